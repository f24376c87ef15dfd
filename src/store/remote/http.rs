//! The HTTP client below the crate: for the store, and for the services that lend credentials.
//!
//! It follows no redirect and repeats nothing. An answer that is no success becomes a
//! [`Rejection`](super::answer::Rejection) here, before the crate can hide its status. An answer that is no object's content
//! has at most [`MAX_ANSWER_BYTES`]; whoever asks for content marks the request with [`Content`].
//!
//! A request that the store leaves without an answer makes all connections suspect, since a router that lost its state
//! silences all of them: requests from then on get new ones.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::{Method, StatusCode, header};
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService,
};
use object_store::{ClientConfigKey, ClientOptions};
use parking_lot::Mutex;
use rand::seq::SliceRandom;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect::Policy;
use tokio::time::Instant;

use super::CONNECT_TIMEOUT;
use super::answer::{Rejection, TooShort, Unusable};
use super::secrets::Secrets;
use crate::sabotage::{Rule, breaks};
use crate::store::BoxError;

/// How much of an error's body is read.
const MAX_ERROR_BODY_BYTES: usize = 16 << 10;
/// How long it is waited for: the status alone says enough.
const ERROR_BODY_PATIENCE: Duration = Duration::from_secs(2);

/// The most bytes of an answer that is no object's content: a page of a listing with 5,000 names, the most of any service,
/// and 3 KiB to each.
pub(super) const MAX_ANSWER_BYTES: usize = 16 << 20;
/// How long a request must have waited when it is abandoned, for the other connections to be suspect, too.
pub(super) const SUSPECT_AFTER: Duration = Duration::from_secs(1);

/// Marks a request for an object's content, whose length its reader checks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Content;

/// Makes the crate's HTTP clients.
#[derive(Debug)]
pub(super) struct Connector;

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        // The crate allows plain HTTP where it asks the metadata service of an instance.
        let plain = options.get_config_value(&ClientConfigKey::AllowHttp).as_deref() == Some("true");
        let client = client(plain).map_err(|e| object_store::Error::Generic { store: "HTTP", source: e.into() })?;
        Ok(HttpClient::new(Gate(Arc::new(Pool { plain, current: Mutex::new((0, client)) }))))
    }
}

/// A client with no connection yet.
fn client(plain: bool) -> reqwest::Result<reqwest::Client> {
    reqwest::Client::builder()
        .user_agent(concat!(env!("CARGO_PKG_NAME"), "/", env!("CARGO_PKG_VERSION")))
        .redirect(if breaks(Rule::FollowRedirects) { Policy::default() } else { Policy::none() })
        .connect_timeout(CONNECT_TIMEOUT)
        .https_only(!plain)
        .http1_only()
        .dns_resolver(Shuffled)
        .build()
}

/// The connections that new requests use.
#[derive(Debug)]
struct Pool {
    plain: bool,
    /// The client, and how many there were before it.
    current: Mutex<(u64, reqwest::Client)>,
}

impl Pool {
    /// Leaves the connections of a client to the requests on them, if it is the current one still.
    fn renew(&self, suspect: u64) {
        let mut current = self.current.lock();
        if current.0 == suspect {
            match client(self.plain) {
                Ok(client) => *current = (suspect + 1, client),
                Err(error) => tracing::warn!(%error, "cannot replace the connections to the store"),
            }
        }
    }
}

/// A request on its way. Dropped after a silence, it makes its pool suspect.
struct OnItsWay {
    pool: Arc<Pool>,
    client: u64,
    heard: Instant,
}

impl OnItsWay {
    fn hear(&mut self) {
        self.heard = Instant::now();
    }
}

impl Drop for OnItsWay {
    fn drop(&mut self) {
        if self.heard.elapsed() >= SUSPECT_AFTER {
            self.pool.renew(self.client);
        }
    }
}

/// Spreads connections over all addresses of a host.
struct Shuffled;

impl Resolve for Shuffled {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            // The client puts the port of the URL in the place of zero.
            let mut addresses: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            addresses.shuffle(&mut rand::rng());
            Ok(Box::new(addresses.into_iter()) as Addrs)
        })
    }
}

#[derive(Debug)]
struct Gate(Arc<Pool>);

#[async_trait::async_trait]
impl HttpService for Gate {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (method, uri) = (request.method().clone(), request.uri().clone());
        let secrets = Secrets::of(&request);
        let content = request.extensions().get::<Content>().is_some();
        let range = request.headers().get(header::RANGE).cloned();
        let (generation, client) = self.0.current.lock().clone();
        let mut on_its_way = OnItsWay { pool: Arc::clone(&self.0), client: generation, heard: Instant::now() };
        let response = client.execute(translated(request)?).await.map_err(failure)?;
        on_its_way.hear();
        if !response.status().is_success() {
            let (status, mut headers) = (response.status().as_u16(), response.headers().clone());
            secrets.mask(&mut headers);
            // Before anything is cut: a part of a secret is one, too.
            let body = secrets.masked(&beginning(response).await);
            on_its_way.hear();
            return Err(unknown(Rejection::new(&method, &uri, status, &headers, &body)));
        }
        let (mut parts, body) = hyper::Response::from(response).into_parts();
        if let (Some(range), Method::GET, StatusCode::OK) = (range, method, parts.status) {
            take_whole(range.to_str().unwrap_or_default(), &mut parts)?;
        }
        let body = body.map_err(failure).map_frame(move |frame| {
            on_its_way.hear();
            frame
        });
        let body = if content {
            HttpResponseBody::new(body)
        } else {
            HttpResponseBody::new(Limited::new(body, MAX_ANSWER_BYTES).map_err(too_long))
        };
        Ok(HttpResponse::from_parts(parts, body))
    }
}

/// Makes the whole object the range that was asked for, if that range is all of it: a service may ignore a range then.
fn take_whole(range: &str, parts: &mut hyper::http::response::Parts) -> Result<(), HttpError> {
    let number = |text: &str| text.parse::<u64>().ok();
    let asked = range.strip_prefix("bytes=").and_then(|range| range.split_once('-'));
    let asked = asked.and_then(|(first, last)| Some((number(first)?, number(last)?)));
    let len = parts.headers.get(header::CONTENT_LENGTH).and_then(|len| number(len.to_str().ok()?));
    // Anything else that makes no sense is found out by the reader.
    let (Some((first, last)), Some(len)) = (asked, len) else { return Ok(()) };
    if first == 0 && last + 1 == len {
        let said = format!("bytes 0-{last}/{len}");
        parts.headers.insert(header::CONTENT_RANGE, said.parse().map_err(unknown)?);
        parts.status = StatusCode::PARTIAL_CONTENT;
    } else if first == 0 && len <= last {
        return Err(unknown(TooShort(format!("it has {len} bytes, bytes 0 to {last} were asked for"))));
    } else if last - first + 1 < len {
        let text = format!("asked for bytes {first} to {last}, it sent all {len} bytes: it ignores ranges");
        return Err(unknown(Unusable(text)));
    }
    Ok(())
}

/// An error of the one kind that the crate would not repeat even if its retries were on.
fn unknown(error: impl std::error::Error + Send + Sync + 'static) -> HttpError {
    HttpError::new(HttpErrorKind::Unknown, error)
}

fn too_long(error: BoxError) -> HttpError {
    if error.is::<LengthLimitError>() {
        return unknown(Unusable(format!("the answer has more than {MAX_ANSWER_BYTES} bytes")));
    }
    error.downcast::<HttpError>().map_or_else(|error| HttpError::new_boxed(HttpErrorKind::Unknown, error), |e| *e)
}

/// The crate's request as the client's.
fn translated(request: HttpRequest) -> Result<reqwest::Request, HttpError> {
    let (parts, body) = request.into_parts();
    let url = parts.uri.to_string();
    let url = reqwest::Url::parse(&url).map_err(unknown)?;
    let mut request = reqwest::Request::new(parts.method, url);
    *request.headers_mut() = parts.headers;
    *request.body_mut() = Some(match body.as_bytes() {
        Some(bytes) => bytes.clone().into(),
        None => reqwest::Body::wrap(body),
    });
    Ok(request)
}

/// No answer, or one that broke off. The URL stays out: the crate's own errors have it where it holds no secret.
fn failure(error: reqwest::Error) -> HttpError {
    unknown(error.without_url())
}

/// As much of a body as an error text is worth; what arrives of it in time.
async fn beginning(response: reqwest::Response) -> String {
    let mut stream = response.bytes_stream();
    let mut bytes = Vec::new();
    let read = async {
        while let Some(Ok(piece)) = stream.next().await {
            let room = MAX_ERROR_BODY_BYTES - bytes.len();
            bytes.extend_from_slice(&piece[..piece.len().min(room)]);
            if bytes.len() == MAX_ERROR_BODY_BYTES {
                break;
            }
        }
    };
    let _ = tokio::time::timeout(ERROR_BODY_PATIENCE, read).await;
    String::from_utf8_lossy(&bytes).into_owned()
}
