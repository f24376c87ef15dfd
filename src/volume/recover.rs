//! What a start, or the next publish, does with what an interrupted publish left.
//!
//! The journal's phase decides; every step may be repeated, since recovery may itself be interrupted:
//! - INTENT: no swap was ever sent. Remove the objects; all that was dirty still is.
//! - PREPARED: a swap may have landed. If the head is ours, or was built upon ours: finish. If not: move the head's
//!   version by a swap of our own, so that a delayed one can only fail (S7); then remove the objects. If the line of
//!   the head cannot be followed, the objects stay: a leak is no loss.
//! - COMMITTED: finish.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::ancestry::Ancestry;
use super::objects::StoredHead;
use super::registry::ExportError;
use super::{Volume, VolumeError};
use crate::cache::journal::{self, Journal, Phase};
use crate::cache::{self, Base, Cache};
use crate::disk::Disk;
use crate::manifest::Manifest;
use crate::manifest::head::{CLONE_SEED_FILE, Head};
use crate::sabotage::{Rule, breaks};
use crate::store::{Condition, StoreError};

impl Volume {
    /// Finishes or rolls back an interrupted publish, if there is one.
    pub(super) async fn settle_journal(self: &Arc<Self>) -> Result<(), ExportError> {
        let found = self.file_io("read", journal::JOURNAL_FILE, journal::load).await?;
        let Some(bytes) = found else { return Ok(()) };
        let path = self.cache.dir().join(journal::JOURNAL_FILE);
        let damaged = |e: journal::JournalError| {
            ExportError::Damaged(format!("{}: {e}; remove it if no publish was under way", path.display()).into())
        };
        let journal = Journal::decode(&bytes, &self.export_id).map_err(damaged)?;
        tracing::info!(
            export = %self.export_id, snapshot = %journal.snapshot_id, phase = ?journal.phase,
            "settling an interrupted publish"
        );
        match journal.phase {
            Phase::Intent => self.roll_back(&journal, true).await,
            Phase::Committed => self.finish_interrupted(&journal).await,
            Phase::Prepared => match self.landed(&journal).await? {
                (Ancestry::Published, _) => self.finish_interrupted(&journal).await,
                (ancestry, stored) => match self.fence(&journal, ancestry, stored).await? {
                    Ancestry::Published => self.finish_interrupted(&journal).await,
                    Ancestry::Foreign => self.roll_back(&journal, true).await,
                    Ancestry::Unknown => {
                        tracing::warn!(
                            export = %self.export_id, snapshot = %journal.snapshot_id,
                            "whether the snapshot was published cannot be told from the manifests: its objects are kept"
                        );
                        self.roll_back(&journal, false).await
                    }
                },
            },
        }
    }

    /// As [`settle_journal`](Self::settle_journal), for a publish that failed perhaps before it had a journal.
    pub(super) async fn settle_or_uncut(self: &Arc<Self>) -> Result<(), ExportError> {
        self.settle_journal().await?;
        // Nothing is in the cut any more if the journal was settled; if there was none, all of it still is.
        Ok(cache::blocking(&self.cache, Cache::uncut).await.map_err(|e| self.cache_error(e))?)
    }

    /// Whether the journal's snapshot became the head or was built upon, and the head as it stands.
    pub(super) async fn landed(&self, journal: &Journal) -> Result<(Ancestry, StoredHead), ExportError> {
        let stored = self.stored_head().await?;
        if self.is_of_another_export(&stored.head) {
            return Ok((Ancestry::Unknown, stored));
        }
        let ours = (journal.snapshot_id, journal.generation);
        let head = stored.head.current;
        if head == journal.parent {
            return Ok((Ancestry::Foreign, stored));
        }
        Ok((self.services.ancestry(&self.export_id, self.geometry, head, ours).await?, stored))
    }

    /// Makes sure that a swap still on its way can only fail, and says whether it landed before that after all.
    async fn fence(
        &self,
        journal: &Journal,
        mut ancestry: Ancestry,
        mut stored: StoredHead,
    ) -> Result<Ancestry, ExportError> {
        let (mut patience, mut given_up) = (self.services.patience(), None);
        loop {
            if breaks(Rule::DeleteBeforeFence) {
                return Ok(Ancestry::Foreign);
            }
            if stored.head.current != journal.parent || ancestry == Ancestry::Unknown {
                // The head moved on without us: the version that the swap was bound to is gone for good.
                return Ok(ancestry);
            }
            if let Some(failure) = given_up {
                return Err(ExportError::from(failure));
            }
            let nudged = stored.head.nudged();
            match self.services.write_head(&nudged, Condition::IfVersion(stored.version)).await {
                Ok(()) => return Ok(Ancestry::Foreign),
                Err(e @ (StoreError::Conflict { .. } | StoreError::Unavailable { .. })) => {
                    given_up = patience.pause_after(e).await.err();
                }
                Err(e) => return Err(e.into()),
            }
            match self.landed(journal).await? {
                (Ancestry::Published, _) => return Ok(Ancestry::Published),
                now => (ancestry, stored) = now,
            }
        }
    }

    async fn roll_back(&self, journal: &Journal, remove_objects: bool) -> Result<(), ExportError> {
        // First: as long as the cut stands, every write to it copies what nobody will read.
        cache::blocking(&self.cache, Cache::uncut).await.map_err(|e| self.cache_error(e))?;
        if remove_objects {
            let snapshot = journal.snapshot_id;
            for key in [self.keys.manifest(snapshot), self.keys.delta(snapshot), self.keys.base(snapshot)] {
                self.services.store.delete(&key).await?;
            }
        }
        self.drop_journal().await
    }

    async fn finish_interrupted(&self, journal: &Journal) -> Result<(), ExportError> {
        let (id, geometry) = (&self.export_id, self.geometry);
        let manifest = self.services.read_manifest(id, geometry, journal.snapshot_id).await?;
        let current = self.finish(journal, manifest).await?;
        let stored = self.services.read_head(&self.export_id).await?;
        // Others may have published since, and have their own there.
        if stored.is_some_and(|stored| stored.head.current == Some(journal.snapshot_id)) {
            self.write_current_ref(&current).await;
        }
        Ok(())
    }

    /// The cache stands on a new snapshot; image and states change together.
    pub(super) async fn commit(&self, base: Base, manifest: Manifest) -> Result<(), VolumeError> {
        let image = Arc::new(manifest);
        let holder = Arc::clone(&self.image);
        let committed = cache::blocking(&self.cache, move |cache| cache.commit(base, || *holder.write() = image)).await;
        committed.map_err(|e| self.cache_error(e))
    }

    /// Drops all local state and stands on the head as it is in the store now.
    pub(super) async fn reset(self: &Arc<Self>) -> Result<(), ExportError> {
        let _operation = self.begin(super::registry::Operation::Resetting)?;
        let _open = self.still_open().await?;
        self.settle_journal().await?;
        let stored = self.stored_head().await?;
        self.stand_on(&stored.head).await?;
        tracing::info!(export = %self.export_id, "reset: everything local was dropped");
        Ok(())
    }

    /// Forgets the cache's content and takes a head's image in its place.
    pub(super) async fn stand_on(self: &Arc<Self>, head: &Head) -> Result<(), ExportError> {
        if head.geometry != self.geometry {
            return Err(self.conflict(head));
        }
        let (base, manifest) = self.services.published_image(head).await?;
        // Before anybody can write: what is written then builds on it.
        self.note_seed(head).await?;
        Ok(self.drop_local(base, Arc::new(manifest)).await?)
    }

    /// Forgets the cache's content; what is missing is that of an image.
    pub(super) async fn drop_local(&self, base: Base, image: Arc<Manifest>) -> Result<(), VolumeError> {
        let holder = Arc::clone(&self.image);
        let reset = move |cache: &Cache| cache.reset(base, || *holder.write() = image);
        cache::blocking(&self.cache, reset).await.map_err(|e| self.cache_error(e))?;
        self.note_own_head();
        self.faults.forget_local();
        Ok(())
    }

    /// The publish is over: its journal goes, and with the first one the note of the clone's seed.
    pub(super) async fn drop_journal(&self) -> Result<(), ExportError> {
        if self.cache.base().generation.0 > 0 {
            self.file_io("removal", CLONE_SEED_FILE, |disk, dir| disk.remove(&dir.join(CLONE_SEED_FILE))).await?;
        }
        self.file_io("removal", journal::JOURNAL_FILE, journal::remove).await
    }

    /// An operation, in one word, on a small file beside the cache, of which the second argument of `work` is the folder.
    pub(super) async fn file_io<T: Send + 'static>(
        &self,
        operation: &'static str,
        file: &str,
        work: impl FnOnce(&dyn Disk, &Path) -> io::Result<T> + Send + 'static,
    ) -> Result<T, ExportError> {
        self.services.file_io(&self.export_id, operation, self.cache.dir(), file, work).await
    }

    /// The head as it stands in the store.
    pub(super) async fn stored_head(&self) -> Result<StoredHead, ExportError> {
        let gone = || ExportError::Damaged(format!("{} is gone from the store", self.keys.head()).into());
        self.services.read_head(&self.export_id).await?.ok_or_else(gone)
    }
}
