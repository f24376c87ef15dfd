//! One byte per chunk: what `cache.raw` holds of it, and its part in a publish under way.
//!
//! Anybody may look at any time, without a lock. Only `cache/mod.rs` changes a byte, holding the chunk's stripe lock
//! (or the whole gate), and only after `cache.meta` has the mark, so that what is seen here is never ahead of what a
//! crash would find.

use crate::sync::{AtomicU8, AtomicU64, Ordering};
use crate::units::ChunkIndex;

/// What the cache holds of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Content {
    /// Its bytes in `cache.raw` mean nothing; the published image has its content.
    Absent,
    /// In `cache.raw`, the same as published.
    Clean,
    /// In `cache.raw`, different from what is published.
    Dirty,
    /// All zeros, different from what is published; its bytes in `cache.raw` mean nothing.
    Zero,
}

/// A chunk's byte: [`Content`] and the flags of a publish.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkState(u8);

const CONTENT: u8 = 0b11;
const IN_CUT: u8 = 0b100;
const AWAITED: u8 = 0b1000;

impl ChunkState {
    /// The state of a chunk that no publish concerns.
    #[must_use]
    pub fn new(content: Content) -> Self {
        Self(match content {
            Content::Absent => 0,
            Content::Clean => 1,
            Content::Dirty => 2,
            Content::Zero => 3,
        })
    }

    /// What the cache holds.
    #[must_use]
    pub fn content(self) -> Content {
        match self.0 & CONTENT {
            0 => Content::Absent,
            1 => Content::Clean,
            2 => Content::Dirty,
            _ => Content::Zero,
        }
    }

    /// Whether the next snapshot publishes the chunk.
    #[must_use]
    pub fn is_dirty(self) -> bool {
        matches!(self.content(), Content::Dirty | Content::Zero)
    }

    /// Whether its bytes in `cache.raw` are its content.
    #[must_use]
    pub fn is_resident(self) -> bool {
        matches!(self.content(), Content::Clean | Content::Dirty)
    }

    /// Whether a write needs no more than its bytes: dirty already, and no publish waits for the old content.
    #[must_use]
    pub fn takes_writes_freely(self) -> bool {
        self.0 == Self::new(Content::Dirty).0
    }

    /// Dirty since before the cut of the publish under way, and not written since.
    #[must_use]
    pub fn in_cut(self) -> bool {
        self.0 & IN_CUT != 0
    }

    /// The publish under way still has to read what the chunk was at the cut.
    #[must_use]
    pub fn awaited(self) -> bool {
        self.0 & AWAITED != 0
    }

    /// The state as a publish begins: whatever is dirty joins the cut.
    #[must_use]
    pub fn cut(self) -> Self {
        match self.content() {
            Content::Dirty => Self(self.0 | IN_CUT | AWAITED),
            Content::Zero => Self(self.0 | IN_CUT),
            _ => self,
        }
    }

    /// The state as the publish has read what the chunk was, or no longer will.
    #[must_use]
    pub fn taken(self) -> Self {
        Self(self.0 & !AWAITED)
    }

    /// The state once the chunk has new content: no longer part of the cut, but what it was then may still be awaited.
    #[must_use]
    pub fn rewritten(self, content: Content) -> Self {
        Self(self.0 & AWAITED | Self::new(content).0)
    }

    /// The state once the publish is the head: what was not written since is now as published.
    #[must_use]
    pub fn published(self) -> Self {
        match (self.in_cut(), self.content()) {
            (true, Content::Dirty) => Self::new(Content::Clean),
            (true, Content::Zero) => Self::new(Content::Absent),
            (_, content) => Self::new(content),
        }
    }

    /// As [`published`](Self::published), if an earlier life of the server made the cut. A write since then may have
    /// reached the disk without its mark, so the bytes here are not known to be those that were published.
    #[must_use]
    pub fn published_unseen(self) -> Self {
        if self.in_cut() { Self::new(Content::Absent) } else { self.uncut() }
    }

    /// The state once the publish is given up: all as before, nothing cleaned.
    #[must_use]
    pub fn uncut(self) -> Self {
        Self::new(self.content())
    }

    /// The part that a crash must not lose, for `cache.meta`: content and cut.
    #[must_use]
    pub fn durable_bits(self) -> u8 {
        self.0 & (CONTENT | IN_CUT)
    }

    /// A state from [`durable_bits`](Self::durable_bits); `None` for anything else.
    #[must_use]
    pub fn from_durable_bits(bits: u8) -> Option<Self> {
        let state = Self(bits);
        (bits & !(CONTENT | IN_CUT) == 0 && (!state.in_cut() || state.is_dirty())).then_some(state)
    }
}

/// The states of all chunks of an image.
#[derive(Debug)]
pub struct ChunkStates {
    states: Box<[AtomicU8]>,
    resident: AtomicU64,
    dirty: AtomicU64,
}

impl ChunkStates {
    /// The states as recovered, in the order of the chunks.
    #[must_use]
    pub fn new(states: &[ChunkState]) -> Self {
        let count = |is: fn(ChunkState) -> bool| AtomicU64::new(states.iter().filter(|s| is(**s)).count() as u64);
        Self {
            states: states.iter().map(|s| AtomicU8::new(s.0)).collect(),
            resident: count(ChunkState::is_resident),
            dirty: count(ChunkState::is_dirty),
        }
    }

    /// A chunk's state now.
    #[must_use]
    pub fn get(&self, chunk: ChunkIndex) -> ChunkState {
        // Acquire pairs with the Release of `set`: who sees a chunk resident sees its bytes, too.
        ChunkState(self.states[chunk.slot()].load(Ordering::Acquire))
    }

    /// Sets a chunk's state; the caller holds its stripe lock or the gate.
    pub fn set(&self, chunk: ChunkIndex, state: ChunkState) {
        let before = ChunkState(self.states[chunk.slot()].swap(state.0, Ordering::AcqRel));
        recount(&self.resident, before.is_resident(), state.is_resident());
        recount(&self.dirty, before.is_dirty(), state.is_dirty());
    }

    /// How many chunks are resident, and how many dirty; for watching, since a change and its count are two steps.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (self.resident.load(Ordering::Relaxed), self.dirty.load(Ordering::Relaxed))
    }

    /// Every chunk with its state, in order.
    pub fn iter(&self) -> impl Iterator<Item = (ChunkIndex, ChunkState)> + '_ {
        (0..).map(ChunkIndex).zip(self.states.iter().map(|s| ChunkState(s.load(Ordering::Acquire))))
    }
}

fn recount(count: &AtomicU64, before: bool, now: bool) {
    match (before, now) {
        (false, true) => count.fetch_add(1, Ordering::Relaxed),
        (true, false) => count.fetch_sub(1, Ordering::Relaxed),
        _ => return,
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counts_are_those_of_a_scan_after_any_change() {
        let contents = [Content::Absent, Content::Clean, Content::Dirty, Content::Zero].map(ChunkState::new);
        let cut = contents.map(ChunkState::cut);
        let every: Vec<_> = contents.into_iter().chain(cut).collect();
        let states = ChunkStates::new(&every);
        let scan = || {
            let count = |is: fn(ChunkState) -> bool| states.iter().filter(|(_, state)| is(*state)).count() as u64;
            (count(ChunkState::is_resident), count(ChunkState::is_dirty))
        };
        assert_eq!(states.counts(), (4, 4));
        for (i, _) in every.iter().enumerate() {
            for state in &every {
                states.set(ChunkIndex(u32::try_from(i).unwrap()), *state);
                assert_eq!(states.counts(), scan());
            }
        }
    }
}
