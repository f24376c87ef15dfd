//! `GET /metrics`: on the admin socket, and on a TCP address of its own that has nothing else.
//!
//! The address is for a collector on another host. It takes no command, names exports but shows nothing of their data,
//! and knows no passwords: the network decides who may read it.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::get;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::timed::TimedWrites;
use super::{Api, Limits, Watch, attend, http, stopped};
use crate::metrics::Page;
use crate::net::Failures;

/// How many collectors are served at once; the next ones are closed.
pub const MAX_SCRAPES: usize = 16;

async fn metrics(State(watch): State<Watch>) -> impl IntoResponse {
    ([(CONTENT_TYPE, Page::CONTENT_TYPE)], watch.metrics().into_text())
}

pub(super) fn routes() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(metrics_of_api))
}

/// Collect the metrics, in Prometheus' text format.
#[utoipa::path(
    get, path = "/metrics", operation_id = "getMetrics", tag = "server",
    responses((status = 200, description = "The counters of now", body = String, content_type = Page::CONTENT_TYPE))
)]
async fn metrics_of_api(State(api): State<Api>) -> impl IntoResponse {
    metrics(State(api.watch)).await
}

/// Nobody can collect there.
#[derive(Debug, thiserror::Error)]
#[error(
    "--metrics-listen {addr} cannot be used ({source}): choose a free address of this host, such as 127.0.0.1:9464"
)]
pub struct ScrapeError {
    addr: String,
    source: io::Error,
}

/// A bound address for collectors.
#[derive(Debug)]
pub struct Scrapes {
    listener: TcpListener,
    local_addr: SocketAddr,
}

impl Scrapes {
    /// Listens at `HOST:PORT`.
    ///
    /// # Errors
    /// [`ScrapeError`], which names the address.
    pub async fn bind(addr: &str) -> Result<Self, ScrapeError> {
        let failed = |source| ScrapeError { addr: addr.to_owned(), source };
        let listener = TcpListener::bind(addr).await.map_err(failed)?;
        let local_addr = listener.local_addr().map_err(failed)?;
        Ok(Self { listener, local_addr })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Serves until `stop` is true; then takes no more collectors and returns once those there are answered.
    pub async fn serve(self, watch: Watch, limits: Limits, mut stop: watch::Receiver<bool>) {
        let slots = Arc::new(Semaphore::new(MAX_SCRAPES));
        let http = http(&limits);
        let router = Router::new().route("/metrics", get(self::metrics)).with_state(watch);
        let service = TowerToHyperService::new(router);
        let mut connections = JoinSet::new();
        let mut failures = Failures::default();
        loop {
            let accepted = tokio::select! {
                accepted = self.listener.accept() => accepted,
                Some(_) = connections.join_next() => continue,
                () = stopped(&mut stop) => break,
            };
            match (accepted, Arc::clone(&slots).try_acquire_owned()) {
                (Ok((stream, _)), Ok(slot)) => {
                    let stream = TimedWrites::new(stream, limits.write_timeout);
                    let connection = http.serve_connection(TokioIo::new(stream), service.clone());
                    let stop = stop.clone();
                    connections.spawn(async move {
                        attend(connection, stop).await;
                        drop(slot);
                    });
                }
                (Ok(_), Err(_)) => tracing::debug!("{MAX_SCRAPES} collectors are connected: one more was closed"),
                (Err(e), _) => failures.pass(self.local_addr, e).await,
            }
        }
        drop(self.listener);
        while connections.join_next().await.is_some() {}
    }
}
