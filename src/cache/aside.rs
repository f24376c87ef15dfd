//! What writers set aside for a publish: blocks of chunks as they were at the cut, until the publish has read the chunk (S2).
//!
//! Before a short piece of a chunk is written they are copied into memory, of which all caches of a server share so much
//! ([`AsideMemory`]). Beyond that, and before a long piece, they go to a file: it takes any number of them, but to add a block
//! to one costs several times what a short write itself does. What cannot be set aside makes the publish fail, not the write.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;

use super::at_once::LONGEST_CHANGE_BYTES;
use super::{Cache, CacheError};
use crate::disk::DiskFile;
use crate::sabotage::{Rule, breaks};
use crate::sync::{AtomicU64, Ordering};
use crate::units::{ByteRange, ChunkIndex};

/// Where blocks are copied that do not go into memory.
pub(super) const ASIDE_FILE: &str = "cut.aside";

/// What is set aside; it lives as long as the publish and need not survive a crash. For every chunk that was written to since
/// the cut and that the publish has not read yet it holds up to 500 bytes besides the blocks.
#[derive(Debug, Default)]
pub(super) struct Aside {
    file: Option<Arc<dyn DiskFile>>,
    chunks: HashMap<ChunkIndex, Copies>,
    /// Why something could not be set aside: the publish must fail.
    broken: Option<CacheError>,
}

/// The blocks of one chunk that are set aside, by their numbers in it.
#[derive(Debug, Default)]
struct Copies {
    in_memory: BTreeMap<usize, Copied>,
    /// These are in the file, each where it is in the image.
    in_file: Option<Box<Blocks>>,
}

/// What is set aside of one chunk, with the file that some of it may be in.
#[derive(Debug)]
pub(super) struct SetAside(Copies, Option<Arc<dyn DiskFile>>);

impl Aside {
    /// An error if something could not be set aside.
    pub(super) fn check(&self) -> Result<(), CacheError> {
        self.broken.clone().map_or(Ok(()), Err)
    }

    /// What is set aside of a chunk that needs to be kept no longer.
    pub(super) fn take(&mut self, chunk: ChunkIndex) -> SetAside {
        SetAside(self.chunks.remove(&chunk).unwrap_or_default(), self.file.clone())
    }

    /// Whether a block is still to be copied; an error if it is of no use any more.
    fn wants(&self, chunk: ChunkIndex, block: usize) -> Result<bool, CacheError> {
        self.check()?;
        Ok(!self.chunks.get(&chunk).is_some_and(|copies| {
            copies.in_memory.contains_key(&block) || copies.in_file.as_ref().is_some_and(|blocks| blocks.has(block))
        }))
    }

    fn of(&mut self, chunk: ChunkIndex) -> &mut Copies {
        self.chunks.entry(chunk).or_default()
    }
}

/// A set of blocks of one chunk.
#[derive(Debug, Default)]
struct Blocks([u64; Blocks::WORDS]);

impl Blocks {
    const WORDS: usize = 16;
    /// How many blocks a chunk has at most.
    const COUNT: u64 = Self::WORDS as u64 * 64;
    /// No block is smaller, as none costs less to copy.
    const MIN_BYTES: u64 = 4096;

    fn has(&self, block: usize) -> bool {
        self.0[block / 64] >> (block % 64) & 1 == 1
    }

    fn add(&mut self, block: usize) {
        self.0[block / 64] |= 1 << (block % 64);
    }
}

/// Memory for what is set aside, over all caches of a server.
#[derive(Debug)]
pub struct AsideMemory {
    free_bytes: AtomicU64,
}

impl AsideMemory {
    /// So many bytes, none of them in use.
    #[must_use]
    pub fn new(bytes: u64) -> Arc<Self> {
        Arc::new(Self { free_bytes: AtomicU64::new(bytes) })
    }

    /// Memory for a block, if there is so much.
    fn take(self: &Arc<Self>, len: usize) -> Option<Copied> {
        let taken = |free: u64| free.checked_sub(len as u64);
        self.free_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, taken).ok()?;
        Some(Copied { bytes: vec![0; len].into(), memory: Arc::clone(self) })
    }
}

/// A block in memory, which it gives back.
#[derive(Debug)]
struct Copied {
    bytes: Box<[u8]>,
    memory: Arc<AsideMemory>,
}

impl Drop for Copied {
    fn drop(&mut self) {
        self.memory.free_bytes.fetch_add(self.bytes.len() as u64, Ordering::Relaxed);
    }
}

impl Cache {
    /// Keeps what a piece of a chunk was at the cut, under its stripe lock. A failure breaks the publish, not the write.
    pub(super) fn save_aside(&self, chunk: ChunkIndex, piece: ByteRange) {
        let read = |buf: &mut [u8], at| self.raw.read_at(buf, at).map(|()| true);
        if let Err(e) = self.copy_aside(chunk, piece, read, || self.aside_file().map(Some)) {
            let useless = {
                let aside = &mut *self.aside.lock();
                aside.broken.get_or_insert(e);
                std::mem::take(&mut aside.chunks)
            };
            // There may be thousands of blocks: who needs the lock does not wait until they are freed.
            drop(useless);
            self.states.set(chunk, self.states.get(chunk).taken());
        }
    }

    /// As [`save_aside`](Self::save_aside), if it is a matter of copying memory; else `false`, and nothing is broken.
    pub(super) fn save_aside_at_once(&self, chunk: ChunkIndex, piece: ByteRange) -> bool {
        let read = |buf: &mut [u8], at| self.raw.read_at_once(buf, at);
        self.copy_aside(chunk, piece, read, || Ok(self.aside.lock().file.clone())).unwrap_or(false)
    }

    fn aside_file(&self) -> Result<Arc<dyn DiskFile>, CacheError> {
        // A second creation would empty it; and who only copies memory does not wait for the first.
        let _one_at_a_time = self.creating_aside.lock();
        if let Some(file) = &self.aside.lock().file {
            return Ok(Arc::clone(file));
        }
        let created =
            self.disk.create(&self.dir.join(ASIDE_FILE)).map_err(|e| self.error("creation", ASIDE_FILE, e))?;
        self.aside.lock().file = Some(Arc::clone(&created));
        Ok(created)
    }

    /// Copies what is not yet aside of the blocks that `piece` touches; `false` if `read` would not, or there is neither memory
    /// nor a file.
    fn copy_aside(
        &self,
        chunk: ChunkIndex,
        piece: ByteRange,
        read: impl Fn(&mut [u8], u64) -> io::Result<bool>,
        file: impl Fn() -> Result<Option<Arc<dyn DiskFile>>, CacheError>,
    ) -> Result<bool, CacheError> {
        if breaks(Rule::SkipAside) {
            return Ok(true);
        }
        let failed = |e| self.error("copy", ASIDE_FILE, e);
        let old = |buf: &mut [u8], range: ByteRange| read(buf, range.offset()).map_err(failed);
        // A long piece hardly notices the file, and would take the memory from short ones, which do.
        let memory = (piece.len() <= LONGEST_CHANGE_BYTES).then_some(&self.aside_memory);
        for (block, range) in self.blocks(chunk, piece) {
            if !self.aside.lock().wants(chunk, block)? {
                continue;
            }
            let len = usize::try_from(range.len()).map_err(|e| failed(io::Error::other(e)))?;
            if let Some(mut copied) = memory.and_then(|memory| memory.take(len)) {
                if !old(&mut copied.bytes, range)? {
                    return Ok(false);
                }
                self.aside.lock().of(chunk).in_memory.insert(block, copied);
            } else {
                let Some(file) = file()? else { return Ok(false) };
                let mut buf = vec![0; len];
                if !old(&mut buf, range)? {
                    return Ok(false);
                }
                file.write_at(&buf, range.offset()).map_err(failed)?;
                self.aside.lock().of(chunk).in_file.get_or_insert_default().add(block);
            }
        }
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

    /// Puts what was set aside of a chunk where it was at the cut. `buf` is as long as the chunk.
    pub(super) fn restore(
        &self,
        chunk: ChunkIndex,
        SetAside(copies, file): &SetAside,
        buf: &mut [u8],
    ) -> Result<(), CacheError> {
        let whole = self.geometry.chunk_range(chunk);
        let in_file = file.as_ref().zip(copies.in_file.as_ref());
        for (block, range) in self.blocks(chunk, whole) {
            let old = super::slice_mut(buf, whole, range);
            if let Some(copied) = copies.in_memory.get(&block) {
                old.copy_from_slice(&copied.bytes);
            } else if let Some((file, _)) = in_file.filter(|(_, blocks)| blocks.has(block)) {
                file.read_at(old, range.offset()).map_err(|e| self.error("read", ASIDE_FILE, e))?;
            }
        }
        Ok(())
    }

    /// Nobody will read what is set aside any more.
    pub(super) fn drop_aside(&self) -> Result<(), CacheError> {
        let useless = std::mem::take(&mut *self.aside.lock());
        drop(useless);
        self.disk.remove(&self.dir.join(ASIDE_FILE)).map_err(|e| self.error("removal", ASIDE_FILE, e))
    }
}
