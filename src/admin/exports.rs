//! `/v1/exports`: each call parses its request, makes one typed call on the registry and types the answer.
//!
//! A call that changes something runs in a task of its own: a client that hangs up does not cancel a publish.

use std::future::Future;
use std::time::SystemTime;

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::delete;
use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::Line;
use super::body::{self, Fields, Named};
use super::health::time;
use super::problem::{Code, Problem, Refusal};
use crate::units::{ExportId, Generation, Geometry, SnapshotId};
use crate::volume::Outage;
use crate::volume::faults;
use crate::volume::registry::{ExportError, ExportStatus, ExportSummary, Published};

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .routes(routes!(list))
        .routes(routes!(create))
        .routes(routes!(open))
        .routes(routes!(clone))
        .routes(routes!(unload))
        .routes(routes!(status))
        .routes(routes!(snapshot))
        .routes(routes!(compact))
        .routes(routes!(cancel))
        .routes(routes!(reset))
        .routes(routes!(trim_cache))
        // "create", "open" and "clone" are export ids too: they can be unloaded like any other.
        .route("/v1/exports/create", delete(unload))
        .route("/v1/exports/open", delete(unload))
        .route("/v1/exports/clone", delete(unload))
}

type Answer<T> = Result<Line<T>, Problem>;
type Created<T> = Result<(StatusCode, Line<T>), Problem>;

/// Runs an operation to its end whether or not anybody waits for the answer.
async fn to_the_end<T: Send + 'static>(
    operation: impl Future<Output = Result<T, ExportError>> + Send + 'static,
) -> Result<T, Problem> {
    match tokio::spawn(operation).await {
        Ok(result) => result.map_err(Problem::from),
        Err(broken) => {
            tracing::error!("an operation broke off: {broken}");
            let detail = "the operation broke off; the server's log says where. Look at the export's status";
            Err(Problem::new(Code::Failed, detail))
        }
    }
}

/// List the exports that are loaded, sorted by id.
#[utoipa::path(
    get, path = "/v1/exports", operation_id = "listExports", tag = "exports",
    responses((status = 200, description = "The exports", body = [Summary]))
)]
async fn list(State(api): State<Api>) -> Line<Vec<Summary>> {
    Line(api.registry.list().into_iter().map(Summary::from).collect())
}

#[derive(Deserialize, ToSchema)]
#[schema(as = CreateRequest)]
#[serde(deny_unknown_fields)]
struct CreateFields {
    /// Its name; no "..".
    #[schema(value_type = String, pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", example = "vm-1")]
    export_id: Box<RawValue>,
    /// Bytes, up to 2^63 - 1.
    #[schema(value_type = u64, minimum = 1, example = 1073741824_u64)]
    size: Box<RawValue>,
    /// Bytes, a power of two; the server's default if it is not given.
    #[schema(value_type = Option<u64>, minimum = 4096, maximum = 67108864)]
    chunk_size: Option<Box<RawValue>>,
}

/// Create an export of zeros.
#[utoipa::path(
    post, path = "/v1/exports/create", operation_id = "createExport", tag = "exports", request_body = CreateFields,
    responses((status = 201, description = "Created", body = Status), Refusal)
)]
async fn create(State(api): State<Api>, Fields(fields): Fields<CreateFields>) -> Created<Status> {
    let id = body::export_id("export_id", &fields.export_id)?;
    let size = body::bytes(Code::InvalidSize, "size", &fields.size)?;
    let chunk_size = match &fields.chunk_size {
        Some(raw) => body::bytes(Code::InvalidChunkSize, "chunk_size", raw)?,
        None => api.default_chunk_bytes,
    };
    let geometry = Geometry::new(size, chunk_size)?;
    let status = to_the_end(async move { api.registry.create(id, geometry).await }).await?;
    Ok((StatusCode::CREATED, Line(status.into())))
}

#[derive(Deserialize, ToSchema)]
#[schema(as = OpenRequest)]
#[serde(deny_unknown_fields)]
struct OpenFields {
    #[schema(value_type = String, pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", example = "vm-1")]
    export_id: Box<RawValue>,
    /// Whether writes are refused.
    #[schema(value_type = Option<bool>)]
    read_only: Option<Box<RawValue>>,
}

/// Load an export that is in the store.
#[utoipa::path(
    post, path = "/v1/exports/open", operation_id = "openExport", tag = "exports", request_body = OpenFields,
    responses((status = 200, description = "Loaded", body = Status), Refusal)
)]
async fn open(State(api): State<Api>, Fields(fields): Fields<OpenFields>) -> Answer<Status> {
    let id = body::export_id("export_id", &fields.export_id)?;
    let read_only = fields.read_only.as_deref().map(|raw| body::flag("read_only", raw)).transpose()?.unwrap_or(false);
    let status = to_the_end(async move { api.registry.open(id, read_only).await }).await?;
    Ok(Line(status.into()))
}

#[derive(Deserialize, ToSchema)]
#[schema(as = CloneRequest)]
#[serde(deny_unknown_fields)]
struct CloneFields {
    /// The new export's name.
    #[schema(value_type = String, pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", example = "vm-2")]
    export_id: Box<RawValue>,
    #[schema(value_type = String, pattern = "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$", example = "vm-1")]
    source_export_id: Box<RawValue>,
    /// A published snapshot of the source; its newest if it is not given.
    #[schema(value_type = Option<String>, pattern = "^[0-9a-f]{32}$")]
    source_snapshot_id: Option<Box<RawValue>>,
}

/// Create an export that starts as a published snapshot of another; no data is copied.
#[utoipa::path(
    post, path = "/v1/exports/clone", operation_id = "cloneExport", tag = "exports", request_body = CloneFields,
    responses((status = 201, description = "Created", body = Status), Refusal)
)]
async fn clone(State(api): State<Api>, Fields(fields): Fields<CloneFields>) -> Created<Status> {
    let id = body::export_id("export_id", &fields.export_id)?;
    let source = body::export_id("source_export_id", &fields.source_export_id)?;
    let snapshot =
        fields.source_snapshot_id.as_deref().map(|raw| body::snapshot_id("source_snapshot_id", raw)).transpose()?;
    let status = to_the_end(async move { api.registry.clone_export(id, source, snapshot).await }).await?;
    Ok((StatusCode::CREATED, Line(status.into())))
}

/// Look at one export.
#[utoipa::path(
    get, path = "/v1/exports/{id}/status", operation_id = "getExportStatus", tag = "exports", params(Named),
    responses((status = 200, description = "Its state", body = Status), Refusal)
)]
async fn status(State(api): State<Api>, Named(id): Named) -> Answer<Status> {
    Ok(Line(api.registry.status(&id).await?.into()))
}

/// The body of a call that takes no fields.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NoFields {}

/// Publish what is dirty, as one point in time. With nothing dirty it creates nothing.
#[utoipa::path(
    post, path = "/v1/exports/{id}/snapshot", operation_id = "createSnapshot", tag = "snapshots", params(Named),
    responses((status = 200, description = "The snapshot now", body = Snapshotted), Refusal)
)]
async fn snapshot(State(api): State<Api>, Named(id): Named, _: Fields<NoFields>) -> Answer<Snapshotted> {
    let published = to_the_end(async move { api.registry.snapshot(&id).await }).await?;
    let Published { created, generation, snapshot_id } = published;
    Ok(Line(Snapshotted { snapshot_created: created, generation, snapshot_id }))
}

/// Rewrite the whole image into one fresh blob, and publish that.
#[utoipa::path(
    post, path = "/v1/exports/{id}/compact", operation_id = "compactExport", tag = "snapshots", params(Named),
    responses((status = 200, description = "The snapshot now", body = Compacted), Refusal)
)]
async fn compact(State(api): State<Api>, Named(id): Named, _: Fields<NoFields>) -> Answer<Compacted> {
    let published = to_the_end(async move { api.registry.compact(&id).await }).await?;
    let Published { created: _, generation, snapshot_id } = published;
    Ok(Line(Compacted { generation, snapshot_id }))
}

/// Give up a snapshot or compaction that is uploading, and wait until the export is as before it. Its own call answers
/// with the code `cancelled`.
#[utoipa::path(
    post, path = "/v1/exports/{id}/cancel", operation_id = "cancelOperation", tag = "snapshots", params(Named),
    responses((status = 200, description = "Whether there was anything that could still be given up", body = Cancelled), Refusal)
)]
async fn cancel(State(api): State<Api>, Named(id): Named, _: Fields<NoFields>) -> Answer<Cancelled> {
    Ok(Line(Cancelled { cancelled: api.registry.cancel(&id).await? }))
}

/// Drop all local state of an export. DESTROYS what was not published.
#[utoipa::path(
    post, path = "/v1/exports/{id}/cache/reset", operation_id = "resetCache", tag = "exports", params(Named),
    responses((status = 200, description = "Its state, as published", body = Status), Refusal)
)]
async fn reset(State(api): State<Api>, Named(id): Named, _: Fields<NoFields>) -> Answer<Status> {
    let after = to_the_end(async move {
        api.registry.reset(&id).await?;
        api.registry.status(&id).await
    });
    Ok(Line(after.await?.into()))
}

/// Drop what the cache holds just as it is published, to free space: it is fetched again when it is read. What is not
/// published stays, and nothing is dropped unless the store has all of it.
#[utoipa::path(
    post, path = "/v1/exports/{id}/cache/trim", operation_id = "trimCache", tag = "exports", params(Named),
    responses((status = 200, description = "How much was freed", body = Trimmed), Refusal)
)]
async fn trim_cache(State(api): State<Api>, Named(id): Named, _: Fields<NoFields>) -> Answer<Trimmed> {
    let trimmed = to_the_end(async move {
        let freed_bytes = api.registry.trim_cache(&id).await?;
        let cache_free_bytes = api.registry.status(&id).await?.cache_free_bytes;
        Ok(Trimmed { export_id: id, freed_bytes, cache_free_bytes })
    });
    Ok(Line(trimmed.await?))
}

/// Unload an export here; its cache and what is in the store stay.
#[utoipa::path(
    delete, path = "/v1/exports/{id}", operation_id = "closeExport", tag = "exports", params(Named),
    responses((status = 204, description = "Unloaded"), Refusal)
)]
async fn unload(State(api): State<Api>, Named(id): Named) -> Result<StatusCode, Problem> {
    to_the_end(async move { api.registry.unload(&id).await }).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// What a snapshot came to.
#[derive(Serialize, ToSchema)]
#[schema(as = SnapshotResult)]
struct Snapshotted {
    /// Whether there was anything to publish.
    snapshot_created: bool,
    #[schema(value_type = u64)]
    generation: Generation,
    #[schema(value_type = Option<String>, pattern = "^[0-9a-f]{32}$")]
    snapshot_id: Option<SnapshotId>,
}

/// What a trim of the cache came to.
#[derive(Serialize, ToSchema)]
#[schema(as = CacheTrimResult)]
struct Trimmed {
    #[schema(value_type = String)]
    export_id: ExportId,
    /// Bytes of the chunks that were dropped.
    freed_bytes: u64,
    /// What is free now on the file system of the cache; null if it does not say.
    cache_free_bytes: Option<u64>,
}

/// What a compaction came to.
#[derive(Serialize, ToSchema)]
#[schema(as = CompactResult)]
struct Compacted {
    #[schema(value_type = u64)]
    generation: Generation,
    #[schema(value_type = Option<String>, pattern = "^[0-9a-f]{32}$")]
    snapshot_id: Option<SnapshotId>,
}

/// What came of a cancellation.
#[derive(Serialize, ToSchema)]
#[schema(as = CancelResult)]
struct Cancelled {
    /// Whether an operation was given up. If not, there was none, or it was too late: then it ran to its end.
    cancelled: bool,
}

/// How far an operation is.
#[derive(Serialize, ToSchema)]
struct Progress {
    done_bytes: u64,
    total_bytes: u64,
}

/// Whether clients can use the export, and what is wrong: `degraded` is served, but some requests fail or will fail;
/// of one that is `discovering` the store has given the name alone so far, and a client that attaches waits for the rest.
#[derive(Serialize, ToSchema)]
#[schema(as = ExportHealth)]
#[serde(tag = "state", rename_all = "lowercase")]
enum Health {
    Ready,
    Discovering,
    Degraded { reason: String },
    Failed { reason: String },
}

impl Health {
    fn of(failed: Option<String>, faults: &[faults::Fault]) -> Self {
        match (failed, faults::summary(faults)) {
            (Some(reason), _) => Self::Failed { reason },
            (None, Some(reason)) => Self::Degraded { reason },
            (None, None) => Self::Ready,
        }
    }
}

/// How many faults of an export its status names.
const MAX_SHOWN_FAULTS: usize = 16;

/// Something that is wrong with an export.
#[derive(Serialize, ToSchema)]
#[schema(as = ExportFault)]
struct Fault {
    /// The code of the refusals that it leads to: damaged, conflict, failed, no-space or store-unavailable.
    cause: &'static str,
    /// When it was first found.
    #[serde(serialize_with = "time")]
    #[schema(value_type = String, format = DateTime)]
    since: SystemTime,
    /// When it was last found.
    #[serde(serialize_with = "time")]
    #[schema(value_type = String, format = DateTime)]
    last: SystemTime,
    /// How often it was found.
    count: u64,
    /// What, where, and why.
    reason: String,
}

impl From<faults::Fault> for Fault {
    fn from(fault: faults::Fault) -> Self {
        let faults::Fault { cause, since, last, count, reason } = fault;
        Self { cause: cause.as_str(), since, last, count, reason: reason.to_string() }
    }
}

/// How the last request to the store went, of whichever export.
#[derive(Serialize, ToSchema)]
#[schema(as = ExportStoreHealth)]
struct StoreHealth {
    /// Whether it had an answer.
    reachable: bool,
    /// Since when there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(format = DateTime)]
    since: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    last_error: Option<String>,
}

impl From<Option<Outage>> for StoreHealth {
    fn from(outage: Option<Outage>) -> Self {
        let reachable = outage.is_none();
        let rfc3339 = |at| DateTime::<Utc>::from(at).to_rfc3339_opts(SecondsFormat::Secs, true);
        let (since, last_error) = outage.map(|outage| (rfc3339(outage.since), outage.last_error)).unzip();
        Self { reachable, since, last_error }
    }
}

/// An export in the list.
#[derive(Serialize, ToSchema)]
#[schema(as = ExportSummary)]
struct Summary {
    #[schema(value_type = String)]
    export_id: ExportId,
    image_size: Option<u64>,
    chunk_size: Option<u64>,
    #[serde(flatten)]
    state: Health,
    #[schema(value_type = Option<String>, pattern = "^[0-9a-f]{32}$")]
    current_snapshot_id: Option<SnapshotId>,
}

impl From<ExportSummary> for Summary {
    fn from(export: ExportSummary) -> Self {
        Self {
            export_id: export.export_id,
            image_size: export.geometry.map(Geometry::image_size),
            chunk_size: export.geometry.map(Geometry::chunk_size),
            state: match export.discovering {
                true => Health::Discovering,
                false => Health::of(export.failed, &export.faults),
            },
            current_snapshot_id: export.current_snapshot_id,
        }
    }
}

/// Everything about one export.
#[derive(Serialize, ToSchema)]
#[schema(as = ExportStatus)]
struct Status {
    #[schema(value_type = String)]
    export_id: ExportId,
    image_size: u64,
    chunk_size: u64,
    chunk_count: u32,
    /// Whether writes are refused.
    read_only: bool,
    resident_chunks: u64,
    dirty_chunks: u64,
    /// Bytes free on the file system of the cache; null if it does not say.
    cache_free_bytes: Option<u64>,
    /// Chunks that are known not to be in the store as they were published: up to 1024 are known.
    damaged_chunks: u64,
    /// How often a fetch found a chunk to be so, since the export was opened.
    corrupt_fetches: u64,
    #[schema(value_type = u64)]
    snapshot_generation: Generation,
    /// That of the head in the store, as it was last read; null if only its snapshot could be.
    #[schema(value_type = Option<u64>)]
    remote_head_generation: Option<Generation>,
    /// The head in the store, as it was last read.
    #[schema(value_type = Option<String>, pattern = "^[0-9a-f]{32}$")]
    remote_head_snapshot_id: Option<SnapshotId>,
    #[schema(value_type = Option<String>, pattern = "^[0-9a-f]{32}$")]
    current_snapshot_id: Option<SnapshotId>,
    /// idle, snapshotting, compacting, resetting, trimming or closing.
    operation_state: &'static str,
    /// How far a snapshot or a compaction is, once it uploads.
    #[serde(skip_serializing_if = "Option::is_none")]
    progress: Option<Progress>,
    store: StoreHealth,
    #[serde(flatten)]
    state: Health,
    /// What is wrong, the worst first: up to 16 of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    faults: Vec<Fault>,
}

impl From<ExportStatus> for Status {
    fn from(export: ExportStatus) -> Self {
        Self {
            image_size: export.geometry.image_size(),
            chunk_size: export.geometry.chunk_size(),
            chunk_count: export.geometry.chunk_count(),
            export_id: export.export_id,
            read_only: export.read_only,
            resident_chunks: export.resident_chunks,
            dirty_chunks: export.dirty_chunks,
            cache_free_bytes: export.cache_free_bytes,
            damaged_chunks: export.damaged_chunks,
            corrupt_fetches: export.corrupt_fetches,
            snapshot_generation: export.snapshot_generation,
            remote_head_generation: export.remote_head_generation,
            remote_head_snapshot_id: export.remote_head_snapshot_id,
            current_snapshot_id: export.current_snapshot_id,
            operation_state: export.operation.as_str(),
            progress: export
                .progress
                .map(|progress| Progress { done_bytes: progress.done_bytes, total_bytes: progress.total_bytes }),
            store: export.store_outage.into(),
            state: Health::of(export.failed, &export.faults),
            faults: export.faults.into_iter().take(MAX_SHOWN_FAULTS).map(Fault::from).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn an_operation_whose_client_hung_up_still_runs_to_its_end() {
        let (go, wait) = oneshot::channel::<()>();
        let (done, ended) = oneshot::channel();
        let mut call = Box::pin(to_the_end(async move {
            wait.await.unwrap();
            done.send("published").unwrap();
            Ok(())
        }));
        assert!(futures_util::poll!(&mut call).is_pending());
        drop(call);
        go.send(()).unwrap();
        assert_eq!(ended.await.unwrap(), "published");
    }

    #[tokio::test]
    async fn an_operation_that_breaks_off_is_a_problem_and_no_500() {
        let broken = to_the_end::<()>(async { panic!("a bug") }).await.unwrap_err();
        assert_eq!(broken.code, Code::Failed);
    }

    #[test]
    fn a_failed_export_says_why_and_so_does_a_degraded_one_and_a_ready_one_has_no_reason() {
        let fault = |cause| faults::Fault::new(cause, SystemTime::UNIX_EPOCH, "a blob is gone".into());
        let summary = |failed: Option<&str>, faults: &[faults::Fault]| {
            let export = ExportSummary {
                export_id: "vm".parse().unwrap(),
                geometry: None,
                current_snapshot_id: None,
                failed: failed.map(str::to_owned),
                faults: faults.to_vec(),
                discovering: false,
            };
            serde_json::to_value(Summary::from(export)).unwrap()
        };
        let damaged = [fault(faults::Cause::Damaged)];
        let failed = summary(Some("volume.json is no JSON"), &damaged);
        assert_eq!((&failed["state"], &failed["reason"]), (&"failed".into(), &"volume.json is no JSON".into()));
        assert_eq!(failed["image_size"], serde_json::Value::Null);
        let degraded = summary(None, &damaged);
        assert_eq!((&degraded["state"], &degraded["reason"]), (&"degraded".into(), &"damaged: a blob is gone".into()));
        let ready = summary(None, &[]);
        assert_eq!((&ready["state"], ready.get("reason")), (&"ready".into(), None));
    }
}
