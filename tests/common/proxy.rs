//! A TCP proxy of the test's own in front of an S3 endpoint: it can be cut, frozen and healed, by hand or in the middle
//! of an upload, it can lose the conditions of requests, and answer some of them itself.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

/// How long a test waits for the proxy to get into a state.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long the accepting thread sleeps when there is nobody to accept.
const PAUSE: Duration = Duration::from_millis(5);

/// What becomes of traffic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It passes.
    Open,
    /// Connections are reset, new ones refused.
    Cut,
    /// Nothing passes and nobody is told: connections come about, and are silent.
    Frozen,
}

#[derive(Debug)]
struct Inner {
    state: State,
    /// The state to enter once so many more bytes have passed, of requests and answers.
    fuse: Option<(usize, State)>,
    /// Both ends of every connection, to be reset.
    streams: Vec<TcpStream>,
    ended: bool,
}

#[derive(Debug)]
struct Shared {
    inner: Mutex<Inner>,
    changed: Condvar,
}

/// What to answer to a request with that head, in the store's place.
type Answer = Arc<dyn Fn(&str) -> Option<String> + Send + Sync>;

/// What becomes of requests, while they may pass.
#[derive(Clone)]
enum Requests {
    Passed,
    WithoutConditions,
    Answered(Answer),
}

/// The proxy; it ends with its value.
#[derive(Debug)]
pub struct Proxy {
    address: SocketAddr,
    shared: Arc<Shared>,
}

impl Proxy {
    /// In front of `upstream`, a URL such as `http://127.0.0.1:9000`; everything passes.
    pub fn start(upstream: &str) -> Self {
        Self::with(upstream, Requests::Passed)
    }

    /// The same, but `If-Match` and `If-None-Match` never arrive.
    pub fn losing_conditions(upstream: &str) -> Self {
        Self::with(upstream, Requests::WithoutConditions)
    }

    /// The same, but the requests for whose head there is an answer do not arrive.
    pub fn answering(upstream: &str, answer: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> Self {
        Self::with(upstream, Requests::Answered(Arc::new(answer)))
    }

    fn with(upstream: &str, requests: Requests) -> Self {
        let upstream: SocketAddr = upstream.trim_start_matches("http://").parse().unwrap();
        // An address that nobody else uses: while the proxy is cut its port is free, and must not become another's.
        let [.., a, b] = std::process::id().to_be_bytes();
        static PROXIES: AtomicU8 = AtomicU8::new(1);
        let of_this_process = PROXIES.fetch_add(1, Ordering::Relaxed);
        let listener = TcpListener::bind((Ipv4Addr::new(127, of_this_process, a, b), 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let inner = Inner { state: State::Open, fuse: None, streams: Vec::new(), ended: false };
        let shared = Arc::new(Shared { inner: Mutex::new(inner), changed: Condvar::new() });
        let accepting = Arc::clone(&shared);
        spawn(move || accepting.accept(listener, upstream, &requests));
        Self { address, shared }
    }

    /// The URL to give as `--endpoint-url`.
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// From now on.
    pub fn set(&self, state: State) {
        self.shared.enter(&mut self.shared.inner.lock().unwrap(), state);
        if state != State::Frozen {
            // Not before it is so: who connects next must find it.
            let deadline = Instant::now() + PATIENCE;
            while TcpStream::connect(self.address).is_ok() != (state == State::Open) {
                assert!(Instant::now() < deadline, "the proxy does not become {state:?}");
                std::thread::sleep(PAUSE);
            }
        }
    }

    /// As soon as `bytes` more bytes have passed, of requests and answers.
    pub fn set_after(&self, bytes: usize, state: State) {
        self.shared.inner.lock().unwrap().fuse = Some((bytes, state));
    }

    /// Waits until the proxy is in that state.
    pub fn wait_for(&self, state: State) {
        let inner = self.shared.inner.lock().unwrap();
        let waited = self.shared.changed.wait_timeout_while(inner, PATIENCE, |inner| inner.state != state).unwrap();
        let now = waited.0.state;
        drop(waited);
        assert_eq!(now, state, "after {PATIENCE:?}");
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let mut inner = self.shared.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        inner.ended = true;
        self.shared.enter(&mut inner, State::Cut);
    }
}

impl Shared {
    fn enter(&self, inner: &mut Inner, state: State) {
        inner.state = state;
        inner.fuse = None;
        if state == State::Cut {
            for stream in inner.streams.drain(..) {
                let _ = stream.shutdown(Shutdown::Both);
            }
        }
        self.changed.notify_all();
    }

    fn accept(self: Arc<Self>, listener: TcpListener, upstream: SocketAddr, requests: &Requests) {
        let address = listener.local_addr().unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut listening = Some(listener);
        loop {
            let (state, ended) = {
                let inner = self.inner.lock().unwrap();
                (inner.state, inner.ended)
            };
            match (state, &listening) {
                _ if ended => return,
                (State::Cut, _) => listening = None,
                (_, None) => {
                    let again = TcpListener::bind(address).unwrap();
                    again.set_nonblocking(true).unwrap();
                    listening = Some(again);
                }
                (_, Some(listener)) => {
                    if let Ok((client, _)) = listener.accept() {
                        client.set_nonblocking(false).unwrap();
                        self.connect(client, upstream, requests.clone());
                        continue;
                    }
                }
            }
            std::thread::sleep(PAUSE);
        }
    }

    /// Two threads per connection, each of which ends with it.
    fn connect(self: &Arc<Self>, client: TcpStream, upstream: SocketAddr, requests: Requests) {
        let Ok(server) = TcpStream::connect(upstream) else { return };
        {
            let mut inner = self.inner.lock().unwrap();
            if inner.state == State::Cut {
                return;
            }
            inner.streams.extend([&client, &server].map(|stream| stream.try_clone().unwrap()));
        }
        let (from, to) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        let shared = Arc::clone(self);
        spawn(move || {
            let _ = match requests {
                Requests::Passed => shared.copy(&from, &to),
                requests => shared.requests(&from, &to, &requests),
            };
            let _ = to.shutdown(Shutdown::Write);
        });
        let shared = Arc::clone(self);
        spawn(move || {
            let _ = shared.copy(&server, &client);
            let _ = client.shutdown(Shutdown::Both);
        });
    }

    fn copy(&self, mut from: impl Read, mut to: impl Write) -> io::Result<()> {
        let mut buf = [0; 16 << 10];
        loop {
            let len = from.read(&mut buf)?;
            if len == 0 {
                return Ok(());
            }
            self.pass(len)?;
            to.write_all(&buf[..len])?;
        }
    }

    /// Waits until bytes may pass; an error if none may any more.
    fn pass(&self, bytes: usize) -> io::Result<()> {
        let mut inner = self.inner.lock().unwrap();
        match inner.fuse.take() {
            Some((left, state)) if left <= bytes => self.enter(&mut inner, state),
            Some((left, state)) => inner.fuse = Some((left - bytes, state)),
            None => {}
        }
        let inner = self.changed.wait_while(inner, |inner| inner.state == State::Frozen).unwrap();
        if inner.state == State::Cut { Err(io::ErrorKind::ConnectionReset.into()) } else { Ok(()) }
    }

    /// Request by request: its conditions under names that mean nothing, or answered here.
    fn requests(&self, client: &TcpStream, mut to: &TcpStream, requests: &Requests) -> io::Result<()> {
        let mut from = BufReader::new(client);
        loop {
            let (mut head, mut body) = (String::new(), 0);
            loop {
                let mut line = String::new();
                if from.read_line(&mut line)? == 0 {
                    return Ok(());
                }
                let lower = line.to_ascii_lowercase();
                if let Some(len) = lower.strip_prefix("content-length:") {
                    body = len.trim().parse().unwrap();
                }
                let conditional = lower.starts_with("if-match:") || lower.starts_with("if-none-match:");
                if conditional && matches!(requests, Requests::WithoutConditions) {
                    line.insert_str(0, "x-lost-");
                }
                head.push_str(&line);
                if line == "\r\n" {
                    break;
                }
            }
            self.pass(head.len())?;
            if let Requests::Answered(answer) = requests
                && let Some(answer) = answer(&head)
            {
                io::copy(&mut (&mut from).take(body), &mut io::sink())?;
                let mut back = client;
                back.write_all(answer.as_bytes())?;
                continue;
            }
            to.write_all(head.as_bytes())?;
            self.copy((&mut from).take(body), to)?;
        }
    }
}

fn spawn(work: impl FnOnce() + Send + 'static) {
    std::thread::Builder::new().spawn(work).unwrap();
}
