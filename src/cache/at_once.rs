//! Reads and writes on the caller's own thread, which others share: only what is a matter of copying memory.
//!
//! A read asks the kernel for what is in the page cache and nothing else. A write is served if all of its chunks are dirty
//! already; or if it touches one chunk alone that is here, and marking it, or setting aside for a publish what it was, are
//! copies of memory, too. The kernel cannot be asked not to wait on every file system: a write copies into the page cache,
//! and now and then the kernel makes the writer wait there, 200 ms at most at a time, when more is dirty than the disk takes.
//! So writes are timed ([`Pace`]): after a slow one they go the way of all that waits, for as long as it took, and longer
//! if slow ones follow each other. In the long run pauses of the kernel hold a thread up for a tenth of its time at most. A
//! write that meets a sync may wait for the file system's journal, so beside a flush none is done here at all.

use std::time::{Duration, Instant};

use super::states::Content;
use super::{Cache, LogFile, STRIPES};
use crate::sync::{AtomicU32, AtomicU64, Ordering};
use crate::units::{ByteRange, ChunkIndex};

/// A write that took longer than this had to wait. Far above what it costs to copy one and to lose the processor
/// meanwhile, far below the kernel's longest pause.
const SLOW_WRITE: Duration = Duration::from_millis(20);
/// After a slow write none is tried for as long as it took; after the next one for twice as long, and so on up to this many
/// times. A single one, as when the journal is written beside a publish, does not send a second's writes the longer way.
const MOST_REST_FACTOR: u32 = 20;
/// But never for longer than this. A slow write that comes so long after a rest is the first again.
const LONGEST_REST: Duration = Duration::from_secs(4);

/// The longest write to a chunk with a mark or a copy to be made first, in bytes. The copy is of the blocks it touches.
pub(super) const LONGEST_CHANGE_BYTES: u64 = 64 << 10;

/// Whether writes are swift.
#[derive(Debug)]
pub(super) struct Pace {
    begun: Instant,
    /// Until when writes rest, in microseconds since `begun`.
    rest_until: AtomicU64,
    /// How many times as long as a slow write they rest.
    factor: AtomicU32,
}

impl Default for Pace {
    fn default() -> Self {
        Self { begun: Instant::now(), rest_until: AtomicU64::new(0), factor: AtomicU32::new(1) }
    }
}

impl Pace {
    fn at(&self, when: Instant) -> u64 {
        micros(when.saturating_duration_since(self.begun))
    }

    /// When the write may begin: now, or not at all.
    fn start(&self) -> Option<Instant> {
        let now = Instant::now();
        (self.at(now) >= self.rest_until.load(Ordering::Relaxed)).then_some(now)
    }

    /// A write that began at `started` has ended at `now`.
    fn end(&self, started: Instant, now: Instant) {
        let took = now.saturating_duration_since(started);
        if took <= SLOW_WRITE {
            return;
        }
        let (began, rested) = (self.at(started), self.rest_until.load(Ordering::Relaxed));
        let factor = match self.factor.load(Ordering::Relaxed) {
            // It was held up beside the one that the rest is for.
            factor if began < rested => factor,
            factor if rested > 0 && began < rested + micros(LONGEST_REST) => (factor * 2).min(MOST_REST_FACTOR),
            _ => 1,
        };
        self.factor.store(factor, Ordering::Relaxed);
        let rest = took.saturating_mul(factor).min(LONGEST_REST);
        self.rest_until.fetch_max(self.at(now + rest), Ordering::Relaxed);
    }
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

impl Cache {
    /// As [`read`](Self::read), if all of it is here and in memory; else `false`, and `buf` has any content.
    pub fn read_at_once(&self, range: ByteRange, buf: &mut [u8], is_zero: impl Fn(ChunkIndex) -> bool) -> bool {
        let Some(_shared) = self.gate.try_read() else { return false };
        self.geometry.split(range).all(|(chunk, piece)| {
            let state = self.states.get(chunk);
            // After a failed sync neither kind is read from the page cache as it is.
            if (state.is_dirty() || state.is_resident()) && self.failed.get().is_some() {
                return false;
            }
            let part = super::slice_mut(buf, range, piece);
            match state.content() {
                Content::Clean | Content::Dirty => self.raw.read_at_once(part, piece.offset()).unwrap_or(false),
                Content::Absent if !is_zero(chunk) => false,
                Content::Absent | Content::Zero => {
                    part.fill(0);
                    true
                }
            }
        })
    }

    /// As [`write`](Self::write), if it is a matter of copying memory and writes are swift; else `false`, and any part of
    /// it may have been written.
    pub fn write_at_once(&self, range: ByteRange, data: &[u8]) -> bool {
        let Some(_shared) = self.gate.try_read() else { return false };
        let ours = self.log_is_ours.load(Ordering::Acquire);
        // On a full disk, too, they go the way that notices when there is room again.
        if !ours || self.failed.get().is_some() || self.full.is_set() || self.flush.is_under_way() {
            return false;
        }
        let free = self.geometry.split(range).all(|(chunk, _)| self.states.get(chunk).takes_writes_freely());
        let Some(started) = self.pace.start() else { return false };
        let written =
            if free { self.raw.write_at(data, range.offset()).is_ok() } else { self.change_at_once(range, data) };
        self.pace.end(started, Instant::now());
        written
    }

    /// Writes a part of one chunk that is here, and what must come before: its mark, and its old content for a publish.
    fn change_at_once(&self, range: ByteRange, data: &[u8]) -> bool {
        let chunk = self.geometry.chunk_at(range.offset());
        if self.geometry.chunk_at(range.end() - 1) != chunk || range.len() > LONGEST_CHANGE_BYTES {
            return false;
        }
        let Some(_stripe) = self.stripes[chunk.slot() % STRIPES].try_lock() else { return false };
        let state = self.states.get(chunk);
        if !state.is_resident() || (state.awaited() && !self.save_aside_at_once(chunk, range)) {
            return false;
        }
        // Who holds the log may be writing a checkpoint.
        let marks = self.log.try_lock().is_some_and(|log| match &*log {
            LogFile::Open(log) => log.takes_a_mark_at_once(),
            LogFile::Sealed { .. } => false,
        });
        marks && self.write_chunk(chunk, range, data, |_| false).unwrap_or(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOW: Duration = Duration::from_millis(100);

    /// A pace, and the moment at which it began.
    fn pace() -> (Pace, Instant) {
        let pace = Pace::default();
        let begun = pace.start().unwrap();
        (pace, begun)
    }

    #[test]
    fn after_a_slow_write_none_is_tried_for_as_long_as_it_took() {
        let (pace, begun) = pace();
        pace.end(begun, begun + SLOW_WRITE);
        assert!(pace.start().is_some(), "as swift as it may be");
        for _ in 0..4 {
            // Those that were held up by the same are one.
            pace.end(begun, begun + SLOW);
        }
        assert_eq!(pace.rest_until.load(Ordering::Relaxed), pace.at(begun + 2 * SLOW));
        pace.end(begun, begun + Duration::from_secs(3600));
        assert!(pace.start().is_none());
        let longest = pace.at(begun + Duration::from_secs(3600) + LONGEST_REST);
        assert_eq!(pace.rest_until.load(Ordering::Relaxed), longest);
    }

    #[test]
    fn slow_writes_that_follow_each_other_are_rested_from_for_up_to_twenty_times_as_long() {
        let (pace, mut now) = pace();
        for factor in [1, 2, 4, 8, 16, 20, 20] {
            pace.end(now, now + SLOW);
            now += SLOW + SLOW * factor;
            assert_eq!(pace.rest_until.load(Ordering::Relaxed), pace.at(now), "{factor}");
        }
        now += LONGEST_REST;
        pace.end(now, now + SLOW);
        assert_eq!(pace.rest_until.load(Ordering::Relaxed), pace.at(now + 2 * SLOW), "the first again");
    }
}
