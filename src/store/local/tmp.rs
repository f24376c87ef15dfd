//! A file on its way to become an object.
//!
//! The chunks of a blob go past the page cache to a disk of this machine, if their place in memory allows it. On their way
//! through it they would be copied once more, drive out what clients read and write, and wait for a sync that has
//! gigabytes to write: all of that at the cost of the clients of the same machine. The disk is waited for slice by slice,
//! as longer writes keep the core for longer before they wait; so what is far away is written the other way.

use std::fs::{File, TryLockError};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use rustix::fs::{AtFlags, OFlags};

use super::beneath::open_plain;
use super::folder::Fault;
use crate::disk::{DIRECT_ALIGNMENT, Medium};
use crate::slices::{SLICE_BYTES, slices};
use crate::units::RandomId;

/// How many files are made until one is not taken by the sweep of a server that starts at that very moment.
const CREATE_ATTEMPTS: usize = 100;
/// What lies between two of them, so that the sweep is over and does not find each new one.
const SWEEP_TIME: Duration = Duration::from_millis(2);

/// A file that nobody knows but its writer; removed when dropped before it got a name.
#[derive(Debug)]
pub(super) struct Tmp {
    folder: OwnedFd,
    name: String,
    path: PathBuf,
    file: File,
    len: u64,
    /// The same file, past the page cache.
    direct: Option<File>,
}

/// Locks a file that was just made, against sweeps; `false` if one has been faster.
fn is_ours(file: &File) -> io::Result<bool> {
    match file.try_lock() {
        Ok(()) => Ok(file.metadata()?.nlink() > 0),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(e)) => Err(e),
    }
}

impl Tmp {
    /// A new, empty one in a folder that errors call `dir`.
    pub(super) fn create(folder: OwnedFd, dir: &Path) -> Result<Self, Fault> {
        for _ in 0..CREATE_ATTEMPTS {
            // Never a name again: a sweep may still be about to remove what had it.
            let name = RandomId::generate().to_string();
            let path = dir.join(&name);
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL;
            let Some((file, _)) = open_plain(&folder, &name, flags, &path)? else { continue };
            if is_ours(&file)? {
                return Ok(Self { folder, name, path, file, len: 0, direct: None });
            }
            std::thread::sleep(SWEEP_TIME);
        }
        let text = format!("what is made in {} is removed at once, {CREATE_ATTEMPTS} times in a row", dir.display());
        Err(Fault::Io(io::Error::other(text)))
    }

    /// The same, for a blob.
    pub(super) fn for_blob(mut self) -> Self {
        if Medium::of(&self.file) == Medium::Disk {
            // One that cannot do it says so here, or at the first write.
            let opened = open_plain(&self.folder, &self.name, OFlags::WRONLY | OFlags::DIRECT, &self.path);
            self.direct = opened.ok().flatten().map(|(file, _)| file);
        }
        self
    }

    /// Gives it its name, in place of what has it.
    pub(super) fn rename(&self, folder: impl AsFd, name: &str) -> Result<(), Fault> {
        Ok(rustix::fs::renameat(&self.folder, &self.name, folder, name)?)
    }

    pub(super) fn file(&self) -> &File {
        &self.file
    }

    /// Adds the pieces, in order.
    pub(super) fn append(mut self, pieces: &[Bytes]) -> Result<Self, Fault> {
        for piece in pieces {
            let written = self.append_directly(piece)?;
            for slice in slices(&piece[written..]) {
                self.file.write_all_at(slice, self.len)?;
                self.len += slice.len() as u64;
            }
        }
        Ok(self)
    }

    /// Adds what can go past the page cache of a piece: all of it, or nothing, as a rule; how many bytes that was.
    fn append_directly(&mut self, piece: &[u8]) -> Result<usize, Fault> {
        let places = [piece.as_ptr().addr() as u64, piece.len() as u64, self.len];
        if piece.len() < SLICE_BYTES || !places.iter().all(|place| place.is_multiple_of(DIRECT_ALIGNMENT as u64)) {
            return Ok(0);
        }
        let mut written = 0;
        for slice in slices(piece) {
            let Some(direct) = &self.direct else { break };
            match direct.write_all_at(slice, self.len) {
                Ok(()) => {
                    written += slice.len();
                    self.len += slice.len() as u64;
                }
                // It asks for more than that: the rest goes the other way.
                Err(e) if e.kind() == ErrorKind::InvalidInput => self.direct = None,
                Err(e) => return Err(e.into()),
            }
        }
        Ok(written)
    }

    /// Makes what was written durable.
    pub(super) fn sync(self) -> Result<Self, Fault> {
        self.file.sync_all()?;
        Ok(self)
    }
}

impl Drop for Tmp {
    fn drop(&mut self) {
        // After a commit the name is gone; after a crash the sweep does this.
        let _ = rustix::fs::unlinkat(&self.folder, &self.name, AtFlags::empty());
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    /// A piece of a blob: its bytes, and how far behind the beginning of a page they lie in memory.
    fn piece() -> impl Strategy<Value = (usize, usize)> {
        const PAGE: usize = 4096;
        let pages = prop_oneof![Just(1), Just(SLICE_BYTES / PAGE), Just(SLICE_BYTES / PAGE * 3), 1..200usize];
        let len = prop_oneof![3 => pages.prop_map(|pages| pages * PAGE), 1 => 1..3 * SLICE_BYTES];
        (len, prop_oneof![3 => Just(0), 1 => 1..PAGE])
    }

    #[test]
    fn a_file_that_a_sweep_holds_or_has_removed_is_left_to_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new");
        let open = || File::options().write(true).create(true).truncate(false).open(&path).unwrap();
        let (file, sweep) = (open(), open());
        sweep.lock().unwrap();
        assert!(!is_ours(&file).unwrap());
        fs::remove_file(&path).unwrap();
        drop(sweep);
        assert!(!is_ours(&file).unwrap());
        assert!(is_ours(&open()).unwrap());
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(50))]

        #[test]
        fn a_blob_is_what_its_pieces_are_whichever_way_each_of_them_went(
            pieces in prop::collection::vec(piece(), 0..8), directly: bool, refused: bool,
        ) {
            let dir = tempfile::tempdir_in("/var/tmp").unwrap();
            let folder = crate::store::local::beneath::open_root(dir.path()).unwrap();
            let mut tmp = Tmp::create(folder, dir.path()).unwrap();
            if directly {
                tmp = tmp.for_blob();
            }
            if refused {
                // As a disk with larger sectors does it: this file takes numbers alone, and no byte below is a digit.
                tmp.direct = Some(File::options().write(true).open("/proc/self/oom_score_adj").unwrap());
            }
            let mut all = Vec::new();
            for (i, (len, behind)) in pieces.into_iter().enumerate() {
                let memory: Vec<u8> = (0..len + 2 * 4096).map(|at| u8::try_from((at / 7 + i) % 47).unwrap()).collect();
                let start = memory.as_ptr().addr().next_multiple_of(4096) - memory.as_ptr().addr() + behind;
                let piece = Bytes::from_owner(memory).slice(start..start + len);
                all.extend_from_slice(&piece);
                tmp = tmp.append(&[piece]).unwrap();
            }
            let tmp = tmp.sync().unwrap();
            prop_assert!(fs::read(&tmp.path).unwrap() == all);
        }
    }
}
