//! `GET /v1/exports/{id}/snapshots`: what of an export is published and can be cloned or read.

use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::Line;
use super::body::Named;
use super::problem::{Problem, Refusal};
use crate::units::{Generation, SnapshotId};
use crate::volume::snapshots::{self, SnapshotInfo};

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(list))
}

/// The line of snapshots that led to the head.
#[derive(Serialize, ToSchema)]
struct Snapshots {
    /// Newest first.
    snapshots: Vec<Snapshot>,
    /// Whether the list reaches back to the first one: not so if an older manifest was deleted, or does not name its
    /// parent.
    complete: bool,
}

/// A published image.
#[derive(Serialize, ToSchema)]
struct Snapshot {
    #[schema(value_type = String, pattern = "^[0-9a-f]{32}$")]
    snapshot_id: SnapshotId,
    /// Its place in the line, from 1.
    #[schema(value_type = u64)]
    generation: Generation,
    /// RFC 3339; empty if an older tool left it out.
    created_at: String,
    /// The snapshot it was taken on.
    #[schema(value_type = Option<String>, pattern = "^[0-9a-f]{32}$")]
    parent_snapshot_id: Option<SnapshotId>,
    /// Bytes of the image, whole chunks of zeros left out.
    data_bytes: u64,
    /// How much of that it brought itself.
    new_bytes: u64,
}

impl From<SnapshotInfo> for Snapshot {
    fn from(info: SnapshotInfo) -> Self {
        Self {
            snapshot_id: info.id,
            generation: info.generation,
            created_at: info.created_at,
            parent_snapshot_id: info.parent,
            data_bytes: info.data_bytes,
            new_bytes: info.new_bytes,
        }
    }
}

impl From<snapshots::Line> for Snapshots {
    fn from(line: snapshots::Line) -> Self {
        Self { snapshots: line.snapshots.into_iter().map(Snapshot::from).collect(), complete: line.complete }
    }
}

/// List the published snapshots of an export, newest first; one request to the store for each.
#[utoipa::path(
    get, path = "/v1/exports/{id}/snapshots", operation_id = "listSnapshots", tag = "snapshots", params(Named),
    responses((status = 200, description = "The snapshots", body = Snapshots), Refusal)
)]
async fn list(State(api): State<Api>, Named(id): Named) -> Result<Line<Snapshots>, Problem> {
    Ok(Line(api.registry.snapshots(&id).await?.into()))
}
