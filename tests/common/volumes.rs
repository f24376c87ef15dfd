//! Volumes without sockets: a registry over a watched store and a temporary cache root.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use nbd_server::cache::Base;
use nbd_server::cache::aside::AsideMemory;
use nbd_server::cache::open::Opening;
use nbd_server::clock::{Clock, SystemClock};
use nbd_server::disk::{Disk, RealDisk};
use nbd_server::store::keys::ExportRoot;
use nbd_server::store::remote::RemoteStore;
use nbd_server::store::retry::RetryPolicy;
use nbd_server::store::{Condition, Key, Store};
use nbd_server::units::{ByteRange, ExportId, Geometry, RandomId};
use nbd_server::volume::registry::{ExportError, ExportStatus, Published, Registry};
use nbd_server::volume::{DEFAULT_PUBLISH_BYTES, Services, Volume, VolumeError};
use tempfile::TempDir;
use tokio::task::JoinHandle;

use super::sim::SimClock;
use super::watched::Watched;

pub const CHUNK: u64 = 4096;
/// For several attempts, in a test that lives through the time they take.
const SHORT_PATIENCE: RetryPolicy = RetryPolicy {
    limit: Duration::from_millis(50),
    first_delay: Duration::from_millis(1),
    max_delay: Duration::from_millis(10),
};

/// One store and the cache roots of any number of servers on it.
pub struct Site {
    pub store: Arc<Watched>,
    /// What its servers may hold of publishes in memory.
    pub publish_bytes: u64,
    pub clock: Arc<dyn Clock>,
    /// How long a head is written again that the store did not take.
    pub patience: RetryPolicy,
    dirs: BTreeMap<&'static str, TempDir>,
}

impl Site {
    pub fn new() -> Self {
        let store = Arc::new(Watched::new(RemoteStore::memory()));
        let (publish_bytes, clock) = (DEFAULT_PUBLISH_BYTES, Arc::new(SystemClock));
        Self { store, publish_bytes, clock, patience: SHORT_PATIENCE, dirs: BTreeMap::new() }
    }

    /// In simulated time, for a runtime that is paused, and as patient as a server is.
    pub fn simulated() -> Self {
        Self { clock: Arc::new(SimClock::default()), patience: RetryPolicy::default(), ..Self::new() }
    }

    pub fn cache_root(&mut self, server: &'static str) -> PathBuf {
        self.dirs.entry(server).or_insert_with(|| tempfile::tempdir().unwrap()).path().to_owned()
    }

    /// Starts a server; starting it again without a close is what a killed process does.
    pub async fn start(&mut self, server: &'static str) -> Arc<Registry> {
        self.start_on(server, Arc::new(RealDisk::default())).await
    }

    pub async fn start_on(&mut self, server: &'static str, disk: Arc<dyn Disk>) -> Arc<Registry> {
        let services = self.services(disk).with_cache_root(cache_root_id(server));
        Registry::discover(Arc::new(services), self.cache_root(server)).await.unwrap()
    }

    pub fn services(&self, disk: Arc<dyn Disk>) -> Services {
        let services = Services::new(self.store.clone(), root(), disk, Arc::clone(&self.clock));
        services.with_publish_bytes(self.publish_bytes).with_patience(self.patience)
    }

    /// A snapshot that is under way on a server: what it holds is cut.
    pub async fn begin_snapshot(
        &mut self,
        server: &'static str,
        registry: &Arc<Registry>,
        name: &'static str,
    ) -> JoinHandle<Result<Published, ExportError>> {
        let journal = self.cache_root(server).join(name).join("snapshot.journal.json");
        let registry = Arc::clone(registry);
        let publishing = tokio::spawn(async move { registry.snapshot(&id(name)).await });
        while !journal.exists() {
            assert!(!publishing.is_finished(), "it ended without a journal");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        publishing
    }

    /// A fresh server that has nothing cached: what it reads comes from the store.
    pub async fn elsewhere(&mut self) -> Arc<Registry> {
        self.dirs.remove("elsewhere");
        self.start("elsewhere").await
    }
}

/// Of a server's cache root by its name. A copy of it, which has `.copy` at the end of its name, has the id of the original.
pub fn cache_root_id(server: &str) -> RandomId {
    let hash = blake3::hash(server.trim_end_matches(".copy").as_bytes());
    RandomId::from_bytes(hash.as_bytes()[..16].try_into().unwrap()).unwrap()
}

pub fn root() -> ExportRoot {
    ExportRoot::new("exports".parse().unwrap())
}

pub fn id(name: &str) -> ExportId {
    name.parse().unwrap()
}

/// A cache of its own, of this machine's disk; what is set aside for publishes goes to its file.
pub fn opening(dir: PathBuf, geometry: Geometry) -> Opening {
    let (disk, base, aside_memory) = (Arc::new(RealDisk::default()), Base::default(), AsideMemory::new(0));
    Opening { disk, dir, export_id: id("disk"), geometry, base, incarnation: None, aside_memory }
}

pub fn geometry(chunks: u64) -> Geometry {
    Geometry::new(chunks * CHUNK, CHUNK).unwrap()
}

/// Makes a snapshot the head of an export as older tools would have published it: all of it is in a base image, and no chunk
/// has a hash. Returns the key of that image, which is not there yet.
pub async fn stand_on_base_image(store: &Watched, name: &str, snapshot: u8, geometry: Geometry) -> Key {
    let put = async |key: &Key, text: String| {
        store.put(key, text.into(), Condition::Always).await.unwrap();
    };
    let snapshot = format!("{snapshot:032x}");
    let keys = root().export(&id(name));
    let base = keys.base(snapshot.parse().unwrap());
    let (size, chunk, chunks) = (geometry.image_size(), geometry.chunk_size(), geometry.chunk_count());
    let manifest = format!(
        r#"{{"version":2,"export_id":"{name}","generation":1,"image_size":{size},"chunk_size":{chunk},"chunk_count":{chunks},
        "base_ref":"base","refs":[{{"id":"base","path":"{base}"}}],"entries":[]}}"#
    );
    put(&keys.manifest(snapshot.parse().unwrap()), manifest).await;
    let head = format!(
        r#"{{"version":1,"export_id":"{name}","image_size":{size},"chunk_size":{chunk},"current_snapshot_id":"{snapshot}"}}"#
    );
    put(&keys.head(), head).await;
    base
}

pub async fn create(registry: &Arc<Registry>, name: &str, chunks: u64) -> Arc<Volume> {
    registry.create(id(name), geometry(chunks)).await.unwrap();
    registry.volume(&id(name)).await.unwrap()
}

pub async fn read(volume: &Arc<Volume>, offset: u64, len: u64) -> Bytes {
    read_as_served(volume, range(offset, len)).await.unwrap()
}

/// As the front end reads: at once if that is possible.
pub async fn read_as_served(volume: &Arc<Volume>, range: ByteRange) -> Result<Bytes, VolumeError> {
    let mut buf = vec![0xEE; usize::try_from(range.len()).unwrap()];
    if volume.read_at_once(range, &mut buf) { Ok(buf.into()) } else { volume.read(range).await }
}

/// As the front end writes: at once if that is possible.
pub async fn write_as_served(volume: &Arc<Volume>, offset: u64, data: Bytes) -> Result<(), VolumeError> {
    if volume.write_at_once(offset, &data) { Ok(()) } else { volume.write(offset, data).await }
}

/// Waits until a range is in the cache: a read waits only until it was fetched.
pub async fn make_resident(volume: &Arc<Volume>, offset: u64, len: u64) {
    volume.prefetch(range(offset, len)).await.unwrap();
}

pub async fn read_all(volume: &Arc<Volume>) -> Bytes {
    read(volume, 0, volume.geometry().image_size()).await
}

pub async fn image(registry: &Arc<Registry>, name: &str) -> Bytes {
    read_all(&registry.volume(&id(name)).await.unwrap()).await
}

pub async fn write(volume: &Arc<Volume>, offset: u64, byte: u8, len: u64) {
    write_as_served(volume, offset, vec![byte; usize::try_from(len).unwrap()].into()).await.unwrap();
}

pub async fn status(registry: &Arc<Registry>, name: &str) -> ExportStatus {
    registry.status(&id(name)).await.unwrap()
}

pub fn range(offset: u64, len: u64) -> ByteRange {
    ByteRange::new(offset, len).unwrap()
}
