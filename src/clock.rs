#![allow(clippy::disallowed_methods, reason = "this is the seam")]
//! The time, as a seam: production reads the system's clocks, tests bring their own.

use std::fmt::Debug;
use std::sync::LazyLock;
use std::time::{Duration, Instant, SystemTime};

/// What the server asks of time: the date for manifests, how long something lasts, and waits between retries.
#[async_trait::async_trait]
pub trait Clock: Debug + Send + Sync {
    /// The date and time of day now.
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
        SystemTime::now()
    }

    fn monotonic(&self) -> Duration {
        static BEGINNING: LazyLock<Instant> = LazyLock::new(Instant::now);
        BEGINNING.elapsed()
    }

    async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }
}
