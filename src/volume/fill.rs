//! A missing chunk → fetched, verified, resident (L8).
//!
//! Concurrent requests for one chunk share one fetch. The fetch is a task of its own: it lives on when the request
//! that began it goes away. No reader sees a chunk before it is whole and its hash was checked; then it need not wait until
//! the chunk is written, as a change of its part does. A failure is told to those who waited and then forgotten: the next
//! request tries again.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use parking_lot::Mutex;
use tokio::sync::watch;

use super::budget::Stream;
use super::turns::{Memory, Turn};
use super::{Services, Volume, VolumeError};
use crate::cache::{self, Cache, states::Content};
use crate::manifest::Source;
use crate::sabotage::{Rule, breaks};
use crate::store::health::Outage;
use crate::store::{Key, SharedStore, StoreError};
use crate::units::{ByteRange, ChunkIndex, ExportId};

/// How often it is looked whether the store is away, for a fetch that takes longer than a request may.
const OUTAGE_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// How far a fetch has come.
#[derive(Debug, Clone)]
enum Stage {
    UnderWay,
    /// The whole chunk is here, but not in the cache yet.
    Fetched(Bytes),
    /// It is in the cache, or cannot be kept there.
    Kept(Bytes, Result<(), VolumeError>),
    Failed(VolumeError),
}

impl Stage {
    /// The chunk, once it is here.
    fn fetched(&self) -> Option<Result<Bytes, VolumeError>> {
        match self {
            Self::UnderWay => None,
            Self::Fetched(bytes) | Self::Kept(bytes, _) => Some(Ok(bytes.clone())),
            Self::Failed(e) => Some(Err(e.clone())),
        }
    }

    /// Whether it is in the cache, once that is decided.
    fn kept(&self) -> Option<Result<(), VolumeError>> {
        match self {
            Self::UnderWay | Self::Fetched(_) => None,
            Self::Kept(_, kept) => Some(kept.clone()),
            Self::Failed(e) => Some(Err(e.clone())),
        }
    }
}

/// A fetch that others may join.
type Shared = watch::Receiver<Stage>;
/// A chunk and what is fetched for it: after a reset it may be something else.
type FillKey = (ChunkIndex, Remote);

/// The fetches of a volume that are under way.
#[derive(Debug, Default)]
pub(super) struct Fills {
    under_way: Mutex<HashMap<FillKey, Shared>>,
    /// Fetches of chunks that are not in the store as they were published.
    pub corrupt: AtomicU64,
}

/// A fetch that others may join as long as this lives: none joins one that came to no end because something in it panicked.
struct UnderWay<'a>(&'a Fills, &'a FillKey);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.under_way.lock().remove(self.1);
    }
}

impl Volume {
    /// The published content of a chunk that was seen missing, for a client that waits for it; it will be in the cache if
    /// there is room.
    pub(super) async fn fetch_for_client(self: &Arc<Self>, chunk: ChunkIndex) -> Result<Bytes, VolumeError> {
        self.for_client(chunk, Stage::fetched).await
    }

    /// Makes a chunk resident that was seen missing, for a client that waits for it.
    pub(super) async fn fill(self: &Arc<Self>, chunk: ChunkIndex) -> Result<(), VolumeError> {
        self.for_client(chunk, Stage::kept).await
    }

    async fn for_client<T>(
        self: &Arc<Self>,
        chunk: ChunkIndex,
        ready: impl Fn(&Stage) -> Option<Result<T, VolumeError>>,
    ) -> Result<T, VolumeError> {
        let _waits = self.services.fill_budget.client_waits();
        let shared = self.shared_fill(chunk, || self.services.fill_budget.stream()).await?;
        self.unless_closing(until(shared, ready)).await
    }

    /// Makes a chunk resident that nobody waits for, when its turn comes; nothing to do if it is by then.
    pub(super) async fn fill_ahead(self: &Arc<Self>, chunk: ChunkIndex) -> Result<(), VolumeError> {
        // Until it has its turn it is not among the fetches under way: a client that comes for it first does not wait along.
        let bytes = self.geometry.chunk_range(chunk).len();
        let (_memory, stream) = self.services.fill_budget.background(bytes).await;
        if self.still_open_at_once().is_none() {
            return Err(VolumeError::Closed(self.export_id.clone()));
        }
        if !self.must_fetch(chunk) {
            return Ok(());
        }
        until(self.shared_fill(chunk, || stream).await?, Stage::kept).await
    }

    /// Has fetched what a stream of reads that `range` belongs to will come to next.
    pub(super) fn read_ahead(self: &Arc<Self>, range: ByteRange) {
        let Some(chunks) = self.ahead.note(self.geometry, range) else { return };
        let missing: Vec<_> = chunks.map(ChunkIndex).filter(|chunk| self.must_fetch(*chunk)).collect();
        if missing.is_empty() {
            return;
        }
        let volume = Arc::clone(self);
        tokio::spawn(async move {
            let fills = missing.into_iter().map(|chunk| volume.fill_ahead(chunk));
            let mut fills = stream::iter(fills).buffer_unordered(super::FETCHES_PER_REQUEST);
            while let Some(filled) = fills.next().await {
                // Whatever it is, a read that comes so far will hear of it.
                if let Err(e) = filled {
                    tracing::debug!(export = %volume.export_id, "read-ahead ends early: {e}");
                    return;
                }
            }
        });
    }

    /// Joins the fetch of a chunk that is under way, or begins it on a stream of its own.
    async fn shared_fill(
        self: &Arc<Self>,
        chunk: ChunkIndex,
        stream: impl FnOnce() -> Stream,
    ) -> Result<Shared, VolumeError> {
        let image = self.image();
        let Some(source) = Remote::of(image.source(chunk)) else {
            // Published as zeros meanwhile.
            let zeros = vec![0; super::buffer_len(self.geometry.chunk_range(chunk))];
            return Ok(already(zeros.into()));
        };
        let key = (chunk, source);
        // A fill may have ended since the chunk was seen missing: it is not fetched again for that.
        let alone = !self.fills.under_way.lock().contains_key(&key);
        if alone
            && self.cache.state(chunk).content() == Content::Clean
            && let Some(bytes) = self.resident(chunk).await?
        {
            return Ok(already(bytes));
        }
        let mut under_way = self.fills.under_way.lock();
        if let Some(shared) = under_way.get(&key) {
            return Ok(shared.clone());
        }
        let (tell, shared) = watch::channel(Stage::UnderWay);
        under_way.insert(key.clone(), shared.clone());
        tokio::spawn(Arc::clone(self).run_fill(key, stream(), tell));
        Ok(shared)
    }

    /// A chunk's content right now, if that is in the cache.
    async fn resident(&self, chunk: ChunkIndex) -> Result<Option<Bytes>, VolumeError> {
        let read = move |cache: &Cache| {
            let whole = cache.geometry().chunk_range(chunk);
            let mut buf = vec![0; super::buffer_len(whole)];
            let missing = cache.read(whole, &mut buf, |_| false)?;
            Ok(missing.is_empty().then(|| buf.into()))
        };
        cache::blocking(&self.cache, read).await.map_err(|e| self.cache_error(e))
    }

    async fn run_fill(self: Arc<Self>, key: FillKey, stream: Stream, tell: watch::Sender<Stage>) {
        let end = {
            let _under_way = UnderWay(&self.fills, &key);
            let (chunk, source) = &key;
            match self.fetch_in_turn(*chunk, source, stream).await {
                Ok((bytes, _memory)) => {
                    tell.send_replace(Stage::Fetched(bytes.clone()));
                    let kept = self.keep(*chunk, source.clone(), bytes.clone()).await;
                    Stage::Kept(bytes, kept)
                }
                Err(e) => Stage::Failed(e),
            }
        };
        tell.send_replace(end);
    }

    /// Fetches a chunk when its turn comes. Those that have theirs in an outage keep it for as long as a request may take;
    /// what waits for them meanwhile, and has waited for as long, is told what they are told.
    async fn fetch_in_turn(
        &self,
        chunk: ChunkIndex,
        source: &Remote,
        stream: Stream,
    ) -> Result<(Bytes, Memory), VolumeError> {
        let started = Instant::now();
        let fetched = async {
            let turn = self.services.fill_budget.turn(&self.export_id, source.range.len()).await;
            let Turn { place, memory } = turn.ok_or_else(|| VolumeError::Closed(self.export_id.clone()))?;
            Ok((self.fetch(chunk, source, Some(stream.in_place(place))).await?, memory))
        };
        tokio::select! {
            biased;
            fetched = fetched => fetched,
            outage = self.services.too_long_an_outage() => {
                self.meter.fetched(started, None);
                let export_id = &self.export_id;
                let text = format!("export {export_id}: chunk {chunk} was not fetched in time: {}", outage.last_error);
                tracing::warn!(export = %export_id, %chunk, "{text}");
                let failed = FetchError::Unavailable(text.into());
                self.note_fetch(chunk, source, &Err::<(), _>(failed.clone()));
                Err(failed.into())
            }
        }
    }

    async fn keep(self: &Arc<Self>, chunk: ChunkIndex, source: Remote, bytes: Bytes) -> Result<(), VolumeError> {
        // Not waiting: who closes the volume waits for the requests, and those wait for this fill.
        let kept = match self.still_open_at_once() {
            Some(_open) => {
                let volume = Arc::clone(self);
                cache::blocking(&self.cache, move |cache| {
                    let published = || Remote::of(volume.image().source(chunk)).is_some_and(|now| now == source);
                    cache.fill(chunk, &bytes, published)
                })
                .await
                .map_err(|e| self.cache_error(e))
            }
            None => Err(VolumeError::Closed(self.export_id.clone())),
        };
        if let Err(e) = &kept {
            tracing::debug!(export = %self.export_id, %chunk, "a fetched chunk was not kept: {e}");
        }
        kept
    }

    /// As [`Services::fetch`], counted and noted.
    pub(super) async fn fetch(
        &self,
        chunk: ChunkIndex,
        source: &Remote,
        stream: Option<Stream>,
    ) -> Result<Bytes, VolumeError> {
        let started = Instant::now();
        let fetched = self.services.fetch(&self.export_id, chunk, source, stream).await;
        self.meter.fetched(started, fetched.as_ref().ok().map(Bytes::len));
        self.note_fetch(chunk, source, &fetched);
        if matches!(fetched, Err(FetchError::Damaged(_))) {
            self.fills.corrupt.fetch_add(1, Ordering::Relaxed);
        }
        fetched.map_err(VolumeError::from)
    }
}

/// A fetch that ended before it began.
fn already(bytes: Bytes) -> Shared {
    watch::channel(Stage::Kept(bytes, Ok(()))).1
}

/// Waits until a fetch has come so far that `ready` says what became of it.
async fn until<T>(
    mut shared: Shared,
    ready: impl Fn(&Stage) -> Option<Result<T, VolumeError>>,
) -> Result<T, VolumeError> {
    let gone = || {
        VolumeError::Unavailable(
            "the fetch came to no end: the server is stopping, or has come upon a mistake of its own".into(),
        )
    };
    let stage = shared.wait_for(|stage| ready(stage).is_some()).await.map_err(|_| gone())?;
    ready(&stage).ok_or_else(gone)?
}

/// Why a chunk is not there.
#[derive(Debug, Clone)]
pub(super) enum FetchError {
    /// The store did not answer, or refused.
    Unavailable(Arc<str>),
    /// What it has is not what was published.
    Damaged(Arc<str>),
}

impl FetchError {
    fn of(export_id: &ExportId, chunk: ChunkIndex, error: &StoreError) -> Self {
        let text = format!("export {export_id}: chunk {chunk} could not be fetched: {error}");
        if let StoreError::NotFound { .. } | StoreError::Short { .. } = error {
            let text = format!("{text}: the object is damaged; restore it from a copy of the bucket");
            tracing::error!(export = %export_id, %chunk, "{text}");
            Self::Damaged(text.into())
        } else {
            tracing::warn!(export = %export_id, %chunk, "{text}");
            Self::Unavailable(text.into())
        }
    }
}

impl From<FetchError> for VolumeError {
    fn from(error: FetchError) -> Self {
        match error {
            FetchError::Unavailable(text) => Self::Unavailable(text),
            FetchError::Damaged(text) => Self::Damaged(text),
        }
    }
}

impl Services {
    /// Returns when a request that began now would have taken as long as one may, if the store is away by then: one that still
    /// answers is only slow, and is waited for.
    async fn too_long_an_outage(&self) -> Outage {
        self.clock.sleep(self.policy.limit).await;
        loop {
            if let Some(outage) = self.store.outage() {
                return outage;
            }
            self.clock.sleep(OUTAGE_CHECK_INTERVAL).await;
        }
    }

    /// The chunk's bytes from the store, their hash checked; what does not match is fetched once more, then refused. The
    /// `stream`, if the fetch has one of the budget's, is free again once the bytes are here.
    pub(super) async fn fetch(
        &self,
        export_id: &ExportId,
        chunk: ChunkIndex,
        source: &Remote,
        mut stream: Option<Stream>,
    ) -> Result<Bytes, FetchError> {
        let for_client = stream.as_ref().is_some_and(Stream::is_for_client);
        for attempt in [1, 2] {
            let bytes = source.get(&self.store).await.map_err(|e| FetchError::of(export_id, chunk, &e))?;
            drop(stream.take());
            let Some(hash) = source.hash else { return Ok(bytes) };
            let checked = bytes.clone();
            let _core = self.fill_budget.core(for_client).await;
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
        Err(FetchError::Damaged(text.into()))
    }
}

/// Where a chunk that is not zeros is in the store.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::SystemClock;
    use crate::disk::RealDisk;
    use crate::store::keys::ExportRoot;
    use crate::store::remote::RemoteStore;
    use crate::store::{Condition, Store};
    use crate::units::SnapshotId;

    #[test]
    fn a_log_line_of_a_failed_fetch_has_its_export_as_a_field() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let log = Arc::new(file.reopen().unwrap());
        let key = || "exports/disk/base".parse().unwrap();
        tracing::subscriber::with_default(tracing_subscriber::fmt().json().with_writer(log).finish(), || {
            let source = "503 SlowDown".into();
            for error in
                [StoreError::NotFound { key: key() }, StoreError::Unavailable { operation: "get", key: key(), source }]
            {
                FetchError::of(&"disk".parse().unwrap(), ChunkIndex(7), &error);
            }
        });
        let log = std::fs::read_to_string(file.path()).unwrap();
        assert_eq!(log.lines().count(), 2, "{log}");
        for line in log.lines() {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!((&line["fields"]["export"], &line["fields"]["chunk"]), (&"disk".into(), &"7".into()), "{line}");
        }
    }

    #[tokio::test]
    async fn a_chunk_is_checked_on_a_core_of_the_budget() {
        let (export, snapshot) = ("disk".parse().unwrap(), SnapshotId::generate());
        let root = ExportRoot::new("exports".parse().unwrap());
        let key = root.export(&export).base(snapshot);
        let store = Arc::new(RemoteStore::memory());
        store.put(&key, Bytes::from_static(b"chunk"), Condition::Always).await.unwrap();
        let services = Services::new(store, root, Arc::new(RealDisk::default()), Arc::new(SystemClock));
        let hash = Some(*blake3::hash(b"chunk").as_bytes());
        let source = Remote { key, range: ByteRange::new(0, 5).unwrap(), hash };
        let soon = |stream| {
            tokio::time::timeout(Duration::from_millis(50), services.fetch(&export, ChunkIndex(0), &source, stream))
        };
        let mut taken = Vec::new();
        for _ in 0..std::thread::available_parallelism().unwrap().get() {
            taken.push(services.fill_budget.core(true).await);
        }
        assert!(soon(Some(services.fill_budget.stream())).await.is_err(), "none is free for clients");
        assert!(soon(Some(services.fill_budget.background(5).await.1)).await.unwrap().is_ok(), "but for others");
        taken.pop();
        assert_eq!(soon(Some(services.fill_budget.stream())).await.unwrap().unwrap()[..], *b"chunk");
    }
}
