//! Runs a scenario under schedules that a checker chooses: random ones, and such as find rare orders (PCT).

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::Duration;

use shuttle::scheduler::{PctScheduler, RandomScheduler, ReplayScheduler, Scheduler};
use shuttle::{Config, FailurePersistence, Runner};

/// How many schedules each of the two schedulers tries of a scenario.
const SCHEDULES: usize = 2000;
/// How long it may take for them. On a busy machine there are fewer; the checker's crate then says "failing seed" though
/// nothing failed.
const LIMIT: Duration = Duration::from_secs(4);
/// Fewer say nothing.
const LEAST: usize = 50;
/// At how many points PCT takes the turn from whoever has it, and one more.
const PCT_DEPTH: usize = 3;
/// Enough for the cache, its hashes and its errors.
const STACK_BYTES: usize = 256 << 10;

/// Tries a scenario under many schedules, or under the one in the file that `NBD_TEST_SCHEDULE` names.
pub fn check(name: &str, scenario: fn()) {
    if let Ok(path) = std::env::var("NBD_TEST_SCHEDULE") {
        let schedule = ReplayScheduler::new_from_file(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
        Runner::new(schedule, config()).run(scenario);
        return;
    }
    // Its own crate has it read, too, but after this line.
    let seed = std::env::var("SHUTTLE_RANDOM_SEED").map_or_else(|_| rand::random(), |text| text.parse().unwrap());
    run(name, "random", seed, RandomScheduler::new_from_seed(seed, SCHEDULES), scenario);
    run(name, "PCT", seed, PctScheduler::new_from_seed(seed, PCT_DEPTH, SCHEDULES), scenario);
}

fn run(name: &str, kind: &str, seed: u64, scheduler: impl Scheduler + 'static, scenario: fn()) {
    let runner = Runner::new(scheduler, config());
    match catch_unwind(AssertUnwindSafe(|| runner.run(scenario))) {
        Ok(tried) => {
            eprintln!("{name}: {tried} {kind} schedules of seed {seed}, all held");
            assert!(tried >= LEAST, "only {tried} schedules were tried within {LIMIT:?}");
        }
        Err(panic) => {
            let cargo = format!("cargo test --features shuttle --test interleavings {name}");
            eprintln!(
                "{name} fails under a {kind} schedule of seed {seed}. To repeat the search: \
                 `SHUTTLE_RANDOM_SEED={seed} {cargo}`. To repeat the one schedule: `NBD_TEST_SCHEDULE=<the file named \
                 above> {cargo}`."
            );
            resume_unwind(panic);
        }
    }
}

fn config() -> Config {
    let mut config = Config::new();
    config.stack_size = STACK_BYTES;
    config.max_time = Some(LIMIT);
    // That weaker orderings are taken for the strongest is said in src/sync.rs.
    config.silence_warnings = true;
    config.failure_persistence = FailurePersistence::File(Some(Path::new(env!("CARGO_TARGET_TMPDIR")).to_owned()));
    config
}
