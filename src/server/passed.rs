//! Sockets that whoever started the program opened for it: `LISTEN_FDS` and `LISTEN_PID`, as systemd sets them.
//!
//! Promises: what is passed to another process, as the variables say, is left alone; a descriptor that no client could
//! come in by is an error, not a server that nobody reaches.

use std::os::fd::AsFd;

use listenfd::ListenFd;
use rustix::net::sockopt::socket_acceptconn;

use crate::nbd::PassedSocket;

/// The first descriptor passed; those before it are stdin, stdout and stderr.
const FIRST: usize = 3;
/// As many sockets are taken at most.
const MAX_PASSED: usize = 256;

/// Why the sockets passed cannot be used; each text names the variable or the descriptor.
#[derive(Debug, thiserror::Error)]
pub enum PassedError {
    /// The variable holds no usable number.
    #[error("LISTEN_FDS {0:?} is not understood: pass a number of sockets up to {MAX_PASSED}, or unset it")]
    Count(String),
    /// It is something else.
    #[error("descriptor {fd} of LISTEN_FDS {reason}: pass TCP or Unix stream sockets that listen")]
    Unfit {
        /// The descriptor.
        fd: usize,
        /// What it is.
        reason: String,
    },
}

/// Takes the sockets that were passed to this process. Call it once, before any thread is started: it unsets the
/// variables, so that no child takes the sockets for its own.
///
/// # Errors
/// [`PassedError`]
pub fn sockets() -> Result<Vec<PassedSocket>, PassedError> {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let (pid, count) = (variable("LISTEN_PID"), variable("LISTEN_FDS"));
    if count.is_empty() || pid != std::process::id().to_string() {
        return Ok(Vec::new());
    }
    // The crate below believes any number.
    if !count.parse().is_ok_and(|count: usize| count <= MAX_PASSED) {
        return Err(PassedError::Count(count));
    }
    let mut passed = ListenFd::from_env();
    (0..passed.len()).map(|index| take(&mut passed, index)).collect()
}

fn take(passed: &mut ListenFd, index: usize) -> Result<PassedSocket, PassedError> {
    let unfit = |reason: String| PassedError::Unfit { fd: FIRST + index, reason };
    let socket = match (passed.take_tcp_listener(index), passed.take_unix_listener(index)) {
        (Ok(Some(tcp)), _) => PassedSocket::Tcp(tcp),
        (_, Ok(Some(unix))) => PassedSocket::Unix(unix),
        _ => return Err(unfit("is neither".to_owned())),
    };
    let listens = match &socket {
        PassedSocket::Tcp(tcp) => socket_acceptconn(tcp.as_fd()),
        PassedSocket::Unix(unix) => socket_acceptconn(unix.as_fd()),
    };
    match listens {
        Ok(true) => Ok(socket),
        Ok(false) => Err(unfit("does not listen".to_owned())),
        Err(error) => Err(unfit(format!("cannot be asked whether it listens ({error})"))),
    }
}
