//! Dropping clean chunks, to get their space back.
//!
//! First a checkpoint that calls them absent, then their states in memory, then the holes (L9): a crash at any point finds a
//! clean chunk with its bytes, or an absent one. Between the checkpoint and the states the file is behind what the cache
//! holds, and never ahead of it: an absent chunk may be overwritten before its mark, a clean one may not.
//!
//! Readers and writers wait for two passes over the states, and for the hole of one chunk at a time.

use super::states::{ChunkState, Content};
use super::{Cache, CacheError, RAW_FILE};
use crate::sabotage::{Rule, breaks};
use crate::units::ChunkIndex;

impl Cache {
    /// Makes every clean chunk absent and frees its space. Dirty chunks and zeros that are not published stay, and so does a
    /// chunk that is written or fetched meanwhile. Needs no room on the disk (L7).
    ///
    /// Returns the bytes of the chunks that were dropped; a file system without holes keeps their space.
    ///
    /// # Errors
    /// [`CacheError`]; if the checkpoint fails nothing is dropped, if a hole fails the chunk is absent and keeps its space.
    pub fn evict_clean(&self) -> Result<u64, CacheError> {
        // Most of what the checkpoint must sync goes to the disk before it, while everything goes on.
        self.sync_raw()?;
        let mut freed = 0;
        for chunk in self.forget_clean()? {
            freed += self.free_absent(chunk)?;
        }
        self.note_room();
        Ok(freed)
    }

    /// Makes the clean chunks absent, first in `cache.meta`; the ones that are.
    fn forget_clean(&self) -> Result<Vec<ChunkIndex>, CacheError> {
        let (clean, absent) = (ChunkState::new(Content::Clean), ChunkState::new(Content::Absent));
        // No other checkpoint may come in between, and call clean again what memory calls absent.
        let _one_at_a_time = self.checkpointing.lock();
        if breaks(Rule::PunchBeforeEviction) {
            let clean = self.states.iter().filter(|(_, state)| *state == clean);
            clean.map(|(chunk, _)| self.raw.punch(self.geometry.chunk_range(chunk))).for_each(drop);
        }
        let mut dropped = super::touched_room(self.states.counts().0, ChunkIndex(u32::MAX));
        self.write_checkpoint(|_, room| {
            let mut states = self.all_states(room);
            for (chunk, state) in (0..).map(ChunkIndex).zip(&mut states).filter(|(_, state)| **state == clean) {
                dropped.push(chunk);
                *state = absent;
            }
            states
        })?;
        // No reader of a chunk's bytes is under way here, nor later: all see it absent.
        let _alone = self.gate.write();
        // One that is clean now was clean all along: without a publish none becomes so but from absent.
        dropped.retain(|chunk| self.states.get(*chunk) == clean);
        for chunk in &dropped {
            self.states.set(*chunk, absent);
        }
        Ok(dropped)
    }

    /// Frees the space of a chunk, unless it is resident again; how many bytes.
    fn free_absent(&self, chunk: ChunkIndex) -> Result<u64, CacheError> {
        let _shared = self.gate.read();
        let _stripe = self.stripe(chunk);
        if self.states.get(chunk).content() != Content::Absent && !breaks(Rule::PunchRefilled) {
            return Ok(0);
        }
        let whole = self.geometry.chunk_range(chunk);
        self.raw.free(whole).map_err(|e| self.error("punch", RAW_FILE, e))?;
        Ok(whole.len())
    }
}
