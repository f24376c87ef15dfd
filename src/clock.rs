#![allow(clippy::disallowed_methods, reason = "this is the seam")]
//! The time, as a seam: production reads the system's clocks, tests bring their own.

use std::fmt::Debug;
use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime};

/// What the server asks of time: the date for manifests, how long something lasts, and waits between retries.
#[async_trait::async_trait]
pub trait Clock: Debug + Send + Sync {
    /// The date and time of day now, from 1970 to 9999: what can be written as RFC 3339, and as HTTP's date.
    fn now(&self) -> SystemTime;
    /// How long it is since a moment that stays the same while the process lives. It never goes back, whatever becomes of
    /// the date: limits are measured by it.
    fn monotonic(&self) -> Duration;
    /// Returns once `duration` has passed.
    async fn sleep(&self, duration: Duration);
}

/// The system's own clock.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemClock;

#[async_trait::async_trait]
impl Clock for SystemClock {
    fn now(&self) -> SystemTime {
        within_calendar(SystemTime::now())
    }

    fn monotonic(&self) -> Duration {
        static BEGINNING: LazyLock<Instant> = LazyLock::new(Instant::now);
        BEGINNING.elapsed()
    }

    async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }
}

/// The last second of the year 9999.
const LAST_SECOND: Duration = Duration::from_secs(253_402_300_799);

/// A clock that is set to no date at all stands at the first or the last there is.
fn within_calendar(date: SystemTime) -> SystemTime {
    date.clamp(SystemTime::UNIX_EPOCH, SystemTime::UNIX_EPOCH + LAST_SECOND)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_date_before_1970_or_after_9999_is_the_first_or_the_last_there_is() {
        let (first, day) = (SystemTime::UNIX_EPOCH, Duration::from_secs(86_400));
        for (date, expected) in [
            (first - day, first),
            (first, first),
            (first + day, first + day),
            (first + LAST_SECOND, first + LAST_SECOND),
            (first + LAST_SECOND + day, first + LAST_SECOND),
            (first + Duration::from_secs(1 << 60), first + LAST_SECOND),
        ] {
            assert_eq!(within_calendar(date), expected);
        }
    }
}
