//! One command → calls of the volume → its outcome.
//!
//! Promises: a command with FUA is durable when it is done; FAST_ZERO is refused exactly where something would have to
//! be fetched; what a READ returns is what the volume read.
//! Must never: check what [`request`](super::request) has checked, or answer a client (the transmission does).

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;

use super::context::Context;
use super::errno::{self, Errno};
use super::reply::{ContextExtents, Outcome};
use super::request::Command;
use crate::units::ByteRange;
use crate::volume::{Change, Extent, RequestKind, Residency, Volume, VolumeError};

/// The most extents one BLOCK_STATUS looks at; the client asks again for the rest. The protocol suggests at most 2^20.
pub(super) const MAX_EXTENTS: usize = 4096;

/// A command and what goes with it.
#[derive(Debug)]
pub(super) struct Task {
    pub(super) command: Command,
    /// FUA: durable before the reply.
    pub(super) durable: bool,
    /// The payload of a WRITE, as long as its range, unless it was `written`.
    pub(super) payload: Bytes,
    /// When the payload of a WRITE was written, if it was; only the sync for FUA is left to do.
    pub(super) written: Option<Instant>,
    /// The contexts a BLOCK_STATUS asks for, at least one.
    pub(super) contexts: Vec<Context>,
}

impl Task {
    /// A command alone.
    pub(super) fn of(command: Command) -> Self {
        Self { command, durable: false, payload: Bytes::new(), written: None, contexts: Vec::new() }
    }
}

/// Takes a task up; `answer` gets its outcome, on whatever thread it comes about. A change has its place in the order of
/// arrivals when this returns.
pub(super) fn serve(volume: &Arc<Volume>, task: Task, answer: impl FnOnce(Outcome) + Send + 'static) {
    let answer = counted(volume, &task, answer);
    let change = match task.command {
        // "Zero length: success, nothing done."
        Command::Trim { range } | Command::WriteZeroes { range, .. } if !range.is_empty() => Some(volume.change(range)),
        // These two without a task of their own: each change of threads costs as much as a fast disk takes.
        Command::Write { range } if !range.is_empty() => return write(volume, range, task, answer),
        Command::Flush => return volume.flush_then(|flushed| answer(outcome(flushed.map(|()| Outcome::Done), false))),
        _ => None,
    };
    let volume = Arc::clone(volume);
    tokio::spawn(async move { answer(serve_in_turn(&volume, task, change).await) });
}

fn write(volume: &Arc<Volume>, range: ByteRange, task: Task, answer: impl FnOnce(Outcome) + Send + 'static) {
    let done = |written: Result<(), VolumeError>| answer(outcome(written.map(|()| Outcome::Done), true));
    if task.written.is_some() {
        return volume.flush_then(done);
    }
    let flushed = task.durable.then(|| Arc::clone(volume));
    volume.change(range).write_then(task.payload, |written| match (written, flushed) {
        // FUA covers this command; the flush covers it and more.
        (Ok(()), Some(volume)) => volume.flush_then(done),
        (written, _) => done(written),
    });
}

/// The answer, and before it what the volume counts of it: the request of the client, however it is carried out. The sync
/// that FUA asks for is a part of it and no FLUSH.
fn counted(
    volume: &Arc<Volume>,
    task: &Task,
    answer: impl FnOnce(Outcome) + Send + 'static,
) -> impl FnOnce(Outcome) + Send + 'static {
    let started = task.written.unwrap_or_else(Instant::now);
    let (counted_as, volume) = (counted_as(&task.command), Arc::clone(volume));
    move |outcome| {
        if let Some((kind, bytes)) = counted_as {
            match &outcome {
                // A client that asks for the fast way is ready for this answer: nothing went wrong, and nothing was moved.
                Outcome::Failed { errno: Errno::NotSup, .. } => volume.observe(kind, 0, started.elapsed(), true),
                outcome => volume.observe(kind, bytes, started.elapsed(), !matches!(outcome, Outcome::Failed { .. })),
            }
        }
        answer(outcome);
    }
}

/// What a command counts as, and the bytes it moves.
fn counted_as(command: &Command) -> Option<(RequestKind, u64)> {
    Some(match command {
        Command::Read { range, .. } => (RequestKind::Read, range.len()),
        Command::Write { range } => (RequestKind::Write, range.len()),
        Command::Flush => (RequestKind::Flush, 0),
        Command::Trim { range } => (RequestKind::Trim, range.len()),
        Command::Cache { range } => (RequestKind::Cache, range.len()),
        Command::WriteZeroes { range, .. } => (RequestKind::WriteZeroes, range.len()),
        Command::BlockStatus { .. } => (RequestKind::BlockStatus, 0),
        Command::BlockStatusPayload { .. } | Command::Disconnect => return None,
    })
}

fn outcome(served: Result<Outcome, VolumeError>, writes: bool) -> Outcome {
    served.unwrap_or_else(|error| Outcome::Failed { errno: errno::of(&error, writes), text: error.to_string().into() })
}

async fn serve_in_turn(volume: &Arc<Volume>, task: Task, change: Option<Change>) -> Outcome {
    let zeroes = matches!(task.command, Command::WriteZeroes { .. });
    let durable = task.durable && (zeroes || matches!(task.command, Command::Trim { .. }));
    let served = match carry_out(volume, task, change).await {
        // As for a write. FUA makes no sense on the others, and is accepted there.
        Ok(Outcome::Done) if durable => volume.flush().await.map(|()| Outcome::Done),
        served => served,
    };
    outcome(served, zeroes)
}

async fn carry_out(volume: &Arc<Volume>, task: Task, change: Option<Change>) -> Result<Outcome, VolumeError> {
    let done = |()| Outcome::Done;
    match (task.command, change) {
        (Command::Read { range, whole }, _) => read(volume, range, whole).await,
        (Command::Trim { .. }, Some(change)) => change.trim().await.map(done),
        (Command::WriteZeroes { range, fast }, Some(change)) => {
            if fast && needs_a_fetch(volume, range).await? {
                let text = "zeroing a part of a chunk that is not in the cache fetches it first, which is not fast";
                return Ok(Outcome::Failed { errno: Errno::NotSup, text: text.into() });
            }
            change.write_zeroes().await.map(done)
        }
        (Command::Cache { range }, _) if !range.is_empty() => volume.prefetch(range).await.map(done),
        (Command::BlockStatus { range, one }, _) => {
            let extents = volume.extents(range, MAX_EXTENTS).await?;
            let of = |context: &Context| (context.id(), statuses(*context, range, one, &extents));
            let contexts: Vec<ContextExtents> = task.contexts.iter().map(of).collect();
            Ok(Outcome::Status(contexts))
        }
        (Command::Write { .. } | Command::Trim { .. } | Command::WriteZeroes { .. } | Command::Cache { .. }, _) => {
            Ok(Outcome::Done)
        }
        // They are dealt with before it comes to this.
        (Command::Flush | Command::BlockStatusPayload { .. } | Command::Disconnect, _) => Ok(Outcome::Done),
    }
}

async fn read(volume: &Arc<Volume>, range: ByteRange, whole: bool) -> Result<Outcome, VolumeError> {
    let bytes = if range.is_empty() { Bytes::new() } else { volume.read(range).await? };
    if bytes.len() as u64 == range.len() {
        return Ok(Outcome::Data { bytes, whole });
    }
    // Other lengths would put the client out of sync for good: better an error here and in the log.
    tracing::error!(export = %volume.export_id(), "a read of {range} brought {} bytes", bytes.len());
    Ok(Outcome::Failed { errno: Errno::Io, text: "the read came back with another length".into() })
}

/// Whether a range begins or ends inside a chunk that is not here.
async fn needs_a_fetch(volume: &Arc<Volume>, range: ByteRange) -> Result<bool, VolumeError> {
    let geometry = volume.geometry();
    if range.is_empty() {
        return Ok(false);
    }
    let ends = [range.offset(), range.end() - 1];
    for chunk in ends.map(|byte| geometry.chunk_range(geometry.chunk_at(byte))) {
        let covered = range.offset() <= chunk.offset() && chunk.end() <= range.end();
        let extents = if covered { Vec::new() } else { volume.extents(chunk, 1).await? };
        if extents.iter().any(|extent| extent.residency == Residency::Absent) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// "At least one extent, none empty; REQ_ONE: exactly one, not beyond the request." Ours never overrun.
fn statuses(context: Context, range: ByteRange, one: bool, extents: &[Extent]) -> Vec<(u64, u32)> {
    let mut statuses: Vec<(u64, u32)> = Vec::new();
    let mut left = range.len();
    for extent in extents {
        let (len, status) = (extent.len.min(left), context.status(extent.residency));
        left -= len;
        match statuses.last_mut() {
            _ if len == 0 => break,
            Some(last) if last.1 == status => last.0 += len,
            Some(_) if one => break,
            _ => statuses.push((len, status)),
        }
    }
    statuses
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(len: u64, residency: Residency) -> Extent {
        Extent { len, residency }
    }

    #[test]
    fn neighbours_of_one_status_are_merged_and_none_overruns_the_request() {
        let extents = [
            extent(10, Residency::Absent),
            extent(10, Residency::Dirty),
            extent(10, Residency::Zero { dirty: true }),
            extent(u64::MAX, Residency::Zero { dirty: false }),
        ];
        let range = ByteRange::new(0, 1 << 40).unwrap();
        let of = |context, one| statuses(context, range, one, &extents);
        assert_eq!(of(Context::Allocation, false), [(20, 0), ((1 << 40) - 20, 3)]);
        assert_eq!(of(Context::Residency, false), [(10, 0), (10, 3), (10, 6), ((1 << 40) - 30, 4)]);
        assert_eq!(of(Context::Allocation, true), [(20, 0)]);
        assert_eq!(of(Context::Residency, true), [(10, 0)]);
    }
}
