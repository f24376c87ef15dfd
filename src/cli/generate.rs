//! `completions` and `man`: made from the definitions of the commands themselves, so they are never behind.

use std::path::{Path, PathBuf};
use std::{fs, io};

use clap::{Args, CommandFactory};
use clap_complete::Shell;
use clap_mangen::roff::{Roff, roman};

use super::CliError;
use crate::config::Cli;

/// What begins the examples in the help of a command, which are the last of it.
const EXAMPLES: &str = "Examples:\n";

/// The flags of `completions`.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:
  nbd-server completions bash > nbd-server.bash")]
pub struct Completions {
    /// The shell
    #[arg(value_name = "SHELL")]
    shell: Shell,
}

/// The flags of `man`.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:
  mkdir -p man1
  nbd-server man man1")]
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
        let mut program = Cli::command().disable_help_subcommand(true);
        program.build();
        let what =
            format!("the man pages could not be written to {}; name a directory that exists", self.dir.display());
        pages(&program, &self.dir).map_err(|source| CliError::Io { what, source })?;
        Ok(String::new())
    }
}

/// The page of a command, and those of all below it.
fn pages(command: &clap::Command, dir: &Path) -> io::Result<()> {
    for below in command.get_subcommands() {
        pages(below, dir)?;
    }
    let help = command.get_after_long_help().or(command.get_after_help()).map(ToString::to_string).unwrap_or_default();
    let (notes, examples) = help.split_once(EXAMPLES).unwrap_or((&help, ""));
    let page = clap_mangen::Man::new(command.clone());
    let mut text = Vec::new();
    page.render_title(&mut text)?;
    page.render_name_section(&mut text)?;
    page.render_synopsis_section(&mut text)?;
    page.render_description_section(&mut text)?;
    page.render_options_section(&mut text)?;
    if command.has_subcommands() {
        page.render_subcommands_section(&mut text)?;
    }
    section("NOTES", notes).to_writer(&mut text)?;
    section("EXAMPLES", examples).to_writer(&mut text)?;
    fs::write(dir.join(page.get_filename()), text)
}

/// A section of its own; nothing if there is no text. Lines that are indented are kept apart.
fn section(title: &str, text: &str) -> Roff {
    let mut roff = Roff::new();
    if !text.trim().is_empty() {
        roff.control("SH", [title]);
        for line in text.trim_end().lines() {
            roff.text([roman(line)]);
        }
    }
    roff
}
