//! Publishing: the cut, the journal, the upload, the swap.
//!
//! The order, and what a crash after each step finds (`recover.rs` acts on it):
//! 1. *cut* – nothing yet: the dirty set is dirty as before.
//! 2. journal INTENT, durable – objects may be in the store that no head names: they are removed, once no head can come
//!    to name them. The folder with this journal may be a copy whose original goes on, so the head tells that, too.
//! 3. blob, then manifest – the same.
//! 4. the cut's record synced, journal PREPARED, durable – the swap may have landed, or still may: the head tells.
//! 5. swap of `volume.json`, from the version read before step 1, and read back – the moment of truth.
//! 6. journal COMMITTED, then the clean marks – the marks are redone.
//! 7. journal removed, then `refs/current.json` – a copy that lags behind while it cannot be written.
//!
//! Clients read and write throughout; they wait only for the cut and the change of states in step 6.

use std::sync::Arc;
use std::time::Instant;

use bytes::Bytes;
use futures_util::future;
use futures_util::stream::{self, StreamExt};
use parking_lot::Mutex;
use tokio::task::JoinSet;
use tracing::Instrument;

use super::ancestry::Ancestry;
use super::budget::{BACKGROUND_FETCHES, Held};
use super::fill::Remote;
use super::head::{StoredHead, Swap};
use super::progress::Publishing;
use super::registry::{ExportError, Operation, Published};
use super::{Volume, VolumeError};
use crate::background;
use crate::cache::journal::{self, Journal, Kind, Phase};
use crate::cache::publish::CutChunk;
use crate::cache::{self, Cache, states::Content};
use crate::manifest::head::CurrentRef;
use crate::manifest::{Change, Manifest};
use crate::sabotage::{Rule, breaks};
use crate::slices::slices;
use crate::store::parts::upload_floor;
use crate::store::{BoxError, StoreError};
use crate::units::{ChunkIndex, SnapshotId};

/// How many chunks of a publish are on their way to the upload at a time: as many as fetches that nobody waits for.
const CHUNKS_AT_A_TIME: usize = BACKGROUND_FETCHES as usize;

/// Keeps other operations out of a volume while it lives.
#[derive(Debug)]
pub(super) struct OperationGuard<'a>(&'a Volume);

impl Drop for OperationGuard<'_> {
    fn drop(&mut self) {
        *self.0.operation.lock() = Operation::Idle;
    }
}

/// A chunk on its way into the blob.
#[derive(Debug, Clone, Copy)]
enum Planned {
    /// Dirty at the cut: read as it was then.
    Cut(CutChunk),
    /// As published: from the cache if it is there, else from the store.
    Published(ChunkIndex),
}

impl Planned {
    fn chunk(self) -> ChunkIndex {
        match self {
            Self::Cut(CutChunk { chunk, .. }) | Self::Published(chunk) => chunk,
        }
    }
}

impl Volume {
    /// Begins an operation that excludes all others.
    pub(super) fn begin(&self, operation: Operation) -> Result<OperationGuard<'_>, ExportError> {
        let mut current = self.operation.lock();
        if *current != Operation::Idle {
            return Err(ExportError::Busy(self.export_id.clone(), current.as_str()));
        }
        *current = operation;
        drop(current);
        Ok(OperationGuard(self))
    }

    /// The snapshot that `volume.json` must name for our changes to build on it.
    pub(super) fn expected_head(&self) -> Option<SnapshotId> {
        let base = self.cache.base();
        if base.generation.0 == 0 { None } else { base.snapshot }
    }

    /// As [`publish`](Self::publish), counted and logged.
    pub(super) async fn publish_counted(self: &Arc<Self>, kind: Kind) -> Result<Published, ExportError> {
        let started = Instant::now();
        let operation = kind.as_str();
        let span = tracing::info_span!("operation", export = %self.export_id, operation);
        async {
            let result = self.publish(kind).await;
            self.meter.published(kind, started, &result);
            self.note_publish(&result).await;
            match &result {
                Ok(Published { created: true, generation, snapshot_id: Some(snapshot) }) => {
                    let seconds = started.elapsed().as_secs_f64();
                    tracing::info!(%snapshot, generation = generation.0, seconds, "published");
                }
                Ok(_) => tracing::info!("nothing is dirty, so nothing was published"),
                Err(e) => tracing::warn!("not published: {e}"),
            }
            result
        }
        .instrument(span)
        .await
    }

    /// Publishes what is dirty, or the whole image.
    async fn publish(self: &Arc<Self>, kind: Kind) -> Result<Published, ExportError> {
        let operation = self.begin(match kind {
            Kind::Snapshot => Operation::Snapshotting,
            Kind::Compact => Operation::Compacting,
        })?;
        let mut publishing = self.publishing(operation);
        let _open = self.still_open().await?;
        self.settle_journal().await?;
        if kind == Kind::Snapshot && !self.cache.is_dirty() {
            return Ok(self.nothing_to_publish());
        }
        // Before anything is uploaded: a head that moved makes all of it useless. This very head is what the swap replaces, so
        // that moving it makes a publish fail, whoever moves it (S7).
        let head = self.check_head().await?;
        let cut = cache::blocking(&self.cache, Cache::cut).await.map_err(|e| self.cache_error(e))?;
        let journal = self.intent(kind);
        let result = self.publish_cut(&head, &journal, cut, &publishing.publishing).await;
        match result {
            Ok(()) => Ok(published(&journal)),
            Err(e) => {
                // Whatever can be undone is undone now; the rest at the next publish or start, by the same rules.
                if let Err(unsettled) = self.settle_or_uncut().await {
                    tracing::warn!(export = %self.export_id, "an aborted publish is not cleared away yet: {unsettled}");
                }
                // The swap had landed after all.
                if self.cache.base().snapshot == Some(journal.snapshot_id) {
                    tracing::warn!(export = %self.export_id, "published, but not in good order: {e}");
                    return Ok(published(&journal));
                }
                if matches!(e, ExportError::Cancelled(_)) {
                    publishing.was_cancelled();
                }
                Err(e)
            }
        }
    }

    fn nothing_to_publish(&self) -> Published {
        let base = self.cache.base();
        Published { created: false, generation: base.generation, snapshot_id: self.expected_head() }
    }

    fn intent(&self, kind: Kind) -> Journal {
        let snapshot_id = SnapshotId::generate();
        Journal {
            phase: Phase::Intent,
            kind,
            export_id: self.export_id.clone(),
            snapshot_id,
            parent: self.expected_head(),
            generation: self.cache.base().generation.next(),
            manifest_key: self.keys.manifest(snapshot_id).to_string(),
            blob_key: match kind {
                Kind::Snapshot => self.keys.delta(snapshot_id).to_string(),
                Kind::Compact => self.keys.base(snapshot_id).to_string(),
            },
            incarnation: self.cache.incarnation(),
            session_id: Some(self.services.identity.writer().session_id),
        }
    }

    async fn publish_cut(
        self: &Arc<Self>,
        head: &StoredHead,
        intent: &Journal,
        cut: Vec<CutChunk>,
        publishing: &Arc<Publishing>,
    ) -> Result<(), ExportError> {
        if !breaks(Rule::SkipIntent) {
            self.write_journal(intent, Phase::Intent).await?;
        }
        let image = self.image();
        let upload = async {
            let manifest = match intent.kind {
                Kind::Snapshot => self.upload_delta(intent, &image, cut, publishing).await?,
                Kind::Compact => self.upload_base(intent, &image, cut, publishing).await?,
            };
            if breaks(Rule::SwapBeforeManifest) {
                self.move_head(head, intent).await?;
            }
            let key = self.keys.manifest(intent.snapshot_id);
            let written = async { Ok(self.services.write_manifest(&key, manifest.clone()).await?) };
            // The head must not name an image of which a part is gone.
            let uploaded = self.blob_key(intent);
            let checked = self.services.check_blobs(&manifest, Some(&uploaded), "nothing was published");
            future::try_join(written, checked).await?;
            Ok::<_, ExportError>(manifest)
        };
        // Most of what must be on the disk before the swap goes there beside the upload.
        let ahead =
            async { cache::blocking(&self.cache, Cache::sync_raw).await.map_err(|e| self.cache_error(e).into()) };
        let upload = future::try_join(upload, ahead);
        // Only the upload can be given up in the middle; from PREPARED on every step is taken to its end.
        let manifest = tokio::select! {
            uploaded = upload => uploaded?.0,
            () = self.closing() => return Err(VolumeError::Closed(self.export_id.clone()).into()),
            () = publishing.cancelled() => return Err(ExportError::Cancelled(self.export_id.clone())),
        };
        cache::blocking(&self.cache, Cache::sync_cut).await.map_err(|e| self.cache_error(e))?;
        if !breaks(Rule::SkipPrepared) {
            self.write_journal(intent, Phase::Prepared).await?;
        }
        self.move_head(head, intent).await?;
        match self.finish(intent, manifest).await {
            Ok(current) => self.write_current_ref(&current).await,
            // It is published all the same: what is left to do here is done by the next publish or start, if not now.
            Err(e) => {
                tracing::warn!(export = %self.export_id, "published, but not in good order: {e}");
                if let Err(unsettled) = self.settle_journal().await {
                    tracing::warn!(export = %self.export_id, "a publish is not settled yet: {unsettled}");
                }
            }
        }
        Ok(())
    }

    /// One blob with what the cut holds; all else stays where it is.
    async fn upload_delta(
        self: &Arc<Self>,
        journal: &Journal,
        image: &Arc<Manifest>,
        cut: Vec<CutChunk>,
        publishing: &Arc<Publishing>,
    ) -> Result<Manifest, ExportError> {
        let mut changes: Vec<_> = cut.iter().filter(|c| c.zero).map(|c| (c.chunk, Change::Zero)).collect();
        let dirty: Vec<_> = cut.iter().filter(|c| !c.zero).copied().map(Planned::Cut).collect();
        changes.extend(self.adopt_unhashed(image, &cut).await?);
        changes.extend(self.upload(journal, dirty.into_iter(), publishing).await?);
        let (parent, now) = (journal.parent, self.services.clock.now());
        let blob = self.blob_key(journal);
        image.successor(self.export_id.clone(), parent, now, blob, changes).map_err(ExportError::damaged)
    }

    /// One blob with every chunk that is not zeros.
    async fn upload_base(
        self: &Arc<Self>,
        journal: &Journal,
        image: &Arc<Manifest>,
        cut: Vec<CutChunk>,
        publishing: &Arc<Publishing>,
    ) -> Result<Manifest, ExportError> {
        let mut in_cut = cut.into_iter().peekable();
        let chunks = (0..self.geometry.chunk_count()).map(ChunkIndex);
        let plan: Vec<_> = chunks
            .filter_map(|chunk| match in_cut.next_if(|c| c.chunk == chunk) {
                Some(CutChunk { zero: true, .. }) => None,
                Some(cut) => Some(Planned::Cut(cut)),
                None => (!image.is_zero(chunk)).then_some(Planned::Published(chunk)),
            })
            .collect();
        let changes = self.upload(journal, plan.into_iter(), publishing).await?;
        let (parent, now) = (journal.parent, self.services.clock.now());
        let blob = self.blob_key(journal);
        image.compacted(self.export_id.clone(), parent, now, blob, changes).map_err(ExportError::damaged)
    }

    fn blob_key(&self, journal: &Journal) -> crate::store::Key {
        match journal.kind {
            Kind::Snapshot => self.keys.delta(journal.snapshot_id),
            Kind::Compact => self.keys.base(journal.snapshot_id),
        }
    }

    /// Reads the chunks, as many ahead as the memory of publishes allows, and streams those that are not zeros into the blob. The
    /// very buffer that is uploaded is hashed (S4). No blob if all are zeros.
    async fn upload(
        self: &Arc<Self>,
        journal: &Journal,
        plan: impl ExactSizeIterator<Item = Planned> + Send,
        publishing: &Arc<Publishing>,
    ) -> Result<Vec<(ChunkIndex, Change)>, ExportError> {
        let max_bytes = plan.len() as u64 * self.geometry.chunk_size();
        let services = &self.services;
        let share = &services.publish_budget.share(upload_floor(max_bytes, self.geometry.chunk_size())).await;
        let changes = Arc::new(Mutex::new(Vec::with_capacity(plan.len())));
        let (into, mut offset) = (Arc::clone(&changes), 0);
        publishing.plan(max_bytes);
        let (counter, chunk_bytes) = (Arc::clone(publishing), self.geometry.chunk_size());
        let mut body = stream::iter(plan)
            .then(move |planned| async move {
                services.fill_budget.let_clients_go_first().await;
                // In the order of the chunks: none holds what an earlier one waits for.
                (planned, share.take(self.geometry.chunk_range(planned.chunk()).len()).await)
            })
            .map(|(planned, held)| self.read_beside(planned, held))
            .buffered(CHUNKS_AT_A_TIME)
            .filter_map(move |read| {
                counter.advance(chunk_bytes);
                let piece = match read {
                    Err(e) => Some(Err(BoxError::from(e))),
                    Ok((chunk, None)) => {
                        into.lock().push((chunk, Change::Zero));
                        None
                    }
                    Ok((chunk, Some((bytes, hash)))) => {
                        into.lock().push((chunk, Change::New { offset, hash }));
                        offset += bytes.len() as u64;
                        Some(Ok(bytes))
                    }
                };
                future::ready(piece)
            })
            .boxed();
        if let Some(first) = body.next().await {
            let whole = stream::iter([first]).chain(body).boxed();
            self.services.store.upload(&self.blob_key(journal), max_bytes, whole).await.map_err(|e| match e {
                StoreError::Body { source, .. } => match source.downcast::<VolumeError>() {
                    Ok(own) => ExportError::Volume(*own),
                    Err(other) => ExportError::Damaged(other.to_string().into()),
                },
                e => e.into(),
            })?;
        } else {
            drop(body);
        }
        Ok(std::mem::take(&mut *changes.lock()))
    }

    /// Reads on a task of its own, which ends with the publish: what it holds for its work it gives back also while the
    /// upload has no room for more.
    fn read_beside(
        self: &Arc<Self>,
        planned: Planned,
        held: Held,
    ) -> impl Future<Output = Result<HashedChunk, VolumeError>> + use<> {
        let volume = Arc::clone(self);
        let mut task = JoinSet::new();
        task.spawn(async move { volume.read_planned(planned, held).await }.in_current_span());
        async move {
            match task.join_next().await {
                Some(ended) => background::outcome(ended).await,
                None => future::pending().await,
            }
        }
    }

    async fn read_planned(self: &Arc<Self>, planned: Planned, held: Held) -> Result<HashedChunk, VolumeError> {
        match planned {
            Planned::Cut(cut) => {
                let read = move |cache: &Cache| {
                    let mut buf = held.buffer(super::buffer_len(cache.geometry().chunk_range(cut.chunk)));
                    cache.take_cut_chunk(cut, &mut buf).map(|()| hashed(cut.chunk, held.by(buf)))
                };
                self.in_background(read).await.map_err(|e| self.cache_error(e))
            }
            Planned::Published(chunk) => {
                let Some(source) = Remote::of(self.image().source(chunk)) else { return Ok((chunk, None)) };
                let held = match self.published_from_cache(chunk, source.hash, held).await? {
                    Ok(read) => return Ok(read),
                    Err(held) => held,
                };
                let (_memory, stream) = self.services.fill_budget.background(source.range.len()).await;
                let bytes = self.fetch(chunk, &source, Some(stream)).await?;
                Ok(self.in_background(move |_| hashed(chunk, held.by(bytes))).await)
            }
        }
    }

    /// A chunk as published, if the cache holds it so; else the memory for it is given back.
    async fn published_from_cache(
        &self,
        chunk: ChunkIndex,
        hash: Option<[u8; 32]>,
        held: Held,
    ) -> Result<Result<HashedChunk, Held>, VolumeError> {
        let Some(hash) = hash.filter(|_| self.cache.state(chunk).content() == Content::Clean) else {
            return Ok(Err(held));
        };
        let read = move |cache: &Cache| {
            let mut buf = held.buffer(super::buffer_len(cache.geometry().chunk_range(chunk)));
            cache.read_unchecked(chunk, &mut buf)?;
            Ok(match hash_unless_zeros(&buf) {
                Some(found) if found == hash => Ok((chunk, Some((held.by(buf), hash)))),
                _ => Err(held),
            })
        };
        self.in_background(read).await.map_err(|e| self.cache_error(e))
    }

    /// Work over a chunk's bytes for a publish, on a core of those that publishes have.
    async fn in_background<T: Send + 'static>(&self, work: impl FnOnce(&Cache) -> T + Send + 'static) -> T {
        let _core = self.services.publish_budget.core().await;
        let cache = Arc::clone(&self.cache);
        self.services.background.run(move || work(&cache)).await
    }

    /// Chunks under a `base_ref` of older tools have no hash. What we write covers every byte by one, so they are
    /// read once and named where they are.
    async fn adopt_unhashed(
        self: &Arc<Self>,
        image: &Arc<Manifest>,
        cut: &[CutChunk],
    ) -> Result<Vec<(ChunkIndex, Change)>, ExportError> {
        let mut adopted = Vec::new();
        if !image.has_base() {
            return Ok(adopted);
        }
        let mut in_cut = cut.iter().peekable();
        for chunk in (0..self.geometry.chunk_count()).map(ChunkIndex) {
            if in_cut.next_if(|c| c.chunk == chunk).is_some() {
                continue;
            }
            let Some(source @ Remote { hash: None, .. }) = Remote::of(image.source(chunk)) else { continue };
            let bytes = self.fetch(chunk, &source, None).await?;
            adopted.push(match self.in_background(move |_| hashed(chunk, bytes)).await {
                (chunk, None) => (chunk, Change::Zero),
                (chunk, Some((_, hash))) => {
                    (chunk, Change::Existing { blob: source.key, offset: source.range.offset(), hash })
                }
            });
        }
        Ok(adopted)
    }

    /// Refuses to publish over a head that is not the one we build on (S8).
    async fn check_head(&self) -> Result<StoredHead, ExportError> {
        let stored = self.stored_head().await?;
        if !self.builds_on(&stored.head) {
            return Err(self.conflict(&stored.head));
        }
        self.note_own_head();
        Ok(stored)
    }

    /// Moves the head that the publish began at to the new snapshot, or says why not.
    async fn move_head(&self, head: &StoredHead, journal: &Journal) -> Result<(), ExportError> {
        let newest;
        let from = if breaks(Rule::SwapFromNewestHead) {
            newest = self.stored_head().await?;
            &newest
        } else {
            head
        };
        let next = from.head.clone().published(journal.snapshot_id).written_by(self.services.identity.writer());
        match self.services.swap_head(from, &next).await? {
            Swap::Landed => Ok(()),
            Swap::Lost { found, .. } if breaks(Rule::OverwriteForeignHead) => {
                let next = found.head.clone().published(journal.snapshot_id);
                self.services.swap_head(&found, &next).await.map(drop).map_err(Into::into)
            }
            // Another server may have built upon our snapshot already.
            Swap::Lost { found, .. } => match self.landed(journal, &found).await? {
                Ancestry::Published => Ok(()),
                Ancestry::Foreign | Ancestry::Unknown => Err(self.conflict(&found.head)),
            },
        }
    }

    /// The swap landed: the journal says so, then the chunks of the cut become clean. What is left is `refs/current.json`.
    pub(super) async fn finish(&self, journal: &Journal, manifest: Manifest) -> Result<CurrentRef, ExportError> {
        match self.write_journal(journal, Phase::Committed).await {
            // On a full disk PREPARED stays and means the same, as long as the head can be read (L7).
            Err(ExportError::Volume(VolumeError::NoSpace(_))) => {}
            written => written?,
        }
        let base = cache::Base { snapshot: Some(journal.snapshot_id), generation: journal.generation };
        let current = manifest.current_ref(journal.snapshot_id, &self.keys.manifest(journal.snapshot_id));
        if breaks(Rule::DropJournalBeforeMarks) {
            self.drop_journal().await?;
        }
        self.commit(base, manifest).await?;
        self.note_own_head();
        self.drop_journal().await?;
        Ok(current)
    }

    pub(super) async fn write_current_ref(&self, current: &CurrentRef) {
        if let Err(e) = self.services.write_current_ref(&self.export_id, current).await {
            tracing::warn!(export = %self.export_id, "refs/current.json was not updated, the next publish will: {e}");
        }
    }

    async fn write_journal(&self, journal: &Journal, phase: Phase) -> Result<(), ExportError> {
        cache::blocking(&self.cache, Cache::check_in_place).await.map_err(|e| self.cache_error(e))?;
        let bytes = Journal { phase, ..journal.clone() }.encode();
        self.file_io("write", journal::JOURNAL_FILE, move |disk, dir| journal::store(disk, dir, &bytes)).await
    }
}

fn published(journal: &Journal) -> Published {
    Published { created: true, generation: journal.generation, snapshot_id: Some(journal.snapshot_id) }
}

/// A chunk with the hash of its bytes, or without either if it is zeros.
pub(super) type HashedChunk = (ChunkIndex, Option<(Bytes, [u8; 32])>);

pub(super) fn hashed(chunk: ChunkIndex, bytes: Bytes) -> HashedChunk {
    let hash = hash_unless_zeros(&bytes);
    (chunk, hash.map(|hash| (bytes, hash)))
}

fn hash_unless_zeros(bytes: &[u8]) -> Option<[u8; 32]> {
    if slices(bytes).all(|slice| slice.iter().all(|b| *b == 0)) {
        return None;
    }
    let mut hasher = blake3::Hasher::new();
    for slice in slices(bytes) {
        hasher.update(slice);
    }
    Some(if breaks(Rule::HashOtherBytes) {
        *blake3::hash(&bytes[..bytes.len() - 1]).as_bytes()
    } else {
        *hasher.finalize().as_bytes()
    })
}
