//! The admin API over a real Unix socket, down to the bytes: what it answers, and what no client can do to it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod common;

use std::io::{BufReader, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::hooked::Hooked;
use common::http::{self, Response};
use common::volumes::{self, Site};
use nbd_server::admin::{self, Api, ExportCounts, Health, Limits, Scrapes, ServerStatus, Socket, StoreHealth, Watch};
use nbd_server::disk::RealDisk;
use nbd_server::metrics::{Kind, Page};
use nbd_server::volume::registry::Registry;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// There is nothing around the API to watch.
fn watch_nothing() -> Watch {
    watch_with(Page::default)
}

fn watch_with(metrics: fn() -> Page) -> Watch {
    let store = StoreHealth { backend: "memory", reachable: true, since: std::time::UNIX_EPOCH, last_error: None };
    let looked_at = store.clone();
    let status = move || ServerStatus {
        version: "1",
        started_at: std::time::UNIX_EPOCH,
        uptime_seconds: 0,
        exports: ExportCounts::default(),
        connections: 0,
        listen: Vec::new(),
        store: store.clone(),
    };
    let exports = ExportCounts::default();
    Watch::new(metrics, move || Health { live: true, ready: true, exports, store: looked_at.clone() }, status)
}

/// A served API; the calls block, so tests run it on a runtime with threads of its own.
struct Served {
    _dir: TempDir,
    socket: PathBuf,
    stop: watch::Sender<bool>,
    serving: JoinHandle<()>,
}

impl Served {
    async fn start() -> Self {
        Self::with(Limits::default()).await
    }

    async fn with(limits: Limits) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let registry = common::registry(&dir.path().join("cache")).await;
        Self::over(registry, dir, limits).await
    }

    async fn over(registry: Arc<Registry>, dir: TempDir, limits: Limits) -> Self {
        let socket = dir.path().join("admin.sock");
        let bound = Socket::bind(&socket, None).await.unwrap();
        let (stop, stopped) = watch::channel(false);
        let api = Api { registry, default_chunk_bytes: 4 << 20, watch: watch_nothing(), limits };
        let serving = tokio::spawn(admin::serve(bound, api, stopped));
        Self { _dir: dir, socket, stop, serving }
    }

    fn call(&self, method: &str, path: &str, body: &str) -> Response {
        http::call(&self.socket, method, path, body)
    }

    fn create(&self, id: &str) {
        let body = json!({"export_id": id, "size": 10 << 20}).to_string();
        assert_eq!(self.call("POST", "/v1/exports/create", &body).status, 201);
    }

    /// Sends a request that must be refused, checks the form of the refusal, and returns its `detail`.
    #[track_caller]
    fn refused(&self, method: &str, path: &str, body: &str, status: u16, code: &str) -> String {
        problem(&self.call(method, path, body), status, code)
    }
}

#[track_caller]
fn problem(response: &Response, status: u16, code: &str) -> String {
    let document = response.json();
    assert_eq!((response.status, &document["code"]), (status, &Value::from(code)), "{document}");
    assert_eq!(response.header("content-type"), Some("application/problem+json"));
    assert_eq!(document["status"], status);
    assert!(document["title"].is_string() && document["type"].is_string());
    document["detail"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_export_is_created_listed_described_and_unloaded() {
    let api = Served::start().await;
    assert_eq!(api.call("GET", "/v1/exports", "").json(), json!([]));

    let body = r#"{"export_id":"vm-2","size":10485761,"chunk_size":65536}"#;
    let created = api.call("POST", "/v1/exports/create", body);
    assert_eq!((created.status, created.header("content-type")), (201, Some("application/json")));
    let expected = json!({
        "export_id": "vm-2", "image_size": 10_485_761, "chunk_size": 65536, "chunk_count": 161,
        "read_only": false, "resident_chunks": 0, "dirty_chunks": 0, "damaged_chunks": 0, "corrupt_fetches": 0, "snapshot_generation": 0, "remote_head_generation": 0, "remote_head_snapshot_id": null,
        "current_snapshot_id": null, "operation_state": "idle", "store": {"reachable": true}, "state": "ready",
    });
    for mut status in [created.json(), api.call("GET", "/v1/exports/vm-2/status", "").json()] {
        let free = status.as_object_mut().unwrap().remove("cache_free_bytes").unwrap();
        assert!(free.as_u64().is_some_and(|bytes| bytes > 0), "{free}");
        assert_eq!(status, expected);
    }

    api.create("vm-1");
    let one = |id: &str, size: u64, chunk: u64| json!({"export_id": id, "image_size": size, "chunk_size": chunk, "state": "ready", "current_snapshot_id": null});
    let list = api.call("GET", "/v1/exports", "").json();
    assert_eq!(list, json!([one("vm-1", 10 << 20, 4 << 20), one("vm-2", 10_485_761, 65536)]), "sorted by id");

    let gone = api.call("DELETE", "/v1/exports/vm-2", "");
    assert_eq!((gone.status, gone.body.len()), (204, 0));
    api.refused("GET", "/v1/exports/vm-2/status", "", 404, "not-found");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_with_a_body_ends_its_line() {
    let api = Served::start().await;
    api.create("vm");
    for (method, path) in [
        ("GET", "/v1/exports"),
        ("GET", "/v1/exports/vm/status"),
        ("POST", "/v1/exports/vm/snapshot"),
        ("POST", "/v1/exports/vm/compact"),
        ("POST", "/v1/exports/vm/cache/reset"),
        ("POST", "/v1/exports/vm/cache/trim"),
        ("GET", "/v1/exports/no/status"),
        ("GET", "/nowhere"),
    ] {
        let body = api.call(method, path, "").body;
        let lines = body.iter().filter(|byte| **byte == b'\n').count();
        assert_eq!((lines, body.last()), (1, Some(&b'\n')), "{path}: {}", String::from_utf8_lossy(&body));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_sync_shows_in_status_and_list_with_its_reason() {
    let disk = Hooked::new(RealDisk::default());
    let mut site = Site::new();
    let registry = site.start_on("here", Arc::new(disk.clone())).await;
    let api = Served::over(Arc::clone(&registry), tempfile::tempdir().unwrap(), Limits::default()).await;
    api.create("vm");
    api.create("well");
    let volume = registry.volume(&volumes::id("vm")).await.unwrap();
    volumes::write(&volume, 0, 1, 4096).await;
    disk.fail("sync", "cache.raw", std::io::ErrorKind::Other);
    volume.flush().await.unwrap_err();
    disk.serve_all();

    let status = api.call("GET", "/v1/exports/vm/status", "").json();
    assert_eq!((&status["state"], &status["operation_state"]), (&json!("failed"), &json!("idle")), "{status}");
    let reason = status["reason"].as_str().unwrap();
    assert!(reason.contains("sync") && reason.contains("restart"), "{reason}");
    let list = api.call("GET", "/v1/exports", "").json();
    assert_eq!((&list[0]["state"], &list[0]["reason"]), (&json!("failed"), &json!(reason)), "{list}");
    assert_eq!((&list[1]["state"], list[1].get("reason")), (&json!("ready"), None), "no other export is hindered");
    let detail = api.refused("POST", "/v1/exports/vm/snapshot", "", 503, "failed");
    assert!(detail.contains("sync"), "{detail}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_of_nothing_creates_nothing_and_says_so() {
    let api = Served::start().await;
    api.create("vm");
    for body in ["", "{}", " {} "] {
        let answer = api.call("POST", "/v1/exports/vm/snapshot", body);
        assert_eq!(answer.status, 200);
        assert_eq!(answer.json(), json!({"snapshot_created": false, "generation": 0, "snapshot_id": null}));
    }
    assert_eq!(api.call("POST", "/v1/exports/vm/cache/reset", "").json()["dirty_chunks"], 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compaction_publishes_and_a_clone_starts_there() {
    let api = Served::start().await;
    api.create("vm");
    let clone = r#"{"export_id":"copy","source_export_id":"vm"}"#;
    api.refused("POST", "/v1/exports/clone", clone, 409, "nothing-published");
    let compacted = api.call("POST", "/v1/exports/vm/compact", "").json();
    assert_eq!(compacted["generation"], 1);
    assert_eq!(compacted["snapshot_id"].as_str().map(str::len), Some(32));
    assert_eq!(compacted.as_object().map(serde_json::Map::len), Some(2));
    let cloned = api.call("POST", "/v1/exports/clone", clone);
    assert_eq!((cloned.status, &cloned.json()["export_id"]), (201, &Value::from("copy")));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_or_there_already_is_said_so() {
    let api = Served::start().await;
    api.create("vm");
    api.refused("POST", "/v1/exports/create", r#"{"export_id":"vm","size":1}"#, 409, "exists");
    api.refused("POST", "/v1/exports/open", r#"{"export_id":"vm"}"#, 409, "already-loaded");
    api.refused("POST", "/v1/exports/open", r#"{"export_id":"no","read_only":true}"#, 404, "not-found");
    api.refused("POST", "/v1/exports/clone", r#"{"export_id":"a","source_export_id":"no"}"#, 404, "not-found");
    let snapshot = "0123456789abcdef0123456789abcdef";
    let body = format!(r#"{{"export_id":"a","source_export_id":"vm","source_snapshot_id":"{snapshot}"}}"#);
    let detail = api.refused("POST", "/v1/exports/clone", &body, 404, "snapshot-not-found");
    assert!(detail.contains(snapshot), "{detail}");
    for call in ["snapshot", "compact", "cache/reset", "cache/trim"] {
        let detail = api.refused("POST", &format!("/v1/exports/no/{call}"), "", 404, "not-found");
        assert!(detail.contains("no"), "{detail}");
    }
    api.refused("DELETE", "/v1/exports/no", "", 404, "not-found");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_size_is_refused_with_the_value_as_written() {
    let api = Served::start().await;
    for size in ["0", "-1", "1.5", "1e3", "9223372036854775808", "18446744073709551616", "\"5\"", "true", "[]"] {
        let body = format!(r#"{{"export_id":"vm","size":{size}}}"#);
        let detail = api.refused("POST", "/v1/exports/create", &body, 400, "invalid-size");
        assert!(detail.contains(size), "{detail}");
    }
    for chunk in ["0", "-4096", "4095", "2048", "12288", "134217728", "\"4M\""] {
        let body = format!(r#"{{"export_id":"vm","size":4096,"chunk_size":{chunk}}}"#);
        let detail = api.refused("POST", "/v1/exports/create", &body, 400, "invalid-chunk-size");
        assert!(detail.contains(chunk), "{detail}");
    }
    let many = r#"{"export_id":"vm","size":9223372036854775807,"chunk_size":4096}"#;
    api.refused("POST", "/v1/exports/create", many, 400, "invalid-chunk-size");
    assert_eq!(api.call("GET", "/v1/exports", "").json(), json!([]), "nothing half-made");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bad_export_id_is_refused_in_bodies_and_in_paths() {
    let api = Served::start().await;
    let long = "x".repeat(129);
    for id in ["", ".", "..", "a/b", "../x", "-x", ".x", "a..b", "a b", "ä", "a\u{0}", &long] {
        let body = json!({"export_id": id, "size": 4096}).to_string();
        let detail = api.refused("POST", "/v1/exports/create", &body, 400, "invalid-export-id");
        assert!(detail.contains("letter or digit"), "names the remedy: {detail}");
    }
    for body in [r#"{"export_id":5,"size":1}"#, r#"{"export_id":null,"size":1}"#] {
        api.refused("POST", "/v1/exports/create", body, 400, "invalid-export-id");
    }
    for id in ["..", "%2e%2e", "a%2Fb", "%", "%zz", "%ff%fe", "%00", "-x", "a%20b", &long] {
        for (method, rest) in [("GET", "/status"), ("POST", "/snapshot"), ("POST", "/compact"), ("DELETE", "")] {
            api.refused(method, &format!("/v1/exports/{id}{rest}"), "", 400, "invalid-export-id");
        }
    }
    let clone = r#"{"export_id":"a","source_export_id":"b","source_snapshot_id":"XYZ"}"#;
    let detail = api.refused("POST", "/v1/exports/clone", clone, 400, "invalid-snapshot-id");
    assert!(detail.contains("source_snapshot_id") && detail.contains("XYZ"), "{detail}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_escaped_id_and_an_id_that_is_also_a_call_work() {
    let api = Served::start().await;
    for id in ["vm-1", "create", "open", "clone"] {
        api.create(id);
    }
    assert_eq!(api.call("GET", "/v1/exports/v%6D%2d1/status?pretty", "").json()["export_id"], "vm-1");
    for id in ["create", "open", "clone"] {
        assert_eq!(api.call("DELETE", &format!("/v1/exports/{id}"), "").status, 204, "{id}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_does_not_fit_is_refused_and_the_field_named() {
    let api = Served::start().await;
    for body in ["hello", "[]", "export_id=vm&size=1", "{\"export_id\":", "\u{0}", "{\"export_id\":\"vm\",\"size\":1}x"]
    {
        api.refused("POST", "/v1/exports/create", body, 400, "invalid-json");
    }
    for (body, field) in [
        ("", "export_id"),
        (r#"{"size":1}"#, "export_id"),
        (r#"{"export_id":"vm"}"#, "size"),
        (r#"{"export_id":"vm","size":1,"sparse":true}"#, "sparse"),
        (r#"{"export_id":"vm","size":1,"size":2}"#, "size"),
    ] {
        let detail = api.refused("POST", "/v1/exports/create", body, 400, "invalid-field");
        assert!(detail.contains(field), "{detail}");
    }
    let detail =
        api.refused("POST", "/v1/exports/open", r#"{"export_id":"vm","read_only":"yes"}"#, 400, "invalid-field");
    assert!(detail.contains("read_only") && detail.contains("\"yes\""), "{detail}");
    api.create("vm");
    let detail = api.refused("POST", "/v1/exports/vm/snapshot", r#"{"force":true}"#, 400, "invalid-field");
    assert!(detail.contains("force"), "{detail}");
}

#[tokio::test(flavor = "multi_thread")]
async fn no_content_type_is_needed_and_none_is_refused() {
    let api = Served::start().await;
    let types = ["", "content-type: application/x-www-form-urlencoded\r\n", "content-type: text/plain; charset=x\r\n"];
    for (i, content_type) in types.iter().enumerate() {
        let body = format!(r#"{{"export_id":"vm-{i}","size":1}}"#);
        let head = format!("POST /v1/exports/create HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{content_type}");
        let request = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
        assert_eq!(http::raw(&api.socket, request.as_bytes()).status, 201, "{content_type}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_method_and_an_unknown_path_are_problems_too() {
    let api = Served::start().await;
    for (method, path, allowed) in [
        ("POST", "/v1/exports", "GET"),
        ("GET", "/v1/exports/create", "POST"),
        ("PUT", "/v1/exports/vm", "DELETE"),
        ("POST", "/v1/exports/vm", "DELETE"),
        ("GET", "/v1/exports/vm/snapshot", "POST"),
        ("BREW", "/v1/exports/vm/status", "GET"),
        ("OPTIONS", "/v1/exports/vm/cache/reset", "POST"),
    ] {
        let response = api.call(method, path, "");
        let detail = problem(&response, 405, "method-not-allowed");
        assert!(detail.contains(path) && detail.contains(method), "{detail}");
        assert!(response.header("allow").is_some_and(|a| a.contains(allowed)), "{:?}", response.headers);
    }
    for path in ["/", "/v1", "/v2/exports", "/v1/exports/", "/v1/exports/vm/", "/v1/exports/vm/nope"] {
        let detail = api.refused("GET", path, "", 404, "unknown-path");
        assert!(detail.contains(path), "{detail}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_beyond_the_cap_is_refused_announced_or_not() {
    let api = Served::start().await;
    let head = "POST /v1/exports/create HTTP/1.1\r\nhost: x\r\n";
    let announced = format!("{head}content-length: 10000000000\r\n\r\n");
    problem(&http::raw(&api.socket, announced.as_bytes()), 413, "payload-too-large");

    let piece = format!("4000\r\n{}\r\n", " ".repeat(0x4000));
    let chunked = format!("{head}transfer-encoding: chunked\r\n\r\n{}0\r\n\r\n", piece.repeat(5));
    problem(&http::raw(&api.socket, chunked.as_bytes()), 413, "payload-too-large");

    let fits = format!("{}{}", r#"{"export_id":"vm","size":1}"#, " ".repeat(admin::MAX_BODY_BYTES - 27));
    assert_eq!(fits.len(), admin::MAX_BODY_BYTES);
    assert_eq!(api.call("POST", "/v1/exports/create", &fits).status, 201);
    api.refused("POST", "/v1/exports/create", &format!("{fits} "), 413, "payload-too-large");
}

#[tokio::test(flavor = "multi_thread")]
async fn bytes_that_are_no_http_never_hang_the_server_and_never_get_a_500() {
    let api = Served::start().await;
    let long_header = format!("GET /v1/exports HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(1 << 20));
    let many_headers = format!("GET /v1/exports HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(5000));
    let long_path = format!("GET /{} HTTP/1.1\r\n\r\n", "y".repeat(70_000));
    for request in [
        &b"hello\r\n\r\n"[..],
        b"GET\r\n\r\n",
        b"GET /v1/exports HTTP/9.9\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        b"GET http://other/v1/exports/%zz/status HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n",
        b"POST /v1/exports/create HTTP/1.1\r\ncontent-length: -1\r\n\r\n",
        b"POST /v1/exports/create HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nx",
        b"POST /v1/exports/create HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
        b"POST /v1/exports/create HTTP/1.1\r\ntransfer-encoding: gzip\r\n\r\n",
        b"GET /v1/\xff\xfe HTTP/1.1\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
        long_header.as_bytes(),
        many_headers.as_bytes(),
        long_path.as_bytes(),
    ] {
        let shown = String::from_utf8_lossy(&request[..request.len().min(60)]);
        let response = http::raw(&api.socket, request);
        assert!((400..500).contains(&response.status), "{} for {shown:?}", response.status);
    }
    let mut http2 = http::connect(&api.socket);
    http2.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
    assert!(http::read_response(&mut BufReader::new(http2)).is_none(), "another protocol: closed");
    assert_eq!(api.call("GET", "/v1/exports", "").status, 200, "still serving");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_ends_early_or_never_comes_is_given_up() {
    let api = Served::with(Limits { body_timeout: Duration::from_millis(200), ..Limits::default() }).await;
    let head = b"POST /v1/exports/create HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{\"export_id\"";

    let started = Instant::now();
    problem(&http::raw(&api.socket, head), 408, "body-timeout");
    assert!(started.elapsed() < Duration::from_secs(30));

    let mut stream = http::connect(&api.socket);
    stream.write_all(head).unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    problem(&http::read_response(&mut BufReader::new(stream)).unwrap(), 400, "incomplete-body");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_head_that_never_ends_is_cut_off() {
    let api = Served::with(Limits { header_timeout: Duration::from_millis(200), ..Limits::default() }).await;
    for head in ["", "GET /v1/exp", "GET /v1/exports HTTP/1.1\r\nx: y\r\n"] {
        let mut stream = http::connect(&api.socket);
        stream.write_all(head.as_bytes()).unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        assert!(!answer.starts_with(b"HTTP/1.1 2"), "{head:?}");
    }
    assert_eq!(api.call("GET", "/v1/exports", "").status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_beyond_the_limit_is_told_so_and_slots_come_back() {
    let api = Served::with(Limits { max_connections: 2, ..Limits::default() }).await;
    let request = b"GET /v1/exports HTTP/1.1\r\nhost: x\r\n\r\n";
    let mut held: Vec<_> = (0..2).map(|_| BufReader::new(http::connect(&api.socket))).collect();
    for stream in &mut held {
        stream.get_mut().write_all(request).unwrap();
        assert_eq!(http::read_response(stream).unwrap().status, 200);
    }
    problem(&http::raw(&api.socket, request), 503, "too-many-connections");
    // A connection carries many requests.
    held[0].get_mut().write_all(request).unwrap();
    assert_eq!(http::read_response(&mut held[0]).unwrap().status, 200);
    drop(held);
    slots_come_back(&api);
}

#[track_caller]
fn slots_come_back(api: &Served) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while api.call("GET", "/v1/exports", "").status != 200 {
        assert!(Instant::now() < deadline, "the slots never came back");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Pipelines requests and reads no answer, until the server has had enough of it.
#[track_caller]
fn never_read(mut stream: impl Write, path: &str) {
    let requests = format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n").repeat(1000);
    let ended = loop {
        if let Err(e) = stream.write_all(requests.as_bytes()) {
            break e.kind();
        }
    };
    assert!(matches!(ended, ErrorKind::BrokenPipe | ErrorKind::ConnectionReset), "{ended}");
}

/// Metrics of which a few fill the buffers of a connection.
fn long_page() -> Page {
    let mut page = Page::default();
    page.family(Kind::Gauge, "long", &"x".repeat(64 << 10));
    page
}

/// One that soon gives up a client that takes no answers.
fn impatient() -> Limits {
    Limits { write_timeout: Duration::from_millis(200), ..Limits::default() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_takes_no_answers_is_cut_off_and_its_slot_comes_back() {
    let api = Served::with(Limits { max_connections: 1, ..impatient() }).await;
    never_read(http::connect(&api.socket), "/v1/exports");
    slots_come_back(&api);
}

#[tokio::test(flavor = "multi_thread")]
async fn collectors_that_take_no_answers_do_not_end_the_collecting() {
    let scrapes = Scrapes::bind("127.0.0.1:0").await.unwrap();
    let address = scrapes.local_addr();
    let (stop, stopped) = watch::channel(false);
    let serving = tokio::spawn(scrapes.serve(watch_with(long_page), impatient(), stopped));
    let connect = || {
        let stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        stream.set_write_timeout(Some(Duration::from_secs(60))).unwrap();
        stream
    };
    std::thread::scope(|scope| {
        for _ in 0..admin::MAX_SCRAPES {
            scope.spawn(|| never_read(connect(), "/metrics"));
        }
    });
    let mut collector = connect();
    collector.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    collector.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    stop.send(true).unwrap();
    serving.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_closes_its_sending_side_still_gets_its_answer() {
    let api = Served::start().await;
    let mut stream = http::connect(&api.socket);
    stream.write_all(b"GET /v1/exports HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(http::read_response(&mut BufReader::new(stream)).unwrap().status, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_removes_the_socket_and_lets_idle_connections_go() {
    let api = Served::start().await;
    let mut idle = BufReader::new(http::connect(&api.socket));
    idle.get_mut().write_all(b"GET /v1/exports HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
    assert_eq!(http::read_response(&mut idle).unwrap().status, 200);
    api.stop.send(true).unwrap();
    tokio::time::timeout(Duration::from_secs(5), api.serving).await.expect("no wait for idle clients").unwrap();
    assert!(!api.socket.exists());
    assert!(http::read_response(&mut idle).is_none());
}
