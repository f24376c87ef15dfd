//! Where things go when nobody says: the system's folders for root, the user's own otherwise.

use std::path::{Path, PathBuf};

use super::ConfigError;
use crate::nbd::{DEFAULT_PORT, ListenAddr};

const NAME: &str = "nbd-server";
const SOCKET: &str = "nbd-server.sock";

/// What the defaults depend on.
pub struct Surroundings<'a> {
    /// Whether the user is root.
    pub root: bool,
    /// Looks up an environment variable.
    pub variable: &'a dyn Fn(&str) -> Option<String>,
    /// Whether whoever started the program passed it sockets to listen on.
    pub sockets_passed: bool,
}

impl Surroundings<'_> {
    /// Loopback, unless sockets were passed: then those are meant, and those alone.
    pub(super) fn listen(&self) -> Vec<ListenAddr> {
        if self.sockets_passed { Vec::new() } else { vec![ListenAddr::Tcp(format!("127.0.0.1:{DEFAULT_PORT}"))] }
    }

    pub(super) fn cache_root(&self) -> Result<PathBuf, ConfigError> {
        Ok(self.state("--cache-root")?.join("cache"))
    }

    pub(super) fn local_root(&self) -> Result<PathBuf, ConfigError> {
        Ok(self.state("--local-root")?.join("store"))
    }

    pub(crate) fn admin_sock(&self) -> Result<PathBuf, ConfigError> {
        if self.root {
            return Ok(Self::system_admin_sock());
        }
        match self.folder("XDG_RUNTIME_DIR") {
            Some(runtime) => Ok(runtime.join(SOCKET)),
            None => Ok(self.state("--admin-sock")?.join(SOCKET)),
        }
    }

    /// Where the system's server has it.
    pub(crate) fn system_admin_sock() -> PathBuf {
        Path::new("/run").join(NAME).join(SOCKET)
    }

    fn state(&self, flag: &'static str) -> Result<PathBuf, ConfigError> {
        if self.root {
            return Ok(Path::new("/var/lib").join(NAME));
        }
        let state = self.folder("XDG_STATE_HOME").or_else(|| Some(self.folder("HOME")?.join(".local/state")));
        let missing = ConfigError::NoDefault { flag, variables: "XDG_STATE_HOME nor HOME" };
        Ok(state.ok_or(missing)?.join(NAME))
    }

    /// A relative path in these variables is to be ignored, says the XDG base directory specification.
    fn folder(&self, name: &str) -> Option<PathBuf> {
        (self.variable)(name).map(PathBuf::from).filter(|path| path.is_absolute())
    }
}
