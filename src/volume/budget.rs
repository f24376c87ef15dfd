//! What fetches and publishes may use of memory and of the store's streams, over all volumes of a server, and who goes first.
//!
//! A fetch that a client waits for takes its turn (`turns`): one of [`FETCHES`] places, and memory from a budget of which
//! background work has half at most, held or in line for. It has a core to check the chunk that only clients' fetches take. So it queues behind one that nobody
//! waits for only where clients use more than their own half. Background work (read-ahead, prefetch, compaction) fetches with
//! few streams, fewer while clients' fetches are under way, and a publish lets clients go first; neither gives way for ever.
//!
//! A publish owns as much memory as its upload needs to go on at all, and beyond that takes what is free. So publishes never
//! wait for each other in a circle, and many at a time queue for their beginning, not in their middle.
//! Buffers that are kept to be used again are part of the budget, too: they give way to memory in use, whosever that is.

use std::ops::{Deref, DerefMut};
use std::sync::{Arc, Weak};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, SemaphorePermit, watch};

use super::turns::{Place, Turn, Turns};
use crate::cache::aside::AsideMemory;
use crate::clock::Clock;
use crate::disk::DIRECT_ALIGNMENT;
use crate::slices::SLICE_BYTES;
use crate::units::ExportId;

/// The most bytes of chunks on their way from the store to the disk, over all volumes of a server.
pub const FILL_BUDGET_BYTES: u64 = 256 << 20;
/// The most fetches into caches under way at a time, over all volumes of a server: with small chunks the bytes alone would allow
/// tens of thousands, each with a connection to the store. Object storage gives its best to far fewer. Those of compactions are
/// among `BACKGROUND_FETCHES` and come on top.
pub const FETCHES: u32 = 256;
/// The part of the bytes for chunks that nobody waits for yet.
pub const BACKGROUND_BYTES: u64 = FILL_BUDGET_BYTES / 2;
/// The most fetches under way for which one begins that nobody waits for, over all volumes of a server: object storage gives
/// about its best to so many streams.
pub const BACKGROUND_FETCHES: u32 = 16;
/// How long one background fetch gives way to clients' fetches before it runs beside them.
pub const BACKGROUND_PATIENCE: Duration = Duration::from_secs(1);
/// How long a publish gives way to clients before it takes up its next chunk.
pub const PUBLISH_PATIENCE: Duration = Duration::from_millis(100);
/// The most bytes of chunks that publishes hold, over all of a server, unless it is told otherwise: between disk and upload, and set
/// aside. An upload whose
/// parts are larger has one of them beyond it.
pub const DEFAULT_PUBLISH_BYTES: u64 = 256 << 20;

/// What part of that is for blocks that clients change before a publish has read them. Neither waits for the other's part: the
/// blocks of a publish that has yet to get its share could hold what it waits for.
const ASIDE_PART: u64 = 8;

const PERMIT_BYTES: u64 = 4 << 10;

fn permits(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(PERMIT_BYTES)).unwrap_or(u32::MAX)
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// What goes on now.
#[derive(Debug, Clone, Copy, Default)]
struct Now {
    /// Requests of clients that wait for a missing chunk.
    waiting: u32,
    /// Requests to the store for chunks.
    fetches: u32,
}

type Counter = fn(&mut Now) -> &mut u32;

/// What all fetches of a server share.
#[derive(Debug)]
pub(crate) struct FillBudget {
    turns: Arc<Turns>,
    background_memory: Arc<Semaphore>,
    background_streams: Arc<Semaphore>,
    cores: Semaphore,
    background_cores: Semaphore,
    now: watch::Sender<Now>,
    clock: Arc<dyn Clock>,
}

impl FillBudget {
    /// A budget that nothing has been taken from.
    pub(crate) fn new(clock: Arc<dyn Clock>) -> Arc<Self> {
        Arc::new(Self {
            turns: Turns::new(FETCHES as usize, FILL_BUDGET_BYTES),
            background_memory: Arc::new(Semaphore::new(permits(BACKGROUND_BYTES) as usize)),
            background_streams: Arc::new(Semaphore::new(BACKGROUND_FETCHES as usize)),
            cores: Semaphore::new(cores()),
            background_cores: Semaphore::new(cores()),
            now: watch::Sender::default(),
            clock,
        })
    }

    /// Waits until a fetch of `bytes` for the cache of an export may begin.
    pub(super) async fn turn(&self, export_id: &ExportId, bytes: u64) -> Option<Turn> {
        // A chunk has at most 64 MiB, a quarter of the budget, so none waits for ever.
        self.turns.take(export_id, bytes).await
    }

    /// One of the processor's cores, to check the hash of a chunk that a client waits for, or of one that none does. Chunks that
    /// arrive together are checked one after the other on each: all at once, the first would be done no sooner than the last.
    pub(super) async fn core(&self, for_client: bool) -> Option<SemaphorePermit<'_>> {
        if for_client { &self.cores } else { &self.background_cores }.acquire().await.ok()
    }

    /// A client waits for a chunk while this lives.
    pub(super) fn client_waits(self: &Arc<Self>) -> Counted {
        self.count(|now| &mut now.waiting)
    }

    /// A stream for a fetch that a client waits for, once that has its turn.
    pub(super) fn stream(self: &Arc<Self>) -> Stream {
        Stream { _fetch: self.count(|now| &mut now.fetches), background: None, _place: None }
    }

    /// Waits until a fetch of `bytes` that nobody waits for has its turn. The memory is its own until it drops the permit.
    pub(super) async fn background(self: &Arc<Self>, bytes: u64) -> (Option<OwnedSemaphorePermit>, Stream) {
        let memory = Arc::clone(&self.background_memory).acquire_many_owned(permits(bytes)).await.ok();
        let background = Arc::clone(&self.background_streams).acquire_owned().await.ok();
        let mut now = self.now.subscribe();
        tokio::select! {
            biased;
            _ = now.wait_for(|now| now.fetches < BACKGROUND_FETCHES) => {}
            () = self.clock.sleep(BACKGROUND_PATIENCE) => {}
        }
        (memory, Stream { _fetch: self.count(|now| &mut now.fetches), background, _place: None })
    }

    /// Waits while clients wait for missing chunks, for a limited time.
    pub(super) async fn let_clients_go_first(&self) {
        let mut now = self.now.subscribe();
        tokio::select! {
            biased;
            _ = now.wait_for(|now| now.waiting == 0) => {}
            () = self.clock.sleep(PUBLISH_PATIENCE) => {}
        }
    }

    fn count(self: &Arc<Self>, counter: Counter) -> Counted {
        self.now.send_modify(|now| *counter(now) += 1);
        Counted { budget: Arc::clone(self), counter }
    }
}

/// Counts as long as it lives.
#[derive(Debug)]
pub(super) struct Counted {
    budget: Arc<FillBudget>,
    counter: Counter,
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.budget.now.send_modify(|now| {
            let count = (self.counter)(now);
            *count = count.saturating_sub(1);
        });
    }
}

/// One of the store's streams; it is free again once the bytes are here.
#[derive(Debug)]
pub(super) struct Stream {
    _fetch: Counted,
    background: Option<OwnedSemaphorePermit>,
    _place: Option<Place>,
}

impl Stream {
    /// With a place among the fetches under way, which is free again when the stream is.
    pub(super) fn in_place(self, place: Place) -> Self {
        Self { _place: Some(place), ..self }
    }

    /// Whether a client waits for what comes over it.
    pub(super) fn is_for_client(&self) -> bool {
        self.background.is_none()
    }
}

/// What all publishes of a server share: memory, and the processor's cores.
#[derive(Debug)]
pub(crate) struct PublishBudget {
    free: Arc<Semaphore>,
    all: u32,
    spare: Mutex<Weak<Mutex<Spare>>>,
    aside: Arc<AsideMemory>,
    cores: Semaphore,
}

impl PublishBudget {
    /// A budget of so many bytes.
    pub(crate) fn new(bytes: u64) -> Self {
        let aside = bytes / ASIDE_PART;
        let all = permits(bytes - aside).max(1);
        let (free, cores) = (Arc::new(Semaphore::new(all as usize)), Semaphore::new(cores().div_ceil(2)));
        Self { free, all, spare: Mutex::default(), aside: AsideMemory::new(aside), cores }
    }

    /// The part of it for what writers set aside.
    pub(super) fn aside(&self) -> &Arc<AsideMemory> {
        &self.aside
    }

    /// One of the cores for reading and hashing a chunk: half of them are left to the clients.
    pub(super) async fn core(&self) -> Option<SemaphorePermit<'_>> {
        self.cores.acquire().await.ok()
    }

    /// The share of one publish: waits for the `floor` of bytes without which its upload would not go on.
    pub(super) async fn share(&self, floor: u64) -> Arc<PublishShare> {
        let floor = permits(floor);
        let taken = Arc::clone(&self.free).acquire_many_owned(floor.min(self.all)).await.ok();
        let own = Arc::new(Semaphore::new(floor as usize));
        let (free, most) = (Arc::clone(&self.free), floor.max(self.all));
        Arc::new(PublishShare { own, free, _taken: taken, spare: self.spare(), most })
    }

    /// What the publishes under way share; it goes with the last of them.
    fn spare(&self) -> Arc<Mutex<Spare>> {
        let mut shared = self.spare.lock();
        shared.upgrade().unwrap_or_else(|| {
            let new = Arc::default();
            *shared = Arc::downgrade(&new);
            new
        })
    }
}

/// Buffers that were in use before: the kernel need not clear their pages once more. They have what the memory in use leaves of
/// the budget, and give way to it. All sizes are in permits.
#[derive(Debug, Default)]
struct Spare {
    in_use: u32,
    kept: u32,
    buffers: Vec<(u32, Vec<u8>)>,
}

impl Spare {
    /// Memory for a buffer of a size, which was in use before if there is one of just that size.
    fn take(&mut self, size: u32, most: u32) -> Vec<u8> {
        let same = self.buffers.iter().rposition(|(other, _)| *other == size).map(|at| self.buffers.swap_remove(at));
        self.kept -= same.as_ref().map_or(0, |(size, _)| *size);
        self.use_more(size, most);
        same.map(|(_, memory)| memory).unwrap_or_default()
    }

    fn use_more(&mut self, size: u32, most: u32) {
        self.in_use += size;
        while self.in_use + self.kept > most && !self.buffers.is_empty() {
            self.kept -= self.buffers.swap_remove(0).0;
        }
    }

    fn keep(&mut self, size: u32, memory: Vec<u8>) {
        self.in_use -= size;
        self.kept += size;
        self.buffers.push((size, memory));
    }
}

/// What one publish may hold in memory.
#[derive(Debug)]
pub(super) struct PublishShare {
    own: Arc<Semaphore>,
    free: Arc<Semaphore>,
    _taken: Option<OwnedSemaphorePermit>,
    spare: Arc<Mutex<Spare>>,
    /// What may be in use and kept, over all publishes, in permits.
    most: u32,
}

impl PublishShare {
    /// Waits until `bytes` more may be held. Those of one publish ask one after the other.
    pub(super) async fn take(self: &Arc<Self>, bytes: u64) -> Held {
        let size = permits(bytes);
        let at_once = [&self.own, &self.free].into_iter().find_map(|s| Arc::clone(s).try_acquire_many_owned(size).ok());
        let permit = match at_once {
            Some(permit) => Some(permit),
            // What is its own comes back when a part has arrived, and a part is less than all of it.
            None => Arc::clone(&self.own).acquire_many_owned(size).await.ok(),
        };
        Held { _permit: permit, size, share: Arc::clone(self) }
    }
}

/// Memory that a publish holds.
#[derive(Debug)]
pub(super) struct Held {
    _permit: Option<OwnedSemaphorePermit>,
    /// How much it is, in permits.
    size: u32,
    share: Arc<PublishShare>,
}

impl Held {
    /// A buffer of `len` bytes of any content, to read a chunk into.
    pub(super) fn buffer(&self, len: usize) -> Buffer {
        let (size, share) = (self.size, Arc::clone(&self.share));
        let mut memory = share.spare.lock().take(size, share.most);
        let start = lay_out(&mut memory, len);
        Buffer { memory, start, size, share }
    }

    /// The bytes that are held: the memory is free again when the last copy of them is gone.
    pub(super) fn by(self, bytes: impl Into<Holder>) -> Bytes {
        let bytes = bytes.into();
        if let Holder::Fetched(_) = bytes {
            self.share.spare.lock().use_more(self.size, self.share.most);
        }
        Bytes::from_owner(Holding(bytes, self))
    }
}

/// Memory for a chunk. One of a slice or more begins where a local store can write it from past the page cache.
#[derive(Debug)]
pub(super) struct Buffer {
    memory: Vec<u8>,
    start: usize,
    /// What it counts for, in permits.
    size: u32,
    share: Arc<PublishShare>,
}

/// Makes room for `len` bytes in memory that may have been used before, and says where they begin.
fn lay_out(memory: &mut Vec<u8>, len: usize) -> usize {
    let alignment = if len < SLICE_BYTES { 1 } else { DIRECT_ALIGNMENT };
    memory.resize(len + alignment - 1, 0);
    let start = memory.as_ptr().addr().next_multiple_of(alignment) - memory.as_ptr().addr();
    memory.truncate(start + len);
    start
}

impl Drop for Buffer {
    fn drop(&mut self) {
        self.share.spare.lock().keep(self.size, std::mem::take(&mut self.memory));
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.memory[self.start..]
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..]
    }
}

/// What the bytes of a chunk are in.
#[derive(Debug)]
pub(super) enum Holder {
    /// One of the publish's own buffers.
    Buffer(Buffer),
    /// What the store brought.
    Fetched(Bytes),
}

impl From<Buffer> for Holder {
    fn from(buf: Buffer) -> Self {
        Self::Buffer(buf)
    }
}

impl From<Bytes> for Holder {
    fn from(bytes: Bytes) -> Self {
        Self::Fetched(bytes)
    }
}

/// In this order: the memory is counted as no longer in use before somebody else may hold as much.
struct Holding(Holder, Held);

impl AsRef<[u8]> for Holding {
    fn as_ref(&self) -> &[u8] {
        match &self.0 {
            Holder::Buffer(buf) => buf,
            Holder::Fetched(bytes) => bytes,
        }
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        if let Holder::Fetched(bytes) = &mut self.0 {
            *bytes = Bytes::new();
            self.1.share.spare.lock().in_use -= self.1.size;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::Instant;

    use super::*;
    use crate::clock::SystemClock;

    const MIB: u64 = 1 << 20;

    #[tokio::test(start_paused = true)]
    async fn background_fetches_give_way_while_clients_use_the_streams_but_not_for_ever() {
        let budget = FillBudget::new(Arc::new(SystemClock));
        let begun = Instant::now();
        let mut clients: Vec<_> = (0..BACKGROUND_FETCHES).map(|_| budget.stream()).collect();
        let patient = budget.background(MIB).await;
        assert_eq!(begun.elapsed(), BACKGROUND_PATIENCE);
        drop(patient);
        clients.pop();
        budget.background(MIB).await;
        assert_eq!(begun.elapsed(), BACKGROUND_PATIENCE, "at once, as soon as there is a stream");
    }

    #[tokio::test(start_paused = true)]
    async fn a_publish_lets_clients_go_first_but_not_for_ever() {
        let budget = FillBudget::new(Arc::new(SystemClock));
        let begun = Instant::now();
        let waiting = budget.client_waits();
        budget.let_clients_go_first().await;
        assert_eq!(begun.elapsed(), PUBLISH_PATIENCE);
        drop(waiting);
        budget.let_clients_go_first().await;
        assert_eq!(begun.elapsed(), PUBLISH_PATIENCE, "at once, when nobody waits");
    }

    #[tokio::test(start_paused = true)]
    async fn background_fetches_have_sixteen_streams_and_half_of_the_memory() {
        let budget = FillBudget::new(Arc::new(SystemClock));
        let soon = |bytes| {
            let budget = Arc::clone(&budget);
            async move { tokio::time::timeout(2 * BACKGROUND_PATIENCE, budget.background(bytes)).await.ok() }
        };
        let mut held = Vec::new();
        for _ in 0..BACKGROUND_FETCHES {
            held.push(soon(MIB).await.expect("a stream"));
        }
        assert!(soon(MIB).await.is_none());
        held.clear();
        let half = soon(BACKGROUND_BYTES).await.expect("all of its memory");
        assert!(soon(1).await.is_none());
        assert!(
            tokio::time::timeout(BACKGROUND_PATIENCE, budget.turn(&"disk".parse().unwrap(), FILL_BUDGET_BYTES / 2))
                .await
                .is_ok()
        );
        drop(half);
    }

    #[tokio::test(start_paused = true)]
    async fn as_many_chunks_are_checked_at_a_time_as_there_are_cores_and_a_clients_behind_no_background_one() {
        let budget = FillBudget::new(Arc::new(SystemClock));
        let soon = |for_client| tokio::time::timeout(BACKGROUND_PATIENCE, budget.core(for_client));
        let mut taken = Vec::new();
        for for_client in [false, true] {
            taken.clear();
            while let Ok(core) = soon(for_client).await {
                taken.push(core);
            }
            assert_eq!(taken.len(), std::thread::available_parallelism().unwrap().get());
            assert!(soon(!for_client).await.is_ok());
            taken.pop();
            assert!(soon(for_client).await.is_ok());
        }
    }

    async fn takes_at_once(share: &Arc<PublishShare>, bytes: u64) -> Option<Held> {
        tokio::time::timeout(Duration::from_millis(20), share.take(bytes)).await.ok()
    }

    #[tokio::test]
    async fn publishes_hold_no_more_than_the_budget_and_each_at_least_its_floor() {
        let budget = PublishBudget::new(64 * MIB);
        let (a, b) = (budget.share(16 * MIB).await, budget.share(16 * MIB).await);
        let mut held = Vec::new();
        // An eighth is not for them.
        for _ in 0..10 {
            held.push(takes_at_once(&a, 4 * MIB).await.expect("its own, and what is free"));
        }
        assert!(takes_at_once(&a, 4 * MIB).await.is_none());
        for _ in 0..4 {
            held.push(takes_at_once(&b, 4 * MIB).await.expect("nobody else may have taken its floor"));
        }
        assert!(takes_at_once(&b, 4 * MIB).await.is_none());
        held.clear();
        assert!(takes_at_once(&b, 4 * MIB).await.is_some());
    }

    #[tokio::test]
    async fn memory_is_free_again_when_the_last_copy_of_its_bytes_is_gone() {
        let budget = PublishBudget::new(4 * MIB);
        let share = budget.share(4 * MIB).await;
        let bytes = share.take(4 * MIB).await.by(Bytes::from(vec![7; 10]));
        let copy = bytes.slice(3..5);
        drop(bytes);
        assert!(takes_at_once(&share, 4 * MIB).await.is_none());
        drop(copy);
        assert!(takes_at_once(&share, 4 * MIB).await.is_some());
    }

    #[tokio::test]
    async fn a_buffer_is_used_again_once_nobody_has_its_bytes() {
        let share = PublishBudget::new(4 * MIB).share(4 * MIB).await;
        let held = share.take(MIB).await;
        let buf = held.buffer(10);
        let place = buf.as_ptr();
        let bytes = held.by(buf);
        let copy = bytes.clone();
        drop(bytes);
        let held = share.take(MIB).await;
        let other = held.buffer(10);
        assert_ne!(other.as_ptr(), place, "a copy is still in use");
        drop(copy);
        let again = held.buffer(5);
        assert_eq!((again.as_ptr(), again.len()), (place, 5));
    }

    /// As many buffers of a size as a publish gets.
    async fn all_it_gets(share: &Arc<PublishShare>, bytes: u64) -> Vec<Bytes> {
        let mut all = Vec::new();
        while let Some(held) = takes_at_once(share, bytes).await {
            let buf = held.buffer(usize::try_from(bytes).unwrap());
            all.push(held.by(buf));
        }
        all
    }

    #[tokio::test]
    async fn buffers_that_are_kept_and_those_in_use_are_never_more_than_the_budget() {
        let budget = PublishBudget::new(64 * MIB);
        let (a, b) = (budget.share(16 * MIB).await, budget.share(16 * MIB).await);
        let kept = || u64::from(a.spare.lock().kept) * PERMIT_BYTES;
        // An eighth is not for them, and the other one's floor is its own.
        assert_eq!(all_it_gets(&a, 4 * MIB).await.len(), 10);
        assert_eq!(kept(), 40 * MIB);
        let all = all_it_gets(&b, 2 * MIB).await;
        assert_eq!(all.len(), 20);
        assert_eq!(kept(), 16 * MIB, "what is left of 56");
        let fetched = takes_at_once(&a, 4 * MIB).await.unwrap().by(Bytes::from_static(b"chunk"));
        assert_eq!(kept(), 12 * MIB);
        drop((all, fetched));
        assert_eq!(kept(), 52 * MIB);
        drop((a, b));
        assert_eq!(budget.share(MIB).await.spare.lock().kept, 0, "nothing is kept for nobody");
    }

    #[tokio::test]
    async fn a_buffer_of_a_slice_begins_where_a_disk_can_have_it_also_when_it_is_used_again() {
        let share = PublishBudget::new(4 * MIB).share(4 * MIB).await;
        for len in [SLICE_BYTES, 3 * SLICE_BYTES + 1, 10, SLICE_BYTES] {
            let held = share.take(MIB).await;
            let buf = held.buffer(len);
            assert_eq!(buf.len(), len);
            assert!(len < SLICE_BYTES || buf.as_ptr().addr().is_multiple_of(DIRECT_ALIGNMENT), "{len}");
            drop(held.by(buf));
        }
    }

    #[tokio::test]
    async fn a_floor_beyond_the_budget_is_granted_to_one_at_a_time() {
        let budget = PublishBudget::new(MIB);
        let first = budget.share(4 * MIB).await;
        assert!(takes_at_once(&first, 4 * MIB).await.is_some());
        let second = tokio::time::timeout(Duration::from_millis(20), budget.share(4 * MIB)).await;
        assert!(second.is_err());
        drop(first);
        budget.share(4 * MIB).await;
    }
}
