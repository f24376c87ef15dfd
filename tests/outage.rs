//! The real binary while its S3 endpoint is away: refused connections, and silence.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::io::{BufRead, BufReader};
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::attached::{Attached, EIO, bytes};
use common::http;
use common::moto::Moto;
use common::proxy::{Proxy, State};
use common::server::{TestServer, run};
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
    assert_eq!(during["operation_state"], "snapshotting", "{during}");
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
