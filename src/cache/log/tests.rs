use super::*;
use crate::cache::aside::AsideMemory;
use crate::cache::open::Opening;
use crate::cache::{Base, Cache, Edges, LogFile};
use crate::disk::RealDisk;
use crate::units::Geometry;

const CHUNK: u64 = 4096;
const CONTENT: [u8; 4096] = [7; 4096];
/// So many marks that a log which is not folded on the way outgrows what one that is folded may take.
const CHUNKS: u64 = 40_000;

fn cache(dir: &Path) -> Cache {
    let geometry = Geometry::new(CHUNKS * CHUNK, CHUNK).unwrap();
    let (disk, dir, export_id) = (Arc::new(RealDisk::default()), dir.join("disk"), "disk".parse().unwrap());
    Opening {
        disk,
        dir,
        export_id,
        geometry,
        base: Base::default(),
        incarnation: None,
        aside_memory: AsideMemory::new(0),
    }
    .open()
    .unwrap()
}

/// The files hold a log of a MiB, and room for the checkpoint of one.
fn assert_folded(cache: &Cache) {
    for name in [META_FILE, SPARE_FILE] {
        let len = RealDisk::default().open(&cache.dir.join(name)).unwrap().len().unwrap();
        assert!(len <= 2 * LOG_FOLD_BYTES + (64 << 10), "{name} has {len} bytes");
    }
}

#[test]
fn the_log_is_folded_in_the_middle_of_a_long_zeroing() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path());
    cache.zero(ByteRange::new(0, CHUNKS * CHUNK).unwrap(), Edges::Skip, |_| false).unwrap();
    assert_folded(&cache);
}

#[test]
fn the_log_is_folded_while_an_image_is_filled_and_nobody_writes() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path());
    for chunk in 0..cache.geometry().chunk_count() {
        cache.fill(ChunkIndex(chunk), &CONTENT, || true).unwrap();
    }
    assert_folded(&cache);
}

#[test]
fn a_mark_is_refused_before_either_file_is_longer_than_what_is_opened() {
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path());
    let LogFile::Open(log) = &mut *cache.log.lock() else { panic!("it was just made") };
    // As if the space had been taken: the test needs none of it.
    log.here.room = MAX_META_BYTES;
    log.spare.as_mut().unwrap().room = MAX_META_BYTES;
    log.log_start = MAX_CHECKPOINT_BYTES;
    log.end = log.log_start + MAX_LOG_BYTES - RECORD;
    log.take_room_for_a_mark(&RealDisk::default(), dir.path()).unwrap();
    log.end += STEP_BYTES;
    let refused = log.take_room_for_a_mark(&RealDisk::default(), dir.path()).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::FileTooLarge);
    log.seal(1).expect("what was marked can still be sealed");
}
