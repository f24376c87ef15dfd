use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::*;
use crate::store::remote::RemoteStore;
use crate::store::{Body, Object, SharedStore};
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
    Down,
}

#[derive(Debug)]
struct Flawed {
    inner: RemoteStore,
    flaw: Flaw,
    puts: AtomicUsize,
}

impl Flawed {
    fn new(flaw: Flaw) -> Self {
        Self { inner: RemoteStore::memory(), flaw, puts: AtomicUsize::new(0) }
    }
}

#[async_trait::async_trait]
impl Store for Flawed {
    async fn get(&self, key: &Key, max_bytes: u64) -> Result<Object, StoreError> {
        let mut object = self.inner.get(key, max_bytes).await?;
        if self.flaw == Flaw::OtherTagOnRead {
            object.version.0.insert_str(0, "W/");
        }
        Ok(object)
    }

    async fn put(&self, key: &Key, bytes: Bytes, condition: Condition) -> Result<Version, StoreError> {
        self.puts.fetch_add(1, Ordering::Relaxed);
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
            (Flaw::Down, _) => {
                let source = "down".into();
                return Err(StoreError::Unavailable { operation: "put", key: key.clone(), source });
            }
            (_, condition) => condition,
        };
        self.inner.put(key, bytes, condition).await
    }

    async fn get_range(&self, key: &Key, range: ByteRange) -> Result<Bytes, StoreError> {
        self.inner.get_range(key, range).await
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
        self.inner.delete(key).await
    }
}

fn root() -> ExportRoot {
    ExportRoot::new("exports".parse().unwrap())
}

/// The probe's verdict on a store, which must be left empty.
async fn verdict(flaw: Flaw) -> Result<(), ProbeError> {
    let store = Flawed::new(flaw);
    let verdict = probe(&store, &root()).await;
    assert_eq!(store.list(root().prefix()).await.unwrap(), [], "{flaw:?} left objects behind");
    verdict
}

#[tokio::test]
async fn a_store_that_keeps_its_promises_passes_and_is_left_empty() {
    verdict(Flaw::None).await.unwrap();
}

#[tokio::test]
async fn each_broken_promise_is_found_and_named() {
    for (flaw, expected) in [
        (Flaw::IgnoresIfAbsent, Finding::ExistingReplaced),
        (Flaw::IgnoresIfVersion, Finding::StaleReplaced),
        (Flaw::RefusesSwaps, Finding::CurrentRefused),
        (Flaw::RefusesCreation, Finding::NewRefused),
        (Flaw::OtherTagOnRead, Finding::VersionDiffers),
        (Flaw::Races, Finding::Winners(RACERS)),
    ] {
        match verdict(flaw).await.unwrap_err() {
            error @ ProbeError::Unfit { finding, .. } => {
                assert_eq!(finding, expected, "{flaw:?}");
                assert!(error.to_string().contains(&finding.to_string()), "{error}");
            }
            ProbeError::Store(e) => panic!("{flaw:?}: {e}"),
        }
    }
    assert!(matches!(verdict(Flaw::ForgetsWrites).await, Err(ProbeError::Unfit { .. })));
}

#[tokio::test]
async fn a_store_that_does_not_answer_is_not_called_unfit() {
    let store = Flawed::new(Flaw::Down);
    let error = probe(&store, &root()).await.unwrap_err();
    assert!(matches!(error, ProbeError::Store(StoreError::Unavailable { .. })), "{error}");
    assert_eq!(store.puts.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn servers_that_start_together_do_not_disturb_each_other() {
    let store: SharedStore = Arc::new(RemoteStore::memory());
    let root = root();
    for outcome in join_all((0..16).map(|_| probe(&*store, &root))).await {
        outcome.unwrap();
    }
}
