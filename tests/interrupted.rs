//! What a volume keeps of its promises when the disk fails, the caller goes away or somebody else acts in between.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, clippy::panic, missing_docs)]

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use common::hooked::Hooked;
use common::sim::{Loss, Sim, SimDisk, SimStore, State, power_loss};
use common::volumes::*;
use nbd_server::clock::SystemClock;
use nbd_server::disk::Disk;
use nbd_server::volume::Services;
use nbd_server::volume::registry::Registry;

async fn start_sim(sim: &Arc<Sim>, disk: Arc<dyn Disk>) -> Arc<Registry> {
    let services = Services::new(Arc::new(SimStore(Arc::clone(sim))), root(), disk, Arc::new(SystemClock));
    Registry::discover(Arc::new(services), PathBuf::from("/cache")).await.unwrap()
}

#[tokio::test]
async fn a_flush_during_a_checkpoint_survives_a_power_loss() {
    let sim = Sim::new(State::default(), 1);
    let disk = Hooked::new(SimDisk(Arc::clone(&sim)));
    let registry = start_sim(&sim, Arc::new(disk.clone())).await;
    let volume = create(&registry, "disk", 8).await;
    write(&volume, 0, 0xaa, CHUNK).await;
    // While the checkpoint of a publish goes to the disk, a client writes and flushes.
    let (staging, runtime, writer) = (AtomicBool::new(false), tokio::runtime::Handle::current(), Arc::clone(&volume));
    disk.hook(move |op, path| {
        if op == "create" && path.ends_with("cache.meta.tmp") {
            staging.store(true, Ordering::SeqCst);
        }
        if op == "sync" && path.ends_with("cache.meta.tmp") && staging.swap(false, Ordering::SeqCst) {
            runtime.block_on(async {
                write(&writer, CHUNK, 0xbb, CHUNK).await;
                writer.flush().await.unwrap();
            });
        }
        Ok(())
    });
    registry.snapshot(&id("disk")).await.unwrap();
    let left = power_loss(&State::default(), &sim.events(), Loss::Everything);
    let sim = Sim::new(left, 2);
    let registry = start_sim(&sim, Arc::new(SimDisk(Arc::clone(&sim)))).await;
    let all = image(&registry, "disk").await;
    assert_eq!([all[0], all[CHUNK as usize]], [0xaa, 0xbb], "the flushed write is gone");
}
