//! A volume is one open export: its cache on local disk, its published image in the store, and the rules between them.
//!
//! This is the only place where cache and store meet. What it promises its front ends:
//! - A read returns the newest write it was ordered after, else what was published: never bytes whose hash was not
//!   checked, never zeros in place of what could not be had.
//! - A write that returned survives the process; after [`Volume::flush`] also the host's power.
//! - A chunk is missing, or all of it is in the cache: nobody sees a half-filled one.
//! - Overlapping changes take effect in the order of their arrival, whichever connection brought them.
//!
//! One rule ties the two sides together. A chunk's state is read *before* the published image: a commit changes the
//! image first and the states after, so whoever sees a chunk missing finds the image that says what it is.

mod ahead;
mod ancestry;
mod at_once;
mod budget;
mod change;
mod export;
pub mod faults;
mod fill;
mod head;
pub mod image;
mod kept;
mod meter;
mod objects;
mod open;
pub mod order;
mod progress;
mod publish;
mod recover;
pub mod registry;
mod seen;
pub mod snapshots;
mod turns;

use std::pin::pin;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::stream::{self, Stream, StreamExt, TryStreamExt};
use parking_lot::{Mutex, RwLock};

use crate::background::Background;
use crate::cache::{self, Cache, CacheError, Progress, states::Content};
use crate::clock::Clock;
use crate::disk::Disk;
use crate::manifest::Manifest;
use crate::store::SharedStore;
pub use crate::store::health::Outage;
use crate::store::keys::{ExportKeys, ExportRoot};
use crate::store::retry::{Patience, RetryPolicy};
use crate::units::{ByteRange, ChunkIndex, ExportId, Geometry, RandomId};
use ahead::ReadAhead;
pub use budget::{DEFAULT_PUBLISH_BYTES, FETCHES};
use budget::{FillBudget, PublishBudget};
pub use change::Change;
use faults::Faults;
use fill::Fills;
use head::Identity;
use meter::Meter;
pub use meter::RequestKind;
use order::Order;
pub use progress::PublishProgress;
use registry::Operation;
use seen::SeenHead;

/// How many missing chunks one request fetches at a time.
const FETCHES_PER_REQUEST: usize = 16;
/// After so many chunks that a request only looks at, others have the thread: a fraction of a millisecond.
const CHUNKS_PER_TURN: usize = 4096;

/// Why a volume did not do what was asked, by what the caller tells its client.
#[derive(Debug, Clone, thiserror::Error)]
pub enum VolumeError {
    /// The range leaves the image. Front ends check first; this is the second fence.
    #[error("range {range} leaves the image of {image_size} bytes")]
    OutOfRange {
        /// The range asked for.
        range: ByteRange,
        /// The image's size in bytes.
        image_size: u64,
    },
    /// The export is attached read-only.
    #[error("export {0} is read-only")]
    ReadOnly(ExportId),
    /// The local disk is full; nothing is lost and it works again once space is back.
    #[error("no space left for the cache of export {0}: free some under --cache-root and repeat")]
    NoSpace(ExportId),
    /// A missing chunk could not be had from the store in time.
    #[error("{0}")]
    Unavailable(Arc<str>),
    /// A missing chunk is not in the store as it was published: its object is gone, too short, or has other bytes.
    #[error("{0}")]
    Damaged(Arc<str>),
    /// The local disk failed, or a file of the cache could not be made, opened or replaced: an operator must act.
    #[error("{0}")]
    Failed(Arc<str>),
    /// The export was unloaded or the server is stopping.
    #[error("export {0} is closed")]
    Closed(ExportId),
}

/// What the cache holds of a stretch of the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residency {
    /// Published content that is not here: a read fetches it.
    Absent,
    /// Reads as zeros and nothing is stored anywhere for it. `dirty`: the zeros are not published yet.
    Zero {
        /// Whether the next snapshot changes it.
        dirty: bool,
    },
    /// Here, and the same as published.
    Clean,
    /// Here, and different from what is published.
    Dirty,
}

/// A stretch of the image with one residency.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Its length in bytes, not 0.
    pub len: u64,
    /// What the cache holds of it.
    pub residency: Residency,
}

/// What all volumes of a server share.
#[derive(Debug)]
pub struct Services {
    /// The object store, retrying.
    pub store: SharedStore,
    /// Where the exports are in it.
    pub root: ExportRoot,
    /// The local disk.
    pub disk: Arc<dyn Disk>,
    /// The time.
    pub clock: Arc<dyn Clock>,
    /// How long the store retries; and so, and at the same pace, is a head written again that it did not take.
    policy: RetryPolicy,
    /// This run of the server, as heads and journals name it.
    identity: Identity,
    /// Where publishes work.
    pub(crate) background: Background,
    /// Bounds the memory of chunks on their way from the store.
    pub(crate) fill_budget: Arc<FillBudget>,
    /// Bounds the memory of chunks on their way to the store.
    pub(crate) publish_budget: PublishBudget,
}

impl Services {
    /// Services over a store, a disk and a clock.
    #[must_use]
    pub fn new(store: SharedStore, root: ExportRoot, disk: Arc<dyn Disk>, clock: Arc<dyn Clock>) -> Self {
        let fill_budget = FillBudget::new(Arc::clone(&clock));
        let publish_budget = PublishBudget::new(DEFAULT_PUBLISH_BYTES);
        let (policy, background) = (RetryPolicy::default(), Background::default());
        let identity = Identity::of(RandomId::generate());
        Self { store, root, disk, clock, policy, identity, background, fill_budget, publish_budget }
    }

    /// The same with the patience that the store has.
    #[must_use]
    pub fn with_patience(self, patience: RetryPolicy) -> Self {
        Self { policy: patience, ..self }
    }

    /// The same as a run over the cache root of that id.
    #[must_use]
    pub fn with_cache_root(self, id: RandomId) -> Self {
        Self { identity: Identity::of(id), ..self }
    }

    /// The same with another bound on the memory of publishes, in bytes.
    #[must_use]
    pub fn with_publish_bytes(self, bytes: u64) -> Self {
        Self { publish_budget: PublishBudget::new(bytes), ..self }
    }

    /// The same with threads of their own for publishes.
    #[must_use]
    pub fn with_background(self, background: Background) -> Self {
        Self { background, ..self }
    }

    /// The patience with one write of a head, from now on.
    fn patience(&self) -> Patience<'_> {
        self.policy.patience(&*self.clock)
    }
}

/// One open export.
#[derive(Debug)]
pub struct Volume {
    export_id: ExportId,
    geometry: Geometry,
    read_only: bool,
    services: Arc<Services>,
    keys: ExportKeys,
    cache: Arc<Cache>,
    /// The published image that missing and clean chunks stand for.
    image: Arc<RwLock<Arc<Manifest>>>,
    /// The head in the store, as it was last read.
    seen: Mutex<SeenHead>,
    fills: Fills,
    faults: Faults,
    ahead: ReadAhead,
    order: Order,
    meter: Meter,
    /// Held by every request and every fill; `false` once closed. Taken exclusively to close.
    open: tokio::sync::RwLock<bool>,
    /// Set before it is closed: who waits for the store gives up.
    closing: tokio::sync::watch::Sender<bool>,
    /// The publish under way: how far it is, and whether somebody wants it to end.
    publishing: progress::Current,
    /// What is going on. Anything but `Idle` keeps other operations out.
    operation: Mutex<Operation>,
}

impl Volume {
    /// The export's name.
    #[must_use]
    pub fn export_id(&self) -> &ExportId {
        &self.export_id
    }

    /// The size of the image and of its chunks.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Whether writes are refused.
    #[must_use]
    pub fn read_only(&self) -> bool {
        self.read_only
    }

    /// The bytes of a range.
    ///
    /// # Errors
    /// [`VolumeError::Unavailable`] and [`VolumeError::Damaged`] if a missing chunk cannot be had, [`VolumeError::Failed`] if
    /// the disk does not read.
    pub async fn read(self: &Arc<Self>, range: ByteRange) -> Result<Bytes, VolumeError> {
        let _open = self.enter(range).await?;
        self.read_ahead(range);
        if let Some(chunk) = self.only_chunk(range)
            && self.must_fetch(chunk)
        {
            // Nothing of it is on the disk, so no thread need go and look.
            self.meter.read(1, 1);
            return Ok(Bytes::copy_from_slice(self.part(&self.fetch_for_client(chunk).await?, chunk, range)));
        }
        let volume = Arc::clone(self);
        let (mut buf, missing) = cache::blocking(&self.cache, move |cache| {
            let mut buf = vec![0; buffer_len(range)];
            let missing = cache.read(range, &mut buf, |chunk| volume.is_zero(chunk))?;
            Ok((buf, missing))
        })
        .await
        .map_err(|e| self.cache_error(e))?;
        self.meter.read(self.geometry.chunks_in(range), missing.len());
        let fetches = missing.into_iter().map(|(chunk, piece)| async move {
            Ok::<_, VolumeError>((chunk, piece, self.fetch_for_client(chunk).await?))
        });
        let mut fetched = stream::iter(fetches).buffer_unordered(FETCHES_PER_REQUEST);
        while let Some((chunk, piece, bytes)) = fetched.try_next().await? {
            let to = buffer_len_of(piece.offset() - range.offset());
            buf[to..to + buffer_len(piece)].copy_from_slice(self.part(&bytes, chunk, piece));
        }
        Ok(buf.into())
    }

    /// The chunk that holds all of a range.
    fn only_chunk(&self, range: ByteRange) -> Option<ChunkIndex> {
        (self.geometry.chunks_in(range) == 1).then(|| self.geometry.chunk_at(range.offset()))
    }

    /// The part of a chunk's `bytes` that a range inside it covers.
    fn part<'a>(&self, bytes: &'a [u8], chunk: ChunkIndex, range: ByteRange) -> &'a [u8] {
        let from = buffer_len_of(range.offset() - self.geometry.chunk_range(chunk).offset());
        &bytes[from..from + buffer_len(range)]
    }

    /// Takes a change's place in the order of arrivals, here and now; its work may begin later.
    pub fn change(self: &Arc<Self>, range: ByteRange) -> Change {
        Change { volume: Arc::clone(self), range, turn: self.order.join(range) }
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// Any [`VolumeError`]; then an unknown part of the range has the new content.
    pub async fn write(self: &Arc<Self>, offset: u64, data: Bytes) -> Result<(), VolumeError> {
        let range = self.range(offset, data.len() as u64)?;
        self.change(range).write(data).await
    }

    /// Makes a range read as zeros. Whole chunks cost neither a fetch nor space.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub async fn write_zeroes(self: &Arc<Self>, range: ByteRange) -> Result<(), VolumeError> {
        self.change(range).write_zeroes().await
    }

    /// Lets go of a range's content: it reads as zeros, except for the edges of chunks that are not here.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub async fn trim(self: &Arc<Self>, range: ByteRange) -> Result<(), VolumeError> {
        self.change(range).trim().await
    }

    /// Makes every write that was replied to, on any connection, durable on the local disk.
    ///
    /// # Errors
    /// [`VolumeError::Failed`] if a sync failed, now or earlier.
    pub async fn flush(self: &Arc<Self>) -> Result<(), VolumeError> {
        let _open = self.still_open().await?;
        cache::blocking(&self.cache, Cache::flush).await.map_err(|e| self.cache_error(e))
    }

    /// As [`flush`](Self::flush); `done` is called with the result, on the thread that has it. It is dropped uncalled only
    /// if the runtime ends.
    pub fn flush_then(self: &Arc<Self>, done: impl FnOnce(Result<(), VolumeError>) + Send + 'static) {
        let volume = Arc::clone(self);
        cache::blocking_then(&self.cache, move |cache| {
            // Not waiting: who closes the volume needs a thread like this one.
            let flushed = match volume.still_open_at_once() {
                Some(_open) => cache.flush(),
                None => return done(Err(VolumeError::Closed(volume.export_id.clone()))),
            };
            done(flushed.map_err(|e| volume.cache_error(e)));
        });
    }

    /// Fetches what is missing of a range. That a chunk cannot be had now is no error: a read will say so.
    ///
    /// # Errors
    /// [`VolumeError::OutOfRange`], [`VolumeError::Closed`].
    pub async fn prefetch(self: &Arc<Self>, range: ByteRange) -> Result<(), VolumeError> {
        let _open = self.enter(range).await?;
        let fetched = self.chunks(range).for_each_concurrent(FETCHES_PER_REQUEST, |(chunk, _)| async move {
            if self.must_fetch(chunk)
                && let Err(e) = self.fill_ahead(chunk).await
            {
                tracing::debug!(export = %self.export_id, %chunk, "prefetch: {e}");
            }
        });
        self.unless_closing(fetched.map(Ok)).await
    }

    /// The range's extents in order, neighbours of one residency merged, at most `max` of them; they cover the range
    /// from its start, and all of it unless `max` (at least 1) cut them short.
    ///
    /// # Errors
    /// [`VolumeError::OutOfRange`], [`VolumeError::Closed`].
    pub async fn extents(self: &Arc<Self>, range: ByteRange, max: usize) -> Result<Vec<Extent>, VolumeError> {
        let _open = self.enter(range).await?;
        let mut extents: Vec<Extent> = Vec::new();
        let mut chunks = pin!(self.chunks(range));
        while let Some((chunk, piece)) = chunks.next().await {
            let residency = self.residency(chunk);
            let full = extents.len() >= max.max(1);
            match extents.last_mut() {
                Some(last) if last.residency == residency => last.len += piece.len(),
                _ if full => break,
                _ => extents.push(Extent { len: piece.len(), residency }),
            }
        }
        Ok(extents)
    }

    /// The chunks of a range with its pieces of them. There may be millions, so now and then others have the thread.
    fn chunks(&self, range: ByteRange) -> impl Stream<Item = (ChunkIndex, ByteRange)> {
        stream::iter(self.geometry.split(range).enumerate()).then(|(i, piece)| async move {
            if i % CHUNKS_PER_TURN == CHUNKS_PER_TURN - 1 {
                tokio::task::yield_now().await;
            }
            piece
        })
    }

    fn residency(&self, chunk: ChunkIndex) -> Residency {
        match self.cache.state(chunk).content() {
            Content::Absent if self.is_zero(chunk) => Residency::Zero { dirty: false },
            Content::Absent => Residency::Absent,
            Content::Clean => Residency::Clean,
            Content::Dirty => Residency::Dirty,
            Content::Zero => Residency::Zero { dirty: true },
        }
    }

    /// Repeats a cache change from where it stopped, filling the chunk that stopped it, until all of it is done.
    async fn until_done<F>(self: &Arc<Self>, range: ByteRange, change: F) -> Result<(), VolumeError>
    where
        F: Fn(&Cache, &Volume, ByteRange) -> Result<Progress, CacheError> + Clone + Send + 'static,
    {
        let mut rest = range;
        loop {
            let (volume, change) = (Arc::clone(self), change.clone());
            let progress = cache::blocking(&self.cache, move |cache| change(cache, &volume, rest)).await;
            match progress.map_err(|e| self.cache_error(e))? {
                Progress::Done => return Ok(()),
                Progress::NeedsFill { chunk, at } => {
                    self.fill_all([chunk]).await?;
                    rest = self.range(at, range.end() - at)?;
                }
            }
        }
    }

    /// Makes chunks resident that a change needs and that must be fetched for it.
    async fn fill_all(self: &Arc<Self>, chunks: impl IntoIterator<Item = ChunkIndex>) -> Result<(), VolumeError> {
        let missing: Vec<_> = chunks.into_iter().filter(|chunk| self.must_fetch(*chunk)).collect();
        stream::iter(missing.into_iter().map(|chunk| self.fill(chunk)))
            .buffer_unordered(FETCHES_PER_REQUEST)
            .try_collect()
            .await
    }

    /// The chunk that an edge of a range cuts in two, if it does.
    fn chunk_cut_by(&self, edge: u64) -> Option<ChunkIndex> {
        let inside = edge < self.geometry.image_size() && !edge.is_multiple_of(self.geometry.chunk_size());
        inside.then(|| self.geometry.chunk_at(edge))
    }

    fn must_fetch(&self, chunk: ChunkIndex) -> bool {
        self.cache.state(chunk).content() == Content::Absent && !self.is_zero(chunk)
    }

    /// Whether a chunk that was just seen missing is zeros in the published image.
    fn is_zero(&self, chunk: ChunkIndex) -> bool {
        self.image.read().is_zero(chunk)
    }

    fn image(&self) -> Arc<Manifest> {
        Arc::clone(&self.image.read())
    }

    fn range(&self, offset: u64, len: u64) -> Result<ByteRange, VolumeError> {
        let range = ByteRange::new(offset, len);
        range.filter(|r| self.geometry.contains(*r)).ok_or_else(|| VolumeError::OutOfRange {
            range: range.or(ByteRange::new(offset, 0)).unwrap_or_else(|| self.geometry.chunk_range(ChunkIndex(0))),
            image_size: self.geometry.image_size(),
        })
    }

    async fn still_open(&self) -> Result<tokio::sync::RwLockReadGuard<'_, bool>, VolumeError> {
        let open = self.open.read().await;
        if *open { Ok(open) } else { Err(VolumeError::Closed(self.export_id.clone())) }
    }

    async fn enter(&self, range: ByteRange) -> Result<tokio::sync::RwLockReadGuard<'_, bool>, VolumeError> {
        self.range(range.offset(), range.len())?;
        self.still_open().await
    }

    async fn enter_to_write(&self, range: ByteRange) -> Result<tokio::sync::RwLockReadGuard<'_, bool>, VolumeError> {
        if self.read_only {
            return Err(VolumeError::ReadOnly(self.export_id.clone()));
        }
        self.enter(range).await
    }

    /// As [`still_open`](Self::still_open), without waiting; `None` also while the volume is being closed. Only who closes it
    /// ever has the door to himself, and he waits for everybody else first.
    fn still_open_at_once(&self) -> Option<tokio::sync::RwLockReadGuard<'_, bool>> {
        self.open.try_read().ok().filter(|open| **open)
    }

    /// As [`enter`](Self::enter), without waiting; `None` if it would have to wait, or would fail.
    fn enter_at_once(&self, range: ByteRange) -> Option<tokio::sync::RwLockReadGuard<'_, bool>> {
        self.still_open_at_once().filter(|_| self.geometry.contains(range))
    }

    /// As [`enter_to_write`](Self::enter_to_write), without waiting; `None` if it would have to wait, or would fail.
    fn enter_to_write_at_once(&self, range: ByteRange) -> Option<tokio::sync::RwLockReadGuard<'_, bool>> {
        self.enter_at_once(range).filter(|_| !self.read_only)
    }

    fn cache_error(&self, error: CacheError) -> VolumeError {
        let error = match error {
            CacheError::NoSpace(_) => VolumeError::NoSpace(self.export_id.clone()),
            CacheError::Failed(why) => return VolumeError::Failed(why),
            other => {
                let text = format!("export {}: {other}", self.export_id);
                tracing::error!(export = %self.export_id, "{text}");
                VolumeError::Failed(text.into())
            }
        };
        self.note_disk_error(&error);
        error
    }

    /// Returns once the volume is being closed.
    pub async fn closing(&self) {
        // Never an error: the sender is our own.
        let _ = self.closing.subscribe().wait_for(|closing| *closing).await;
    }

    /// What `work` comes to; but it is given up once the volume is being closed, which waits for who is inside: a store may not
    /// answer for long.
    async fn unless_closing<T>(&self, work: impl Future<Output = Result<T, VolumeError>>) -> Result<T, VolumeError> {
        tokio::select! {
            biased;
            done = work => done,
            () = self.closing() => Err(VolumeError::Closed(self.export_id.clone())),
        }
    }

    /// Ends all requests and a publish that is uploading, and seals the cache. The remote data stays, and so does the cache.
    async fn close(&self) -> Result<(), CacheError> {
        self.closing.send_replace(true);
        let mut open = self.open.write().await;
        if !std::mem::replace(&mut *open, false) {
            return Ok(());
        }
        cache::blocking(&self.cache, Cache::close).await
    }
}

/// The length of a range that is held in memory. Requests are far smaller than `usize`.
fn buffer_len(range: ByteRange) -> usize {
    buffer_len_of(range.len())
}

#[allow(clippy::cast_possible_truncation, reason = "lengths inside one request or chunk")]
fn buffer_len_of(len: u64) -> usize {
    len as usize
}
