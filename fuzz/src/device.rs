//! The real server with one small export, and a client's side of the handshake.

use std::cell::OnceCell;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nbd_server::clock::SystemClock;
use nbd_server::nbd::wire::{self, Mode, opt, rep};
use nbd_server::nbd::{Limits, ListenAddr, Listener, Server};
use nbd_server::store::keys::ExportRoot;
use nbd_server::store::remote::RemoteStore;
use nbd_server::units::{ExportId, Geometry};
use nbd_server::volume::Services;
use nbd_server::volume::registry::Registry;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::sync::watch;

use super::memory_disk::MemoryDisk;

/// The image's size in bytes: small, so that no input is slow, and its last chunk is short.
pub const IMAGE_BYTES: usize = (256 << 10) - 512;
const CHUNK_BYTES: u64 = 64 << 10;
const EXPORT: &str = "fuzz";
/// Longer than anything may take that does not hang.
const DEADLINE: Duration = Duration::from_secs(30);

thread_local! {
    static DEVICE: OnceCell<Device> = const { OnceCell::new() };
}

/// A server on a runtime of its own, which runs while a client of it does.
pub struct Device {
    runtime: tokio::runtime::Runtime,
    socket: PathBuf,
    _folder: TempDir,
    _stop: watch::Sender<bool>,
}

impl Device {
    /// Calls `f` with this thread's server.
    pub fn with<T>(f: impl FnOnce(&Self) -> T) -> T {
        DEVICE.with(|device| f(device.get_or_init(Self::start)))
    }

    fn start() -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("nbd.sock");
        let (stop, stopping) = watch::channel(false);
        let root = ExportRoot::new("exports".parse().unwrap());
        let store = Arc::new(RemoteStore::memory());
        let services = Services::new(store, root, Arc::new(MemoryDisk::default()), Arc::new(SystemClock));
        runtime.block_on(async {
            let registry = Registry::discover(Arc::new(services), "/cache".into()).await.unwrap();
            let id: ExportId = EXPORT.parse().unwrap();
            let geometry = Geometry::new(IMAGE_BYTES as u64, CHUNK_BYTES).unwrap();
            registry.create(id, geometry).await.unwrap();
            let listener = Listener::bind(&ListenAddr::Unix(socket.clone())).await.unwrap();
            let server = Server::new(registry, Limits::default());
            tokio::spawn(async move { server.serve(listener, stopping).await });
        });
        Self { runtime, socket, _folder: folder, _stop: stop }
    }

    /// Runs a client to its end, which has to come.
    pub fn run<T>(&self, client: impl Future<Output = T>) -> T {
        let bounded = async { tokio::time::timeout(DEADLINE, client).await };
        self.runtime.block_on(bounded).expect("the server answers or closes, it does not hang")
    }

    /// Attaches the export, with both metadata contexts where the mode has them.
    pub async fn attach(&self, mode: Mode) -> UnixStream {
        let mut stream = UnixStream::connect(&self.socket).await.unwrap();
        let mut said = u32::from(wire::FIXED_NEWSTYLE | wire::NO_ZEROES).to_be_bytes().to_vec();
        let switch = match mode {
            Mode::Simple => None,
            Mode::Structured => Some(opt::STRUCTURED_REPLY),
            Mode::Extended => Some(opt::EXTENDED_HEADERS),
        };
        if let Some(switch) = switch {
            option(&mut said, switch, &[]);
            let queries =
                [text(EXPORT), 2u32.to_be_bytes().to_vec(), text("base:allocation"), text("nbd-server:residency")];
            option(&mut said, opt::SET_META_CONTEXT, &queries.concat());
        }
        option(&mut said, opt::GO, &[text(EXPORT), vec![0, 0]].concat());
        stream.write_all(&said).await.unwrap();
        stream.read_exact(&mut [0; 18]).await.unwrap();
        loop {
            let mut header = [0; 20];
            stream.read_exact(&mut header).await.unwrap();
            let mut reader = wire::Reader(&header[8..]);
            let (option, kind, len) = (reader.u32().unwrap(), reader.u32().unwrap(), reader.u32().unwrap());
            stream.read_exact(&mut vec![0; len as usize]).await.unwrap();
            assert!(kind < rep::ERR_UNSUP, "option {option} was refused");
            if (option, kind) == (opt::GO, rep::ACK) {
                return stream;
            }
        }
    }
}

fn option(out: &mut Vec<u8>, option: u32, data: &[u8]) {
    out.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&u32::try_from(data.len()).unwrap().to_be_bytes());
    out.extend_from_slice(data);
}

fn text(text: &str) -> Vec<u8> {
    [&u32::try_from(text.len()).unwrap().to_be_bytes(), text.as_bytes()].concat()
}
