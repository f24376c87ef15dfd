//! A disk and a store that remember every operation, so that the moment of a crash can be chosen afterwards.
//!
//! The disk keeps, per file, what was synced and what was not; per folder, the same of its names. A *process crash*
//! keeps all of it. A *power loss* keeps what was synced, and of the rest whatever a [`Loss`] says: unsynced writes
//! may survive in any combination, the last of them torn at a sector.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use futures_util::StreamExt;
use nbd_server::disk::{Disk, DiskFile};
use nbd_server::store::{Body, Condition, Key, Object, Store, StoreError, Version};
use nbd_server::units::ByteRange;

/// What no disk tears.
pub const SECTOR: usize = 512;

type Objects = BTreeMap<Key, (Bytes, u64)>;

/// One operation of the timeline.
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
    Punch {
        node: usize,
        range: ByteRange,
    },
    Sync {
        node: usize,
    },
    Rename {
        from: PathBuf,
        to: PathBuf,
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
    fn node(&self) -> Option<usize> {
        match self {
            Self::Write { node, .. } | Self::SetLen { node, .. } | Self::Punch { node, .. } => Some(*node),
            _ => None,
        }
    }

    fn dir(&self) -> Option<&Path> {
        match self {
            Self::Create { path, .. } | Self::Remove { path } => path.parent(),
            Self::Rename { to, .. } => to.parent(),
            _ => None,
        }
    }
}

/// What a power loss leaves of the operations that no sync covered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// All of them.
    Nothing,
    /// None of them.
    Everything,
    /// Each with even chances, drawn from this seed; the last one that is kept is torn.
    Some(u64),
}

/// What is on the disk and in the store at one moment.
#[derive(Debug, Clone, Default, Hash)]
pub struct State {
    files: Vec<Vec<u8>>,
    names: BTreeMap<PathBuf, usize>,
    pub objects: Arc<Objects>,
}

impl State {
    /// The files there are.
    pub fn paths(&self) -> impl Iterator<Item = &PathBuf> {
        self.names.keys()
    }

    /// Tells states apart.
    pub fn fingerprint(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for (name, node) in &self.names {
            (name, &self.files[*node]).hash(&mut hasher);
        }
        self.objects.hash(&mut hasher);
        hasher.finish()
    }

    fn apply(&mut self, event: &Event) {
        match event {
            Event::Create { path, node } => {
                self.names.insert(path.clone(), *node);
                if self.files.len() <= *node {
                    self.files.resize(node + 1, Vec::new());
                }
            }
            Event::Write { node, offset, bytes } => {
                let (file, at) = (&mut self.files[*node], usize::try_from(*offset).unwrap());
                if file.len() < at + bytes.len() {
                    set_len(file, at + bytes.len());
                }
                file[at..at + bytes.len()].copy_from_slice(bytes);
            }
            Event::SetLen { node, len } => set_len(&mut self.files[*node], usize::try_from(*len).unwrap()),
            Event::Punch { node, range } => {
                let file = &mut self.files[*node];
                let end = usize::try_from(range.end()).unwrap().min(file.len());
                let start = usize::try_from(range.offset()).unwrap().min(end);
                file[start..end].fill(0);
            }
            Event::Rename { from, to } => {
                if let Some(node) = self.names.remove(from) {
                    self.names.insert(to.clone(), node);
                }
            }
            Event::Remove { path } => {
                self.names.remove(path);
            }
            Event::Store(objects) => self.objects = Arc::clone(objects),
            Event::Sync { .. } | Event::SyncDir { .. } => {}
        }
    }
}

/// Cuts a file or extends it by zeros; all at once, for byte by byte takes long without optimisation.
fn set_len(file: &mut Vec<u8>, len: usize) {
    let more = len.saturating_sub(file.len());
    file.truncate(len);
    file.extend_from_slice(&vec![0; more]);
}

/// A small generator of even chances; its seed names a case.
struct Coin(u64);

impl Coin {
    fn flip(&mut self) -> bool {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (self.0 >> 60) & 1 == 1
    }
}

/// What a crash right after the first `len` events leaves, starting from `start`.
pub fn process_crash(start: &State, events: &[Event]) -> State {
    let mut state = start.clone();
    events.iter().for_each(|event| state.apply(event));
    state
}

/// As [`process_crash`], with the last write cut short after `sectors` sectors (by a kill in mid-write).
pub fn killed_in_write(start: &State, events: &[Event], sectors: usize) -> Option<State> {
    let (Event::Write { node, offset, bytes }, before) = events.split_last()? else { return None };
    let keep = sectors * SECTOR;
    if keep == 0 || keep >= bytes.len() {
        return None;
    }
    let mut state = process_crash(start, before);
    state.apply(&Event::Write { node: *node, offset: *offset, bytes: bytes.slice(..keep) });
    Some(state)
}

/// What a power loss right after the events leaves.
pub fn power_loss(start: &State, events: &[Event], loss: Loss) -> State {
    let synced = |i: usize, event: &Event| {
        events[i + 1..].iter().any(|later| match later {
            Event::Sync { node } => event.node() == Some(*node),
            Event::SyncDir { dir } => event.dir() == Some(dir),
            _ => false,
        })
    };
    let mut coin = Coin(match loss {
        Loss::Some(seed) => seed,
        _ => 0,
    });
    let unsynced = |event: &Event| event.node().is_some() || event.dir().is_some();
    let last_data = events.iter().rposition(|event| matches!(event, Event::Write { .. }));
    // Names change in order: a file system keeps a prefix of what was not synced.
    let mut names_kept = true;
    let mut state = start.clone();
    for (i, event) in events.iter().enumerate() {
        if let Event::Create { node, .. } = event {
            // The file itself exists once created, whether or not its name survives.
            if state.files.len() <= *node {
                state.files.resize(node + 1, Vec::new());
            }
        }
        if !unsynced(event) || synced(i, event) {
            state.apply(event);
            continue;
        }
        match loss {
            Loss::Nothing => state.apply(event),
            Loss::Everything => {}
            Loss::Some(_) if event.dir().is_some() => {
                names_kept &= coin.flip();
                if names_kept {
                    state.apply(event);
                }
            }
            Loss::Some(_) => {
                if !coin.flip() {
                    continue;
                }
                match event {
                    Event::Write { node, offset, bytes } if Some(i) == last_data && bytes.len() > SECTOR => {
                        for (at, sector) in (0u64..).step_by(SECTOR).zip(bytes.chunks(SECTOR)) {
                            if coin.flip() {
                                let bytes = Bytes::copy_from_slice(sector);
                                state.apply(&Event::Write { node: *node, offset: offset + at, bytes });
                            }
                        }
                    }
                    _ => state.apply(event),
                }
            }
        }
    }
    state
}

/// The disk and the store of a host, recording.
#[derive(Debug)]
pub struct Sim(Mutex<Inner>);

#[derive(Debug)]
struct Inner {
    state: State,
    events: Vec<Event>,
    boot: u8,
    next_version: u64,
}

impl Sim {
    /// A host that comes up with this on its disk and in its store.
    pub fn new(state: State, boot: u8) -> Arc<Self> {
        let next_version = state.objects.values().map(|(_, version)| *version).max().unwrap_or(0) + 1;
        Arc::new(Self(Mutex::new(Inner { state, events: Vec::new(), boot, next_version })))
    }

    /// How many operations there were so far.
    pub fn now(&self) -> usize {
        self.0.lock().unwrap().events.len()
    }

    pub fn events(&self) -> Vec<Event> {
        self.0.lock().unwrap().events.clone()
    }

    pub fn state(&self) -> State {
        self.0.lock().unwrap().state.clone()
    }

    fn record(&self, event: Event) {
        let inner = &mut *self.0.lock().unwrap();
        inner.state.apply(&event);
        inner.events.push(event);
    }

    fn change_objects<T>(&self, change: impl FnOnce(&mut Objects, u64) -> T) -> T {
        let inner = &mut *self.0.lock().unwrap();
        let mut objects = (*inner.state.objects).clone();
        let result = change(&mut objects, inner.next_version);
        inner.next_version += 1;
        let event = Event::Store(Arc::new(objects));
        inner.state.apply(&event);
        inner.events.push(event);
        result
    }
}

/// The sim's disk and its open files.
#[derive(Debug, Clone)]
pub struct SimDisk(pub Arc<Sim>);

#[derive(Debug)]
struct SimFile {
    sim: Arc<Sim>,
    node: usize,
}

fn not_found() -> io::Error {
    io::ErrorKind::NotFound.into()
}

impl Disk for SimDisk {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let node = *self.0.0.lock().unwrap().state.names.get(path).ok_or_else(not_found)?;
        Ok(Arc::new(SimFile { sim: Arc::clone(&self.0), node }))
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        let node = self.0.0.lock().unwrap().state.files.len();
        self.0.record(Event::Create { path: path.to_owned(), node });
        Ok(Arc::new(SimFile { sim: Arc::clone(&self.0), node }))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.record(Event::Rename { from: from.to_owned(), to: to.to_owned() });
        Ok(())
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        if self.0.0.lock().unwrap().state.names.contains_key(path) {
            self.0.record(Event::Remove { path: path.to_owned() });
        }
        Ok(())
    }

    fn create_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn remove_dir(&self, _: &Path) -> io::Result<()> {
        Ok(())
    }

    fn list_dir(&self, path: &Path) -> io::Result<Vec<String>> {
        let names = self.0.0.lock().unwrap().state.names.keys().cloned().collect::<Vec<_>>();
        let below = names.iter().filter_map(|name| name.strip_prefix(path).ok()?.iter().next()?.to_str());
        let mut below: Vec<String> = below.map(str::to_owned).collect();
        below.dedup();
        Ok(below)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.0.record(Event::SyncDir { dir: path.to_owned() });
        Ok(())
    }

    fn boot_id(&self) -> io::Result<[u8; 16]> {
        Ok([self.0.0.lock().unwrap().boot; 16])
    }
}

impl DiskFile for SimFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let inner = self.sim.0.lock().unwrap();
        let (file, at) = (&inner.state.files[self.node], usize::try_from(offset).unwrap());
        let bytes = file.get(at..at + buf.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.sim.record(Event::Write { node: self.node, offset, bytes: Bytes::copy_from_slice(buf) });
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.sim.0.lock().unwrap().state.files[self.node].len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.sim.record(Event::SetLen { node: self.node, len });
        Ok(())
    }

    fn punch(&self, range: ByteRange) -> io::Result<()> {
        self.sim.record(Event::Punch { node: self.node, range });
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        self.sim.record(Event::Sync { node: self.node });
        Ok(())
    }
}

/// The sim's store.
#[derive(Debug, Clone)]
pub struct SimStore(pub Arc<Sim>);

impl SimStore {
    fn object(&self, key: &Key) -> Result<(Bytes, u64), StoreError> {
        let found = self.0.0.lock().unwrap().state.objects.get(key).cloned();
        found.ok_or_else(|| StoreError::NotFound { key: key.clone() })
    }
}

#[async_trait::async_trait]
impl Store for SimStore {
    async fn get(&self, key: &Key, _: u64) -> Result<Object, StoreError> {
        let (bytes, version) = self.object(key)?;
        Ok(Object { bytes, version: Version(version.to_string()) })
    }

    async fn get_range(&self, key: &Key, range: ByteRange) -> Result<Bytes, StoreError> {
        let (bytes, _) = self.object(key)?;
        let (from, to) = (usize::try_from(range.offset()).unwrap(), usize::try_from(range.end()).unwrap());
        assert!(to <= bytes.len(), "{key} {range}");
        Ok(bytes.slice(from..to))
    }

    async fn put(&self, key: &Key, bytes: Bytes, condition: Condition) -> Result<Version, StoreError> {
        let there = self.object(key).ok().map(|(_, version)| version.to_string());
        let holds = match condition {
            Condition::Always => true,
            Condition::IfAbsent => there.is_none(),
            Condition::IfVersion(version) => there == Some(version.0),
        };
        if !holds {
            return Err(StoreError::Conflict { key: key.clone() });
        }
        Ok(self.0.change_objects(|objects, version| {
            objects.insert(key.clone(), (bytes, version));
            Version(version.to_string())
        }))
    }

    async fn upload(&self, key: &Key, _: u64, mut body: Body<'_>) -> Result<(), StoreError> {
        let mut whole = Vec::new();
        while let Some(piece) = body.next().await {
            whole.extend_from_slice(&piece.map_err(|source| StoreError::Body { key: key.clone(), source })?);
        }
        self.0.change_objects(|objects, version| objects.insert(key.clone(), (whole.into(), version)));
        Ok(())
    }

    async fn list(&self, prefix: &Key) -> Result<Vec<Key>, StoreError> {
        let below = format!("{prefix}/");
        let objects = Arc::clone(&self.0.0.lock().unwrap().state.objects);
        Ok(objects.keys().filter(|key| key.as_str().starts_with(&below)).cloned().collect())
    }

    async fn list_folders(&self, prefix: &Key) -> Result<Vec<String>, StoreError> {
        let below = format!("{prefix}/");
        let keys = self.list(prefix).await?;
        let names = keys.iter().filter_map(|key| key.as_str().strip_prefix(&below)?.split_once('/'));
        let mut names: Vec<String> = names.map(|(name, _)| name.to_owned()).collect();
        names.dedup();
        Ok(names)
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        if self.object(key).is_ok() {
            self.0.change_objects(|objects, _| objects.remove(key));
        }
        Ok(())
    }
}
