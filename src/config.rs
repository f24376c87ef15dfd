//! From what the user wrote to what the program may trust.
//!
//! A [`Config`] is complete and consistent: every default is filled in, every value has its type, and values that
//! contradict each other were refused with a text that names the flag, the value and the remedy. Nothing is read or
//! created outside of the arguments, the environment and the configuration file: what the machine says to the values is
//! for the start to find out. Credentials are not looked at here.

mod defaults;
mod file;
mod layers;
mod storage;
#[cfg(test)]
mod tests;
mod tls;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::cli;
use crate::nbd::ListenAddr;
use crate::nbd::tls::TlsConfig;
use crate::net::MAX_PATH_BYTES;
use crate::store::keys::{ExportRoot, MAX_KEY_BYTES};
use crate::store::remote::{RemoteConfig, RemoteKind};
use crate::units::{DEFAULT_CHUNK_BYTES, Geometry, MAX_EXPORT_ID_BYTES, size};
use crate::volume::DEFAULT_PUBLISH_BYTES;
pub use defaults::Surroundings;
pub use file::{FileError, MAX_FILE_BYTES};
pub use layers::{Origins, ReadError, read};
use storage::{Backend, given};
pub use storage::{Storage, StoreAccess};

/// What follows an export's folder in the longest key: `/snapshots/<32 digits>/manifest.json`.
const LONGEST_KEY_TAIL_BYTES: usize = "/snapshots//manifest.json".len() + 32;
/// The longest export root that leaves room for the rest of every key.
const MAX_EXPORT_ROOT_BYTES: usize = MAX_KEY_BYTES - 1 - MAX_EXPORT_ID_BYTES - LONGEST_KEY_TAIL_BYTES;
/// The least memory of publishes: an upload in the smallest parts goes on with what of it is for chunks.
const MIN_PUBLISH_BYTES: u64 = 20 << 20;
/// The most memory of publishes that can be asked for.
const MAX_PUBLISH_BYTES: u64 = 1 << 40;

/// What scripts can rely on.
const EXIT_STATUSES: &str = "Exit status:
  0  it is done
  1  it was refused, failed or was cancelled, or credentials are missing
  2  the command line, the configuration or a variable in place of a flag is wrong, or a yes is missing
  3  no server answers at the admin socket";

/// Network block devices that live in object storage, with a lazy local cache.
#[derive(Debug, Parser)]
#[command(name = "nbd-server", version, about, max_term_width = 110, after_help = EXIT_STATUSES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What the program can do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Serve exports over NBD until SIGTERM or SIGINT. No flag is needed to try it out.
    Serve(Box<Serve>),
    /// Look at a configuration without starting anything.
    #[command(subcommand)]
    Config(ConfigCommand),
    /// Talk to a server that runs.
    #[command(flatten)]
    Client(cli::Command),
}

/// What can be done with a configuration.
#[derive(Debug, Subcommand)]
pub enum ConfigCommand {
    /// Say whether serve would take a configuration file, with the environment variables as they are.
    Check(Check),
    /// Show every setting that serve would have with the same flags, and where each comes from.
    #[command(after_long_help = "Examples:
  nbd-server config show
  nbd-server config show --config config.toml")]
    Show(Box<Serve>),
}

/// The flags of `config check`.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:
  nbd-server config check config.toml")]
pub struct Check {
    /// The file
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
}

impl Command {
    /// The file whose settings lie under those of this command.
    fn config_file(&self) -> Option<&Path> {
        match self {
            Self::Serve(serve) | Self::Config(ConfigCommand::Show(serve)) => serve.storage.config(),
            Self::Client(command) => command.config_file(),
            Self::Config(ConfigCommand::Check(_)) => None,
        }
    }
}

impl Check {
    /// The arguments of the `serve` that is meant.
    #[must_use]
    pub fn serve(&self) -> Vec<OsString> {
        vec!["nbd-server".into(), "serve".into(), "--config".into(), self.file.clone().into()]
    }
}

/// The flags of `serve`, as written.
#[derive(Debug, Args)]
#[command(
    after_long_help = "Credentials come from the usual environment variables (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, AZURE_STORAGE_ACCOUNT_NAME, ...) and are never logged.

Examples:
  # on a local directory
  nbd-server serve
  # on a bucket
  nbd-server serve --storage-backend s3 --bucket my-disks --region eu-central-1
  # with settings from a file, for clients of this machine alone
  nbd-server serve --config config.toml --listen unix:nbd.sock"
)]
pub struct Serve {
    /// Directory for the local caches, one folder per export; one server at a time
    /// [default: /var/lib/nbd-server/cache for root, else ~/.local/state/nbd-server/cache]
    #[arg(long, value_name = "DIR", env = "NBD_SERVER_CACHE_ROOT")]
    cache_root: Option<PathBuf>,

    /// Address for NBD clients: HOST:PORT, [IPV6]:PORT or unix:PATH; port 0 picks a free one. May be repeated, or
    /// separated by commas in the variable
    /// [default: the sockets passed in LISTEN_FDS, else 127.0.0.1:10809]
    #[arg(long, value_name = "ADDR", env = "NBD_SERVER_LISTEN", value_delimiter = ',')]
    listen: Vec<ListenAddr>,

    #[command(flatten)]
    tls: tls::Flags,

    /// Unix socket of the admin API
    /// [default: /run/nbd-server/nbd-server.sock for root, else $XDG_RUNTIME_DIR/nbd-server.sock]
    #[arg(long, value_name = "PATH", env = "NBD_SERVER_ADMIN_SOCK")]
    admin_sock: Option<PathBuf>,

    /// Group whose members may use the admin API too, by name or number [default: none, the owner alone]
    #[arg(long, value_name = "NAME", env = "NBD_SERVER_ADMIN_GROUP")]
    admin_group: Option<String>,

    /// Address at which Prometheus may collect GET /metrics over HTTP: HOST:PORT or [IPV6]:PORT. The admin socket has
    /// it in any case [default: none]
    #[arg(long, value_name = "ADDR", env = "NBD_SERVER_METRICS_LISTEN", value_parser = metrics_addr)]
    metrics_listen: Option<String>,

    /// Chunk size of exports that are created without one: a power of two from 4KiB to 64MiB
    #[arg(long, value_name = "BYTES", env = "NBD_SERVER_CHUNK_SIZE", value_parser = chunk_bytes,
          default_value_t = DEFAULT_CHUNK_BYTES)]
    chunk_size: u64,

    #[command(flatten)]
    storage: Storage,

    /// Memory for chunks on their way to the store, over all snapshots and compactions under way, an eighth of it for blocks that
    /// clients change meanwhile: from 20MiB to 1TiB
    #[arg(long, value_name = "BYTES", env = "NBD_SERVER_PUBLISH_MEMORY", value_parser = publish_bytes,
          default_value_t = DEFAULT_PUBLISH_BYTES)]
    publish_memory: u64,

    /// What is logged to stderr; read again on SIGHUP
    #[arg(long, value_name = "LEVEL", env = "NBD_SERVER_LOG_LEVEL", default_value = "info")]
    log_level: LogLevel,

    /// How it is logged
    #[arg(long, value_name = "FORMAT", env = "NBD_SERVER_LOG_FORMAT", default_value = "text")]
    log_format: LogFormat,
}

/// How much is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
#[allow(missing_docs, reason = "the names say it")]
pub enum LogLevel {
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// How a line of the log looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// For people
    Text,
    /// One JSON object per line
    Json,
}

/// Everything a server needs to know to start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where the local caches are.
    pub cache_root: PathBuf,
    /// Where in the store the exports are.
    pub export_root: ExportRoot,
    /// Where NBD clients connect; at least one address, unless sockets were passed.
    pub listen: Vec<ListenAddr>,
    /// `None`: there is no TLS.
    pub tls: Option<TlsConfig>,
    /// Where the admin API is; short enough for a socket.
    pub admin_sock: PathBuf,
    /// The group that may use the admin API beside the owner.
    pub admin_group: Option<String>,
    /// Where metrics can be collected over TCP.
    pub metrics_listen: Option<String>,
    /// The chunk size of an export created without one, in bytes.
    pub chunk_bytes: u64,
    /// Where published snapshots live.
    pub store: StoreConfig,
    /// How long a read, or the start, waits for a store that does not answer.
    pub store_timeout: Duration,
    /// The memory of all publishes together, in bytes.
    pub publish_bytes: u64,
    /// Whether a store is written to that the probe found unfit.
    pub allow_unsafe_store: bool,
    /// How much is logged.
    pub log_level: LogLevel,
    /// How it is logged.
    pub log_format: LogFormat,
}

/// The object storage to use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StoreConfig {
    /// A local directory.
    Local(PathBuf),
    /// Memory.
    Memory,
    /// A bucket.
    Remote(RemoteConfig),
}

impl Config {
    /// How the store is reached.
    #[must_use]
    pub fn access(&self) -> StoreAccess {
        StoreAccess {
            store: self.store.clone(),
            export_root: self.export_root.clone(),
            timeout: self.store_timeout,
            allow_unsafe: self.allow_unsafe_store,
        }
    }
}

impl StoreConfig {
    /// The backend as the flag names it.
    #[must_use]
    pub fn backend(&self) -> &'static str {
        match self {
            Self::Local(_) => Backend::Local.as_str(),
            Self::Memory => Backend::Memory.as_str(),
            Self::Remote(remote) => match remote.kind {
                RemoteKind::S3 => Backend::S3.as_str(),
                RemoteKind::R2 => Backend::R2.as_str(),
                RemoteKind::Gcs => Backend::Gcs.as_str(),
                RemoteKind::Azure => Backend::Azure.as_str(),
            },
        }
    }
}

/// Why the flags do not make a configuration; each text names flag, value and remedy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// A default depends on something the environment does not say.
    #[error("there is no default for {flag}: neither {variables} is set; give {flag}")]
    NoDefault {
        /// The flag without a value.
        flag: &'static str,
        /// The variables that would have helped.
        variables: &'static str,
    },
    /// What was chosen cannot work without a flag.
    #[error("{choice} needs {flag}: {remedy}")]
    Missing {
        /// The flag that chose, with its value.
        choice: String,
        /// The flag that is missing.
        flag: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// A flag that would be ignored: most likely what was chosen is not what was meant.
    #[error("{flag} {value} has no meaning with {choice}: drop it, or choose {meant}")]
    Unused {
        /// The flag.
        flag: &'static str,
        /// Its value.
        value: String,
        /// The flag that chose, with its value.
        choice: String,
        /// The choices it belongs to.
        meant: &'static str,
    },
    /// The path of the admin socket is more than the kernel takes.
    #[error("--admin-sock {path} has {bytes} bytes, more than the {MAX_PATH_BYTES} of a Unix socket: choose a shorter path", path = .0.display(), bytes = .0.as_os_str().len())]
    LongSocketPath(PathBuf),
    /// Cache and store would share one directory.
    #[error("--cache-root and --local-root are both {0}: give each its own directory")]
    SameDirectory(String),
}

impl Serve {
    /// Fills in the defaults and checks the flags against each other.
    ///
    /// # Errors
    /// The first [`ConfigError`] found.
    pub fn check(self, surroundings: &Surroundings<'_>) -> Result<Config, ConfigError> {
        let StoreAccess { store, export_root, timeout, allow_unsafe } = self.storage.check(surroundings)?;
        let tls = self.tls.check()?;
        let listen = if self.listen.is_empty() { surroundings.listen() } else { self.listen };
        let cache_root = self.cache_root.map_or_else(|| surroundings.cache_root(), Ok)?;
        let admin_sock = self.admin_sock.map_or_else(|| surroundings.admin_sock(), Ok)?;
        if admin_sock.as_os_str().len() > MAX_PATH_BYTES {
            return Err(ConfigError::LongSocketPath(admin_sock));
        }
        if matches!(&store, StoreConfig::Local(root) if *root == cache_root) {
            return Err(ConfigError::SameDirectory(cache_root.display().to_string()));
        }
        Ok(Config {
            cache_root,
            export_root,
            listen,
            tls,
            admin_sock,
            admin_group: given(self.admin_group.as_ref()),
            metrics_listen: self.metrics_listen,
            chunk_bytes: self.chunk_size,
            store,
            store_timeout: timeout,
            publish_bytes: self.publish_memory,
            allow_unsafe_store: allow_unsafe,
            log_level: self.log_level,
            log_format: self.log_format,
        })
    }

    /// How much is logged.
    #[must_use]
    pub fn log_level(&self) -> LogLevel {
        self.log_level
    }
}

fn metrics_addr(text: &str) -> Result<String, String> {
    match text.parse::<ListenAddr>() {
        Ok(ListenAddr::Tcp(addr)) => Ok(addr),
        Ok(ListenAddr::Unix(_)) => Err("the admin socket serves /metrics already; give HOST:PORT".into()),
        Err(e) => Err(e.to_string()),
    }
}

/// A chunk size, in bytes.
pub(crate) fn chunk_bytes(text: &str) -> Result<u64, String> {
    let bytes = size::parse(text)?;
    // An image of one byte has one chunk of any size: what remains to refuse is the chunk size.
    Geometry::new(1, bytes).map_err(|e| e.to_string())?;
    Ok(bytes)
}

/// The memory of publishes, in bytes.
fn publish_bytes(text: &str) -> Result<u64, String> {
    let bytes = size::parse(text)?;
    let fits = (MIN_PUBLISH_BYTES..=MAX_PUBLISH_BYTES).contains(&bytes);
    fits.then_some(bytes).ok_or_else(|| "give between 20MiB and 1TiB".into())
}
