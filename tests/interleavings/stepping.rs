//! A disk each of whose operations is a point at which another thread may go on, and whose `cache.raw` is read and
//! written piece by piece, as the kernel does it.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nbd_server::cache::RAW_FILE;
use nbd_server::disk::{Disk, DiskFile};
use nbd_server::units::ByteRange;

use super::sim::SimDisk;

/// What is read or written in one step.
pub const PIECE: usize = 2048;

#[derive(Debug)]
pub struct SteppingDisk {
    below: SimDisk,
    turns: Arc<Turns>,
}

#[derive(Debug)]
struct SteppingFile {
    below: Arc<dyn DiskFile>,
    turns: Arc<Turns>,
    /// It is the image: torn while others look, and its next sync may be made to fail.
    raw: bool,
}

/// The scheduler's chances to go on elsewhere.
#[derive(Debug, Default)]
struct Turns {
    /// Any operation on it is such a chance, without the wish to be passed over that a yield would be.
    point: shuttle::sync::atomic::AtomicBool,
    /// What comes before the scenario needs none.
    begun: AtomicBool,
    fails_next_sync: AtomicBool,
}

impl Turns {
    fn take(&self) {
        if self.begun.load(Ordering::Relaxed) {
            self.point.load(Ordering::SeqCst);
        }
    }
}

impl SteppingDisk {
    pub fn new(below: SimDisk) -> Self {
        Self { below, turns: Arc::default() }
    }

    /// From here on each operation is a step.
    pub fn begin(&self) {
        self.turns.begun.store(true, Ordering::Relaxed);
    }

    /// The next sync of the image fails, and as in the kernel only that one.
    pub fn fail_next_sync(&self) {
        self.turns.fails_next_sync.store(true, Ordering::Relaxed);
    }

    fn file(&self, path: &Path, below: Arc<dyn DiskFile>) -> Arc<dyn DiskFile> {
        Arc::new(SteppingFile { below, turns: Arc::clone(&self.turns), raw: path.ends_with(RAW_FILE) })
    }
}

impl Disk for SteppingDisk {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.turns.take();
        Ok(self.file(path, self.below.open(path)?))
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        self.turns.take();
        Ok(self.file(path, self.below.create(path)?))
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.turns.take();
        self.below.rename(from, to)
    }

    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        self.turns.take();
        self.below.exchange(a, b)
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.turns.take();
        self.below.remove(path)
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        self.below.create_dir(path)
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.below.remove_dir(path)
    }

    fn list_dir(&self, path: &Path) -> io::Result<Vec<String>> {
        self.turns.take();
        self.below.list_dir(path)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.turns.take();
        self.below.sync_dir(path)
    }

    fn boot_id(&self) -> io::Result<[u8; 16]> {
        self.below.boot_id()
    }
}

impl DiskFile for SteppingFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        for (at, piece) in (offset..).step_by(PIECE).zip(buf.chunks_mut(PIECE)) {
            self.turns.take();
            self.below.read_at(piece, at)?;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let piece_bytes = if self.raw { PIECE } else { buf.len().max(1) };
        for (at, piece) in (offset..).step_by(piece_bytes).zip(buf.chunks(piece_bytes)) {
            self.turns.take();
            self.below.write_at(piece, at)?;
        }
        Ok(())
    }

    fn len(&self) -> io::Result<u64> {
        self.below.len()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.turns.take();
        self.below.set_len(len)
    }

    fn punch(&self, range: ByteRange) -> io::Result<()> {
        self.turns.take();
        self.below.punch(range)
    }

    fn allocate(&self, range: ByteRange) -> io::Result<()> {
        self.turns.take();
        self.below.allocate(range)
    }

    fn has_data(&self) -> io::Result<bool> {
        self.below.has_data()
    }

    fn is_at(&self, path: &Path) -> io::Result<bool> {
        self.below.is_at(path)
    }

    fn sync(&self) -> io::Result<()> {
        self.turns.take();
        if self.raw && self.turns.fails_next_sync.swap(false, Ordering::Relaxed) {
            return Err(io::Error::other("the device is gone"));
        }
        // What is written from here on it may cover or not: it counts from the start, where less is promised.
        self.below.sync()?;
        self.turns.take();
        Ok(())
    }
}
