//! The local cache of one export: chunk states over `cache.raw`, and the one place that does disk I/O for data.
//!
//! Promises, with the rules of `docs/architecture.md` that they serve:
//! - A chunk's mark is in `cache.meta` before the reply to the write that made it dirty (L1), and no state is visible
//!   in memory before its mark is written. The order of mark and bytes is chosen so that a process crash between the
//!   two leaves the old content or the new one.
//! - [`Cache::flush`] returns after: sync of `cache.raw`, then the seals, then sync of `cache.meta` (L2).
//! - A failed sync is final: the cache latches *failed* (L6). A full disk is not (L7).
//! - It never decides what a missing chunk's content is, and never sees the store: callers say which missing chunks
//!   are zeros and bring the bytes of the others.
//!
//! Locks, always taken in this order: *checkpointing*, *filling*, the *gate* (shared by every client's read and every
//! transition, exclusive for the cut, the commit, the eviction and the reset), a chunk's *stripe* (around each transition), *creating aside*, *aside*,
//! *syncing*, the *log*, the *base*, the *incarnation*. None is held across anything but local I/O. The methods block, and [`blocking`] is the one crossing from async
//! code; but for those of `at_once`, which async code may call as it is.

pub mod aside;
mod at_once;
mod evict;
pub mod flush;
mod full;
pub mod journal;
mod log;
pub mod meta;
pub mod open;
pub mod publish;
pub mod reserved;
pub mod states;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::background::Background;
use crate::disk::{Disk, DiskFile};
use crate::sabotage::{Rule, breaks};
use crate::sync::{AtomicBool, AtomicU64, Mutex, MutexGuard, OnceLock, RwLock};
use crate::units::{ByteRange, ChunkIndex, ExportId, Geometry, RandomId};
use aside::{Aside, AsideMemory};
use at_once::Pace;
use flush::FlushBarrier;
use full::Fullness;
use log::{MetaLog, Roomy};
pub use meta::Base;
use meta::{Header, MetaError};
use states::{ChunkState, ChunkStates, Content};

/// The image's file name in the export's cache folder.
pub const RAW_FILE: &str = "cache.raw";
const STRIPES: usize = 64;

/// Why the cache did not do what was asked, by what the caller does next.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CacheError {
    /// The disk is full; nothing is lost, the same call works once space is back.
    #[error("no space left on the disk of {0}")]
    NoSpace(PathBuf),
    /// A disk operation failed.
    #[error("{operation} of {path} failed: {source}")]
    Io {
        /// What was attempted, in one word.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// What the disk said.
        source: Arc<io::Error>,
    },
    /// A sync failed earlier: what reached the disk is unknown, so the export takes no more writes.
    #[error("{0}")]
    Failed(Arc<str>),
    /// A file is not what it should be; nothing was changed.
    #[error(
        "{path}: {source}; move the folder away to start from the published snapshot, losing what was not published"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: MetaError,
    },
}

/// How far a write or zeroing came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// All of it is in the cache.
    Done,
    /// All before byte `at` is; the chunk there must be filled first.
    NeedsFill {
        /// The chunk to fill.
        chunk: ChunkIndex,
        /// The first byte of the image that was not written.
        at: u64,
    },
}

/// What zeroing does at the edges of a missing chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edges {
    /// They must read as zeros: the chunk is filled first.
    Zero,
    /// They may stay as they are.
    Skip,
}

/// Runs blocking cache work on a thread that may block; it goes on to its end even if the caller goes away.
pub async fn blocking<T, F>(cache: &Arc<Cache>, work: F) -> T
where
    T: Send + 'static,
    F: FnOnce(&Cache) -> T + Send + 'static,
{
    let cache = Arc::clone(cache);
    blocking_io(move || work(&cache)).await
}

/// As [`blocking`], for work that sees to its result itself.
pub fn blocking_then(cache: &Arc<Cache>, work: impl FnOnce(&Cache) + Send + 'static) {
    let cache = Arc::clone(cache);
    drop(tokio::task::spawn_blocking(move || work(&cache)));
}

/// Runs blocking disk work that has no cache yet.
pub async fn blocking_io<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    Background::default().run(work).await
}

/// The cache of one export. See the module's documentation for its promises and locks.
#[derive(Debug)]
pub struct Cache {
    disk: Arc<dyn Disk>,
    dir: PathBuf,
    export_id: ExportId,
    geometry: Geometry,
    boot_id: [u8; 16],
    raw: Arc<dyn DiskFile>,
    states: ChunkStates,
    /// One checkpoint at a time: each carries the log over from the one before.
    checkpointing: Mutex<()>,
    gate: RwLock<()>,
    stripes: [Mutex<()>; STRIPES],
    /// One fill writes at a time: a file takes one write at a time, and many that wait for it there would hold up a cut and the
    /// clients' writes for as long as all of them take.
    filling: Mutex<()>,
    log: Mutex<LogFile>,
    /// Whether the log is [`LogFile::Open`]: a look at it without the lock.
    log_is_ours: AtomicBool,
    /// Who only watches asks for it, and so shall not wait for the disk, as one does for the log: it is held to copy it.
    base: Mutex<Base>,
    /// Which of the exports that ever had this name.
    incarnation: Mutex<Option<RandomId>>,
    flush: FlushBarrier,
    syncing: Mutex<()>,
    pace: Pace,
    aside: Mutex<Aside>,
    creating_aside: Mutex<()>,
    aside_memory: Arc<AsideMemory>,
    /// How many cuts this life of the server has made. Changed under the whole gate.
    cuts: AtomicU64,
    full: Fullness,
    failed: OnceLock<Arc<str>>,
}

/// The state of `cache.meta` in this life of the server.
#[derive(Debug)]
enum LogFile {
    /// Sealed by a clean stop and not changed since; the next checkpoint starts at this number.
    Sealed { next_seq: u64, file: Roomy },
    /// Written by this life of the server.
    Open(MetaLog),
}

impl Cache {
    /// The sizes of the image and its chunks.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// The folder all files of the cache are in.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The disk under the cache.
    #[must_use]
    pub fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    /// The published snapshot that the states are relative to.
    #[must_use]
    pub fn base(&self) -> Base {
        *self.base.lock()
    }

    /// Which of the exports that ever had this name the cache belongs to, as its head says; `None` if that is not known.
    #[must_use]
    pub fn incarnation(&self) -> Option<RandomId> {
        *self.incarnation.lock()
    }

    /// Notes the incarnation, where the cache of an older server has none; the next checkpoint makes it durable.
    pub fn note_incarnation(&self, incarnation: Option<RandomId>) {
        let mut noted = self.incarnation.lock();
        *noted = noted.or(incarnation);
    }

    /// Whether anything is not published and not in the cut that stands either.
    #[must_use]
    pub fn is_dirty_beside_cut(&self) -> bool {
        self.states.iter().any(|(_, state)| state.is_dirty() && !state.in_cut())
    }

    /// A chunk's state now.
    #[must_use]
    pub fn state(&self, chunk: ChunkIndex) -> ChunkState {
        self.states.get(chunk)
    }

    /// Whether there is anything that is not published. Looks at the states themselves: what is to be published or
    /// thrown away is never decided by a count beside them.
    #[must_use]
    pub fn is_dirty(&self) -> bool {
        self.states.iter().any(|(_, state)| state.is_dirty())
    }

    /// How many chunks are resident, and how many dirty; for watching.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        self.states.counts()
    }

    /// Why the cache takes no more writes, if it does not.
    #[must_use]
    pub fn failure(&self) -> Option<Arc<str>> {
        self.failed.get().cloned()
    }

    /// Reads what is here of a range: fills `buf` (as long as the range) but for the chunks it returns, whose content
    /// the caller must get. `is_zero` says of a missing chunk whether its content is zeros.
    ///
    /// # Errors
    /// [`CacheError::Io`] if the disk does not read; [`CacheError::Failed`] for dirty chunks after a failed sync.
    pub fn read(
        &self,
        range: ByteRange,
        buf: &mut [u8],
        is_zero: impl Fn(ChunkIndex) -> bool,
    ) -> Result<Vec<(ChunkIndex, ByteRange)>, CacheError> {
        let _shared = self.gate.read();
        let mut missing = Vec::new();
        let mut resident: Option<ByteRange> = None;
        for (chunk, piece) in self.geometry.split(range) {
            let state = self.states.get(chunk);
            let failed = self.failure().filter(|_| !breaks(Rule::ReadAfterFailedSync));
            match failed {
                Some(why) if state.is_dirty() => return Err(CacheError::Failed(why)),
                // The kernel may have dropped what a fill wrote, too: it is fetched and verified once more.
                Some(_) if state.content() == Content::Clean => {
                    self.read_raw(resident.take(), range, buf)?;
                    missing.push((chunk, piece));
                    continue;
                }
                _ => {}
            }
            if state.is_resident() {
                let from = resident.map_or(piece.offset(), ByteRange::offset);
                resident = ByteRange::new(from, piece.end() - from);
                continue;
            }
            self.read_raw(resident.take(), range, buf)?;
            if state.content() == Content::Zero || is_zero(chunk) {
                slice_mut(buf, range, piece).fill(0);
            } else {
                missing.push((chunk, piece));
            }
        }
        self.read_raw(resident, range, buf)?;
        Ok(missing)
    }

    fn read_raw(&self, piece: Option<ByteRange>, range: ByteRange, buf: &mut [u8]) -> Result<(), CacheError> {
        let Some(piece) = piece else { return Ok(()) };
        self.raw.read_at(slice_mut(buf, range, piece), piece.offset()).map_err(|e| self.error("read", RAW_FILE, e))
    }

    /// Writes `data` at `offset`. A chunk that is missing and only partly overwritten stops it, unless `is_zero`.
    ///
    /// # Errors
    /// [`CacheError::NoSpace`], [`CacheError::Io`], [`CacheError::Failed`].
    pub fn write(
        &self,
        offset: u64,
        data: &[u8],
        is_zero: impl Fn(ChunkIndex) -> bool,
    ) -> Result<Progress, CacheError> {
        let Some(range) = ByteRange::new(offset, data.len() as u64) else { return Ok(Progress::Done) };
        // Also before a write that needs no mark: as long as the seal of a clean stop stands, no stop would sync it.
        self.ensure_log_is_ours()?;
        {
            let _shared = self.gate.read();
            self.check_not_failed()?;
            if self.geometry.split(range).all(|(chunk, _)| self.states.get(chunk).takes_writes_freely()) {
                self.write_raw(range, data)?;
                self.note_room();
                return Ok(Progress::Done);
            }
        }
        for (chunk, piece) in self.geometry.split(range) {
            let _shared = self.gate.read();
            let _stripe = self.stripe(chunk);
            self.check_not_failed()?;
            if !self.write_chunk(chunk, piece, slice(data, range, piece), &is_zero)? {
                return Ok(Progress::NeedsFill { chunk, at: piece.offset() });
            }
        }
        self.note_room();
        self.fold_log();
        Ok(Progress::Done)
    }

    /// One chunk's part of a write, under its stripe lock; `false` if the chunk must be filled first.
    fn write_chunk(
        &self,
        chunk: ChunkIndex,
        piece: ByteRange,
        data: &[u8],
        is_zero: impl Fn(ChunkIndex) -> bool,
    ) -> Result<bool, CacheError> {
        let whole = self.geometry.chunk_range(chunk);
        let state = self.states.get(chunk);
        match state.content() {
            Content::Absent | Content::Zero if piece == whole && breaks(Rule::MarkBeforeWholeOverwrite) => {
                self.transition(chunk, state, Content::Dirty)?;
                self.write_raw(piece, data)?;
            }
            Content::Absent | Content::Zero if piece == whole => {
                // Bytes, then mark: a process crash in mid-write must not leave a dirty chunk whose rest was never
                // written.
                self.write_raw(piece, data)?;
                self.transition(chunk, state, Content::Dirty)?;
            }
            Content::Absent if !is_zero(chunk) => return Ok(false),
            Content::Absent | Content::Zero => {
                // What lies in the chunk's region of the file is unknown; all of it must read as zeros first.
                if !breaks(Rule::TrustMissingBytes) {
                    self.raw.punch(whole).map_err(|e| self.error("punch", RAW_FILE, e))?;
                }
                self.transition(chunk, state, Content::Dirty)?;
                self.write_raw(piece, data)?;
            }
            Content::Clean if breaks(Rule::BytesBeforeMark) => {
                self.write_raw(piece, data)?;
                self.transition(chunk, state, Content::Dirty)?;
            }
            Content::Clean => {
                self.transition(chunk, state, Content::Dirty)?;
                self.write_raw(piece, data)?;
            }
            Content::Dirty => {
                self.leave_cut(chunk, piece, Content::Dirty)?;
                self.write_raw(piece, data)?;
            }
        }
        Ok(true)
    }

    /// Makes a range read as zeros without writing any: whole chunks lose their content, edges get holes.
    ///
    /// # Errors
    /// [`CacheError::NoSpace`], [`CacheError::Io`], [`CacheError::Failed`].
    pub fn zero(
        &self,
        range: ByteRange,
        edges: Edges,
        is_zero: impl Fn(ChunkIndex) -> bool,
    ) -> Result<Progress, CacheError> {
        for (chunk, piece) in self.geometry.split(range) {
            let state = self.states.get(chunk);
            if state.content() == Content::Zero || (state.content() == Content::Absent && is_zero(chunk)) {
                continue;
            }
            self.ensure_log_is_ours()?;
            // There may be millions of marks in one call.
            self.fold_log();
            let _shared = self.gate.read();
            let _stripe = self.stripe(chunk);
            self.check_not_failed()?;
            if !self.zero_chunk(chunk, piece, edges, &is_zero)? {
                return Ok(Progress::NeedsFill { chunk, at: piece.offset() });
            }
        }
        self.fold_log();
        Ok(Progress::Done)
    }

    fn zero_chunk(
        &self,
        chunk: ChunkIndex,
        piece: ByteRange,
        edges: Edges,
        is_zero: impl Fn(ChunkIndex) -> bool,
    ) -> Result<bool, CacheError> {
        let whole = self.geometry.chunk_range(chunk);
        let state = self.states.get(chunk);
        if breaks(Rule::PunchBeforeMark) && state.is_resident() {
            self.raw.punch(piece).map_err(|e| self.error("punch", RAW_FILE, e))?;
        }
        let zero = if breaks(Rule::TrimForgets) { Content::Absent } else { Content::Zero };
        match state.content() {
            Content::Zero => return Ok(true),
            Content::Absent if is_zero(chunk) => return Ok(true),
            // The mark before the hole: what is marked zero is never read from the file.
            Content::Dirty if piece == whole => self.leave_cut(chunk, piece, zero)?,
            Content::Absent | Content::Clean if piece == whole => self.transition(chunk, state, zero)?,
            Content::Absent => return Ok(edges == Edges::Skip),
            Content::Clean => self.transition(chunk, state, Content::Dirty)?,
            Content::Dirty => self.leave_cut(chunk, piece, Content::Dirty)?,
        }
        // A chunk of zeros is never read from the file.
        let emptied = if piece == whole { self.raw.free(piece) } else { self.raw.punch(piece) };
        emptied.map_err(|e| self.error("punch", RAW_FILE, e))?;
        Ok(true)
    }

    /// Makes a missing chunk resident with its published `bytes`, unless it got another content meanwhile or
    /// `still_published` (asked while no publish or reset can interfere) says that these are no longer its bytes.
    ///
    /// # Errors
    /// [`CacheError::NoSpace`], [`CacheError::Io`]; the chunk stays missing.
    pub fn fill(&self, chunk: ChunkIndex, bytes: &[u8], still_published: impl Fn() -> bool) -> Result<(), CacheError> {
        debug_assert_eq!(self.geometry.chunk_range(chunk).len(), bytes.len() as u64);
        self.ensure_log_is_ours()?;
        // Who only reads has nobody else to do it.
        self.fold_log();
        let _one_at_a_time = self.filling.lock();
        let _shared = self.gate.read();
        let _stripe = self.stripe(chunk);
        let state = self.states.get(chunk);
        let stale = state.content() != Content::Absent || !still_published();
        if stale && !breaks(Rule::KeepStaleFill) {
            return Ok(());
        }
        if breaks(Rule::CleanBeforeBytes) {
            self.transition(chunk, state, Content::Clean)?;
        }
        self.write_raw(self.geometry.chunk_range(chunk), bytes)?;
        self.note_room();
        self.transition(chunk, state, Content::Clean)
    }

    /// The mark, then the state: nobody sees what a crash would not find.
    fn transition(&self, chunk: ChunkIndex, from: ChunkState, to: Content) -> Result<(), CacheError> {
        let log = &mut *self.log.lock();
        // Under the lock: of a log that could not be replaced nobody knows which file a restart will find.
        self.check_not_failed()?;
        let marked = match log {
            LogFile::Open(_) if breaks(Rule::SkipMark) && to == Content::Dirty => Ok(()),
            LogFile::Open(log) => log.mark(&*self.disk, &self.dir, chunk, to),
            LogFile::Sealed { .. } => Err(io::Error::other("the log was not opened before a change")),
        };
        marked.map_err(|e| self.error("write", log::META_FILE, e))?;
        let to = if breaks(Rule::CleanRedirtied) && from.in_cut() { from } else { from.rewritten(to) };
        self.states.set(chunk, to);
        Ok(())
    }

    /// Before `piece` of a dirty chunk gets other content: a publish under way keeps what it was at the cut, and the chunk is
    /// dirty for the generation after.
    fn leave_cut(&self, chunk: ChunkIndex, piece: ByteRange, to: Content) -> Result<(), CacheError> {
        if self.states.get(chunk).awaited() {
            self.save_aside(chunk, piece);
        }
        let state = self.states.get(chunk);
        if state.in_cut() || state.content() != to { self.transition(chunk, state, to) } else { Ok(()) }
    }

    /// Makes the bytes of every completed write durable, but not their marks. One sync at a time: the kernel tells of lost pages
    /// once, so whoever hears of none must find the failure latched that another one heard of (L6).
    ///
    /// # Errors
    /// [`CacheError::Failed`] if a sync fails, now or ever before.
    pub fn sync_raw(&self) -> Result<(), CacheError> {
        let _one_at_a_time = self.syncing.lock();
        self.check_not_failed()?;
        self.raw.sync().map_err(|e| self.fail("sync of cache.raw", &e))
    }

    fn write_raw(&self, range: ByteRange, data: &[u8]) -> Result<(), CacheError> {
        self.raw.write_at(data, range.offset()).map_err(|e| self.error("write", RAW_FILE, e))
    }

    fn stripe(&self, chunk: ChunkIndex) -> MutexGuard<'_, ()> {
        self.stripes[chunk.slot() % STRIPES].lock()
    }

    fn check_not_failed(&self) -> Result<(), CacheError> {
        self.failed.get().map_or(Ok(()), |why| Err(CacheError::Failed(Arc::clone(why))))
    }

    /// Latches the failure of a sync of data or marks: the kernel may have dropped them, and a restart must know.
    fn fail(&self, what: &str, source: &io::Error) -> CacheError {
        if breaks(Rule::RetrySync) {
            return self.error("sync", "", io::Error::other(source.to_string()));
        }
        open::note_failure(&*self.disk, &self.dir, &self.export_id);
        self.latch(what, source)
    }

    /// Takes no more writes: which of two files the disk has under a name is unknown. The next start finds out.
    fn latch(&self, what: &str, source: &io::Error) -> CacheError {
        let text = format!(
            "export {}: {what} of {} failed ({source}): its cache takes no more writes, since what reached the disk is unknown; check the disk, then restart the server",
            self.export_id,
            self.dir.display()
        );
        self.latch_text(text)
    }

    fn latch_text(&self, text: String) -> CacheError {
        let why = self.failed.get_or_init(|| {
            tracing::error!(export = %self.export_id, "{text}");
            text.into()
        });
        CacheError::Failed(Arc::clone(why))
    }

    fn error(&self, operation: &'static str, file: &str, source: io::Error) -> CacheError {
        self.note_refusal(&source);
        disk_error(operation, &self.dir.join(file), source)
    }

    fn header(&self, base: Base, first_seq: u64) -> Header {
        let (export_id, geometry, boot_id) = (self.export_id.clone(), self.geometry, self.boot_id);
        Header { export_id, geometry, base, incarnation: self.incarnation(), boot_id, first_seq }
    }

    /// The states of all chunks, put into `room`, which is empty.
    fn all_states(&self, mut room: Vec<ChunkState>) -> Vec<ChunkState> {
        room.extend(self.states.iter().map(|(_, state)| state));
        room
    }
}

/// An empty list with room for `len` of what `any` is one of, and all of the room touched. It is for what is listed under the
/// gate: a machine may take longer to give memory, a page at a time, than a pass over all states takes, and everybody waits.
fn touched_room<T: Clone>(len: u64, any: T) -> Vec<T> {
    let mut room = vec![any; usize::try_from(len).unwrap_or(0)];
    room.clear();
    room
}

/// What an operation, in one word, on a file of a cache failed with.
pub(crate) fn disk_error(operation: &'static str, path: &Path, source: io::Error) -> CacheError {
    if full::is_want_of_space(&source) {
        CacheError::NoSpace(path.to_owned())
    } else {
        CacheError::Io { operation, path: path.to_owned(), source: Arc::new(source) }
    }
}

#[allow(clippy::cast_possible_truncation, reason = "offsets inside a buffer in memory")]
fn slice_mut(buf: &mut [u8], range: ByteRange, piece: ByteRange) -> &mut [u8] {
    let from = (piece.offset() - range.offset()) as usize;
    &mut buf[from..from + piece.len() as usize]
}

#[allow(clippy::cast_possible_truncation, reason = "offsets inside a buffer in memory")]
fn slice(buf: &[u8], range: ByteRange, piece: ByteRange) -> &[u8] {
    let from = (piece.offset() - range.offset()) as usize;
    &buf[from..from + piece.len() as usize]
}
