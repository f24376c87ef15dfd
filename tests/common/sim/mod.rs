//! A simulated host: a disk and a store that remember every operation, so that the moment of a crash can be chosen
//! afterwards, and that fail as a test wishes.
//!
//! The disk keeps two images: the *live* one is what the running code sees, the *durable* one what syncs have covered;
//! between them stand the operations that no sync covered, in order. A process crash leaves the live image. A power loss
//! leaves the durable one and any part of what lies between (`sim/crash.rs` says which). Faults are in `sim/faults.rs`.

pub mod crash;
pub mod disk;
pub mod faults;
pub mod store;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use nbd_server::clock::Clock;
use nbd_server::store::Key;
use nbd_server::units::ByteRange;

pub use crash::Loss;
pub use disk::SimDisk;
use faults::Faults;
pub use store::SimStore;

/// What no disk tears.
pub const SECTOR: usize = 512;

/// An object as it stands in the store.
#[derive(Debug, Clone)]
pub struct StoredObject {
    pub bytes: Bytes,
    pub version: u64,
    print: blake3::Hash,
}

/// All objects of the store.
pub type Objects = BTreeMap<Key, StoredObject>;

/// One operation of the timeline. Files are named by the number of their creation, for names change.
#[derive(Debug, Clone)]
pub enum Event {
    Create {
        path: PathBuf,
        node: usize,
    },
    Write {
        node: usize,
        offset: u64,
        bytes: Bytes,
    },
    SetLen {
        node: usize,
        len: u64,
    },
    Allocate {
        node: usize,
        range: ByteRange,
    },
    Punch {
        node: usize,
        range: ByteRange,
    },
    Sync {
        node: usize,
    },
    /// The disk did not take what was written since the last sync, and the kernel has dropped it.
    SyncFailed {
        node: usize,
    },
    Rename {
        from: PathBuf,
        to: PathBuf,
    },
    Exchange {
        a: PathBuf,
        b: PathBuf,
    },
    Remove {
        path: PathBuf,
    },
    SyncDir {
        dir: PathBuf,
    },
    /// The store's objects after a change.
    Store(Arc<Objects>),
}

impl Event {
    /// The file whose content it changes.
    fn node(&self) -> Option<usize> {
        match self {
            Self::Write { node, .. }
            | Self::SetLen { node, .. }
            | Self::Allocate { node, .. }
            | Self::Punch { node, .. } => Some(*node),
            _ => None,
        }
    }

    /// The folder whose names it changes.
    fn dir(&self) -> Option<&Path> {
        match self {
            Self::Create { path, .. } | Self::Remove { path } => path.parent(),
            Self::Rename { to, .. } | Self::Exchange { a: to, .. } => to.parent(),
            _ => None,
        }
    }
}

/// What is on the disk and in the store at one moment.
#[derive(Debug, Clone, Default)]
pub struct State {
    files: Vec<Arc<Vec<u8>>>,
    names: BTreeMap<PathBuf, usize>,
    pub objects: Arc<Objects>,
}

impl State {
    /// The files there are.
    pub fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        self.names.keys()
    }

    /// Tells states apart: names, bytes, objects and their versions.
    pub fn fingerprint(&self) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new();
        for (name, node) in &self.names {
            let file = &self.files[*node];
            hasher.update(name.as_os_str().as_encoded_bytes()).update(&file.len().to_le_bytes()).update(file);
        }
        for (key, object) in &*self.objects {
            hasher
                .update(key.as_str().as_bytes())
                .update(object.print.as_bytes())
                .update(&object.version.to_le_bytes());
        }
        hasher.finalize()
    }

    fn file(&mut self, node: usize) -> &mut Vec<u8> {
        Arc::make_mut(&mut self.files[node])
    }

    /// The file itself exists once created, whether or not its name survives.
    fn know(&mut self, node: usize) {
        if self.files.len() <= node {
            self.files.resize(node + 1, Arc::default());
        }
    }

    fn apply(&mut self, event: &Event) {
        match event {
            Event::Create { path, node } => {
                self.know(*node);
                self.names.insert(path.clone(), *node);
            }
            Event::Write { node, offset, bytes } => {
                let (file, at) = (self.file(*node), usize::try_from(*offset).unwrap());
                grow(file, at + bytes.len());
                file[at..at + bytes.len()].copy_from_slice(bytes);
            }
            Event::SetLen { node, len } => {
                let (file, len) = (self.file(*node), usize::try_from(*len).unwrap());
                file.truncate(len);
                grow(file, len);
            }
            Event::Allocate { node, range } => {
                grow(self.file(*node), usize::try_from(range.end()).unwrap());
            }
            Event::Punch { node, range } => {
                let file = self.file(*node);
                let end = usize::try_from(range.end()).unwrap().min(file.len());
                let start = usize::try_from(range.offset()).unwrap().min(end);
                file[start..end].fill(0);
            }
            Event::Rename { from, to } => {
                if let Some(node) = self.names.remove(from) {
                    self.names.insert(to.clone(), node);
                }
            }
            Event::Exchange { a, b } => {
                if let (Some(on_a), Some(on_b)) = (self.names.get(a).copied(), self.names.get(b).copied()) {
                    self.names.insert(a.clone(), on_b);
                    self.names.insert(b.clone(), on_a);
                }
            }
            Event::Remove { path } => {
                self.names.remove(path);
            }
            Event::Store(objects) => self.objects = Arc::clone(objects),
            Event::Sync { .. } | Event::SyncFailed { .. } | Event::SyncDir { .. } => {}
        }
    }
}

/// Extends a file by zeros to at least `len` bytes; faster than `resize` in a debug build.
fn grow(file: &mut Vec<u8>, len: usize) {
    if file.len() < len {
        let mut longer = vec![0; len];
        longer[..file.len()].copy_from_slice(file);
        *file = longer;
    }
}

/// The timeline up to some moment: the live image, the durable one, and what stands between.
#[derive(Debug, Clone, Default)]
pub struct Walk {
    pub live: State,
    durable: State,
    pending: Vec<Event>,
}

impl Walk {
    /// A host that comes up: all that is on its disk is durable.
    pub fn from(state: State) -> Self {
        Self { durable: state.clone(), live: state, pending: Vec::new() }
    }

    /// The next operation happens.
    pub fn take(&mut self, event: &Event) {
        self.live.apply(event);
        match event {
            Event::Sync { node } => self.settle(|e| e.node() == Some(*node)),
            Event::SyncDir { dir } => self.settle(|e| e.dir() == Some(dir)),
            Event::SyncFailed { node } => {
                self.pending.retain(|e| e.node() != Some(*node));
                self.live.files[*node] = Arc::clone(&self.durable.files[*node]);
            }
            Event::Store(_) => self.durable.apply(event),
            event => {
                if let Event::Create { node, .. } = event {
                    self.durable.know(*node);
                }
                self.pending.push(event.clone());
            }
        }
    }

    fn settle(&mut self, covered: impl Fn(&Event) -> bool) {
        let Self { durable, pending, .. } = self;
        pending.retain(|event| {
            let settled = covered(event);
            if settled {
                durable.apply(event);
            }
            !settled
        });
    }
}

/// The disk and the store of a host.
#[derive(Debug)]
pub struct Sim(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    walk: Walk,
    events: Vec<Event>,
    boot: u8,
    next_version: u64,
    /// Per file, the sectors that have their space on the disk.
    allocated: Vec<BTreeSet<u64>>,
    faults: Faults,
}

impl Sim {
    /// A host that comes up with this on its disk and in its store.
    pub fn new(state: State, boot: u8) -> Arc<Self> {
        Self::after(Walk::from(state), boot)
    }

    /// A host whose server died: what was written is there, and not all of it is synced.
    pub fn after(walk: Walk, boot: u8) -> Arc<Self> {
        let state = &walk.live;
        let next_version = state.objects.values().map(|object| object.version).max().unwrap_or(0) + 1;
        let sectors = |file: &Arc<Vec<u8>>| (0..file.len().div_ceil(SECTOR) as u64).collect();
        let allocated = state.files.iter().map(sectors).collect();
        let (events, faults) = (Vec::new(), Faults::default());
        Arc::new(Self(Mutex::new(Inner { walk, events, boot, next_version, allocated, faults })))
    }

    /// How many operations there were so far.
    pub fn now(&self) -> usize {
        self.0.lock().unwrap().events.len()
    }

    pub fn events(&self) -> Vec<Event> {
        self.0.lock().unwrap().events.clone()
    }

    /// What the running code sees.
    pub fn state(&self) -> State {
        self.0.lock().unwrap().walk.live.clone()
    }

    /// The host at this moment.
    pub fn walk(&self) -> Walk {
        self.0.lock().unwrap().walk.clone()
    }

    pub fn boot(&self) -> u8 {
        self.0.lock().unwrap().boot
    }

    /// When a sync failed for the first time since the host came up, if one did.
    pub fn sync_failed(&self) -> Option<usize> {
        self.0.lock().unwrap().events.iter().position(|event| matches!(event, Event::SyncFailed { .. }))
    }

    /// Whether the disk took the note that a sync failed.
    pub fn noted_since(&self, then: usize) -> bool {
        let is_note = |event: &Event| matches!(event, Event::Create { path, .. } if path.ends_with("cache.failed"));
        self.0.lock().unwrap().events[then..].iter().any(is_note)
    }

    /// What goes wrong from now on, and what went before.
    pub fn faults<T>(&self, change: impl FnOnce(&mut Faults) -> T) -> T {
        change(&mut self.0.lock().unwrap().faults)
    }

    /// Copies the files of a folder as they are at this moment, as a snapshot of the file system would.
    pub fn copy_folder(&self, from: &str, to: &str) {
        let inner = &mut *self.0.lock().unwrap();
        let below = |path: &PathBuf| Some((Path::new(to).join(path.strip_prefix(from).ok()?), path.clone()));
        let copies: Vec<_> = inner.walk.live.names.keys().filter_map(below).collect();
        for (copy, path) in copies {
            let bytes = Bytes::from((*inner.walk.live.files[inner.walk.live.names[&path]]).clone());
            let node = inner.walk.live.files.len();
            inner.allocated.push(inner.allocated[inner.walk.live.names[&path]].clone());
            inner.record(Event::Create { path: copy, node });
            inner.record(Event::Write { node, offset: 0, bytes });
        }
    }

    /// The host goes down here and comes up again with `state`: the recording goes on from there.
    pub fn reboot(&self, state: State) {
        let inner = &mut *self.0.lock().unwrap();
        inner.walk = Walk::from(state);
        inner.boot += 1;
        inner.events.clear();
    }
}

impl Inner {
    fn record(&mut self, event: Event) {
        self.walk.take(&event);
        self.events.push(event);
    }

    fn change_objects<T>(&mut self, change: impl FnOnce(&mut Objects, u64) -> T) -> T {
        let mut objects = (*self.walk.live.objects).clone();
        let result = change(&mut objects, self.next_version);
        self.next_version += 1;
        self.record(Event::Store(Arc::new(objects)));
        result
    }
}

/// Time that passes only while everybody waits for it: the runtime's paused clock.
#[derive(Debug)]
pub struct SimClock(tokio::time::Instant);

impl Default for SimClock {
    fn default() -> Self {
        Self(tokio::time::Instant::now())
    }
}

#[async_trait::async_trait]
impl Clock for SimClock {
    fn now(&self) -> SystemTime {
        // From 2026-01-01.
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_767_225_600) + self.0.elapsed()
    }

    fn monotonic(&self) -> Duration {
        self.0.elapsed()
    }

    async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }
}
