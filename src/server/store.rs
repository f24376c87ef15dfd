//! The store of a configuration, with all that stands around it: retries, counters, news of its health.

use std::sync::Arc;
use std::time::SystemTime;

use super::ServerError;
use crate::background::Background;
use crate::clock::{Clock, SystemClock};
use crate::config::{StoreAccess, StoreConfig};
use crate::disk::{Disk, RealDisk};
use crate::store::SharedStore;
use crate::store::health::Health;
use crate::store::local::LocalStore;
use crate::store::observed::Observed;
use crate::store::probe::{ProbeError, probe};
use crate::store::remote::RemoteStore;
use crate::store::retry::{RetryPolicy, Retrying};
use crate::volume::Services;

/// The store, with the two of its wrappers that count, and what both know of how it does.
pub(super) struct WatchedStore {
    pub(super) backend: &'static str,
    pub(super) health: Arc<Health>,
    pub(super) observed: Arc<Observed>,
    pub(super) retrying: Arc<Retrying>,
    policy: RetryPolicy,
}

impl WatchedStore {
    /// The store of a configuration; nothing is asked of it yet.
    pub(super) fn connect(
        access: &StoreAccess,
        clock: &Arc<dyn Clock>,
        background: Background,
    ) -> Result<Self, ServerError> {
        if clock.now() == SystemTime::UNIX_EPOCH {
            return Err(ServerError::NoDate);
        }
        let policy = RetryPolicy { limit: access.timeout, ..RetryPolicy::default() };
        let health = Arc::new(Health::new(clock.now()));
        let store: SharedStore = match &access.store {
            StoreConfig::Local(root) => {
                let opened = LocalStore::open(root.clone(), Arc::clone(clock));
                let store = opened.map_err(|source| ServerError::LocalRoot { path: root.clone(), source })?;
                Arc::new(store.with_background(background))
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
        Ok(Self { backend: access.store.backend(), health, observed, retrying: Arc::new(retrying), policy })
    }

    /// Finds out whether the store is fit for writing.
    pub(super) async fn probe(&self, access: &StoreAccess) -> Result<(), ServerError> {
        match probe(&self.retrying, &access.export_root).await {
            Err(unfit @ ProbeError::Unfit { .. }) if access.allow_unsafe => tracing::warn!(
                "UNSAFE: {unfit}. --allow-unsafe-store is given, so the server starts nevertheless: as soon as a \
                 second server publishes an export of this one, images are lost without a word"
            ),
            judged => judged?,
        }
        Ok(())
    }

    /// What volumes on it are made of.
    pub(super) fn services(&self, access: &StoreAccess, disk: Arc<dyn Disk>, clock: Arc<dyn Clock>) -> Services {
        let store = Arc::clone(&self.retrying) as SharedStore;
        Services::new(store, access.export_root.clone(), disk, clock).with_patience(self.policy)
    }
}

/// The store for a command that works without a server.
pub(crate) struct Offline {
    store: WatchedStore,
    access: StoreAccess,
    services: Arc<Services>,
}

impl Offline {
    /// Nothing is asked of the store yet. Memory is refused: what is in it is nowhere else.
    ///
    /// # Errors
    /// [`ServerError`], about the flags or the local directory.
    pub(crate) fn connect(access: &StoreAccess) -> Result<Self, ServerError> {
        if access.store == StoreConfig::Memory {
            return Err(ServerError::MemoryOffline);
        }
        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let store = WatchedStore::connect(access, &clock, Background::default())?;
        let services = Arc::new(store.services(access, Arc::new(RealDisk::default()), clock));
        Ok(Self { store, access: access.clone(), services })
    }

    /// Finds out whether the store is fit for writing.
    ///
    /// # Errors
    /// [`ServerError::Probe`].
    pub(crate) async fn probe(&self) -> Result<(), ServerError> {
        self.store.probe(&self.access).await
    }

    /// What volumes are made of.
    pub(crate) fn services(&self) -> Arc<Services> {
        Arc::clone(&self.services)
    }
}
