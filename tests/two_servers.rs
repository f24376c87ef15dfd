//! Two real servers on one bucket: what keeps their images apart, and what the server does where nothing would.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

use common::attached::{Attached, bytes};
use common::http;
use common::moto::Moto;
use common::proxy::{Proxy, State};
use common::server::{S3_KEYS, TestServer, nbd_server, run_to_end};
use serde_json::{Value, json};

const SIZE: usize = 1 << 20;

fn status(server: &TestServer) -> Value {
    server.ok("GET", "/v1/exports/disk/status", Value::Null)
}

#[test]
fn of_two_servers_on_one_bucket_exactly_one_publishes_and_the_other_keeps_its_data() {
    let moto = Moto::with_bucket("disks");
    let chunks = ["--chunk-size", "64KiB"];
    let first = TestServer::on_s3(&moto.endpoint(), "disks", &chunks);
    first.ok("POST", "/v1/exports/create", json!({"export_id": "disk", "size": SIZE}));
    let mut disk = Attached::new(&first, "disk", vec![0; SIZE]);
    disk.write(0, &bytes(1, SIZE));
    first.ok("POST", "/v1/exports/disk/snapshot", Value::Null);
    let second = TestServer::on_s3(&moto.endpoint(), "disks", &chunks);
    let mut published = disk.image;
    let mut servers = [first, second];

    for round in 0..8u64 {
        let base = status(&servers[0])["current_snapshot_id"].clone();
        assert_eq!(base, status(&servers[1])["current_snapshot_id"]);
        let mut disks = [0, 1].map(|i| Attached::new(&servers[i], "disk", published.clone()));
        for (who, disk) in (0..).zip(&mut disks) {
            // In the same chunks, and each in one of its own.
            disk.write(100_000, &bytes(10 * round + who, 200_000));
            disk.write(700_000 + 100_000 * usize::try_from(who).unwrap(), &bytes(10 * round + who, 10));
            disk.flush();
        }
        let answers = std::thread::scope(|scope| {
            let call = |server: &TestServer| {
                let socket = server.socket();
                scope.spawn(move || http::call(&socket, "POST", "/v1/exports/disk/snapshot", ""))
            };
            [call(&servers[0]), call(&servers[1])].map(|thread| thread.join().unwrap())
        });
        let winner = usize::from(answers[0].status != 200);
        let (won, lost) = (&answers[winner], &answers[1 - winner]);
        assert_eq!((won.status, lost.status), (200, 409), "{} {}", won.json(), lost.json());
        let (won, lost) = (won.json(), lost.json());
        assert_eq!(lost["code"], "conflict", "{lost}");
        for id in [&base, &won["snapshot_id"]] {
            assert!(lost["detail"].as_str().unwrap().contains(id.as_str().unwrap()), "{id} in {lost}");
        }

        // Nothing of the loser's is gone, also after a restart; it just cannot be published.
        let (loser, disk) = (&mut servers[1 - winner], &mut disks[1 - winner]);
        let lost = status(loser);
        assert_eq!((&lost["state"], &lost["faults"][0]["cause"]), (&json!("degraded"), &json!("conflict")), "{lost}");
        assert_eq!(lost["remote_head_snapshot_id"], won["snapshot_id"], "{lost}");
        assert_eq!(lost["remote_head_generation"], won["generation"], "{lost}");
        let dirty = lost["dirty_chunks"].clone();
        assert!(dirty.as_u64().unwrap() >= 4, "{dirty}");
        if round % 2 == 0 {
            loser.stop();
        } else {
            loser.kill9();
        }
        loser.start_again();
        assert_eq!(status(loser)["dirty_chunks"], dirty);
        disk.move_to(loser);
        disk.check_all();
        let (again, answer) = loser.api("POST", "/v1/exports/disk/snapshot", Value::Null);
        assert_eq!((again, &answer["code"]), (409, &json!("conflict")), "{answer}");
        disk.check_all();

        published.clone_from(&disks[winner].image);
        let reset = servers[1 - winner].ok("POST", "/v1/exports/disk/cache/reset", Value::Null);
        assert_eq!((&reset["current_snapshot_id"], &reset["dirty_chunks"]), (&won["snapshot_id"], &json!(0)));
        for server in &servers {
            Attached::new(server, "disk", published.clone()).check_all();
        }
    }
    let elsewhere = TestServer::on_s3(&moto.endpoint(), "disks", &[]);
    Attached::new(&elsewhere, "disk", published).check_all();
}

/// What the newest manifest of an export says.
fn manifest(root: &Path, server: &TestServer, export: &str) -> String {
    let path = format!("/v1/exports/{export}/status");
    let snapshot = server.ok("GET", &path, Value::Null)["current_snapshot_id"].as_str().unwrap().to_owned();
    fs::read_to_string(root.join(export).join("snapshots").join(snapshot).join("manifest.json")).unwrap()
}

#[test]
fn a_store_that_is_moved_to_another_prefix_is_whole_there_and_goes_on_from_there() {
    let dir = tempfile::tempdir().unwrap();
    let mut images: Vec<(String, Vec<u8>)> = Vec::new();
    let mut last = None;
    // Beside the old prefix, below and above it, and back.
    for (round, root) in (0u64..).zip(["exports", "team/exports", "team", "team/team", "exports"]) {
        let folder = dir.path().join(root);
        if let Some(last) = last {
            fs::rename(last, dir.path().join("moving")).unwrap();
            let _ = fs::remove_dir(dir.path().join("team"));
            fs::create_dir_all(folder.parent().unwrap()).unwrap();
            fs::rename(dir.path().join("moving"), &folder).unwrap();
        }
        last = Some(folder.clone());
        let store = ["--storage-backend", "local", "--local-root", dir.path().to_str().unwrap(), "--export-root", root];
        let mut server = TestServer::start(&[&store[..], &["--chunk-size", "64KiB"]].concat(), &[]);
        for listed in server.ok("GET", "/v1/exports", Value::Null).as_array().unwrap() {
            assert_eq!(listed["state"], "ready", "{listed}");
        }
        let name = format!("disk-{round}");
        let image = match images.last() {
            None => {
                server.ok("POST", "/v1/exports/create", json!({"export_id": name, "size": SIZE}));
                vec![0; SIZE]
            }
            Some((source, image)) => {
                server.ok("POST", "/v1/exports/clone", json!({"export_id": name, "source_export_id": source}));
                image.clone()
            }
        };
        images.push((name, image));
        let at = usize::try_from(round).unwrap() * 100_000;
        for (name, image) in &mut images {
            let mut disk = Attached::new(&server, name, image.clone());
            disk.check_all();
            disk.write(at, &bytes(round, 80_000));
            server.ok("POST", &format!("/v1/exports/{name}/snapshot"), Value::Null);
            image.clone_from(&disk.image);
            let written = manifest(&folder, &server, name);
            let paths = written.lines().filter(|line| line.contains("\"path\"")).collect::<Vec<_>>();
            assert!(paths.iter().all(|line| line.contains(&format!("\"path\": \"{root}/disk-"))), "{paths:?}");
        }
        server.stop();
    }
}

/// A `serve` on a bucket, in a directory of its own.
fn serve(dir: &Path, endpoint: &str) -> Command {
    let mut command = nbd_server();
    command.args(["serve", "--listen", "127.0.0.1:0", "--store-timeout", "2", "--cache-root"]).arg(dir.join("cache"));
    command.arg("--admin-sock").arg(dir.join("admin.sock"));
    command.args(["--storage-backend", "s3", "--bucket", "disks", "--endpoint-url", endpoint]).envs(S3_KEYS);
    command
}

#[test]
fn a_store_that_ignores_conditions_is_refused_unless_the_user_insists_and_then_warned_of() {
    let moto = Moto::with_bucket("disks");
    let proxy = Proxy::losing_conditions(&moto.endpoint());
    let dir = tempfile::tempdir().unwrap();
    for switch in ["", "false"] {
        let mut command = serve(dir.path(), &proxy.endpoint());
        if !switch.is_empty() {
            command.env("NBD_SERVER_ALLOW_UNSAFE_STORE", switch);
        }
        let output = run_to_end(&mut command);
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert!(text.contains("not safe to write to") && text.contains("If-None-Match"), "{text}");
    }

    let s3 = ["--storage-backend", "s3", "--bucket", "disks", "--endpoint-url", &proxy.endpoint()];
    let insisting = [
        TestServer::start(&[&s3[..], &["--allow-unsafe-store"]].concat(), &S3_KEYS),
        TestServer::start(&s3, &[&S3_KEYS[..], &[("NBD_SERVER_ALLOW_UNSAFE_STORE", "true")]].concat()),
    ];
    for (name, mut server) in ["by-flag", "by-variable"].into_iter().zip(insisting) {
        let warning = server.wait_for_log("UNSAFE");
        for part in ["WARN", "not safe to write to", "--allow-unsafe-store", "lost"] {
            assert!(warning.contains(part), "{part} in {warning}");
        }
        server.ok("POST", "/v1/exports/create", json!({"export_id": name, "size": SIZE}));
        let mut disk = Attached::new(&server, name, vec![0; SIZE]);
        disk.write(0, &bytes(1, SIZE));
        assert_eq!(server.ok("POST", &format!("/v1/exports/{name}/snapshot"), Value::Null)["generation"], 1);
        server.stop();
    }

    // It overrides the verdict, and nothing else.
    proxy.set(State::Cut);
    let output = run_to_end(serve(dir.path(), &proxy.endpoint()).arg("--allow-unsafe-store"));
    assert_eq!(output.status.code(), Some(1));
    // Nor does a store that is safe hear of it.
    let safe = TestServer::on_s3(&moto.endpoint(), "disks", &["--allow-unsafe-store"]);
    assert!(!safe.log().contains("UNSAFE"), "{}", safe.log());
}
