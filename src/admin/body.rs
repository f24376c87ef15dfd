//! What a request says, from untrusted bytes to typed values: the body, its fields, and the export id in the path.
//!
//! A body is read whole under a size cap and a deadline. Its `Content-Type` is not looked at, so that a plain
//! `curl -d` works; unknown fields are refused, so that a misspelt one is not silently ignored. Fields are first taken
//! as raw JSON text: every refusal can then quote the value as the client wrote it.

use axum::body::Body;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::header::CONTENT_LENGTH;
use axum::http::request::Parts;
use futures_util::StreamExt;
use percent_encoding::percent_decode_str;
use serde::de::DeserializeOwned;
use serde_json::error::Category;
use serde_json::value::RawValue;
use utoipa::openapi::Required;
use utoipa::openapi::path::{Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::schema::{ObjectBuilder, Type};

use super::Api;
use super::problem::{Code, Problem};
use crate::units::{ExportId, SnapshotId, UnitError};

/// How much of a client's own text an answer repeats, in characters.
const MAX_QUOTED_CHARS: usize = 160;

/// A JSON object with exactly the fields of `T`. An empty body counts as `{}`.
pub(super) struct Fields<T>(pub(super) T);

impl<T: DeserializeOwned> FromRequest<Api> for Fields<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, api: &Api) -> Result<Self, Problem> {
        let limits = api.limits;
        let announced = request.headers().get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
        if announced.is_some_and(|bytes| bytes > limits.max_body_bytes as u64) {
            return Err(too_large(limits.max_body_bytes));
        }
        let bytes = tokio::time::timeout(limits.body_timeout, read(request.into_body(), limits.max_body_bytes))
            .await
            .map_err(|_| {
                let seconds = limits.body_timeout.as_secs_f32();
                Problem::new(Code::BodyTimeout, format!("the body was not complete after {seconds} s"))
            })??;
        parse(&bytes).map(Self)
    }
}

async fn read(body: Body, max_bytes: usize) -> Result<Vec<u8>, Problem> {
    let mut pieces = body.into_data_stream();
    let mut bytes = Vec::new();
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|e| Problem::new(Code::IncompleteBody, format!("the body ended early: {e}")))?;
        if bytes.len() + piece.len() > max_bytes {
            return Err(too_large(max_bytes));
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes)
}

fn too_large(max_bytes: usize) -> Problem {
    Problem::new(Code::PayloadTooLarge, format!("the body is larger than the {max_bytes} bytes a request may have"))
}

fn parse<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    let bytes = bytes.trim_ascii();
    let bytes = if bytes.is_empty() { b"{}" } else { bytes };
    // Checked here because a derived decoder would also take the fields in order from an array.
    if bytes[0] != b'{' {
        let found = quoted(&String::from_utf8_lossy(bytes));
        let detail = format!("the body must be a JSON object such as {{\"export_id\":\"vm-1\"}}, not {found}");
        return Err(Problem::new(Code::InvalidJson, detail));
    }
    serde_json::from_slice(bytes).map_err(|e| match e.classify() {
        Category::Data => Problem::new(Code::InvalidField, format!("the body does not fit this call: {e}")),
        Category::Io | Category::Syntax | Category::Eof => {
            Problem::new(Code::InvalidJson, format!("the body is not JSON: {e}"))
        }
    })
}

/// The value as the client wrote it, cut to a length an answer can carry.
fn quoted(text: &str) -> String {
    match text.char_indices().nth(MAX_QUOTED_CHARS) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

fn wrong(code: Code, name: &str, wanted: &str, raw: &RawValue) -> Problem {
    Problem::new(code, format!("{name} must be {wanted}, not {}", quoted(raw.get())))
}

/// A field that holds a count of bytes.
pub(super) fn bytes(code: Code, name: &str, raw: &RawValue) -> Result<u64, Problem> {
    let wanted = format!("a whole number of bytes between 1 and {}", i64::MAX);
    serde_json::from_str(raw.get()).map_err(|_| wrong(code, name, &wanted, raw))
}

/// A field that holds an export id.
pub(super) fn export_id(name: &str, raw: &RawValue) -> Result<ExportId, Problem> {
    let text = string(Code::InvalidExportId, name, "a string such as \"vm-1\"", raw)?;
    text.parse().map_err(|e: UnitError| in_field(name, e))
}

/// A field that holds a snapshot id.
pub(super) fn snapshot_id(name: &str, raw: &RawValue) -> Result<SnapshotId, Problem> {
    let text = string(Code::InvalidSnapshotId, name, "a string of 32 lower-case hex digits", raw)?;
    text.parse().map_err(|e: UnitError| in_field(name, e))
}

/// A field that is true or false.
pub(super) fn flag(name: &str, raw: &RawValue) -> Result<bool, Problem> {
    serde_json::from_str(raw.get()).map_err(|_| wrong(Code::InvalidField, name, "true or false", raw))
}

fn string(code: Code, name: &str, wanted: &str, raw: &RawValue) -> Result<String, Problem> {
    serde_json::from_str(raw.get()).map_err(|_| wrong(code, name, wanted, raw))
}

fn in_field(name: &str, error: UnitError) -> Problem {
    let problem = Problem::from(error);
    Problem { detail: format!("{name}: {}", problem.detail), ..problem }
}

/// The export a path names: `/v1/exports/{id}` and everything below it.
pub(super) struct Named(pub(super) ExportId);

/// Where the id stands in a path, counted in slashes.
const ID_SEGMENT: usize = 3;

impl utoipa::IntoParams for Named {
    fn into_params(_: impl Fn() -> Option<ParameterIn>) -> Vec<Parameter> {
        let id = ObjectBuilder::new().schema_type(Type::String).pattern(Some(EXPORT_ID_PATTERN));
        let parameter = ParameterBuilder::new()
            .name("id")
            .parameter_in(ParameterIn::Path)
            .required(Required::True)
            .description(Some("The export"))
            .schema(Some(id));
        vec![parameter.build()]
    }
}

/// What an export id looks like, for the description of the API.
const EXPORT_ID_PATTERN: &str = "^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$";

impl FromRequestParts<Api> for Named {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, _: &Api) -> Result<Self, Problem> {
        let segment = parts.uri.path().split('/').nth(ID_SEGMENT).unwrap_or_default();
        // Bytes that are no UTF-8 become U+FFFD, which no id may hold; so does a "%" that is no escape.
        let text = percent_decode_str(segment).decode_utf8_lossy();
        Ok(Self(text.parse().map_err(Problem::from)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, serde::Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Sample {
        size: Box<RawValue>,
        #[allow(dead_code, reason = "only its presence is tested")]
        note: Option<Box<RawValue>>,
    }

    fn refusal(body: &str) -> Problem {
        parse::<Sample>(body.as_bytes()).map(drop).unwrap_err()
    }

    #[test]
    fn what_is_no_object_is_refused_with_the_text_as_written() {
        for body in ["[1]", "3", "\"x\"", "null", "size=1", "<xml/>"] {
            let problem = refusal(body);
            assert_eq!(problem.code, Code::InvalidJson, "{body}");
            assert!(problem.detail.contains(body), "{}", problem.detail);
        }
        for body in ["{", "{\"size\":", "{\"size\":1,}", "{\"size\":1} x", "{'size':1}", "{\"size\":\"\u{1}\"}"] {
            assert_eq!(refusal(body).code, Code::InvalidJson, "{body}");
        }
    }

    #[test]
    fn a_missing_an_unknown_and_a_repeated_field_are_named() {
        for (body, name) in
            [("", "`size`"), ("{\"size\":1,\"sise\":2}", "`sise`"), ("{\"size\":1,\"size\":2}", "`size`")]
        {
            let problem = refusal(body);
            assert_eq!(problem.code, Code::InvalidField, "{body}");
            assert!(problem.detail.contains(name), "{}", problem.detail);
        }
    }

    #[test]
    fn a_size_that_is_no_whole_number_is_quoted_as_written() {
        for raw in ["-1", "1.5", "1e3", "\"1\"", "18446744073709551616", "99999999999999999999999", "true", "[1]"] {
            let sample: Sample = parse(format!("{{\"size\":{raw}}}").as_bytes()).unwrap();
            let problem = bytes(Code::InvalidSize, "size", &sample.size).unwrap_err();
            assert_eq!(problem.code, Code::InvalidSize);
            assert!(problem.detail.ends_with(&format!("not {raw}")), "{}", problem.detail);
        }
    }

    #[test]
    fn a_long_value_is_cut_at_a_character() {
        assert_eq!(quoted("é"), "é");
        assert_eq!(quoted(&"é".repeat(500)), format!("{}…", "é".repeat(MAX_QUOTED_CHARS)));
    }

    #[test]
    fn deep_nesting_is_refused_and_does_not_overflow_the_stack() {
        let deep = format!("{{\"size\":{}}}", "[".repeat(60_000));
        assert_eq!(refusal(&deep).code, Code::InvalidJson);
    }
}
