//! What a local disk that is full, or fails, does to a volume and what it does not.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

mod common;

use std::io::ErrorKind;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use common::hooked::Hooked;
use common::volumes::*;
use nbd_server::cache::open::Opening;
use nbd_server::disk::RealDisk;
use nbd_server::store::Store;
use nbd_server::volume::VolumeError;
use nbd_server::volume::registry::{ExportError, Registry};

/// An export of 8 published chunks, chunk i full of i + 1; the first is clean here, the second dirty.
async fn on_a_hooked_disk(site: &mut Site) -> (Arc<Registry>, Hooked) {
    let origin = site.start("origin").await;
    let volume = create(&origin, "disk", 8).await;
    for i in 0..8 {
        write(&volume, i * CHUNK, i as u8 + 1, CHUNK).await;
    }
    origin.snapshot(&id("disk")).await.unwrap();
    origin.close().await;
    let disk = Hooked::new(RealDisk::default());
    let registry = site.start_on("here", Arc::new(disk.clone())).await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    make_resident(&volume, 0, 1).await;
    write(&volume, CHUNK, 0xbb, 10).await;
    volume.flush().await.unwrap();
    (registry, disk)
}

#[tokio::test]
async fn a_full_disk_refuses_the_write_and_poisons_nothing() {
    // The log has its space before it needs it: what a full disk refuses is to let it grow (`tests/faults.rs`).
    for (operation, file) in [("write_at", "cache.raw")] {
        let mut site = Site::new();
        let (registry, disk) = on_a_hooked_disk(&mut site).await;
        let volume = registry.volume(&id("disk")).await.unwrap();
        disk.fail(operation, file, ErrorKind::StorageFull);
        let refused = write_as_served(&volume, 2 * CHUNK, vec![0xcc; CHUNK as usize].into()).await.unwrap_err();
        assert!(matches!(refused, VolumeError::NoSpace(_)), "{file}: {refused}");
        assert!(matches!(
            write_as_served(&volume, 3 * CHUNK + 1, vec![0xcc].into()).await,
            Err(VolumeError::NoSpace(_))
        ));
        // Reads go on, of missing chunks, too; and so does FLUSH.
        assert_eq!([read(&volume, CHUNK, 1).await[0], read(&volume, 4 * CHUNK, 1).await[0]], [0xbb, 5]);
        volume.flush().await.unwrap();
        disk.serve_all();
        write(&volume, 2 * CHUNK, 0xcc, CHUNK).await;
        write(&volume, 3 * CHUNK + 1, 0xcc, 1).await;
        volume.flush().await.unwrap();
        drop((volume, registry));
        let all =
            image(&site.start_on("here", Arc::new(Hooked::new(RealDisk::default()).after_boot(1))).await, "disk").await;
        let firsts: Vec<u8> = all.chunks(CHUNK as usize).map(|chunk| chunk[0]).collect();
        assert_eq!(firsts, [1, 0xbb, 0xcc, 4, 5, 6, 7, 8], "{file}");
        assert_eq!(all[3 * CHUNK as usize + 1], 0xcc);
    }
}

#[tokio::test]
async fn a_failed_sync_is_final_until_the_export_is_opened_again_and_clean_chunks_are_still_read() {
    for file in ["cache.raw", "cache.meta"] {
        let mut site = Site::new();
        let (registry, disk) = on_a_hooked_disk(&mut site).await;
        let volume = registry.volume(&id("disk")).await.unwrap();
        write(&volume, 2 * CHUNK, 0xcc, CHUNK).await;
        disk.fail("sync", file, ErrorKind::Other);
        assert!(matches!(volume.flush().await, Err(VolumeError::Failed(_))), "{file}");
        // The disk seems well again, but what it dropped is gone: nothing is tried again.
        disk.serve_all();
        assert!(matches!(volume.flush().await, Err(VolumeError::Failed(_))));
        assert!(matches!(write_as_served(&volume, 0, vec![1].into()).await, Err(VolumeError::Failed(_))));
        assert!(matches!(volume.trim(range(0, CHUNK)).await, Err(VolumeError::Failed(_))));
        assert!(matches!(read_as_served(&volume, range(CHUNK, 1)).await, Err(VolumeError::Failed(_))));
        assert!(matches!(registry.snapshot(&id("disk")).await, Err(ExportError::Volume(VolumeError::Failed(_)))));
        assert_eq!(read(&volume, 0, 1).await[0], 1);
        assert_eq!(read(&volume, 5 * CHUNK, 1).await[0], 6);
        let why = status(&registry, "disk").await.failed.unwrap();
        assert!(why.contains("sync") && why.contains("restart"), "{why}");
        assert!(registry.list()[0].failed.is_some());
        registry.unload(&id("disk")).await.unwrap();
        registry.open(id("disk"), false).await.unwrap();
        assert_eq!(image(&registry, "disk").await[CHUNK as usize], 0xbb);
    }
}

#[tokio::test]
async fn no_room_to_set_a_chunk_aside_fails_the_snapshot_and_not_the_write() {
    for operation in ["create", "write_at", "read_at"] {
        a_disk_fault_of_what_is_set_aside_fails_the_snapshot_alone(operation).await;
    }
}

async fn a_disk_fault_of_what_is_set_aside_fails_the_snapshot_alone(operation: &'static str) {
    let mut site = Site::new();
    // An eighth of it would be for what is set aside, and is less than a block: all of that goes to the disk.
    site.publish_bytes = 7 * CHUNK;
    let (registry, disk) = on_a_hooked_disk(&mut site).await;
    // More chunks than a publish reads ahead of its upload.
    let volume = create(&registry, "large", 32).await;
    for i in 0..32 {
        write(&volume, i * CHUNK, 0x11, CHUNK).await;
    }
    disk.fail(operation, "cut.aside", ErrorKind::StorageFull);
    // The upload does not begin before the write has come.
    let (open, gate) = tokio::sync::watch::channel(false);
    site.store.hold_until("upload", gate);
    let publishing = site.begin_snapshot("here", &registry, "large").await;
    for i in 0..32 {
        write(&volume, i * CHUNK, 0x22, 10).await;
    }
    open.send(true).unwrap();
    let refused = publishing.await.unwrap().unwrap_err();
    assert!(refused.to_string().contains("no space left"), "{operation}: {refused}");
    assert_eq!(status(&registry, "large").await.dirty_chunks, 32);
    disk.serve_all();
    assert!(registry.snapshot(&id("large")).await.unwrap().created);
    let all = image(&site.elsewhere().await, "large").await;
    assert_eq!([all[0], all[10]], [0x22, 0x11]);
}

#[tokio::test]
async fn a_flush_hears_of_a_failed_sync_of_the_log_that_a_publish_ran_beside_it() {
    let mut site = Site::new();
    let (registry, disk) = on_a_hooked_disk(&mut site).await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    let (begun, failing) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
    let (begins, fails) = (begun.clone(), failing.clone());
    // The kernel tells of a lost page once: the publish's sync hears of it, and takes its time; the flush's would not.
    disk.hook(move |op, path| {
        if op != "sync" || !path.ends_with("cache.meta") || begins.fetch_add(1, Ordering::SeqCst) > 0 {
            return Ok(());
        }
        while !fails.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        Err(ErrorKind::Other.into())
    });
    let publish = tokio::spawn(async move { registry.snapshot(&id("disk")).await });
    while begun.load(Ordering::SeqCst) == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    write(&volume, 2 * CHUNK, 0xcc, CHUNK).await;
    let flush = tokio::spawn(async move { volume.flush().await });
    tokio::time::sleep(Duration::from_millis(100)).await;
    failing.store(true, Ordering::SeqCst);
    assert!(matches!(flush.await.unwrap(), Err(VolumeError::Failed(_))));
    assert!(publish.await.unwrap().is_err());
}

#[tokio::test]
async fn an_image_larger_than_the_file_system_takes_is_refused_with_the_remedy_and_nothing_stays() {
    let mut site = Site::new();
    let disk = Hooked::new(RealDisk::default());
    let registry = site.start_on("here", Arc::new(disk.clone())).await;
    disk.fail("set_len", "cache.raw", ErrorKind::FileTooLarge);
    let refused = registry.create(id("large"), geometry(8)).await.unwrap_err();
    assert!(matches!(refused, ExportError::Volume(VolumeError::Failed(_))), "{refused:?}");
    let text = refused.to_string();
    assert!(text.contains("export large") && text.contains("32768 bytes") && text.contains("--cache-root"), "{text}");
    assert!(!site.cache_root("here").join("large").exists(), "no folder");
    assert!(site.store.inner.list(&"exports".parse().unwrap()).await.unwrap().is_empty(), "and no object");
    disk.serve_all();
    registry.create(id("large"), geometry(8)).await.unwrap();
}

#[tokio::test]
async fn an_export_whose_head_is_in_the_store_is_not_taken_back_when_its_cache_cannot_be_made() {
    let mut site = Site::new();
    let disk = Hooked::new(RealDisk::default());
    let here = site.start_on("here", Arc::new(disk.clone())).await;
    // The last step of a new cache: the head is there by then, and others may have found it.
    disk.fail("rename", "cache.meta", ErrorKind::PermissionDenied);
    here.create(id("disk"), geometry(8)).await.unwrap_err();
    let there = site.start("there").await;
    write(&there.volume(&id("disk")).await.unwrap(), 0, 0xbb, CHUNK).await;
    there.snapshot(&id("disk")).await.unwrap();
    disk.serve_all();
    assert_eq!(image(&here, "disk").await[0], 0xbb, "it is opened at its next use");
}

#[tokio::test]
async fn a_cache_without_its_data_is_damaged_and_one_that_may_not_be_read_has_failed() {
    let mut site = Site::new();
    let (registry, disk) = on_a_hooked_disk(&mut site).await;
    registry.unload(&id("disk")).await.unwrap();
    for (kind, damaged) in [(ErrorKind::NotFound, true), (ErrorKind::PermissionDenied, false)] {
        disk.fail("open", "cache.raw", kind);
        let refused = registry.open(id("disk"), false).await.unwrap_err();
        assert!(refused.to_string().contains("cache.raw"), "{refused}");
        assert_eq!(matches!(refused, ExportError::Damaged(_)), damaged, "{refused:?}");
        assert_eq!(matches!(refused, ExportError::Volume(VolumeError::Failed(_))), !damaged, "{refused:?}");
    }
    disk.serve_all();
    registry.open(id("disk"), false).await.unwrap();
    assert_eq!(image(&registry, "disk").await[CHUNK as usize], 0xbb, "nothing was lost");
}

#[tokio::test]
async fn a_publish_that_is_finished_late_does_not_hide_what_others_published_since() {
    let mut site = Site::new();
    let (registry, disk) = on_a_hooked_disk(&mut site).await;
    // The journal goes by becoming a spare.
    let phases = AtomicBool::new(false);
    disk.hook(move |op, path| {
        let ends = op == "rename" && path.ends_with("snapshot.journal.json.spare");
        if ends && !phases.swap(true, Ordering::SeqCst) { Err(ErrorKind::PermissionDenied.into()) } else { Ok(()) }
    });
    assert!(registry.snapshot(&id("disk")).await.unwrap().created, "only its journal is left");
    drop(registry);
    let there = site.start("there").await;
    write(&there.volume(&id("disk")).await.unwrap(), 0, 0xee, CHUNK).await;
    let newest = there.snapshot(&id("disk")).await.unwrap().snapshot_id.unwrap().to_string();
    let here = site.start("here").await;
    assert_eq!(image(&here, "disk").await[0], 0xee);
    assert!(!site.cache_root("here").join("disk/snapshot.journal.json").exists());
    let current = site.store.get(&root().export(&id("disk")).current_ref(), 1 << 20).await.unwrap();
    assert!(String::from_utf8_lossy(&current.bytes).contains(&newest));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_write_is_acknowledged_by_a_log_that_could_not_be_replaced() {
    let mut site = Site::new();
    let (registry, disk) = on_a_hooked_disk(&mut site).await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    let (exchanged, writing) = (AtomicBool::new(false), Arc::new(Mutex::new(None)));
    let (writes, runtime) = (Arc::clone(&writing), tokio::runtime::Handle::current());
    // The checkpoint after the swap is in place already when the disk fails, and a write that needs a mark waits for the log.
    disk.hook(move |op, path| {
        exchanged.fetch_or(op == "exchange" && path.ends_with("cache.meta"), Ordering::SeqCst);
        if op != "sync_dir" || !path.ends_with("disk") || !exchanged.swap(false, Ordering::SeqCst) {
            return Ok(());
        }
        let volume = Arc::clone(&volume);
        *writes.lock().unwrap() = Some(runtime.spawn(async move { volume.write(CHUNK, vec![0xdd; 10].into()).await }));
        std::thread::sleep(Duration::from_millis(100));
        Err(ErrorKind::PermissionDenied.into())
    });
    // The swap was before that.
    assert!(registry.snapshot(&id("disk")).await.unwrap().created);
    assert!(status(&registry, "disk").await.failed.is_some());
    let write = writing.lock().unwrap().take().unwrap();
    assert!(matches!(write.await.unwrap(), Err(VolumeError::Failed(_))));
}

#[tokio::test]
async fn a_disk_that_fails_beside_the_cache_is_said_to_have_failed_with_the_file() {
    let mut site = Site::new();
    let (registry, disk) = on_a_hooked_disk(&mut site).await;
    let failed = |operation: &str, file: &str, refused: ExportError| {
        assert!(matches!(refused, ExportError::Volume(VolumeError::Failed(_))), "{refused:?}");
        assert!(refused.to_string().contains(&format!("{operation} of ")), "{refused}");
        assert!(refused.to_string().contains(file), "{refused}");
    };
    disk.fail("write_at", "snapshot.journal.json.spare", ErrorKind::PermissionDenied);
    failed("write", "snapshot.journal.json", registry.snapshot(&id("disk")).await.unwrap_err());
    disk.serve_all();
    registry.snapshot(&id("disk")).await.unwrap();

    disk.fail("list_dir", "other", ErrorKind::PermissionDenied);
    failed("listing", "other", registry.create(id("other"), geometry(8)).await.unwrap_err());
    disk.serve_all();
    registry.create(id("other"), geometry(8)).await.unwrap();

    disk.fail("create", "clone.seed.json.tmp", ErrorKind::PermissionDenied);
    failed("write", "clone.seed.json", registry.clone_export(id("clone"), id("disk"), None).await.unwrap_err());
    disk.serve_all();
    assert_eq!(image(&registry, "clone").await, image(&registry, "disk").await);
}

/// The next operation on a file panics, as a mistake in this server would.
fn panic_once(disk: &Hooked, operation: &'static str, name: &'static str) {
    let panics = AtomicBool::new(true);
    disk.hook(move |op, path| {
        let here = op == operation && path.ends_with(name);
        assert!(!(here && panics.swap(false, Ordering::SeqCst)), "as the test wishes");
        Ok(())
    });
}

#[tokio::test]
async fn a_fetch_that_panics_is_an_error_for_those_who_wait_for_it_and_for_nobody_after() {
    let mut site = Site::new();
    let (registry, disk) = on_a_hooked_disk(&mut site).await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    panic_once(&disk, "write_at", "cache.raw");
    let refused = write_as_served(&volume, 2 * CHUNK + 1, vec![0xcc].into()).await.unwrap_err();
    assert!(matches!(refused, VolumeError::Unavailable(_)), "{refused}");
    write(&volume, 2 * CHUNK + 1, 0xcc, 1).await;
    assert_eq!(read(&volume, 2 * CHUNK, 3).await[..], [3, 0xcc, 3]);
}

#[test]
fn a_flush_that_panics_keeps_no_later_one_waiting() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Hooked::new(RealDisk::default());
    let opening = Opening { disk: Arc::new(disk.clone()), ..opening(dir.path().join("disk"), geometry(1)) };
    let cache = Arc::new(opening.open().unwrap());
    cache.write(0, &[1], |_| true).unwrap();
    panic_once(&disk, "sync", "cache.raw");
    let flush = || {
        let (cache, (tell, told)) = (Arc::clone(&cache), mpsc::channel());
        std::thread::Builder::new().spawn(move || tell.send(cache.flush())).unwrap();
        told.recv_timeout(Duration::from_secs(30))
    };
    assert_eq!(flush().unwrap_err(), mpsc::RecvTimeoutError::Disconnected, "it has panicked");
    flush().expect("an end").unwrap();
    assert!(cache.write_at_once(range(0, 1), &[2]), "as with no flush under way");
}

/// A server over a cache root that is held open, as a real one is.
async fn start_below(site: &mut Site, server: &'static str) -> Arc<Registry> {
    let path = site.cache_root(server);
    let folder = std::fs::File::open(&path).unwrap();
    site.start_on(server, Arc::new(RealDisk::below(&path, folder))).await
}

/// The names in a folder and, for files, their bytes.
fn content(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let entries = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    let mut all: Vec<_> =
        entries.map(|path| (path.display().to_string(), std::fs::read(&path).unwrap_or_default())).collect();
    all.sort();
    all
}

#[tokio::test]
async fn a_server_whose_cache_root_was_replaced_says_so_and_touches_nothing_in_the_new_one() {
    let mut site = Site::new();
    let here = start_below(&mut site, "here").await;
    let volume = create(&here, "disk", 8).await;
    write(&volume, 0, 1, CHUNK).await;
    volume.flush().await.unwrap();
    // The folder goes elsewhere, and a second server begins at its path.
    let path = site.cache_root("here");
    let moved = path.with_extension("moved");
    std::fs::rename(&path, &moved).unwrap();
    std::fs::create_dir(&path).unwrap();
    let other = start_below(&mut site, "here").await;
    let on_other = other.volume(&id("disk")).await.unwrap();
    write(&on_other, CHUNK, 2, CHUNK).await;
    on_other.flush().await.unwrap();
    let before = content(&path.join("disk"));

    write(&volume, 2 * CHUNK, 3, CHUNK).await;
    let refused = volume.flush().await.unwrap_err().to_string();
    assert!(refused.contains("moved, replaced or removed") && refused.contains("put the folder back"), "{refused}");
    assert!(volume.write(3 * CHUNK, vec![4].into()).await.is_err(), "it takes no more writes");
    let _ = here.snapshot(&id("disk")).await;
    let _ = here.reset(&id("disk")).await;
    here.close().await;
    assert_eq!(content(&path.join("disk")), before);
    // What the second one flushed survives its death.
    drop((on_other, other));
    assert_eq!(image(&start_below(&mut site, "here").await, "disk").await[usize::try_from(CHUNK).unwrap()], 2);
    std::fs::remove_dir_all(moved).unwrap();
}

#[tokio::test]
async fn nothing_is_written_into_a_folder_that_took_the_place_of_an_exports() {
    for done in ["close", "reset", "snapshot", "flush"] {
        let mut site = Site::new();
        let registry = start_below(&mut site, "here").await;
        let volume = create(&registry, "disk", 8).await;
        write(&volume, 0, 1, CHUNK).await;
        volume.flush().await.unwrap();
        // A backup takes the folder's place, under a running server.
        let folder = site.cache_root("here").join("disk");
        let moved = folder.with_extension("moved");
        std::fs::rename(&folder, &moved).unwrap();
        std::fs::create_dir(&folder).unwrap();
        for file in std::fs::read_dir(&moved).unwrap() {
            let file = file.unwrap();
            std::fs::copy(file.path(), folder.join(file.file_name())).unwrap();
        }
        let before = content(&folder);
        write(&volume, CHUNK, 2, CHUNK).await;
        match done {
            "close" => registry.close().await,
            "reset" => drop(registry.reset(&id("disk")).await.unwrap_err()),
            "snapshot" => drop(registry.snapshot(&id("disk")).await.unwrap_err()),
            _ => drop(volume.flush().await.unwrap_err()),
        }
        assert_eq!(content(&folder), before, "{done}");
    }
}

#[tokio::test]
async fn a_flush_into_a_folder_that_was_removed_is_a_failure() {
    let mut site = Site::new();
    let registry = start_below(&mut site, "here").await;
    let volume = create(&registry, "disk", 8).await;
    write(&volume, 0, 1, CHUNK).await;
    volume.flush().await.unwrap();
    std::fs::remove_dir_all(site.cache_root("here").join("disk")).unwrap();
    write(&volume, 0, 2, CHUNK).await;
    assert!(matches!(volume.flush().await, Err(VolumeError::Failed(_))));
    let shown = status(&registry, "disk").await.failed.unwrap();
    assert!(shown.contains("moved, replaced or removed"), "{shown}");
}

#[tokio::test]
async fn a_cache_that_lost_its_states_is_refused_and_its_data_kept() {
    let mut site = Site::new();
    let registry = site.start("here").await;
    let volume = create(&registry, "disk", 8).await;
    write(&volume, 0, 0xaa, CHUNK).await;
    volume.flush().await.unwrap();
    drop((volume, registry));
    let folder = site.cache_root("here").join("disk");
    std::fs::remove_file(folder.join("cache.meta")).unwrap();
    for _ in 0..2 {
        let refused = site.start("here").await.volume(&id("disk")).await.unwrap_err();
        let text = refused.to_string();
        assert!(matches!(refused, ExportError::Damaged(_)) && text.contains("cache.meta"), "{text}");
        assert!(text.contains(folder.to_str().unwrap()) && text.contains("move the folder away"), "{text}");
        assert_eq!(std::fs::read(folder.join("cache.raw")).unwrap()[0], 0xaa);
    }
    // Neither is it overwritten by an export of that name that is created anew.
    site.store.delete(&root().export(&id("disk")).head()).await.unwrap();
    let refused = site.start("here").await.create(id("disk"), geometry(8)).await.unwrap_err();
    assert!(refused.to_string().contains("cache.meta"), "{refused}");
    assert_eq!(std::fs::read(folder.join("cache.raw")).unwrap()[0], 0xaa);
}
