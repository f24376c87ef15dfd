//! A cache over a published image, driven as `volume` drives it, and a memory of all that was written.

use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use nbd_server::cache::aside::AsideMemory;
use nbd_server::cache::open::Opening;
use nbd_server::cache::publish::CutChunk;
use nbd_server::cache::states::Content;
use nbd_server::cache::{Base, Cache, CacheError, Edges, Progress};
use nbd_server::disk::Disk;
use nbd_server::units::{ByteRange, ChunkIndex, Generation, Geometry, SnapshotId};
use shuttle::rand::{Rng, thread_rng};

use super::sim::{SECTOR, Sim, SimDisk, State, Walk};
use super::stepping::{PIECE, SteppingDisk};

pub const CHUNKS: usize = 4;
const CHUNK: usize = 2 * PIECE;

/// What a chunk holds: a value for each half.
pub type Halves = [u8; 2];
/// What all chunks hold.
pub type Image = [Halves; CHUNKS];

/// Which part of a chunk is meant.
#[derive(Debug, Clone, Copy)]
pub enum Part {
    Whole,
    First,
    Second,
}
pub use Part::{First, Second, Whole};

impl Part {
    fn range(self, chunk: usize) -> ByteRange {
        let (from, len) = match self {
            Whole => (0, CHUNK),
            First => (0, PIECE),
            Second => (PIECE, PIECE),
        };
        ByteRange::new((chunk * CHUNK + from) as u64, len as u64).unwrap()
    }

    fn halves(self) -> std::ops::Range<usize> {
        match self {
            Whole => 0..2,
            First => 0..1,
            Second => 1..2,
        }
    }
}

/// When something happened.
#[derive(Debug, Clone, Copy)]
struct Stamp {
    /// After that many operations of the disk: what a crash is chosen by.
    moment: usize,
    /// Orders what happens between two operations, too.
    tick: usize,
}

/// A write or zeroing.
#[derive(Debug, Clone, Copy)]
struct Change {
    begun: Stamp,
    ended: Option<Stamp>,
    value: u8,
}

impl Change {
    fn ended_by(&self, moment: usize) -> bool {
        self.ended.is_some_and(|ended| ended.moment <= moment)
    }

    fn ended_before(&self, later: &Self) -> bool {
        self.ended.is_some_and(|ended| ended.tick < later.begun.tick)
    }
}

pub struct World {
    sim: Arc<Sim>,
    disk: Arc<SteppingDisk>,
    pub cache: Cache,
    /// The published images, by generation. Never locked across a step.
    images: Mutex<Vec<Image>>,
    /// Each half's changes.
    changes: Mutex<[[Vec<Change>; 2]; CHUNKS]>,
    /// The flushes that returned, as two moments each.
    flushes: Mutex<Vec<(usize, usize)>>,
    ticks: AtomicUsize,
}

fn dir() -> PathBuf {
    PathBuf::from("/cache/disk")
}

fn opening(disk: Arc<dyn Disk>) -> Opening {
    let geometry = Geometry::new((CHUNKS * CHUNK) as u64, CHUNK as u64).unwrap();
    let base = Base { snapshot: None, generation: Generation(0) };
    // One chunk is set aside in memory, others at the same time in the file.
    let aside_memory = AsideMemory::new(CHUNK as u64);
    Opening { disk, dir: dir(), export_id: "disk".parse().unwrap(), geometry, base, incarnation: None, aside_memory }
}

fn base(generation: usize) -> Base {
    let snapshot = Some(SnapshotId::from_bytes([u8::try_from(generation).unwrap(); 16]));
    Base { snapshot, generation: Generation(generation as u64) }
}

fn chunk(chunk: usize) -> ChunkIndex {
    ChunkIndex(u32::try_from(chunk).unwrap())
}

fn bytes(halves: Halves) -> Vec<u8> {
    halves.map(|value| [value; PIECE]).concat()
}

/// The two values of a chunk's bytes, none of which may be torn.
pub fn halves(bytes: &[u8]) -> Halves {
    let value = |half: &[u8]| {
        assert!(half == [half[0]; PIECE], "torn: {:?}", sectors(half));
        half[0]
    };
    [value(&bytes[..PIECE]), value(&bytes[PIECE..])]
}

fn sectors(bytes: &[u8]) -> Vec<u8> {
    bytes.chunks(SECTOR).map(|sector| sector[0]).collect()
}

impl World {
    /// A new cache of this published image.
    pub fn new(image: Image) -> Self {
        let sim = Sim::new(State::default(), 1);
        let disk = Arc::new(SteppingDisk::new(SimDisk(Arc::clone(&sim))));
        let cache = opening(Arc::clone(&disk) as Arc<dyn Disk>).open().unwrap();
        let start = Stamp { moment: 0, tick: 0 };
        let first = |value| vec![Change { begun: start, ended: Some(start), value }];
        let changes = Mutex::new(image.map(|halves| halves.map(first)));
        let (images, flushes) = (Mutex::new(vec![image]), Mutex::default());
        Self { sim, disk, cache, images, changes, flushes, ticks: AtomicUsize::new(1) }
    }

    /// From here on every operation of the disk is a step.
    pub fn begin(&self) {
        self.disk.begin();
    }

    pub fn fail_next_sync(&self) {
        self.disk.fail_next_sync();
    }

    pub fn now(&self) -> usize {
        self.sim.now()
    }

    fn stamp(&self) -> Stamp {
        Stamp { moment: self.now(), tick: self.ticks.fetch_add(1, Ordering::Relaxed) }
    }

    /// The published image now.
    pub fn published(&self) -> Image {
        *self.images.lock().unwrap().last().unwrap()
    }

    fn is_zero(&self, chunk: ChunkIndex) -> bool {
        self.published()[chunk.slot()] == [0, 0]
    }

    pub fn write(&self, at: usize, part: Part, value: u8) {
        self.try_write(at, part, value).unwrap();
    }

    pub fn try_write(&self, at: usize, part: Part, value: u8) -> Result<(), CacheError> {
        let range = part.range(at);
        let data = vec![value; usize::try_from(range.len()).unwrap()];
        self.change(at, part, value, || {
            // On a client's own thread, or on one that may wait: the scheduler takes its pick.
            if thread_rng().gen_bool(0.5) && self.cache.write_at_once(range, &data) {
                return Ok(Progress::Done);
            }
            self.cache.write(range.offset(), &data, |chunk| self.is_zero(chunk))
        })
    }

    pub fn zero(&self, at: usize, part: Part) {
        let zero = || self.cache.zero(part.range(at), Edges::Zero, |chunk| self.is_zero(chunk));
        self.change(at, part, 0, zero).unwrap();
    }

    fn change(
        &self,
        at: usize,
        part: Part,
        value: u8,
        once: impl Fn() -> Result<Progress, CacheError>,
    ) -> Result<(), CacheError> {
        let change = Change { begun: self.stamp(), ended: None, value };
        let places: Vec<usize> = part.halves().map(|half| self.note(at, half, change)).collect();
        // Each range lies in one chunk, so all of it is still to be done when the chunk was missing.
        while let Progress::NeedsFill { .. } = once()? {
            self.fill(at);
        }
        let ended = Some(self.stamp());
        let changes = &mut *self.changes.lock().unwrap();
        for (half, place) in part.halves().zip(places) {
            changes[at][half][place].ended = ended;
        }
        Ok(())
    }

    fn note(&self, at: usize, half: usize, change: Change) -> usize {
        let changes = &mut self.changes.lock().unwrap()[at][half];
        changes.push(change);
        changes.len() - 1
    }

    /// Fetches a missing chunk and keeps it, as one who saw it missing does.
    pub fn fill(&self, at: usize) -> Halves {
        let content = self.published()[at];
        if content != [0, 0] {
            self.cache.fill(chunk(at), &bytes(content), || self.published()[at] == content).unwrap();
        }
        content
    }

    /// Reads a whole chunk, with what is missing of it from the published image.
    pub fn read(&self, at: usize) -> Halves {
        self.try_read(at).unwrap()
    }

    pub fn try_read(&self, at: usize) -> Result<Halves, CacheError> {
        let mut buf = vec![0xee; CHUNK];
        let missing = self.cache.read(Whole.range(at), &mut buf, |chunk| self.is_zero(chunk))?;
        Ok(if missing.is_empty() { halves(&buf) } else { self.fill(at) })
    }

    pub fn flush(&self) {
        let begun = self.now();
        self.cache.flush().unwrap();
        self.flushes.lock().unwrap().push((begun, self.now()));
    }

    pub fn content(&self, at: usize) -> Content {
        self.cache.state(chunk(at)).content()
    }

    /// Whether a chunk's state bears no trace of a publish.
    pub fn is_free_of_a_publish(&self, at: usize) -> bool {
        let state = self.cache.state(chunk(at));
        state == state.uncut()
    }

    pub fn take(&self, cut: CutChunk) -> Result<Halves, CacheError> {
        let mut buf = vec![0xee; CHUNK];
        self.cache.take_cut_chunk(cut, &mut buf)?;
        Ok(halves(&buf))
    }

    /// The chunks of a cut, and what the image will be once they are published.
    pub fn cut_and_take(&self) -> (Vec<usize>, Result<Image, CacheError>) {
        let cut = self.cache.cut().unwrap();
        let chunks = cut.iter().map(|cut| cut.chunk.slot()).collect();
        let mut image = self.published();
        for cut in cut {
            let at = cut.chunk.slot();
            image[at] = match if cut.zero { Ok([0, 0]) } else { self.take(cut) } {
                Ok(taken) => taken,
                Err(e) => return (chunks, Err(e)),
            };
        }
        (chunks, Ok(image))
    }

    pub fn commit(&self, image: Image) {
        let generation = self.images.lock().unwrap().len();
        self.cache.commit(base(generation), || self.images.lock().unwrap().push(image)).unwrap();
    }

    /// Publishes what is dirty; returns the chunks of the cut and the image.
    pub fn publish(&self) -> (Vec<usize>, Image) {
        let (chunks, image) = self.cut_and_take();
        let image = image.unwrap();
        self.commit(image);
        (chunks, image)
    }

    pub fn reset(&self, image: Image) {
        let generation = self.images.lock().unwrap().len();
        self.cache.reset(base(generation), None, || self.images.lock().unwrap().push(image)).unwrap();
    }

    pub fn list(&self) -> Vec<String> {
        self.disk.list_dir(&dir()).unwrap()
    }

    /// The host at a moment. Which kind of crash takes it there is the caller's to say.
    pub fn host_at(&self, moment: usize) -> Walk {
        let mut host = Walk::default();
        self.sim.events()[..moment].iter().for_each(|event| host.take(event));
        host
    }

    /// The cache that a start in boot `boot` (they begin at 1) makes of what a crash left, and the value of each sector.
    pub fn recovered(&self, state: State, boot: u8) -> (Cache, Vec<Vec<u8>>) {
        let disk = Arc::new(SimDisk(Sim::new(state, boot)));
        let cache = opening(disk).open().unwrap();
        let generation = usize::try_from(cache.base().generation.0).unwrap();
        let image = self.images.lock().unwrap()[generation];
        let contents = (0..CHUNKS).map(|at| {
            let mut buf = vec![0xee; CHUNK];
            let missing = cache.read(Whole.range(at), &mut buf, |chunk| image[chunk.slot()] == [0, 0]).unwrap();
            let published = sectors(&bytes(image[at]));
            let content = if missing.is_empty() { sectors(&buf) } else { published.clone() };
            let clean = cache.state(chunk(at)).content() == Content::Clean;
            assert!(!clean || content == published, "chunk {at} is clean and not as published: {content:?}");
            content
        });
        let contents = contents.collect();
        (cache, contents)
    }

    /// Every sector holds what was written last before `kept`, or something written or under way since.
    pub fn assert_holds(&self, contents: &[Vec<u8>], kept: usize, moment: usize, what: &str) {
        let changes = self.changes.lock().unwrap();
        for (at, sectors) in contents.iter().enumerate() {
            for (half, sectors) in sectors.chunks(PIECE / SECTOR).enumerate() {
                let changes = &changes[at][half];
                let replaced =
                    |change: &Change| changes.iter().any(|later| change.ended_before(later) && later.ended_by(kept));
                let allowed: Vec<u8> = changes
                    .iter()
                    .filter(|change| change.begun.moment <= moment && !replaced(change))
                    .map(|change| change.value)
                    .collect();
                assert!(
                    sectors.iter().all(|sector| allowed.contains(sector)),
                    "{what} at {moment}: half {half} of chunk {at} holds {sectors:?}, allowed is {allowed:?} of {changes:?}"
                );
            }
        }
    }

    /// The newest moment by which a flush had begun that returned by `moment`.
    pub fn flushed_by(&self, moment: usize) -> usize {
        let flushes = self.flushes.lock().unwrap();
        flushes.iter().filter(|(_, returned)| *returned <= moment).map(|(begun, _)| *begun).max().unwrap_or(0)
    }

    /// Moments at which flushes returned.
    pub fn flushes(&self) -> Vec<usize> {
        self.flushes.lock().unwrap().iter().map(|(_, returned)| *returned).collect()
    }
}
