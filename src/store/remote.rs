//! S3, R2, Google Cloud Storage, Azure and memory, over the `object_store` crate.
//!
//! What this adds to the crate, and must never lose:
//! - **No hidden retries.** The crate's own are off. A conditional put is one request; what may be repeated is repeated
//!   by [`retry`](super::retry) and, inside an upload or a listing, by the same policy here.
//! - **Bounds that fit the payload.** The crate's default of 30 s for a whole request would kill every large body on a
//!   slow link; here a request may take [`SILENCE_LIMIT`] plus its bytes at [`MIN_BYTES_PER_SECOND`], and a part of an upload as
//!   long as all parts that are on their way with it. Other requests at the same time are not reckoned with.
//! - **Nothing is believed.** The range and the length of a body are compared with what was asked for: the crate hands
//!   out a short body as if it were whole.
//! - **No redirect is followed.** A client that follows one takes another server's answer for the store's, and sends it the
//!   credentials in its headers.
//! - **Credentials** come from the environment and appear in no log, error or `Debug` text.

mod answer;
mod config;
mod http;
mod listing;
mod memory;
mod redirect;
mod secrets;
mod token;
mod upload;

use std::fmt;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use futures_util::{FutureExt, TryStreamExt};
use object_store::list::PaginatedListStore;
use object_store::multipart::MultipartStore;
use object_store::path::Path;
use object_store::{
    GetOptions, GetRange, GetResult, ObjectMeta, ObjectStore, ObjectStoreExt, PutMode, PutOptions, UpdateVersion,
};

use super::health::Health;
use super::retry::{Request, RetryPolicy};
use super::{Body, Condition, Key, MAX_FOLDERS, MAX_LISTED, Object, Store, StoreError, Version};
use crate::clock::Clock;
use crate::units::ByteRange;
use answer::judge;
pub use config::{RemoteConfig, RemoteConfigError, RemoteKind};

/// How long a connection may take to come about.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the store may say nothing: before its answer begins, and between two pieces of it.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(15);
/// The slowest transfer that still counts as one: of an object that is read, or of an upload with all its parts.
pub const MIN_BYTES_PER_SECOND: u64 = 64 << 10;

/// Where the store keeps what changes with every write.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum VersionTag {
    /// The entity tag: S3, R2, Azure, memory.
    ETag,
    /// The object's generation: Google.
    Generation,
}

/// A bucket in the cloud, or memory that behaves like one.
pub struct RemoteStore {
    objects: Arc<dyn ObjectStore>,
    parts: Arc<dyn MultipartStore>,
    pages: Arc<dyn PaginatedListStore>,
    tag: VersionTag,
    /// Whether it keeps the very bytes that it is given: then it is given a copy, since whoever gave a body counts on its memory.
    keeps_payloads: bool,
    discards: upload::Discards,
    place: String,
    policy: RetryPolicy,
    clock: Arc<dyn Clock>,
    health: Arc<Health>,
}

// The crate's own types print credentials.
impl fmt::Debug for RemoteStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RemoteStore").field("place", &self.place).finish_non_exhaustive()
    }
}

impl fmt::Display for RemoteStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.place)
    }
}

/// How long one request with a body of that size may take.
fn allowance(bytes: u64) -> Duration {
    SILENCE_LIMIT + Duration::from_secs(bytes / MIN_BYTES_PER_SECOND)
}

/// A put that only takes place if something holds, so that "no" may mean that it did not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Conditional {
    Yes,
    No,
}

/// Runs one request to its end or to the end of its time.
async fn timed<T>(
    request: Request<'_>,
    limit: Duration,
    conditional: Conditional,
    work: impl Future<Output = object_store::Result<T>>,
) -> Result<T, StoreError> {
    // The crate panics on values that it takes for valid, such as credentials that it was lent: that ends this request.
    match tokio::time::timeout(limit, AssertUnwindSafe(work).catch_unwind()).await {
        Ok(Ok(outcome)) => outcome.map_err(|e| judge(e, request, conditional)),
        Ok(Err(_)) => {
            Err(request.unavailable("the client library cannot work with what it was given, such as a credential"))
        }
        Err(_) => Err(request.unavailable(format!("no answer within {} s", limit.as_secs()))),
    }
}

fn path(request: Request<'_>) -> Result<Path, StoreError> {
    Path::parse(request.key.as_str()).map_err(|e| request.refused(e))
}

impl RemoteStore {
    /// Notes in `health` how the requests do that it repeats by itself.
    #[must_use]
    pub fn reporting_to(self, health: Arc<Health>) -> Self {
        Self { health, ..self }
    }

    /// The version in a store's answer.
    fn version(
        &self,
        request: Request<'_>,
        e_tag: Option<String>,
        generation: Option<String>,
    ) -> Result<Version, StoreError> {
        let (text, name) = match self.tag {
            VersionTag::ETag => (e_tag, "ETag"),
            VersionTag::Generation => (generation, "generation"),
        };
        text.map(Version).ok_or_else(|| {
            request.refused(format!("the answer has no {name}, without which writes cannot be conditional"))
        })
    }

    /// Asks for an object and reads it whole, once `check` has approved of what the store is about to send.
    async fn fetch(
        &self,
        request: Request<'_>,
        range: Option<GetRange>,
        check: impl FnOnce(&GetResult) -> Result<(), StoreError>,
    ) -> Result<(Bytes, ObjectMeta), StoreError> {
        let mut options = GetOptions { range, ..GetOptions::default() };
        options.extensions.insert(http::Content);
        let path = path(request)?;
        let asked = self.objects.get_opts(&path, options);
        let result = timed(request, SILENCE_LIMIT, Conditional::No, asked).await?;
        check(&result)?;
        let meta = result.meta.clone();
        let len = result.range.end.saturating_sub(result.range.start);
        let limit = allowance(len);
        match tokio::time::timeout(limit, read_body(request, result, len)).await {
            Ok(bytes) => Ok((bytes?, meta)),
            Err(_) => Err(request.unavailable(format!("{len} bytes did not arrive within {} s", limit.as_secs()))),
        }
    }
}

/// The whole body, exactly as long as announced.
async fn read_body(request: Request<'_>, result: GetResult, len: u64) -> Result<Bytes, StoreError> {
    let mut stream = result.into_stream();
    let capacity = usize::try_from(len).map_err(|e| request.refused(e))?;
    let mut bytes = BytesMut::with_capacity(capacity);
    loop {
        let piece = tokio::time::timeout(SILENCE_LIMIT, stream.try_next()).await;
        let piece = piece.map_err(|_| request.unavailable(format!("silent for {} s", SILENCE_LIMIT.as_secs())))?;
        match piece.map_err(|e| judge(e, request, Conditional::No))? {
            Some(piece) if piece.len() <= capacity - bytes.len() => bytes.extend_from_slice(&piece),
            Some(_) => return Err(request.unavailable(format!("the body is longer than the {len} bytes announced"))),
            None if bytes.len() == capacity => return Ok(bytes.freeze()),
            None => return Err(request.unavailable(format!("the body ended after {} of {len} bytes", bytes.len()))),
        }
    }
}

#[async_trait::async_trait]
impl Store for RemoteStore {
    async fn get(&self, key: &Key, max_bytes: u64) -> Result<Object, StoreError> {
        let request = Request { operation: "get", key };
        let fits = |result: &GetResult| {
            if result.meta.size <= max_bytes {
                Ok(())
            } else {
                Err(StoreError::TooLarge { key: key.clone(), max_bytes })
            }
        };
        let (bytes, meta) = self.fetch(request, None, fits).await?;
        Ok(Object { bytes, version: self.version(request, meta.e_tag, meta.version)? })
    }

    async fn get_range(&self, key: &Key, range: ByteRange) -> Result<Bytes, StoreError> {
        let request = Request { operation: "get", key };
        let asked = range.offset()..range.end();
        let as_asked = |result: &GetResult| {
            if result.meta.size < range.end() {
                Err(request.short(format!("it ends at byte {}, before {range} does", result.meta.size)))
            } else if result.range == asked {
                Ok(())
            } else {
                Err(request.unavailable(format!("asked for {range}, was offered {:?}", result.range)))
            }
        };
        let (bytes, _) = self.fetch(request, Some(GetRange::Bounded(asked.clone())), as_asked).await?;
        Ok(bytes)
    }

    async fn len(&self, key: &Key) -> Result<u64, StoreError> {
        let request = Request { operation: "head", key };
        let path = path(request)?;
        let options = GetOptions { head: true, ..GetOptions::default() };
        Ok(timed(request, SILENCE_LIMIT, Conditional::No, self.objects.get_opts(&path, options)).await?.meta.size)
    }

    async fn put(&self, key: &Key, bytes: Bytes, condition: Condition) -> Result<Version, StoreError> {
        let request = Request { operation: "put", key };
        let (mode, conditional) = match condition {
            Condition::Always => (PutMode::Overwrite, Conditional::No),
            Condition::IfAbsent => (PutMode::Create, Conditional::Yes),
            Condition::IfVersion(Version(text)) => {
                let version = match self.tag {
                    VersionTag::ETag => UpdateVersion { e_tag: Some(text), version: None },
                    VersionTag::Generation => UpdateVersion { e_tag: None, version: Some(text) },
                };
                (PutMode::Update(version), Conditional::Yes)
            }
        };
        let limit = allowance(bytes.len() as u64);
        let path = path(request)?;
        let put = self.objects.put_opts(&path, bytes.into(), PutOptions { mode, ..PutOptions::default() });
        let done = timed(request, limit, conditional, put).await?;
        self.version(request, done.e_tag, done.version)
    }

    async fn upload(&self, key: &Key, max_bytes: u64, body: Body<'_>) -> Result<(), StoreError> {
        upload::upload(self, key, max_bytes, body).await
    }

    async fn list(&self, prefix: &Key) -> Result<Vec<Key>, StoreError> {
        let below = format!("{prefix}/");
        let mut keys: Vec<Key> = Vec::new();
        self.pages(prefix, None, MAX_LISTED, |page| {
            let names = page.objects.iter().map(|object| object.location.as_ref());
            // A folder's own marker object (`prefix/`) arrives without its slash: it is not below the prefix.
            keys.extend(names.filter(|name| name.starts_with(&below)).filter_map(|name| name.parse().ok()));
        })
        .await?;
        keys.sort_unstable();
        keys.dedup();
        Ok(keys)
    }

    async fn list_folders(&self, prefix: &Key) -> Result<Vec<String>, StoreError> {
        let mut names: Vec<String> = Vec::new();
        self.pages(prefix, Some("/"), MAX_FOLDERS, |page| {
            names.extend(page.common_prefixes.iter().filter_map(|folder| folder.filename().map(str::to_owned)));
        })
        .await?;
        names.sort_unstable();
        names.dedup();
        Ok(names)
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let request = Request { operation: "delete", key };
        let path = path(request)?;
        // Who gives an upload up and cleans up behind it: what is left of its parts goes first.
        self.discards.end().await;
        match timed(request, SILENCE_LIMIT, Conditional::No, self.objects.delete(&path)).await {
            Err(StoreError::NotFound { .. }) => Ok(()),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests;
