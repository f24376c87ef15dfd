//! The counters of every volume, as a scrape reads them.
//!
//! How many chunks are resident or dirty is counted as states change, so nothing here passes over a table of chunks:
//! a scrape costs the number of open exports, not their size.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{PUBLISH_KINDS, PublishEnding, RequestKind};
use crate::metrics::{Kind, Page};
use crate::volume::Volume;
use crate::volume::faults::Cause;
use crate::volume::registry::Registry;

/// A number that every open export has: what it is, its name, its help, and where it is read.
type Reading = (Kind, &'static str, &'static str, fn(&Volume) -> u64);

const READINGS: [Reading; 14] = [
    (Kind::Gauge, "nbd_server_export_image_bytes", "Size of the image.", |v| v.geometry.image_size()),
    (Kind::Gauge, "nbd_server_export_resident_bytes", "Data in the local cache, in whole chunks.", |v| {
        v.bytes_of(v.cache.counts().0)
    }),
    (Kind::Gauge, "nbd_server_export_dirty_bytes", "Data that is not published yet, in whole chunks.", |v| {
        v.bytes_of(v.cache.counts().1)
    }),
    (
        Kind::Gauge,
        "nbd_server_export_cache_free_bytes",
        "Room left on the file system of the cache; 0 if it does not say.",
        |v| v.cache.space().map_or(0, |space| space.free),
    ),
    (Kind::Gauge, "nbd_server_export_generation", "Publishes of the export that the cache builds on.", |v| {
        v.cache.base().generation.0
    }),
    (
        Kind::Gauge,
        "nbd_server_export_published_timestamp_seconds",
        "When the snapshot was published that the cache builds on; 0 if none was.",
        Volume::published_at,
    ),
    (Kind::Gauge, "nbd_server_export_connections", "Clients attached to the export.", |v| v.meter.connections.get()),
    (Kind::Gauge, "nbd_server_export_read_only", "Whether writes are refused.", |v| v.read_only.into()),
    (
        Kind::Counter,
        "nbd_server_export_chunk_hits_total",
        "Chunks that reads found in the cache, or knew to be zeros.",
        |v| v.meter.hits.get(),
    ),
    (Kind::Counter, "nbd_server_export_chunk_misses_total", "Chunks that reads had to wait for.", |v| {
        v.meter.misses.get()
    }),
    (Kind::Counter, "nbd_server_export_fetched_bytes_total", "Data fetched from the store.", |v| {
        v.meter.fetched_bytes.get()
    }),
    (Kind::Counter, "nbd_server_export_fetch_failures_total", "Fetches that failed, damaged chunks included.", |v| {
        v.meter.fetch_failures.get()
    }),
    (
        Kind::Counter,
        "nbd_server_export_corrupt_fetches_total",
        "Fetches of chunks that are not in the store as they were published.",
        |v| v.fills.corrupt.load(Ordering::Relaxed),
    ),
    (
        Kind::Gauge,
        "nbd_server_export_damaged_chunks",
        "Chunks that are known not to be in the store as they were published.",
        Volume::damaged_chunks,
    ),
];

impl Registry {
    /// Writes what was counted of every export. One that nobody has used yet is not open and has only its `up`.
    pub fn describe(&self, page: &mut Page) {
        let help = "Whether the export can be served.";
        let mut up = page.family(Kind::Gauge, "nbd_server_export_up", help);
        let exports = self.list();
        for export in &exports {
            up.sample(&[("export", export.export_id.as_str())], u8::from(export.failed.is_none()));
        }
        let help = "Whether something is wrong with the export that its clients meet, by cause.";
        let mut degraded = page.family(Kind::Gauge, "nbd_server_export_degraded", help);
        for export in &exports {
            for cause in Cause::ALL {
                let labels = [("export", export.export_id.as_str()), ("cause", cause.as_str())];
                degraded.sample(&labels, u8::from(export.faults.iter().any(|fault| fault.cause == cause)));
            }
        }
        let volumes = self.open_volumes();
        for (kind, name, help, value) in READINGS {
            let mut family = page.family(kind, name, help);
            for volume in &volumes {
                family.sample(&[("export", volume.export_id.as_str())], value(volume));
            }
        }
        let help = "Time until a chunk was fetched from the store and its hash checked, further attempts included.";
        let mut family = page.family(Kind::Histogram, "nbd_server_export_fetch_duration_seconds", help);
        for volume in &volumes {
            family.histogram(&[("export", volume.export_id.as_str())], &volume.meter.fetches);
        }
        requests(page, &volumes);
        publishes(page, &volumes);
    }
}

fn requests(page: &mut Page, volumes: &[Arc<Volume>]) {
    let all = || volumes.iter().flat_map(|volume| RequestKind::ALL.map(|kind| (volume, kind)));
    let help = "Requests of clients that were answered; the sync of a FUA is a part of its request.";
    let mut family = page.family(Kind::Counter, "nbd_server_export_requests_total", help);
    for (volume, kind) in all() {
        let meter = &volume.meter.requests[kind as usize];
        // Read first: it is counted last, so that the difference is never negative.
        let failed = meter.failed.get();
        for (outcome, count) in [("ok", meter.durations.count().saturating_sub(failed)), ("error", failed)] {
            let labels = [("export", volume.export_id.as_str()), ("operation", kind.as_str()), ("outcome", outcome)];
            family.sample(&labels, count);
        }
    }
    let help = "Data that clients read, wrote, trimmed or zeroed.";
    let mut family = page.family(Kind::Counter, "nbd_server_export_request_bytes_total", help);
    for (volume, kind) in all() {
        let labels = [("export", volume.export_id.as_str()), ("operation", kind.as_str())];
        family.sample(&labels, volume.meter.requests[kind as usize].bytes.get());
    }
    let help = "Time from a request's arrival at the volume to its answer; only of operations that occurred.";
    let mut family = page.family(Kind::Histogram, "nbd_server_export_request_duration_seconds", help);
    for (volume, kind) in all() {
        let durations = &volume.meter.requests[kind as usize].durations;
        if durations.count() > 0 {
            let labels = [("export", volume.export_id.as_str()), ("operation", kind.as_str())];
            family.histogram(&labels, durations);
        }
    }
}

fn publishes(page: &mut Page, volumes: &[Arc<Volume>]) {
    let all = || volumes.iter().flat_map(|volume| PUBLISH_KINDS.map(|kind| (volume, kind)));
    let help = "Snapshots and compactions, by how they ended.";
    let mut family = page.family(Kind::Counter, "nbd_server_export_publishes_total", help);
    for (volume, kind) in all() {
        for ending in PublishEnding::ALL {
            let labels = [("export", volume.export_id.as_str()), ("kind", kind.as_str()), ("outcome", ending.as_str())];
            family.sample(&labels, volume.meter.publishes[kind as usize].endings[ending as usize].get());
        }
    }
    let help = "Time that snapshots and compactions took, failed ones included.";
    let mut family = page.family(Kind::Histogram, "nbd_server_export_publish_duration_seconds", help);
    for (volume, kind) in all() {
        let labels = [("export", volume.export_id.as_str()), ("kind", kind.as_str())];
        family.histogram(&labels, &volume.meter.publishes[kind as usize].durations);
    }
}

impl Volume {
    /// That many chunks; the last of an image may be shorter, so it is an upper bound.
    fn bytes_of(&self, chunks: u64) -> u64 {
        chunks.saturating_mul(self.geometry.chunk_size()).min(self.geometry.image_size())
    }

    /// When the snapshot under the cache was published, in seconds since 1970; 0 if none was.
    fn published_at(&self) -> u64 {
        if self.cache.base().generation.0 == 0 {
            return 0;
        }
        let at = chrono::DateTime::parse_from_rfc3339(self.image().created_at());
        at.ok().and_then(|at| u64::try_from(at.timestamp()).ok()).unwrap_or_default()
    }
}
