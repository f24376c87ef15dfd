//! Every way the admin API says no, in one table: code → status and title, and every error of the registry → code.
//!
//! Answers are `application/problem+json` (RFC 9457). `code` is for programs and never changes its meaning, `title` is
//! the same for every problem of that code, `detail` names the value, the place and the remedy for a person. There is
//! no 500: what the server cannot do is the store's or the disk's state (503, 507), and says so.

use std::collections::BTreeMap;

use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::openapi::schema::{Object, ObjectBuilder, Type};
use utoipa::openapi::{ContentBuilder, Ref, RefOr, ResponseBuilder};
use utoipa::{IntoResponses, ToSchema};

use crate::units::UnitError;
use crate::volume::VolumeError;
use crate::volume::registry::ExportError;

/// What went wrong, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Code {
    InvalidJson,
    InvalidField,
    InvalidExportId,
    InvalidSnapshotId,
    InvalidSize,
    InvalidChunkSize,
    IncompleteBody,
    OutOfRange,
    ReadOnly,
    UnknownPath,
    NotFound,
    SnapshotNotFound,
    MethodNotAllowed,
    BodyTimeout,
    Exists,
    AlreadyLoaded,
    NothingPublished,
    Busy,
    Cancelled,
    Conflict,
    Closed,
    PayloadTooLarge,
    StoreUnavailable,
    Damaged,
    Failed,
    TooManyConnections,
    NoSpace,
}

impl Code {
    /// All of them.
    const ALL: [Self; 27] = [
        Self::InvalidJson,
        Self::InvalidField,
        Self::InvalidExportId,
        Self::InvalidSnapshotId,
        Self::InvalidSize,
        Self::InvalidChunkSize,
        Self::IncompleteBody,
        Self::OutOfRange,
        Self::ReadOnly,
        Self::UnknownPath,
        Self::NotFound,
        Self::SnapshotNotFound,
        Self::MethodNotAllowed,
        Self::BodyTimeout,
        Self::Exists,
        Self::AlreadyLoaded,
        Self::NothingPublished,
        Self::Busy,
        Self::Cancelled,
        Self::Conflict,
        Self::Closed,
        Self::PayloadTooLarge,
        Self::StoreUnavailable,
        Self::Damaged,
        Self::Failed,
        Self::TooManyConnections,
        Self::NoSpace,
    ];

    /// The table: status, code, title.
    const fn row(self) -> (StatusCode, &'static str, &'static str) {
        use StatusCode as S;
        match self {
            Self::InvalidJson => (S::BAD_REQUEST, "invalid-json", "The body is not a JSON object"),
            Self::InvalidField => (S::BAD_REQUEST, "invalid-field", "A field is missing, unknown or of the wrong type"),
            Self::InvalidExportId => (S::BAD_REQUEST, "invalid-export-id", "Not an export id"),
            Self::InvalidSnapshotId => (S::BAD_REQUEST, "invalid-snapshot-id", "Not a snapshot id"),
            Self::InvalidSize => (S::BAD_REQUEST, "invalid-size", "Not an image size"),
            Self::InvalidChunkSize => (S::BAD_REQUEST, "invalid-chunk-size", "Not a chunk size for this image"),
            Self::IncompleteBody => (S::BAD_REQUEST, "incomplete-body", "The body ended early"),
            Self::OutOfRange => (S::BAD_REQUEST, "out-of-range", "The range leaves the image"),
            Self::ReadOnly => (S::FORBIDDEN, "read-only", "The export is read-only"),
            Self::UnknownPath => (S::NOT_FOUND, "unknown-path", "No such call"),
            Self::NotFound => (S::NOT_FOUND, "not-found", "No such export"),
            Self::SnapshotNotFound => (S::NOT_FOUND, "snapshot-not-found", "No such snapshot"),
            Self::MethodNotAllowed => (S::METHOD_NOT_ALLOWED, "method-not-allowed", "Not a method of this path"),
            Self::BodyTimeout => (S::REQUEST_TIMEOUT, "body-timeout", "The body took too long"),
            Self::Exists => (S::CONFLICT, "exists", "The export id is taken"),
            Self::AlreadyLoaded => (S::CONFLICT, "already-loaded", "The export is loaded already"),
            Self::NothingPublished => (S::CONFLICT, "nothing-published", "The export has no snapshot"),
            Self::Busy => (S::CONFLICT, "busy", "Another operation on the export is under way"),
            Self::Cancelled => (S::CONFLICT, "cancelled", "The operation was cancelled"),
            Self::Conflict => (S::CONFLICT, "conflict", "Another server published the export"),
            Self::Closed => (S::CONFLICT, "closed", "The export is being unloaded"),
            Self::PayloadTooLarge => (S::PAYLOAD_TOO_LARGE, "payload-too-large", "The body is too large"),
            Self::StoreUnavailable => (S::SERVICE_UNAVAILABLE, "store-unavailable", "The store does not answer"),
            Self::Damaged => (S::SERVICE_UNAVAILABLE, "damaged", "Stored state of the export is damaged"),
            Self::Failed => (S::SERVICE_UNAVAILABLE, "failed", "The export failed and needs an operator"),
            Self::TooManyConnections => (S::SERVICE_UNAVAILABLE, "too-many-connections", "Too many connections"),
            Self::NoSpace => (S::INSUFFICIENT_STORAGE, "no-space", "The local disk is full"),
        }
    }
}

/// One refusal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    pub(super) code: Code,
    pub(super) detail: String,
}

/// Every refusal; `code` says which, for programs.
#[derive(Serialize, ToSchema)]
#[schema(as = Problem)]
pub(super) struct Document<'a> {
    /// `urn:nbd-server:problem:` and the code.
    r#type: String,
    title: &'a str,
    status: u16,
    #[schema(schema_with = codes)]
    code: &'a str,
    /// The value, the place and the remedy, for a person.
    detail: &'a str,
}

/// Every code there is, with its status and its title.
fn codes() -> Object {
    let meaning = Code::ALL.map(|code| {
        let (status, name, title) = code.row();
        format!("- `{name}` ({}): {title}", status.as_u16())
    });
    ObjectBuilder::new()
        .schema_type(Type::String)
        .enum_values(Some(Code::ALL.map(|code| code.row().1)))
        .description(Some(format!("Never changes its meaning:\n{}", meaning.join("\n"))))
        .build()
}

/// What every call may answer instead: a problem, of whatever status its code has.
pub(super) struct Refusal;

impl IntoResponses for Refusal {
    fn responses() -> BTreeMap<String, RefOr<utoipa::openapi::Response>> {
        let content = ContentBuilder::new().schema(Some(Ref::from_schema_name("Problem"))).build();
        let refusal = ResponseBuilder::new().description("A refusal").content(MEDIA_TYPE, content).build();
        BTreeMap::from([("default".to_owned(), RefOr::T(refusal))])
    }
}

impl Problem {
    pub(super) fn new(code: Code, detail: impl Into<String>) -> Self {
        Self { code, detail: detail.into() }
    }

    /// The whole answer as it goes over the wire, for a client whose request is not read.
    pub(super) fn to_http(&self) -> String {
        let (status, ..) = self.code.row();
        let body = self.document();
        format!(
            "HTTP/1.1 {status}\r\ncontent-type: {MEDIA_TYPE}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
            body.len()
        )
    }

    /// The body of the answer, on one line.
    pub(super) fn document(&self) -> String {
        let (status, code, title) = self.code.row();
        let r#type = format!("urn:nbd-server:problem:{code}");
        let document = Document { r#type, title, status: status.as_u16(), code, detail: &self.detail };
        // Strings and one number always encode; the text of the code is what a program needs if that ever changes.
        serde_json::to_string(&document).unwrap_or_else(|_| format!(r#"{{"code":"{code}"}}"#)) + "\n"
    }
}

/// The media type of every refusal.
const MEDIA_TYPE: &str = "application/problem+json";

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let (status, ..) = self.code.row();
        (status, [(header::CONTENT_TYPE, MEDIA_TYPE)], self.document()).into_response()
    }
}

impl From<UnitError> for Problem {
    fn from(error: UnitError) -> Self {
        let code = match error {
            UnitError::ChunkSize(_) | UnitError::TooManyChunks { .. } => Code::InvalidChunkSize,
            UnitError::ImageSize(_) => Code::InvalidSize,
            UnitError::ExportId(_) => Code::InvalidExportId,
            UnitError::SnapshotId(_) => Code::InvalidSnapshotId,
        };
        Self::new(code, error.to_string())
    }
}

impl From<VolumeError> for Problem {
    fn from(error: VolumeError) -> Self {
        let code = match error {
            VolumeError::OutOfRange { .. } => Code::OutOfRange,
            VolumeError::ReadOnly(_) => Code::ReadOnly,
            VolumeError::NoSpace(_) => Code::NoSpace,
            VolumeError::Unavailable(_) => Code::StoreUnavailable,
            VolumeError::Damaged(_) => Code::Damaged,
            VolumeError::Failed(_) => Code::Failed,
            VolumeError::Closed(_) => Code::Closed,
        };
        Self::new(code, error.to_string())
    }
}

impl From<ExportError> for Problem {
    fn from(error: ExportError) -> Self {
        let code = match error {
            ExportError::Unit(error) => return error.into(),
            ExportError::Volume(error) => return error.into(),
            ExportError::NotFound(..) => Code::NotFound,
            ExportError::Exists(_) => Code::Exists,
            ExportError::AlreadyLoaded(_) => Code::AlreadyLoaded,
            ExportError::SnapshotNotFound(..) => Code::SnapshotNotFound,
            ExportError::NothingPublished(_) => Code::NothingPublished,
            ExportError::Busy(..) => Code::Busy,
            ExportError::Cancelled(_) => Code::Cancelled,
            ExportError::Conflict { .. } | ExportError::HeadRewritten { .. } => Code::Conflict,
            ExportError::StoreUnavailable(_) => Code::StoreUnavailable,
            ExportError::Damaged(_) => Code::Damaged,
        };
        Self::new(code, error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::units::{ByteRange, ExportId};
    use crate::volume::registry::HeadWriter;

    fn vm() -> ExportId {
        "vm".parse().unwrap()
    }

    #[test]
    fn codes_are_unique_and_none_is_a_500() {
        let codes: BTreeSet<_> = Code::ALL.iter().map(|c| c.row().1).collect();
        assert_eq!(codes.len(), Code::ALL.len());
        for code in Code::ALL {
            let (status, name, _) = code.row();
            assert!(status.is_client_error() || status.is_server_error(), "{name}");
            assert_ne!(status, StatusCode::INTERNAL_SERVER_ERROR, "{name}");
        }
    }

    #[test]
    fn registry_errors_keep_their_text_and_get_the_status_a_client_acts_on() {
        let closed = VolumeError::Closed(vm());
        let range = ByteRange::new(1, 2).unwrap();
        let conflict = ExportError::Conflict {
            export_id: vm(),
            expected: "aa".into(),
            found: "bb".into(),
            moved_by: HeadWriter::AnotherServer,
        };
        for (error, status, code) in [
            (ExportError::Unit(UnitError::ChunkSize(3)), 400, "invalid-chunk-size"),
            (UnitError::TooManyChunks { image_size: 9, chunk_size: 1, chunks: 9 }.into(), 400, "invalid-chunk-size"),
            (UnitError::ImageSize(0).into(), 400, "invalid-size"),
            (UnitError::ExportId("..".into()).into(), 400, "invalid-export-id"),
            (UnitError::SnapshotId("x".into()).into(), 400, "invalid-snapshot-id"),
            (ExportError::NotFound(vm(), "loaded"), 404, "not-found"),
            (ExportError::Exists(vm()), 409, "exists"),
            (ExportError::AlreadyLoaded(vm()), 409, "already-loaded"),
            (ExportError::SnapshotNotFound(vm(), crate::units::SnapshotId::generate()), 404, "snapshot-not-found"),
            (ExportError::NothingPublished(vm()), 409, "nothing-published"),
            (ExportError::Busy(vm(), "snapshotting"), 409, "busy"),
            (conflict, 409, "conflict"),
            (ExportError::StoreUnavailable("s3 is away".into()), 503, "store-unavailable"),
            (ExportError::Damaged("cache.meta".into()), 503, "damaged"),
            (VolumeError::OutOfRange { range, image_size: 1 }.into(), 400, "out-of-range"),
            (VolumeError::ReadOnly(vm()).into(), 403, "read-only"),
            (VolumeError::NoSpace(vm()).into(), 507, "no-space"),
            (VolumeError::Unavailable("s3 is away".into()).into(), 503, "store-unavailable"),
            (VolumeError::Damaged("a blob is gone".into()).into(), 503, "damaged"),
            (VolumeError::Failed("fsync: EIO".into()).into(), 503, "failed"),
            (closed.into(), 409, "closed"),
        ] {
            let text = error.to_string();
            let document: serde_json::Value = serde_json::from_str(&Problem::from(error).document()).unwrap();
            assert_eq!(document["status"], status, "{text}");
            assert_eq!(document["code"], code, "{text}");
            assert_eq!(document["detail"], text);
            assert_eq!(document["type"], format!("urn:nbd-server:problem:{code}"));
            assert!(!document["title"].as_str().unwrap().is_empty());
        }
    }
}
