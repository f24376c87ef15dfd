//! The small objects of an export: its head, its manifests, the copy of the head. Reads are capped and checked,
//! and every error names the object.

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};

use super::Services;
use super::registry::ExportError;
use crate::manifest::head::{CurrentRef, Head, MAX_HEAD_BYTES};
use crate::manifest::{Manifest, format};
use crate::store::{Condition, Key, StoreError, Version};
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

/// A head as it stands in the store, with what a swap needs to replace just that one.
#[derive(Debug, Clone)]
pub(super) struct StoredHead {
    pub head: Head,
    pub version: Version,
}

impl Services {
    /// `volume.json`, or `None` if there is no such export.
    pub(super) async fn read_head(&self, id: &ExportId) -> Result<Option<StoredHead>, ExportError> {
        let key = self.root.export(id).head();
        match self.store.get(&key, MAX_HEAD_BYTES).await {
            Ok(object) => {
                let head =
                    Head::decode(&object.bytes, id, &key).map_err(|e| ExportError::Damaged(e.to_string().into()))?;
                Ok(Some(StoredHead { head, version: object.version }))
            }
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Writes `volume.json` if the condition holds. An error other than a refusal leaves open whether it landed.
    pub(super) async fn write_head(&self, head: &Head, condition: Condition) -> Result<(), StoreError> {
        let key = self.root.export(&head.export_id).head();
        self.store.put(&key, head.encode().into(), condition).await.map(drop)
    }

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

    /// Writes `refs/current.json`, the copy of the head for readers of the older direct mode.
    pub(super) async fn write_current_ref(&self, id: &ExportId, current: &CurrentRef) -> Result<(), StoreError> {
        let key = self.root.export(id).current_ref();
        self.store.put(&key, current.encode().into(), Condition::Always).await.map(drop)
    }
}
