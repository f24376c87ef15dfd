//! Which snapshots led to a head: a manifest names its parent.
//!
//! A swap that seemed to fail may have landed and been built upon by another server since; its objects are then part
//! of a published image and must stay.

use super::Services;
use super::registry::ExportError;
use crate::manifest::head::Head;
use crate::units::{ExportId, Generation, Geometry, SnapshotId};

/// How many manifests are followed before the answer is "unknown".
const MAX_STEPS: usize = 4096;

/// Whether a snapshot is the head or led to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ancestry {
    /// It was published.
    Published,
    /// It never was the head of this line.
    Foreign,
    /// The line has manifests of other tools that do not name their parents.
    Unknown,
}

impl Services {
    /// Follows the parents of `head` until `snapshot`, whose own generation is `generation`, must have appeared.
    pub(super) async fn ancestry(
        &self,
        id: &ExportId,
        geometry: Geometry,
        head: Option<SnapshotId>,
        (snapshot, generation): (SnapshotId, Generation),
    ) -> Result<Ancestry, ExportError> {
        self.ancestry_within(MAX_STEPS, id, geometry, head, (snapshot, generation)).await
    }

    /// As [`ancestry`](Self::ancestry), following that many manifests at most.
    pub(super) async fn ancestry_within(
        &self,
        max_steps: usize,
        id: &ExportId,
        geometry: Geometry,
        head: Option<SnapshotId>,
        (snapshot, generation): (SnapshotId, Generation),
    ) -> Result<Ancestry, ExportError> {
        let mut at = head;
        for _ in 0..max_steps {
            let Some(current) = at else { return Ok(Ancestry::Foreign) };
            if current == snapshot {
                return Ok(Ancestry::Published);
            }
            let Some(manifest) = self.find_manifest(id, geometry, current).await? else { return Ok(Ancestry::Unknown) };
            if manifest.generation() <= generation {
                return Ok(Ancestry::Foreign);
            }
            if manifest.parent().is_none() {
                return Ok(Ancestry::Unknown);
            }
            at = manifest.parent();
        }
        Ok(Ancestry::Unknown)
    }

    /// A snapshot that an export's head is or came from. An object that an aborted publish left is not one.
    pub(super) async fn published(
        &self,
        id: &ExportId,
        head: &Head,
        asked: SnapshotId,
    ) -> Result<SnapshotId, ExportError> {
        let not_found = || ExportError::SnapshotNotFound(id.clone(), asked);
        if head.current == Some(asked) {
            return Ok(asked);
        }
        let manifest = self.find_manifest(id, head.geometry, asked).await?.ok_or_else(not_found)?;
        let ancestry = self.ancestry(id, head.geometry, head.current, (asked, manifest.generation())).await?;
        if ancestry == Ancestry::Foreign { Err(not_found()) } else { Ok(asked) }
    }
}
