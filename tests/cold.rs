//! The cold path and publishing, by what they ask for: requests to the store, bytes held, operations of the disk. How long it
//! takes is measured by `benches/cold.rs`.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

mod common;

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use common::hooked::Hooked;
use common::shaped::{Shape, Shaped};
use common::sim::SimClock;
use common::volumes::*;
use common::watched::{Fate, Watched};
use futures_util::stream::{self, StreamExt};
use nbd_server::clock::SystemClock;
use nbd_server::disk::RealDisk;
use nbd_server::store::remote::RemoteStore;
use nbd_server::store::retry::{RetryPolicy, Retrying};
use nbd_server::units::{ChunkIndex, Geometry};
use nbd_server::volume::registry::Registry;
use nbd_server::volume::{FETCHES, Services, Volume, VolumeError};
use tempfile::TempDir;

/// As fast as it can be: what counts here is what is asked for.
const AT_ONCE: Shape =
    Shape { first_byte: Duration::ZERO, stream_bytes_per_second: u64::MAX, streams: 1024, forgets_blobs: false };
const MIB: u64 = 1 << 20;

/// A store with the export "disk" in it, of which nothing is cached.
struct Cold {
    store: Arc<Shaped>,
    registry: Arc<Registry>,
    volume: Arc<Volume>,
    _dirs: [TempDir; 2],
}

impl Cold {
    /// Every chunk is full of the low byte of its number, plus one.
    async fn new(chunks: u64) -> Self {
        let store = Arc::new(Shaped::new(Arc::new(RemoteStore::memory()), AT_ONCE));
        let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let origin = start(&store, dirs[0].path()).await;
        let volume = create(&origin, "disk", chunks).await;
        for i in 0..chunks {
            write(&volume, i * CHUNK, byte_of(i), CHUNK).await;
        }
        origin.snapshot(&id("disk")).await.unwrap();
        origin.close().await;
        let registry = start(&store, dirs[1].path()).await;
        let volume = registry.volume(&id("disk")).await.unwrap();
        store.forget_asked();
        Self { store, registry, volume, _dirs: dirs }
    }

    async fn resident(&self) -> u64 {
        status(&self.registry, "disk").await.resident_chunks
    }

    /// Waits until so many ranges were asked for, and then whether more follow.
    async fn asked(&self, count: usize) -> usize {
        until(|| self.store.asked().len() >= count).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        self.store.asked().len()
    }
}

#[test]
fn a_read_of_a_missing_chunk_asks_the_store_without_a_look_at_the_disk() {
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.enable_all().max_blocking_threads(1).build().unwrap();
    runtime.block_on(async {
        let cold = Cold::new(2).await;
        let (open, gate) = std::sync::mpsc::channel::<()>();
        // The only thread that may look there.
        let held = tokio::task::spawn_blocking(move || gate.recv());
        let volume = Arc::clone(&cold.volume);
        let read = tokio::spawn(async move { read(&volume, CHUNK + 1, 2).await });
        let asked = tokio::time::timeout(Duration::from_secs(30), cold.asked(1)).await;
        assert_eq!(asked.expect("a request to the store"), 1);
        drop(open);
        held.await.unwrap().unwrap_err();
        assert_eq!(read.await.unwrap()[..], [byte_of(1); 2]);
    });
}

async fn start(store: &Arc<Shaped>, cache_root: &Path) -> Arc<Registry> {
    let services = Services::new(store.clone(), root(), Arc::new(RealDisk::default()), Arc::new(SystemClock));
    Registry::discover(Arc::new(services), cache_root.to_owned()).await.unwrap()
}

fn byte_of(chunk: u64) -> u8 {
    (chunk % 255) as u8 + 1
}

async fn until(mut done: impl FnMut() -> bool) {
    while !done() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

#[tokio::test]
async fn misses_of_many_chunks_are_all_asked_for_at_once() {
    let cold = Cold::new(64).await;
    cold.store.answer(false);
    let reads: Vec<_> = (0..32u64)
        .map(|i| {
            let volume = cold.volume.clone();
            tokio::spawn(async move { read(&volume, (i * 29 % 64) * CHUNK, 1).await })
        })
        .collect();
    assert_eq!(cold.asked(32).await, 32);
    cold.store.answer(true);
    for (i, bytes) in (0u64..).zip(futures_util::future::join_all(reads).await) {
        assert_eq!(bytes.unwrap()[0], byte_of(i * 29 % 64));
    }
    assert_eq!(cold.store.asked().len(), 32);
}

#[tokio::test]
async fn however_many_misses_there_are_the_store_sees_a_bounded_number_at_a_time() {
    let (most, misses) = (FETCHES as usize, u64::from(FETCHES) * 3);
    let cold = Cold::new(misses).await;
    cold.store.answer(false);
    let read_all = (0..misses).map(|i| {
        let volume = cold.volume.clone();
        // In no order that is read ahead of.
        tokio::spawn(async move { read(&volume, (i * 389 % misses) * CHUNK, 1).await })
    });
    let reads: Vec<_> = read_all.collect();
    assert_eq!(cold.asked(most).await, most);
    cold.store.answer(true);
    for (i, bytes) in (0..misses).zip(futures_util::future::join_all(reads).await) {
        assert_eq!(bytes.unwrap()[0], byte_of(i * 389 % misses));
    }
    assert_eq!(cold.store.asked().len(), misses as usize);
}

#[tokio::test]
async fn a_sequential_reader_finds_its_next_chunks_here_and_each_is_fetched_once() {
    let cold = Cold::new(256).await;
    let volume = &cold.volume;
    for i in 0..16 * 4 {
        assert_eq!(read(volume, i * CHUNK / 4, CHUNK / 4).await[0], byte_of(i / 4));
    }
    // It has read 16 chunks, and asked for no more than the window beyond them.
    until(|| cold.store.asked().len() >= 32).await;
    assert!(cold.asked(32).await <= 16 + 64);
    for i in 16 * 4..256 * 4 {
        assert_eq!(read(volume, i * CHUNK / 4, CHUNK / 4).await[0], byte_of(i / 4));
    }
    assert_eq!(cold.asked(256).await, 256);
    make_resident(volume, 0, 256 * CHUNK).await;
    assert_eq!(cold.asked(256).await, 256);
    assert_eq!(cold.resident().await, 256);
}

#[tokio::test]
async fn random_reading_fetches_only_what_it_reads() {
    let cold = Cold::new(1024).await;
    let mut read_chunks = BTreeSet::new();
    for i in 0..200u64 {
        let chunk = i * 389 % 1024;
        read_chunks.insert(chunk);
        read(&cold.volume, chunk * CHUNK + 512, 512).await;
    }
    assert_eq!(cold.asked(200).await, read_chunks.len());
}

#[tokio::test]
async fn several_sequential_readers_at_once_are_all_read_ahead_of() {
    let cold = Cold::new(1024).await;
    for i in 0..8 * 4 {
        for reader in 0..8 {
            read(&cold.volume, reader * 128 * CHUNK + i * CHUNK / 4, CHUNK / 4).await;
        }
    }
    until(|| cold.store.asked().len() >= 8 * 16).await;
}

#[tokio::test]
async fn a_clients_miss_is_asked_for_at_once_while_background_fetches_wait_for_their_turn() {
    let cold = Cold::new(256).await;
    cold.store.answer(false);
    let prefetch = {
        let volume = cold.volume.clone();
        tokio::spawn(async move { volume.prefetch(range(0, 128 * CHUNK)).await })
    };
    assert_eq!(cold.asked(16).await, 16, "the background has its sixteen streams and no more");
    let miss = {
        let volume = cold.volume.clone();
        // One that the prefetch will come to, but has not yet.
        tokio::spawn(async move { read(&volume, 100 * CHUNK, 1).await })
    };
    assert_eq!(cold.asked(17).await, 17);
    let in_blob = |chunk: u64| chunk * CHUNK;
    assert_eq!(cold.store.asked()[16].offset(), in_blob(100));
    cold.store.answer(true);
    assert_eq!(miss.await.unwrap()[0], byte_of(100));
    prefetch.await.unwrap().unwrap();
    assert_eq!(cold.asked(128).await, 128, "what the client had fetched is not fetched again");
}

#[tokio::test]
async fn writing_over_a_fresh_export_or_whole_chunks_asks_the_store_for_nothing() {
    let cold = Cold::new(64).await;
    for i in 0..64 {
        write(&cold.volume, i * CHUNK, 9, CHUNK).await;
    }
    let fresh = create(&cold.registry, "fresh", 64).await;
    for i in 0..64 {
        write(&fresh, i * CHUNK + 512, 9, 512).await;
    }
    assert_eq!(cold.store.asked(), []);
}

#[tokio::test]
async fn a_reader_does_not_wait_until_its_chunk_is_written_and_a_writer_does() {
    let cold = Cold::new(2).await;
    let dir = tempfile::tempdir().unwrap();
    let disk = Hooked::new(RealDisk::default());
    let services = Services::new(cold.store.clone(), root(), Arc::new(disk.clone()), Arc::new(SystemClock));
    let registry = Registry::discover(Arc::new(services), dir.path().to_owned()).await.unwrap();
    let volume = registry.volume(&id("disk")).await.unwrap();
    let held = Arc::new(AtomicBool::new(true));
    let waits = held.clone();
    disk.hook(move |op, path| {
        while op == "write_at" && path.ends_with("cache.raw") && waits.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    });
    assert_eq!(read(&volume, 1, 2).await[..], [1, 1]);
    // Again, from the same fetch; and what is not in the cache is no place for a part of a chunk.
    assert_eq!(read(&volume, 1, 2).await[..], [1, 1]);
    let into = volume.clone();
    let change = tokio::spawn(async move { write(&into, 0, 9, 1).await });
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!change.is_finished());
    held.store(false, Ordering::SeqCst);
    change.await.unwrap();
    assert_eq!(read(&volume, 0, 2).await[..], [9, 1]);
    assert_eq!(cold.store.asked().len(), 1, "one fetch for all of them");
}

#[tokio::test]
async fn a_cut_costs_one_record_however_many_chunks_are_dirty() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Hooked::new(RealDisk::default());
    let store = Arc::new(Shaped::new(Arc::new(RemoteStore::memory()), AT_ONCE));
    let services = Services::new(store.clone(), root(), Arc::new(disk.clone()), Arc::new(SystemClock));
    let registry = Registry::discover(Arc::new(services), dir.path().to_owned()).await.unwrap();
    let mut costs = Vec::new();
    for (name, chunks) in [("few", 2), ("many", 2_000)] {
        let volume = create(&registry, name, chunks).await;
        for i in 0..chunks {
            write(&volume, i * CHUNK, 1, 512).await;
        }
        // What happens from the call to the journal is the cut.
        let (operations, over) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let (counted, journal) = (operations.clone(), over.clone());
        disk.hook(move |op, path| {
            // Looking for a file changes nothing, and waits for no disk.
            let looks = ["open", "is_at"].contains(&op);
            if path.to_string_lossy().contains("snapshot.journal") && !looks {
                journal.store(1, Ordering::SeqCst);
            } else if journal.load(Ordering::SeqCst) == 0 && !looks {
                counted.fetch_add(1, Ordering::SeqCst);
            }
            Ok(())
        });
        registry.snapshot(&id(name)).await.unwrap();
        disk.serve_all();
        assert_eq!(over.load(Ordering::SeqCst), 1);
        costs.push(operations.load(Ordering::SeqCst));
    }
    assert_eq!(costs[0], costs[1]);
    assert!(costs[0] <= 2, "{costs:?}");
}

#[tokio::test]
async fn a_publish_of_more_than_its_memory_goes_through() {
    let dirs = [(); 2].map(|()| tempfile::tempdir().unwrap());
    let store = Arc::new(Shaped::new(Arc::new(RemoteStore::memory()), AT_ONCE));
    let services = Services::new(store.clone(), root(), Arc::new(RealDisk::default()), Arc::new(SystemClock));
    // Less than the three parts that this blob has, and less than the exports need together.
    let services = services.with_publish_bytes(12 * MIB);
    let registry = Registry::discover(Arc::new(services), dirs[0].path().to_owned()).await.unwrap();
    let names = ["a", "b", "c"];
    for name in names {
        registry.create(id(name), Geometry::new(24 * MIB, MIB).unwrap()).await.unwrap();
        let volume = registry.volume(&id(name)).await.unwrap();
        for i in 0..24 {
            write(&volume, i * MIB, i as u8 + 1, MIB).await;
        }
    }
    let published = names.map(|name| {
        let registry = registry.clone();
        async move { registry.snapshot(&id(name)).await.unwrap() }
    });
    assert!(futures_util::future::join_all(published).await.iter().all(|p| p.created));
    let elsewhere = start(&store, dirs[1].path()).await;
    for name in names {
        let volume = elsewhere.volume(&id(name)).await.unwrap();
        for i in 0..24 {
            assert_eq!(read(&volume, i * MIB + 5, 1).await[0], i as u8 + 1);
        }
    }
}

#[tokio::test]
async fn an_import_reads_no_further_ahead_than_its_memory() {
    const CHUNKS: u32 = 128;
    // Nothing that is sent to it ever arrives.
    let stuck = Shape { streams: 0, ..AT_ONCE };
    let store = Arc::new(Shaped::new(Arc::new(RemoteStore::memory()), stuck));
    let services =
        Services::new(store, root(), Arc::new(RealDisk::default()), Arc::new(SystemClock)).with_publish_bytes(32 * MIB);
    let geometry = Geometry::new(u64::from(CHUNKS) * MIB, MIB).unwrap();
    let read = AtomicUsize::new(0);
    let chunks = stream::iter(0..CHUNKS).map(|chunk| {
        read.fetch_add(1, Ordering::SeqCst);
        Ok((ChunkIndex(chunk), Bytes::from(vec![1; MIB as usize])))
    });
    let name = id("disk");
    let import = services.import(&name, geometry, chunks.boxed(), std::future::pending());
    assert!(tokio::time::timeout(Duration::from_secs(3), import).await.is_err());
    // All but the eighth for what clients of an export change, and one more that waits for its turn.
    assert_eq!(read.load(Ordering::SeqCst), 29);
}

#[tokio::test]
async fn a_start_asks_for_one_small_object_of_each_export_and_an_opening_for_its_manifest_once() {
    let mut site = Site::new();
    let registry = site.start("origin").await;
    for i in 0..100 {
        create(&registry, &format!("disk-{i}"), 4).await;
    }
    let volume = registry.volume(&id("disk-7")).await.unwrap();
    write(&volume, 0, 7, CHUNK).await;
    registry.snapshot(&id("disk-7")).await.unwrap();
    registry.close().await;
    site.store.forget_counts();
    let registry = site.elsewhere().await;
    assert_eq!((site.store.count("list_folders"), site.store.count("get")), (1, 100));
    assert_eq!(site.store.count("list") + site.store.count("put") + site.store.count("get_range"), 0);
    site.store.forget_counts();
    registry.volume(&id("disk-7")).await.unwrap();
    // The head, the manifest, and the head once more after the journal was looked at.
    assert_eq!(site.store.count("get"), 3);
}

#[tokio::test(start_paused = true)]
async fn in_an_outage_reads_that_wait_for_memory_fail_within_the_same_limit_as_all_others() {
    // More than fit into memory at a time.
    const CHUNKS: u64 = 10;
    const LARGE: u64 = 64 * MIB;
    for fate in [Fate::Failed, Fate::Stuck] {
        let (watched, clock) = (Arc::new(Watched::new(RemoteStore::memory())), Arc::new(SimClock::default()));
        stand_on_base_image(&watched, "disk", 1, Geometry::new(CHUNKS * LARGE, LARGE).unwrap()).await;
        let patience = RetryPolicy { limit: Duration::from_secs(20), ..RetryPolicy::default() };
        let store = Arc::new(Retrying::new(watched.clone(), patience, clock.clone()));
        let services = Services::new(store, root(), Arc::new(RealDisk::default()), clock).with_patience(patience);
        let dir = tempfile::tempdir().unwrap();
        let registry = Registry::discover(Arc::new(services), dir.path().to_owned()).await.unwrap();
        let volume = registry.volume(&id("disk")).await.unwrap();
        watched.judge(move |operation, _| if operation == "get_range" { fate } else { Fate::Served });
        let begun = tokio::time::Instant::now();
        let reads = (0..CHUNKS).map(|i| volume.read(range(i * LARGE, 1)));
        for read in futures_util::future::join_all(reads).await {
            assert!(matches!(read, Err(VolumeError::Unavailable(_))), "{fate:?}: {read:?}");
        }
        let took = begun.elapsed();
        assert!(took < patience.limit + Duration::from_secs(2), "{fate:?}: {took:?}");
    }
}
