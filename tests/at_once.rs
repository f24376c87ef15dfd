//! What is served at once, on the thread that took it up, and what must not be: the rules are those of all requests.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::cast_possible_truncation, missing_docs)]

mod common;

use std::collections::BTreeSet;
use std::io::ErrorKind;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::hooked::Hooked;
use common::nbd::{CHUNK as NBD_CHUNK, LAZY_BYTES, MIB, Raw, Served};
use common::volumes::*;
use nbd_server::disk::{Disk, RealDisk};
use nbd_server::nbd::Limits;
use nbd_server::nbd::wire::{Mode, cmd};
use nbd_server::units::Geometry;
use nbd_server::volume::{Volume, VolumeError};
use tokio::sync::watch;

const SOON: Duration = Duration::from_millis(50);

fn reads_at_once(volume: &Arc<Volume>, offset: u64, len: u64) -> Option<Vec<u8>> {
    let mut buf = vec![0xEE; usize::try_from(len).unwrap()];
    volume.read_at_once(range(offset, len), &mut buf).then_some(buf)
}

/// An export whose chunks 0 and 1 are dirty, 2 and 3 zeros, and whose chunks from 4 on are published and missing.
async fn mixed(site: &mut Site, disk: &Hooked) -> Arc<Volume> {
    let origin = site.start("origin").await;
    let volume = create(&origin, "disk", 8).await;
    write(&volume, 4 * CHUNK, 9, 4 * CHUNK).await;
    origin.snapshot(&id("disk")).await.unwrap();
    origin.close().await;
    let registry = site.start_on("here", Arc::new(disk.clone())).await;
    let volume = registry.volume(&id("disk")).await.unwrap();
    write(&volume, 0, 1, 2 * CHUNK).await;
    volume
}

#[tokio::test]
async fn what_is_here_is_read_at_once_and_what_is_missing_is_not() {
    let (mut site, disk) = (Site::new(), Hooked::new(RealDisk::default()));
    let volume = mixed(&mut site, &disk).await;
    assert_eq!(reads_at_once(&volume, CHUNK + 1, 2).unwrap(), [1, 1]);
    let over_the_edge = reads_at_once(&volume, 2 * CHUNK - 1, 2).unwrap();
    assert_eq!(over_the_edge, [1, 0], "data, then zeros");
    assert!(reads_at_once(&volume, 4 * CHUNK - 1, 2).is_none(), "a chunk of it is missing");
    make_resident(&volume, 4 * CHUNK, 1).await;
    assert_eq!(reads_at_once(&volume, 4 * CHUNK - 1, 2).unwrap(), [0, 9], "clean now");
    assert!(reads_at_once(&volume, 8 * CHUNK - 1, 2).is_none(), "beyond the end");
}

#[tokio::test]
async fn a_write_is_done_at_once_where_all_is_dirty_or_one_chunk_that_is_here_needs_its_mark() {
    let (mut site, disk) = (Site::new(), Hooked::new(RealDisk::default()));
    let volume = mixed(&mut site, &disk).await;
    // Zeros need a hole first, what is missing a fetch.
    for (offset, at_once) in
        [(0, true), (CHUNK - 2, true), (2 * CHUNK - 2, false), (2 * CHUNK, false), (4 * CHUNK, false)]
    {
        assert_eq!(volume.write_at_once(offset, &[7; 4]), at_once, "at {offset}");
    }
    assert!(!volume.write_at_once(8 * CHUNK - 1, &[7; 2]), "beyond the end");
    assert_eq!(reads_at_once(&volume, 0, 5).unwrap(), [7, 7, 7, 7, 1]);
    make_resident(&volume, 4 * CHUNK, 2 * CHUNK).await;
    assert!(!volume.write_at_once(5 * CHUNK - 2, &[7; 4]), "two marks");
    assert!(volume.write_at_once(4 * CHUNK, &[7; 4]), "one mark");
    assert_eq!(reads_at_once(&volume, 4 * CHUNK, 5).unwrap(), [7, 7, 7, 7, 9]);
}

#[tokio::test]
async fn what_a_write_at_once_marked_is_dirty_after_a_crash() {
    let (mut site, disk) = (Site::new(), Hooked::new(RealDisk::default()));
    let volume = mixed(&mut site, &disk).await;
    make_resident(&volume, 4 * CHUNK, CHUNK).await;
    // The file is this life's own from the first change on.
    assert!(volume.write_at_once(0, &[7]) && volume.write_at_once(4 * CHUNK + 1, &[7]));
    // As a process crash leaves it: nothing is synced, no clean stop.
    let registry = site.start_on("here", Arc::new(RealDisk::default())).await;
    let again = registry.volume(&id("disk")).await.unwrap();
    assert_eq!(read(&again, 4 * CHUNK, 3).await[..], [9, 7, 9]);
    assert_eq!(status(&registry, "disk").await.dirty_chunks, 3);
}

#[tokio::test]
async fn first_writes_at_once_ask_the_disk_for_nothing_but_copies_and_lose_nothing_when_the_log_has_no_room() {
    const CHUNKS: u64 = 1_500;
    let (mut site, disk) = (Site::new(), Hooked::new(RealDisk::default()));
    let registry = site.start_on("here", Arc::new(disk.clone())).await;
    let volume = create(&registry, "disk", CHUNKS).await;
    write(&volume, 0, 1, CHUNKS * CHUNK).await;
    registry.snapshot(&id("disk")).await.unwrap();
    let at_once = Arc::new(AtomicBool::new(false));
    let (asking, asked) = (at_once.clone(), Arc::new(std::sync::Mutex::new(BTreeSet::new())));
    let notes = asked.clone();
    disk.hook(move |op, _| {
        if asking.load(Ordering::SeqCst) {
            notes.lock().unwrap().insert(op.to_owned());
        }
        Ok(())
    });
    let mut refused = 0;
    for chunk in 0..CHUNKS {
        at_once.store(true, Ordering::SeqCst);
        let done = volume.write_at_once(chunk * CHUNK, &[2]);
        at_once.store(false, Ordering::SeqCst);
        if !done {
            refused += 1;
            volume.write(chunk * CHUNK, vec![2].into()).await.unwrap();
        }
    }
    assert_eq!(*asked.lock().unwrap(), BTreeSet::from(["write_at".to_owned()]));
    // The log takes room for some hundred marks at a time.
    assert!((1..CHUNKS / 10).contains(&refused), "{refused} refused");
    drop((volume, registry));
    let again = image(&site.start_on("here", Arc::new(RealDisk::default())).await, "disk").await;
    assert!(again.chunks(CHUNK as usize).all(|chunk| chunk[..2] == [2, 1]));
}

#[tokio::test]
async fn a_long_first_write_is_handed_on() {
    let (mut site, disk) = (Site::new(), Hooked::new(RealDisk::default()));
    let registry = site.start_on("here", Arc::new(disk)).await;
    let geometry = Geometry::new(4 << 20, 1 << 20).unwrap();
    registry.create(id("disk"), geometry).await.unwrap();
    let volume = registry.volume(&id("disk")).await.unwrap();
    write(&volume, 0, 1, 4 << 20).await;
    registry.snapshot(&id("disk")).await.unwrap();
    // The file is this life's own from the first change on.
    write(&volume, 3 << 20, 2, 1).await;
    assert!(!volume.write_at_once(0, &[2; (64 << 10) + 1]));
    assert!(volume.write_at_once(0, &[2; 64 << 10]));
    assert!(volume.write_at_once(0, &[3; (64 << 10) + 1]), "it has its mark");
}

#[tokio::test]
async fn a_write_at_once_never_passes_an_overlapping_one_that_arrived_earlier() {
    let (mut site, disk) = (Site::new(), Hooked::new(RealDisk::default()));
    let volume = mixed(&mut site, &disk).await;
    let (open, gate) = watch::channel(false);
    site.store.hold_until("get_range", gate);
    // It has arrived, and its work has not even begun.
    let earlier = volume.change(range(CHUNK, 3 * CHUNK + 1));
    assert!(!volume.write_at_once(CHUNK, &[7]));
    assert!(volume.write_at_once(0, &[7]), "beside it");
    let earlier = tokio::spawn(earlier.write(vec![5; 3 * CHUNK as usize + 1].into()));
    let later = tokio::spawn({
        let later = volume.change(range(CHUNK, 1));
        async move { later.write(vec![7].into()).await }
    });
    assert!(
        tokio::time::timeout(SOON, async {
            while !later.is_finished() {
                tokio::task::yield_now().await
            }
        })
        .await
        .is_err()
    );
    open.send(true).unwrap();
    earlier.await.unwrap().unwrap();
    later.await.unwrap().unwrap();
    assert_eq!(read(&volume, CHUNK, 2).await[..], [7, 5]);
    assert!(volume.write_at_once(CHUNK, &[8]));
}

#[tokio::test]
async fn a_chunk_of_the_cut_is_written_at_once_and_keeps_its_content_for_the_snapshot() {
    let (mut site, disk) = (Site::new(), Hooked::new(RealDisk::default()));
    // An eighth of it is for what is set aside in memory: one block.
    site.publish_bytes = 8 * CHUNK;
    let volume = mixed(&mut site, &disk).await;
    let registry = site.start_on("publishing", Arc::new(disk.clone())).await;
    // More chunks than a publish reads ahead of its upload.
    let published = create(&registry, "other", 32).await;
    write(&published, 0, 1, 32 * CHUNK).await;
    assert!(published.write_at_once(0, &[2]), "before the cut");
    let (open, gate) = watch::channel(false);
    site.store.hold_until("upload", gate);
    let snapshot = site.begin_snapshot("publishing", &registry, "other").await;
    let end = 32 * CHUNK;
    assert!(published.write_at_once(end - 3 * CHUNK, &[3]), "set aside in memory");
    assert!(!published.write_at_once(end - 2 * CHUNK, &[3]), "the first one beyond it makes a file");
    published.write(end - 2 * CHUNK, vec![3].into()).await.unwrap();
    assert!(published.write_at_once(end - 2 * CHUNK, &[4]), "set aside before");
    assert!(published.write_at_once(end - 1, &[5]), "set aside at once");
    open.send(true).unwrap();
    snapshot.await.unwrap().unwrap();
    for (at, now) in [(0, [2, 1]), (end - 3 * CHUNK, [3, 1]), (end - 2 * CHUNK, [4, 1]), (end - 2, [1, 5])] {
        assert_eq!(read(&published, at, 2).await[..], now, "at {at}");
    }
    let elsewhere = site.elsewhere().await;
    let seen = image(&elsewhere, "other").await;
    assert!(seen[0] == 2 && seen[1..].iter().all(|b| *b == 1));
    drop(volume);
}

#[tokio::test]
async fn nothing_is_written_at_once_beside_a_flush() {
    let (mut site, disk) = (Site::new(), Hooked::new(RealDisk::default()));
    let volume = mixed(&mut site, &disk).await;
    let (tell, mut told) = watch::channel(false);
    let (open, gate) = std::sync::mpsc::channel::<()>();
    let gate = std::sync::Mutex::new(gate);
    disk.hook(move |operation, _| {
        if operation == "sync" {
            tell.send_replace(true);
            let _ = gate.lock().unwrap().recv();
        }
        Ok(())
    });
    let flush = tokio::spawn({
        let volume = Arc::clone(&volume);
        async move { volume.flush().await }
    });
    told.wait_for(|told| *told).await.unwrap();
    assert!(!volume.write_at_once(0, &[7]));
    assert!(reads_at_once(&volume, 0, 1).is_some());
    drop(open);
    flush.await.unwrap().unwrap();
    assert!(volume.write_at_once(0, &[7]));
}

#[tokio::test]
async fn after_a_failed_sync_nothing_of_the_page_cache_is_served_at_once() {
    let (mut site, disk) = (Site::new(), Hooked::new(RealDisk::default()));
    let volume = mixed(&mut site, &disk).await;
    read(&volume, 4 * CHUNK, 1).await;
    disk.fail("sync", "cache.raw", ErrorKind::Other);
    volume.flush().await.unwrap_err();
    assert!(!volume.write_at_once(0, &[7]));
    assert!(reads_at_once(&volume, 0, 1).is_none());
    assert!(reads_at_once(&volume, 4 * CHUNK, 1).is_none(), "clean chunks may have been dropped, too");
}

#[tokio::test]
async fn after_a_write_that_had_to_wait_none_is_done_at_once_for_a_while() {
    let (mut site, disk) = (Site::new(), Hooked::new(RealDisk::default()));
    let volume = mixed(&mut site, &disk).await;
    disk.hook(|operation, _| {
        if operation == "write_at" {
            std::thread::sleep(Duration::from_secs(2));
        }
        Ok(())
    });
    assert!(volume.write_at_once(0, &[7]));
    disk.serve_all();
    assert!(!volume.write_at_once(0, &[8]));
    write(&volume, 0, 8, 1).await;
    // As long as it took, so two seconds and a little.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!volume.write_at_once(0, &[9]));
    let again = async {
        while !volume.write_at_once(0, &[9]) {
            tokio::time::sleep(SOON).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), again).await.unwrap();
}

/// A server whose export `disk` is on a hooked disk and dirty all over.
fn served_on(disk: &Hooked) -> Served {
    served_in(tokio::runtime::Runtime::new().unwrap(), disk)
}

fn served_in(runtime: tokio::runtime::Runtime, disk: &Hooked) -> Served {
    let disk = disk.clone();
    Served::start_in(runtime, Limits::default(), None, &"127.0.0.1:0".parse().unwrap(), async move |_| {
        let mut site = Site::new();
        let registry = site.start_on("served", Arc::new(disk)).await;
        registry.create(id("disk"), Geometry::new(64 * NBD_CHUNK, NBD_CHUNK).unwrap()).await.unwrap();
        let volume = registry.volume(&id("disk")).await.unwrap();
        write(&volume, 0, 1, 64 * NBD_CHUNK).await;
        (registry, site)
    })
}

#[test]
fn a_read_that_waits_for_the_disk_holds_up_nothing() {
    let disk = Hooked::new(RealDisk::default());
    let served = served_on(&disk);
    let mut client = Raw::attach(&served, "disk", Mode::Structured);
    let mut other = Raw::attach(&served, "disk", Mode::Structured);
    let (open, gate) = std::sync::mpsc::channel::<()>();
    let (gate, refused) = (std::sync::Mutex::new(gate), AtomicUsize::new(0));
    // The first read is not in memory, and the disk takes as long as the test wishes.
    disk.hook(move |operation, path: &Path| {
        match operation {
            "read_at_once" if refused.fetch_add(1, Ordering::SeqCst) == 0 => return Err(ErrorKind::WouldBlock.into()),
            "read_at" if path.ends_with("cache.raw") => drop(gate.lock().unwrap().recv()),
            _ => {}
        }
        Ok(())
    });
    let slow = client.encode(0, cmd::READ, 1, 0, 4096);
    client.send(&slow);
    for _ in 0..100 {
        assert_eq!(client.read(4096, 4096), [1; 4096]);
        assert_eq!(other.read(0, 4096), [1; 4096]);
        client.write(8192, &[1; 512]);
    }
    drop(open);
    assert_eq!(client.answer(0, 4096).cookie, 1);
}

#[tokio::test]
async fn a_write_that_waits_for_the_disk_alone_is_done_by_one_other_thread_and_needs_nobody_else() {
    let (mut site, disk) = (Site::new(), Hooked::new(RealDisk::default()));
    let volume = mixed(&mut site, &disk).await;
    let (done, ended) = std::sync::mpsc::channel();
    let begin = |offset, data: &'static [u8]| {
        let done = done.clone();
        let change = volume.change(range(offset, data.len() as u64));
        change.write_then(data.into(), move |written| done.send((offset, written.is_ok())).unwrap());
    };
    // While the runtime's only thread waits here, it can do nothing for them.
    begin(2 * CHUNK - 1, &[7, 7]);
    assert_eq!(ended.recv_timeout(Duration::from_secs(30)), Ok((2 * CHUNK - 1, true)));
    begin(4 * CHUNK - 1, &[8, 8]);
    assert!(ended.recv_timeout(SOON).is_err(), "the rest of its second chunk is missing");
    assert_eq!(reads_at_once(&volume, 4 * CHUNK - 1, 1).unwrap(), [0], "and until it is here, none is written");
    let earlier = volume.change(range(0, 2));
    begin(1, &[9]);
    assert!(ended.recv_timeout(SOON).is_err(), "an earlier one of the same byte is under way");
    earlier.write(vec![5, 5].into()).await.unwrap();
    let mut others = BTreeSet::new();
    let patience = Instant::now() + Duration::from_secs(30);
    while others.len() < 2 {
        assert!(Instant::now() < patience, "{others:?}");
        others.extend(ended.try_recv());
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert_eq!(others, BTreeSet::from([(1, true), (4 * CHUNK - 1, true)]));
    assert_eq!(read(&volume, 0, 3).await[..], [5, 9, 1]);
    assert_eq!(read(&volume, 2 * CHUNK - 1, 3).await[..], [7, 7, 0]);
    assert_eq!(read(&volume, 4 * CHUNK - 2, 4).await[..], [0, 8, 8, 9]);
}

#[tokio::test]
async fn a_write_that_would_wait_for_the_disk_is_refused_as_any_other() {
    let mut site = Site::new();
    let registry = site.start("here").await;
    let volume = create(&registry, "disk", 2).await;
    write(&volume, 0, 1, 2 * CHUNK).await;
    let refusal = async |volume: &Arc<Volume>, offset| {
        let (done, ended) = tokio::sync::oneshot::channel();
        volume.change(range(offset, 1)).write_then(vec![2].into(), |written| done.send(written).unwrap());
        ended.await.unwrap().unwrap_err()
    };
    assert!(matches!(refusal(&volume, 2 * CHUNK).await, VolumeError::OutOfRange { .. }));
    registry.unload(&id("disk")).await.unwrap();
    assert!(matches!(refusal(&volume, 0).await, VolumeError::Closed(_)));
    registry.open(id("disk"), true).await.unwrap();
    let volume = registry.volume(&id("disk")).await.unwrap();
    assert!(matches!(refusal(&volume, 0).await, VolumeError::ReadOnly(_)));
    assert_eq!(read(&volume, 0, 1).await[..], [1]);
}

#[test]
fn what_is_in_a_file_system_of_memory_is_read_at_once() {
    // The kernel does not take orders not to wait there.
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let file = RealDisk::default().create(&dir.path().join("file")).unwrap();
    file.write_at(&[7; 4096], 0).unwrap();
    let mut buf = [0; 4096];
    assert!(file.read_at_once(&mut buf, 0).unwrap());
    assert_eq!(buf, [7; 4096]);
}

/// READs of a MiB each from the start on, as one piece.
fn long_reads(client: &Raw, count: u64) -> Vec<u8> {
    (0..count).flat_map(|i| client.encode(0, cmd::READ, i, i * MIB, MIB)).collect()
}

fn take_ones(client: &mut Raw, replies: u64, len: u64) {
    for _ in 0..replies {
        assert_eq!(client.take(16 + len as usize)[16..], vec![1; len as usize]);
    }
}

#[test]
fn long_reads_that_came_together_are_shared_among_processors_unless_all_have_clients_of_their_own() {
    let disk = Hooked::new(RealDisk::default());
    let served = served_on(&disk);
    let by = Arc::new(std::sync::Mutex::new(BTreeSet::new()));
    let notes = Arc::clone(&by);
    disk.hook(move |operation, _| {
        if operation == "read_at_once" {
            notes.lock().unwrap().insert(std::thread::current().name().unwrap_or_default().to_owned());
        }
        Ok(())
    });
    // Whether threads of that name read for what was asked just now.
    let was_read_by = |name: &str| std::mem::take(&mut *by.lock().unwrap()).contains(name);
    let has_thread = |client: &mut Raw| {
        client.send(&client.encode(0, cmd::READ, 1, 0, 1));
        take_ones(client, 1, 1);
        was_read_by("nbd-client")
    };
    let readers_help = |client: &mut Raw| {
        client.send(&long_reads(client, 4));
        take_ones(client, 4, MIB);
        was_read_by("nbd-reader")
    };
    let processors = std::thread::available_parallelism().unwrap().get();
    let mut clients: Vec<Raw> = (0..processors).map(|_| Raw::attach(&served, "disk", Mode::Simple)).collect();
    assert!(readers_help(&mut clients[0]));
    let patience = Instant::now() + Duration::from_secs(30);
    // A stall of the machine may take a client's thread away: then it is asked until it has one again.
    loop {
        for client in &mut clients {
            while !has_thread(client) {
                assert!(Instant::now() < patience, "it gets no thread");
            }
        }
        if clients.iter_mut().all(has_thread) && !readers_help(&mut clients[0]) {
            break;
        }
        assert!(Instant::now() < patience, "all are busy, and still others read for them");
    }
}

#[test]
fn long_reads_that_came_together_wait_for_no_read_of_a_disk_that_hangs() {
    const BLOCKING_THREADS: usize = 4;
    let disk = Hooked::new(RealDisk::default());
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    let runtime = builder.enable_all().max_blocking_threads(BLOCKING_THREADS).build().unwrap();
    let served = served_in(runtime, &disk);
    let mut client = Raw::attach(&served, "disk", Mode::Simple);
    let mut other = Raw::attach(&served, "disk", Mode::Simple);
    let (open, gate) = std::sync::mpsc::channel::<()>();
    let (gate, refused, held) = (std::sync::Mutex::new(gate), AtomicUsize::new(0), Arc::new(AtomicUsize::new(0)));
    let holds = Arc::clone(&held);
    disk.hook(move |operation, path: &Path| {
        match operation {
            // Not in memory.
            "read_at_once" if refused.fetch_add(1, Ordering::SeqCst) < BLOCKING_THREADS => {
                return Err(ErrorKind::WouldBlock.into());
            }
            "read_at" if path.ends_with("cache.raw") => {
                holds.fetch_add(1, Ordering::SeqCst);
                let _ = gate.lock().unwrap().recv();
            }
            _ => {}
        }
        Ok(())
    });
    for cookie in 0..BLOCKING_THREADS as u64 {
        other.send(&other.encode(0, cmd::READ, cookie, 0, 4096));
    }
    let patience = Instant::now() + Duration::from_secs(30);
    while held.load(Ordering::SeqCst) < BLOCKING_THREADS {
        assert!(Instant::now() < patience, "not all threads are held up");
        std::thread::sleep(Duration::from_millis(1));
    }
    client.send(&long_reads(&client, 4));
    take_ones(&mut client, 4, MIB);
    drop(open);
    take_ones(&mut other, BLOCKING_THREADS as u64, 4096);
}

#[test]
fn writes_that_wait_for_the_disk_go_on_side_by_side_with_everything_else() {
    let disk = Hooked::new(RealDisk::default());
    let served = served_on(&disk);
    let mut client = Raw::attach(&served, "disk", Mode::Structured);
    let mut other = Raw::attach(&served, "disk", Mode::Structured);
    let (open, gate) = std::sync::mpsc::channel::<()>();
    let (gate, seen) = (std::sync::Mutex::new(gate), AtomicUsize::new(0));
    disk.hook(move |operation, path: &Path| {
        if operation == "write_at" && path.ends_with("cache.raw") {
            match seen.fetch_add(1, Ordering::SeqCst) {
                // The kernel's pause for one who dirties more than the disk takes.
                0 => std::thread::sleep(Duration::from_millis(100)),
                // Worse: a disk that does not answer at all.
                1..8 => drop(gate.lock().unwrap().recv()),
                _ => {}
            }
        }
        Ok(())
    });
    client.write(0, &[2; 4096]);
    for cookie in 1..8 {
        let slow = [client.encode(0, cmd::WRITE, cookie, cookie * 4096, 4096), vec![2; 4096]].concat();
        client.send(&slow);
    }
    for _ in 0..100 {
        assert_eq!(client.read(0, 4096), [2; 4096]);
        assert_eq!(other.read(0, 4096), [2; 4096]);
    }
    other.write(1 << 20, &[3; 4096]);
    drop(open);
    let mut answered: Vec<u64> = (1..8).map(|_| client.answer(0, 0).cookie).collect();
    answered.sort_unstable();
    assert_eq!(answered, [1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(other.read(4096, 7 * 4096), [2; 7 * 4096]);
}

#[test]
fn an_at_once_write_waits_for_an_older_connections_overlapping_one() {
    let served = Served::new();
    let half = LAZY_BYTES / 2;
    let mut new = Raw::attach(&served, "lazy", Mode::Structured);
    // Dirty, so that a later write there needs nothing but its bytes.
    new.write(half - NBD_CHUNK, &vec![1; usize::try_from(NBD_CHUNK).unwrap()]);
    let mut old = Raw::attach(&served, "lazy", Mode::Structured);
    // Waits for the fetch of the chunk it ends in.
    let stalled = [old.encode(0, cmd::WRITE, 1, half - 512, 1024), vec![2; 1024]].concat();
    old.send(&stalled);
    // Time for it to arrive: some exchanges on another connection.
    (0..50).for_each(|_| assert_eq!(new.read(half - 512, 1), [1]));
    drop(old);
    let newer = [new.encode(0, cmd::WRITE, 2, half - 512, 512), vec![3; 512]].concat();
    new.send(&newer);
    // Behind the old one; what does not overlap goes on.
    assert_eq!(new.read(0, 1), [0]);
    served.gate.send(true).unwrap();
    assert_eq!(new.answer(0, 0).cookie, 2);
    assert_eq!(new.read(half - 1, 2), [3, 2]);
}
