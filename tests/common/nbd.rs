//! What the tests over sockets share: a served set of exports, and a raw client that says exactly what it is told.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nbd_server::nbd::tls::{Tls, TlsConfig};
use nbd_server::nbd::wire::{self, Mode, opt, rep};
use nbd_server::nbd::{Limits, ListenAddr, Listener, Server};
use nbd_server::store::{Condition, Store as _};
use nbd_server::units::Geometry;
use nbd_server::volume::registry::Registry;
use tokio::sync::watch;

use super::volumes::{Site, id, root, write};

pub const MIB: u64 = 1 << 20;
/// The chunk size of every export here but `big`.
pub const CHUNK: u64 = 64 << 10;
pub const DISK_BYTES: u64 = 64 * MIB;
pub const LAZY_BYTES: u64 = 2 * MIB;
pub const BIG_BYTES: u64 = 6 << 30;
/// What the absent half of `lazy` reads as.
pub const LAZY_BYTE: u8 = 0xAB;

/// The exports of the tests: `disk` and `disk2` (zeros, writable), `ro` (zeros, read-only), `lazy` (its second half is
/// absent and can be fetched only once `gate` says true), `broken` (cannot be opened), `big` (zeros).
pub async fn registry(gate: watch::Receiver<bool>) -> (Arc<Registry>, Site) {
    let mut site = Site::new();
    let origin = site.start("origin").await;
    let half = LAZY_BYTES / 2;
    for (name, size, chunk) in [
        ("disk", DISK_BYTES, CHUNK),
        ("disk2", MIB, CHUNK),
        ("ro", MIB, CHUNK),
        ("lazy", LAZY_BYTES, CHUNK),
        ("big", BIG_BYTES, 64 * MIB),
    ] {
        origin.create(id(name), Geometry::new(size, chunk).unwrap()).await.unwrap();
    }
    write(&origin.volume(&id("lazy")).await.unwrap(), half, LAZY_BYTE, half).await;
    origin.snapshot(&id("lazy")).await.unwrap();
    origin.close().await;
    let head = r#"{"version":1,"export_id":"broken","image_size":1048576,"chunk_size":65536,"current_snapshot_id":"00000000000000000000000000000001"}"#;
    site.store.put(&root().export(&id("broken")).head(), head.into(), Condition::Always).await.unwrap();

    let registry = site.start("served").await;
    registry.unload(&id("ro")).await.unwrap();
    registry.open(id("ro"), true).await.unwrap();
    // Its failure shows at the first use.
    registry.volume(&id("broken")).await.unwrap_err();
    registry.volume(&id("lazy")).await.unwrap();
    site.store.hold_until("get_range", gate);
    (registry, site)
}

/// A registry with a single export, `only`.
pub async fn registry_of_one(_: watch::Receiver<bool>) -> (Arc<Registry>, Site) {
    registry_of(&["only".to_owned()]).await
}

/// A registry with small exports of these names.
pub async fn registry_of(names: &[String]) -> (Arc<Registry>, Site) {
    let mut site = Site::new();
    let registry = site.start("served").await;
    for name in names {
        registry.create(id(name), Geometry::new(MIB, CHUNK).unwrap()).await.unwrap();
    }
    (registry, site)
}

/// A server in this process.
pub struct Served {
    runtime: Option<tokio::runtime::Runtime>,
    task: Option<tokio::task::JoinHandle<()>>,
    stop: watch::Sender<bool>,
    pub gate: watch::Sender<bool>,
    registry: Arc<Registry>,
    pub addr: ListenAddr,
    pub site: Site,
}

impl Served {
    pub fn new() -> Self {
        Self::with(Limits::default())
    }

    pub fn with(limits: Limits) -> Self {
        Self::start(limits, &"127.0.0.1:0".parse().unwrap(), registry)
    }

    pub fn start(
        limits: Limits,
        addr: &ListenAddr,
        registry: impl AsyncFnOnce(watch::Receiver<bool>) -> (Arc<Registry>, Site),
    ) -> Self {
        Self::start_with_tls(limits, None, addr, registry)
    }

    pub fn start_with_tls(
        limits: Limits,
        tls: Option<TlsConfig>,
        addr: &ListenAddr,
        registry: impl AsyncFnOnce(watch::Receiver<bool>) -> (Arc<Registry>, Site),
    ) -> Self {
        Self::start_in(tokio::runtime::Runtime::new().unwrap(), limits, tls, addr, registry)
    }

    pub fn start_in(
        runtime: tokio::runtime::Runtime,
        limits: Limits,
        tls: Option<TlsConfig>,
        addr: &ListenAddr,
        registry: impl AsyncFnOnce(watch::Receiver<bool>) -> (Arc<Registry>, Site),
    ) -> Self {
        let (gate, closed) = watch::channel(false);
        let (stop, stopping) = watch::channel(false);
        let (registry, site) = runtime.block_on(registry(closed));
        let tls = tls.map(|files| Arc::new(runtime.block_on(Tls::load(files)).unwrap()));
        let server = Server::with_tls(Arc::clone(&registry), limits, tls);
        let listener = runtime.block_on(Listener::bind(addr)).unwrap();
        let addr = listener.local_addr().clone();
        let task = runtime.spawn(async move { server.serve(listener, stopping).await });
        Self { runtime: Some(runtime), task: Some(task), stop, gate, registry, addr, site }
    }

    pub fn host_port(&self) -> String {
        self.addr.to_string()
    }

    pub fn uri(&self, export: &str) -> String {
        match &self.addr {
            ListenAddr::Tcp(addr) => format!("nbd://{addr}/{export}"),
            ListenAddr::Unix(path) => format!("nbd+unix:///{export}?socket={}", path.display()),
        }
    }

    /// Tells it to stop, without waiting.
    pub fn tell_to_stop(&self) {
        self.stop.send(true).unwrap();
    }

    /// Unloads an export.
    pub fn unload(&self, name: &str) {
        self.runtime.as_ref().unwrap().block_on(self.registry.unload(&id(name))).unwrap();
    }

    /// Waits until it has stopped.
    pub fn wait(mut self) {
        let (runtime, task) = (self.runtime.take().unwrap(), self.task.take().unwrap());
        runtime.block_on(task).unwrap();
        runtime.shutdown_background();
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A chunk of a structured reply.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Chunk {
    pub done: bool,
    pub kind: u16,
    pub payload: Vec<u8>,
}

/// A reply, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Answer {
    pub cookie: u64,
    pub errno: u32,
    /// What a READ brought.
    pub data: Vec<u8>,
    /// `None`: a simple reply.
    pub chunks: Option<Vec<Chunk>>,
}

/// A client that says exactly what it is told.
pub struct Raw<S = TcpStream> {
    pub stream: S,
    pub mode: Mode,
}

/// What a busy client has in flight.
pub const DEPTH: u64 = 32;
/// How long each of its requests is, in bytes.
pub const LEN: usize = 4096;

/// Requests as many as the depth, in the first 61 blocks of an export, and how long the replies to them are; simple replies, so
/// that they can be counted.
pub fn batch(client: &Raw, kind: u16) -> (Vec<u8>, usize) {
    let mut requests = Vec::new();
    for cookie in 0..DEPTH {
        requests.extend(client.encode(0, kind, cookie, (cookie * 7 % 61) * LEN as u64, LEN as u64));
        if kind == wire::cmd::WRITE {
            requests.extend([7; LEN]);
        }
    }
    let reply = if kind == wire::cmd::READ { 16 + LEN } else { 16 };
    (requests, reply * usize::try_from(DEPTH).unwrap())
}

pub fn frame(option: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    [&wire::OPTION_MAGIC.to_be_bytes(), &option.to_be_bytes()[..], &len.to_be_bytes(), data].concat()
}

pub fn text(bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat()
}

pub fn go_data(name: &str) -> Vec<u8> {
    [&text(name.as_bytes())[..], &[0, 0]].concat()
}

pub fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = text(name.as_bytes());
    data.extend_from_slice(&u32::try_from(queries.len()).unwrap().to_be_bytes());
    queries.iter().for_each(|query| data.extend_from_slice(&text(query.as_bytes())));
    data
}

impl Raw {
    /// Connects and takes the greeting.
    pub fn connect(served: &Served) -> Self {
        Self::connect_to(&served.host_port())
    }

    /// The same, to a server that runs elsewhere.
    pub fn connect_to(host_port: &str) -> Self {
        let stream = TcpStream::connect(host_port).unwrap();
        stream.set_nodelay(true).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let mut raw = Self { stream, mode: Mode::Simple };
        assert_eq!(raw.take(18), b"NBDMAGICIHAVEOPT\x00\x03");
        raw.send(&3u32.to_be_bytes());
        raw
    }

    /// Connects and attaches an export, with both metadata contexts where the mode has them.
    pub fn attach(served: &Served, export: &str, mode: Mode) -> Self {
        let mut raw = Self::connect(served);
        raw.negotiate(export, mode);
        raw
    }
}

impl<S: Read + Write> Raw<S> {
    /// Attaches an export, with both metadata contexts where the mode has them.
    pub fn negotiate(&mut self, export: &str, mode: Mode) {
        let switch = match mode {
            Mode::Simple => None,
            Mode::Structured => Some(opt::STRUCTURED_REPLY),
            Mode::Extended => Some(opt::EXTENDED_HEADERS),
        };
        if let Some(option) = switch {
            assert_eq!(self.option(option, &[]).last().unwrap().0, rep::ACK);
            let queries = meta_data(export, &["base:allocation", "nbd-server:residency"]);
            assert_eq!(self.option(opt::SET_META_CONTEXT, &queries).len(), 3);
        }
        self.go(export);
        self.mode = mode;
    }

    pub fn go(&mut self, export: &str) {
        let replies = self.option(opt::GO, &go_data(export));
        assert_eq!(replies.last().unwrap().0, rep::ACK, "GO: {replies:?}");
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
    }

    pub fn take(&mut self, len: usize) -> Vec<u8> {
        self.try_take(len).unwrap()
    }

    pub fn try_take(&mut self, len: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.stream.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Sends an option and takes its replies up to the last: (type, data).
    pub fn option(&mut self, option: u32, data: &[u8]) -> Vec<(u32, Vec<u8>)> {
        self.send(&frame(option, data));
        self.option_replies(option)
    }

    pub fn option_replies(&mut self, option: u32) -> Vec<(u32, Vec<u8>)> {
        let mut replies = Vec::new();
        loop {
            let header = self.take(20);
            let mut reader = wire::Reader(&header);
            assert_eq!(reader.u64(), Some(wire::OPTION_REPLY_MAGIC));
            assert_eq!(reader.u32(), Some(option));
            let (kind, len) = (reader.u32().unwrap(), reader.u32().unwrap());
            let data = self.take(usize::try_from(len).unwrap());
            replies.push((kind, data));
            if kind == rep::ACK || kind >= 1 << 31 {
                return replies;
            }
        }
    }

    pub fn encode(&self, flags: u16, kind: u16, cookie: u64, offset: u64, len: u64) -> Vec<u8> {
        let extended = self.mode == Mode::Extended;
        let magic = if extended { wire::EXTENDED_REQUEST_MAGIC } else { wire::REQUEST_MAGIC };
        let mut out = magic.to_be_bytes().to_vec();
        out.extend_from_slice(&flags.to_be_bytes());
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&cookie.to_be_bytes());
        out.extend_from_slice(&offset.to_be_bytes());
        if extended {
            out.extend_from_slice(&len.to_be_bytes());
        } else {
            out.extend_from_slice(&u32::try_from(len).unwrap().to_be_bytes());
        }
        out
    }

    /// Sends a request and takes its reply.
    pub fn call(&mut self, flags: u16, kind: u16, offset: u64, len: u64, payload: &[u8]) -> Answer {
        let request = [&self.encode(flags, kind, 0x1122_3344_5566_7788, offset, len), payload].concat();
        self.send(&request);
        let read = if kind == wire::cmd::READ { usize::try_from(len).unwrap_or(0) } else { 0 };
        let answer = self.answer(offset, read);
        assert_eq!(answer.cookie, 0x1122_3344_5566_7788);
        answer
    }

    pub fn write(&mut self, offset: u64, data: &[u8]) -> Answer {
        let flags = if self.mode == Mode::Extended { wire::cflag::PAYLOAD_LEN } else { 0 };
        self.call(flags, wire::cmd::WRITE, offset, data.len() as u64, data)
    }

    pub fn read(&mut self, offset: u64, len: u64) -> Vec<u8> {
        let answer = self.call(0, wire::cmd::READ, offset, len, &[]);
        assert_eq!(answer.errno, 0);
        answer.data
    }

    /// Takes a reply; `read`: the bytes a READ asked for. Checks every rule about the form of chunks.
    pub fn answer(&mut self, offset: u64, read: usize) -> Answer {
        self.try_answer(offset, read).unwrap()
    }

    pub fn try_answer(&mut self, offset: u64, read: usize) -> io::Result<Answer> {
        let magic = u32::from_be_bytes(self.try_take(4)?.try_into().unwrap());
        if magic == wire::SIMPLE_REPLY_MAGIC {
            assert_ne!(self.mode, Mode::Extended, "with extended headers nothing gets a simple reply");
            let rest = self.try_take(12)?;
            let mut reader = wire::Reader(&rest);
            let (errno, cookie) = (reader.u32().unwrap(), reader.u64().unwrap());
            let data = if errno == 0 { self.try_take(read)? } else { Vec::new() };
            return Ok(Answer { cookie, errno, data, chunks: None });
        }
        assert_ne!(self.mode, Mode::Simple, "no chunks unless negotiated");
        self.chunks(magic, offset, read)
    }

    fn chunks(&mut self, mut magic: u32, offset: u64, read: usize) -> io::Result<Answer> {
        let extended = self.mode == Mode::Extended;
        let mut answer = Answer { cookie: 0, errno: 0, data: vec![0; read], chunks: None };
        let mut chunks: Vec<Chunk> = Vec::new();
        let mut covered = vec![false; read];
        loop {
            assert_eq!(magic, if extended { wire::EXTENDED_CHUNK_MAGIC } else { wire::CHUNK_MAGIC });
            let head = self.try_take(if extended { 28 } else { 16 })?;
            let mut reader = wire::Reader(&head);
            let (flags, kind) = (reader.u16().unwrap(), reader.u16().unwrap());
            let cookie = reader.u64().unwrap();
            assert!(chunks.is_empty() || cookie == answer.cookie);
            answer.cookie = cookie;
            let len = if extended {
                assert_eq!(reader.u64(), Some(offset), "the offset MUST be the request's");
                reader.u64().unwrap()
            } else {
                u64::from(reader.u32().unwrap())
            };
            assert_eq!(flags & !1, 0);
            let payload = self.try_take(usize::try_from(len).unwrap())?;
            let mut body = wire::Reader(&payload);
            match kind {
                wire::chunk::NONE => assert!(payload.is_empty() && flags == 1),
                wire::chunk::OFFSET_DATA | wire::chunk::OFFSET_HOLE => {
                    let at = usize::try_from(body.u64().unwrap() - offset).unwrap();
                    let bytes = if kind == wire::chunk::OFFSET_HOLE {
                        vec![0; usize::try_from(body.u32().unwrap()).unwrap()]
                    } else {
                        body.0.to_vec()
                    };
                    assert!(!bytes.is_empty());
                    let part = &mut covered[at..at + bytes.len()];
                    assert!(part.iter().all(|seen| !seen), "no overlap");
                    part.fill(true);
                    answer.data[at..at + bytes.len()].copy_from_slice(&bytes);
                }
                wire::chunk::ERROR => {
                    answer.errno = body.u32().unwrap();
                    assert_ne!(answer.errno, 0);
                    assert_eq!(usize::from(body.u16().unwrap()), body.0.len());
                    assert!(!body.0.is_empty() && std::str::from_utf8(body.0).is_ok());
                }
                wire::chunk::BLOCK_STATUS => assert!(!extended),
                wire::chunk::BLOCK_STATUS_EXT => assert!(extended),
                other => panic!("chunk type {other}"),
            }
            chunks.push(Chunk { done: flags == 1, kind, payload });
            if flags == 1 {
                break;
            }
            magic = u32::from_be_bytes(self.try_take(4)?.try_into().unwrap());
        }
        assert!(answer.errno != 0 || covered.iter().all(|seen| *seen), "every byte is covered");
        answer.chunks = Some(chunks);
        Ok(answer)
    }

    /// Whether the server has closed, or closes within the read timeout; what it sent before is thrown away.
    pub fn is_closed(&mut self) -> bool {
        let mut rest = [0; 4096];
        loop {
            match self.stream.read(&mut rest) {
                Ok(0) => return true,
                Ok(_) => {}
                Err(error) => return error.kind() == io::ErrorKind::ConnectionReset,
            }
        }
    }
}

/// A path in a directory that goes with the returned guard.
pub fn scratch(name: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(name);
    (dir, path)
}
