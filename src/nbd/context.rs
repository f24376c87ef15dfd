//! The metadata contexts: their names, their ids, and what they say of an extent. Pure.
//!
//! `base:allocation` is the protocol's own: bit 0 = hole, bit 1 = reads as zeros.
//!
//! `nbd-server:residency` is ours: bit 0 = resident (the bytes are in the local cache), bit 1 = dirty (the next snapshot
//! publishes it), bit 2 = zero (reads as zeros, nothing is stored for it). So absent = 0, clean = 1, dirty = 3,
//! published zeros = 4, zeros not yet published = 6. Other bits are 0 and may get a meaning later.
//!
//! Must never: call something a hole or zero that does not read as zeros; "0" is always safe.

use crate::volume::Residency;

/// A metadata context a client can select.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Context {
    /// `base:allocation`.
    Allocation,
    /// `nbd-server:residency`.
    Residency,
}

const HOLE: u32 = 1 << 0;
const ZERO: u32 = 1 << 1;

const RESIDENT: u32 = 1 << 0;
const DIRTY: u32 = 1 << 1;
const NOTHING_STORED: u32 = 1 << 2;

impl Context {
    /// Every context there is.
    pub const ALL: [Self; 2] = [Self::Allocation, Self::Residency];

    /// The name: namespace, colon, leaf.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Allocation => "base:allocation",
            Self::Residency => "nbd-server:residency",
        }
    }

    /// The id replies carry; unique within a connection, the same in all of them.
    #[must_use]
    pub fn id(self) -> u32 {
        match self {
            Self::Allocation => 1,
            Self::Residency => 2,
        }
    }

    /// Whether the query of a LIST names it, or its whole namespace ("base:").
    #[must_use]
    pub fn is_listed_by(self, query: &str) -> bool {
        self.name() == query || (query.ends_with(':') && self.name().starts_with(query))
    }

    /// What it says of a stretch.
    #[must_use]
    pub fn status(self, residency: Residency) -> u32 {
        match (self, residency) {
            (Self::Allocation, Residency::Zero { .. }) => HOLE | ZERO,
            (Self::Allocation, Residency::Absent | Residency::Clean | Residency::Dirty)
            | (Self::Residency, Residency::Absent) => 0,
            (Self::Residency, Residency::Clean) => RESIDENT,
            (Self::Residency, Residency::Dirty) => RESIDENT | DIRTY,
            (Self::Residency, Residency::Zero { dirty: false }) => NOTHING_STORED,
            (Self::Residency, Residency::Zero { dirty: true }) => NOTHING_STORED | DIRTY,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_residency_numbers_are_the_documented_ones() {
        let of = |residency| Context::Residency.status(residency);
        assert_eq!(of(Residency::Absent), 0);
        assert_eq!(of(Residency::Clean), 1);
        assert_eq!(of(Residency::Dirty), 3);
        assert_eq!(of(Residency::Zero { dirty: false }), 4);
        assert_eq!(of(Residency::Zero { dirty: true }), 6);
    }

    #[test]
    fn only_what_reads_as_zeros_is_a_hole() {
        let of = |residency| Context::Allocation.status(residency);
        assert_eq!([of(Residency::Absent), of(Residency::Clean), of(Residency::Dirty)], [0, 0, 0]);
        assert_eq!(of(Residency::Zero { dirty: true }), 3);
    }

    #[test]
    fn a_namespace_lists_its_own_contexts_and_a_part_of_a_name_lists_none() {
        assert!(Context::Allocation.is_listed_by("base:"));
        assert!(!Context::Residency.is_listed_by("base:"));
        assert!(!Context::Allocation.is_listed_by("base:alloc"));
        assert!(!Context::Allocation.is_listed_by(""));
    }
}
