//! The main job from start to end, with the real binary and clients that nobody here wrote.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::cast_possible_truncation, missing_docs)]

mod common;

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use common::moto::Moto;
use common::server::{TestServer, nbd_server, run};
use serde_json::{Value, json};

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;

/// A sparse image with data at its start, in its middle, across chunks and at its end.
fn make_image(path: &Path, size: u64) {
    let file = File::create(path).unwrap();
    file.set_len(size).unwrap();
    let mut random = File::open("/dev/urandom").unwrap();
    for (offset, len) in [(0, 9 * MIB), (size / 2 - 3 * MIB, 7 * MIB + 512), (size / 4 + 4096, 4096), (size - MIB, MIB)]
    {
        let mut data = vec![0; len as usize];
        random.read_exact(&mut data).unwrap();
        file.write_all_at(&data, offset).unwrap();
    }
}

fn same(image: &Path, uri: &str, dir: &Path) {
    let copy = dir.join("copy.img");
    run("nbdcopy", &[uri, copy.to_str().unwrap()]);
    run("cmp", &[image.to_str().unwrap(), copy.to_str().unwrap()]);
    std::fs::remove_file(copy).unwrap();
}

fn newcomers_session(server: &mut TestServer) {
    let dir = server.dir().to_owned();
    let (first, second) = (dir.join("first.img"), dir.join("second.img"));
    make_image(&first, GIB);
    server.ok("POST", "/v1/exports/create", json!({"export_id": "vm-1", "size": GIB}));
    let uri = server.nbd_uri("vm-1");
    assert_eq!(run("nbdinfo", &["--size", &uri]).trim(), GIB.to_string());
    run("nbdcopy", &["--flush", first.to_str().unwrap(), &uri]);
    same(&first, &uri, &dir);
    let snapshot = server.ok("POST", "/v1/exports/vm-1/snapshot", Value::Null);
    assert_eq!((&snapshot["snapshot_created"], &snapshot["generation"]), (&json!(true), &json!(1)));

    // More writes: a few bytes in an old chunk, data where there were zeros, zeros where there was data.
    std::fs::copy(&first, &second).unwrap();
    let change = ["write -P 7 1000k 100k", "write -P 8 700M 5M", "write -z 4M 4M", "flush"];
    for target in [uri.as_str(), second.to_str().unwrap()] {
        let mut args = vec!["-f", "raw"];
        change.iter().for_each(|c| args.extend(["-c", c]));
        args.push(target);
        run("qemu-io", &args);
    }
    same(&second, &uri, &dir);

    let clone = json!({"export_id": "vm-2", "source_export_id": "vm-1", "source_snapshot_id": snapshot["snapshot_id"]});
    server.ok("POST", "/v1/exports/clone", clone);
    same(&first, &server.nbd_uri("vm-2"), &dir);
    same(&second, &uri, &dir);

    let compacted = server.ok("POST", "/v1/exports/vm-1/compact", Value::Null);
    assert_eq!(compacted["generation"], json!(2));
    assert_eq!(server.ok("GET", "/v1/exports/vm-1/status", Value::Null)["dirty_chunks"], json!(0));

    server.stop();
    std::fs::remove_dir_all(server.cache_root()).unwrap();
    server.start_again();
    same(&second, &server.nbd_uri("vm-1"), &dir);
    same(&first, &server.nbd_uri("vm-2"), &dir);
    server.stop();
}

#[test]
fn a_newcomers_session_works_on_the_embedded_store() {
    newcomers_session(&mut TestServer::start(&[], &[]));
}

#[test]
fn a_newcomers_session_works_on_s3() {
    let moto = Moto::with_bucket("disks");
    newcomers_session(&mut TestServer::on_s3(&moto.endpoint(), "disks", &[]));
}

#[test]
fn a_clone_of_100_gib_is_ready_at_once_and_zeros_take_no_space() {
    let mut server = TestServer::start(&[], &[]);
    server.ok("POST", "/v1/exports/create", json!({"export_id": "big", "size": 100 * GIB}));
    let uri = server.nbd_uri("big");
    run("qemu-io", &["-f", "raw", "-c", "write -P 1 50G 8M", "-c", "write -z 10G 30M", "-c", "discard 60G 1G", &uri]);
    server.ok("POST", "/v1/exports/big/snapshot", Value::Null);
    let begun = Instant::now();
    server.ok("POST", "/v1/exports/clone", json!({"export_id": "clone", "source_export_id": "big"}));
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    run("qemu-io", &["-f", "raw", "-c", "read -P 1 50G 8M", "-c", "read -P 0 10G 30M", &server.nbd_uri("clone")]);
    for export in ["big", "clone"] {
        let raw = std::fs::metadata(server.cache_root().join(export).join("cache.raw")).unwrap();
        assert_eq!(raw.len(), 100 * GIB);
        assert!(raw.blocks() * 512 <= 9 * MIB, "{export}: {} bytes", raw.blocks() * 512);
    }
    server.stop();
}

#[test]
fn ten_thousand_exports_are_listed_within_ten_seconds_and_a_broken_one_hinders_none() {
    let mut server = TestServer::start(&[], &[]);
    server.stop();
    let store = server.local_root();
    for i in 0..10_000 {
        let folder = store.join(format!("exports/vm-{i:05}"));
        std::fs::create_dir_all(&folder).unwrap();
        let head = format!(r#"{{"version":1,"export_id":"vm-{i:05}","image_size":1073741824,"chunk_size":4194304}}"#);
        let head = if i == 5_000 { "{broken".to_owned() } else { head };
        std::fs::write(folder.join("volume.json"), head).unwrap();
    }
    let begun = Instant::now();
    server.start_again();
    let list = server.ok("GET", "/v1/exports", Value::Null);
    let took = begun.elapsed();
    let list = list.as_array().unwrap();
    assert_eq!(list.len(), 10_000);
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert_eq!((&list[4_999]["state"], &list[5_000]["state"]), (&json!("ready"), &json!("failed")));
    assert!(list[5_000]["reason"].as_str().unwrap().contains("vm-05000/volume.json"));
    run("nbdinfo", &[&server.nbd_uri("vm-09999")]);
    server.stop();
}

/// As somebody who has just installed it: no flag, nothing there before, an ordinary user.
#[test]
fn serve_runs_with_no_flag_at_all() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o777)).unwrap();
    let program = dir.path().join("nbd-server");
    std::fs::copy(env!("CARGO_BIN_EXE_nbd-server"), &program).unwrap();
    let (home, run_dir) = (dir.path().join("home"), dir.path().join("run"));
    for folder in [&home, &run_dir] {
        std::fs::create_dir(folder).unwrap();
        std::fs::set_permissions(folder, PermissionsExt::from_mode(0o777)).unwrap();
    }
    // The server must not run as root here, or it would use the machine's own /var/lib and /run.
    let root = std::fs::metadata("/proc/self").unwrap().uid() == 0;
    let mut command = Command::new(if root { Path::new("setpriv") } else { &program });
    if root {
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&program);
    }
    let mut child = command
        .arg("serve")
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap())
        .env("HOME", &home)
        .env("XDG_RUNTIME_DIR", &run_dir)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    let ready = lines.by_ref().map(Result::unwrap).find(|line| line.contains("ready: ")).expect("a ready line");
    let curl = ready.split_once("create an export: ").unwrap().1.split_once("; attach it").unwrap().0;
    let created: Value = serde_json::from_str(&run("sh", &["-c", &format!("{curl} --silent")])).unwrap();
    assert_eq!(created["export_id"], json!("vm-1"));
    assert_eq!(run("nbdinfo", &["--size", "nbd://127.0.0.1:10809/vm-1"]).trim(), GIB.to_string());
    assert!(home.join(".local/state/nbd-server/store/exports/vm-1/volume.json").exists());
    assert!(home.join(".local/state/nbd-server/cache/vm-1/cache.raw").exists());
    assert!(run_dir.join("nbd-server.sock").exists());
    run("kill", &["-TERM", &child.id().to_string()]);
    assert!(child.wait().unwrap().success());
    assert!(!run_dir.join("nbd-server.sock").exists());
}

#[test]
fn help_names_every_flag_with_its_environment_variable() {
    let help = nbd_server().args(["serve", "--help"]).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    for flag in [
        "cache-root",
        "export-root",
        "listen",
        "tls",
        "tls-cert",
        "tls-key",
        "tls-client-ca",
        "admin-sock",
        "chunk-size",
        "storage-backend",
        "local-root",
        "bucket",
        "endpoint-url",
        "region",
        "r2-account-id",
        "store-timeout",
        "publish-memory",
        "allow-unsafe-store",
    ] {
        assert!(help.contains(&format!("--{flag}")), "{flag}");
        let variable = format!("NBD_SERVER_{}", flag.replace('-', "_").to_uppercase());
        assert!(help.contains(&variable), "{variable}");
    }
}
