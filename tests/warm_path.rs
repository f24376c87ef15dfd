//! What a warm request costs, and a cut while requests wait for it, counted and not timed: system calls and allocations.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::alloc::System;
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use common::nbd::{DEPTH, LEN, MIB, Raw, Served, batch};
use common::server::TestServer;
use common::volumes::{Site, id, opening, write};
use nbd_server::background::NICENESS;
use nbd_server::nbd::Limits;
use nbd_server::nbd::wire::{Mode, cmd};
use nbd_server::slices::SLICE_BYTES;
use nbd_server::units::{DEFAULT_CHUNK_BYTES, Geometry};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

const ROUNDS: u64 = 50;

/// The allocations of the process are counted: one test at a time.
fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
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

/// Writers wait for a cut, and a list that grows while they do costs them more than the pass over the states.
#[test]
fn a_cut_takes_its_memory_at_once_however_many_chunks_are_dirty() {
    let _alone = alone();
    let (dir, dirty) = (tempfile::tempdir().unwrap(), 10_000);
    let geometry = Geometry::new(dirty * 4096, 4096).unwrap();
    let cache = opening(dir.path().join("disk"), geometry).open().unwrap();
    for chunk in 0..dirty {
        cache.write(chunk * 4096, &[1], |_| true).unwrap();
    }
    let region = Region::new(ALLOCATOR);
    let cut = cache.cut().unwrap();
    let change = region.change();
    assert_eq!((cut.len() as u64, change.allocations, change.reallocations), (dirty, 1, 0));
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

/// How many system calls of each name `rounds` more rounds of `exchange` cost the server, with so many `clients`.
fn calls_of(clients: usize, rounds: u64, exchange: impl Fn(&mut [Raw], u64)) -> impl Fn(&str) -> u64 {
    // The calls of a whole life of the server, with few rounds in it and with more.
    let (few, many) = (calls_of_a_life(clients, 10, &exchange), calls_of_a_life(clients, 10 + rounds, &exchange));
    move |name| many.get(name).unwrap_or(&0).saturating_sub(*few.get(name).unwrap_or(&0))
}

fn calls_of_a_life(clients: usize, rounds: u64, exchange: impl Fn(&mut [Raw], u64)) -> BTreeMap<String, u64> {
    let text = traced("-c", " total", |server| {
        server.ok("POST", "/v1/exports/create", serde_json::json!({"export_id": "disk", "size": MIB}));
        let mut clients: Vec<Raw> = (0..clients).map(|_| attach(server)).collect();
        clients[0].write(0, &vec![1; usize::try_from(MIB).unwrap()]);
        exchange(&mut clients, rounds);
    });
    counted(&text).into_iter().map(|(name, calls)| (name.to_owned(), calls)).collect()
}

fn attach(server: &TestServer) -> Raw {
    let mut client = Raw::connect_to(&server.nbd_address());
    client.negotiate("disk", Mode::Simple);
    client
}

/// What `strace` with this option wrote of a server's life with this `work` in it; the last of it has `last` in it.
fn traced(option: &str, last: &str, work: impl FnOnce(&TestServer)) -> String {
    let (_dir, file) = common::nbd::scratch("calls");
    let strace = ["strace", "-D", "-f", option, "-o", file.to_str().unwrap()].map(str::to_owned).to_vec();
    let mut server = TestServer::start_through(strace, &["--listen", "127.0.0.1:0"], &[]);
    work(&server);
    server.stop();
    // The tracer ends after the server.
    let patience = Instant::now() + Duration::from_secs(60);
    loop {
        let text = std::fs::read_to_string(&file).unwrap();
        if text.contains(last) {
            return text;
        }
        assert!(Instant::now() < patience, "strace did not end: {text:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// What is called to wait, receive, send and wake.
const AROUND: [&str; 8] = ["epoll_wait", "recvfrom", "sendto", "writev", "sendmsg", "futex", "read", "write"];

#[test]
fn a_warm_read_is_one_system_call_and_its_share_of_a_batch_on_each_of_four_connections_too() {
    let _alone = alone();
    for clients in [1, 4] {
        // Reads alone: the tracer may hold a write up, and then writes are handed on for a while.
        let calls = calls_of(clients, ROUNDS, |clients, rounds| {
            let (requests, len) = batch(&clients[0], cmd::READ);
            let mut replies = vec![0; len];
            for _ in 0..rounds {
                clients.iter_mut().for_each(|client| client.stream.write_all(&requests).unwrap());
                clients.iter_mut().for_each(|client| client.stream.read_exact(&mut replies).unwrap());
            }
        });
        let batches = ROUNDS * clients as u64;
        assert_eq!(calls("preadv2"), DEPTH * batches, "one each");
        assert!(calls("mmap") + calls("munmap") < ROUNDS, "memory is used again");
        // One wait, one receive and one send.
        let per_batch = AROUND.map(&calls).iter().sum::<u64>() / batches;
        assert!(per_batch < 8, "{per_batch} calls per batch of {DEPTH} besides, {clients} connections");
    }
}

#[test]
fn a_warm_read_of_a_mebibyte_is_one_read_and_few_sends() {
    let _alone = alone();
    let calls = calls_of(1, ROUNDS, |clients, rounds| {
        let client = &mut clients[0];
        let request = client.encode(0, cmd::READ, 1, 0, MIB);
        exchange(&mut client.stream, &request, &mut vec![0; 16 + usize::try_from(MIB).unwrap()], rounds);
    });
    assert_eq!(calls("preadv2"), ROUNDS);
    // The socket may take it in parts, with a wait before each.
    let around = AROUND.map(&calls).iter().sum::<u64>() / ROUNDS;
    assert!(around < 24, "{around} calls besides");
}

#[test]
fn a_flush_is_one_sync_and_its_reply_is_sent_by_the_thread_that_did_it() {
    let _alone = alone();
    let calls = calls_of(1, ROUNDS, |clients, rounds| {
        let client = &mut clients[0];
        let mut write = client.encode(0, cmd::WRITE, 1, 0, LEN as u64);
        write.extend([7; LEN]);
        let flush = client.encode(0, cmd::FLUSH, 2, 0, 0);
        for _ in 0..rounds {
            for request in [&write, &flush] {
                exchange(&mut client.stream, request, &mut [0; 16], 1);
            }
        }
    });
    // A write to a chunk that is dirty already leaves nothing to seal.
    assert_eq!(calls("fdatasync"), ROUNDS);
    // Those of writes may be among them: the tracer holds one up now and then, and it is handed on.
    assert!(calls("sendto") >= ROUNDS, "{} replies sent by the thread that has them", calls("sendto"));
    let around = AROUND.map(&calls).iter().sum::<u64>() / ROUNDS;
    assert!(around < 20, "{around} calls besides");
}

/// What a warm request waits for, on a machine with all cores busy, is the system calls of others: many a kernel interrupts
/// none.
#[test]
fn publishing_and_fetching_go_over_no_more_than_a_slice_in_one_system_call() {
    let _alone = alone();
    let calls = "-etrace=read,write,pread64,pwrite64,preadv2,sched_yield,setpriority";
    let size = 2 * DEFAULT_CHUNK_BYTES;
    let text = traced(calls, " exited with 0 ", |server| {
        server.ok("POST", "/v1/exports/create", serde_json::json!({"export_id": "disk", "size": size}));
        let mut client = attach(server);
        let mut over_all = |each: &mut dyn FnMut(&mut Raw, u64)| {
            (0..size).step_by(SLICE_BYTES).for_each(|at| each(&mut client, at));
        };
        over_all(&mut |client, at| drop(client.write(at, &[7; SLICE_BYTES])));
        server.ok("POST", "/v1/exports/disk/snapshot", serde_json::json!({}));
        server.ok("POST", "/v1/exports/disk/cache/reset", serde_json::json!({}));
        // Less than a slice each, so that no slice is read for them.
        over_all(&mut |client, at| assert!(client.read(at, LEN as u64) == [7; LEN]));
    });
    let moved = |line: &str| line.rsplit_once(" = ").and_then(|(_, moved)| moved.parse::<usize>().ok());
    let longest = text.lines().max_by_key(|line| moved(line)).unwrap();
    assert_eq!(moved(longest), Some(SLICE_BYTES), "{longest}");
    // Nor in less: each slice is read once for the publish, and once for the fetch.
    let whole = |line: &&str| line.contains("pread64") && moved(line) == Some(SLICE_BYTES);
    assert_eq!(text.lines().filter(whole).count() as u64, 2 * size / SLICE_BYTES as u64);
    // The core is offered before each: what a thread did just before it moved a slice into the store. The tracer writes a call
    // in two lines if another thread's came meanwhile, both of which have its name.
    let (mut last, mut offered) = (BTreeMap::new(), 0);
    // And threads that count less do the work of a publish.
    let (mut count_less, mut read) = (BTreeSet::new(), 0);
    let background = format!("setpriority(PRIO_PROCESS, 0, {NICENESS}");
    for line in text.lines() {
        let (thread, call) = line.split_once(' ').unwrap();
        let call = call.trim_start();
        let before = last.insert(thread, call);
        if call.starts_with(&background) {
            count_less.insert(thread);
        }
        if moved(line) == Some(SLICE_BYTES) && call.starts_with("pwrite64(") {
            assert!(before.is_some_and(|before| before.contains("sched_yield")), "{before:?}, then {call}");
            assert!(count_less.contains(thread), "{line}");
            offered += 1;
        }
        if moved(line) == Some(SLICE_BYTES) && call.starts_with("pread64(") {
            read += usize::from(count_less.contains(thread));
        }
    }
    assert!(offered > 0 && read > 0, "{offered} and {read}");
}
