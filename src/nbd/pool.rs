//! Memory for what comes and goes in bulk: lent while there is something in it, and used again.
//!
//! A buffer is a mapping of its own, not a part of what the allocator hands out. The allocator gives a page back only
//! once all that was ever put there is gone, and what another thread freed only when the one that had it comes by again:
//! a thousand connections that were busy once kept up to 170 MiB for good.
//!
//! Promises: a buffer costs the pages that were used of it; one that comes back is kept for the next borrower, or goes
//! back to the system at once if [`KEPT_BUFFERS`] are. What clients have lent is bounded by their limits.
//! Must never: lend a buffer that is still in use.

use std::alloc::{Layout, handle_alloc_error};
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use bytes::Bytes;
use memmap2::MmapMut;
use parking_lot::Mutex;

/// The size of each buffer, in bytes. It begins at a page, as do those that are copied into it: to an address a few bytes
/// further into its page processors copy much more slowly, 600 µs instead of 250 for reading and sending 1 MiB.
pub(super) const BUFFER_BYTES: usize = 1 << 20;
/// How many are kept for the next borrower.
const KEPT_BUFFERS: usize = 16;

/// The buffers that nobody uses just now.
#[derive(Debug, Default)]
pub(super) struct Pool(Mutex<Vec<MmapMut>>);

/// Bytes in a row, in memory that is lent while there are any. Those that are added have any content at first.
#[derive(Debug)]
pub(super) struct Lease {
    /// `None` while there are no bytes, or have been none yet.
    memory: Option<MmapMut>,
    len: usize,
    pool: Arc<Pool>,
}

impl Pool {
    /// `len` bytes of any content.
    pub(super) fn lease(self: &Arc<Self>, len: usize) -> Lease {
        let mut lease = self.nothing();
        lease.room(len);
        lease
    }

    /// No bytes; they may be added.
    pub(super) fn nothing(self: &Arc<Self>) -> Lease {
        Lease { memory: None, len: 0, pool: Arc::clone(self) }
    }

    /// A buffer, or for more bytes than that a longer one, which is never kept.
    fn lend(&self, len: usize) -> MmapMut {
        if len <= BUFFER_BYTES
            && let Some(kept) = self.0.lock().pop()
        {
            return kept;
        }
        let len = len.max(BUFFER_BYTES);
        // As the allocator does when there is no memory.
        MmapMut::map_anon(len)
            .unwrap_or_else(|_| handle_alloc_error(Layout::array::<u8>(len).unwrap_or(Layout::new::<u8>())))
    }

    fn take_back(&self, memory: MmapMut) {
        let mut kept = self.0.lock();
        if memory.len() == BUFFER_BYTES && kept.len() < KEPT_BUFFERS {
            kept.push(memory);
        }
    }
}

impl Lease {
    /// Adds `len` bytes, and shows them.
    pub(super) fn room(&mut self, len: usize) -> &mut [u8] {
        let start = self.len;
        let end = start + len;
        let capacity = self.memory.as_ref().map_or(0, |memory| memory.len());
        if end > capacity {
            // Growing costs a copy, so not for a few bytes at a time.
            let mut longer = self.pool.lend(end.max(capacity * 2));
            longer[..start].copy_from_slice(self);
            self.give_back();
            self.memory = Some(longer);
        }
        self.len = end;
        &mut self[start..]
    }

    pub(super) fn append(&mut self, bytes: &[u8]) {
        self.room(bytes.len()).copy_from_slice(bytes);
    }

    /// Takes all but the first `len` bytes away.
    pub(super) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// Takes the first `len` bytes away.
    pub(super) fn drop_front(&mut self, len: usize) {
        self.copy_within(len.., 0);
        self.len -= len;
    }

    /// Takes all bytes away, and their memory.
    pub(super) fn give_back(&mut self) {
        self.len = 0;
        if let Some(memory) = self.memory.take() {
            self.pool.take_back(memory);
        }
    }

    /// The bytes, to be shared; the last to let go gives the memory back.
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
        self.memory.as_ref().map_or(&[], |memory| &memory[..self.len])
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut [u8] {
        self.memory.as_mut().map_or(&mut [], |memory| &mut memory[..self.len])
    }
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.give_back();
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
        drop(pool.lease(BUFFER_BYTES + 1));
        let kept = pool.0.lock();
        assert_eq!(kept.iter().map(|memory| memory.len()).collect::<Vec<_>>(), [BUFFER_BYTES; KEPT_BUFFERS]);
    }

    #[test]
    fn a_lease_holds_what_was_put_there_last_and_no_memory_for_nothing() {
        let pool = Arc::new(Pool::default());
        let mut lease = pool.nothing();
        assert!(lease.is_empty());
        lease.append(b"abcdef");
        lease.drop_front(2);
        assert_eq!(*lease, *b"cdef");
        lease.truncate(1);
        lease.append(b"xy");
        assert_eq!(*lease, *b"cxy");
        for len in [2, BUFFER_BYTES, BUFFER_BYTES * 3] {
            assert_eq!(lease.room(len).len(), len);
            assert_eq!(lease[..3], *b"cxy");
            lease.truncate(3);
        }
        lease.give_back();
        assert!(lease.is_empty() && lease.memory.is_none());
    }
}
