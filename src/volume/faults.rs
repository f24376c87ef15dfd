//! What is wrong with an export that is served all the same: why its clients get errors, or will get some.
//!
//! A fault is there until its cause is known to be gone, not until it has been looked at:
//! - A chunk that could not be fetched, by whatever was asked for it, is a fault until a fetch of it succeeds, or no
//!   read needs that object for it any more: the chunk was overwritten, or the image under the cache is another.
//! - Fetches that failed in an outage of the store are one fault, until the store answers.
//! - An error of the local disk is a fault until the cache is reset or opened again; a full disk until there is
//!   room again.
//! - A head that another server moved is one until changes here can be published again (`volume/seen.rs`).
//! - A publish that failed is a fault until one succeeds, or a reset drops what it was about.
//!
//! Memory: up to [`MAX_CHUNK_FAULTS`] chunks of an export are noted. What is beyond them is counted by the meter alone, and
//! noted when it fails again once there is room.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use parking_lot::Mutex;

use super::fill::{FetchError, Remote};
use super::registry::ExportError;
use super::{Volume, VolumeError};
use crate::units::ChunkIndex;

/// How many chunks of an export are noted that cannot be fetched.
pub const MAX_CHUNK_FAULTS: usize = 1024;

/// What kind of thing is wrong, the worst first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Cause {
    /// An object is missing, too short, or not what was published.
    Damaged,
    /// Another server moved the head.
    Conflict,
    /// The local disk fails.
    Failed,
    /// The local disk is full.
    NoSpace,
    /// The store does not answer, or refuses.
    StoreUnavailable,
}

impl Cause {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Damaged, Self::Conflict, Self::Failed, Self::NoSpace, Self::StoreUnavailable];

    /// As the API names it: the code of the refusals that it leads to.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Damaged => "damaged",
            Self::Conflict => "conflict",
            Self::Failed => "failed",
            Self::NoSpace => "no-space",
            Self::StoreUnavailable => "store-unavailable",
        }
    }

    /// Why a publish failed; `None` if nothing is wrong with the export, or that is noted where it is found.
    fn of(error: &ExportError) -> Option<Self> {
        match error {
            ExportError::Damaged(_) | ExportError::Volume(VolumeError::Damaged(_)) => Some(Self::Damaged),
            ExportError::Volume(VolumeError::Failed(_)) => Some(Self::Failed),
            ExportError::Volume(VolumeError::NoSpace(_)) => Some(Self::NoSpace),
            ExportError::StoreUnavailable(_) | ExportError::Volume(VolumeError::Unavailable(_)) => {
                Some(Self::StoreUnavailable)
            }
            _ => None,
        }
    }
}

/// Something that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    /// What kind of thing.
    pub cause: Cause,
    /// When it was first found.
    pub since: SystemTime,
    /// When it was last found.
    pub last: SystemTime,
    /// How often it was found.
    pub count: u64,
    /// What, where, and why.
    pub reason: Arc<str>,
}

impl Fault {
    /// Found for the first time.
    #[must_use]
    pub fn new(cause: Cause, now: SystemTime, reason: Arc<str>) -> Self {
        Self { cause, since: now, last: now, count: 1, reason }
    }

    /// Found once more, or something else in its place.
    fn renew(&mut self, found: Self) {
        if self.cause == found.cause {
            (self.last, self.count, self.reason) = (found.last, self.count + 1, found.reason);
        } else {
            *self = found;
        }
    }
}

/// A line that says what is wrong, if anything is.
#[must_use]
pub fn summary(faults: &[Fault]) -> Option<String> {
    let (first, others) = faults.split_first()?;
    let more = if others.is_empty() { String::new() } else { format!(" (and {} more)", others.len()) };
    Some(format!("{}: {}{more}", first.cause.as_str(), first.reason))
}

/// The faults of a volume.
#[derive(Debug, Default)]
pub(super) struct Faults {
    chunks: Mutex<BTreeMap<ChunkIndex, (Remote, Fault)>>,
    outage: Mutex<Option<Fault>>,
    disk: Mutex<Option<Fault>>,
    full: Mutex<Option<Fault>>,
    publish: Mutex<Option<Fault>>,
}

/// Takes note of a fault where one of its kind has its place.
pub(super) fn put(slot: &mut Option<Fault>, found: Fault) {
    match slot {
        Some(fault) => fault.renew(found),
        none => *none = Some(found),
    }
}

/// As [`put`], where the place is shared.
pub(super) fn note(slot: &Mutex<Option<Fault>>, found: Fault) {
    put(&mut slot.lock(), found);
}

impl Faults {
    /// A chunk was not to be had from where its published bytes are.
    fn note_chunk(&self, chunk: ChunkIndex, source: &Remote, found: Fault) {
        let mut chunks = self.chunks.lock();
        let room = chunks.len() < MAX_CHUNK_FAULTS;
        match chunks.get_mut(&chunk) {
            Some((of, fault)) if of == source => fault.renew(found),
            None if !room => {}
            _ => {
                chunks.insert(chunk, (source.clone(), found));
            }
        }
    }

    /// Everything local was dropped.
    pub(super) fn forget_local(&self) {
        *self.disk.lock() = None;
        *self.publish.lock() = None;
    }
}

impl Volume {
    /// What is wrong, the worst first.
    pub(super) fn faults(&self) -> Vec<Fault> {
        if self.services.store.outage().is_none() {
            *self.faults.outage.lock() = None;
        }
        if !self.cache.is_full() {
            *self.faults.full.lock() = None;
        }
        let slots = [&self.faults.outage, &self.faults.disk, &self.faults.full, &self.faults.publish];
        let mut faults: Vec<_> = slots.into_iter().filter_map(|slot| slot.lock().clone()).collect();
        faults.extend(self.seen_head().conflict);
        self.drop_healed_chunks();
        faults.extend(self.faults.chunks.lock().values().map(|(_, fault)| fault.clone()));
        faults.sort_by_key(|fault| fault.cause);
        faults
    }

    /// How many chunks are known to be damaged in the store, up to [`MAX_CHUNK_FAULTS`].
    pub(super) fn damaged_chunks(&self) -> u64 {
        self.drop_healed_chunks();
        self.faults.chunks.lock().values().filter(|(_, fault)| fault.cause == Cause::Damaged).count() as u64
    }

    fn drop_healed_chunks(&self) {
        let image = self.image();
        self.faults.chunks.lock().retain(|chunk, (source, _)| {
            self.must_fetch(*chunk) && Remote::of(image.source(*chunk)).is_some_and(|now| now == *source)
        });
    }

    /// Takes note of what a fetch came to.
    pub(super) fn note_fetch<T>(&self, chunk: ChunkIndex, source: &Remote, fetched: &Result<T, FetchError>) {
        let (cause, reason) = match fetched {
            Ok(_) => {
                self.faults.chunks.lock().remove(&chunk);
                return;
            }
            Err(FetchError::Damaged(reason)) => (Cause::Damaged, reason),
            Err(FetchError::Unavailable(reason)) => (Cause::StoreUnavailable, reason),
        };
        let found = Fault::new(cause, self.services.clock.now(), Arc::clone(reason));
        if cause == Cause::StoreUnavailable && self.services.store.outage().is_some() {
            note(&self.faults.outage, found);
        } else {
            self.faults.note_chunk(chunk, source, found);
        }
    }

    /// Takes note of an error of the local disk.
    pub(super) fn note_disk_error(&self, error: &VolumeError) {
        let (slot, cause) = match error {
            VolumeError::NoSpace(_) => (&self.faults.full, Cause::NoSpace),
            _ => (&self.faults.disk, Cause::Failed),
        };
        note(slot, Fault::new(cause, self.services.clock.now(), error.to_string().into()));
    }

    /// Takes note of what a publish came to.
    pub(super) async fn note_publish<T>(self: &Arc<Self>, result: &Result<T, ExportError>) {
        match result {
            Ok(_) => *self.faults.publish.lock() = None,
            Err(ExportError::Conflict { .. }) => {
                *self.faults.publish.lock() = None;
                self.learn_generation().await;
            }
            Err(e) => {
                if let Some(cause) = Cause::of(e) {
                    note(&self.faults.publish, Fault::new(cause, self.services.clock.now(), e.to_string().into()));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;
    use crate::units::ByteRange;

    fn found(seconds: u64, cause: Cause, reason: &str) -> Fault {
        Fault::new(cause, UNIX_EPOCH + Duration::from_secs(seconds), reason.into())
    }

    #[test]
    fn a_fault_that_is_found_again_keeps_its_beginning_and_is_counted() {
        let slot = Mutex::default();
        note(&slot, found(1, Cause::NoSpace, "a"));
        note(&slot, found(5, Cause::NoSpace, "b"));
        let fault = slot.lock().clone().unwrap();
        assert_eq!((fault.count, &*fault.reason), (2, "b"));
        assert_eq!(fault.last.duration_since(fault.since).unwrap(), Duration::from_secs(4));
        note(&slot, found(6, Cause::Failed, "c"));
        assert_eq!(slot.lock().clone().unwrap(), found(6, Cause::Failed, "c"));
    }

    #[test]
    fn chunk_faults_are_bounded_and_a_known_one_is_renewed_at_the_limit() {
        let faults = Faults::default();
        let source = Remote { key: "blob".parse().unwrap(), range: ByteRange::new(0, 4).unwrap(), hash: None };
        for chunk in 0..=u32::try_from(MAX_CHUNK_FAULTS).unwrap() {
            faults.note_chunk(ChunkIndex(chunk), &source, found(1, Cause::Damaged, "gone"));
        }
        assert_eq!(faults.chunks.lock().len(), MAX_CHUNK_FAULTS);
        faults.note_chunk(ChunkIndex(0), &source, found(2, Cause::Damaged, "gone"));
        assert_eq!(faults.chunks.lock()[&ChunkIndex(0)].1.count, 2);
    }

    #[test]
    fn the_worst_comes_first_and_the_rest_is_counted() {
        let two = [found(1, Cause::Damaged, "a blob is gone"), found(1, Cause::NoSpace, "full")];
        assert_eq!(summary(&two).unwrap(), "damaged: a blob is gone (and 1 more)");
        assert_eq!(summary(&two[..1]).unwrap(), "damaged: a blob is gone");
        assert_eq!(summary(&[]), None);
        assert!(Cause::ALL.is_sorted());
    }
}
