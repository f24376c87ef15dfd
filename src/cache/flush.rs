//! FLUSH: one barrier at a time, shared by all who asked before it began (L2).
//!
//! A flush that arrives while a barrier is under way waits for the next one: the running one may have begun before
//! the writes that this flush must cover were complete.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::log::{META_FILE, MetaLog, Unsynced};
use super::{Cache, CacheError, LogFile, RAW_FILE, disk_error};
use crate::disk::DiskFile;
use crate::sabotage::{Rule, breaks};
use crate::sync::{Condvar, Mutex};

/// Numbers the barriers: who asks waits until one that began after it asked has ended.
#[derive(Debug, Default)]
pub struct FlushBarrier {
    state: Mutex<Barriers>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Barriers {
    begun: u64,
    ended: u64,
    /// How the barrier with the number `ended` ended.
    result: Option<CacheError>,
}

/// The barrier under way. It ends with this, also if something in it panics: then those who wait for it hear of an error.
struct UnderWay<'a> {
    of: &'a FlushBarrier,
    result: Option<Result<(), CacheError>>,
}

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        let panicked = || Err(disk_error("flush", Path::new(RAW_FILE), io::Error::other("it panicked")));
        let result = self.result.take().unwrap_or_else(panicked);
        let mut state = self.of.state.lock();
        state.ended = state.begun;
        state.result = result.err();
        drop(state);
        self.of.ended.notify_all();
    }
}

impl FlushBarrier {
    /// Returns once a barrier that began after this call has ended; runs it if nobody else does.
    fn pass(&self, barrier: impl FnOnce() -> Result<(), CacheError>) -> Result<(), CacheError> {
        let mut state = self.state.lock();
        let mine = state.begun + 1;
        loop {
            if state.ended >= mine {
                return state.result.clone().map_or(Ok(()), Err);
            }
            if breaks(Rule::JoinRunningBarrier) && state.begun > state.ended {
                return Ok(());
            }
            if state.begun == state.ended {
                break;
            }
            self.ended.wait(&mut state);
        }
        state.begun += 1;
        drop(state);
        let mut under_way = UnderWay { of: self, result: None };
        let result = barrier();
        under_way.result = Some(result.clone());
        result
    }

    /// Whether a barrier is under way right now.
    pub(super) fn is_under_way(&self) -> bool {
        let state = self.state.lock();
        state.begun != state.ended
    }
}

impl Cache {
    /// Makes every write that has returned durable, on all connections.
    ///
    /// # Errors
    /// [`CacheError::Failed`] if a sync fails, now or ever before; [`CacheError::NoSpace`] if the seal finds no room.
    pub fn flush(&self) -> Result<(), CacheError> {
        self.flush.pass(|| self.flush_barrier())
    }

    fn flush_barrier(&self) -> Result<(), CacheError> {
        self.make_durable()?;
        self.check_in_place()
    }

    /// Finds out that the next start will find what is made durable, and that no name leads into another's folder.
    ///
    /// # Errors
    /// [`CacheError::Failed`], for good, if `cache.raw` is no longer where it was opened.
    pub fn check_in_place(&self) -> Result<(), CacheError> {
        let path = self.dir.join(RAW_FILE);
        if self.raw.is_at(&path).map_err(|e| self.error("look-up", RAW_FILE, e))? {
            return Ok(());
        }
        Err(self.latch_text(format!(
            "export {}: {} is another file or none, since the folder was moved, replaced or removed while it was in use: its \
             cache takes no more writes, since a start would not find them; stop the server, put the folder back, start again",
            self.export_id,
            path.display()
        )))
    }

    fn make_durable(&self) -> Result<(), CacheError> {
        self.check_not_failed()?;
        let unsealed = match &*self.log.lock() {
            LogFile::Open(log) => log.unsealed(),
            LogFile::Sealed { .. } => None,
        };
        if !breaks(Rule::SkipRawSync) && !breaks(Rule::SealBeforeRawSync) {
            self.sync_raw()?;
        }
        let Some(through) = unsealed else { return Ok(()) };
        self.sync_log(|log| log.seal(through))?;
        if breaks(Rule::SealBeforeRawSync) {
            self.sync_raw()?;
        }
        self.fold_log();
        Ok(())
    }

    /// Makes a part of the log durable; nothing to do where a clean stop has made all of it. Not under the log's lock: first
    /// writes to other chunks go on while the disk syncs.
    pub(super) fn sync_log(
        &self,
        part: impl FnOnce(&mut MetaLog) -> io::Result<(Arc<dyn DiskFile>, Unsynced)>,
    ) -> Result<(), CacheError> {
        let (file, unsynced) = match &mut *self.log.lock() {
            LogFile::Open(log) => part(log).map_err(|e| self.error("write", META_FILE, e))?,
            LogFile::Sealed { .. } => return Ok(()),
        };
        if !breaks(Rule::SkipSealSync) {
            // One at a time, for the reason that `sync_raw` has.
            let _one_at_a_time = self.syncing.lock();
            self.check_not_failed()?;
            file.sync().map_err(|e| self.fail("sync of cache.meta", &e))?;
        }
        if let LogFile::Open(log) = &mut *self.log.lock() {
            log.synced(unsynced);
        }
        Ok(())
    }
}
