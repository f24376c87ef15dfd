//! The admin API: HTTP/1.1 and JSON over a Unix socket; and the metrics, which may have an address of their own.
//!
//! Promises: every request is answered or its connection closed within bounded time and memory, however malformed or
//! slow it is, and whether or not its answer is taken; every refusal that follows a readable request head is
//! `application/problem+json` with a stable code. An operation that was accepted runs to its end even if its client hangs
//! up; how long it may take is not limited here. This front end passes logical ids only: it never sees keys, paths or bytes
//! of an image.

mod answer;
mod body;
mod exports;
mod health;
mod openapi;
mod problem;
mod scrape;
mod snapshots;
mod socket;
mod status;
mod timed;

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::http::{Method, Uri};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use crate::metrics::Page;
use crate::net::Failures;
use crate::volume::registry::Registry;
pub use health::{Health, StoreFailure, StoreHealth};
use problem::{Code, Problem};
pub use scrape::{MAX_SCRAPES, ScrapeError, Scrapes};
pub use socket::{BindError, Group, Socket};
pub use status::{ExportCounts, ServerStatus};
use timed::TimedWrites;

/// How long a client may take for a request's head; also how long a connection may idle.
pub const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a client may take for a request's body.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a client may leave an answer untaken, without one byte of progress.
pub const WRITE_TIMEOUT: Duration = Duration::from_secs(10);
/// The longest request head, in bytes.
pub const MAX_HEAD_BYTES: usize = 64 << 10;
/// The longest request body, in bytes.
pub const MAX_BODY_BYTES: usize = 64 << 10;
/// How many clients are served at once; the next ones are told so and turned away.
pub const MAX_CONNECTIONS: usize = 256;
/// How long turning a client away may take.
const REFUSAL_TIMEOUT: Duration = Duration::from_secs(1);

/// What a client may ask of the server's patience. The default is the constants above.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// See [`HEADER_TIMEOUT`].
    pub header_timeout: Duration,
    /// See [`BODY_TIMEOUT`].
    pub body_timeout: Duration,
    /// See [`WRITE_TIMEOUT`].
    pub write_timeout: Duration,
    /// See [`MAX_BODY_BYTES`].
    pub max_body_bytes: usize,
    /// See [`MAX_CONNECTIONS`].
    pub max_connections: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            header_timeout: HEADER_TIMEOUT,
            body_timeout: BODY_TIMEOUT,
            write_timeout: WRITE_TIMEOUT,
            max_body_bytes: MAX_BODY_BYTES,
            max_connections: MAX_CONNECTIONS,
        }
    }
}

/// What the calls work on.
#[derive(Debug, Clone)]
pub struct Api {
    /// The exports.
    pub registry: Arc<Registry>,
    /// The chunk size of an export whose creator names none, in bytes.
    pub default_chunk_bytes: u64,
    /// What is shown to watchers.
    pub watch: Watch,
    /// What a client may ask of the server's patience.
    pub limits: Limits,
}

/// What this front end shows but does not know: it sees volumes alone. The composition root, which knows every part, gives
/// it functions that look.
#[derive(Clone)]
pub struct Watch {
    metrics: Arc<dyn Fn() -> Page + Send + Sync>,
    health: Arc<dyn Fn() -> Health + Send + Sync>,
    status: Arc<dyn Fn() -> ServerStatus + Send + Sync>,
}

impl Watch {
    /// What `GET /metrics`, `GET /v1/health` and `GET /v1/status` show.
    pub fn new(
        metrics: impl Fn() -> Page + Send + Sync + 'static,
        health: impl Fn() -> Health + Send + Sync + 'static,
        status: impl Fn() -> ServerStatus + Send + Sync + 'static,
    ) -> Self {
        Self { metrics: Arc::new(metrics), health: Arc::new(health), status: Arc::new(status) }
    }

    fn metrics(&self) -> Page {
        (self.metrics)()
    }

    fn health(&self) -> Health {
        (self.health)()
    }

    fn status(&self) -> ServerStatus {
        (self.status)()
    }
}

impl std::fmt::Debug for Watch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watch")
    }
}

fn router(api: Api) -> Router {
    openapi::described([exports::routes(), snapshots::routes(), status::routes(), health::routes(), scrape::routes()])
        .fallback(unknown_path)
        .method_not_allowed_fallback(method_not_allowed)
        .with_state(api)
}

async fn unknown_path(method: Method, uri: Uri) -> Problem {
    let path: String = uri.path().chars().take(MAX_ECHOED_CHARS).collect();
    Problem::new(
        Code::UnknownPath,
        format!("{method} {path} is no call of this API; GET /v1/exports lists the exports"),
    )
}

async fn method_not_allowed(method: Method, uri: Uri) -> Problem {
    let path: String = uri.path().chars().take(MAX_ECHOED_CHARS).collect();
    Problem::new(Code::MethodNotAllowed, format!("{path} does not take {method}; the Allow header says what it takes"))
}

/// How much of a client's path an answer repeats, in characters.
const MAX_ECHOED_CHARS: usize = 256;

/// Serves until `stop` is true; then takes no more clients, removes the socket, and returns once the requests under way
/// are answered. Dropping the future ends the connections at once; operations they started go on.
pub async fn serve(socket: Socket, api: Api, mut stop: watch::Receiver<bool>) {
    let slots = Arc::new(Semaphore::new(api.limits.max_connections));
    let http = http(&api.limits);
    let service = TowerToHyperService::new(router(api.clone()));
    let mut connections = JoinSet::new();
    let mut failures = Failures::default();
    loop {
        let accepted = tokio::select! {
            accepted = socket.listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            () = stopped(&mut stop) => break,
        };
        match (accepted, Arc::clone(&slots).try_acquire_owned()) {
            (Ok((stream, _)), Ok(slot)) => {
                let stream = TimedWrites::new(stream, api.limits.write_timeout);
                let connection = http.serve_connection(TokioIo::new(stream), service.clone());
                let stop = stop.clone();
                connections.spawn(async move {
                    attend(connection, stop).await;
                    drop(slot);
                });
            }
            (Ok((stream, _)), Err(_)) => turn_away(stream, api.limits.max_connections).await,
            (Err(e), _) => failures.pass("the admin socket", e).await,
        }
    }
    drop(socket);
    while connections.join_next().await.is_some() {}
}

fn http(limits: &Limits) -> http1::Builder {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_buf_size(MAX_HEAD_BYTES)
        // A client may close its sending side after the request and still wait for the answer.
        .half_close(true);
    http
}

/// Returns once `stop` is true, or nobody is left who could make it true.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

type Connection<S> = http1::Connection<TokioIo<TimedWrites<S>>, TowerToHyperService<Router>>;

async fn attend<S>(connection: Connection<S>, mut stop: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stopped(&mut stop) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(e) = ended {
        tracing::debug!("an HTTP connection ended early: {e}");
    }
}

/// Answers before the request was read, so that a client beyond the limit neither waits nor costs a slot.
async fn turn_away(mut stream: UnixStream, max_connections: usize) {
    let detail = format!("{max_connections} clients are connected already: close some, or repeat later");
    let problem = Problem::new(Code::TooManyConnections, detail);
    tracing::warn!("an admin client was turned away: {}", problem.detail);
    let answer = problem.to_http();
    let _ = tokio::time::timeout(REFUSAL_TIMEOUT, stream.write_all(answer.as_bytes())).await;
}
