//! What a server tells those who watch it, collected from the parts that count.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use super::store::WatchedStore;
use crate::admin::{ExportCounts, Health, ServerStatus, StoreFailure, StoreHealth};
use crate::clock::Clock;
use crate::metrics::{Kind, Page};
use crate::nbd;
use crate::store::health::Reachability;
use crate::volume::registry::Registry;

/// Everything that counts.
pub(super) struct Watched {
    pub(super) registry: Arc<Registry>,
    pub(super) nbd: Arc<nbd::Server>,
    pub(super) store: WatchedStore,
    pub(super) started: SystemTime,
    /// The same by the clock that no change of the date moves.
    pub(super) begun: Duration,
    pub(super) clock: Arc<dyn Clock>,
    /// Where NBD clients connect, as URIs without an export.
    pub(super) listen: Vec<String>,
    /// Whether the server stops.
    pub(super) stopped: watch::Receiver<bool>,
}

impl Watched {
    /// All metrics as they are now.
    pub(super) fn page(&self) -> Page {
        let mut page = Page::default();
        page.family(Kind::Gauge, "nbd_server_build_info", "The version that runs.")
            .sample(&[("version", env!("CARGO_PKG_VERSION"))], 1);
        let started = self.started.duration_since(UNIX_EPOCH).unwrap_or_default();
        page.family(Kind::Gauge, "process_start_time_seconds", "When the server started, since 1970.")
            .sample(&[], started.as_secs_f64());
        self.nbd.describe(&mut page);
        self.store.health.describe(&mut page);
        self.store.observed.describe(&mut page);
        self.registry.describe(&mut page);
        page
    }

    /// How the server is now.
    pub(super) fn health(&self) -> Health {
        Health { live: true, ready: !*self.stopped.borrow(), exports: self.exports(), store: self.store() }
    }

    /// The server itself, for a person.
    pub(super) fn status(&self) -> ServerStatus {
        ServerStatus {
            version: env!("CARGO_PKG_VERSION"),
            started_at: self.started,
            uptime_seconds: self.clock.monotonic().saturating_sub(self.begun).as_secs(),
            exports: self.exports(),
            connections: self.nbd.connections(),
            listen: self.listen.clone(),
            store: self.store(),
        }
    }

    fn exports(&self) -> ExportCounts {
        let mut counts = ExportCounts::default();
        for export in self.registry.list() {
            let count = match (&export.failed, export.faults.is_empty()) {
                _ if export.discovering => &mut counts.discovering,
                (Some(_), _) => &mut counts.failed,
                (None, false) => &mut counts.degraded,
                (None, true) => &mut counts.ready,
            };
            *count += 1;
        }
        counts
    }

    fn store(&self) -> StoreHealth {
        let Reachability { up, since, last_error } = self.store.health.reachability();
        let last_error = last_error.map(|(reason, at)| StoreFailure { at, reason });
        StoreHealth { backend: self.store.backend, reachable: up, since, last_error }
    }
}
