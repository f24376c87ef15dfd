//! The commands that go to the store without a server find it by the flags of `serve`, each of them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod common;

use std::fs;
use std::io::Read;
use std::net::TcpListener;
use std::process::{Command, Stdio};

use common::images::{done, image, left_over, offline, refused, same, text};
use common::moto::Moto;
use common::proxy::Proxy;
use common::server::{S3_KEYS, nbd_server};

#[test]
fn a_local_store_is_found_by_flag_variable_and_file() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, back, store) = (image(dir.path()), dir.path().join("back.img"), dir.path().join("store"));
    let there = ["--local-root", text(&store), "--export-root", "tenant/disks", "--storage-backend", "local"];
    let temporary = dir.path().join("temporary");
    fs::create_dir(&temporary).unwrap();
    // A folder of its own for what is not raw; one that is not there is named.
    let stdin = || Stdio::from(fs::File::open(&raw).unwrap());
    let import = ["import", "-", "vm", "--quiet"];
    let nowhere =
        nbd_server().args(import).args(there).args(["--temp-dir", "/nowhere"]).stdin(stdin()).output().unwrap();
    assert_eq!(nowhere.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("--temp-dir /nowhere"));
    let imported = done(nbd_server().args(import).args(there).args(["--temp-dir", text(&temporary)]).stdin(stdin()));
    assert!(store.join("tenant/disks/vm/volume.json").exists() && left_over(&temporary).is_empty());
    let exported = done(nbd_server().args(["export-image", "vm", text(&back), "--quiet"]).args(there));
    assert_eq!(imported.stdout, exported.stdout, "the snapshot's id");
    same(&raw, &back);

    let config = dir.path().join("config.toml");
    let settings = format!("local-root = {:?}\nexport-root = 'tenant/disks'\ncache-root = '/x'\n", text(&store));
    fs::write(&config, settings).unwrap();
    let export = ["export-image", "vm", text(&back), "--force"];
    done(nbd_server().args(export).args(["--config", text(&config)]));
    done(nbd_server().args(export).env("NBD_SERVER_CONFIG", &config));
    let variables = [("NBD_SERVER_LOCAL_ROOT", text(&store)), ("NBD_SERVER_EXPORT_ROOT", "tenant/disks")];
    done(nbd_server().args(export).envs(variables));
    // Without the export root it is another store.
    refused(&mut offline(dir.path(), &export), 1, "storage flags");
    refused(&mut offline(dir.path(), &["import", text(&raw), "b", "--bucket", "disks"]), 2, "--bucket disks");
}

/// The head of the first request that a command makes to the endpoint, which then is gone.
fn first_request(command: &mut Command) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    command.args(["--endpoint-url", &endpoint, "--bucket", "disks", "--store-timeout", "1"]).envs(S3_KEYS);
    let mut child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let (mut stream, _) = listener.accept().unwrap();
    drop(listener);
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") && stream.read(&mut byte).unwrap() == 1 {
        head.push(byte[0]);
    }
    drop(stream);
    child.kill().unwrap();
    child.wait().unwrap();
    String::from_utf8(head).unwrap()
}

#[test]
fn the_region_and_the_account_are_those_of_the_flags() {
    let dir = tempfile::tempdir().unwrap();
    let (raw, back) = (image(dir.path()), dir.path().join("back.img"));
    let (cache, socket) = (dir.path().join("cache"), dir.path().join("admin.sock"));
    for words in [
        &["serve", "--listen", "127.0.0.1:0", "--cache-root", text(&cache), "--admin-sock", text(&socket)][..],
        &["import", text(&raw), "vm"],
        &["export-image", "vm", text(&back)],
    ] {
        let r2 = ["--storage-backend", "r2", "--r2-account-id", "0123456789abcdef0123456789abcdef"];
        for (flags, region) in [
            (&["--storage-backend", "s3"][..], "us-east-1"),
            (&["--storage-backend", "s3", "--region", "eu-central-1"], "eu-central-1"),
            (&r2, "auto"),
        ] {
            let head = first_request(nbd_server().args(words).args(flags));
            assert!(head.contains(&format!("/{region}/s3/aws4_request")), "{words:?} {flags:?}: {head}");
            assert!(head.split(' ').nth(1).unwrap().starts_with("/disks"), "path-style: {head}");
        }
    }
}

#[test]
fn an_import_into_a_store_without_conditions_needs_the_flag_and_an_export_does_not() {
    let moto = Moto::with_bucket("disks");
    let proxy = Proxy::losing_conditions(&moto.endpoint());
    let dir = tempfile::tempdir().unwrap();
    let (raw, back) = (image(dir.path()), dir.path().join("back.img"));
    let s3 = |args: &[&str]| common::images::on_s3(dir.path(), &proxy.endpoint(), args);
    refused(&mut s3(&["import", text(&raw), "vm"]), 1, "not safe to write to");
    let warned = done(&mut s3(&["import", text(&raw), "vm", "--allow-unsafe-store"]));
    assert!(String::from_utf8_lossy(&warned.stderr).contains("UNSAFE"), "{warned:?}");
    done(&mut s3(&["export-image", "vm", text(&back)]));
    done(&mut s3(&["export-image", "vm", text(&back), "--force", "--allow-unsafe-store=false"]));
    same(&raw, &back);
}
