//! The HTTP client below the crate: for the store, and for the services that lend credentials.
//!
//! It follows no redirect and repeats nothing. An answer that is no success becomes a
//! [`Rejection`](super::answer::Rejection) here, before the crate can hide its status.

use std::net::SocketAddr;
use std::time::Duration;

use futures_util::StreamExt;
use http_body_util::BodyExt;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService,
};
use object_store::{ClientConfigKey, ClientOptions};
use rand::seq::SliceRandom;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::redirect::Policy;

use super::CONNECT_TIMEOUT;
use super::answer::Rejection;
use super::secrets::Secrets;
use crate::sabotage::{Rule, breaks};

/// How much of an error's body is read.
const MAX_ERROR_BODY_BYTES: usize = 16 << 10;
/// How long it is waited for: the status alone says enough.
const ERROR_BODY_PATIENCE: Duration = Duration::from_secs(2);

/// Makes the crate's HTTP clients.
#[derive(Debug)]
pub(super) struct Connector;

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        // The crate allows plain HTTP where it asks the metadata service of an instance.
        let plain = options.get_config_value(&ClientConfigKey::AllowHttp).as_deref() == Some("true");
        let client = reqwest::Client::builder()
            .user_agent(concat!(env!("CARGO_PKG_NAME"), "/", env!("CARGO_PKG_VERSION")))
            .redirect(if breaks(Rule::FollowRedirects) { Policy::default() } else { Policy::none() })
            .connect_timeout(CONNECT_TIMEOUT)
            .https_only(!plain)
            .http1_only()
            .dns_resolver(Shuffled)
            .build();
        let client = client.map_err(|e| object_store::Error::Generic { store: "HTTP", source: e.into() })?;
        Ok(HttpClient::new(Gate(client)))
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
struct Gate(reqwest::Client);

#[async_trait::async_trait]
impl HttpService for Gate {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let (method, uri) = (request.method().clone(), request.uri().clone());
        let secrets = Secrets::of(&request);
        let response = self.0.execute(translated(request)?).await.map_err(failure)?;
        if response.status().is_success() {
            let (parts, body) = hyper::Response::from(response).into_parts();
            return Ok(HttpResponse::from_parts(parts, HttpResponseBody::new(body.map_err(failure))));
        }
        let (status, mut headers) = (response.status().as_u16(), response.headers().clone());
        secrets.mask(&mut headers);
        // Before anything is cut: a part of a secret is one, too.
        let body = secrets.masked(&beginning(response).await);
        // "Unknown" is the one kind the crate would not repeat even if its retries were on.
        Err(HttpError::new(HttpErrorKind::Unknown, Rejection::new(&method, &uri, status, &headers, &body)))
    }
}

/// The crate's request as the client's.
fn translated(request: HttpRequest) -> Result<reqwest::Request, HttpError> {
    let (parts, body) = request.into_parts();
    let url = parts.uri.to_string();
    let url = reqwest::Url::parse(&url).map_err(|e| HttpError::new(HttpErrorKind::Unknown, e))?;
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
    HttpError::new(HttpErrorKind::Unknown, error.without_url())
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
