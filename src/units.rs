//! The words of the house: indices, ranges, ids and the geometry of an image.
//!
//! Everything here is checked when it is built, so the floors above never hold a chunk size that is no power of two,
//! an export id that climbs out of its folder, or a range that wraps around.

pub mod size;

use std::fmt;
use std::str::FromStr;
use std::sync::Mutex;
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use uuid::{ContextV7, Timestamp, Uuid};

/// The smallest chunk, in bytes.
pub const MIN_CHUNK_BYTES: u64 = 4 << 10;
/// The largest chunk, in bytes.
pub const MAX_CHUNK_BYTES: u64 = 64 << 20;
/// The chunk size of an export that does not name one, in bytes.
pub const DEFAULT_CHUNK_BYTES: u64 = 4 << 20;
/// The most chunks an image may have: bounds the memory of its chunk states and of its manifest.
pub const MAX_CHUNKS: u64 = 1 << 24;
/// The longest export id, in bytes.
pub const MAX_EXPORT_ID_BYTES: usize = 128;

/// Why a unit was refused. Each text names the value and what would be accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UnitError {
    /// The chunk size is not a power of two in the allowed span.
    #[error(
        "chunk size {0} is not a power of two between {MIN_CHUNK_BYTES} (4 KiB) and {MAX_CHUNK_BYTES} (64 MiB); the usual choice is {DEFAULT_CHUNK_BYTES}"
    )]
    ChunkSize(u64),
    /// The image size is zero or no client could address it.
    #[error("image size {0} is not between 1 and {max} bytes", max = i64::MAX)]
    ImageSize(u64),
    /// The image would have more chunks than the server is built for.
    #[error(
        "an image of {image_size} bytes in chunks of {chunk_size} has {chunks} chunks, more than the {MAX_CHUNKS} allowed: choose a larger chunk size"
    )]
    TooManyChunks {
        /// The size asked for, in bytes.
        image_size: u64,
        /// The chunk size asked for, in bytes.
        chunk_size: u64,
        /// How many chunks that makes.
        chunks: u64,
    },
    /// The text is not an export id.
    #[error(
        "export id {0:?} is not allowed: use 1 to {MAX_EXPORT_ID_BYTES} of A-Z a-z 0-9 . _ - , starting with a letter or digit, without \"..\""
    )]
    ExportId(String),
    /// The text is not a snapshot id.
    #[error("snapshot id {0:?} is not 32 lower-case hex digits")]
    SnapshotId(String),
}

/// The position of a chunk in its image; the chunk starts at byte `index × chunk_size`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ChunkIndex(pub u32);

impl ChunkIndex {
    /// The index as an offset into a table with one slot per chunk.
    #[must_use]
    pub fn slot(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for ChunkIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A contiguous range of bytes whose end is known not to overflow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ByteRange {
    offset: u64,
    len: u64,
}

impl ByteRange {
    /// The range of `len` bytes from `offset`, or `None` if its end is beyond `u64::MAX`.
    #[must_use]
    pub fn new(offset: u64, len: u64) -> Option<Self> {
        offset.checked_add(len).map(|_| Self { offset, len })
    }

    /// The first byte.
    #[must_use]
    pub fn offset(self) -> u64 {
        self.offset
    }

    /// The length in bytes.
    #[must_use]
    pub fn len(self) -> u64 {
        self.len
    }

    /// Whether the range holds no byte.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The first byte behind the range.
    #[must_use]
    pub fn end(self) -> u64 {
        self.offset + self.len
    }
}

impl fmt::Display for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.offset, self.end())
    }
}

/// How many times an export was published; 0 means never.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Generation(pub u64);

impl Generation {
    /// The generation of the next publish.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0.saturating_add(1))
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The size of an image and of its chunks, both in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Geometry {
    image_size: u64,
    chunk_size: u64,
}

impl Geometry {
    /// Checks both sizes and that the chunks can be counted.
    ///
    /// # Errors
    /// [`UnitError`] naming the value that is out of bounds.
    pub fn new(image_size: u64, chunk_size: u64) -> Result<Self, UnitError> {
        if !chunk_size.is_power_of_two() || !(MIN_CHUNK_BYTES..=MAX_CHUNK_BYTES).contains(&chunk_size) {
            return Err(UnitError::ChunkSize(chunk_size));
        }
        if image_size == 0 || i64::try_from(image_size).is_err() {
            return Err(UnitError::ImageSize(image_size));
        }
        let chunks = image_size.div_ceil(chunk_size);
        if chunks > MAX_CHUNKS {
            return Err(UnitError::TooManyChunks { image_size, chunk_size, chunks });
        }
        Ok(Self { image_size, chunk_size })
    }

    /// The image's size in bytes.
    #[must_use]
    pub fn image_size(self) -> u64 {
        self.image_size
    }

    /// The size of every chunk but perhaps the last, in bytes.
    #[must_use]
    pub fn chunk_size(self) -> u64 {
        self.chunk_size
    }

    /// The number of chunks, 1 to [`MAX_CHUNKS`].
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "the constructor bounds the count by MAX_CHUNKS")]
    pub fn chunk_count(self) -> u32 {
        self.image_size.div_ceil(self.chunk_size) as u32
    }

    /// The chunk that holds byte `offset`, which must lie inside the image.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "an offset inside the image has an index below MAX_CHUNKS")]
    pub fn chunk_at(self, offset: u64) -> ChunkIndex {
        debug_assert!(offset < self.image_size);
        ChunkIndex((offset / self.chunk_size) as u32)
    }

    /// The bytes of a chunk; the last one may be short.
    #[must_use]
    pub fn chunk_range(self, chunk: ChunkIndex) -> ByteRange {
        let offset = u64::from(chunk.0) * self.chunk_size;
        debug_assert!(offset < self.image_size);
        ByteRange { offset, len: self.chunk_size.min(self.image_size - offset) }
    }

    /// Whether the range lies inside the image.
    #[must_use]
    pub fn contains(self, range: ByteRange) -> bool {
        range.end() <= self.image_size
    }

    /// How many chunks a range inside the image touches.
    #[must_use]
    pub fn chunks_in(self, range: ByteRange) -> u64 {
        if range.is_empty() {
            0
        } else {
            u64::from(self.chunk_at(range.end() - 1).0 - self.chunk_at(range.offset).0) + 1
        }
    }

    /// Cuts a range inside the image at chunk boundaries, in order; nothing for an empty range.
    pub fn split(self, range: ByteRange) -> impl Iterator<Item = (ChunkIndex, ByteRange)> {
        debug_assert!(self.contains(range));
        let mut at = range.offset;
        std::iter::from_fn(move || {
            (at < range.end()).then(|| {
                let chunk = self.chunk_at(at);
                let end = range.end().min(self.chunk_range(chunk).end());
                let piece = ByteRange { offset: at, len: end - at };
                at = end;
                (chunk, piece)
            })
        })
    }
}

/// The name of an export: what an NBD client attaches, and the folder of its objects and of its cache.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ExportId(String);

impl ExportId {
    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ExportId {
    type Err = UnitError;

    fn from_str(text: &str) -> Result<Self, UnitError> {
        let allowed = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'.' | b'_' | b'-');
        let good = text.len() <= MAX_EXPORT_ID_BYTES
            && text.bytes().next().is_some_and(|c| c.is_ascii_alphanumeric())
            && text.bytes().all(allowed)
            && !text.contains("..");
        if good { Ok(Self(text.to_owned())) } else { Err(UnitError::ExportId(text.chars().take(160).collect())) }
    }
}

impl TryFrom<String> for ExportId {
    type Error = UnitError;

    fn try_from(text: String) -> Result<Self, UnitError> {
        text.parse()
    }
}

impl From<ExportId> for String {
    fn from(id: ExportId) -> Self {
        id.0
    }
}

impl fmt::Display for ExportId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The name of a snapshot: a UUIDv7, written as 32 lower-case hex digits without hyphens. Never reused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotId([u8; 16]);

impl SnapshotId {
    /// A new id, unique across servers and ordered by time.
    #[must_use]
    #[allow(clippy::disallowed_methods, reason = "below the seam; no test depends on the date in an id")]
    pub fn generate() -> Self {
        // In the order of their making, within a millisecond too.
        static ORDER: Mutex<ContextV7> = Mutex::new(ContextV7::new());
        // A clock that is set to no date at all costs the order, not the id.
        let date = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let date = Timestamp::from_unix(&ORDER, date.as_secs(), date.subsec_nanos());
        Self(Uuid::new_v7(date).into_bytes())
    }

    /// The id as its 16 bytes, most significant first.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        self.0
    }

    /// The id from its 16 bytes, most significant first.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

/// 128 random bits that tell one thing from all others of its kind: an export from a later one of the same name, a cache
/// root from its copies, a run of a server from other runs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RandomId([u8; 16]);

impl RandomId {
    /// A new id, unique across servers.
    #[must_use]
    pub fn generate() -> Self {
        Self(rand::random())
    }

    /// The id as its 16 bytes, most significant first.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        self.0
    }

    /// The id of 16 bytes, most significant first; `None` if all are 0, which no id has.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 16]) -> Option<Self> {
        (bytes != [0; 16]).then_some(Self(bytes))
    }
}

/// The text form of an id of 128 bits: 32 lower-case hex digits, in JSON too. `$refused` makes the error of another text.
macro_rules! hex_id {
    ($name:ident, $error:ty, $refused:expr) => {
        impl FromStr for $name {
            type Err = $error;

            fn from_str(text: &str) -> Result<Self, $error> {
                let refused = || $refused(text.chars().take(64).collect());
                let lower_hex = |c: u8| matches!(c, b'0'..=b'9' | b'a'..=b'f');
                if text.len() != 32 || !text.bytes().all(lower_hex) {
                    return Err(refused());
                }
                let value = u128::from_str_radix(text, 16).map_err(|_| refused())?;
                Ok(Self(value.to_be_bytes()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = $error;

            fn try_from(text: String) -> Result<Self, $error> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> Self {
                id.to_string()
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", u128::from_be_bytes(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Display::fmt(self, f)
            }
        }
    };
}

hex_id!(SnapshotId, UnitError, UnitError::SnapshotId);
hex_id!(RandomId, String, |text: String| format!("id {text:?} is not 32 lower-case hex digits"));

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshot_ids_are_distinct_and_in_the_order_of_their_making() {
        let ids: Vec<_> = (0..10_000).map(|_| SnapshotId::generate()).collect();
        assert!(ids.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(ids.iter().all(|id| id.to_string().as_bytes()[12] == b'7'), "version 7");
    }

    #[test]
    fn the_chunks_that_a_range_touches_are_those_it_is_cut_into() {
        let geometry = Geometry::new(4 * 4096 + 1, 4096).unwrap();
        for (offset, len) in [(0, 0), (0, 1), (0, 4096), (0, 4097), (4095, 2), (1, 4096 * 4), (4 * 4096, 1), (4096, 0)]
        {
            let range = ByteRange::new(offset, len).unwrap();
            assert_eq!(geometry.chunks_in(range), geometry.split(range).count() as u64, "{range}");
        }
    }
}
