//! The socket under a connection, beside its stream: whether the client has hung up, and replies from other threads.
//!
//! *Hung up* (L11): a connection whose limits are used up leaves requests unread. If its client hangs up meanwhile and
//! goes on over a new connection, those requests are of the past: carried out late, they would land on newer data. So
//! whoever has had to wait looks here before it takes the next request. A client that only shuts down its sending side
//! gets all its replies as long as its requests stay within the limits.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendFlags, send};

/// A connection's socket.
#[derive(Debug)]
pub(super) struct Socket {
    fd: Arc<OwnedFd>,
    /// What is sent on it is what the client reads: there is no TLS on top.
    plain: bool,
}

impl Socket {
    /// A socket with nothing on top of it.
    pub(super) fn plain(fd: Arc<OwnedFd>) -> Self {
        Self { fd, plain: true }
    }

    /// The same, under TLS.
    pub(super) fn under_tls(self) -> Self {
        Self { plain: false, ..self }
    }

    /// Whether the client has closed, or at least will send no more.
    pub(super) fn has_hung_up(&self) -> bool {
        let mut asked = [PollFd::new(&*self.fd, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut asked, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// Sends as much of `bytes` as goes without waiting, and says how much that was. Only for who knows that nobody else
    /// is sending. A broken connection takes nothing; its stream will say so.
    pub(super) fn send_now(&self, bytes: &[u8]) -> usize {
        if !self.plain {
            return 0;
        }
        send(&*self.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).unwrap_or(0)
    }
}
