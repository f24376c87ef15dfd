//! The simulated host's store: of one host, or shared by several.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use nbd_server::store::{Body, Condition, Key, Object, Store, StoreError, Version};
use nbd_server::units::ByteRange;

use super::faults::StoreFault;
use super::{Inner, Sim, StoredObject};

/// "Every call is bounded in time by the implementation": after this long a stalled one fails.
const BACKEND_LIMIT: Duration = Duration::from_secs(600);

type Meanwhile = Box<dyn FnMut(&str, &Key) -> Option<Pin<Box<dyn Future<Output = ()> + Send>>> + Send>;

/// A put whose caller has given up on it.
#[derive(Debug)]
struct LatePut {
    due: usize,
    key: Key,
    bytes: Bytes,
    condition: Condition,
}

#[derive(Clone)]
pub struct SimStore {
    sim: Arc<Sim>,
    late: Arc<Mutex<Vec<LatePut>>>,
    meanwhile: Arc<Mutex<Option<Meanwhile>>>,
}

impl std::fmt::Debug for SimStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SimStore")
    }
}

fn unavailable(operation: &'static str, key: &Key) -> StoreError {
    StoreError::Unavailable { operation, key: key.clone(), source: "as the test wishes".into() }
}

impl Inner {
    fn put(&mut self, key: &Key, bytes: Bytes, condition: &Condition) -> Result<Version, StoreError> {
        let there = self.walk.live.objects.get(key).map(|object| object.version.to_string());
        let holds = match condition {
            Condition::Always => true,
            Condition::IfAbsent => there.is_none(),
            Condition::IfVersion(version) => there.as_ref() == Some(&version.0),
        };
        if !holds {
            return Err(StoreError::Conflict { key: key.clone() });
        }
        let print = blake3::hash(&bytes);
        Ok(self.change_objects(|objects, version| {
            objects.insert(key.clone(), StoredObject { bytes, version, print });
            Version(version.to_string())
        }))
    }
}

impl SimStore {
    pub fn new(sim: Arc<Sim>) -> Self {
        Self { sim, late: Arc::default(), meanwhile: Arc::default() }
    }

    /// What happens while a call is under way: runs before the call does, at that very place of the timeline.
    pub fn meanwhile(
        &self,
        what: impl FnMut(&str, &Key) -> Option<Pin<Box<dyn Future<Output = ()> + Send>>> + Send + 'static,
    ) {
        *self.meanwhile.lock().unwrap() = Some(Box::new(what));
    }

    /// What was given up by its caller and has not happened yet, happens now.
    pub fn land_late_puts(&self) {
        self.land(usize::MAX);
    }

    fn land(&self, now: usize) {
        let mut late = self.late.lock().unwrap();
        let (due, later) = std::mem::take(&mut *late).into_iter().partition(|put| put.due <= now);
        *late = later;
        for LatePut { key, bytes, condition, .. } in due {
            // Nobody hears of it.
            let _ = self.sim.0.lock().unwrap().put(&key, bytes, &condition);
        }
    }

    /// The fault of the next call, after what comes before it.
    async fn begin(&self, operation: &'static str, key: &Key) -> Result<Option<StoreFault>, StoreError> {
        let meanwhile = self.meanwhile.lock().unwrap().as_mut().and_then(|what| what(operation, key));
        if let Some(meanwhile) = meanwhile {
            meanwhile.await;
        }
        let (fault, now) = {
            let faults = &mut self.sim.0.lock().unwrap().faults;
            (faults.next_store_call(), faults.store_calls)
        };
        self.land(now);
        match fault {
            Some(StoreFault::Before) => Err(unavailable(operation, key)),
            Some(StoreFault::Stall) => {
                tokio::time::sleep(BACKEND_LIMIT).await;
                Err(unavailable(operation, key))
            }
            fault => Ok(fault),
        }
    }

    /// As [`begin`](Self::begin) for a call that changes nothing and brings no content.
    async fn begin_plain(&self, operation: &'static str, key: &Key) -> Result<bool, StoreError> {
        match self.begin(operation, key).await? {
            None | Some(StoreFault::Conflict | StoreFault::ConflictWithItself) => Ok(true),
            Some(StoreFault::LandedUnseen) => Ok(false),
            Some(_) => Err(unavailable(operation, key)),
        }
    }

    async fn begin_read(&self, key: &Key) -> Result<(Bytes, u64, Option<StoreFault>), StoreError> {
        let fault = self.begin("get", key).await?;
        let inner = self.sim.0.lock().unwrap();
        let object = inner.walk.live.objects.get(key).ok_or_else(|| StoreError::NotFound { key: key.clone() })?;
        match fault {
            Some(StoreFault::LandedUnseen | StoreFault::Late(_)) => Err(unavailable("get", key)),
            // A backend hears of a short body by its length.
            Some(StoreFault::ShortBody) => Err(unavailable("get", key)),
            fault => Ok((object.bytes.clone(), object.version, fault)),
        }
    }

    async fn write(
        &self,
        operation: &'static str,
        key: &Key,
        bytes: Bytes,
        condition: Condition,
    ) -> Result<Version, StoreError> {
        let fault = self.begin(operation, key).await?;
        let inner = &mut *self.sim.0.lock().unwrap();
        match fault {
            None => inner.put(key, bytes, &condition),
            Some(StoreFault::Conflict) if condition != Condition::Always => {
                Err(StoreError::Conflict { key: key.clone() })
            }
            Some(StoreFault::ConflictWithItself) if condition != Condition::Always => {
                inner.put(key, bytes, &condition)?;
                Err(StoreError::Conflict { key: key.clone() })
            }
            Some(StoreFault::Conflict | StoreFault::ConflictWithItself) => inner.put(key, bytes, &condition),
            Some(StoreFault::LandedUnseen) => {
                inner.put(key, bytes, &condition)?;
                Err(unavailable(operation, key))
            }
            Some(StoreFault::Late(calls)) => {
                let due = inner.faults.store_calls + calls;
                self.late.lock().unwrap().push(LatePut { due, key: key.clone(), bytes, condition });
                Err(unavailable(operation, key))
            }
            Some(_) => Err(unavailable(operation, key)),
        }
    }
}

fn garbled(bytes: &Bytes) -> Bytes {
    bytes.iter().map(|byte| byte.wrapping_add(1)).collect::<Vec<u8>>().into()
}

#[async_trait::async_trait]
impl Store for SimStore {
    async fn get(&self, key: &Key, _: u64) -> Result<Object, StoreError> {
        let (bytes, version, fault) = self.begin_read(key).await?;
        let bytes = if fault == Some(StoreFault::WrongBytes) { garbled(&bytes) } else { bytes };
        Ok(Object { bytes, version: Version(version.to_string()) })
    }

    async fn get_range(&self, key: &Key, range: ByteRange) -> Result<Bytes, StoreError> {
        let (bytes, _, fault) = self.begin_read(key).await?;
        let (from, to) = (usize::try_from(range.offset()).unwrap(), usize::try_from(range.end()).unwrap());
        assert!(to <= bytes.len(), "{key} {range}");
        let bytes = bytes.slice(from..to);
        Ok(if fault == Some(StoreFault::WrongBytes) { garbled(&bytes) } else { bytes })
    }

    async fn len(&self, key: &Key) -> Result<u64, StoreError> {
        let (bytes, _, _) = self.begin_read(key).await?;
        Ok(bytes.len() as u64)
    }

    async fn put(&self, key: &Key, bytes: Bytes, condition: Condition) -> Result<Version, StoreError> {
        self.write("put", key, bytes, condition).await
    }

    async fn upload(&self, key: &Key, _: u64, mut body: Body<'_>) -> Result<(), StoreError> {
        let mut whole = Vec::new();
        while let Some(piece) = body.next().await {
            whole.extend_from_slice(&piece.map_err(|source| StoreError::Body { key: key.clone(), source })?);
        }
        self.write("upload", key, whole.into(), Condition::Always).await.map(drop)
    }

    async fn list(&self, prefix: &Key) -> Result<Vec<Key>, StoreError> {
        if !self.begin_plain("list", prefix).await? {
            return Err(unavailable("list", prefix));
        }
        let below = format!("{prefix}/");
        let objects = self.sim.state().objects;
        Ok(objects.keys().filter(|key| key.as_str().starts_with(&below)).cloned().collect())
    }

    async fn list_folders(&self, prefix: &Key) -> Result<Vec<String>, StoreError> {
        let below = format!("{prefix}/");
        let keys = self.list(prefix).await?;
        let names = keys.iter().filter_map(|key| key.as_str().strip_prefix(&below)?.split_once('/'));
        let mut names: Vec<String> = names.map(|(name, _)| name.to_owned()).collect();
        names.dedup();
        Ok(names)
    }

    async fn delete(&self, key: &Key) -> Result<(), StoreError> {
        let told = self.begin_plain("delete", key).await?;
        let inner = &mut *self.sim.0.lock().unwrap();
        if inner.walk.live.objects.contains_key(key) {
            inner.change_objects(|objects, _| objects.remove(key));
        }
        if told { Ok(()) } else { Err(unavailable("delete", key)) }
    }
}
