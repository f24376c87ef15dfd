use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use super::*;
use crate::clock::Clock;
use crate::store::remote::RemoteStore;
use crate::store::retry::RetryPolicy;
use crate::store::{Body, SharedStore};
use crate::units::ByteRange;

/// How a store goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flaw {
    None,
    /// Takes If-None-Match for decoration.
    IgnoresIfAbsent,
    /// Takes If-Match for decoration.
    IgnoresIfVersion,
    /// Knows no conditions and says so each time.
    RefusesSwaps,
    RefusesCreation,
    /// Serves reads of another version tag than writes, as a compressing proxy may.
    OtherTagOnRead,
    /// Compares, then writes, with a gap between.
    Races,
    /// Keeps what was there.
    ForgetsWrites,
    /// Serves another range than it was asked for.
    OtherRange,
    /// Sends the whole object for a range of it, which is refused.
    IgnoresRanges,
    /// Ends before the range does.
    ShortRanges,
    /// Does not answer when it is asked for a range.
    NoRanges,
    /// Says that the condition does not hold, and writes nevertheless.
    RejectsAndWrites,
}

/// Which requests a store answers with 503.
#[derive(Debug, Clone, Copy)]
enum Throttle {
    None,
    /// Every one of so many, without having carried it out.
    Before(usize),
    /// Every one of so many, although it carried it out.
    After(usize),
    /// All of them.
    All,
}

#[derive(Debug)]
struct Flawed {
    inner: RemoteStore,
    flaw: Flaw,
    throttle: Throttle,
    requests: AtomicUsize,
}

impl Flawed {
    fn new(flaw: Flaw, throttle: Throttle) -> Arc<Self> {
        Arc::new(Self { inner: RemoteStore::memory(), flaw, throttle, requests: AtomicUsize::new(0) })
    }

    /// Carries a request out, and answers it or not.
    async fn throttled<T>(
        &self,
        key: &Key,
        work: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let count = self.requests.fetch_add(1, Ordering::Relaxed) + 1;
        let slow_down = || Err(Request { operation: "request", key }.unavailable("503 SlowDown"));
        match self.throttle {
            Throttle::All => slow_down(),
            Throttle::Before(period) if count.is_multiple_of(period) => slow_down(),
            Throttle::After(period) if count.is_multiple_of(period) => work.await.and_then(|_| slow_down()),
            _ => work.await,
        }
    }

    async fn flawed_put(&self, key: &Key, bytes: Bytes, condition: Condition) -> Result<Version, StoreError> {
        let conflict = || Err(StoreError::Conflict { key: key.clone() });
        let condition = match (self.flaw, condition) {
            (Flaw::IgnoresIfAbsent, Condition::IfAbsent) => Condition::Always,
            (Flaw::IgnoresIfVersion, Condition::IfVersion(_)) => Condition::Always,
            (Flaw::RefusesSwaps, Condition::IfVersion(_)) | (Flaw::RefusesCreation, Condition::IfAbsent) => {
                return conflict();
            }
            (Flaw::Races, condition) => {
                let standing = self.inner.get(key, 1024).await.ok().map(|o| o.version);
                let holds = match condition {
                    Condition::Always => true,
                    Condition::IfAbsent => standing.is_none(),
                    Condition::IfVersion(v) => standing == Some(v),
                };
                if !holds {
                    return conflict();
                }
                tokio::task::yield_now().await;
                Condition::Always
            }
            (Flaw::ForgetsWrites, Condition::IfVersion(_)) => return Ok(Version("new".into())),
            (Flaw::RejectsAndWrites, condition) => {
                if self.inner.put(key, bytes.clone(), condition).await.is_err() {
                    self.inner.put(key, bytes, Condition::Always).await?;
                    return conflict();
                }
                let object = self.inner.get(key, MAX_PROBE_BYTES).await?;
                return Ok(object.version);
            }
            (_, condition) => condition,
        };
        self.inner.put(key, bytes, condition).await
    }
}

/// A clock on which waiting takes no time but as its hands show.
#[derive(Debug, Default)]
struct FakeClock(std::sync::Mutex<Duration>);

#[async_trait::async_trait]
impl Clock for FakeClock {
    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH
    }
    fn monotonic(&self) -> Duration {
        *self.0.lock().unwrap()
    }
    async fn sleep(&self, duration: Duration) {
        // A turn for whatever is waited for beside it.
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        *self.0.lock().unwrap() += duration;
    }
}

fn retrying(store: SharedStore) -> (Retrying, Arc<FakeClock>) {
    let clock = Arc::new(FakeClock::default());
    (Retrying::new(store, RetryPolicy::default(), clock.clone()), clock)
}

#[async_trait::async_trait]
impl Store for Flawed {
    async fn get(&self, key: &Key, max_bytes: u64) -> Result<Object, StoreError> {
        let mut object = self.throttled(key, self.inner.get(key, max_bytes)).await?;
        if self.flaw == Flaw::OtherTagOnRead {
            object.version.0.insert_str(0, "W/");
        }
        Ok(object)
    }

    async fn put(&self, key: &Key, bytes: Bytes, condition: Condition) -> Result<Version, StoreError> {
        self.throttled(key, self.flawed_put(key, bytes, condition)).await
    }

    async fn get_range(&self, key: &Key, range: ByteRange) -> Result<Bytes, StoreError> {
        let request = Request { operation: "get", key };
        self.requests.fetch_add(1, Ordering::Relaxed);
        match self.flaw {
            Flaw::OtherRange => self.inner.get_range(key, range).await.map(|bytes| bytes.slice(1..)),
            Flaw::IgnoresRanges => Err(request.refused("it ignores ranges")),
            Flaw::ShortRanges => Err(request.short("it ends at byte 3")),
            Flaw::NoRanges => Err(request.unavailable("503 SlowDown")),
            _ => self.inner.get_range(key, range).await,
        }
    }
    async fn len(&self, key: &Key) -> Result<u64, StoreError> {
        self.inner.len(key).await
    }
    async fn upload(&self, key: &Key, max_bytes: u64, body: Body<'_>) -> Result<(), StoreError> {
        self.inner.upload(key, max_bytes, body).await
    }
    async fn list(&self, prefix: &Key) -> Result<Vec<Key>, StoreError> {
        self.inner.list(prefix).await
    }
    async fn list_folders(&self, prefix: &Key) -> Result<Vec<String>, StoreError> {
        self.inner.list_folders(prefix).await
    }
    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.throttled(key, self.inner.delete(key)).await
    }
}

fn root() -> ExportRoot {
    ExportRoot::new("exports".parse().unwrap())
}

/// The probe's verdict on a store, which must be left empty.
async fn verdict(flaw: Flaw, throttle: Throttle) -> Result<(), ProbeError> {
    let store = Flawed::new(flaw, throttle);
    let (retrying, clock) = retrying(store.clone());
    let verdict = probe(&retrying, &root()).await;
    assert_eq!(store.list(root().prefix()).await.unwrap(), [], "{flaw:?}, {throttle:?} left objects behind");
    let (requests, took) = (store.requests.load(Ordering::Relaxed), clock.monotonic());
    assert!(requests <= 60 && took <= Duration::from_secs(5), "{flaw:?}, {throttle:?}: {requests} in {took:?}");
    verdict
}

fn throttles() -> impl Iterator<Item = Throttle> {
    (4..=7).flat_map(|period| [Throttle::Before(period), Throttle::After(period)]).chain([Throttle::None])
}

#[tokio::test]
async fn a_store_that_keeps_its_promises_passes_and_is_left_empty() {
    verdict(Flaw::None, Throttle::None).await.unwrap();
}

#[tokio::test]
async fn a_throttled_store_that_keeps_its_promises_passes_within_seconds() {
    for throttle in throttles() {
        verdict(Flaw::None, throttle).await.unwrap();
    }
}

#[tokio::test]
async fn each_broken_promise_is_found_and_named_even_if_requests_are_throttled() {
    for (flaw, expected) in [
        (Flaw::IgnoresIfAbsent, Finding::ExistingReplaced),
        (Flaw::IgnoresIfVersion, Finding::StaleReplaced),
        (Flaw::RefusesSwaps, Finding::CurrentRefused),
        (Flaw::RefusesCreation, Finding::NewRefused),
        (Flaw::OtherTagOnRead, Finding::VersionDiffers),
        (Flaw::RejectsAndWrites, Finding::ExistingReplaced),
        (Flaw::OtherRange, Finding::WrongRange),
        (Flaw::IgnoresRanges, Finding::WrongRange),
        (Flaw::ShortRanges, Finding::WrongRange),
        (Flaw::Races, Finding::Winners(RACERS)),
        (Flaw::ForgetsWrites, Finding::StaleReplaced),
    ] {
        for throttle in throttles() {
            match verdict(flaw, throttle).await.unwrap_err() {
                error @ ProbeError::Unfit { finding, .. } => {
                    let as_expected = match (finding, expected) {
                        // The others had no answer.
                        (Finding::Winners(winners), Finding::Winners(_)) => winners > 1,
                        // A version that was read, as no put was answered with one, is not taken for the condition either.
                        (Finding::CurrentRefused, Finding::VersionDiffers) => !matches!(throttle, Throttle::None),
                        (finding, expected) => finding == expected,
                    };
                    assert!(as_expected, "{flaw:?}, {throttle:?}: {finding}");
                    assert!(error.to_string().contains(&finding.to_string()), "{error}");
                }
                ProbeError::Store(e) => panic!("{flaw:?}, {throttle:?}: {e}"),
            }
        }
    }
}

#[tokio::test]
async fn a_store_that_does_not_answer_is_not_called_unfit() {
    let store = Flawed::new(Flaw::None, Throttle::All);
    let (retrying, clock) = retrying(store.clone());
    let error = probe(&retrying, &root()).await.unwrap_err();
    assert!(matches!(error, ProbeError::Store(StoreError::Unavailable { .. })), "{error}");
    // After the first pause the put is settled by a read, which is repeated for as long as any.
    let limit = retrying.patience().limit() + crate::store::retry::DEFAULT_FIRST_DELAY;
    assert!(clock.monotonic() <= limit, "{:?}", clock.monotonic());
}

#[tokio::test]
async fn a_store_that_stops_answering_after_a_put_is_left_empty_too() {
    let store = Flawed::new(Flaw::NoRanges, Throttle::None);
    let (retrying, _) = retrying(store.clone());
    let error = probe(&retrying, &root()).await.unwrap_err();
    assert!(matches!(error, ProbeError::Store(StoreError::Unavailable { .. })), "{error}");
    assert_eq!(store.list(root().prefix()).await.unwrap(), []);
}

#[tokio::test]
async fn servers_that_start_together_do_not_disturb_each_other() {
    let store = retrying(Arc::new(RemoteStore::memory())).0;
    let root = root();
    for outcome in join_all((0..16).map(|_| probe(&store, &root))).await {
        outcome.unwrap();
    }
}
