//! What is counted of a volume while it is open.
//!
//! The counters are fields of the volume, so a request finds its own without looking anything up; `meter/page.rs` shows
//! them to a scrape.

mod page;

use std::time::{Duration, Instant};

use super::Volume;
use super::registry::{ExportError, Published};
use crate::cache::journal::Kind;
use crate::metrics::{Counter, Histogram, PUBLISH_BOUNDS, Presence, REQUEST_BOUNDS};

/// What a client asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "as the protocol names them")]
pub enum RequestKind {
    Read,
    Write,
    Flush,
    Trim,
    WriteZeroes,
    Cache,
    BlockStatus,
}

impl RequestKind {
    const ALL: [Self; 7] =
        [Self::Read, Self::Write, Self::Flush, Self::Trim, Self::WriteZeroes, Self::Cache, Self::BlockStatus];

    fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Write => "write",
            Self::Flush => "flush",
            Self::Trim => "trim",
            Self::WriteZeroes => "write_zeroes",
            Self::Cache => "cache",
            Self::BlockStatus => "block_status",
        }
    }
}

/// How a publish ended.
#[derive(Debug, Clone, Copy)]
enum PublishEnding {
    Published,
    NothingDirty,
    Conflict,
    Failed,
}

impl PublishEnding {
    const ALL: [Self; 4] = [Self::Published, Self::NothingDirty, Self::Conflict, Self::Failed];

    fn of(result: &Result<Published, ExportError>) -> Self {
        match result {
            Ok(Published { created: true, .. }) => Self::Published,
            Ok(_) => Self::NothingDirty,
            Err(ExportError::Conflict { .. } | ExportError::HeadRewritten { .. }) => Self::Conflict,
            Err(_) => Self::Failed,
        }
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::Published => "published",
            Self::NothingDirty => "nothing_dirty",
            Self::Conflict => "conflict",
            Self::Failed => "failed",
        }
    }
}

const PUBLISH_KINDS: [Kind; 2] = [Kind::Snapshot, Kind::Compact];

#[derive(Debug)]
struct RequestMeter {
    failed: Counter,
    bytes: Counter,
    durations: Histogram,
}

#[derive(Debug)]
struct PublishMeter {
    endings: [Counter; PublishEnding::ALL.len()],
    durations: Histogram,
}

/// The counters of a volume since it was opened.
#[derive(Debug)]
pub(super) struct Meter {
    requests: [RequestMeter; RequestKind::ALL.len()],
    hits: Counter,
    misses: Counter,
    fetches: Histogram,
    fetched_bytes: Counter,
    fetch_failures: Counter,
    publishes: [PublishMeter; PUBLISH_KINDS.len()],
    connections: Presence,
}

impl Default for Meter {
    fn default() -> Self {
        let request = |_| RequestMeter {
            failed: Counter::default(),
            bytes: Counter::default(),
            durations: Histogram::new(REQUEST_BOUNDS),
        };
        let publish = |_| PublishMeter { endings: Default::default(), durations: Histogram::new(PUBLISH_BOUNDS) };
        Self {
            requests: RequestKind::ALL.map(request),
            hits: Counter::default(),
            misses: Counter::default(),
            fetches: Histogram::new(REQUEST_BOUNDS),
            fetched_bytes: Counter::default(),
            fetch_failures: Counter::default(),
            publishes: PUBLISH_KINDS.map(publish),
            connections: Presence::default(),
        }
    }
}

impl Meter {
    /// A read of `touched` chunks, of which `missing` are not here.
    pub(super) fn read(&self, touched: u64, missing: usize) {
        let missing = missing as u64;
        self.hits.add(touched - missing);
        if missing > 0 {
            self.misses.add(missing);
        }
    }

    /// A fetch that brought `bytes`, or nothing that could be used.
    pub(super) fn fetched(&self, started: Instant, bytes: Option<usize>) {
        self.fetches.observe(started.elapsed());
        match bytes {
            Some(bytes) => self.fetched_bytes.add(bytes as u64),
            None => {
                self.fetch_failures.increment();
            }
        }
    }

    /// A publish that came to an end.
    pub(super) fn published(&self, kind: Kind, started: Instant, result: &Result<Published, ExportError>) {
        let meter = &self.publishes[kind as usize];
        meter.endings[PublishEnding::of(result) as usize].increment();
        meter.durations.observe(started.elapsed());
    }
}

impl Volume {
    /// Counts a request of a client that was answered: how many bytes it moved, how long it took, whether it succeeded.
    pub fn observe(&self, kind: RequestKind, bytes: u64, took: Duration, ok: bool) {
        let meter = &self.meter.requests[kind as usize];
        meter.durations.observe(took);
        if ok {
            meter.bytes.add(bytes);
        } else {
            meter.failed.increment();
        }
    }

    /// How many clients are attached; each enters here and leaves when it is gone.
    #[must_use]
    pub fn connections(&self) -> &Presence {
        &self.meter.connections
    }
}
