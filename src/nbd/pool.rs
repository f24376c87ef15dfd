//! Large buffers, used again: fresh memory costs the kernel more than the copy into it.
//!
//! Promises: no more than [`KEPT_BUFFERS`] are kept, whatever was asked for at once. What a client's buffers hold in
//! flight is bounded by its limits.
//! Must never: hand out a buffer that is still in use.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

/// The size of each buffer, in bytes.
pub(super) const BUFFER_BYTES: usize = 1 << 20;
/// A buffer begins at a multiple of this address. The pages that are copied into it do, too, and processors copy much
/// more slowly to an address a few bytes further into its page: 600 µs instead of 250 for reading and sending 1 MiB.
const ALIGNMENT_BYTES: usize = 4096;
/// How many are kept for the next request.
const KEPT_BUFFERS: usize = 16;

/// The buffers that nobody uses just now.
#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<Vec<Box<[u8]>>>);

/// A buffer in use; it returns to its pool when it is dropped.
#[derive(Debug)]
pub(super) struct Lease {
    buffer: Box<[u8]>,
    /// Where its content begins.
    start: usize,
    len: usize,
    pool: Arc<Pool>,
}

impl Pool {
    /// A buffer of `len` bytes, at most [`BUFFER_BYTES`], with any content.
    pub(super) fn lease(self: &Arc<Self>, len: usize) -> Lease {
        debug_assert!(len <= BUFFER_BYTES);
        let kept = self.0.lock().pop();
        let buffer = kept.unwrap_or_else(|| vec![0; BUFFER_BYTES + ALIGNMENT_BYTES].into_boxed_slice());
        let aligned = buffer.as_ptr().align_offset(ALIGNMENT_BYTES);
        // Where that cannot be told, any place will do.
        let start = if aligned <= ALIGNMENT_BYTES { aligned } else { 0 };
        Lease { buffer, start, len, pool: Arc::clone(self) }
    }
}

impl Lease {
    /// The buffer's content, to be shared; the last to let go returns the buffer.
    pub(super) fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Lease {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl Deref for Lease {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.buffer[self.start..self.start + self.len]
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.buffer[self.start..self.start + self.len]
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut kept = self.pool.0.lock();
        if kept.len() < KEPT_BUFFERS {
            kept.push(std::mem::take(&mut self.buffer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_used_again_once_nobody_has_it_and_not_before() {
        let pool = Arc::new(Pool::default());
        let first = pool.lease(10);
        let at = first.as_ptr();
        let shared = first.freeze();
        let part = shared.slice(3..5);
        drop(shared);
        assert_ne!(pool.lease(10).as_ptr(), at);
        assert_eq!(part.len(), 2);
        drop(part);
        let again = pool.lease(BUFFER_BYTES);
        assert_eq!((again.as_ptr(), again.len()), (at, BUFFER_BYTES));
    }

    #[test]
    fn a_burst_leaves_no_more_than_the_buffers_that_are_kept() {
        let pool = Arc::new(Pool::default());
        drop((0..KEPT_BUFFERS * 2).map(|_| pool.lease(1)).collect::<Vec<_>>());
        assert_eq!(pool.0.lock().len(), KEPT_BUFFERS);
    }
}
