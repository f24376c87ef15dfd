//! What is known of the head in the store: as it was when it was last read, by whatever read it.
//!
//! A head that another server moved is a conflict from the moment it is found, until one is read on which the changes here
//! build, or a reset drops them.

use std::sync::Arc;

use super::Volume;
use super::faults::{self, Cause, Fault};
use super::registry::{ExportError, Operation};
use crate::cache::Base;
use crate::manifest::head::Head;
use crate::units::{Generation, SnapshotId};

/// The head as it was last read.
#[derive(Debug, Clone)]
pub(super) struct SeenHead {
    pub snapshot: Option<SnapshotId>,
    /// `None` if its manifest could not be read, which alone has it.
    pub generation: Option<Generation>,
    /// Why nothing that builds on the cache can be published over it.
    pub conflict: Option<Fault>,
}

impl SeenHead {
    /// The head of which `base` is the image.
    pub(super) fn of(base: Base) -> Self {
        let snapshot = base.snapshot.filter(|_| base.generation.0 > 0);
        Self { snapshot, generation: Some(base.generation), conflict: None }
    }
}

impl Volume {
    /// The head as it was last read.
    pub(super) fn seen_head(&self) -> SeenHead {
        self.seen.lock().clone()
    }

    /// The head is the one that the cache stands on.
    pub(super) fn note_own_head(&self) {
        *self.seen.lock() = SeenHead::of(self.cache.base());
    }

    /// The head is one that another server made.
    pub(super) fn note_foreign_head(&self, head: &Head, conflict: &ExportError) {
        let found = Fault::new(Cause::Conflict, self.services.clock.now(), conflict.to_string().into());
        let mut seen = self.seen.lock();
        if seen.snapshot != head.current {
            (seen.snapshot, seen.generation) = (head.current, None);
        }
        faults::put(&mut seen.conflict, found);
    }

    /// Finds out the generation of the head, if only its snapshot is known. That it cannot be read is no error.
    pub(super) async fn learn_generation(self: &Arc<Self>) {
        let SeenHead { snapshot: Some(snapshot), generation: None, .. } = self.seen_head() else { return };
        let found = self.services.find_manifest(&self.export_id, self.geometry, snapshot).await;
        let mut seen = self.seen.lock();
        if let Ok(Some(manifest)) = found
            && seen.snapshot == Some(snapshot)
        {
            seen.generation = Some(manifest.generation());
        }
    }

    /// The head was a snapshot while the snapshots were being listed. It may have moved since, by a publish of our own.
    pub(super) fn note_listed(&self, snapshot: SnapshotId, generation: Generation) {
        let operation = self.operation.lock();
        let base = self.cache.base();
        if *operation != Operation::Idle || generation < base.generation || Some(snapshot) == base.snapshot {
            return;
        }
        let mut seen = self.seen.lock();
        (seen.snapshot, seen.generation) = (Some(snapshot), Some(generation));
    }
}
