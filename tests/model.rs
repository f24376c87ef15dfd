//! Random operations on two exports that share blobs, against plain byte arrays. Sectors of 512 bytes, chunks of 4 KiB.
//! A failing case is kept in `proptest-regressions/` and repeated first from then on.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, missing_docs)]

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;

use common::volumes::*;
use nbd_server::units::SnapshotId;
use nbd_server::volume::Volume;
use nbd_server::volume::registry::Registry;
use proptest::prelude::*;

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
    /// The second export is made anew from a snapshot of the first.
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
        2 => Just(Step::Flush),
        3 => Just(Step::Snapshot),
        1 => Just(Step::Compact),
        1 => Just(Step::Reset),
        2 => Just(Step::Kill),
        1 => Just(Step::Restart),
        1 => any::<prop::sample::Index>().prop_map(|which| Step::Clone { which }),
    ];
    prop::collection::vec((any::<bool>(), step), 1..60)
}

/// What an export should be, in the simplest form.
#[derive(Clone)]
struct Model {
    image: Vec<u8>,
    published: Vec<u8>,
}

struct Run {
    site: Site,
    registry: Arc<Registry>,
    models: BTreeMap<&'static str, Model>,
    snapshots: Vec<(SnapshotId, Vec<u8>)>,
}

const NAMES: [&str; 2] = ["first", "second"];

impl Run {
    async fn new() -> Self {
        let mut site = Site::new();
        let registry = site.start("a").await;
        let mut run = Self { site, registry, models: BTreeMap::new(), snapshots: Vec::new() };
        let zeros = vec![0; SIZE as usize];
        for name in NAMES {
            let geometry = nbd_server::units::Geometry::new(SIZE, CHUNK).unwrap();
            run.registry.create(id(name), geometry).await.unwrap();
            run.models.insert(name, Model { image: zeros.clone(), published: zeros.clone() });
        }
        run
    }

    async fn volume(&self, name: &str) -> Arc<Volume> {
        self.registry.volume(&id(name)).await.unwrap()
    }

    async fn take(&mut self, name: &'static str, step: Step) {
        let volume = self.volume(name).await;
        let model = self.models.get_mut(name).unwrap();
        let span = |at: u64, sectors: u64| (at * SECTOR) as usize..((at + sectors) * SECTOR) as usize;
        match step {
            Step::Write { at, sectors, byte } => {
                write(&volume, at * SECTOR, byte, sectors * SECTOR).await;
                model.image[span(at, sectors)].fill(byte);
            }
            Step::Zero { at, sectors } => {
                volume.write_zeroes(range(at * SECTOR, sectors * SECTOR)).await.unwrap();
                model.image[span(at, sectors)].fill(0);
            }
            Step::Trim { at, sectors } => {
                volume.trim(range(at * SECTOR, sectors * SECTOR)).await.unwrap();
                // What a trim leaves of each sector is its business: the old content or zeros.
                let now = read(&volume, at * SECTOR, sectors * SECTOR).await;
                let old = &mut model.image[span(at, sectors)];
                for (old, now) in old.chunks_mut(SECTOR as usize).zip(now.chunks(SECTOR as usize)) {
                    assert!(now == old || now.iter().all(|b| *b == 0));
                    old.copy_from_slice(now);
                }
            }
            Step::Read { at, sectors } => {
                assert_eq!(read(&volume, at * SECTOR, sectors * SECTOR).await, model.image[span(at, sectors)]);
            }
            Step::Flush => volume.flush().await.unwrap(),
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
            }
            Step::Kill => self.registry = self.site.start("a").await,
            Step::Restart => {
                self.registry.close().await;
                self.registry = self.site.start("a").await;
            }
            Step::Clone { which } if !self.snapshots.is_empty() => {
                let (snapshot, image) = which.get(&self.snapshots).clone();
                self.registry.unload(&id(NAMES[1])).await.unwrap();
                std::fs::remove_dir_all(self.site.cache_root("a").join(NAMES[1])).unwrap();
                use nbd_server::store::Store as _;
                self.site.store.delete(&root().export(&id(NAMES[1])).head()).await.unwrap();
                self.registry.clone_export(id(NAMES[1]), id(NAMES[0]), Some(snapshot)).await.unwrap();
                self.models.insert(NAMES[1], Model { image: image.clone(), published: image });
            }
            Step::Clone { .. } => {}
        }
    }

    async fn check(&mut self) {
        for name in NAMES {
            assert_eq!(image(&self.registry, name).await, self.models[name].image, "{name}");
        }
        let elsewhere = self.site.elsewhere().await;
        for name in NAMES {
            assert_eq!(image(&elsewhere, name).await, self.models[name].published, "{name} as published");
        }
        for (i, (snapshot, expected)) in self.snapshots.iter().enumerate() {
            let name = format!("check-{i}");
            elsewhere.clone_export(id(&name), id(NAMES[0]), Some(*snapshot)).await.unwrap();
            assert_eq!(&image(&elsewhere, &name).await, expected, "snapshot {i}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: std::env::var("NBD_TEST_MODEL_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(150),
        max_shrink_iters: 2000,
        ..ProptestConfig::default()
    })]

    #[test]
    fn two_exports_behave_as_plain_byte_arrays_whatever_happens(steps in steps()) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut run = Run::new().await;
            for (second, step) in steps {
                run.take(NAMES[usize::from(second)], step).await;
            }
            run.check().await;
        });
    }
}
