//! A store that counts what is asked of it, and answers as a test wishes.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use nbd_server::store::{Body, Condition, Key, Object, SharedStore, Store, StoreError, Version};
use nbd_server::units::ByteRange;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;

/// What happens to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// As usual.
    Served,
    /// Nothing happens, and the caller is told so.
    Failed,
    /// It happens, and the caller is told that it did not.
    LandedUnseen,
    /// Nothing happens, and the caller is told that it did: of a put or an upload.
    Pretended,
    /// It never ends.
    Stuck,
}

type Judge = Box<dyn FnMut(&str, &Key) -> Fate + Send>;

/// Wraps a store. Operations are named as the trait's methods.
pub struct Watched {
    pub inner: SharedStore,
    counts: Mutex<BTreeMap<String, usize>>,
    judge: Mutex<Judge>,
    pub delay: Mutex<Duration>,
    gates: Mutex<BTreeMap<&'static str, watch::Receiver<bool>>>,
    stuck: Notify,
}

impl std::fmt::Debug for Watched {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Watched")
    }
}

impl Watched {
    pub fn new(inner: impl Store + 'static) -> Self {
        Self {
            inner: Arc::new(inner),
            counts: Mutex::default(),
            judge: Mutex::new(Box::new(|_, _| Fate::Served)),
            delay: Mutex::default(),
            gates: Mutex::default(),
            stuck: Notify::new(),
        }
    }

    /// How often an operation was asked for.
    pub fn count(&self, operation: &str) -> usize {
        self.counts.lock().unwrap().get(operation).copied().unwrap_or(0)
    }

    pub fn forget_counts(&self) {
        self.counts.lock().unwrap().clear();
    }

    /// Decides every call from now on.
    pub fn judge(&self, judge: impl FnMut(&str, &Key) -> Fate + Send + 'static) {
        *self.judge.lock().unwrap() = Box::new(judge);
    }

    pub fn serve_all(&self) {
        self.judge(|_, _| Fate::Served);
    }

    pub fn outage(&self) {
        self.judge(|_, _| Fate::Failed);
    }

    /// For so long, heads are not written and all else is served: as by a store that throttles writes.
    pub fn throttle_heads(&self, duration: Duration) {
        let end = Instant::now() + duration;
        self.judge(move |op, key| {
            let head = op == "put" && key.as_str().ends_with("volume.json");
            if head && Instant::now() < end { Fate::Failed } else { Fate::Served }
        });
    }

    /// What `work` comes to; `None` once a call of the store is stuck, with which it ends.
    pub async fn until_stuck<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            done = work => Some(done),
            () = self.stuck.notified() => None,
        }
    }

    /// Lets no "get_range" or "upload" begin until the gate opens.
    pub fn hold_until(&self, operation: &'static str, gate: watch::Receiver<bool>) {
        self.gates.lock().unwrap().insert(operation, gate);
    }

    async fn pass_gate(&self, operation: &str) {
        let gate = self.gates.lock().unwrap().get(operation).cloned();
        if let Some(mut gate) = gate {
            // Nobody is left to open it: the test is over.
            let _ = gate.wait_for(|open| *open).await;
        }
    }

    async fn decide<T>(
        &self,
        operation: &'static str,
        key: &Key,
        call: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        self.decide_write(operation, key, None, call).await
    }

    /// As `decide`, for a call that has an answer even if it does nothing.
    async fn decide_write<T>(
        &self,
        operation: &'static str,
        key: &Key,
        pretence: Option<T>,
        call: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        *self.counts.lock().unwrap().entry(operation.to_owned()).or_default() += 1;
        let delay = *self.delay.lock().unwrap();
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        let failed = || StoreError::Unavailable { operation, key: key.clone(), source: "as the test wishes".into() };
        let fate = (self.judge.lock().unwrap())(operation, key);
        match fate {
            Fate::Served => call.await,
            Fate::Failed => Err(failed()),
            Fate::LandedUnseen => call.await.and_then(|_| Err(failed())),
            Fate::Pretended => Ok(pretence.expect("only a write can be pretended")),
            Fate::Stuck => {
                self.stuck.notify_one();
                std::future::pending().await
            }
        }
    }
}

#[async_trait::async_trait]
impl Store for Watched {
    async fn get(&self, key: &Key, max_bytes: u64) -> Result<Object, StoreError> {
        self.decide("get", key, self.inner.get(key, max_bytes)).await
    }

    async fn get_range(&self, key: &Key, range: ByteRange) -> Result<Bytes, StoreError> {
        self.pass_gate("get_range").await;
        self.decide("get_range", key, self.inner.get_range(key, range)).await
    }

    async fn len(&self, key: &Key) -> Result<u64, StoreError> {
        self.decide("len", key, self.inner.len(key)).await
    }

    async fn put(&self, key: &Key, bytes: Bytes, condition: Condition) -> Result<Version, StoreError> {
        let pretence = Some(Version("pretended".into()));
        self.decide_write("put", key, pretence, self.inner.put(key, bytes, condition)).await
    }

    async fn upload(&self, key: &Key, max_bytes: u64, body: Body<'_>) -> Result<(), StoreError> {
        self.pass_gate("upload").await;
        self.decide_write("upload", key, Some(()), self.inner.upload(key, max_bytes, body)).await
    }

    async fn list(&self, prefix: &Key) -> Result<Vec<Key>, StoreError> {
        self.decide("list", prefix, self.inner.list(prefix)).await
    }

    async fn list_folders(&self, prefix: &Key) -> Result<Vec<String>, StoreError> {
        self.decide("list_folders", prefix, self.inner.list_folders(prefix)).await
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        self.decide("delete", key, self.inner.delete(key)).await
    }
}
