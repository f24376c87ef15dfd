//! The cache's part in a publish: the cut, what writers must leave readable for it, and the end.
//!
//! The cut takes as long as a pass over the chunk states, whatever the volume's size or the store's speed. After it,
//! a write to a chunk of the cut marks the chunk dirty for the next generation (S3), and first sets aside what it is about
//! to change (`aside.rs`), until the publish has read the chunk.

use std::io;

use super::full::is_want_of_space;
use super::log::{META_FILE, MetaLog};
use super::meta::Record;
use super::states::Content;
use super::{Base, Cache, CacheError, LogFile, RAW_FILE};
use crate::sabotage::{Rule, breaks};
use crate::slices::{SLICE_BYTES, slices_mut};
use crate::sync::Ordering;
use crate::units::ChunkIndex;

/// A chunk of a cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CutChunk {
    /// Which of the cuts of this life of the server it belongs to.
    cut: u64,
    /// Which one.
    pub chunk: ChunkIndex,
    /// Known to be all zeros: there is nothing to read.
    pub zero: bool,
}

impl Cache {
    /// Freezes what is dirty now, while no chunk is being changed: the chunks that the publish is about. A write over several
    /// chunks that has not returned may be in it in part.
    ///
    /// # Errors
    /// [`CacheError`]; then nothing is frozen.
    pub fn cut(&self) -> Result<Vec<CutChunk>, CacheError> {
        self.ensure_log_is_ours()?;
        self.make_room_for_a_cut()?;
        let any = CutChunk { cut: u64::MAX, chunk: ChunkIndex(u32::MAX), zero: true };
        let mut chunks = super::touched_room(self.states.counts().1, any);
        // Freed once writers go on.
        let _earlier;
        let _alone = self.gate.write();
        self.check_not_failed()?;
        self.append(MetaLog::cut)?;
        // An earlier cut may still stand, if its publish could not be settled: while a writer sets aside for that one, what it
        // copies is not as it is at this one.
        _earlier = std::mem::take(&mut *self.aside.lock());
        let cut = self.cuts.fetch_add(1, Ordering::Relaxed) + 1;
        for (chunk, state) in self.states.iter().filter(|(_, state)| state.is_dirty()) {
            self.states.set(chunk, state.uncut().cut());
            chunks.push(CutChunk { cut, chunk, zero: state.content() == Content::Zero });
        }
        Ok(chunks)
    }

    /// Once all of the cut was read: makes its record durable, since a recovery that finds the publish landed relies on it,
    /// and makes sure that the disk dropped nothing of what was read.
    ///
    /// # Errors
    /// [`CacheError::Failed`] if a sync fails, now or ever before.
    pub fn sync_cut(&self) -> Result<(), CacheError> {
        if breaks(Rule::SkipCutSync) {
            return Ok(());
        }
        self.sync_raw()?;
        self.sync_log(|log| Ok(log.to_sync()))
    }

    /// Reads a chunk as it was at its cut; from then on writers need not keep it. `buf` is as long as the chunk.
    ///
    /// # Errors
    /// [`CacheError`] if it cannot be read, or something could not be set aside when a write came, or the publish has ended.
    pub fn take_cut_chunk(&self, CutChunk { cut, chunk, .. }: CutChunk, buf: &mut [u8]) -> Result<(), CacheError> {
        // Nobody waits for this read: what a write changes meanwhile is aside by then.
        self.read_unchecked(chunk, buf)?;
        let set_aside = {
            let _shared = self.gate.read();
            let _stripe = self.stripe(chunk);
            let aside = &mut *self.aside.lock();
            let state = self.states.get(chunk);
            let given_up = || Err(self.error("read", RAW_FILE, io::Error::other("the publish was given up")));
            // A read may outlive its publish: it must not take what the next one waits for.
            if cut != self.cuts.load(Ordering::Relaxed) && !breaks(Rule::TakeForAnotherCut) {
                return given_up();
            }
            aside.check()?;
            if !state.awaited() {
                return given_up();
            }
            self.states.set(chunk, state.taken());
            aside.take(chunk)
        };
        self.restore(chunk, &set_aside, buf)
    }

    /// Reads what is in a chunk's place in `cache.raw`, for whoever can tell by a hash whether it is what he looks for. `buf` is
    /// as long as the chunk.
    ///
    /// # Errors
    /// [`CacheError::Io`] if the disk does not read.
    pub fn read_unchecked(&self, chunk: ChunkIndex, buf: &mut [u8]) -> Result<(), CacheError> {
        let whole = self.geometry.chunk_range(chunk);
        for (slice, at) in slices_mut(buf).zip((whole.offset()..).step_by(SLICE_BYTES)) {
            self.raw.read_at(slice, at).map_err(|e| self.error("read", RAW_FILE, e))?;
        }
        Ok(())
    }

    /// The publish is the head: what was not written since the cut is now as published, relative to `base`.
    /// `swap` runs while no reader or writer is under way, before the first state changes.
    ///
    /// # Errors
    /// [`CacheError`]; then the change stands in memory and the caller's journal must stay to redo it after a crash.
    pub fn commit(&self, base: Base, swap: impl FnOnce()) -> Result<(), CacheError> {
        // Most of what the checkpoint must sync goes to the disk before it, while everybody still works.
        self.sync_raw()?;
        self.checkpoint_after(|current| {
            swap();
            *current = base;
            let ours = self.cuts.load(Ordering::Relaxed) > 0 || breaks(Rule::CleanUnseen);
            for (chunk, state) in self.states.iter() {
                let published = if ours { state.published() } else { state.published_unseen() };
                if published != state {
                    self.states.set(chunk, published);
                }
            }
        })?;
        self.drop_aside()
    }

    /// The publish is given up: everything that was dirty still is.
    ///
    /// # Errors
    /// [`CacheError`] if the log cannot be written; the states are as they should be all the same.
    pub fn uncut(&self) -> Result<(), CacheError> {
        let appended = {
            let _alone = self.gate.write();
            for (chunk, state) in self.states.iter().filter(|(_, state)| state.in_cut() || state.awaited()) {
                self.states.set(chunk, state.uncut());
            }
            let open = matches!(*self.log.lock(), LogFile::Open(_));
            if open { self.append(|log| log.append(Record::Uncut)) } else { Ok(()) }
        };
        appended.and(self.drop_aside())
    }

    /// On a full disk a log that publishes alone have filled is folded, which gives it the room of the spare file (L7).
    fn make_room_for_a_cut(&self) -> Result<(), CacheError> {
        let reserved = match &mut *self.log.lock() {
            LogFile::Open(log) => log.reserve_cut(),
            LogFile::Sealed { .. } => Ok(()),
        };
        match reserved {
            Err(e) if is_want_of_space(&e) => self.checkpoint(),
            reserved => reserved.map_err(|e| self.error("write", META_FILE, e)),
        }
    }

    fn append(&self, append: impl FnOnce(&mut MetaLog) -> io::Result<()>) -> Result<(), CacheError> {
        let appended = match &mut *self.log.lock() {
            LogFile::Open(log) => append(log),
            LogFile::Sealed { .. } => Err(io::Error::other("the log was not opened before a change")),
        };
        appended.map_err(|e| self.error("write", META_FILE, e))
    }
}

#[cfg(test)]
mod tests;
