//! One client from the greeting to its end: drives the pure handshake over a stream, starts TLS if the client asks for it,
//! looks exports up, and hands the stream to the transmission.
//!
//! Promises: a client that does not get on with the handshake, TLS included, is closed at the deadline, which each answered
//! option renews up to a bound; an export is opened
//! only once a client has named it; what the client sent ahead is not lost.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_rustls::server::TlsStream;

use super::Shared;
use super::handshake::{self, Close, ExportInfo, Handshake, Negotiated, Step, TlsState};
use super::request::Attachment;
use super::socket::Socket;
use super::stream::Stream;
use super::transmission;
use crate::units::{ExportId, Geometry};
use crate::volume::Volume;
use crate::volume::registry::{ExportError, ExportSummary, Registry};

/// How much is received at once in the handshake, in bytes.
const RECEIVE_BYTES: usize = 4096;
/// How long a client in the handshake has once the server stops: time for one more exchange.
const STOPPING_GRACE: Duration = Duration::from_secs(1);

/// Serves one client to its end.
pub(super) async fn run(mut stream: Stream, shared: &Shared, mut stop: watch::Receiver<bool>) {
    let mut talk = Talk::new(shared);
    match talk.negotiate(&mut stream, &mut stop).await {
        Ok(Next::Transmit(attached)) => {
            let socket = stream.socket();
            transmit(stream, socket, talk, attached, stop).await;
        }
        // In a box: a plain connection shall not be as large as one with a TLS session in it.
        Ok(Next::Secure) => {
            let socket = stream.socket().under_tls();
            Box::pin(run_in_tls(stream, socket, talk, stop)).await;
        }
        Err(why) => leave(stream, &why, shared).await,
    }
}

async fn run_in_tls<S>(stream: S, socket: Socket, mut talk: Talk<'_>, mut stop: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let shared = talk.shared;
    let mut stream = match talk.secure(stream, &mut stop).await {
        Ok(stream) => stream,
        Err((why, Some(stream))) => return leave(stream, &why, shared).await,
        Err((why, None)) => return log_left(&why),
    };
    match talk.negotiate(&mut stream, &mut stop).await {
        Ok(Next::Transmit(attached)) => transmit(stream, socket, talk, attached, stop).await,
        Ok(Next::Secure) => leave(stream, &Left::TwiceSecured, shared).await,
        Err(why) => leave(stream, &why, shared).await,
    }
}

async fn transmit<S>(stream: S, socket: Socket, talk: Talk<'_>, attached: Attached, stop: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite,
{
    let Attached { volume, export, negotiated } = attached;
    let (shared, input) = talk.end();
    shared.attached.increment();
    let counted = Arc::clone(&volume);
    let _present = counted.connections().enter();
    tracing::Span::current().record("export", export.name.as_str());
    tracing::info!("a client attached");
    tracing::debug!("it negotiated {negotiated:?}");
    let Negotiated { mode, contexts } = negotiated;
    let attachment = Attachment { mode, contexts, size: export.size, read_only: export.read_only };
    transmission::run(stream, socket, input, volume, attachment, shared, stop).await;
    tracing::info!("a client is gone");
}

async fn leave<S>(stream: S, why: &Left, shared: &Shared)
where
    S: AsyncRead + AsyncWrite,
{
    log_left(why);
    let (mut reader, mut writer) = tokio::io::split(stream);
    super::close_gently(&mut reader, &mut writer, shared.limits.option.drained_bytes.into()).await;
}

fn log_left(why: &Left) {
    tracing::debug!("a client left in the handshake: {why}");
}

/// Why a client did not get to the transmission.
#[derive(Debug, thiserror::Error)]
enum Left {
    #[error("{0:?}")]
    Closed(Close),
    #[error("it closed the connection")]
    HungUp,
    #[error("it did not finish in time")]
    TooSlow,
    #[error("the connection broke: {0}")]
    Broken(#[from] std::io::Error),
    #[error("no TLS came about: {0}")]
    NoTls(std::io::Error),
    #[error("it started TLS inside TLS")]
    TwiceSecured,
}

/// What comes after a negotiation.
enum Next {
    Transmit(Attached),
    /// The TLS handshake, and then the negotiation once more from the start.
    Secure,
}

/// What a client asked for and gets.
struct Attached {
    volume: Arc<Volume>,
    export: ExportInfo,
    negotiated: Negotiated,
}

/// A conversation before the transmission; it outlives a change of streams.
struct Talk<'a> {
    shared: &'a Shared,
    handshake: Handshake,
    /// Received and not yet understood.
    input: BytesMut,
    /// To be sent.
    out: Vec<u8>,
    /// When the client has to have taken the next step, TLS included.
    deadline: Instant,
    /// When it has to be done.
    last: Instant,
    stopping: bool,
}

impl<'a> Talk<'a> {
    fn new(shared: &'a Shared) -> Self {
        let mut out = Vec::new();
        let tls = shared.tls.as_ref().map_or(TlsState::Off, |tls| tls.state());
        let handshake = Handshake::new(shared.limits.option, tls, &mut out);
        let now = Instant::now();
        let (deadline, last) = (now + shared.limits.handshake, now + shared.limits.handshake_in_all);
        Self { shared, handshake, input: BytesMut::new(), out, deadline, last, stopping: false }
    }

    /// The client was answered: it got on.
    fn renew_deadline(&mut self) {
        if !self.stopping {
            self.deadline = self.last.min(Instant::now() + self.shared.limits.handshake);
        }
    }

    async fn negotiate<S>(&mut self, stream: &mut S, stop: &mut watch::Receiver<bool>) -> Result<Next, Left>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let mut found: Option<(Arc<Volume>, ExportInfo)> = None;
        loop {
            let mut step = self.handshake.feed(&mut self.input, &mut self.out, self.stopping);
            if let Step::Find(name) = &step {
                let asked = Instant::now();
                let answer = match find(&self.shared.registry, name).await {
                    Ok(export) => self.handshake.found(Ok(&found.insert(export).1), &mut self.out),
                    Err(reason) => self.handshake.found(Err(&reason), &mut self.out),
                };
                // The deadline is the client's; opening an export is on us.
                self.deadline += asked.elapsed();
                self.last += asked.elapsed();
                match answer {
                    Some(next) => step = next,
                    None => continue,
                }
            }
            if step == Step::List {
                let exports = attachable(self.shared.registry.list());
                self.handshake.listed(exports.iter().map(|(name, text)| (name.as_str(), text.as_str())), &mut self.out);
            }
            if !self.out.is_empty() {
                let sending = tokio::time::timeout_at(self.deadline, send(stream, &self.out));
                sending.await.map_err(|_| self.too_slow())??;
                self.out.clear();
                self.renew_deadline();
            }
            match (step, found.take()) {
                (Step::Transmit(negotiated), Some((volume, export))) => {
                    return Ok(Next::Transmit(Attached { volume, export, negotiated }));
                }
                (Step::StartTls, _) => return Ok(Next::Secure),
                (Step::Close(why), _) => {
                    if let Close::Limit(text) = why {
                        self.shared.bites.options.log(text);
                    }
                    return Err(Left::Closed(why));
                }
                (Step::NeedMore, _) => {
                    self.input.reserve(RECEIVE_BYTES);
                    // What arrived after a stop is answered as such.
                    tokio::select! {
                        biased;
                        () = super::stopped(stop), if !self.stopping => self.stop(),
                        got = tokio::time::timeout_at(self.deadline, stream.read_buf(&mut self.input)) => {
                            if got.map_err(|_| self.too_slow())?? == 0 {
                                return Err(Left::HungUp);
                            }
                        }
                    }
                }
                (Step::List | Step::Find(_) | Step::Transmit(_), _) => {}
            }
        }
    }

    /// The TLS handshake. "Handshake failure: MUST close"; the stream is handed back for that, if there is still one.
    async fn secure<S>(
        &mut self,
        stream: S,
        stop: &mut watch::Receiver<bool>,
    ) -> Result<TlsStream<S>, (Left, Option<S>)>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        let Some(tls) = &self.shared.tls else {
            let missing = std::io::Error::other("there is no certificate");
            return Err((Left::NoTls(missing), Some(stream)));
        };
        let mut accepting = tls.acceptor().accept(stream).into_fallible();
        let accepted = loop {
            tokio::select! {
                biased;
                () = super::stopped(stop), if !self.stopping => self.stop(),
                accepted = tokio::time::timeout_at(self.deadline, &mut accepting) => break accepted,
            }
        };
        match accepted {
            Ok(Ok(stream)) => {
                self.handshake.secured();
                Ok(stream)
            }
            Ok(Err((error, stream))) => Err((Left::NoTls(error), Some(stream))),
            Err(_) => Err((self.too_slow(), None)),
        }
    }

    /// What the transmission goes on with; the rest is over, and its memory with it.
    fn end(self) -> (&'a Shared, BytesMut) {
        (self.shared, self.input)
    }

    /// The server stops: the client is told at its next option, and has time for that alone.
    fn stop(&mut self) {
        self.stopping = true;
        self.deadline = self.deadline.min(Instant::now() + STOPPING_GRACE);
    }

    fn too_slow(&self) -> Left {
        self.shared.bites.handshake.log("a client did not finish the handshake in time: its connection is closed");
        Left::TooSlow
    }
}

async fn send<S: AsyncWrite + Unpin>(stream: &mut S, out: &[u8]) -> std::io::Result<()> {
    stream.write_all(out).await?;
    stream.flush().await
}

/// The export a client names, opened; or a text that says why not and what to do.
async fn find(registry: &Registry, name: &str) -> Result<(Arc<Volume>, ExportInfo), String> {
    let id = if name.is_empty() { only_export(&registry.list())? } else { named(name)? };
    let volume = registry.volume(&id).await.map_err(|error| match error {
        ExportError::NotFound(..) => unknown(name),
        error => format!("export {name:?} cannot be attached: {error}"),
    })?;
    let geometry = volume.geometry();
    let export = ExportInfo {
        name: volume.export_id().to_string(),
        size: geometry.image_size(),
        read_only: volume.read_only(),
        description: description(geometry),
    };
    Ok((volume, export))
}

/// "The empty name means the only export, if there is just one."
fn only_export(exports: &[ExportSummary]) -> Result<ExportId, String> {
    match exports {
        [only] => Ok(only.export_id.clone()),
        [] => Err("there is no export here: create one through the admin socket".to_owned()),
        several => Err(format!("there are {} exports here, so none is the default: name one", several.len())),
    }
}

/// What cannot be the name of an export is the name of no export.
fn named(name: &str) -> Result<ExportId, String> {
    name.parse().map_err(|_| unknown(name))
}

fn unknown(name: &str) -> String {
    let name = handshake::echoed(name);
    format!("there is no export {name} here: list the exports, or create or open it through the admin socket")
}

/// What a list shows: names and descriptions of what can be attached. A failed export is left out, since a client that
/// looks at each of the list would stumble over it; who names it is told the reason.
fn attachable(exports: Vec<ExportSummary>) -> Vec<(String, String)> {
    exports
        .into_iter()
        .filter(|export| export.failed.is_none())
        .map(|export| (export.export_id.into(), export.geometry.map_or_else(String::new, description)))
        .collect()
}

fn description(geometry: Geometry) -> String {
    format!("{} bytes in chunks of {}", geometry.image_size(), geometry.chunk_size())
}
