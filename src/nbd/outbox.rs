//! Replies on their way to the client: gathered, sent many at a time, each holding its share of the limits until sent.
//!
//! Promises: every accepted request is answered exactly once, also when the code that serves it dies; a client that does
//! not take its replies costs what its limits allow and is dropped after [`Limits::stalled`](super::Limits::stalled).
//! Must never: queue without bound. Every reply holds a [`Slot`], and there are as many places as slots.

use std::io::{self, IoSlice};
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::errno::Errno;
use super::limits::{Bites, Limits};
use super::reply::{Asked, Frames, Outcome};

/// How many replies one write gathers at most.
const GATHERED_REPLIES: usize = 64;
/// How many stretches of memory one write takes at most; far below the system's 1024, and it lives on the stack.
const GATHERED_SLICES: usize = 64;

/// What a connection has left of its limits.
#[derive(Debug)]
pub(super) struct Budget {
    requests: Arc<Semaphore>,
    allowance: Arc<Semaphore>,
    connection: Arc<Semaphore>,
    shared: Arc<Semaphore>,
    limits: Limits,
}

/// A request's share of the limits; given back when it is dropped.
#[derive(Debug)]
pub(super) struct Slot {
    _permits: [Option<OwnedSemaphorePermit>; 3],
}

/// Whether a request had to wait for its share.
#[derive(Debug, Clone, Copy)]
pub(super) struct Waited(pub(super) bool);

impl Budget {
    pub(super) fn new(limits: Limits, shared: Arc<Semaphore>) -> Self {
        let semaphore = |permits| Arc::new(Semaphore::new(permits));
        Self {
            requests: semaphore(limits.requests),
            allowance: semaphore(limits.allowance_bytes),
            connection: semaphore(limits.connection_bytes),
            shared,
            limits,
        }
    }

    /// Waits until a request of `bytes` fits, and says whether it had to. While it waits nothing more is read from the
    /// client.
    pub(super) async fn slot(&self, bytes: usize, bites: &Bites) -> Option<(Slot, Waited)> {
        let (request, waited) = match Arc::clone(&self.requests).try_acquire_owned() {
            Ok(permit) => (permit, Waited(false)),
            Err(_) => {
                bites.requests.log("a connection has all its requests in flight: reading from it waits");
                (Arc::clone(&self.requests).acquire_owned().await.ok()?, Waited(true))
            }
        };
        if bytes == 0 {
            return Some((Slot { _permits: [Some(request), None, None] }, waited));
        }
        let wanted = |of: usize| u32::try_from(bytes.min(of)).unwrap_or(u32::MAX);
        if bytes <= self.limits.allowance_bytes
            && let Ok(own) = Arc::clone(&self.allowance).try_acquire_many_owned(wanted(bytes))
        {
            return Some((Slot { _permits: [Some(request), Some(own), None] }, waited));
        }
        let (connection, of_own) = acquire(&self.connection, wanted(self.limits.connection_bytes), bites).await?;
        let (shared, of_all) = acquire(&self.shared, wanted(self.limits.shared_bytes), bites).await?;
        let waited = Waited(waited.0 || of_own.0 || of_all.0);
        Some((Slot { _permits: [Some(request), Some(connection), Some(shared)] }, waited))
    }

    /// Waits until every slot has been given back.
    pub(super) async fn all_back(&self) {
        let all = u32::try_from(self.limits.requests).unwrap_or(u32::MAX);
        let _ = self.requests.acquire_many(all).await;
    }
}

async fn acquire(from: &Arc<Semaphore>, permits: u32, bites: &Bites) -> Option<(OwnedSemaphorePermit, Waited)> {
    if let Ok(permit) = Arc::clone(from).try_acquire_many_owned(permits) {
        return Some((permit, Waited(false)));
    }
    bites.bytes.log("the payload bytes in flight have reached their limit: reading from clients waits");
    Some((Arc::clone(from).acquire_many_owned(permits).await.ok()?, Waited(true)))
}

/// A reply with its share of the limits, kept until it is sent.
#[derive(Debug)]
pub(super) struct Reply {
    asked: Asked,
    outcome: Outcome,
    slot: Slot,
}

/// An accepted request that has not been answered.
#[derive(Debug)]
pub(super) struct Ticket {
    asked: Asked,
    /// `None` once answered.
    slot: Option<Slot>,
    outbox: mpsc::Sender<Reply>,
}

impl Ticket {
    pub(super) fn new(asked: Asked, slot: Slot, outbox: mpsc::Sender<Reply>) -> Self {
        Self { asked, slot: Some(slot), outbox }
    }

    pub(super) fn answer(mut self, outcome: Outcome) {
        self.send(outcome);
    }

    fn send(&mut self, outcome: Outcome) {
        if let Some(slot) = self.slot.take() {
            // There is a place for each slot, so it fails only if the connection is gone, and then nobody waits for it.
            let _ = self.outbox.try_send(Reply { asked: self.asked, outcome, slot });
        }
    }
}

/// The code that served it died: the client still gets its reply.
impl Drop for Ticket {
    fn drop(&mut self) {
        self.send(Outcome::Failed { errno: Errno::Io, text: "the request was dropped: see the server's log".into() });
    }
}

/// Sends replies until every sender is gone.
///
/// # Errors
/// The connection's, or [`io::ErrorKind::TimedOut`] if the client does not take what it asked for.
pub(super) async fn send_all<W: AsyncWrite + Unpin>(
    writer: &mut W,
    mut replies: mpsc::Receiver<Reply>,
    stalled: Duration,
) -> io::Result<()> {
    let mut batch = Vec::with_capacity(GATHERED_REPLIES);
    let mut slots = Vec::with_capacity(GATHERED_REPLIES);
    let mut frames = Frames::default();
    while replies.recv_many(&mut batch, GATHERED_REPLIES).await > 0 {
        for Reply { asked, outcome, slot } in batch.drain(..) {
            asked.encode(outcome, &mut frames);
            slots.push(slot);
        }
        send(writer, &frames, stalled).await?;
        frames.clear();
        slots.clear();
    }
    Ok(())
}

async fn send<W: AsyncWrite + Unpin>(writer: &mut W, frames: &Frames, stalled: Duration) -> io::Result<()> {
    let mut left = frames.slices().peekable();
    // How much of the first slice left has been sent.
    let mut sent = 0;
    while left.peek().is_some() {
        let mut slices = [IoSlice::new(&[]); GATHERED_SLICES];
        let mut count = 0;
        for (i, (slot, slice)) in slices.iter_mut().zip(left.clone()).enumerate() {
            *slot = IoSlice::new(if i == 0 { &slice[sent..] } else { slice });
            count = i + 1;
        }
        let write = tokio::time::timeout(stalled, writer.write_vectored(&slices[..count]));
        let mut written = write.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        while let Some(slice) = left.peek() {
            let rest = slice.len() - sent;
            if written < rest {
                sent += written;
                break;
            }
            written -= rest;
            sent = 0;
            left.next();
        }
    }
    // A stream that buffers (TLS) hands on what it holds.
    tokio::time::timeout(stalled, writer.flush()).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::wire::{Mode, Request};
    use tokio::io::AsyncReadExt;

    fn asked(cookie: u64) -> Asked {
        Asked::new(&Request { flags: 0, kind: 0, cookie, offset: 0, len: 0 }, Mode::Simple)
    }

    fn budget(limits: Limits) -> Budget {
        Budget::new(limits, Arc::new(Semaphore::new(limits.shared_bytes)))
    }

    #[tokio::test]
    async fn replies_arrive_whole_however_small_the_pieces_the_client_takes() {
        let budget = budget(Limits::default());
        let (outbox, replies) = mpsc::channel(256);
        let mut expected = Vec::new();
        for cookie in 0..200u64 {
            let bytes: Vec<u8> = (0..cookie * 7).map(|i| u8::try_from(i % 251).unwrap()).collect();
            expected.extend_from_slice(&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
            expected.extend_from_slice(&cookie.to_be_bytes());
            expected.extend_from_slice(&bytes);
            let (slot, _) = budget.slot(bytes.len(), &Bites::default()).await.unwrap();
            let ticket = Ticket::new(asked(cookie), slot, outbox.clone());
            ticket.answer(Outcome::Data { bytes: bytes.into(), whole: false });
        }
        drop(outbox);
        let (mut ours, mut theirs) = tokio::io::duplex(13);
        let sender = tokio::spawn(async move { send_all(&mut ours, replies, Duration::from_secs(5)).await });
        let mut got = Vec::new();
        theirs.read_to_end(&mut got).await.unwrap();
        sender.await.unwrap().unwrap();
        assert!(got == expected);
        tokio::time::timeout(Duration::from_secs(1), budget.all_back()).await.expect("every slot came back");
    }

    #[tokio::test]
    async fn a_ticket_that_is_dropped_unanswered_answers_eio() {
        let (outbox, mut replies) = mpsc::channel(1);
        let (slot, _) = budget(Limits::default()).slot(0, &Bites::default()).await.unwrap();
        drop(Ticket::new(asked(1), slot, outbox));
        assert!(matches!(replies.recv().await.unwrap().outcome, Outcome::Failed { errno: Errno::Io, .. }));
    }

    #[tokio::test]
    async fn small_requests_go_on_when_others_have_used_up_what_is_shared() {
        let limits = Limits { shared_bytes: 1 << 20, ..Limits::default() };
        let shared = Arc::new(Semaphore::new(limits.shared_bytes));
        let (greedy, modest) = (Budget::new(limits, Arc::clone(&shared)), Budget::new(limits, shared));
        let bites = Bites::default();
        let _held = greedy.slot(1 << 20, &bites).await.unwrap();
        let soon = Duration::from_millis(50);
        assert!(tokio::time::timeout(soon, modest.slot(1 << 20, &bites)).await.is_err());
        assert!(tokio::time::timeout(soon, modest.slot(4096, &bites)).await.is_ok());
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_is_given_up_after_the_deadline() {
        let (outbox, replies) = mpsc::channel(1);
        let (slot, _) = budget(Limits::default()).slot(0, &Bites::default()).await.unwrap();
        Ticket::new(asked(1), slot, outbox).answer(Outcome::Data { bytes: vec![1; 4096].into(), whole: false });
        let (mut ours, _theirs) = tokio::io::duplex(16);
        let error = send_all(&mut ours, replies, Duration::from_millis(20)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    }
}
