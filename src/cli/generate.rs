//! `completions` and `man`: made from the definitions of the commands themselves, so they are never behind.

use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::CliError;
use crate::config::Cli;

/// The flags of `completions`.
#[derive(Debug, Args)]
pub struct Completions {
    /// The shell
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

/// The flags of `man`.
#[derive(Debug, Args)]
pub struct Man {
    /// Existing directory for the pages, one per command
    #[arg(value_name = "DIR")]
    dir: PathBuf,
}

impl Completions {
    pub(super) fn run(self) -> Result<String, CliError> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "nbd-server", &mut script);
        Ok(String::from_utf8_lossy(&script).into_owned())
    }
}

impl Man {
    pub(super) fn run(self) -> Result<String, CliError> {
        let written = clap_mangen::generate_to(Cli::command(), &self.dir);
        let what =
            format!("the man pages could not be written to {}; name a directory that exists", self.dir.display());
        written.map_err(|source| CliError::Io { what, source })?;
        Ok(String::new())
    }
}
