//! The fuzz targets of `fuzz/` on a stable toolchain: every file of the corpus is replayed, then mutated for a while.
//!
//! `NBD_TEST_FUZZ_SECONDS` is the time for each target (5 unless given), `NBD_TEST_FUZZ_SEED` the start of its random
//! numbers (0 unless given).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
#![allow(clippy::print_stderr, reason = "the seed and the count belong into the output of the test")]

#[path = "fuzz/mutate.rs"]
mod mutate;
#[path = "../fuzz/src/lib.rs"]
mod targets;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use mutate::{Random, mutated};

fn from_environment(name: &str, otherwise: u64) -> u64 {
    std::env::var(name).map_or(otherwise, |text| text.parse().unwrap_or_else(|_| panic!("{name}={text}: no number")))
}

/// The files of a target's corpus, in the order of their names.
fn corpus(target: &str) -> Vec<(PathBuf, Vec<u8>)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut files: Vec<PathBuf> = fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files.into_iter().map(|path| (path.clone(), fs::read(path).unwrap())).collect()
}

fn fuzz(target: &str, entry: fn(&[u8])) {
    let corpus = corpus(target);
    assert!(corpus.len() >= 3, "the corpus of {target} is missing");
    for (path, bytes) in &corpus {
        let outcome = catch_unwind(AssertUnwindSafe(|| entry(bytes)));
        outcome.unwrap_or_else(|panic| {
            eprintln!("{} fails: repeat with `cargo test --test fuzz {target}`", path.display());
            resume_unwind(panic)
        });
    }
    let seed = from_environment("NBD_TEST_FUZZ_SEED", 0);
    let duration = Duration::from_secs(from_environment("NBD_TEST_FUZZ_SECONDS", 5));
    let seeds: Vec<Vec<u8>> = corpus.into_iter().map(|(_, bytes)| bytes).collect();
    let mut random = Random(seed);
    let (start, mut tried) = (Instant::now(), 0u64);
    while start.elapsed() < duration {
        let bytes = mutated(&seeds, &mut random);
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| entry(&bytes))) {
            let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{target}-{seed}-{tried}"));
            fs::write(&path, &bytes).unwrap();
            eprintln!(
                "{target} fails on input {tried} of seed {seed}, kept as {}.\nCopy it to fuzz/corpus/{target}/ under a \
                 name that says what it is; `cargo test --test fuzz {target}` then begins with it.",
                path.display()
            );
            resume_unwind(panic);
        }
        tried += 1;
    }
    eprintln!("{target}: {tried} inputs mutated from {} files with seed {seed}, all held", seeds.len());
}

#[test]
fn handshake_output_is_whole_bounded_and_the_same_however_the_bytes_are_cut() {
    fuzz("handshake", targets::handshake);
}

#[test]
fn requests_simple_get_one_well_formed_reply_each() {
    fuzz("requests_simple", targets::requests_simple);
}

#[test]
fn requests_structured_get_one_well_formed_reply_each() {
    fuzz("requests_structured", targets::requests_structured);
}

#[test]
fn requests_extended_get_one_well_formed_reply_each() {
    fuzz("requests_extended", targets::requests_extended);
}

#[test]
fn cache_meta_is_refused_or_means_one_thing() {
    fuzz("cache_meta", targets::cache_meta);
}

#[test]
fn journal_is_refused_or_means_one_thing() {
    fuzz("journal", targets::journal);
}

#[test]
fn manifest_is_refused_or_means_one_thing() {
    fuzz("manifest", targets::manifest);
}

#[test]
fn head_is_refused_or_means_one_thing() {
    fuzz("head", targets::head);
}

#[test]
fn each_target_of_cargo_fuzz_is_run_here() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let this = fs::read_to_string(root.join("tests/fuzz.rs")).unwrap();
    let manifest = fs::read_to_string(root.join("fuzz/Cargo.toml")).unwrap();
    let mut targets = 0;
    for entry in fs::read_dir(root.join("fuzz/fuzz_targets")).unwrap() {
        let name = entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned();
        assert!(this.contains(&format!("targets::{name})")), "{name} is not run on the stable toolchain");
        assert!(manifest.contains(&format!("name = \"{name}\"")), "{name} is not in fuzz/Cargo.toml");
        targets += 1;
    }
    assert!(targets >= 8);
}

#[test]
fn the_same_seed_gives_the_same_inputs() {
    let seeds = [b"abc 12".to_vec(), vec![0; 100]];
    let run = |seed| -> Vec<Vec<u8>> {
        let mut random = Random(seed);
        (0..50).map(|_| mutated(&seeds, &mut random)).collect()
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}
