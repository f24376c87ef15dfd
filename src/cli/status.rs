//! `status`: the server itself.

use clap::Args;
use serde_json::Value;

use super::table::pairs;
use super::{CliError, Common, number, text};
use crate::config::Surroundings;

/// The flags of `status`.
#[derive(Debug, Args)]
#[command(after_long_help = "Examples:
  nbd-server status
  nbd-server status --json | jq -e .store.reachable")]
pub struct Status {
    #[command(flatten)]
    common: Common,
}

impl Status {
    pub(super) async fn run(self, surroundings: &Surroundings<'_>) -> Result<String, CliError> {
        let status = self.common.client(surroundings)?.get("/v1/status").await?;
        Ok(self.common.show(&status, &[], || shown(&status)))
    }
}

/// How many exports there are of each kind; those that the store has only named so far go away by themselves.
fn exports_line(exports: &Value) -> String {
    let line = format!("{} ready, {} degraded, {} failed", exports["ready"], exports["degraded"], exports["failed"]);
    match number(exports, "discovering") {
        0 => line,
        unread => format!("{line}, {unread} discovering"),
    }
}

fn shown(status: &Value) -> String {
    let exports = &status["exports"];
    let listen = status["listen"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let store = &status["store"];
    let health = if store["reachable"] == true {
        format!("{}, answers", text(store, "backend"))
    } else {
        let reason = text(&store["last_error"], "reason");
        format!("{}, fails since {}: {reason}", text(store, "backend"), text(store, "since"))
    };
    pairs(&[
        ("version", text(status, "version").to_owned()),
        ("started", format!("{} ({} ago)", text(status, "started_at"), ago(number(status, "uptime_seconds")))),
        ("exports", exports_line(exports)),
        ("clients", number(status, "connections").to_string()),
        ("NBD", listen.collect::<Vec<_>>().join(" ")),
        ("store", health),
    ])
}

/// The two largest units of a span of time.
fn ago(seconds: u64) -> String {
    let (minutes, hours, days) = (seconds / 60, seconds / 3600, seconds / 86_400);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min {} s", seconds % 60),
        (0, _, _) => format!("{hours} h {} min", minutes % 60),
        _ => format!("{days} d {} h", hours % 24),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_span_of_time_is_shown_in_its_two_largest_units() {
        for (seconds, text) in [(0, "0 s"), (61, "1 min 1 s"), (7_260, "2 h 1 min"), (90_000, "1 d 1 h")] {
            assert_eq!(ago(seconds), text);
        }
    }
}
