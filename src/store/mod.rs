//! Object storage, as the rest of the house sees it: one small trait, and what every backend must promise.
//!
//! A key names at most one object. Objects are written whole: a reader sees all of an object or none of it.
//! [`Condition::IfAbsent`] and [`Condition::IfVersion`] are atomic among all servers on the store: of any number of
//! racers exactly one wins. No implementation repeats a conditional put by itself: whether one landed is for the
//! caller to find out. A backend that cannot promise this is refused at start, by [`probe`].
//!
//! ```text
//! local   a directory of plain files                     remote  s3, r2, gcs, azure, memory
//! retry   repeats what may be repeated, within a limit    keys    every key, built and parsed
//! health  whether the store answers                       observed  counts requests
//! ```

pub mod health;
pub mod keys;
pub mod local;
pub mod observed;
pub mod parts;
pub mod probe;
pub mod remote;
pub mod retry;

use std::fmt::{self, Debug};
use std::sync::Arc;

use bytes::Bytes;
use futures_util::stream::BoxStream;

use crate::units::ByteRange;
use health::Outage;
pub use keys::Key;

/// A store that many volumes share.
pub type SharedStore = Arc<dyn Store>;

/// Which state of an object a conditional put replaces: opaque, and different after every write of different bytes.
///
/// Writing the bytes that are there already may or may not change it (on S3 the version is a hash of the content):
/// whoever wants an older version to go stale must write something else.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Version(pub String);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// When a put may take place.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// Whatever is there: only for objects that have one writer or whose content follows from their key.
    Always,
    /// Only if the key names no object.
    IfAbsent,
    /// Only if the object there is still this version; an object that is gone is a conflict too.
    IfVersion(Version),
}

/// A whole object with the version it was read at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// The object's content.
    pub bytes: Bytes,
    /// What [`Condition::IfVersion`] takes to replace just this content.
    pub version: Version,
}

/// The content of a blob on its way up, in order, in pieces of any size.
pub type Body<'a> = BoxStream<'a, Result<Bytes, BoxError>>;

/// A source error of any kind.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// What went wrong, by what the caller does next.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// There is no such object.
    #[error("{key} is not in the store")]
    NotFound {
        /// The key asked for.
        key: Key,
    },
    /// The condition did not hold. After an earlier unclear attempt it may be one's own write that stands there:
    /// read the object to find out.
    #[error("{key} was changed by someone else")]
    Conflict {
        /// The key that was to be written.
        key: Key,
    },
    /// Timeout, throttling, an outage, a body cut short: the same request may succeed later. A put may have landed.
    #[error("the store did not serve {operation} of {key}: {source}")]
    Unavailable {
        /// What was attempted, in one word.
        operation: &'static str,
        /// The key it was attempted on.
        key: Key,
        /// What the backend said.
        source: BoxError,
    },
    /// The store refuses: credentials, permissions, a bucket that is not there, a request it cannot serve. Final for a start
    /// and for a command, which say so at once; not for a read of published data, which [`retry`] repeats.
    #[error("the store refused {operation} of {key}: {source}")]
    Refused {
        /// What was attempted, in one word.
        operation: &'static str,
        /// The key it was attempted on.
        key: Key,
        /// What the backend said.
        source: BoxError,
    },
    /// The object is larger than the caller is ready to hold.
    #[error("{key} is larger than the {max_bytes} bytes such an object may have")]
    TooLarge {
        /// The key that was read.
        key: Key,
        /// The caller's cap.
        max_bytes: u64,
    },
    /// The object ends before what was asked of it does.
    #[error("{key} is too short: {source}")]
    Short {
        /// The key that was read.
        key: Key,
        /// Where it ends.
        source: BoxError,
    },
    /// The caller's own body stream failed; nothing was stored.
    #[error("reading what should become {key} failed: {source}")]
    Body {
        /// The key that was being written.
        key: Key,
        /// What the stream said.
        source: BoxError,
    },
}

impl StoreError {
    /// A refusal as an outage.
    fn for_now(self) -> Self {
        match self {
            Self::Refused { operation, key, source } => Self::Unavailable { operation, key, source },
            other => other,
        }
    }
}

/// The most names one listing returns; a longer one is [`StoreError::Refused`] rather than held in memory.
pub const MAX_LISTED: usize = 10_000_000;
/// The most names that a listing of folders returns, one for each export; a longer one is [`StoreError::Refused`].
pub const MAX_FOLDERS: usize = 100_000;

/// Object storage. Every call is bounded in time by the implementation.
#[async_trait::async_trait]
pub trait Store: Debug + Send + Sync {
    /// The whole object and its version; [`StoreError::TooLarge`] beyond `max_bytes`.
    async fn get(&self, key: &Key, max_bytes: u64) -> Result<Object, StoreError>;

    /// Exactly the bytes of `range`, which is not empty; [`StoreError::Unavailable`] when fewer or more arrive,
    /// [`StoreError::Short`] when the object ends before the range does.
    async fn get_range(&self, key: &Key, range: ByteRange) -> Result<Bytes, StoreError>;

    /// The length of an object in bytes, without its content.
    async fn len(&self, key: &Key) -> Result<u64, StoreError>;

    /// Writes a small object in one request and returns its version.
    async fn put(&self, key: &Key, bytes: Bytes, condition: Condition) -> Result<Version, StoreError>;

    /// Writes a blob of at most `max_bytes` from a stream, with bounded memory; [`StoreError::TooLarge`] if the stream
    /// goes on beyond that. Remote stores get one put if it fits a part, else a multipart upload in equal parts.
    ///
    /// On any error, and when the call is abandoned, what was sent is discarded and no object appears; with one
    /// exception: once the last request is on its way, [`StoreError::Unavailable`] or going away leaves open whether
    /// it lands. The object is never there in part.
    async fn upload(&self, key: &Key, max_bytes: u64, body: Body<'_>) -> Result<(), StoreError>;

    /// Every key below a prefix (`prefix/…`), sorted; names that no [`Key`] can have are left out.
    async fn list(&self, prefix: &Key) -> Result<Vec<Key>, StoreError>;

    /// The names of the folders right below a prefix, sorted: `exports` → `["vm-1", "vm-2"]`. A folder may turn out to
    /// hold no object.
    async fn list_folders(&self, prefix: &Key) -> Result<Vec<String>, StoreError>;

    /// Removes an object; it is no error if there is none.
    async fn delete(&self, key: &Key) -> Result<(), StoreError>;

    /// The outage, if the last request had no answer; `None` also from a store that does not keep track.
    fn outage(&self) -> Option<Outage> {
        None
    }
}
