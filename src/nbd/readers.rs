//! Threads that read for busy connections, while there are more processors than those.
//!
//! One thread reads a MiB from memory and then sends it; two do both at a time.
//!
//! Promises: a read is handed to a reader that is free, or not at all; so nothing queues here, and there are as many readers
//! as processors, whatever clients ask for. They are started when the first one is needed.
//! Must never: be given work that waits for a disk, the store or a client. What does that belongs to the runtime, whose
//! threads may all be held up by a disk; these may not.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, SendError, Sender, channel};
use std::sync::{Arc, OnceLock};

use parking_lot::Mutex;
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// The stack of a reader, in bytes; what is never touched takes no memory.
const STACK_BYTES: usize = 1 << 20;

type Work = Box<dyn FnOnce() + Send>;

/// The readers of a server.
#[derive(Debug)]
pub(super) struct Readers {
    count: usize,
    free: Arc<Semaphore>,
    /// The way to them; `None` if they could not be started.
    way: OnceLock<Option<Sender<(Work, OwnedSemaphorePermit)>>>,
}

/// A reader that has nothing to do.
pub(super) struct Reader<'a> {
    way: &'a Sender<(Work, OwnedSemaphorePermit)>,
    place: OwnedSemaphorePermit,
}

impl Readers {
    /// As many as there are processors; none is started yet.
    pub(super) fn new() -> Self {
        let count = std::thread::available_parallelism().map_or(1, usize::from);
        Self { count, free: Arc::new(Semaphore::new(count)), way: OnceLock::new() }
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    /// A free one, if there is one. To be called on the runtime, or where it was entered.
    pub(super) fn free(&self) -> Option<Reader<'_>> {
        let place = Arc::clone(&self.free).try_acquire_owned().ok()?;
        let way = self.way.get_or_init(|| {
            let started = start(self.count);
            started.inspect_err(|error| tracing::warn!("nobody reads for busy connections: {error}")).ok()
        });
        Some(Reader { way: way.as_ref()?, place })
    }
}

impl Reader<'_> {
    pub(super) fn work(self, work: impl FnOnce() + Send + 'static) {
        if let Err(SendError((work, _))) = self.way.send((Box::new(work), self.place)) {
            work();
        }
    }
}

/// They end when the way to them is gone.
fn start(count: usize) -> std::io::Result<Sender<(Work, OwnedSemaphorePermit)>> {
    let (way, work) = channel();
    let work = Arc::new(Mutex::new(work));
    for _ in 0..count {
        let (work, runtime) = (Arc::clone(&work), Handle::current());
        let reader = std::thread::Builder::new().name("nbd-reader".to_owned()).stack_size(STACK_BYTES);
        reader.spawn(move || {
            let _runtime = runtime.enter();
            while let Some((work, place)) = next(&work) {
                // Who is answered by work that panics has been told by its ticket.
                let _ = catch_unwind(AssertUnwindSafe(work));
                drop(place);
            }
        })?;
    }
    Ok(way)
}

fn next<T>(work: &Mutex<Receiver<T>>) -> Option<T> {
    work.lock().recv().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    #[tokio::test]
    async fn as_many_are_free_as_there_are_processors_and_each_is_again_after_its_work_even_if_that_panicked() {
        let readers = Readers::new();
        for _ in 0..3 {
            let patience = Instant::now() + Duration::from_secs(30);
            while readers.free.available_permits() < readers.count() {
                assert!(Instant::now() < patience, "they do not come back");
                tokio::task::yield_now().await;
            }
            let (open, gate) = channel::<()>();
            let gate = Arc::new(Mutex::new(gate));
            for _ in 0..readers.count() {
                let gate = Arc::clone(&gate);
                readers.free().expect("a free one").work(move || {
                    let _ = gate.lock().recv();
                    panic!("on purpose");
                });
            }
            assert!(readers.free().is_none());
            drop(open);
        }
    }
}
