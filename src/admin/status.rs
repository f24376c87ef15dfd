//! `GET /v1/status`: the server itself, for a person who looks at it; `GET /v1/health` is for a program that watches it.

use std::time::SystemTime;

use axum::extract::State;
use serde::Serialize;
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::Line;
use super::health::{StoreHealth, time};

/// How the server is.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct ServerStatus {
    /// The version that runs.
    pub version: &'static str,
    /// When it started.
    #[serde(serialize_with = "time")]
    #[schema(value_type = String, format = DateTime)]
    pub started_at: SystemTime,
    /// How long it has run, whatever has become of the date since.
    pub uptime_seconds: u64,
    /// The exports that are loaded.
    pub exports: ExportCounts,
    /// NBD clients that are connected.
    pub connections: usize,
    /// Where NBD clients connect, as URIs without an export.
    pub listen: Vec<String>,
    /// How the store is.
    pub store: StoreHealth,
}

/// How many exports are loaded.
#[derive(Debug, Clone, Copy, Default, Serialize, ToSchema)]
pub struct ExportCounts {
    /// Those that clients can use, with nothing known to be wrong.
    pub ready: usize,
    /// Those that are served, but some requests fail or will fail; the list of exports says why.
    pub degraded: usize,
    /// Those that cannot be served; the list of exports says why.
    pub failed: usize,
    /// Those of which the store has given the name alone so far.
    pub discovering: usize,
}

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(status))
}

/// Look at the server: version, uptime, exports, clients, addresses and store.
#[utoipa::path(
    get, path = "/v1/status", operation_id = "getStatus", tag = "server",
    responses((status = 200, description = "The server's own state", body = ServerStatus))
)]
async fn status(State(api): State<Api>) -> Line<ServerStatus> {
    Line(api.watch.status())
}
