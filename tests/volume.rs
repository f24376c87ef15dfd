//! What a volume promises its front ends, over a store that counts and fails as a test wishes.

#![allow(clippy::unwrap_used, clippy::panic, clippy::cast_possible_truncation, missing_docs)]

mod common;

use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::hooked::Hooked;
use common::volumes::*;
use common::watched::Fate;
use futures_util::FutureExt;
use nbd_server::disk::{Disk, DiskFile, RealDisk};
use nbd_server::store::{Condition, Store};
use nbd_server::units::{Geometry, SnapshotId};
use nbd_server::volume::faults::Cause;
use nbd_server::volume::registry::{ExportError, Operation, Registry};
use nbd_server::volume::{Extent, Residency, VolumeError};

/// Publishes an export of 8 chunks, chunk i full of byte i + 1, and returns its snapshot.
async fn publish_eight(site: &mut Site) -> SnapshotId {
    let registry = site.start("origin").await;
    let volume = create(&registry, "disk", 8).await;
    for i in 0..8 {
        write(&volume, i * CHUNK, i as u8 + 1, CHUNK).await;
    }
    let published = registry.snapshot(&id("disk")).await.unwrap();
    registry.close().await;
    site.store.forget_counts();
    published.snapshot_id.unwrap()
}

#[tokio::test]
async fn a_new_export_reads_as_zeros_and_asks_the_store_for_nothing() {
    let mut site = Site::new();
    let registry = site.start("a").await;
    let volume = create(&registry, "disk", 8).await;
    site.store.forget_counts();
    assert!(read_all(&volume).await.iter().all(|b| *b == 0));
    assert_eq!(site.store.count("get_range"), 0);
}

#[tokio::test]
async fn concurrent_readers_of_a_missing_chunk_cause_one_fetch() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let registry = site.elsewhere().await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    *site.store.delay.lock().unwrap() = Duration::from_millis(50);
    let reads = (0..32).map(|i| {
        let volume = volume.clone();
        tokio::spawn(async move { read(&volume, 3 * CHUNK + i, 1).await[0] })
    });
    for byte in futures_util::future::join_all(reads).await {
        assert_eq!(byte.unwrap(), 4);
    }
    assert_eq!(site.store.count("get_range"), 1);
    make_resident(&volume, 3 * CHUNK, CHUNK).await;
    assert_eq!(status(&registry, "disk").await.resident_chunks, 1);
    read(&volume, 3 * CHUNK, CHUNK).await;
    assert_eq!(site.store.count("get_range"), 1, "a resident chunk is not fetched again");
}

#[tokio::test]
async fn a_fill_lives_on_when_its_first_requester_hangs_up() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let registry = site.elsewhere().await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    *site.store.delay.lock().unwrap() = Duration::from_millis(100);
    let hung_up = tokio::time::timeout(Duration::from_millis(20), read(&volume, 0, 1)).await;
    assert!(hung_up.is_err());
    assert_eq!(read(&volume, 0, 1).await[0], 1);
    assert_eq!(site.store.count("get_range"), 1);
}

#[tokio::test]
async fn a_partial_write_on_a_missing_chunk_keeps_the_rest() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let registry = site.elsewhere().await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    write(&volume, 2 * CHUNK + 100, 0xee, 10).await;
    let chunk = read(&volume, 2 * CHUNK, CHUNK).await;
    assert!(chunk[..100].iter().all(|b| *b == 3));
    assert!(chunk[100..110].iter().all(|b| *b == 0xee));
    assert!(chunk[110..].iter().all(|b| *b == 3));
}

#[tokio::test]
async fn a_full_overwrite_fetches_nothing_and_a_write_across_chunks_only_its_edges() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let registry = site.elsewhere().await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    write(&volume, 2 * CHUNK, 0xee, 2 * CHUNK).await;
    assert_eq!(site.store.count("get_range"), 0);
    write(&volume, 5 * CHUNK - 1, 0xdd, 2 * CHUNK + 2).await;
    assert_eq!(site.store.count("get_range"), 2, "chunks 4 and 7, not 5 and 6");
    let all = read_all(&volume).await;
    assert_eq!(all[5 * CHUNK as usize - 2], 5);
    assert!(all[5 * CHUNK as usize - 1..7 * CHUNK as usize + 1].iter().all(|b| *b == 0xdd));
    assert_eq!(all[7 * CHUNK as usize + 1], 8);
}

#[tokio::test]
async fn zeroing_whole_chunks_fetches_nothing_and_frees_their_space() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let registry = site.start("origin").await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    let raw = site.cache_root("origin").join("disk/cache.raw");
    let before = std::fs::metadata(&raw).unwrap().blocks();
    volume.trim(range(0, 4 * CHUNK)).await.unwrap();
    assert!(std::fs::metadata(&raw).unwrap().blocks() < before);
    assert!(read(&volume, 0, 4 * CHUNK).await.iter().all(|b| *b == 0));

    let registry = site.elsewhere().await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    volume.write_zeroes(range(0, 2 * CHUNK)).await.unwrap();
    assert_eq!(site.store.count("get_range"), 0);
    // An edge of a missing chunk: WRITE_ZEROES fetches and merges, TRIM leaves it.
    volume.write_zeroes(range(2 * CHUNK, 10)).await.unwrap();
    volume.trim(range(3 * CHUNK, 10)).await.unwrap();
    assert_eq!(site.store.count("get_range"), 1);
    let all = read_all(&volume).await;
    assert!(all[..2 * CHUNK as usize + 10].iter().all(|b| *b == 0));
    assert_eq!(all[2 * CHUNK as usize + 10], 3);
    assert_eq!(all[3 * CHUNK as usize], 4);
}

#[tokio::test]
async fn a_partial_write_on_a_zeroed_chunk_lets_no_older_data_shine_through() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let registry = site.elsewhere().await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    read_all(&volume).await;
    volume.trim(range(0, CHUNK)).await.unwrap();
    write(&volume, 10, 0xaa, 10).await;
    registry.snapshot(&id("disk")).await.unwrap();
    let mut expected = vec![0; CHUNK as usize];
    expected[10..20].fill(0xaa);
    assert_eq!(read(&volume, 0, CHUNK).await, expected);
    assert_eq!(image(&site.elsewhere().await, "disk").await[..CHUNK as usize], expected);
}

/// Chunk 0 in part and chunk 1 as zeros are not published, the other six of the eight are clean.
async fn eight_of_which_six_are_clean(site: &mut Site, disk: Hooked) -> (Arc<Registry>, Vec<u8>) {
    publish_eight(site).await;
    let registry = site.start_on("origin", Arc::new(disk)).await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    write(&volume, 10, 0xaa, 10).await;
    volume.trim(range(CHUNK, CHUNK)).await.unwrap();
    let image: Vec<u8> = (0..8 * CHUNK).map(|at| [1, 0, 3, 4, 5, 6, 7, 8][(at / CHUNK) as usize]).collect();
    let image = [&image[..10], &[0xaa; 10], &image[20..]].concat();
    assert_eq!(read_all(&volume).await, image);
    (registry, image)
}

#[tokio::test]
async fn a_trim_of_the_cache_drops_clean_chunks_and_keeps_what_is_not_published() {
    let mut site = Site::new();
    let (registry, image) = eight_of_which_six_are_clean(&mut site, Hooked::new(RealDisk::default())).await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    let raw = site.cache_root("origin").join("disk/cache.raw");
    let blocks = || std::fs::metadata(&raw).unwrap().blocks();
    let before = blocks();
    assert_eq!(registry.trim_cache(&id("disk")).await.unwrap(), 6 * CHUNK);
    assert_eq!(before - blocks(), 6 * CHUNK / 512);
    let extents = volume.extents(range(0, 8 * CHUNK), 100).await.unwrap();
    let expected =
        [(CHUNK, Residency::Dirty), (CHUNK, Residency::Zero { dirty: true }), (6 * CHUNK, Residency::Absent)];
    assert_eq!(extents, expected.map(|(len, residency)| Extent { len, residency }));
    assert_eq!(registry.trim_cache(&id("disk")).await.unwrap(), 0, "there is no more to drop");

    // As after a kill: the states are in the file, too.
    let registry = site.start("origin").await;
    site.store.forget_counts();
    let volume = registry.volume(&id("disk")).await.unwrap();
    assert_eq!((read_all(&volume).await, site.store.count("get_range")), (image.clone().into(), 6));
    make_resident(&volume, 0, 8 * CHUNK).await;
    assert_eq!(registry.trim_cache(&id("disk")).await.unwrap(), 6 * CHUNK, "what was fetched can be dropped again");
    registry.snapshot(&id("disk")).await.unwrap();
    assert_eq!(common::volumes::image(&site.elsewhere().await, "disk").await, image);
    assert_eq!(registry.trim_cache(&id("disk")).await.unwrap(), CHUNK, "what is published now");
    assert_eq!(read_all(&volume).await, image);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_trim_of_the_cache_leaves_what_is_fetched_or_written_meanwhile() {
    let mut site = Site::new();
    let disk = Hooked::new(RealDisk::default());
    let (registry, mut image) = eight_of_which_six_are_clean(&mut site, disk.clone()).await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    // While the first chunk gets its hole, later ones are there again.
    let (hole, holes) = std::sync::mpsc::channel();
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let wait = std::sync::Mutex::new(wait);
    disk.hook(move |op, path| {
        if op == "punch" && path.ends_with("cache.raw") {
            let _ = hole.send(());
            // Once the other end is gone it waits no more.
            let _ = wait.lock().unwrap().recv();
        }
        Ok(())
    });
    let trimming = tokio::spawn({
        let registry = Arc::clone(&registry);
        async move { registry.trim_cache(&id("disk")).await }
    });
    tokio::task::block_in_place(|| holes.recv()).unwrap();
    assert_eq!(status(&registry, "disk").await.resident_chunks, 1, "all are absent before the first hole");
    assert_eq!(status(&registry, "disk").await.operation, Operation::Trimming);
    let refused = registry.snapshot(&id("disk")).await.unwrap_err();
    assert!(refused.to_string().contains("busy trimming"), "{refused}");
    make_resident(&volume, 4 * CHUNK, CHUNK).await;
    volume.write(5 * CHUNK, vec![0xbb; CHUNK as usize].into()).await.unwrap();
    volume.write(6 * CHUNK + 5, vec![0xcc; 5].into()).await.unwrap();
    image[(5 * CHUNK) as usize..(6 * CHUNK) as usize].fill(0xbb);
    image[(6 * CHUNK) as usize + 5..(6 * CHUNK) as usize + 10].fill(0xcc);
    drop(go);
    assert_eq!(trimming.await.unwrap().unwrap(), 3 * CHUNK);
    assert_eq!(status(&registry, "disk").await.resident_chunks, 4);
    assert_eq!(read_all(&volume).await, image);
    registry.close().await;
    assert_eq!(common::volumes::image(&site.start("origin").await, "disk").await, image);
}

#[tokio::test]
async fn a_trim_of_the_cache_drops_nothing_that_the_store_does_not_have() {
    let mut site = Site::new();
    let snapshot = publish_eight(&mut site).await;
    let registry = site.start("origin").await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    let delta = root().export(&id("disk")).delta(snapshot);
    let blob = site.store.get(&delta, 1 << 20).await.unwrap().bytes;
    site.store.delete(&delta).await.unwrap();
    let gone = registry.trim_cache(&id("disk")).await.unwrap_err();
    assert!(matches!(gone, ExportError::Damaged(_)) && gone.to_string().contains("nothing was dropped"), "{gone}");
    site.store.put(&delta, blob.slice(..blob.len() - 1), Condition::Always).await.unwrap();
    assert!(matches!(registry.trim_cache(&id("disk")).await, Err(ExportError::Damaged(_))), "too short");
    site.store.outage();
    assert!(matches!(registry.trim_cache(&id("disk")).await, Err(ExportError::StoreUnavailable(_))));
    assert_eq!(status(&registry, "disk").await.resident_chunks, 8);
    let image = read_all(&volume).await;
    assert!(image.chunks(CHUNK as usize).zip(1..).all(|(chunk, value)| chunk.iter().all(|b| *b == value)));
    site.store.serve_all();
    site.store.put(&delta, blob, Condition::Always).await.unwrap();
    assert_eq!(registry.trim_cache(&id("disk")).await.unwrap(), 8 * CHUNK);
    assert_eq!(read_all(&volume).await, image);
}

#[tokio::test]
async fn extents_tell_absent_clean_dirty_and_zero_apart() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let registry = site.elsewhere().await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    read(&volume, CHUNK, CHUNK).await;
    write(&volume, 2 * CHUNK, 9, CHUNK).await;
    volume.trim(range(3 * CHUNK, CHUNK)).await.unwrap();
    let extents = volume.extents(range(0, 8 * CHUNK), 100).await.unwrap();
    let expected = [
        (CHUNK, Residency::Absent),
        (CHUNK, Residency::Clean),
        (CHUNK, Residency::Dirty),
        (CHUNK, Residency::Zero { dirty: true }),
        (4 * CHUNK, Residency::Absent),
    ];
    assert_eq!(extents, expected.map(|(len, residency)| Extent { len, residency }));
    assert_eq!(volume.extents(range(10, 8 * CHUNK - 10), 2).await.unwrap().len(), 2);
}

#[tokio::test]
async fn what_is_set_aside_in_memory_is_bounded_over_all_exports() {
    let mut site = Site::new();
    // An eighth of it is room for two blocks.
    site.publish_bytes = 16 * CHUNK;
    let registry = site.start("a").await;
    let volumes = [create(&registry, "one", 32).await, create(&registry, "two", 32).await];
    for volume in &volumes {
        write(volume, 0, 1, 32 * CHUNK).await;
    }
    let (open, gate) = tokio::sync::watch::channel(false);
    site.store.hold_until("upload", gate);
    let one = site.begin_snapshot("a", &registry, "one").await;
    let two = site.begin_snapshot("a", &registry, "two").await;
    let folder = site.cache_root("a");
    let in_file = || ["one", "two"].map(|name| folder.join(name).join("cut.aside").exists());
    for (export, chunk, expected) in
        [(0, 31, [false, false]), (1, 31, [false, false]), (1, 30, [false, true]), (0, 30, [true, true])]
    {
        write(&volumes[export], chunk * CHUNK, 2, 1).await;
        assert_eq!(in_file(), expected, "chunk {chunk} of {export}");
    }
    open.send(true).unwrap();
    for publishing in [one, two] {
        publishing.await.unwrap().unwrap();
    }
    let elsewhere = site.elsewhere().await;
    for name in ["one", "two"] {
        assert!(image(&elsewhere, name).await.iter().all(|b| *b == 1), "{name}");
    }
}

#[tokio::test]
async fn a_snapshot_holds_what_was_written_before_it_and_nothing_after() {
    let mut site = Site::new();
    // An eighth of it is for what is set aside: there is room for ten chunks in memory.
    site.publish_bytes = 80 * CHUNK;
    let registry = site.start("a").await;
    let volume = create(&registry, "disk", 64).await;
    for i in 0..64 {
        write(&volume, i * CHUNK, 1, CHUNK).await;
    }
    // While the blob is on its way, every chunk is overwritten: most must be set aside for the snapshot.
    let (open, gate) = tokio::sync::watch::channel(false);
    site.store.hold_until("upload", gate);
    let publishing = site.begin_snapshot("a", &registry, "disk").await;
    let aside = site.cache_root("a").join("disk/cut.aside");
    // From the last one, since the first ones are read already.
    for i in (0..64).rev() {
        write(&volume, i * CHUNK + 7, 2, 100).await;
        assert_eq!(aside.exists(), i < 54, "ten are set aside in memory, then the others in the file: {i}");
    }
    open.send(true).unwrap();
    let published = publishing.await.unwrap().unwrap();
    assert_eq!(status(&registry, "disk").await.dirty_chunks, 64, "dirty for the next generation");
    assert!(image(&site.elsewhere().await, "disk").await.iter().all(|b| *b == 1));
    assert!(!aside.exists());

    let second = registry.snapshot(&id("disk")).await.unwrap();
    assert_eq!(second.generation.0, published.generation.0 + 1);
    assert_eq!(image(&site.elsewhere().await, "disk").await, read_all(&volume).await);
}

#[tokio::test]
async fn a_snapshot_with_nothing_dirty_creates_nothing_and_says_so() {
    let mut site = Site::new();
    let snapshot = publish_eight(&mut site).await;
    let registry = site.elsewhere().await;
    read_all(&registry.volume(&id("disk")).await.unwrap()).await;
    site.store.forget_counts();
    let published = registry.snapshot(&id("disk")).await.unwrap();
    assert!(!published.created);
    assert_eq!((published.generation.0, published.snapshot_id), (1, Some(snapshot)));
    assert_eq!(site.store.count("upload") + site.store.count("put"), 0);
}

#[tokio::test]
async fn a_delta_holds_only_what_changed_and_no_zeros() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let registry = site.elsewhere().await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    write(&volume, 0, 9, CHUNK).await;
    write(&volume, CHUNK, 0, CHUNK).await;
    volume.trim(range(2 * CHUNK, CHUNK)).await.unwrap();
    let snapshot = registry.snapshot(&id("disk")).await.unwrap().snapshot_id.unwrap();
    let delta = site.store.get(&root().export(&id("disk")).delta(snapshot), 1 << 20).await.unwrap();
    assert_eq!(delta.bytes, vec![9; CHUNK as usize]);
    let all = image(&site.elsewhere().await, "disk").await;
    let firsts: Vec<u8> = all.chunks(CHUNK as usize).map(|chunk| chunk[0]).collect();
    assert_eq!(firsts, [9, 0, 0, 4, 5, 6, 7, 8]);
}

#[tokio::test]
async fn compaction_makes_one_base_and_every_older_snapshot_stays() {
    let mut site = Site::new();
    let first = publish_eight(&mut site).await;
    let registry = site.elsewhere().await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    write(&volume, 0, 9, CHUNK).await;
    let second = registry.snapshot(&id("disk")).await.unwrap().snapshot_id.unwrap();
    write(&volume, CHUNK, 10, 5).await;
    volume.trim(range(7 * CHUNK, CHUNK)).await.unwrap();
    let third = registry.compact(&id("disk")).await.unwrap();
    assert_eq!((third.created, third.generation.0), (true, 3));
    let keys = root().export(&id("disk"));
    let base = site.store.get(&keys.base(third.snapshot_id.unwrap()), 1 << 20).await.unwrap();
    assert_eq!(base.bytes.len() as u64, 7 * CHUNK);
    // The compacted image needs no other blob.
    for snapshot in [first, second] {
        let blob = site.store.get(&keys.delta(snapshot), 1 << 20).await.unwrap();
        site.store.delete(&keys.delta(snapshot)).await.unwrap();
        assert_eq!(image(&site.elsewhere().await, "disk").await, read_all(&volume).await);
        site.store.put(&keys.delta(snapshot), blob.bytes, Condition::Always).await.unwrap();
    }
    // Each published snapshot is still there to be cloned.
    for (snapshot, name, bytes) in [(first, "c1", [1, 2, 8]), (second, "c2", [9, 2, 8])] {
        registry.clone_export(id(name), id("disk"), Some(snapshot)).await.unwrap();
        let all = image(&registry, name).await;
        assert_eq!([all[0], all[CHUNK as usize], all[7 * CHUNK as usize]], bytes);
    }
}

#[tokio::test]
async fn a_clone_shares_its_sources_blobs_and_first_publishes_only_what_it_wrote() {
    let mut site = Site::new();
    let source = publish_eight(&mut site).await;
    let registry = site.start("origin").await;
    site.store.forget_counts();
    registry.clone_export(id("copy"), id("disk"), None).await.unwrap();
    assert_eq!(site.store.count("upload"), 0);
    let seed = site.cache_root("origin").join("copy/clone.seed.json");
    assert!(seed.exists());
    let copy = registry.volume(&id("copy")).await.unwrap();
    write(&copy, 3 * CHUNK + 1, 0xcc, 1).await;
    let published = registry.snapshot(&id("copy")).await.unwrap();
    assert_eq!(published.generation.0, 1);
    assert!(!seed.exists());
    let keys = root().export(&id("copy"));
    let delta = site.store.get(&keys.delta(published.snapshot_id.unwrap()), 1 << 20).await.unwrap();
    assert_eq!(delta.bytes.len() as u64, CHUNK);
    let manifest = site.store.get(&keys.manifest(published.snapshot_id.unwrap()), 1 << 20).await.unwrap();
    let manifest = String::from_utf8(manifest.bytes.to_vec()).unwrap();
    assert!(manifest.contains(root().export(&id("disk")).delta(source).as_str()));

    let there = site.elsewhere().await;
    let mut expected = image(&there, "disk").await.to_vec();
    expected[3 * CHUNK as usize + 1] = 0xcc;
    assert_eq!(image(&there, "copy").await, expected);
}

#[tokio::test]
async fn an_unpublished_clone_comes_back_with_its_writes() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let registry = site.start("origin").await;
    registry.clone_export(id("copy"), id("disk"), None).await.unwrap();
    write(&registry.volume(&id("copy")).await.unwrap(), 0, 0xcc, 10).await;
    // The source moves on; the clone does not.
    write(&registry.volume(&id("disk")).await.unwrap(), CHUNK, 0xdd, CHUNK).await;
    registry.snapshot(&id("disk")).await.unwrap();
    drop(registry);
    let all = image(&site.start("origin").await, "copy").await;
    assert_eq!([all[0], all[10], all[CHUNK as usize]], [0xcc, 1, 2]);
}

#[tokio::test]
async fn clones_are_made_of_published_snapshots_only() {
    let mut site = Site::new();
    let registry = site.start("a").await;
    create(&registry, "empty", 8).await;
    let clone = |source: &'static str, snapshot| registry.clone_export(id("copy"), id(source), snapshot);
    assert!(matches!(clone("nowhere", None).await, Err(ExportError::NotFound(..))));
    assert!(matches!(clone("empty", None).await, Err(ExportError::NothingPublished(_))));
    write(&registry.volume(&id("empty")).await.unwrap(), 0, 1, 1).await;
    // A publish whose swap fails leaves nothing that could be cloned.
    site.store.judge(
        |op, key| if op == "put" && key.as_str().ends_with("volume.json") { Fate::Failed } else { Fate::Served },
    );
    assert!(registry.snapshot(&id("empty")).await.is_err());
    site.store.serve_all();
    assert!(registry.snapshot(&id("empty")).await.unwrap().created);
    assert!(matches!(clone("empty", Some(SnapshotId::generate())).await, Err(ExportError::SnapshotNotFound(..))));
    assert!(matches!(registry.clone_export(id("empty"), id("empty"), None).await, Err(ExportError::Exists(_))));
}

#[tokio::test]
async fn a_restart_without_a_clean_stop_brings_every_write_back() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let registry = site.elsewhere().await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    write(&volume, 100, 0xaa, 3 * CHUNK).await;
    volume.trim(range(5 * CHUNK, CHUNK)).await.unwrap();
    let before = read_all(&volume).await;
    make_resident(&volume, 0, volume.geometry().image_size()).await;
    let then = status(&registry, "disk").await;
    site.store.forget_counts();
    for _ in 0..2 {
        let registry = site.start("elsewhere").await;
        assert_eq!(image(&registry, "disk").await, before);
        let now = status(&registry, "disk").await;
        assert_eq!((now.dirty_chunks, now.resident_chunks), (then.dirty_chunks, then.resident_chunks));
    }
    assert_eq!(site.store.count("get_range"), 0, "clean chunks survive a process crash, too");
}

#[tokio::test]
async fn a_clean_stop_keeps_everything_even_across_a_boot() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let registry = site.elsewhere().await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    write(&volume, 100, 0xaa, CHUNK).await;
    let before = read_all(&volume).await;
    registry.close().await;
    assert!(matches!(volume.flush().await, Err(VolumeError::Closed(_))));
    site.store.forget_counts();
    let registry = site.start_on("elsewhere", Arc::new(AfterBoot(1))).await;
    assert_eq!(image(&registry, "disk").await, before);
    assert_eq!(status(&registry, "disk").await.dirty_chunks, 2);
    assert_eq!(site.store.count("get_range"), 0);
}

/// The same disk after the host went down and came up again.
#[derive(Debug)]
struct AfterBoot(u8);

impl Disk for AfterBoot {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        RealDisk::default().open(path)
    }
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        RealDisk::default().create(path)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        RealDisk::default().rename(from, to)
    }
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        RealDisk::default().exchange(a, b)
    }
    fn remove(&self, path: &Path) -> io::Result<()> {
        RealDisk::default().remove(path)
    }
    fn create_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk::default().create_dir(path)
    }
    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk::default().remove_dir(path)
    }
    fn list_dir(&self, path: &Path) -> io::Result<Vec<String>> {
        RealDisk::default().list_dir(path)
    }
    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        RealDisk::default().sync_dir(path)
    }
    fn boot_id(&self) -> io::Result<[u8; 16]> {
        Ok([self.0; 16])
    }
}

#[tokio::test]
async fn after_the_host_went_down_only_sealed_marks_count() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let registry = site.elsewhere().await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    // Clean, and sealed to be: cache all the same.
    make_resident(&volume, 4 * CHUNK, CHUNK).await;
    write(&volume, 0, 0xaa, 10).await;
    volume.flush().await.unwrap();
    write(&volume, CHUNK, 0xbb, 10).await;
    make_resident(&volume, 2 * CHUNK, CHUNK).await;
    drop((volume, registry));
    let registry = site.start_on("elsewhere", Arc::new(AfterBoot(1))).await;
    let now = status(&registry, "disk").await;
    assert_eq!((now.dirty_chunks, now.resident_chunks), (1, 1));
    let all = image(&registry, "disk").await;
    assert_eq!([all[0], all[CHUNK as usize], all[2 * CHUNK as usize]], [0xaa, 2, 3]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publish_whose_upload_hangs_holds_no_other_one_up() {
    let mut site = Site::new();
    let registry = site.start("origin").await;
    for name in ["hangs", "goes"] {
        write(&create(&registry, name, 64).await, 0, 1, 64 * CHUNK).await;
    }
    site.store.judge(
        |op, key| {
            if op == "upload" && key.as_str().contains("/hangs/") { Fate::Stuck } else { Fate::Served }
        },
    );
    let hanging = tokio::spawn({
        let registry = Arc::clone(&registry);
        async move { registry.snapshot(&id("hangs")).await }
    });
    while site.store.count("upload") == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let going = tokio::time::timeout(Duration::from_secs(10), registry.snapshot(&id("goes"))).await;
    assert!(going.expect("it waits for the other's cores").unwrap().created);
    assert!(!hanging.is_finished());
    hanging.abort();
}

#[tokio::test]
async fn a_publish_interrupted_anywhere_is_finished_or_undone_at_the_next_start() {
    // The k-th change of the store never returns and the process is killed; then the host of k + 1, and so on.
    for landed in [false, true] {
        for k in 0.. {
            let mut site = Site::new();
            publish_eight(&mut site).await;
            let registry = site.start("origin").await;
            let volume = registry.volume(&id("disk")).await.unwrap();
            write(&volume, 0, 0xaa, CHUNK).await;
            let calls = Arc::new(AtomicUsize::new(0));
            let counted = Arc::clone(&calls);
            site.store.judge(move |op, _| {
                let change = matches!(op, "put" | "upload" | "delete");
                match change.then(|| counted.fetch_add(1, Ordering::SeqCst)) {
                    Some(n) if n == k && landed => Fate::LandedUnseen,
                    Some(n) if n >= k => Fate::Stuck,
                    _ => Fate::Served,
                }
            });
            let disk = id("disk");
            let ended = site.store.until_stuck(registry.snapshot(&disk)).await;
            drop((volume, registry));
            site.store.serve_all();
            let done = calls.load(Ordering::SeqCst) <= k;

            let registry = site.start("origin").await;
            let here = image(&registry, "disk").await;
            assert!(here[..CHUNK as usize].iter().all(|b| *b == 0xaa), "k = {k}");
            let folder = std::fs::read_dir(site.cache_root("origin").join("disk")).unwrap();
            let mut names: Vec<_> = folder.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            let spares = ["snapshot.journal.json.spare", "snapshot.journal.json.spare2"];
            assert_eq!(names, [&["cache.meta", "cache.meta.spare", "cache.raw"], &spares[..]].concat(), "k = {k}");
            let state = status(&registry, "disk").await;
            let expected = if state.snapshot_generation.0 == 2 { 0 } else { 1 };
            assert_eq!(state.dirty_chunks, expected, "k = {k}");
            // Nothing but whole, published snapshots is left in the store.
            let snapshots = site.store.list_folders(&"exports/disk/snapshots".parse().unwrap()).await.unwrap();
            assert_eq!(snapshots.len() as u64, state.snapshot_generation.0, "k = {k}");
            registry.snapshot(&id("disk")).await.unwrap();
            assert_eq!(image(&site.elsewhere().await, "disk").await, here, "k = {k}");
            if done {
                assert!(ended.unwrap().unwrap().created);
                assert!(k >= 3, "blob, manifest and head at least");
                break;
            }
        }
    }
}

#[tokio::test]
async fn a_swap_that_landed_unseen_is_recognised_as_our_own() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let registry = site.start("origin").await;
    write(&registry.volume(&id("disk")).await.unwrap(), 0, 0xaa, CHUNK).await;
    let mut once = true;
    site.store.judge(move |op, key| {
        let swap = op == "put" && key.as_str().ends_with("volume.json");
        if swap && std::mem::take(&mut once) { Fate::LandedUnseen } else { Fate::Served }
    });
    let published = registry.snapshot(&id("disk")).await.unwrap();
    assert_eq!((published.created, published.generation.0), (true, 2));
    assert_eq!(status(&registry, "disk").await.dirty_chunks, 0);
}

#[tokio::test]
async fn an_outage_in_mid_publish_keeps_everything_dirty_and_a_later_publish_succeeds() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    for lost in ["upload", "put"] {
        let registry = site.start("origin").await;
        let volume = registry.volume(&id("disk")).await.unwrap();
        write(&volume, 0, 0xaa, CHUNK).await;
        let mut down = false;
        site.store.judge(move |op, _| {
            down |= op == lost;
            if down { Fate::Failed } else { Fate::Served }
        });
        let refused = registry.snapshot(&id("disk")).await.unwrap_err();
        assert!(matches!(refused, ExportError::StoreUnavailable(_)), "{refused}");
        assert_eq!(status(&registry, "disk").await.dirty_chunks, 1);
        write(&volume, 10, 0xbb, 10).await;
        site.store.serve_all();
        assert!(registry.snapshot(&id("disk")).await.unwrap().created);
        assert_eq!(image(&site.elsewhere().await, "disk").await, read_all(&volume).await);
        registry.close().await;
    }
}

#[tokio::test]
async fn of_two_servers_that_publish_one_export_one_wins_and_the_other_keeps_its_dirty_data() {
    let mut site = Site::new();
    let first = publish_eight(&mut site).await;
    let (a, b) = (site.start("a").await, site.start("b").await);
    let (on_a, on_b) = (a.volume(&id("disk")).await.unwrap(), b.volume(&id("disk")).await.unwrap());
    write(&on_a, 0, 0xaa, 10).await;
    write(&on_b, 0, 0xbb, 10).await;
    let disk = id("disk");
    let (x, y) = tokio::join!(a.snapshot(&disk), b.snapshot(&disk));
    let (winner, lost, loser, bytes) = match (x, y) {
        (Ok(won), Err(lost)) => (won, lost, ("b", &b), 0xbb),
        (Err(lost), Ok(won)) => (won, lost, ("a", &a), 0xaa),
        other => panic!("one must win: {other:?}"),
    };
    let ExportError::Conflict { expected, found, .. } = &lost else { panic!("{lost}") };
    assert_eq!(*expected, first.to_string());
    assert_eq!(*found, winner.snapshot_id.unwrap().to_string());
    assert_eq!(status(loser.1, "disk").await.dirty_chunks, 1);
    // Its dirty data survives a restart, and so does the conflict.
    loser.1.close().await;
    let again = site.start(loser.0).await;
    assert_eq!(image(&again, "disk").await[0], bytes);
    assert!(matches!(again.snapshot(&id("disk")).await, Err(ExportError::Conflict { .. })));
    // A reset gives it up and follows the winner.
    again.reset(&id("disk")).await.unwrap();
    assert_ne!(image(&again, "disk").await[0], bytes);
    assert_eq!(status(&again, "disk").await.dirty_chunks, 0);
}

#[tokio::test]
async fn closed_and_read_only_exports_are_so_after_a_restart_until_they_are_opened() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let disk = Hooked::new(RealDisk::default());
    let registry = site.start_on("a", Arc::new(disk.clone())).await;
    image(&registry, "disk").await;
    // Its room was taken with the first use of an export.
    disk.fail("create", ".exports.json.spare", io::ErrorKind::StorageFull);
    registry.unload(&id("disk")).await.unwrap();
    disk.serve_all();
    drop(registry);
    let registry = site.start("a").await;
    assert!(registry.list().is_empty() && registry.volume(&id("disk")).await.is_err());

    registry.open(id("disk"), true).await.unwrap();
    registry.close().await;
    let registry = site.start("a").await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    assert!(matches!(volume.write(0, vec![1].into()).await, Err(VolumeError::ReadOnly(_))));
    assert!(!site.elsewhere().await.volume(&id("disk")).await.unwrap().read_only(), "as in any fresh cache root");
}

#[tokio::test]
async fn closes_at_once_that_are_refused_leave_an_export_open_after_a_restart() {
    let mut site = Site::new();
    let registry = site.start("a").await;
    let volume = create(&registry, "disk", 8).await;
    write(&volume, 0, 1, CHUNK).await;
    let (open, gate) = tokio::sync::watch::channel(false);
    site.store.hold_until("upload", gate);
    let publishing = site.begin_snapshot("a", &registry, "disk").await;
    let disk = id("disk");
    for refused in futures_util::future::join_all([registry.unload(&disk), registry.unload(&disk)]).await {
        assert!(matches!(refused, Err(ExportError::Busy(..))), "{refused:?}");
    }
    open.send_replace(true);
    publishing.await.unwrap().unwrap();
    drop((volume, registry));
    assert_eq!(image(&site.start("a").await, "disk").await[0], 1);
}

#[tokio::test]
async fn an_export_is_writable_again_once_it_is_opened_so_and_an_unreadable_state_is_refused() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let disk = Hooked::new(RealDisk::default());
    let registry = site.start_on("a", Arc::new(disk.clone())).await;
    disk.fail("write_at", ".exports.json.spare", io::ErrorKind::Other);
    image(&registry, "disk").await;
    let refused = registry.unload(&id("disk")).await.unwrap_err();
    assert!(refused.to_string().contains(".exports.json"), "{refused}");
    assert_eq!(image(&registry, "disk").await[0], 1, "a close that cannot be kept changes nothing");
    disk.serve_all();
    for read_only in [true, false] {
        registry.unload(&id("disk")).await.unwrap();
        registry.open(id("disk"), read_only).await.unwrap();
    }
    registry.close().await;
    let registry = site.start("a").await;
    write(&registry.volume(&id("disk")).await.unwrap(), 0, 0xaa, 1).await;
    registry.close().await;
    let file = site.cache_root("a").join(".exports.json");
    let good = std::fs::read_to_string(&file).unwrap();
    for bad in ["{".to_owned(), good.replace("\"version\": 1", "\"version\": 2")] {
        std::fs::write(&file, bad).unwrap();
        let services = Arc::new(site.services(Arc::new(RealDisk::default())));
        let refused = Registry::discover(services, site.cache_root("a")).await.unwrap_err().to_string();
        assert!(refused.contains(file.to_str().unwrap()), "{refused}");
    }
}

#[tokio::test]
async fn a_conflict_shows_with_the_head_that_was_found_until_a_reset() {
    let mut site = Site::new();
    let first = publish_eight(&mut site).await;
    let (a, b) = (site.start("a").await, site.start("b").await);
    write(&b.volume(&id("disk")).await.unwrap(), 0, 0xbb, 10).await;
    write(&a.volume(&id("disk")).await.unwrap(), 0, 0xaa, 10).await;
    a.snapshot(&id("disk")).await.unwrap();
    write(&a.volume(&id("disk")).await.unwrap(), 0, 0xab, 10).await;
    let newest = a.snapshot(&id("disk")).await.unwrap().snapshot_id;
    let generations = async |registry: &Arc<Registry>| {
        let status = status(registry, "disk").await;
        (status.snapshot_generation.0, status.remote_head_generation.map(|g| g.0), status.remote_head_snapshot_id)
    };
    assert_eq!(generations(&b).await, (1, Some(1), Some(first)));
    assert_eq!(causes(&b).await, []);
    b.snapshot(&id("disk")).await.unwrap_err();
    assert_eq!(generations(&b).await, (1, Some(3), newest));
    assert_eq!(causes(&b).await, [Cause::Conflict]);

    // Its manifest, which has the generation, cannot be read.
    b.close().await;
    let b = site.start("b").await;
    site.store.judge(move |op, key| {
        let of_newest = op == "get" && key.as_str().contains(&newest.unwrap().to_string());
        if of_newest { Fate::Failed } else { Fate::Served }
    });
    b.snapshot(&id("disk")).await.unwrap_err();
    site.store.serve_all();
    b.snapshot(&id("disk")).await.unwrap_err();
    assert_eq!(generations(&b).await, (1, Some(3), newest));
    let seen = causes(&b).await;
    assert_eq!(seen, [Cause::Conflict], "also after a restart");
    b.reset(&id("disk")).await.unwrap();
    assert_eq!(generations(&b).await, (3, Some(3), newest));
    assert_eq!(causes(&b).await, []);
}

#[tokio::test]
async fn a_listing_of_snapshots_tells_the_status_of_a_newer_head() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let (a, b) = (site.start("a").await, site.start("b").await);
    image(&b, "disk").await;
    write(&a.volume(&id("disk")).await.unwrap(), 0, 0xaa, 10).await;
    let newer = a.snapshot(&id("disk")).await.unwrap().snapshot_id;
    assert_eq!(status(&b, "disk").await.remote_head_generation.unwrap().0, 1);
    b.snapshots(&id("disk")).await.unwrap();
    let told = status(&b, "disk").await;
    assert_eq!((told.remote_head_generation.unwrap().0, told.remote_head_snapshot_id), (2, newer));
    assert_eq!((told.snapshot_generation.0, causes(&b).await), (1, vec![]), "nothing of its own is in the way");
}

#[tokio::test]
async fn a_server_without_changes_follows_the_head_at_its_next_start() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let (a, b) = (site.start("a").await, site.start("b").await);
    image(&b, "disk").await;
    b.close().await;
    write(&a.volume(&id("disk")).await.unwrap(), 0, 0xaa, CHUNK).await;
    a.snapshot(&id("disk")).await.unwrap();
    assert_eq!(image(&site.start("b").await, "disk").await[0], 0xaa);
}

#[tokio::test]
async fn a_damaged_blob_is_an_error_never_zeros_and_never_cached() {
    let mut site = Site::new();
    let snapshot = publish_eight(&mut site).await;
    let key = root().export(&id("disk")).delta(snapshot);
    let good = site.store.get(&key, 1 << 20).await.unwrap().bytes;
    let mut bad = good.to_vec();
    bad[2 * CHUNK as usize + 5] ^= 1;
    site.store.put(&key, bad.into(), Condition::Always).await.unwrap();
    let registry = site.elsewhere().await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    site.store.forget_counts();
    let refused = volume.read(range(2 * CHUNK, 1)).await.unwrap_err();
    assert!(matches!(&refused, VolumeError::Damaged(text) if text.contains(key.as_str())), "{refused}");
    assert_eq!(site.store.count("get_range"), 2, "retried once, on a fresh request");
    assert_eq!(status(&registry, "disk").await.corrupt_fetches, 1);
    assert!(volume.write(2 * CHUNK, vec![1].into()).await.is_err());
    assert_eq!(read(&volume, 3 * CHUNK, 1).await[0], 4, "other chunks are served");
    site.store.put(&key, good, Condition::Always).await.unwrap();
    assert_eq!(read(&volume, 2 * CHUNK, 1).await[0], 3);
}

/// What is wrong with the export, by cause, as status and list say.
async fn causes(registry: &Arc<Registry>) -> Vec<Cause> {
    let status = status(registry, "disk").await;
    assert_eq!(registry.list()[0].faults, status.faults);
    let damaged = status.faults.iter().filter(|fault| fault.cause == Cause::Damaged).count();
    assert_eq!(status.damaged_chunks, damaged as u64, "{:?}", status.faults);
    status.faults.iter().map(|fault| fault.cause).collect()
}

#[tokio::test]
async fn an_object_that_is_gone_or_too_short_is_damage_by_name_until_it_is_restored() {
    let mut site = Site::new();
    let snapshot = publish_eight(&mut site).await;
    let key = root().export(&id("disk")).delta(snapshot);
    let good = site.store.get(&key, 1 << 20).await.unwrap().bytes;
    for short in [None, Some(good.slice(..2 * CHUNK as usize + 1))] {
        let registry = site.elsewhere().await;
        let volume = registry.volume(&id("disk")).await.unwrap();
        assert_eq!(causes(&registry).await, []);
        site.store.delete(&key).await.unwrap();
        if let Some(short) = short {
            site.store.put(&key, short, Condition::Always).await.unwrap();
        }
        for _ in 0..2 {
            let refused = volume.read(range(2 * CHUNK, 1)).await.unwrap_err();
            assert!(matches!(&refused, VolumeError::Damaged(text) if text.contains(key.as_str())), "{refused}");
        }
        assert_eq!(causes(&registry).await, [Cause::Damaged]);
        let fault = status(&registry, "disk").await.faults.remove(0);
        assert!(fault.count == 2 && fault.reason.contains(key.as_str()), "{fault:?}");
        let compacted = registry.compact(&id("disk")).await.unwrap_err();
        assert!(matches!(compacted, ExportError::Volume(VolumeError::Damaged(_))), "{compacted}");

        site.store.put(&key, good.clone(), Condition::Always).await.unwrap();
        assert_eq!(read_all(&volume).await[2 * CHUNK as usize], 3);
        registry.compact(&id("disk")).await.unwrap();
        assert_eq!(causes(&registry).await, []);
        // The next round begins with what the first did.
        let head = root().export(&id("disk")).head();
        let old = site.store.get(&head, 1 << 20).await.unwrap().bytes;
        let text = String::from_utf8(old.to_vec()).unwrap();
        let published = status(&registry, "disk").await.current_snapshot_id.unwrap().to_string();
        let back = text.replace(&published, &snapshot.to_string());
        site.store.put(&head, back.into(), Condition::Always).await.unwrap();
    }
}

#[tokio::test]
async fn a_damaged_chunk_that_no_read_needs_any_more_is_no_fault() {
    let mut site = Site::new();
    let snapshot = publish_eight(&mut site).await;
    let key = root().export(&id("disk")).delta(snapshot);
    let registry = site.elsewhere().await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    let good = site.store.get(&key, 1 << 20).await.unwrap().bytes;
    site.store.delete(&key).await.unwrap();
    volume.read(range(0, 8 * CHUNK)).await.unwrap_err();
    volume.read(range(0, 1)).await.unwrap_err();
    volume.read(range(CHUNK, 1)).await.unwrap_err();
    let before = causes(&registry).await.len();
    write(&volume, 0, 0xaa, CHUNK).await;
    assert_eq!(causes(&registry).await.len(), before - 1, "it was overwritten");
    site.store.put(&key, good, Condition::Always).await.unwrap();
    registry.reset(&id("disk")).await.unwrap();
    assert_eq!(read_all(&volume).await[0], 1);
    assert_eq!(causes(&registry).await, []);
}

#[tokio::test]
async fn whatever_a_client_gets_an_error_for_shows_by_its_cause_until_it_is_over() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let disk = Hooked::new(RealDisk::default());
    let registry = site.start_on("hooked", Arc::new(disk.clone())).await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    site.store.judge(|op, _| if op == "get_range" { Fate::Failed } else { Fate::Served });
    volume.read(range(0, 1)).await.unwrap_err();
    assert_eq!(causes(&registry).await, [Cause::StoreUnavailable]);
    site.store.serve_all();
    make_resident(&volume, 0, CHUNK).await;
    assert_eq!(causes(&registry).await, []);

    disk.fail("write_at", "cache.raw", io::ErrorKind::StorageFull);
    assert!(matches!(volume.write(0, vec![1].into()).await, Err(VolumeError::NoSpace(_))));
    disk.serve_all();
    write(&volume, 0, 2, 1).await;
    assert_eq!(causes(&registry).await, [], "there is room again");

    disk.fail("read_at", "cache.raw", io::ErrorKind::Other);
    assert!(matches!(volume.read(range(0, 1)).await, Err(VolumeError::Failed(_))));
    disk.serve_all();
    assert_eq!(causes(&registry).await, [Cause::Failed], "a disk that failed once is to be looked at");
    registry.reset(&id("disk")).await.unwrap();
    assert_eq!(causes(&registry).await, []);

    write(&volume, 0, 3, 1).await;
    site.store.judge(|op, _| if op == "upload" { Fate::Failed } else { Fate::Served });
    registry.snapshot(&id("disk")).await.unwrap_err();
    assert_eq!(causes(&registry).await, [Cause::StoreUnavailable], "a publish failed");
    site.store.serve_all();
    registry.snapshot(&id("disk")).await.unwrap();
    assert_eq!(causes(&registry).await, []);
}

#[tokio::test]
async fn an_export_that_could_not_be_opened_for_now_is_degraded_until_it_is() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let registry = site.elsewhere().await;
    site.store.outage();
    registry.volume(&id("disk")).await.unwrap_err();
    let listed = registry.list().remove(0);
    assert_eq!((listed.failed, listed.faults[0].cause), (None, Cause::StoreUnavailable));
    site.store.serve_all();
    registry.volume(&id("disk")).await.unwrap();
    assert_eq!(causes(&registry).await, []);
}

#[tokio::test]
async fn in_an_outage_resident_data_is_read_and_written_and_misses_fail_until_it_ends() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let registry = site.elsewhere().await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    read(&volume, 0, CHUNK).await;
    site.store.outage();
    write(&volume, 10, 0xaa, 10).await;
    volume.flush().await.unwrap();
    assert_eq!(read(&volume, 10, 1).await[0], 0xaa);
    assert!(matches!(volume.read(range(CHUNK, 1)).await, Err(VolumeError::Unavailable(_))));
    assert!(volume.write(CHUNK + 1, vec![1].into()).await.is_err());
    write(&volume, CHUNK, 0xbb, CHUNK).await;
    site.store.serve_all();
    assert_eq!(read(&volume, 2 * CHUNK, 1).await[0], 3);
}

#[tokio::test]
async fn a_reset_drops_what_was_not_published_for_good() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let registry = site.start("origin").await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    write(&volume, 0, 0xaa, 3 * CHUNK).await;
    volume.flush().await.unwrap();
    registry.reset(&id("disk")).await.unwrap();
    assert_eq!(read(&volume, 0, 1).await[0], 1);
    let raw = site.cache_root("origin").join("disk/cache.raw");
    assert_eq!(std::fs::metadata(&raw).unwrap().len(), 8 * CHUNK);
    drop((volume, registry));
    let registry = site.start_on("origin", Arc::new(AfterBoot(7))).await;
    assert_eq!(image(&registry, "disk").await[0], 1);
    assert_eq!(status(&registry, "disk").await.dirty_chunks, 0);
}

#[tokio::test]
async fn a_volume_is_closed_though_reads_and_a_prefetch_of_it_wait_for_a_store_that_does_not_answer() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let registry = site.elsewhere().await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    site.store.judge(|op, _| if op == "get_range" { Fate::Stuck } else { Fate::Served });
    let [reading, writing, fetching] = [0; 3].map(|_| Arc::clone(&volume));
    let reading = tokio::spawn(async move { reading.read(range(0, 1)).await.map(drop) });
    let writing = tokio::spawn(async move { writing.write(CHUNK, vec![1].into()).await });
    let fetching = tokio::spawn(async move { fetching.prefetch(range(2 * CHUNK, CHUNK)).await });
    while site.store.count("get_range") < 3 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    tokio::time::timeout(Duration::from_secs(10), registry.close()).await.expect("it waits for the store");
    for ended in [reading, writing, fetching] {
        assert!(matches!(ended.await.unwrap(), Err(VolumeError::Closed(_))));
    }
}

#[tokio::test]
async fn a_request_that_looks_at_millions_of_chunks_lets_others_have_the_thread() {
    let mut site = Site::new();
    let registry = site.start("a").await;
    let volume = create(&registry, "vast", 1 << 20).await;
    let whole = range(0, volume.geometry().image_size());
    let mut looking = Box::pin(volume.extents(whole, 1));
    assert!(looking.as_mut().now_or_never().is_none());
    assert_eq!(looking.await.unwrap(), [Extent { len: whole.len(), residency: Residency::Zero { dirty: false } }]);
    let mut fetching = Box::pin(volume.prefetch(whole));
    assert!(fetching.as_mut().now_or_never().is_none());
    fetching.await.unwrap();
}

#[tokio::test]
async fn all_who_ask_for_an_export_while_it_is_being_opened_hear_of_one_attempt() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let registry = site.elsewhere().await;
    site.store.forget_counts();
    *site.store.delay.lock().unwrap() = Duration::from_millis(50);
    site.store.outage();
    let disk = id("disk");
    for asked in futures_util::future::join_all([0; 5].map(|_| registry.volume(&disk))).await {
        assert!(matches!(asked, Err(ExportError::StoreUnavailable(_))));
    }
    assert_eq!(site.store.count("get"), 1);
    site.store.serve_all();
    assert_eq!(image(&registry, "disk").await[CHUNK as usize], 2, "the next one is an attempt of its own");
}

#[tokio::test]
async fn a_creation_that_hangs_keeps_its_name_and_holds_up_no_other() {
    let mut site = Site::new();
    let registry = site.start("a").await;
    site.store.judge(|op, key| if op == "put" && key.as_str().contains("/disk/") { Fate::Stuck } else { Fate::Served });
    let creating = registry.create(id("disk"), geometry(8));
    let others = async {
        assert!(matches!(registry.create(id("disk"), geometry(8)).await, Err(ExportError::Busy(..))));
        assert!(matches!(registry.open(id("disk"), false).await, Err(ExportError::Busy(..))));
        create(&registry, "other", 8).await;
    };
    tokio::select! {
        biased;
        _ = creating => panic!("the store is stuck"),
        done = tokio::time::timeout(Duration::from_secs(10), async {
            site.store.until_stuck(std::future::pending::<()>()).await;
            others.await;
        }) => done.expect("they wait for the one that hangs"),
    }
    site.store.serve_all();
    create(&registry, "disk", 8).await;
}

#[tokio::test]
async fn an_opening_that_hangs_holds_up_the_unload_of_its_export_and_nothing_else() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    create(&site.start("origin").await, "other", 8).await;
    let registry = site.elsewhere().await;
    site.store.judge(|op, key| if op == "get" && key.as_str().contains("/disk/") { Fate::Stuck } else { Fate::Served });
    let [opening, unloading] = [0; 2].map(|_| Arc::clone(&registry));
    let opening = tokio::spawn(async move { opening.volume(&id("disk")).await.map(drop) });
    site.store.until_stuck(std::future::pending::<()>()).await;
    let unloading = tokio::spawn(async move { unloading.unload(&id("disk")).await });
    let others = async {
        registry.unload(&id("other")).await.unwrap();
        registry.open(id("other"), false).await.unwrap();
        create(&registry, "new", 8).await;
    };
    tokio::time::timeout(Duration::from_secs(10), others).await.expect("they wait for the opening");
    assert!(!opening.is_finished() && !unloading.is_finished());
}

/// An export "disk" that begins as one snapshot, with a cache on server "a", and the registry that put another in its place, which
/// begins as another snapshot: chunk 0 is full of 1 in the one, of 2 in the other.
async fn recreated_elsewhere(site: &mut Site, change: bool) -> Arc<Registry> {
    let b = site.start("b").await;
    let source = create(&b, "source", 8).await;
    let mut snapshots = Vec::new();
    for byte in [1, 2] {
        write(&source, 0, byte, CHUNK).await;
        snapshots.push(b.snapshot(&id("source")).await.unwrap().snapshot_id);
    }
    b.clone_export(id("disk"), id("source"), snapshots[0]).await.unwrap();
    b.unload(&id("disk")).await.unwrap();
    let a = site.start("a").await;
    let volume = a.volume(&id("disk")).await.unwrap();
    assert_eq!(read_all(&volume).await[0], 1);
    if change {
        write(&volume, CHUNK, 7, 1).await;
    }
    a.close().await;
    site.store.delete(&root().export(&id("disk")).head()).await.unwrap();
    std::fs::remove_dir_all(site.cache_root("b").join("disk")).unwrap();
    b.clone_export(id("disk"), id("source"), snapshots[1]).await.unwrap();
    b
}

#[tokio::test]
async fn a_cache_of_an_export_that_was_deleted_and_created_anew_shows_the_new_one_or_refuses_to() {
    let mut site = Site::new();
    recreated_elsewhere(&mut site, false).await;
    let a = site.start("a").await;
    assert_eq!(image(&a, "disk").await[0], 2);
    write(&a.volume(&id("disk")).await.unwrap(), CHUNK, 7, 1).await;
    a.snapshot(&id("disk")).await.unwrap();

    let mut site = Site::new();
    recreated_elsewhere(&mut site, true).await;
    for _ in 0..2 {
        let refused = site.start("a").await.volume(&id("disk")).await.unwrap_err();
        let text = refused.to_string();
        assert!(matches!(refused, ExportError::Damaged(_)) && text.contains("move the folder away"), "{text}");
        assert!(text.contains(site.cache_root("a").to_str().unwrap()), "{text}");
    }
}

/// Deletes an export in the store, and creates it anew on another server.
async fn recreate(site: &mut Site, name: &str, geometry: Geometry) -> Arc<Registry> {
    let keys = root().export(&id(name));
    for key in [keys.head(), keys.current_ref()] {
        site.store.delete(&key).await.unwrap();
    }
    let other = site.start("other").await;
    other.create(id(name), geometry).await.unwrap();
    other
}

#[tokio::test]
async fn settling_what_an_export_left_that_was_created_anew_removes_no_snapshot() {
    let mut site = Site::new();
    let here = site.start("here").await;
    let volume = create(&here, "disk", 8).await;
    write(&volume, CHUNK, 1, CHUNK).await;
    here.snapshot(&id("disk")).await.unwrap();
    write(&volume, 0, 1, CHUNK).await;
    let mut landed = false;
    site.store.judge(move |op, key| {
        let head = key.as_str().ends_with("volume.json");
        match op {
            "get" if head && landed => Fate::Failed,
            "put" if head => {
                landed = true;
                Fate::LandedUnseen
            }
            _ => Fate::Served,
        }
    });
    here.snapshot(&id("disk")).await.unwrap_err();
    site.store.serve_all();
    site.start("there").await.clone_export(id("clone"), id("disk"), None).await.unwrap();
    recreate(&mut site, "disk", geometry(8)).await;
    let refused = here.snapshot(&id("disk")).await.unwrap_err();
    assert!(refused.to_string().contains("move the folder away"), "{refused}");
    assert_eq!(image(&site.elsewhere().await, "clone").await[0], 1);
}

#[tokio::test]
async fn an_older_export_without_a_head_is_not_created_over() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    site.store.delete(&root().export(&id("disk")).head()).await.unwrap();
    let registry = site.start("a").await;
    assert!(matches!(registry.create(id("disk"), geometry(8)).await, Err(ExportError::Exists(_))));
    registry.open(id("disk"), false).await.unwrap();
    assert_eq!(image(&registry, "disk").await[0], 1);
}

#[tokio::test]
async fn nothing_is_published_over_an_export_that_was_created_anew_meanwhile() {
    let other_sizes = Geometry::new(8 * CHUNK, 2 * CHUNK).unwrap();
    for (published, geometry) in [(true, geometry(8)), (false, geometry(8)), (false, other_sizes), (true, other_sizes)]
    {
        let mut site = Site::new();
        let here = site.start("here").await;
        let volume = create(&here, "disk", 8).await;
        write(&volume, 0, 1, CHUNK).await;
        if published {
            here.snapshot(&id("disk")).await.unwrap();
            write(&volume, CHUNK, 2, CHUNK).await;
        }
        let before = read_all(&volume).await;
        let other = recreate(&mut site, "disk", geometry).await;
        let head = site.store.get(&root().export(&id("disk")).head(), 1 << 20).await.unwrap().bytes;
        for refused in [here.snapshot(&id("disk")).await, here.compact(&id("disk")).await] {
            let refused = refused.unwrap_err();
            assert!(matches!(refused, ExportError::Damaged(_)), "{refused}");
            assert!(refused.to_string().contains("move the folder away"), "{refused}");
        }
        let now = site.store.get(&root().export(&id("disk")).head(), 1 << 20).await.unwrap().bytes;
        assert_eq!(now, head);
        assert_eq!(read_all(&volume).await, before, "what is here is kept");
        here.close().await;
        other.close().await;
        // Nor is it opened, though nothing of the one before may be left.
        for key in site.store.list(&"exports/disk/snapshots".parse().unwrap()).await.unwrap() {
            site.store.delete(&key).await.unwrap();
        }
        let refused = site.start("here").await.volume(&id("disk")).await.unwrap_err();
        assert!(refused.to_string().contains(site.cache_root("here").join("disk").to_str().unwrap()), "{refused}");
    }
}

#[tokio::test]
async fn a_reset_never_takes_an_image_of_other_sizes() {
    let mut site = Site::new();
    let here = site.start("here").await;
    let volume = create(&here, "disk", 8).await;
    write(&volume, 0, 1, 8 * CHUNK).await;
    let other = recreate(&mut site, "disk", Geometry::new(8 * CHUNK, 2 * CHUNK).unwrap()).await;
    write(&other.volume(&id("disk")).await.unwrap(), 0, 2, 8 * CHUNK).await;
    other.snapshot(&id("disk")).await.unwrap();
    let refused = here.reset(&id("disk")).await.unwrap_err();
    assert!(matches!(refused, ExportError::Damaged(_)), "{refused}");
    assert!(read_all(&volume).await.iter().all(|byte| *byte == 1));
}

#[tokio::test]
async fn the_beginning_of_an_export_that_was_created_anew_is_noted_with_it() {
    let mut site = Site::new();
    let b = recreated_elsewhere(&mut site, false).await;
    let a = site.start("a").await;
    let volume = a.volume(&id("disk")).await.unwrap();
    assert_eq!(read_all(&volume).await[0], 2);
    // Its beginning is noted for a start that finds another head, and changes here.
    write(&volume, CHUNK, 7, 1).await;
    a.close().await;
    write(&b.volume(&id("disk")).await.unwrap(), 0, 3, CHUNK).await;
    b.snapshot(&id("disk")).await.unwrap();
    let a = site.start("a").await;
    assert_eq!(image(&a, "disk").await[..=CHUNK as usize], [vec![2; CHUNK as usize], vec![7]].concat());
    assert!(matches!(a.snapshot(&id("disk")).await, Err(ExportError::Conflict { .. })));
}

#[tokio::test]
async fn a_server_without_changes_follows_a_head_whose_forerunners_are_gone() {
    let mut site = Site::new();
    let first = publish_eight(&mut site).await;
    let a = site.start("a").await;
    assert_eq!(image(&a, "disk").await[0], 1);
    a.close().await;
    let b = site.start("b").await;
    write(&b.volume(&id("disk")).await.unwrap(), 0, 0xbb, CHUNK).await;
    b.compact(&id("disk")).await.unwrap();
    let keys = root().export(&id("disk"));
    for key in [keys.manifest(first), keys.delta(first)] {
        site.store.delete(&key).await.unwrap();
    }
    assert_eq!(image(&site.start("a").await, "disk").await[0], 0xbb);
}

#[tokio::test]
async fn a_publish_whose_swap_landed_unseen_before_a_short_outage_is_no_failure() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let registry = site.start("origin").await;
    write(&registry.volume(&id("disk")).await.unwrap(), 0, 0xaa, CHUNK).await;
    let (mut landed, mut outage) = (false, false);
    site.store.judge(move |op, key| {
        if landed {
            // The head cannot be read to see whose it is, but when that is settled.
            return if std::mem::replace(&mut outage, false) { Fate::Failed } else { Fate::Served };
        }
        landed = op == "put" && key.as_str().ends_with("volume.json");
        outage = landed;
        if landed { Fate::LandedUnseen } else { Fate::Served }
    });
    let published = registry.snapshot(&id("disk")).await.unwrap();
    assert_eq!((published.created, published.generation.0), (true, 2));
    assert_eq!(status(&registry, "disk").await.dirty_chunks, 0);
}

#[tokio::test]
async fn creating_opening_and_unloading_refuse_what_does_not_fit() {
    let mut site = Site::new();
    let registry = site.start("a").await;
    create(&registry, "disk", 8).await;
    assert!(matches!(registry.create(id("disk"), geometry(8)).await, Err(ExportError::Exists(_))));
    assert!(matches!(registry.open(id("disk"), false).await, Err(ExportError::AlreadyLoaded(_))));
    assert!(matches!(registry.open(id("other"), false).await, Err(ExportError::NotFound(..))));
    assert!(matches!(registry.unload(&id("other")).await, Err(ExportError::NotFound(..))));
    let volume = registry.volume(&id("disk")).await.unwrap();
    write(&volume, 0, 7, 10).await;
    registry.unload(&id("disk")).await.unwrap();
    assert!(matches!(volume.read(range(0, 1)).await, Err(VolumeError::Closed(_))));
    assert!(matches!(registry.status(&id("disk")).await, Err(ExportError::NotFound(..))));
    // Still in the store, and the cache with its dirty data still here.
    assert!(matches!(registry.create(id("disk"), geometry(8)).await, Err(ExportError::Exists(_))));
    let status = registry.open(id("disk"), true).await.unwrap();
    assert_eq!(status.dirty_chunks, 1);
    let volume = registry.volume(&id("disk")).await.unwrap();
    assert_eq!(read(&volume, 0, 1).await[0], 7);
    assert!(matches!(volume.write(0, vec![1].into()).await, Err(VolumeError::ReadOnly(_))));
    assert!(matches!(volume.read(range(8 * CHUNK - 1, 2)).await, Err(VolumeError::OutOfRange { .. })));
}

#[tokio::test]
async fn an_export_that_cannot_be_made_leaves_nothing_behind() {
    let mut site = Site::new();
    let registry = site.start("a").await;
    std::fs::write(site.cache_root("a").join("disk"), "in the way").unwrap();
    registry.create(id("disk"), geometry(8)).await.unwrap_err();
    assert!(registry.list().is_empty());
    assert!(site.store.list(&"exports".parse().unwrap()).await.unwrap().is_empty());
}

#[tokio::test]
async fn one_bad_export_hinders_no_other() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let put = async |key: &str, text: &str| {
        let bytes = text.to_owned().into_bytes().into();
        site.store.put(&key.parse().unwrap(), bytes, Condition::Always).await.unwrap();
    };
    put("exports/broken/volume.json", "{").await;
    put("exports/new/volume.json", r#"{"version":9,"export_id":"new","image_size":4096,"chunk_size":4096}"#).await;
    put(
        "exports/lost/volume.json",
        r#"{"version":1,"export_id":"lost","image_size":4096,"chunk_size":4096,"current_snapshot_id":"0123456789abcdef0123456789abcdef"}"#,
    )
    .await;
    put("exports/no.export/readme.txt", "").await;
    let registry = site.elsewhere().await;
    let listed = registry.list();
    let failed: Vec<_> = listed.iter().map(|e| (e.export_id.as_str(), e.failed.is_some())).collect();
    assert_eq!(failed, [("broken", true), ("disk", false), ("lost", false), ("new", true)]);
    assert!(listed[3].failed.as_ref().unwrap().contains("version is 9"));
    assert_eq!(image(&registry, "disk").await[0], 1);
    // A head that names a missing manifest is an error for that export, never a fallback.
    assert!(matches!(registry.volume(&id("lost")).await, Err(ExportError::Damaged(_))));
    assert!(registry.list()[2].failed.as_ref().unwrap().contains("manifest.json"));
}

#[tokio::test(start_paused = true)]
async fn a_head_that_does_not_come_holds_up_no_other_export_and_is_read_again() {
    let mut site = Site::simulated();
    publish_eight(&mut site).await;
    for (key, name) in [
        ("exports/down/volume.json", "down"),
        ("exports/silent/volume.json", "silent"),
        ("exports/stray/readme.txt", ""),
    ] {
        let text = format!(r#"{{"version":1,"export_id":"{name}","image_size":4096,"chunk_size":4096}}"#);
        site.store.put(&key.parse().unwrap(), text.into(), Condition::Always).await.unwrap();
    }
    site.store.judge(|op, key| match key.as_str() {
        "exports/silent/volume.json" if op == "get" => Fate::Stuck,
        "exports/down/volume.json" if op == "get" => Fate::Failed,
        _ => Fate::Served,
    });
    let services = Arc::new(site.services(Arc::new(RealDisk::default())));
    let registry = Registry::list_names(services, site.cache_root("elsewhere")).await.unwrap();
    let state = |name: &str| {
        let listed = registry.list().into_iter().find(|export| export.export_id.as_str() == name);
        listed.map(|export| (export.discovering, export.failed.is_some(), export.geometry.is_some()))
    };
    let unread = Some((true, false, false));
    for name in ["disk", "down", "silent", "stray"] {
        assert_eq!(state(name), unread, "{name} is known by its name");
    }
    let reading = {
        let registry = Arc::clone(&registry);
        tokio::spawn(async move {
            registry.read_on().await;
            registry.read_again().await;
        })
    };
    while state("disk") == unread || state("down") == unread || state("stray").is_some() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(state("silent"), unread);
    assert_eq!(state("disk"), Some((false, false, true)));
    assert_eq!(state("down"), Some((false, true, false)));
    assert_eq!(image(&registry, "disk").await[0], 1);
    assert!(matches!(registry.volume(&id("down")).await, Err(ExportError::StoreUnavailable(_))));
    reading.abort();
    // The store is well again: what could not be read is, in the background.
    site.store.serve_all();
    registry.read_again().await;
    assert_eq!(state("down"), Some((false, false, true)));
}

#[tokio::test]
async fn a_folder_without_a_head_does_not_keep_its_name_from_being_created() {
    let mut site = Site::new();
    site.store.put(&"exports/disk/readme.txt".parse().unwrap(), "".into(), Condition::Always).await.unwrap();
    let services = Arc::new(site.services(Arc::new(RealDisk::default())));
    let registry = Registry::list_names(services, site.cache_root("a")).await.unwrap();
    assert!(registry.list()[0].discovering);
    let created = registry.create(id("disk"), Geometry::new(4096, 4096).unwrap()).await;
    let refused = matches!(&created, Err(ExportError::Exists(_)));
    registry.read_on().await;
    // What lies there may be an image of an older tool, which is not created over; either way no name stays that is no export.
    assert_eq!(registry.list().len(), usize::from(!refused));
}

#[tokio::test]
async fn a_cache_of_another_geometry_is_refused_and_left_alone() {
    let mut site = Site::new();
    let registry = site.start("a").await;
    write(&create(&registry, "disk", 8).await, 0, 1, 1).await;
    registry.close().await;
    let key = root().export(&id("disk")).head();
    let text = r#"{"version":1,"export_id":"disk","image_size":65536,"chunk_size":4096}"#;
    site.store.put(&key, text.into(), Condition::Always).await.unwrap();
    let refused = site.start("a").await.volume(&id("disk")).await.unwrap_err().to_string();
    assert!(refused.contains("image size is 32768") && refused.contains("65536"), "{refused}");
}

/// An export as older tools left it: a flat base image, no head, only `refs/current.json`. The keys in its files are of the
/// prefix that it was written under.
async fn legacy_export(site: &Site, written_under: &str) {
    let put = async |key: &str, bytes: Vec<u8>| {
        site.store.put(&key.parse().unwrap(), bytes.into(), Condition::Always).await.unwrap();
    };
    let base: Vec<u8> = (0..4u8).flat_map(|i| vec![if i == 2 { 0 } else { i + 1 }; CHUNK as usize]).collect();
    put("exports/old/snapshots/00000000000000000000000000000001/base.blob", base).await;
    let delta = vec![0x77; CHUNK as usize];
    let hash = blake3::hash(&delta).to_hex();
    put("exports/old/snapshots/00000000000000000000000000000002/delta.blob", delta).await;
    let manifest = format!(
        r#"{{"version":2,"export_id":"old","generation":5,"image_size":16384,"chunk_size":4096,"chunk_count":4,
        "created_at":"2024-01-01T00:00:00Z","base_ref":"base",
        "refs":[{{"id":"base","path":"{written_under}/old/snapshots/00000000000000000000000000000001/base.blob"}},
                {{"id":"d","path":"{written_under}/old/snapshots/00000000000000000000000000000002/delta.blob"}}],
        "entries":[{{"index":1,"ref":"d","offset":0,"len":4096,"blake3":"{hash}"}}]}}"#
    );
    let key = "old/snapshots/00000000000000000000000000000002/manifest.json";
    put(&format!("exports/{key}"), manifest.into_bytes()).await;
    let snapshot = "00000000000000000000000000000002";
    let current = format!(r#"{{"generation":5,"snapshot_id":"{snapshot}","manifest_key":"{written_under}/{key}"}}"#);
    put("exports/old/refs/current.json", current.into_bytes()).await;
}

#[tokio::test]
async fn an_export_of_older_tools_is_adopted_and_its_next_publish_covers_every_byte_by_a_hash() {
    for written_under in ["exports", "older/root", "exports/older"] {
        adopts_and_covers_every_byte(written_under).await;
    }
}

async fn adopts_and_covers_every_byte(written_under: &str) {
    let mut site = Site::new();
    legacy_export(&site, written_under).await;
    let registry = site.start("a").await;
    assert!(registry.list().is_empty());
    let status = registry.open(id("old"), false).await.unwrap();
    assert_eq!(status.snapshot_generation.0, 5);
    let volume = registry.volume(&id("old")).await.unwrap();
    let firsts: Vec<u8> = read_all(&volume).await.chunks(CHUNK as usize).map(|c| c[0]).collect();
    assert_eq!(firsts, [1, 0x77, 0, 4]);
    volume.trim(range(0, CHUNK)).await.unwrap();
    let published = registry.snapshot(&id("old")).await.unwrap();
    assert_eq!(published.generation.0, 6);
    let key = root().export(&id("old")).manifest(published.snapshot_id.unwrap());
    let manifest = site.store.get(&key, 1 << 20).await.unwrap().bytes;
    let manifest: serde_json::Value = serde_json::from_slice(&manifest).unwrap();
    assert!(manifest.get("base_ref").is_none());
    let indices: Vec<_> = manifest["entries"].as_array().unwrap().iter().map(|e| e["index"].clone()).collect();
    assert_eq!(indices, [1, 3], "published zeros have no entry");
    let firsts: Vec<u8> = image(&site.elsewhere().await, "old").await.chunks(CHUNK as usize).map(|c| c[0]).collect();
    assert_eq!(firsts, [0, 0x77, 0, 4]);
}

#[tokio::test]
async fn a_write_that_waited_for_its_fetch_never_lands_on_newer_data() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let registry = site.elsewhere().await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    let (fetch, fetched) = tokio::sync::watch::channel(false);
    site.store.hold_until("get_range", fetched);
    // The old connection's write waits for the chunk; the newer one's covers all of it and needs no fetch.
    let (on_old, on_new) = (volume.clone(), volume.clone());
    let old = tokio::spawn(async move { write(&on_old, 100, 0x01, 100).await });
    while site.store.count("get_range") == 0 && Arc::strong_count(&volume) < 5 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let new = tokio::spawn(async move { write(&on_new, 0, 0x02, CHUNK).await });
    tokio::time::sleep(Duration::from_millis(20)).await;
    fetch.send(true).unwrap();
    old.await.unwrap();
    new.await.unwrap();
    assert!(read(&volume, 0, CHUNK).await.iter().all(|b| *b == 0x02));
}

#[tokio::test]
async fn a_read_after_a_reset_gets_the_new_image_although_a_fetch_of_the_old_one_is_under_way() {
    let mut site = Site::new();
    let base_image = async |site: &Site, snapshot: u8| {
        let key = stand_on_base_image(&site.store, "old", snapshot, geometry(1)).await;
        site.store.put(&key, vec![snapshot; CHUNK as usize].into(), Condition::Always).await.unwrap();
    };
    base_image(&site, 1).await;
    let registry = site.start("a").await;
    let volume = registry.volume(&id("old")).await.unwrap();
    let (fetch, fetched) = tokio::sync::watch::channel(false);
    site.store.hold_until("get_range", fetched);
    let old = tokio::spawn(async move { read(&volume, 0, 1).await });
    // It is polled until it waits for its fetch.
    tokio::task::yield_now().await;
    base_image(&site, 2).await;
    registry.reset(&id("old")).await.unwrap();
    let volume = registry.volume(&id("old")).await.unwrap();
    let new = tokio::spawn(async move { read(&volume, 0, 1).await });
    tokio::task::yield_now().await;
    fetch.send(true).unwrap();
    assert_eq!([old.await.unwrap()[0], new.await.unwrap()[0]], [1, 2]);
}

#[tokio::test]
async fn a_swap_that_the_store_only_claims_to_have_made_is_no_publish() {
    let mut site = Site::new();
    let registry = site.start("here").await;
    let volume = create(&registry, "disk", 8).await;
    write(&volume, 0, 1, CHUNK).await;
    site.store.judge(
        |op, key| {
            if op == "put" && key.as_str().ends_with("volume.json") { Fate::Pretended } else { Fate::Served }
        },
    );
    let refused = registry.snapshot(&id("disk")).await.unwrap_err();
    assert!(refused.to_string().contains("answered that it had written the object"), "{refused}");
    assert_eq!(status(&registry, "disk").await.dirty_chunks, 1, "a chunk is clean once the head was read back");
    let refused = registry.create(id("other"), geometry(8)).await.unwrap_err();
    assert!(refused.to_string().contains("answered that it had written the object"), "{refused}");
    site.store.serve_all();
    assert!(registry.snapshot(&id("disk")).await.unwrap().created);
    assert_eq!(image(&site.elsewhere().await, "disk").await[0], 1);
}

#[tokio::test]
async fn a_snapshot_that_names_a_lost_blob_is_not_published_and_a_compaction_repairs_it() {
    for lost in ["gone", "short"] {
        let mut site = Site::new();
        let registry = site.start("here").await;
        let volume = create(&registry, "disk", 8).await;
        write(&volume, 0, 1, CHUNK).await;
        let first = registry.snapshot(&id("disk")).await.unwrap().snapshot_id.unwrap();
        write(&volume, CHUNK, 2, CHUNK).await;
        let blob = root().export(&id("disk")).delta(first);
        if lost == "gone" {
            site.store.delete(&blob).await.unwrap();
        } else {
            site.store.put(&blob, vec![1; 10].into(), Condition::Always).await.unwrap();
        }
        let refused = registry.snapshot(&id("disk")).await.unwrap_err();
        assert!(matches!(refused, ExportError::Damaged(_)) && refused.to_string().contains(blob.as_str()), "{refused}");
        assert_eq!(status(&registry, "disk").await.dirty_chunks, 1);
        assert_eq!(status(&registry, "disk").await.current_snapshot_id, Some(first));
        assert!(registry.compact(&id("disk")).await.unwrap().created, "every chunk of the blob is in the cache");
        let all = image(&site.elsewhere().await, "disk").await;
        assert_eq!([all[0], all[CHUNK as usize]], [1, 2]);
    }
}

/// What the store holds of an export, and the same once more a publish later.
async fn roll_back_after_a_publish(site: &mut Site) {
    publish_eight(site).await;
    let head = root().export(&id("disk")).head();
    let older = site.store.get(&head, 1 << 20).await.unwrap().bytes;
    let registry = site.start("here").await;
    write(&registry.volume(&id("disk")).await.unwrap(), 0, 0xaa, CHUNK).await;
    registry.snapshot(&id("disk")).await.unwrap();
    registry.close().await;
    site.store.put(&head, older, Condition::Always).await.unwrap();
}

#[tokio::test]
async fn a_cache_is_not_dropped_for_a_head_that_was_rolled_back() {
    let mut site = Site::new();
    roll_back_after_a_publish(&mut site).await;
    // The store alone, then the same once another server has published a line of its own there.
    for published_since in [false, true] {
        if published_since {
            let other = site.start("other").await;
            for byte in 1..4 {
                write(&other.volume(&id("disk")).await.unwrap(), CHUNK, byte, CHUNK).await;
                other.snapshot(&id("disk")).await.unwrap();
            }
        }
        let raw = site.cache_root("here").join("disk/cache.raw");
        let refused = site.start("here").await.volume(&id("disk")).await.unwrap_err();
        let text = refused.to_string();
        assert!(matches!(refused, ExportError::Damaged(_)) && text.contains("rolled back"), "{text}");
        assert!(text.contains(raw.parent().unwrap().to_str().unwrap()), "{text}");
        assert_eq!(std::fs::read(&raw).unwrap()[0], 0xaa, "what was published last is in the cache alone");
    }
}

#[tokio::test]
async fn a_dirty_cache_of_a_newer_snapshot_than_the_head_is_called_what_it_is() {
    let mut site = Site::new();
    roll_back_after_a_publish(&mut site).await;
    let head = root().export(&id("disk")).head();
    let older = site.store.get(&head, 1 << 20).await.unwrap().bytes;
    // The same server goes on, and the head is rolled back once more, under changes that are not published.
    site.cache_root("here");
    let registry = site.elsewhere().await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    write(&volume, 0, 0xbb, CHUNK).await;
    registry.snapshot(&id("disk")).await.unwrap();
    write(&volume, CHUNK, 0xcc, CHUNK).await;
    registry.close().await;
    drop((volume, registry));
    site.store.put(&head, older, Condition::Always).await.unwrap();
    let refused = site.start("elsewhere").await.volume(&id("disk")).await.unwrap_err();
    assert!(refused.to_string().contains("rolled back"), "{refused}");
}

#[tokio::test]
async fn an_older_copy_of_a_cache_with_changes_is_refused_and_says_what_to_do() {
    let mut site = Site::new();
    let registry = site.start("here").await;
    let volume = create(&registry, "disk", 8).await;
    write(&volume, 0, 1, CHUNK).await;
    volume.flush().await.unwrap();
    let (here, copy) = (site.cache_root("here").join("disk"), site.cache_root("here.copy").join("disk"));
    std::fs::create_dir(&copy).unwrap();
    for file in std::fs::read_dir(&here).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), copy.join(file.file_name())).unwrap();
    }
    let published = registry.snapshot(&id("disk")).await.unwrap().snapshot_id.unwrap();
    let refused = site.start("here.copy").await.volume(&id("disk")).await.unwrap_err();
    let text = refused.to_string();
    assert!(matches!(refused, ExportError::Damaged(_)) && text.contains("copy or an older state"), "{text}");
    assert!(text.contains(&published.to_string()) && text.contains("move the folder away"), "{text}");
    assert_eq!(image(&site.elsewhere().await, "disk").await[0], 1);
}
