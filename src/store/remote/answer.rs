//! What a failed request means: to be asked again, a lost race, or hopeless.
//!
//! The crate hides the HTTP status of most failures in a type of its own. So the HTTP client ([`super::http`]) turns every
//! answer that is no success into a [`Rejection`]: host, status, code and message, cut to size, where a redirect points, and
//! nothing else of the request or the answer; what of the request is a credential is masked ([`super::secrets`]), so that
//! none can get into an error text.
//!
//! The crate fetches its credentials by the same client. So not every answer is about the object: that it is absent is
//! believed of a store's own words alone.

use std::error::Error;

use hyper::header::HeaderMap;
use hyper::{Method, Uri};
use serde_json::Value;

use super::{Conditional, redirect};
use crate::store::StoreError;
use crate::store::retry::Request;

/// How much of its message is kept.
const MAX_MESSAGE_CHARS: usize = 300;

/// Where Azure repeats the code of an error: the only place if there is no body.
const AZURE_CODE_HEADER: &str = "x-ms-error-code";
/// The codes by which stores say that there is no such object, version or upload.
const ABSENT: &[&str] = &["NoSuchKey", "NoSuchVersion", "NoSuchUpload", "BlobNotFound", "ResourceNotFound"];
/// The codes by which they say that there is no such bucket.
const NO_BUCKET: &[&str] = &["NoSuchBucket", "ContainerNotFound", "NoSuchContainer"];

/// Who did not carry a request out, and in which words.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{host} answered HTTP {status}{}{code}{}{message}{}{directions}",
    if code.is_empty() { "" } else { " " },
    if message.is_empty() { "" } else { ": " },
    if directions.is_empty() { "" } else { "; " })]
pub(super) struct Rejection {
    host: String,
    /// Whether the request was a HEAD, whose answer has no body; only objects are asked for so.
    to_head: bool,
    status: u16,
    code: String,
    message: String,
    /// Where a redirect points, and which setting is right.
    directions: String,
}

/// An answer that asking again would not change: too long, or not of what was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct Unusable(pub(super) String);

/// An object that ends before what was asked of it does.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub(super) struct TooShort(pub(super) String);

/// Code and message of an error's body; empty where there are none.
fn words(body: &str) -> (String, String) {
    let json = serde_json::from_str(body).ok();
    let xml = || (element(body, "Code"), element(body, "Message"));
    let (code, message) = json.as_ref().map_or_else(xml, words_of_json);
    (cut(code), cut(message))
}

/// Those who lend credentials answer in JSON, each in a form of its own.
fn words_of_json(json: &Value) -> (&str, &str) {
    let (code, message) = match json.get("error") {
        Some(error @ Value::Object(_)) => (first(error, &["status"]), first(error, &["message"])),
        _ => (first(json, &["error", "code", "Code"]), first(json, &["error_description", "message", "Message"])),
    };
    (code.unwrap_or_default(), message.unwrap_or_default())
}

fn first<'a>(json: &'a Value, names: &[&str]) -> Option<&'a str> {
    names.iter().find_map(|name| json.get(name)?.as_str())
}

/// The content of an XML element that holds text alone.
pub(super) fn element<'a>(body: &'a str, tag: &str) -> &'a str {
    let rest = body.split_once(&format!("<{tag}>")).map(|(_, rest)| rest);
    rest.and_then(|rest| rest.split_once(&format!("</{tag}>"))).map_or("", |(inner, _)| inner)
}

/// What of a text from outside gets into an error.
pub(super) fn cut(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(MAX_MESSAGE_CHARS).collect()
}

impl Rejection {
    /// What an answer says that is no success; `body` is the beginning of its body.
    pub(super) fn new(method: &Method, uri: &Uri, status: u16, headers: &HeaderMap, body: &str) -> Self {
        let (mut code, message) = words(body);
        if code.is_empty() {
            code = headers.get(AZURE_CODE_HEADER).and_then(|code| code.to_str().ok()).map(cut).unwrap_or_default();
        }
        let directions = redirect::directions(uri, status, headers, body).unwrap_or_default();
        let host = uri.host().unwrap_or_default().to_owned();
        Self { host, to_head: method == Method::HEAD, status, code, message, directions }
    }

    /// Whether this is a store that has no such object, and not somebody else of whom something else was asked.
    fn says_absent(&self) -> bool {
        self.status == 404 && (self.to_head || ABSENT.contains(&self.code.as_str()))
    }

    fn meaning(&self, request: Request<'_>, conditional: Conditional) -> StoreError {
        let key = || request.key.clone();
        match (self.status, conditional) {
            (404, _) if NO_BUCKET.contains(&self.code.as_str()) => request.refused(self.clone()),
            // A swap of an object that is gone; S3 says 404 where others say 412.
            (404, Conditional::Yes) if self.says_absent() => StoreError::Conflict { key: key() },
            (404, Conditional::No) if self.says_absent() => StoreError::NotFound { key: key() },
            // Who lends credentials says so while he starts or is being renewed.
            (404 | 410, _) => request.unavailable(self.clone()),
            // A range that begins behind the end of the object.
            (416, Conditional::No) => request.short(self.clone()),
            (304 | 412, Conditional::Yes) => StoreError::Conflict { key: key() },
            // Azure's way to say that the object is there, and that of others.
            (409, Conditional::Yes) if self.code.ends_with("AlreadyExists") => StoreError::Conflict { key: key() },
            // Another request for the key is under way, says S3: nothing is decided, try again.
            (409, _) => request.unavailable(self.clone()),
            (501 | 505, _) => request.refused(self.clone()),
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
        if let Some(unusable) = e.downcast_ref::<Unusable>() {
            return request.refused(unusable.clone());
        }
        if let Some(short) = e.downcast_ref::<TooShort>() {
            return request.short(short.clone());
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
        // Memory is never busy: its general errors are bad requests; for reads, a range behind the end.
        (E::Generic { store: "InMemory", .. }, _) if request.operation == "get" => request.short(error),
        (E::Generic { store: "InMemory", .. }, _) => request.refused(error),
        // No answer of the store in the chain: the connection, or an answer that makes no sense.
        (E::Generic { .. } | E::JoinError { .. }, _) => request.unavailable(error),
        _ => request.refused(error),
    }
}

/// Whether the store knows nothing to put together (any more): S3 calls it no upload, Azure a list of unknown blocks.
pub(super) fn nothing_to_assemble(error: &StoreError) -> bool {
    match error {
        StoreError::NotFound { .. } => true,
        StoreError::Refused { source, .. } => {
            source.downcast_ref::<Rejection>().is_some_and(|rejection| rejection.code == "InvalidBlockList")
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use object_store::client::{HttpError, HttpErrorKind};

    use super::*;

    fn rejection(status: u16, body: &str) -> Rejection {
        let uri = Uri::from_static("https://store.example/disks/exports/vm/volume.json");
        Rejection::new(&Method::GET, &uri, status, &HeaderMap::new(), body)
    }

    /// One letter per meaning: Not found, Conflict, Unavailable, Refused, Short.
    fn letter(rejection: Rejection, conditional: Conditional) -> char {
        let key = "exports/vm/volume.json".parse().unwrap();
        // Wrapped as the crate wraps it: an HTTP error somewhere in the chain.
        let source = Box::new(HttpError::new(HttpErrorKind::Unknown, rejection));
        let error = object_store::Error::Generic { store: "S3", source };
        match judge(error, Request { operation: "put", key: &key }, conditional) {
            StoreError::NotFound { .. } => 'N',
            StoreError::Conflict { .. } => 'C',
            StoreError::Unavailable { .. } => 'U',
            StoreError::Refused { .. } => 'R',
            StoreError::Short { .. } => 'S',
            other => panic!("{other}"),
        }
    }

    #[test]
    fn each_status_means_what_the_caller_does_next() {
        for (status, code, plain, conditional) in [
            (300, "", 'R', 'R'),
            (301, "PermanentRedirect", 'R', 'R'),
            (302, "", 'R', 'R'),
            (303, "", 'R', 'R'),
            (304, "", 'R', 'C'),
            (307, "TemporaryRedirect", 'R', 'R'),
            (308, "", 'R', 'R'),
            (400, "InvalidArgument", 'R', 'R'),
            (400, "RequestTimeout", 'U', 'U'),
            (401, "", 'R', 'R'),
            (403, "AccessDenied", 'R', 'R'),
            (404, "NoSuchKey", 'N', 'C'),
            (404, "NoSuchUpload", 'N', 'C'),
            (404, "NoSuchVersion", 'N', 'C'),
            (404, "BlobNotFound", 'N', 'C'),
            (404, "ResourceNotFound", 'N', 'C'),
            (404, "NoSuchBucket", 'R', 'R'),
            (404, "ContainerNotFound", 'R', 'R'),
            (404, "NoSuchEntity", 'U', 'U'),
            (404, "", 'U', 'U'),
            (408, "", 'U', 'U'),
            (409, "ConditionalRequestConflict", 'U', 'U'),
            (409, "OperationAborted", 'U', 'U'),
            (409, "", 'U', 'U'),
            (409, "BlobAlreadyExists", 'U', 'C'),
            (410, "", 'U', 'U'),
            (412, "PreconditionFailed", 'R', 'C'),
            (416, "InvalidRange", 'S', 'R'),
            (429, "", 'U', 'U'),
            (500, "InternalError", 'U', 'U'),
            (501, "NotImplemented", 'R', 'R'),
            (503, "SlowDown", 'U', 'U'),
            (504, "", 'U', 'U'),
        ] {
            let body = format!("<Error><Code>{code}</Code></Error>");
            assert_eq!(letter(rejection(status, &body), Conditional::No), plain, "{status} {code}");
            assert_eq!(letter(rejection(status, &body), Conditional::Yes), conditional, "{status} {code}, conditional");
        }
    }

    #[test]
    fn an_answer_to_head_has_no_words_and_speaks_of_the_object() {
        let head = |status, code: &str| Rejection { to_head: true, code: code.into(), ..rejection(status, "") };
        assert_eq!(letter(head(404, ""), Conditional::No), 'N');
        assert_eq!(letter(head(404, "ContainerNotFound"), Conditional::No), 'R');
        assert_eq!(letter(head(410, ""), Conditional::No), 'U');
    }

    #[test]
    fn a_rejection_names_the_host_keeps_code_and_message_and_nothing_else_of_the_body() {
        let body = "<Error><Code>SignatureDoesNotMatch</Code><Message>no\nmatch</Message>\
                    <AWSAccessKeyId>AKIDSECRET</AWSAccessKeyId></Error>";
        let said = "store.example answered HTTP 403 SignatureDoesNotMatch: nomatch";
        assert_eq!(rejection(403, body).to_string(), said);
        assert_eq!(rejection(502, "<html>bad gateway").to_string(), "store.example answered HTTP 502");
        let long = format!("<Message>{}</Message>", "x".repeat(5_000));
        assert!(rejection(500, &long).to_string().len() < 400);
        let long = serde_json::json!({"message": "x".repeat(5_000)}).to_string();
        assert!(rejection(500, &long).to_string().len() < 400);
    }

    #[test]
    fn the_words_of_those_who_answer_in_json_are_kept() {
        for (body, code, message) in [
            (
                r#"{"error":{"code":403,"message":"no access","status":"PERMISSION_DENIED"}}"#,
                "PERMISSION_DENIED",
                "no access",
            ),
            (r#"{"error":"invalid_grant","error_description":"expired","trace_id":"7"}"#, "invalid_grant", "expired"),
            (r#"{"error":"invalid_grant"}"#, "invalid_grant", ""),
            (r#"{"message":"no such role","secret":"hushhush"}"#, "", "no such role"),
            (r#"{"code":"NoRole","message":"no such role"}"#, "NoRole", "no such role"),
            (r#"{"Code":"NoRole","Message":"no such role"}"#, "NoRole", "no such role"),
            (r#"{"error":7,"message":[]}"#, "", ""),
            (r#"["message"]"#, "", ""),
            (r#"{"message":"cut"#, "", ""),
        ] {
            assert_eq!(words(body), (code.to_owned(), message.to_owned()), "{body}");
        }
    }
}
