//! Random operations on two exports that share blobs, against plain byte arrays. Sectors of 512 bytes, chunks of 4 KiB.
//!
//! The exports live on a simulated host, so that it may lose its power: then each sector may have fallen back, but not
//! behind the last flush. `NBD_TEST_MODEL_CASES=N` (default 250) tries N cases. A failing case is shrunk, printed, and
//! kept in `tests/model.proptest-regressions`, whose cases are repeated first from then on; `PROPTEST_RNG_SEED=N` repeats
//! a whole run.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::scene::{runtime, start};
use common::sim::{Loss, Sim, SimStore, State};
use common::volumes::*;
use nbd_server::units::{Geometry, SnapshotId};
use nbd_server::volume::Volume;
use nbd_server::volume::registry::Registry;
use proptest::prelude::*;
use proptest::test_runner::{FailurePersistence, FileFailurePersistence};

const CHUNKS: u64 = 6;
/// Not a multiple of the chunk size: the last chunk is short.
const SIZE: u64 = CHUNKS * CHUNK - 1024;
const SECTOR: u64 = 512;

#[derive(Debug, Clone)]
enum Step {
    Write {
        at: u64,
        sectors: u64,
        byte: u8,
    },
    Zero {
        at: u64,
        sectors: u64,
    },
    Trim {
        at: u64,
        sectors: u64,
    },
    Read {
        at: u64,
        sectors: u64,
    },
    Flush,
    Snapshot,
    Compact,
    Reset,
    /// The process dies; the kernel lives.
    Kill,
    Restart,
    /// The host dies and comes up again.
    Crash {
        kept: u64,
        torn: u64,
    },
    Create,
    /// The export is made anew from a snapshot of the first.
    Clone {
        which: prop::sample::Index,
    },
}

fn steps() -> impl Strategy<Value = Vec<(bool, Step)>> {
    let sectors = SIZE / SECTOR;
    let place = (0..sectors).prop_flat_map(move |at| (Just(at), 1..=(sectors - at).min(20)));
    let step = prop_oneof![
        8 => (place.clone(), 1u8..).prop_map(|((at, sectors), byte)| Step::Write { at, sectors, byte }),
        3 => place.clone().prop_map(|(at, sectors)| Step::Zero { at, sectors }),
        3 => place.clone().prop_map(|(at, sectors)| Step::Trim { at, sectors }),
        4 => place.prop_map(|(at, sectors)| Step::Read { at, sectors }),
        3 => Just(Step::Flush),
        3 => Just(Step::Snapshot),
        1 => Just(Step::Compact),
        1 => Just(Step::Reset),
        2 => Just(Step::Kill),
        1 => Just(Step::Restart),
        2 => any::<(u64, u64)>().prop_map(|(kept, torn)| Step::Crash { kept, torn }),
        1 => Just(Step::Create),
        1 => any::<prop::sample::Index>().prop_map(|which| Step::Clone { which }),
    ];
    prop::collection::vec((any::<bool>(), step), 1..60)
}

/// What an export should be, in the simplest form.
#[derive(Clone)]
struct Model {
    image: Vec<u8>,
    published: Vec<u8>,
    /// What each sector may be after a power loss: what was flushed, and what came after.
    after_crash: Vec<Vec<u8>>,
}

impl Model {
    fn new(image: Vec<u8>) -> Self {
        let mut model = Self { published: image.clone(), image, after_crash: Vec::new() };
        model.flushed();
        model
    }

    fn flushed(&mut self) {
        self.after_crash = self.image.chunks(SECTOR as usize).map(|sector| vec![sector[0]]).collect();
    }

    fn change(&mut self, at: u64, new: &[u8]) {
        let from = (at * SECTOR) as usize;
        self.image[from..from + new.len()].copy_from_slice(new);
        for (sector, new) in (at as usize..).zip(new.chunks(SECTOR as usize)) {
            self.after_crash[sector].push(new[0]);
        }
    }

    /// The host went down, and this is what came back.
    fn crashed(&mut self, image: &[u8]) {
        for (sector, bytes) in image.chunks(SECTOR as usize).enumerate() {
            let allowed = &self.after_crash[sector];
            assert!(bytes.iter().all(|b| *b == bytes[0]), "sector {sector} is torn");
            assert!(
                allowed.contains(&bytes[0]),
                "sector {sector} is {} after a power loss, not of {allowed:?}",
                bytes[0]
            );
        }
        self.image = image.to_vec();
        self.flushed();
    }
}

struct Run {
    sim: Arc<Sim>,
    store: SimStore,
    registry: Arc<Registry>,
    models: BTreeMap<&'static str, Model>,
    snapshots: Vec<(SnapshotId, Vec<u8>)>,
}

const NAMES: [&str; 2] = ["first", "second"];

impl Run {
    async fn new() -> Self {
        let sim = Sim::new(State::default(), 1);
        let store = SimStore::new(Arc::clone(&sim));
        let registry = start(&sim, &store, "/cache").await.unwrap();
        let mut run = Self { sim, store, registry, models: BTreeMap::new(), snapshots: Vec::new() };
        run.create(NAMES[0]).await;
        run
    }

    async fn start(&mut self) {
        self.registry = start(&self.sim, &self.store, "/cache").await.unwrap();
    }

    async fn create(&mut self, name: &'static str) {
        self.registry.create(id(name), Geometry::new(SIZE, CHUNK).unwrap()).await.unwrap();
        self.models.insert(name, Model::new(vec![0; SIZE as usize]));
    }

    async fn volume(&self, name: &str) -> Arc<Volume> {
        self.registry.volume(&id(name)).await.unwrap()
    }

    async fn take(&mut self, name: &'static str, step: Step) {
        match step {
            Step::Kill => self.start().await,
            Step::Restart => {
                // An export that nobody used since the last start is left as it is by a stop.
                for name in self.models.keys() {
                    self.volume(name).await;
                }
                self.registry.close().await;
                self.start().await;
                self.models.values_mut().for_each(Model::flushed);
            }
            Step::Crash { kept, torn } => {
                self.sim.reboot(self.sim.walk().power_loss(Loss::Some { kept, names: usize::MAX, torn: Some(torn) }));
                self.start().await;
                for (name, model) in &mut self.models {
                    model.crashed(&image(&self.registry, name).await);
                }
            }
            Step::Create if !self.models.contains_key(name) => self.create(name).await,
            Step::Clone { which } if !self.snapshots.is_empty() => {
                let (snapshot, image) = which.get(&self.snapshots).clone();
                self.remove(NAMES[1]).await;
                self.registry.clone_export(id(NAMES[1]), id(NAMES[0]), Some(snapshot)).await.unwrap();
                self.models.insert(NAMES[1], Model::new(image));
            }
            Step::Create | Step::Clone { .. } => {}
            step if self.models.contains_key(name) => self.take_on(name, step).await,
            _ => {}
        }
    }

    /// A user deletes an export: here, its cache, and in the store.
    async fn remove(&mut self, name: &'static str) {
        use nbd_server::disk::Disk as _;
        use nbd_server::store::Store as _;
        if self.models.remove(name).is_none() {
            return;
        }
        self.registry.unload(&id(name)).await.unwrap();
        let (disk, dir) = (common::sim::SimDisk(Arc::clone(&self.sim)), std::path::Path::new("/cache").join(name));
        for file in disk.list_dir(&dir).unwrap() {
            disk.remove(&dir.join(file)).unwrap();
        }
        disk.sync_dir(&dir).unwrap();
        let keys = root().export(&id(name));
        for key in [keys.head(), keys.current_ref()] {
            self.store.delete(&key).await.unwrap();
        }
    }

    async fn take_on(&mut self, name: &'static str, step: Step) {
        let volume = self.volume(name).await;
        let model = self.models.get_mut(name).unwrap();
        let span = |at: u64, sectors: u64| (at * SECTOR) as usize..((at + sectors) * SECTOR) as usize;
        match step {
            Step::Write { at, sectors, byte } => {
                write(&volume, at * SECTOR, byte, sectors * SECTOR).await;
                model.change(at, &vec![byte; (sectors * SECTOR) as usize]);
            }
            Step::Zero { at, sectors } => {
                volume.write_zeroes(range(at * SECTOR, sectors * SECTOR)).await.unwrap();
                model.change(at, &vec![0; (sectors * SECTOR) as usize]);
            }
            Step::Trim { at, sectors } => {
                volume.trim(range(at * SECTOR, sectors * SECTOR)).await.unwrap();
                // What a trim leaves of each sector is its business: the old content or zeros.
                let now = read(&volume, at * SECTOR, sectors * SECTOR).await;
                let old = &model.image[span(at, sectors)];
                for (old, now) in old.chunks(SECTOR as usize).zip(now.chunks(SECTOR as usize)) {
                    assert!(now == old || now.iter().all(|b| *b == 0));
                }
                model.change(at, &now);
            }
            Step::Read { at, sectors } => {
                assert_eq!(read(&volume, at * SECTOR, sectors * SECTOR).await, model.image[span(at, sectors)]);
            }
            Step::Flush => {
                volume.flush().await.unwrap();
                model.flushed();
            }
            Step::Snapshot | Step::Compact => {
                let published = match step {
                    Step::Snapshot => self.registry.snapshot(&id(name)).await.unwrap(),
                    _ => self.registry.compact(&id(name)).await.unwrap(),
                };
                if published.created {
                    model.published = model.image.clone();
                    if name == NAMES[0] {
                        self.snapshots.push((published.snapshot_id.unwrap(), model.image.clone()));
                    }
                }
                assert_eq!(model.published, model.image);
            }
            Step::Reset => {
                self.registry.reset(&id(name)).await.unwrap();
                model.image = model.published.clone();
                model.flushed();
            }
            Step::Kill | Step::Restart | Step::Crash { .. } | Step::Create | Step::Clone { .. } => unreachable!(),
        }
    }

    async fn check(&mut self) {
        for (name, model) in &self.models {
            assert_eq!(image(&self.registry, name).await, model.image, "{name}");
        }
        let elsewhere = start(&self.sim, &self.store, "/elsewhere").await.unwrap();
        for (name, model) in &self.models {
            assert_eq!(image(&elsewhere, name).await, model.published, "{name} as published");
        }
        for (i, (snapshot, expected)) in self.snapshots.iter().enumerate() {
            let name = format!("check-{i}");
            elsewhere.clone_export(id(&name), id(NAMES[0]), Some(*snapshot)).await.unwrap();
            assert_eq!(&image(&elsewhere, &name).await, expected, "snapshot {i}");
        }
    }
}

/// Where failing cases are kept; not those of a build that breaks a rule on purpose.
fn kept() -> Option<Box<dyn FailurePersistence>> {
    let file = || Box::new(FileFailurePersistence::WithSource("proptest-regressions")) as Box<dyn FailurePersistence>;
    option_env!("NBD_SABOTAGE").is_none().then(file)
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("NBD_TEST_MODEL_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(250),
        max_shrink_iters: 2000,
        failure_persistence: kept(),
        ..ProptestConfig::default()
    })]

    #[test]
    fn two_exports_behave_as_plain_byte_arrays_whatever_happens(steps in steps()) {
        runtime().block_on(async {
            let mut run = Run::new().await;
            for (second, step) in steps {
                run.take(NAMES[usize::from(second)], step).await;
            }
            run.check().await;
        });
    }
}
