//! Long work in slices, so that whoever wakes up meanwhile soon has a core.
//!
//! The kernel lets a thread run on for a millisecond or more when another one wakes up, and many a kernel interrupts no
//! call that a thread is in. So what goes over megabytes beside clients' requests does it slice by slice, and offers its core
//! between two of them.

use crate::sync::yield_now;

/// The length of a slice in bytes: some 10 to 50 microseconds of work.
pub const SLICE_BYTES: usize = 128 << 10;

/// The slices of `bytes`, with the core offered between two of them.
pub fn slices(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.chunks(SLICE_BYTES).inspect(offering())
}

/// As [`slices`], to be filled.
pub fn slices_mut(bytes: &mut [u8]) -> impl Iterator<Item = &mut [u8]> {
    bytes.chunks_mut(SLICE_BYTES).inspect(offering())
}

fn offering<T>() -> impl FnMut(&T) {
    let mut first = true;
    move |_| {
        if !std::mem::take(&mut first) {
            yield_now();
        }
    }
}
