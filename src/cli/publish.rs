//! What `snapshot create` and `compact` share: a call that may take long, with its progress, and Ctrl-C.
//!
//! Ctrl-C asks the server to give up and waits for its answer, so that what is reported is what is. A second one stops the
//! waiting: then the server goes on by itself.

use std::time::Duration;

use serde_json::Value;

use super::interrupt::Interrupts;
use super::progress::Progress;
use super::{CliError, Common, number};
use crate::config::Surroundings;
use crate::units::ExportId;

/// How often the server is asked how far it is.
const POLL: Duration = Duration::from_millis(300);

/// Has an export published, by the last word of the call's path.
pub(super) async fn publish(
    common: &Common,
    surroundings: &Surroundings<'_>,
    name: &ExportId,
    (what, call): (&'static str, &str),
) -> Result<Value, CliError> {
    let client = common.client(surroundings)?;
    let (path, status) = (format!("/v1/exports/{name}/{call}"), format!("/v1/exports/{name}/status"));
    let mut interrupts = Interrupts::listen_for_server()?;
    let mut ticks = tokio::time::interval(POLL);
    let (progress, mut cancelling) = (Progress::new(what, 0, false), false);
    let mut publishing = std::pin::pin!(client.post(&path, None));
    loop {
        tokio::select! {
            answer = &mut publishing => return answer,
            _ = ticks.tick(), if !common.is_terse() => {
                // Only to be shown: if it fails, the call itself will say why.
                let Ok(status) = client.get(&status).await else { continue };
                let total = number(&status["progress"], "total_bytes");
                let store = &status["store"];
                let fails = store["reachable"] == false;
                progress.wait_for_store(fails.then(|| store["last_error"].as_str().unwrap_or_default()));
                if total > 0 {
                    progress.plan(total);
                    progress.reach(number(&status["progress"], "done_bytes").min(total));
                }
            }
            () = interrupts.next() => {
                if std::mem::replace(&mut cancelling, true) {
                    return Err(CliError::GaveUpWaiting(name.clone()));
                }
                let (client, path) = (client.clone(), format!("/v1/exports/{name}/cancel"));
                // What comes of it is what the call itself ends with.
                tokio::spawn(async move { client.post(&path, None).await });
            }
        }
    }
}
