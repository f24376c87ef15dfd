//! What a warm request costs, counted and not timed: system calls and allocations.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::alloc::System;
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::nbd::{MIB, Raw, Served};
use common::server::TestServer;
use common::volumes::{Site, id, write};
use nbd_server::nbd::Limits;
use nbd_server::nbd::wire::{Mode, cmd};
use nbd_server::units::Geometry;
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const DEPTH: u64 = 32;
const ROUNDS: u64 = 50;
const LEN: usize = 4096;

/// The allocations of the process are counted: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Requests as many as the depth, and how long the replies to them are; simple replies, so that they can be counted.
fn batch(client: &Raw, kind: u16) -> (Vec<u8>, usize) {
    let mut requests = Vec::new();
    for cookie in 0..DEPTH {
        requests.extend(client.encode(0, kind, cookie, (cookie * 7 % 61) * LEN as u64, LEN as u64));
        if kind == cmd::WRITE {
            requests.extend([7; LEN]);
        }
    }
    let reply = if kind == cmd::READ { 16 + LEN } else { 16 };
    (requests, reply * usize::try_from(DEPTH).unwrap())
}

/// Sends a batch and takes its replies, round after round, allocating nothing.
fn exchange(stream: &mut TcpStream, requests: &[u8], replies: &mut [u8], rounds: u64) {
    for _ in 0..rounds {
        stream.write_all(requests).unwrap();
        stream.read_exact(replies).unwrap();
    }
}

#[test]
fn a_warm_request_allocates_nothing() {
    let _alone = alone();
    let served = Served::start(Limits::default(), &"127.0.0.1:0".parse().unwrap(), async |_| {
        let mut site = Site::new();
        let registry = site.start("served").await;
        registry.create(id("disk"), Geometry::new(MIB, MIB).unwrap()).await.unwrap();
        write(&registry.volume(&id("disk")).await.unwrap(), 0, 1, MIB).await;
        (Arc::clone(&registry), site)
    });
    let mut client = Raw::attach(&served, "disk", Mode::Simple);
    for kind in [cmd::READ, cmd::WRITE] {
        let (requests, len) = batch(&client, kind);
        let mut replies = vec![0; len];
        // Buffers grow to their size in the first rounds. A busy machine may hold a write up as a slow disk would, and then
        // writes are handed on for a while, which allocates: so it is the best of some tries that counts.
        let patience = Instant::now() + Duration::from_secs(60);
        let mut fewest = usize::MAX;
        while fewest >= 20 && Instant::now() < patience {
            let region = Region::new(ALLOCATOR);
            exchange(&mut client.stream, &requests, &mut replies, ROUNDS);
            let change = region.change();
            fewest = fewest.min(change.allocations + change.reallocations);
        }
        assert!(fewest < 20, "{fewest} allocations for {} requests of kind {kind}", DEPTH * ROUNDS);
    }
}

/// The calls of each system call that `strace -c` counted.
fn counted(summary: &str) -> BTreeMap<&str, u64> {
    let lines = summary.lines().filter(|line| line.trim_start().starts_with(|first: char| first.is_ascii_digit()));
    let fields = lines.map(|line| line.split_whitespace().collect::<Vec<_>>());
    // % time, seconds, usecs/call, calls, errors (if any), name.
    fields
        .filter(|fields| fields.len() >= 5)
        .map(|fields| (fields[fields.len() - 1], fields[3].parse().unwrap()))
        .collect()
}

/// The system calls of a whole life of the server, with so many rounds of reads in it.
fn calls_with(rounds: u64) -> BTreeMap<String, u64> {
    let (_dir, summary) = common::nbd::scratch("calls");
    let strace = ["strace", "-D", "-f", "-c", "-o", summary.to_str().unwrap()].map(str::to_owned).to_vec();
    let mut server = TestServer::start_through(strace, &["--listen", "127.0.0.1:0"], &[]);
    server.ok("POST", "/v1/exports/create", serde_json::json!({"export_id": "disk", "size": MIB}));
    let mut client = Raw::connect_to(&server.nbd_address());
    client.negotiate("disk", Mode::Simple);
    client.write(0, &vec![1; usize::try_from(MIB).unwrap()]);
    // Reads alone: the tracer may hold a write up, and then writes are handed on for a while.
    let (requests, len) = batch(&client, cmd::READ);
    exchange(&mut client.stream, &requests, &mut vec![0; len], rounds);
    drop(client);
    server.stop();
    // The tracer ends after the server.
    let patience = Instant::now() + Duration::from_secs(60);
    let text = loop {
        let text = std::fs::read_to_string(&summary).unwrap();
        if text.contains(" total") {
            break text;
        }
        assert!(Instant::now() < patience, "strace wrote no summary: {text:?}");
        std::thread::sleep(Duration::from_millis(10));
    };
    counted(&text).into_iter().map(|(name, calls)| (name.to_owned(), calls)).collect()
}

#[test]
fn a_warm_read_is_one_system_call_and_its_share_of_a_batch() {
    let _alone = alone();
    let (few, many) = (calls_with(10), calls_with(10 + ROUNDS));
    let more = |name: &str| many.get(name).unwrap_or(&0).saturating_sub(*few.get(name).unwrap_or(&0));
    assert_eq!(more("preadv2"), DEPTH * ROUNDS, "one each");
    // One wait, one receive and one send.
    let others: u64 = ["epoll_wait", "recvfrom", "sendto", "writev", "futex", "read", "write"].map(more).iter().sum();
    let per_batch = others / ROUNDS;
    assert!(per_batch < 8, "{per_batch} calls per batch of {DEPTH} besides: {few:?}, {many:?}");
}
