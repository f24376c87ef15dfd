//! What can go wrong at the n-th call of the disk or of the store, once or from there on.

use std::io;

use super::SECTOR;

/// What a disk does instead of what it was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskFault {
    /// The call fails with EIO. If it was a sync, what it was about is gone.
    Eio,
    /// There is no space left: whatever needs new space gets ENOSPC, all else works.
    Full,
    /// A write stops half-way, with EIO; other calls fail with EIO.
    Short,
}

/// What a store does instead of what it was asked for. HTTP answers become these outcomes in `src/store/remote/`,
/// whose tests hold that: 429, 500 and 503 are [`Before`](Self::Before), 409 and 412 are [`Conflict`](Self::Conflict).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreFault {
    /// Nothing happens, and the caller hears that the store is not available.
    Before,
    /// It happens, and the caller hears that the store is not available.
    LandedUnseen,
    /// The caller hears that the store is not available; it happens this many calls later, if its condition holds then.
    Late(usize),
    /// A conditional put is told of a conflict, though there was none. All else works.
    Conflict,
    /// A conditional put lands, and is told of a conflict with itself. All else works.
    ConflictWithItself,
    /// A read brings less than was asked for. All else is not available.
    ShortBody,
    /// A read brings the right number of other bytes. All else is not available.
    WrongBytes,
    /// Nothing happens for so long that the call is given up.
    Stall,
}

/// When a fault strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Plan<F> {
    /// The number of the call, from 0.
    pub at: usize,
    pub fault: F,
    /// From there on, or just once.
    pub sticky: bool,
}

/// The faults of a host, and how many calls there were.
#[derive(Debug, Default)]
pub struct Faults {
    pub disk_calls: usize,
    pub store_calls: usize,
    pub disk: Option<Plan<DiskFault>>,
    pub store: Option<Plan<StoreFault>>,
}

fn strikes<F: Copy>(calls: &mut usize, plan: Option<Plan<F>>) -> Option<F> {
    let call = *calls;
    *calls += 1;
    plan.filter(|plan| call == plan.at || (plan.sticky && call > plan.at)).map(|plan| plan.fault)
}

impl Faults {
    /// All is well from now on.
    pub fn end(&mut self) {
        (self.disk, self.store) = (None, None);
    }

    pub fn next_disk_call(&mut self) -> Option<DiskFault> {
        strikes(&mut self.disk_calls, self.disk)
    }

    pub fn next_store_call(&mut self) -> Option<StoreFault> {
        strikes(&mut self.store_calls, self.store)
    }
}

pub fn eio() -> io::Error {
    io::Error::other("EIO as the test wishes")
}

pub fn full() -> io::Error {
    io::ErrorKind::StorageFull.into()
}

/// How much of a write lands that stops half-way, in bytes.
pub fn half(len: usize) -> usize {
    (len / 2).next_multiple_of(SECTOR).min(len.saturating_sub(1)) / SECTOR * SECTOR
}
