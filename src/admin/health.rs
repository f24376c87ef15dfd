//! `GET /v1/health`: whether the server lives, is ready, and reaches its store.
//!
//! 200 means: it takes clients. A store that fails does not change that, since what is in the caches is served as before;
//! who wants to know looks at the body. 503 means: it stops.

use std::time::SystemTime;

use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use chrono::{DateTime, SecondsFormat, Utc};
use serde::{Serialize, Serializer};

use super::Api;
use super::answer::Line;

/// How the server is.
#[derive(Debug, Clone, Serialize)]
pub struct Health {
    /// It answers.
    pub live: bool,
    /// It takes clients.
    pub ready: bool,
    /// How its store is.
    pub store: StoreHealth,
}

/// How the store is, by the last request to it.
#[derive(Debug, Clone, Serialize)]
pub struct StoreHealth {
    /// The kind of store.
    pub backend: &'static str,
    /// Whether it gave a definite answer.
    pub reachable: bool,
    /// Since when that is so.
    #[serde(serialize_with = "time")]
    pub since: SystemTime,
    /// The last failure, however long ago.
    pub last_error: Option<StoreFailure>,
}

/// A request that the store did not serve.
#[derive(Debug, Clone, Serialize)]
pub struct StoreFailure {
    /// When it failed.
    #[serde(serialize_with = "time")]
    pub at: SystemTime,
    /// What failed and why.
    pub reason: String,
}

fn time<S: Serializer>(at: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&DateTime::<Utc>::from(*at).to_rfc3339_opts(SecondsFormat::Millis, true))
}

pub(super) fn routes() -> Router<Api> {
    Router::new().route("/v1/health", get(health))
}

async fn health(State(api): State<Api>) -> (StatusCode, Line<Health>) {
    let health = api.watch.health();
    let status = if health.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Line(health))
}
