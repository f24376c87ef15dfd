//! One export as it is known here: by its head alone until somebody uses it, then by its volume.
//!
//! Promises: whoever asks for the volume while it is being opened waits for that one attempt, and hears what it came to; the
//! attempt goes on when they go away.
//! Must never: open a cache that may be open already. Two would write the same files.

use std::path::PathBuf;
use std::sync::Arc;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use parking_lot::Mutex;

use super::faults::{self, Cause, Fault};
use super::registry::ExportError;
use super::{Services, Volume};
use crate::background;
use crate::manifest::head::Head;
use crate::units::{ExportId, Geometry, SnapshotId};

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
    /// It may have been closed since.
    Open(Arc<Volume>),
    /// It was unloaded unopened: whoever still knows it must not open it any more.
    Unloaded,
}

type Opening = Shared<BoxFuture<'static, Result<Arc<Volume>, ExportError>>>;

/// An attempt at opening an export, and the state that it leaves however it ends.
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
            State::Open(volume) => Some(Arc::clone(volume)),
            State::Unopened | State::Opening(_) | State::Unloaded => None,
        }
    }

    /// The volume, opened if it is not, over the cache in `dir`.
    pub(super) async fn open(
        self: &Arc<Self>,
        services: &Arc<Services>,
        dir: PathBuf,
        id: &ExportId,
    ) -> Result<Arc<Volume>, ExportError> {
        let opening = match &mut *self.state.lock() {
            State::Open(volume) => return Ok(Arc::clone(volume)),
            State::Opening(opening) => opening.clone(),
            State::Unloaded => return Err(ExportError::NotFound(id.clone(), "loaded here any more")),
            state @ State::Unopened => {
                let attempt = tokio::spawn(Arc::clone(self).attempt(Arc::clone(services), dir, id.clone()));
                let opening = async move { background::outcome(attempt.await).await }.boxed().shared();
                *state = State::Opening(opening.clone());
                opening
            }
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
                attempt.leaves = State::Open(Arc::clone(&volume));
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

    /// Sees to it that no opening begins any more, and waits for one that is under way. The volume, if there is one.
    pub(super) async fn end_openings(&self) -> Option<Arc<Volume>> {
        loop {
            let opening = match &mut *self.state.lock() {
                State::Open(volume) => return Some(Arc::clone(volume)),
                State::Opening(opening) => opening.clone(),
                state @ (State::Unopened | State::Unloaded) => {
                    *state = State::Unloaded;
                    return None;
                }
            };
            // Whatever it comes to, the state says it.
            let _ = opening.await;
        }
    }
}
