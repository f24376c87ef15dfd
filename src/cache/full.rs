//! Whether the disk under a cache is full: one warning when it becomes so, one when it no longer is.
//!
//! It is full from the first operation that is refused for want of space until there is room for two chunks, as the file
//! system says; where a quota refused it, until something was written, too. Nothing is decided by it: each operation finds
//! out by itself.

use std::io;

use super::Cache;
use crate::disk::Space;
use crate::sync::{AtomicBool, Ordering};

/// What is known of the room on the disk.
#[derive(Debug, Default)]
pub(super) struct Fullness {
    full: AtomicBool,
    /// The file system may have room that a quota does not grant.
    by_quota: AtomicBool,
}

impl Fullness {
    pub(super) fn is_set(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }
}

/// Whether an operation failed for want of space.
pub(super) fn is_want_of_space(e: &io::Error) -> bool {
    matches!(e.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

impl Cache {
    /// Whether the disk is full, as far as is known.
    pub fn is_full(&self) -> bool {
        if self.full.is_set() && !self.full.by_quota.load(Ordering::Relaxed) && self.has_room() == Some(true) {
            self.end_full();
        }
        self.full.is_set()
    }

    /// The room on the file system of the cache.
    ///
    /// # Errors
    /// Those of the disk; [`io::ErrorKind::Unsupported`] if it does not say.
    pub fn space(&self) -> io::Result<Space> {
        self.disk.space(&self.dir)
    }

    fn has_room(&self) -> Option<bool> {
        self.space().ok().map(|space| space.free >= 2 * self.geometry.chunk_size())
    }

    /// An operation failed.
    pub(super) fn note_refusal(&self, e: &io::Error) {
        if !is_want_of_space(e) {
            return;
        }
        self.full.by_quota.store(e.kind() == io::ErrorKind::QuotaExceeded, Ordering::Relaxed);
        if !self.full.full.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                export = %self.export_id,
                "no space left for the cache in {} ({e}): writes are refused until there is; free some, or move the cache to a \
                 larger disk",
                self.dir.display()
            );
        }
    }

    /// Something was written that may have needed room.
    pub(super) fn note_room(&self) {
        if self.full.is_set() && self.has_room() != Some(false) {
            self.end_full();
        }
    }

    fn end_full(&self) {
        if self.full.full.swap(false, Ordering::Relaxed) {
            tracing::warn!(export = %self.export_id, "there is space again for the cache in {}", self.dir.display());
        }
    }
}
