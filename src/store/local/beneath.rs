//! Names below the store's root, reached step by step over descriptors of folders.
//!
//! Promises: nothing outside the root is reached, and no open waits. A link is never followed, at no step; what is neither a
//! folder nor a plain file is an error that names it, judged on the descriptor.

use std::fs::{File, Metadata};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::path::Arg;

use super::folder::Fault;
use crate::disk::private::{FILE_MODE, FOLDER_MODE};

/// A folder that is walked through: no permission to list it is needed.
const STEP: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// The store's root. It may itself be reached through links: its path is the user's.
pub(super) fn open_root(root: &Path) -> io::Result<OwnedFd> {
    rustix::fs::openat(CWD, root, STEP, Mode::empty()).map_err(|e| {
        let e = io::Error::from(e);
        io::Error::other(format!("the store's folder {} cannot be opened: {e}", root.display()))
    })
}

/// The folder of that name in another, if it is there. `path` is what errors call it.
pub(super) fn step(folder: impl AsFd, name: &str, path: &Path) -> Result<Option<OwnedFd>, Fault> {
    match rustix::fs::openat(&folder, name, STEP | OFlags::NOFOLLOW, Mode::empty()) {
        Ok(fd) => Ok(Some(fd)),
        Err(Errno::NOENT) => Ok(None),
        Err(Errno::NOTDIR | Errno::LOOP) => match kind(&folder, name)? {
            // A plain file is an object, below which there is nothing.
            None | Some(FileType::RegularFile) => Ok(None),
            Some(_) => Err(Fault::Forbidden(format!(
                "{} is a link or a special file where a folder of the store should be: put the folder itself in its place",
                path.display()
            ))),
        },
        Err(e) => Err(e.into()),
    }
}

/// The same, made for its owner alone if it is not there, and durable in the folder above.
pub(super) fn step_or_make(folder: impl AsFd, name: &str, path: &Path) -> Result<OwnedFd, Fault> {
    if let Some(fd) = step(&folder, name, path)? {
        return Ok(fd);
    }
    match rustix::fs::mkdirat(&folder, name, Mode::from_raw_mode(FOLDER_MODE)) {
        Ok(()) => sync(&folder)?,
        // A plain file is in the way, or another server has made it just now.
        Err(Errno::EXIST) => {}
        Err(e) => return Err(e.into()),
    }
    step(&folder, name, path)?.ok_or_else(|| Fault::Io(io::ErrorKind::NotADirectory.into()))
}

/// What has that name in a folder, links not followed.
fn kind(folder: impl AsFd, name: &str) -> Result<Option<FileType>, Fault> {
    match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(found) => Ok(Some(FileType::from_raw_mode(found.st_mode))),
        Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Opens the plain file of that name; `None` if there is none. Never waits: not for the other end of a pipe, either.
pub(super) fn open_plain(
    folder: impl AsFd,
    name: impl Arg,
    flags: OFlags,
    path: &Path,
) -> Result<Option<(File, Metadata)>, Fault> {
    let flags = flags | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(folder, name, flags, Mode::from_raw_mode(FILE_MODE)) {
        Ok(fd) => File::from(fd),
        Err(Errno::NOENT) => return Ok(None),
        // A link; a socket, or a pipe that nothing reads; a folder.
        Err(Errno::LOOP | Errno::NXIO | Errno::NODEV | Errno::ISDIR) => return Err(no_object(path)),
        Err(e) => return Err(e.into()),
    };
    let metadata = file.metadata()?;
    if metadata.is_file() { Ok(Some((file, metadata))) } else { Err(no_object(path)) }
}

pub(super) fn no_object(path: &Path) -> Fault {
    Fault::Forbidden(format!(
        "{} is a folder, a link or a special file where a plain file should be; remove it or choose another name",
        path.display()
    ))
}

/// The folder, opened to be listed or synced.
pub(super) fn listable(folder: impl AsFd) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(folder, ".", flags, Mode::empty())?)
}

/// Makes the names in a folder durable.
pub(super) fn sync(folder: impl AsFd) -> io::Result<()> {
    Ok(rustix::fs::fsync(listable(folder)?)?)
}
