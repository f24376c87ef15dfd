//! The composition root: from a configuration to a running server, and back to nothing.
//!
//! **Start**, in this order: certificates → NBD sockets → address for metrics → cache root and its lock → admin socket →
//! store and its probe → discovery → the log line that begins with `ready:`. Sockets are bound early, so that a taken port
//! costs nothing, and served once the exports are listed; their heads are read on behind that. A start that fails removes the sockets and the empty folders
//! it made.
//!
//! **Stop**, on SIGTERM or SIGINT: no new clients → what was accepted is answered, to NBD clients within
//! [`Limits::drain`](nbd::Limits::drain), to all others within [`DRAIN_TIMEOUT`] → every volume is flushed and sealed,
//! however long that takes → the lock goes, last of all. A second signal ends the process
//! at once, which is safe but leaves the caches unsealed.
//!
//! **SIGHUP** reads again what can change while clients are served: the certificates and the log's level.

mod cache_root;
mod descriptors;
mod folders;
mod log_limit;
mod logging;
mod notify;
mod passed;
mod private;
mod ready;
mod store;
mod watched;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;

use crate::admin::{self, Api, BindError, ScrapeError, Scrapes, Watch};
use crate::background::Background;
use crate::clock::{Clock, SystemClock};
use crate::config::Config;
use crate::nbd::tls::{Tls, TlsError};
use crate::nbd::{self, ListenError, PassedSocket};
use crate::store::probe::ProbeError;
use crate::store::remote::RemoteConfigError;
use crate::volume::registry::{ExportError, Registry};
pub use descriptors::take_all as take_all_descriptors;
pub use logging::{Logging, show_warnings};
pub use passed::{PassedError, sockets as passed_sockets};
pub(crate) use ready::quoted;

use cache_root::{CacheRoot, CacheRootError};
use folders::NewFolders;
pub(crate) use store::Offline;
use store::WatchedStore;
use watched::Watched;

/// How long a start waits for the heads of its exports once the store is listed; what comes later does not hold it up.
const DISCOVERY_PATIENCE: Duration = Duration::from_secs(1);
/// How long clients may take to get their last answers when the server stops; those of NBD have less.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(30);

/// Why the server did not start, or did not end well. Each text is one line with the value and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// No NBD clients could connect.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// A socket that was passed cannot be used.
    #[error("a socket of LISTEN_FDS cannot be used: {0}")]
    Adopt(#[source] io::Error),
    /// There are no certificates to work with.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The cache root cannot be made or written.
    #[error("--cache-root {path} cannot be used ({source}): choose a directory this user may write", path = .path.display())]
    CacheRoot {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another server works there.
    #[error("--cache-root {path} is in use by another nbd-server: stop that one, or choose another directory", path = .0.display())]
    CacheLocked(PathBuf),
    /// Its `.id` is a copy.
    #[error(
        "--cache-root {path} is a copy of another cache root: two servers that write one export from copies of one cache lose data. Start with an empty --cache-root, and keep this folder if it holds what was not published; or, if the original will never be used again, delete {path}/.id and start once more", path = .0.display()
    )]
    CacheCopied(PathBuf),
    /// The libraries for HTTP, TLS and object storage panic at such a date.
    #[error("the system's clock is set to a date before 1970: set the clock, then start again")]
    NoDate,
    /// No admin client could connect.
    #[error(transparent)]
    Admin(#[from] BindError),
    /// No metrics can be collected.
    #[error(transparent)]
    Scrapes(#[from] ScrapeError),
    /// The local store cannot be made or written.
    #[error("--local-root {path}: {source}; choose a directory this user may write", path = .path.display())]
    LocalRoot {
        /// The directory.
        path: PathBuf,
        /// What the store said.
        source: io::Error,
    },
    /// The bucket is not described well enough.
    #[error(transparent)]
    Remote(#[from] RemoteConfigError),
    /// The store does not answer, refuses, or is not safe to write to.
    #[error("{0}; check the storage flags, the credentials and the network")]
    Probe(#[from] ProbeError),
    /// A command without a server would work on a store that nobody else sees.
    #[error("--storage-backend memory is inside one server alone: choose the backend that holds the export")]
    MemoryOffline,
    /// The exports cannot be listed.
    #[error("the exports cannot be listed: {0}")]
    Discovery(#[from] ExportError),
    /// Signals cannot be received.
    #[error("cannot listen for signals: {0}")]
    Signals(#[source] io::Error),
    /// A front end ended by itself.
    #[error("a part of the server broke off; the log above says which")]
    Broken,
    /// A second signal cut the stop short.
    #[error("stopped at once by a second signal: the next start checks the caches")]
    Interrupted,
}

impl ServerError {
    /// Whether the user has to write something else, rather than change something on the machine.
    #[must_use]
    pub fn is_usage(&self) -> bool {
        matches!(self, Self::MemoryOffline | Self::Remote(RemoteConfigError::Invalid { .. }))
    }
}

/// Runs a server from start to stop, on the sockets that were passed to it and those of the configuration.
///
/// # Errors
/// [`ServerError`]; nothing half-made is left behind.
pub async fn run(
    config: Config,
    passed: Vec<PassedSocket>,
    logging: Logging,
    background: Background,
) -> Result<(), ServerError> {
    let limit = logging.limit();
    let ended = tokio::select! {
        ended = start_and_serve(config, passed, logging, background) => ended,
        never = limit.report_regularly() => match never {},
    };
    limit.report_all();
    ended
}

async fn start_and_serve(
    config: Config,
    passed: Vec<PassedSocket>,
    mut logging: Logging,
    background: Background,
) -> Result<(), ServerError> {
    let mut signals = Signals::new().map_err(ServerError::Signals)?;
    let reloads = signal(SignalKind::hangup()).map_err(ServerError::Signals)?;
    let server = tokio::select! {
        started = Server::start(&config, passed, background) => started?,
        name = signals.next() => {
            tracing::info!("stopped by {name} before it was ready");
            return Ok(());
        }
    };
    if let Some(scrapes) = &server.scrapes {
        tracing::info!("metrics at http://{}/metrics", scrapes.local_addr());
    }
    tracing::info!("{}", server.ready());
    server.serve(&mut signals, reloads, &mut logging).await
}

/// Bound, discovered, and not serving yet.
struct Server {
    listeners: Vec<nbd::Listener>,
    tls: Option<Arc<Tls>>,
    nbd: Arc<nbd::Server>,
    admin: admin::Socket,
    api: Api,
    scrapes: Option<Scrapes>,
    stop: watch::Sender<bool>,
    discovery: JoinSet<()>,
    // Last, so that everything that touches the cache root is gone when another server may have it.
    cache_root: CacheRoot,
}

impl Server {
    async fn start(config: &Config, passed: Vec<PassedSocket>, background: Background) -> Result<Self, ServerError> {
        let tls = match &config.tls {
            Some(files) => Some(Arc::new(Tls::load(files.clone()).await?)),
            None => None,
        };
        let mut listeners = Vec::new();
        for socket in passed {
            listeners.push(nbd::Listener::adopt(socket).map_err(ServerError::Adopt)?);
        }
        for addr in &config.listen {
            listeners.push(nbd::Listener::bind(addr).await?);
        }
        let scrapes = match &config.metrics_listen {
            Some(addr) => Some(Scrapes::bind(addr).await?),
            None => None,
        };
        // Declared before what lies in them: on a failure they must be empty when their turn comes.
        let (cache_folders, mut cache_root) = own_cache_root(&config.cache_root)?;
        let socket_folders = match config.admin_sock.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => NewFolders::create(parent)
                .map_err(|source| BindError::Io { path: config.admin_sock.clone(), source })?,
            _ => NewFolders::default(),
        };
        let group = config.admin_group.as_deref().map(admin::Group::find).transpose()?;
        if let Some(group) = &group {
            socket_folders.made().iter().try_for_each(|folder| group.let_through(folder))?;
        }
        let admin = admin::Socket::bind(&config.admin_sock, group.as_ref()).await?;

        let clock: Arc<dyn Clock> = Arc::new(SystemClock);
        let access = config.access();
        let store = WatchedStore::connect(&access, &clock, background.clone())?;
        private::mend(&config.cache_root, &access.store, &access.export_root).await;
        store.probe(&access).await?;
        let disk =
            cache_root.disk().map_err(|source| ServerError::CacheRoot { path: config.cache_root.clone(), source })?;
        let services = store.services(&access, Arc::new(disk), Arc::clone(&clock)).with_cache_root(cache_root.id());
        let services = services.with_publish_bytes(config.publish_bytes).with_background(background);
        let registry = Registry::list_names(Arc::new(services), config.cache_root.clone()).await?;
        let discovery = discover(Arc::clone(&registry)).await;

        cache_folders.keep();
        cache_root.keep();
        socket_folders.keep();
        let limits = admin::Limits::default();
        let nbd = nbd::Server::with_tls(Arc::clone(&registry), descriptors::limits_of_clients(), tls.clone());
        let nbd = Arc::new(nbd);
        let (stop, stopped) = watch::channel(false);
        let (exports, clients) = (Arc::clone(&registry), Arc::clone(&nbd));
        let (started, begun) = (clock.now(), clock.monotonic());
        let addresses: Vec<_> = listeners.iter().map(|listener| listener.local_addr().clone()).collect();
        let listen = ready::uris(&addresses, tls.as_ref().is_some_and(|tls| tls.config().required));
        let watched =
            Arc::new(Watched { registry: exports, nbd: clients, store, started, begun, clock, listen, stopped });
        let (scraped, looked_at) = (Arc::clone(&watched), Arc::clone(&watched));
        let watch = Watch::new(move || scraped.page(), move || looked_at.health(), move || watched.status());
        let api = Api { registry, default_chunk_bytes: config.chunk_bytes, watch, limits };
        Ok(Self { listeners, tls, nbd, admin, api, scrapes, stop, discovery, cache_root })
    }

    fn ready(&self) -> String {
        let addresses: Vec<_> = self.listeners.iter().map(|listener| listener.local_addr().clone()).collect();
        let tls_required = self.tls.as_ref().is_some_and(|tls| tls.config().required);
        ready::line(&self.api.registry.list(), &addresses, tls_required, self.admin.path())
    }

    async fn serve(self, signals: &mut Signals, mut reloads: Signal, logging: &mut Logging) -> Result<(), ServerError> {
        let Self { listeners, tls, nbd, admin, api, scrapes, stop, mut discovery, cache_root } = self;
        let registry = Arc::clone(&api.registry);
        let stopped = stop.subscribe();
        let mut fronts = JoinSet::new();
        for listener in listeners {
            let (nbd, stopped) = (Arc::clone(&nbd), stopped.clone());
            fronts.spawn(async move { nbd.serve(listener, stopped).await });
        }
        if let Some(scrapes) = scrapes {
            fronts.spawn(scrapes.serve(api.watch.clone(), api.limits, stopped.clone()));
        }
        fronts.spawn(admin::serve(admin, api, stopped));
        notify::ready();

        let mut closing_idle = std::pin::pin!(registry.keep_closing_idle());
        let cause = loop {
            tokio::select! {
                name = signals.next() => break Ok(name),
                ended = fronts.join_next() => break Err(ended),
                _ = reloads.recv() => reload(tls.as_deref(), logging).await,
                never = &mut closing_idle => match never {},
            }
        };
        match &cause {
            Ok(name) => {
                tracing::info!("{name}: finishing what was accepted, then flushing; a second signal ends at once")
            }
            Err(ended) => tracing::error!("a front end broke off, stopping: {ended:?}"),
        }
        notify::stopping();
        stop.send_replace(true);
        discovery.shutdown().await;
        let closing = async {
            if tokio::time::timeout(DRAIN_TIMEOUT, async { while fronts.join_next().await.is_some() {} }).await.is_err()
            {
                tracing::warn!("some clients had no answer after {} s and were cut off", DRAIN_TIMEOUT.as_secs());
                fronts.shutdown().await;
            }
            registry.close().await;
        };
        tokio::select! {
            () = closing => {}
            _ = signals.next() => return Err(ServerError::Interrupted),
        }
        drop(cache_root);
        tracing::info!("stopped");
        cause.map(drop).map_err(|_| ServerError::Broken)
    }
}

/// Reads the heads of all exports, and again those that could not be read, until it is dropped. Returns once every head was
/// read or [`DISCOVERY_PATIENCE`] is over.
async fn discover(registry: Arc<Registry>) -> JoinSet<()> {
    let (read, all_read) = oneshot::channel();
    let mut discovery = JoinSet::new();
    discovery.spawn(async move {
        registry.read_on().await;
        // A start that went on does not wait for it any more.
        let _ = read.send(());
        registry.read_again().await;
    });
    if tokio::time::timeout(DISCOVERY_PATIENCE, all_read).await.is_err() {
        tracing::warn!("not every export is known yet: the heads that the store has not given so far are read on");
    }
    discovery
}

/// What SIGHUP asks for.
async fn reload(tls: Option<&Tls>, logging: &mut Logging) {
    if let Err(error) = logging.reload() {
        let line = error.to_string().split_whitespace().collect::<Vec<_>>().join(" ");
        tracing::error!("SIGHUP: the log's level stays: {line}; then send SIGHUP again");
    }
    let Some(tls) = tls else { return tracing::info!("SIGHUP: without TLS there are no certificates to read again") };
    match tls.reload().await {
        Ok(()) => tracing::info!("SIGHUP: new clients get the certificate in {}", tls.config().cert.display()),
        Err(error) => tracing::error!("SIGHUP: the TLS certificates in use stay: {error}; then send SIGHUP again"),
    }
}

fn own_cache_root(path: &Path) -> Result<(NewFolders, CacheRoot), ServerError> {
    let refused = |source| ServerError::CacheRoot { path: path.to_owned(), source };
    let folders = NewFolders::create(path).map_err(refused)?;
    match CacheRoot::acquire(path) {
        Ok(root) => Ok((folders, root)),
        Err(CacheRootError::Taken) => Err(ServerError::CacheLocked(path.to_owned())),
        Err(CacheRootError::Copied) => Err(ServerError::CacheCopied(path.to_owned())),
        Err(CacheRootError::Io(source)) => Err(refused(source)),
    }
}

/// The signals that end a server.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// The name of the next one.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}
