//! Replies on their way to the client: gathered, sent many at a time, each holding its share of the limits until sent.
//!
//! Promises: every accepted request is answered exactly once, also when the code that serves it dies; a client that does
//! not take its replies costs what its limits allow and is dropped after [`Limits::stalled`](super::Limits::stalled).
//! Must never: queue without bound. Every reply holds a [`Slot`] until it is sent, and a connection has so many of them.
//!
//! The reader and the writer of a connection are two halves of one task. What the reader answers itself wakes nobody: the
//! writer has its turn when the reader next waits. What another thread answers wakes the task.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::task::{Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::errno::Errno;
use super::limits::{Bites, Limits};
use super::reply::{Asked, Frames, Outcome};

/// How many stretches of memory one write takes at most; far below the system's 1024, and it lives on the stack.
const GATHERED_SLICES: usize = 64;
/// Once this many bytes are gathered the reader lets the writer go first.
const GATHERED_BYTES: usize = 256 << 10;

/// The replies of one connection, and what it has left of its limits.
#[derive(Debug)]
pub(super) struct Outbox {
    requests: Semaphore,
    allowance: Semaphore,
    connection: Semaphore,
    shared: Arc<Semaphore>,
    limits: Limits,
    line: Mutex<Line>,
}

/// Replies that wait for the writer.
#[derive(Debug, Default)]
struct Line {
    frames: Frames,
    /// Memory to gather the next ones in while these are sent.
    spare: Frames,
    /// What these replies hold of the limits.
    held: Share,
    /// Requests that are not answered yet.
    owed: usize,
    /// No more requests are taken.
    closed: bool,
    /// The client gets no more replies.
    gone: bool,
    /// The reader waits for nothing but that the writer has had its turn.
    reader_let_go_first: bool,
    writer: Option<Waker>,
}

/// Parts of the limits, as permits of the semaphores of the same names.
#[derive(Debug, Default)]
struct Share {
    requests: usize,
    allowance: usize,
    connection: usize,
    shared: usize,
}

impl Share {
    fn add(&mut self, other: Self) {
        self.requests += other.requests;
        self.allowance += other.allowance;
        self.connection += other.connection;
        self.shared += other.shared;
    }
}

/// A request's share of the limits; given back when it is dropped, or else when its reply was sent.
#[derive(Debug)]
pub(super) struct Slot {
    share: Share,
    outbox: Arc<Outbox>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.outbox.give_back(std::mem::take(&mut self.share));
    }
}

/// Whether a request had to wait for its share.
#[derive(Debug, Clone, Copy)]
pub(super) struct Waited(pub(super) bool);

impl Outbox {
    pub(super) fn new(limits: Limits, shared: Arc<Semaphore>) -> Arc<Self> {
        Arc::new(Self {
            requests: Semaphore::new(limits.requests),
            allowance: Semaphore::new(limits.allowance_bytes),
            connection: Semaphore::new(limits.connection_bytes),
            shared,
            limits,
            line: Mutex::default(),
        })
    }

    /// Waits until a request of `bytes` fits, and says whether it had to. While it waits nothing more is read from the
    /// client.
    pub(super) async fn slot(self: &Arc<Self>, bytes: usize, bites: &Bites) -> Option<(Slot, Waited)> {
        let mut slot = Slot { share: Share::default(), outbox: Arc::clone(self) };
        let mut waited = Waited(false);
        match self.requests.try_acquire() {
            Ok(permit) => permit.forget(),
            Err(_) => {
                bites.requests.log("a connection has all its requests in flight: reading from it waits");
                waited = Waited(true);
                self.requests.acquire().await.ok()?.forget();
            }
        }
        slot.share.requests = 1;
        if bytes == 0 {
            return Some((slot, waited));
        }
        if bytes <= self.limits.allowance_bytes
            && let Ok(permit) = self.allowance.try_acquire_many(permits(bytes))
        {
            permit.forget();
            slot.share.allowance = bytes;
            return Some((slot, waited));
        }
        let wanted = bytes.min(self.limits.connection_bytes);
        let (permit, of_own) = acquire(&self.connection, wanted, bites).await?;
        permit.forget();
        slot.share.connection = wanted;
        let wanted = bytes.min(self.limits.shared_bytes);
        let (permit, of_all) = acquire(&self.shared, wanted, bites).await?;
        permit.forget();
        slot.share.shared = wanted;
        Some((slot, Waited(waited.0 || of_own.0 || of_all.0)))
    }

    fn give_back(&self, share: Share) {
        let give = |to: &Semaphore, permits| {
            if permits > 0 {
                to.add_permits(permits);
            }
        };
        give(&self.requests, share.requests);
        give(&self.allowance, share.allowance);
        give(&self.connection, share.connection);
        give(&self.shared, share.shared);
    }

    /// Waits until every slot has been given back.
    pub(super) async fn all_back(&self) {
        let _ = self.requests.acquire_many(permits(self.limits.requests)).await;
    }

    /// A request that will be answered by its ticket.
    pub(super) fn ticket(asked: Asked, slot: Slot) -> Ticket {
        slot.outbox.line.lock().owed += 1;
        Ticket { asked, slot: Some(slot) }
    }

    /// Answers a READ of `len` bytes with what `read` puts into its reply, if it does; else gives the slot back to the
    /// caller. To be called by the connection's own task.
    pub(super) fn read_at_once(
        asked: Asked,
        slot: Slot,
        len: usize,
        whole: bool,
        read: impl FnOnce(&mut [u8]) -> bool,
    ) -> Result<(), Slot> {
        let mut slot = slot;
        let read = {
            let line = &mut *slot.outbox.line.lock();
            let read = asked.encode_read(len, whole, &mut line.frames, read);
            if read {
                line.held.add(std::mem::take(&mut slot.share));
            }
            read
        };
        if read { Ok(()) } else { Err(slot) }
    }

    /// Answers a request. To be called by the connection's own task.
    pub(super) fn answer_at_once(asked: Asked, slot: Slot, outcome: Outcome) {
        let mut slot = slot;
        let line = &mut *slot.outbox.line.lock();
        asked.encode(outcome, &mut line.frames);
        line.held.add(std::mem::take(&mut slot.share));
    }

    /// Whether the reader should let the writer go first.
    pub(super) fn is_full(&self) -> bool {
        self.line.lock().frames.bytes() >= GATHERED_BYTES
    }

    /// Lets the other half of the task go on, once. To be called by the reader.
    pub(super) async fn let_writer_go_first(&self) {
        let mut asked = false;
        poll_fn(|_| {
            if std::mem::replace(&mut asked, true) {
                return Poll::Ready(());
            }
            self.line.lock().reader_let_go_first = true;
            Poll::Pending
        })
        .await;
    }

    /// Whether the reader is to be polled again after the writer, though nothing wakes it.
    pub(super) fn reader_let_go_first(&self) -> bool {
        std::mem::take(&mut self.line.lock().reader_let_go_first)
    }

    /// No more requests are taken: once all are answered the writer is done.
    pub(super) fn close(&self) {
        self.line.lock().closed = true;
    }

    /// The client gets no more replies: what is still to come is thrown away.
    pub(super) fn abandon(&self) {
        let held = {
            let line = &mut *self.line.lock();
            line.gone = true;
            line.frames.clear();
            std::mem::take(&mut line.held)
        };
        self.give_back(held);
    }

    /// Gives memory back that a client needed which now is silent.
    pub(super) fn shrink(&self) {
        let line = &mut *self.line.lock();
        line.spare = Frames::default();
        if line.frames.is_empty() {
            line.frames = Frames::default();
        }
    }

    /// Waits for replies; `None` once there will be none any more.
    async fn next(&self) -> Option<Sending<'_>> {
        poll_fn(|context| {
            let line = &mut *self.line.lock();
            if !line.frames.is_empty() {
                let frames = std::mem::replace(&mut line.frames, std::mem::take(&mut line.spare));
                let share = std::mem::take(&mut line.held);
                return Poll::Ready(Some(Sending { frames, share, outbox: self }));
            }
            if line.closed && line.owed == 0 {
                return Poll::Ready(None);
            }
            match &mut line.writer {
                Some(writer) => writer.clone_from(context.waker()),
                none => *none = Some(context.waker().clone()),
            }
            Poll::Pending
        })
        .await
    }
}

/// Replies that were never sent hold a part of what all connections share.
impl Drop for Outbox {
    fn drop(&mut self) {
        let held = std::mem::take(&mut self.line.get_mut().held);
        self.give_back(held);
    }
}

/// Replies being sent, and what they hold of the limits; it is given back when they are dropped.
struct Sending<'a> {
    frames: Frames,
    share: Share,
    outbox: &'a Outbox,
}

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        let mut frames = std::mem::take(&mut self.frames);
        frames.clear();
        self.outbox.give_back(std::mem::take(&mut self.share));
        self.outbox.line.lock().spare = frames;
    }
}

fn permits(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

async fn acquire<'a>(from: &'a Semaphore, wanted: usize, bites: &Bites) -> Option<(SemaphorePermit<'a>, Waited)> {
    if let Ok(permit) = from.try_acquire_many(permits(wanted)) {
        return Some((permit, Waited(false)));
    }
    bites.bytes.log("the payload bytes in flight have reached their limit: reading from clients waits");
    Some((from.acquire_many(permits(wanted)).await.ok()?, Waited(true)))
}

/// An accepted request that has not been answered.
#[derive(Debug)]
pub(super) struct Ticket {
    asked: Asked,
    /// `None` once answered.
    slot: Option<Slot>,
}

impl Ticket {
    pub(super) fn answer(mut self, outcome: Outcome) {
        self.send(outcome);
    }

    fn send(&mut self, outcome: Outcome) {
        let Some(mut slot) = self.slot.take() else { return };
        // Looking for holes in a long read takes its time, so not under the lock.
        let mut frames = Frames::default();
        self.asked.encode(outcome, &mut frames);
        let writer = {
            let line = &mut *slot.outbox.line.lock();
            line.owed -= 1;
            if !line.gone {
                line.frames.append(frames);
                line.held.add(std::mem::take(&mut slot.share));
            }
            line.writer.take()
        };
        if let Some(writer) = writer {
            writer.wake();
        }
    }
}

/// The code that served it died: the client still gets its reply.
impl Drop for Ticket {
    fn drop(&mut self) {
        self.send(Outcome::Failed { errno: Errno::Io, text: "the request was dropped: see the server's log".into() });
    }
}

/// Sends replies until the outbox is closed and every request is answered.
///
/// # Errors
/// The connection's, or [`io::ErrorKind::TimedOut`] if the client does not take what it asked for.
pub(super) async fn send_all<W: AsyncWrite + Unpin>(
    writer: &mut W,
    outbox: &Outbox,
    stalled: Duration,
) -> io::Result<()> {
    while let Some(sending) = outbox.next().await {
        send(writer, &sending.frames, stalled).await?;
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

    fn outbox(limits: Limits) -> Arc<Outbox> {
        Outbox::new(limits, Arc::new(Semaphore::new(limits.shared_bytes)))
    }

    #[tokio::test]
    async fn replies_arrive_whole_however_small_the_pieces_the_client_takes() {
        let outbox = outbox(Limits::default());
        let mut expected = Vec::new();
        for cookie in 0..200u64 {
            let bytes: Vec<u8> = (0..cookie * 7).map(|i| u8::try_from(i % 251).unwrap()).collect();
            expected.extend_from_slice(&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
            expected.extend_from_slice(&cookie.to_be_bytes());
            expected.extend_from_slice(&bytes);
            let (slot, _) = outbox.slot(bytes.len(), &Bites::default()).await.unwrap();
            let data = Outcome::Data { bytes: bytes.into(), whole: false };
            // From another thread and from the connection's own, in turn.
            match cookie % 2 {
                0 => Outbox::ticket(asked(cookie), slot).answer(data),
                _ => Outbox::answer_at_once(asked(cookie), slot, data),
            }
        }
        outbox.close();
        let (mut ours, mut theirs) = tokio::io::duplex(13);
        let from = Arc::clone(&outbox);
        let sender = tokio::spawn(async move { send_all(&mut ours, &from, Duration::from_secs(5)).await });
        let mut got = Vec::new();
        theirs.read_to_end(&mut got).await.unwrap();
        sender.await.unwrap().unwrap();
        assert!(got == expected);
        tokio::time::timeout(Duration::from_secs(1), outbox.all_back()).await.expect("every slot came back");
    }

    #[tokio::test]
    async fn a_ticket_that_is_dropped_unanswered_answers_eio() {
        let outbox = outbox(Limits::default());
        let (slot, _) = outbox.slot(0, &Bites::default()).await.unwrap();
        drop(Outbox::ticket(asked(1), slot));
        let sending = outbox.next().await.unwrap();
        let sent: Vec<u8> = sending.frames.slices().flatten().copied().collect();
        assert_eq!(sent, [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 1]);
    }

    #[tokio::test]
    async fn small_requests_go_on_when_others_have_used_up_what_is_shared() {
        let limits = Limits { shared_bytes: 1 << 20, ..Limits::default() };
        let shared = Arc::new(Semaphore::new(limits.shared_bytes));
        let (greedy, modest) = (Outbox::new(limits, Arc::clone(&shared)), Outbox::new(limits, shared));
        let bites = Bites::default();
        let _held = greedy.slot(1 << 20, &bites).await.unwrap();
        let soon = Duration::from_millis(50);
        assert!(tokio::time::timeout(soon, modest.slot(1 << 20, &bites)).await.is_err());
        assert!(tokio::time::timeout(soon, modest.slot(4096, &bites)).await.is_ok());
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_is_given_up_after_the_deadline() {
        let outbox = outbox(Limits::default());
        let (slot, _) = outbox.slot(0, &Bites::default()).await.unwrap();
        let late = Outbox::ticket(asked(2), outbox.slot(0, &Bites::default()).await.unwrap().0);
        Outbox::ticket(asked(1), slot).answer(Outcome::Data { bytes: vec![1; 4096].into(), whole: false });
        let (mut ours, _theirs) = tokio::io::duplex(16);
        let error = send_all(&mut ours, &outbox, Duration::from_millis(20)).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        outbox.abandon();
        late.answer(Outcome::Done);
        tokio::time::timeout(Duration::from_secs(1), outbox.all_back()).await.expect("every slot came back");
    }

    #[tokio::test]
    async fn replies_that_are_never_sent_give_back_what_all_share() {
        let limits = Limits::default();
        let shared = Arc::new(Semaphore::new(limits.shared_bytes));
        let outbox = Outbox::new(limits, Arc::clone(&shared));
        let (slot, _) = outbox.slot(1 << 20, &Bites::default()).await.unwrap();
        Outbox::answer_at_once(asked(1), slot, Outcome::Done);
        assert!(shared.available_permits() < limits.shared_bytes);
        drop(outbox);
        assert_eq!(shared.available_permits(), limits.shared_bytes);
    }
}
