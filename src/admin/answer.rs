//! What a call answers: JSON, and a newline, so that in a terminal the prompt begins on a line of its own.

use axum::http::header;
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use super::problem::{Code, Problem};

/// A body in JSON, on one line.
pub(super) struct Line<T>(pub(super) T);

impl<T: Serialize> IntoResponse for Line<T> {
    fn into_response(self) -> Response {
        match serde_json::to_string(&self.0) {
            Ok(text) => ([(header::CONTENT_TYPE, "application/json")], text + "\n").into_response(),
            // Structs of numbers and strings always encode; there is no 500 even so.
            Err(e) => Problem::new(Code::Failed, format!("the answer cannot be written: {e}")).into_response(),
        }
    }
}
