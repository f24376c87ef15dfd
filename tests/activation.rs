//! Socket activation with the real binary: what is passed in `LISTEN_FDS` is served, what is not for it is left alone.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod common;

use std::process::Command;

use common::nbd::scratch;
use common::server::{TestServer, nbd_server_through, run_to_end};

/// The launcher that passes these sockets.
fn passing(what: &[&str]) -> Vec<String> {
    let launcher = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/clients/passed_sockets.py");
    let all = ["/usr/bin/python3", launcher].into_iter().chain(what.iter().copied()).chain(["--"]);
    all.map(str::to_owned).collect()
}

/// The NBD URIs of the ready line.
fn uris(server: &TestServer) -> Vec<String> {
    let line = server.wait_for_log("ready: ");
    let (_, rest) = line.split_once("NBD on ").unwrap();
    rest.split_once("; ").unwrap().0.split(' ').map(str::to_owned).collect()
}

fn create(server: &TestServer) {
    server.ok("POST", "/v1/exports/create", serde_json::json!({"export_id": "vm", "size": 12345}));
}

#[track_caller]
fn serves(uri: &str) {
    let uri = match uri.split_once('?') {
        Some((start, query)) => format!("{start}vm?{query}"),
        None => format!("{uri}vm"),
    };
    let output = Command::new("timeout").args(["60", "nbdinfo", "--size", &uri]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "12345", "{uri}: {output:?}");
}

#[test]
fn passed_sockets_alone_are_served_when_no_address_is_given() {
    let (_guard, socket) = scratch("passed.sock");
    let unix = format!("unix:{}", socket.display());
    let mut server = TestServer::start_through(passing(&["tcp", &unix]), &[], &[]);
    create(&server);
    let uris = uris(&server);
    assert_eq!(uris.len(), 2, "{uris:?}");
    assert!(uris[0].starts_with("nbd://127.0.0.1:") && !uris[0].contains(":10809"), "{uris:?}");
    assert_eq!(uris[1], format!("nbd+unix:///?socket={}", socket.display()));
    uris.iter().for_each(|uri| serves(uri));
    server.stop();
    assert!(socket.exists(), "the file belongs to whoever passed the socket");
}

#[test]
fn passed_sockets_are_served_beside_the_addresses_that_are_given() {
    let mut server = TestServer::start_through(passing(&["tcp"]), &["--listen=127.0.0.1:0"], &[]);
    create(&server);
    let uris = uris(&server);
    assert_eq!(uris.len(), 2, "{uris:?}");
    assert_ne!(uris[0], uris[1]);
    uris.iter().for_each(|uri| serves(uri));
    server.stop();
}

#[test]
fn sockets_for_another_process_are_left_alone() {
    let mut server = TestServer::start_through(passing(&["tcp", "pid:1"]), &["--listen=127.0.0.1:0"], &[]);
    create(&server);
    let uris = uris(&server);
    assert_eq!(uris.len(), 1, "{uris:?}");
    serves(&uris[0]);
    server.stop();
}

#[test]
fn what_is_passed_and_no_listening_socket_is_refused_by_number() {
    for (what, parts) in
        [(&["tcp", "file"][..], ["descriptor 4", "neither"]), (&["deaf"], ["descriptor 3", "does not listen"])]
    {
        let output = run_to_end(nbd_server_through(&passing(what)).args(["serve", "--storage-backend=memory"]));
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.starts_with("error: ") && text.lines().count() == 1, "{text}");
        parts.iter().for_each(|part| assert!(text.contains(part), "{part:?} is not in {text}"));
    }
    let count = ["/bin/sh", "-c", "LISTEN_PID=$$ LISTEN_FDS=99999999999 exec \"$@\"", "sh"].map(str::to_owned);
    let output = run_to_end(nbd_server_through(&count).args(["serve", "--storage-backend=memory"]));
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(text.contains("LISTEN_FDS \"99999999999\""), "{text}");
}
