//! A missing chunk → fetched, verified, resident (L8).
//!
//! Concurrent requests for one chunk share one fetch. The fetch is a task of its own: it lives on when the request
//! that began it goes away. No reader sees a chunk before it is whole and its hash was checked. A failure is told to
//! those who waited and then forgotten: the next request tries again.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Semaphore, SemaphorePermit, watch};

use super::{Services, Volume, VolumeError};
use crate::cache;
use crate::manifest::Source;
use crate::sabotage::{Rule, breaks};
use crate::store::{Key, SharedStore, StoreError};
use crate::units::{ByteRange, ChunkIndex, ExportId};

/// The most bytes of chunks on their way from the store to the disk, over all volumes of a server.
pub const FILL_BUDGET_BYTES: u64 = 256 << 20;
const PERMIT_BYTES: u64 = 4 << 10;

/// Bounds the chunks in memory between store and disk.
#[derive(Debug)]
pub(crate) struct FillBudget(Semaphore);

impl Default for FillBudget {
    fn default() -> Self {
        Self(Semaphore::new(usize::try_from(FILL_BUDGET_BYTES / PERMIT_BYTES).unwrap_or(1)))
    }
}

impl FillBudget {
    /// Waits until `bytes` more may be held; they may be while the permit lives.
    async fn take(&self, bytes: u64) -> Option<SemaphorePermit<'_>> {
        // A chunk has at most 64 MiB, a quarter of the budget, so nobody waits for ever.
        self.0.acquire_many(u32::try_from(bytes.div_ceil(PERMIT_BYTES)).unwrap_or(1)).await.ok()
    }
}

/// A chunk that was fetched.
#[derive(Debug, Clone)]
pub(super) struct Filled {
    /// The whole chunk.
    pub bytes: Bytes,
    /// Whether it is in the cache now. A reader does not care; a partial write does.
    pub kept: Result<(), VolumeError>,
}

type Outcome = Result<Filled, VolumeError>;
/// A chunk and the hash of the content that is fetched for it: after a reset it may be another.
type FillKey = (ChunkIndex, [u8; 32]);

/// The fetches of a volume that are under way.
#[derive(Debug, Default)]
pub(super) struct Fills {
    under_way: Mutex<HashMap<FillKey, watch::Receiver<Option<Outcome>>>>,
    /// Chunks whose bytes were not what was published, twice in a row.
    pub corrupt: AtomicU64,
}

impl Volume {
    /// The published content of a chunk that was seen missing; it is in the cache afterwards if there is room.
    pub(super) async fn fill(self: &Arc<Self>, chunk: ChunkIndex) -> Outcome {
        let mut outcome = {
            let image = self.image();
            let source = Remote::of(image.source(chunk));
            let Some(source) = source else {
                // Published as zeros meanwhile.
                let len = super::buffer_len(self.geometry.chunk_range(chunk));
                return Ok(Filled { bytes: vec![0; len].into(), kept: Ok(()) });
            };
            let key = (chunk, source.hash.unwrap_or_default());
            let mut under_way = self.fills.under_way.lock();
            match under_way.get(&key) {
                Some(outcome) => outcome.clone(),
                None => {
                    let (tell, outcome) = watch::channel(None);
                    under_way.insert(key, outcome.clone());
                    tokio::spawn(Arc::clone(self).run_fill(key, source, tell));
                    outcome
                }
            }
        };
        let gone = || VolumeError::Unavailable("the fetch was abandoned: the server is stopping".into());
        let outcome = outcome.wait_for(Option::is_some).await.map_err(|_| gone())?;
        outcome.clone().ok_or_else(gone)?
    }

    async fn run_fill(self: Arc<Self>, key: FillKey, source: Remote, tell: watch::Sender<Option<Outcome>>) {
        let outcome = self.fetch_and_keep(key.0, &source).await;
        self.fills.under_way.lock().remove(&key);
        tell.send_replace(Some(outcome));
    }

    async fn fetch_and_keep(self: &Arc<Self>, chunk: ChunkIndex, source: &Remote) -> Outcome {
        let _budget = self.services.fill_budget.take(source.range.len()).await;
        let bytes = self.fetch(chunk, source).await?;
        // Not waiting: who closes the volume waits for the requests, and those wait for this fill.
        let kept = match self.open.try_read() {
            Ok(open) if *open => {
                let (volume, content, source) = (Arc::clone(self), bytes.clone(), source.clone());
                cache::blocking(&self.cache, move |cache| {
                    let published = || Remote::of(volume.image().source(chunk)).is_some_and(|now| now == source);
                    cache.fill(chunk, &content, published)
                })
                .await
                .map_err(|e| self.cache_error(e))
            }
            _ => Err(VolumeError::Closed(self.export_id.clone())),
        };
        if let Err(e) = &kept {
            tracing::debug!(export = %self.export_id, %chunk, "a fetched chunk was not kept: {e}");
        }
        Ok(Filled { bytes, kept })
    }

    /// As [`Services::fetch`], counted.
    pub(super) async fn fetch(&self, chunk: ChunkIndex, source: &Remote) -> Result<Bytes, VolumeError> {
        let started = Instant::now();
        let fetched = self.fetch_checked(chunk, source).await;
        self.meter.fetched(started, fetched.as_ref().ok().map(Bytes::len));
        fetched
    }

    async fn fetch_checked(&self, chunk: ChunkIndex, source: &Remote) -> Result<Bytes, VolumeError> {
        self.services.fetch(&self.export_id, chunk, source).await.map_err(|e| match e {
            FetchError::Unavailable(text) => VolumeError::Unavailable(text),
            FetchError::Corrupt(text) => {
                self.fills.corrupt.fetch_add(1, Ordering::Relaxed);
                VolumeError::Unavailable(text)
            }
        })
    }
}

/// Why a chunk is not there.
#[derive(Debug, Clone)]
pub(super) enum FetchError {
    /// The store did not answer.
    Unavailable(Arc<str>),
    /// What it answered is not what was published.
    Corrupt(Arc<str>),
}

impl Services {
    /// The chunk's bytes from the store, their hash checked; what does not match is fetched once more, then refused.
    pub(super) async fn fetch(
        &self,
        export_id: &ExportId,
        chunk: ChunkIndex,
        source: &Remote,
    ) -> Result<Bytes, FetchError> {
        for attempt in [1, 2] {
            let bytes = source.get(&self.store).await.map_err(|e| {
                let text = format!("export {export_id}: chunk {chunk} could not be fetched: {e}");
                tracing::warn!("{text}");
                FetchError::Unavailable(text.into())
            })?;
            let Some(hash) = source.hash else { return Ok(bytes) };
            let checked = bytes.clone();
            let found = cache::blocking_io(move || *blake3::hash(&checked).as_bytes()).await;
            if found == hash || breaks(Rule::ServeUnverified) {
                return Ok(bytes);
            }
            tracing::error!(
                export = %export_id, %chunk, attempt,
                "{} at {} is not what was published: its BLAKE3 is not the manifest's", source.key, source.range
            );
        }
        let text = format!(
            "export {export_id}: chunk {chunk} in {} at {} does not match the manifest's BLAKE3: the object is damaged; restore it from a copy of the bucket",
            source.key, source.range
        );
        Err(FetchError::Corrupt(text.into()))
    }
}

/// Where a chunk that is not zeros is in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Remote {
    /// The blob.
    pub key: Key,
    /// The chunk's bytes in it.
    pub range: ByteRange,
    /// Their hash; `None` only under a `base_ref` of older tools, which has none.
    pub hash: Option<[u8; 32]>,
}

impl Remote {
    /// `None` for zeros.
    pub(super) fn of(source: Source<'_>) -> Option<Self> {
        match source {
            Source::Zero => None,
            Source::Packed { key, range, hash } => Some(Self { key: key.clone(), range, hash: Some(hash) }),
            Source::Base { key, range } => Some(Self { key: key.clone(), range, hash: None }),
        }
    }

    async fn get(&self, store: &SharedStore) -> Result<Bytes, StoreError> {
        store.get_range(&self.key, self.range).await
    }
}
