//! `GET /v1/health`: whether the server lives, is ready, and reaches its store.
//!
//! 200 means: it takes clients. A store that fails does not change that, since what is in the caches is served as before,
//! nor does an export that is degraded or failed: the body says so. 503 means: it stops.

use std::time::SystemTime;

use axum::extract::State;
use axum::http::StatusCode;
use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Serialize, Serializer};
use utoipa::ToSchema;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;
use super::answer::Line;
use super::status::ExportCounts;

/// How the server is.
#[derive(Debug, Clone, Serialize, ToSchema)]
#[schema(as = ServerHealth)]
pub struct Health {
    /// It answers.
    pub live: bool,
    /// It takes clients.
    pub ready: bool,
    /// How its exports are.
    pub exports: ExportCounts,
    /// How its store is.
    pub store: StoreHealth,
}

/// How the store is, by the last request to it.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct StoreHealth {
    /// The kind of store.
    pub backend: &'static str,
    /// Whether it gave a definite answer.
    pub reachable: bool,
    /// Since when that is so.
    #[serde(serialize_with = "time")]
    #[schema(value_type = String, format = DateTime)]
    pub since: SystemTime,
    /// The last failure, however long ago.
    pub last_error: Option<StoreFailure>,
}

/// A request that the store did not serve.
#[derive(Debug, Clone, Serialize, ToSchema)]
pub struct StoreFailure {
    /// When it failed.
    #[serde(serialize_with = "time")]
    #[schema(value_type = String, format = DateTime)]
    pub at: SystemTime,
    /// What failed and why.
    pub reason: String,
}

pub(super) fn time<S: Serializer>(at: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&DateTime::<Utc>::from(*at).to_rfc3339_opts(SecondsFormat::Millis, true))
}

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(health))
}

/// Ask whether the server lives, takes clients and reaches its store.
#[utoipa::path(
    get, path = "/v1/health", operation_id = "getHealth", tag = "server",
    responses(
        (status = 200, description = "It takes clients", body = Health),
        (status = 503, description = "It stops", body = Health)
    )
)]
async fn health(State(api): State<Api>) -> (StatusCode, Line<Health>) {
    let health = api.watch.health();
    let status = if health.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Line(health))
}
