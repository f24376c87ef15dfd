//! The cache root: a folder that is one server's, held open and locked for as long as the server runs.
//!
//! Guarantees:
//! - One server at a time: the folder itself is locked, and so is `.lock` in it, which servers before 0.2 lock alone. A
//!   removed `.lock` lets nobody else in.
//! - Files are reached through the open folder. If another one takes its path, nothing in that one is touched.
//! - A copy of a cache root is recognised where the file system tells a file from its copy: `.id` holds the inode and the
//!   birth time of itself. Where it does not (a clone of the whole disk), the head in the store tells.

use std::fs::{File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags, openat, renameat, statx, unlinkat};
use serde::{Deserialize, Serialize};

use crate::disk::{RealDisk, identity};
use crate::units::RandomId;

/// Names of files in a cache root: no export can have them.
const LOCK_NAME: &str = ".lock";
const ID_NAME: &str = ".id";
const ID_STAGING: &str = ".id.tmp";
const MAX_ID_BYTES: u64 = 4096;
const ID_VERSION: u64 = 1;
/// How often the folder or its lock file may be replaced while they are being locked, by a server that stops.
const MAX_LOCK_ATTEMPTS: usize = 16;

/// Why a cache root cannot be used.
#[derive(Debug)]
pub(super) enum CacheRootError {
    /// Another server uses it.
    Taken,
    /// It is a copy of another cache root.
    Copied,
    Io(io::Error),
}

impl From<io::Error> for CacheRootError {
    fn from(e: io::Error) -> Self {
        Self::Io(e)
    }
}

impl From<rustix::io::Errno> for CacheRootError {
    fn from(e: rustix::io::Errno) -> Self {
        Self::Io(e.into())
    }
}

/// `.id`: which cache root this is.
#[derive(Debug, Serialize, Deserialize)]
struct Id {
    version: u64,
    cache_root_id: RandomId,
    /// The file itself; `None` on a file system that does not tell when a file was born.
    file: Option<Birth>,
}

/// What a file has and its copy does not.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Birth {
    inode: u64,
    seconds: i64,
    nanoseconds: u32,
}

impl Birth {
    fn of(file: &File) -> io::Result<Option<Self>> {
        let about = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::INO | StatxFlags::BTIME)?;
        let known = StatxFlags::from_bits_retain(about.stx_mask).contains(StatxFlags::INO | StatxFlags::BTIME);
        let born = about.stx_btime;
        Ok(known.then_some(Self { inode: about.stx_ino, seconds: born.tv_sec, nanoseconds: born.tv_nsec }))
    }
}

/// A cache root that is ours until this is dropped. The kernel lets go of the locks when the process dies.
#[derive(Debug)]
pub(super) struct CacheRoot {
    path: PathBuf,
    folder: File,
    _lock: File,
    id: RandomId,
    /// `.id` was made by this start, which has not come to its end.
    id_is_new: bool,
}

impl CacheRoot {
    /// Locks the folder at `path` and finds out which cache root it is.
    pub(super) fn acquire(path: &Path) -> Result<Self, CacheRootError> {
        for _ in 0..MAX_LOCK_ATTEMPTS {
            let folder = File::open(path)?;
            lock(&folder)?;
            let flags = OFlags::CREATE | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = File::from(openat(&folder, LOCK_NAME, flags, Mode::from_raw_mode(0o600))?);
            lock(&file)?;
            // A server that stops removes `.lock`, and a folder may be replaced: locks count on what is still there.
            let (root, lock) = (std::fs::metadata(path), std::fs::metadata(path.join(LOCK_NAME)));
            let in_place = |found: io::Result<std::fs::Metadata>, ours: &File| -> io::Result<bool> {
                let ours = identity(&ours.metadata()?);
                Ok(found.is_ok_and(|found| identity(&found) == ours))
            };
            if in_place(root, &folder)? && in_place(lock, &file)? {
                let mut root =
                    Self { path: path.to_owned(), folder, _lock: file, id: RandomId::generate(), id_is_new: false };
                root.identify()?;
                return Ok(root);
            }
        }
        Err(CacheRootError::Taken)
    }

    /// The id of the cache root, which its copies share.
    pub(super) fn id(&self) -> RandomId {
        self.id
    }

    /// The files below it.
    ///
    /// # Errors
    /// Those of the system, if it has no descriptors left.
    pub(super) fn disk(&self) -> io::Result<RealDisk> {
        Ok(RealDisk::below(&self.path, self.folder.try_clone()?))
    }

    /// The start came to its end: `.id` stays.
    pub(super) fn keep(&mut self) {
        self.id_is_new = false;
    }

    /// Reads the id, or gives one to a cache root that has none.
    fn identify(&mut self) -> Result<(), CacheRootError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match openat(&self.folder, ID_NAME, flags, Mode::empty()) {
            Ok(file) => self.check(File::from(file)),
            Err(rustix::io::Errno::NOENT) => match self.create_id() {
                // The server must start to make room. A later start gives the id.
                Err(e) if matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                    tracing::warn!(
                        "{} is full: its id, by which a copy is recognised, is made later",
                        self.path.display()
                    );
                    Ok(())
                }
                created => Ok(created?),
            },
            Err(e) => Err(e.into()),
        }
    }

    fn check(&mut self, file: File) -> Result<(), CacheRootError> {
        let mut bytes = Vec::new();
        (&file).take(MAX_ID_BYTES).read_to_end(&mut bytes)?;
        let id: Id = serde_json::from_slice(&bytes).map_err(|e| self.unusable(&e.to_string()))?;
        if id.version != ID_VERSION {
            return Err(self
                .unusable(&format!("its version is {}, this server knows {ID_VERSION}", id.version))
                .into());
        }
        if id.file.is_some() && id.file != Birth::of(&file)? {
            return Err(CacheRootError::Copied);
        }
        self.id = id.cache_root_id;
        Ok(())
    }

    fn unusable(&self, problem: &str) -> io::Error {
        let path = self.path.join(ID_NAME);
        let text = format!(
            "{} is not as nbd-server writes it ({problem}); delete it if this folder is no copy of another server's",
            path.display()
        );
        io::Error::new(io::ErrorKind::InvalidData, text)
    }

    fn create_id(&mut self) -> io::Result<()> {
        if let Err(e) = unlinkat(&self.folder, ID_STAGING, AtFlags::empty())
            && e != rustix::io::Errno::NOENT
        {
            return Err(e.into());
        }
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
        let mut file = File::from(openat(&self.folder, ID_STAGING, flags, Mode::from_raw_mode(0o600))?);
        let id = Id { version: ID_VERSION, cache_root_id: self.id, file: Birth::of(&file)? };
        // Plain fields always serialize.
        file.write_all(&serde_json::to_vec_pretty(&id).unwrap_or_default())?;
        file.sync_all()?;
        renameat(&self.folder, ID_STAGING, &self.folder, ID_NAME)?;
        self.folder.sync_all()?;
        self.id_is_new = true;
        Ok(())
    }
}

impl Drop for CacheRoot {
    fn drop(&mut self) {
        // Before the locks go, or these could be another's files. A file left behind locks nobody out.
        let _ = unlinkat(&self.folder, LOCK_NAME, AtFlags::empty());
        if self.id_is_new {
            let _ = unlinkat(&self.folder, ID_NAME, AtFlags::empty());
        }
    }
}

fn lock(file: &File) -> Result<(), CacheRootError> {
    match file.try_lock() {
        Ok(()) => Ok(()),
        Err(TryLockError::WouldBlock) => Err(CacheRootError::Taken),
        // NFS locks no folder, which its `.lock` makes up for.
        Err(TryLockError::Error(e)) if file.metadata()?.is_dir() => {
            tracing::debug!("the cache root itself cannot be locked, {LOCK_NAME} in it is: {e}");
            Ok(())
        }
        Err(TryLockError::Error(e)) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(dir: &Path) -> Vec<String> {
        let mut names: Vec<_> =
            std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn acquire_and_keep(dir: &Path) -> CacheRoot {
        let mut root = CacheRoot::acquire(dir).unwrap();
        root.keep();
        root
    }

    #[test]
    fn a_cache_root_has_one_owner_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = acquire_and_keep(dir.path());
        let id = first.id();
        assert!(matches!(CacheRoot::acquire(dir.path()), Err(CacheRootError::Taken)));
        drop(first);
        assert_eq!(names(dir.path()), [ID_NAME], "the lock file is gone");
        let again = CacheRoot::acquire(dir.path()).unwrap();
        assert_eq!(again.id(), id);
        assert!(matches!(CacheRoot::acquire(dir.path()), Err(CacheRootError::Taken)));
    }

    #[test]
    fn a_removed_lock_file_lets_no_second_server_in() {
        let dir = tempfile::tempdir().unwrap();
        let _first = acquire_and_keep(dir.path());
        std::fs::remove_file(dir.path().join(LOCK_NAME)).unwrap();
        assert!(matches!(CacheRoot::acquire(dir.path()), Err(CacheRootError::Taken)));
    }

    #[test]
    fn a_lock_file_that_a_crash_left_locks_nobody_out() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(LOCK_NAME), "").unwrap();
        CacheRoot::acquire(dir.path()).unwrap();
    }

    #[test]
    fn a_fifo_as_lock_file_or_id_is_an_error_and_no_hang() {
        for name in [LOCK_NAME, ID_NAME] {
            let dir = tempfile::tempdir().unwrap();
            let fifo = rustix::fs::FileType::Fifo;
            rustix::fs::mknodat(rustix::fs::CWD, dir.path().join(name), fifo, Mode::from_raw_mode(0o600), 0).unwrap();
            assert!(matches!(CacheRoot::acquire(dir.path()), Err(CacheRootError::Io(_))), "{name}");
        }
    }

    #[test]
    fn a_fifo_in_the_place_of_a_new_id_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, dir.path().join(ID_STAGING), fifo, Mode::from_raw_mode(0o600), 0).unwrap();
        let id = acquire_and_keep(dir.path()).id();
        assert_eq!(acquire_and_keep(dir.path()).id(), id);
    }

    #[test]
    fn a_start_that_fails_leaves_no_file_in_a_new_cache_root() {
        let dir = tempfile::tempdir().unwrap();
        drop(CacheRoot::acquire(dir.path()).unwrap());
        assert_eq!(names(dir.path()), [""; 0]);
    }

    #[test]
    fn a_copy_of_a_cache_root_is_refused_until_its_id_is_deleted() {
        let (dir, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let id = acquire_and_keep(dir.path()).id();
        std::fs::copy(dir.path().join(ID_NAME), copy.path().join(ID_NAME)).unwrap();
        assert!(matches!(CacheRoot::acquire(copy.path()), Err(CacheRootError::Copied)));
        std::fs::remove_file(copy.path().join(ID_NAME)).unwrap();
        assert_ne!(acquire_and_keep(copy.path()).id(), id);
        // A folder that was moved is none.
        let moved = dir.path().parent().unwrap().join(format!("{id}"));
        std::fs::rename(dir.path(), &moved).unwrap();
        assert_eq!(acquire_and_keep(&moved).id(), id);
        std::fs::remove_dir_all(moved).unwrap();
    }

    #[test]
    fn an_id_that_cannot_be_read_is_named() {
        for text in ["", "{}", r#"{"version":2,"cache_root_id":"0123456789abcdef0123456789abcdef","file":null}"#] {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join(ID_NAME), text).unwrap();
            let Err(CacheRootError::Io(refused)) = CacheRoot::acquire(dir.path()) else { panic!("{text}") };
            assert!(refused.to_string().contains(ID_NAME), "{refused}");
        }
    }
}
