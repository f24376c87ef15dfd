//! What can be seen of a publish under way, and how it is asked to end.
//!
//! Cancelling asks; it takes nothing away by itself. The publish gives up where it may give up anyway, as at a stop of the
//! server: while it uploads. It then rolls itself back by the rules of `recover.rs`, and only after that is the one who
//! cancelled told. Past that point it is taken to its end, and that is what the one who cancelled hears.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use tokio::sync::watch;

use super::Volume;
use super::publish::OperationGuard;

/// How far a publish is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PublishProgress {
    /// Bytes of chunks that went into the upload; zeros too, though they are not sent.
    pub done_bytes: u64,
    /// How many there are, as if the last chunk were a whole one.
    pub total_bytes: u64,
}

/// How a publish ended, for whoever cancelled it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ending {
    /// Given up and rolled back, because somebody asked for it.
    Cancelled,
    /// Done, or failed by itself.
    Otherwise,
}

/// A publish under way.
#[derive(Debug)]
pub(super) struct Publishing {
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
    cancel: watch::Sender<bool>,
    ending: watch::Sender<Option<Ending>>,
}

/// The publish under way, if there is one; shared with whoever looks.
pub(super) type Current = Mutex<Option<Arc<Publishing>>>;

impl Publishing {
    /// More chunks are to be uploaded.
    pub(super) fn plan(&self, bytes: u64) {
        self.total_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Some of them are.
    pub(super) fn advance(&self, bytes: u64) {
        self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Ends once somebody wants the publish to be given up.
    pub(super) async fn cancelled(&self) {
        // The sender is our own.
        let _ = self.cancel.subscribe().wait_for(|cancel| *cancel).await;
    }
}

/// Says how it ended when it goes: a publish that breaks off keeps nobody waiting.
pub(super) struct PublishingGuard<'a> {
    volume: &'a Volume,
    operation: Option<OperationGuard<'a>>,
    pub(super) publishing: Arc<Publishing>,
    ending: Ending,
}

impl PublishingGuard<'_> {
    /// It was given up and rolled back.
    pub(super) fn was_cancelled(&mut self) {
        self.ending = Ending::Cancelled;
    }
}

impl Drop for PublishingGuard<'_> {
    fn drop(&mut self) {
        *self.volume.publishing.lock() = None;
        // Before anybody hears of the end, who may then begin another operation at once.
        drop(self.operation.take());
        self.publishing.ending.send_replace(Some(self.ending));
    }
}

impl Volume {
    /// The operation that begins is a publish.
    pub(super) fn publishing<'a>(&'a self, operation: OperationGuard<'a>) -> PublishingGuard<'a> {
        let publishing = Arc::new(Publishing {
            done_bytes: AtomicU64::new(0),
            total_bytes: AtomicU64::new(0),
            cancel: watch::Sender::new(false),
            ending: watch::Sender::new(None),
        });
        *self.publishing.lock() = Some(Arc::clone(&publishing));
        PublishingGuard { volume: self, operation: Some(operation), publishing, ending: Ending::Otherwise }
    }

    /// How far the publish under way is; `None` without one, and until it is known what there is to upload.
    pub(super) fn progress(&self) -> Option<PublishProgress> {
        let publishing = self.publishing.lock().clone()?;
        let progress = PublishProgress {
            done_bytes: publishing.done_bytes.load(Ordering::Relaxed),
            total_bytes: publishing.total_bytes.load(Ordering::Relaxed),
        };
        (progress.total_bytes > 0).then_some(progress)
    }

    /// Asks the publish under way to give up, and waits for its end: whether it was given up and everything is as before
    /// it, or there was none, or it was too late.
    pub(super) async fn cancel(&self) -> bool {
        let Some(publishing) = self.publishing.lock().clone() else { return false };
        let mut ending = publishing.ending.subscribe();
        publishing.cancel.send_replace(true);
        let ended = ending.wait_for(Option::is_some).await;
        ended.is_ok_and(|ending| *ending == Some(Ending::Cancelled))
    }
}
