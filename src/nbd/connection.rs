//! One client from the greeting to its end: drives the pure handshake over a stream, looks exports up for it, and hands
//! the stream to the transmission.
//!
//! Promises: a client that does not get on with the handshake is closed at the deadline; an export is opened only once a
//! client has named it; what the client sent ahead is not lost.

use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::watch;
use tokio::time::Instant;

use super::Shared;
use super::handshake::{self, Close, ExportInfo, Handshake, Negotiated, Step};
use super::request::Attachment;
use super::transmission;
use crate::units::{ExportId, Geometry};
use crate::volume::Volume;
use crate::volume::registry::{ExportError, ExportSummary, Registry};

/// How much is received at once in the handshake, in bytes.
const RECEIVE_BYTES: usize = 4096;
/// How long a client in the handshake has once the server stops: time for one more exchange.
const STOPPING_GRACE: Duration = Duration::from_secs(1);

/// Serves one client to its end.
pub(super) async fn run<S>(mut stream: S, shared: &Shared, mut stop: watch::Receiver<bool>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut input = BytesMut::new();
    match negotiate(&mut stream, &mut input, shared, &mut stop).await {
        Ok((volume, export, negotiated)) => {
            tracing::debug!("export {}: a client attached, {negotiated:?}", export.name);
            let Negotiated { mode, contexts } = negotiated;
            let attachment = Attachment { mode, contexts, size: export.size, read_only: export.read_only };
            transmission::run(stream, &input, volume, attachment, shared, stop).await;
        }
        Err(why) => {
            tracing::debug!("a client left in the handshake: {why}");
            let (mut reader, mut writer) = tokio::io::split(stream);
            super::close_gently(&mut reader, &mut writer).await;
        }
    }
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
}

async fn negotiate<S>(
    stream: &mut S,
    input: &mut BytesMut,
    shared: &Shared,
    stop: &mut watch::Receiver<bool>,
) -> Result<(Arc<Volume>, ExportInfo, Negotiated), Left>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut deadline = Instant::now() + shared.limits.handshake;
    let too_slow = |_| {
        shared.bites.handshake.log("a client did not finish the handshake in time: its connection is closed");
        Left::TooSlow
    };
    let mut out = Vec::new();
    let mut handshake = Handshake::new(shared.limits.option, &mut out);
    let mut found: Option<(Arc<Volume>, ExportInfo)> = None;
    let mut stopping = false;
    loop {
        let mut step = handshake.feed(input, &mut out, stopping);
        if let Step::Find(name) = &step {
            let asked = Instant::now();
            let answer = match find(&shared.registry, name).await {
                Ok(export) => handshake.found(Ok(&found.insert(export).1), &mut out),
                Err(reason) => handshake.found(Err(&reason), &mut out),
            };
            // The deadline is the client's; opening an export is on us.
            deadline += asked.elapsed();
            match answer {
                Some(next) => step = next,
                None => continue,
            }
        }
        if step == Step::List {
            let exports = attachable(shared.registry.list());
            handshake.listed(exports.iter().map(|(name, text)| (name.as_str(), text.as_str())), &mut out);
        }
        if !out.is_empty() {
            tokio::time::timeout_at(deadline, send(stream, &out)).await.map_err(too_slow)??;
            out.clear();
        }
        match (step, found.take()) {
            (Step::Transmit(negotiated), Some((volume, export))) => return Ok((volume, export, negotiated)),
            (Step::Close(why), _) => {
                if let Close::Limit(text) = why {
                    shared.bites.options.log(text);
                }
                return Err(Left::Closed(why));
            }
            (Step::NeedMore, _) => {
                input.reserve(RECEIVE_BYTES);
                tokio::select! {
                    got = tokio::time::timeout_at(deadline, stream.read_buf(input)) => {
                        if got.map_err(too_slow)?? == 0 {
                            return Err(Left::HungUp);
                        }
                    }
                    () = super::stopped(stop), if !stopping => {
                        stopping = true;
                        deadline = deadline.min(Instant::now() + STOPPING_GRACE);
                    }
                }
            }
            (Step::List | Step::Find(_) | Step::Transmit(_), _) => {}
        }
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
