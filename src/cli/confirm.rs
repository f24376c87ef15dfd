//! A yes, before anything is destroyed: by the flag, or from a person at a terminal. Without either, nothing happens.

use std::io::{BufRead, IsTerminal, Write};

use clap::Args;

use super::CliError;

/// The flag that says yes.
#[derive(Debug, Args)]
pub struct Yes {
    /// Do it without asking
    #[arg(short, long)]
    yes: bool,
}

impl Yes {
    /// Asks whether `what` is meant.
    ///
    /// # Errors
    /// [`CliError::Unconfirmed`] unless somebody said yes.
    pub(super) fn confirm(&self, what: &str) -> Result<(), CliError> {
        if self.yes {
            return Ok(());
        }
        if !std::io::stdin().is_terminal() {
            return Err(CliError::Unconfirmed(format!("{what}: add --yes if that is meant")));
        }
        // Nobody to tell if stderr is gone; then there will be no yes either.
        let _ = write!(std::io::stderr(), "{what}. Go on? [y/N] ");
        let mut line = String::new();
        let read = std::io::stdin().lock().read_line(&mut line);
        match (read, line.trim().to_ascii_lowercase().as_str()) {
            (Ok(_), "y" | "yes") => Ok(()),
            _ => Err(CliError::Unconfirmed("nothing was done".into())),
        }
    }
}
