//! `GET /v1/openapi.json`: the description of this API, made from the code that serves it.
//!
//! `docs/openapi.json` is a copy; a test compares the two.

use std::sync::Arc;

use axum::http::header;
use axum::response::IntoResponse;
use axum::{Extension, Router};
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::Api;

/// What is not said beside the calls themselves.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "nbd-server admin API",
        description = "Manages the exports of one nbd-server, over HTTP/1.1 on its admin socket. Whoever can open the \
                       socket can do everything.",
        license(name = "MIT OR Apache-2.0", identifier = "MIT OR Apache-2.0")
    ),
    components(schemas(super::problem::Document)),
    servers((url = "http://localhost", description = "The admin socket")),
    tags(
        (name = "exports", description = "Devices that NBD clients attach by name"),
        (name = "snapshots", description = "Published, immutable images of an export"),
        (name = "server", description = "The server itself")
    )
)]
struct Description;

/// Read this description of the API.
#[utoipa::path(
    get, path = "/v1/openapi.json", operation_id = "getDescription", tag = "server",
    responses((status = 200, description = "OpenAPI 3.1", body = serde_json::Value))
)]
async fn description(Extension(text): Extension<Arc<str>>) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], text.to_string())
}

/// The calls of these routers, and the one that describes them.
pub(super) fn described(routers: impl IntoIterator<Item = OpenApiRouter<Api>>) -> Router<Api> {
    let start = OpenApiRouter::with_openapi(Description::openapi()).routes(routes!(description));
    let (router, description) = routers.into_iter().fold(start, OpenApiRouter::merge).split_for_parts();
    // Strings, numbers and lists of them always encode.
    let text: Arc<str> = description.to_pretty_json().map_or_else(|_| "{}".into(), |text| (text + "\n").into());
    router.layer(Extension(text))
}
