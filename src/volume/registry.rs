//! Export name → open volume: create, open, clone, unload, discover.
//!
//! An export is known by its name once the store is listed, and can be used from then on; the heads are read one after the
//! other meanwhile. Until it is used only what the list shows is kept of its head; then its manifest is loaded and its cache
//! opened. An idle export is closed again. One that cannot be served stays listed with the reason, and is tried again at the
//! next use; no other export notices.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use futures_util::stream::{self, StreamExt};
use parking_lot::{Mutex, RwLock};

use super::export::{Export, Known};
use super::faults::Fault;
use super::head::Swap;
use super::kept::{self, Kept, KeptStates};
use super::open::local_error;
use super::snapshots::Line;
use super::{Outage, PublishProgress, Services, Volume, VolumeError};
use crate::background;
use crate::cache::journal::{JOURNAL_FILE, Kind};
use crate::cache::{self, Base, open as cache_files};
use crate::manifest::head::{CloneSeed, Head};
use crate::units::{ExportId, Generation, Geometry, SnapshotId, UnitError};

/// How many exports are closed at a time.
const EXPORTS_AT_A_TIME: usize = 64;
/// How many heads are read at a time: each may have [`MAX_HEAD_BYTES`](crate::manifest::head::MAX_HEAD_BYTES), whatever is
/// in it, and none stays in memory.
const HEADS_AT_A_TIME: usize = 16;
/// How many interrupted publishes are settled at a time.
const JOURNALS_AT_A_TIME: usize = 16;
/// How long a head that could not be read is left alone, at first and at most.
const FIRST_PAUSE: Duration = Duration::from_secs(10);
const MAX_PAUSE: Duration = Duration::from_secs(600);

/// How long an export stays open that nothing uses.
pub const IDLE_BEFORE_CLOSE: Duration = Duration::from_mins(10);
/// How often idle exports are looked for.
pub const IDLE_CHECK_INTERVAL: Duration = Duration::from_mins(1);

/// What the list of exports says of one.
#[derive(Debug, Clone)]
pub struct ExportSummary {
    /// The export's name.
    pub export_id: ExportId,
    /// Sizes; `None` if the head could not be read.
    pub geometry: Option<Geometry>,
    /// The head, or `None` if nothing is published or the head could not be read.
    pub current_snapshot_id: Option<SnapshotId>,
    /// Why the export cannot be served, if it cannot.
    pub failed: Option<String>,
    /// Whether nothing but its name is known yet.
    pub discovering: bool,
    /// What is wrong with it otherwise, the worst first.
    pub faults: Vec<Fault>,
}

/// What is going on with one export right now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Nothing but reads and writes.
    Idle,
    /// A snapshot is being published.
    Snapshotting,
    /// A compaction is being published.
    Compacting,
    /// The local state is being dropped.
    Resetting,
    /// The clean chunks of the cache are being dropped.
    Trimming,
    /// The export is being unloaded.
    Closing,
}

impl Operation {
    /// As `operation_state` names it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Snapshotting => "snapshotting",
            Self::Compacting => "compacting",
            Self::Resetting => "resetting",
            Self::Trimming => "trimming",
            Self::Closing => "closing",
        }
    }
}

/// Everything that can be said of one loaded export.
#[derive(Debug, Clone)]
pub struct ExportStatus {
    /// The export's name.
    pub export_id: ExportId,
    /// Sizes.
    pub geometry: Geometry,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Chunks whose bytes are in the cache, dirty ones included.
    pub resident_chunks: u64,
    /// Chunks that the next snapshot publishes.
    pub dirty_chunks: u64,
    /// What is free on the file system of the cache, in bytes; `None` if it does not say.
    pub cache_free_bytes: Option<u64>,
    /// Chunks that are known not to be in the store as they were published.
    pub damaged_chunks: u64,
    /// How often a fetch found a chunk to be so, since the export was opened.
    pub corrupt_fetches: u64,
    /// The generation the cache builds on.
    pub snapshot_generation: Generation,
    /// The generation of the head in the store, as it was last read; `None` if only its snapshot could be.
    pub remote_head_generation: Option<Generation>,
    /// The head in the store, as it was last read.
    pub remote_head_snapshot_id: Option<SnapshotId>,
    /// The snapshot the cache builds on.
    pub current_snapshot_id: Option<SnapshotId>,
    /// What is going on.
    pub operation: Operation,
    /// How far a publish is.
    pub progress: Option<PublishProgress>,
    /// Since when, and with what error, the store does not answer, if the last request to it had no answer.
    pub store_outage: Option<Outage>,
    /// Why the export takes no more writes, if a local disk error stopped it.
    pub failed: Option<String>,
    /// What is wrong with it otherwise, the worst first.
    pub faults: Vec<Fault>,
}

/// What a publish left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Published {
    /// Whether anything was published: a snapshot with nothing dirty creates nothing.
    pub created: bool,
    /// The generation now.
    pub generation: Generation,
    /// The snapshot now; `None` if the export was never published and had nothing to publish.
    pub snapshot_id: Option<SnapshotId>,
}

/// Why an operation on an export was refused or failed, by what the caller tells its user.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ExportError {
    /// A size or chunk size that cannot be.
    #[error(transparent)]
    Unit(#[from] UnitError),
    /// Not loaded here (and, for open and clone, not in the store either).
    #[error("export {0} is not {1}")]
    NotFound(ExportId, &'static str),
    /// The export's name is taken, here or in the store.
    #[error("export {0} exists already: choose another id, or open it with POST /v1/exports/open")]
    Exists(ExportId),
    /// Open of an export that is open.
    #[error("export {0} is loaded already")]
    AlreadyLoaded(ExportId),
    /// Clone of a snapshot that was never published under that export.
    #[error("export {0} has no published snapshot {1}")]
    SnapshotNotFound(ExportId, SnapshotId),
    /// Clone or copy of an export without a published snapshot.
    #[error("export {0} has nothing published: take a snapshot of it once something is written, or compact it")]
    NothingPublished(ExportId),
    /// Whoever wanted it does not any more; it is as it was before.
    #[error("export {0} is as it was before: the operation was cancelled")]
    Cancelled(ExportId),
    /// One publish, reset or trim of the cache at a time.
    #[error("export {0} is busy {1}: wait for it to end and repeat")]
    Busy(ExportId, &'static str),
    /// Another server moved the head: both images are intact, this one's changes are still dirty.
    #[error(
        "export {export_id}: the head in the store is snapshot {found}, not {expected} on which this server builds: {moved_by} published it. Nothing was overwritten and the dirty data here is kept; clone snapshot {found} elsewhere to look at it, or drop the local changes with cache/reset"
    )]
    Conflict {
        /// The export.
        export_id: ExportId,
        /// The snapshot this server builds on, or "none".
        expected: String,
        /// The snapshot the store has, or "none".
        found: String,
        /// The server that published it.
        moved_by: HeadWriter,
    },
    /// The head was rewritten while a publish uploaded, though it names the same snapshot; nothing was published.
    #[error(
        "export {export_id}: {moved_by} rewrote the head in the store while the snapshot was uploaded, so it was not published. The dirty data here is kept: repeat the call once no other server uses this export"
    )]
    HeadRewritten {
        /// The export.
        export_id: ExportId,
        /// The server that rewrote it.
        moved_by: HeadWriter,
    },
    /// The store did not answer in time.
    #[error("{0}")]
    StoreUnavailable(Arc<str>),
    /// What the store or the local disk holds of this export is damaged or does not fit; it says what and where.
    #[error("{0}")]
    Damaged(Arc<str>),
    /// Local reads, writes or syncs fail.
    #[error(transparent)]
    Volume(#[from] VolumeError),
}

/// The server that wrote a head which is not the one expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeadWriter {
    /// One over a cache root of its own.
    AnotherServer,
    /// One over a cache root of the same id as this server's: either is a copy.
    CopyOfThisCacheRoot,
}

impl std::fmt::Display for HeadWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::AnotherServer => "another server",
            Self::CopyOfThisCacheRoot => "a server over a copy of this cache root (stop one of the two for good)",
        })
    }
}

impl ExportError {
    pub(super) fn damaged(e: impl std::fmt::Display) -> Self {
        Self::Damaged(e.to_string().into())
    }
}

/// Runs work to its end even if the caller goes away.
async fn in_full<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    background::outcome(tokio::spawn(work).await).await
}

/// All exports of a server.
#[derive(Debug)]
pub struct Registry {
    services: Arc<Services>,
    cache_root: PathBuf,
    exports: RwLock<BTreeMap<ExportId, Arc<Export>>>,
    /// What is being created, opened or closed, so that two calls never make one export twice.
    arriving: Mutex<BTreeSet<ExportId>>,
    /// Which exports are closed or read-only, also after a restart.
    kept: tokio::sync::Mutex<KeptStates>,
    /// The room for that is taken once there is an export.
    kept_room: tokio::sync::OnceCell<()>,
}

/// Keeps other calls from creating or loading an export while it lives.
#[derive(Debug)]
struct Arriving<'a> {
    registry: &'a Registry,
    id: ExportId,
}

impl Drop for Arriving<'_> {
    fn drop(&mut self) {
        self.registry.arriving.lock().remove(&self.id);
    }
}

impl Registry {
    /// Finds every export under the export root, reads every head once, and settles what a crash left of their publishes.
    ///
    /// # Errors
    /// As [`list_names`](Self::list_names).
    pub async fn discover(services: Arc<Services>, cache_root: PathBuf) -> Result<Arc<Self>, ExportError> {
        let registry = Self::list_names(services, cache_root).await?;
        registry.read_on().await;
        Ok(registry)
    }

    /// Finds the name of every export under the export root: each can be used from now on.
    ///
    /// # Errors
    /// [`ExportError::StoreUnavailable`] if the store cannot be listed; what keeps it from knowing which exports are closed.
    pub async fn list_names(services: Arc<Services>, cache_root: PathBuf) -> Result<Arc<Self>, ExportError> {
        let kept = KeptStates::load(&services, &cache_root).await?;
        let folders = services.store.list_folders(services.root.prefix()).await?;
        let named = |id: ExportId| match kept.of(&id) {
            Kept::Open { read_only } => Some((id, Export::new(Known::Name, read_only))),
            Kept::Closed => None,
        };
        let exports = folders.iter().filter_map(|name| name.parse().ok()).filter_map(named).collect();
        Ok(Arc::new(Self {
            services,
            cache_root,
            exports: RwLock::new(exports),
            arriving: Mutex::default(),
            kept: tokio::sync::Mutex::new(kept),
            kept_room: tokio::sync::OnceCell::new(),
        }))
    }

    /// Reads the heads of what was listed, and settles what a crash left of their publishes. One bad export is no error, and
    /// holds up no other.
    pub async fn read_on(&self) {
        tokio::join!(self.read_heads(), self.settle_journals());
        self.report_strays().await;
    }

    /// Tries heads again that could not be read, at a pace that slows down, until there are none.
    pub async fn read_again(&self) {
        let mut pause = FIRST_PAUSE;
        while !self.unread().is_empty() {
            self.services.clock.sleep(pause).await;
            self.read_heads().await;
            pause = MAX_PAUSE.min(pause * 2);
        }
    }

    async fn read_heads(&self) {
        let unread = self.unread();
        let read = |(id, export)| async move { self.read_head_of(&id, &export).await };
        stream::iter(unread).for_each_concurrent(HEADS_AT_A_TIME, read).await;
    }

    fn unread(&self) -> Vec<(ExportId, Arc<Export>)> {
        let all = self.exports.read();
        let unread = all.iter().filter(|(_, export)| export.is_unread());
        unread.map(|(id, export)| (id.clone(), Arc::clone(export))).collect()
    }

    /// Reads the head of a name that the listing had; a folder without one is no export and is left out from now on.
    async fn read_head_of(&self, id: &ExportId, export: &Arc<Export>) {
        match self.services.read_head(id).await {
            Ok(Some(stored)) => export.note_read(id, Known::of(&stored.head)),
            Ok(None) => {
                let mut exports = self.exports.write();
                if export.is_unread() && exports.get(id).is_some_and(|known| Arc::ptr_eq(known, export)) {
                    exports.remove(id);
                }
            }
            Err(e) => export.note_read(id, Known::Unread(e.to_string())),
        }
    }

    /// Whether a name is taken here. A name that is known from the listing alone is looked at first.
    async fn is_loaded(&self, id: &ExportId) -> bool {
        let listed = self.exports.read().get(id).cloned();
        if let Some(export) = listed.filter(|export| export.is_unread()) {
            self.read_head_of(id, &export).await;
        }
        self.exports.read().contains_key(id)
    }

    /// Opens the exports whose caches have an interrupted publish, which settles it.
    async fn settle_journals(&self) {
        let names = self.list_local(&self.cache_root).await;
        let settle = |id: ExportId| async move {
            let files = self.list_local(&self.cache_root.join(id.as_str())).await;
            if files.iter().any(|name| name == JOURNAL_FILE)
                && let Err(e) = self.volume(&id).await
                && !matches!(e, ExportError::NotFound(..))
            {
                tracing::error!(export = %id, "an interrupted publish is not settled yet: {e}");
            }
        };
        let ids = names.iter().filter_map(|name| name.parse::<ExportId>().ok());
        let known: Vec<_> = ids.filter(|id| self.exports.read().contains_key(id)).collect();
        stream::iter(known).for_each_concurrent(JOURNALS_AT_A_TIME, settle).await;
    }

    /// Caches without an export in the store are reported, for they may hold what was never published.
    async fn report_strays(&self) {
        for name in self.list_local(&self.cache_root).await {
            let Ok(id) = name.parse::<ExportId>() else { continue };
            if self.exports.read().contains_key(&id) || self.kept.lock().await.of(&id) == Kept::Closed {
                continue;
            }
            let files = self.list_local(&self.cache_root.join(id.as_str())).await;
            if files.iter().any(|name| name == cache_files::META_FILE) {
                let reason = format!(
                    "{} is not in the store, but {} holds a cache of it: start with the store that it belongs to, restore the \
                     object, or move the folder away; what was not published is in the folder alone",
                    self.services.root.export(&id).head(),
                    self.cache_root.join(id.as_str()).display()
                );
                self.add_stray(id, reason);
            }
        }
    }

    fn add_stray(&self, id: ExportId, reason: String) {
        // Created or being created since: then its cache is no stray.
        if self.arriving.lock().contains(&id) {
            return;
        }
        if let Entry::Vacant(entry) = self.exports.write().entry(id) {
            tracing::error!(export = %entry.key(), "cannot be served: {reason}");
            entry.insert(Export::new(Known::Failed(reason), false));
        }
    }

    /// The names in a folder of the cache root. One that cannot be listed is reported, and the others go on.
    async fn list_local(&self, dir: &Path) -> Vec<String> {
        let (disk, folder) = (Arc::clone(&self.services.disk), dir.to_owned());
        cache::blocking_io(move || disk.list_dir(&folder)).await.unwrap_or_else(|e| {
            // A file in the cache root is none of ours.
            if e.kind() != io::ErrorKind::NotADirectory {
                tracing::error!("what an earlier run left in {} is not known: {e}", dir.display());
            }
            Vec::new()
        })
    }

    /// All exports, sorted by id.
    #[must_use]
    pub fn list(&self) -> Vec<ExportSummary> {
        let summary = |(id, export): (&ExportId, &Arc<Export>)| {
            // In this order: an export that is closed meanwhile has its head known before.
            let volume = export.volume();
            let known = export.known();
            let (geometry, current) = match &known {
                Known::Read { geometry, current } => (Some(*geometry), *current),
                Known::Name | Known::Unread(_) | Known::Failed(_) => (None, None),
            };
            ExportSummary {
                export_id: id.clone(),
                geometry: volume.as_ref().map_or(geometry, |v| Some(v.geometry())),
                current_snapshot_id: volume.as_ref().map_or(current, |v| v.expected_head()),
                faults: volume.as_ref().map_or_else(|| export.faults(), |v| v.faults()),
                failed: match &volume {
                    Some(volume) => volume.cache.failure().map(|why| why.to_string()),
                    None => known.failed().map(str::to_owned),
                },
                discovering: volume.is_none() && known == Known::Name,
            }
        };
        self.exports.read().iter().map(summary).collect()
    }

    /// The open volume of that name: opens it on first use.
    ///
    /// # Errors
    /// [`ExportError::NotFound`] if it is not loaded here; whatever keeps it from being opened.
    pub async fn volume(&self, id: &ExportId) -> Result<Arc<Volume>, ExportError> {
        let export = self.export(id)?;
        self.open_export(id, &export).await
    }

    fn export(&self, id: &ExportId) -> Result<Arc<Export>, ExportError> {
        let found = self.exports.read().get(id).cloned();
        found.ok_or_else(|| {
            ExportError::NotFound(id.clone(), "loaded here: create it, or open it if it is in the store")
        })
    }

    /// Has an export be so from now on, also after a restart.
    async fn keep(&self, id: &ExportId, kept: Kept) -> Result<(), ExportError> {
        self.kept.lock().await.keep(&self.services, &self.cache_root, id, kept).await
    }

    async fn open_export(&self, id: &ExportId, export: &Arc<Export>) -> Result<Arc<Volume>, ExportError> {
        self.kept_room.get_or_init(|| kept::reserve(&self.services, &self.cache_root)).await;
        export.open(&self.services, self.cache_root.join(id.as_str()), id).await
    }

    /// A new export of zeros.
    ///
    /// # Errors
    /// [`ExportError::Exists`] if the name is taken here or in the store.
    pub async fn create(&self, id: ExportId, geometry: Geometry) -> Result<ExportStatus, ExportError> {
        self.create_with(Head::created(id, geometry, None)).await
    }

    /// A new export that starts as a published snapshot of another (default: its head).
    ///
    /// # Errors
    /// [`ExportError::NotFound`], [`ExportError::SnapshotNotFound`] and [`ExportError::NothingPublished`] about the
    /// source; [`ExportError::Exists`] about the new one.
    pub async fn clone_export(
        &self,
        id: ExportId,
        source: ExportId,
        snapshot: Option<SnapshotId>,
    ) -> Result<ExportStatus, ExportError> {
        let not_found = || ExportError::NotFound(source.clone(), "in the store");
        let head = self.services.read_head(&source).await?.ok_or_else(not_found)?.head;
        let snapshot = match (snapshot, head.current) {
            (Some(asked), _) => self.services.published(&source, &head, asked).await?,
            (None, Some(current)) => current,
            (None, None) => return Err(ExportError::NothingPublished(source)),
        };
        let seed = CloneSeed { source_export_id: source, source_snapshot_id: snapshot };
        self.create_with(Head::created(id, head.geometry, Some(seed))).await
    }

    async fn create_with(&self, head: Head) -> Result<ExportStatus, ExportError> {
        let id = head.export_id.clone();
        let _arriving = self.arriving(&id)?;
        let exists = || ExportError::Exists(id.clone());
        if self.is_loaded(&id).await {
            return Err(exists());
        }
        if self.services.is_taken(&id).await? {
            return Err(exists());
        }
        // Once the head is there, another server may open the export and publish it: nobody takes a head back. So whatever keeps
        // this server from having a cache of it is found out before.
        self.rehearse_cache(&head).await?;
        // One of that name may have been closed before it was deleted in the store.
        self.keep(&id, Kept::Open { read_only: false }).await?;
        match self.services.create_head(&head).await {
            Ok(Swap::Landed) => {}
            Ok(Swap::Lost { .. }) => {
                self.discard_cache(&id).await;
                return Err(exists());
            }
            Err(e) => {
                self.discard_cache(&id).await;
                if e.acknowledged {
                    self.exports.write().insert(id, Export::new(Known::of(&head), false));
                }
                return Err(e.into());
            }
        }
        let export = Export::new(Known::of(&head), false);
        self.exports.write().insert(id.clone(), Arc::clone(&export));
        let opened = self.open_export(&id, &export).await;
        let volume =
            opened.inspect_err(|e| tracing::warn!(export = %id, "created, to be opened at its first use: {e}"))?;
        tracing::info!(export = %id, "created");
        Ok(volume.status())
    }

    fn arriving(&self, id: &ExportId) -> Result<Arriving<'_>, ExportError> {
        if self.arriving.lock().insert(id.clone()) {
            Ok(Arriving { registry: self, id: id.clone() })
        } else {
            Err(ExportError::Busy(id.clone(), "being created, opened or closed"))
        }
    }

    /// Finds out whether an export that is to be created can have a cache here.
    async fn rehearse_cache(&self, head: &Head) -> Result<(), ExportError> {
        let id = &head.export_id;
        let dir = self.cache_root.join(id.as_str());
        if self.services.file_io(id, "listing", &dir, "", cache_files::exists).await? {
            return Err(ExportError::Exists(id.clone()));
        }
        let opening = self.services.opening(dir, head, Base::default());
        let vacant = opening.clone();
        let vacant = cache::blocking_io(move || vacant.refuse_data_without_states()).await;
        vacant.map_err(|e| local_error(id, e))?;
        let rehearsed = cache::blocking_io(move || opening.rehearse()).await;
        if rehearsed.is_err() {
            self.discard_cache(id).await;
        }
        rehearsed.map_err(|e| local_error(id, e))
    }

    /// Nothing half-made stays behind.
    async fn discard_cache(&self, id: &ExportId) {
        let (disk, dir) = (Arc::clone(&self.services.disk), self.cache_root.join(id.as_str()));
        if let Err(left) = cache::blocking_io(move || cache_files::discard(&*disk, &dir)).await {
            tracing::warn!(export = %id, "the cache of an export that could not be created is still there: {left}");
        }
    }

    /// Loads an export that is in the store; one that only has `refs/current.json` gets its missing head.
    ///
    /// # Errors
    /// [`ExportError::AlreadyLoaded`], [`ExportError::NotFound`].
    pub async fn open(&self, id: ExportId, read_only: bool) -> Result<ExportStatus, ExportError> {
        let _arriving = self.arriving(&id)?;
        if self.is_loaded(&id).await {
            return Err(ExportError::AlreadyLoaded(id));
        }
        let head = match self.services.read_head(&id).await? {
            Some(stored) => stored.head,
            None => self.services.adopt(&id).await?.ok_or_else(|| ExportError::NotFound(id.clone(), "in the store"))?,
        };
        let export = Export::new(Known::of(&head), read_only);
        let volume = self.open_export(&id, &export).await?;
        if let Err(e) = self.keep(&id, Kept::Open { read_only }).await {
            if let Err(unsealed) = volume.close().await {
                tracing::warn!(export = %id, "closed without a clean stop; the next open recovers it: {unsealed}");
            }
            return Err(e);
        }
        tracing::info!(export = %id, read_only, "loaded");
        self.exports.write().insert(id, export);
        Ok(volume.status())
    }

    /// Everything about one export. One that was closed because it was idle is not opened for this.
    ///
    /// # Errors
    /// As [`volume`](Self::volume).
    pub async fn status(&self, id: &ExportId) -> Result<ExportStatus, ExportError> {
        match self.export(id)?.status().await {
            Some(status) => Ok(ExportStatus { store_outage: self.services.store.outage(), ..status }),
            None => Ok(self.volume(id).await?.status()),
        }
    }

    /// The published snapshots of an export that is loaded here, newest first, as the store has them now.
    ///
    /// # Errors
    /// [`ExportError::NotFound`]; whatever keeps its head or a manifest from being read.
    pub async fn snapshots(&self, id: &ExportId) -> Result<Line, ExportError> {
        let export = self.export(id)?;
        let line = self.services.snapshots(id).await?;
        if let Some(newest) = line.snapshots.first() {
            export.note_listed(newest.id, newest.generation);
        }
        Ok(line)
    }

    /// Publishes what is dirty.
    ///
    /// # Errors
    /// [`ExportError::Busy`], [`ExportError::Conflict`], and whatever keeps it from being uploaded.
    pub async fn snapshot(&self, id: &ExportId) -> Result<Published, ExportError> {
        let volume = self.volume(id).await?;
        in_full(async move { volume.publish_counted(Kind::Snapshot).await }).await
    }

    /// Publishes the whole image afresh.
    ///
    /// # Errors
    /// As [`snapshot`](Self::snapshot).
    pub async fn compact(&self, id: &ExportId) -> Result<Published, ExportError> {
        let volume = self.volume(id).await?;
        in_full(async move { volume.publish_counted(Kind::Compact).await }).await
    }

    /// Gives up the publish under way and waits until everything is as before it. `false` if there is none, or if it is
    /// too late: then it was taken to its end.
    ///
    /// # Errors
    /// As [`volume`](Self::volume).
    pub async fn cancel(&self, id: &ExportId) -> Result<bool, ExportError> {
        Ok(self.volume(id).await?.cancel().await)
    }

    /// Drops all local state; what was not published is gone.
    ///
    /// # Errors
    /// [`ExportError::Busy`]; [`ExportError::StoreUnavailable`] if the head cannot be read.
    pub async fn reset(&self, id: &ExportId) -> Result<(), ExportError> {
        let volume = self.volume(id).await?;
        in_full(async move { volume.reset().await }).await
    }

    /// Drops the chunks of the cache that are as published, to be fetched again when they are read; how many bytes that freed.
    ///
    /// # Errors
    /// [`ExportError::Busy`]; [`ExportError::StoreUnavailable`] if the store does not answer, and [`ExportError::Damaged`] if
    /// it no longer has what would be dropped; those of the disk.
    pub async fn trim_cache(&self, id: &ExportId) -> Result<u64, ExportError> {
        let volume = self.volume(id).await?;
        in_full(async move { volume.trim_cache().await }).await
    }

    /// Unloads an export here, until it is opened again; cache and remote data stay.
    ///
    /// # Errors
    /// [`ExportError::NotFound`], [`ExportError::Busy`]; those of the disk that keeps it closed after a restart.
    pub async fn unload(&self, id: &ExportId) -> Result<(), ExportError> {
        let export = self.export(id)?;
        // Of two calls at once one would take what the other has kept for what was there before.
        let _one_at_a_time = self.arriving(id)?;
        let before = self.kept.lock().await.of(id);
        self.keep(id, Kept::Closed).await?;
        let unloaded = self.unload_one(id, &export).await;
        if unloaded.is_err() {
            self.keep(id, before).await?;
        }
        unloaded
    }

    async fn unload_one(&self, id: &ExportId, export: &Arc<Export>) -> Result<(), ExportError> {
        if let Some(volume) = export.end_openings().await {
            let _operation = volume.begin(Operation::Closing)?;
            if let Err(e) = volume.close().await {
                tracing::warn!(export = %id, "unloaded without a clean stop; the next open recovers it: {e}");
            }
        }
        // Of two calls one may have gone on to load it anew.
        let mut exports = self.exports.write();
        if exports.get(id).is_some_and(|known| Arc::ptr_eq(known, export)) {
            exports.remove(id);
        }
        drop(exports);
        tracing::info!(export = %id, "unloaded");
        Ok(())
    }

    pub(super) fn open_volumes(&self) -> Vec<Arc<Volume>> {
        self.exports.read().values().filter_map(|export| export.volume()).collect()
    }

    fn all(&self) -> Vec<Arc<Export>> {
        self.exports.read().values().cloned().collect()
    }

    /// Closes every export that nothing has used for `idle` and that has nothing unpublished or wrong; its next use opens it.
    pub async fn close_idle(&self, idle: Duration) {
        for export in self.all() {
            export.close_if_idle(idle).await;
        }
    }

    /// Closes idle exports for as long as it is polled.
    pub async fn keep_closing_idle(&self) -> Infallible {
        loop {
            self.services.clock.sleep(IDLE_CHECK_INTERVAL).await;
            self.close_idle(IDLE_BEFORE_CLOSE).await;
        }
    }

    /// Ends publishes, flushes and seals every volume; the server stops afterwards.
    pub async fn close(&self) {
        for export in self.all() {
            export.closed().await;
        }
        stream::iter(self.open_volumes())
            .for_each_concurrent(EXPORTS_AT_A_TIME, |volume| async move {
                if let Err(e) = volume.close().await {
                    tracing::error!(export = %volume.export_id(), "stopped without the clean-stop seal: {e}");
                }
            })
            .await;
    }
}
