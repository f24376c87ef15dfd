//! The real binary while its S3 endpoint is away: refused connections, and silence.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::attached::{Attached, EIO, bytes};
use common::http;
use common::moto::Moto;
use common::proxy::{Proxy, State};
use common::server::{TestServer, nbd_server, run};
use serde_json::{Value, json};

const MIB: usize = 1 << 20;
const SIZE: usize = 32 * MIB;
/// What the server is given as `--store-timeout`.
const STORE_TIMEOUT: Duration = Duration::from_secs(4);
/// How much longer an answer may take on a machine that compiles.
const SLACK: Duration = Duration::from_secs(10);

fn status(server: &TestServer) -> Value {
    server.ok("GET", "/v1/exports/disk/status", Value::Null)
}

/// From its end to its beginning: what lies beyond is not read ahead, so it is missing.
fn check_lower_half(disk: &mut Attached) {
    for at in (0..SIZE / 2).step_by(MIB).rev() {
        disk.check(at, MIB);
    }
}

/// Half of a published image is resident and partly dirty when the endpoint goes away in the middle of a read, and then
/// in the middle of a snapshot.
fn outage(away: State) {
    let moto = Moto::with_bucket("disks");
    let proxy = Proxy::start(&moto.endpoint());
    let flags = ["--store-timeout", "4", "--chunk-size", "1MiB"];
    let mut server = TestServer::on_s3(&proxy.endpoint(), "disks", &flags);
    server.ok("POST", "/v1/exports/create", json!({"export_id": "disk", "size": SIZE}));
    let mut disk = Attached::new(&server, "disk", vec![0; SIZE]);
    for at in (0..SIZE).step_by(MIB) {
        disk.write(at, &bytes(at as u64, MIB));
    }
    server.ok("POST", "/v1/exports/disk/snapshot", Value::Null);
    server.ok("POST", "/v1/exports/disk/cache/reset", Value::Null);

    // A read in whose middle the store goes away waits, and succeeds if it is back in time.
    proxy.set_after(2 * MIB + MIB / 2, away);
    let mut reader = Attached::new(&server, "disk", disk.image.clone());
    std::thread::scope(|scope| {
        let read = scope.spawn(|| reader.try_read(24 * MIB, 6 * MIB));
        proxy.wait_for(away);
        std::thread::sleep(Duration::from_millis(300));
        proxy.set(State::Open);
        assert!(read.join().unwrap().unwrap() == disk.image[24 * MIB..30 * MIB], "another content");
    });

    check_lower_half(&mut disk);
    for at in (0..12 * MIB).step_by(MIB) {
        disk.write(at, &bytes(100 + at as u64, MIB));
    }
    let socket = server.socket();
    proxy.set_after(6 * MIB, away);
    let publishing = std::thread::Builder::new()
        .spawn(move || http::call(&socket, "POST", "/v1/exports/disk/snapshot", ""))
        .unwrap();
    proxy.wait_for(away);

    // All of this is answered although the store is not there, and before it is back.
    check_lower_half(&mut disk);
    disk.write(3 * MIB + 100, &bytes(7, 5000));
    disk.write(14 * MIB - 10, &bytes(8, 20));
    disk.flush();
    check_lower_half(&mut disk);
    if away == State::Cut {
        // The parts of the upload tell, without anybody reading. In silence they may wait longer than this test.
        let deadline = Instant::now() + SLACK;
        while status(&server)["store"]["reachable"] == true {
            assert!(Instant::now() < deadline, "the status says that the store answers");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    let begun = Instant::now();
    assert_eq!(reader.try_read(20 * MIB, 4096), Err(EIO));
    assert!(begun.elapsed() < STORE_TIMEOUT + SLACK, "{:?}", begun.elapsed());
    let during = status(&server);
    if away == State::Frozen {
        // Where connections are refused the publish ends within the same time.
        assert_eq!(during["operation_state"], "snapshotting", "{during}");
    }
    assert_eq!(during["store"]["reachable"], false, "{during}");
    let text = |name: &str| during["store"][name].as_str().unwrap().to_owned();
    assert!(text("since").ends_with('Z') && !text("last_error").is_empty(), "{during}");
    assert_eq!(during["state"], "degraded", "{during}");
    assert_eq!(during["faults"][0]["cause"], "store-unavailable", "{during}");
    disk.flush();

    proxy.set(State::Open);
    assert!(reader.try_read(20 * MIB, 4096).unwrap() == disk.image[20 * MIB..][..4096], "another content");
    let published = publishing.join().unwrap();
    match published.status {
        200 => assert_eq!(published.json()["generation"], 2),
        503 => assert_eq!(published.json()["code"], "store-unavailable"),
        _ => panic!("{} {}", published.status, published.json()),
    }
    // With what was written during the outage, and with what the first attempt did not publish.
    server.ok("POST", "/v1/exports/disk/snapshot", Value::Null);
    let after = status(&server);
    assert_eq!((&after["store"], &after["dirty_chunks"]), (&json!({"reachable": true}), &json!(0)), "{after}");
    assert_eq!(after["state"], "ready", "{after}");
    disk.check_all();
    server.stop();
    let elsewhere = TestServer::on_s3(&moto.endpoint(), "disks", &[]);
    disk.move_to(&elsewhere);
    disk.check_all();
}

#[test]
fn an_endpoint_that_refuses_connections_wedges_and_corrupts_nothing() {
    outage(State::Cut);
}

#[test]
fn an_endpoint_that_falls_silent_wedges_and_corrupts_nothing() {
    outage(State::Frozen);
}

#[test]
fn a_start_while_the_store_is_away_says_so_and_goes_on_when_it_is_back() {
    let moto = Moto::with_bucket("disks");
    let proxy = Proxy::start(&moto.endpoint());
    proxy.set(State::Cut);
    let mut server = std::thread::scope(|scope| {
        scope.spawn(|| {
            std::thread::sleep(Duration::from_secs(1));
            proxy.set(State::Open);
        });
        TestServer::on_s3(&proxy.endpoint(), "disks", &[])
    });
    let log = server.log();
    assert_eq!(log.matches("the store does not answer yet, trying for up to 60 s").count(), 1, "{log}");
    server.ok("POST", "/v1/exports/create", json!({"export_id": "disk", "size": 1}));
    server.stop();

    // Who does not want to wait stops it.
    proxy.set(State::Cut);
    let mut waiting = server.command().stderr(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(waiting.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|line| line.contains("does not answer yet")));
    run("kill", &["-TERM", &waiting.id().to_string()]);
    assert!(lines.any(|line| line.contains("stopped by SIGTERM before it was ready")));
    assert_eq!(waiting.wait().unwrap().code(), Some(0));
    assert!(!server.socket().exists());
}

fn s3_error(status: &str, code: &str) -> String {
    let body = format!("<Error><Code>{code}</Code></Error>");
    format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\n\r\n{body}", body.len())
}

#[test]
fn a_cold_read_that_the_store_refuses_waits_and_the_reason_shows_at_once() {
    let moto = Moto::with_bucket("disks");
    let refusals = ["RequestTimeTooSkewed", "ExpiredToken"];
    let (refusing, turn) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let (refuses, now) = (Arc::clone(&refusing), Arc::clone(&turn));
    let proxy = Proxy::answering(&moto.endpoint(), move |head| {
        let refused = refuses.load(Ordering::Relaxed) && head.to_ascii_lowercase().contains("\r\nrange:");
        let turn = now.load(Ordering::Relaxed);
        refused.then(|| s3_error(["403 Forbidden", "400 Bad Request"][turn], refusals[turn]))
    });
    let mut server = TestServer::on_s3(&proxy.endpoint(), "disks", &["--chunk-size", "1MiB"]);
    server.ok("POST", "/v1/exports/create", json!({"export_id": "disk", "size": 4 * MIB}));
    let mut disk = Attached::new(&server, "disk", vec![0; 4 * MIB]);
    disk.write(0, &bytes(1, 4 * MIB));
    server.ok("POST", "/v1/exports/disk/snapshot", Value::Null);
    server.ok("POST", "/v1/exports/disk/cache/reset", Value::Null);
    for (index, code) in refusals.into_iter().enumerate() {
        turn.store(index, Ordering::Relaxed);
        refusing.store(true, Ordering::Relaxed);
        let mut reader = Attached::new(&server, "disk", disk.image.clone());
        std::thread::scope(|scope| {
            // From its end to its beginning: what lies beyond is not read ahead, so it is missing.
            let read = scope.spawn(move || reader.check((3 - index) * MIB, MIB));
            let deadline = Instant::now() + STORE_TIMEOUT + SLACK;
            while !status(&server)["store"]["last_error"].as_str().unwrap_or_default().contains(code) {
                assert!(Instant::now() < deadline && !read.is_finished(), "{}", status(&server));
                std::thread::sleep(Duration::from_millis(10));
            }
            refusing.store(false, Ordering::Relaxed);
            read.join().unwrap();
        });
        assert_eq!(status(&server)["store"], json!({"reachable": true}));
        assert!(server.log().contains(code));
    }
    server.stop();
}

#[test]
fn a_full_store_ends_a_publish_within_store_timeout_and_progress_says_why() {
    let moto = Moto::with_bucket("disks");
    let full = Arc::new(AtomicBool::new(false));
    let is_full = Arc::clone(&full);
    let proxy = Proxy::answering(&moto.endpoint(), move |head| {
        let refused = is_full.load(Ordering::Relaxed) && (head.starts_with("PUT ") || head.starts_with("POST "));
        refused.then(|| s3_error("507 Insufficient Storage", "StorageFull"))
    });
    let flags = ["--store-timeout", "12", "--chunk-size", "1MiB"];
    let mut server = TestServer::on_s3(&proxy.endpoint(), "disks", &flags);
    server.ok("POST", "/v1/exports/create", json!({"export_id": "disk", "size": MIB}));
    let mut disk = Attached::new(&server, "disk", vec![0; MIB]);
    disk.write(0, &bytes(1, MIB));
    full.store(true, Ordering::Relaxed);
    let begun = Instant::now();
    let create =
        nbd_server().args(["snapshot", "create", "disk"]).env("NBD_SERVER_ADMIN_SOCK", server.socket()).output();
    let (created, took) = (create.unwrap(), begun.elapsed());
    let said = String::from_utf8(created.stderr).unwrap();
    assert!(took < Duration::from_secs(12 + 20), "{took:?}: {said}");
    assert_eq!(created.status.code(), Some(1), "{said}");
    for part in ["waiting for the store for ", "HTTP 507 StorageFull", "gave up after"] {
        assert!(said.contains(part), "{part} in {said}");
    }
    full.store(false, Ordering::Relaxed);
    server.ok("POST", "/v1/exports/disk/snapshot", Value::Null);
    assert_eq!(status(&server)["dirty_chunks"], 0);
    server.stop();
}

#[test]
fn a_store_that_throttles_or_is_undecided_keeps_no_export_from_being_created() {
    let moto = Moto::with_bucket("disks");
    let (requests, undecided) = (Arc::new(AtomicUsize::new(0)), AtomicUsize::new(0));
    let count = Arc::clone(&requests);
    let proxy = Proxy::answering(&moto.endpoint(), move |head| {
        let creates_head = head.starts_with("PUT ") && head.contains("/volume.json ");
        if creates_head && undecided.fetch_add(1, Ordering::Relaxed).is_multiple_of(2) {
            return Some(s3_error("409 Conflict", "ConditionalRequestConflict"));
        }
        let throttled = (count.fetch_add(1, Ordering::Relaxed) + 1).is_multiple_of(5);
        throttled.then(|| s3_error("503 Slow Down", "SlowDown"))
    });
    let mut server = TestServer::on_s3(&proxy.endpoint(), "disks", &["--chunk-size", "1MiB"]);
    let to_start = requests.load(Ordering::Relaxed);
    assert!(to_start <= 80, "{to_start} requests until it was ready");
    server.ok("POST", "/v1/exports/create", json!({"export_id": "disk", "size": MIB}));
    let mut disk = Attached::new(&server, "disk", vec![0; MIB]);
    disk.write(0, &bytes(1, MIB));
    server.ok("POST", "/v1/exports/disk/snapshot", Value::Null);
    server.ok("POST", "/v1/exports/clone", json!({"export_id": "copy", "source_export_id": "disk"}));
    let (code, refused) = server.api("POST", "/v1/exports/create", json!({"export_id": "copy", "size": MIB}));
    assert_eq!(code, 409, "{refused}");
    Attached::new(&server, "copy", disk.image.clone()).check_all();
    server.stop();
}
