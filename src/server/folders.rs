//! Folders a start creates, and takes back if it does not come to its end; and the lock that makes the cache root ours.

use std::fs::{DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

/// What lies here are images: for the owner alone.
const DIR_MODE: u32 = 0o700;
/// The lock's name: no export can have it.
const LOCK_NAME: &str = ".lock";
/// How often a lock file may be swept away under our hands by a server that stops.
const MAX_LOCK_ATTEMPTS: usize = 16;

/// Folders that did not exist before. Dropped before [`NewFolders::keep`], they are removed again if they are empty.
#[derive(Debug, Default)]
pub(super) struct NewFolders(Vec<PathBuf>);

impl NewFolders {
    /// Makes `path` and what is missing above it.
    pub(super) fn create(path: &Path) -> io::Result<Self> {
        let missing: Vec<_> =
            path.ancestors().take_while(|folder| !folder.as_os_str().is_empty() && !folder.exists()).collect();
        let mut made = Self::default();
        for folder in missing.into_iter().rev() {
            match DirBuilder::new().mode(DIR_MODE).create(folder) {
                Ok(()) => made.0.push(folder.to_owned()),
                // Somebody else made it since; if it is no folder, what comes next will say so.
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
                Err(e) => return Err(e),
            }
        }
        if path.is_dir() { Ok(made) } else { Err(io::ErrorKind::NotADirectory.into()) }
    }

    /// Those that were made, outermost first.
    pub(super) fn made(&self) -> &[PathBuf] {
        &self.0
    }

    /// The start came to its end: the folders stay.
    pub(super) fn keep(mut self) {
        self.0.clear();
    }
}

impl Drop for NewFolders {
    fn drop(&mut self) {
        for folder in self.0.iter().rev() {
            // A folder that is not empty by now is somebody's.
            let _ = std::fs::remove_dir(folder);
        }
    }
}

/// Why the cache root is not ours.
#[derive(Debug)]
pub(super) enum LockError {
    Taken,
    Io(io::Error),
}

/// The lock on a cache root, held until it is dropped. The kernel lets go of it when the process dies.
#[derive(Debug)]
pub(super) struct CacheLock {
    path: PathBuf,
    _file: File,
}

impl CacheLock {
    pub(super) fn acquire(cache_root: &Path) -> Result<Self, LockError> {
        let path = cache_root.join(LOCK_NAME);
        for _ in 0..MAX_LOCK_ATTEMPTS {
            let file = File::options().create(true).append(true).open(&path).map_err(LockError::Io)?;
            match file.try_lock() {
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => return Err(LockError::Taken),
                Err(TryLockError::Error(e)) => return Err(LockError::Io(e)),
            }
            // A server that stops removes the file: the lock counts only on the one that is still there.
            let ours = file.metadata().map_err(LockError::Io)?;
            if std::fs::metadata(&path).is_ok_and(|found| (found.dev(), found.ino()) == (ours.dev(), ours.ino())) {
                return Ok(Self { path, _file: file });
            }
        }
        Err(LockError::Taken)
    }
}

impl Drop for CacheLock {
    fn drop(&mut self) {
        // Before the lock goes, or it could be another's file. A file left behind locks nobody out.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_taken_back_unless_kept_or_used() {
        let dir = tempfile::tempdir().unwrap();
        let (top, deep) = (dir.path().join("a"), dir.path().join("a/b/c"));
        drop(NewFolders::create(&deep).unwrap());
        assert!(!top.exists());
        let made = NewFolders::create(&deep).unwrap();
        std::fs::write(top.join("file"), "").unwrap();
        drop(made);
        assert!(top.exists() && !top.join("b").exists());
        NewFolders::create(&deep).unwrap().keep();
        assert!(deep.exists());
        drop(NewFolders::create(&deep).unwrap());
        assert!(deep.exists(), "it was there before");
    }

    #[test]
    fn a_folder_below_a_file_is_an_error_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        assert!(NewFolders::create(&file).is_err());
        assert!(NewFolders::create(&file.join("a/b")).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_cache_root_has_one_owner_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let first = CacheLock::acquire(dir.path()).unwrap();
        assert!(matches!(CacheLock::acquire(dir.path()), Err(LockError::Taken)));
        drop(first);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "nothing is left behind");
        let again = CacheLock::acquire(dir.path()).unwrap();
        assert!(matches!(CacheLock::acquire(dir.path()), Err(LockError::Taken)));
        drop(again);
    }

    #[test]
    fn a_lock_file_that_a_crash_left_locks_nobody_out() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(LOCK_NAME), "").unwrap();
        CacheLock::acquire(dir.path()).unwrap();
    }
}
