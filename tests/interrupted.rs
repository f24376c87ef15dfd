//! What a volume keeps of its promises when the disk fails, the caller goes away or somebody else acts in between.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::panic, missing_docs)]

mod common;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use common::hooked::Hooked;
use common::sim::faults::{DiskFault, Faults, Plan};
use common::sim::{Loss, Sim, SimDisk, SimStore, State};
use common::volumes::*;
use common::watched::Fate;
use futures_util::FutureExt;
use nbd_server::cache::Edges;
use nbd_server::clock::SystemClock;
use nbd_server::disk::{Disk, RealDisk};
use nbd_server::store::retry::DEFAULT_LIMIT;
use nbd_server::store::{Condition, Key};
use nbd_server::units::SnapshotId;
use nbd_server::volume::registry::{ExportError, IDLE_BEFORE_CLOSE, IDLE_CHECK_INTERVAL, Operation, Registry};
use nbd_server::volume::{Services, VolumeError};
use tokio::time::{sleep, timeout};

/// Long enough for anything that does not wait.
const SOON: Duration = Duration::from_millis(300);
/// Long enough for anything, on any machine.
const PATIENCE: Duration = Duration::from_secs(30);

async fn start_sim(sim: &Arc<Sim>, disk: Arc<dyn Disk>) -> Arc<Registry> {
    let services = Services::new(Arc::new(SimStore::new(Arc::clone(sim))), root(), disk, Arc::new(SystemClock));
    Registry::discover(Arc::new(services), PathBuf::from("/cache")).await.unwrap()
}

/// Publishes an export of 8 chunks, chunk i full of byte i + 1.
async fn publish_eight(site: &mut Site) {
    let registry = site.start("origin").await;
    let volume = create(&registry, "disk", 8).await;
    for i in 0..8 {
        write(&volume, i * CHUNK, i as u8 + 1, CHUNK).await;
    }
    registry.snapshot(&id("disk")).await.unwrap();
    registry.close().await;
}

/// The first operation of this kind waits until the flag is set; the others pass.
fn hold_first(disk: &Hooked, operation: &'static str, name: &'static str) -> (Arc<AtomicBool>, Arc<AtomicBool>) {
    hold(disk, operation, name, 1)
}

/// As [`hold_first`], for the one of that number.
fn hold(
    disk: &Hooked,
    operation: &'static str,
    name: &'static str,
    number: usize,
) -> (Arc<AtomicBool>, Arc<AtomicBool>) {
    let (held, go) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
    let seen = AtomicUsize::new(0);
    let (is_held, may_go) = (Arc::clone(&held), Arc::clone(&go));
    disk.hook(move |op, path| {
        if op == operation && path.ends_with(name) && seen.fetch_add(1, Ordering::SeqCst) + 1 == number {
            is_held.store(true, Ordering::SeqCst);
            while !may_go.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    });
    (held, go)
}

#[tokio::test]
async fn a_flush_during_a_checkpoint_survives_a_power_loss() {
    let sim = Sim::new(State::default(), 1);
    let disk = Hooked::new(SimDisk(Arc::clone(&sim)));
    let registry = start_sim(&sim, Arc::new(disk.clone())).await;
    let volume = create(&registry, "disk", 8).await;
    write(&volume, 0, 0xaa, CHUNK).await;
    // While the checkpoint of a publish goes to the disk, a client writes and flushes.
    let (staging, runtime, writer) = (AtomicBool::new(false), tokio::runtime::Handle::current(), Arc::clone(&volume));
    disk.hook(move |op, path| {
        if op == "open" && path.ends_with("cache.meta.spare") {
            staging.store(true, Ordering::SeqCst);
        }
        if op == "sync" && path.ends_with("cache.meta.spare") && staging.swap(false, Ordering::SeqCst) {
            runtime.block_on(async {
                write(&writer, CHUNK, 0xbb, CHUNK).await;
                writer.flush().await.unwrap();
            });
        }
        Ok(())
    });
    registry.snapshot(&id("disk")).await.unwrap();
    let left = sim.walk().power_loss(Loss::Everything);
    let sim = Sim::new(left, 2);
    let registry = start_sim(&sim, Arc::new(SimDisk(Arc::clone(&sim)))).await;
    let all = image(&registry, "disk").await;
    assert_eq!([all[0], all[CHUNK as usize]], [0xaa, 0xbb], "the flushed write is gone");
}

#[tokio::test]
async fn an_open_whose_caller_went_away_never_touches_the_cache_of_the_next() {
    let mut site = Site::new();
    write(&create(&site.start("a").await, "disk", 8).await, 0, 0xaa, CHUNK).await;
    let disk = Hooked::new(RealDisk::default());
    let registry = site.start_on("a", Arc::new(disk.clone())).await;
    let (_, go) = hold_first(&disk, "sync", "cache.raw");
    assert!(timeout(SOON, registry.volume(&id("disk"))).await.is_err());
    // Whether the next one may go on at once or waits for the first: what it writes is kept.
    if let Ok(volume) = timeout(SOON, registry.volume(&id("disk"))).await {
        let volume = volume.unwrap();
        write(&volume, CHUNK, 0xbb, CHUNK).await;
        volume.flush().await.unwrap();
    }
    go.store(true, Ordering::SeqCst);
    let volume = registry.volume(&id("disk")).await.unwrap();
    sleep(SOON).await;
    write(&volume, CHUNK, 0xbb, CHUNK).await;
    volume.flush().await.unwrap();
    drop((volume, registry));
    let all = image(&site.start("a").await, "disk").await;
    assert_eq!([all[0], all[CHUNK as usize]], [0xaa, 0xbb], "the flushed write is gone");
}

#[tokio::test]
async fn an_export_unloaded_while_it_is_being_opened_is_not_open_afterwards() {
    let mut site = Site::new();
    write(&create(&site.start("a").await, "disk", 8).await, 0, 0xaa, CHUNK).await;
    let disk = Hooked::new(RealDisk::default());
    let registry = site.start_on("a", Arc::new(disk.clone())).await;
    let (held, go) = hold_first(&disk, "sync", "cache.raw");
    let opening = tokio::spawn({
        let registry = Arc::clone(&registry);
        async move { registry.volume(&id("disk")).await }
    });
    while !held.load(Ordering::SeqCst) {
        sleep(Duration::from_millis(1)).await;
    }
    let unloading = tokio::spawn({
        let registry = Arc::clone(&registry);
        async move { registry.unload(&id("disk")).await }
    });
    sleep(SOON).await;
    go.store(true, Ordering::SeqCst);
    unloading.await.unwrap().unwrap();
    // Otherwise the next open would be a second one on the same files.
    if let Ok(volume) = opening.await.unwrap() {
        let refused = volume.write(0, vec![1].into()).await;
        assert!(matches!(refused, Err(VolumeError::Closed(_))), "{refused:?}");
    }
}

#[tokio::test]
async fn a_publish_whose_caller_went_away_cleans_nothing_that_the_next_one_cut() {
    let mut site = Site::new();
    let disk = Hooked::new(RealDisk::default());
    let registry = site.start_on("a", Arc::new(disk.clone())).await;
    let volume = create(&registry, "disk", 8).await;
    write(&volume, 0, 0xaa, CHUNK).await;
    // The first goes on beside the upload; this one is between upload and swap.
    let (held, go) = hold(&disk, "sync", "cache.raw", 2);
    let caller = tokio::spawn({
        let registry = Arc::clone(&registry);
        async move { registry.snapshot(&id("disk")).await }
    });
    while !held.load(Ordering::SeqCst) {
        sleep(Duration::from_millis(1)).await;
    }
    caller.abort();
    write(&volume, CHUNK, 0xbb, CHUNK).await;
    site.store.judge(|op, _| if op == "upload" { Fate::Stuck } else { Fate::Served });
    let _ = timeout(SOON, registry.snapshot(&id("disk"))).await;
    go.store(true, Ordering::SeqCst);
    while status(&registry, "disk").await.operation != Operation::Idle {
        sleep(Duration::from_millis(1)).await;
    }
    site.store.serve_all();
    assert_eq!(status(&registry, "disk").await.dirty_chunks, 1, "what was never published is dirty");
    registry.snapshot(&id("disk")).await.unwrap();
    assert_eq!(image(&site.elsewhere().await, "disk").await, read_all(&volume).await);
}

#[tokio::test]
async fn a_chunk_written_since_the_cut_is_never_clean_after_a_power_loss() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let registry = site.start("origin").await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    write(&volume, 0, 0xaa, CHUNK).await;
    volume.flush().await.unwrap();
    let mut landed = false;
    site.store.judge(move |op, key| {
        if landed {
            return Fate::Stuck;
        }
        landed = op == "put" && key.as_str().ends_with("volume.json");
        if landed { Fate::LandedUnseen } else { Fate::Served }
    });
    assert!(site.store.until_stuck(registry.snapshot(&id("disk"))).await.is_none());
    // Its mark is not sealed, but the bytes reach the disk.
    write(&volume, 0, 0xbb, 10).await;
    drop((volume, registry));
    site.store.serve_all();
    let registry = site.start_on("origin", Arc::new(Hooked::new(RealDisk::default()).after_boot(1))).await;
    let here = image(&registry, "disk").await;
    assert!(here[0] == 0xaa || here[0] == 0xbb);
    registry.snapshot(&id("disk")).await.unwrap();
    let there = image(&site.elsewhere().await, "disk").await;
    assert_eq!((here[0], status(&registry, "disk").await.dirty_chunks), (there[0], 0), "clean is: as published");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_only_watches_an_export_waits_for_none_of_its_disk_operations() {
    for (operation, name) in [("sync_dir", "disk"), ("punch", "cache.raw")] {
        let mut site = Site::new();
        let disk = Hooked::new(RealDisk::default());
        let registry = site.start_on("a", Arc::new(disk.clone())).await;
        write(&create(&registry, "disk", 8).await, 0, 0xaa, CHUNK).await;
        let (held, go) = hold_first(&disk, operation, name);
        let [resetting, watching] = [0; 2].map(|_| Arc::clone(&registry));
        let resetting = tokio::spawn(async move { resetting.reset(&id("disk")).await });
        while !held.load(Ordering::SeqCst) {
            sleep(Duration::from_millis(1)).await;
        }
        let watching = tokio::spawn(async move { (watching.list().len(), status(&watching, "disk").await.operation) });
        let watched = timeout(PATIENCE, watching).await;
        go.store(true, Ordering::SeqCst);
        resetting.await.unwrap().unwrap();
        assert_eq!(watched.expect(operation).unwrap(), (1, Operation::Resetting));
    }
}

#[tokio::test]
async fn a_reset_without_room_changes_nothing() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let disk = Hooked::new(RealDisk::default());
    let (a, b) = (site.start_on("a", Arc::new(disk.clone())).await, site.start("b").await);
    let (on_a, on_b) = (a.volume(&id("disk")).await.unwrap(), b.volume(&id("disk")).await.unwrap());
    write(&on_a, 0, 0xaa, CHUNK).await;
    write(&on_b, 3 * CHUNK, 0xbb, CHUNK).await;
    b.snapshot(&id("disk")).await.unwrap();
    disk.fail("write_at", "cache.meta.spare", io::ErrorKind::StorageFull);
    assert!(matches!(a.reset(&id("disk")).await, Err(ExportError::Volume(VolumeError::NoSpace(_)))));
    disk.serve_all();
    let all = read_all(&on_a).await;
    assert_eq!([all[0], all[3 * CHUNK as usize]], [0xaa, 4], "one image, not two mixed");
    a.reset(&id("disk")).await.unwrap();
    let all = read_all(&on_a).await;
    assert_eq!([all[0], all[3 * CHUNK as usize]], [1, 0xbb]);
}

#[tokio::test]
async fn a_checkpoint_that_finds_no_room_for_the_newest_marks_poisons_nothing() {
    let mut site = Site::new();
    let disk = Hooked::new(RealDisk::default());
    let registry = site.start_on("a", Arc::new(disk.clone())).await;
    let volume = create(&registry, "disk", 8).await;
    write(&volume, 0, 0xaa, CHUNK).await;
    let (staging, full) = (AtomicBool::new(false), AtomicBool::new(false));
    let (runtime, writer) = (tokio::runtime::Handle::current(), Arc::clone(&volume));
    disk.hook(move |op, path| {
        if !path.ends_with("cache.meta.spare") {
            return Ok(());
        }
        match op {
            "open" => staging.store(true, Ordering::SeqCst),
            "sync" if staging.swap(false, Ordering::SeqCst) => {
                runtime.block_on(write(&writer, CHUNK, 0xbb, CHUNK));
                full.store(true, Ordering::SeqCst);
            }
            "write_at" if full.swap(false, Ordering::SeqCst) => return Err(io::ErrorKind::StorageFull.into()),
            _ => {}
        }
        Ok(())
    });
    let _ = registry.snapshot(&id("disk")).await;
    disk.serve_all();
    volume.write(2 * CHUNK, vec![0xcc; CHUNK as usize].into()).await.unwrap();
    volume.flush().await.unwrap();
    registry.snapshot(&id("disk")).await.unwrap();
    assert_eq!(image(&site.elsewhere().await, "disk").await, read_all(&volume).await);
}

#[test]
fn the_log_stays_small_without_any_flush() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path().join("disk");
    let cache = opening(dir.clone(), geometry(8)).open().unwrap();
    for _ in 0..40_000 {
        cache.write(0, &[1; CHUNK as usize], |_| true).unwrap();
        cache.zero(range(0, CHUNK), Edges::Zero, |_| true).unwrap();
    }
    let len = std::fs::metadata(dir.join("cache.meta")).unwrap().len();
    // Each of the two files has room for the checkpoint of what the other one's log may say.
    assert!(len < 5 << 19, "{len}");
}

#[tokio::test(start_paused = true)]
async fn a_store_that_throttles_the_last_step_of_a_publish_for_a_while_costs_no_upload() {
    let mut site = Site::simulated();
    publish_eight(&mut site).await;
    let registry = site.start("a").await;
    write(&registry.volume(&id("disk")).await.unwrap(), 0, 0xaa, CHUNK).await;
    site.store.forget_counts();
    site.store.throttle_heads(Duration::from_secs(2));
    assert!(registry.snapshot(&id("disk")).await.unwrap().created);
    assert_eq!(site.store.count("upload"), 2, "the blob and the manifest, once");
    assert_eq!(image(&site.elsewhere().await, "disk").await[0], 0xaa);
}

#[tokio::test(start_paused = true)]
async fn a_publish_whose_last_step_is_never_served_ends_in_time_with_the_stores_own_words() {
    let mut site = Site::simulated();
    publish_eight(&mut site).await;
    let registry = site.start("a").await;
    write(&registry.volume(&id("disk")).await.unwrap(), 0, 0xaa, CHUNK).await;
    site.store.throttle_heads(DEFAULT_LIMIT * 10);
    let begun = tokio::time::Instant::now();
    let error = registry.snapshot(&id("disk")).await.unwrap_err().to_string();
    // As long again it is tried to make sure that no swap lands any more.
    assert!(begun.elapsed() <= DEFAULT_LIMIT * 2, "{:?}", begun.elapsed());
    assert!(error.contains("gave up after") && error.ends_with("as the test wishes"), "{error}");

    // What it left is settled by the next one, and that needs a moment as well.
    let error = registry.snapshot(&id("disk")).await.unwrap_err().to_string();
    assert!(error.contains("gave up after") && error.ends_with("as the test wishes"), "{error}");
    site.store.throttle_heads(Duration::from_secs(2));
    assert!(registry.snapshot(&id("disk")).await.unwrap().created);
    assert_eq!(image(&site.elsewhere().await, "disk").await[0], 0xaa);
}

#[tokio::test]
async fn objects_that_older_tools_built_on_are_never_removed() {
    let mut site = Site::new();
    // A swap is tried once.
    site.patience.limit = Duration::ZERO;
    publish_eight(&mut site).await;
    let registry = site.start("origin").await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    write(&volume, 0, 0xaa, CHUNK).await;
    // The swap does not get through, and the publish is given up; then a late one lands, and an older tool, which does not
    // name parents, publishes on top of it, just before the head's version is moved.
    let (inner, swaps) = (Arc::clone(&site.store.inner), AtomicUsize::new(0));
    let first = registry.list()[0].current_snapshot_id.unwrap();
    site.store.judge(move |op, key| {
        let swap = op == "put" && key.as_str().ends_with("volume.json");
        match swap.then(|| swaps.fetch_add(1, Ordering::SeqCst)) {
            Some(0) => return Fate::Failed,
            Some(1) => {}
            _ => return Fate::Served,
        }
        let keys = root().export(&id("disk"));
        let text = |key: &Key| {
            let bytes = inner.get(key, 1 << 20).now_or_never().unwrap().unwrap().bytes;
            String::from_utf8(bytes.to_vec()).unwrap()
        };
        let put = |key: &Key, text: String| {
            inner.put(key, text.into(), Condition::Always).now_or_never().unwrap().unwrap();
        };
        let folders = inner.list_folders(&"exports/disk/snapshots".parse().unwrap()).now_or_never().unwrap().unwrap();
        let ours: SnapshotId = folders.iter().map(|name| name.parse().unwrap()).find(|id| *id != first).unwrap();
        let theirs = SnapshotId::generate();
        let manifest = text(&keys.manifest(ours)).replace("\"generation\": 2", "\"generation\": 3");
        let lines = manifest.lines().filter(|line| !line.contains("parent_snapshot_id"));
        put(&keys.manifest(theirs), lines.collect());
        put(&keys.head(), text(&keys.head()).replace(&first.to_string(), &theirs.to_string()));
        Fate::Served
    });
    assert!(registry.snapshot(&id("disk")).await.is_err());
    site.store.serve_all();
    let all = image(&site.elsewhere().await, "disk").await;
    assert_eq!([all[0], all[CHUNK as usize]], [0xaa, 2]);
}

#[tokio::test]
async fn an_export_whose_head_went_through_before_an_outage_is_there_after_it() {
    let mut site = Site::new();
    let registry = site.start("a").await;
    let mut created = false;
    site.store.judge(move |op, _| {
        created |= op == "put";
        if op == "get" && created { Fate::Failed } else { Fate::Served }
    });
    assert!(registry.create(id("disk"), geometry(8)).await.is_err());
    site.store.serve_all();
    assert!(matches!(registry.create(id("disk"), geometry(8)).await, Err(ExportError::Exists(_))));
    assert_eq!(status(&registry, "disk").await.dirty_chunks, 0);
}

#[tokio::test]
async fn after_a_failed_sync_a_restart_trusts_only_what_was_sealed() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let disk = Hooked::new(RealDisk::default());
    let registry = site.start_on("a", Arc::new(disk.clone())).await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    write(&volume, 0, 0xaa, CHUNK).await;
    disk.fail("sync", "cache.raw", io::ErrorKind::Other);
    assert!(matches!(volume.flush().await, Err(VolumeError::Failed(_))));
    registry.close().await;
    drop((volume, registry));
    // The kernel drops what it could not write.
    let raw = std::fs::File::options().write(true).open(site.cache_root("a").join("disk/cache.raw")).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&raw, &[0; CHUNK as usize], 0).unwrap();
    let all = image(&site.start("a").await, "disk").await;
    assert!(matches!(all[0], 1 | 0xaa), "{} was never written", all[0]);
}

#[tokio::test]
async fn a_publish_given_up_in_an_outage_costs_later_writes_nothing() {
    let mut site = Site::new();
    // Less than a block for what is set aside, so it would be in the file.
    site.publish_bytes = 7 * CHUNK;
    let registry = site.start("a").await;
    let volume = create(&registry, "disk", 64).await;
    for i in 0..64 {
        write(&volume, i * CHUNK, 1, CHUNK).await;
    }
    let mut down = false;
    site.store.judge(move |op, _| {
        down |= op == "upload";
        if down { Fate::Failed } else { Fate::Served }
    });
    assert!(registry.snapshot(&id("disk")).await.is_err());
    for i in 0..64 {
        write(&volume, i * CHUNK, 2, 10).await;
    }
    assert!(!site.cache_root("a").join("disk/cut.aside").exists(), "nobody will read what is set aside");
    site.store.serve_all();
    registry.snapshot(&id("disk")).await.unwrap();
    assert_eq!(image(&site.elsewhere().await, "disk").await, read_all(&volume).await);
}

#[tokio::test(start_paused = true)]
async fn what_a_failed_sync_dropped_is_never_published() {
    let sim = Sim::new(State::default(), 1);
    let store = SimStore::new(Arc::clone(&sim));
    let registry = common::scene::start(&sim, &store, "/cache").await.unwrap();
    // More chunks than a publish reads ahead of its upload.
    let volume = create(&registry, "disk", 32).await;
    write(&volume, 0, 0xaa, 32 * CHUNK).await;
    // A client flushes while the upload is under way, and the disk does not take what it has: the kernel drops it.
    let (on, writer) = (Arc::clone(&sim), Arc::clone(&volume));
    store.meanwhile(move |operation, _| {
        let (sim, volume) = (Arc::clone(&on), Arc::clone(&writer));
        (operation == "upload").then(|| -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> {
            Box::pin(async move {
                sim.faults(|f| f.disk = Some(Plan { at: f.disk_calls, fault: DiskFault::Eio, sticky: true }));
                volume.flush().await.unwrap_err();
                sim.faults(Faults::end);
            })
        })
    });
    let refused = registry.snapshot(&id("disk")).await.unwrap_err();
    assert!(matches!(refused, ExportError::Volume(VolumeError::Failed(_))), "{refused}");
    let elsewhere = common::scene::start(&sim, &SimStore::new(Arc::clone(&sim)), "/elsewhere").await.unwrap();
    assert_eq!(status(&elsewhere, "disk").await.snapshot_generation.0, 0, "nothing was published");
}

#[tokio::test]
async fn a_publish_that_is_cancelled_leaves_everything_as_before_and_the_next_one_succeeds() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let registry = site.start("origin").await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    let before = site.store.inner.list(&"exports".parse().unwrap()).await.unwrap();
    for kind in ["snapshot", "compact"] {
        write(&volume, 0, 0xaa, CHUNK).await;
        site.store.judge(|op, _| if op == "upload" { Fate::Stuck } else { Fate::Served });
        let publishing = tokio::spawn({
            let registry = Arc::clone(&registry);
            async move {
                if kind == "snapshot" {
                    registry.snapshot(&id("disk")).await
                } else {
                    registry.compact(&id("disk")).await
                }
            }
        });
        let progress = loop {
            sleep(Duration::from_millis(1)).await;
            if let Some(progress) = status(&registry, "disk").await.progress {
                break progress;
            }
        };
        let chunks = if kind == "snapshot" { 1 } else { 8 };
        assert!(progress.total_bytes == chunks * CHUNK && progress.done_bytes <= progress.total_bytes, "{progress:?}");
        // In the middle of the upload a write goes to a chunk of the cut.
        write(&volume, 10, 0xbb, 10).await;
        assert!(registry.cancel(&id("disk")).await.unwrap(), "{kind}");
        assert!(matches!(publishing.await.unwrap(), Err(ExportError::Cancelled(_))), "{kind}");
        let after = status(&registry, "disk").await;
        assert_eq!((after.operation, after.progress, after.dirty_chunks), (Operation::Idle, None, 1), "{kind}");
        assert_eq!(site.store.inner.list(&"exports".parse().unwrap()).await.unwrap(), before, "{kind}");
        assert!(!site.cache_root("origin").join("disk/snapshot.journal.json").exists(), "{kind} is rolled back by now");
        assert!(!registry.cancel(&id("disk")).await.unwrap(), "there is nothing to cancel any more");
    }
    site.store.serve_all();
    assert!(registry.snapshot(&id("disk")).await.unwrap().created);
    assert_eq!(image(&site.elsewhere().await, "disk").await, read_all(&volume).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_publish_whose_disk_hangs_holds_up_nobody_and_takes_nothing_from_the_next() {
    let (mut site, disk) = (Site::new(), Hooked::new(RealDisk::default()));
    let registry = site.start_on("here", Arc::new(disk.clone())).await;
    let volume = create(&registry, "disk", 1).await;
    write(&volume, 0, 1, CHUNK).await;
    // The first read of the cache is that of the publish given up, the second one that of the next.
    let (gates, waits): (Vec<_>, Vec<_>) = [(); 2].map(|()| std::sync::mpsc::channel::<()>()).into_iter().unzip();
    let (waits, reads) = (waits.into_iter().map(Mutex::new).collect::<Vec<_>>(), Arc::new(AtomicUsize::new(0)));
    let counted = Arc::clone(&reads);
    disk.hook(move |operation, path| {
        if operation == "read_at" && path.ends_with("cache.raw") {
            let nth = counted.fetch_add(1, Ordering::SeqCst);
            waits.get(nth).map(|wait| wait.lock().unwrap().recv());
        }
        Ok(())
    });
    let snapshot = || {
        let registry = Arc::clone(&registry);
        tokio::spawn(async move { registry.snapshot(&id("disk")).await })
    };
    let reached = async |nth| {
        while reads.load(Ordering::SeqCst) < nth {
            sleep(Duration::from_millis(1)).await;
        }
    };
    let given_up = snapshot();
    timeout(PATIENCE, reached(1)).await.expect("a read by the publish");
    assert!(timeout(PATIENCE, registry.cancel(&id("disk"))).await.expect("nobody waits for the disk").unwrap());
    assert!(matches!(given_up.await.unwrap(), Err(ExportError::Cancelled(_))));
    let next = snapshot();
    timeout(PATIENCE, reached(2)).await.expect("a read by the next publish");
    let mut gates = gates.into_iter();
    drop(gates.next());
    // Time for the late read to come to its end.
    sleep(SOON).await;
    write(&volume, 0, 2, 1).await;
    drop(gates.next());
    assert!(timeout(PATIENCE, next).await.unwrap().unwrap().unwrap().created);
    assert!(image(&site.elsewhere().await, "disk").await.iter().all(|byte| *byte == 1), "as it was at the cut");
    assert_eq!(read(&volume, 0, 2).await[..], [2, 1]);
}

#[tokio::test]
async fn a_publish_cancelled_at_any_call_is_done_or_as_if_it_had_never_been() {
    for at in 0.. {
        let mut site = Site::new();
        publish_eight(&mut site).await;
        let registry = site.start("origin").await;
        let volume = registry.volume(&id("disk")).await.unwrap();
        write(&volume, 0, 0xaa, CHUNK).await;
        let before = site.store.inner.list(&"exports".parse().unwrap()).await.unwrap();
        let reached = Arc::new(AtomicBool::new(false));
        let (tell, mut calls) = (Arc::clone(&reached), 0);
        // Each call takes so long that the cancellation arrives while this one is under way.
        *site.store.delay.lock().unwrap() = Duration::from_millis(5);
        site.store.judge(move |_, _| {
            tell.fetch_or(calls == at, Ordering::SeqCst);
            calls += 1;
            Fate::Served
        });
        let publishing = tokio::spawn({
            let registry = Arc::clone(&registry);
            async move { registry.snapshot(&id("disk")).await }
        });
        while !reached.load(Ordering::SeqCst) && !publishing.is_finished() {
            tokio::task::yield_now().await;
        }
        let cancelled = registry.cancel(&id("disk")).await.unwrap();
        let published = publishing.await.unwrap();
        let after = status(&registry, "disk").await;
        match published {
            Ok(published) => assert!(!cancelled && published.created && after.dirty_chunks == 0, "at {at}"),
            Err(ExportError::Cancelled(_)) => {
                assert!(cancelled && after.dirty_chunks == 1, "at {at}");
                // Rolled back before anybody hears of it, not at the next publish.
                let there = site.store.inner.list(&"exports".parse().unwrap()).await.unwrap();
                assert_eq!(there, before, "at {at}");
                assert!(!site.cache_root("origin").join("disk/snapshot.journal.json").exists(), "at {at}");
            }
            Err(e) => panic!("at {at}: {e}"),
        }
        *site.store.delay.lock().unwrap() = Duration::ZERO;
        let there = image(&site.elsewhere().await, "disk").await;
        assert_eq!(there[0] == 0xaa, !cancelled, "at {at}");
        // It was not reached: all of them were tried.
        if !reached.load(Ordering::SeqCst) {
            assert!(at > 3, "blob, manifest and head at least");
            break;
        }
        registry.snapshot(&id("disk")).await.unwrap();
        assert_eq!(image(&site.elsewhere().await, "disk").await, read_all(&volume).await);
    }
}

/// How many descriptors this process has on files below a folder.
fn descriptors_below(dir: &Path) -> usize {
    let open = std::fs::read_dir("/proc/self/fd").unwrap().filter_map(|fd| std::fs::read_link(fd.unwrap().path()).ok());
    open.filter(|file| file.starts_with(dir)).count()
}

/// Closes idle exports until no file below a folder is open: what a use began in the background may last longer than the use.
async fn close_idle(registry: &Arc<Registry>, dir: &Path) {
    let closed = async {
        while descriptors_below(dir) > 0 {
            registry.close_idle(Duration::ZERO).await;
            sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(PATIENCE, closed).await.unwrap();
}

#[tokio::test]
async fn an_idle_export_is_closed_and_its_status_and_listing_stay_the_same() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let (registry, dir) = (site.start("a").await, site.cache_root("a").join("disk"));
    write(&registry.volume(&id("disk")).await.unwrap(), 0, 0xaa, CHUNK).await;
    registry.snapshot(&id("disk")).await.unwrap();
    let before = (status(&registry, "disk").await, registry.list());
    assert!(descriptors_below(&dir) > 0);
    close_idle(&registry, &dir).await;
    site.store.forget_counts();
    let after = (status(&registry, "disk").await, registry.list());
    assert_eq!(format!("{after:?}"), format!("{before:?}"));
    assert_eq!((descriptors_below(&dir), site.store.count("get")), (0, 0), "a status opens it");

    let elsewhere = site.start("origin").await;
    write(&elsewhere.volume(&id("disk")).await.unwrap(), 0, 0xbb, CHUNK).await;
    let newer = elsewhere.snapshot(&id("disk")).await.unwrap();
    registry.snapshots(&id("disk")).await.unwrap();
    let status = status(&registry, "disk").await;
    assert_eq!(status.remote_head_snapshot_id, newer.snapshot_id, "a listing found a newer head");
    assert_eq!(status.current_snapshot_id, before.0.current_snapshot_id);
    assert_eq!(image(&registry, "disk").await[0], 0xbb, "without changes it follows the head when it is opened");
}

#[tokio::test]
async fn an_export_that_is_attached_dirty_faulty_or_published_is_not_closed_as_idle() {
    let mut site = Site::new();
    publish_eight(&mut site).await;
    let (registry, dir) = (site.start("a").await, site.cache_root("a").join("disk"));
    let stays_open = async |why: &str| {
        // What the last use began in the background would keep it open, too.
        sleep(SOON).await;
        registry.close_idle(Duration::ZERO).await;
        assert!(descriptors_below(&dir) > 0, "it is {why}");
    };
    let attached = registry.volume(&id("disk")).await.unwrap();
    stays_open("attached").await;
    write(&attached, 0, 0xaa, CHUNK).await;
    drop(attached);
    stays_open("dirty").await;
    let (open, gate) = tokio::sync::watch::channel(false);
    site.store.hold_until("upload", gate);
    let publishing = site.begin_snapshot("a", &registry, "disk").await;
    stays_open("being published").await;
    open.send_replace(true);
    publishing.await.unwrap().unwrap();
    site.store.judge(|op, _| if op == "get_range" { Fate::Failed } else { Fate::Served });
    let read = registry.volume(&id("disk")).await.unwrap().read(range(CHUNK, 1)).await;
    assert!(matches!(read, Err(VolumeError::Unavailable(_))), "{read:?}");
    stays_open("faulty").await;
    site.store.serve_all();
    make_resident(&registry.volume(&id("disk")).await.unwrap(), CHUNK, CHUNK).await;
    close_idle(&registry, &dir).await;
    assert_eq!(image(&registry, "disk").await, image(&site.elsewhere().await, "disk").await);
}

/// A server "a" with an export that is being closed as idle, and the flag that lets this go on.
async fn being_closed(site: &mut Site, disk: &Hooked) -> (Arc<Registry>, Arc<AtomicBool>) {
    publish_eight(site).await;
    let registry = site.start_on("a", Arc::new(disk.clone())).await;
    make_resident(&registry.volume(&id("disk")).await.unwrap(), 0, 8 * CHUNK).await;
    let (held, go) = hold_first(disk, "sync", "cache.meta");
    let (closer, dir) = (Arc::clone(&registry), site.cache_root("a").join("disk"));
    tokio::spawn(async move { close_idle(&closer, &dir).await });
    while !held.load(Ordering::SeqCst) {
        sleep(Duration::from_millis(1)).await;
    }
    (registry, go)
}

#[tokio::test]
async fn a_client_that_comes_while_an_idle_export_is_closed_gets_it_opened_anew() {
    let mut site = Site::new();
    let disk = Hooked::new(RealDisk::default());
    let (registry, go) = being_closed(&mut site, &disk).await;
    let dir = site.cache_root("a").join("disk");
    let (opens, left_open) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let (count, left) = (Arc::clone(&opens), Arc::clone(&left_open));
    disk.hook(move |op, path| {
        if op == "open" && path.starts_with(&dir) && count.fetch_add(1, Ordering::SeqCst) == 0 {
            left.store(descriptors_below(&dir), Ordering::SeqCst);
        }
        Ok(())
    });
    let clients = [0; 3].map(|_| {
        let registry = Arc::clone(&registry);
        tokio::spawn(async move { registry.volume(&id("disk")).await.unwrap() })
    });
    sleep(SOON).await;
    let early = opens.load(Ordering::SeqCst);
    go.store(true, Ordering::SeqCst);
    assert_eq!(early, 0, "it is opened while it is being closed");
    let volumes = timeout(PATIENCE, futures_util::future::try_join_all(clients)).await.unwrap().unwrap();
    assert!(volumes.iter().all(|volume| Arc::ptr_eq(volume, &volumes[0])));
    assert!(opens.load(Ordering::SeqCst) > 0);
    assert_eq!(left_open.load(Ordering::SeqCst), 0, "files of the closed one are still open");
    write(&volumes[0], 0, 0xaa, CHUNK).await;
    assert_eq!(read_all(&volumes[0]).await[CHUNK as usize], 2);
}

#[tokio::test]
async fn a_stop_and_an_unload_wait_for_an_idle_export_that_is_being_closed() {
    for unload in [false, true] {
        let mut site = Site::new();
        let disk = Hooked::new(RealDisk::default());
        let (registry, go) = being_closed(&mut site, &disk).await;
        let ending = async {
            if unload {
                registry.unload(&id("disk")).await.unwrap();
            } else {
                registry.close().await;
            }
        };
        tokio::pin!(ending);
        let early = timeout(SOON, &mut ending).await.is_ok();
        go.store(true, Ordering::SeqCst);
        assert!(!early, "it ends before the files are closed");
        timeout(PATIENCE, ending).await.unwrap();
        assert_eq!(descriptors_below(&site.cache_root("a")), 0);
        assert_eq!(registry.list().len(), usize::from(!unload));
        if !unload {
            let gets = site.store.count("get_range");
            assert_eq!(image(&site.start("a").await, "disk").await[CHUNK as usize], 2);
            assert_eq!(site.store.count("get_range"), gets, "clean chunks are kept, as after a clean stop");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_export_counts_as_idle_ten_minutes_after_its_last_use_though_its_status_is_polled() {
    let mut site = Site::simulated();
    publish_eight(&mut site).await;
    let (registry, dir) = (site.start("a").await, site.cache_root("a").join("disk"));
    let closer = Arc::clone(&registry);
    let closer = tokio::spawn(async move { closer.keep_closing_idle().await });
    let minutes_until_closed = async || {
        for minute in 0..60 {
            status(&registry, "disk").await;
            assert_eq!(registry.list().len(), 1);
            if descriptors_below(&dir) == 0 {
                return minute;
            }
            sleep(IDLE_CHECK_INTERVAL).await;
        }
        panic!("it stays open");
    };
    image(&registry, "disk").await;
    sleep(IDLE_BEFORE_CLOSE / 2).await;
    image(&registry, "disk").await;
    for _ in 0..2 {
        let closed_after = minutes_until_closed().await;
        assert!((9..=12).contains(&closed_after), "{closed_after} min");
        image(&registry, "disk").await;
    }
    closer.abort();
}
