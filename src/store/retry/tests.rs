use std::collections::VecDeque;
use std::sync::Mutex;
use std::time::SystemTime;

use futures_util::StreamExt;

use super::*;

/// A clock on which waiting takes no time, and which remembers every wait.
#[derive(Debug)]
struct FakeClock {
    date: Mutex<SystemTime>,
    /// What becomes of the date during a wait, beyond what passes.
    step: fn(SystemTime) -> SystemTime,
    waits: Mutex<Vec<Duration>>,
}

impl FakeClock {
    fn new() -> Arc<Self> {
        Self::whose_date_steps(|date| date)
    }

    fn whose_date_steps(step: fn(SystemTime) -> SystemTime) -> Arc<Self> {
        // Far enough from 1970 for the date to go back.
        let date = SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 40);
        Arc::new(Self { date: Mutex::new(date), step, waits: Mutex::default() })
    }

    fn waits(&self) -> Vec<Duration> {
        self.waits.lock().unwrap().clone()
    }
}

#[async_trait::async_trait]
impl Clock for FakeClock {
    fn now(&self) -> SystemTime {
        *self.date.lock().unwrap()
    }

    fn monotonic(&self) -> Duration {
        self.waits.lock().unwrap().iter().sum()
    }

    async fn sleep(&self, duration: Duration) {
        let mut date = self.date.lock().unwrap();
        *date = (self.step)(*date + duration);
        self.waits.lock().unwrap().push(duration);
    }
}

/// What the scripted store does with one request.
#[derive(Debug, Clone, Copy)]
enum Step {
    Serve,
    Outage,
    Refuse,
    Conflict,
    Silence,
}

/// A store that follows a script, and then repeats its last step for ever.
#[derive(Debug)]
struct Scripted {
    script: Mutex<VecDeque<Step>>,
    calls: Mutex<Vec<&'static str>>,
}

impl Scripted {
    fn new(script: &[Step]) -> Arc<Self> {
        Arc::new(Self { script: Mutex::new(script.iter().copied().collect()), calls: Mutex::default() })
    }

    fn calls(&self) -> usize {
        self.calls.lock().unwrap().len()
    }

    async fn step<T>(&self, operation: &'static str, key: &Key, served: T) -> Result<T, StoreError> {
        self.calls.lock().unwrap().push(operation);
        let step = {
            let mut script = self.script.lock().unwrap();
            if script.len() > 1 { script.pop_front().unwrap() } else { script[0] }
        };
        let request = Request { operation, key };
        match step {
            Step::Serve => Ok(served),
            Step::Outage => Err(request.unavailable("the lights are out")),
            Step::Refuse => Err(request.refused("go away")),
            Step::Conflict => Err(StoreError::Conflict { key: key.clone() }),
            Step::Silence => std::future::pending().await,
        }
    }
}

#[async_trait::async_trait]
impl Store for Scripted {
    async fn get(&self, key: &Key, _: u64) -> Result<Object, StoreError> {
        self.step("get", key, Object { bytes: "it".into(), version: Version("1".into()) }).await
    }
    async fn get_range(&self, key: &Key, _: ByteRange) -> Result<Bytes, StoreError> {
        self.step("get", key, "it".into()).await
    }
    async fn len(&self, key: &Key) -> Result<u64, StoreError> {
        self.step("head", key, 2).await
    }
    async fn put(&self, key: &Key, _: Bytes, _: Condition) -> Result<Version, StoreError> {
        self.step("put", key, Version("2".into())).await
    }
    async fn upload(&self, key: &Key, _: u64, _: Body<'_>) -> Result<(), StoreError> {
        self.step("upload", key, ()).await
    }
    async fn list(&self, prefix: &Key) -> Result<Vec<Key>, StoreError> {
        self.step("list", prefix, Vec::new()).await
    }
    async fn list_folders(&self, prefix: &Key) -> Result<Vec<String>, StoreError> {
        self.step("list", prefix, Vec::new()).await
    }
    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.step("delete", key, ()).await
    }
}

fn retrying(store: &Arc<Scripted>) -> (Retrying, Arc<FakeClock>) {
    retrying_by(store, FakeClock::new())
}

fn retrying_by(store: &Arc<Scripted>, clock: Arc<FakeClock>) -> (Retrying, Arc<FakeClock>) {
    (Retrying::new(store.clone(), RetryPolicy::default(), clock.clone()), clock)
}

fn key() -> Key {
    "exports/vm/volume.json".parse().unwrap()
}

/// Every call of the trait that may be repeated, by name.
async fn call(store: &dyn Store, name: &str) -> Result<(), StoreError> {
    let range = ByteRange::new(0, 2).unwrap();
    match name {
        "get" => store.get(&key(), 9).await.map(drop),
        "get_range" => store.get_range(&key(), range).await.map(drop),
        "len" => store.len(&key()).await.map(drop),
        "list" => store.list(&key()).await.map(drop),
        "list_folders" => store.list_folders(&key()).await.map(drop),
        "delete" => store.delete(&key()).await,
        "put" => store.put(&key(), "x".into(), Condition::Always).await.map(drop),
        other => unreachable!("{other}"),
    }
}

const REPEATABLE: [&str; 7] = ["get", "get_range", "len", "list", "list_folders", "delete", "put"];

#[tokio::test]
async fn what_may_be_repeated_is_repeated_until_it_succeeds() {
    for name in REPEATABLE {
        let store = Scripted::new(&[Step::Outage, Step::Outage, Step::Outage, Step::Serve]);
        let (retrying, clock) = retrying(&store);
        call(&retrying, name).await.unwrap();
        assert_eq!(store.calls(), 4, "{name}");
        // A request that is cut at the limit also starts a wait for the limit, which a ready answer outruns.
        assert_eq!(clock.waits().len(), 3, "{name}");
    }
}

#[tokio::test]
async fn an_outage_ends_as_an_error_within_the_limit_that_says_how_often_and_how_long() {
    for name in REPEATABLE {
        let store = Scripted::new(&[Step::Outage]);
        let (retrying, clock) = retrying(&store);
        let error = call(&retrying, name).await.unwrap_err();
        let waited: Duration = clock.waits().iter().sum();
        assert!(waited < DEFAULT_LIMIT, "{name} waited {waited:?}");
        assert!(waited > DEFAULT_LIMIT - DEFAULT_MAX_DELAY * 2, "{name} gave up after {waited:?} already");
        let text = error.to_string();
        let said =
            format!("gave up after {} attempts in {:.1} s: the lights are out", store.calls(), waited.as_secs_f64());
        assert!(matches!(error, StoreError::Unavailable { .. }) && text.contains(&said), "{text} / {said}");
    }
}

#[tokio::test]
async fn setting_the_date_makes_no_request_give_up_sooner_or_later() {
    const HOUR: Duration = Duration::from_secs(3600);
    let back: fn(SystemTime) -> SystemTime = |date| date - HOUR;
    let forward: fn(SystemTime) -> SystemTime = |date| date + HOUR;
    for step in [back, forward] {
        let store = Scripted::new(&[Step::Outage]);
        let (retrying, clock) = retrying_by(&store, FakeClock::whose_date_steps(step));
        retrying.get(&key(), 9).await.unwrap_err();
        let waited: Duration = clock.waits().iter().sum();
        assert!(waited < DEFAULT_LIMIT, "waited {waited:?}");
        assert!(waited > DEFAULT_LIMIT - DEFAULT_MAX_DELAY * 2, "gave up after {waited:?} already");
    }
}

#[tokio::test]
async fn a_store_that_never_answers_is_left_when_the_time_is_up() {
    for name in ["get", "get_range", "delete", "put"] {
        let store = Scripted::new(&[Step::Silence]);
        let (retrying, clock) = retrying(&store);
        let error = call(&retrying, name).await.unwrap_err();
        assert!(error.to_string().contains("no answer before the time was up"), "{error}");
        assert_eq!((store.calls(), clock.waits()), (1, vec![DEFAULT_LIMIT]), "{name}");
    }
}

#[tokio::test]
async fn an_answer_is_an_answer_and_is_not_asked_for_again() {
    for name in REPEATABLE {
        for answer in [Step::Refuse, Step::Conflict] {
            if name == "get_range" && matches!(answer, Step::Refuse) {
                continue;
            }
            let store = Scripted::new(&[answer]);
            let (retrying, clock) = retrying(&store);
            call(&retrying, name).await.unwrap_err();
            assert_eq!((store.calls(), clock.waits().len()), (1, 0), "{name}");
        }
    }
}

#[tokio::test]
async fn a_read_of_published_data_that_is_refused_waits_until_it_is_not() {
    let store = Scripted::new(&[Step::Refuse, Step::Refuse, Step::Serve]);
    let (served, _) = retrying(&store);
    let reading = call(&served, "get_range");
    reading.await.unwrap();
    assert_eq!((store.calls(), served.outage()), (3, None));

    let (refused, clock) = retrying(&Scripted::new(&[Step::Refuse]));
    let error = call(&refused, "get_range").await.unwrap_err();
    assert!(matches!(error, StoreError::Unavailable { .. }) && error.to_string().ends_with("go away"), "{error}");
    let waited: Duration = clock.waits().iter().sum();
    assert!(waited < DEFAULT_LIMIT && waited > DEFAULT_LIMIT - DEFAULT_MAX_DELAY * 2, "{waited:?}");
    let outage = refused.outage().unwrap();
    assert!(outage.last_error.ends_with("go away"), "{}", outage.last_error);
}

#[tokio::test]
async fn a_short_limit_is_used_to_its_end() {
    for _ in 0..300 {
        let (store, clock) = (Scripted::new(&[Step::Outage]), FakeClock::new());
        let policy = RetryPolicy { limit: Duration::from_secs(5), ..RetryPolicy::default() };
        let retrying = Retrying::new(store.clone(), policy, clock.clone());
        retrying.get(&key(), 9).await.unwrap_err();
        let waited = clock.monotonic();
        assert!(waited < policy.limit && waited >= policy.limit - DEFAULT_FIRST_DELAY, "{waited:?}");
        assert!(store.calls() < 100, "{}", store.calls());
    }
}

/// How often a transfer is sent, and how long that takes, if each attempt fails after `takes`.
async fn transfer(takes: Duration) -> (u32, Duration) {
    let (clock, policy) = (FakeClock::new(), RetryPolicy { limit: Duration::from_secs(5), ..RetryPolicy::default() });
    let key = key();
    let request = Request { operation: "upload", key: &key };
    let attempts = std::cell::Cell::new(0);
    let attempt = || async {
        attempts.set(attempts.get() + 1);
        clock.sleep(takes).await;
        Err::<(), _>(request.unavailable("507 Insufficient Storage"))
    };
    let overtime = Overtime::Transfer { at_least: 2, in_all: Duration::from_secs(90) };
    let health = Health::new(clock.now());
    policy.run(&*clock, &health, request, overtime, attempt).await.unwrap_err();
    (attempts.get(), clock.monotonic())
}

#[tokio::test]
async fn a_transfer_that_fails_at_once_ends_within_the_limit_and_a_slow_one_later() {
    let (attempts, took) = transfer(Duration::ZERO).await;
    assert!(attempts >= 2 && took <= Duration::from_secs(5), "{attempts} in {took:?}");
    let (attempts, took) = transfer(Duration::from_secs(20)).await;
    assert!(attempts >= 4 && took < Duration::from_secs(90 + 20), "{attempts} in {took:?}");
    let (attempts, took) = transfer(Duration::from_secs(100)).await;
    assert!(attempts == 2 && took < Duration::from_secs(205), "{attempts} in {took:?}");
}

#[tokio::test]
async fn a_conditional_put_is_one_request_whatever_comes_of_it() {
    for condition in [Condition::IfAbsent, Condition::IfVersion(Version("1".into()))] {
        for step in [Step::Outage, Step::Conflict, Step::Refuse] {
            let store = Scripted::new(&[step, Step::Serve]);
            let (retrying, clock) = retrying(&store);
            retrying.put(&key(), "x".into(), condition.clone()).await.unwrap_err();
            assert_eq!((store.calls(), clock.waits().len()), (1, 0), "{condition:?}");
        }
    }
}

#[tokio::test]
async fn an_upload_is_passed_on_once_since_its_stream_cannot_be_read_again() {
    let store = Scripted::new(&[Step::Outage, Step::Serve]);
    let (retrying, _) = retrying(&store);
    retrying.upload(&key(), 9, futures_util::stream::empty().boxed()).await.unwrap_err();
    assert_eq!(store.calls(), 1);
}

#[tokio::test]
async fn every_call_tells_of_an_outage_and_of_its_end() {
    for name in REPEATABLE.into_iter().chain(["conditional put", "upload"]) {
        let store = Scripted::new(&[Step::Outage]);
        let (retrying, clock) = retrying(&store);
        let begun = clock.now();
        match name {
            "conditional put" => drop(retrying.put(&key(), "x".into(), Condition::IfAbsent).await.unwrap_err()),
            "upload" => drop(retrying.upload(&key(), 9, futures_util::stream::empty().boxed()).await.unwrap_err()),
            name => drop(call(&retrying, name).await.unwrap_err()),
        }
        let outage = retrying.outage().expect(name);
        assert_eq!((outage.since, outage.last_error.contains("the lights are out")), (begun, true), "{name}");
        store.script.lock().unwrap().push_back(Step::Serve);
        let _ = call(&retrying, "get").await;
        assert_eq!(retrying.outage(), None, "{name}");
    }
}

#[test]
fn the_ceiling_of_the_delays_doubles_up_to_its_maximum() {
    let policy = RetryPolicy::default();
    let ceilings: Vec<u128> = (1..=9).map(|failures| policy.ceiling(failures).as_millis()).collect();
    assert_eq!(ceilings, [100, 200, 400, 800, 1_600, 3_200, 5_000, 5_000, 5_000]);
    assert_eq!(policy.ceiling(u32::MAX), DEFAULT_MAX_DELAY);
}

#[tokio::test]
async fn delays_grow_and_are_spread_over_all_of_zero_to_their_ceiling() {
    let policy = RetryPolicy::default();
    let mut by_turn = vec![Vec::new(); 6];
    for _ in 0..300 {
        let store = Scripted::new(&[Step::Outage]);
        let (retrying, clock) = retrying(&store);
        retrying.get(&key(), 9).await.unwrap_err();
        let waits = clock.waits();
        by_turn.iter_mut().zip(waits).for_each(|(seen, wait)| seen.push(wait));
    }
    for (failures, seen) in (1..).zip(by_turn) {
        let ceiling = policy.ceiling(failures);
        assert!(seen.iter().all(|wait| *wait <= ceiling), "delay {failures} beyond {ceiling:?}");
        // With 300 draws the chance that a tenth of the span stays empty is below 10⁻¹³.
        assert!(seen.iter().any(|wait| *wait < ceiling / 10), "delay {failures} is never short");
        assert!(seen.iter().any(|wait| *wait > ceiling - ceiling / 10), "delay {failures} never grows");
    }
}

#[tokio::test]
async fn attempts_are_bounded_even_if_the_clock_stands_still() {
    /// Time does not pass, so no limit of time is ever reached.
    #[derive(Debug)]
    struct Standing;
    #[async_trait::async_trait]
    impl Clock for Standing {
        fn now(&self) -> SystemTime {
            SystemTime::UNIX_EPOCH
        }
        fn monotonic(&self) -> Duration {
            Duration::ZERO
        }
        async fn sleep(&self, _: Duration) {}
    }
    let store = Scripted::new(&[Step::Outage]);
    let retrying = Retrying::new(store.clone(), RetryPolicy::default(), Arc::new(Standing));
    retrying.get(&key(), 9).await.unwrap_err();
    assert_eq!(store.calls(), MAX_ATTEMPTS as usize);
}
