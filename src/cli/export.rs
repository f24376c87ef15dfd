//! `export`: devices that NBD clients attach by name.

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::table::{Row, pairs, table};
use super::{CliError, Common, bytes_or_unknown, number, size, snapshot_or_none, text};
use crate::config::{Surroundings, chunk_bytes};
use crate::units::{ExportId, SnapshotId};

/// What can be done with exports.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the exports that are loaded
    List(List),
    /// Create an export of zeros
    Create(Create),
    /// Load an export that is in the store
    Open(Open),
    /// Create an export that starts as a published snapshot of another; no data is copied
    Clone(CloneExport),
    /// Look at one export: what is cached and dirty, which snapshot it builds on, what is going on
    Status(Status),
    /// Give up a snapshot or compaction that is uploading: the export is as before it
    Cancel(Cancel),
    /// Unload an export here; its cache and what is in the store stay
    Close(Close),
}

/// The flags of `export list`.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:
  nbd-server export list
  nbd-server export list --json | jq -r '.[] | select(.state != \"ready\") | .reason'")]
pub struct List {
    #[command(flatten)]
    common: Common,
}

/// The flags of `export create`.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:
  nbd-server export create vm-3 10GiB
  nbd-server export create db-1 256MiB --chunk-size 64KiB")]
pub struct Create {
    /// Name of the new export
    #[arg(value_name = "NAME")]
    name: ExportId,
    /// Size of the device, such as 10G or 512MiB
    #[arg(value_name = "SIZE", value_parser = size::parse)]
    size: u64,
    /// Unit of fetching and publishing: a power of two from 4KiB to 64MiB [default: the server's --chunk-size]
    #[arg(long, value_name = "BYTES", value_parser = chunk_bytes)]
    chunk_size: Option<u64>,
    #[command(flatten)]
    common: Common,
}

/// The flags of `export open`.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:
  # an export that another server, or an import, has put into the store
  nbd-server export open vm-2
  # the same, to look at it alone
  nbd-server export close vm-2
  nbd-server export open vm-2 --read-only")]
pub struct Open {
    /// The export
    #[arg(value_name = "NAME")]
    name: ExportId,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    #[command(flatten)]
    common: Common,
}

/// The flags of `export clone`.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:
  nbd-server export clone vm-1 vm-3
  # from its oldest snapshot
  nbd-server export clone vm-1 vm-4 --snapshot $(nbd-server snapshot list vm-1 -q | tail -n 1)")]
pub struct CloneExport {
    /// The export to clone
    #[arg(value_name = "SOURCE")]
    source: ExportId,
    /// Name of the new export
    #[arg(value_name = "NAME")]
    name: ExportId,
    /// Snapshot of the source to start from [default: its newest]
    #[arg(long, value_name = "ID")]
    snapshot: Option<SnapshotId>,
    #[command(flatten)]
    common: Common,
}

/// The flags of `export status`.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:
  nbd-server export status vm-1
  nbd-server export status vm-1 --json | jq .dirty_chunks")]
pub struct Status {
    /// The export
    #[arg(value_name = "NAME")]
    name: ExportId,
    #[command(flatten)]
    common: Common,
}

/// The flags of `export cancel`.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:
  nbd-server export cancel vm-1")]
pub struct Cancel {
    /// The export
    #[arg(value_name = "NAME")]
    name: ExportId,
    #[command(flatten)]
    common: Common,
}

/// The flags of `export close`.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:
  # publish what was written, then move the export to another server
  nbd-server snapshot create vm-1
  nbd-server export close vm-1")]
pub struct Close {
    /// The export
    #[arg(value_name = "NAME")]
    name: ExportId,
    #[command(flatten)]
    common: Common,
}

impl Command {
    pub(super) async fn run(self, surroundings: &Surroundings<'_>) -> Result<String, CliError> {
        match self {
            Self::List(List { common }) => {
                let exports = common.client(surroundings)?.get("/v1/exports").await?;
                let rows = exports.as_array().map(Vec::as_slice).unwrap_or_default();
                let ids: Vec<&str> = rows.iter().map(|export| text(export, "export_id")).collect();
                Ok(common.show(&exports, &ids, || list(rows)))
            }
            Self::Create(Create { name, size, chunk_size, common }) => {
                let mut body = json!({"export_id": name, "size": size});
                if let Some(chunk_size) = chunk_size {
                    body["chunk_size"] = chunk_size.into();
                }
                let export = common.client(surroundings)?.post("/v1/exports/create", Some(body)).await?;
                Ok(done(&common, &export, &format!("created {name}, {}", size::shown(size))))
            }
            Self::Open(Open { name, read_only, common }) => {
                let body = json!({"export_id": name, "read_only": read_only});
                let export = common.client(surroundings)?.post("/v1/exports/open", Some(body)).await?;
                let mode = if read_only { ", read-only" } else { "" };
                Ok(done(&common, &export, &format!("opened {name}{mode}")))
            }
            Self::Clone(CloneExport { source, name, snapshot, common }) => {
                let mut body = json!({"export_id": name, "source_export_id": source});
                if let Some(snapshot) = snapshot {
                    body["source_snapshot_id"] = snapshot.to_string().into();
                }
                let export = common.client(surroundings)?.post("/v1/exports/clone", Some(body)).await?;
                Ok(done(&common, &export, &format!("created {name} as a clone of {source}")))
            }
            Self::Status(Status { name, common }) => {
                let export = common.client(surroundings)?.get(&format!("/v1/exports/{name}/status")).await?;
                Ok(common.show(&export, &[], || status(&export)))
            }
            Self::Cancel(Cancel { name, common }) => {
                let answer = common.client(surroundings)?.post(&format!("/v1/exports/{name}/cancel"), None).await?;
                Ok(common.show(&answer, &[], || {
                    if answer["cancelled"] == true {
                        format!("cancelled; {name} is as it was before\n")
                    } else {
                        format!("nothing was given up: {name} had no operation that still could be\n")
                    }
                }))
            }
            Self::Close(Close { name, common }) => {
                let none = common.client(surroundings)?.delete(&format!("/v1/exports/{name}")).await?;
                Ok(common
                    .show(&none, &[], || format!("closed {name}; `nbd-server export open {name}` loads it again\n")))
            }
        }
    }
}

fn done(common: &Common, export: &Value, what: &str) -> String {
    common.show(export, &[text(export, "export_id")], || format!("{what}\n"))
}

fn list(exports: &[Value]) -> String {
    let row = |export: &Value| -> Row {
        let state = match text(export, "reason") {
            "" => text(export, "state").to_owned(),
            reason => format!("{}: {reason}", text(export, "state")),
        };
        vec![
            text(export, "export_id").to_owned(),
            bytes_or_unknown(export, "image_size"),
            bytes_or_unknown(export, "chunk_size"),
            snapshot_or_none(export, "current_snapshot_id"),
            state,
        ]
    };
    table(&["NAME", "SIZE", "CHUNK", "SNAPSHOT", "STATE"], &exports.iter().map(row).collect::<Vec<_>>())
}

/// What is going on, and how far it is.
fn operation(export: &Value) -> String {
    let state = text(export, "operation_state");
    let bytes = |field: &str| export["progress"][field].as_u64().map(size::shown);
    match (bytes("done_bytes"), bytes("total_bytes")) {
        (Some(done), Some(total)) => format!("{state}, {done} of {total}"),
        _ => state.to_owned(),
    }
}

/// The generation of the head in the store; with its snapshot, if that is not the one here.
fn remote_head(export: &Value) -> String {
    let generation = export["remote_head_generation"].as_u64().map_or("unknown".to_owned(), |known| known.to_string());
    let snapshot = snapshot_or_none(export, "remote_head_snapshot_id");
    if snapshot == snapshot_or_none(export, "current_snapshot_id") {
        generation
    } else {
        format!("{generation}: snapshot {snapshot}")
    }
}

fn status(export: &Value) -> String {
    let chunk = number(export, "chunk_size");
    let image = number(export, "image_size");
    let chunks = |field: &str| {
        let count = number(export, field);
        // The last chunk may be short.
        format!("{} ({count} of {} chunks)", size::shown((count * chunk).min(image)), number(export, "chunk_count"))
    };
    let state = match text(export, "reason") {
        "" => text(export, "state").to_owned(),
        reason => format!("{}: {reason}", text(export, "state")),
    };
    let mut rows = vec![
        ("name", text(export, "export_id").to_owned()),
        ("state", state),
        ("operation", operation(export)),
        ("size", size::shown(image)),
        ("chunk size", size::shown(chunk)),
        ("writes", if export["read_only"] == true { "refused".to_owned() } else { "taken".to_owned() }),
        ("resident", chunks("resident_chunks")),
        ("dirty", chunks("dirty_chunks")),
        ("free on disk", bytes_or_unknown(export, "cache_free_bytes")),
        ("snapshot", snapshot_or_none(export, "current_snapshot_id")),
        ("generation", format!("{}, in the store {}", export["snapshot_generation"], remote_head(export))),
        ("damaged chunks", number(export, "damaged_chunks").to_string()),
    ];
    let store = &export["store"];
    rows.push((
        "store",
        if store["reachable"] == true {
            "answers".to_owned()
        } else {
            format!("fails since {}: {}", text(store, "since"), text(store, "last_error"))
        },
    ));
    pairs(&rows)
}
