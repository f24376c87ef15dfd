//! Whether a client has hung up, although what it sent before is not all read yet (L11).
//!
//! A connection whose limits are used up leaves requests unread. If its client hangs up meanwhile and goes on over a new
//! connection, those requests are of the past: carried out late, they would land on newer data. So whoever has had to
//! wait looks here before it takes the next request. A client that only shuts down its sending side gets all its replies
//! as long as its requests stay within the limits.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// A look at the other end of a connection.
#[derive(Debug)]
pub(super) struct HangUp(Option<OwnedFd>);

impl HangUp {
    /// Watches this stream's socket. Without a descriptor to spare nothing is ever seen.
    pub(super) fn of(stream: &impl AsFd) -> Self {
        Self(stream.as_fd().try_clone_to_owned().ok())
    }

    /// Whether the client has closed, or at least will send no more.
    pub(super) fn is_seen(&self) -> bool {
        let Some(socket) = &self.0 else { return false };
        let mut asked = [PollFd::new(socket, PollFlags::RDHUP)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut asked, Some(&now)).is_ok_and(|ready| ready > 0)
    }
}
