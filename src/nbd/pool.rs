//! Memory for what comes and goes in bulk: borrowed while there is something in it, and used again.
//!
//! A buffer is a mapping of its own, not a part of what the allocator hands out. The allocator gives a page back only
//! once all that was ever put there is gone, and what another thread freed only when the one that had it comes by again:
//! a thousand connections that were busy once kept up to 170 MiB for good.
//!
//! Promises: a buffer costs the pages that were used of it; only [`Pool::most_kept`] of all, lent or not, were used
//! before, and may cost the pages of others' use, too. No more are kept; the rest goes back to the system at once.
//! Must never: lend a buffer that is still in use, or map or unmap under the lock.

use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use bytes::Bytes;
use memmap2::MmapMut;
use parking_lot::Mutex;

/// The size of each buffer, in bytes. It begins at a page, as do those that are copied into it: to an address a few bytes
/// further into its page processors copy much more slowly, 600 µs instead of 250 for reading and sending 1 MiB.
pub(super) const BUFFER_BYTES: usize = 1 << 20;
/// How many are kept for the next borrowers, for each processor and at least: a connection that is being polled has up to
/// three, one that waits for its client has none.
const KEPT_BUFFERS_PER_CORE: usize = 4;
const KEPT_BUFFERS: usize = 16;
/// How many more may be lent. A process may have 65,530 mappings, and with that many not even one can be taken out of the
/// middle of two. Beyond these the allocator lends.
const FRESH_BUFFERS: usize = 16 << 10;

/// The buffers of a server.
#[derive(Debug)]
pub(super) struct Pool {
    most_kept: usize,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Those that nobody uses just now.
    kept: Vec<MmapMut>,
    /// How many are lent that had been kept, and how many that had not.
    lent_again: usize,
    lent_fresh: usize,
}

#[derive(Debug)]
enum Memory {
    /// It was used before.
    Again(MmapMut),
    Fresh(MmapMut),
    Allocated(Box<[u8]>),
}

/// Bytes in a row, in memory that is borrowed while there are any. Those that are added have any content at first.
#[derive(Debug)]
pub(super) struct Lease {
    /// `None` while there are no bytes.
    memory: Option<Memory>,
    len: usize,
    pool: Arc<Pool>,
}

impl Default for Pool {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self { most_kept: KEPT_BUFFERS.max(cores * KEPT_BUFFERS_PER_CORE), state: Mutex::default() }
    }
}

impl Pool {
    /// `len` bytes of any content.
    pub(super) fn lease(self: &Arc<Self>, len: usize) -> Lease {
        let mut lease = self.nothing();
        lease.add(len);
        lease
    }

    /// No bytes; they may be added.
    pub(super) fn nothing(self: &Arc<Self>) -> Lease {
        Lease { memory: None, len: 0, pool: Arc::clone(self) }
    }

    /// A buffer, or for more bytes than that a longer one, which is never kept.
    fn lend(&self, len: usize) -> Memory {
        let may_map = {
            let state = &mut *self.state.lock();
            if len <= BUFFER_BYTES
                && let Some(kept) = state.kept.pop()
            {
                state.lent_again += 1;
                return Memory::Again(kept);
            }
            let may_map = state.lent_fresh < FRESH_BUFFERS;
            state.lent_fresh += usize::from(may_map);
            may_map
        };
        if may_map {
            if let Ok(fresh) = MmapMut::map_anon(len.max(BUFFER_BYTES)) {
                return Memory::Fresh(fresh);
            }
            self.state.lock().lent_fresh -= 1;
        }
        Memory::Allocated(vec![0; len].into_boxed_slice())
    }

    fn take_back(&self, memory: Memory) {
        let surplus = {
            let state = &mut *self.state.lock();
            let memory = match memory {
                Memory::Again(memory) => {
                    state.lent_again -= 1;
                    memory
                }
                Memory::Fresh(memory) => {
                    state.lent_fresh -= 1;
                    memory
                }
                Memory::Allocated(_) => return,
            };
            if memory.len() == BUFFER_BYTES && state.kept.len() + state.lent_again < self.most_kept {
                state.kept.push(memory);
                return;
            }
            memory
        };
        drop(surplus);
    }

    /// How many nobody uses just now.
    #[cfg(test)]
    pub(super) fn kept(&self) -> usize {
        self.state.lock().kept.len()
    }
}

impl Deref for Memory {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Again(mapped) | Self::Fresh(mapped) => mapped,
            Self::Allocated(bytes) => bytes,
        }
    }
}

impl DerefMut for Memory {
    fn deref_mut(&mut self) -> &mut [u8] {
        match self {
            Self::Again(mapped) | Self::Fresh(mapped) => mapped,
            Self::Allocated(bytes) => bytes,
        }
    }
}

impl Lease {
    /// Adds `len` bytes, and shows them.
    pub(super) fn add(&mut self, len: usize) -> &mut [u8] {
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
        self.add(bytes.len()).copy_from_slice(bytes);
    }

    /// Takes all but the first `len` bytes away.
    pub(super) fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
        if self.len == 0 {
            self.give_back();
        }
    }

    /// Takes the first `len` bytes away.
    pub(super) fn drop_front(&mut self, len: usize) {
        self.copy_within(len.., 0);
        self.truncate(self.len - len);
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
        drop((0..pool.most_kept * 2).map(|_| pool.lease(1)).collect::<Vec<_>>());
        drop(pool.lease(BUFFER_BYTES + 1));
        let state = pool.state.lock();
        assert_eq!(
            state.kept.iter().map(|memory| memory.len()).collect::<Vec<_>>(),
            vec![BUFFER_BYTES; pool.most_kept]
        );
        assert_eq!((state.lent_again, state.lent_fresh), (0, 0));
    }

    #[test]
    fn borrowers_that_hold_on_to_used_buffers_do_not_make_more_of_them() {
        let pool = Arc::new(Pool::default());
        let mut held = Vec::new();
        for _ in 0..pool.most_kept * 2 {
            drop(pool.lease(BUFFER_BYTES));
            held.push(pool.lease(1));
        }
        let used = held.iter().filter(|lease| matches!(lease.memory, Some(Memory::Again(_)))).count();
        assert_eq!((used, pool.kept()), (pool.most_kept, 0));
    }

    #[test]
    fn beyond_what_may_be_mapped_the_allocator_lends_what_is_asked_for() {
        let pool = Arc::new(Pool::default());
        pool.state.lock().lent_fresh = FRESH_BUFFERS;
        let mut lease = pool.lease(3);
        assert!(matches!(&lease.memory, Some(Memory::Allocated(bytes)) if bytes.len() == 3));
        lease.copy_from_slice(b"abc");
        lease.append(b"def");
        assert_eq!(*lease, *b"abcdef");
        drop(lease);
        assert_eq!((pool.kept(), pool.state.lock().lent_fresh), (0, FRESH_BUFFERS));
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
            assert_eq!(lease.add(len).len(), len);
            assert_eq!(lease[..3], *b"cxy");
            lease.truncate(3);
        }
        lease.truncate(0);
        assert!(lease.memory.is_none());
        lease.append(b"z");
        lease.drop_front(1);
        assert!(lease.memory.is_none());
    }
}
