//! The admin socket's place in the file system.
//!
//! Whoever can connect rules every export, so the socket is for its owner, and for a group only if one is named; it is
//! never open to others, not even for the moment between its creation and a `chmod`. A stale socket of a crashed server is replaced; one that somebody serves, and anything that
//! is no socket, is left alone. The file is removed on drop, if it is still ours.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown};
use std::path::{Path, PathBuf};

use tokio::net::UnixListener;

use crate::net::{self, BoundSocket, MAX_PATH_BYTES, SocketFile};

/// How many clients may wait to be accepted.
const BACKLOG: u32 = 128;
/// For the owner alone.
const SOCKET_MODE: u32 = 0o600;
/// For the owner and the group that was named.
const GROUP_SOCKET_MODE: u32 = 0o660;
/// A folder that the group may pass through.
const GROUP_FOLDER_MODE: u32 = 0o750;

/// Why there is no admin socket. Each text names the path and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// Another server serves it.
    #[error("--admin-sock {path} is served by a running server: stop that one, or choose another path", path = .0.display())]
    Live(PathBuf),
    /// The path names something else.
    #[error("--admin-sock {path} exists and is no socket: remove it, or choose another path", path = .0.display())]
    NoSocket(PathBuf),
    /// The kernel cannot address it.
    #[error(
        "--admin-sock {path} has {bytes} bytes, more than the {MAX_PATH_BYTES} a Unix socket's path may have: choose a shorter one",
        path = .0.display(),
        bytes = .0.as_os_str().len()
    )]
    TooLong(PathBuf),
    /// There is no such group.
    #[error("--admin-group {0} is no group of this system: name one that getent group lists, or give its number")]
    UnknownGroup(String),
    /// The socket or its folder cannot be given to the group.
    #[error("--admin-group {group} cannot be given {path} ({source}): run as root, or as a member of the group", path = .path.display())]
    Group {
        /// The socket or its folder.
        path: PathBuf,
        /// The group.
        group: String,
        /// What the system said.
        source: io::Error,
    },
    /// The folder or the socket cannot be made.
    #[error("--admin-sock {path} cannot be created ({source}): choose a path in a folder this user may write", path = .path.display())]
    Io {
        /// The socket's path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
}

/// A group whose members may use the admin socket as its owner may.
#[derive(Debug, Clone)]
pub struct Group {
    name: String,
    gid: u32,
}

impl Group {
    /// Looks a group up by its name, or its number.
    ///
    /// # Errors
    /// [`BindError::UnknownGroup`].
    pub fn find(name: &str) -> Result<Self, BindError> {
        let gid = match name.parse() {
            Ok(gid) => Some(gid),
            Err(_) => nix::unistd::Group::from_name(name).ok().flatten().map(|group| group.gid.as_raw()),
        };
        let gid = gid.ok_or_else(|| BindError::UnknownGroup(name.to_owned()))?;
        Ok(Self { name: name.to_owned(), gid })
    }

    /// Lets the group pass through a folder that was made for the socket.
    ///
    /// # Errors
    /// [`BindError::Group`].
    pub fn let_through(&self, folder: &Path) -> Result<(), BindError> {
        self.give(folder, GROUP_FOLDER_MODE)
    }

    fn give(&self, path: &Path, mode: u32) -> Result<(), BindError> {
        let given = lchown(path, None, Some(self.gid));
        let given = given.and_then(|()| fs::set_permissions(path, fs::Permissions::from_mode(mode)));
        given.map_err(|source| BindError::Group { path: path.to_owned(), group: self.name.clone(), source })
    }

    /// A group that cannot get to the socket has no use of it; most likely somebody forgot the folder.
    fn warn_if_kept_out(&self, socket: &Path) {
        let Some(Ok(folder)) = socket.parent().map(fs::metadata) else { return };
        let way = if folder.gid() == self.gid { 0o010 } else { 0o001 };
        if folder.mode() & way == 0 {
            let folder = socket.parent().unwrap_or(socket).display();
            tracing::warn!("--admin-group {} cannot pass through {folder}: chgrp and chmod g+x it", self.name);
        }
    }
}

/// A bound admin socket.
#[derive(Debug)]
pub struct Socket {
    pub(super) listener: UnixListener,
    // Behind the listener: fields drop in order, and a path must not vanish while it is still being served.
    file: SocketFile,
}

impl Socket {
    /// Listens at `path`, whose folder must exist; for its owner, and a group if there is one.
    ///
    /// # Errors
    /// [`BindError`]; nothing is left behind then.
    pub async fn bind(path: &Path, group: Option<&Group>) -> Result<Self, BindError> {
        let io = |source| BindError::Io { path: path.to_owned(), source };
        let bound = BoundSocket::bind(path, Some(SOCKET_MODE)).await.map_err(|error| match error {
            net::BindError::Live => BindError::Live(path.to_owned()),
            net::BindError::NotASocket => BindError::NoSocket(path.to_owned()),
            net::BindError::TooLong => BindError::TooLong(path.to_owned()),
            net::BindError::Io(source) => io(source),
        })?;
        if let Some(group) = group {
            group.give(path, GROUP_SOCKET_MODE)?;
            group.warn_if_kept_out(path);
        }
        let (listener, file) = bound.listen(BACKLOG).map_err(io)?;
        Ok(Self { listener, file })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.file.path()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[tokio::test]
    async fn the_socket_is_for_the_owner_alone_and_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        let socket = Socket::bind(&path, None).await.unwrap();
        assert_eq!(mode(&path), 0o600);
        drop(socket);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn a_refused_path_is_named_with_its_flag() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("admin.sock");
        let _first = Socket::bind(&path, None).await.unwrap();
        let refused = Socket::bind(&path, None).await.unwrap_err();
        assert!(matches!(refused, BindError::Live(_)), "{refused}");
        assert!(refused.to_string().contains(path.to_str().unwrap()));
        let refused = Socket::bind(&dir.path().join("s".repeat(MAX_PATH_BYTES)), None).await.unwrap_err();
        assert!(matches!(refused, BindError::TooLong(_)), "{refused}");
        let notes = dir.path().join("notes.txt");
        fs::write(&notes, "mine").unwrap();
        assert!(matches!(Socket::bind(&notes, None).await, Err(BindError::NoSocket(_))));
    }
}
