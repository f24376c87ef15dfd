//! Modes of files and folders that hold image data: for their owner alone.
//!
//! What the server creates has these modes from creation ([`FILE_MODE`], [`FOLDER_MODE`]). What an earlier version, a copy
//! or a restore left wider is narrowed by [`narrow`], if it belongs to the server's user. Links are never followed.

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;

/// The mode of a file that holds image data.
pub(crate) const FILE_MODE: u32 = 0o600;
/// The mode of a folder that holds such files.
pub(crate) const FOLDER_MODE: u32 = 0o700;
/// What group and others may do.
const WIDER: u32 = 0o077;
/// How many files and folders one pass looks at, so that no tree of another purpose holds up a start.
const MAX_LOOKED_AT: u64 = 100_000;
/// How deep it goes: each level keeps a descriptor open.
const MAX_DEPTH: usize = 32;

/// What was wider than it should be.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Wider {
    /// How many files and folders are now for their owner alone.
    pub(crate) narrowed: u64,
    /// How many belong to another user, or cannot be changed, and stay as they are.
    pub(crate) left: u64,
    /// The first of all of them, and its mode.
    pub(crate) first: Option<(PathBuf, u32)>,
    looked_at: u64,
}

impl Wider {
    /// Says so in the log, in one line; `what` names the kind of folder.
    pub(crate) fn report(&self, what: &str) {
        let Some((path, mode)) = &self.first else { return };
        let remedy = match self.left {
            0 => String::new(),
            left => format!("; {left} belong to another user and stay so: chmod go= them, or move them away"),
        };
        tracing::warn!(
            "{what}: other users of this machine had access to {} files and folders (the first is {}, mode {mode:04o}); \
             {} are now for their owner alone{remedy}",
            self.narrowed + self.left,
            path.display(),
            self.narrowed
        );
    }
}

/// Narrows a folder and all below it. A folder that is for its owner alone keeps others from what is in it, so the pass
/// ends there.
pub(crate) fn narrow(folder: &Path, wider: &mut Wider) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    match rustix::fs::openat(CWD, folder, flags, Mode::empty()) {
        Ok(fd) => wider.folder(&fd, folder, 0),
        // A link, a file, nothing: none of it is a folder of images.
        Err(Errno::NOTDIR | Errno::LOOP | Errno::NOENT) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

impl Wider {
    fn folder(&mut self, folder: &OwnedFd, path: &Path, depth: usize) -> io::Result<()> {
        if rustix::fs::fstat(folder)?.st_mode & WIDER == 0 || depth == MAX_DEPTH {
            return Ok(());
        }
        for entry in Dir::read_from(folder)? {
            let entry = entry?;
            if matches!(entry.file_name().to_bytes(), b"." | b"..") {
                continue;
            }
            if self.looked_at == MAX_LOOKED_AT {
                return Ok(());
            }
            self.looked_at += 1;
            let path = path.join(entry.file_name().to_string_lossy().as_ref());
            match self.entry(folder, entry.file_name(), &path, depth) {
                // What cannot be opened is not ours, or gone by now.
                Ok(()) | Err(_) => {}
            }
        }
        // After what is in it: a pass that is interrupted begins anew.
        self.one(folder, path)
    }

    fn entry(&mut self, folder: &OwnedFd, name: &CStr, path: &Path, depth: usize) -> io::Result<()> {
        let found = rustix::fs::statat(folder, name, rustix::fs::AtFlags::SYMLINK_NOFOLLOW)?;
        let kind = FileType::from_raw_mode(found.st_mode);
        if found.st_mode & WIDER == 0 || !matches!(kind, FileType::RegularFile | FileType::Directory) {
            return Ok(());
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(folder, name, flags, Mode::empty())?;
        match kind {
            FileType::Directory => self.folder(&fd, path, depth + 1),
            _ => self.one(&fd, path),
        }
    }

    fn one(&mut self, fd: impl AsFd, path: &Path) -> io::Result<()> {
        let found = rustix::fs::fstat(&fd)?;
        if found.st_mode & WIDER == 0 {
            return Ok(());
        }
        let mode = found.st_mode & 0o7777;
        self.first.get_or_insert_with(|| (path.to_owned(), mode));
        let ours = found.st_uid == rustix::process::geteuid().as_raw();
        if ours && rustix::fs::fchmod(&fd, Mode::from_raw_mode(mode & !WIDER)).is_ok() {
            self.narrowed += 1;
        } else {
            self.left += 1;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn what_others_may_read_is_narrowed_down_to_the_last_file_and_links_are_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        let (folder, elsewhere) = (dir.path().join("vm"), dir.path().join("elsewhere"));
        fs::create_dir_all(folder.join("a/b")).unwrap();
        fs::write(folder.join("a/b/blob"), "").unwrap();
        fs::write(&elsewhere, "").unwrap();
        std::os::unix::fs::symlink(&elsewhere, folder.join("link")).unwrap();
        for (path, mode) in [(".", 0o755), ("a", 0o750), ("a/b", 0o755), ("a/b/blob", 0o644)] {
            fs::set_permissions(folder.join(path), Permissions::from_mode(mode)).unwrap();
        }
        fs::set_permissions(&elsewhere, Permissions::from_mode(0o644)).unwrap();

        let mut wider = Wider::default();
        narrow(&folder, &mut wider).unwrap();
        assert_eq!((wider.narrowed, wider.left), (4, 0));
        for (path, wanted) in [(".", 0o700), ("a", 0o700), ("a/b", 0o700), ("a/b/blob", 0o600)] {
            assert_eq!(mode(&folder.join(path)), wanted, "{path}");
        }
        assert_eq!(mode(&elsewhere), 0o644);

        let mut again = Wider::default();
        narrow(&folder, &mut again).unwrap();
        narrow(&folder.join("link"), &mut again).unwrap();
        assert_eq!(again, Wider::default());
    }
}
