//! The real binary on a disk that is full to the last byte: a small tmpfs in a mount namespace of its own.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, ErrorKind, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use common::attached::{Attached, ENOSPC, bytes};
use common::server::TestServer;
use serde_json::{Value, json};

const KIB: usize = 1 << 10;
const CHUNK: usize = 64 * KIB;
const SIZE: usize = 8 << 20;
/// The disk of the cache root: less than the image.
const DISK: &str = "4m";

/// A tmpfs that only those see who enter the namespace of the process that holds it; gone with that process.
struct SmallDisk {
    holder: Child,
    dir: tempfile::TempDir,
}

impl SmallDisk {
    fn new() -> Self {
        Self::mounted("tmpfs")
    }

    fn mounted(file_system: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut unshare = Command::new("unshare");
        // Without root, as the root of a user namespace.
        unshare.arg(if is_root() { "-m" } else { "-rm" });
        let script = r#"mount -t "$2" -o size="$1" none "$0" && echo mounted && exec sleep infinity"#;
        unshare
            .args(["sh", "-c", script])
            .arg(dir.path())
            .args([DISK, file_system])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let mut holder = unshare.spawn().expect("unshare, of util-linux: run `make setup`");
        let mut line = String::new();
        BufReader::new(holder.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(
            line.trim(),
            "mounted",
            "this test mounts a tmpfs: run it as root, or allow user namespaces (sysctl kernel.unprivileged_userns_clone=1 \
             or kernel.apparmor_restrict_unprivileged_userns=0); a container needs CAP_SYS_ADMIN"
        );
        Self { holder, dir }
    }

    /// A server whose cache root is on the disk.
    fn server(&self) -> TestServer {
        let pid = self.holder.id().to_string();
        let mut launcher = vec!["nsenter", "-t", &pid, "-m"];
        if !is_root() {
            launcher.extend(["-U", "--preserve-credentials"]);
        }
        let launcher = launcher.into_iter().map(str::to_owned).collect();
        let cache_root = self.dir.path().to_str().unwrap();
        let flags = ["--listen", "127.0.0.1:0", "--chunk-size", "64KiB", "--cache-root", cache_root];
        TestServer::start_through(launcher, &flags, &[])
    }

    /// A file that takes all the room there is, as seen from outside of the namespace.
    fn ballast(&self) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.holder.id()));
        root.join(self.dir.path().strip_prefix("/").unwrap()).join("ballast")
    }

    fn fill(&self) {
        let mut file = OpenOptions::new().create(true).append(true).open(self.ballast()).unwrap();
        for len in [CHUNK, 4 * KIB, 1] {
            let piece = vec![0xff; len];
            loop {
                match file.write(&piece) {
                    Ok(_) => {}
                    Err(e) if e.kind() == ErrorKind::StorageFull => break,
                    Err(e) => panic!("{e}"),
                }
            }
        }
    }

    fn make_room(&self) {
        std::fs::remove_file(self.ballast()).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").unwrap().uid() == 0
}

fn status(server: &TestServer) -> Value {
    server.ok("GET", "/v1/exports/disk/status", Value::Null)
}

/// A published image of which a part is dirty, a part resident and a part missing, on a disk that is then filled up.
fn on_a_full_disk(disk: &SmallDisk) -> (TestServer, Attached) {
    let server = disk.server();
    server.ok("POST", "/v1/exports/create", json!({"export_id": "disk", "size": SIZE}));
    let mut client = Attached::new(&server, "disk", vec![0; SIZE]);
    for at in (0..2 << 20).step_by(CHUNK) {
        client.write(at, &bytes(at as u64, CHUNK));
    }
    server.ok("POST", "/v1/exports/disk/snapshot", Value::Null);
    server.ok("POST", "/v1/exports/disk/cache/reset", Value::Null);
    client.check(0, 8 * CHUNK);
    client.write(4 * CHUNK + 10, &bytes(1, 100));
    client.write(40 * CHUNK, &bytes(2, 2 * CHUNK));
    client.flush();
    client.write(50 * CHUNK, &bytes(3, CHUNK));
    disk.fill();
    (server, client)
}

/// Writes that need room, until one finds none. What it would have replaced was zeros, so that nobody has to guess how
/// much of it took place: the test tries again where it ended.
fn write_until_full(client: &mut Attached) -> usize {
    for at in (64 * CHUNK..SIZE).step_by(4 * KIB) {
        match client.try_write(at, &bytes(at as u64, 4 * KIB)) {
            0 => {}
            ENOSPC => return at,
            other => panic!("error {other}"),
        }
    }
    panic!("the disk does not get full");
}

#[test]
fn a_full_disk_costs_no_data_even_if_the_server_dies_on_it() {
    let disk = SmallDisk::new();
    let (mut server, mut client) = on_a_full_disk(&disk);
    let refused_at = write_until_full(&mut client);
    // In place, in what is there already; and what was never here.
    client.write(40 * CHUNK + 7, &bytes(4, 1000));
    client.check(0, refused_at);
    client.flush();
    // What a publish writes here has its room, however often: as do the writes to what is here already.
    for round in 0..60 {
        let published = server.ok("POST", "/v1/exports/disk/snapshot", Value::Null);
        assert_eq!((&published["snapshot_created"], &status(&server)["dirty_chunks"]), (&json!(true), &json!(0)));
        client.write(40 * CHUNK + 7, &bytes(round, 1000));
        client.flush();
    }
    server.ok("POST", "/v1/exports/disk/compact", Value::Null);
    client.write(4 * CHUNK + 10, &bytes(8, 100));
    client.write(40 * CHUNK + 9, &bytes(9, 1000));
    let full = status(&server);
    assert_eq!((&full["state"], &full["operation_state"]), (&json!("degraded"), &json!("idle")), "{full}");
    assert!(full["faults"].as_array().unwrap().iter().any(|fault| fault["cause"] == "no-space"), "{full}");
    assert_eq!(server.log().matches("writes are refused until there is").count(), 1, "{}", server.log());
    assert_eq!(client.try_write(refused_at, &bytes(5, CHUNK)), ENOSPC);
    client.check(0, refused_at);
    client.flush();

    server.kill9();
    disk.make_room();
    server.start_again();
    client.move_to(&server);
    client.check(0, refused_at);
    client.write(refused_at, &bytes(6, CHUNK));
    client.flush();
    client.check(0, refused_at + CHUNK);
    server.ok("POST", "/v1/exports/disk/snapshot", Value::Null);
    assert_eq!(status(&server)["dirty_chunks"], 0);
    client.check(0, refused_at + CHUNK);

    // From the store alone.
    server.ok("POST", "/v1/exports/disk/cache/reset", Value::Null);
    client.check(0, 16 * CHUNK);
    client.check(40 * CHUNK, 16 * CHUNK);
    client.check(refused_at, CHUNK);
    server.stop();
}

#[test]
fn a_server_that_dies_on_a_full_disk_starts_reads_and_flushes_on_it_again() {
    let disk = SmallDisk::new();
    let (mut server, mut client) = on_a_full_disk(&disk);
    let refused_at = write_until_full(&mut client);
    for _ in 0..2 {
        server.kill9();
        disk.fill();
        server.start_again();
        assert_eq!(status(&server)["state"], "ready");
        client.move_to(&server);
        client.check(0, refused_at);
        client.flush();
    }
    assert_eq!(client.try_write(refused_at, &bytes(5, CHUNK)), ENOSPC);
    client.flush();
    assert_eq!(status(&server)["state"], "degraded");
    disk.make_room();
    client.write(refused_at, &bytes(6, CHUNK));
    assert_eq!(status(&server)["state"], "ready");
    server.wait_for_log("there is space again");
    assert_eq!(server.log().matches("there is space again").count(), 1, "{}", server.log());
    client.flush();
    client.check(0, refused_at + CHUNK);
    server.stop();
}

#[test]
fn a_trim_of_the_cache_on_a_full_disk_makes_room_to_write_on() {
    let disk = SmallDisk::new();
    let (mut server, mut client) = on_a_full_disk(&disk);
    let refused_at = write_until_full(&mut client);
    let full = status(&server);
    assert!(full["cache_free_bytes"].as_u64().unwrap() < CHUNK as u64, "{full}");
    let trimmed = server.ok("POST", "/v1/exports/disk/cache/trim", Value::Null);
    // Eight chunks were read, one of which was written to.
    let freed = trimmed["freed_bytes"].as_u64().unwrap();
    assert!(freed >= 7 * CHUNK as u64 && trimmed["cache_free_bytes"].as_u64().unwrap() >= freed, "{trimmed}");
    let after = status(&server);
    assert_eq!((&after["state"], &after["dirty_chunks"]), (&json!("ready"), &full["dirty_chunks"]), "{after}");
    server.wait_for_log("there is space again");
    client.write(refused_at, &bytes(5, CHUNK));
    client.flush();
    // Publishing makes the rest droppable, again and again.
    for round in 6..9 {
        disk.fill();
        server.ok("POST", "/v1/exports/disk/snapshot", Value::Null);
        server.ok("POST", "/v1/exports/disk/cache/trim", Value::Null);
        assert_eq!(status(&server)["resident_chunks"], 0);
        client.write(refused_at, &bytes(round, 2 * CHUNK));
        client.flush();
    }
    server.kill9();
    disk.make_room();
    server.start_again();
    client.move_to(&server);
    client.check(0, refused_at + 2 * CHUNK);
    server.stop();
}

/// ramfs has neither holes to punch nor space to take ahead.
#[test]
fn a_file_system_without_holes_serves_a_cache() {
    let disk = SmallDisk::mounted("ramfs");
    let mut server = disk.server();
    server.ok("POST", "/v1/exports/create", json!({"export_id": "disk", "size": SIZE}));
    let mut client = Attached::new(&server, "disk", vec![0; SIZE]);
    // What lies there means nothing after the reset, and must not shine through.
    client.write(0, &bytes(1, 8 * CHUNK));
    server.ok("POST", "/v1/exports/disk/snapshot", Value::Null);
    client.write(0, &bytes(2, 8 * CHUNK));
    server.ok("POST", "/v1/exports/disk/cache/reset", Value::Null);
    client.image[..8 * CHUNK].copy_from_slice(&bytes(1, 8 * CHUNK));
    client.check_all();
    for (from, len) in [(10, 100), (CHUNK, CHUNK), (3 * CHUNK - 7, CHUNK + 20)] {
        client.zero(from, len);
        client.check_all();
    }
    // Into zeros that were a whole chunk of other bytes.
    client.write(CHUNK + 5, &bytes(3, 10));
    client.check_all();
    client.flush();
    server.ok("POST", "/v1/exports/disk/snapshot", Value::Null);
    server.kill9();
    server.start_again();
    client.move_to(&server);
    client.check_all();
    server.stop();
}
