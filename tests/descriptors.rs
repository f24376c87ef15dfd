//! The real binary where the system grants few descriptors: clients of one kind do not take them from everybody else.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod common;

use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::nbd::Raw;
use common::server::TestServer;
use nbd_server::nbd::wire::Mode;
use serde_json::{Value, json};

/// A server that gets this many descriptors and no more.
fn with_descriptors(count: usize) -> TestServer {
    let launcher = ["prlimit".to_owned(), format!("--nofile={count}:{count}")];
    TestServer::start_through(launcher.into(), &["--listen", "127.0.0.1:0"], &[])
}

/// Whether the server greets this client, or closes it.
fn is_greeted(mut client: &TcpStream) -> bool {
    client.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    match client.read_exact(&mut [0; 18]) {
        Ok(()) => true,
        Err(e) if matches!(e.kind(), ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset) => false,
        Err(e) => panic!("neither greeted nor closed: {e}"),
    }
}

#[track_caller]
fn until(mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while !is_so() {
        assert!(Instant::now() < deadline, "it never came");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn where_descriptors_are_few_clients_are_refused_before_the_rest_runs_out() {
    let server = with_descriptors(128);
    for id in ["busy", "cold"] {
        server.ok("POST", "/v1/exports/create", json!({"export_id": id, "size": 1 << 20}));
    }
    let mut attached = Raw::connect_to(&server.nbd_address());
    attached.negotiate("busy", Mode::Simple);
    let clients: Vec<_> = (0..128).map(|_| TcpStream::connect(server.nbd_address()).unwrap()).collect();
    let greeted: Vec<_> = clients.iter().filter(|client| is_greeted(client)).collect();
    assert_eq!(greeted.len(), 63, "half of the descriptors are for clients");
    server.wait_for_log("64 clients are connected, as many as are allowed");

    assert_eq!(server.ok("GET", "/v1/exports", Value::Null).as_array().unwrap().len(), 2);
    server.ok("POST", "/v1/exports/cold/snapshot", Value::Null);
    server.ok("POST", "/v1/exports/create", json!({"export_id": "new", "size": 1 << 20}));
    assert_eq!(attached.write(0, &[7; 4096]).errno, 0);
    drop(clients);
    until(|| server.ok("GET", "/v1/status", Value::Null)["connections"] == 1);
    let mut late = Raw::connect_to(&server.nbd_address());
    late.negotiate("new", Mode::Simple);
}

#[test]
fn a_lack_of_descriptors_is_logged_once_and_passes() {
    let server = with_descriptors(64);
    // With the server's own these are more than there are: some wait to be accepted.
    let held: Vec<_> = (0..64).map(|_| UnixStream::connect(server.socket()).unwrap()).collect();
    server.wait_for_log("the admin socket cannot accept a client");
    let nbd = format!("{} cannot accept a client", server.nbd_address());
    let said = |part: &str| server.log().lines().filter(|line| line.contains(part)).count();
    let mut clients = Vec::new();
    until(|| {
        clients.push(TcpStream::connect(server.nbd_address()).unwrap());
        said(&nbd) > 0
    });
    // Both try again ten times a second.
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!((said("the admin socket cannot"), said(&nbd)), (1, 1), "{}", server.log());
    drop((held, clients));
    server.ok("GET", "/v1/exports", Value::Null);
    assert!(is_greeted(&TcpStream::connect(server.nbd_address()).unwrap()));
}
