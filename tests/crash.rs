//! Crashes at every operation of recorded scenarios, and what the real recovery makes of each.
//!
//! A scenario runs once on a simulated host, which records every operation of disk and store. Then each moment is a
//! crash: the process dies (with the last write perhaps cut short), or the host does (with whatever the disk may
//! keep of what was not synced). The real code recovers each state, and every promise is checked:
//! every sector holds a value between the last flushed and the last issued; every published snapshot is whole and
//! unchanged; no staging file and no half-made snapshot is left. Recovery itself is recorded, too, and crashed again.
//!
//! A failure prints the scenario's seed and the command that repeats it. `NBD_TEST_CRASH_FACTOR=N` (default 1) looks at
//! about N times as many states.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, missing_docs)]

mod common;

use std::collections::HashSet;
use std::io::Write as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex};
use std::time::Instant;

use common::scene::{Chapter, Meanwhile, SECTORS, Scene, random_steps, recovers, runtime};
use common::sim::crash::{Moment, every_crash};
use common::sim::{Event, Sim};

/// All scenarios together recover at least this many distinct states: the random ones go on until there are.
const DISTINCT_STATES: usize = 100_000;
/// The shortest of the named scenarios has more than this.
const STATES_OF_A_SCENARIO: usize = 100;

/// Of many unsynced changes, this many subsets are tried at each moment.
const RANDOM_LOSSES: u64 = 24;
/// Of the recoveries, one in so many is itself crashed at every operation.
const RECOVERIES_CRASHED: usize = 8;
/// The steps of a random scenario.
const STEPS: usize = 40;

fn factor() -> u64 {
    std::env::var("NBD_TEST_CRASH_FACTOR").ok().and_then(|n| n.parse().ok()).unwrap_or(1)
}

/// Every state that was ever recovered, in all scenarios.
static SEEN: LazyLock<Mutex<HashSet<blake3::Hash>>> = LazyLock::new(Mutex::default);

/// What is tried of one scenario, and how it is named.
struct Search<'a> {
    name: &'a str,
    chapter: &'a Chapter,
    /// Same bytes, but more was promised: another case, though not another state.
    cases: Mutex<HashSet<(blake3::Hash, bool, usize)>>,
    states: AtomicUsize,
}

impl Search<'_> {
    /// Whether this is a case that was not looked at yet.
    fn is_new(&self, moment: &Moment, floor: usize) -> bool {
        let print = moment.host.live.fingerprint();
        if SEEN.lock().unwrap().insert(print) {
            self.states.fetch_add(1, Ordering::Relaxed);
        }
        self.cases.lock().unwrap().insert((print, moment.power_lost, floor))
    }

    /// Recovers one state, and then each state that a crash of that recovery leaves.
    fn check(&self, runtime: &tokio::runtime::Runtime, moment: Moment, crash_again: bool) -> Result<(), String> {
        let k = moment.k;
        let boot = self.chapter.boot + u8::from(moment.power_lost);
        let start = moment.host.clone();
        let sim = Sim::after(moment.host, boot);
        let checked = runtime.block_on(recovers(&sim, &self.chapter.histories, k, moment.power_lost));
        let recovered = checked.map_err(|e| format!("crash after {k} operations ({}): {e}", moment.how))?;
        if !crash_again {
            return Ok(());
        }
        let events = &sim.events()[..recovered];
        let mut failed = Ok(());
        every_crash(
            &start,
            events,
            2,
            |_| true,
            |again| {
                let power_lost = moment.power_lost || again.power_lost;
                if failed.is_err() || !self.is_new(&again, if power_lost { self.promised(k) } else { k }) {
                    return;
                }
                let sim = Sim::after(again.host, boot + u8::from(again.power_lost));
                let checked = runtime.block_on(recovers(&sim, &self.chapter.histories, k, power_lost));
                failed = checked.map(drop).map_err(|e| {
                    let done = around(events, again.k);
                    format!(
                        "crash after {k} operations ({}), and after {} of the recovery ({}): {e}\n{done}",
                        moment.how, again.k, again.how
                    )
                });
            },
        );
        failed
    }

    fn promised(&self, k: usize) -> usize {
        self.chapter.histories.values().map(|history| history.promised(k)).sum()
    }

    fn everywhere(&self) {
        let failed: Mutex<Option<String>> = Mutex::new(None);
        let work = |worker: usize| {
            let (runtime, mut count) = (runtime(), worker);
            every_crash(
                &self.chapter.start,
                &self.chapter.events,
                RANDOM_LOSSES * factor(),
                |k| k % 2 == worker,
                |m| {
                    let k = m.k;
                    let floor = if m.power_lost { self.promised(k) } else { k };
                    if failed.lock().unwrap().is_some() || !self.is_new(&m, floor) {
                        return;
                    }
                    count += 1;
                    // Names that were changed and not made durable are what a second crash may take back.
                    let renamed = k.checked_sub(1).map(|last| &self.chapter.events[last]);
                    let renamed = matches!(renamed, Some(Event::Exchange { .. } | Event::Rename { .. }));
                    let crash_again = count.is_multiple_of(RECOVERIES_CRASHED) || (renamed && !m.power_lost);
                    if let Err(e) = self.check(&runtime, m, crash_again) {
                        *failed.lock().unwrap() = Some(format!("{e}\n{}", around(&self.chapter.events, k)));
                    }
                },
            );
        };
        std::thread::scope(|scope| {
            scope.spawn(|| work(0));
            scope.spawn(|| work(1));
        });
        if let Some(failure) = failed.into_inner().unwrap() {
            let test = std::thread::current().name().unwrap_or_default().to_owned();
            panic!("{}: {failure}\nto repeat it: cargo test --test crash {test}", self.name);
        }
    }
}

/// The operations before and after a crash.
fn around(events: &[Event], k: usize) -> String {
    let near = &events[k.saturating_sub(6)..(k + 2).min(events.len())];
    let short = |event| format!("    {event:?}").chars().take(160).collect::<String>();
    near.iter().map(short).collect::<Vec<_>>().join("\n")
}

/// Past the capture of test output: the figure is printed whether or not the test fails.
fn say(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Records a scenario, crashes it everywhere, and returns how many states that no scenario had before were recovered.
fn crash_everywhere(name: &str, record: impl AsyncFnOnce(&mut Scene)) -> usize {
    let began = Instant::now();
    let chapters = runtime().block_on(async {
        let mut scene = Scene::begin().await;
        record(&mut scene).await;
        scene.chapters()
    });
    let mut states = 0;
    for chapter in &chapters {
        let search = Search { name, chapter, cases: Mutex::default(), states: AtomicUsize::new(0) };
        search.everywhere();
        states += search.states.into_inner();
    }
    let operations: usize = chapters.iter().map(|chapter| chapter.events.len()).sum();
    say(&format!(
        "crash states: {name}: {operations} operations, {states} distinct states recovered in {:.1} s",
        began.elapsed().as_secs_f32()
    ));
    states
}

fn scenario(name: &str, record: impl AsyncFnOnce(&mut Scene)) {
    let states = crash_everywhere(name, record);
    assert!(states >= STATES_OF_A_SCENARIO, "{name}: only {states} states");
}

#[test]
fn random_scenarios_until_100_000_states_were_recovered() {
    let seed = std::env::var("NBD_TEST_SEED").ok().and_then(|seed| seed.parse::<u64>().ok());
    let (began, mut scenarios) = (Instant::now(), 0);
    for seed in seed.map_or(1..u64::MAX, |seed| seed..seed + 1) {
        let again = format!("NBD_TEST_SEED={seed} cargo test --test crash random_scenarios");
        crash_everywhere(&format!("seed {seed}, to repeat: {again}"), async |scene| {
            random_steps(scene, seed, STEPS).await;
        });
        scenarios += 1;
        if SEEN.lock().unwrap().len() >= DISTINCT_STATES * usize::try_from(factor()).unwrap() {
            break;
        }
    }
    let (states, seconds) = (SEEN.lock().unwrap().len(), began.elapsed().as_secs());
    say(&format!(
        "crash states: {states} distinct states in all, {scenarios} scenarios were random, after {seconds} s"
    ));
}

#[test]
fn first_writes() {
    scenario("first writes", async |s| {
        s.create("disk").await;
        s.write("disk", 0..3).await;
        s.write("disk", 8..16).await;
        s.write("disk", 6..20).await;
        s.flush("disk").await;
        s.write("disk", 0..SECTORS).await;
        s.flush("disk").await;
    });
}

#[test]
fn overwrites() {
    scenario("overwrites", async |s| {
        s.create("disk").await;
        s.write("disk", 0..SECTORS).await;
        s.flush("disk").await;
        s.write("disk", 1..2).await;
        s.write("disk", 8..16).await;
        s.write("disk", 1..3).await;
        s.flush("disk").await;
        s.write("disk", 2..20).await;
    });
}

#[test]
fn flushes_with_and_without_new_marks() {
    scenario("flushes", async |s| {
        s.create("disk").await;
        s.flush("disk").await;
        s.write("disk", 0..2).await;
        s.flush("disk").await;
        s.flush("disk").await;
        s.write("disk", 9..10).await;
        s.write("disk", 17..18).await;
        s.flush("disk").await;
        s.write("disk", 1..2).await;
        s.flush("disk").await;
        s.write("disk", 26..27).await;
    });
}

/// FUA is a write and a flush before the reply (`a_change_with_fua_is_durable_when_it_is_replied_to`).
#[test]
fn writes_with_fua_between_others() {
    scenario("fua", async |s| {
        s.create("disk").await;
        for (plain, durable) in [(0..2, 8..9), (9..10, 16..24), (1..3, 24..26)] {
            s.write("disk", plain).await;
            s.write("disk", durable).await;
            s.flush("disk").await;
        }
    });
}

#[test]
fn trims_over_every_kind_of_chunk() {
    scenario("trims", async |s| {
        s.create("disk").await;
        s.write("disk", 0..24).await;
        s.flush("disk").await;
        s.zero("disk", 0..8, true).await;
        s.write("disk", 3..5).await;
        s.flush("disk").await;
        s.snapshot("disk").await;
        s.zero("disk", 6..24, true).await;
        s.write("disk", 9..10).await;
        s.flush("disk").await;
        s.snapshot("disk").await;
        s.zero("disk", 8..16, true).await;
        s.write("disk", 8..16).await;
    });
}

#[test]
fn zeroes_over_every_kind_of_chunk() {
    scenario("zeroes", async |s| {
        s.create("disk").await;
        s.write("disk", 0..24).await;
        s.zero("disk", 10..12, false).await;
        s.flush("disk").await;
        s.snapshot("disk").await;
        s.zero("disk", 8..16, false).await;
        s.write("disk", 9..10).await;
        s.zero("disk", 2..20, false).await;
        s.flush("disk").await;
        s.snapshot("disk").await;
        s.write("disk", 17..18).await;
    });
}

#[test]
fn fills_and_writes_over_them() {
    scenario("fills", async |s| {
        s.create("disk").await;
        s.write("disk", 0..SECTORS).await;
        s.snapshot("disk").await;
        s.reset("disk").await;
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
fn a_snapshot_with_writes_during_it() {
    scenario("snapshot", async |s| {
        s.create("disk").await;
        s.write("disk", 0..20).await;
        s.flush("disk").await;
        let changes = [
            Meanwhile::Write(2..3),
            Meanwhile::Flush,
            Meanwhile::Write(16..18),
            Meanwhile::Zero(8..16),
            Meanwhile::Write(24..26),
            Meanwhile::Flush,
            Meanwhile::Write(0..8),
        ];
        s.snapshot_under("disk", &changes).await;
        s.flush("disk").await;
    });
}

#[test]
fn a_second_snapshot() {
    scenario("second snapshot", async |s| {
        s.create("disk").await;
        s.write("disk", 0..20).await;
        s.snapshot("disk").await;
        s.write("disk", 1..2).await;
        s.flush("disk").await;
        s.write("disk", 10..11).await;
        s.snapshot_under("disk", &[Meanwhile::Write(1..2), Meanwhile::Write(26..27)]).await;
        s.write("disk", 0..1).await;
        s.snapshot("disk").await;
    });
}

#[test]
fn compactions() {
    scenario("compact", async |s| {
        s.create("disk").await;
        s.write("disk", 0..20).await;
        s.snapshot("disk").await;
        s.write("disk", 1..2).await;
        s.compact("disk").await;
        s.write("disk", 26..28).await;
        s.flush("disk").await;
        s.zero("disk", 8..16, true).await;
        s.compact("disk").await;
    });
}

#[test]
fn resets_after_unpublished_writes() {
    scenario("resets", async |s| {
        s.create("disk").await;
        s.write("disk", 0..12).await;
        s.snapshot("disk").await;
        s.write("disk", 0..20).await;
        s.flush("disk").await;
        s.zero("disk", 8..16, true).await;
        s.reset("disk").await;
        s.write("disk", 4..6).await;
        s.flush("disk").await;
        s.write("disk", 9..10).await;
    });
}

#[test]
fn trims_of_the_cache_among_writes_and_fills() {
    scenario("trims of the cache", async |s| {
        s.create("disk").await;
        s.write("disk", 0..SECTORS).await;
        s.snapshot("disk").await;
        s.write("disk", 1..2).await;
        s.zero("disk", 8..16, true).await;
        s.flush("disk").await;
        s.trim_cache("disk").await;
        s.read("disk", 16..18).await;
        s.write("disk", 24..SECTORS).await;
        s.write("disk", 17..18).await;
        s.flush("disk").await;
        s.snapshot("disk").await;
        s.restart().await;
        s.trim_cache("disk").await;
        s.write("disk", 16..24).await;
        s.write("disk", 2..3).await;
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
fn clean_stops() {
    scenario("clean stops", async |s| {
        s.create("disk").await;
        s.write("disk", 0..10).await;
        s.restart().await;
        s.read("disk", 0..1).await;
        s.write("disk", 4..6).await;
        s.snapshot("disk").await;
        s.restart().await;
        s.write("disk", 12..20).await;
        s.restart().await;
        s.read("disk", 0..1).await;
    });
}

#[test]
fn kills_and_power_losses_and_the_recoveries_from_them() {
    scenario("recoveries", async |s| {
        s.create("disk").await;
        s.write("disk", 0..10).await;
        s.snapshot("disk").await;
        s.write("disk", 12..20).await;
        s.kill().await;
        s.read("disk", 0..1).await;
        s.flush("disk").await;
        s.write("disk", 5..7).await;
        s.kill().await;
        s.write("disk", 6..8).await;
        s.power_loss(common::sim::Loss::Everything).await;
        s.write("disk", 9..10).await;
        s.kill().await;
        s.flush("disk").await;
        s.power_loss(common::sim::Loss::Nothing).await;
        s.snapshot("disk").await;
    });
}
