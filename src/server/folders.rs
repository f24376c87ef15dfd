//! Folders that a start creates, and removes again if it fails.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// What lies here are images: for the owner alone.
const DIR_MODE: u32 = 0o700;

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
}
