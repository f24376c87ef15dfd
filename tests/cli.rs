//! The command line of the real binary: what a user gets wrong, what the machine says no to, and how it all ends.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use common::server::{S3_KEYS, TestServer, nbd_server, run_to_end};
use serde_json::{Value, json};

/// A `serve` that would work, in a directory of its own, with further flags.
fn serve(dir: &Path, args: &[&str]) -> Command {
    let mut command = nbd_server();
    command.arg("serve").env("HOME", dir).env("XDG_RUNTIME_DIR", dir.join("run"));
    let given = |flag: &str| args.iter().any(|arg| arg.starts_with(flag));
    for (flag, name) in [("--cache-root", "cache"), ("--admin-sock", "run/admin.sock"), ("--local-root", "store")] {
        let local = !given("--storage-backend") && !args.contains(&"--local-root=");
        if !given(flag) && (flag != "--local-root" || local) {
            command.arg(flag).arg(dir.join(name));
        }
    }
    if !given("--listen") {
        command.args(["--listen", "127.0.0.1:0"]);
    }
    command.args(args);
    command
}

/// Runs a start that must fail: the status, then the text, which names all of `parts`.
#[track_caller]
fn refused(command: &mut Command, status: i32, parts: &[&str]) -> String {
    let output = run_to_end(command);
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{text}");
    assert!(output.stdout.is_empty(), "errors belong on stderr");
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in: {text}");
    }
    text
}

/// A refusal by the machine: status 1, one line, and no trace in the directory.
#[track_caller]
fn refused_by_the_machine(dir: &Path, args: &[&str], parts: &[&str]) {
    refused_by_the_machine_with(&mut serve(dir, args), dir, parts);
}

#[track_caller]
fn refused_by_the_machine_with(command: &mut Command, dir: &Path, parts: &[&str]) {
    let before = tree(dir);
    let text = refused(command, 1, parts);
    assert_eq!(text.lines().count(), 1, "one line: {text}");
    assert!(text.starts_with("error: "), "{text}");
    assert_eq!(tree(dir), before, "nothing half-made is left behind");
}

/// Every path below a directory, sorted.
fn tree(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut left = vec![dir.to_owned()];
    while let Some(next) = left.pop() {
        for entry in fs::read_dir(next).unwrap() {
            let entry = entry.unwrap();
            if entry.file_type().unwrap().is_dir() {
                left.push(entry.path());
            }
            found.push(entry.path());
        }
    }
    found.sort();
    found
}

#[test]
fn a_usage_error_ends_with_status_2_names_the_value_and_creates_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for (args, parts) in [
        (&["--frobnicate"][..], &["--frobnicate", "--help"][..]),
        (&["--cache-rot=/x"], &["--cache-rot", "--cache-root"]),
        (&["extra"], &["extra"]),
        (&["--chunk-size=5000"], &["5000", "power of two", "4194304"]),
        (&["--chunk-size=4MB"], &["4MB", "MiB"]),
        (&["--chunk-size=0"], &["'0'", "power of two"]),
        (&["--storage-backend=s3"], &["s3", "--bucket", "name a bucket"]),
        (&["--storage-backend=gcs", "--bucket="], &["gcs", "--bucket"]),
        (&["--storage-backend=azure"], &["azure", "--bucket"]),
        (&["--storage-backend=r2", "--bucket=b"], &["r2", "--r2-account-id", "--endpoint-url"]),
        (&["--storage-backend=floppy"], &["floppy", "local, s3, r2, gcs, azure, memory"]),
        (&["--storage-backend=s3", "--bucket=s3://b/x"], &["s3://b/x", "--bucket"]),
        (&["--storage-backend=s3", "--bucket=b", "--endpoint-url=localhost:9000"], &["localhost:9000", "http://"]),
        (&["--bucket=b"], &["--bucket b", "local", "s3"]),
        (&["--export-root=/x"], &["/x", "--export-root", "slash"]),
        (&["--export-root=../x"], &["../x", "--export-root"]),
        (&["--listen=10809"], &["10809", "--listen", "unix:"]),
        (&["--listen=127.0.0.1:99999"], &["127.0.0.1:99999"]),
        (&["--tls=maybe"], &["maybe", "--tls", "off, on, required"]),
        (&["--tls=on"], &["--tls on", "--tls-cert", "name a PEM file"]),
        (&["--tls=required", "--tls-cert=/c.pem"], &["--tls required", "--tls-key"]),
        (&["--tls-cert=/c.pem"], &["--tls-cert /c.pem", "--tls off", "--tls on"]),
        (&["--allow-unsafe-store=perhaps"], &["perhaps", "--allow-unsafe-store"]),
        (&["--store-timeout=never"], &["never", "--store-timeout"]),
        (&["--log-level=loud"], &["loud", "error, warn, info, debug, trace"]),
    ] {
        // With credentials, so that what is refused is the flag.
        let keys = [("AWS_ACCESS_KEY_ID", "x"), ("AWS_SECRET_ACCESS_KEY", "y")];
        refused(serve(dir.path(), args).envs(keys), 2, parts);
        assert_eq!(tree(dir.path()), Vec::<PathBuf>::new(), "{args:?}");
    }
    let long = format!("--admin-sock=/{}", "s".repeat(107));
    refused(&mut serve(dir.path(), &[&long]), 2, &["--admin-sock", "107", "shorter"]);
    refused(&mut nbd_server(), 2, &["Usage", "serve"]);
}

#[test]
fn a_variable_works_like_its_flag_and_the_flag_wins() {
    let dir = tempfile::tempdir().unwrap();
    let chunk = [("NBD_SERVER_CHUNK_SIZE", "12345")];
    refused(serve(dir.path(), &[]).envs(chunk), 2, &["12345", "--chunk-size"]);
    let server = TestServer::start(&["--chunk-size=64K"], &chunk);
    server.ok("POST", "/v1/exports/create", json!({"export_id": "vm", "size": 65537}));
    assert_eq!(server.ok("GET", "/v1/exports/vm/status", Value::Null)["chunk_count"], 2);
}

#[test]
fn help_and_version_end_with_status_0() {
    for args in [&["--help"][..], &["--version"], &["serve", "--help"]] {
        let output = run_to_end(nbd_server().args(args));
        assert_eq!(output.status.code(), Some(0));
        assert!(output.stderr.is_empty() && !output.stdout.is_empty());
    }
}

#[test]
fn a_cache_root_that_cannot_be_written_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    for path in [file.clone(), file.join("below"), "/proc/nowhere/cache".into()] {
        let path = path.to_str().unwrap();
        refused_by_the_machine(dir.path(), &["--cache-root", path], &["--cache-root", path, "may write"]);
        refused_by_the_machine(dir.path(), &["--local-root", path], &["--local-root", path, "may write"]);
    }
    let below = file.join("admin.sock");
    let below = below.to_str().unwrap();
    refused_by_the_machine(dir.path(), &["--admin-sock", below], &["--admin-sock", below, "may write"]);
}

#[test]
fn a_taken_port_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    refused_by_the_machine(dir.path(), &["--listen", &addr], &["--listen", &addr, "in use", "another address"]);
    // The first address is given up again when the second one fails.
    let socket = format!("unix:{}", dir.path().join("nbd.sock").display());
    refused_by_the_machine(dir.path(), &["--listen", &socket, "--listen", &addr], &[&addr]);
}

#[test]
fn a_certificate_that_cannot_be_read_or_used_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("c.pem");
    fs::write(&file, "no certificate").unwrap();
    let cert = format!("--tls-cert={}", file.display());
    let tls = ["--tls=required", &cert, "--tls-key=/nowhere/k.pem"];
    refused_by_the_machine(dir.path(), &tls, &["--tls-cert", "c.pem", "holds no certificate"]);
    fs::remove_file(&file).unwrap();
    refused_by_the_machine(dir.path(), &tls, &["--tls-cert", "c.pem", "cannot be read", "No such file"]);
}

#[test]
fn a_cache_root_of_a_running_server_is_refused_and_that_server_goes_on() {
    let server = TestServer::start(&[], &[]);
    server.ok("POST", "/v1/exports/create", json!({"export_id": "vm", "size": 1}));
    let dir = tempfile::tempdir().unwrap();
    let root = server.cache_root();
    let root = root.to_str().unwrap();
    refused_by_the_machine(dir.path(), &["--cache-root", root], &["--cache-root", root, "another nbd-server"]);
    let socket = server.socket();
    let socket = socket.to_str().unwrap();
    refused_by_the_machine(dir.path(), &["--admin-sock", socket], &["--admin-sock", socket, "running server"]);
    server.ok("GET", "/v1/exports/vm/status", Value::Null);
}

#[test]
fn an_admin_path_that_is_a_file_is_refused_and_kept() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("notes");
    fs::write(&file, "mine").unwrap();
    let path = file.to_str().unwrap();
    refused_by_the_machine(dir.path(), &["--admin-sock", path], &[path, "no socket"]);
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
}

#[test]
fn missing_credentials_are_said_at_once_and_a_store_that_is_away_within_store_timeout() {
    let dir = tempfile::tempdir().unwrap();
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let endpoint = format!("--endpoint-url=http://{closed}");
    let s3 = ["--storage-backend=s3", "--bucket=b", &endpoint, "--store-timeout=2"];
    refused_by_the_machine(dir.path(), &s3, &["credentials", "AWS_ACCESS_KEY_ID"]);
    let secret = "not-to-be-seen";
    let keys = [("AWS_ACCESS_KEY_ID", "id"), ("AWS_SECRET_ACCESS_KEY", secret)];
    let before = tree(dir.path());
    let started = Instant::now();
    let told = "the store does not answer yet, trying for up to 2 s";
    let parts = [told, "error: ", &closed.to_string(), "attempts", "network"];
    let text = refused(serve(dir.path(), &s3).envs(keys), 1, &parts);
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
    assert_eq!(text.lines().count(), 3, "it is told once, with the reason, and then the error: {text}");
    assert_eq!(tree(dir.path()), before);
    assert!(!text.contains(secret));
}

#[test]
fn a_server_starts_serves_and_stops_without_a_trace_of_its_sockets() {
    let mut server = TestServer::start(&["--storage-backend=memory"], &[]);
    let mode = fs::metadata(server.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let line = server.wait_for_log("ready: ");
    for part in ["curl --unix-socket", "/v1/exports/create", "nbd-client", "nbdcopy", &server.nbd_uri("vm-1")] {
        assert!(line.contains(part), "{part} in {line}");
    }
    assert!(TcpStream::connect(server.nbd_address()).is_ok());
    server.stop();
    assert!(!server.socket().exists());
    assert!(!server.cache_root().join(".lock").exists());
}

#[test]
fn the_curl_command_of_the_ready_line_creates_an_export() {
    let server = TestServer::start(&[], &[]);
    let line = server.wait_for_log("ready: ");
    let start = line.find("curl ").unwrap();
    let curl = line[start..].split("; ").next().unwrap();
    let output = Command::new("sh").args(["-c", &format!("{curl} --silent --show-error")]).output().unwrap();
    let answer: Value = serde_json::from_slice(&output.stdout).expect("JSON from curl");
    assert_eq!((&answer["export_id"], &answer["image_size"]), (&json!("vm-1"), &json!(1 << 30)));
}

#[test]
fn a_socket_that_a_crash_left_behind_is_replaced() {
    let mut server = TestServer::start(&[], &[]);
    server.kill9();
    assert!(server.socket().exists());
    server.start_again();
    server.ok("GET", "/v1/exports", Value::Null);
    server.stop();
    drop(UnixListener::bind(server.socket()).unwrap());
    server.start_again();
    server.ok("GET", "/v1/exports", Value::Null);
}

#[test]
fn every_address_given_is_served() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("nbd.sock");
    let listen = format!("--listen=unix:{},127.0.0.1:0", socket.display());
    let mut server = TestServer::start(&[&listen], &[]);
    assert!(server.nbd_uri("vm").ends_with(&format!("/vm?socket={}", socket.display())));
    assert!(UnixStream::connect(&socket).is_ok());
    assert!(server.wait_for_log("ready: ").contains(" nbd://127.0.0.1:"));
    server.stop();
    assert!(!socket.exists());
}

#[test]
fn ctrl_c_stops_as_cleanly_as_sigterm() {
    let mut server = TestServer::start(&["--log-level=debug"], &[]);
    server.signal(2);
    assert_eq!(server.wait().code(), Some(0));
}

/// A `create` whose body has not come yet, and which the server is known to wait for.
fn half_a_request(server: &TestServer) -> (UnixStream, &'static str) {
    let body = r#"{"export_id":"late","size":4096}"#;
    let mut stream = common::http::connect(&server.socket());
    let head = "POST /v1/exports/create HTTP/1.1\r\nhost: x\r\nexpect: 100-continue\r\n";
    write!(stream, "{head}content-length: {}\r\n\r\n", body.len()).unwrap();
    let mut go_on = [0; 25];
    stream.read_exact(&mut go_on).unwrap();
    assert_eq!(&go_on, b"HTTP/1.1 100 Continue\r\n\r\n");
    (stream, body)
}

#[test]
fn a_stop_answers_what_was_accepted_and_takes_nothing_new() {
    let mut server = TestServer::start(&[], &[]);
    let (mut stream, body) = half_a_request(&server);
    server.signal(15);
    server.wait_for_log("SIGTERM");
    let deadline = Instant::now() + Duration::from_secs(10);
    while UnixStream::connect(server.socket()).is_ok() || TcpStream::connect(server.nbd_address()).is_ok() {
        assert!(Instant::now() < deadline, "still taking clients");
    }
    stream.write_all(body.as_bytes()).unwrap();
    assert_eq!(common::http::read_response(&mut BufReader::new(stream)).unwrap().status, 201);
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn a_second_signal_ends_the_server_at_once_with_status_1() {
    let mut server = TestServer::start(&[], &[]);
    let _waiting = half_a_request(&server);
    server.signal(15);
    server.wait_for_log("SIGTERM");
    let started = Instant::now();
    server.signal(2);
    assert_eq!(server.wait().code(), Some(1));
    assert!(started.elapsed() < Duration::from_secs(5), "{:?}", started.elapsed());
    server.start_again();
    server.stop();
}

#[test]
fn a_stop_does_not_wait_for_clients_that_say_nothing() {
    let mut server = TestServer::start(&[], &[]);
    let _admin = UnixStream::connect(server.socket()).unwrap();
    let _nbd = TcpStream::connect(server.nbd_address()).unwrap();
    let started = Instant::now();
    server.stop();
    assert!(started.elapsed() < Duration::from_secs(20), "{:?}", started.elapsed());
}

#[test]
fn errors_alone_are_logged_at_level_error() {
    // Nobody could wait for the ready line here, so this one waits for the socket.
    let dir = tempfile::tempdir().unwrap();
    let mut child = serve(dir.path(), &["--log-level=error"]).stderr(std::process::Stdio::piped()).spawn().unwrap();
    let socket = dir.path().join("run/admin.sock");
    while UnixStream::connect(&socket).is_err() {
        assert!(child.try_wait().unwrap().is_none());
        std::thread::sleep(Duration::from_millis(5));
    }
    let status = Command::new("kill").arg(child.id().to_string()).status().unwrap();
    assert!(status.success());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), String::from_utf8(output.stderr).unwrap()), (Some(0), String::new()));
}

fn mode_and_group(path: &Path) -> (u32, u32) {
    let found = fs::metadata(path).unwrap();
    (found.permissions().mode() & 0o777, found.gid())
}

#[test]
fn image_data_is_for_its_owner_alone_and_a_start_narrows_what_is_wider() {
    let mut server = TestServer::start(&[], &[]);
    let (cache, store) = (server.cache_root(), server.local_root());
    for folder in [&cache, &store] {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755)).unwrap();
    }
    server.ok("POST", "/v1/exports/create", json!({"export_id": "vm", "size": 1 << 20}));
    let of_cache = ["vm", "vm/cache.raw", "vm/cache.meta"].map(|name| cache.join(name));
    let of_store = ["exports", "exports/vm", "exports/vm/volume.json"].map(|name| store.join(name));
    let images: Vec<_> = of_cache.into_iter().chain(of_store).collect();
    for path in &images {
        let wanted = if path.is_dir() { 0o700 } else { 0o600 };
        assert_eq!(mode_and_group(path).0, wanted, "{}", path.display());
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }
    assert!(!server.log().contains("had access to"));
    server.stop();
    server.start_again();
    for path in &images {
        assert_eq!(mode_and_group(path).0 & 0o077, 0, "{}", path.display());
    }
    let log = server.log();
    for part in
        ["--cache-root: other users of this machine had access to 3 files and folders", "--local-root: other users"]
    {
        assert_eq!(log.matches(part).count(), 1, "{part} in {log}");
    }
    for root in [&cache, &store] {
        assert_eq!(mode_and_group(root).0, 0o755, "the roots themselves are the user's");
    }
}

#[test]
fn the_admin_socket_is_for_a_group_only_if_one_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("run/deep/admin.sock");
    let flag = format!("--admin-sock={}", socket.display());
    let own = fs::metadata(dir.path()).unwrap().gid();
    // As root any group will do; everybody else has one of their own to give.
    let gid = if own == 0 { 7 } else { own };
    for (group, socket_mode, folder_mode) in [(None, 0o600, 0o700), (Some(gid), 0o660, 0o750)] {
        let named = group.map(|gid| format!("--admin-group={gid}"));
        let args: Vec<_> = [Some(flag.as_str()), named.as_deref()].into_iter().flatten().collect();
        let mut child = serve(dir.path(), &args).stderr(std::process::Stdio::null()).spawn().unwrap();
        while UnixStream::connect(&socket).is_err() {
            assert!(child.try_wait().unwrap().is_none());
            std::thread::sleep(Duration::from_millis(5));
        }
        let expected_group = group.unwrap_or(own);
        assert_eq!(mode_and_group(&socket), (socket_mode, expected_group));
        for folder in ["run", "run/deep"] {
            assert_eq!(mode_and_group(&dir.path().join(folder)), (folder_mode, expected_group), "{folder}");
        }
        child.kill().unwrap();
        child.wait().unwrap();
        fs::remove_dir_all(dir.path().join("run")).unwrap();
    }
    // By name, too.
    let name = fs::read_to_string("/etc/group").unwrap();
    let of_root = name.lines().find(|line| line.split(':').nth(2) == Some("0")).unwrap().split(':').next().unwrap();
    if own == 0 {
        let server = TestServer::start(&[&format!("--admin-group={of_root}")], &[]);
        assert_eq!(mode_and_group(&server.socket()), (0o660, 0));
    }
    let empty = tempfile::tempdir().unwrap();
    refused_by_the_machine(empty.path(), &["--admin-group=nobody-knows-it"], &["nobody-knows-it", "getent group"]);
}

#[test]
fn a_group_that_cannot_pass_through_the_folder_is_warned_of() {
    let dir = tempfile::tempdir().unwrap();
    let gid = fs::metadata(dir.path()).unwrap().gid();
    fs::create_dir(dir.path().join("run")).unwrap();
    fs::set_permissions(dir.path().join("run"), fs::Permissions::from_mode(0o700)).unwrap();
    let mut command = serve(dir.path(), &[&format!("--admin-group={gid}")]);
    let mut child = command.stderr(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    let said: Vec<_> = lines.by_ref().take_while(|line| !line.contains("ready: ")).collect();
    child.kill().unwrap();
    child.wait().unwrap();
    assert!(said.iter().any(|line| line.contains("cannot pass through") && line.contains("chmod g+x")), "{said:?}");
    assert_eq!(mode_and_group(&dir.path().join("run")).0, 0o700, "what was there stays as it is");
}

#[test]
fn systemd_is_told_that_the_server_is_ready_lives_and_stops() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("notify");
    let told = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
    told.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let env = [("NOTIFY_SOCKET", path.to_str().unwrap()), ("WATCHDOG_USEC", "100000")];
    let mut server = TestServer::start(&[], &env);
    let next = || {
        let mut buf = [0; 256];
        let len = told.recv(&mut buf).unwrap();
        String::from_utf8(buf[..len].to_vec()).unwrap().trim().to_owned()
    };
    assert_eq!(next(), "READY=1");
    let started = Instant::now();
    for _ in 0..4 {
        assert_eq!(next(), "WATCHDOG=1");
    }
    assert!(started.elapsed() >= Duration::from_millis(100), "a beat at half of the time, not all at once");
    server.signal(15);
    while next() != "STOPPING=1" {}
    assert_eq!(server.wait().code(), Some(0));
}

/// A library that sets the clock of a process back to 1969.
fn clock_before_1970(dir: &Path) -> PathBuf {
    let (source, library) = (dir.join("clock.c"), dir.join("clock.so"));
    let text = "#define _GNU_SOURCE
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t id, struct timespec *now) {
    int failed = syscall(SYS_clock_gettime, id, now);
    if (!failed && id == CLOCK_REALTIME) now->tv_sec = now->tv_sec % 1000 - 100000;
    return failed;
}";
    fs::write(&source, text).unwrap();
    let mut cc = Command::new("cc");
    cc.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(&source);
    assert!(cc.status().unwrap().success());
    library
}

#[test]
fn a_clock_before_1970_is_refused_at_the_start_and_no_panic() {
    let dir = tempfile::tempdir().unwrap();
    let library = clock_before_1970(dir.path());
    let said = ["the system's clock is set to a date before 1970: set the clock"];
    let s3 = ["--storage-backend=s3", "--bucket=disks", "--endpoint-url=http://127.0.0.1:9"];
    for args in [&s3[..], &[]] {
        let mut start = serve(dir.path(), args);
        let text = refused(start.envs(S3_KEYS).env("LD_PRELOAD", &library), 1, &said);
        assert!(!text.contains("panicked"), "{text}");
    }
    let import = ["import", library.to_str().unwrap(), "vm", "--local-root", dir.path().to_str().unwrap()];
    refused(nbd_server().args(import).env("LD_PRELOAD", &library), 1, &said);
}
