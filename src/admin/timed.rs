//! A connection whose client must take what it is sent. One that asks and never reads would hold its slot for ever, and a
//! stop would wait for it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

/// A stream whose writes fail once one has waited for longer than a limit without a byte of progress. As long as nothing is
/// written, no time counts: a client may wait for an answer as long as that takes.
#[derive(Debug)]
pub(super) struct TimedWrites<S> {
    stream: S,
    limit: Duration,
    /// There while a write waits.
    deadline: Option<Pin<Box<Sleep>>>,
}

impl<S> TimedWrites<S> {
    pub(super) fn new(stream: S, limit: Duration) -> Self {
        Self { stream, limit, deadline: None }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for TimedWrites<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for TimedWrites<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if let Poll::Ready(written) = Pin::new(&mut self.stream).poll_write(context, buf) {
            self.deadline = None;
            return Poll::Ready(written);
        }
        let limit = self.limit;
        let deadline = self.deadline.get_or_insert_with(|| Box::pin(sleep(limit)));
        ready!(deadline.as_mut().poll(context));
        let late = format!("nothing of an answer was taken for {limit:?}");
        Poll::Ready(Err(io::Error::new(io::ErrorKind::TimedOut, late)))
    }

    // Sockets have nothing to flush, and do not wait when they are shut down.
    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
    use tokio::time::Instant;

    use super::*;

    const LIMIT: Duration = Duration::from_secs(10);

    #[tokio::test(start_paused = true)]
    async fn a_write_that_nobody_takes_fails_at_the_limit() {
        let (_client, server) = duplex(4);
        let mut server = TimedWrites::new(server, LIMIT);
        let started = Instant::now();
        let failed = server.write_all(b"answer").await.unwrap_err();
        assert_eq!((failed.kind(), started.elapsed().as_secs()), (io::ErrorKind::TimedOut, 10));
    }

    #[tokio::test(start_paused = true)]
    async fn a_slow_reader_and_a_long_silence_are_waited_for() {
        let (mut client, server) = duplex(1);
        let mut server = TimedWrites::new(server, LIMIT);
        let reader = tokio::spawn(async move {
            let mut read = Vec::new();
            for _ in 0..6 {
                sleep(LIMIT - Duration::from_secs(1)).await;
                read.push(client.read_u8().await.unwrap());
            }
            read
        });
        server.write_all(b"ans").await.unwrap();
        sleep(LIMIT * 1000).await;
        server.write_all(b"wer").await.unwrap();
        assert_eq!(reader.await.unwrap(), b"answer");
    }
}
