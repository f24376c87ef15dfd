//! The local disk, as a seam: production uses the kernel's files, tests a disk that fails, tears and crashes.
//!
//! The seam is as narrow as the cache needs: named files with positioned reads and writes, holes, and the syncs that
//! the durability rules speak of. All calls block; `cache` alone decides on which thread.

pub(crate) mod private;

use std::fmt::Debug;
use std::fs;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{
    AtFlags, CWD, Dir, FallocateFlags, FileType, Mode, OFlags, RenameFlags, SeekFrom, mkdirat, openat, renameat,
    renameat_with, statat, unlinkat,
};
use rustix::io::{Errno, ReadWriteFlags, retry_on_intr};

use crate::units::ByteRange;

/// The room on a file system, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    /// What a user other than root may still take.
    pub free: u64,
    /// What there is, taken or not.
    pub total: u64,
}

/// A file system under the cache root.
pub trait Disk: Debug + Send + Sync {
    /// Opens a file that must exist, for reading and writing.
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>>;
    /// Creates an empty file for its owner alone, replacing one of that name.
    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>>;
    /// Replaces `to` by `from` in one step.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Swaps the names of two files in one step, so that neither gives up its space.
    /// [`io::ErrorKind::Unsupported`] where the file system cannot.
    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()>;
    /// Removes a file; it is no error if there is none.
    fn remove(&self, path: &Path) -> io::Result<()>;
    /// Creates a folder and those above it, for their owner alone, unless they exist.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Removes an empty folder; it is no error if there is none.
    fn remove_dir(&self, path: &Path) -> io::Result<()>;
    /// The names in a folder, sorted; none if there is no such folder.
    fn list_dir(&self, path: &Path) -> io::Result<Vec<String>>;
    /// Makes the creations, renames and removals in a folder durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// The room on the file system that a folder is on.
    fn space(&self, _: &Path) -> io::Result<Space> {
        Err(io::ErrorKind::Unsupported.into())
    }
    /// Identifies the boot of this host: the same after a process crash, another after the host went down.
    fn boot_id(&self) -> io::Result<[u8; 16]>;
}

/// An open file of a [`Disk`].
#[allow(clippy::len_without_is_empty, reason = "nobody asks a cache file whether it is empty")]
pub trait DiskFile: Debug + Send + Sync {
    /// Fills the whole buffer from `offset`; [`io::ErrorKind::UnexpectedEof`] if the file ends first.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;
    /// As [`read_at`](Self::read_at), if all of it is in memory; `false`, and the buffer has any content, if the disk would
    /// have to be waited for.
    fn read_at_once(&self, buf: &mut [u8], offset: u64) -> io::Result<bool> {
        self.read_at(buf, offset).map(|()| true)
    }
    /// Writes the whole buffer at `offset`.
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;
    /// The file's length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Cuts or extends the file to `len` bytes; an extension is a hole.
    fn set_len(&self, len: u64) -> io::Result<()>;
    /// Makes a range read as zeros and frees its space, if the file system can; the length stays.
    fn punch(&self, range: ByteRange) -> io::Result<()>;
    /// Frees the space of a range whose bytes mean nothing, before and after; where the file system cannot, they stay.
    fn free(&self, range: ByteRange) -> io::Result<()> {
        self.punch(range)
    }
    /// Takes the space that later writes to a range need, and extends the file to hold it. What was written stays.
    fn allocate(&self, range: ByteRange) -> io::Result<()>;
    /// Makes all completed writes durable.
    fn sync(&self) -> io::Result<()>;
    /// Whether the file holds anything but holes.
    fn has_data(&self) -> io::Result<bool>;
    /// Whether the file at a path is this one.
    fn is_at(&self, path: &Path) -> io::Result<bool>;
}

/// Replaces a small file in one step that survives a crash: the old content is there, or the new one.
///
/// # Errors
/// Those of the disk; the old content is still there unless the last step, the sync of the folder, failed.
pub fn replace_file(disk: &dyn Disk, dir: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let staging = dir.join(format!("{name}.tmp"));
    let file = disk.create(&staging)?;
    file.write_at(bytes, 0)?;
    file.sync()?;
    disk.rename(&staging, &dir.join(name))?;
    disk.sync_dir(dir)
}

/// The whole content of a small file, or `None` if there is none.
///
/// # Errors
/// Those of the disk, and a file of more than `max_bytes`.
pub fn read_file(disk: &dyn Disk, path: &Path, max_bytes: u64) -> io::Result<Option<Vec<u8>>> {
    let file = match disk.open(path) {
        Ok(file) => file,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(e),
    };
    let len = file.len()?;
    if len > max_bytes {
        let text = format!("it has {len} bytes, more than the {max_bytes} such a file may have");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    let mut bytes = vec![0; usize::try_from(len).map_err(io::Error::other)?];
    file.read_at(&mut bytes, 0)?;
    Ok(Some(bytes))
}

/// Removes a file for good: the removal survives a crash.
///
/// # Errors
/// Those of the disk.
pub fn remove_file(disk: &dyn Disk, dir: &Path, name: &str) -> io::Result<()> {
    disk.remove(&dir.join(name))?;
    disk.sync_dir(dir)
}

/// A long write is handed to the kernel in pieces of this size, in bytes. It keeps what one write brings in one folio of
/// its page cache, and ext4 goes over all blocks of a folio whenever a part of it is written: after writes of 1 MiB a
/// later one of 4 KiB costs 8 to 11 µs, after pieces of 64 KiB 3.3 µs, after these 2.7 µs (Linux 6.18). Pieces of 16 KiB
/// would bring it to 2.2 µs, and cost a long write 25 µs per MiB more, where these cost 5.
const WRITE_PIECE_BYTES: usize = 32 << 10;

/// Image data is for its owner alone.
const FILE_MODE: Mode = Mode::from_raw_mode(private::FILE_MODE);
const FOLDER_MODE: Mode = Mode::from_raw_mode(private::FOLDER_MODE);

/// The kernel's files, found by their paths or below a folder that stays open.
#[derive(Debug, Clone, Default)]
pub struct RealDisk {
    root: Option<Arc<Root>>,
}

/// A folder that is reached by its descriptor alone: whatever is at its path by now is never touched.
#[derive(Debug)]
struct Root {
    path: PathBuf,
    folder: fs::File,
}

fn ignore_missing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

impl RealDisk {
    /// The files below `folder`, which was opened at `path`. Every path that is asked for begins with `path`.
    #[must_use]
    pub fn below(path: &Path, folder: fs::File) -> Self {
        Self { root: Some(Arc::new(Root { path: path.to_owned(), folder })) }
    }

    /// What a path is relative to, and the path from there.
    fn locate<'a>(&'a self, path: &'a Path) -> io::Result<(BorrowedFd<'a>, &'a Path)> {
        let Some(root) = &self.root else { return Ok((CWD, path)) };
        let relative = path.strip_prefix(&root.path).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        Ok((root.folder.as_fd(), if relative.as_os_str().is_empty() { Path::new(".") } else { relative }))
    }

    fn open_by(&self, path: &Path, flags: OFlags) -> io::Result<fs::File> {
        let (at, path) = self.locate(path)?;
        Ok(openat(at, path, flags | OFlags::CLOEXEC, FILE_MODE)?.into())
    }

    fn open_folder(&self, path: &Path) -> io::Result<fs::File> {
        self.open_by(path, OFlags::RDONLY | OFlags::DIRECTORY)
    }

    fn unlink(&self, path: &Path, flags: AtFlags) -> io::Result<()> {
        let (at, path) = self.locate(path)?;
        ignore_missing(unlinkat(at, path, flags).map_err(Into::into))
    }
}

impl Disk for RealDisk {
    fn open(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        RealFile::over(self.open_by(path, OFlags::RDWR)?)
    }

    fn create(&self, path: &Path) -> io::Result<Arc<dyn DiskFile>> {
        RealFile::over(self.open_by(path, OFlags::RDWR | OFlags::CREATE | OFlags::TRUNC)?)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        let ((from_at, from), (to_at, to)) = (self.locate(from)?, self.locate(to)?);
        Ok(renameat(from_at, from, to_at, to)?)
    }

    fn exchange(&self, a: &Path, b: &Path) -> io::Result<()> {
        let ((at_a, a), (at_b, b)) = (self.locate(a)?, self.locate(b)?);
        match renameat_with(at_a, a, at_b, b, RenameFlags::EXCHANGE) {
            Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => Err(io::ErrorKind::Unsupported.into()),
            exchanged => Ok(exchanged?),
        }
    }

    fn remove(&self, path: &Path) -> io::Result<()> {
        self.unlink(path, AtFlags::empty())
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let (at, path) = self.locate(path)?;
        let folders: Vec<_> = path.ancestors().filter(|folder| !folder.as_os_str().is_empty()).collect();
        for folder in folders.into_iter().rev() {
            match mkdirat(at, folder, FOLDER_MODE) {
                // One that cannot be made because it is there says so in several ways.
                Err(e) if !statat(at, folder, AtFlags::empty()).is_ok_and(is_folder) => return Err(e.into()),
                _ => {}
            }
        }
        Ok(())
    }

    fn remove_dir(&self, path: &Path) -> io::Result<()> {
        self.unlink(path, AtFlags::REMOVEDIR)
    }

    fn list_dir(&self, path: &Path) -> io::Result<Vec<String>> {
        let folder = match self.open_folder(path) {
            Ok(folder) => folder,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(e),
        };
        let mut names = Vec::new();
        for entry in Dir::new(folder)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name != "." && name != ".." {
                names.push(name);
            }
        }
        names.sort();
        Ok(names)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        self.open_folder(path)?.sync_all()
    }

    fn space(&self, dir: &Path) -> io::Result<Space> {
        let about = rustix::fs::fstatvfs(self.open_folder(dir)?)?;
        let bytes = |blocks: u64| blocks.saturating_mul(about.f_frsize);
        Ok(Space { free: bytes(about.f_bavail), total: bytes(about.f_blocks) })
    }

    fn boot_id(&self) -> io::Result<[u8; 16]> {
        let text = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let id = uuid::Uuid::parse_str(text.trim()).map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e))?;
        Ok(id.into_bytes())
    }
}

/// Where what goes past the page cache must begin and end, in memory and in the file, in bytes: hardly a disk asks for more,
/// and one that does refuses the write.
pub(crate) const DIRECT_ALIGNMENT: usize = 4096;

/// What a file's bytes are kept on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Medium {
    /// Nothing but memory.
    Memory,
    /// A disk of this machine, which can be read and written past the page cache.
    Disk,
    /// Another machine, or something that is not known.
    Unknown,
}

impl Medium {
    /// The medium under a file, by its file system.
    pub(crate) fn of(file: &fs::File) -> Self {
        const TMPFS: u32 = 0x0102_1994;
        const EXT: u32 = 0xEF53;
        const XFS: u32 = 0x5846_5342;
        match rustix::fs::fstatfs(file).map(|about| u32::try_from(about.f_type)) {
            Ok(Ok(TMPFS)) => Self::Memory,
            Ok(Ok(EXT | XFS)) => Self::Disk,
            _ => Self::Unknown,
        }
    }
}

/// The device and the inode of a file.
pub(crate) fn identity(about: &fs::Metadata) -> (u64, u64) {
    (about.dev(), about.ino())
}

fn is_folder(about: rustix::fs::Stat) -> bool {
    FileType::from_raw_mode(about.st_mode) == FileType::Directory
}

#[derive(Debug)]
struct RealFile {
    file: fs::File,
    /// Device and inode.
    identity: (u64, u64),
    /// Whether its file system keeps everything in memory, and takes no orders not to wait.
    in_memory: bool,
}

impl RealFile {
    fn over(file: fs::File) -> io::Result<Arc<dyn DiskFile>> {
        let in_memory = Medium::of(&file) == Medium::Memory;
        let identity = identity(&file.metadata()?);
        Ok(Arc::new(Self { file, identity, in_memory }))
    }
}

/// Whether a file system has no such operation: NFS before 4.2, many of FUSE.
fn is_unsupported(result: &rustix::io::Result<()>) -> bool {
    matches!(result, Err(Errno::OPNOTSUPP | Errno::NOSYS))
}

impl RealFile {
    fn punch_hole(&self, range: ByteRange) -> rustix::io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.file, flags, range.offset(), range.len())
    }

    fn write_zeros(&self, range: ByteRange) -> io::Result<()> {
        static ZEROS: [u8; WRITE_PIECE_BYTES] = [0; WRITE_PIECE_BYTES];
        let mut at = range.offset();
        while at < range.end() {
            let piece = (range.end() - at).min(ZEROS.len() as u64);
            self.file.write_all_at(&ZEROS[..usize::try_from(piece).map_err(io::Error::other)?], at)?;
            at += piece;
        }
        Ok(())
    }
}

impl DiskFile for RealFile {
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn read_at_once(&self, buf: &mut [u8], offset: u64) -> io::Result<bool> {
        let whole = buf.len();
        let read = if self.in_memory {
            rustix::io::pread(&self.file, buf, offset)
        } else {
            rustix::io::preadv2(&self.file, &mut [io::IoSliceMut::new(buf)], offset, ReadWriteFlags::NOWAIT)
        };
        // Less than all, "would block", "not on this file system": the read that may wait finds out what it is.
        Ok(read.is_ok_and(|read| read == whole))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        // By rustix, which calls the kernel itself: libc's call is one at which a thread may be cancelled, and to say so to
        // the thread before and after is a fiftieth of a warm request. What the kernel did not take at once goes on as usual.
        let write = |(at, piece): (u64, &[u8])| {
            let written = retry_on_intr(|| rustix::io::pwrite(&self.file, piece, at))?;
            self.file.write_all_at(&piece[written..], at + written as u64)
        };
        (offset..).step_by(WRITE_PIECE_BYTES).zip(buf.chunks(WRITE_PIECE_BYTES)).try_for_each(write)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn punch(&self, range: ByteRange) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        let punched = self.punch_hole(range);
        if is_unsupported(&punched) { self.write_zeros(range) } else { Ok(punched?) }
    }

    fn free(&self, range: ByteRange) -> io::Result<()> {
        let punched = if range.is_empty() { Ok(()) } else { self.punch_hole(range) };
        if is_unsupported(&punched) { Ok(()) } else { Ok(punched?) }
    }

    fn allocate(&self, range: ByteRange) -> io::Result<()> {
        match rustix::fs::fallocate(&self.file, FallocateFlags::empty(), range.offset(), range.len()) {
            // A file system that takes no orders: what can be had is the length, which a hole gives.
            Err(Errno::OPNOTSUPP | Errno::NOSYS) if self.len()? < range.end() => self.set_len(range.end()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            allocated => Ok(allocated?),
        }
    }

    fn sync(&self) -> io::Result<()> {
        // fdatasync also flushes the size and the extents a reader needs to find the data.
        self.file.sync_data()
    }

    fn has_data(&self) -> io::Result<bool> {
        match rustix::fs::seek(&self.file, SeekFrom::Data(0)) {
            Err(Errno::NXIO) => Ok(false),
            Err(e) => Err(e.into()),
            // A file system that knows no holes calls all of a file data.
            Ok(_) => Ok(self.file.metadata()?.blocks() > 0),
        }
    }

    fn is_at(&self, path: &Path) -> io::Result<bool> {
        match fs::metadata(path) {
            Ok(found) => Ok(identity(&found) == self.identity),
            Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => Ok(false),
            Err(e) => Err(e),
        }
    }
}
