//! What a server tells those who watch it, collected from the parts that count.

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::watch;

use super::ServerError;
use crate::admin::{Health, StoreFailure, StoreHealth};
use crate::clock::Clock;
use crate::config::{Config, StoreConfig};
use crate::metrics::{Kind, Page};
use crate::nbd;
use crate::store::SharedStore;
use crate::store::local::LocalStore;
use crate::store::observed::{Observed, Reachability};
use crate::store::probe::probe;
use crate::store::remote::RemoteStore;
use crate::store::retry::{RetryPolicy, Retrying};
use crate::volume::registry::Registry;

/// Everything that counts.
pub(super) struct Watched {
    pub(super) registry: Arc<Registry>,
    pub(super) nbd: Arc<nbd::Server>,
    pub(super) store: WatchedStore,
    pub(super) started: SystemTime,
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
        self.store.observed.describe(&mut page);
        self.store.retrying.describe(&mut page);
        self.registry.describe(&mut page);
        page
    }

    /// How the server is now.
    pub(super) fn health(&self) -> Health {
        let Reachability { up, since, last_error } = self.store.observed.reachability();
        let last_error = last_error.map(|(reason, at)| StoreFailure { at, reason });
        let store = StoreHealth { backend: self.store.backend, reachable: up, since, last_error };
        Health { live: true, ready: !*self.stopped.borrow(), store }
    }
}

/// The store, with the two of its wrappers that count.
pub(super) struct WatchedStore {
    backend: &'static str,
    observed: Arc<Observed>,
    retrying: Arc<Retrying>,
}

impl WatchedStore {
    /// The store of a configuration, found fit for writing.
    pub(super) async fn build(config: &Config, clock: &Arc<dyn Clock>) -> Result<Self, ServerError> {
        let policy = RetryPolicy { limit: config.store_timeout, ..RetryPolicy::default() };
        let store: SharedStore = match &config.store {
            StoreConfig::Local(root) => {
                let opened = LocalStore::open(root.clone(), Arc::clone(clock));
                Arc::new(opened.map_err(|source| ServerError::LocalRoot { path: root.clone(), source })?)
            }
            StoreConfig::Memory => Arc::new(RemoteStore::memory()),
            StoreConfig::Remote(remote) => {
                let environment = |name: &str| std::env::var(name).ok();
                Arc::new(RemoteStore::connect(remote, &environment, policy, Arc::clone(clock))?)
            }
        };
        // Without retries: somebody who has just started a server wants to hear at once that the store is away.
        probe(&*store, &config.export_root).await?;
        let observed = Arc::new(Observed::new(store, Arc::clone(clock)));
        let retrying = Retrying::new(Arc::clone(&observed) as SharedStore, policy, Arc::clone(clock));
        Ok(Self { backend: config.store.backend(), observed, retrying: Arc::new(retrying) })
    }

    /// As the volumes use it.
    pub(super) fn shared(&self) -> SharedStore {
        Arc::clone(&self.retrying) as SharedStore
    }
}
