//! Scenarios on a simulated host, and the oracle: which values every sector may have after whatever happened.
//!
//! A sector holds one value in all its bytes. For each change of a sector the history knows when it was asked for and
//! when it was replied to, on the timeline of the host. From that follows what a crash at any moment may leave: nothing
//! older than what was promised, nothing newer than what was asked for.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::ops::Range;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use nbd_server::manifest::{Source, format, head::Head};
use nbd_server::store::retry::{RetryPolicy, Retrying};
use nbd_server::units::{ChunkIndex, Geometry, SnapshotId};
use nbd_server::volume::registry::{ExportError, Published, Registry};
use nbd_server::volume::{Residency, Services, Volume, VolumeError};

use super::sim::crash::Dice;
use super::sim::faults::Faults;
use super::sim::{Event, Loss, SECTOR, Sim, SimClock, SimDisk, SimStore, State, Walk};
use super::volumes::{CHUNK, cache_root_id, id, range, read_all, read_as_served, root, write_as_served};

pub const CHUNKS: u64 = 4;
/// The last chunk is short.
pub const SIZE: u64 = CHUNKS * CHUNK - 1024;
pub const SECTORS: usize = SIZE as usize / SECTOR;

/// When something happens that never does.
const NEVER: usize = usize::MAX;

pub fn geometry() -> Geometry {
    Geometry::new(SIZE, CHUNK).unwrap()
}

/// One thread runs the tasks and one the disk work, so that a scenario always takes the same course.
pub fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .max_blocking_threads(1)
        .enable_all()
        .start_paused(true)
        .build()
        .unwrap()
}

pub async fn start(sim: &Arc<Sim>, store: &SimStore, cache_root: &str) -> Result<Arc<Registry>, ExportError> {
    start_with_patience(sim, store, cache_root, RetryPolicy::default()).await
}

/// The same with another patience for writing heads.
pub async fn start_with_patience(
    sim: &Arc<Sim>,
    store: &SimStore,
    cache_root: &str,
    patience: RetryPolicy,
) -> Result<Arc<Registry>, ExportError> {
    let (disk, clock) = (Arc::new(SimDisk(Arc::clone(sim))), Arc::new(SimClock::default()));
    let retrying = Retrying::new(Arc::new(store.clone()), RetryPolicy::default(), clock.clone());
    // One chunk is set aside in memory while it is published, others in the file.
    let services = Services::new(Arc::new(retrying), root(), disk, clock).with_publish_bytes(8 * CHUNK);
    let services = services.with_patience(patience).with_cache_root(cache_root_id(cache_root));
    Registry::discover(Arc::new(services), PathBuf::from(cache_root)).await
}

/// A change of one sector: when it was asked for, when it was replied to, and the value.
#[derive(Debug, Clone, Copy)]
struct Fact {
    issued: usize,
    acked: usize,
    value: u8,
}

/// One of these values, it is not known which: the first is the floor, each further one may be there instead.
fn any_of(values: &[u8], issued: usize, acked: usize) -> Vec<Fact> {
    let fact = |(i, value): (usize, &u8)| Fact { issued, acked: if i == 0 { acked } else { NEVER }, value: *value };
    values.iter().enumerate().map(fact).collect()
}

#[derive(Debug, Clone, Copy)]
pub struct Span {
    pub begun: usize,
    pub acked: usize,
}

/// The values that every sector may have.
type Image = Vec<Vec<u8>>;

#[derive(Debug, Clone)]
struct Publish {
    span: Span,
    image: Image,
}

/// What happened to one export.
#[derive(Debug, Clone, Default)]
pub struct History {
    created: Option<Span>,
    sectors: Vec<Vec<Fact>>,
    flushes: Vec<Span>,
    snapshots: BTreeMap<SnapshotId, Publish>,
    /// Publishes that failed, or whose end nobody saw. They may have landed all the same.
    attempts: Vec<Publish>,
}

impl History {
    /// The values a sector may have if everything replied to until `floor` must be there and nothing after `k` was
    /// asked for.
    fn allowed(&self, sector: usize, floor: usize, k: usize) -> Vec<u8> {
        let facts = &self.sectors[sector];
        let last = facts.iter().rposition(|fact| fact.acked <= floor).unwrap_or(0);
        facts[last..].iter().filter(|fact| fact.issued <= k).map(|fact| fact.value).collect()
    }

    fn image(&self, floor: usize, k: usize) -> Image {
        (0..SECTORS).map(|sector| self.allowed(sector, floor, k)).collect()
    }

    /// Until when everything is durable if the host goes down at `k`.
    pub fn flushed(&self, k: usize) -> usize {
        self.flushes.iter().filter(|flush| flush.acked <= k).map(|flush| flush.begun).max().unwrap_or(0)
    }

    /// How much was promised by `k`: the same bytes at a later moment have to satisfy more.
    pub fn promised(&self, k: usize) -> usize {
        self.flushed(k) + self.snapshots.values().filter(|snapshot| snapshot.span.acked <= k).count()
    }

    fn note(&mut self, sectors: Range<usize>, issued: usize, acked: usize, value: u8) {
        for sector in sectors {
            self.sectors[sector].push(Fact { issued, acked, value });
        }
    }
}

/// A change that is made while a publish is under way.
#[derive(Debug, Clone)]
pub enum Meanwhile {
    Write(Range<usize>),
    Zero(Range<usize>),
    Flush,
}

/// A stretch of a scenario without a power loss in it: from where, what happened, and what that promised.
pub struct Chapter {
    pub start: Walk,
    pub boot: u8,
    pub events: Vec<Event>,
    pub histories: BTreeMap<&'static str, History>,
}

/// A scenario as it is being recorded.
pub struct Scene {
    pub sim: Arc<Sim>,
    pub store: SimStore,
    pub histories: BTreeMap<&'static str, History>,
    /// The stretches before the last power loss.
    past: Vec<Chapter>,
    start: Walk,
    registry: Option<Arc<Registry>>,
    next_value: u8,
    /// Whether steps may fail, since the disk and the store do.
    faulty: bool,
}

/// What a step leaves if it may fail: nothing, if it did.
type Step<T> = Option<T>;

impl Scene {
    pub async fn begin() -> Self {
        let mut scene = Self::on(Sim::new(State::default(), 1), false);
        scene.start().await;
        scene
    }

    /// A scenario whose steps may fail.
    pub fn faulty(sim: Arc<Sim>) -> Self {
        Self::on(sim, true)
    }

    fn on(sim: Arc<Sim>, faulty: bool) -> Self {
        let store = SimStore::new(Arc::clone(&sim));
        let (start, histories) = (sim.walk(), BTreeMap::new());
        Self { sim, store, histories, past: Vec::new(), start, registry: None, next_value: 0, faulty }
    }

    /// All that was recorded.
    pub fn chapters(mut self) -> Vec<Chapter> {
        self.end_chapter();
        self.past
    }

    fn end_chapter(&mut self) {
        let (start, boot, events) = (self.start.clone(), self.sim.boot(), self.sim.events());
        self.past.push(Chapter { start, boot, events, histories: self.histories.clone() });
    }

    fn step<T, E: std::fmt::Debug>(&self, result: Result<T, E>) -> Step<T> {
        if !self.faulty {
            return Some(result.unwrap());
        }
        if let Err(e) = &result {
            // Shown if the test fails: how it came to that.
            println!("after {} operations: {e:?}", self.sim.now());
        }
        result.ok()
    }

    /// Starts a server here; if one was running, it is dead.
    pub async fn start(&mut self) -> Step<()> {
        self.registry = None;
        self.registry = self.step(start(&self.sim, &self.store, "/cache").await);
        self.registry.as_ref().map(|_| ())
    }

    fn registry(&self) -> Step<Arc<Registry>> {
        self.registry.clone()
    }

    async fn volume(&self, name: &str) -> Step<Arc<Volume>> {
        self.step(self.registry()?.volume(&id(name)).await)
    }

    pub async fn create(&mut self, name: &'static str) -> Step<()> {
        let begun = self.sim.now();
        let created = self.step(self.registry()?.create(id(name), geometry()).await);
        self.made(name, begun, created.is_some(), &vec![vec![0]; SECTORS]);
        created.map(drop)
    }

    /// A clone of what `source` published last.
    pub async fn clone_of(&mut self, name: &'static str, source: &'static str) -> Step<()> {
        // Ids are in the order of time.
        let (_, last) = self.histories.get(source)?.snapshots.last_key_value()?;
        let (image, begun) = (last.image.clone(), self.sim.now());
        let cloned = self.step(self.registry()?.clone_export(id(name), id(source), None).await);
        self.made(name, begun, cloned.is_some(), &image);
        cloned?;
        if image.iter().any(|values| values.len() > 1) {
            self.pin(name).await?;
        }
        Some(())
    }

    fn made(&mut self, name: &'static str, begun: usize, created: bool, image: &Image) {
        if !created && self.histories.contains_key(name) {
            return;
        }
        let sectors = image.iter().map(|values| any_of(values, 0, 0)).collect();
        let acked = if created { self.sim.now() } else { NEVER };
        let created = Some(Span { begun, acked });
        self.histories.insert(name, History { created, sectors, ..History::default() });
    }

    /// What the export is now, it stays, until it is changed.
    async fn pin(&mut self, name: &'static str) -> Step<()> {
        let volume = self.volume(name).await?;
        let now = self.step(volume.read(range(0, SIZE)).await)?;
        let acked = self.sim.now();
        let history = self.histories.get_mut(name)?;
        for (sector, bytes) in now.chunks(SECTOR).enumerate() {
            let allowed = history.allowed(sector, acked, acked);
            assert!(allowed.contains(&bytes[0]), "{name}, sector {sector}: {} instead of {allowed:?}", bytes[0]);
            history.sectors[sector].push(Fact { issued: 0, acked, value: bytes[0] });
        }
        Some(())
    }

    fn new_value(&mut self) -> u8 {
        self.next_value = self.next_value.checked_add(1).expect("a scenario has at most 255 writes");
        self.next_value
    }

    pub async fn write(&mut self, name: &str, sectors: Range<usize>) -> Step<()> {
        let value = self.new_value();
        let volume = self.volume(name).await?;
        let issued = self.sim.now();
        let written = self.step(write(&volume, &sectors, value).await);
        let acked = written.map_or(NEVER, |()| self.sim.now());
        self.histories.get_mut(name)?.note(sectors, issued, acked, value);
        written
    }

    pub async fn zero(&mut self, name: &str, sectors: Range<usize>, trim: bool) -> Step<()> {
        let volume = self.volume(name).await?;
        let issued = self.sim.now();
        let (zeroed, done) = zero(&volume, &sectors, trim).await;
        let done = self.step(done);
        let acked = done.map_or(NEVER, |()| self.sim.now());
        for sectors in zeroed {
            self.histories.get_mut(name)?.note(sectors, issued, acked, 0);
        }
        done
    }

    pub async fn read(&mut self, name: &str, sectors: Range<usize>) -> Step<()> {
        let volume = self.volume(name).await?;
        let now = self.step(read_as_served(&volume, span(&sectors)).await)?;
        for (sector, bytes) in sectors.zip(now.chunks(SECTOR)) {
            let allowed = self.histories.get(name)?.allowed(sector, self.sim.now(), NEVER);
            let value = bytes[0];
            assert!(allowed.contains(&value), "{name}, sector {sector} reads as {value} instead of {allowed:?}");
        }
        Some(())
    }

    pub async fn flush(&mut self, name: &str) -> Step<()> {
        let volume = self.volume(name).await?;
        let begun = self.sim.now();
        self.step(volume.flush().await)?;
        let acked = self.sim.now();
        self.histories.get_mut(name)?.flushes.push(Span { begun, acked });
        Some(())
    }

    pub async fn snapshot(&mut self, name: &str) -> Step<()> {
        let begun = self.sim.now();
        let registry = self.registry()?;
        let published = registry.snapshot(&id(name)).await;
        self.published(name, begun, published)
    }

    pub async fn compact(&mut self, name: &str) -> Step<()> {
        let begun = self.sim.now();
        let registry = self.registry()?;
        let published = registry.compact(&id(name)).await;
        self.published(name, begun, published)
    }

    fn published(&mut self, name: &str, begun: usize, published: Result<Published, ExportError>) -> Step<()> {
        let acked = self.sim.now();
        let published = self.step(published);
        let history = self.histories.get_mut(name)?;
        let image = history.image(begun, acked);
        match published {
            Some(Published { created: true, snapshot_id: Some(snapshot), .. }) => {
                history.snapshots.insert(snapshot, Publish { span: Span { begun, acked }, image });
            }
            Some(_) => {}
            None => history.attempts.push(Publish { span: Span { begun, acked: NEVER }, image }),
        }
        published.map(drop)
    }

    /// A snapshot; one of the changes is made at each call of the store that it makes.
    pub async fn snapshot_under(&mut self, name: &'static str, changes: &[Meanwhile]) -> Step<()> {
        let volume = self.volume(name).await?;
        let changes: VecDeque<_> = changes.iter().map(|change| (change.clone(), self.new_value())).collect();
        let (changes, sim, faulty) = (Arc::new(Mutex::new(changes)), Arc::clone(&self.sim), self.faulty);
        let facts = Arc::new(Mutex::new(Vec::<(Vec<Range<usize>>, Span, Option<u8>)>::new()));
        let done = Arc::clone(&facts);
        self.store.meanwhile(move |_, key| {
            let publishing = key.as_str().contains(&format!("/{name}/"));
            let (change, value) = publishing.then(|| changes.lock().unwrap().pop_front())??;
            let (volume, sim, done) = (Arc::clone(&volume), Arc::clone(&sim), Arc::clone(&done));
            Some(Box::pin(async move {
                let begun = sim.now();
                let (sectors, value, outcome) = match change {
                    Meanwhile::Write(sectors) => {
                        let outcome = write(&volume, &sectors, value).await;
                        (vec![sectors], Some(value), outcome)
                    }
                    Meanwhile::Zero(sectors) => {
                        let (zeroed, outcome) = zero(&volume, &sectors, false).await;
                        (zeroed, Some(0), outcome)
                    }
                    Meanwhile::Flush => (Vec::new(), None, volume.flush().await),
                };
                assert!(faulty || outcome.is_ok(), "{outcome:?}");
                let acked = outcome.map_or(NEVER, |()| sim.now());
                done.lock().unwrap().push((sectors, Span { begun, acked }, value));
            }))
        });
        let begun = self.sim.now();
        let published = self.registry()?.snapshot(&id(name)).await;
        self.store.meanwhile(|_, _| None);
        let history = self.histories.get_mut(name)?;
        for (sectors, span, value) in std::mem::take(&mut *facts.lock().unwrap()) {
            match value {
                Some(value) => sectors.into_iter().for_each(|s| history.note(s, span.begun, span.acked, value)),
                None if span.acked != NEVER => history.flushes.push(span),
                None => {}
            }
        }
        self.published(name, begun, published)
    }

    pub async fn reset(&mut self, name: &'static str) -> Step<()> {
        let issued = self.sim.now();
        let done = self.step(self.registry()?.reset(&id(name)).await);
        let acked = done.map_or(NEVER, |()| self.sim.now());
        let history = self.histories.get_mut(name)?;
        // What it falls back to: the newest snapshot, which may be one that failed in the eyes of its caller.
        let newest = history.snapshots.last_key_value().map(|(_, publish)| publish);
        let begun = newest.map_or(0, |publish| publish.span.begun);
        let base = newest.map_or_else(|| history.first_image(), |publish| publish.image.clone());
        let later = history.attempts.iter().filter(|attempt| attempt.span.begun >= begun);
        let images: Vec<Image> = std::iter::once(base).chain(later.map(|attempt| attempt.image.clone())).collect();
        let mut unclear = false;
        for sector in 0..SECTORS {
            let mut values: Vec<u8> = images.iter().flat_map(|image| image[sector].iter().copied()).collect();
            values.dedup();
            unclear |= values.len() > 1;
            history.sectors[sector].extend(any_of(&values, issued, acked));
        }
        done?;
        // A reset is durable before it is reported.
        let now = self.sim.now();
        history.flushes.push(Span { begun: now, acked: now });
        if unclear { self.pin(name).await } else { Some(()) }
    }

    pub async fn trim_cache(&mut self, name: &str) -> Step<()> {
        let trimmed = self.registry()?.trim_cache(&id(name)).await;
        self.step(trimmed).map(drop)
    }

    /// A clean stop and a start.
    pub async fn restart(&mut self) -> Step<()> {
        let begun = self.sim.now();
        self.registry()?.close().await;
        let span = Span { begun, acked: self.sim.now() };
        if !self.faulty {
            self.histories.values_mut().for_each(|history| history.flushes.push(span));
        }
        self.start().await
    }

    /// The process dies and is started again: the recovery is part of the recording, and so crashed, too.
    pub async fn kill(&mut self) -> Step<()> {
        self.start().await
    }

    /// The host goes down and comes up again. The recording goes on from what that left.
    pub async fn power_loss(&mut self, loss: Loss) -> Step<()> {
        let k = self.sim.now();
        self.registry = None;
        self.end_chapter();
        self.sim.reboot(self.sim.walk().power_loss(loss));
        self.start = self.sim.walk();
        for history in self.histories.values_mut() {
            let floor = history.flushed(k);
            for sector in 0..SECTORS {
                let allowed = history.allowed(sector, floor, k);
                history.sectors[sector] = any_of(&allowed, 0, 0);
            }
            let past = Span { begun: 0, acked: 0 };
            history.flushes.clear();
            history.created = history.created.map(|span| if span.acked > k { span } else { past });
            let publishes = history.snapshots.values_mut().chain(&mut history.attempts);
            publishes.for_each(|publish| publish.span = past);
        }
        self.start().await?;
        let names: Vec<_> = self.histories.keys().copied().collect();
        for name in names {
            self.pin(name).await?;
        }
        Some(())
    }

    /// The process dies on a full disk and starts on it: whatever was acknowledged is there, a FLUSH makes it survive the
    /// host as well; or, every other time, it can be published.
    pub async fn works_on_a_full_disk(&mut self) -> Result<(), String> {
        let k = self.sim.now();
        self.start().await.ok_or("the server does not start")?;
        let registry = self.registry().unwrap();
        for (name, history) in &self.histories {
            let Some(volume) = opened(&registry, name, history, k).await? else { continue };
            check_image(&registry, name, &history.image(k, NEVER)).await?;
            volume.flush().await.map_err(|e| format!("{name} does not flush: {e}"))?;
            if k.is_multiple_of(2) {
                continue;
            }
            for _ in 0..2 {
                registry.snapshot(&id(name)).await.map_err(|e| format!("{name} does not publish: {e}"))?;
            }
            registry.compact(&id(name)).await.map_err(|e| format!("{name} is not compacted: {e}"))?;
            check_image(&registry, name, &history.image(k, NEVER)).await?;
        }
        self.sim.faults(Faults::end);
        self.registry = None;
        self.sim.reboot(self.sim.walk().power_loss(Loss::Everything));
        self.start().await.ok_or("the server does not start after the power loss")?;
        let registry = self.registry().unwrap();
        for (name, history) in &self.histories {
            if opened(&registry, name, history, k).await?.is_some() {
                let checked = check_image(&registry, name, &history.image(k, NEVER)).await;
                checked.map_err(|e| format!("after a power loss: {e}"))?;
            }
        }
        Ok(())
    }

    /// After all faults are over: everything is there, everything works, and it is the same in the store. Of what was not
    /// flushed when a sync failed nothing is promised.
    pub async fn settles(&mut self, sync_failed: Option<usize>) -> Result<(), String> {
        let k = self.sim.now();
        if sync_failed.is_some_and(|then| !self.sim.noted_since(then)) {
            // The disk did not even take the note that a sync failed: nothing but a reboot tells the next start.
            self.registry = None;
            self.sim.reboot(self.sim.walk().power_loss(Loss::Nothing));
        }
        for restarted in [false, true] {
            if restarted {
                self.start().await.ok_or("the server does not start again")?;
            } else if self.registry.is_none() || sync_failed.is_some() {
                continue;
            }
            let registry = self.registry().unwrap();
            for (name, history) in &self.histories {
                let floor = sync_failed.map_or(k, |then| history.flushed(then));
                let what = if restarted { "after a restart" } else { "without a restart" };
                let Some(volume) = opened(&registry, name, history, k).await? else { continue };
                if !restarted && matches!(volume.flush().await, Err(VolumeError::Failed(_))) {
                    continue;
                }
                check_image(&registry, name, &history.image(floor, NEVER)).await.map_err(|e| format!("{what}: {e}"))?;
            }
        }
        let registry = self.registry().unwrap();
        let elsewhere = start(&self.sim, &self.store, "/elsewhere").await.map_err(|e| e.to_string())?;
        for (name, history) in &self.histories {
            let Some(volume) = opened(&registry, name, history, k).await? else { continue };
            volume.flush().await.map_err(|e| format!("{name} does not flush: {e}"))?;
            registry.snapshot(&id(name)).await.map_err(|e| format!("{name} does not publish: {e}"))?;
            let there = elsewhere.volume(&id(name)).await.map_err(|e| format!("{name} elsewhere: {e}"))?;
            if read_all(&there).await != read_all(&volume).await {
                return Err(format!("{name} as published is not {name} as it is here"));
            }
        }
        Ok(())
    }
}

impl History {
    /// What the export started as.
    fn first_image(&self) -> Image {
        self.sectors.iter().map(|facts| vec![facts[0].value]).collect()
    }
}

fn span(sectors: &Range<usize>) -> nbd_server::units::ByteRange {
    range((sectors.start * SECTOR) as u64, (sectors.len() * SECTOR) as u64)
}

async fn write(volume: &Arc<Volume>, sectors: &Range<usize>, value: u8) -> Result<(), VolumeError> {
    write_as_served(volume, (sectors.start * SECTOR) as u64, vec![value; sectors.len() * SECTOR].into()).await
}

/// Zeroes sectors, and says which: a trim leaves the edges of missing chunks.
async fn zero(
    volume: &Arc<Volume>,
    sectors: &Range<usize>,
    trim: bool,
) -> (Vec<Range<usize>>, Result<(), VolumeError>) {
    if !trim {
        return (vec![sectors.clone()], volume.write_zeroes(span(sectors)).await);
    }
    let mut zeroed = Vec::new();
    for (chunk, piece) in geometry().split(span(sectors)) {
        let whole = geometry().chunk_range(chunk);
        let there = volume.extents(whole, 1).await.unwrap();
        if piece == whole || there[0].residency != Residency::Absent {
            let first = usize::try_from(piece.offset()).unwrap() / SECTOR;
            zeroed.push(first..first + usize::try_from(piece.len()).unwrap() / SECTOR);
        }
    }
    (zeroed, volume.trim(span(sectors)).await)
}

/// The volume of an export, or `None` if its creation failed and it is not there.
async fn opened(
    registry: &Arc<Registry>,
    name: &str,
    history: &History,
    k: usize,
) -> Result<Option<Arc<Volume>>, String> {
    match registry.volume(&id(name)).await {
        Ok(volume) => Ok(Some(volume)),
        // A creation that was not acknowledged may have left nothing, or a head without a cache, for which there may be no room.
        Err(ExportError::NotFound(..) | ExportError::Volume(VolumeError::NoSpace(_)))
            if history.created.is_none_or(|span| span.acked > k) =>
        {
            Ok(None)
        }
        Err(e) => Err(format!("{name} does not open: {e}")),
    }
}

async fn check_image(registry: &Arc<Registry>, name: &str, allowed: &Image) -> Result<(), String> {
    let volume = registry.volume(&id(name)).await.map_err(|e| format!("{name} does not open: {e}"))?;
    let image = read_as_served(&volume, range(0, SIZE)).await.map_err(|e| format!("{name} does not read: {e}"))?;
    for (sector, (bytes, allowed)) in image.chunks(SECTOR).zip(allowed).enumerate() {
        if !allowed.contains(&bytes[0]) || bytes.iter().any(|b| *b != bytes[0]) {
            return Err(format!("{name}, sector {sector}: {} instead of {allowed:?}", bytes[0]));
        }
    }
    Ok(())
}

/// What a server that is started on `sim` makes of a crash after the first `k` operations of the histories; how many
/// operations its recovery took.
pub async fn recovers(
    sim: &Arc<Sim>,
    histories: &BTreeMap<&'static str, History>,
    k: usize,
    power_lost: bool,
) -> Result<usize, String> {
    let store = SimStore::new(Arc::clone(sim));
    let registry = start(sim, &store, "/cache").await.map_err(|e| format!("the server does not start: {e}"))?;
    for (name, history) in histories {
        if opened(&registry, name, history, k).await?.is_none() {
            continue;
        }
        let floor = if power_lost { history.flushed(k) } else { k };
        check_image(&registry, name, &history.image(floor, k)).await?;
        published_is_whole(&sim.state(), name, history, k)?;
    }
    let state = sim.state();
    let spares = [
        ".exports.json.spare",
        ".exports.json.spare2",
        "cache.meta.spare",
        "snapshot.journal.json.spare",
        "snapshot.journal.json.spare2",
    ];
    let known = [&["cache.raw", "cache.meta", "clone.seed.json"], &spares[..]].concat();
    if let Some(path) = state.paths().find(|path| !known.contains(&path.file_name().unwrap().to_str().unwrap())) {
        return Err(format!("{} is left", path.display()));
    }
    let recovered = sim.now();
    for (name, history) in histories.iter().filter(|_| !power_lost) {
        if opened(&registry, name, history, k).await?.is_some() {
            goes_on(&registry, name, k).await?;
        }
    }
    Ok(recovered)
}

/// Writes after the recovery, one to each chunk, change what they cover, and nothing beside it.
async fn goes_on(registry: &Arc<Registry>, name: &str, k: usize) -> Result<(), String> {
    let volume = registry.volume(&id(name)).await.map_err(|e| e.to_string())?;
    let mut expected = read_all(&volume).await.to_vec();
    let in_chunk = CHUNK as usize / SECTOR;
    for sector in (k % in_chunk..SECTORS).step_by(in_chunk) {
        write(&volume, &(sector..sector + 1), 0xff).await.map_err(|e| format!("{name} takes no writes: {e}"))?;
        expected[sector * SECTOR..(sector + 1) * SECTOR].fill(0xff);
    }
    let now = read_all(&volume).await;
    match now.chunks(SECTOR).zip(expected.chunks(SECTOR)).position(|(now, expected)| now != expected) {
        Some(at) => Err(format!("{name}: a write to another sector changed sector {at}")),
        None => Ok(()),
    }
}

fn published_is_whole(state: &State, name: &str, history: &History, k: usize) -> Result<(), String> {
    let keys = root().export(&id(name));
    let head = state.objects.get(&keys.head()).ok_or("the head is gone")?;
    let head = Head::decode(&head.bytes, &id(name), &keys.head()).map_err(|e| e.to_string())?;
    let acked = history.snapshots.iter().filter(|(_, publish)| publish.span.acked <= k);
    let mut published: HashSet<SnapshotId> = acked.map(|(snapshot, _)| *snapshot).collect();
    published.extend(head.current);
    for snapshot in &published {
        let content = published_content(state, name, *snapshot)?;
        let fits = |image: &Image| content.iter().zip(image).position(|(value, allowed)| !allowed.contains(value));
        let misfit = match history.snapshots.get(snapshot) {
            Some(publish) => fits(&publish.image),
            None => {
                let mut misfits = history.attempts.iter().map(|attempt| fits(&attempt.image));
                misfits.find(Option::is_none).unwrap_or(Some(0))
            }
        };
        if let Some(sector) = misfit {
            return Err(format!("snapshot {snapshot} of {name}, sector {sector} is {}", content[sector]));
        }
    }
    let folders = state.objects.keys().filter_map(|key| {
        let rest = key.as_str().strip_prefix(keys.prefix().as_str())?.strip_prefix("/snapshots/")?;
        Some(rest.split_once('/')?.0.to_owned())
    });
    let known: HashSet<String> = published.iter().map(SnapshotId::to_string).collect();
    match folders.into_iter().find(|folder| !known.contains(folder)) {
        Some(folder) => Err(format!("objects of snapshot {folder}, which was never published, are left")),
        None => Ok(()),
    }
}

/// The value of every sector of a snapshot, read as any other program would.
fn published_content(state: &State, name: &str, snapshot: SnapshotId) -> Result<Vec<u8>, String> {
    let key = root().export(&id(name)).manifest(snapshot);
    let object = state.objects.get(&key).ok_or_else(|| format!("{key} is gone"))?;
    let manifest =
        format::decode(&object.bytes, &key, &id(name), Some(geometry()), &root()).map_err(|e| e.to_string())?;
    let mut content = Vec::with_capacity(SECTORS);
    for chunk in (0..u32::try_from(CHUNKS).unwrap()).map(ChunkIndex) {
        let sectors = usize::try_from(geometry().chunk_range(chunk).len()).unwrap() / SECTOR;
        match manifest.source(chunk) {
            Source::Zero => content.extend(std::iter::repeat_n(0, sectors)),
            Source::Packed { key, range, hash } => {
                let blob = &state.objects.get(key).ok_or_else(|| format!("{key} is gone"))?.bytes;
                let bytes = usize::try_from(range.offset()).unwrap()..usize::try_from(range.end()).unwrap();
                let bytes = blob.get(bytes).ok_or_else(|| format!("{key} is too short"))?;
                if blake3::hash(bytes) != hash {
                    return Err(format!("{key} is damaged"));
                }
                content.extend(bytes.chunks(SECTOR).map(|sector| sector[0]));
            }
            Source::Base { .. } => return Err("a base without hashes".into()),
        }
    }
    Ok(content)
}

/// Some steps that a seed draws: everything that can happen to two exports which share blobs.
pub async fn random_steps(scene: &mut Scene, seed: u64, steps: usize) {
    let mut dice = Dice(seed);
    let names = ["disk", "copy"];
    scene.create("disk").await;
    for _ in 0..steps {
        let name = names[usize::from(dice.below(3) == 0 && scene.histories.contains_key("copy"))];
        let from = usize::try_from(dice.below(SECTORS as u64)).unwrap();
        let len = 1 + usize::try_from(dice.below(12)).unwrap();
        let mut sectors = from..(from + len).min(SECTORS);
        if dice.below(4) == 0 {
            let chunk_sectors = usize::try_from(CHUNK).unwrap() / SECTOR;
            let first = from / chunk_sectors * chunk_sectors;
            sectors = first..(first + chunk_sectors).min(SECTORS);
        }
        match dice.below(32) {
            0..=9 => {
                scene.write(name, sectors).await;
            }
            10..=12 => {
                scene.zero(name, sectors, false).await;
            }
            13..=15 => {
                scene.zero(name, sectors, true).await;
            }
            16..=19 => {
                scene.flush(name).await;
            }
            20 => {
                scene.read(name, sectors).await;
            }
            21 => {
                scene.trim_cache(name).await;
            }
            22 | 23 => {
                scene.snapshot(name).await;
            }
            24 | 25 => {
                let other = sectors.start / 2..sectors.start / 2 + 1;
                let changes = [Meanwhile::Write(sectors), Meanwhile::Flush, Meanwhile::Write(other)];
                scene.snapshot_under(name, &changes).await;
            }
            26 => {
                scene.compact(name).await;
            }
            27 => {
                scene.reset(name).await;
            }
            28 => {
                scene.restart().await;
            }
            29 | 30 => {
                scene.kill().await;
            }
            _ if !scene.histories.contains_key("copy") => {
                scene.clone_of("copy", "disk").await;
            }
            _ => {
                let loss = Loss::Some { kept: dice.roll(), names: 9, torn: Some(dice.roll()) };
                scene.power_loss(loss).await;
            }
        }
    }
}
