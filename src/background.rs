//! Threads for the long work of a publish: reading, hashing and writing what is going to be in the store.
//!
//! A kernel lets a thread go on for a millisecond or more when another one wakes up that counts as much. A client's request
//! wakes three on its way and back, its own among them. So a server does what goes over gigabytes on threads that count less,
//! and whoever is woken for a request has a core at once. They share one where nobody else wants it, and have some tenth of
//! it where others do: they are never starved.
//!
//! Must never: sync what clients' flushes wait for, or hold what a request waits for while working through megabytes.

use std::io;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::task::{JoinError, JoinHandle};

/// How much less they count: as `nice` has it, where 0 is the rule and 19 the most.
pub const NICENESS: i32 = 10;
/// Their name, for whoever looks at a server's threads.
const THREAD_NAME: &str = "nbd-background";

/// Where long work goes: to threads of that kind, or by default to those that the runtime has for all that blocks.
#[derive(Debug, Clone, Default)]
pub struct Background(Option<Handle>);

impl Background {
    /// Threads that count less; they are there while the runtime that is returned lives, which does nothing else.
    ///
    /// # Errors
    /// The system's, if it has no more to give.
    pub fn start() -> io::Result<(Self, Runtime)> {
        let runtime = Builder::new_current_thread()
            .thread_name(THREAD_NAME)
            .on_thread_start(|| {
                // Less than the server itself, whatever it was started with. Anybody may; and if not, the work is done all
                // the same.
                let _ = rustix::process::nice(NICENESS);
            })
            .build()?;
        Ok((Self(Some(runtime.handle().clone())), runtime))
    }

    /// Begins work that blocks; it goes on to its end even if nobody waits for it.
    pub fn spawn<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        match &self.0 {
            Some(threads) => threads.spawn_blocking(work),
            None => tokio::task::spawn_blocking(work),
        }
    }

    /// As [`spawn`](Self::spawn), to what it comes to.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        outcome(self.spawn(work).await).await
    }
}

/// What a task came to; its panic goes on here.
pub async fn outcome<T>(ended: Result<T, JoinError>) -> T {
    match ended.map_err(JoinError::try_into_panic) {
        Ok(result) => result,
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        // The runtime is shutting down: nobody is left to see a result.
        Err(Err(_)) => std::future::pending().await,
    }
}
