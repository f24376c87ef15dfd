use std::sync::Mutex;
use std::time::SystemTime;

use futures_util::stream;
use object_store::PutResult;
use proptest::prelude::*;
use tokio::time::Instant;

use super::super::MIN_BYTES_PER_SECOND;
use super::*;
use crate::clock::Clock;
use crate::store::parts::MIN_PART_BYTES;

proptest! {
    #[test]
    fn cutting_keeps_every_byte_in_order_and_all_parts_but_the_last_full(
        lengths in prop::collection::vec(0usize..50, 0..40),
        part_bytes in 1u64..70,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let mut counter = 0u8;
        let pieces: Vec<Bytes> = lengths
            .iter()
            .map(|len| (0..*len).map(|_| { counter = counter.wrapping_add(1); counter }).collect())
            .collect();
        let whole: Vec<u8> = pieces.concat();
        let (parts, total) = runtime.block_on(cut(pieces, part_bytes));
        prop_assert_eq!(total, whole.len() as u64);
        prop_assert_eq!(parts.concat(), whole);
        let full = parts.iter().take(parts.len().saturating_sub(1)).all(|part| part.len() as u64 == part_bytes);
        prop_assert!(full && parts.iter().all(|part| !part.is_empty()));
    }
}

/// All parts of a body, and the total it came to.
async fn cut(pieces: Vec<Bytes>, part_bytes: u64) -> (Vec<Vec<u8>>, u64) {
    let key: Key = "blob".parse().unwrap();
    let body = stream::iter(pieces.into_iter().map(Ok)).boxed();
    let mut cutter = Cutter { body, rest: Bytes::new(), total: 0, max_bytes: u64::MAX };
    let mut parts = Vec::new();
    loop {
        // Asking whether it has ended must not lose a byte.
        let ended = cutter.ended(&key).await.unwrap();
        let part = cutter.part(&key, part_bytes).await.unwrap();
        assert_eq!(ended, part.len == 0);
        assert_eq!(part.pieces.iter().map(|piece| piece.len() as u64).sum::<u64>(), part.len);
        if ended {
            return (parts, cutter.total);
        }
        parts.push(part.pieces.concat());
    }
}

#[tokio::test]
async fn pieces_are_cut_without_being_copied() {
    let key: Key = "blob".parse().unwrap();
    let piece = Bytes::from(vec![7; 100]);
    let body = stream::iter([Ok(piece.clone())]).boxed();
    let mut cutter = Cutter { body, rest: Bytes::new(), total: 0, max_bytes: u64::MAX };
    for offset in [0, 40, 80] {
        let part = cutter.part(&key, 40).await.unwrap();
        assert_eq!(part.pieces[0].as_ptr(), piece[offset..].as_ptr());
    }
}

/// The runtime's paused time.
#[derive(Debug)]
struct PausedClock(Instant);

#[async_trait::async_trait]
impl Clock for PausedClock {
    fn now(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + self.0.elapsed()
    }

    fn monotonic(&self) -> Duration {
        self.0.elapsed()
    }

    async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }
}

/// A store behind a link of [`MIN_BYTES_PER_SECOND`] that all parts under way share evenly. It takes parts and forgets them.
#[derive(Debug, Default)]
struct SlowLink {
    /// Held by each part that is under way.
    link: Arc<()>,
    sent: Mutex<Vec<usize>>,
    /// How many of the parts, once they have arrived, get no answer but a reset.
    resets: Mutex<usize>,
    /// Whether there is nobody at its end.
    down: bool,
}

impl SlowLink {
    async fn carry(&self, mut bytes: u64) {
        let _under_way = Arc::clone(&self.link);
        while bytes > 0 {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let sharing = Arc::strong_count(&self.link) as u64 - 1;
            bytes = bytes.saturating_sub(MIN_BYTES_PER_SECOND / sharing);
        }
    }
}

#[async_trait::async_trait]
impl MultipartStore for SlowLink {
    async fn create_multipart(&self, _: &Path) -> object_store::Result<MultipartId> {
        Ok("u1".into())
    }

    async fn put_part(&self, _: &Path, _: &MultipartId, part: usize, data: PutPayload) -> object_store::Result<PartId> {
        let failure = |why: &'static str| object_store::Error::Generic { store: "link", source: why.into() };
        if self.down {
            return Err(failure("down"));
        }
        self.sent.lock().unwrap().push(part);
        self.carry(data.content_length() as u64).await;
        let mut resets = self.resets.lock().unwrap();
        if *resets > 0 {
            *resets -= 1;
            return Err(failure("reset"));
        }
        Ok(PartId { content_id: part.to_string() })
    }

    async fn complete_multipart(&self, _: &Path, _: &MultipartId, _: Vec<PartId>) -> object_store::Result<PutResult> {
        Ok(PutResult { e_tag: None, version: None, extensions: object_store::Extensions::default() })
    }

    async fn abort_multipart(&self, _: &Path, _: &MultipartId) -> object_store::Result<()> {
        Ok(())
    }
}

/// Uploads parts of the usual size over the link; how long that took.
async fn upload_over(parts: Arc<SlowLink>, count: usize) -> (Result<(), StoreError>, Duration) {
    let clock = Arc::new(PausedClock(Instant::now()));
    let store = RemoteStore { parts, clock, keeps_payloads: false, ..RemoteStore::memory() };
    let part = Bytes::from(vec![7; usize::try_from(MIN_PART_BYTES).unwrap()]);
    let body = stream::iter(std::iter::repeat_n(part, count).map(Ok)).boxed();
    // What the parts become, as far as it is looked at: its length.
    let whole = Bytes::from(vec![0; usize::try_from(MIN_PART_BYTES).unwrap() * count]);
    store.objects.put(&Path::from("blob"), whole.into()).await.unwrap();
    let begun = Instant::now();
    (upload(&store, &"blob".parse().unwrap(), MIN_PART_BYTES * count as u64, body).await, begun.elapsed())
}

#[tokio::test(start_paused = true)]
async fn parts_that_share_the_slowest_link_there_may_be_all_arrive_at_the_first_attempt() {
    let link = Arc::new(SlowLink::default());
    let count = 2 * PARTS_IN_FLIGHT + 1;
    let (uploaded, took) = upload_over(Arc::clone(&link), count).await;
    uploaded.unwrap();
    assert_eq!(link.sent.lock().unwrap().len(), count, "each was sent once");
    assert!(took.as_secs() >= count as u64 * MIN_PART_BYTES / MIN_BYTES_PER_SECOND, "{took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_part_that_was_lost_after_a_long_way_is_sent_again() {
    let link = Arc::new(SlowLink { resets: Mutex::new(PARTS_IN_FLIGHT), ..SlowLink::default() });
    upload_over(Arc::clone(&link), PARTS_IN_FLIGHT).await.0.unwrap();
    assert_eq!(link.sent.lock().unwrap().len(), 2 * PARTS_IN_FLIGHT);
}

#[tokio::test(start_paused = true)]
async fn an_upload_to_a_store_that_fails_at_once_ends_within_store_timeout() {
    let link = Arc::new(SlowLink { down: true, ..SlowLink::default() });
    let (uploaded, took) = upload_over(link, PARTS_IN_FLIGHT).await;
    assert!(matches!(uploaded, Err(StoreError::Unavailable { .. })), "{uploaded:?}");
    assert!(took <= crate::store::retry::DEFAULT_LIMIT, "{took:?}");
}
