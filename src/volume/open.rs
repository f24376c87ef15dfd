//! Opening a volume: which published image the cache stands on, and what to do when the head is another.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::{Mutex, RwLock};

use super::ahead::ReadAhead;
use super::ancestry::Ancestry;
use super::faults::Faults;
use super::fill::Fills;
use super::head::Swap;
use super::meter::Meter;
use super::order::Order;
use super::registry::{ExportError, ExportStatus, HeadWriter, Operation};
use super::seen::SeenHead;
use super::{Services, Volume, VolumeError};
use crate::cache::journal::{self, JOURNAL_FILE};
use crate::cache::{self, Base, CacheError, open::Opening};
use crate::disk::{self, Disk};
use crate::manifest::Manifest;
use crate::manifest::head::{CLONE_SEED_FILE, CloneSeed, CurrentRef, Head, MAX_HEAD_BYTES};
use crate::store::StoreError;
use crate::store::keys::ExportKeys;
use crate::units::{ExportId, Generation, RandomId, SnapshotId};

/// How many manifests an opening follows from a newer head back to the cache's snapshot: each may have 16 MiB and more. A head
/// that is farther ahead is taken for a newer one.
const OPENING_STEPS: usize = 32;

impl Services {
    /// The image that a head stands for, and what a cache of it is relative to.
    pub(super) async fn published_image(&self, head: &Head) -> Result<(Base, Manifest), ExportError> {
        let id = &head.export_id;
        if let Some(snapshot) = head.current {
            let manifest = self.read_manifest(id, head.geometry, snapshot).await?;
            Ok((Base { snapshot: Some(snapshot), generation: manifest.generation() }, manifest))
        } else if let Some(seed) = &head.seed {
            let snapshot = seed.source_snapshot_id;
            let manifest = self.read_manifest(&seed.source_export_id, head.geometry, snapshot).await?;
            Ok((Base { snapshot: Some(snapshot), generation: Generation(0) }, manifest.seed_of(id.clone())))
        } else {
            Ok((Base::default(), Manifest::empty(id.clone(), head.geometry)))
        }
    }

    /// What the cache of an export is opened, or made, by.
    pub(super) fn opening(&self, dir: PathBuf, head: &Head, base: Base) -> Opening {
        Opening {
            disk: Arc::clone(&self.disk),
            dir,
            export_id: head.export_id.clone(),
            geometry: head.geometry,
            base,
            incarnation: head.incarnation,
            aside_memory: Arc::clone(self.publish_budget.aside()),
        }
    }

    /// Gives an export of the older direct mode, which only has `refs/current.json`, its head.
    pub(super) async fn adopt(&self, id: &ExportId) -> Result<Option<Head>, ExportError> {
        let keys = self.root.export(id);
        let object = match self.store.get(&keys.current_ref(), MAX_HEAD_BYTES).await {
            Ok(object) => object,
            Err(StoreError::NotFound { .. }) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let current = CurrentRef::decode(&object.bytes, &keys.current_ref()).map_err(ExportError::damaged)?;
        let manifest = keys.manifest(current.snapshot_id);
        if self.root.resolve(&current.manifest_key).as_ref() != Ok(&manifest) {
            let text = format!("{}: manifest_key is not {manifest}, where its snapshot's must be", keys.current_ref());
            return Err(ExportError::Damaged(text.into()));
        }
        let geometry = self.read_geometry(id, current.snapshot_id).await?;
        // Without an incarnation: a cache of the export may be there, and it is the same export still.
        let head = Head::new(id.clone(), geometry, None).published(current.snapshot_id);
        Ok(Some(match self.create_head(&head).await? {
            Swap::Landed => head,
            // Another server adopted it first.
            Swap::Lost { found, .. } => found.head,
        }))
    }
}

impl Volume {
    /// Opens the cache, settles what a crash left, and stands on the head, unless dirty data here builds on another.
    pub(super) async fn open(
        services: Arc<Services>,
        dir: PathBuf,
        head: &Head,
        read_only: bool,
    ) -> Result<Arc<Self>, ExportError> {
        let (head_base, head_image) = services.published_image(head).await?;
        let opening = services.opening(dir.clone(), head, head_base);
        let opened = cache::blocking_io(move || opening.open()).await;
        let cache = opened.map_err(|e| local_error(&head.export_id, e))?;
        let (base, dirty) = (cache.base(), cache.is_dirty());
        let keys = services.root.export(&head.export_id);
        let another = created_anew(head, cache.incarnation(), base);
        if another && dirty {
            return Err(another_export(&keys, &dir));
        }
        // With nothing of its own in it, the cache need not stand where the head was once: that may not even be there any more.
        let follows = another || (base != head_base && !dirty && !services.left_a_journal(head, &dir).await?);
        if follows && !another {
            services.refuse_older_head(head, base, &dir).await?;
        }
        let stands_on_head = base == head_base || follows;
        let image = if stands_on_head { head_image } else { services.image_of(head, base, &dir).await? };
        cache.note_incarnation(head.incarnation);
        let volume = Arc::new(Self {
            export_id: head.export_id.clone(),
            geometry: head.geometry,
            read_only,
            keys,
            services,
            cache: Arc::new(cache),
            image: Arc::new(RwLock::new(Arc::new(image))),
            seen: Mutex::new(SeenHead::of(head_base)),
            fills: Fills::default(),
            faults: Faults::default(),
            ahead: ReadAhead::default(),
            order: Order::default(),
            meter: Meter::default(),
            open: tokio::sync::RwLock::new(true),
            closing: tokio::sync::watch::Sender::new(false),
            publishing: Mutex::default(),
            operation: Mutex::new(Operation::Idle),
        });
        if follows {
            volume.drop_local(head_base, head.incarnation, volume.image()).await?;
        }
        if another {
            // Whatever was being published of the one before.
            volume.drop_journal().await?;
        }
        volume.settle_journal().await?;
        volume.follow_head().await?;
        Ok(volume)
    }

    /// A cache without dirty chunks follows a head that another server moved; one with dirty chunks stays, and its
    /// next publish reports the conflict.
    async fn follow_head(self: &Arc<Self>) -> Result<(), ExportError> {
        let head = self.stored_head().await?.head;
        if self.builds_on(&head) {
            return self.note_seed(&head).await;
        }
        self.services.refuse_older_head(&head, self.cache.base(), self.cache.dir()).await?;
        if !self.cache.is_dirty() {
            tracing::info!(export = %self.export_id, "another server published since; its snapshot is served from now on");
            return self.stand_on(&head).await;
        }
        if self.services.identity.shares_cache_root_with(&head) {
            return Err(copied_cache(&self.keys, &head, self.cache.dir()));
        }
        match self.conflict(&head) {
            conflict @ ExportError::Conflict { .. } => tracing::warn!(export = %self.export_id, "{conflict}"),
            another => return Err(another),
        }
        self.learn_generation().await;
        Ok(())
    }

    /// Whether a head is the one that the changes here build on.
    pub(super) fn builds_on(&self, head: &Head) -> bool {
        head.current == self.expected_head() && !self.is_of_another_export(head)
    }

    /// Whether a head is certainly that of an export which was created under this one's name after this one had been deleted.
    pub(super) fn is_of_another_export(&self, head: &Head) -> bool {
        head.geometry != self.geometry || created_anew(head, self.cache.incarnation(), self.cache.base())
    }

    /// Why nothing that builds on what the cache stands on may be published over a head; the conflict is noted.
    pub(super) fn conflict(&self, head: &Head) -> ExportError {
        if self.is_of_another_export(head) {
            return another_export(&self.keys, self.cache.dir());
        }
        let export_id = self.export_id.clone();
        let moved_by = if self.services.identity.shares_cache_root_with(head) {
            HeadWriter::CopyOfThisCacheRoot
        } else {
            HeadWriter::AnotherServer
        };
        if head.current == self.expected_head() {
            return ExportError::HeadRewritten { export_id, moved_by };
        }
        let name = |id: Option<SnapshotId>| id.map_or_else(|| "none".to_owned(), |id| id.to_string());
        let (expected, found) = (name(self.expected_head()), name(head.current));
        let conflict = ExportError::Conflict { export_id, expected, found, moved_by };
        self.note_foreign_head(head, &conflict);
        conflict
    }

    /// Keeps the seed of a clone that was never published beside its cache.
    pub(super) async fn note_seed(&self, head: &Head) -> Result<(), ExportError> {
        let Some(seed) = head.seed.as_ref().filter(|_| head.current.is_none()) else { return Ok(()) };
        let bytes = seed.encode();
        self.file_io("write", CLONE_SEED_FILE, move |disk, dir| {
            match disk::read_file(disk, &dir.join(CLONE_SEED_FILE), MAX_HEAD_BYTES)? {
                Some(there) if there == bytes => Ok(()),
                _ => disk::replace_file(disk, dir, CLONE_SEED_FILE, &bytes),
            }
        })
        .await
    }

    /// Everything about the export that can be said without asking the store.
    pub(super) fn status(&self) -> ExportStatus {
        let (resident_chunks, dirty_chunks) = self.cache.counts();
        let seen = self.seen_head();
        ExportStatus {
            export_id: self.export_id.clone(),
            geometry: self.geometry,
            read_only: self.read_only,
            resident_chunks,
            dirty_chunks,
            damaged_chunks: self.damaged_chunks(),
            cache_free_bytes: self.cache.space().ok().map(|space| space.free),
            corrupt_fetches: self.fills.corrupt.load(Ordering::Relaxed),
            snapshot_generation: self.cache.base().generation,
            remote_head_generation: seen.generation,
            remote_head_snapshot_id: seen.snapshot,
            current_snapshot_id: self.expected_head(),
            operation: *self.operation.lock(),
            progress: self.progress(),
            store_outage: self.services.store.outage(),
            failed: self.cache.failure().map(|why| why.to_string()),
            faults: self.faults(),
        }
    }
}

impl Services {
    /// Refuses to drop what a cache holds for a head that the snapshot under it did not lead to: the head was rolled back, and
    /// the cache may be the only copy of what came after.
    async fn refuse_older_head(&self, head: &Head, base: Base, dir: &Path) -> Result<(), ExportError> {
        let Base { snapshot: Some(snapshot), generation } = base else { return Ok(()) };
        if generation == Generation(0) {
            return Ok(());
        }
        let (id, geometry) = (&head.export_id, head.geometry);
        if self.ancestry_within(OPENING_STEPS, id, geometry, head.current, (snapshot, generation)).await?
            != Ancestry::Foreign
        {
            return Ok(());
        }
        let (key, dir) = (self.root.export(id).head(), dir.display());
        let current = head.current.map_or_else(|| "no snapshot".to_owned(), |id| format!("snapshot {id}"));
        let text = format!(
            "{key} names {current}, to which snapshot {snapshot} (generation {generation}) did not lead, on which the cache in \
             {dir} stands: the object was rolled back, or the export deleted and created anew, and the cache may be the only copy of \
             what came after. Restore the object; or, to serve what it names, unload the export, move the folder away and open it again"
        );
        Err(ExportError::Damaged(text.into()))
    }

    /// Whether a publish was interrupted that is not settled.
    async fn left_a_journal(&self, head: &Head, dir: &Path) -> Result<bool, ExportError> {
        Ok(self.file_io(&head.export_id, "read", dir, JOURNAL_FILE, journal::load).await?.is_some())
    }

    /// An operation, in one word, on a small file in the folder of a cache; `work` gets the disk and the folder.
    pub(super) async fn file_io<T: Send + 'static>(
        &self,
        id: &ExportId,
        operation: &'static str,
        dir: &Path,
        file: &str,
        work: impl FnOnce(&dyn Disk, &Path) -> io::Result<T> + Send + 'static,
    ) -> Result<T, ExportError> {
        let (disk, folder) = (Arc::clone(&self.disk), dir.to_owned());
        let done = cache::blocking_io(move || work(&*disk, &folder)).await;
        done.map_err(|e| local_error(id, cache::disk_error(operation, &dir.join(file), e)))
    }

    /// The image that a cache stands on whose base is not the head's: another server published since, or a publish of
    /// our own was not settled.
    async fn image_of(&self, head: &Head, base: Base, dir: &Path) -> Result<Manifest, ExportError> {
        let (id, geometry) = (head.export_id.clone(), head.geometry);
        let as_of_then = match (base.snapshot, base.generation) {
            (None, _) => Head::new(id, geometry, None),
            (Some(snapshot), Generation(0)) => {
                let path = dir.join(CLONE_SEED_FILE);
                let read =
                    |disk: &dyn Disk, dir: &Path| disk::read_file(disk, &dir.join(CLONE_SEED_FILE), MAX_HEAD_BYTES);
                let noted = self.file_io(&head.export_id, "read", dir, CLONE_SEED_FILE, read).await?;
                let noted = noted.ok_or_else(|| "it is missing".to_owned()).and_then(|bytes| CloneSeed::decode(&bytes));
                let other = |seed: &CloneSeed| format!("source_snapshot_id is {}", seed.source_snapshot_id);
                let fits =
                    |seed: CloneSeed| if seed.source_snapshot_id == snapshot { Ok(seed) } else { Err(other(&seed)) };
                let seed = noted.and_then(fits).map_err(|problem| {
                    let path = path.display();
                    let text =
                        format!("{path} does not name snapshot {snapshot}, on which the cache stands: {problem}");
                    ExportError::Damaged(text.into())
                })?;
                Head::new(id, geometry, Some(seed))
            }
            (Some(snapshot), _) => Head::new(id, geometry, None).published(snapshot),
        };
        Ok(self.published_image(&as_of_then).await?.1)
    }
}

/// Whether two incarnations are known and not the same.
pub(super) fn differ(a: Option<RandomId>, b: Option<RandomId>) -> bool {
    a.zip(b).is_some_and(|(a, b)| a != b)
}

/// Whether a head is that of an export which was created after the one of a cache, an incarnation that stands on `base`.
fn created_anew(head: &Head, incarnation: Option<RandomId>, base: Base) -> bool {
    match incarnation.zip(head.incarnation) {
        Some((ours, theirs)) => ours != theirs,
        // Told apart by what they begin as: a head that names a snapshot never goes back to naming none, and until then it names
        // what the export began as.
        None => head.current.is_none() && base != beginning(head),
    }
}

fn another_export(keys: &ExportKeys, dir: &Path) -> ExportError {
    let (key, dir) = (keys.head(), dir.display());
    let text = format!(
        "{key} is of another export than the cache in {dir}: it was deleted in the store, and created anew. To serve the one \
         in the store unload the export, move the folder away and open it again; what was not published is in the folder alone"
    );
    ExportError::Damaged(text.into())
}

pub(super) fn copied_cache(keys: &ExportKeys, head: &Head, dir: &Path) -> ExportError {
    let (key, dir) = (keys.head(), dir.display());
    let current = head.current.map_or_else(|| "none".to_owned(), |id| id.to_string());
    let text = format!(
        "{dir} is a copy or an older state of the cache that published snapshot {current}, which {key} names: it holds \
         changes, and does not know that snapshot. To serve what is in the store unload the export, move the folder away and \
         open it again; the changes are in the folder alone"
    );
    ExportError::Damaged(text.into())
}

/// What a cache of an export stands on of which nothing is published yet.
fn beginning(head: &Head) -> Base {
    Base { snapshot: head.seed.as_ref().map(|seed| seed.source_snapshot_id), generation: Generation(0) }
}

/// What an error about the files of a cache is to whoever uses the export.
pub(super) fn local_error(id: &ExportId, error: CacheError) -> ExportError {
    match error {
        CacheError::NoSpace(_) => VolumeError::NoSpace(id.clone()).into(),
        CacheError::Failed(why) => VolumeError::Failed(why).into(),
        // A file that is not there where others are, or of no length that it can have, is no fault of the disk.
        CacheError::Io { ref source, .. }
            if !matches!(source.kind(), ErrorKind::NotFound | ErrorKind::InvalidData | ErrorKind::UnexpectedEof) =>
        {
            VolumeError::Failed(format!("export {id}: {error}").into()).into()
        }
        CacheError::Io { .. } | CacheError::Damaged { .. } => {
            ExportError::Damaged(format!("export {id}: {error}").into())
        }
    }
}
