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

use std::fs::{self, File, FileTimes, TryLockError};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::tmp::Tmp;
use crate::clock::Clock;
use crate::slices::{SLICE_BYTES, slices_mut};
use crate::store::{Condition, Key, MAX_LISTED, Object, Version};
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

impl Folder {
    /// Creates what is missing and sweeps what was left over.
    pub(super) fn open(root: PathBuf, clock: Arc<dyn Clock>) -> io::Result<Self> {
        fs::create_dir_all(root.join(TMP_DIR))?;
        let folder = Self { root, clock };
        drop(folder.open_lock_file()?);
        sync_dir(&folder.root)?;
        if let Some(parent) = folder.root.canonicalize()?.parent() {
            // The root's own name, too, must outlive a power loss; a parent that may not be read was not ours to make.
            match sync_dir(parent) {
                Err(e) if e.kind() == ErrorKind::PermissionDenied => {}
                other => other?,
            }
        }
        folder.sweep()?;
        Ok(folder)
    }

    fn sweep(&self) -> io::Result<()> {
        for entry in fs::read_dir(self.root.join(TMP_DIR))? {
            let path = entry?.path();
            // Another server may sweep, or finish its write, at the same time: what is gone is gone.
            let Ok(file) = File::open(&path) else { continue };
            if file.try_lock().is_ok() && fs::remove_file(&path).is_ok() {
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

    /// The whole object.
    pub(super) fn read(&self, key: &Key, max_bytes: u64) -> Result<Object, Fault> {
        let (file, metadata) = open_object(&self.path(key)?)?;
        if metadata.len() > max_bytes {
            return Err(Fault::TooLarge { max_bytes });
        }
        Ok(Object { bytes: read_exactly(&file, 0, metadata.len())?, version: version_of(&metadata) })
    }

    /// A range of the object.
    pub(super) fn read_range(&self, key: &Key, range: ByteRange) -> Result<Bytes, Fault> {
        let (file, metadata) = open_object(&self.path(key)?)?;
        if range.end() > metadata.len() {
            return Err(Fault::Short(format!("it ends at byte {}, before {range} does", metadata.len())));
        }
        read_exactly(&file, range.offset(), range.len())
    }

    /// The length of the object in bytes.
    pub(super) fn len(&self, key: &Key) -> Result<u64, Fault> {
        Ok(open_object(&self.path(key)?)?.1.len())
    }

    /// A new, empty tmp file.
    pub(super) fn tmp(&self) -> Result<Tmp, Fault> {
        Tmp::create(&self.root.join(TMP_DIR))
    }

    /// Turns a tmp file into the object, if the condition holds, and returns once that is durable.
    pub(super) fn commit(&self, tmp: Tmp, key: &Key, condition: &Condition) -> Result<Version, Fault> {
        let path = self.path(key)?;
        let _lock = self.lock()?;
        let standing = standing(&path)?;
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
        let parent = path.parent().unwrap_or(&self.root);
        make_folders(parent)?;
        fs::rename(tmp.path(), &path)?;
        sync_dir(parent)?;
        Ok(version_of(&tmp.file().metadata()?))
    }

    /// Removes the object, and the folders it leaves empty.
    pub(super) fn remove(&self, key: &Key) -> Result<(), Fault> {
        let path = self.path(key)?;
        let _lock = self.lock()?;
        if standing(&path)?.is_none() {
            return Ok(());
        }
        fs::remove_file(&path)?;
        let folders = path.ancestors().skip(1).take_while(|folder| *folder != self.root);
        for (depth, folder) in folders.enumerate() {
            if depth == 0 {
                sync_dir(folder)?;
            }
            // Under the lock no writer is between making a folder and filling it. A folder in use refuses to go.
            if fs::remove_dir(folder).is_err() {
                break;
            }
        }
        Ok(())
    }

    /// Every object below a prefix, sorted.
    pub(super) fn list(&self, prefix: &Key) -> Result<Vec<Key>, Fault> {
        let mut keys = Vec::new();
        let mut pending = vec![(self.path(prefix)?, prefix.as_str().to_owned())];
        while let Some((folder, name)) = pending.pop() {
            for entry in entries(&folder)? {
                let entry = entry?;
                let Some(key) = key_below(&name, &entry) else { continue };
                // readdir names the type as well: no further call per entry.
                let kind = entry.file_type()?;
                if kind.is_dir() {
                    pending.push((entry.path(), key.as_str().to_owned()));
                } else if kind.is_file() {
                    keys.push(key);
                }
                bound(keys.len() + pending.len())?;
            }
        }
        keys.sort_unstable();
        Ok(keys)
    }

    /// The folders right below a prefix, sorted.
    pub(super) fn list_folders(&self, prefix: &Key) -> Result<Vec<String>, Fault> {
        let mut names = Vec::new();
        for entry in entries(&self.path(prefix)?)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() && key_below(prefix.as_str(), &entry).is_some() {
                names.push(entry.file_name().to_string_lossy().into_owned());
                bound(names.len())?;
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn open_lock_file(&self) -> io::Result<File> {
        File::options().write(true).create(true).truncate(false).open(self.root.join(LOCK_FILE))
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

/// What stands at a path; an error if it is there but no object.
fn standing(path: &Path) -> Result<Option<Standing>, Fault> {
    match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_file() => {
            Ok(Some(Standing { modified: metadata.modified()?, version: version_of(&metadata) }))
        }
        Ok(_) => Err(no_object(path)),
        Err(e) if is_missing(&e) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Opens an object without following a link at its name, and without waiting for the other end of a pipe.
fn open_object(path: &Path) -> Result<(File, fs::Metadata), Fault> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(fd) => File::from(fd),
        Err(Errno::LOOP) => return Err(no_object(path)),
        Err(e) if is_missing(&e.into()) => return Err(Fault::Missing),
        Err(e) => return Err(e.into()),
    };
    let metadata = file.metadata()?;
    if metadata.is_file() { Ok((file, metadata)) } else { Err(no_object(path)) }
}

fn no_object(path: &Path) -> Fault {
    Fault::Forbidden(format!(
        "{} is a folder, a link or a special file where a plain file should be; remove it or choose another name",
        path.display()
    ))
}

/// No such name, or a file where one of its folders would be.
fn is_missing(e: &io::Error) -> bool {
    matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory)
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

/// Creates a folder and those above it, each durable in its parent before the next.
fn make_folders(folder: &Path) -> Result<(), Fault> {
    let missing: Vec<&Path> = folder.ancestors().take_while(|folder| !folder.is_dir()).collect();
    for folder in missing.into_iter().rev() {
        fs::create_dir(folder)?;
        if let Some(parent) = folder.parent() {
            sync_dir(parent)?;
        }
    }
    Ok(())
}

fn sync_dir(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

/// The entries of a folder; none if there is no such folder (any more).
fn entries(folder: &Path) -> io::Result<impl Iterator<Item = io::Result<fs::DirEntry>>> {
    match fs::read_dir(folder) {
        Ok(entries) => Ok(Some(entries).into_iter().flatten()),
        Err(e) if is_missing(&e) => Ok(None.into_iter().flatten()),
        Err(e) => Err(e),
    }
}

/// The key of a folder's entry, unless no key can have that name.
fn key_below(folder: &str, entry: &fs::DirEntry) -> Option<Key> {
    format!("{folder}/{}", entry.file_name().to_str()?).parse().ok()
}

fn bound(count: usize) -> Result<(), Fault> {
    if count > MAX_LISTED {
        return Err(Fault::Forbidden(format!("there are more than {MAX_LISTED} names; choose a longer prefix")));
    }
    Ok(())
}
