//! What a listener does when the system gives it no connection: a client gave up, or descriptors have run out. Neither is a
//! reason to stop serving others, and neither may fill the log.

use std::fmt::Display;
use std::io;
use std::time::Duration;

use tokio::time::{Instant, sleep};

/// The pause before the next try.
const PAUSE: Duration = Duration::from_millis(100);
/// A failure so long after the last one is another episode, and worth a line of its own.
const QUIET: Duration = Duration::from_secs(60);

/// The failures of one listener.
#[derive(Debug, Default)]
pub struct Failures {
    last: Option<Instant>,
}

impl Failures {
    /// Takes note of a failure, which is logged once per episode, and waits until another try makes sense.
    pub async fn pass(&mut self, listener: impl Display, error: io::Error) {
        if self.is_news() {
            tracing::warn!("{listener} cannot accept a client: {error}; it is tried until it works");
        }
        sleep(PAUSE).await;
    }

    fn is_news(&mut self) -> bool {
        let last = self.last.replace(Instant::now());
        last.is_none_or(|last| last.elapsed() > QUIET)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_episode_is_news_once_however_long_it_lasts() {
        let mut failures = Failures::default();
        for _ in 0..2 {
            assert!(failures.is_news());
            for _ in 0..5 {
                sleep(QUIET).await;
                assert!(!failures.is_news());
            }
            sleep(QUIET + PAUSE).await;
        }
    }
}
