//! Crashes at every operation of recorded scenarios, and what the real recovery makes of each.
//!
//! A scenario runs once on a simulated host, which records every operation of disk and store. Then each moment is a
//! crash: the process dies (with the last write perhaps cut short), or the host does (with whatever the disk may
//! keep of what was not synced). The real code recovers each state, and every promise is checked:
//! every sector holds a value between the last flushed and the last issued; every published snapshot is whole and
//! unchanged; no staging file and no half-made snapshot is left.
//!
//! `NBD_TEST_CRASH_LOSSES=N` draws N random losses at every moment (default 12).

#![allow(
    clippy::print_stdout,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::cast_possible_truncation,
    missing_docs
)]

mod common;

use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use common::sim::{Event, Loss, SECTOR, Sim, SimDisk, SimStore, State, killed_in_write, power_loss, process_crash};
use common::volumes::{CHUNK, id, range, read_all, read_as_served, root, write_as_served};
use nbd_server::clock::SystemClock;
use nbd_server::manifest::{Source, format};
use nbd_server::store::keys::ExportKeys;
use nbd_server::units::{ChunkIndex, Geometry, SnapshotId};
use nbd_server::volume::registry::{Published, Registry};
use nbd_server::volume::{Services, Volume};

const CHUNKS: u64 = 4;
/// The last chunk is short.
const SIZE: u64 = CHUNKS * CHUNK - 1024;
const SECTORS: usize = SIZE as usize / SECTOR;

fn geometry() -> Geometry {
    Geometry::new(SIZE, CHUNK).unwrap()
}

async fn start(sim: &Arc<Sim>) -> Arc<Registry> {
    let (store, disk) = (Arc::new(SimStore(Arc::clone(sim))), Arc::new(SimDisk(Arc::clone(sim))));
    let services = Arc::new(Services::new(store, root(), disk, Arc::new(SystemClock)));
    Registry::discover(services, PathBuf::from("/cache")).await.unwrap()
}

/// A change of one sector: when it was asked for, when it was replied to, and the value.
#[derive(Debug, Clone, Copy)]
struct Fact {
    issued: usize,
    acked: usize,
    value: u8,
}

#[derive(Debug, Clone, Copy)]
struct Span {
    begun: usize,
    acked: usize,
}

/// What happened to one export.
#[derive(Debug, Clone, Default)]
struct History {
    created: Option<Span>,
    sectors: Vec<Vec<Fact>>,
    flushes: Vec<Span>,
    snapshots: BTreeMap<SnapshotId, Span>,
}

impl History {
    /// The values a sector may have if everything replied to until `floor` must be there and nothing after `k` was
    /// asked for.
    fn allowed(&self, sector: usize, floor: usize, k: usize) -> Vec<u8> {
        let facts = &self.sectors[sector];
        let last = facts.iter().rposition(|fact| fact.acked <= floor).unwrap_or(0);
        facts[last..].iter().filter(|fact| fact.issued <= k).map(|fact| fact.value).collect()
    }

    /// Until when everything is durable if the host goes down at `k`.
    fn flushed(&self, k: usize) -> usize {
        self.flushes.iter().filter(|flush| flush.acked <= k).map(|flush| flush.begun).max().unwrap_or(0)
    }
}

/// A scenario as it is being recorded.
struct Scene {
    sim: Arc<Sim>,
    registry: Arc<Registry>,
    histories: BTreeMap<&'static str, History>,
    next_value: u8,
}

impl Scene {
    async fn begin() -> Self {
        let sim = Sim::new(State::default(), 1);
        let registry = start(&sim).await;
        Self { sim, registry, histories: BTreeMap::new(), next_value: 0 }
    }

    async fn create(&mut self, name: &'static str) {
        let begun = self.sim.now();
        self.registry.create(id(name), geometry()).await.unwrap();
        self.made(name, begun, &[0; SECTORS]);
    }

    async fn clone_of(&mut self, name: &'static str, source: &'static str) {
        let content: Vec<u8> = self.histories[source].sectors.iter().map(|f| f.last().unwrap().value).collect();
        let begun = self.sim.now();
        self.registry.clone_export(id(name), id(source), None).await.unwrap();
        self.made(name, begun, &content);
    }

    fn made(&mut self, name: &'static str, begun: usize, content: &[u8]) {
        let sectors = content.iter().map(|value| vec![Fact { issued: 0, acked: 0, value: *value }]).collect();
        let created = Some(Span { begun, acked: self.sim.now() });
        self.histories.insert(name, History { created, sectors, ..History::default() });
    }

    async fn volume(&self, name: &str) -> Arc<Volume> {
        self.registry.volume(&id(name)).await.unwrap()
    }

    fn note(&mut self, name: &str, sectors: std::ops::Range<usize>, issued: usize, value: u8) {
        let acked = self.sim.now();
        for sector in sectors {
            self.histories.get_mut(name).unwrap().sectors[sector].push(Fact { issued, acked, value });
        }
    }

    async fn write(&mut self, name: &str, sectors: std::ops::Range<usize>) {
        self.next_value = self.next_value.checked_add(1).expect("a scenario has at most 255 writes");
        let (issued, value) = (self.sim.now(), self.next_value);
        let bytes = vec![value; sectors.len() * SECTOR];
        write_as_served(&self.volume(name).await, (sectors.start * SECTOR) as u64, bytes.into()).await.unwrap();
        self.note(name, sectors, issued, value);
    }

    async fn zero(&mut self, name: &str, sectors: std::ops::Range<usize>, trim: bool) {
        let issued = self.sim.now();
        let span = range((sectors.start * SECTOR) as u64, (sectors.len() * SECTOR) as u64);
        let volume = self.volume(name).await;
        if trim {
            volume.trim(span).await.unwrap()
        } else {
            volume.write_zeroes(span).await.unwrap()
        }
        self.note(name, sectors, issued, 0);
    }

    async fn read(&mut self, name: &str, sectors: std::ops::Range<usize>) {
        let span = range((sectors.start * SECTOR) as u64, (sectors.len() * SECTOR) as u64);
        read_as_served(&self.volume(name).await, span).await.unwrap();
    }

    async fn flush(&mut self, name: &str) {
        let begun = self.sim.now();
        self.volume(name).await.flush().await.unwrap();
        self.histories.get_mut(name).unwrap().flushes.push(Span { begun, acked: self.sim.now() });
    }

    async fn snapshot(&mut self, name: &str) {
        let begun = self.sim.now();
        let published = self.registry.snapshot(&id(name)).await.unwrap();
        self.published(name, begun, published);
    }

    async fn compact(&mut self, name: &str) {
        let begun = self.sim.now();
        let published = self.registry.compact(&id(name)).await.unwrap();
        self.published(name, begun, published);
    }

    fn published(&mut self, name: &str, begun: usize, published: Published) {
        assert!(published.created);
        let span = Span { begun, acked: self.sim.now() };
        let history = self.histories.get_mut(name).unwrap();
        history.snapshots.insert(published.snapshot_id.unwrap(), span);
    }

    /// A snapshot with writes to a chunk of the cut, to a clean and to a missing one while it is under way.
    async fn snapshot_under_writes(&mut self, name: &'static str, writes: &[std::ops::Range<usize>]) {
        let begun = self.sim.now();
        let registry = Arc::clone(&self.registry);
        let task = tokio::spawn(async move { registry.snapshot(&id(name)).await.unwrap() });
        for sectors in writes {
            self.write(name, sectors.clone()).await;
            self.flush(name).await;
        }
        let published = task.await.unwrap();
        self.published(name, begun, published);
    }

    async fn reset(&mut self, name: &'static str, content: &[u8]) {
        let issued = self.sim.now();
        self.registry.reset(&id(name)).await.unwrap();
        for (sector, value) in content.iter().enumerate() {
            self.note(name, sector..sector + 1, issued, *value);
        }
        // A reset is durable before it is reported.
        let now = self.sim.now();
        self.histories.get_mut(name).unwrap().flushes.push(Span { begun: now, acked: now });
    }

    fn content(&self, name: &str) -> Vec<u8> {
        self.histories[name].sectors.iter().map(|facts| facts.last().unwrap().value).collect()
    }

    async fn restart(&mut self) {
        let begun = self.sim.now();
        self.registry.close().await;
        let span = Span { begun, acked: self.sim.now() };
        self.histories.values_mut().for_each(|history| history.flushes.push(span));
        self.registry = start(&self.sim).await;
    }

    /// The process dies and is started again: the recovery is part of the recording, and so crashed, too.
    async fn kill(&mut self) {
        self.registry = start(&self.sim).await;
    }
}

/// A moment of a scenario and what it left.
struct Case<'a> {
    histories: &'a BTreeMap<&'static str, History>,
    k: usize,
    power_lost: bool,
    state: State,
}

impl Case<'_> {
    async fn check(self) -> Result<(), String> {
        let objects = Arc::clone(&self.state.objects);
        let sim = Sim::new(self.state, if self.power_lost { 2 } else { 1 });
        let registry = start(&sim).await;
        for (name, history) in self.histories {
            let Some(created) = history.created else { continue };
            let keys = root().export(&id(name));
            if created.acked > self.k && !objects.contains_key(&keys.head()) {
                continue;
            }
            let volume = registry.volume(&id(name)).await.map_err(|e| format!("{name} does not open: {e}"))?;
            let image = read_all(&volume).await;
            let floor = if self.power_lost { history.flushed(self.k) } else { self.k };
            for (sector, bytes) in image.chunks(SECTOR).enumerate() {
                let allowed = history.allowed(sector, floor, self.k);
                if !allowed.contains(&bytes[0]) || bytes.iter().any(|b| *b != bytes[0]) {
                    return Err(format!("{name}, sector {sector}: {} instead of {allowed:?}", bytes[0]));
                }
            }
            self::published_is_whole(&sim.state(), &keys, name, history, self.k)?;
        }
        let state = sim.state();
        for path in state.paths() {
            let name = path.file_name().unwrap().to_str().unwrap();
            if !["cache.raw", "cache.meta", "clone.seed.json"].contains(&name) {
                return Err(format!("{} is left", path.display()));
            }
        }
        Ok(())
    }
}

fn published_is_whole(state: &State, keys: &ExportKeys, name: &str, history: &History, k: usize) -> Result<(), String> {
    let head = state.objects.get(&keys.head()).ok_or("the head is gone")?;
    let head = nbd_server::manifest::head::Head::decode(&head.0, &id(name), &keys.head()).unwrap();
    let acked = history.snapshots.iter().filter(|(_, span)| span.acked <= k);
    let mut published: HashSet<SnapshotId> = acked.map(|(snapshot, _)| *snapshot).collect();
    published.extend(head.current);
    for snapshot in &published {
        let key = keys.manifest(*snapshot);
        let (bytes, _) = state.objects.get(&key).ok_or_else(|| format!("{key} is gone"))?;
        let manifest = format::decode(bytes, &key, &id(name), Some(geometry()), &root()).map_err(|e| e.to_string())?;
        let span = history.snapshots.get(snapshot).ok_or("the head is a snapshot that nobody took")?;
        for chunk in (0..CHUNKS as u32).map(ChunkIndex) {
            let whole = geometry().chunk_range(chunk);
            let content = match manifest.source(chunk) {
                Source::Zero => vec![0; whole.len() as usize],
                Source::Packed { key, range, hash } => {
                    let (blob, _) = state.objects.get(key).ok_or_else(|| format!("{key} is gone"))?;
                    let bytes = &blob[range.offset() as usize..range.end() as usize];
                    if blake3::hash(bytes) != hash {
                        return Err(format!("{key} is damaged"));
                    }
                    bytes.to_vec()
                }
                Source::Base { .. } => return Err("a base without hashes".into()),
            };
            for (i, sector) in content.chunks(SECTOR).enumerate() {
                let at = whole.offset() as usize / SECTOR + i;
                let allowed = history.allowed(at, span.begun, span.acked);
                if !allowed.contains(&sector[0]) {
                    return Err(format!("snapshot {snapshot}, sector {at}: {} instead of {allowed:?}", sector[0]));
                }
            }
        }
    }
    let folders: HashSet<String> = state
        .objects
        .keys()
        .filter_map(|key| key.as_str().strip_prefix(keys.prefix().as_str())?.strip_prefix("/snapshots/"))
        .filter_map(|rest| Some(rest.split_once('/')?.0.to_owned()))
        .collect();
    match folders.iter().find(|folder| !published.iter().any(|snapshot| snapshot.to_string() == **folder)) {
        Some(folder) => Err(format!("objects of snapshot {folder}, which was never published, are left")),
        None => Ok(()),
    }
}

/// Crashes a recorded scenario everywhere and returns how many distinct states were recovered.
fn crash_everywhere(name: &str, scene: &Scene) -> usize {
    let losses: u64 = std::env::var("NBD_TEST_CRASH_LOSSES").ok().and_then(|n| n.parse().ok()).unwrap_or(12);
    let (events, histories) = (scene.sim.events(), &scene.histories);
    let (next, seen, failed) = (AtomicUsize::new(0), Mutex::new(HashSet::new()), Mutex::new(None));
    let work = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        loop {
            let k = next.fetch_add(1, Ordering::Relaxed);
            if k > events.len() || failed.lock().unwrap().is_some() {
                return;
            }
            for (kind, power_lost, state) in states(&events[..k], losses) {
                // The same bytes at a later moment have to satisfy stricter promises: they are another case.
                let acks =
                    histories.values().map(|h| h.flushed(k) + h.snapshots.values().filter(|s| s.acked <= k).count());
                let case = (state.fingerprint(), power_lost, acks.sum::<usize>(), if power_lost { 0 } else { k });
                if !seen.lock().unwrap().insert(case) {
                    continue;
                }
                // A write cut short was not replied to.
                let k = if kind.starts_with("killed") { k - 1 } else { k };
                let case = Case { histories, k, power_lost, state };
                if let Err(e) = runtime.block_on(case.check()) {
                    let around = &events[k.saturating_sub(6)..(k + 2).min(events.len())];
                    let around: Vec<_> = around.iter().map(short).collect();
                    *failed.lock().unwrap() =
                        Some(format!("{name}, crash at {k} ({kind}): {e}\n{}", around.join("\n")));
                }
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(work);
        }
    });
    if let Some(failure) = failed.into_inner().unwrap() {
        panic!("{failure}");
    }
    let states = seen.into_inner().unwrap().len();
    println!("{name}: {} operations, {states} distinct crash states recovered", events.len());
    states
}

fn short(event: &Event) -> String {
    let text = format!("{event:?}");
    text.chars().take(160).collect()
}

fn states(events: &[Event], losses: u64) -> Vec<(String, bool, State)> {
    let start = State::default();
    let mut states = vec![("process".to_owned(), false, process_crash(&start, events))];
    for sectors in [1, 3, 7] {
        states.extend(
            killed_in_write(&start, events, sectors).map(|s| (format!("killed after {sectors} sectors"), false, s)),
        );
    }
    let seeds = (0..losses).map(|seed| Loss::Some(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ events.len() as u64));
    for loss in [Loss::Nothing, Loss::Everything].into_iter().chain(seeds) {
        states.push((format!("power, {loss:?}"), true, power_loss(&start, events, loss)));
    }
    states
}

fn scenario(name: &str, record: impl AsyncFnOnce(&mut Scene)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let scene = runtime.block_on(async {
        let mut scene = Scene::begin().await;
        record(&mut scene).await;
        scene
    });
    assert!(crash_everywhere(name, &scene) > 100);
}

#[test]
fn first_writes_overwrites_and_flushes() {
    scenario("writes", async |s| {
        s.create("disk").await;
        s.write("disk", 0..3).await;
        s.flush("disk").await;
        s.write("disk", 1..2).await;
        s.write("disk", 8..16).await;
        s.write("disk", 6..20).await;
        s.flush("disk").await;
        s.flush("disk").await;
        s.write("disk", 0..SECTORS).await;
        s.flush("disk").await;
    });
}

#[test]
fn trims_and_zeroes_over_every_kind_of_chunk() {
    scenario("zeroes", async |s| {
        s.create("disk").await;
        s.write("disk", 0..24).await;
        s.flush("disk").await;
        s.zero("disk", 0..8, true).await;
        s.zero("disk", 10..12, false).await;
        s.write("disk", 3..5).await;
        s.flush("disk").await;
        s.snapshot("disk").await;
        s.zero("disk", 8..16, false).await;
        s.write("disk", 9..10).await;
        s.zero("disk", 8..16, true).await;
        s.flush("disk").await;
        s.write("disk", 8..16).await;
        s.zero("disk", 16..24, true).await;
        s.snapshot("disk").await;
        s.write("disk", 17..18).await;
        s.flush("disk").await;
    });
}

#[test]
fn fills_and_writes_over_them() {
    scenario("fills", async |s| {
        s.create("disk").await;
        s.write("disk", 0..SECTORS).await;
        s.snapshot("disk").await;
        let published = s.content("disk");
        s.reset("disk", &published).await;
        s.read("disk", 0..3).await;
        s.write("disk", 9..10).await;
        s.write("disk", 1..2).await;
        s.flush("disk").await;
        s.write("disk", 16..24).await;
        s.write("disk", 2..3).await;
        s.flush("disk").await;
    });
}

#[test]
fn snapshots_compactions_and_writes_during_them() {
    scenario("publishes", async |s| {
        s.create("disk").await;
        s.write("disk", 0..20).await;
        s.snapshot("disk").await;
        s.write("disk", 1..2).await;
        s.write("disk", 10..11).await;
        s.flush("disk").await;
        s.snapshot_under_writes("disk", &[2..3, 16..18, 9..10, 24..26]).await;
        s.write("disk", 0..1).await;
        s.compact("disk").await;
        s.write("disk", 26..28).await;
        s.flush("disk").await;
        s.snapshot("disk").await;
    });
}

#[test]
fn resets_after_unpublished_writes() {
    scenario("resets", async |s| {
        s.create("disk").await;
        s.write("disk", 0..12).await;
        s.snapshot("disk").await;
        let published = s.content("disk");
        s.write("disk", 0..20).await;
        s.flush("disk").await;
        s.reset("disk", &published).await;
        s.write("disk", 4..6).await;
        s.flush("disk").await;
    });
}

#[test]
fn a_clone_and_its_first_publish() {
    scenario("clones", async |s| {
        s.create("disk").await;
        s.write("disk", 0..12).await;
        s.snapshot("disk").await;
        s.clone_of("copy", "disk").await;
        s.write("copy", 2..4).await;
        s.flush("copy").await;
        s.write("disk", 0..2).await;
        s.snapshot("copy").await;
        s.write("copy", 20..22).await;
        s.snapshot("disk").await;
        s.snapshot("copy").await;
    });
}

#[test]
fn clean_stops_kills_and_recoveries_between_them() {
    scenario("restarts", async |s| {
        s.create("disk").await;
        s.write("disk", 0..10).await;
        s.restart().await;
        s.read("disk", 0..1).await;
        s.write("disk", 4..6).await;
        s.snapshot("disk").await;
        s.restart().await;
        s.write("disk", 12..20).await;
        s.kill().await;
        s.read("disk", 0..1).await;
        s.flush("disk").await;
        s.write("disk", 5..7).await;
        s.kill().await;
        s.write("disk", 6..8).await;
        s.restart().await;
        s.read("disk", 0..1).await;
    });
}
