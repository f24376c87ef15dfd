//! Transmission: requests in, validated once, served, answered in any order.
//!
//! Promises: all requests that one receive brought are taken up before the next; what need not wait is served as it is
//! taken up, without another thread (but a long READ with the next request right behind it, if processors are idle); a slow
//! request never holds up those behind it; everything accepted is answered before an orderly close, also to a client that has
//! shut down its sending side; the stream stays in sync after a refused request.
//! Must never: carry out a request that did not arrive whole, or read on while the client's limits are used up.

use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Instant;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;

use super::Shared;
use super::inbox::{DIRECT_PAYLOAD_BYTES, Gone, Inbox};
use super::limits::{ALLOWANCE_BYTES, Limits, MAX_DRAINED_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES};
use super::outbox::{self, Outbox, Slot, Ticket};
use super::pool::{self, Lease};
use super::readers::Reader;
use super::reply::{Asked, Outcome};
use super::request::{self, Attachment, Command, MAX_BLOCK_STATUS_PAYLOAD_BYTES, Refusal};
use super::serve::{self, MAX_EXTENTS, Task};
use super::socket::Socket;
use super::wire::{self, BadMagic, Request, cflag};
use crate::units::ByteRange;
use crate::volume::Volume;

/// The longest READ or WRITE that is served at once, in bytes: copying it takes a fraction of a millisecond, and that is
/// how long the requests behind it wait.
const AT_ONCE_BYTES: usize = pool::BUFFER_BYTES;
/// A READ up to this many bytes is read into the very memory it is sent from, between the headers.
const GATHERED_READ_BYTES: usize = 16 << 10;
/// A READ of this many bytes or more takes longer than handing it to another thread, if there is something else to do.
const ASIDE_READ_BYTES: usize = 256 << 10;
/// What a BLOCK_STATUS in flight is charged for, in bytes: its extents as the volume lists them and as they are sent.
const STATUS_BYTES: usize = MAX_EXTENTS * 64;
// It goes on, too, when greedy clients have used up what is shared.
const _: () = assert!(STATUS_BYTES <= ALLOWANCE_BYTES);

/// Why no more requests are taken.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("the client disconnected")]
    Disconnected,
    #[error("the server stops")]
    Stopping,
    #[error("the export is unloaded")]
    Unloaded,
    #[error("the client hung up while its next requests waited for their turn: they are left")]
    HungUp,
    #[error(transparent)]
    Gone(#[from] Gone),
    #[error("a request came with {0}: the stream is out of sync")]
    OutOfSync(#[from] BadMagic),
    #[error("a request with {0} bytes of payload, more than is even thrown away")]
    Oversize(u64),
}

/// Why replies cannot be sent any more.
#[derive(Debug, thiserror::Error)]
enum Unsent {
    #[error(transparent)]
    Broken(#[from] std::io::Error),
    #[error("the client was too slow for the memory that it held")]
    TooSlow,
}

impl End {
    /// How much of what the client still sends is thrown away at the close, in bytes. A client in the middle of its longest
    /// request shall still get the replies to those before it; one that breaks the protocol is not owed that.
    fn discarded(&self, limits: &Limits) -> u64 {
        match self {
            Self::OutOfSync(_) | Self::Oversize(_) => limits.option.drained_bytes.into(),
            _ => MAX_DRAINED_PAYLOAD_BYTES,
        }
    }
}

/// Serves an attached client until either side ends it.
pub(super) async fn run<S>(
    stream: S,
    socket: Socket,
    early: BytesMut,
    volume: Arc<Volume>,
    attachment: Attachment,
    shared: &Shared,
    mut stop: watch::Receiver<bool>,
) where
    S: AsyncRead + AsyncWrite,
{
    let limits = shared.limits;
    let unloading = Arc::clone(&volume);
    let (reader, mut writer) = tokio::io::split(stream);
    let account = shared.shares.account(volume.export_id().as_str());
    let outbox = Outbox::new(limits, Arc::clone(&account), socket, Arc::clone(&shared.pool));
    let mut connection = Connection {
        inbox: Inbox::new(reader, &early, Arc::clone(&account), &shared.pool),
        volume,
        attachment,
        outbox: &outbox,
        shared,
    };
    drop(early);
    let (sent, discarded, mut reader) = {
        let mut sending = pin!(async {
            tokio::select! {
                biased;
                () = account.is_cut_off() => Err(Unsent::TooSlow),
                sent = outbox::send_all(&mut writer, &outbox) => Ok(sent?),
            }
        });
        let end = {
            let mut taking = pin!(connection.take_requests());
            let mut stopped = pin!(super::stopped(&mut stop));
            let mut unloaded = pin!(unloading.closing());
            // Reader and writer are two halves of one task: what is answered while the reader works is sent when it next
            // waits, in one write and without waking another thread.
            poll_fn(|context| {
                loop {
                    if let Poll::Ready(end) = taking.as_mut().poll(context) {
                        return Poll::Ready(Ok(end));
                    }
                    if stopped.as_mut().poll(context).is_ready() {
                        return Poll::Ready(Ok(End::Stopping));
                    }
                    if unloaded.as_mut().poll(context).is_ready() {
                        return Poll::Ready(Ok(End::Unloaded));
                    }
                    if let Poll::Ready(sent) = sending.as_mut().poll(context) {
                        return Poll::Ready(Err(sent));
                    }
                    if !outbox.reader_let_go_first() {
                        return Poll::Pending;
                    }
                }
            })
            .await
        };
        if let Ok(end) = &end {
            connection.log_end(end);
        }
        // No more requests are taken, so nothing is held for them while replies are waited for.
        let reader = connection.inbox.into_reader();
        match end {
            Ok(end) => {
                outbox.close();
                (sending.await, end.discarded(&limits), reader)
            }
            Err(sent) => (sent, 0, reader),
        }
    };
    match sent {
        Ok(()) => super::close_gently(&mut reader, &mut writer, discarded).await,
        Err(error) => {
            match &error {
                Unsent::TooSlow => shared.bites.slow.log(
                    "a client moved too little for the memory it held while others waited for some: its connection is closed",
                ),
                Unsent::Broken(broken) if broken.kind() == std::io::ErrorKind::TimedOut => {
                    shared.bites.stalled.log("a client did not take its replies: its connection is closed");
                }
                Unsent::Broken(_) => {}
            }
            tracing::debug!("replies cannot be sent any more: {error}");
            outbox.abandon();
        }
    }
    outbox.all_back().await;
}

struct Connection<'a, R> {
    inbox: Inbox<R>,
    volume: Arc<Volume>,
    attachment: Attachment,
    outbox: &'a Arc<Outbox>,
    shared: &'a Shared,
}

impl<R: AsyncRead + Unpin> Connection<'_, R> {
    async fn take_requests(&mut self) -> End {
        loop {
            match wire::decode_request(self.attachment.mode, self.inbox.received()) {
                Err(bad) => return bad.into(),
                Ok(Some(request)) => {
                    self.inbox.take(self.attachment.mode.request_bytes());
                    if let Err(end) = self.take_request(request).await {
                        return end;
                    }
                    if self.outbox.is_full() {
                        self.outbox.let_writer_go_first().await;
                    }
                }
                Ok(None) => {
                    if let Err(gone) = self.inbox.receive().await {
                        return gone.into();
                    }
                }
            }
        }
    }

    async fn take_request(&mut self, request: Request) -> Result<(), End> {
        let payload_bytes = request::payload(&request, self.attachment.mode);
        if payload_bytes > MAX_DRAINED_PAYLOAD_BYTES {
            return Err(End::Oversize(payload_bytes));
        }
        let verdict = match request::validate(&request, &self.attachment) {
            Ok(Command::Disconnect) => return Err(End::Disconnected),
            verdict => verdict,
        };
        // Paid for before its payload takes memory; refused ones take a place too, since their replies do.
        let price = verdict.as_ref().map_or(0, price);
        let Some((slot, waited)) = self.outbox.slot(price, &self.shared.bites).await else {
            return Err(End::Stopping);
        };
        // "A write of a connection that died must not land after a newer connection's."
        if waited.0 && self.outbox.client_has_hung_up() {
            return Err(End::HungUp);
        }
        let asked = Asked::new(&request, self.attachment.mode);
        let command = match verdict {
            Ok(command) => command,
            Err(refusal) => {
                if payload_bytes > u64::from(MAX_PAYLOAD_BYTES) {
                    self.shared.bites.payload.log("a client sends payloads over the maximum block size: refused");
                }
                // "For WRITE still consume the payload."
                self.inbox.discard(payload_bytes).await?;
                Outbox::answer_at_once(asked, slot, refusal.into());
                return Ok(());
            }
        };
        let slot = match command {
            Command::Read { range, whole } => match self.read_at_once(asked, slot, range, whole) {
                Ok(()) => return Ok(()),
                Err(slot) => slot,
            },
            _ => slot,
        };
        match self.receive_task(command, &request, payload_bytes).await? {
            Received::Refused(refusal) => Outbox::answer_at_once(asked, slot, refusal.into()),
            Received::Done => Outbox::answer_at_once(asked, slot, Outcome::Done),
            Received::Task(task) => {
                let ticket = Outbox::ticket(asked, slot);
                serve::serve(&self.volume, task, move |outcome| ticket.answer(outcome));
            }
        }
        Ok(())
    }

    /// Serves a READ without a task of its own, if it need not wait; else gives its slot back.
    fn read_at_once(&self, asked: Asked, slot: Slot, range: ByteRange, whole: bool) -> Result<(), Slot> {
        let len = usize::try_from(range.len()).unwrap_or(usize::MAX);
        // What is gathered is one piece of memory, which shall not grow for a client that takes no replies.
        let gathered = len <= GATHERED_READ_BYTES;
        if len == 0 || len > AT_ONCE_BYTES || (gathered && self.outbox.is_full()) {
            return Err(slot);
        }
        if gathered {
            return Outbox::read_at_once(asked, slot, len, whole, |buf| self.volume.read_at_once(range, buf));
        }
        let mut buffer = self.shared.pool.lease(len);
        // With the next request here already, this thread goes on to it, or sends, while another one reads.
        if len >= ASIDE_READ_BYTES
            && self.inbox.is_inside_request()
            && let Some(reader) = self.shared.reader_to_spare()
        {
            self.read_aside(reader, Outbox::ticket(asked, slot), range, whole, buffer);
            return Ok(());
        }
        if !self.volume.read_at_once(range, &mut buffer) {
            return Err(slot);
        }
        Outbox::answer_at_once(asked, slot, Outcome::Data { bytes: buffer.freeze(), whole });
        Ok(())
    }

    /// Has a READ served by a reader, or, if it has to wait, as any other that does.
    fn read_aside(&self, reader: Reader<'_>, ticket: Ticket, range: ByteRange, whole: bool, mut buffer: Lease) {
        let volume = Arc::clone(&self.volume);
        reader.work(move || {
            if volume.read_at_once(range, &mut buffer) {
                return ticket.answer(Outcome::Data { bytes: buffer.freeze(), whole });
            }
            serve::serve(&volume, Task::of(Command::Read { range, whole }), move |outcome| ticket.answer(outcome));
        });
    }

    /// Receives the payload of a WRITE and writes it, if that need not wait.
    async fn write_at_once(&mut self, range: ByteRange, durable: bool) -> Result<Written, Gone> {
        let len = usize::try_from(range.len()).unwrap_or(usize::MAX);
        if len == 0 || len > AT_ONCE_BYTES {
            return self.inbox.payload(len).await.map(Written::Not);
        }
        if len > DIRECT_PAYLOAD_BYTES {
            let mut payload = self.shared.pool.lease(len);
            self.inbox.payload_into(&mut payload).await?;
            let written = write_now(&self.volume, range, &payload, durable);
            return Ok(written.unwrap_or_else(|| Written::Not(payload.freeze())));
        }
        let payload = self.inbox.gather(len).await?;
        let written = write_now(&self.volume, range, payload, durable);
        let written = written.unwrap_or_else(|| Written::Not(Bytes::copy_from_slice(payload)));
        self.inbox.take(len);
        Ok(written)
    }

    /// Adds to a command what goes with it, or does it, if it is a WRITE that need not wait.
    async fn receive_task(
        &mut self,
        command: Command,
        request: &Request,
        payload_bytes: u64,
    ) -> Result<Received, Gone> {
        let durable = request.flags & cflag::FUA != 0;
        let mut task = Task { durable, ..Task::of(command) };
        match command {
            Command::Write { range } => match self.write_at_once(range, durable).await? {
                Written::Not(payload) => task.payload = payload,
                Written::Unsynced(begun) => task.written = Some(begun),
                Written::Done => return Ok(Received::Done),
            },
            Command::BlockStatus { .. } => task.contexts.clone_from(&self.attachment.contexts),
            Command::BlockStatusPayload { .. } if payload_bytes > MAX_BLOCK_STATUS_PAYLOAD_BYTES => {
                self.inbox.discard(payload_bytes).await?;
                return Ok(Received::Refused(Refusal::invalid(
                    "a BLOCK_STATUS payload with more context ids than there are contexts",
                )));
            }
            Command::BlockStatusPayload { offset, one } => {
                let payload = self.inbox.payload(usize::try_from(payload_bytes).unwrap_or(usize::MAX)).await?;
                match request::block_status_payload(offset, one, &payload, &self.attachment) {
                    Ok((command, contexts)) => task = Task { command, contexts, ..task },
                    Err(refusal) => return Ok(Received::Refused(refusal)),
                }
            }
            _ => {}
        }
        Ok(Received::Task(task))
    }

    fn log_end(&self, end: &End) {
        match end {
            End::Gone(Gone::Stalled) => {
                self.shared.bites.stalled.log("a client left a request half sent: its connection is closed");
            }
            End::Oversize(_) => self.shared.bites.payload.log("a client announced an absurd payload: it is closed"),
            _ => {}
        }
        tracing::debug!("export {}: a connection ends: {end}", self.volume.export_id());
    }
}

/// What became of a WRITE as it was received.
enum Written {
    /// It has to wait; its payload.
    Not(Bytes),
    /// It is in the cache since this moment, and FUA wants it on the disk.
    Unsynced(Instant),
    /// It is done and counted.
    Done,
}

/// Writes, if that need not wait.
fn write_now(volume: &Volume, range: ByteRange, data: &[u8], durable: bool) -> Option<Written> {
    if durable {
        return volume.write_part_at_once(range.offset(), data).map(Written::Unsynced);
    }
    volume.write_at_once(range.offset(), data).then_some(Written::Done)
}

/// What became of a command as it was received.
enum Received {
    /// It is to be served.
    Task(Task),
    /// It was, at once.
    Done,
    /// Its payload makes no sense.
    Refused(Refusal),
}

/// What a command is charged for in payload bytes, of the request or of the reply.
fn price(command: &Command) -> usize {
    match command {
        Command::Read { range, .. } | Command::Write { range } => usize::try_from(range.len()).unwrap_or(usize::MAX),
        Command::BlockStatus { .. } | Command::BlockStatusPayload { .. } => STATUS_BYTES,
        Command::Flush
        | Command::Trim { .. }
        | Command::Cache { .. }
        | Command::WriteZeroes { .. }
        | Command::Disconnect => 0,
    }
}
