//! What a failed request means: to be asked again, a lost race, or hopeless.
//!
//! The crate hides the HTTP status of most failures in a type of its own. So [`Gate`] stands between it and its HTTP
//! client, and turns every answer that is no success into a [`Rejection`]: status, code and message, cut to size, and
//! nothing else of the request or the answer, so that no credential can get into an error text.

use std::error::Error;

use futures_util::StreamExt;
use object_store::ClientOptions;
use object_store::client::{
    HttpClient, HttpConnector, HttpError, HttpErrorKind, HttpRequest, HttpResponse, HttpResponseBody, HttpService,
    ReqwestConnector,
};

use super::Conditional;
use crate::store::StoreError;
use crate::store::retry::Request;

/// How much of an error's body is read.
const MAX_ERROR_BODY_BYTES: usize = 16 << 10;
/// How much of its message is kept.
const MAX_MESSAGE_CHARS: usize = 300;

/// The store's own words for a request it did not carry out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("HTTP {status}{}{code}{}{message}", if code.is_empty() { "" } else { " " }, if message.is_empty() { "" } else { ": " })]
pub(super) struct Rejection {
    pub(super) status: u16,
    pub(super) code: String,
    message: String,
}

impl Rejection {
    fn new(status: u16, body: &str) -> Self {
        let text = |tag: &str| -> String {
            let from = body.split_once(&format!("<{tag}>")).map(|(_, rest)| rest);
            let inner = from.and_then(|rest| rest.split_once(&format!("</{tag}>"))).map_or("", |(inner, _)| inner);
            inner.chars().filter(|c| !c.is_control()).take(MAX_MESSAGE_CHARS).collect()
        };
        Self { status, code: text("Code"), message: text("Message") }
    }

    fn meaning(&self, request: Request<'_>, conditional: Conditional) -> StoreError {
        let key = || request.key.clone();
        let no_bucket = matches!(self.code.as_str(), "NoSuchBucket" | "ContainerNotFound" | "NoSuchContainer");
        match (self.status, conditional) {
            (404, _) if no_bucket => request.refused(self.clone()),
            // A swap of an object that is gone; S3 says 404 where others say 412.
            (304 | 404 | 409 | 412, Conditional::Yes) => StoreError::Conflict { key: key() },
            (404, Conditional::No) => StoreError::NotFound { key: key() },
            (501 | 505, _) => request.refused(self.clone()),
            // Two writers of one key at the same instant: S3 asks to come again.
            (409, Conditional::No) => request.unavailable(self.clone()),
            (408 | 425 | 429 | 500..=599, _) => request.unavailable(self.clone()),
            // S3 words a connection that went quiet as the client's mistake.
            (400, _) if self.code == "RequestTimeout" => request.unavailable(self.clone()),
            _ => request.refused(self.clone()),
        }
    }
}

/// Sorts an error of the crate by what the caller does next.
pub(super) fn judge(error: object_store::Error, request: Request<'_>, conditional: Conditional) -> StoreError {
    use object_store::Error as E;
    let mut cause: Option<&(dyn Error + 'static)> = Some(&error);
    while let Some(e) = cause {
        if let Some(rejection) = e.downcast_ref::<Rejection>() {
            return rejection.meaning(request, conditional);
        }
        cause = e.source();
    }
    let key = || request.key.clone();
    match (&error, conditional) {
        (E::NotFound { .. }, Conditional::No) => StoreError::NotFound { key: key() },
        (
            E::NotFound { .. } | E::AlreadyExists { .. } | E::Precondition { .. } | E::NotModified { .. },
            Conditional::Yes,
        ) => StoreError::Conflict { key: key() },
        // Memory is never busy: its general errors are bad requests, such as a range behind the end.
        (E::Generic { store: "InMemory", .. }, _) => request.refused(error),
        // No answer of the store in the chain: the connection, or an answer that makes no sense.
        (E::Generic { .. } | E::JoinError { .. }, _) => request.unavailable(error),
        _ => request.refused(error),
    }
}

/// Makes HTTP clients whose failures can be told apart.
#[derive(Debug)]
pub(super) struct GateConnector;

impl HttpConnector for GateConnector {
    fn connect(&self, options: &ClientOptions) -> object_store::Result<HttpClient> {
        Ok(HttpClient::new(Gate(ReqwestConnector::default().connect(options)?)))
    }
}

#[derive(Debug)]
struct Gate(HttpClient);

#[async_trait::async_trait]
impl HttpService for Gate {
    async fn call(&self, request: HttpRequest) -> Result<HttpResponse, HttpError> {
        let response = self.0.execute(request).await?;
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let body = beginning(response.into_body()).await;
        // "Unknown" is the one kind the crate would not repeat even if its retries were on.
        Err(HttpError::new(HttpErrorKind::Unknown, Rejection::new(status.as_u16(), &body)))
    }
}

/// As much of a body as an error text is worth; what arrives of it.
async fn beginning(body: HttpResponseBody) -> String {
    let mut stream = body.bytes_stream();
    let mut bytes = Vec::new();
    while let Some(Ok(piece)) = stream.next().await {
        let room = MAX_ERROR_BODY_BYTES - bytes.len();
        bytes.extend_from_slice(&piece[..piece.len().min(room)]);
        if bytes.len() == MAX_ERROR_BODY_BYTES {
            break;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One letter per meaning: Not found, Conflict, Unavailable, Refused.
    fn letter(status: u16, code: &str, conditional: Conditional) -> char {
        let key = "exports/vm/volume.json".parse().unwrap();
        let rejection = Rejection::new(status, &format!("<Error><Code>{code}</Code></Error>"));
        // Wrapped as the crate wraps it: an HTTP error somewhere in the chain.
        let source = Box::new(HttpError::new(HttpErrorKind::Unknown, rejection));
        let error = object_store::Error::Generic { store: "S3", source };
        match judge(error, Request { operation: "put", key: &key }, conditional) {
            StoreError::NotFound { .. } => 'N',
            StoreError::Conflict { .. } => 'C',
            StoreError::Unavailable { .. } => 'U',
            StoreError::Refused { .. } => 'R',
            other => panic!("{other}"),
        }
    }

    #[test]
    fn each_status_means_what_the_caller_does_next() {
        for (status, code, plain, conditional) in [
            (301, "PermanentRedirect", 'R', 'R'),
            (304, "", 'R', 'C'),
            (400, "InvalidArgument", 'R', 'R'),
            (400, "RequestTimeout", 'U', 'U'),
            (401, "", 'R', 'R'),
            (403, "AccessDenied", 'R', 'R'),
            (404, "NoSuchKey", 'N', 'C'),
            (404, "NoSuchBucket", 'R', 'R'),
            (404, "ContainerNotFound", 'R', 'R'),
            (408, "", 'U', 'U'),
            (409, "ConditionalRequestConflict", 'U', 'C'),
            (412, "PreconditionFailed", 'R', 'C'),
            (416, "InvalidRange", 'R', 'R'),
            (429, "", 'U', 'U'),
            (500, "InternalError", 'U', 'U'),
            (501, "NotImplemented", 'R', 'R'),
            (503, "SlowDown", 'U', 'U'),
            (504, "", 'U', 'U'),
        ] {
            assert_eq!(letter(status, code, Conditional::No), plain, "{status} {code}");
            assert_eq!(letter(status, code, Conditional::Yes), conditional, "{status} {code}, conditional");
        }
    }

    #[test]
    fn a_rejection_keeps_code_and_message_and_nothing_else_of_the_body() {
        let body = "<Error><Code>SignatureDoesNotMatch</Code><Message>no\nmatch</Message>\
                    <AWSAccessKeyId>AKIDSECRET</AWSAccessKeyId></Error>";
        assert_eq!(Rejection::new(403, body).to_string(), "HTTP 403 SignatureDoesNotMatch: nomatch");
        assert_eq!(Rejection::new(502, "<html>bad gateway").to_string(), "HTTP 502");
        let long = format!("<Message>{}</Message>", "x".repeat(5_000));
        assert!(Rejection::new(500, &long).to_string().len() < 400);
    }
}
