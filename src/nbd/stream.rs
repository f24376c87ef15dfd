//! A client's socket as a stream of bytes. Whoever polls the connection does the waiting.
//!
//! A receive that finds nothing and a send that finds no room note it in [`Wants`] and return; what waits for the socket is
//! the [`driver`](super::driver), since it alone knows whether a thread or the runtime polls the connection.
//!
//! Promises: after a receive that took all there was, replies go first: a client gets them while it still prepares its next
//! requests. Only after one that brought little the next one has a look at once, since what comes one by one shall not be
//! answered one by one.
//! Must never: block the thread.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, ready};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::{RecvFlags, SendAncillaryBuffer, SendFlags, Shutdown, recv, sendmsg, shutdown};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::task::coop;

use super::socket::Socket;

/// As much memory that was never used is made ready for a receive, in bytes: a payload that is only announced shall cost no
/// more.
const FRESH_BYTES: usize = 128 << 10;
/// A receive brought little if it brought fewer bytes than this.
const LITTLE_BYTES: usize = 4 << 10;

/// What a connection noted about its socket while it was polled. Only the thread that polls it reads and writes this.
#[derive(Debug, Default)]
pub(super) struct Wants {
    /// A receive found nothing.
    pub(super) readable: Flag,
    /// A send found no room, or was not tried since there was none.
    pub(super) writable: Flag,
    /// The last send found no room, and none has been made since. Without this a send would be tried whenever the connection is
    /// polled, and a buffer that takes a few bytes more would pass for a client that takes its replies.
    pub(super) full: Flag,
    /// A receive was put off, for what is to be sent to go first: poll again.
    pub(super) put_off: Flag,
    /// Something was received.
    pub(super) received: Flag,
    /// The next receive is to be put off: the last one took all there was.
    drained: Flag,
    /// The last receive brought little, and the one before did not.
    little: Flag,
}

/// A mark that one thread makes and takes.
#[derive(Debug, Default)]
pub(super) struct Flag(AtomicBool);

impl Flag {
    fn set(&self, to: bool) {
        self.0.store(to, Ordering::Relaxed);
    }

    fn is_set(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    /// Whether it was set; it is not any more.
    pub(super) fn take(&self) -> bool {
        let set = self.is_set();
        self.set(false);
        set
    }
}

/// A connected socket. One for each connection: two would take each other's notes.
#[derive(Debug)]
pub(super) struct Stream {
    socket: Arc<OwnedFd>,
    wants: Arc<Wants>,
}

impl Stream {
    pub(super) fn new(socket: Arc<OwnedFd>, wants: Arc<Wants>) -> Self {
        Self { socket, wants }
    }

    /// The socket under it.
    pub(super) fn socket(&self) -> Socket {
        Socket::plain(Arc::clone(&self.socket))
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let wants = &self.wants;
        if wants.drained.take() {
            wants.put_off.set(true);
            return Poll::Pending;
        }
        // On the runtime, a client that sends without end shall not keep others from their turn.
        let turn = ready!(coop::poll_proceed(context));
        let used_before = buf.initialized().len() - buf.filled().len();
        let room = buf.remaining().min(used_before.max(FRESH_BYTES));
        match retry_on_intr(|| recv(&*self.socket, buf.initialize_unfilled_to(room), RecvFlags::DONTWAIT)) {
            Ok((got, _)) => {
                buf.advance(got);
                let first_little = got < LITTLE_BYTES && !wants.little.take();
                wants.little.set(first_little);
                wants.drained.set(got > 0 && got < room && !first_little);
                wants.received.set(true);
                turn.made_progress();
                Poll::Ready(Ok(()))
            }
            Err(Errno::AGAIN) => {
                wants.little.set(false);
                wants.readable.set(true);
                Poll::Pending
            }
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(context, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if self.wants.full.is_set() {
            self.wants.writable.set(true);
            return Poll::Pending;
        }
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        match retry_on_intr(|| sendmsg(&*self.socket, slices, &mut SendAncillaryBuffer::default(), flags)) {
            Ok(sent) => Poll::Ready(Ok(sent)),
            Err(Errno::AGAIN) => {
                self.wants.full.set(true);
                self.wants.writable.set(true);
                Poll::Pending
            }
            Err(error) => Poll::Ready(Err(error.into())),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(shutdown(&*self.socket, Shutdown::Write).map_err(Into::into))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    struct Ends {
        stream: Stream,
        wants: Arc<Wants>,
        peer: UnixStream,
    }

    fn ends() -> Ends {
        let (peer, ours) = UnixStream::pair().unwrap();
        let wants = Arc::<Wants>::default();
        Ends { stream: Stream::new(Arc::new(ours.into()), Arc::clone(&wants)), wants, peer }
    }

    /// How much one receive brings, if it brings something.
    fn receive(stream: &mut Stream) -> Option<usize> {
        let mut memory = vec![0; 64 << 10];
        let mut buf = ReadBuf::new(&mut memory);
        let received = Pin::new(stream).poll_read(&mut Context::from_waker(std::task::Waker::noop()), &mut buf);
        received.map(Result::unwrap).is_ready().then(|| buf.filled().len())
    }

    #[test]
    fn after_a_receive_that_took_all_there_was_replies_go_first() {
        let Ends { mut stream, wants, mut peer } = ends();
        peer.write_all(&[1; LITTLE_BYTES]).unwrap();
        assert_eq!(receive(&mut stream), Some(LITTLE_BYTES));
        peer.write_all(&[1]).unwrap();
        assert_eq!(receive(&mut stream), None);
        assert!(wants.put_off.take() && !wants.readable.take());
        assert_eq!(receive(&mut stream), Some(1), "once");
    }

    #[test]
    fn after_one_that_brought_little_the_next_looks_at_once_but_not_the_one_after() {
        let Ends { mut stream, wants, mut peer } = ends();
        for _ in 0..3 {
            for expected in [Some(1), Some(1), None] {
                peer.write_all(&[1]).unwrap();
                assert_eq!(receive(&mut stream), expected);
            }
            assert!(wants.put_off.take());
            assert_eq!(receive(&mut stream), Some(1));
            assert_eq!(receive(&mut stream), None, "the second in a row, which finds nothing");
            assert!(wants.readable.take() && !wants.put_off.take());
        }
    }

    #[test]
    fn a_send_that_found_no_room_is_not_tried_again_before_there_is_some() {
        let Ends { mut stream, wants, mut peer } = ends();
        let send = |stream: &mut Stream| {
            let context = &mut Context::from_waker(std::task::Waker::noop());
            Pin::new(stream).poll_write(context, &[1; 4096]).is_ready()
        };
        while send(&mut stream) {}
        assert!(wants.writable.take());
        peer.read_exact(&mut [0; 64 << 10]).unwrap();
        assert!(!send(&mut stream) && wants.writable.take(), "nobody has said so");
        wants.full.take();
        assert!(send(&mut stream));
    }
}
