//! `volume.json` in the store: the only place that reads it and that writes it.
//!
//! Guarantees:
//! - A write replaces exactly the head that its caller names, never one that was read later.
//! - A write counts once the head was read back and is the one written. The store's answer alone proves nothing: a proxy
//!   may have given it, or it may be lost although the write landed (S6).
//! - [`Swap::Lost`] is final: the version that the write was bound to is gone, and no version comes back.

use super::Services;
use super::registry::ExportError;
use crate::manifest::head::{Head, MAX_HEAD_BYTES, Writer};
use crate::sabotage::{Rule, breaks};
use crate::store::{Condition, Key, StoreError, Version};
use crate::units::{ExportId, RandomId};

/// A head as it stands in the store, with what a swap needs to replace just that one.
#[derive(Debug, Clone)]
pub(super) struct StoredHead {
    pub head: Head,
    pub version: Version,
}

/// What became of a write of a head.
#[derive(Debug)]
pub(super) enum Swap {
    /// The head in the store is the one written.
    Landed,
    /// The head in the store is another, and the write cannot land any more; with one exception: a head that was to be
    /// created may appear after all if an attempt had no answer and the head found is deleted meanwhile.
    Lost {
        /// The head found.
        found: Box<StoredHead>,
        /// Whether every attempt had an answer.
        answered: bool,
    },
}

/// Why it is not known whether a head was written.
#[derive(Debug)]
pub(super) struct SwapError {
    pub error: ExportError,
    /// Whether the write may have landed, or may still land.
    pub may_land: bool,
    /// Whether the store said that it did.
    pub acknowledged: bool,
}

impl From<SwapError> for ExportError {
    fn from(e: SwapError) -> Self {
        e.error
    }
}

/// This run of this server, as heads and journals name it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Identity(Writer);

impl Identity {
    /// A new run over a cache root.
    pub fn of(cache_root_id: RandomId) -> Self {
        Self(Writer { cache_root_id, session_id: RandomId::generate() })
    }

    pub fn writer(&self) -> Writer {
        self.0
    }

    /// Whether a head was written by a server over a cache root of this one's id.
    pub fn shares_cache_root_with(&self, head: &Head) -> bool {
        head.writer().is_some_and(|writer| writer.cache_root_id == self.0.cache_root_id)
    }
}

impl Services {
    /// `volume.json`, or `None` if there is no such export.
    pub(super) async fn read_head(&self, id: &ExportId) -> Result<Option<StoredHead>, ExportError> {
        let key = self.root.export(id).head();
        match self.store.get(&key, MAX_HEAD_BYTES).await {
            Ok(object) => {
                let head = Head::decode(&object.bytes, id, &key).map_err(ExportError::damaged)?;
                Ok(Some(StoredHead { head, version: object.version }))
            }
            Err(StoreError::NotFound { .. }) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    /// Creates the head of an export that has none.
    pub(super) async fn create_head(&self, head: &Head) -> Result<Swap, SwapError> {
        self.write_head(None, head).await
    }

    /// Replaces exactly the head `from` by `next`.
    pub(super) async fn swap_head(&self, from: &StoredHead, next: &Head) -> Result<Swap, SwapError> {
        self.write_head(Some(from), next).await
    }

    /// Writes `next` in the place of `from`, again while the head stays as it was and there is time.
    async fn write_head(&self, from: Option<&StoredHead>, next: &Head) -> Result<Swap, SwapError> {
        let key = self.root.export(&next.export_id).head();
        let mut patience = self.patience();
        let (mut may_land, mut acknowledged) = (false, false);
        loop {
            let condition = match from {
                Some(_) if breaks(Rule::SwapUnconditionally) => Condition::Always,
                Some(from) => Condition::IfVersion(from.version.clone()),
                None => Condition::IfAbsent,
            };
            let failure = match self.store.put(&key, next.encode().into(), condition).await {
                Ok(_) if breaks(Rule::BelieveSwapAnswer) => return Ok(Swap::Landed),
                Ok(_) => {
                    (may_land, acknowledged) = (true, true);
                    not_stored(&key)
                }
                Err(e @ StoreError::Conflict { .. }) => e,
                Err(e @ StoreError::Unavailable { .. }) => {
                    may_land = true;
                    e
                }
                Err(e) => return Err(SwapError { error: e.into(), may_land, acknowledged }),
            };
            if may_land && !acknowledged && breaks(Rule::TakeUnclearForFailed) {
                return Err(SwapError { error: failure.into(), may_land: false, acknowledged });
            }
            let found = self.read_head(&next.export_id).await;
            let found =
                found.map_err(|e| SwapError { error: not_read_back(&key, &e), may_land: true, acknowledged })?;
            match (found, from) {
                (Some(found), _) if found.head == *next => return Ok(Swap::Landed),
                (Some(found), Some(from)) if found.version == from.version => {}
                (Some(found), _) => return Ok(Swap::Lost { found: Box::new(found), answered: !may_land }),
                (None, Some(_)) => return Err(SwapError { error: head_is_gone(&key), may_land, acknowledged }),
                (None, None) => {}
            }
            patience.pause_after(failure).await.map_err(|e| SwapError { error: e.into(), may_land, acknowledged })?;
        }
    }
}

fn not_stored(key: &Key) -> StoreError {
    let source = "the store answered that it had written the object, but a read finds it as it was before".into();
    StoreError::Unavailable { operation: "put", key: key.clone(), source }
}

fn not_read_back(key: &Key, e: &ExportError) -> ExportError {
    ExportError::StoreUnavailable(
        format!("whether {key} was written is not known, since it cannot be read: {e}").into(),
    )
}

pub(super) fn head_is_gone(key: &Key) -> ExportError {
    let text = format!("{key} is gone: the export was deleted in the store; restore the object or unload the export");
    ExportError::Damaged(text.into())
}
