//! `cache`: what an export keeps on the local disk.

use clap::{Args, Subcommand};

use super::confirm::Yes;
use super::{CliError, Common, number, text};
use crate::config::Surroundings;
use crate::units::ExportId;

/// What can be done with a cache.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Drop everything local and serve the published image. DESTROYS what was not published
    Reset(Reset),
}

/// The flags of `cache reset`.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:
  nbd-server cache reset vm-1 --yes")]
pub struct Reset {
    /// The export
    #[arg(value_name = "NAME")]
    name: ExportId,
    #[command(flatten)]
    yes: Yes,
    #[command(flatten)]
    common: Common,
}

impl Command {
    pub(super) async fn run(self, surroundings: &Surroundings<'_>) -> Result<String, CliError> {
        let Self::Reset(Reset { name, yes, common }) = self;
        let client = common.client(surroundings)?;
        let before = client.get(&format!("/v1/exports/{name}/status")).await?;
        let dirty = number(&before, "dirty_chunks");
        yes.confirm(&format!("this drops the cache of {name}, with {dirty} chunks that were never published"))?;
        let after = client.post(&format!("/v1/exports/{name}/cache/reset"), None).await?;
        Ok(common.show(&after, &[text(&after, "export_id")], || format!("{name} is as published\n")))
    }
}
