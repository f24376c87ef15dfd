//! The published snapshots of an export, newest first: what a user can still clone or read.
//!
//! Only the store is asked, and only for manifests: one request per snapshot, one manifest in memory at a time. What is
//! listed is the line of parents of the head, so an object that an aborted publish left is never taken for a snapshot.

use super::Services;
use super::registry::ExportError;
use crate::manifest::Manifest;
use crate::store::keys::ExportKeys;
use crate::units::{ChunkIndex, ExportId, Generation, SnapshotId};

/// The most snapshots that are listed: as many as an ancestry is followed for.
pub const MAX_SNAPSHOTS: usize = 4096;

/// What is known of one published snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotInfo {
    /// Its id.
    pub id: SnapshotId,
    /// Its place in the line, from 1.
    pub generation: Generation,
    /// When it was taken, in RFC 3339, as its manifest has it; empty if an older tool left it out.
    pub created_at: String,
    /// The snapshot it was taken on.
    pub parent: Option<SnapshotId>,
    /// Bytes of the image that are not in a run of zeros of a whole chunk.
    pub data_bytes: u64,
    /// How much of that it brought itself: the size of its own blob.
    pub new_bytes: u64,
}

/// The line of snapshots that led to a head.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Line {
    /// Newest first.
    pub snapshots: Vec<SnapshotInfo>,
    /// Whether it reaches back to the first one. Not so if a manifest of the line was deleted or, written by an older
    /// tool, does not name its parent; or beyond [`MAX_SNAPSHOTS`].
    pub complete: bool,
}

impl SnapshotInfo {
    fn of(id: SnapshotId, manifest: &Manifest, keys: &ExportKeys) -> Self {
        let geometry = manifest.geometry();
        let own = [keys.delta(id), keys.base(id)];
        let (mut data_bytes, mut new_bytes) = (0, 0);
        for entry in manifest.entries() {
            let len = geometry.chunk_range(entry.chunk).len();
            data_bytes += len;
            if own.contains(&manifest.blobs()[entry.blob as usize]) {
                new_bytes += len;
            }
        }
        if manifest.has_base() {
            // Every chunk without an entry is somewhere in the base, whatever it holds.
            let chunks = (0..geometry.chunk_count()).map(ChunkIndex);
            data_bytes = chunks.map(|chunk| geometry.chunk_range(chunk).len()).sum();
        }
        Self {
            id,
            generation: manifest.generation(),
            created_at: manifest.created_at().to_owned(),
            parent: manifest.parent(),
            data_bytes,
            new_bytes,
        }
    }
}

impl Services {
    /// The snapshots of an export in the store.
    ///
    /// # Errors
    /// [`ExportError::NotFound`] if it is not there, [`ExportError::Damaged`] if its head or a manifest cannot be read,
    /// [`ExportError::StoreUnavailable`].
    pub(super) async fn snapshots(&self, id: &ExportId) -> Result<Line, ExportError> {
        let not_found = || ExportError::NotFound(id.clone(), "in the store");
        let head = self.read_head(id).await?.ok_or_else(not_found)?.head;
        let keys = self.root.export(id);
        let mut line = Line { snapshots: Vec::new(), complete: true };
        let mut at = head.current;
        while let Some(snapshot) = at {
            if line.snapshots.len() == MAX_SNAPSHOTS {
                line.complete = false;
                break;
            }
            let manifest = if line.snapshots.is_empty() {
                self.read_manifest(id, head.geometry, snapshot).await?
            } else {
                match self.find_manifest(id, head.geometry, snapshot).await? {
                    Some(manifest) => manifest,
                    None => {
                        line.complete = false;
                        break;
                    }
                }
            };
            // A line that does not descend would never end.
            if line.snapshots.last().is_some_and(|newer| newer.generation <= manifest.generation()) {
                let text = format!("{} names a parent that is not older", keys.manifest(snapshot));
                return Err(ExportError::Damaged(text.into()));
            }
            line.complete = manifest.parent().is_some() || manifest.generation().0 <= 1;
            at = manifest.parent();
            line.snapshots.push(SnapshotInfo::of(snapshot, &manifest, &keys));
        }
        Ok(line)
    }
}
