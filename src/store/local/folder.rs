//! The directory itself, in blocking calls.
//!
//! **The lock** (`flock` on `<root>/.lock`, opened anew each time, so that it excludes threads as well as processes)
//! covers: looking at the object that is there, choosing the new version, making parent folders, rename or unlink,
//! and the fsync of the directory. Nothing is renamed or unlinked without it. Reads take no lock: a file is complete
//! when it gets its name and never changes after.
//!
//! **The version** is modification time, length and inode. The time is set explicitly, under the lock, to be later
//! than that of the object replaced, so that even a rewrite of the same bytes within one tick of the kernel's clock,
//! or after the clock was set back, is a new version.
//!
//! **Tmp files** (`tmp.rs`) are `flock`ed by their writer for as long as it lives. The sweep at open removes those that
//! nobody has locked: never one that another server is still writing. Between the two, a writer that has just made its file
//! and not locked it yet may lose it; it notices, and makes another.

use std::ffi::{CStr, CString, OsStr};
use std::fs::{self, File, FileTimes, TryLockError};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use rustix::fs::{AtFlags, Dir, DirEntry, FileType, OFlags};
use rustix::io::Errno;

use super::beneath::{listable, no_object, open_plain, open_root, step, step_or_make, sync};
use super::tmp::Tmp;
use crate::clock::Clock;
use crate::disk::private::FOLDER_MODE;
use crate::slices::{SLICE_BYTES, slices_mut};
use crate::store::{Condition, Key, MAX_FOLDERS, MAX_LISTED, Object, Version};
use crate::units::ByteRange;

/// How long a write waits for other writers before it gives up. The lock is held for a rename and two fsyncs.
pub const LOCK_PATIENCE: Duration = Duration::from_secs(30);
/// How long a writer that waits for the lock sleeps between two looks.
const LOCK_POLL: Duration = Duration::from_millis(2);
/// By how much a new modification time exceeds the old one: the first step that the file system can express.
const TIME_STEPS: [Duration; 4] =
    [Duration::from_nanos(1), Duration::from_micros(1), Duration::from_millis(1), Duration::from_secs(2)];

const LOCK_FILE: &str = ".lock";
const TMP_DIR: &str = ".tmp";

/// What can be wrong with a request.
#[derive(Debug)]
pub(super) enum Fault {
    /// No such object.
    Missing,
    /// The condition does not hold.
    Changed,
    /// The object is larger than the caller's cap.
    TooLarge { max_bytes: u64 },
    /// The object ends before what was asked of it does.
    Short(String),
    /// The request makes no sense here, and why.
    Forbidden(String),
    /// The disk said no.
    Io(io::Error),
}

impl From<io::Error> for Fault {
    fn from(e: io::Error) -> Self {
        Self::Io(e)
    }
}

impl From<Errno> for Fault {
    fn from(e: Errno) -> Self {
        Self::Io(e.into())
    }
}

/// The store's directory.
#[derive(Debug)]
pub(super) struct Folder {
    root: PathBuf,
    clock: Arc<dyn Clock>,
}

/// The object that stands at a path.
struct Standing {
    modified: SystemTime,
    version: Version,
}

/// Where an object is, or would be: its folders from the root down, and its name in the last.
struct Place {
    folders: Vec<OwnedFd>,
    /// The names of those folders but the root.
    steps: Vec<String>,
    name: String,
    path: PathBuf,
}

impl Place {
    fn folder(&self) -> BorrowedFd<'_> {
        // The root is there at least.
        self.folders[self.folders.len() - 1].as_fd()
    }

    /// What stands there; an error if it is no object.
    fn standing(&self) -> Result<Option<Standing>, Fault> {
        match rustix::fs::statat(self.folder(), &*self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) if FileType::from_raw_mode(found.st_mode) == FileType::RegularFile => {
                let (file, metadata) = self.open()?.ok_or(Fault::Missing)?;
                drop(file);
                Ok(Some(Standing { modified: metadata.modified()?, version: version_of(&metadata) }))
            }
            Ok(_) => Err(no_object(&self.path)),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    fn open(&self) -> Result<Option<(File, fs::Metadata)>, Fault> {
        open_plain(self.folder(), &self.name, OFlags::RDONLY, &self.path)
    }
}

impl Folder {
    /// Creates what is missing and sweeps what was left over.
    pub(super) fn open(root: PathBuf, clock: Arc<dyn Clock>) -> Result<Self, Fault> {
        fs::DirBuilder::new().recursive(true).mode(FOLDER_MODE).create(&root)?;
        let folder = Self { root, clock };
        let root = open_root(&folder.root)?;
        let tmp = step_or_make(&root, TMP_DIR, &folder.root.join(TMP_DIR))?;
        drop(folder.open_lock_file()?);
        sync(&root)?;
        if let Some(parent) = folder.root.canonicalize()?.parent() {
            // The root's own name, too, must outlive a power loss; a parent that may not be read was not ours to make.
            match File::open(parent).and_then(|parent| parent.sync_all()) {
                Err(e) if e.kind() == ErrorKind::PermissionDenied => {}
                other => other?,
            }
        }
        folder.sweep(&tmp)?;
        Ok(folder)
    }

    fn sweep(&self, tmp: &OwnedFd) -> Result<(), Fault> {
        for name in entries(listable(tmp)?)? {
            let (name, _) = name?;
            let path = self.root.join(TMP_DIR).join(OsStr::from_bytes(name.to_bytes()));
            // Another server may sweep, or finish its write, at the same time: what is gone is gone.
            let file = match open_plain(tmp, &*name, OFlags::RDONLY, &path) {
                Ok(Some((file, _))) => file,
                Err(Fault::Forbidden(what)) => {
                    tracing::warn!("left where it is: {what}");
                    continue;
                }
                Ok(None) | Err(_) => continue,
            };
            if file.try_lock().is_ok() && rustix::fs::unlinkat(tmp, &name, AtFlags::empty()).is_ok() {
                tracing::info!(path = %path.display(), "removed what a writer that died had left");
            }
        }
        Ok(())
    }

    fn path(&self, key: &Key) -> Result<PathBuf, Fault> {
        if key.as_str().starts_with('.') {
            return Err(Fault::Forbidden("names at the root that start with a dot are the local store's own".into()));
        }
        Ok(self.root.join(key.as_str()))
    }

    /// Walks to the place of a key, as `step` does it; `None` if a folder on the way is not there.
    fn walk(
        &self,
        key: &Key,
        step: impl Fn(BorrowedFd<'_>, &str, &Path) -> Result<Option<OwnedFd>, Fault>,
    ) -> Result<Option<Place>, Fault> {
        let path = self.path(key)?;
        let (steps, name) = key.as_str().rsplit_once('/').unwrap_or(("", key.as_str()));
        let steps: Vec<_> = steps.split('/').filter(|step| !step.is_empty()).map(str::to_owned).collect();
        let mut folders = vec![open_root(&self.root)?];
        let mut at = self.root.clone();
        for name in &steps {
            at.push(name);
            let Some(next) = step(folders[folders.len() - 1].as_fd(), name, &at)? else { return Ok(None) };
            folders.push(next);
        }
        Ok(Some(Place { folders, steps, name: name.to_owned(), path }))
    }

    fn find(&self, key: &Key) -> Result<Option<Place>, Fault> {
        self.walk(key, |folder, name, path| step(folder, name, path))
    }

    fn open_object(&self, key: &Key) -> Result<(File, fs::Metadata), Fault> {
        self.find(key)?.ok_or(Fault::Missing)?.open()?.ok_or(Fault::Missing)
    }

    /// The whole object.
    pub(super) fn read(&self, key: &Key, max_bytes: u64) -> Result<Object, Fault> {
        let (file, metadata) = self.open_object(key)?;
        if metadata.len() > max_bytes {
            return Err(Fault::TooLarge { max_bytes });
        }
        Ok(Object { bytes: read_exactly(&file, 0, metadata.len())?, version: version_of(&metadata) })
    }

    /// A range of the object.
    pub(super) fn read_range(&self, key: &Key, range: ByteRange) -> Result<Bytes, Fault> {
        let (file, metadata) = self.open_object(key)?;
        if range.end() > metadata.len() {
            return Err(Fault::Short(format!("it ends at byte {}, before {range} does", metadata.len())));
        }
        read_exactly(&file, range.offset(), range.len())
    }

    /// The length of the object in bytes.
    pub(super) fn len(&self, key: &Key) -> Result<u64, Fault> {
        Ok(self.open_object(key)?.1.len())
    }

    /// A new, empty tmp file.
    pub(super) fn tmp(&self) -> Result<Tmp, Fault> {
        let root = open_root(&self.root)?;
        let path = self.root.join(TMP_DIR);
        Tmp::create(step_or_make(root, TMP_DIR, &path)?, &path)
    }

    /// Turns a tmp file into the object, if the condition holds, and returns once that is durable.
    pub(super) fn commit(&self, tmp: Tmp, key: &Key, condition: &Condition) -> Result<Version, Fault> {
        let _lock = self.lock()?;
        let standing = match self.find(key)? {
            Some(place) => place.standing()?,
            None => None,
        };
        let holds = match (condition, &standing) {
            (Condition::Always, _) | (Condition::IfAbsent, None) => true,
            (Condition::IfVersion(expected), Some(standing)) => standing.version == *expected,
            (Condition::IfAbsent, Some(_)) | (Condition::IfVersion(_), None) => false,
        };
        if !holds {
            return Err(Fault::Changed);
        }
        self.date(tmp.file(), standing.map(|s| s.modified))?;
        tmp.file().sync_all()?;
        let made = self.walk(key, |folder, name, path| step_or_make(folder, name, path).map(Some))?;
        let place = made.ok_or(Fault::Missing)?;
        tmp.rename(place.folder(), &place.name)?;
        sync(place.folder())?;
        Ok(version_of(&tmp.file().metadata()?))
    }

    /// Removes the object, and the folders it leaves empty.
    pub(super) fn remove(&self, key: &Key) -> Result<(), Fault> {
        let _lock = self.lock()?;
        let Some(place) = self.find(key)? else { return Ok(()) };
        if place.standing()?.is_none() {
            return Ok(());
        }
        rustix::fs::unlinkat(place.folder(), &*place.name, AtFlags::empty())?;
        sync(place.folder())?;
        // Under the lock no writer is between making a folder and filling it. A folder in use refuses to go.
        for (above, name) in place.folders.iter().zip(&place.steps).rev() {
            if rustix::fs::unlinkat(above, name, AtFlags::REMOVEDIR).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Every object below a prefix, sorted.
    pub(super) fn list(&self, prefix: &Key) -> Result<Vec<Key>, Fault> {
        let mut keys = Vec::new();
        let mut pending = vec![prefix.clone()];
        while let Some(folder) = pending.pop() {
            for entry in self.entries(&folder)? {
                let (name, kind) = entry?;
                let Some(key) = key_below(&folder, &name) else { continue };
                match kind {
                    FileType::Directory => pending.push(key),
                    FileType::RegularFile => keys.push(key),
                    _ => {}
                }
                bound(keys.len() + pending.len(), MAX_LISTED)?;
            }
        }
        keys.sort_unstable();
        Ok(keys)
    }

    /// The folders right below a prefix, sorted.
    pub(super) fn list_folders(&self, prefix: &Key) -> Result<Vec<String>, Fault> {
        let mut names = Vec::new();
        for entry in self.entries(prefix)? {
            let (name, kind) = entry?;
            if kind == FileType::Directory && key_below(prefix, &name).is_some() {
                names.push(name.to_string_lossy().into_owned());
                bound(names.len(), MAX_FOLDERS)?;
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    /// The entries of a folder; none if there is no such folder (any more).
    fn entries(&self, folder: &Key) -> Result<impl Iterator<Item = Result<(CString, FileType), Fault>>, Fault> {
        let found = match self.find(folder)? {
            Some(place) => step(place.folder(), &place.name, &place.path)?,
            None => None,
        };
        let listed = found.map(|folder| entries(listable(folder)?)).transpose()?;
        Ok(listed.into_iter().flatten())
    }

    fn open_lock_file(&self) -> Result<File, Fault> {
        let flags = OFlags::WRONLY | OFlags::CREATE;
        let opened = open_plain(open_root(&self.root)?, LOCK_FILE, flags, &self.root.join(LOCK_FILE))?;
        opened.map(|(file, _)| file).ok_or(Fault::Missing)
    }

    /// The lock, released when the file is dropped.
    fn lock(&self) -> Result<File, Fault> {
        let file = self.open_lock_file()?;
        let deadline = Instant::now() + LOCK_PATIENCE;
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) if Instant::now() < deadline => std::thread::sleep(LOCK_POLL),
                Err(TryLockError::WouldBlock) => {
                    let text = format!(
                        "{} was locked by another writer for {} s",
                        self.root.join(LOCK_FILE).display(),
                        LOCK_PATIENCE.as_secs()
                    );
                    return Err(Fault::Io(io::Error::new(ErrorKind::TimedOut, text)));
                }
                Err(TryLockError::Error(e)) => return Err(e.into()),
            }
        }
    }

    /// Dates a file now, and later than the object it replaces.
    fn date(&self, file: &File, replaced: Option<SystemTime>) -> Result<(), Fault> {
        let now = self.clock.now();
        let Some(replaced) = replaced else {
            return Ok(file.set_times(FileTimes::new().set_modified(now))?);
        };
        for step in TIME_STEPS {
            file.set_times(FileTimes::new().set_modified(now.max(replaced + step)))?;
            // Read back: a file system with coarse time stamps cuts small steps off.
            if file.metadata()?.modified()? > replaced {
                return Ok(());
            }
        }
        Err(Fault::Forbidden("the file system does not keep modification times, which tell versions apart".into()))
    }
}

fn version_of(metadata: &fs::Metadata) -> Version {
    Version(format!("{}.{:09}-{}-{}", metadata.mtime(), metadata.mtime_nsec(), metadata.len(), metadata.ino()))
}

fn read_exactly(file: &File, offset: u64, len: u64) -> Result<Bytes, Fault> {
    let mut bytes = vec![0; usize::try_from(len).map_err(|e| Fault::Forbidden(e.to_string()))?];
    for (slice, at) in slices_mut(&mut bytes).zip((offset..).step_by(SLICE_BYTES)) {
        file.read_exact_at(slice, at).map_err(|e| match e.kind() {
            ErrorKind::UnexpectedEof => io::Error::new(e.kind(), "the file became shorter while it was read"),
            _ => e,
        })?;
    }
    Ok(bytes.into())
}

/// The names in a folder and what they are, without those of the folder itself and the one above.
fn entries(folder: OwnedFd) -> Result<impl Iterator<Item = Result<(CString, FileType), Fault>>, Fault> {
    let listing = Dir::read_from(&folder)?;
    let named = move |entry: rustix::io::Result<DirEntry>| {
        let entry = entry?;
        // A listing names the kind as well on most file systems: no further call per entry.
        let kind = match entry.file_type() {
            FileType::Unknown => {
                let found = rustix::fs::statat(&folder, entry.file_name(), AtFlags::SYMLINK_NOFOLLOW)?;
                FileType::from_raw_mode(found.st_mode)
            }
            known => known,
        };
        Ok((entry.file_name().to_owned(), kind))
    };
    let is_entry = |entry: &Result<(CString, FileType), Fault>| {
        !entry.as_ref().is_ok_and(|(name, _)| matches!(name.to_bytes(), b"." | b".."))
    };
    Ok(listing.map(named).filter(is_entry))
}

/// The key of a folder's entry, unless no key can have that name.
fn key_below(folder: &Key, name: &CStr) -> Option<Key> {
    format!("{folder}/{}", name.to_str().ok()?).parse().ok()
}

fn bound(count: usize, limit: usize) -> Result<(), Fault> {
    if count > limit {
        return Err(Fault::Forbidden(format!("there are more than {limit} names; choose a longer prefix")));
    }
    Ok(())
}
