//! What systemd is told, if it started the server: that it is ready, that it lives, that it stops.
//!
//! A server that nobody listens to tells nobody; that telling fails is logged and harms nothing.

use std::time::Duration;

use sd_notify::NotifyState;

/// Signs of life are sent at half of the watchdog's patience, but no faster than this.
const SHORTEST_INTERVAL: Duration = Duration::from_millis(10);

/// Clients can connect. From here on signs of life are sent, if the unit has a watchdog, for as long as tasks are run.
pub(super) fn ready() {
    tell(NotifyState::Ready);
    if let Some(patience) = sd_notify::watchdog_enabled() {
        tokio::spawn(live((patience / 2).max(SHORTEST_INTERVAL)));
    }
}

/// The server stops.
pub(super) fn stopping() {
    tell(NotifyState::Stopping);
}

async fn live(every: Duration) {
    let mut beat = tokio::time::interval(every);
    loop {
        beat.tick().await;
        tell(NotifyState::Watchdog);
    }
}

fn tell(state: NotifyState<'_>) {
    if let Err(e) = sd_notify::notify(&[state]) {
        tracing::warn!("systemd could not be told how the server is: {e}");
    }
}
