//! A fault at every call of the disk and of the store, and what is left of the promises: errors are allowed, losses are
//! not.
//!
//! A scenario is run again and again; in the n-th run the n-th call goes wrong, once or from there on, until a run is
//! clean. Whatever its steps answered, afterwards the faults are over, and every sector holds what was acknowledged last
//! or something asked for since; a restart changes nothing of that; everything can be flushed and published; and a server
//! with an empty cache reads the same.
//!
//! A failure prints the command that repeats it. `NBD_TEST_FAULT_SEEDS=N` (default 2) adds N random scenarios to the fixed
//! one.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, missing_docs)]

mod common;

use common::scene::{Meanwhile, Scene, random_steps, runtime, start};
use common::sim::disk::SimDisk;
use common::sim::faults::{DiskFault, Faults, Plan, StoreFault};
use common::sim::{Loss, Sim, SimStore, State};
use common::volumes::{CHUNK, create, id, image, write};
use nbd_server::cache::journal;
use nbd_server::disk::Disk;

/// The steps of a random scenario.
const STEPS: usize = 25;

/// A bit of everything, so that every kind of call is there.
async fn everything(s: &mut Scene) {
    s.create("disk").await;
    s.write("disk", 0..20).await;
    s.flush("disk").await;
    s.snapshot("disk").await;
    s.write("disk", 1..2).await;
    s.zero("disk", 8..16, true).await;
    s.write("disk", 9..10).await;
    s.clone_of("copy", "disk").await;
    let changes = [Meanwhile::Write(2..3), Meanwhile::Flush, Meanwhile::Write(17..18), Meanwhile::Zero(0..8)];
    s.snapshot_under("disk", &changes).await;
    s.write("copy", 2..4).await;
    s.restart().await;
    s.read("copy", 8..10).await;
    s.write("copy", 20..22).await;
    s.flush("copy").await;
    s.snapshot("copy").await;
    s.compact("disk").await;
    s.write("disk", 26..28).await;
    s.reset("copy").await;
    s.read("copy", 16..24).await;
    s.write("copy", 0..8).await;
    s.kill().await;
    s.write("copy", 9..11).await;
    s.flush("copy").await;
    s.snapshot("copy").await;
}

async fn steps(scene: &mut Scene, seed: u64) {
    scene.start().await;
    match seed {
        0 => everything(scene).await,
        seed => random_steps(scene, seed, STEPS).await,
    }
}

/// Runs the scenario with a fault and returns whether it struck.
fn run(seed: u64, plan: impl FnOnce(&mut Faults), struck: impl FnOnce(&Faults) -> bool) -> Result<bool, String> {
    runtime().block_on(async {
        let sim = Sim::new(State::default(), 1);
        sim.faults(plan);
        let mut scene = Scene::faulty(std::sync::Arc::clone(&sim));
        steps(&mut scene, seed).await;
        let struck = sim.faults(|faults| {
            faults.end();
            struck(faults)
        });
        // Half of what comes late comes before the restart, half of it after.
        if seed.is_multiple_of(2) {
            scene.store.land_late_puts();
        }
        scene.settles(sim.sync_failed()).await?;
        Ok(struck)
    })
}

fn seeds() -> std::ops::RangeInclusive<u64> {
    if let Some(seed) = std::env::var("NBD_TEST_SEED").ok().and_then(|seed| seed.parse().ok()) {
        return seed..=seed;
    }
    0..=std::env::var("NBD_TEST_FAULT_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(2)
}

/// The number of the call at which a repeated run begins.
fn first_call() -> usize {
    std::env::var("NBD_TEST_FAULT_AT").ok().and_then(|at| at.parse().ok()).unwrap_or(0)
}

/// Says how a run is repeated, should it fail in any way.
struct Repeat<'a> {
    test: &'a str,
    what: &'a str,
    seed: u64,
    at: usize,
}

impl Drop for Repeat<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self { test, what, seed, at } = self;
            println!("{what} at call {at}; to repeat it:");
            println!("NBD_TEST_SEED={seed} NBD_TEST_FAULT_AT={at} cargo test --test faults {test}");
        }
    }
}

/// Runs with a fault at every call until none strikes any more.
fn at_every_call(test: &str, what: &str, run: impl Fn(u64, usize) -> Result<bool, String>) {
    let (mut runs, first) = (0, first_call());
    for seed in seeds() {
        for at in first.. {
            let _repeat = Repeat { test, what, seed, at };
            if !run(seed, at).unwrap_or_else(|e| panic!("{e}")) {
                break;
            }
            runs += 1;
        }
    }
    assert!(runs > 10 || first > 0, "only {runs} runs were struck");
}

fn disk_fault_at_every_call(test: &str, fault: DiskFault) {
    for sticky in [false, true] {
        at_every_call(test, &format!("{fault:?}, sticky: {sticky},"), |seed, at| {
            run(seed, |f| f.disk = Some(Plan { at, fault, sticky }), |f| f.disk_calls > at)
        });
    }
}

fn store_fault_at_every_call(test: &str, fault: StoreFault) {
    for sticky in [false, true] {
        at_every_call(test, &format!("{fault:?}, sticky: {sticky},"), |seed, at| {
            run(seed, |f| f.store = Some(Plan { at, fault, sticky }), |f| f.store_calls > at)
        });
    }
}

#[test]
fn an_io_error_at_any_call_of_the_disk_loses_nothing() {
    disk_fault_at_every_call("an_io_error", DiskFault::Eio);
}

#[test]
fn a_disk_that_is_full_at_any_call_loses_nothing() {
    disk_fault_at_every_call("a_disk_that_is_full", DiskFault::Full);
}

#[test]
fn a_write_cut_short_at_any_call_loses_nothing() {
    disk_fault_at_every_call("a_write_cut_short", DiskFault::Short);
}

#[test]
fn a_store_that_fails_before_any_call_loses_nothing() {
    store_fault_at_every_call("a_store_that_fails", StoreFault::Before);
}

#[test]
fn a_call_of_the_store_that_lands_unseen_loses_nothing() {
    store_fault_at_every_call("a_call_of_the_store_that_lands_unseen", StoreFault::LandedUnseen);
}

#[test]
fn a_call_of_the_store_that_lands_later_loses_nothing() {
    for calls in [1, 2, 4, 7, 12] {
        store_fault_at_every_call("a_call_of_the_store_that_lands_later", StoreFault::Late(calls));
    }
}

#[test]
fn a_conflict_that_was_none_loses_nothing() {
    store_fault_at_every_call("a_conflict_that_was_none", StoreFault::Conflict);
}

#[test]
fn a_conflict_with_itself_loses_nothing() {
    store_fault_at_every_call("a_conflict_with_itself", StoreFault::ConflictWithItself);
}

#[test]
fn a_body_cut_short_loses_nothing() {
    store_fault_at_every_call("a_body_cut_short", StoreFault::ShortBody);
}

#[test]
fn wrong_bytes_from_the_store_lose_nothing() {
    store_fault_at_every_call("wrong_bytes_from_the_store", StoreFault::WrongBytes);
}

#[test]
fn a_store_that_stalls_loses_nothing() {
    store_fault_at_every_call("a_store_that_stalls", StoreFault::Stall);
}

/// The disk is full from the k-th call on, the process is killed, and it starts while the disk is still full: nothing
/// that was acknowledged is lost, and FLUSH makes it durable (L7).
#[test]
fn a_start_on_a_full_disk_reads_and_flushes_what_was_written() {
    at_every_call("a_start_on_a_full_disk", "the disk is full", |seed, at| {
        runtime().block_on(async {
            let sim = Sim::new(State::default(), 1);
            let mut scene = Scene::faulty(std::sync::Arc::clone(&sim));
            sim.faults(|f| f.disk = Some(Plan { at, fault: DiskFault::Full, sticky: true }));
            steps(&mut scene, seed).await;
            let struck = sim.faults(|f| f.disk_calls > at);
            scene.works_on_a_full_disk().await?;
            Ok(struck)
        })
    });
}

/// Marks that need no space for bytes are refused before they take the space of what depends on them (L7).
#[test]
fn marks_on_a_full_disk_leave_room_for_their_seal_and_their_recovery() {
    const CHUNKS: u64 = 1000;
    runtime().block_on(async {
        let sim = Sim::new(State::default(), 1);
        let store = SimStore::new(std::sync::Arc::clone(&sim));
        let registry = start(&sim, &store, "/cache").await.unwrap();
        let volume = create(&registry, "disk", CHUNKS).await;
        write(&volume, 0, 1, CHUNKS * CHUNK).await;
        registry.snapshot(&id("disk")).await.unwrap();
        sim.faults(|f| f.disk = Some(Plan { at: f.disk_calls, fault: DiskFault::Full, sticky: true }));
        let mut marked = 0;
        // Each of these chunks is clean and has its bytes' space.
        while volume.write(marked * CHUNK, vec![2; 10].into()).await.is_ok() {
            marked += 1;
        }
        assert!(marked > 100 && marked < CHUNKS, "{marked} marks");
        volume.flush().await.expect("the seal has its room");
        drop((volume, registry));
        let registry = start(&sim, &store, "/cache").await.unwrap();
        let volume = registry.volume(&id("disk")).await.expect("recovery has its room");
        volume.flush().await.unwrap();
        drop((volume, registry));
        sim.faults(Faults::end);
        sim.reboot(sim.walk().power_loss(Loss::Everything));
        let all = image(&start(&sim, &store, "/cache").await.unwrap(), "disk").await;
        let firsts: Vec<u8> = all.chunks(usize::try_from(CHUNK).unwrap()).map(|chunk| chunk[0]).collect();
        let marked = usize::try_from(marked).unwrap();
        assert!(firsts[..marked].iter().all(|b| *b == 2) && firsts[marked..].iter().all(|b| *b == 1));
    });
}

/// A spare that a power loss may make the journal again is not written (L7).
#[test]
fn a_spare_is_not_written_before_it_is_durable_that_it_is_one() {
    let dir = std::path::Path::new("/cache/disk");
    let stored = |disk: &SimDisk, text: &str| journal::FILE.store(disk, dir, text.as_bytes());
    let loaded = |disk: &SimDisk| {
        let bytes = journal::FILE.load(disk, dir).unwrap().expect("a journal");
        String::from_utf8(bytes).unwrap().trim_end().to_owned()
    };
    for at in 0.. {
        let sim = Sim::new(State::default(), 1);
        let disk = SimDisk(std::sync::Arc::clone(&sim));
        journal::FILE.reserve(&disk, dir).unwrap();
        stored(&disk, "first").unwrap();
        disk.sync_dir(dir).unwrap();
        // Everything of the second but the last step.
        let begun = sim.faults(|f| f.disk_calls);
        stored(&disk, "second").unwrap();
        let calls = sim.faults(|f| f.disk_calls) - begun;
        sim.faults(|f| f.disk = Some(Plan { at: f.disk_calls + calls - 1, fault: DiskFault::Eio, sticky: false }));
        stored(&disk, "third").unwrap_err();
        assert_eq!(loaded(&disk), "third", "it was exchanged");
        sim.faults(|f| f.disk = Some(Plan { at: f.disk_calls + at, fault: DiskFault::Eio, sticky: true }));
        let fourth = stored(&disk, "fourth");
        sim.faults(Faults::end);
        let live = loaded(&disk);
        sim.reboot(sim.walk().power_loss(Loss::Everything));
        let after = loaded(&disk);
        assert!(after == "second" || after == "third" || after == live, "call {at}: {after:?}");
        if fourth.is_ok() {
            assert_eq!(after, "fourth");
            assert!(at >= calls, "{at} calls");
            break;
        }
    }
}
