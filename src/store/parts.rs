//! Into how many parts a blob is cut on its way up, and so how much memory an upload holds.
//!
//! It is part of what a store promises, since the caller pays for it: a body's bytes are let go of when the part they are in has
//! arrived. So who gives a body bounds the memory by how many bytes of it are alive at a time; fewer than
//! [`upload_floor`] would never fill a part.

/// The smallest part but for the last, in bytes.
pub const MIN_PART_BYTES: u64 = 8 << 20;
/// The most parts of one upload: S3's own limit.
pub const MAX_PARTS: u64 = 10_000;
/// The most parts of one upload that are sent at a time: object storage gives about its best to so many streams.
pub const PARTS_IN_FLIGHT: usize = 16;

/// The size of every part but the last, for a blob of at most `max_bytes`.
#[must_use]
pub fn part_bytes(max_bytes: u64) -> u64 {
    const MIB: u64 = 1 << 20;
    max_bytes.div_ceil(MAX_PARTS).div_ceil(MIB).saturating_mul(MIB).max(MIN_PART_BYTES)
}

/// How many bytes of a body of at most `max_bytes`, in pieces of `piece_bytes`, must be allowed to live at a time: a part, the
/// piece that tells whether it is the last, and the one that was cut in two between the part and the one before.
#[must_use]
pub fn upload_floor(max_bytes: u64, piece_bytes: u64) -> u64 {
    part_bytes(max_bytes).next_multiple_of(piece_bytes.max(1)).saturating_add(2 * piece_bytes)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn parts_are_small_until_the_limit_on_their_number_makes_them_larger() {
        for (max_bytes, expected) in [
            (0, 8 * MIB),
            (1, 8 * MIB),
            (80_000 * MIB, 8 * MIB),
            (80_000 * MIB + 1, 9 * MIB),
            (1_000_000 * MIB, 100 * MIB),
        ] {
            assert_eq!(part_bytes(max_bytes), expected, "{max_bytes}");
        }
    }

    proptest! {
        #[test]
        fn a_blob_of_any_size_fits_the_number_of_parts(max_bytes in 0..=u64::MAX / 2) {
            let part = part_bytes(max_bytes);
            prop_assert!(max_bytes.div_ceil(part) <= MAX_PARTS);
            prop_assert!(part >= MIN_PART_BYTES && part.is_multiple_of(MIB));
        }
    }
}
