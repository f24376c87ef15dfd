//! The locks and atomics of the code whose interleavings are checked: all of `cache`, and `volume/order.rs`.
//!
//! They are those of `parking_lot` and `std`. Under the feature `shuttle`, with which `tests/interleavings.rs` is built
//! and nothing else, they are those of a scheduler that tries thousands of orders of the same calls: then each use is a
//! point at which another thread may go on. For that to be the whole truth nothing there may block by other means;
//! `tests/architecture.rs` reads the source for it.
//!
//! The checker knows one order of all atomic operations. Whether a weaker `Ordering` suffices it cannot say.

#[cfg(not(feature = "shuttle"))]
mod primitives {
    pub use std::sync::OnceLock;
    pub use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
    pub use std::thread::yield_now;

    pub use parking_lot::{Condvar, Mutex, MutexGuard, RwLock};
}

#[cfg(feature = "shuttle")]
mod primitives {
    use std::sync::PoisonError;

    pub use shuttle::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
    pub use shuttle::thread::yield_now;
    pub use shuttle_parking_lot::{Mutex, MutexGuard, RwLock};

    /// A condition variable with the calls of `parking_lot`'s, which the checker's crate leaves out.
    #[derive(Debug, Default)]
    pub struct Condvar {
        /// Held from before the waiter lets go of its lock until it waits, so that no notice passes in between.
        falling_asleep: shuttle::sync::Mutex<()>,
        woken: shuttle::sync::Condvar,
    }

    impl Condvar {
        /// Lets go of the lock until notified, perhaps without cause.
        pub fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
            let falling_asleep = self.falling_asleep.lock().unwrap_or_else(PoisonError::into_inner);
            MutexGuard::unlocked(guard, || drop(self.woken.wait(falling_asleep)));
        }

        /// Wakes all who wait.
        pub fn notify_all(&self) {
            let _nobody_between = self.falling_asleep.lock().unwrap_or_else(PoisonError::into_inner);
            self.woken.notify_all();
        }
    }

    /// A cell that is written once, by one of those who ask, while the others wait for it.
    #[derive(Debug)]
    pub struct OnceLock<T> {
        writing: shuttle::sync::Mutex<()>,
        written: AtomicBool,
        value: std::sync::OnceLock<T>,
    }

    impl<T> OnceLock<T> {
        /// An empty cell.
        #[allow(clippy::new_without_default, reason = "the one call that its users make")]
        #[must_use]
        pub const fn new() -> Self {
            let written = AtomicBool::new(false);
            Self { writing: shuttle::sync::Mutex::new(()), written, value: std::sync::OnceLock::new() }
        }

        /// What is in it.
        pub fn get(&self) -> Option<&T> {
            if self.written.load(Ordering::Acquire) { self.value.get() } else { None }
        }

        /// What is in it, after writing it if nothing is.
        pub fn get_or_init(&self, init: impl FnOnce() -> T) -> &T {
            let _alone = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
            let value = self.value.get_or_init(init);
            self.written.store(true, Ordering::Release);
            value
        }
    }
}

pub use primitives::*;
