//! Blobs on their way up: re-cut into equal parts without copying, several in flight (`store/parts.rs`).
//!
//! A body that fits one part becomes one put. A longer one becomes a multipart upload: parts of one size (R2 insists)
//! but the last, each repeated on its own, since putting a part twice puts it once. The parts in flight share the link, so
//! each may take as long as all of them together. At the end the store is asked how long the object is. If anything fails, or the caller goes away, the parts are discarded; a
//! bucket rule that expires incomplete uploads catches what a crash leaves.

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use object_store::multipart::{MultipartStore, PartId};
use object_store::path::Path;
use object_store::{MultipartId, ObjectStoreExt, PutPayload};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::answer::nothing_to_assemble;
use super::{Conditional, RemoteStore, SILENCE_LIMIT, allowance, path, timed};
use crate::store::health::Health;
use crate::store::parts::{PARTS_IN_FLIGHT, part_bytes};
use crate::store::retry::{Overtime, Request};
use crate::store::{Body, Key, StoreError};

/// How long the store may take to put the parts together.
const ASSEMBLY_LIMIT: Duration = Duration::from_secs(180);
/// How often a request is sent at least that fails, however long that takes; and for how long on a slow link, as a multiple
/// of the time that one with the link to itself may take.
const MIN_ATTEMPTS: u32 = 3;

/// A body being cut into parts.
struct Cutter<'a> {
    body: Body<'a>,
    /// What the last part left of its last piece.
    rest: Bytes,
    /// What the body has delivered so far.
    total: u64,
    max_bytes: u64,
}

/// One part: pieces of the body in order, and their length in bytes.
struct Part {
    pieces: Vec<Bytes>,
    len: u64,
}

impl Part {
    fn payload(self, copied: bool) -> PutPayload {
        if copied { Bytes::from(self.pieces.concat()).into() } else { PutPayload::from_iter(self.pieces) }
    }
}

impl Cutter<'_> {
    /// The next piece that is not empty; `None` at the end.
    async fn piece(&mut self, key: &Key) -> Result<Option<Bytes>, StoreError> {
        while self.rest.is_empty() {
            let Some(piece) = self.body.next().await else { return Ok(None) };
            self.rest = piece.map_err(|source| StoreError::Body { key: key.clone(), source })?;
            self.total += self.rest.len() as u64;
            if self.total > self.max_bytes {
                return Err(StoreError::TooLarge { key: key.clone(), max_bytes: self.max_bytes });
            }
        }
        Ok(Some(std::mem::take(&mut self.rest)))
    }

    /// As many bytes as fit a part, fewer only at the end of the body.
    async fn part(&mut self, key: &Key, part_bytes: u64) -> Result<Part, StoreError> {
        let mut part = Part { pieces: Vec::new(), len: 0 };
        while part.len < part_bytes {
            let Some(mut piece) = self.piece(key).await? else { break };
            let room = usize::try_from(part_bytes - part.len).unwrap_or(usize::MAX);
            if piece.len() > room {
                self.rest = piece.split_off(room);
            }
            part.len += piece.len() as u64;
            part.pieces.push(piece);
        }
        Ok(part)
    }

    /// Whether the body has no more bytes.
    async fn ended(&mut self, key: &Key) -> Result<bool, StoreError> {
        Ok(match self.piece(key).await? {
            Some(piece) => {
                self.rest = piece;
                false
            }
            None => true,
        })
    }
}

pub(super) async fn upload(store: &RemoteStore, key: &Key, max_bytes: u64, body: Body<'_>) -> Result<(), StoreError> {
    let request = Request { operation: "upload", key };
    let path = path(request)?;
    let part_bytes = part_bytes(max_bytes);
    let mut cutter = Cutter { body, rest: Bytes::new(), total: 0, max_bytes };
    let first = cutter.part(key, part_bytes).await?;
    if cutter.ended(key).await? {
        let limit = allowance(first.len);
        let payload = first.payload(store.keeps_payloads);
        repeat(store, request, limit, || store.objects.put(&path, payload.clone())).await?;
        return check_len(store, request, &path, cutter.total).await;
    }
    let id = repeat(store, request, SILENCE_LIMIT, || store.parts.create_multipart(&path)).await?;
    let pending =
        Pending { parts: Arc::clone(&store.parts), discards: store.discards.clone(), path, id, settled: false };
    match send_parts(store, request, &pending, first, &mut cutter, part_bytes).await {
        Ok(()) => {
            let path = pending.path.clone();
            pending.keep();
            check_len(store, request, &path, cutter.total).await
        }
        Err(e) => {
            pending.discard().await;
            Err(e)
        }
    }
}

/// An upload counts once the store says of the object that it is as long as what was sent.
async fn check_len(store: &RemoteStore, request: Request<'_>, path: &Path, total: u64) -> Result<(), StoreError> {
    match repeat(store, request, SILENCE_LIMIT, || store.objects.head(path)).await {
        Ok(meta) if meta.size == total => Ok(()),
        Ok(meta) => Err(request.refused(format!("the object has {} bytes where {total} were sent", meta.size))),
        Err(StoreError::NotFound { .. }) => {
            Err(request.refused(format!("the store took {total} bytes and has no such object")))
        }
        Err(e) => Err(e),
    }
}

async fn send_parts(
    store: &RemoteStore,
    request: Request<'_>,
    pending: &Pending,
    first: Part,
    cutter: &mut Cutter<'_>,
    part_bytes: u64,
) -> Result<(), StoreError> {
    let mut in_flight = JoinSet::new();
    let mut done = Vec::new();
    let mut next = Some(first);
    let mut count = 0;
    while let Some(part) = next.take().filter(|part| part.len > 0) {
        in_flight.spawn(put_part(PartPut::new(store, request, pending), count, part));
        count += 1;
        // The slot is free before the next part is gathered, so that the part being gathered is counted too.
        while in_flight.len() >= PARTS_IN_FLIGHT {
            done.push(landed(request, in_flight.join_next().await)?);
        }
        next = Some(cutter.part(request.key, part_bytes).await?);
    }
    while !in_flight.is_empty() {
        done.push(landed(request, in_flight.join_next().await)?);
    }
    done.sort_unstable_by_key(|(index, _)| *index);
    let ids = done.into_iter().map(|(_, id)| id).collect();
    complete(store, request, pending, ids, cutter.total).await
}

type Landed = (usize, PartId);

fn landed(
    request: Request<'_>,
    joined: Option<Result<Result<Landed, StoreError>, tokio::task::JoinError>>,
) -> Result<Landed, StoreError> {
    match joined {
        Some(Ok(outcome)) => outcome,
        Some(Err(lost)) => Err(request.unavailable(lost)),
        None => Err(request.unavailable("a part was lost")),
    }
}

/// What the task of one part needs, owned.
struct PartPut {
    parts: Arc<dyn MultipartStore>,
    keeps_payloads: bool,
    policy: crate::store::retry::RetryPolicy,
    clock: Arc<dyn crate::clock::Clock>,
    health: Arc<Health>,
    operation: &'static str,
    key: Key,
    path: Path,
    id: MultipartId,
}

impl PartPut {
    fn new(store: &RemoteStore, request: Request<'_>, pending: &Pending) -> Self {
        Self {
            parts: Arc::clone(&store.parts),
            keeps_payloads: store.keeps_payloads,
            policy: store.policy,
            clock: Arc::clone(&store.clock),
            health: Arc::clone(&store.health),
            operation: request.operation,
            key: request.key.clone(),
            path: pending.path.clone(),
            id: pending.id.clone(),
        }
    }
}

async fn put_part(put: PartPut, index: usize, part: Part) -> Result<Landed, StoreError> {
    let request = Request { operation: put.operation, key: &put.key };
    let (alone, sharing) = (allowance(part.len), allowance(part.len * PARTS_IN_FLIGHT as u64));
    let payload = part.payload(put.keeps_payloads);
    let attempt = || {
        let sent = put.parts.put_part(&put.path, &put.id, index, payload.clone());
        timed(request, sharing, Conditional::No, sent)
    };
    // A store that takes the bytes and never answers looks like a slow link, so there is no third attempt as long as that.
    let overtime = Overtime::Transfer { at_least: 2, in_all: alone * MIN_ATTEMPTS };
    match put.policy.run(&*put.clock, &put.health, request, overtime, attempt).await {
        Ok(id) => Ok((index, id)),
        Err(StoreError::NotFound { .. }) => Err(request.unavailable("the store has forgotten the upload")),
        Err(e) => Err(e),
    }
}

/// Puts the parts together. If an attempt had no clear end and the next one finds nothing to assemble, the first one landed:
/// the object is there, in full length.
async fn complete(
    store: &RemoteStore,
    request: Request<'_>,
    pending: &Pending,
    ids: Vec<PartId>,
    total: u64,
) -> Result<(), StoreError> {
    let unclear = AtomicBool::new(false);
    let attempt = || async {
        let assembled = store.parts.complete_multipart(&pending.path, &pending.id, ids.clone());
        match timed(request, ASSEMBLY_LIMIT, Conditional::No, assembled).await {
            Ok(_) => Ok(()),
            Err(e) if unclear.load(Ordering::Relaxed) && nothing_to_assemble(&e) => {
                let head = store.objects.head(&pending.path);
                let meta = timed(request, SILENCE_LIMIT, Conditional::No, head).await?;
                if meta.size == total { Ok(()) } else { Err(request.refused("another object stands there")) }
            }
            Err(e) => {
                unclear.store(true, Ordering::Relaxed);
                Err(e)
            }
        }
    };
    match store.policy.run(&*store.clock, &store.health, request, lasting(ASSEMBLY_LIMIT), attempt).await {
        Err(StoreError::NotFound { .. }) => Err(request.unavailable("the store has forgotten the upload")),
        other => other,
    }
}

/// For a request of which each attempt may take up to `limit`.
fn lasting(limit: Duration) -> Overtime {
    Overtime::Transfer { at_least: MIN_ATTEMPTS, in_all: limit * MIN_ATTEMPTS }
}

/// Repeats a request that lands once however often it is sent.
async fn repeat<T, F>(
    store: &RemoteStore,
    request: Request<'_>,
    limit: Duration,
    work: impl Fn() -> F,
) -> Result<T, StoreError>
where
    F: Future<Output = object_store::Result<T>>,
{
    let attempt = || timed(request, limit, Conditional::No, work());
    store.policy.run(&*store.clock, &store.health, request, lasting(limit), attempt).await
}

/// Uploads whose caller went away, and which the store is being told to forget: each holds a receiver until it was told.
#[derive(Debug, Clone, Default)]
pub(super) struct Discards(Arc<watch::Sender<()>>);

impl Discards {
    /// Waits until there are none; each takes [`SILENCE_LIMIT`] at most.
    pub(super) async fn end(&self) {
        self.0.closed().await;
    }
}

/// A multipart upload the store knows of, which is discarded unless it was completed.
struct Pending {
    parts: Arc<dyn MultipartStore>,
    discards: Discards,
    path: Path,
    id: MultipartId,
    settled: bool,
}

impl Pending {
    /// It has become an object.
    fn keep(mut self) {
        self.settled = true;
    }

    /// Tells the store to forget it: once, for a limited time, since a lost upload costs money but no data.
    async fn discard(mut self) {
        abort(Arc::clone(&self.parts), self.path.clone(), self.id.clone()).await;
        self.settled = true;
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // The caller went away in the middle.
        if let (false, Ok(runtime)) = (self.settled, tokio::runtime::Handle::try_current()) {
            let under_way = self.discards.0.subscribe();
            let aborted = abort(Arc::clone(&self.parts), self.path.clone(), self.id.clone());
            runtime.spawn(async move {
                aborted.await;
                drop(under_way);
            });
        }
    }
}

async fn abort(parts: Arc<dyn MultipartStore>, path: Path, id: MultipartId) {
    let aborted = AssertUnwindSafe(parts.abort_multipart(&path, &id)).catch_unwind();
    match tokio::time::timeout(SILENCE_LIMIT, aborted).await {
        Ok(Ok(Ok(()))) => {}
        Ok(Ok(Err(e))) => {
            tracing::warn!(%path, error = %e, "could not discard an incomplete upload; its parts may remain")
        }
        Ok(Err(_)) | Err(_) => {
            tracing::warn!(%path, "could not discard an incomplete upload in time; its parts may remain")
        }
    }
}

#[cfg(test)]
mod tests;
