//! A store with the speed of object storage: so long until the first byte, so fast from then on, so many streams at a time.
//! It also tells which ranges were asked for, in order, and can keep its answers back.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use futures_util::stream::{self, StreamExt};
use nbd_server::store::parts::{PARTS_IN_FLIGHT, part_bytes};
use nbd_server::store::{Body, Condition, Key, Object, SharedStore, Store, StoreError, Version};
use nbd_server::units::ByteRange;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

/// How fast a store is.
#[derive(Debug, Clone, Copy)]
pub struct Shape {
    pub first_byte: Duration,
    pub stream_bytes_per_second: u64,
    pub streams: usize,
    /// Whether blobs are forgotten once they are here: what is measured is the way up, not this machine's memory.
    pub forgets_blobs: bool,
}

impl Shape {
    /// A bucket in the same region.
    pub const BUCKET: Self = Self {
        first_byte: Duration::from_millis(25),
        stream_bytes_per_second: 100 << 20,
        streams: 16,
        forgets_blobs: false,
    };

    /// How long one stream is busy with so many bytes.
    pub fn time(&self, bytes: u64) -> Duration {
        self.first_byte + Duration::from_secs_f64(bytes as f64 / self.stream_bytes_per_second as f64)
    }
}

/// Wraps a store.
pub struct Shaped {
    inner: SharedStore,
    shape: Shape,
    streams: Arc<Semaphore>,
    asked: Mutex<Vec<ByteRange>>,
    answering: watch::Sender<bool>,
}

impl std::fmt::Debug for Shaped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shaped")
    }
}

impl Shaped {
    pub fn new(inner: SharedStore, shape: Shape) -> Self {
        let (streams, answering) = (Arc::new(Semaphore::new(shape.streams)), watch::Sender::new(true));
        Self { inner, shape, streams, asked: Mutex::default(), answering }
    }

    /// The ranges asked for so far, in order.
    pub fn asked(&self) -> Vec<ByteRange> {
        self.asked.lock().unwrap().clone()
    }

    pub fn forget_asked(&self) {
        self.asked.lock().unwrap().clear();
    }

    /// Range reads are asked for and get no answer until they do again.
    pub fn answer(&self, answering: bool) {
        self.answering.send_replace(answering);
    }

    async fn take(&self, bytes: u64) {
        occupy(&self.streams, self.shape.time(bytes)).await;
    }
}

async fn occupy(streams: &Semaphore, time: Duration) {
    let _stream = streams.acquire().await.unwrap();
    if !time.is_zero() {
        tokio::time::sleep(time).await;
    }
}

#[async_trait::async_trait]
impl Store for Shaped {
    async fn get(&self, key: &Key, max_bytes: u64) -> Result<Object, StoreError> {
        let object = self.inner.get(key, max_bytes).await?;
        self.take(object.bytes.len() as u64).await;
        Ok(object)
    }

    async fn get_range(&self, key: &Key, range: ByteRange) -> Result<Bytes, StoreError> {
        self.asked.lock().unwrap().push(range);
        self.answering.subscribe().wait_for(|answering| *answering).await.unwrap();
        self.take(range.len()).await;
        self.inner.get_range(key, range).await
    }

    async fn len(&self, key: &Key) -> Result<u64, StoreError> {
        self.take(0).await;
        self.inner.len(key).await
    }

    async fn put(&self, key: &Key, bytes: Bytes, condition: Condition) -> Result<Version, StoreError> {
        self.take(bytes.len() as u64).await;
        self.inner.put(key, bytes, condition).await
    }

    /// In parts as the real one's, each on a stream of its own, as many at a time as that sends.
    async fn upload(&self, key: &Key, max_bytes: u64, mut body: Body<'_>) -> Result<(), StoreError> {
        let (mut sent, mut arrived) = (JoinSet::new(), BTreeMap::new());
        let (mut pieces, mut gathered, mut ended) = (Vec::new(), 0, false);
        while !ended {
            let piece =
                body.next().await.transpose().map_err(|source| StoreError::Body { key: key.clone(), source })?;
            ended = piece.is_none();
            gathered += piece.as_ref().map_or(0, Bytes::len);
            pieces.extend(piece);
            if ended || gathered as u64 >= part_bytes(max_bytes) {
                let (streams, time) = (self.streams.clone(), self.shape.time(std::mem::take(&mut gathered) as u64));
                let (index, part) = (arrived.len() + sent.len(), std::mem::take(&mut pieces));
                let forgets = self.shape.forgets_blobs;
                sent.spawn(async move {
                    occupy(&streams, time).await;
                    (index, if forgets { Bytes::new() } else { Bytes::from(part.concat()) })
                });
            }
            while sent.len() >= PARTS_IN_FLIGHT || (ended && !sent.is_empty()) {
                arrived.extend(sent.join_next().await.map(Result::unwrap));
            }
        }
        self.inner.upload(key, max_bytes, stream::iter(arrived.into_values().map(Ok)).boxed()).await
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
