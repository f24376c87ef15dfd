//! The NBD server: clients come in, attach an export by name, and read and write it.
//!
//! Promises: every statement of the protocol that stands above a piece of this code; a client, however hostile, costs
//! bounded memory and time ([`Limits`]) and never harms another; a stop answers what was accepted.
//! Must never: see the admin interface, the cache, the store or a manifest. Exports and their data come from
//! [`crate::volume`] alone.
//!
//! The way of a request: [`listen`] → `driver` polls the connection, on the runtime or on a thread → `connection` drives the
//! pure [`handshake`], over [`tls`] if so agreed → `transmission` takes requests from its inbox, [`request`] judges each once,
//! `serve` calls the volume, [`reply`] makes the frames, the outbox sends them.

mod connection;
pub mod context;
mod driver;
pub mod errno;
pub mod handshake;
mod inbox;
pub mod limits;
pub mod listen;
mod outbox;
mod pool;
mod readers;
pub mod reply;
pub mod request;
mod serve;
mod shares;
mod socket;
mod stream;
pub mod tls;
mod transmission;
pub mod wire;

use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

use self::driver::Driver;
use self::limits::Bites;
pub use self::limits::Limits;
use self::listen::Client;
pub use self::listen::{DEFAULT_PORT, ListenAddr, ListenError, Listener, PassedSocket};
use self::pool::Pool;
use self::readers::{Reader, Readers};
use self::shares::Shares;
use self::tls::Tls;
use crate::metrics::{Counter, Kind, Page};
use crate::net::Failures;
use crate::volume::registry::Registry;

/// How long a closing connection waits for the client to read what was sent and close its side.
const CLOSING: Duration = Duration::from_secs(1);

/// Serves the exports of a registry to NBD clients.
#[derive(Debug)]
pub struct Server {
    shared: Arc<Shared>,
    connections: Arc<Semaphore>,
}

/// What all connections share.
#[derive(Debug)]
struct Shared {
    registry: Arc<Registry>,
    limits: Limits,
    /// `None`: there is no TLS.
    tls: Option<Arc<Tls>>,
    /// Payload bytes in flight beyond what each connection has for itself.
    shares: Arc<Shares>,
    /// For busy connections.
    threads: Arc<Semaphore>,
    readers: Readers,
    pool: Arc<Pool>,
    bites: Bites,
    /// Clients that were let in; and of these, those that attached an export.
    accepted: Counter,
    attached: Counter,
}

impl Shared {
    /// Someone to read for a connection, if fewer of them are busy than there are processors.
    fn reader_to_spare(&self) -> Option<Reader<'_>> {
        let busy = self.limits.threads - self.threads.available_permits();
        if busy < self.readers.count() { self.readers.free() } else { None }
    }
}

impl Server {
    /// A server of these exports, without TLS. The limits hold for all its listeners together.
    #[must_use]
    pub fn new(registry: Arc<Registry>, limits: Limits) -> Self {
        Self::with_tls(registry, limits, None)
    }

    /// A server of these exports, whose clients may or must use TLS.
    #[must_use]
    pub fn with_tls(registry: Arc<Registry>, limits: Limits, tls: Option<Arc<Tls>>) -> Self {
        let shares = Shares::new(limits.shared_bytes, limits.stalled);
        Self {
            shared: Arc::new(Shared {
                registry,
                limits,
                tls,
                shares,
                threads: Arc::new(Semaphore::new(limits.threads)),
                readers: Readers::new(),
                pool: Arc::default(),
                bites: Bites::none(),
                accepted: Counter::default(),
                attached: Counter::default(),
            }),
            connections: Arc::new(Semaphore::new(limits.connections)),
        }
    }

    /// Accepts clients until `stop` turns true (or its sender is gone); then takes no new ones, lets those in the
    /// handshake know, answers what was accepted, and returns once all are gone or [`Limits::drain`] has passed.
    /// Call it once per listener; the calls may run side by side.
    pub async fn serve(&self, listener: Listener, stop: watch::Receiver<bool>) {
        let mut clients = JoinSet::new();
        let cut = watch::Sender::new(false);
        let mut stopping = stop.clone();
        let mut failures = Failures::default();
        loop {
            tokio::select! {
                () = stopped(&mut stopping) => break,
                Some(_) = clients.join_next() => {}
                accepted = listener.accept() => match accepted {
                    Ok(client) => self.welcome(client, &mut clients, &stop, &cut),
                    Err(error) => failures.pass(listener.local_addr(), error).await,
                },
            }
        }
        drop(listener);
        let drained = async { while clients.join_next().await.is_some() {} };
        if tokio::time::timeout(self.shared.limits.drain, drained).await.is_err() {
            self.shared.bites.drain.log("the stop did not wait for all requests: some clients were cut off");
            cut.send_replace(true);
            while clients.join_next().await.is_some() {}
        }
    }

    /// How many clients are connected.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.limits.connections - self.connections.available_permits()
    }

    /// Writes what was counted.
    pub fn describe(&self, page: &mut Page) {
        let Shared { bites, accepted, attached, .. } = &*self.shared;
        page.family(Kind::Gauge, "nbd_server_connections", "NBD clients now.").sample(&[], self.connections());
        page.family(Kind::Counter, "nbd_server_connections_total", "NBD clients that were let in.")
            .sample(&[], accepted.get());
        page.family(Kind::Counter, "nbd_server_attached_total", "NBD clients that attached an export.")
            .sample(&[], attached.get());
        let help = "How often a client met a limit: it was refused, cut off or made to wait.";
        let mut family = page.family(Kind::Counter, "nbd_server_limit_hits_total", help);
        for (limit, count) in bites.counts() {
            family.sample(&[("limit", limit)], count);
        }
    }

    fn welcome(
        &self,
        client: Client,
        clients: &mut JoinSet<()>,
        stop: &watch::Receiver<bool>,
        cut: &watch::Sender<bool>,
    ) {
        let Ok(place) = Arc::clone(&self.connections).try_acquire_owned() else {
            let most = self.shared.limits.connections;
            let text = format!("{most} clients are connected, as many as are allowed: new ones are closed");
            self.shared.bites.connections.log(&text);
            return;
        };
        let id = self.shared.accepted.increment() + 1;
        let (shared, stop) = (Arc::clone(&self.shared), stop.clone());
        let threads = Arc::clone(&shared.threads);
        // The export is filled in once it is known.
        let span = tracing::info_span!("connection", id, peer = client.peer, export = tracing::field::Empty);
        let driver = Driver::new(client.socket, span, async move |stream| {
            connection::run(stream, &shared, stop).await;
            drop(place);
        });
        clients.spawn(driver.run(threads, cut.subscribe()));
    }
}

/// Returns once the server is told to stop, or nobody is left who could tell it to.
async fn stopped(stop: &mut watch::Receiver<bool>) {
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Closes so that the client gets what was sent: with data left unread the system would answer with a reset, and a reset
/// overtakes replies that are still on their way. Up to `discarded` bytes that the client still sends are thrown away.
async fn close_gently<R, W>(reader: &mut R, writer: &mut W, discarded: u64)
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let closing = async {
        writer.shutdown().await?;
        tokio::io::copy(&mut reader.take(discarded), &mut tokio::io::sink()).await
    };
    // Whatever comes of it, the connection is over.
    let _ = tokio::time::timeout(CLOSING, closing).await;
}
