//! The small objects of an export beside its head: its manifests, and the copy of the head. Reads are capped and checked,
//! and every error names the object.

use bytes::Bytes;
use futures_util::stream::{self, StreamExt, TryStreamExt};

use super::Services;
use super::registry::ExportError;
use crate::manifest::head::CurrentRef;
use crate::manifest::{Manifest, format};
use crate::store::{Condition, Key, StoreError};
use crate::units::{ExportId, Geometry, SnapshotId};

impl From<StoreError> for ExportError {
    fn from(e: StoreError) -> Self {
        match e {
            StoreError::Body { .. }
            | StoreError::TooLarge { .. }
            | StoreError::Short { .. }
            | StoreError::NotFound { .. } => Self::Damaged(e.to_string().into()),
            StoreError::Conflict { .. } | StoreError::Unavailable { .. } | StoreError::Refused { .. } => {
                Self::StoreUnavailable(e.to_string().into())
            }
        }
    }
}

/// How many blobs are looked at at a time before a snapshot that names them is published.
const BLOBS_CHECKED_AT_A_TIME: usize = 16;

impl Services {
    /// The manifest of a snapshot that is known to be published.
    pub(super) async fn read_manifest(
        &self,
        id: &ExportId,
        geometry: Geometry,
        snapshot: SnapshotId,
    ) -> Result<Manifest, ExportError> {
        let key = self.root.export(id).manifest(snapshot);
        let missing = || {
            let text = format!("{key} is missing, but it is named as published: restore it from a copy of the bucket");
            ExportError::Damaged(text.into())
        };
        self.find_manifest(id, geometry, snapshot).await?.ok_or_else(missing)
    }

    /// The manifest of a snapshot, or `None` if there is no such object.
    pub(super) async fn find_manifest(
        &self,
        id: &ExportId,
        geometry: Geometry,
        snapshot: SnapshotId,
    ) -> Result<Option<Manifest>, ExportError> {
        let key = self.root.export(id).manifest(snapshot);
        self.decode_manifest(key, id, Some(geometry)).await
    }

    /// The sizes of an export that has no head, from a manifest of its.
    pub(super) async fn read_geometry(&self, id: &ExportId, snapshot: SnapshotId) -> Result<Geometry, ExportError> {
        let key = self.root.export(id).manifest(snapshot);
        let missing = ExportError::Damaged(format!("{key} is missing, but refs/current.json names it").into());
        Ok(self.decode_manifest(key, id, None).await?.ok_or(missing)?.geometry())
    }

    async fn decode_manifest(
        &self,
        key: Key,
        id: &ExportId,
        geometry: Option<Geometry>,
    ) -> Result<Option<Manifest>, ExportError> {
        let object = match self.store.get(&key, geometry.map_or(format::MAX_BYTES, format::max_bytes)).await {
            Ok(object) => object,
            Err(StoreError::NotFound { .. }) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        let (root, id) = (self.root.clone(), id.clone());
        let decoded =
            crate::cache::blocking_io(move || format::decode(&object.bytes, &key, &id, geometry, &root)).await;
        decoded.map(Some).map_err(ExportError::damaged)
    }

    /// Writes a manifest; its key belongs to this publish alone.
    pub(super) async fn write_manifest(&self, key: &Key, manifest: Manifest) -> Result<(), StoreError> {
        let bytes: Bytes = crate::cache::blocking_io(move || format::encode(&manifest)).await.into();
        let len = bytes.len() as u64;
        self.store.upload(key, len, stream::iter([Ok(bytes)]).boxed()).await
    }

    /// Finds out that the blobs which a manifest names are there, whole: all but the one that was just `uploaded`, which its
    /// upload vouches for.
    ///
    /// # Errors
    /// [`ExportError::Damaged`], which says what was `left` undone; [`ExportError::StoreUnavailable`].
    pub(super) async fn check_blobs(
        &self,
        manifest: &Manifest,
        uploaded: Option<&Key>,
        left: &str,
    ) -> Result<(), ExportError> {
        let named = manifest.blob_lengths().into_iter().filter(|(key, _)| Some(*key) != uploaded);
        let earlier: Vec<_> = named.map(|(key, needed)| (key.clone(), needed)).collect();
        let checks = stream::iter(earlier).map(|(key, needed)| self.check_blob(key, needed, left));
        checks.buffer_unordered(BLOBS_CHECKED_AT_A_TIME).try_collect().await
    }

    async fn check_blob(&self, key: Key, needed: u64, left: &str) -> Result<(), ExportError> {
        let wrong = match self.store.len(&key).await {
            Ok(len) if len >= needed => return Ok(()),
            Ok(len) => format!("has {len} bytes instead of at least {needed}"),
            Err(StoreError::NotFound { .. }) => "is gone from the store".to_owned(),
            Err(e) => return Err(e.into()),
        };
        let text = format!(
            "{key}, which the image needs, {wrong}: {left}. Restore the object from a copy of the bucket; or \
             compact the export, which works if the cache holds every chunk that is in it"
        );
        Err(ExportError::Damaged(text.into()))
    }

    /// Writes `refs/current.json`, the copy of the head for readers of the older direct mode.
    pub(super) async fn write_current_ref(&self, id: &ExportId, current: &CurrentRef) -> Result<(), StoreError> {
        let key = self.root.export(id).current_ref();
        self.store.put(&key, current.encode().into(), Condition::Always).await.map(drop)
    }
}
