//! Whether a store honours conditional writes: asked at start, of the store itself (rule R1).
//!
//! Without them two servers that publish the same export would overwrite each other's head, and neither would know.
//! Some stores accept the condition and ignore it, so only trying tells. The probe writes a few small objects of its
//! own under `<export-root>/.probe/`, a name no export can have, and removes them.

use bytes::Bytes;
use futures_util::future::join_all;

use super::keys::ExportRoot;
use super::{Condition, Key, Store, StoreError, Version};
use crate::sabotage::{Rule, breaks};

/// How many writers race for one key.
pub const RACERS: usize = 8;
/// The largest object the probe reads back, in bytes.
const MAX_PROBE_BYTES: u64 = 1024;

/// Why a store is not written to.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// It breaks the contract.
    #[error(
        "the store is not safe to write to: {finding} (object {key}). Without conditional writes two servers could \
         overwrite each other's images; use a store that supports If-Match and If-None-Match on PUT"
    )]
    Unfit {
        /// The object it was seen on.
        key: Key,
        /// What it did.
        finding: Finding,
    },
    /// It could not be asked.
    #[error("{0} (at the start-up probe of the store)")]
    Store(#[from] StoreError),
}

/// What a store did wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Finding {
    /// Create-if-absent of a new key met a conflict.
    #[error("it refused to create a new object on the condition that there is none")]
    NewRefused,
    /// Create-if-absent of an existing key went through.
    #[error("it replaced an object that was to be created only if absent")]
    ExistingReplaced,
    /// A swap with a version that is not the object's went through.
    #[error("it replaced an object although the version asked for was not its version")]
    StaleReplaced,
    /// A swap with the object's version met a conflict.
    #[error("it refused to replace an object although the version asked for was its version")]
    CurrentRefused,
    /// The version after a put is not what a read reports.
    #[error("it reports another version when an object is read than when it was written")]
    VersionDiffers,
    /// The version stayed when the bytes changed.
    #[error("it gives an object with new content its old version")]
    VersionStuck,
    /// A read does not return what the last successful write wrote.
    #[error("it does not return the content that was written last")]
    WrongContent,
    /// Several of the racers were told that they won.
    #[error("of {RACERS} writers that raced for one object, {0} were told that they won")]
    Winners(usize),
}

/// Tries out every promise that the head of an export depends on.
///
/// # Errors
/// [`ProbeError::Unfit`] names the promise broken; [`ProbeError::Store`] if the store could not be asked.
pub async fn probe(store: &dyn Store, root: &ExportRoot) -> Result<(), ProbeError> {
    if breaks(Rule::BelieveStore) {
        return Ok(());
    }
    // Two servers may start at once.
    let name = uuid::Uuid::now_v7().simple();
    let one = root.probe(&format!("{name}-one"));
    let race = root.probe(&format!("{name}-race"));
    let verdict = async {
        alone(store, &one).await?;
        racing(store, &race).await
    }
    .await;
    for key in [&one, &race] {
        if let Err(error) = store.delete(key).await {
            // A store that could not even be asked has nothing of ours.
            if !matches!(verdict, Err(ProbeError::Store(_))) {
                tracing::warn!(%key, %error, "could not remove an object of the start-up probe; delete it by hand");
            }
        }
    }
    verdict
}

/// A conditional put whose two clear answers are yes and no.
async fn attempt(
    store: &dyn Store,
    key: &Key,
    content: &Bytes,
    condition: Condition,
) -> Result<Option<Version>, StoreError> {
    match store.put(key, content.clone(), condition).await {
        Ok(version) => Ok(Some(version)),
        Err(StoreError::Conflict { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

/// One writer, step by step.
async fn alone(store: &dyn Store, key: &Key) -> Result<(), ProbeError> {
    let unfit = |finding| Err(ProbeError::Unfit { key: key.clone(), finding });
    let [first, second, third] = ["first", "second", "third"].map(Bytes::from);

    let Some(created) = attempt(store, key, &first, Condition::IfAbsent).await? else {
        return unfit(Finding::NewRefused);
    };
    if attempt(store, key, &second, Condition::IfAbsent).await?.is_some() {
        return unfit(Finding::ExistingReplaced);
    }
    let Some(swapped) = attempt(store, key, &second, Condition::IfVersion(created.clone())).await? else {
        return unfit(Finding::CurrentRefused);
    };
    if swapped == created {
        return unfit(Finding::VersionStuck);
    }
    // A version the store has known, rather than an invented one that might be refused for its form.
    if attempt(store, key, &third, Condition::IfVersion(created)).await?.is_some() {
        return unfit(Finding::StaleReplaced);
    }
    let read = store.get(key, MAX_PROBE_BYTES).await?;
    if read.bytes != second {
        return unfit(Finding::WrongContent);
    }
    if read.version != swapped {
        return unfit(Finding::VersionDiffers);
    }
    store.delete(key).await?;
    if attempt(store, key, &third, Condition::IfVersion(swapped)).await?.is_some() {
        return unfit(Finding::StaleReplaced);
    }
    Ok(())
}

/// Many writers at once: first to create, then to replace.
async fn racing(store: &dyn Store, key: &Key) -> Result<(), ProbeError> {
    heat(store, key, "create", Condition::IfAbsent, Finding::NewRefused).await?;
    let standing = store.get(key, MAX_PROBE_BYTES).await?.version;
    heat(store, key, "swap", Condition::IfVersion(standing), Finding::CurrentRefused).await
}

/// One race. Without a winner it proves nothing if one of the answers was unclear.
async fn heat(
    store: &dyn Store,
    key: &Key,
    name: &str,
    condition: Condition,
    no_winner: Finding,
) -> Result<(), ProbeError> {
    let contents: Vec<Bytes> = (0..RACERS).map(|racer| Bytes::from(format!("{name} {racer}"))).collect();
    let answers = join_all(contents.iter().map(|content| attempt(store, key, content, condition.clone()))).await;
    let mut winner = None;
    let mut winners = 0;
    let mut unclear = None;
    for (answer, content) in answers.into_iter().zip(&contents) {
        match answer {
            Ok(Some(_)) => {
                winners += 1;
                winner = Some(content);
            }
            Ok(None) => {}
            Err(e @ StoreError::Unavailable { .. }) => unclear = Some(e),
            Err(e) => return Err(e.into()),
        }
    }
    let unfit = |finding| Err(ProbeError::Unfit { key: key.clone(), finding });
    if winners > 1 {
        return unfit(Finding::Winners(winners));
    }
    match (winner, unclear) {
        (None, Some(e)) => Err(e.into()),
        (None, None) => unfit(no_winner),
        (Some(content), _) if store.get(key, MAX_PROBE_BYTES).await?.bytes != *content => unfit(Finding::WrongContent),
        (Some(_), _) => Ok(()),
    }
}

#[cfg(test)]
mod tests;
