//! Replies on their way to the client: gathered, sent many at a time, each holding its share of the limits until sent.
//!
//! Promises: every accepted request is answered exactly once, also when the code that serves it dies; a client that does
//! not take its replies costs what its limits allow and is dropped after [`Limits::stalled`](super::Limits::stalled).
//! Must never: queue without bound. Every reply holds a [`Slot`] until it is sent, and a connection has so many of them.
//!
//! The reader and the writer of a connection are two halves of one task. What the reader answers itself wakes nobody: the
//! writer has its turn when the reader next waits. What another thread answers wakes the task; but a short reply that is
//! the only one owed is sent by that thread itself, if nothing is being sent: a client that waits for a flush shall not
//! wait for one more change of threads.

use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::sync::Arc;
use std::task::{Poll, Waker};

use parking_lot::Mutex;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{Semaphore, SemaphorePermit};

use super::errno::Errno;
use super::limits::{Bites, Limits};
use super::pool::Pool;
use super::reply::{Asked, Frames, Outcome};
use super::shares::Account;
use super::socket::Socket;

/// How many stretches of memory one write takes at most; far below the system's 1024, and it lives on the stack.
const GATHERED_SLICES: usize = 64;
/// What the log says of a request that waits for memory.
const BYTES_WAIT: &str = "the payload bytes in flight have reached their limit: reading from clients waits";
/// Once this many bytes are gathered the reader lets the writer go first.
const GATHERED_BYTES: usize = 256 << 10;

/// The replies of one connection, and what it has left of its limits.
#[derive(Debug)]
pub(super) struct Outbox {
    requests: Semaphore,
    allowance: Semaphore,
    connection: Semaphore,
    account: Arc<Account>,
    limits: Limits,
    socket: Socket,
    pool: Arc<Pool>,
    line: Mutex<Line>,
}

/// Replies that wait for the writer.
#[derive(Debug)]
struct Line {
    frames: Frames,
    /// What these replies hold of the limits.
    held: Share,
    /// Requests that are not answered yet.
    owed: usize,
    /// The writer is sending, or has failed to.
    sending: bool,
    /// No more requests are taken.
    closed: bool,
    /// The client gets no more replies.
    gone: bool,
    /// The reader waits for nothing but that the writer has had its turn.
    reader_let_go_first: bool,
    writer: Option<Waker>,
}

impl Line {
    fn new(pool: &Arc<Pool>) -> Self {
        Self {
            frames: Frames::new(pool),
            held: Share::default(),
            owed: 0,
            sending: false,
            closed: false,
            gone: false,
            reader_let_go_first: false,
            writer: None,
        }
    }

    /// Whether nothing is being sent or will be, but for what is put here next, and nobody waits for the end.
    fn is_idle(&self) -> bool {
        self.owed == 0 && self.frames.is_empty() && !(self.sending || self.closed || self.gone)
    }
}

/// Parts of the limits: permits of the semaphores of the same names, and shared memory of the account.
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
    pub(super) fn new(limits: Limits, account: Arc<Account>, socket: Socket, pool: Arc<Pool>) -> Arc<Self> {
        Arc::new(Self {
            requests: Semaphore::new(limits.requests),
            allowance: Semaphore::new(limits.allowance_bytes),
            connection: Semaphore::new(limits.connection_bytes),
            account,
            limits,
            socket,
            line: Mutex::new(Line::new(&pool)),
            pool,
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
                bites.requests.note_wait("a connection has all its requests in flight: reading from it waits");
                waited = Waited(true);
                self.requests.acquire().await.ok()?.forget();
            }
        }
        slot.share.requests = 1;
        if bytes == 0 {
            return Some((slot, waited));
        }
        let small = bytes <= self.limits.allowance_bytes;
        if small && let Ok(permit) = self.allowance.try_acquire_many(permits(bytes)) {
            permit.forget();
            slot.share.allowance = bytes;
            return Some((slot, waited));
        }
        // Whichever comes first: others may keep what is shared for as long as they like.
        tokio::select! {
            biased;
            taken = self.beyond_allowance(bytes, bites, &mut waited) => slot.share.add(taken?),
            permit = self.allowance.acquire_many(permits(bytes)), if small => {
                permit.ok()?.forget();
                slot.share.allowance = bytes;
            }
        }
        Some((slot, waited))
    }

    /// A share of what the connection and all of them have beyond its allowance.
    async fn beyond_allowance(&self, bytes: usize, bites: &Bites, waited: &mut Waited) -> Option<Share> {
        let connection = bytes.min(self.limits.connection_bytes);
        let of_own = acquire(&self.connection, connection, bites, waited).await?;
        let shared = bytes.min(self.limits.shared_bytes);
        if !self.account.try_take(shared) {
            bites.bytes.note_wait(BYTES_WAIT);
            *waited = Waited(true);
            self.account.take(shared).await;
        }
        of_own.forget();
        Some(Share { connection, shared, ..Share::default() })
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
        if share.shared > 0 {
            self.account.give_back(share.shared);
        }
    }

    /// Whether the client has closed, or at least will send no more.
    pub(super) fn client_has_hung_up(&self) -> bool {
        self.socket.has_hung_up()
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

    /// Waits for replies, and puts them into `frames`, which holds none; `None` once there will be none any more.
    async fn next<'a>(&'a self, frames: &'a mut Frames) -> Option<Sending<'a>> {
        let share = poll_fn(|context| {
            let line = &mut *self.line.lock();
            line.sending = !line.frames.is_empty();
            if line.sending {
                std::mem::swap(&mut line.frames, frames);
                return Poll::Ready(Some(std::mem::take(&mut line.held)));
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
        .await?;
        Some(Sending { frames, share, outbox: self })
    }
}

/// Replies that were never sent hold a part of what all connections share.
impl Drop for Outbox {
    fn drop(&mut self) {
        let held = std::mem::take(&mut self.line.get_mut().held);
        self.give_back(held);
    }
}

/// Replies being sent, and what they hold of the limits; when this is dropped their memory is given back, and then that.
struct Sending<'a> {
    frames: &'a mut Frames,
    share: Share,
    outbox: &'a Outbox,
}

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        self.frames.clear();
        self.outbox.give_back(std::mem::take(&mut self.share));
    }
}

fn permits(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

async fn acquire<'a>(
    from: &'a Semaphore,
    wanted: usize,
    bites: &Bites,
    waited: &mut Waited,
) -> Option<SemaphorePermit<'a>> {
    if let Ok(permit) = from.try_acquire_many(permits(wanted)) {
        return Some(permit);
    }
    bites.bytes.note_wait(BYTES_WAIT);
    *waited = Waited(true);
    from.acquire_many(permits(wanted)).await.ok()
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
        let mut frames = Frames::new(&slot.outbox.pool);
        self.asked.encode(outcome, &mut frames);
        let writer = {
            let line = &mut *slot.outbox.line.lock();
            line.owed -= 1;
            if line.is_idle() {
                let sent = slot.outbox.socket.send_now(frames.only_head());
                frames.drop_front(sent);
                if frames.is_empty() {
                    return;
                }
            }
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
pub(super) async fn send_all<W: AsyncWrite + Unpin>(writer: &mut W, outbox: &Outbox) -> io::Result<()> {
    let mut frames = Frames::new(&outbox.pool);
    while let Some(sending) = outbox.next(&mut frames).await {
        send(writer, sending.frames, &outbox.account).await?;
    }
    Ok(())
}

async fn send<W: AsyncWrite + Unpin>(writer: &mut W, frames: &Frames, account: &Account) -> io::Result<()> {
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
        let write = account.client(writer.write_vectored(&slices[..count]));
        let mut written = write.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        account.moved(written);
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
    account.client(writer.flush()).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

#[cfg(test)]
mod tests;
