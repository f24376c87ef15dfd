use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::cache::aside::{ASIDE_FILE, AsideMemory};
use crate::cache::open::Opening;
use crate::cache::{Edges, Progress};
use crate::disk::RealDisk;
use crate::units::{ByteRange, ExportId, Geometry};

/// 32 blocks a chunk, and a last chunk that ends in the middle of one.
const CHUNK: u64 = 128 << 10;
const SIZE: u64 = 3 * CHUNK - 5000;

/// A cache with so much memory for what is set aside.
fn cache(size: u64, chunk_size: u64, aside_bytes: u64) -> (Cache, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let geometry = Geometry::new(size, chunk_size).unwrap();
    let export_id = "disk".parse::<ExportId>().unwrap();
    let (disk, aside_memory) = (Arc::new(RealDisk::default()), AsideMemory::new(aside_bytes));
    let cache_dir = dir.path().join("disk");
    let opening =
        Opening { disk, dir: cache_dir, export_id, geometry, base: Base::default(), incarnation: None, aside_memory };
    (opening.open().unwrap(), dir)
}

fn whole(cache: &Cache, chunk: ChunkIndex) -> std::ops::Range<usize> {
    let range = cache.geometry().chunk_range(chunk);
    usize::try_from(range.offset()).unwrap()..usize::try_from(range.end()).unwrap()
}

fn taken(cache: &Cache, cut: CutChunk) -> Vec<u8> {
    let mut buf = vec![0xEE; whole(cache, cut.chunk).len()];
    cache.take_cut_chunk(cut, &mut buf).unwrap();
    buf
}

#[derive(Debug, Clone)]
enum Step {
    Write { at: u64, len: u64, byte: u8 },
    Zero { at: u64, len: u64 },
    Take { chunk: u32 },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Pieces about as large as a block, and some that cover chunks.
    let piece =
        || (0..SIZE, prop_oneof![3 => 1..9000u64, 1 => 1..2 * CHUNK]).prop_map(|(at, len)| (at, len.min(SIZE - at)));
    let step = prop_oneof![
        4 => (piece(), 1..=255u8).prop_map(|((at, len), byte)| Step::Write { at, len, byte }),
        2 => piece().prop_map(|(at, len)| Step::Zero { at, len }),
        1 => (0..3u32).prop_map(|chunk| Step::Take { chunk }),
    ];
    prop::collection::vec(step, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn a_publish_reads_every_chunk_as_it_was_at_the_cut_whatever_is_written_since(
        before in steps(),
        after in steps(),
        blocks_in_memory in prop_oneof![Just(0u64), 1..20u64, Just(1000)],
    ) {
        let (cache, _dir) = cache(SIZE, CHUNK, blocks_in_memory * 4096);
        let mut image = vec![0; usize::try_from(SIZE).unwrap()];
        let change = |image: &mut Vec<u8>, at: u64, len: u64, byte: u8| {
            let (from, to) = (usize::try_from(at).unwrap(), usize::try_from(at + len).unwrap());
            image[from..to].fill(byte);
            let progress = match byte {
                0 => cache.zero(ByteRange::new(at, len).unwrap(), Edges::Zero, |_| true),
                _ => cache.write(at, &image[from..to], |_| true),
            };
            assert_eq!(progress.unwrap(), Progress::Done);
        };
        for step in before {
            match step {
                Step::Write { at, len, byte } => change(&mut image, at, len, byte),
                Step::Zero { at, len } => change(&mut image, at, len, 0),
                Step::Take { .. } => {}
            }
        }
        let (cut, at_cut) = (cache.cut().unwrap(), image.clone());
        let mut awaited: Vec<_> = cut.into_iter().filter(|c| !c.zero).collect();
        for step in after {
            match step {
                Step::Write { at, len, byte } => change(&mut image, at, len, byte),
                Step::Zero { at, len } => change(&mut image, at, len, 0),
                Step::Take { chunk } => if let Some(i) = awaited.iter().position(|c| c.chunk.0 == chunk) {
                    let cut = awaited.swap_remove(i);
                    prop_assert!(taken(&cache, cut) == at_cut[whole(&cache, cut.chunk)], "chunk {chunk}");
                }
            }
        }
        for cut in awaited {
            prop_assert!(taken(&cache, cut) == at_cut[whole(&cache, cut.chunk)], "{cut:?} at the end");
        }
        let mut now = vec![0xEE; image.len()];
        cache.read(ByteRange::new(0, SIZE).unwrap(), &mut now, |_| true).unwrap();
        prop_assert!(now == image, "readers see what was written last");
    }
}

#[test]
fn a_write_during_a_publish_copies_the_block_it_changes_and_not_the_chunk() {
    const CHUNK: u64 = 4 << 20;
    let (cache, dir) = cache(CHUNK, CHUNK, 0);
    cache.write(0, &vec![1; 4 << 20], |_| true).unwrap();
    let cut = cache.cut().unwrap();
    for _ in 0..3 {
        cache.write(1 << 20, &[2; 4096], |_| true).unwrap();
    }
    let aside = std::fs::metadata(dir.path().join("disk").join(ASIDE_FILE)).unwrap();
    let copied = std::os::unix::fs::MetadataExt::blocks(&aside) * 512;
    assert!((4096..=64 << 10).contains(&copied), "{copied}");
    assert!(taken(&cache, cut[0]).iter().all(|b| *b == 1));
    cache.write(2 << 20, &[2; 4096], |_| true).unwrap();
    assert_eq!(std::os::unix::fs::MetadataExt::blocks(&aside) * 512, copied, "nobody waits for it any more");
}

#[test]
fn blocks_are_set_aside_in_memory_while_there_is_room_and_that_is_given_back() {
    const CHUNK: u64 = 4 << 20;
    let (cache, dir) = cache(2 * CHUNK, CHUNK, 2 * 4096);
    let file = dir.path().join("disk").join(ASIDE_FILE);
    let write = |block: u64| cache.write(block * 4096, &[2], |_| true).unwrap();
    for given_back in ["taken", "given up", "taken"] {
        cache.write(0, &vec![1; 8 << 20], |_| true).unwrap();
        let cut = cache.cut().unwrap();
        // The same block twice is set aside once.
        for block in [3, 3, 1024] {
            write(block);
        }
        assert!(!file.exists(), "{given_back}: two blocks are in memory");
        if given_back == "taken" {
            assert!(taken(&cache, cut[0]).iter().all(|b| *b == 1));
            write(1025);
            assert!(!file.exists(), "that of the first has room for another");
            write(1026);
            assert!(file.exists(), "that is one too many");
            assert!(taken(&cache, cut[1]).iter().all(|b| *b == 1));
        }
        cache.uncut().unwrap();
        assert!(!file.exists());
    }
}

#[test]
fn a_chunk_is_read_as_it_was_at_the_cut_while_a_writer_changes_it() {
    const CHUNK: u64 = 4 << 20;
    let (cache, _dir) = cache(CHUNK, CHUNK, 250 * 4096);
    for round in 1..=20u8 {
        cache.write(0, &vec![round; 4 << 20], |_| true).unwrap();
        let cut = cache.cut().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for at in (0..500).map(|i: u64| i * 40_961 % (CHUNK - 4096)) {
                    cache.write(at, &[0xFF; 4096], |_| true).unwrap();
                }
            });
            assert!(taken(&cache, cut[0]).iter().all(|b| *b == round), "round {round}");
        });
        cache.uncut().unwrap();
    }
}
