//! Hostile clients: each costs bounded memory and time, and no other client notices.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod common;

use std::io::Write;
use std::net::TcpStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::memory::{peak_bytes, resident_bytes};
use common::nbd::{MIB, Raw, Served};
use common::server::TestServer;
use nbd_server::nbd::Limits;
use nbd_server::nbd::wire::{Mode, cflag, cmd, opt, rep};

/// The memory of the process is measured: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

#[test]
fn a_client_that_takes_no_replies_is_bounded_and_harms_no_other() {
    let _alone = alone();
    let limits = Limits { stalled: Duration::from_secs(2), ..Limits::default() };
    let served = Served::with(limits);
    let before = own_bytes();
    let mut greedy = Raw::attach(&served, "disk", Mode::Simple);
    greedy.write(0, &vec![1; usize::try_from(32 * MIB).unwrap()]);
    greedy.stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    // 1000 reads of 32 MiB: 32 GiB, were they all carried out.
    for cookie in 0..1000 {
        let request = greedy.encode(0, cmd::READ, cookie, 0, 32 * MIB);
        greedy.send(&request);
    }
    let mut other = Raw::attach(&served, "disk", Mode::Simple);
    let mut most = 0;
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_millis(1500) {
        assert_eq!(other.read(0, 4096), [1; 4096]);
        most = most.max(own_bytes());
    }
    let more_mib = most.saturating_sub(before) >> 20;
    // Its own limit of 64 MiB, what it wrote (32 MiB in the image), and the allocator's slack.
    assert!(more_mib < 160, "{more_mib} MiB more");
    // Once it took something the deadline would begin anew.
    std::thread::sleep(Duration::from_secs(2));
    assert!(greedy.is_closed(), "given up after the deadline");
}

#[test]
fn the_payload_that_is_only_announced_costs_nothing() {
    let _alone = alone();
    let served = Served::new();
    let before = own_bytes();
    let clients: Vec<Raw> = (0..64)
        .map(|_| {
            let mut client = Raw::attach(&served, "disk", Mode::Simple);
            let request = client.encode(0, cmd::WRITE, 1, 0, 32 * MIB);
            client.send(&request);
            client
        })
        .collect();
    // More than the shared 1 GiB is announced by now; small requests go on.
    let mut other = Raw::attach(&served, "disk", Mode::Simple);
    assert_eq!(other.read(0, 4096), [0; 4096]);
    let more_mib = own_bytes().saturating_sub(before) >> 20;
    assert!(more_mib < 64, "{more_mib} MiB more for {} announcements", clients.len());
}

#[test]
fn clients_that_move_a_byte_at_a_time_starve_nobody() {
    let _alone = alone();
    let (shared_bytes, connection_bytes) = (64 << 20, 4 << 20);
    let limits = Limits { shared_bytes, connection_bytes, stalled: Duration::from_secs(6), ..Limits::default() };
    let served = Served::with(limits);
    let over = AtomicBool::new(false);
    let over = &over;
    std::thread::scope(|scope| {
        // More than there is, by readers and by writers. None of them ever stalls; each ends with this test at the latest.
        let drips = move || {
            (0..600).take_while(move |_| {
                std::thread::sleep(Duration::from_millis(100));
                !over.load(Ordering::Relaxed)
            })
        };
        for nth in 0..34 {
            let mut reader = Raw::attach(&served, "disk", Mode::Simple);
            for cookie in 0..32 {
                let request = reader.encode(0, cmd::READ, cookie, 0, MIB);
                reader.send(&request);
            }
            let mut writer = Raw::attach(&served, "disk", Mode::Simple);
            let request = writer.encode(0, cmd::WRITE, nth, 8 * MIB, 2 * MIB);
            writer.send(&request);
            scope.spawn(move || drips().take_while(|_| reader.try_take(1).is_ok()).count());
            scope.spawn(move || drips().take_while(|_| writer.stream.write_all(&[7]).is_ok()).count());
        }
        let mut other = Raw::attach(&served, "disk2", Mode::Simple);
        for _ in 0..4 {
            assert_eq!(other.read(0, MIB).len() as u64, MIB);
            assert_eq!(other.write(0, &[1; 1 << 20]).errno, 0);
        }
        let mut other = Raw::attach(&served, "disk", Mode::Simple);
        assert_eq!(other.read(0, 2 * MIB).len() as u64, 2 * MIB, "as much as any of them");
        over.store(true, Ordering::Relaxed);
    });
}

#[test]
fn an_option_of_4_gib_is_refused_by_its_length_and_hardly_read() {
    let _alone = alone();
    let served = Served::new();
    let header = [&b"IHAVEOPT"[..], &opt::LIST.to_be_bytes(), &u32::MAX.to_be_bytes()].concat();
    let mut waiting = Raw::connect(&served);
    waiting.send(&header);
    let [(rep::ERR_TOO_BIG, text)] = &waiting.option_replies(opt::LIST)[..] else { panic!("another reply") };
    assert!(String::from_utf8_lossy(text).contains("4294967295 bytes"));
    assert!(waiting.is_closed());
    let mut blind = Raw::connect(&served);
    blind.send(&header);
    assert!(mib_taken(&mut blind) < 32);
}

#[test]
fn a_write_of_4_gib_is_refused_by_its_length_and_hardly_read() {
    let _alone = alone();
    let served = Served::new();
    let mut client = Raw::attach(&served, "disk", Mode::Extended);
    let header = client.encode(cflag::PAYLOAD_LEN, cmd::WRITE, 1, 0, u64::from(u32::MAX));
    client.send(&header);
    assert!(mib_taken(&mut client) < 32);
}

/// How much of an endless payload a server takes, of 64 MiB; some of it waits in the buffers of two sockets.
fn mib_taken(client: &mut Raw) -> usize {
    (0..64).take_while(|_| client.stream.write_all(&[0; 1 << 20]).is_ok()).count()
}

#[test]
fn thousands_of_silent_connections_cost_little_and_harm_no_other() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    let _alone = alone();
    // Both ends of each connection are in this process.
    let allowed = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: allowed.maximum, ..allowed }).unwrap();
    let served = Served::with(Limits { handshake: Duration::from_secs(3), ..Limits::default() });
    let before = own_bytes();
    let mut silent: Vec<Raw> = (0..4000).map(|_| Raw::connect(&served)).collect();
    let mut client = Raw::attach(&served, "disk", Mode::Structured);
    assert_eq!(client.read(0, 4096), [0; 4096]);
    let each = own_bytes().saturating_sub(before) / 4000;
    assert!(each < 24 << 10, "{each} bytes each");
    for client in &mut silent {
        assert!(client.is_closed());
    }
    assert_eq!(client.read(0, 1), [0]);
}

#[test]
fn ten_thousand_connections_to_the_real_server_harm_no_other() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    let _alone = alone();
    let allowed = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: allowed.maximum, ..allowed }).unwrap();
    let mut server = TestServer::start(&[], &[]);
    server.ok("POST", "/v1/exports/create", serde_json::json!({"export_id": "disk", "size": MIB}));
    let address = server.nbd_address();
    let before = peak_bytes(server.pid());
    let silent: Vec<TcpStream> = (0..10_000).map(|_| TcpStream::connect(&address).unwrap()).collect();
    let size = Command::new("nbdinfo").args(["--size", &server.nbd_uri("disk")]).output().unwrap();
    assert_eq!(String::from_utf8(size.stdout).unwrap().trim(), MIB.to_string());
    let each = (peak_bytes(server.pid()) - before) / 10_000;
    assert!(each < 24 << 10, "{each} bytes each");
    drop(silent);
    server.stop();
}

/// What this process has, in which the server runs.
fn own_bytes() -> u64 {
    resident_bytes(std::process::id())
}
