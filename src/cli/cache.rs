//! `cache`: what an export keeps on the local disk.

use clap::{Args, Subcommand};

use super::confirm::Yes;
use super::{CliError, Common, bytes_or_unknown, number, size, text};
use crate::config::Surroundings;
use crate::units::ExportId;

/// What can be done with a cache.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Drop everything local and serve the published image. DESTROYS what was not published
    Reset(Reset),
    /// Drop what is cached just as it is published, to free space: it is fetched again when it is read
    Trim(Trim),
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

/// The flags of `cache trim`.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:
  nbd-server cache trim vm-1
  # what was written becomes droppable once it is published
  nbd-server snapshot create vm-1
  nbd-server cache trim vm-1")]
pub struct Trim {
    /// The export
    #[arg(value_name = "NAME")]
    name: ExportId,
    #[command(flatten)]
    common: Common,
}

impl Command {
    pub(super) async fn run(self, surroundings: &Surroundings<'_>) -> Result<String, CliError> {
        match self {
            Self::Reset(Reset { name, yes, common }) => {
                let client = common.client(surroundings)?;
                let before = client.get(&format!("/v1/exports/{name}/status")).await?;
                let dirty = number(&before, "dirty_chunks");
                yes.confirm(&format!("this drops the cache of {name}, with {dirty} chunks that were never published"))?;
                let after = client.post(&format!("/v1/exports/{name}/cache/reset"), None).await?;
                Ok(common.show(&after, &[text(&after, "export_id")], || format!("{name} is as published\n")))
            }
            Self::Trim(Trim { name, common }) => {
                let answer = common.client(surroundings)?.post(&format!("/v1/exports/{name}/cache/trim"), None).await?;
                Ok(common.show(&answer, &[text(&answer, "export_id")], || {
                    let freed = size::shown(number(&answer, "freed_bytes"));
                    let free = bytes_or_unknown(&answer, "cache_free_bytes");
                    format!("dropped {freed} from the cache of {name}; free on its disk: {free}\n")
                }))
            }
        }
    }
}
