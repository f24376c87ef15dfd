//! What a server tells those who watch it, collected from the parts that count.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use super::ServerError;
use crate::admin::{ExportCounts, Health, ServerStatus, StoreFailure, StoreHealth};
use crate::clock::Clock;
use crate::config::{Config, StoreConfig};
use crate::metrics::{Kind, Page};
use crate::nbd;
use crate::store::SharedStore;
use crate::store::health::{Health as StoreNews, Reachability};
use crate::store::local::LocalStore;
use crate::store::observed::Observed;
use crate::store::probe::ProbeError;
use crate::store::remote::RemoteStore;
use crate::store::retry::{RetryPolicy, Retrying};
use crate::volume::registry::Registry;

/// Everything that counts.
pub(super) struct Watched {
    pub(super) registry: Arc<Registry>,
    pub(super) nbd: Arc<nbd::Server>,
    pub(super) store: WatchedStore,
    pub(super) started: SystemTime,
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
        self.store.retrying.describe(&mut page);
        self.registry.describe(&mut page);
        page
    }

    /// How the server is now.
    pub(super) fn health(&self) -> Health {
        Health { live: true, ready: !*self.stopped.borrow(), store: self.store() }
    }

    /// The server itself, for a person.
    pub(super) fn status(&self) -> ServerStatus {
        let exports = self.registry.list();
        let failed = exports.iter().filter(|export| export.failed.is_some()).count();
        ServerStatus {
            version: env!("CARGO_PKG_VERSION"),
            started_at: self.started,
            uptime_seconds: self.clock.now().duration_since(self.started).unwrap_or_default().as_secs(),
            exports: ExportCounts { ready: exports.len() - failed, failed },
            connections: self.nbd.connections(),
            listen: self.listen.clone(),
            store: self.store(),
        }
    }

    fn store(&self) -> StoreHealth {
        let Reachability { up, since, last_error } = self.store.health.reachability();
        let last_error = last_error.map(|(reason, at)| StoreFailure { at, reason });
        StoreHealth { backend: self.store.backend, reachable: up, since, last_error }
    }
}

/// The store, with the two of its wrappers that count, and what both know of how it does.
pub(super) struct WatchedStore {
    backend: &'static str,
    health: Arc<StoreNews>,
    observed: Arc<Observed>,
    retrying: Arc<Retrying>,
}

impl WatchedStore {
    /// The store of a configuration, found fit for writing.
    pub(super) async fn build(config: &Config, clock: &Arc<dyn Clock>) -> Result<Self, ServerError> {
        let policy = RetryPolicy { limit: config.store_timeout, ..RetryPolicy::default() };
        let health = Arc::new(StoreNews::new(clock.now()));
        let store: SharedStore = match &config.store {
            StoreConfig::Local(root) => {
                let opened = LocalStore::open(root.clone(), Arc::clone(clock));
                Arc::new(opened.map_err(|source| ServerError::LocalRoot { path: root.clone(), source })?)
            }
            StoreConfig::Memory => Arc::new(RemoteStore::memory()),
            StoreConfig::Remote(remote) => {
                let environment = |name: &str| std::env::var(name).ok();
                let store = RemoteStore::connect(remote, &environment, policy, Arc::clone(clock))?;
                Arc::new(store.reporting_to(Arc::clone(&health)))
            }
        };
        let observed = Arc::new(Observed::new(store));
        let retrying = Retrying::new(Arc::clone(&observed) as SharedStore, policy, Arc::clone(clock))
            .reporting_to(Arc::clone(&health));
        match retrying.probe(&config.export_root).await {
            Err(unfit @ ProbeError::Unfit { .. }) if config.allow_unsafe_store => tracing::warn!(
                "UNSAFE: {unfit}. --allow-unsafe-store is given, so the server starts nevertheless: as soon as a \
                 second server publishes an export of this one, images are lost without a word"
            ),
            judged => judged?,
        }
        Ok(Self { backend: config.store.backend(), health, observed, retrying: Arc::new(retrying) })
    }

    /// As the volumes use it.
    pub(super) fn shared(&self) -> SharedStore {
        Arc::clone(&self.retrying) as SharedStore
    }
}
