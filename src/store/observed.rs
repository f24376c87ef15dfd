//! A store under observation: what was asked of it, how it ended, and how long it took.
//!
//! Changes nothing about a request. It stands below [`retry`](super::retry), so every attempt counts.

use std::time::Instant;

use bytes::Bytes;

use super::{Body, Condition, Key, Object, SharedStore, Store, StoreError, Version};
use crate::metrics::{Counter, Histogram, Kind, Page, REQUEST_BOUNDS};
use crate::units::ByteRange;

#[derive(Debug, Clone, Copy)]
enum Operation {
    Get,
    Head,
    Put,
    Upload,
    List,
    Delete,
}

impl Operation {
    const ALL: [Self; 6] = [Self::Get, Self::Head, Self::Put, Self::Upload, Self::List, Self::Delete];

    fn as_str(self) -> &'static str {
        match self {
            Self::Get => "get",
            Self::Head => "head",
            Self::Put => "put",
            Self::Upload => "upload",
            Self::List => "list",
            Self::Delete => "delete",
        }
    }
}

/// How a request ended.
#[derive(Debug, Clone, Copy)]
enum Ending {
    Ok,
    NotFound,
    Conflict,
    TooLarge,
    Short,
    Unavailable,
    Refused,
    Abandoned,
}

impl Ending {
    const ALL: [Self; 8] = [
        Self::Ok,
        Self::NotFound,
        Self::Conflict,
        Self::TooLarge,
        Self::Short,
        Self::Unavailable,
        Self::Refused,
        Self::Abandoned,
    ];

    fn of<T>(outcome: &Result<T, StoreError>) -> Self {
        match outcome {
            Ok(_) => Self::Ok,
            Err(StoreError::NotFound { .. }) => Self::NotFound,
            Err(StoreError::Conflict { .. }) => Self::Conflict,
            Err(StoreError::TooLarge { .. }) => Self::TooLarge,
            Err(StoreError::Short { .. }) => Self::Short,
            Err(StoreError::Unavailable { .. }) => Self::Unavailable,
            Err(StoreError::Refused { .. }) => Self::Refused,
            Err(StoreError::Body { .. }) => Self::Abandoned,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::NotFound => "not_found",
            Self::Conflict => "conflict",
            Self::TooLarge => "too_large",
            Self::Short => "short",
            Self::Unavailable => "unavailable",
            Self::Refused => "refused",
            Self::Abandoned => "abandoned",
        }
    }
}

#[derive(Debug)]
struct Tally {
    endings: [Counter; Ending::ALL.len()],
    durations: Histogram,
}

impl Default for Tally {
    fn default() -> Self {
        Self { endings: Default::default(), durations: Histogram::new(REQUEST_BOUNDS) }
    }
}

/// A store whose requests are counted.
#[derive(Debug)]
pub struct Observed {
    inner: SharedStore,
    tallies: [Tally; Operation::ALL.len()],
}

impl Observed {
    /// Watches a store.
    #[must_use]
    pub fn new(inner: SharedStore) -> Self {
        Self { inner, tallies: Default::default() }
    }

    /// Writes what was counted.
    pub fn describe(&self, page: &mut Page) {
        let tallies = || Operation::ALL.map(|operation| (operation.as_str(), &self.tallies[operation as usize]));
        let help = "Requests to the object store, each attempt counted, by how they ended.";
        let mut family = page.family(Kind::Counter, "nbd_server_store_requests_total", help);
        for (operation, tally) in tallies() {
            for ending in Ending::ALL {
                let labels = [("operation", operation), ("outcome", ending.as_str())];
                family.sample(&labels, tally.endings[ending as usize].get());
            }
        }
        let help = "Time until a request to the object store ended.";
        let mut family = page.family(Kind::Histogram, "nbd_server_store_request_duration_seconds", help);
        for (operation, tally) in tallies() {
            family.histogram(&[("operation", operation)], &tally.durations);
        }
    }

    async fn observe<T>(
        &self,
        operation: Operation,
        request: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        // A request that is given up from above has an ending too.
        let mut watch = Watch { store: self, operation, started: Instant::now(), ended: false };
        let outcome = request.await;
        watch.ended = true;
        self.count(operation, Ending::of(&outcome), watch.started);
        outcome
    }

    fn count(&self, operation: Operation, ending: Ending, started: Instant) {
        let tally = &self.tallies[operation as usize];
        tally.endings[ending as usize].increment();
        tally.durations.observe(started.elapsed());
    }
}

/// Counts a request that nobody waits for any more.
struct Watch<'a> {
    store: &'a Observed,
    operation: Operation,
    started: Instant,
    ended: bool,
}

impl Drop for Watch<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.store.count(self.operation, Ending::Abandoned, self.started);
        }
    }
}

#[async_trait::async_trait]
impl Store for Observed {
    async fn get(&self, key: &Key, max_bytes: u64) -> Result<Object, StoreError> {
        self.observe(Operation::Get, self.inner.get(key, max_bytes)).await
    }

    async fn get_range(&self, key: &Key, range: ByteRange) -> Result<Bytes, StoreError> {
        self.observe(Operation::Get, self.inner.get_range(key, range)).await
    }

    async fn len(&self, key: &Key) -> Result<u64, StoreError> {
        self.observe(Operation::Head, self.inner.len(key)).await
    }

    async fn put(&self, key: &Key, bytes: Bytes, condition: Condition) -> Result<Version, StoreError> {
        self.observe(Operation::Put, self.inner.put(key, bytes, condition)).await
    }

    async fn upload(&self, key: &Key, max_bytes: u64, body: Body<'_>) -> Result<(), StoreError> {
        self.observe(Operation::Upload, self.inner.upload(key, max_bytes, body)).await
    }

    async fn list(&self, prefix: &Key) -> Result<Vec<Key>, StoreError> {
        self.observe(Operation::List, self.inner.list(prefix)).await
    }

    async fn list_folders(&self, prefix: &Key) -> Result<Vec<String>, StoreError> {
        self.observe(Operation::List, self.inner.list_folders(prefix)).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.observe(Operation::Delete, self.inner.delete(key)).await
    }
}

#[cfg(test)]
mod tests;
