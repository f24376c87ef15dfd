//! What the real binary tells those who watch it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Stdio};

use common::moto::Moto;
use common::nbd::Raw;
use common::proxy::{Proxy, State};
use common::server::{TestServer, nbd_server, run, run_to_end};
use nbd_server::nbd::wire::Mode;
use serde_json::{Value, json};

const CHUNK: usize = 64 << 10;

/// The samples of a page, `name{labels}` and value.
struct Page(String);

impl Page {
    fn of(server: &TestServer) -> Self {
        let answer = server.http("GET", "/metrics", "");
        assert_eq!(answer.status, 200);
        assert_eq!(answer.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
        Self(String::from_utf8(answer.body).unwrap())
    }

    /// The value of the only sample of that name whose labels contain all of `labels`.
    #[track_caller]
    fn get(&self, name: &str, labels: &[&str]) -> f64 {
        let of_name = |line: &&str| line.starts_with(name) && line[name.len()..].starts_with(['{', ' ']);
        let samples: Vec<_> =
            self.0.lines().filter(of_name).filter(|line| labels.iter().all(|label| line.contains(label))).collect();
        assert_eq!(samples.len(), 1, "{name} {labels:?}: {samples:?}");
        samples[0].rsplit(' ').next().unwrap().parse().unwrap()
    }
}

/// An export `vm` of 16 chunks, attached.
fn attached(server: &TestServer) -> Raw {
    server.ok("POST", "/v1/exports/create", json!({"export_id": "vm", "size": 16 * CHUNK, "chunk_size": CHUNK}));
    attach(server)
}

fn attach(server: &TestServer) -> Raw {
    let mut client = Raw::connect_to(&server.nbd_address());
    client.negotiate("vm", Mode::Simple);
    client
}

#[test]
fn a_write_with_fua_counts_as_one_write_whether_it_waits_or_not() {
    const FUA: u16 = 1;
    let mut server = TestServer::start(&[], &[]);
    let mut client = attached(&server);
    let count = |operation: &str| {
        let labels = [r#"export="vm""#, &format!("operation={operation:?}"), r#"outcome="ok""#];
        Page::of(&server).get("nbd_server_export_requests_total", &labels)
    };
    // The marks of 16 new chunks have to wait; a few bytes of a dirty one need not.
    for (nth, data) in [vec![7; 16 * CHUNK], vec![8; 512], vec![9; CHUNK]].iter().enumerate() {
        assert_eq!(client.call(FUA, 1, 0, data.len() as u64, data).errno, 0);
        assert_eq!((count("write"), count("flush")), ((nth + 1) as f64, 0.0));
    }
    let duration = "nbd_server_export_request_duration_seconds_count";
    let page = Page::of(&server);
    assert_eq!(page.get(duration, &[r#"export="vm""#, r#"operation="write""#]), 3.0);
    let bytes = page.get("nbd_server_export_request_bytes_total", &[r#"export="vm""#, r#"operation="write""#]);
    assert_eq!(bytes, (17 * CHUNK + 512) as f64);
    server.stop();
}

#[test]
fn a_scrape_counts_what_clients_did() {
    let mut server = TestServer::start(&[], &[]);
    let mut client = attached(&server);
    assert_eq!(client.write(0, &vec![7; 2 * CHUNK]).errno, 0);
    assert_eq!(client.write(512, &[8; 512]).errno, 0);
    assert_eq!(client.read(0, 4096).len(), 4096);
    assert_ne!(client.call(0, 1, 16 * CHUNK as u64, 512, &[1; 512]).errno, 0);
    assert_eq!(client.call(0, 3, 0, 0, &[]).errno, 0);
    let page = Page::of(&server);
    let requests = "nbd_server_export_requests_total";
    let bytes = "nbd_server_export_request_bytes_total";
    let vm = r#"export="vm""#;
    assert_eq!(page.get(requests, &[vm, r#"operation="write""#, r#"outcome="ok""#]), 2.0);
    assert_eq!(page.get(requests, &[vm, r#"operation="read""#, r#"outcome="ok""#]), 1.0);
    assert_eq!(page.get(requests, &[vm, r#"operation="flush""#, r#"outcome="ok""#]), 1.0);
    assert_eq!(page.get(bytes, &[vm, r#"operation="write""#]), (2 * CHUNK + 512) as f64);
    assert_eq!(page.get(bytes, &[vm, r#"operation="read""#]), 4096.0);
    let durations = "nbd_server_export_request_duration_seconds";
    assert_eq!(page.get(&format!("{durations}_count"), &[vm, r#"operation="write""#]), 2.0);
    assert!(page.get(&format!("{durations}_sum"), &[vm, r#"operation="write""#]) > 0.0);
    for (name, expected) in [
        ("nbd_server_export_up", 1.0),
        ("nbd_server_export_image_bytes", (16 * CHUNK) as f64),
        ("nbd_server_export_resident_bytes", (2 * CHUNK) as f64),
        ("nbd_server_export_dirty_bytes", (2 * CHUNK) as f64),
        ("nbd_server_export_generation", 0.0),
        ("nbd_server_export_published_timestamp_seconds", 0.0),
        ("nbd_server_export_connections", 1.0),
        ("nbd_server_export_chunk_hits_total", 1.0),
        ("nbd_server_export_chunk_misses_total", 0.0),
    ] {
        assert_eq!(page.get(name, &[vm]), expected, "{name}");
    }
    assert!(page.get("nbd_server_export_cache_free_bytes", &[vm]) > 0.0);
    assert_eq!(page.get("nbd_server_connections", &[]), 1.0);
    assert_eq!(page.get("nbd_server_attached_total", &[]), 1.0);
    assert_eq!(page.get("nbd_server_build_info", &[env!("CARGO_PKG_VERSION")]), 1.0);
    assert_eq!(page.get("nbd_server_limit_hits_total", &[r#"limit="connections""#]), 0.0);
    assert_eq!(page.get("nbd_server_store_up", &[]), 1.0);

    drop(client);
    server.ok("POST", "/v1/exports/vm/snapshot", Value::Null);
    server.ok("POST", "/v1/exports/vm/snapshot", Value::Null);
    let page = Page::of(&server);
    let publishes = "nbd_server_export_publishes_total";
    let snapshot = r#"kind="snapshot""#;
    assert_eq!(page.get(publishes, &[vm, snapshot, r#"outcome="published""#]), 1.0);
    assert_eq!(page.get(publishes, &[vm, snapshot, r#"outcome="nothing_dirty""#]), 1.0);
    assert_eq!(page.get(publishes, &[vm, r#"kind="compact""#, r#"outcome="published""#]), 0.0);
    assert_eq!(page.get("nbd_server_export_publish_duration_seconds_count", &[vm, snapshot]), 2.0);
    assert_eq!(page.get("nbd_server_export_dirty_bytes", &[vm]), 0.0);
    assert_eq!(page.get("nbd_server_export_generation", &[vm]), 1.0);
    assert_eq!(page.get("nbd_server_export_connections", &[vm]), 0.0);
    let now = std::fs::metadata(server.dir()).unwrap().modified().unwrap();
    let now = now.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    let published = page.get("nbd_server_export_published_timestamp_seconds", &[vm]);
    assert!((published - now).abs() < 600.0, "{published} {now}");
    let put = [r#"operation="put""#, r#"outcome="ok""#];
    assert!(page.get("nbd_server_store_requests_total", &put) >= 2.0, "the head twice");
    assert_eq!(
        page.get("nbd_server_store_request_duration_seconds_count", &[r#"operation="upload""#]),
        2.0,
        "blob and manifest"
    );

    server.ok("POST", "/v1/exports/vm/cache/reset", Value::Null);
    let mut client = attach(&server);
    client.read(0, 3 * CHUNK as u64);
    let page = Page::of(&server);
    assert_eq!(page.get("nbd_server_export_chunk_misses_total", &[vm]), 2.0);
    assert_eq!(page.get("nbd_server_export_chunk_hits_total", &[vm]), 2.0, "one before, and one of zeros");
    assert_eq!(page.get("nbd_server_export_fetched_bytes_total", &[vm]), (2 * CHUNK) as f64);
    assert_eq!(page.get("nbd_server_export_fetch_duration_seconds_count", &[vm]), 2.0);
    server.stop();
}

#[test]
fn an_outage_of_the_store_is_counted_and_its_end_is_seen() {
    let server = TestServer::start(&["--store-timeout=1"], &[]);
    let mut client = attached(&server);
    client.write(0, &vec![7; CHUNK]);
    server.ok("POST", "/v1/exports/vm/snapshot", Value::Null);
    server.ok("POST", "/v1/exports/vm/cache/reset", Value::Null);
    // The blob is a folder: the store can neither find nor read it.
    let blob = walk(&server.local_root(), "delta.blob");
    let aside = blob.with_extension("aside");
    fs::rename(&blob, &aside).unwrap();
    fs::create_dir(&blob).unwrap();
    assert_ne!(client.call(0, 0, 0, 512, &[]).errno, 0);
    let page = Page::of(&server);
    assert_eq!(page.get("nbd_server_store_up", &[]), 0.0);
    assert_eq!(page.get("nbd_server_export_fetch_failures_total", &[]), 1.0);
    let read_errors = [r#"operation="read""#, r#"outcome="error""#];
    assert_eq!(page.get("nbd_server_export_requests_total", &read_errors), 1.0);
    fs::remove_dir(&blob).unwrap();
    fs::rename(&aside, &blob).unwrap();
    assert_eq!(client.read(0, 512), [7; 512]);
    assert_eq!(Page::of(&server).get("nbd_server_store_up", &[]), 1.0);
}

#[test]
fn zeroing_that_is_refused_as_it_would_not_be_fast_counts_as_no_error() {
    const FAST_ZERO: u16 = 1 << 4;
    let server = TestServer::start(&[], &[]);
    let mut client = attached(&server);
    client.write(0, &vec![7; CHUNK]);
    server.ok("POST", "/v1/exports/vm/snapshot", Value::Null);
    server.ok("POST", "/v1/exports/vm/cache/reset", Value::Null);
    assert_eq!(client.call(FAST_ZERO, 6, 0, 512, &[]).errno, 95);
    let page = Page::of(&server);
    let zeroing = r#"operation="write_zeroes""#;
    let count = |outcome| page.get("nbd_server_export_requests_total", &[zeroing, outcome]);
    assert_eq!((count(r#"outcome="ok""#), count(r#"outcome="error""#)), (1.0, 0.0));
    assert_eq!(page.get("nbd_server_export_request_bytes_total", &[zeroing]), 0.0);
}

#[test]
fn a_blob_that_is_gone_shows_everywhere_by_name_until_it_is_restored() {
    let server = TestServer::start(&[], &[]);
    let mut client = attached(&server);
    client.write(0, &vec![7; CHUNK]);
    server.ok("POST", "/v1/exports/vm/snapshot", Value::Null);
    server.ok("POST", "/v1/exports/vm/cache/reset", Value::Null);
    let shown = |healthy: bool| {
        let status = server.ok("GET", "/v1/exports/vm/status", Value::Null);
        let list = server.ok("GET", "/v1/exports", Value::Null);
        let health = server.ok("GET", "/v1/health", Value::Null);
        let page = Page::of(&server);
        let (state, count) = if healthy { ("ready", 0) } else { ("degraded", 1) };
        assert_eq!((&status["state"], &list[0]["state"]), (&json!(state), &json!(state)));
        assert_eq!(status["damaged_chunks"], count, "{status}");
        assert_eq!(health["exports"], json!({"ready": 1 - count, "discovering": 0, "degraded": count, "failed": 0}));
        assert_eq!(page.get("nbd_server_export_damaged_chunks", &[]), f64::from(count));
        assert_eq!(page.get("nbd_server_export_degraded", &[r#"cause="damaged""#]), f64::from(count));
        assert_eq!(page.get("nbd_server_export_up", &[]), 1.0);
        let cli = |args: &[&str]| {
            let output = run_to_end(nbd_server().args(args).arg("--admin-sock").arg(server.socket()));
            String::from_utf8(output.stdout).unwrap()
        };
        for text in [status.to_string(), list.to_string(), cli(&["export", "list"]), cli(&["export", "status", "vm"])] {
            assert_eq!(text.contains("/delta.blob is not in the store"), !healthy, "{text}");
        }
        assert!(cli(&["status"]).contains(&format!("{} ready, {count} degraded, 0 failed", 1 - count)));
    };
    shown(true);
    let blob = walk(&server.local_root(), "delta.blob");
    let aside = blob.with_extension("aside");
    fs::rename(&blob, &aside).unwrap();
    assert_eq!(client.call(0, 0, 0, 512, &[]).errno, 5);
    shown(false);
    let (code, refused) = server.api("POST", "/v1/exports/vm/compact", Value::Null);
    assert_eq!((code, &refused["code"]), (503, &json!("damaged")), "{refused}");
    fs::rename(&aside, &blob).unwrap();
    server.ok("POST", "/v1/exports/vm/compact", Value::Null);
    assert_eq!(client.read(0, 512), [7; 512]);
    shown(true);
}

#[test]
fn the_parts_of_an_upload_that_are_sent_again_count_as_retries() {
    let moto = Moto::with_bucket("disks");
    let proxy = Proxy::start(&moto.endpoint());
    let server = TestServer::on_s3(&proxy.endpoint(), "disks", &[]);
    server.ok("POST", "/v1/exports/create", json!({"export_id": "vm", "size": 32 << 20}));
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 0 32M", "-c", "flush", &server.nbd_uri("vm")]);
    assert_eq!(Page::of(&server).get("nbd_server_store_retries_total", &[]), 0.0);
    // In the middle of the blob, whose parts are all that is under way.
    proxy.set_after(12 << 20, State::Cut);
    std::thread::scope(|scope| {
        let publish = scope.spawn(|| server.ok("POST", "/v1/exports/vm/snapshot", Value::Null));
        proxy.wait_for(State::Cut);
        while Page::of(&server).get("nbd_server_store_retries_total", &[]) == 0.0 {
            assert!(!publish.is_finished(), "nothing was sent again");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        proxy.set(State::Open);
        assert_eq!(publish.join().unwrap()["snapshot_created"], true);
    });
}

#[test]
fn health_says_whether_the_store_answers_and_what_was_wrong() {
    let server = TestServer::start(&["--store-timeout=1"], &[]);
    let health = server.ok("GET", "/v1/health", Value::Null);
    assert_eq!((&health["live"], &health["ready"]), (&json!(true), &json!(true)), "{health}");
    let store = &health["store"];
    assert_eq!((&store["backend"], &store["reachable"]), (&json!("local"), &json!(true)));
    assert!(store["since"].as_str().unwrap().ends_with('Z') && store["last_error"].is_null(), "{health}");
    // Where the export's head would be is a folder.
    fs::create_dir_all(server.local_root().join("exports/vm/volume.json")).unwrap();
    let (status, _) = server.api("POST", "/v1/exports/open", json!({"export_id": "vm"}));
    assert_ne!(status, 200);
    let (status, health) = server.api("GET", "/v1/health", Value::Null);
    assert_eq!(status, 200, "what is in the caches is served: {health}");
    assert_eq!(health["store"]["reachable"], false, "{health}");
    assert!(health["store"]["last_error"]["reason"].as_str().unwrap().contains("exports/vm/volume.json"), "{health}");
    server.ok("POST", "/v1/exports/create", json!({"export_id": "other", "size": 4096}));
    let health = server.ok("GET", "/v1/health", Value::Null);
    assert_eq!(health["store"]["reachable"], true);
    assert!(health["store"]["last_error"]["at"].as_str().unwrap().ends_with('Z'), "{health}");
}

fn walk(dir: &std::path::Path, name: &str) -> std::path::PathBuf {
    let mut left = vec![dir.to_owned()];
    while let Some(next) = left.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            if path.ends_with(name) {
                return path;
            }
            if path.is_dir() {
                left.push(path);
            }
        }
    }
    panic!("there is no {name} below {}", dir.display());
}

#[test]
fn a_failed_export_is_down_and_one_that_nobody_used_is_up_and_has_no_numbers() {
    let mut server = TestServer::start(&[], &[]);
    for id in ["bad", "good"] {
        server.ok("POST", "/v1/exports/create", json!({"export_id": id, "size": 4096}));
    }
    server.stop();
    fs::write(walk(&server.local_root().join("exports/bad"), "volume.json"), "{").unwrap();
    server.start_again();
    let page = Page::of(&server);
    assert_eq!(page.get("nbd_server_export_up", &[r#"export="bad""#]), 0.0);
    assert_eq!(page.get("nbd_server_export_up", &[r#"export="good""#]), 1.0);
    assert!(!page.0.contains("nbd_server_export_dirty_bytes{"), "{}", page.0);
}

#[test]
fn promtool_finds_nothing_to_criticise() {
    let server = TestServer::start(&[], &[]);
    let mut client = attached(&server);
    client.write(0, &vec![7; CHUNK]);
    server.ok("POST", "/v1/exports/vm/compact", Value::Null);
    let mut promtool = Command::new("promtool")
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("promtool: run `make test`, which installs it");
    promtool.stdin.take().unwrap().write_all(Page::of(&server).0.as_bytes()).unwrap();
    let output = promtool.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap()).concat();
    assert!(output.status.success() && said.is_empty(), "{said}");
}

#[test]
fn the_address_for_collectors_has_the_metrics_and_nothing_else() {
    let server = TestServer::start(&["--metrics-listen=127.0.0.1:0"], &[]);
    let line = server.wait_for_log("metrics at ");
    let address = line.split("http://").nth(1).unwrap().trim_end_matches("/metrics").to_owned();
    let get = |path: &str| {
        let mut stream = TcpStream::connect(&address).unwrap();
        write!(stream, "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    };
    let answer = get("/metrics");
    assert!(answer.starts_with("HTTP/1.1 200 ") && answer.contains("\nnbd_server_build_info{"), "{answer}");
    for path in ["/", "/v1/exports", "/v1/exports/create", "/v1/health"] {
        assert!(get(path).starts_with("HTTP/1.1 404 "), "{path}");
    }

    let dir = tempfile::tempdir().unwrap();
    let taken = format!("--metrics-listen={address}");
    for (flag, status, part) in [
        (taken.as_str(), 1, address.as_str()),
        ("--metrics-listen=9464", 2, "--metrics-listen"),
        ("--metrics-listen=unix:/x", 2, "the admin socket serves /metrics"),
    ] {
        let output = run_to_end(nbd_server().args(["serve", "--listen=127.0.0.1:0", flag]).env("HOME", dir.path()));
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.code() == Some(status) && said.contains(part), "{flag}: {said}");
    }
}

#[test]
fn a_collector_that_sends_nothing_does_not_hold_up_the_stop() {
    let mut server = TestServer::start(&["--metrics-listen=127.0.0.1:0"], &[]);
    let line = server.wait_for_log("metrics at ");
    let address = line.split("http://").nth(1).unwrap().trim_end_matches("/metrics").to_owned();
    let _silent = TcpStream::connect(address).unwrap();
    server.stop();
}
