//! The log of the real binary: what a line says, what it never says, and how its level changes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::process::Command;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use common::certs::Pki;
use common::moto::Moto;
use common::nbd::Raw;
use common::server::{TestServer, nbd_server, run_to_end};
use nbd_server::clock::SystemClock;
use nbd_server::nbd::wire::Mode;
use nbd_server::store::remote::{RemoteConfig, RemoteKind, RemoteStore};
use nbd_server::store::retry::RetryPolicy;
use nbd_server::store::{Condition, Store};
use serde_json::{Value, json};
use tracing_subscriber::fmt::MakeWriter;

const CHUNK: usize = 4096;
const ID: &str = "AKIALOOKFORTHIS";
const SECRET: &str = "wJalrXUtnFEMI/K7MDENG/hunter2";
const TOKEN: &str = "FwoGZXIvYXdzEBYaDtoken";

/// Its lines as JSON objects.
fn lines(log: &str) -> Vec<Value> {
    log.lines().map(|line| serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))).collect()
}

#[test]
fn no_credential_is_ever_logged_not_even_at_trace() {
    let moto = Moto::with_bucket("disks");
    let pki = Pki::new();
    let flags = [
        "--log-level=trace",
        "--log-format=json",
        "--storage-backend=s3",
        "--bucket=disks",
        &format!("--endpoint-url={}", moto.endpoint()),
        "--tls=on",
        &format!("--tls-cert={}", pki.path("server-cert.pem").display()),
        &format!("--tls-key={}", pki.path("server-key.pem").display()),
    ];
    let keys = [("AWS_ACCESS_KEY_ID", ID), ("AWS_SECRET_ACCESS_KEY", SECRET), ("AWS_SESSION_TOKEN", TOKEN)];
    let mut server = TestServer::start(&flags, &keys);
    server.ok("POST", "/v1/exports/create", json!({"export_id": "vm", "size": 4 * CHUNK, "chunk_size": CHUNK}));
    let mut client = Raw::connect_to(&server.nbd_address());
    client.negotiate("vm", Mode::Simple);
    assert_eq!(client.write(0, &[7; CHUNK]).errno, 0);
    server.ok("POST", "/v1/exports/vm/snapshot", Value::Null);
    server.ok("POST", "/v1/exports/vm/cache/reset", Value::Null);
    assert_eq!(client.read(0, CHUNK as u64), [7; CHUNK]);
    let (_, port) = server.nbd_address().rsplit_once(':').map(|(h, p)| (h.to_owned(), p.to_owned())).unwrap();
    let uri = format!("nbds://localhost:{port}/vm?tls-certificates={}", pki.anonymous());
    let nbdinfo = Command::new("nbdinfo").args(["--size", &uri]).output().unwrap();
    assert!(nbdinfo.status.success(), "{}", String::from_utf8_lossy(&nbdinfo.stderr));
    server.signal(15);
    server.wait_for_log("SIGTERM");
    let log = server.log();
    server.wait();
    // Text that no log line has by chance: the body of the key without its line breaks, in pieces.
    let key = pki.text("server-key.pem");
    let key_pieces: Vec<_> = key.lines().filter(|line| !line.starts_with("-----")).collect();
    assert!(!key_pieces.is_empty() && lines(&log).len() > 5, "{log}");
    for secret in [SECRET, TOKEN, ID].into_iter().chain(key_pieces) {
        assert!(!log.contains(secret), "{secret} in\n{log}");
        let escaped = secret.replace('/', "%2F");
        assert!(!log.contains(&escaped), "{escaped} in\n{log}");
    }
}

/// An endpoint that refuses everything, and says in its answer what it was asked: the worst a log could repeat.
fn telltale() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    #[allow(clippy::disallowed_methods, reason = "a test's own thread, which ends with the process")]
    std::thread::spawn(move || {
        for mut stream in listener.incoming().map_while(Result::ok) {
            let mut head = Vec::new();
            let mut byte = [0];
            while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).is_ok_and(|read| read == 1) {
                head.push(byte[0]);
            }
            let _ = write!(stream, "HTTP/1.1 403 No\r\nconnection: close\r\ncontent-length: {}\r\n\r\n", head.len());
            let _ = stream.write_all(&head);
        }
    });
    format!("http://{address}")
}

#[test]
fn no_provider_s_credential_is_logged_whatever_the_store_answers_or_if_it_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let key = "aHVudGVyMmh1bnRlcjI=";
    let account = ("AZURE_STORAGE_ACCOUNT_NAME", "account");
    let telltale = telltale();
    for (backend, variables, secrets) in [
        ("azure", &[account, ("AZURE_STORAGE_ACCOUNT_KEY", key)][..], &[key, "hunter2"][..]),
        ("azure", &[account, ("AZURE_STORAGE_SAS_TOKEN", "sv=2021&sig=hunter2%3D&sp=rw")], &["hunter2", "sig="]),
        ("azure", &[account, ("AZURE_STORAGE_TOKEN", "hunter2hunter2")], &["hunter2"]),
        ("azure", &[account, ("AZURE_STORAGE_ACCOUNT_KEY", "hunter2!no-base64")], &["hunter2"]),
        ("azure", &[account, ("AZURE_STORAGE_SAS_TOKEN", "hunter2")], &["hunter2"]),
        ("gcs", &[("GOOGLE_BEARER_TOKEN", "hunter2hunter2")], &["hunter2"]),
        ("gcs", &[("GOOGLE_SERVICE_ACCOUNT_KEY", r#"{"private_key":"hunter2","client_email":3}"#)], &["hunter2"]),
        (
            "s3",
            &[("AWS_ACCESS_KEY_ID", ID), ("AWS_SECRET_ACCESS_KEY", SECRET), ("AWS_SESSION_TOKEN", TOKEN)],
            &[SECRET, TOKEN, ID],
        ),
        // What no header carries: the client library panics.
        ("s3", &[("AWS_ACCESS_KEY_ID", ID), ("AWS_SECRET_ACCESS_KEY", "hunter2\n")], &["hunter2"]),
        ("gcs", &[("GOOGLE_BEARER_TOKEN", "hunter2\n")], &["hunter2"]),
        ("azure", &[account, ("AZURE_STORAGE_TOKEN", "hunter2\n")], &["hunter2"]),
    ] {
        for endpoint in [&*telltale, "http://127.0.0.1:9"] {
            let mut serve = nbd_server();
            serve.args(["serve", "--log-level=trace", "--listen=127.0.0.1:0", "--bucket=disks", "--store-timeout=1"]);
            serve.args(["--storage-backend", backend, "--endpoint-url", endpoint]).env("HOME", dir.path());
            serve.arg("--cache-root").arg(dir.path().join("cache")).arg("--admin-sock").arg(dir.path().join("a.sock"));
            let output = run_to_end(serve.envs(variables.iter().copied()));
            let log = String::from_utf8(output.stderr).unwrap();
            assert!(output.status.code().is_some_and(|status| [1, 2].contains(&status)), "{variables:?}: {log}");
            assert!(log.lines().last().unwrap().starts_with("error: ") && !log.contains("panicked"), "{log}");
            for secret in secrets {
                assert!(!log.contains(secret), "{secret} in\n{log}");
            }
        }
    }
}

#[test]
fn an_export_that_turns_out_to_be_damaged_is_logged_once() {
    let mut server = TestServer::start(&[], &[]);
    server.ok("POST", "/v1/exports/create", json!({"export_id": "vm", "size": 4096}));
    let snapshot = server.ok("POST", "/v1/exports/vm/compact", Value::Null)["snapshot_id"].clone();
    server.stop();
    let manifest = format!("exports/vm/snapshots/{}/manifest.json", snapshot.as_str().unwrap());
    fs::write(server.local_root().join(&manifest), "damage").unwrap();
    server.start_again();
    for _ in 0..3 {
        let (status, answer) = server.api("GET", "/v1/exports/vm/status", Value::Null);
        assert_eq!((status, &answer["code"]), (503, &json!("damaged")));
        assert!(answer["detail"].as_str().unwrap().starts_with(&format!("{manifest}: not a manifest")), "{answer}");
    }
    assert_eq!(server.ok("GET", "/v1/exports", Value::Null)[0]["state"], "failed");
    let log = server.log();
    let told: Vec<_> = log.lines().filter(|line| line.contains("cannot be served")).collect();
    assert!(told.len() == 1 && told[0].contains("export=vm") && told[0].contains(&manifest), "{log}");
    server.stop();
}

#[derive(Clone, Default)]
struct Heard(Arc<Mutex<Vec<u8>>>);

impl Write for Heard {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for Heard {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// The binary keeps these libraries quiet; should somebody let them speak, they must not tell either.
#[tokio::test]
async fn the_libraries_below_log_no_credential_either() {
    let moto = Moto::with_bucket("disks");
    let heard = Heard::default();
    let everything = tracing_subscriber::fmt()
        .with_max_level(tracing::level_filters::LevelFilter::TRACE)
        .with_writer(heard.clone())
        .with_ansi(false)
        .finish();
    let _listening = tracing::subscriber::set_default(everything);
    let config = RemoteConfig {
        kind: RemoteKind::S3,
        bucket: Some("disks".into()),
        endpoint_url: Some(moto.endpoint()),
        region: None,
        r2_account_id: None,
    };
    let keys = |name: &str| match name {
        "AWS_ACCESS_KEY_ID" => Some(ID.to_owned()),
        "AWS_SECRET_ACCESS_KEY" => Some(SECRET.to_owned()),
        "AWS_SESSION_TOKEN" => Some(TOKEN.to_owned()),
        _ => None,
    };
    let policy = RetryPolicy { limit: std::time::Duration::from_secs(2), ..RetryPolicy::default() };
    let store = RemoteStore::connect(&config, &keys, policy, Arc::new(SystemClock)).unwrap();
    let key = "exports/vm/volume.json".parse().unwrap();
    store.put(&key, Bytes::from_static(b"it"), Condition::IfAbsent).await.unwrap();
    store.get(&key, 9).await.unwrap();
    assert!(store.get(&"exports/none".parse().unwrap(), 9).await.is_err());
    drop(moto);
    assert!(store.get(&key, 9).await.is_err());
    let heard = String::from_utf8(heard.0.lock().unwrap().clone()).unwrap();
    assert!(heard.contains("hyper_util") || heard.contains("object_store"), "nobody spoke: {heard}");
    for secret in [SECRET, TOKEN] {
        assert!(!heard.contains(secret), "{heard}");
    }
}

#[test]
fn a_json_line_names_export_connection_and_operation() {
    let mut server = TestServer::start(&["--log-format=json"], &[]);
    server.ok("POST", "/v1/exports/create", json!({"export_id": "vm", "size": CHUNK, "chunk_size": CHUNK}));
    let mut client = Raw::connect_to(&server.nbd_address());
    client.negotiate("vm", Mode::Simple);
    for _ in 0..50 {
        client.write(0, &[7; CHUNK]);
        client.read(0, CHUNK as u64);
    }
    server.ok("POST", "/v1/exports/vm/snapshot", Value::Null);
    drop(client);
    server.wait_for_log("a client is gone");
    let log = lines(&server.log());
    let find = |message: &str| log.iter().find(|line| line["message"] == message).unwrap_or_else(|| panic!("{log:#?}"));
    let attached = find("a client attached");
    assert_eq!((&attached["level"], &attached["span"]["export"]), (&json!("INFO"), &json!("vm")));
    assert_eq!(attached["span"]["id"], 1);
    assert!(attached["span"]["peer"].as_str().unwrap().starts_with("127.0.0.1:"));
    assert_eq!(find("a client is gone")["span"], attached["span"]);
    let published = find("published");
    assert_eq!((&published["span"]["export"], &published["span"]["operation"]), (&json!("vm"), &json!("snapshot")));
    assert_eq!(published["generation"], 1);
    assert_eq!(find("created")["export"], "vm");
    assert!(log.len() < 12, "at info there is no line per request: {log:#?}");
    server.stop();
}

/// A client that attaches and resets its connection.
fn attach_and_reset(address: &str) {
    let mut client = Raw::connect_to(address);
    client.negotiate("vm", Mode::Simple);
    rustix::net::sockopt::set_socket_linger(&client.stream, Some(std::time::Duration::ZERO)).unwrap();
}

#[test]
fn clients_that_reset_leave_a_few_lines_and_a_count() {
    const CLIENTS: usize = 100;
    let mut server = TestServer::start(&["--log-format=json"], &[]);
    server.ok("POST", "/v1/exports/create", json!({"export_id": "vm", "size": 4096}));
    (0..CLIENTS).for_each(|_| attach_and_reset(&server.nbd_address()));
    // They have all come and gone before the export is closed.
    assert_eq!(server.api("DELETE", "/v1/exports/vm", Value::Null).0, 204);
    server.signal(15);
    let messages = ["a client attached", "a client is gone"];
    for message in messages {
        server.wait_for_log(&format!("more lines like this one were left out: {message}"));
    }
    let log = lines(&server.log());
    let about = |message: &str| log.iter().filter(|line| line["message"] == message).count();
    for message in messages {
        let summary = format!("{} more lines like this one were left out: {message}", CLIENTS - about(message));
        assert!((1..=40).contains(&about(message)) && about(&summary) == 1, "{message}: {log:#?}");
        let summary = log.iter().find(|line| line["message"] == summary.as_str()).unwrap();
        assert_eq!((&summary["export"], &summary["level"]), (&json!("vm"), &json!("INFO")));
    }
    server.wait();
}

#[test]
fn sighup_takes_the_level_from_the_configuration_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("n.toml");
    fs::write(&path, "log-level = 'info'").unwrap();
    let server = TestServer::start(&["--config", path.to_str().unwrap()], &[]);
    let attach = || Raw::connect_to(&server.nbd_address()).negotiate("vm", Mode::Simple);
    server.ok("POST", "/v1/exports/create", json!({"export_id": "vm", "size": 4096}));
    attach();
    server.wait_for_log("a client is gone");
    assert!(!server.log().contains("it negotiated"));
    fs::write(&path, "log-level = 'debug'").unwrap();
    server.signal(1);
    server.wait_for_log("the log's level is now Debug");
    attach();
    server.wait_for_log("it negotiated");
    assert!(!server.log().contains("after a restart"), "{}", server.log());
    fs::write(&path, "log-level = 'debug'\nchunk-size = '8KiB'\nlisten = ['127.0.0.1:9']\nbucket = 'b'\n").unwrap();
    server.signal(1);
    // The flag --listen goes before the file, then as now.
    server.wait_for_log("SIGHUP: changed, but in force after a restart alone: chunk-size, bucket");
    fs::write(&path, "log-level = 'loud'").unwrap();
    server.signal(1);
    let line = server.wait_for_log("the log's level stays");
    assert!(line.contains("n.toml line 1") && line.contains("loud"), "{line}");
}
