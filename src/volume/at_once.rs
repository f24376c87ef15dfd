//! What a volume does on the caller's own thread, because nothing has to be waited for: most of what a warm cache is
//! asked. It is a client's request that is served here, and counted as one.
//!
//! Promises: the same as the methods that wait, or nothing at all happened that a caller can see; then the caller asks
//! those. No fetch, no sync, no other thread, no allocation but for what a publish needs set aside, and no lock that is held
//! across more than copies of memory.
//! Must never: pass an overlapping change that arrived earlier, or report an error: the methods that wait find it again.

use std::sync::Arc;
use std::time::Instant;

use super::{RequestKind, Volume};
use crate::units::ByteRange;

impl Volume {
    /// Reads a range into `buf`, which is as long; `false` if that would have to wait, or would fail.
    pub fn read_at_once(self: &Arc<Self>, range: ByteRange, buf: &mut [u8]) -> bool {
        let Some(_open) = self.enter_at_once(range) else { return false };
        let started = Instant::now();
        let done = self.cache.read_at_once(range, buf, |chunk| self.is_zero(chunk));
        if done {
            self.meter.read(self.geometry.chunks_in(range), 0);
            self.observe(RequestKind::Read, range.len(), started.elapsed(), true);
            // What is not done here is noted by the method that waits.
            self.read_ahead(range);
        }
        done
    }

    /// Writes `data` at `offset`; `false` if that would have to wait, or would fail, in which case any part of it may
    /// have been written.
    pub fn write_at_once(&self, offset: u64, data: &[u8]) -> bool {
        let Some(started) = self.write_part_at_once(offset, data) else { return false };
        self.observe(RequestKind::Write, data.len() as u64, started.elapsed(), true);
        true
    }

    /// The same for a request that is not done with it: returns when the write began, so that the caller can count the
    /// request once it is done.
    pub fn write_part_at_once(&self, offset: u64, data: &[u8]) -> Option<Instant> {
        let range = ByteRange::new(offset, data.len() as u64)?;
        let _open = self.enter_to_write_at_once(range)?;
        let _turn = self.order.turn_at_once(range)?;
        let started = Instant::now();
        self.cache.write_at_once(range, data).then_some(started)
    }
}
