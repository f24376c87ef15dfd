//! Long work in slices, so that whoever wakes up meanwhile soon has a core.
//!
//! The kernel lets a thread run on for a millisecond or more when another one wakes up, and many a kernel interrupts no
//! call that a thread is in. So what goes over megabytes beside clients' requests does it slice by slice, and offers its core
//! before each, also where chunks are no longer than one.
//!
//! What no client waits for leaves half of the cores to clients: it has a [`background_core`] while it works.

use std::sync::LazyLock;

use tokio::sync::{Semaphore, SemaphorePermit};

use crate::sync::yield_now;

/// The length of a slice in bytes: some 10 to 50 microseconds of work.
pub const SLICE_BYTES: usize = 128 << 10;

/// Of the machine, so of all servers in one process together.
static BACKGROUND_CORES: LazyLock<Semaphore> =
    LazyLock::new(|| Semaphore::new(std::thread::available_parallelism().map_or(1, usize::from).div_ceil(2)));

/// A core to work on for what no client waits for. Who holds one, or waits for one, must be polled by someone who does
/// neither: all others wait for it.
pub async fn background_core() -> Option<SemaphorePermit<'static>> {
    BACKGROUND_CORES.acquire().await.ok()
}

/// The slices of `bytes`, with the core offered before each.
pub fn slices(bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    bytes.chunks(SLICE_BYTES).inspect(|_| yield_now())
}

/// As [`slices`], to be filled.
pub fn slices_mut(bytes: &mut [u8]) -> impl Iterator<Item = &mut [u8]> {
    bytes.chunks_mut(SLICE_BYTES).inspect(|_| yield_now())
}
