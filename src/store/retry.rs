//! Patience with a store that has a bad moment: exponential backoff with full jitter, bounded in time and in number.
//!
//! Repeated is only what may be repeated without anybody noticing: reads, listings, deletes, and puts that overwrite
//! whatever is there. A conditional put is passed on **once**, always: after an unclear answer the object may be one's
//! own, and only the caller can tell, who then waits by the same [`RetryPolicy`]. An upload is passed on once too, since its
//! stream cannot be read again; the backend repeats its parts with the same policy.

use std::fmt::Debug;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;

use super::health::{Health, Outage};
use super::{Body, BoxError, Condition, Key, Object, SharedStore, Store, StoreError, Version};
use crate::clock::Clock;
use crate::sabotage::{Rule, breaks};
use crate::units::ByteRange;

/// How long a request is repeated that does not set another limit: the default of `--store-timeout`.
pub const DEFAULT_LIMIT: Duration = Duration::from_secs(60);
/// The upper end of the first delay.
pub const DEFAULT_FIRST_DELAY: Duration = Duration::from_millis(100);
/// The upper end of any delay.
pub const DEFAULT_MAX_DELAY: Duration = Duration::from_secs(5);
/// The most attempts at one request: ends the loop even if the clock stands still.
pub const MAX_ATTEMPTS: u32 = 10_000;

/// When to try again, and when to give up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetryPolicy {
    /// From the first attempt to giving up.
    pub limit: Duration,
    /// The first delay is random between zero and this; each further upper end is twice the one before.
    pub first_delay: Duration,
    /// The upper end stops growing here.
    pub max_delay: Duration,
}

impl Default for RetryPolicy {
    fn default() -> Self {
        Self { limit: DEFAULT_LIMIT, first_delay: DEFAULT_FIRST_DELAY, max_delay: DEFAULT_MAX_DELAY }
    }
}

/// What happens to an attempt that is still under way when the time is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Overtime {
    /// It is abandoned: somebody waits for the answer.
    Cut,
    /// It may finish, since it has bounds of its own; there is just no further one.
    Finish,
    /// The same for a transfer, of which there are at least so many attempts. After one that took longer than the limit, as
    /// on a slow link, the limit counts anew, until `in_all` has passed; attempts that fail at once end within the limit.
    Transfer { at_least: u32, in_all: Duration },
}

/// The name of a request, for its errors.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Request<'a> {
    pub(crate) operation: &'static str,
    pub(crate) key: &'a Key,
}

impl Request<'_> {
    /// The request may succeed later.
    pub(crate) fn unavailable(self, source: impl Into<BoxError>) -> StoreError {
        StoreError::Unavailable { operation: self.operation, key: self.key.clone(), source: source.into() }
    }

    /// The object ends before what is asked of it does.
    pub(crate) fn short(self, source: impl Into<BoxError>) -> StoreError {
        StoreError::Short { key: self.key.clone(), source: source.into() }
    }

    /// The request will never succeed.
    pub(crate) fn refused(self, source: impl Into<BoxError>) -> StoreError {
        StoreError::Refused { operation: self.operation, key: self.key.clone(), source: source.into() }
    }
}

/// Why the last attempt was the last.
#[derive(Debug, thiserror::Error)]
#[error("gave up after {attempts} attempts in {:.1} s: {source}", elapsed.as_secs_f64())]
struct GaveUp {
    attempts: u32,
    elapsed: Duration,
    source: BoxError,
}

impl RetryPolicy {
    /// The longest pause after the given number of failures, which is at least one.
    fn ceiling(&self, failures: u32) -> Duration {
        // The shift is capped where any delay has long reached its maximum.
        self.first_delay.saturating_mul(1 << failures.saturating_sub(1).min(30)).min(self.max_delay)
    }

    /// The patience of one request, which begins now.
    pub(crate) fn patience(self, clock: &dyn Clock) -> Patience<'_> {
        Patience { policy: self, clock, begun: clock.monotonic(), extended: Duration::ZERO, failures: 0, at_least: 1 }
    }

    /// Repeats `attempt` while it ends as [`StoreError::Unavailable`] and there is time for another one; what each
    /// came to is noted in `health`.
    pub(crate) async fn run<T, F>(
        &self,
        clock: &dyn Clock,
        health: &Health,
        request: Request<'_>,
        overtime: Overtime,
        mut attempt: impl FnMut() -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        let mut patience = self.patience(clock);
        loop {
            let outcome = match overtime {
                Overtime::Cut => patience.cut(request, attempt()).await,
                Overtime::Finish => attempt().await,
                Overtime::Transfer { at_least, in_all } => {
                    let begun = patience.elapsed();
                    let outcome = attempt().await;
                    patience.at_least = at_least;
                    patience.extend(begun, in_all);
                    outcome
                }
            };
            health.note(clock.now(), &outcome);
            match outcome {
                Err(failure @ StoreError::Unavailable { .. }) => patience.pause_after(failure).await?,
                outcome => return outcome,
            }
            health.note_retry();
        }
    }
}

/// What is left of the patience with one request: the only way to wait between two attempts.
///
/// Who sends a conditional put again, having read what stands there, waits by it too.
#[derive(Debug)]
pub(crate) struct Patience<'a> {
    policy: RetryPolicy,
    clock: &'a dyn Clock,
    begun: Duration,
    /// How much later than after the limit it ends.
    extended: Duration,
    failures: u32,
    /// How many attempts there are, however long each takes.
    at_least: u32,
}

impl Patience<'_> {
    fn elapsed(&self) -> Duration {
        self.clock.monotonic().saturating_sub(self.begun)
    }

    fn left(&self) -> Duration {
        (self.policy.limit + self.extended).saturating_sub(self.elapsed())
    }

    /// Counts the limit anew if the attempt that began so long after the first one took longer than it; at most until
    /// `in_all` has passed.
    fn extend(&mut self, begun: Duration, in_all: Duration) {
        let elapsed = self.elapsed();
        if elapsed.saturating_sub(begun) > self.policy.limit {
            self.extended = elapsed.min(in_all.saturating_sub(self.policy.limit));
        }
    }

    /// How long a request is repeated.
    pub(crate) fn limit(&self) -> Duration {
        self.policy.limit
    }

    /// Whether no attempt has failed yet.
    pub(crate) fn is_fresh(&self) -> bool {
        self.failures == 0
    }

    /// Makes one attempt, and abandons it when the time is up.
    pub(crate) async fn cut<T>(
        &self,
        request: Request<'_>,
        attempt: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        tokio::select! {
            biased;
            outcome = attempt => outcome,
            () = self.clock.sleep(self.left()) => Err(request.unavailable("no answer before the time was up")),
        }
    }

    /// Waits before the next attempt; the failure comes back, with how long it was tried, if there is no time for another.
    pub(crate) async fn pause_after(&mut self, failure: StoreError) -> Result<(), StoreError> {
        self.failures += 1;
        // Full jitter: servers that lost the same store must not come back in step.
        let drawn = rand::random_range(Duration::ZERO..=self.policy.ceiling(self.failures));
        let left = self.left();
        let time_is_up = left <= self.policy.first_delay && self.failures >= self.at_least;
        // A long delay does not use up the time for a last attempt.
        let delay = if left.is_zero() { drawn } else { drawn.min(left / 2) };
        if time_is_up || self.failures >= MAX_ATTEMPTS {
            return Err(self.gave_up(failure));
        }
        tracing::debug!(failures = self.failures, ?delay, error = %failure, "the store did not answer; trying again");
        self.clock.sleep(delay).await;
        Ok(())
    }

    fn gave_up(&self, failure: StoreError) -> StoreError {
        match failure {
            StoreError::Unavailable { operation, key, source } if self.failures > 1 => {
                let source = Box::new(GaveUp { attempts: self.failures, elapsed: self.elapsed(), source });
                StoreError::Unavailable { operation, key, source }
            }
            failure => failure,
        }
    }
}

/// A store that is asked again when it does not answer.
#[derive(Debug)]
pub struct Retrying {
    inner: SharedStore,
    policy: RetryPolicy,
    clock: Arc<dyn Clock>,
    health: Arc<Health>,
}

impl Retrying {
    /// Wraps a store.
    #[must_use]
    pub fn new(inner: SharedStore, policy: RetryPolicy, clock: Arc<dyn Clock>) -> Self {
        let health = Arc::new(Health::new(clock.now()));
        Self { inner, policy, clock, health }
    }

    /// Notes in `health` how the store does: one that its backend shares knows of the parts of an upload, too.
    #[must_use]
    pub fn reporting_to(self, health: Arc<Health>) -> Self {
        Self { health, ..self }
    }

    async fn repeat<T, F>(
        &self,
        operation: &'static str,
        key: &Key,
        overtime: Overtime,
        attempt: impl FnMut() -> F,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, StoreError>>,
    {
        self.policy.run(&*self.clock, &self.health, Request { operation, key }, overtime, attempt).await
    }

    /// The patience with one request that the caller repeats, from now on.
    pub(crate) fn patience(&self) -> Patience<'_> {
        self.policy.patience(&*self.clock)
    }

    /// Reads a range of what was not published: unlike for [`Store::get_range`], a refusal is final.
    pub(crate) async fn get_range_unless_refused(&self, key: &Key, range: ByteRange) -> Result<Bytes, StoreError> {
        self.repeat("get", key, Overtime::Cut, || self.inner.get_range(key, range)).await
    }

    /// Removes an object in one attempt.
    pub(crate) async fn delete_once(&self, key: &Key) -> Result<(), StoreError> {
        self.patience().cut(Request { operation: "delete", key }, self.inner.delete(key)).await
    }

    /// Of what is passed on once.
    fn noted<T>(&self, outcome: Result<T, StoreError>) -> Result<T, StoreError> {
        self.health.note(self.clock.now(), &outcome);
        outcome
    }
}

#[async_trait::async_trait]
impl Store for Retrying {
    async fn get(&self, key: &Key, max_bytes: u64) -> Result<Object, StoreError> {
        self.repeat("get", key, Overtime::Cut, || self.inner.get(key, max_bytes)).await
    }

    async fn get_range(&self, key: &Key, range: ByteRange) -> Result<Bytes, StoreError> {
        // A refusal, too: what is read in ranges was published to this store and is named by what it served, so credentials
        // that expired, a clock or a policy that is wrong may be put right, as an outage passes.
        let attempt = || async { self.inner.get_range(key, range).await.map_err(StoreError::for_now) };
        self.repeat("get", key, Overtime::Cut, attempt).await
    }

    async fn len(&self, key: &Key) -> Result<u64, StoreError> {
        self.repeat("head", key, Overtime::Cut, || self.inner.len(key)).await
    }

    async fn put(&self, key: &Key, bytes: Bytes, condition: Condition) -> Result<Version, StoreError> {
        match condition {
            Condition::Always => {
                let put = || self.inner.put(key, bytes.clone(), Condition::Always);
                self.repeat("put", key, Overtime::Cut, put).await
            }
            conditional if breaks(Rule::RetryConditionalPut) => {
                let put = || self.inner.put(key, bytes.clone(), conditional.clone());
                self.repeat("put", key, Overtime::Cut, put).await
            }
            Condition::IfAbsent | Condition::IfVersion(_) => self.noted(self.inner.put(key, bytes, condition).await),
        }
    }

    async fn upload(&self, key: &Key, max_bytes: u64, body: Body<'_>) -> Result<(), StoreError> {
        self.noted(self.inner.upload(key, max_bytes, body).await)
    }

    // A long listing makes many requests, each with bounds of its own; together they may take longer than one may.
    async fn list(&self, prefix: &Key) -> Result<Vec<Key>, StoreError> {
        self.repeat("list", prefix, Overtime::Finish, || self.inner.list(prefix)).await
    }

    async fn list_folders(&self, prefix: &Key) -> Result<Vec<String>, StoreError> {
        self.repeat("list", prefix, Overtime::Finish, || self.inner.list_folders(prefix)).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.repeat("delete", key, Overtime::Cut, || self.inner.delete(key)).await
    }

    fn outage(&self) -> Option<Outage> {
        self.health.outage()
    }
}

#[cfg(test)]
mod tests;
