//! The cache's life: creation, opening after any kind of end, checkpoints, the clean stop.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::aside::{ASIDE_FILE, AsideMemory};
use super::at_once::Pace;
use super::flush::FlushBarrier;
use super::full::{Fullness, is_want_of_space};
use super::journal;
pub use super::log::META_FILE;
use super::log::{self, FAILED_FILE, MAX_META_BYTES, MetaLog, Roomy, Staged};
use super::meta::{self, Header, MetaError, Record, Trust};
use super::states::{ChunkState, ChunkStates, Content};
use super::{Base, Cache, CacheError, LogFile, RAW_FILE, STRIPES, disk_error};
use crate::disk::{self, Disk, DiskFile};
use crate::sabotage::{Rule, breaks};
use crate::sync::{AtomicBool, AtomicU64, Mutex, OnceLock, Ordering, RwLock};
use crate::units::{ByteRange, ExportId, Geometry, RandomId};

/// Where the note of a clone's seed is written before it takes its place.
const SEED_STAGING: &str = "clone.seed.json.tmp";

/// No boot has this id.
const NO_BOOT: [u8; 16] = [0; 16];

/// What a cache is opened for.
#[derive(Debug, Clone)]
pub struct Opening {
    /// The disk.
    pub disk: Arc<dyn Disk>,
    /// The export's cache folder.
    pub dir: PathBuf,
    /// The export, as its head names it.
    pub export_id: ExportId,
    /// Its sizes, as its head says.
    pub geometry: Geometry,
    /// The published snapshot that a new cache starts from.
    pub base: Base,
    /// The incarnation that a new cache belongs to.
    pub incarnation: Option<RandomId>,
    /// What the server has for blocks that writers set aside for publishes.
    pub aside_memory: Arc<AsideMemory>,
}

impl Opening {
    /// Opens the cache, or creates an empty one if there is none.
    ///
    /// # Errors
    /// [`CacheError::Damaged`] if what is there is damaged or of another image; [`CacheError::Io`] and
    /// [`CacheError::NoSpace`] from the disk.
    pub fn open(self) -> Result<Cache, CacheError> {
        let boot_id = self.disk.boot_id().map_err(|e| self.error("boot id", "", e))?;
        for leftover in [ASIDE_FILE, journal::JOURNAL_STAGING, SEED_STAGING] {
            self.disk.remove(&self.dir.join(leftover)).map_err(|e| self.error("removal", leftover, e))?;
        }
        match self.disk.open(&self.dir.join(META_FILE)) {
            Ok(file) => self.reopen(file, boot_id),
            Err(e) if e.kind() == io::ErrorKind::NotFound => self.create(boot_id),
            Err(e) => Err(self.error("open", META_FILE, e)),
        }
    }

    /// Refuses a folder in which a new cache would replace data: a creation that was interrupted leaves a `cache.raw` without a
    /// byte in it; with data in it, the file that said what the data is was lost.
    ///
    /// # Errors
    /// [`CacheError::Io`], naming the file.
    pub fn refuse_data_without_states(&self) -> Result<(), CacheError> {
        let has_data = match self.disk.open(&self.dir.join(RAW_FILE)) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            opened => opened.and_then(|left| left.has_data()),
        };
        if !has_data.map_err(|e| self.error("look-up", RAW_FILE, e))? {
            return Ok(());
        }
        let text = format!(
            "it holds data, but {META_FILE} beside it, which says what the data is, is missing. Flushed changes may be in it: \
             restore {META_FILE}; or move the folder away to start from the published snapshot, losing what was not published"
        );
        Err(self.error("creation", RAW_FILE, io::Error::new(io::ErrorKind::InvalidData, text)))
    }

    /// Makes all of a new cache but what makes it one: an error says why there can be none.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn rehearse(&self) -> Result<(), CacheError> {
        let rehearsed = self.prepare(NO_BOOT).and_then(|_| self.disk.remove(&self.dir.join(RAW_FILE)));
        rehearsed.map_err(|e| self.error("creation", RAW_FILE, e))
    }

    /// The files of an empty cache. Without cache.meta, which is only staged, all of this is made anew.
    fn prepare(&self, boot_id: [u8; 16]) -> io::Result<(Arc<dyn DiskFile>, Staged)> {
        self.disk.create_dir(&self.dir)?;
        if let Some(parent) = self.dir.parent() {
            self.disk.sync_dir(parent)?;
        }
        let raw = self.disk.create(&self.dir.join(RAW_FILE))?;
        raw.set_len(self.geometry.image_size()).map_err(|e| self.says_if_too_large(e))?;
        raw.sync()?;
        let absent = vec![ChunkState::new(Content::Absent); self.geometry.chunk_count() as usize];
        let staged = log::stage(&*self.disk, &self.dir, &self.header(boot_id, 1), &absent)?;
        journal::FILE.reserve(&*self.disk, &self.dir)?;
        Ok((raw, staged))
    }

    fn create(self, boot_id: [u8; 16]) -> Result<Cache, CacheError> {
        self.refuse_data_without_states()?;
        let made = || -> io::Result<(Arc<dyn DiskFile>, MetaLog)> {
            let (raw, staged) = self.prepare(boot_id)?;
            let mut log = staged.install(&*self.disk, &self.dir, None)?;
            log.take_room_for_a_mark(&*self.disk, &self.dir)?;
            Ok((raw, log))
        };
        let (raw, log) = made().map_err(|e| self.error("creation", RAW_FILE, e))?;
        let states = vec![ChunkState::new(Content::Absent); self.geometry.chunk_count() as usize];
        Ok(self.into_cache(boot_id, raw, &states, LogFile::Open(log)))
    }

    /// Adds the remedy, where the file system takes no file as large as the image.
    fn says_if_too_large(&self, e: io::Error) -> io::Error {
        if e.kind() != io::ErrorKind::FileTooLarge {
            return e;
        }
        let bytes = self.geometry.image_size();
        let text = format!(
            "{e}: this file system has no files of {bytes} bytes; put --cache-root on one that has, such as XFS"
        );
        io::Error::new(e.kind(), text)
    }

    fn reopen(mut self, file: Arc<dyn DiskFile>, boot_id: [u8; 16]) -> Result<Cache, CacheError> {
        // A life that was killed may have exchanged cache.meta and its spare without making that durable: then what is the
        // spare now is cache.meta for a power loss, and must not be written yet.
        if !breaks(Rule::ReuseSpareAtOnce) {
            self.disk.sync_dir(&self.dir).map_err(|e| self.error("sync", "", e))?;
        }
        match journal::FILE.reserve(&*self.disk, &self.dir) {
            // A publish will find out.
            Err(e) if is_want_of_space(&e) => {}
            reserved => reserved.map_err(|e| self.error("reservation", journal::JOURNAL_FILE, e))?,
        }
        let len = file.len().map_err(|e| self.error("read", META_FILE, e))?;
        if len > MAX_META_BYTES {
            return Err(self.damaged(META_FILE, MetaError::Damaged(format!("its length ({len} bytes)"))));
        }
        let mut bytes = vec![0; usize::try_from(len).unwrap_or(0)];
        file.read_at(&mut bytes, 0).map_err(|e| self.error("read", META_FILE, e))?;
        // After a failed sync the kernel forgets what it could not write, as if the host had gone down (L6).
        let failed = holds(&*self.disk, &self.dir, FAILED_FILE).map_err(|e| self.error("list", "", e))?;
        let trusted_boot = if failed && !breaks(Rule::ForgetFailedSync) { NO_BOOT } else { boot_id };
        let found = meta::decode(&bytes, trusted_boot).map_err(|e| self.damaged(META_FILE, e))?;
        self.check_identity(&found.header)?;
        (self.base, self.incarnation) = (found.header.base, found.header.incarnation);

        let raw = self.disk.open(&self.dir.join(RAW_FILE)).map_err(|e| self.error("open", RAW_FILE, e))?;
        let raw_len = raw.len().map_err(|e| self.error("read", RAW_FILE, e))?;
        if raw_len != self.geometry.image_size() {
            let mismatch = MetaError::Mismatch {
                field: "length",
                found: raw_len.to_string(),
                expected: self.geometry.image_size().to_string(),
            };
            return Err(self.damaged(RAW_FILE, mismatch));
        }
        let old = Roomy::found(file).map_err(|e| self.error("read", META_FILE, e))?;
        if found.trust == Trust::CleanStop {
            self.forget_failure(failed)?;
            let log = LogFile::Sealed { next_seq: found.next_seq, file: old };
            return Ok(self.into_cache(boot_id, raw, &found.states, log));
        }
        tracing::info!(export = %self.export_id, trust = ?found.trust, "the cache was not closed in good order; recovering it");
        // A checkpoint vouches for the bytes under its marks, so these are synced first.
        raw.sync().map_err(|e| {
            note_failure(&*self.disk, &self.dir, &self.export_id);
            self.error("sync", RAW_FILE, e)
        })?;
        let header = self.header(boot_id, found.next_seq);
        let log = log::stage(&*self.disk, &self.dir, &header, &found.states)
            .and_then(|staged| staged.install(&*self.disk, &self.dir, Some(old)))
            .map_err(|e| self.error("write", META_FILE, e))?;
        self.free_missing(&*raw, &found.states);
        self.forget_failure(failed)?;
        Ok(self.into_cache(boot_id, raw, &found.states, LogFile::Open(log)))
    }

    /// The states no longer rest on what the failed sync was about.
    fn forget_failure(&self, failed: bool) -> Result<(), CacheError> {
        if !failed {
            return Ok(());
        }
        disk::remove_file(&*self.disk, &self.dir, FAILED_FILE).map_err(|e| self.error("removal", FAILED_FILE, e))
    }

    /// Gives back the space of chunks that recovery dropped, or that were dropped when the server died. Their bytes mean
    /// nothing either way.
    fn free_missing(&self, raw: &dyn DiskFile, states: &[ChunkState]) {
        let mut at = 0u64;
        for run in states.chunk_by(|a, b| a.is_resident() == b.is_resident()) {
            let end = (at + run.len() as u64 * self.geometry.chunk_size()).min(self.geometry.image_size());
            let range = ByteRange::new(at, end - at);
            let punched = range.filter(|_| !run[0].is_resident()).map_or(Ok(()), |range| raw.free(range));
            if let Err(e) = punched {
                tracing::warn!(export = %self.export_id, "the space of dropped chunks was not freed: {e}");
            }
            at = end;
        }
    }

    fn check_identity(&self, header: &Header) -> Result<(), CacheError> {
        let fields = [
            ("export id", header.export_id.to_string(), self.export_id.to_string()),
            ("image size", header.geometry.image_size().to_string(), self.geometry.image_size().to_string()),
            ("chunk size", header.geometry.chunk_size().to_string(), self.geometry.chunk_size().to_string()),
        ];
        for (field, found, expected) in fields {
            if found != expected {
                return Err(self.damaged(META_FILE, MetaError::Mismatch { field, found, expected }));
            }
        }
        Ok(())
    }

    fn header(&self, boot_id: [u8; 16], first_seq: u64) -> Header {
        let (export_id, geometry) = (self.export_id.clone(), self.geometry);
        Header { export_id, geometry, base: self.base, incarnation: self.incarnation, boot_id, first_seq }
    }

    fn into_cache(self, boot_id: [u8; 16], raw: Arc<dyn DiskFile>, states: &[ChunkState], file: LogFile) -> Cache {
        Cache {
            disk: self.disk,
            dir: self.dir,
            export_id: self.export_id,
            geometry: self.geometry,
            boot_id,
            raw,
            states: ChunkStates::new(states),
            checkpointing: Mutex::new(()),
            gate: RwLock::new(()),
            stripes: [const { Mutex::new(()) }; STRIPES],
            log_is_ours: AtomicBool::new(matches!(file, LogFile::Open(_))),
            log: Mutex::new(file),
            base: Mutex::new(self.base),
            incarnation: Mutex::new(self.incarnation),
            flush: FlushBarrier::default(),
            syncing: Mutex::new(()),
            pace: Pace::default(),
            filling: Mutex::new(()),
            aside: Mutex::default(),
            creating_aside: Mutex::new(()),
            aside_memory: self.aside_memory,
            cuts: AtomicU64::new(0),
            full: Fullness::default(),
            failed: OnceLock::new(),
        }
    }

    fn error(&self, operation: &'static str, file: &str, source: io::Error) -> CacheError {
        disk_error(operation, &self.dir.join(file), source)
    }

    fn damaged(&self, file: &str, source: MetaError) -> CacheError {
        CacheError::Damaged { path: self.dir.join(file), source }
    }
}

/// Notes for the next start that a sync failed: until the host goes down, the page cache is not what was written.
pub(super) fn note_failure(disk: &dyn Disk, dir: &Path, export_id: &ExportId) {
    // If the disk does not take even this, the log line is all there is.
    if let Err(e) = disk.create(&dir.join(FAILED_FILE)).and_then(|_| disk.sync_dir(dir)) {
        tracing::error!(export = %export_id, "a failed sync was not noted for the next start: {e}");
    }
}

/// Whether a folder holds a cache, whatever its state.
///
/// # Errors
/// Those of the disk.
pub fn exists(disk: &dyn Disk, dir: &Path) -> io::Result<bool> {
    holds(disk, dir, META_FILE)
}

fn holds(disk: &dyn Disk, dir: &Path, file: &str) -> io::Result<bool> {
    Ok(disk.list_dir(dir)?.iter().any(|name| name == file))
}

/// Removes a cache that nobody has open and nobody needs.
///
/// # Errors
/// Those of the disk.
pub fn discard(disk: &dyn Disk, dir: &Path) -> io::Result<()> {
    // First what makes it a cache: what a crash leaves of the rest means nothing.
    disk.remove(&dir.join(META_FILE))?;
    for name in disk.list_dir(dir)? {
        disk.remove(&dir.join(name))?;
    }
    disk.remove_dir(dir)
}

impl Cache {
    /// Before the first change of this life: a checkpoint of our own, which clears the clean-stop seal (L4).
    pub(super) fn ensure_log_is_ours(&self) -> Result<(), CacheError> {
        self.check_not_failed()?;
        if self.log_is_ours.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut log = self.log.lock();
        let LogFile::Sealed { next_seq, file: old } = &*log else { return Ok(()) };
        let (next_seq, old) = (*next_seq, old.clone());
        self.check_in_place()?;
        // Nothing changes a state before this returns, for every change needs a mark in a log of ours.
        let staged =
            log::stage(&*self.disk, &self.dir, &self.header(self.base(), next_seq), &self.all_states(Vec::new()))
                .map_err(|e| self.error("write", META_FILE, e))?;
        let ours =
            staged.install(&*self.disk, &self.dir, Some(old)).map_err(|e| self.latch("renewal of cache.meta", &e))?;
        *log = LogFile::Open(ours);
        self.log_is_ours.store(true, Ordering::Release);
        Ok(())
    }

    /// Folds the log if it has outgrown its checkpoint and nobody is at it yet. Whoever marks many chunks calls it in between,
    /// holding no lock. What it was called after is done and marked either way, so a failure is nobody's but the log's.
    pub(super) fn fold_log(&self) {
        let (outgrown, near_limit) = match &*self.log.lock() {
            LogFile::Open(log) => (log.wants_folding(), log.is_near_limit()),
            LogFile::Sealed { .. } => return,
        };
        if !outgrown {
            return;
        }
        if self.checkpointing.is_locked() {
            if near_limit {
                // Marks may come faster than a slow disk takes a checkpoint.
                drop(self.checkpointing.lock());
            }
            return;
        }
        if let Err(e) = self.checkpoint() {
            tracing::warn!(export = %self.export_id, "the log was not folded, it grows on: {e}");
        }
    }

    /// Folds the log into a new checkpoint.
    pub(super) fn checkpoint(&self) -> Result<(), CacheError> {
        self.checkpoint_after(|_| {})
    }

    /// Changes states and base while nothing else does, then makes that durable by a new checkpoint. Readers and
    /// writers wait only for the change itself; what they mark meanwhile is carried over.
    ///
    /// After an error the change stands in memory, and the old file with its log still describes the time before.
    pub(super) fn checkpoint_after(&self, change: impl FnOnce(&mut Base)) -> Result<(), CacheError> {
        let _one_at_a_time = self.checkpointing.lock();
        self.write_checkpoint(|base, room| {
            change(base);
            self.all_states(room)
        })
    }

    /// Writes a checkpoint of the states that `freeze` puts into the room it is given, while no state changes. The caller holds
    /// *checkpointing*.
    pub(super) fn write_checkpoint(
        &self,
        freeze: impl FnOnce(&mut Base, Vec<ChunkState>) -> Vec<ChunkState>,
    ) -> Result<(), CacheError> {
        self.ensure_log_is_ours()?;
        let room = super::touched_room(self.geometry.chunk_count().into(), ChunkState::new(Content::Dirty));
        let closed = || self.error("write", META_FILE, io::Error::other("the cache was closed meanwhile"));
        let (header, states) = {
            let _alone = self.gate.write();
            let LogFile::Open(file) = &mut *self.log.lock() else { return Err(closed()) };
            let states = freeze(&mut self.base.lock(), room);
            (self.header(self.base(), file.begin_carry()), states)
        };
        let synced = if breaks(Rule::SealBeforeData) { Ok(()) } else { self.sync_raw() };
        let staged = synced.and_then(|()| self.check_in_place()).and_then(|()| {
            log::stage(&*self.disk, &self.dir, &header, &states).map_err(|e| self.error("write", META_FILE, e))
        });
        let LogFile::Open(file) = &mut *self.log.lock() else { return Err(closed()) };
        let carried = staged.and_then(|staged| {
            file.carry_over(&staged).map_err(|e| self.error("write", META_FILE, e))?;
            Ok(staged)
        });
        match carried {
            Ok(staged) => {
                file.replace(staged, &*self.disk, &self.dir).map_err(|e| self.latch("renewal of cache.meta", &e))
            }
            Err(e) => {
                file.end_carry();
                Err(e)
            }
        }
    }

    /// Drops everything: every chunk is missing, and `base` of an incarnation is what they stand for. Durable on return (L9).
    /// `swap` runs once it is, while no reader or writer is under way.
    ///
    /// # Errors
    /// [`CacheError`]; a failure before the checkpoint is in place changes nothing.
    pub fn reset(&self, base: Base, incarnation: Option<RandomId>, swap: impl FnOnce()) -> Result<(), CacheError> {
        let _one_at_a_time = self.checkpointing.lock();
        self.ensure_log_is_ours()?;
        self.check_in_place()?;
        let _alone = self.gate.write();
        // No publish is under way: what one left that could not be settled is of no use.
        self.drop_aside()?;
        if breaks(Rule::PunchBeforeReset) {
            let whole = ByteRange::new(0, self.geometry.image_size());
            whole.map_or(Ok(()), |whole| self.raw.punch(whole)).map_err(|e| self.error("punch", RAW_FILE, e))?;
        }
        let LogFile::Open(file) = &mut *self.log.lock() else { return Ok(()) };
        let absent = vec![ChunkState::new(Content::Absent); self.geometry.chunk_count() as usize];
        let header = Header { incarnation, ..self.header(base, file.begin_carry()) };
        let staged = log::stage(&*self.disk, &self.dir, &header, &absent);
        let staged = staged.inspect_err(|_| file.end_carry()).map_err(|e| self.error("write", META_FILE, e))?;
        file.replace(staged, &*self.disk, &self.dir).map_err(|e| self.latch("renewal of cache.meta", &e))?;
        *self.base.lock() = base;
        *self.incarnation.lock() = incarnation;
        swap();
        for (chunk, _) in self.states.iter() {
            self.states.set(chunk, ChunkState::new(Content::Absent));
        }
        // A hole rather than a truncation: the file has its full length at every moment.
        let whole = ByteRange::new(0, self.geometry.image_size());
        let emptied = whole.map_or(Ok(()), |whole| self.raw.free(whole));
        emptied.map_err(|e| self.error("punch", RAW_FILE, e))
    }

    /// The clean stop: everything durable, then the seal that lets the next start trust all of it (L4). No call that
    /// changes the cache may come after.
    ///
    /// # Errors
    /// [`CacheError`]; without the seal, the next start recovers instead.
    pub fn close(&self) -> Result<(), CacheError> {
        if matches!(*self.log.lock(), LogFile::Sealed { .. }) {
            return Ok(());
        }
        self.checkpoint()?;
        let _alone = self.gate.write();
        let log = &mut *self.log.lock();
        let LogFile::Open(file) = log else { return Ok(()) };
        file.append(Record::CleanStop).map_err(|e| self.error("write", META_FILE, e))?;
        file.to_sync().0.sync().map_err(|e| self.fail("sync of cache.meta", &e))?;
        // Whatever comes after starts a file of its own.
        *log = LogFile::Sealed { next_seq: file.next_seq(), file: file.file() };
        self.log_is_ours.store(false, Ordering::Release);
        Ok(())
    }
}
