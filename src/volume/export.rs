//! One export as it is known here: by its head alone until somebody uses it, then by its volume.
//!
//! Promises: whoever asks for the volume while it is being opened waits for that one attempt, and hears what it came to; the
//! attempt goes on when they go away. A volume that nothing uses is closed again, and opened anew at its next use; a use that
//! comes while it is being closed waits for the end of that.
//! Must never: open a cache that may be open already. Two would write the same files.
//! Locks: what needs the volume gets its handle under the lock of the state. So a volume whose only handle is the state's, seen
//! under that lock, is in no use and cannot come into any.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use parking_lot::Mutex;

use super::faults::{self, Cause, Fault};
use super::registry::{ExportError, ExportStatus, Operation};
use super::{Services, Volume};
use crate::background;
use crate::manifest::head::Head;
use crate::units::{ExportId, Generation, Geometry, SnapshotId};

/// An export that is known here.
#[derive(Debug)]
pub(super) struct Export {
    read_only: bool,
    known: Mutex<Known>,
    /// Why the last attempt at opening it failed, if another may succeed.
    unopened: Mutex<Option<Fault>>,
    state: Mutex<State>,
}

/// What is known of an export that is not open: no more of its head than the list shows, as its size is the store's choice.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Known {
    /// A name that the listing had.
    Name,
    /// The head could not be read, and why.
    Unread(String),
    /// What the head said when it was last read.
    Read { geometry: Geometry, current: Option<SnapshotId> },
    /// It cannot be served, and why.
    Failed(String),
}

impl Known {
    pub(super) fn of(head: &Head) -> Self {
        Self::Read { geometry: head.geometry, current: head.current }
    }

    /// Why it cannot be served.
    pub(super) fn failed(&self) -> Option<&str> {
        match self {
            Self::Unread(reason) | Self::Failed(reason) => Some(reason),
            Self::Name | Self::Read { .. } => None,
        }
    }
}

#[derive(Debug)]
enum State {
    /// Nobody has used it yet, or it could not be opened.
    Unopened,
    Opening(Opening),
    /// It may have been closed since. When it was last asked for, or seen in use, by the monotonic clock.
    Open(Arc<Volume>, Duration),
    /// It is idle and being closed.
    Closing(Closing),
    /// It was idle and was closed. Its status, which stays the same until its next use.
    Closed(Box<ExportStatus>),
    /// It was unloaded unopened: whoever still knows it must not open it any more.
    Unloaded,
}

type Opening = Shared<BoxFuture<'static, Result<Arc<Volume>, ExportError>>>;
type Closing = Shared<BoxFuture<'static, ()>>;

/// An attempt at opening or closing an export, and the state that it leaves however it ends.
struct Attempt<'a> {
    export: &'a Export,
    leaves: State,
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        *self.export.state.lock() = std::mem::replace(&mut self.leaves, State::Unopened);
    }
}

impl Export {
    pub(super) fn new(known: Known, read_only: bool) -> Arc<Self> {
        let (known, unopened) = (Mutex::new(known), Mutex::default());
        Arc::new(Self { read_only, known, unopened, state: Mutex::new(State::Unopened) })
    }

    /// What is known of it.
    pub(super) fn known(&self) -> Known {
        self.known.lock().clone()
    }

    /// Whether its head was never read.
    pub(super) fn is_unread(&self) -> bool {
        matches!(*self.known.lock(), Known::Name | Known::Unread(_))
    }

    /// What reading its head came to, unless more is known by now. Logged once, however often it is tried.
    pub(super) fn note_read(&self, id: &ExportId, read: Known) {
        let mut known = self.known.lock();
        if !matches!(*known, Known::Name | Known::Unread(_)) || *known == read {
            return;
        }
        match (&*known, read.failed()) {
            (_, Some(reason)) => tracing::error!(export = %id, "cannot be served: {reason}"),
            (Known::Unread(_), None) => tracing::info!(export = %id, "its head can be read again"),
            _ => {}
        }
        *known = read;
    }

    /// What is wrong with it while it is not open.
    pub(super) fn faults(&self) -> Vec<Fault> {
        self.unopened.lock().iter().cloned().collect()
    }

    /// The volume, if somebody has used it.
    pub(super) fn volume(&self) -> Option<Arc<Volume>> {
        match &*self.state.lock() {
            State::Open(volume, _) => Some(Arc::clone(volume)),
            _ => None,
        }
    }

    /// The volume, opened if it is not, over the cache in `dir`.
    pub(super) async fn open(
        self: &Arc<Self>,
        services: &Arc<Services>,
        dir: PathBuf,
        id: &ExportId,
    ) -> Result<Arc<Volume>, ExportError> {
        let opening = loop {
            let closing = match &mut *self.state.lock() {
                State::Open(volume, used) => {
                    *used = services.clock.monotonic();
                    return Ok(Arc::clone(volume));
                }
                State::Opening(opening) => break opening.clone(),
                State::Closing(closing) => closing.clone(),
                State::Unloaded => return Err(ExportError::NotFound(id.clone(), "loaded here any more")),
                state @ (State::Unopened | State::Closed(_)) => {
                    let attempt = tokio::spawn(Arc::clone(self).attempt(Arc::clone(services), dir, id.clone()));
                    let opening = async move { background::outcome(attempt.await).await }.boxed().shared();
                    *state = State::Opening(opening.clone());
                    break opening;
                }
            };
            closing.await;
        };
        opening.await
    }

    async fn attempt(
        self: Arc<Self>,
        services: Arc<Services>,
        dir: PathBuf,
        id: ExportId,
    ) -> Result<Arc<Volume>, ExportError> {
        let clock = Arc::clone(&services.clock);
        let mut attempt = Attempt { export: &self, leaves: State::Unopened };
        let opened = async {
            let not_found = || ExportError::NotFound(id.clone(), "in the store any more");
            let head = services.read_head(&id).await?.ok_or_else(not_found)?.head;
            let volume = Volume::open(services, dir, &head, self.read_only).await?;
            Ok((head, volume))
        };
        match opened.await {
            Ok((head, volume)) => {
                *self.known.lock() = Known::of(&head);
                *self.unopened.lock() = None;
                attempt.leaves = State::Open(Arc::clone(&volume), clock.monotonic());
                Ok(volume)
            }
            Err(e) => {
                if let ExportError::StoreUnavailable(reason) = &e {
                    let found = Fault::new(Cause::StoreUnavailable, clock.now(), Arc::clone(reason));
                    faults::note(&self.unopened, found);
                } else if !(matches!(e, ExportError::NotFound(..)) && self.is_unread()) {
                    // A folder without a head is none of the exports: the discovery leaves it out.
                    self.note_failure(&id, e.to_string());
                }
                Err(e)
            }
        }
    }

    fn note_failure(&self, id: &ExportId, reason: String) {
        let mut known = self.known.lock();
        // Logged once, however often it is tried.
        if known.failed() != Some(&*reason) {
            tracing::error!(export = %id, "cannot be served: {reason}");
        }
        *known = Known::Failed(reason);
    }

    /// The status, if it is known without opening the export. This is no use of it.
    pub(super) async fn status(&self) -> Option<ExportStatus> {
        self.closed().await;
        match &*self.state.lock() {
            State::Open(volume, _) => Some(volume.status()),
            State::Closed(status) => Some(status.as_ref().clone()),
            _ => None,
        }
    }

    /// The head was a snapshot while the snapshots were being listed.
    pub(super) fn note_listed(&self, snapshot: SnapshotId, generation: Generation) {
        match &mut *self.state.lock() {
            State::Open(volume, _) => volume.note_listed(snapshot, generation),
            State::Closed(status) if generation >= status.snapshot_generation => {
                (status.remote_head_snapshot_id, status.remote_head_generation) = (Some(snapshot), Some(generation));
            }
            _ => {}
        }
    }

    /// Closes the volume if nothing has used it for `idle`, nothing of it is unpublished or wrong, and the store answers, which
    /// the next opening asks.
    pub(super) async fn close_if_idle(self: &Arc<Self>, idle: Duration) {
        if let Some(closing) = self.begin_closing(idle) {
            closing.await;
        }
    }

    fn begin_closing(self: &Arc<Self>, idle: Duration) -> Option<Closing> {
        let mut state = self.state.lock();
        let State::Open(volume, used) = &mut *state else { return None };
        let now = volume.services.clock.monotonic();
        // Every client, fetch and publish has a handle on the volume; work that outlives its caller at least on the cache.
        let in_use = Arc::get_mut(volume).is_none_or(|volume| Arc::get_mut(&mut volume.cache).is_none());
        if in_use {
            *used = now;
            return None;
        }
        let status = volume.status();
        // One that is closed already is being unloaded.
        if now.saturating_sub(*used) < idle || *volume.closing.borrow() || !is_at_rest(&status) {
            return None;
        }
        // Before the state, so that a listing at any time has the one or the other.
        *self.known.lock() = Known::Read { geometry: status.geometry, current: status.current_snapshot_id };
        let ended = tokio::spawn(Arc::clone(self).close(Arc::clone(volume), status));
        let closing = async move { background::outcome(ended.await).await }.boxed().shared();
        *state = State::Closing(closing.clone());
        Some(closing)
    }

    async fn close(self: Arc<Self>, volume: Arc<Volume>, status: ExportStatus) {
        let mut attempt = Attempt { export: &self, leaves: State::Unopened };
        // Dropped before the attempt, so that the files are closed when the state allows to open them again.
        let volume = volume;
        let export = volume.export_id();
        match volume.close().await {
            Ok(()) => {
                attempt.leaves = State::Closed(Box::new(status));
                tracing::info!(%export, "closed until its next use: it was idle");
            }
            Err(e) => tracing::warn!(%export, "closed without a clean stop; the next use recovers it: {e}"),
        }
    }

    /// Waits for the closing of an idle volume that is under way.
    pub(super) async fn closed(&self) {
        let closing = match &*self.state.lock() {
            State::Closing(closing) => closing.clone(),
            _ => return,
        };
        closing.await;
    }

    /// Sees to it that no opening begins any more, and waits for one that is under way. The volume, if there is one.
    pub(super) async fn end_openings(&self) -> Option<Arc<Volume>> {
        loop {
            let under_way = match &mut *self.state.lock() {
                State::Open(volume, _) => return Some(Arc::clone(volume)),
                State::Opening(opening) => opening.clone().map(drop).boxed(),
                State::Closing(closing) => closing.clone().boxed(),
                state @ (State::Unopened | State::Closed(_) | State::Unloaded) => {
                    *state = State::Unloaded;
                    return None;
                }
            };
            // Whatever it comes to, the state says it.
            under_way.await;
        }
    }
}

/// Whether an export has nothing that is unpublished, under way or wrong.
fn is_at_rest(status: &ExportStatus) -> bool {
    status.dirty_chunks == 0
        && status.operation == Operation::Idle
        && status.failed.is_none()
        && status.faults.is_empty()
        && status.store_outage.is_none()
}
