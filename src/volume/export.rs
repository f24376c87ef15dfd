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
use crate::units::ExportId;

/// An export that is known here.
#[derive(Debug)]
pub(super) struct Export {
    read_only: bool,
    /// The head as last read, or why it could not be.
    head: Mutex<Result<Head, String>>,
    /// Why the last attempt at opening it failed, if another may succeed.
    unopened: Mutex<Option<Fault>>,
    state: Mutex<State>,
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
    pub(super) fn new(head: Result<Head, String>, read_only: bool) -> Arc<Self> {
        let (head, unopened) = (Mutex::new(head), Mutex::default());
        Arc::new(Self { read_only, head, unopened, state: Mutex::new(State::Unopened) })
    }

    /// The head as last read, or why it could not be.
    pub(super) fn head(&self) -> Result<Head, String> {
        self.head.lock().clone()
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
                *self.head.lock() = Ok(head);
                *self.unopened.lock() = None;
                attempt.leaves = State::Open(Arc::clone(&volume));
                Ok(volume)
            }
            Err(e) => {
                if let ExportError::StoreUnavailable(reason) = &e {
                    let found = Fault::new(Cause::StoreUnavailable, clock.now(), Arc::clone(reason));
                    faults::note(&self.unopened, found);
                } else {
                    self.note_failure(&id, e.to_string());
                }
                Err(e)
            }
        }
    }

    fn note_failure(&self, id: &ExportId, reason: String) {
        let mut head = self.head.lock();
        // Logged once, however often it is tried.
        if head.as_ref().err() != Some(&reason) {
            tracing::error!(export = %id, "cannot be served: {reason}");
            *head = Err(reason);
        }
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
