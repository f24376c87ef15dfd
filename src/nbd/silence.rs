//! How long a client has been silent.
//!
//! Promises: a silence is noticed after [`LOOK`] times [`SILENT_LOOKS`] at most, and once; one that ended counts no more,
//! however long it was.

use std::time::Duration;

use tokio::time::{Interval, MissedTickBehavior, interval};

/// How often a connection looks whether its client has been silent since it last looked. A timer for each receive would cost
/// more than this.
const LOOK: Duration = Duration::from_secs(3);
/// So many looks in a row that found nothing are a silence.
const SILENT_LOOKS: u32 = 2;

/// A watch over the receives of a connection.
#[derive(Debug)]
pub(super) struct Silence {
    looks: Interval,
    /// How many looks in a row found that nothing had been received since.
    silent: u32,
}

impl Silence {
    pub(super) fn new() -> Self {
        let mut looks = interval(LOOK);
        // After a silence was noticed nobody looks. Looks that were left out then would be made up for in a row.
        looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { looks, silent: 0 }
    }

    /// Something was received.
    pub(super) fn is_broken(&mut self) {
        self.silent = 0;
    }

    /// Whether this silence has been noticed.
    pub(super) fn was_noticed(&self) -> bool {
        self.silent >= SILENT_LOOKS
    }

    /// Returns when there is a silence to be noticed. Giving it up loses nothing.
    pub(super) async fn lasts(&mut self) {
        while !self.was_noticed() {
            self.looks.tick().await;
            self.silent += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::time::{advance, timeout};

    #[tokio::test(start_paused = true)]
    async fn a_silence_is_noticed_once_and_one_that_ended_counts_no_more() {
        let mut silence = Silence::new();
        for _ in 0..3 {
            timeout(LOOK * SILENT_LOOKS, silence.lasts()).await.expect("noticed");
            assert!(silence.was_noticed());
            advance(Duration::from_secs(3600)).await;
            // A client that goes on asking is not silent, whatever was before.
            for _ in 0..10 {
                silence.is_broken();
                let noticed = timeout(LOOK / 2, silence.lasts()).await;
                assert!(noticed.is_err() && !silence.was_noticed());
            }
        }
    }
}
