//! Transmission: requests in, validated once, served, answered in any order.
//!
//! Promises: all requests that one receive brought are taken up before the next; a slow one never holds up those behind
//! it; everything accepted is answered before an orderly close, also to a client that has shut down its sending side;
//! the stream stays in sync after a refused request.
//! Must never: carry out a request that did not arrive whole, or read on while the client's limits are used up.

use std::sync::Arc;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, watch};

use super::Shared;
use super::hangup::HangUp;
use super::inbox::{Gone, Inbox};
use super::limits::{MAX_DRAINED_PAYLOAD_BYTES, MAX_PAYLOAD_BYTES};
use super::outbox::{self, Budget, Reply, Ticket};
use super::reply::Asked;
use super::request::{self, Attachment, Command, MAX_BLOCK_STATUS_PAYLOAD_BYTES, Refusal};
use super::serve::{self, MAX_EXTENTS, Task};
use super::wire::{self, BadMagic, Request, cflag};
use crate::volume::Volume;

/// What a BLOCK_STATUS in flight is charged for, in bytes: its extents as the volume lists them and as they are sent.
const STATUS_BYTES: usize = MAX_EXTENTS * 64;

/// Why no more requests are taken.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("the client disconnected")]
    Disconnected,
    #[error("the server stops")]
    Stopping,
    #[error("the client hung up while its next requests waited for their turn: they are left")]
    HungUp,
    #[error(transparent)]
    Gone(#[from] Gone),
    #[error("a request came with {0}: the stream is out of sync")]
    OutOfSync(#[from] BadMagic),
    #[error("a request with {0} bytes of payload, more than is even thrown away")]
    Oversize(u64),
}

/// Serves an attached client until either side ends it.
pub(super) async fn run<S>(
    stream: S,
    hang_up: HangUp,
    early: &[u8],
    volume: Arc<Volume>,
    attachment: Attachment,
    shared: &Shared,
    mut stop: watch::Receiver<bool>,
) where
    S: AsyncRead + AsyncWrite,
{
    let limits = shared.limits;
    let (reader, mut writer) = tokio::io::split(stream);
    let (outbox, replies) = mpsc::channel(limits.requests);
    let budget = Budget::new(limits, Arc::clone(&shared.bytes));
    let mut connection = Connection {
        inbox: Inbox::new(reader, early, limits.stalled),
        volume,
        attachment,
        budget: &budget,
        hang_up,
        shared,
    };
    // Reader and writer are two halves of one task: what is answered while the reader works is sent when it next waits,
    // in one write and without waking another thread.
    let sent = {
        let sending = outbox::send_all(&mut writer, replies, limits.stalled);
        tokio::pin!(sending);
        let end = tokio::select! {
            biased;
            end = connection.take_requests(outbox) => Ok(end),
            () = super::stopped(&mut stop) => Ok(End::Stopping),
            sent = &mut sending => Err(sent),
        };
        match end {
            Ok(end) => {
                connection.log_end(&end);
                // Every request in flight holds a sender; the last reply ends it.
                sending.await
            }
            Err(sent) => sent,
        }
    };
    match sent {
        Ok(()) => {
            let mut reader = connection.inbox.into_reader();
            super::close_gently(&mut reader, &mut writer).await;
        }
        Err(error) => {
            if error.kind() == std::io::ErrorKind::TimedOut {
                shared.bites.stalled.log("a client did not take its replies: its connection is closed");
            }
            tracing::debug!("replies cannot be sent any more: {error}");
        }
    }
    budget.all_back().await;
}

struct Connection<'a, R> {
    inbox: Inbox<R>,
    volume: Arc<Volume>,
    attachment: Attachment,
    budget: &'a Budget,
    hang_up: HangUp,
    shared: &'a Shared,
}

impl<R: AsyncRead + Unpin> Connection<'_, R> {
    async fn take_requests(&mut self, outbox: mpsc::Sender<Reply>) -> End {
        loop {
            match wire::decode_request(self.attachment.mode, self.inbox.received()) {
                Err(bad) => return bad.into(),
                Ok(Some(request)) => {
                    self.inbox.take(self.attachment.mode.request_bytes());
                    if let Err(end) = self.take_request(request, &outbox).await {
                        return end;
                    }
                }
                Ok(None) => {
                    // What was answered so far goes out before more is taken in.
                    tokio::task::yield_now().await;
                    if let Err(gone) = self.inbox.receive().await {
                        return gone.into();
                    }
                }
            }
        }
    }

    async fn take_request(&mut self, request: Request, outbox: &mpsc::Sender<Reply>) -> Result<(), End> {
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
        let Some((slot, waited)) = self.budget.slot(price, &self.shared.bites).await else {
            return Err(End::Stopping);
        };
        // "A write of a connection that died must not land after a newer connection's."
        if waited.0 && self.hang_up.is_seen() {
            return Err(End::HungUp);
        }
        let task = match verdict {
            Ok(command) => self.receive_task(command, &request, payload_bytes).await?,
            Err(refusal) => {
                if payload_bytes > u64::from(MAX_PAYLOAD_BYTES) {
                    self.shared.bites.payload.log("a client sends payloads over the maximum block size: refused");
                }
                // "For WRITE still consume the payload."
                self.inbox.discard(payload_bytes).await?;
                Err(refusal)
            }
        };
        let ticket = Ticket::new(Asked::new(&request, self.attachment.mode), slot, outbox.clone());
        match task {
            Err(refusal) => ticket.answer(refusal.into()),
            // The place to serve at once, without a task of its own, what the volume can serve without waiting: its
            // reply would be in the outbox before the next request of this receive is looked at.
            Ok(task) => {
                let volume = Arc::clone(&self.volume);
                tokio::spawn(async move { ticket.answer(serve::serve(&volume, task).await) });
            }
        }
        Ok(())
    }

    /// Adds to a command what goes with it.
    async fn receive_task(
        &mut self,
        command: Command,
        request: &Request,
        payload_bytes: u64,
    ) -> Result<Result<Task, Refusal>, Gone> {
        let durable = request.flags & cflag::FUA != 0;
        let mut task = Task { command, durable, payload: Bytes::new(), contexts: Vec::new() };
        match command {
            Command::Write { .. } => {
                task.payload = self.inbox.payload(usize::try_from(payload_bytes).unwrap_or(usize::MAX)).await?;
            }
            Command::BlockStatus { .. } => task.contexts.clone_from(&self.attachment.contexts),
            Command::BlockStatusPayload { .. } if payload_bytes > MAX_BLOCK_STATUS_PAYLOAD_BYTES => {
                self.inbox.discard(payload_bytes).await?;
                return Ok(Err(Refusal::invalid(
                    "a BLOCK_STATUS payload with more context ids than there are contexts",
                )));
            }
            Command::BlockStatusPayload { offset, one } => {
                let payload = self.inbox.payload(usize::try_from(payload_bytes).unwrap_or(usize::MAX)).await?;
                match request::block_status_payload(offset, one, &payload, &self.attachment) {
                    Ok((command, contexts)) => task = Task { command, contexts, ..task },
                    Err(refusal) => return Ok(Err(refusal)),
                }
            }
            _ => {}
        }
        Ok(Ok(task))
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
