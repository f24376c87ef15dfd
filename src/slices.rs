//! Long work in slices, so that whoever wakes up meanwhile soon has a core.
//!
//! The kernel lets a thread run on for a millisecond or more when another one wakes up, and many a kernel interrupts no
//! call that a thread is in. So what goes over megabytes beside clients' requests does it slice by slice, and offers its core
//! before each, also where chunks are no longer than one.

use crate::sync::yield_now;

/// The length of a slice in bytes: some 10 to 50 microseconds of work.
pub const SLICE_BYTES: usize = 128 << 10;

/// The slices of `bytes`, with the core offered before each.
pub fn slices(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.chunks(SLICE_BYTES).inspect(|_| yield_now())
}

/// As [`slices`], to be filled.
pub fn slices_mut(bytes: &mut [u8]) -> impl Iterator<Item = &mut [u8]> {
    bytes.chunks_mut(SLICE_BYTES).inspect(|_| yield_now())
}
