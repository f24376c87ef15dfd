//! How fast the cold path and publishing are against a store shaped like a bucket: `make bench-cold` prints it, and takes some
//! minutes. What must hold on any machine is gated by counts in `tests/cold.rs`.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs, clippy::print_stdout)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::ffi::OsStr;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use common::memory::{peak_bytes, resident_bytes};
use common::shaped::{Shape, Shaped};
use common::volumes::*;
use nbd_server::background::Background;
use nbd_server::cache::Cache;
use nbd_server::clock::{Clock, SystemClock};
use nbd_server::disk::RealDisk;
use nbd_server::manifest::head::Head;
use nbd_server::manifest::{Change, Manifest, format};
use nbd_server::store::local::LocalStore;
use nbd_server::store::remote::RemoteStore;
use nbd_server::store::{Condition, SharedStore, Store};
use nbd_server::units::{ChunkIndex, Geometry, SnapshotId};
use nbd_server::volume::registry::Registry;
use nbd_server::volume::{Services, Volume};
use tokio::runtime::Runtime;

/// The server's.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const MIB: u64 = 1 << 20;
const CHUNK_BYTES: u64 = 4 * MIB;
const DISK_CHUNKS: u64 = 256;
/// How many writes are spread over busy exports.
const WRITES: u64 = 200_000;

#[tokio::main]
async fn main() {
    let args: Vec<String> = std::env::args().collect();
    // Memory is measured in a process that did nothing else.
    if let [_, scale, dir, name] = &args[..]
        && scale == "scale"
    {
        return open_at_scale(Path::new(dir), name).await;
    }
    if args[1..] == ["touch"] {
        return drop(std::hint::black_box(vec![1u8; 3 << 30]));
    }
    // By name, or all: `cargo bench --bench cold -- reads cuts`.
    let named: Vec<_> = args[1..].iter().filter(|a| !a.starts_with("--")).collect();
    let asked = |name: &str| named.is_empty() || named.iter().any(|a| *a == name);
    if asked("reads") {
        cold_reads().await;
    }
    if asked("publishing") {
        publishing().await;
    }
    if asked("cuts") {
        cuts();
    }
    if asked("sizes") {
        scale().await;
    }
    if asked("exports") {
        many_exports().await;
    }
}

fn report(what: &str, result: &str) {
    println!("{what:<64}  {result}");
}

/// Has as much memory touched as a measurement needs, right before it: a virtual machine's host gives a page out slowly the first
/// time, and that is not what is measured. By a process of its own, since this one's allocator would go on to give it back.
fn warm_memory() {
    run_this(&["touch"]);
}

fn run_this(args: &[impl AsRef<OsStr>]) {
    let this = std::env::current_exe().unwrap();
    assert!(std::process::Command::new(this).args(args).status().unwrap().success());
}

/// Where publishes work, as in a server.
fn background() -> Background {
    static STARTED: OnceLock<(Background, Runtime)> = OnceLock::new();
    STARTED.get_or_init(|| Background::start().unwrap()).0.clone()
}

async fn start(store: SharedStore, cache_root: &Path) -> Arc<Registry> {
    let services = Services::new(store, root(), Arc::new(RealDisk::default()), Arc::new(SystemClock));
    let services = services.with_background(background());
    Registry::discover(Arc::new(services), cache_root.to_owned()).await.unwrap()
}

/// Bytes that no two chunks share.
async fn fill_with_data(volume: &Arc<Volume>, chunks: u64) {
    let mut data = vec![0u8; CHUNK_BYTES as usize];
    for chunk in 0..chunks {
        for (i, word) in data.chunks_exact_mut(8).enumerate() {
            let value = (i as u64 + 1).wrapping_mul(chunk + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
            word.copy_from_slice(&value.to_le_bytes());
        }
        volume.write(chunk * CHUNK_BYTES, data.clone().into()).await.unwrap();
    }
}

fn percentile(times: &mut [Duration], percent: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() * percent / 100).min(times.len() - 1)]
}

async fn cold_reads() {
    let memory: SharedStore = Arc::new(RemoteStore::memory());
    let dir = tempfile::tempdir().unwrap();
    let origin = start(memory.clone(), dir.path()).await;
    origin.create(id("disk"), Geometry::new(DISK_CHUNKS * CHUNK_BYTES, CHUNK_BYTES).unwrap()).await.unwrap();
    fill_with_data(&origin.volume(&id("disk")).await.unwrap(), DISK_CHUNKS).await;
    origin.snapshot(&id("disk")).await.unwrap();
    origin.close().await;

    let shape = Shape::BUCKET;
    let one = shape.time(CHUNK_BYTES);
    let aggregate = shape.streams as f64 * 4.0 / one.as_secs_f64();
    for readers in [1, 4] {
        let (volume, _dirs) = cold(&memory, shape).await;
        warm_memory();
        let begun = Instant::now();
        let share = DISK_CHUNKS * CHUNK_BYTES / readers;
        let reads = (0..readers).map(|reader| {
            let volume = volume.clone();
            tokio::spawn(async move {
                let mut buf = vec![0; MIB as usize];
                for at in (reader * share..(reader + 1) * share).step_by(MIB as usize) {
                    // As the front end does.
                    if !volume.read_at_once(range(at, MIB), &mut buf) {
                        read(&volume, at, MIB).await;
                    }
                }
            })
        });
        futures_util::future::join_all(reads).await;
        let speed = 1024.0 / begun.elapsed().as_secs_f64();
        let text = format!("{speed:.0} MiB/s, {:.2} of the store's {aggregate:.0}", speed / aggregate);
        report(&format!("sequential cold reading of 1 GiB, {readers} at once"), &text);
    }
    let (volume, _dirs) = cold(&memory, shape).await;
    warm_memory();
    let begun = Instant::now();
    let reads = (0..32).map(|i| {
        let volume = volume.clone();
        tokio::spawn(async move { read(&volume, (i * 29 % DISK_CHUNKS) * CHUNK_BYTES, 4096).await })
    });
    futures_util::future::join_all(reads).await;
    let fetches = begun.elapsed().as_secs_f64() / one.as_secs_f64();
    report("32 random cold reads at once", &format!("{:.0?}, the time of {fetches:.1} fetches", begun.elapsed()));
}

async fn cold(memory: &SharedStore, shape: Shape) -> (Arc<Volume>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let registry = start(Arc::new(Shaped::new(memory.clone(), shape)), dir.path()).await;
    (registry.volume(&id("disk")).await.unwrap(), dir)
}

/// 4 KiB writes all over the volume until told to stop, a few thousand a second; how long each took.
async fn write_until(volume: Arc<Volume>, chunks: u64, stop: Arc<AtomicBool>) -> Vec<Duration> {
    let mut times = Vec::new();
    let data = [7; 4096];
    for i in 0u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let at = (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) % (chunks * CHUNK_BYTES)) & !4095;
        let begun = Instant::now();
        // As the front end does.
        if !volume.write_at_once(at, &data) {
            volume.write(at, data.to_vec().into()).await.unwrap();
        }
        times.push(begun.elapsed());
        if i % 4 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    times
}

async fn publishing() {
    let dir = tempfile::tempdir().unwrap();
    let shape = Shape { forgets_blobs: true, ..Shape::BUCKET };
    let registry = start(Arc::new(Shaped::new(Arc::new(RemoteStore::memory()), shape)), dir.path()).await;
    registry.create(id("disk"), Geometry::new(DISK_CHUNKS * CHUNK_BYTES, CHUNK_BYTES).unwrap()).await.unwrap();
    let volume = registry.volume(&id("disk")).await.unwrap();
    fill_with_data(&volume, DISK_CHUNKS).await;
    warm_memory();
    let begun = Instant::now();
    registry.snapshot(&id("disk")).await.unwrap();
    report("snapshot of 1 GiB", &format!("{:.0} MiB/s", 1024.0 / begun.elapsed().as_secs_f64()));

    fill_with_data(&volume, DISK_CHUNKS).await;
    let mut p99 = Vec::new();
    for publish in [false, true] {
        let stop = Arc::new(AtomicBool::new(false));
        let writer = tokio::spawn(write_until(volume.clone(), DISK_CHUNKS, stop.clone()));
        if publish {
            registry.snapshot(&id("disk")).await.unwrap();
        } else {
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
        stop.store(true, Ordering::Relaxed);
        let times = &mut writer.await.unwrap();
        let when = if publish { "during a snapshot" } else { "alone" };
        for percent in [50, 90, 99] {
            let time = percentile(times, percent);
            report(&format!("4 KiB writes {when}, percentile {percent} of {}", times.len()), &format!("{time:.0?}"));
        }
        p99.push(percentile(times, 99));
    }
    let ratio = p99[1].as_secs_f64() / p99[0].as_secs_f64();
    report("p99 of 4 KiB writes during a snapshot", &format!("{ratio:.1} times that without"));
}

fn cuts() {
    for (chunks, dirty) in [(100_000, 100_000), (262_144, 100_000), (4 << 20, 100_000)] {
        let dir = tempfile::tempdir().unwrap();
        let geometry = Geometry::new(chunks * 4096, 4096).unwrap();
        let cache: Cache = opening(dir.path().join("c"), geometry).open().unwrap();
        for i in 0..dirty {
            cache.write(i * (chunks / dirty) * 4096, &[1], |_| true).unwrap();
        }
        let mut times: Vec<_> = (0..100)
            .map(|_| {
                let begun = Instant::now();
                assert_eq!(cache.cut().unwrap().len() as u64, dirty);
                let time = begun.elapsed();
                cache.uncut().unwrap();
                time
            })
            .collect();
        report(
            &format!("p99 of a cut, {dirty} of {chunks} chunks dirty"),
            &format!("{:.1?}", percentile(&mut times, 99)),
        );
    }
}

fn local(dir: &Path) -> LocalStore {
    let clock: Arc<dyn Clock> = Arc::new(SystemClock);
    LocalStore::open(dir.join("store"), clock).unwrap().with_background(background())
}

async fn scale() {
    let dir =
        tempfile::tempdir_in(std::env::var_os("BENCH_DIR").unwrap_or_else(|| std::env::temp_dir().into())).unwrap();
    let store = local(dir.path());
    for (name, chunks, published) in [("full", 262_144u64, 262_144u32), ("vast", (4 << 20) - 1, 0)] {
        let geometry = Geometry::new(chunks * CHUNK_BYTES, CHUNK_BYTES).unwrap();
        let keys = root().export(&id(name));
        let mut head = Head::new(id(name), geometry, None);
        if published > 0 {
            let snapshot = SnapshotId::generate();
            let change = |i: u32| Change::New {
                offset: u64::from(i) * CHUNK_BYTES,
                hash: *blake3::hash(&i.to_le_bytes()).as_bytes(),
            };
            let changes = (0..published).map(|i| (ChunkIndex(i), change(i))).collect();
            let empty = Manifest::empty(id(name), geometry);
            let now = SystemClock.now();
            let manifest = empty.compacted(id(name), None, now, keys.base(snapshot), changes).unwrap();
            store.put(&keys.manifest(snapshot), format::encode(&manifest).into(), Condition::Always).await.unwrap();
            head = head.published(snapshot);
        }
        store.put(&keys.head(), head.encode().into(), Condition::IfAbsent).await.unwrap();
        run_this(&["scale".as_ref(), dir.path().as_os_str(), name.as_ref()]);
    }
}

/// What this process has now, and the most it ever had, in MiB.
fn memory() -> (u64, u64) {
    let pid = std::process::id();
    (resident_bytes(pid) / MIB, peak_bytes(pid) / MIB)
}

async fn open_at_scale(dir: &Path, name: &str) {
    let what = if name == "full" { "1 TiB, every chunk published" } else { "16 TiB less 4 MiB, nothing resident" };
    let registry = start(Arc::new(local(dir)), &dir.join("cache")).await;
    let begun = Instant::now();
    let volume = registry.volume(&id(name)).await.unwrap();
    let (opened, (rss, peak)) = (begun.elapsed(), memory());
    report(&format!("{what}: open"), &format!("{:.2} s, {rss} MiB resident, {peak} at most", opened.as_secs_f64()));
    volume.write(0, vec![1; CHUNK_BYTES as usize].into()).await.unwrap();
    let begun = Instant::now();
    registry.snapshot(&id(name)).await.unwrap();
    let (snapshot, (rss, peak)) = (begun.elapsed(), memory());
    report(
        &format!("{what}: snapshot of one chunk"),
        &format!("{:.2} s, {rss} MiB resident, {peak} at most", snapshot.as_secs_f64()),
    );
}

async fn many_exports() {
    let (memory, dir) = (Arc::new(RemoteStore::memory()), tempfile::tempdir().unwrap());
    let origin = start(memory.clone(), dir.path()).await;
    for i in 0..1000 {
        origin.create(id(&format!("disk-{i}")), Geometry::new(64 * MIB, CHUNK_BYTES).unwrap()).await.unwrap();
    }
    origin.close().await;
    let store: SharedStore = Arc::new(Shaped::new(memory, Shape::BUCKET));
    let begun = Instant::now();
    let registry = start(store, dir.path()).await;
    report("start with 1,000 exports", &format!("{:.2} s", begun.elapsed().as_secs_f64()));
    for attached in [1, 100] {
        let mut volumes = Vec::new();
        for i in 0..attached {
            let volume = registry.volume(&id(&format!("disk-{i}"))).await.unwrap();
            // What an export costs once: its files, its first mark.
            write(&volume, 0, 1, 4 * MIB).await;
            volumes.push(volume);
        }
        let begun = Instant::now();
        let busy = volumes.into_iter().map(|volume| {
            tokio::spawn(async move {
                for n in 0..WRITES / attached {
                    write(&volume, n * 4096 % (4 * MIB), 1, 4096).await;
                    // As a connection's task gives way now and then.
                    if n % 32 == 0 {
                        tokio::task::yield_now().await;
                    }
                }
            })
        });
        futures_util::future::join_all(busy).await;
        let rate = WRITES as f64 / begun.elapsed().as_secs_f64();
        report(&format!("4 KiB writes, {attached} of 1,000 exports busy"), &format!("{rate:.0} a second"));
    }
}
