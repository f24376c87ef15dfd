//! What the real server's memory is bounded by, whatever it is asked.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::cast_possible_truncation, missing_docs)]

mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use common::memory::{anonymous_bytes, huge_bytes, peak_bytes};
use common::moto::Moto;
use common::nbd::{MIB, Raw, batch};
use common::server::{TestServer, run};
use nbd_server::nbd::wire::{Mode, cmd};
use serde_json::{Value, json};

const CONNECTIONS: usize = 1_000;

/// Attaches to `disk` without asking for anything.
fn attach(server: &TestServer) -> Raw {
    let mut client = Raw::connect_to(&server.nbd_address());
    client.negotiate("disk", Mode::Simple);
    client
}

/// Lets all clients write, and then read, as busy ones do: each sends its requests before any is waited for.
fn work(clients: &mut [Raw]) {
    for kind in [cmd::WRITE, cmd::READ] {
        let owed: Vec<usize> = clients
            .iter_mut()
            .map(|client| {
                let (requests, replies) = batch(client, kind);
                client.send(&requests);
                replies
            })
            .collect();
        for (client, owed) in clients.iter_mut().zip(owed) {
            client.stream.read_exact(&mut vec![0; owed]).unwrap();
        }
    }
}

#[test]
fn no_memory_is_in_huge_pages_of_which_a_byte_takes_two_mebibytes() {
    let mut server = TestServer::start(&["--listen", "127.0.0.1:0"], &[]);
    server.ok("POST", "/v1/exports/create", json!({"export_id": "disk", "size": 64 * MIB}));
    let mut client = attach(&server);
    for at in (0..64 * MIB).step_by(MIB as usize) {
        client.write(at, &[1; MIB as usize]);
    }
    // Two are taken before the program can say so.
    let huge = huge_bytes(server.pid()) / MIB;
    assert!(huge <= 4, "{huge} MiB in huge pages");
    server.stop();
}

#[test]
fn heads_full_of_fields_of_other_tools_take_no_memory_once_they_are_read() {
    const HEADS: u64 = 300;
    let mut server = TestServer::start(&["--listen", "127.0.0.1:0"], &[]);
    let before = anonymous_bytes(server.pid());
    server.stop();
    let note = "x".repeat(MIB as usize - 4096);
    for i in 0..HEADS {
        let folder = server.local_root().join(format!("exports/vm-{i}"));
        std::fs::create_dir_all(&folder).unwrap();
        let head =
            json!({"version": 1, "export_id": format!("vm-{i}"), "image_size": 4096, "chunk_size": 4096, "note": note});
        std::fs::write(folder.join("volume.json"), head.to_string()).unwrap();
    }
    server.start_again();
    let patience = Instant::now() + Duration::from_secs(60);
    let known = || server.ok("GET", "/v1/status", json!({}))["exports"]["ready"] == HEADS;
    while !known() && Instant::now() < patience {
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(known());
    let more = anonymous_bytes(server.pid()).saturating_sub(before) / MIB;
    assert!(more < HEADS / 3, "{more} MiB more");
    server.stop();
}

#[test]
fn what_a_publish_writes_to_a_directory_takes_no_place_in_the_page_cache() {
    let store = tempfile::tempdir_in("/var/tmp").unwrap();
    let root = store.path().to_str().unwrap();
    let kind = run("stat", &["-f", "-c", "%T", root]);
    let disk = ["ext2/ext3", "xfs"].contains(&kind.trim());
    assert!(disk, "this test needs /var/tmp on ext4 or XFS, since only there the page cache is passed by: {kind}");
    let mut server =
        TestServer::start(&["--listen", "127.0.0.1:0", "--storage-backend", "local", "--local-root", root], &[]);
    server.ok("POST", "/v1/exports/create", json!({"export_id": "disk", "size": 64 * MIB}));
    let mut client = attach(&server);
    for at in (0..64 * MIB).step_by(MIB as usize) {
        client.write(at, &[1; MIB as usize]);
    }
    for operation in ["snapshot", "compact"] {
        server.ok("POST", &format!("/v1/exports/disk/{operation}"), json!({}));
    }
    server.stop();
    let files = run("find", &[root, "-type", "f", "-size", "+32M"]);
    assert_eq!(files.lines().count(), 2, "a delta and a base: {files}");
    for blob in files.lines() {
        let resident = run("fincore", &["--bytes", "--noheadings", "--output", "RES", blob]);
        assert!(resident.trim().parse::<u64>().unwrap() <= MIB, "{blob}: {resident} bytes");
    }
}

#[test]
fn a_thousand_idle_connections_cost_less_than_50_mib_before_and_after_they_had_work() {
    let mut server = TestServer::start(&["--listen", "127.0.0.1:0"], &[]);
    server.ok("POST", "/v1/exports/create", json!({"export_id": "disk", "size": MIB}));
    work(&mut [attach(&server)]);
    let before = anonymous_bytes(server.pid());
    let more = || anonymous_bytes(server.pid()).saturating_sub(before) / MIB;
    let mut clients: Vec<Raw> = (0..CONNECTIONS).map(|_| attach(&server)).collect();
    assert!(more() < 50, "{} MiB more for connections that had no work yet", more());
    work(&mut clients);
    // What was needed for the last reply goes back after it was sent.
    let patience = Instant::now() + Duration::from_secs(5);
    while more() >= 50 && Instant::now() < patience {
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(more() < 50, "{} MiB more for connections that had work once", more());
    drop(clients);
    server.stop();
}

#[test]
fn a_thousand_half_requests_cost_less_than_50_mib_whatever_their_memory_was_used_for_before() {
    let mut server = TestServer::start(&["--listen", "127.0.0.1:0"], &[]);
    server.ok("POST", "/v1/exports/create", json!({"export_id": "disk", "size": MIB}));
    let mut reader = attach(&server);
    reader.read(0, MIB);
    let before = anonymous_bytes(server.pid());
    let mut clients: Vec<Raw> = (0..CONNECTIONS).map(|_| attach(&server)).collect();
    for client in &mut clients {
        let (requests, _) = batch(client, cmd::WRITE);
        client.send(&requests[..100]);
        // Its pages are those that the next client gets, if all of them are used again.
        reader.read(0, MIB);
    }
    let more = anonymous_bytes(server.pid()).saturating_sub(before) / MIB;
    assert!(more < 50, "{more} MiB more");
    drop(clients);
    server.stop();
}

#[test]
fn an_export_of_16_tib_with_nothing_resident_costs_less_than_32_mib() {
    let mut server = TestServer::start(&["--listen", "127.0.0.1:0"], &[]);
    // All but its last chunk: ext4 holds no longer file.
    let size = (16 << 40) - 4 * MIB;
    server.ok("POST", "/v1/exports/create", json!({"export_id": "disk", "size": size}));
    let uri = server.nbd_uri("disk");
    run("qemu-io", &["-f", "raw", "-c", "read -P 0 15T 1M", &uri]);
    let created = anonymous_bytes(server.pid()) / MIB;
    assert!(created < 32, "{created} MiB");
    // Nothing of the work of creating it is left, either.
    server.stop();
    server.start_again();
    run("qemu-io", &["-f", "raw", "-c", "read -P 0 15T 1M", &server.nbd_uri("disk")]);
    let opened = anonymous_bytes(server.pid()) / MIB;
    assert!(opened < 32, "{opened} MiB");
    server.stop();
}

/// The most memory a server had, in MiB, that published a snapshot of 700 MiB.
fn peak_of_a_large_snapshot(args: &[&str]) -> u64 {
    let moto = Moto::with_bucket("disks");
    let mut server = TestServer::on_s3(&moto.endpoint(), "disks", args);
    let size = 700 * MIB;
    let image = server.dir().join("large.img");
    let mut file = File::create(&image).unwrap();
    let mut block = vec![0u8; MIB as usize];
    for i in 0..size / MIB {
        block.fill(i as u8 | 1);
        file.write_all(&block).unwrap();
    }
    server.ok("POST", "/v1/exports/create", json!({"export_id": "large", "size": size}));
    // One request at a time: what clients send has a bound of its own.
    run("nbdcopy", &["-C1", "-R1", image.to_str().unwrap(), &server.nbd_uri("large")]);
    server.ok("POST", "/v1/exports/large/snapshot", Value::Null);
    let peak = peak_bytes(server.pid());
    server.stop();
    peak / MIB
}

#[test]
fn a_large_snapshot_uploads_as_a_stream_in_bounded_memory() {
    let peak = peak_of_a_large_snapshot(&[]);
    assert!(peak < 256 + 80, "{peak} MiB");
}

#[test]
fn the_memory_of_publishes_is_as_much_as_was_allowed() {
    let peak = peak_of_a_large_snapshot(&["--publish-memory", "32MiB"]);
    assert!(peak < 32 + 80, "{peak} MiB");
}
