//! One request, one answer: HTTP/1.1 over the Unix socket.
//!
//! A connection is made for each call and ends with it. An answer is held whole, up to [`MAX_ANSWER_BYTES`]. How long an
//! operation takes is not limited here: a publish may take hours.

use std::path::PathBuf;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1;
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

use super::CliError;

/// The longest answer that is read: the list of some 100,000 exports.
pub const MAX_ANSWER_BYTES: usize = 64 << 20;

/// Where a server is asked.
#[derive(Debug, Clone)]
pub(super) struct Client {
    socket: PathBuf,
}

/// A refusal of the API.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The stable code, or the HTTP status of an answer that has none.
    pub code: String,
    /// What, where, and what to do.
    pub detail: String,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ({})", self.detail, self.code)
    }
}

impl Refused {
    fn from_answer(status: u16, answer: &Value) -> Self {
        let text = |field: &str| answer[field].as_str().map(str::to_owned);
        Self {
            code: text("code").unwrap_or_else(|| status.to_string()),
            detail: text("detail").unwrap_or_else(|| format!("the server answered {answer}")),
        }
    }

    /// The command that helps, where the API, which knows nothing of commands, does not name one.
    pub(super) fn remedy(&self) -> Option<&'static str> {
        match self.code.as_str() {
            "not-found" => {
                Some("`nbd-server export list` shows what is loaded, `nbd-server export open NAME` loads one")
            }
            "exists" => Some("`nbd-server export open NAME` loads one that is in the store"),
            "snapshot-not-found" => Some("`nbd-server snapshot list NAME` shows what is published"),
            "nothing-published" => Some("`nbd-server snapshot create NAME` publishes one"),
            "conflict" => Some(
                "`nbd-server export clone` shows the other server's image; `nbd-server cache reset NAME` drops this one's changes",
            ),
            "store-unavailable" => Some("`nbd-server status` shows since when the store fails, and why"),
            "busy" => Some("`nbd-server export status NAME` shows what is going on"),
            "failed" | "damaged" => {
                Some("`nbd-server export list`, `nbd-server export status NAME` and the server's log have the reason")
            }
            _ => None,
        }
    }
}

impl Client {
    pub(super) fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    pub(super) async fn get(&self, path: &str) -> Result<Value, CliError> {
        self.call(Method::GET, path, None).await
    }

    pub(super) async fn post(&self, path: &str, body: Option<Value>) -> Result<Value, CliError> {
        self.call(Method::POST, path, body).await
    }

    pub(super) async fn delete(&self, path: &str) -> Result<Value, CliError> {
        self.call(Method::DELETE, path, None).await
    }

    /// The JSON of a good answer; null if it has none.
    async fn call(&self, method: Method, path: &str, body: Option<Value>) -> Result<Value, CliError> {
        let no_answer = |reason: String| CliError::NoAnswer { path: self.socket.clone(), reason };
        let stream = UnixStream::connect(&self.socket).await;
        let stream = stream.map_err(|source| CliError::NoServer { path: self.socket.clone(), source })?;
        let (mut sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|e| no_answer(e.to_string()))?;
        let body = body.map(|body| Bytes::from(body.to_string())).unwrap_or_default();
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, "localhost")
            .header(CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .map_err(|e| no_answer(e.to_string()))?;
        let exchange = async {
            let response = sender.send_request(request).await.map_err(|e| e.to_string())?;
            let status = response.status();
            let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES).collect();
            let bytes = body.await.map_err(|e| e.to_string())?.to_bytes();
            drop(sender);
            Ok::<_, String>((status, bytes))
        };
        // The connection moves the bytes; its own end says no more than the exchange does.
        let (exchanged, _) = tokio::join!(exchange, connection);
        let (status, bytes) = exchanged.map_err(no_answer)?;
        let answer = if bytes.is_empty() { Ok(Value::Null) } else { serde_json::from_slice(&bytes) };
        let answer = answer.map_err(|e| no_answer(format!("{status} without JSON: {e}")))?;
        if status.is_success() {
            Ok(answer)
        } else {
            Err(CliError::Refused(Refused::from_answer(status.as_u16(), &answer)))
        }
    }
}
