//! Whole images straight to and from the store, without a server and without a cache.
//!
//! *In*, as the first snapshot of a new export. Order, and what a crash after each step leaves:
//! 1. blob, then manifest – objects of an export without a head, which nobody sees and nothing is lost with.
//! 2. `volume.json`, created only if there is none – the export is there, whole.
//! 3. `refs/current.json` – a copy that may be missing until the next publish.
//!
//! An export that exists is never touched, be it another server's newest. Objects are removed only while no request of
//! ours can still make a head that names them.
//!
//! *Out*, any published image: every chunk is checked against its hash before it is handed on. The only bytes without one
//! are those under a `base_ref` of older tools.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use parking_lot::Mutex;

use super::Services;
use super::fill::{FetchError, Remote};
use super::head::{Swap, SwapError};
use super::publish::hashed;
use super::registry::{ExportError, Published};
use crate::manifest::head::{Head, MAX_HEAD_BYTES};
use crate::manifest::{Change, Manifest};
use crate::store::parts::upload_floor;
use crate::store::{BoxError, Key, StoreError};
use crate::units::{ChunkIndex, ExportId, Geometry, SnapshotId};

/// The chunks of an image in ascending order; those left out are zeros.
pub type Chunks<'a> = BoxStream<'a, std::io::Result<(ChunkIndex, Bytes)>>;

/// A published image, to be read.
#[derive(Debug)]
pub struct Image {
    services: Arc<Services>,
    export_id: ExportId,
    snapshot: SnapshotId,
    manifest: Manifest,
}

impl Services {
    /// Publishes an image as the first snapshot of a new export. While the image uploads, `cancelled` ends it and leaves
    /// nothing behind; from then on it is taken to its end.
    ///
    /// # Errors
    /// [`ExportError::Exists`]; [`ExportError::Damaged`] with the text of a chunk that could not be read;
    /// [`ExportError::Cancelled`]; whatever keeps it from being uploaded.
    pub async fn import(
        &self,
        id: &ExportId,
        geometry: Geometry,
        chunks: Chunks<'_>,
        cancelled: impl Future<Output = ()> + Send,
    ) -> Result<Published, ExportError> {
        if self.is_taken(id).await? {
            return Err(ExportError::Exists(id.clone()));
        }
        let snapshot = SnapshotId::generate();
        let keys = self.root.export(id);
        let objects = [keys.base(snapshot), keys.manifest(snapshot)];
        let uploaded = tokio::select! {
            uploaded = self.upload_image(id, geometry, &objects, chunks) => uploaded,
            () = cancelled => Err(ExportError::Cancelled(id.clone())),
        };
        let manifest = match uploaded {
            Ok(manifest) => manifest,
            Err(e) => {
                self.discard(&objects).await;
                return Err(e);
            }
        };
        let head = Head::created(id.clone(), geometry, None).published(snapshot);
        self.create_imported(&head, &objects).await?;
        let current = manifest.current_ref(snapshot, &objects[1]);
        if let Err(e) = self.write_current_ref(id, &current).await {
            tracing::warn!(export = %id, "refs/current.json was not written, the next publish will: {e}");
        }
        Ok(Published { created: true, generation: manifest.generation(), snapshot_id: Some(snapshot) })
    }

    /// Whether there is an export of that name, an older one without a head included.
    pub(super) async fn is_taken(&self, id: &ExportId) -> Result<bool, ExportError> {
        if self.read_head(id).await?.is_some() {
            return Ok(true);
        }
        match self.store.get(&self.root.export(id).current_ref(), MAX_HEAD_BYTES).await {
            Err(StoreError::NotFound { .. }) => Ok(false),
            Ok(_) | Err(StoreError::TooLarge { .. }) => Ok(true),
            Err(e) => Err(e.into()),
        }
    }

    async fn upload_image(
        &self,
        id: &ExportId,
        geometry: Geometry,
        [blob, manifest_key]: &[Key; 2],
        chunks: Chunks<'_>,
    ) -> Result<Manifest, ExportError> {
        let floor = upload_floor(geometry.image_size(), geometry.chunk_size());
        let share = &self.publish_budget.share(floor).await;
        let changes = Arc::new(Mutex::new(Vec::new()));
        let (into, mut offset) = (Arc::clone(&changes), 0);
        // A store may look again whether there is more.
        let mut body = chunks
            .fuse()
            .then(|read| async {
                match read {
                    // The very buffer that is uploaded is hashed.
                    Ok((chunk, bytes)) => {
                        let held = share.take(bytes.len() as u64).await;
                        Ok(self.background.run(move || hashed(chunk, held.by(bytes))).await)
                    }
                    Err(e) => Err(BoxError::from(e)),
                }
            })
            .filter_map(move |read| {
                let piece = match read {
                    Err(e) => Some(Err(e)),
                    Ok((_, None)) => None,
                    Ok((chunk, Some((bytes, hash)))) => {
                        into.lock().push((chunk, Change::New { offset, hash }));
                        offset += bytes.len() as u64;
                        Some(Ok(bytes))
                    }
                };
                std::future::ready(piece)
            })
            .boxed();
        if let Some(first) = body.next().await {
            let whole = futures_util::stream::iter([first]).chain(body).boxed();
            self.store.upload(blob, geometry.image_size(), whole).await.map_err(|e| match e {
                StoreError::Body { source, .. } => {
                    ExportError::Damaged(format!("the image cannot be read: {source}").into())
                }
                e => e.into(),
            })?;
        } else {
            drop(body);
        }
        let changes = std::mem::take(&mut *changes.lock());
        let empty = Manifest::empty(id.clone(), geometry);
        let manifest = empty.compacted(id.clone(), None, self.clock.now(), blob.clone(), changes);
        let manifest = manifest.map_err(ExportError::damaged)?;
        self.write_manifest(manifest_key, manifest.clone()).await?;
        Ok(manifest)
    }

    /// Creates the head of an imported image. While it may still land, its objects stay.
    async fn create_imported(&self, head: &Head, objects: &[Key; 2]) -> Result<(), ExportError> {
        let (error, may_land) = match self.create_head(head).await {
            Ok(Swap::Landed) => return Ok(()),
            Ok(Swap::Lost { answered, .. }) => (ExportError::Exists(head.export_id.clone()), !answered),
            Err(SwapError { error, may_land, .. }) => (error, may_land),
        };
        if !may_land {
            self.discard(objects).await;
        }
        Err(error)
    }

    async fn discard(&self, objects: &[Key]) {
        for key in objects {
            if let Err(e) = self.store.delete(key).await {
                tracing::warn!("{key} of an import that was given up is still there: {e}");
            }
        }
    }
}

impl Image {
    /// The published image of an export: a snapshot of it, or its head, which for a clone that was never published is
    /// the snapshot it was made from.
    ///
    /// # Errors
    /// [`ExportError::NotFound`], [`ExportError::SnapshotNotFound`], [`ExportError::NothingPublished`]; whatever keeps
    /// the manifest from being read.
    pub async fn find(
        services: Arc<Services>,
        id: &ExportId,
        snapshot: Option<SnapshotId>,
    ) -> Result<Self, ExportError> {
        let not_found = || ExportError::NotFound(id.clone(), "in the store");
        let head = services.read_head(id).await?.ok_or_else(not_found)?.head;
        let (snapshot, manifest) = match snapshot {
            Some(asked) => {
                let asked = services.published(id, &head, asked).await?;
                (Some(asked), services.read_manifest(id, head.geometry, asked).await?)
            }
            None => {
                let (base, manifest) = services.published_image(&head).await?;
                (base.snapshot, manifest)
            }
        };
        let snapshot = snapshot.ok_or_else(|| ExportError::NothingPublished(id.clone()))?;
        Ok(Self { services, export_id: id.clone(), snapshot, manifest })
    }

    /// The snapshot that it is.
    #[must_use]
    pub fn snapshot(&self) -> SnapshotId {
        self.snapshot
    }

    /// Its sizes.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.manifest.geometry()
    }

    /// The chunks that are not known to be zeros, in order.
    pub fn data_chunks(&self) -> impl Iterator<Item = ChunkIndex> + '_ {
        (0..self.geometry().chunk_count()).map(ChunkIndex).filter(|chunk| !self.manifest.is_zero(*chunk))
    }

    /// The bytes of a chunk, checked.
    ///
    /// # Errors
    /// [`ExportError::StoreUnavailable`]; [`ExportError::Damaged`] if they are not what was published.
    pub async fn chunk(&self, chunk: ChunkIndex) -> Result<Bytes, ExportError> {
        let Some(source) = Remote::of(self.manifest.source(chunk)) else {
            return Ok(vec![0; super::buffer_len(self.geometry().chunk_range(chunk))].into());
        };
        self.services.fetch(&self.export_id, chunk, &source, None).await.map_err(|e| match e {
            FetchError::Unavailable(text) => ExportError::StoreUnavailable(text),
            FetchError::Damaged(text) => ExportError::Damaged(text),
        })
    }
}
