//! Errors of a volume → errors of the protocol: one exhaustive table.
//!
//! Promises: every error has exactly one number, and a new error does not compile before it has one.
//! Must never: hide an error as success, or send a number that the protocol does not list.

use crate::volume::VolumeError;

/// The error numbers of the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Errno {
    /// Not permitted: the export is read-only.
    Perm = 1,
    /// Input or output failed.
    Io = 5,
    /// The request is malformed or leaves the export.
    Inval = 22,
    /// No space: the cache's disk is full, or the write leaves the export.
    NoSpc = 28,
    /// Only for FAST_ZERO: zeroing here would not be fast.
    NotSup = 95,
    /// The server is stopping, or the export was unloaded.
    Shutdown = 108,
}

/// The number for an error of the volume. `writes`: whether the command was a write or a write of zeros, for which
/// the protocol tells "past the end" apart.
#[must_use]
pub fn of(error: &VolumeError, writes: bool) -> Errno {
    match error {
        // "SHOULD return NBD_ENOSPC if a write is past the end", and EINVAL for everything else.
        VolumeError::OutOfRange { .. } if writes => Errno::NoSpc,
        VolumeError::OutOfRange { .. } => Errno::Inval,
        VolumeError::ReadOnly(_) => Errno::Perm,
        VolumeError::NoSpace(_) => Errno::NoSpc,
        VolumeError::Unavailable(_) | VolumeError::Damaged(_) | VolumeError::Failed(_) => Errno::Io,
        VolumeError::Closed(_) => Errno::Shutdown,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{ByteRange, ExportId};

    #[test]
    fn each_error_of_a_volume_has_its_number() {
        let id: ExportId = "disk".parse().unwrap();
        let range = ByteRange::new(1, 1).unwrap();
        let outside = VolumeError::OutOfRange { range, image_size: 1 };
        assert_eq!(of(&outside, true), Errno::NoSpc);
        assert_eq!(of(&outside, false), Errno::Inval);
        assert_eq!(of(&VolumeError::ReadOnly(id.clone()), true), Errno::Perm);
        assert_eq!(of(&VolumeError::NoSpace(id.clone()), true), Errno::NoSpc);
        assert_eq!(of(&VolumeError::Unavailable("x".into()), false), Errno::Io);
        assert_eq!(of(&VolumeError::Damaged("x".into()), false), Errno::Io);
        assert_eq!(of(&VolumeError::Failed("x".into()), true), Errno::Io);
        assert_eq!(of(&VolumeError::Closed(id), false), Errno::Shutdown);
        assert_eq!(Errno::Shutdown as u32, 108);
    }
}
