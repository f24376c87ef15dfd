//! `snapshot`: published, immutable images of an export.

use clap::{Args, Subcommand};
use serde_json::Value;

use super::publish::publish;
use super::table::{Row, table};
use super::{CliError, Common, number, size, snapshot_or_none, text};
use crate::config::Surroundings;
use crate::units::ExportId;

/// What can be done with snapshots.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Publish what was written since the last one, as one point in time; clients go on meanwhile
    Create(Create),
    /// List the published snapshots of an export, newest first
    List(List),
}

/// The flags of `snapshot create`.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:
  nbd-server snapshot create vm-1
  # every export
  nbd-server export list -q | xargs -n 1 nbd-server snapshot create")]
pub struct Create {
    /// The export
    #[arg(value_name = "NAME")]
    name: ExportId,
    #[command(flatten)]
    common: Common,
}

/// The flags of `snapshot list`.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:
  nbd-server snapshot list vm-1
  # the id of the newest
  nbd-server snapshot list vm-1 -q | head -n 1")]
pub struct List {
    /// The export
    #[arg(value_name = "NAME")]
    name: ExportId,
    #[command(flatten)]
    common: Common,
}

impl Command {
    pub(super) async fn run(self, surroundings: &Surroundings<'_>) -> Result<String, CliError> {
        match self {
            Self::Create(Create { name, common }) => {
                let answer = publish(&common, surroundings, &name, ("publishing", "snapshot")).await?;
                let ids: Vec<&str> = answer["snapshot_id"].as_str().into_iter().collect();
                Ok(common.show(&answer, &ids, || created(&name, &answer)))
            }
            Self::List(List { name, common }) => {
                let answer = common.client(surroundings)?.get(&format!("/v1/exports/{name}/snapshots")).await?;
                let snapshots = answer["snapshots"].as_array().map(Vec::as_slice).unwrap_or_default();
                let ids: Vec<&str> = snapshots.iter().map(|snapshot| text(snapshot, "snapshot_id")).collect();
                Ok(common.show(&answer, &ids, || list(snapshots, answer["complete"] == true)))
            }
        }
    }
}

fn created(name: &ExportId, answer: &Value) -> String {
    let snapshot = snapshot_or_none(answer, "snapshot_id");
    if answer["snapshot_created"] == true {
        format!("published snapshot {snapshot} of {name}, generation {}\n", answer["generation"])
    } else {
        format!("nothing was written to {name} since its last snapshot ({snapshot}): nothing was published\n")
    }
}

fn list(snapshots: &[Value], complete: bool) -> String {
    let row = |snapshot: &Value| -> Row {
        vec![
            text(snapshot, "snapshot_id").to_owned(),
            number(snapshot, "generation").to_string(),
            text(snapshot, "created_at").to_owned(),
            size::shown(number(snapshot, "data_bytes")),
            size::shown(number(snapshot, "new_bytes")),
        ]
    };
    let rows: Vec<Row> = snapshots.iter().map(row).collect();
    let mut text = table(&["SNAPSHOT", "GENERATION", "CREATED", "DATA", "NEW"], &rows);
    if !complete {
        text += "(older ones cannot be followed: a manifest was deleted, or does not name its parent)\n";
    }
    text
}
