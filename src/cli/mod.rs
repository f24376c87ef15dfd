//! The client commands: what a person or a script tells a running server, over its admin socket.
//!
//! Each command is one call of the API or a few, and says what came of it: a table for people, the API's own answer with
//! `--json`, ids alone with `--quiet`. Nothing is destroyed without a yes. A refusal is the API's text and what to do.
//!
//! Exit statuses, for scripts: 0 it is done, 1 it was refused or failed, 2 the command line is wrong or a yes is
//! missing, 3 no server answers at the socket.

mod attach;
mod cache;
mod client;
mod compact;
mod confirm;
mod convert;
mod export;
mod export_image;
mod generate;
mod import;
mod interrupt;
mod progress;
mod publish;
mod recognize;
mod snapshot;
mod status;
mod table;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, Subcommand};
use serde_json::Value;

use crate::config::{ConfigError, Surroundings};
use crate::server::ServerError;
use crate::units::ExportId;
use crate::units::size;
use crate::volume::registry::ExportError;
use client::Client;
pub use client::{MAX_ANSWER_BYTES, Refused};

/// The machine, or the server, said no.
const FAILED: u8 = 1;
/// The user has to write something else.
const USAGE: u8 = 2;
/// There is nobody to ask.
const NO_SERVER: u8 = 3;

/// The commands for a running server.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create, open, clone, look at and close exports
    #[command(subcommand)]
    Export(export::Command),
    /// Publish snapshots and list them
    #[command(subcommand)]
    Snapshot(snapshot::Command),
    /// Rewrite the whole image of an export into one fresh blob, and publish that
    Compact(compact::Compact),
    /// Drop the local cache of an export
    #[command(subcommand)]
    Cache(cache::Command),
    /// Store a disk image as a new export, straight in the object store: no server takes part
    Import(Box<import::Import>),
    /// Write a published image into a file, straight from the object store: no server takes part
    ExportImage(Box<export_image::ExportImage>),
    /// Look at the server itself: version, uptime, exports, clients, store
    Status(status::Status),
    /// Print the commands that attach an export: nbd-client, qemu and libnbd
    AttachCommand(attach::AttachCommand),
    /// Print the completions of a shell
    Completions(generate::Completions),
    /// Write the man pages into a directory
    Man(generate::Man),
}

/// What every command takes that asks a server.
#[derive(Debug, Args)]
pub struct Common {
    /// Unix socket of the server's admin API
    /// [default: $XDG_RUNTIME_DIR/nbd-server.sock if there is one, for root or else: /run/nbd-server/nbd-server.sock]
    #[arg(long, value_name = "PATH", env = "NBD_SERVER_ADMIN_SOCK")]
    admin_sock: Option<PathBuf>,

    /// Print the API's answer as JSON
    #[arg(long, conflicts_with = "quiet")]
    json: bool,

    /// Print ids alone, or nothing
    #[arg(short, long)]
    quiet: bool,
}

/// Why a command did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Nobody listens at the socket.
    #[error("no server answers at {path} ({source})", path = .path.display())]
    NoServer {
        /// The socket.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The connection broke before there was an answer.
    #[error("the server at {path} gave no answer: {reason}", path = .path.display())]
    NoAnswer {
        /// The socket.
        path: PathBuf,
        /// What happened.
        reason: String,
    },
    /// The server said no.
    #[error("{0}")]
    Refused(Refused),
    /// The user pressed Ctrl-C twice.
    #[error("what was asked of export {0} was not waited for: the server goes on with it, or gives it up by itself")]
    GaveUpWaiting(ExportId),
    /// The user pressed Ctrl-C, or somebody else wanted the program to end.
    #[error("cancelled: {0}")]
    Cancelled(String),
    /// There is no default for a flag.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A yes is missing.
    #[error("{0}")]
    Unconfirmed(String),
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] ServerError),
    /// The store, or what it holds, said no.
    #[error(transparent)]
    Export(#[from] ExportError),
    /// A disk image that cannot be what it is to be.
    #[error("{0}")]
    Image(String),
    /// The local machine said no.
    #[error("{what}: {source}")]
    Io {
        /// What was done to what.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
}

impl CliError {
    /// What to do, where the text itself does not say it.
    #[must_use]
    pub fn remedy(&self) -> Option<&'static str> {
        match self {
            Self::NoServer { .. } => Some(
                "start one with `nbd-server serve`, name its socket with --admin-sock, or become a user that may open it",
            ),
            Self::NoAnswer { .. } => Some("the server's log says more; `nbd-server status` shows whether it lives"),
            Self::Refused(refused) => refused.remedy(),
            Self::Export(ExportError::NotFound(..)) => {
                Some("the storage flags must be those of the server: --storage-backend, --bucket, --export-root, ...")
            }
            Self::GaveUpWaiting(_) => Some("`nbd-server export status NAME` shows what is going on"),
            Self::Config(_)
            | Self::Cancelled(_)
            | Self::Unconfirmed(_)
            | Self::Store(_)
            | Self::Export(_)
            | Self::Image(_)
            | Self::Io { .. } => None,
        }
    }

    /// The exit status of the program.
    #[must_use]
    pub fn status(&self) -> ExitCode {
        ExitCode::from(match self {
            Self::NoServer { .. } => NO_SERVER,
            Self::Store(e) if e.is_usage() => USAGE,
            Self::NoAnswer { .. }
            | Self::Refused(_)
            | Self::GaveUpWaiting(_)
            | Self::Cancelled(_)
            | Self::Store(_)
            | Self::Export(_)
            | Self::Image(_)
            | Self::Io { .. } => FAILED,
            Self::Config(_) | Self::Unconfirmed(_) => USAGE,
        })
    }
}

impl Command {
    /// The file whose settings lie under the flags of this command.
    pub(crate) fn config_file(&self) -> Option<&Path> {
        match self {
            Self::Import(command) => command.storage.config(),
            Self::ExportImage(command) => command.storage.config(),
            _ => None,
        }
    }

    /// Does it, and returns what belongs on stdout.
    ///
    /// # Errors
    /// [`CliError`].
    pub async fn run(self, surroundings: &Surroundings<'_>) -> Result<String, CliError> {
        match self {
            Self::Export(command) => command.run(surroundings).await,
            Self::Snapshot(command) => command.run(surroundings).await,
            Self::Compact(command) => command.run(surroundings).await,
            Self::Cache(command) => command.run(surroundings).await,
            Self::Import(command) => command.run(surroundings).await,
            Self::ExportImage(command) => command.run(surroundings).await,
            Self::Status(command) => command.run(surroundings).await,
            Self::AttachCommand(command) => command.run(surroundings).await,
            Self::Completions(command) => command.run(),
            Self::Man(command) => command.run(),
        }
    }
}

impl Common {
    /// Whether stderr is to be left alone unless something is wrong.
    fn is_terse(&self) -> bool {
        self.json || self.quiet
    }

    fn client(&self, surroundings: &Surroundings<'_>) -> Result<Client, CliError> {
        let path = match &self.admin_sock {
            Some(path) => path.clone(),
            None => default_socket(surroundings.admin_sock(), Surroundings::system_admin_sock())?,
        };
        Ok(Client::new(path))
    }

    /// The answer in the form that was asked for; `ids` are those it is about, `text` is for people.
    fn show(&self, answer: &Value, ids: &[&str], text: impl FnOnce() -> String) -> String {
        if self.json {
            return format!("{answer}\n");
        }
        if self.quiet {
            return ids.iter().map(|id| format!("{id}\n")).collect();
        }
        text()
    }
}

/// The socket of the user's own server, or if there is none, the system's.
fn default_socket(own: Result<PathBuf, ConfigError>, system: PathBuf) -> Result<PathBuf, ConfigError> {
    // What may not be looked at is there: to be refused at it says more than another place.
    let there = |path: &Path| path.try_exists().unwrap_or(true);
    match own {
        Ok(own) if there(&own) => Ok(own),
        _ if there(&system) => Ok(system),
        own => own,
    }
}

/// A text in an answer; empty if there is none.
fn text<'a>(answer: &'a Value, field: &str) -> &'a str {
    answer[field].as_str().unwrap_or_default()
}

/// A number in an answer.
fn number(answer: &Value, field: &str) -> u64 {
    answer[field].as_u64().unwrap_or_default()
}

/// A number of bytes in an answer, or that it is not known.
fn bytes_or_unknown(answer: &Value, field: &str) -> String {
    answer[field].as_u64().map_or_else(|| "unknown".to_owned(), size::shown)
}

/// The snapshot that an answer names, or that there is none.
fn snapshot_or_none(answer: &Value, field: &str) -> String {
    answer[field].as_str().unwrap_or("none").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_systems_server_is_asked_where_the_user_has_none() {
        let dir = tempfile::tempdir().unwrap();
        let (own, system) = (dir.path().join("own"), dir.path().join("system"));
        let chosen = || default_socket(Ok(own.clone()), system.clone()).unwrap();
        assert_eq!(chosen(), own, "where one would be started");
        std::fs::write(&system, "").unwrap();
        assert_eq!(chosen(), system);
        std::fs::write(&own, "").unwrap();
        assert_eq!(chosen(), own);
    }
}
