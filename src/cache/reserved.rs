//! Small files that are replaced in one step, on a full disk as well: their room is taken ahead of need (L7).
//!
//! Beside the file, or in its place while there is none, lie two spare files. One of them is written and synced, then it
//! gets the file's name: by an exchange if there is a file, so that neither gives up its space. A removal renames the file
//! to a spare. All of them are padded with spaces to the same length, which JSON allows.
//!
//! A spare is written only once it is durable that it is one: until then a power loss may give it the file's name again.

use std::io;
use std::path::Path;
use std::sync::Arc;

use crate::disk::{self, Disk, DiskFile};
use crate::sabotage::{Rule, breaks};
use crate::units::ByteRange;

/// What a file takes on the disk, in bytes; one with more content takes a multiple of it, which may find no room.
const ROOM_BYTES: u64 = 4096;

/// A small file, by its name in its folder, and its spares.
#[derive(Debug, Clone, Copy)]
pub struct Reserved {
    /// The file's name.
    pub name: &'static str,
    /// The names of the spares; the first is the file's former self while there is none.
    pub spares: [&'static str; 2],
    /// The most that a file of that name may have, in bytes.
    pub max_bytes: u64,
}

fn open(disk: &dyn Disk, path: &Path) -> io::Result<Option<Arc<dyn DiskFile>>> {
    match disk.open(path) {
        Ok(file) => Ok(Some(file)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
    }
}

impl Reserved {
    /// Takes the room of the file and its spares, as far as it is not taken.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn reserve(&self, disk: &dyn Disk, dir: &Path) -> io::Result<()> {
        let there = open(disk, &dir.join(self.name))?.is_some();
        for spare in self.spares.iter().skip(usize::from(there)) {
            let path = dir.join(spare);
            let file = open(disk, &path)?.map_or_else(|| disk.create(&path), Ok)?;
            if file.len()? < ROOM_BYTES
                && let Some(all) = ByteRange::new(0, ROOM_BYTES)
            {
                file.allocate(all)?;
            }
        }
        Ok(())
    }

    /// The content, or `None` if there is no file.
    ///
    /// # Errors
    /// Those of the disk, and a file that is too long.
    pub fn load(&self, disk: &dyn Disk, dir: &Path) -> io::Result<Option<Vec<u8>>> {
        disk::read_file(disk, &dir.join(self.name), self.max_bytes)
    }

    /// Replaces the file, durably.
    ///
    /// # Errors
    /// Those of the disk; the old content is still there unless the last step, the sync of the folder, failed.
    pub fn store(&self, disk: &dyn Disk, dir: &Path, bytes: &[u8]) -> io::Result<()> {
        if !breaks(Rule::WriteSpareAtOnce) {
            disk.sync_dir(dir)?;
        }
        let path = dir.join(self.name);
        let there = open(disk, &path)?.is_some();
        let spare = dir.join(self.spares[usize::from(there)]);
        write(disk, &spare, bytes)?;
        let exchanged = there.then(|| disk.exchange(&spare, &path));
        match exchanged {
            Some(Err(e)) if e.kind() != io::ErrorKind::Unsupported => return Err(e),
            Some(Ok(())) => {}
            _ => disk.rename(&spare, &path)?,
        }
        disk.sync_dir(dir)
    }

    /// Removes the file, durably.
    ///
    /// # Errors
    /// Those of the disk.
    pub fn remove(&self, disk: &dyn Disk, dir: &Path) -> io::Result<()> {
        let path = dir.join(self.name);
        if open(disk, &path)?.is_some() {
            disk.rename(&path, &dir.join(self.spares[0]))?;
        }
        disk.sync_dir(dir)
    }
}

fn write(disk: &dyn Disk, path: &Path, bytes: &[u8]) -> io::Result<()> {
    let room = usize::try_from(ROOM_BYTES).map_err(io::Error::other)?;
    let mut padded = bytes.to_vec();
    padded.resize(bytes.len().next_multiple_of(room), b' ');
    let file = open(disk, path)?.map_or_else(|| disk.create(path), Ok)?;
    file.write_at(&padded, 0)?;
    let len = padded.len() as u64;
    if file.len()? != len {
        file.set_len(len)?;
    }
    file.sync()
}
