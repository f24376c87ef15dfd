//! Read-ahead: who reads on will find the next chunks here.
//!
//! A read that begins about where an earlier one ended continues its *stream*. Several streams of a volume are followed at once.
//! A stream that goes on is read ahead of, by a window that grows eightfold with every chunk it comes to, up to
//! [`WINDOW_BYTES`]; a read that continues nothing starts a new stream in the place of the one least recently used, without a
//! window. So random reading fetches nothing ahead, and what a reader that turns away leaves behind is one window.
//!
//! What is here is the plan alone: it never fetches, never waits, and errs on the side of doing nothing.

use std::ops::Range;

use parking_lot::Mutex;

use super::budget::{BACKGROUND_BYTES, BACKGROUND_FETCHES};
use crate::units::{ByteRange, Geometry};

/// How far ahead of one stream chunks are fetched, in bytes.
pub const WINDOW_BYTES: u64 = BACKGROUND_BYTES;
/// How far ahead of one stream chunks are fetched, in chunks: small ones are many more than the store serves at a time.
pub const WINDOW_CHUNKS: u32 = 64;
/// How many streams of one volume are followed.
pub const STREAMS: usize = 16;
/// How many reads must have continued a stream before it is read ahead of.
const PROOF: u32 = 2;
/// What part of a chunk it must have read by then: a few small reads in a row are worth no chunk.
const PROOF_OF_CHUNK: u64 = 8;
/// The first window, in chunks.
const FIRST_WINDOW: u32 = 2;
/// By how much the window grows with every chunk that the stream comes to: the second chunk keeps all of a store's streams busy.
const GROWTH: u32 = 8;
const _: () = assert!(FIRST_WINDOW * GROWTH >= BACKGROUND_FETCHES);

/// One reader that goes on.
#[derive(Debug, Clone, Copy, Default)]
struct Stream {
    /// The first byte that it read.
    begun: u64,
    /// The first byte behind what it has read.
    next: u64,
    /// How many reads continued it.
    continued: u32,
    /// How far ahead of it chunks are fetched, in chunks.
    window: u32,
    /// The first chunk that was not asked for.
    asked: u32,
    /// When it was last used; 0 is an empty place.
    used: u64,
}

/// The streams of one volume.
#[derive(Debug, Default)]
pub(super) struct ReadAhead(Mutex<Streams>);

#[derive(Debug, Default)]
struct Streams {
    places: [Stream; STREAMS],
    /// Counts reads.
    now: u64,
}

impl ReadAhead {
    /// Takes note of a read inside the image; the chunks that should be fetched now because of it.
    pub(super) fn note(&self, geometry: Geometry, range: ByteRange) -> Option<Range<u32>> {
        // Not waiting: a read that is not noted costs less than one that waits for its turn here.
        self.0.try_lock()?.note(geometry, range)
    }
}

impl Streams {
    fn note(&mut self, geometry: Geometry, range: ByteRange) -> Option<Range<u32>> {
        if range.is_empty() {
            return None;
        }
        self.now += 1;
        // Requests that are sent together arrive in any order.
        let slack = geometry.chunk_size() / 2;
        let near = |s: &&mut Stream| s.used > 0 && s.next.abs_diff(range.offset()) <= slack;
        let Some(stream) = self.places.iter_mut().filter(near).max_by_key(|s| s.used) else {
            let oldest = self.places.iter_mut().min_by_key(|s| s.used)?;
            *oldest = Stream { begun: range.offset(), next: range.end(), used: self.now, ..Stream::default() };
            return None;
        };
        stream.used = self.now;
        stream.advance(geometry, range.end())
    }
}

impl Stream {
    fn advance(&mut self, geometry: Geometry, end: u64) -> Option<Range<u32>> {
        if end <= self.next {
            return None;
        }
        let before = geometry.chunk_at(self.next.saturating_sub(1)).0;
        let here = geometry.chunk_at(end - 1).0;
        self.next = end;
        self.continued = self.continued.saturating_add(1);
        let proof = geometry.chunk_size() / PROOF_OF_CHUNK;
        if self.continued < PROOF || end.saturating_sub(self.begun) < proof {
            return None;
        }
        let most = u32::try_from(WINDOW_BYTES / geometry.chunk_size()).unwrap_or(u32::MAX).min(WINDOW_CHUNKS);
        if self.window == 0 {
            self.window = FIRST_WINDOW.min(most);
        } else if here > before {
            self.window = self.window.saturating_mul(GROWTH).min(most);
        }
        let from = self.asked.max(here + 1);
        let to = here.saturating_add(1).saturating_add(self.window).min(geometry.chunk_count());
        // A few at a time: each batch is a task.
        if from >= to || (to < geometry.chunk_count() && to - from < self.window / 4) {
            return None;
        }
        self.asked = to;
        Some(from..to)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn geometry() -> Geometry {
        Geometry::new(1 << 40, 4 * MIB).unwrap()
    }

    fn note(streams: &mut Streams, offset: u64, len: u64) -> Range<u32> {
        streams.note(geometry(), ByteRange::new(offset, len).unwrap()).unwrap_or(0..0)
    }

    /// Reads `len` bytes from `start` by MiB; every chunk that was asked for, in order.
    fn sequence(streams: &mut Streams, start: u64, len: u64) -> Vec<u32> {
        (0..len / MIB).flat_map(|i| note(streams, start + i * MIB, MIB)).collect()
    }

    #[test]
    fn a_sequence_asks_for_every_chunk_ahead_of_it_once_and_no_further_than_the_window() {
        let mut streams = Streams::default();
        let mut asked = Vec::new();
        let most = u32::try_from(WINDOW_BYTES / (4 * MIB)).unwrap();
        for i in 0..1024 {
            asked.extend(note(&mut streams, i * MIB, MIB));
            let (here, last) = (u32::try_from(i / 4).unwrap(), asked.last().copied().unwrap_or(0));
            assert!(last <= here + most, "at chunk {here} already {last}");
            // Once the window is open, it stays open.
            assert!(here < 16 || last >= here + most / 2, "at chunk {here} only {last}");
        }
        let last = *asked.last().unwrap();
        assert_eq!(asked, (1..=last).collect::<Vec<_>>());
    }

    #[test]
    fn the_window_grows_with_the_stream() {
        let mut streams = Streams::default();
        assert!(sequence(&mut streams, 0, 2 * MIB).is_empty());
        assert_eq!(sequence(&mut streams, 2 * MIB, 2 * MIB), [1, 2]);
        assert_eq!(sequence(&mut streams, 4 * MIB, 4 * MIB), (3..=17).collect::<Vec<_>>());
        assert_eq!(sequence(&mut streams, 8 * MIB, 4 * MIB), (18..=34).collect::<Vec<_>>());
    }

    #[test]
    fn random_reading_asks_for_nothing() {
        let mut streams = Streams::default();
        for i in 0..100_000u64 {
            let offset = (i.wrapping_mul(0x9E37_79B9_7F4A_7C15) % (1 << 40)) & !4095;
            assert_eq!(note(&mut streams, offset, 4096), 0..0);
        }
    }

    #[test]
    fn a_few_small_reads_in_a_row_are_no_stream_yet() {
        let mut streams = Streams::default();
        assert!((0..64).all(|i| note(&mut streams, 40 * MIB + i * 4096, 4096).is_empty()));
    }

    #[test]
    fn reading_one_place_again_and_again_asks_for_nothing() {
        let mut streams = Streams::default();
        assert!((0..100).all(|_| note(&mut streams, 40 * MIB, MIB).is_empty()));
    }

    #[test]
    fn several_streams_at_once_are_each_recognised() {
        let mut streams = Streams::default();
        let starts: Vec<u64> = (0..8).map(|i| i << 36).collect();
        let mut asked = vec![0; starts.len()];
        for i in 0..64 {
            for (start, asked) in starts.iter().zip(&mut asked) {
                *asked += note(&mut streams, start + i * MIB, MIB).len();
            }
        }
        assert!(asked.iter().all(|n| *n >= 32), "{asked:?}");
    }

    #[test]
    fn requests_that_arrive_out_of_order_are_one_stream() {
        let mut streams = Streams::default();
        let mut asked: Vec<u32> = Vec::new();
        for i in (0..1024u64).step_by(4) {
            for j in [2, 0, 3, 1] {
                asked.extend(note(&mut streams, (i + j) * MIB / 8, MIB / 8));
            }
        }
        assert_eq!(asked, (1..=*asked.last().unwrap()).collect::<Vec<_>>());
        assert!(*asked.last().unwrap() >= 32 + 24);
    }

    #[test]
    fn nothing_beyond_the_image_is_asked_for() {
        let end = geometry().image_size();
        let mut streams = Streams::default();
        let asked = sequence(&mut streams, end - 16 * MIB, 16 * MIB);
        assert_eq!(asked.last(), Some(&(geometry().chunk_count() - 1)));
    }
}
