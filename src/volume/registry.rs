//! Export name → open volume: create, open, clone, unload, discover.

use std::sync::Arc;

use super::{Volume, VolumeError};
use crate::units::{ExportId, Generation, Geometry, SnapshotId, UnitError};

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
    /// The export is being unloaded.
    Closing,
}

/// Everything that can be said of one loaded export.
#[derive(Debug, Clone)]
pub struct ExportStatus {
    /// The export's name.
    pub export_id: ExportId,
    /// Sizes.
    pub geometry: Geometry,
    /// Chunks whose bytes are in the cache, dirty ones included.
    pub resident_chunks: u64,
    /// Chunks that the next snapshot publishes.
    pub dirty_chunks: u64,
    /// The generation the cache builds on.
    pub snapshot_generation: Generation,
    /// The generation of the head when it was last seen.
    pub remote_head_generation: Generation,
    /// The snapshot the cache builds on.
    pub current_snapshot_id: Option<SnapshotId>,
    /// What is going on.
    pub operation: Operation,
    /// Why the export takes no more writes, if a local disk error stopped it.
    pub failed: Option<String>,
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
    /// Clone of an export without a published snapshot.
    #[error("export {0} has nothing published to clone: take a snapshot of it first")]
    NothingPublished(ExportId),
    /// One publish or reset at a time.
    #[error("export {0} is busy {1}: wait for it to end and repeat")]
    Busy(ExportId, &'static str),
    /// Another server moved the head: both images are intact, this one's changes are still dirty.
    #[error(
        "export {export_id}: the head in the store is snapshot {found}, not {expected} on which this server builds: another server published it. Nothing was overwritten and the dirty data here is kept; clone snapshot {found} elsewhere to look at it, or drop the local changes with cache/reset"
    )]
    Conflict {
        /// The export.
        export_id: ExportId,
        /// The snapshot this server builds on, or "none".
        expected: String,
        /// The snapshot the store has, or "none".
        found: String,
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

/// All exports of a server.
#[derive(Debug)]
pub struct Registry {}

impl Registry {
    /// All exports, sorted by id.
    pub fn list(&self) -> Vec<ExportSummary> {
        todo!()
    }
    /// The open volume of that name: opens it on first use.
    pub async fn volume(&self, id: &ExportId) -> Result<Arc<Volume>, ExportError> {
        let _ = id;
        todo!()
    }
    /// A new export of zeros.
    pub async fn create(&self, id: ExportId, geometry: Geometry) -> Result<ExportStatus, ExportError> {
        let _ = (id, geometry);
        todo!()
    }
    /// Loads an export that is in the store.
    pub async fn open(&self, id: ExportId, read_only: bool) -> Result<ExportStatus, ExportError> {
        let _ = (id, read_only);
        todo!()
    }
    /// A new export that starts as a published snapshot of another (default: its head).
    pub async fn clone_export(
        &self,
        id: ExportId,
        source: ExportId,
        snapshot: Option<SnapshotId>,
    ) -> Result<ExportStatus, ExportError> {
        let _ = (id, source, snapshot);
        todo!()
    }
    /// Everything about one export.
    pub async fn status(&self, id: &ExportId) -> Result<ExportStatus, ExportError> {
        let _ = id;
        todo!()
    }
    /// Publishes what is dirty.
    pub async fn snapshot(&self, id: &ExportId) -> Result<Published, ExportError> {
        let _ = id;
        todo!()
    }
    /// Publishes the whole image afresh.
    pub async fn compact(&self, id: &ExportId) -> Result<Published, ExportError> {
        let _ = id;
        todo!()
    }
    /// Drops all local state; what was not published is gone.
    pub async fn reset(&self, id: &ExportId) -> Result<(), ExportError> {
        let _ = id;
        todo!()
    }
    /// Unloads an export here; cache and remote data stay.
    pub async fn unload(&self, id: &ExportId) -> Result<(), ExportError> {
        let _ = id;
        todo!()
    }
    /// Flushes and seals every volume; the server stops afterwards.
    pub async fn close(&self) {
        todo!()
    }
}
