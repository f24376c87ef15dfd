//! `compact`: one fresh blob in place of many.

use clap::Args;

use super::publish::publish;
use super::{CliError, Common, snapshot_or_none};
use crate::config::Surroundings;
use crate::units::ExportId;

/// The flags of `compact`.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:
  nbd-server compact vm-1")]
pub struct Compact {
    /// The export
    #[arg(value_name = "NAME")]
    name: ExportId,
    #[command(flatten)]
    common: Common,
}

impl Compact {
    pub(super) async fn run(self, surroundings: &Surroundings<'_>) -> Result<String, CliError> {
        let Self { name, common } = self;
        let answer = publish(&common, surroundings, &name, ("compacting", "compact")).await?;
        let ids: Vec<&str> = answer["snapshot_id"].as_str().into_iter().collect();
        Ok(common.show(&answer, &ids, || {
            let snapshot = snapshot_or_none(&answer, "snapshot_id");
            format!("compacted {name}: snapshot {snapshot}, generation {}\n", answer["generation"])
        }))
    }
}
