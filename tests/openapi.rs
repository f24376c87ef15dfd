//! The description of the API: it is current, complete, and what the server does.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use common::server::TestServer;
use serde_json::{Value, json};

/// How long the fuzzer may take in all, in seconds.
const PATIENCE_SECS: u32 = 55;
/// How many requests it makes to each call.
const REQUESTS_PER_CALL: &str = "60";

fn committed() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/openapi.json")
}

#[test]
fn the_committed_description_is_the_one_that_is_served() {
    let server = TestServer::start(&[], &[]);
    let served = server.http("GET", "/v1/openapi.json", "");
    assert_eq!((served.status, served.header("content-type")), (200, Some("application/json")));
    if std::env::var_os("NBD_TEST_BLESS").is_some() {
        fs::write(committed(), &served.body).unwrap();
    }
    let text = String::from_utf8(served.body).unwrap();
    let hint = "docs/openapi.json is old: NBD_TEST_BLESS=1 cargo test --test openapi committed";
    assert!(fs::read_to_string(committed()).is_ok_and(|committed| committed == text), "{hint}");
}

#[test]
fn the_description_has_every_call_and_every_code() {
    let description: Value = serde_json::from_slice(&fs::read(committed()).unwrap()).unwrap();
    let mut calls: Vec<String> = Vec::new();
    for (path, methods) in description["paths"].as_object().unwrap() {
        calls.extend(methods.as_object().unwrap().keys().map(|method| format!("{method} {path}")));
    }
    calls.sort();
    assert_eq!(
        calls,
        [
            "delete /v1/exports/{id}",
            "get /metrics",
            "get /v1/exports",
            "get /v1/exports/{id}/snapshots",
            "get /v1/exports/{id}/status",
            "get /v1/health",
            "get /v1/openapi.json",
            "get /v1/status",
            "post /v1/exports/clone",
            "post /v1/exports/create",
            "post /v1/exports/open",
            "post /v1/exports/{id}/cache/reset",
            "post /v1/exports/{id}/cache/trim",
            "post /v1/exports/{id}/cancel",
            "post /v1/exports/{id}/compact",
            "post /v1/exports/{id}/snapshot",
        ]
    );
    let codes = &description["components"]["schemas"]["Problem"]["properties"]["code"];
    let names: Vec<&str> = codes["enum"].as_array().unwrap().iter().map(|code| code.as_str().unwrap()).collect();
    assert!(names.len() >= 26 && names.contains(&"store-unavailable"), "{names:?}");
    for name in names {
        assert!(codes["description"].as_str().unwrap().contains(&format!("`{name}` (")), "{name}");
    }
}

/// Carries connections to a TCP port on to a Unix socket, for clients that know no such sockets. Ends with the process.
fn bridge(socket: PathBuf) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    #[allow(clippy::disallowed_methods, reason = "a test's own threads")]
    std::thread::spawn(move || {
        for client in listener.incoming().map_while(Result::ok) {
            // A client that the server turned away notices by itself.
            let Ok(server) = UnixStream::connect(&socket) else { continue };
            let (up, down) = ((client.try_clone().unwrap(), server.try_clone().unwrap()), (server, client));
            std::thread::spawn(move || {
                let (mut from, mut to): (TcpStream, UnixStream) = up;
                carry(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Write);
            });
            std::thread::spawn(move || {
                let (mut from, mut to): (UnixStream, TcpStream) = down;
                carry(&mut from, &mut to);
                let _ = to.shutdown(Shutdown::Both);
            });
        }
    });
    address
}

fn carry(from: &mut impl Read, to: &mut impl Write) {
    let mut buf = [0; 16 << 10];
    while let Ok(read @ 1..) = from.read(&mut buf) {
        if to.write_all(&buf[..read]).is_err() {
            return;
        }
    }
}

#[test]
fn requests_made_from_the_description_get_the_answers_it_describes() {
    let mut server = TestServer::start(&["--storage-backend", "memory"], &[]);
    server.ok("POST", "/v1/exports/create", json!({"export_id": "vm-1", "size": 1 << 20}));
    server.ok("POST", "/v1/exports/vm-1/compact", Value::Null);
    let address = bridge(server.socket());
    let schemathesis = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/schemathesis");
    let checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,\
                  negative_data_rejection";
    let dir = tempfile::tempdir().unwrap();
    let output = Command::new("timeout")
        .args([&PATIENCE_SECS.to_string()])
        .arg(&schemathesis)
        .arg("run")
        .arg(format!("http://{address}/v1/openapi.json"))
        .args(["--url", &format!("http://{address}"), "--checks", checks, "--phases", "examples,coverage,fuzzing"])
        .args(["--max-examples", REQUESTS_PER_CALL, "--seed", "1", "--no-color", "--request-timeout", "20"])
        .current_dir(dir.path())
        .stdin(Stdio::null())
        .output()
        .unwrap_or_else(|e| panic!("{}: {e}; run `make setup`", schemathesis.display()));
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{}\n{said}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    let failed = said.lines().any(|line| line.contains("generated") && line.contains("failed"));
    // All calls but the one it has the description from.
    assert!(said.contains("Tested: 15") && !failed, "{said}");
    server.stop();
}
