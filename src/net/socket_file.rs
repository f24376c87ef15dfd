//! The file of a Unix socket, from its creation to its removal.
//!
//! Guarantees: a socket file that a crash left behind is replaced; one that a live server answers on, and a file that is
//! not a socket, is left alone; a file is removed only if it is the one that was looked at: [`SocketFile`] keeps it open, so
//! that the system cannot give its inode to a successor's file meanwhile.
//! Must not: be used by two servers for one path at the same moment. Between the last look at a file and its removal another
//! process may still replace it; servers that share a configuration are kept apart by the lock on their cache root.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, fchmod, fstat, lstat, open, unlink};
use rustix::io::Errno;
use tokio::net::{UnixListener, UnixSocket, UnixStream};

/// The longest path of a Unix socket, in bytes: the kernel keeps 108, one of them for the final NUL.
pub const MAX_PATH_BYTES: usize = 107;

/// Why a path cannot be bound. The caller knows which flag it comes from, and says it.
#[derive(Debug)]
pub enum BindError {
    /// A server answers there.
    Live,
    /// The path names something else than a socket.
    NotASocket,
    /// The path has more than [`MAX_PATH_BYTES`].
    TooLong,
    /// The system refused.
    Io(io::Error),
}

impl From<io::Error> for BindError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<Errno> for BindError {
    fn from(error: Errno) -> Self {
        Self::Io(error.into())
    }
}

/// A socket that has its path and does not listen yet.
#[derive(Debug)]
pub struct BoundSocket {
    socket: UnixSocket,
    file: SocketFile,
}

impl BoundSocket {
    /// Binds a path, in the place of what a crash left there. The file has the `mode` from its creation on; without one the
    /// umask decides.
    ///
    /// # Errors
    /// [`BindError`].
    pub async fn bind(path: &Path, mode: Option<u32>) -> Result<Self, BindError> {
        if path.as_os_str().len() > MAX_PATH_BYTES {
            return Err(BindError::TooLong);
        }
        remove_stale(path).await?;
        let socket = UnixSocket::new_stream()?;
        if let Some(mode) = mode {
            // The kernel gives the file the mode that its socket has at bind.
            fchmod(&socket, Mode::from_raw_mode(mode))?;
        }
        socket.bind(path)?;
        let file = SocketFile(Found::open(path)?);
        Ok(Self { socket, file })
    }

    /// Lets up to `backlog` clients wait to be accepted.
    ///
    /// # Errors
    /// The system's; then the file is removed.
    pub fn listen(self, backlog: u32) -> io::Result<(UnixListener, SocketFile)> {
        Ok((self.socket.listen(backlog)?, self.file))
    }
}

/// A file that was found at a path.
#[derive(Debug)]
struct Found {
    path: PathBuf,
    file: OwnedFd,
}

impl Found {
    fn open(path: &Path) -> rustix::io::Result<Self> {
        // A socket can be opened as a path alone.
        let file = open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?;
        Ok(Self { path: path.to_owned(), file })
    }

    fn is_socket(&self) -> rustix::io::Result<bool> {
        Ok(FileType::from_raw_mode(fstat(&self.file)?.st_mode) == FileType::Socket)
    }

    /// Removes the file, unless another one has taken its place.
    fn remove(&self) -> rustix::io::Result<()> {
        let this = fstat(&self.file)?;
        match lstat(&self.path) {
            Ok(there) if (there.st_dev, there.st_ino) == (this.st_dev, this.st_ino) => unlink(&self.path),
            Ok(_) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// The file of a bound socket, which is removed on drop, if it is still the one at its path.
///
/// Drop the listener first: a path must not vanish while it is still served.
#[derive(Debug)]
pub struct SocketFile(Found);

impl SocketFile {
    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0.path
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if let Err(e) = self.0.remove() {
            tracing::warn!("the socket {} could not be removed: {e}", self.path().display());
        }
    }
}

/// Removes a socket that no server listens on.
async fn remove_stale(path: &Path) -> Result<(), BindError> {
    let found = match Found::open(path) {
        Ok(found) => found,
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    if !found.is_socket()? {
        return Err(BindError::NotASocket);
    }
    match UnixStream::connect(path).await {
        Err(e) if e.kind() == io::ErrorKind::ConnectionRefused => Ok(found.remove()?),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        // A full backlog is a server, too.
        Ok(_) => Err(BindError::Live),
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Err(BindError::Live),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::net::UnixListener as StdListener;

    use super::*;

    async fn listen(path: &Path) -> Result<(UnixListener, SocketFile), BindError> {
        Ok(BoundSocket::bind(path, None).await?.listen(8)?)
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        drop(StdListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves the file behind as a crash does");
        let (listener, file) = listen(&path).await.unwrap();
        assert!(matches!(listen(&path).await, Err(BindError::Live)));
        assert!(UnixStream::connect(&path).await.is_ok(), "the refused one did no harm");
        drop(listener);
        assert!(path.exists());
        drop(file);
        assert!(!path.exists(), "its own file goes with it");
    }

    #[tokio::test]
    async fn a_file_that_is_not_a_socket_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notes.txt");
        fs::write(&path, "mine").unwrap();
        assert!(matches!(listen(&path).await, Err(BindError::NotASocket)));
        assert_eq!(fs::read_to_string(&path).unwrap(), "mine");
        // Not even if it is a link to a stale socket.
        let (link, stale) = (dir.path().join("link"), dir.path().join("stale"));
        drop(StdListener::bind(&stale).unwrap());
        std::os::unix::fs::symlink(&stale, &link).unwrap();
        assert!(matches!(listen(&link).await, Err(BindError::NotASocket)));
        assert!(link.exists());
    }

    #[tokio::test]
    async fn the_longest_path_binds_and_one_byte_more_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let fill = MAX_PATH_BYTES - dir.path().as_os_str().len() - 1;
        listen(&dir.path().join("s".repeat(fill))).await.unwrap();
        assert!(matches!(listen(&dir.path().join("s".repeat(fill + 1))).await, Err(BindError::TooLong)));
    }

    #[tokio::test]
    async fn a_successor_s_socket_outlives_its_predecessor() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.sock");
        let (listener, file) = listen(&path).await.unwrap();
        drop(listener);
        // File systems hand out the number of an inode again at once.
        for _ in 0..8 {
            let (_successor, successors) = listen(&path).await.unwrap();
            std::mem::forget(successors);
        }
        drop(file);
        assert!(path.exists());
    }
}
