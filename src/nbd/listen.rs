//! Where clients come in: TCP and Unix sockets, bound here or passed in by whoever started the program.
//!
//! Promises: what [`net`](crate::net) promises of a socket's file; the file of a socket that was passed in is not ours.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use rustix::net::sockopt;
use tokio::net::{TcpListener, TcpSocket, TcpStream, UnixListener};

use crate::net::{BindError, BoundSocket, MAX_PATH_BYTES, SocketFile};

/// The port that NBD has been assigned.
pub const DEFAULT_PORT: u16 = 10809;

/// How many clients may wait to be accepted; the kernel's own bound (`net.core.somaxconn`) may be lower. One more has to
/// try again after a second, so there is room for a whole fleet that reconnects at once.
const BACKLOG: u32 = 4096;
/// How long a TCP client may say nothing before its host is asked whether it is there.
const SILENCE: Duration = Duration::from_secs(60);
/// How long each question waits for an answer.
const PROBE_INTERVAL: Duration = Duration::from_secs(10);
/// After so many questions without an answer the connection is over.
const PROBES: u32 = 6;

/// Why a listener could not be had; each text names the address and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The text is no address.
    #[error("listen address {0:?} is not understood: write HOST:PORT, as in 127.0.0.1:{DEFAULT_PORT}, or unix:PATH")]
    Address(String),
    /// Somebody listens there already.
    #[error("--listen {0} is in use by another process: end it, or choose another address")]
    Taken(ListenAddr),
    /// A file that is no socket is in the way.
    #[error("{0:?} exists and is not a socket: remove it, or choose another path with --listen")]
    NotASocket(PathBuf),
    /// The kernel cannot address it.
    #[error(
        "--listen unix:{path} has {bytes} bytes, more than the {MAX_PATH_BYTES} of a Unix socket: choose a shorter path",
        path = .0.display(),
        bytes = .0.as_os_str().len()
    )]
    TooLong(PathBuf),
    /// The system refused.
    #[error("cannot listen on {addr}: {source}")]
    Io {
        /// Where.
        addr: ListenAddr,
        /// Why.
        source: io::Error,
    },
}

/// An address to listen on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ListenAddr {
    /// `HOST:PORT`; port 0 takes a free one.
    Tcp(String),
    /// `unix:PATH`.
    Unix(PathBuf),
}

impl FromStr for ListenAddr {
    type Err = ListenError;

    fn from_str(text: &str) -> Result<Self, ListenError> {
        let refused = || ListenError::Address(text.to_owned());
        if let Some(path) = text.strip_prefix("unix:") {
            return if path.is_empty() { Err(refused()) } else { Ok(Self::Unix(path.into())) };
        }
        match text.rsplit_once(':') {
            // An IPv6 address without brackets has no port that could be told apart.
            Some((host, port))
                if !host.is_empty() && port.parse::<u16>().is_ok() && (!host.contains(':') || host.ends_with(']')) =>
            {
                Ok(Self::Tcp(text.to_owned()))
            }
            _ => Err(refused()),
        }
    }
}

impl fmt::Display for ListenAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(addr) => f.write_str(addr),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A socket that listens already.
#[derive(Debug)]
#[allow(missing_docs, reason = "the names say it")]
pub enum PassedSocket {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener),
}

/// A bound socket.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    addr: ListenAddr,
}

#[derive(Debug)]
enum Socket {
    Tcp(TcpListener),
    /// No file: it was passed in, and its file is for whoever made it.
    Unix {
        listener: UnixListener,
        _file: Option<SocketFile>,
    },
}

/// A client, just connected.
#[derive(Debug)]
pub(super) struct Client {
    /// Who it is, for the log.
    pub(super) peer: String,
    pub(super) socket: OwnedFd,
}

/// Binds the first address of a name that can be had.
async fn bind_tcp(host_port: &str) -> io::Result<TcpListener> {
    let mut refused = io::Error::new(io::ErrorKind::AddrNotAvailable, "the name has no address");
    for addr in tokio::net::lookup_host(host_port).await? {
        let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
        // A port that the last server's connections still hold in TIME_WAIT is free.
        socket.set_reuseaddr(true)?;
        match socket.bind(addr).and_then(|()| socket.listen(BACKLOG)) {
            Ok(listener) => return Ok(listener),
            Err(e) => refused = e,
        }
    }
    Err(refused)
}

impl Listener {
    /// Binds the address.
    ///
    /// # Errors
    /// [`ListenError`], naming the address.
    pub async fn bind(addr: &ListenAddr) -> Result<Self, ListenError> {
        match addr {
            ListenAddr::Tcp(host_port) => {
                let listener = bind_tcp(host_port).await.map_err(|source| bind_error(addr, source))?;
                // Port 0 has become a real one.
                let bound = listener.local_addr().map_err(|source| bind_error(addr, source))?;
                Ok(Self { socket: Socket::Tcp(listener), addr: ListenAddr::Tcp(bound.to_string()) })
            }
            ListenAddr::Unix(path) => {
                let refused = |error| socket_error(addr, path, error);
                let bound = BoundSocket::bind(path, None).await.map_err(refused)?;
                let (listener, file) = bound.listen(BACKLOG).map_err(|source| bind_error(addr, source))?;
                Ok(Self { socket: Socket::Unix { listener, _file: Some(file) }, addr: addr.clone() })
            }
        }
    }

    /// Takes over a socket that was passed in.
    ///
    /// # Errors
    /// The system's.
    pub fn adopt(passed: PassedSocket) -> io::Result<Self> {
        match passed {
            PassedSocket::Tcp(listener) => {
                listener.set_nonblocking(true)?;
                let listener = TcpListener::from_std(listener)?;
                let addr = ListenAddr::Tcp(listener.local_addr()?.to_string());
                Ok(Self { socket: Socket::Tcp(listener), addr })
            }
            PassedSocket::Unix(listener) => {
                listener.set_nonblocking(true)?;
                let listener = UnixListener::from_std(listener)?;
                let addr = listener.local_addr()?;
                // A socket without a file (an abstract one) has no path to show.
                let path = addr.as_pathname().unwrap_or_else(|| Path::new("(unnamed)")).to_owned();
                Ok(Self { socket: Socket::Unix { listener, _file: None }, addr: ListenAddr::Unix(path) })
            }
        }
    }

    /// Where it listens; with the port it got.
    #[must_use]
    pub fn local_addr(&self) -> &ListenAddr {
        &self.addr
    }

    pub(super) async fn accept(&self) -> io::Result<Client> {
        match &self.socket {
            Socket::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                // "SHOULD set TCP_NODELAY." A socket that died already says so at its first use.
                let _ = stream.set_nodelay(true);
                let _ = notice_silence(&stream);
                Ok(Client { peer: peer.to_string(), socket: stream.into_std()?.into() })
            }
            Socket::Unix { listener, .. } => {
                let (stream, _) = listener.accept().await?;
                Ok(Client { peer: "unix".to_owned(), socket: stream.into_std()?.into() })
            }
        }
    }
}

/// Lets the system ask a client that says nothing whether it is there: one whose host lost power says no farewell.
fn notice_silence(stream: &TcpStream) -> rustix::io::Result<()> {
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, SILENCE)?;
    sockopt::set_tcp_keepintvl(stream, PROBE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, PROBES)
}

fn socket_error(addr: &ListenAddr, path: &Path, error: BindError) -> ListenError {
    match error {
        BindError::Live => ListenError::Taken(addr.clone()),
        BindError::NotASocket => ListenError::NotASocket(path.to_owned()),
        BindError::TooLong => ListenError::TooLong(path.to_owned()),
        BindError::Io(source) => bind_error(addr, source),
    }
}

fn bind_error(addr: &ListenAddr, source: io::Error) -> ListenError {
    match source.kind() {
        io::ErrorKind::AddrInUse => ListenError::Taken(addr.clone()),
        _ => ListenError::Io { addr: addr.clone(), source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_understood_or_refused_by_name() {
        for good in ["127.0.0.1:0", "localhost:10809", "[::1]:10809", "unix:/run/x.sock", "unix:x"] {
            assert_eq!(good.parse::<ListenAddr>().unwrap().to_string(), good);
        }
        for bad in ["", "10809", ":10809", "host", "host:", "host:99999", "::1", "::1:80", "unix:"] {
            let error = bad.parse::<ListenAddr>().unwrap_err().to_string();
            assert!(error.contains(&format!("{bad:?}")), "{error}");
        }
    }

    #[tokio::test]
    async fn a_taken_port_is_named_in_the_error() {
        let first = Listener::bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
        let error = Listener::bind(first.local_addr()).await.unwrap_err();
        assert!(matches!(&error, ListenError::Taken(_)));
        assert!(error.to_string().contains(&first.local_addr().to_string()));
    }

    #[tokio::test]
    async fn a_client_whose_host_is_gone_is_given_up_after_two_minutes() {
        let listener = Listener::bind(&"127.0.0.1:0".parse().unwrap()).await.unwrap();
        let _peer = TcpStream::connect(listener.local_addr().to_string()).await.unwrap();
        let socket = listener.accept().await.unwrap().socket;
        assert!(sockopt::socket_keepalive(&socket).unwrap());
        let (idle, interval) = (sockopt::tcp_keepidle(&socket).unwrap(), sockopt::tcp_keepintvl(&socket).unwrap());
        assert_eq!(idle + interval * sockopt::tcp_keepcnt(&socket).unwrap(), Duration::from_secs(120));
    }

    #[tokio::test]
    async fn a_unix_socket_s_file_is_replaced_when_stale_and_never_when_a_successor_s() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd.sock");
        let addr = ListenAddr::Unix(path.clone());
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let live = Listener::bind(&addr).await.unwrap();
        assert!(matches!(Listener::bind(&addr).await, Err(ListenError::Taken(_))));
        std::fs::remove_file(&path).unwrap();
        let successor = Listener::bind(&addr).await.unwrap();
        drop(live);
        assert!(path.exists());
        drop(successor);
        assert!(!path.exists());
        std::fs::write(&path, "precious").unwrap();
        assert!(matches!(Listener::bind(&addr).await, Err(ListenError::NotASocket(_))));
        let long = Listener::bind(&ListenAddr::Unix("/s".repeat(60).into())).await.unwrap_err().to_string();
        assert!(long.contains("120 bytes"), "{long}");
    }
}
