//! What a start, or the next publish, does with what an interrupted publish left.
//!
//! The journal's phase decides; every step may be repeated, since recovery may itself be interrupted:
//! - INTENT, PREPARED: a swap may have landed, or still may. At INTENT none was sent when the journal was written; but the
//!   folder may be a copy of one whose server went on. If the head is ours, or was built upon ours: finish. If not: move
//!   the head's version by a swap of our own, so that any other can only fail (S7); then remove the objects. If the line
//!   of the head cannot be followed, the objects stay: a leak is no loss.
//! - COMMITTED: finish.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::ancestry::Ancestry;
use super::head::{StoredHead, Swap, head_is_gone};
use super::open::{copied_cache, differ};
use super::registry::ExportError;
use super::{Volume, VolumeError};
use crate::cache::journal::{self, Journal, Phase};
use crate::cache::{self, Base, Cache};
use crate::disk::Disk;
use crate::manifest::Manifest;
use crate::manifest::head::{CLONE_SEED_FILE, Head};
use crate::sabotage::{Rule, breaks};
use crate::units::RandomId;

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
        if journal.phase == Phase::Committed {
            return self.finish_interrupted(&journal).await;
        }
        if journal.phase == Phase::Intent && self.is_ours(&journal) {
            // We sent no swap. Until the cut ends, every write to it copies what will never be read, and the store may be away.
            cache::blocking(&self.cache, Cache::uncut).await.map_err(|e| self.cache_error(e))?;
        }
        match self.outcome(&journal).await? {
            // Our own life never had its snapshot published at INTENT: the folder is an older state of one that went on.
            Ancestry::Published if journal.phase == Phase::Intent && self.cache.is_dirty_beside_cut() => {
                let stored = self.stored_head().await?;
                Err(copied_cache(&self.keys, &stored.head, self.cache.dir()))
            }
            Ancestry::Published => self.finish_interrupted(&journal).await,
            // A server that writes no session into its journal may swap from a newer head than it began at.
            Ancestry::Foreign => self.roll_back(&journal, journal.session_id.is_some()).await,
            Ancestry::Unknown => {
                tracing::warn!(
                    export = %self.export_id, snapshot = %journal.snapshot_id,
                    "whether the snapshot was published cannot be told from the manifests: its objects are kept"
                );
                self.roll_back(&journal, false).await
            }
        }
    }

    /// Whether this run of the server wrote the journal: then no other run ever sends its swap.
    fn is_ours(&self, journal: &Journal) -> bool {
        journal.session_id == Some(self.services.identity.writer().session_id)
    }

    /// As [`settle_journal`](Self::settle_journal), for a publish that failed perhaps before it had a journal.
    pub(super) async fn settle_or_uncut(self: &Arc<Self>) -> Result<(), ExportError> {
        self.settle_journal().await?;
        // Nothing is in the cut any more if the journal was settled; if there was none, all of it still is.
        Ok(cache::blocking(&self.cache, Cache::uncut).await.map_err(|e| self.cache_error(e))?)
    }

    /// Whether the journal's snapshot became `stored` or was built upon.
    pub(super) async fn landed(&self, journal: &Journal, stored: &StoredHead) -> Result<Ancestry, ExportError> {
        if self.is_of_another_export(&stored.head) || differ(journal.incarnation, stored.head.incarnation) {
            return Ok(Ancestry::Unknown);
        }
        let ours = (journal.snapshot_id, journal.generation);
        let head = stored.head.current;
        if head == journal.parent {
            return Ok(Ancestry::Foreign);
        }
        self.services.ancestry(&self.export_id, self.geometry, head, ours).await
    }

    /// What became of the journal's swap; unless that is unknown, it is final: a swap that is still on its way, from here or
    /// from a server of which this cache is a copy, can only fail (S7).
    async fn outcome(&self, journal: &Journal) -> Result<Ancestry, ExportError> {
        if breaks(Rule::TakeUnclearForFailed) || (breaks(Rule::RemoveAtIntent) && journal.phase == Phase::Intent) {
            return Ok(Ancestry::Foreign);
        }
        let stored = self.stored_head().await?;
        let ancestry = self.landed(journal, &stored).await?;
        let moved_on = stored.head.current != journal.parent;
        let never_sent = journal.phase == Phase::Intent && self.is_ours(journal);
        if ancestry != Ancestry::Foreign || moved_on || never_sent || breaks(Rule::DeleteBeforeFence) {
            return Ok(ancestry);
        }
        // The head is still the one that the swap replaces.
        let moved = stored.head.bumped().written_by(self.services.identity.writer());
        match self.services.swap_head(&stored, &moved).await? {
            Swap::Landed => Ok(Ancestry::Foreign),
            Swap::Lost { found, .. } => self.landed(journal, &found).await,
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

    /// Drops the clean chunks of the cache, whose blobs are in the store by then; how many bytes that freed.
    pub(super) async fn trim_cache(self: &Arc<Self>) -> Result<u64, ExportError> {
        let _operation = self.begin(super::registry::Operation::Trimming)?;
        let _open = self.still_open().await?;
        // What is gone from the store may be in the cache alone.
        self.services.check_blobs(&self.image(), None, "nothing was dropped from the cache").await?;
        let freed = cache::blocking(&self.cache, Cache::evict_clean).await.map_err(|e| self.cache_error(e))?;
        tracing::info!(export = %self.export_id, freed_bytes = freed, "the clean chunks of the cache were dropped");
        Ok(freed)
    }

    /// Forgets the cache's content and takes a head's image in its place.
    pub(super) async fn stand_on(self: &Arc<Self>, head: &Head) -> Result<(), ExportError> {
        if head.geometry != self.geometry {
            return Err(self.conflict(head));
        }
        let (base, manifest) = self.services.published_image(head).await?;
        // Before anybody can write: what is written then builds on it.
        self.note_seed(head).await?;
        Ok(self.drop_local(base, head.incarnation, Arc::new(manifest)).await?)
    }

    /// Forgets the cache's content; what is missing is that of an image.
    pub(super) async fn drop_local(
        &self,
        base: Base,
        incarnation: Option<RandomId>,
        image: Arc<Manifest>,
    ) -> Result<(), VolumeError> {
        let holder = Arc::clone(&self.image);
        let reset = move |cache: &Cache| cache.reset(base, incarnation, || *holder.write() = image);
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
        self.services.read_head(&self.export_id).await?.ok_or_else(|| head_is_gone(&self.keys.head()))
    }
}
