//! The cache's part in a publish: the cut, what writers must leave readable for it, and the end.
//!
//! The cut takes as long as a pass over the chunk states, whatever the volume's size or the store's speed. After it,
//! a write to a chunk of the cut marks the chunk dirty for the next generation (S3), and first copies aside what it is about
//! to change (S2), until the publish has read the chunk. If there is no room for the copy, the publish fails, not the write.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;

use super::log::{META_FILE, MetaLog};
use super::meta::Record;
use super::states::Content;
use super::{Base, Cache, CacheError, LogFile, RAW_FILE};
use crate::disk::DiskFile;
use crate::sabotage::{Rule, breaks};
use crate::slices::{SLICE_BYTES, slices_mut};
use crate::sync::Ordering;
use crate::units::{ByteRange, ChunkIndex};

/// Where blocks of chunks are copied before a write changes them under a publish.
pub const ASIDE_FILE: &str = "cut.aside";

/// What was set aside; it lives as long as the publish and need not survive a crash. For every chunk that was written to since
/// the cut and that the publish has not read yet it holds about 150 bytes.
#[derive(Debug, Default)]
pub struct Aside {
    file: Option<Arc<dyn DiskFile>>,
    /// Which blocks of a chunk are in the file, where they are in the image.
    blocks: HashMap<ChunkIndex, Blocks>,
    /// Why something could not be set aside: the publish must fail.
    broken: Option<CacheError>,
}

/// A set of blocks of one chunk, by their numbers in it.
#[derive(Debug, Clone, Copy, Default)]
struct Blocks([u64; Blocks::WORDS]);

impl Blocks {
    const WORDS: usize = 16;
    /// How many blocks a chunk has at most.
    const COUNT: u64 = Self::WORDS as u64 * 64;
    /// No block is smaller, as none costs less to copy.
    const MIN_BYTES: u64 = 4096;

    fn has(self, block: usize) -> bool {
        self.0[block / 64] >> (block % 64) & 1 == 1
    }

    fn add(&mut self, block: usize) {
        self.0[block / 64] |= 1 << (block % 64);
    }
}

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
    /// Freezes what is dirty now, while no write is under way: the chunks that the publish is about.
    ///
    /// # Errors
    /// [`CacheError`]; then nothing is frozen.
    pub fn cut(&self) -> Result<Vec<CutChunk>, CacheError> {
        self.ensure_log_is_ours()?;
        let any = CutChunk { cut: u64::MAX, chunk: ChunkIndex(u32::MAX), zero: true };
        let mut chunks = super::touched_room(self.states.counts().1, any);
        let _alone = self.gate.write();
        self.check_not_failed()?;
        self.append(MetaLog::cut)?;
        *self.aside.lock() = Aside::default();
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
        let (file, blocks) = {
            let _shared = self.gate.read();
            let _stripe = self.stripe(chunk);
            let aside = &mut *self.aside.lock();
            let state = self.states.get(chunk);
            let given_up = || Err(self.error("read", RAW_FILE, io::Error::other("the publish was given up")));
            // A read may outlive its publish: it must not take what the next one waits for.
            if cut != self.cuts.load(Ordering::Relaxed) && !breaks(Rule::TakeForAnotherCut) {
                return given_up();
            }
            if let Some(e) = &aside.broken {
                return Err(e.clone());
            }
            if !state.awaited() {
                return given_up();
            }
            self.states.set(chunk, state.taken());
            (aside.file.clone(), aside.blocks.remove(&chunk))
        };
        let (Some(file), Some(blocks)) = (file, blocks) else { return Ok(()) };
        let whole = self.geometry.chunk_range(chunk);
        for (_, range) in self.blocks(chunk, whole).filter(|(block, _)| blocks.has(*block)) {
            let old = super::slice_mut(buf, whole, range);
            file.read_at(old, range.offset()).map_err(|e| self.error("read", ASIDE_FILE, e))?;
        }
        Ok(())
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

    /// Keeps what a piece of a chunk was at the cut, under its stripe lock. A failure breaks the publish, not the write.
    pub(super) fn save_aside(&self, chunk: ChunkIndex, piece: ByteRange) {
        let read = |buf: &mut [u8], at| self.raw.read_at(buf, at).map(|()| true);
        let saved = self.aside_file().and_then(|file| self.copy_aside(&*file, chunk, piece, read));
        if let Err(e) = saved {
            self.aside.lock().broken.get_or_insert(e);
            self.states.set(chunk, self.states.get(chunk).taken());
        }
    }

    /// As [`save_aside`](Self::save_aside), if it is a matter of copying memory; else `false`, and nothing is broken.
    pub(super) fn save_aside_at_once(&self, chunk: ChunkIndex, piece: ByteRange) -> bool {
        let read = |buf: &mut [u8], at| self.raw.read_at_once(buf, at);
        let file = self.aside.lock().file.clone();
        file.is_some_and(|file| self.copy_aside(&*file, chunk, piece, read).unwrap_or(false))
    }

    fn aside_file(&self) -> Result<Arc<dyn DiskFile>, CacheError> {
        let aside = &mut *self.aside.lock();
        if let Some(file) = &aside.file {
            return Ok(Arc::clone(file));
        }
        let created =
            self.disk.create(&self.dir.join(ASIDE_FILE)).map_err(|e| self.error("creation", ASIDE_FILE, e))?;
        Ok(Arc::clone(aside.file.insert(created)))
    }

    /// Copies what is not yet aside of the blocks that `piece` touches; `false` if `read` would not.
    fn copy_aside(
        &self,
        file: &dyn DiskFile,
        chunk: ChunkIndex,
        piece: ByteRange,
        read: impl Fn(&mut [u8], u64) -> io::Result<bool>,
    ) -> Result<bool, CacheError> {
        if breaks(Rule::SkipAside) {
            return Ok(true);
        }
        let failed = |e| self.error("copy", ASIDE_FILE, e);
        let mut saved = {
            let aside = &*self.aside.lock();
            if let Some(e) = &aside.broken {
                return Err(e.clone());
            }
            aside.blocks.get(&chunk).copied().unwrap_or_default()
        };
        let mut buf = Vec::new();
        for (block, range) in self.blocks(chunk, piece) {
            if !saved.has(block) {
                buf.resize(usize::try_from(range.len()).map_err(|e| failed(io::Error::other(e)))?, 0);
                if !read(&mut buf, range.offset()).map_err(failed)? {
                    return Ok(false);
                }
                file.write_at(&buf, range.offset()).map_err(failed)?;
                saved.add(block);
            }
        }
        self.aside.lock().blocks.insert(chunk, saved);
        Ok(true)
    }

    /// The blocks of a chunk that a piece of it touches, by their numbers in the chunk.
    fn blocks(&self, chunk: ChunkIndex, piece: ByteRange) -> impl Iterator<Item = (usize, ByteRange)> {
        let whole = self.geometry.chunk_range(chunk);
        let bytes = self.geometry.chunk_size().div_ceil(Blocks::COUNT).max(Blocks::MIN_BYTES);
        let first = (piece.offset() - whole.offset()) / bytes;
        (first..Blocks::COUNT).map_while(move |block| {
            let at = whole.offset() + block * bytes;
            let range = ByteRange::new(at, bytes.min(whole.end().checked_sub(at)?))?;
            (range.offset() < piece.end()).then_some((usize::try_from(block).ok()?, range))
        })
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
        {
            let _alone = self.gate.write();
            for (chunk, state) in self.states.iter().filter(|(_, state)| state.in_cut() || state.awaited()) {
                self.states.set(chunk, state.uncut());
            }
            if matches!(self.log.lock().file, LogFile::Open(_)) {
                self.append(|log| log.append(Record::Uncut))?;
            }
        }
        self.drop_aside()
    }

    fn drop_aside(&self) -> Result<(), CacheError> {
        *self.aside.lock() = Aside::default();
        self.disk.remove(&self.dir.join(ASIDE_FILE)).map_err(|e| self.error("removal", ASIDE_FILE, e))
    }

    fn append(&self, append: impl FnOnce(&mut MetaLog) -> io::Result<()>) -> Result<(), CacheError> {
        let appended = match &mut self.log.lock().file {
            LogFile::Open(log) => append(log),
            LogFile::Sealed { .. } => Err(io::Error::other("the log was not opened before a change")),
        };
        appended.map_err(|e| self.error("write", META_FILE, e))
    }
}

#[cfg(test)]
mod tests;
