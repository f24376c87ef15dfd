//! Whether a store honours conditional writes: asked at start, of the store itself (rule R1).
//!
//! Without them two servers that publish the same export would overwrite each other's head, and neither would know.
//! Some stores accept the condition and ignore it, so only trying tells. The probe writes a few small objects of its
//! own under `<export-root>/.probe/`, a name no export can have, and removes them.
//!
//! A store that is throttled, or away for a moment, is probed all the same: each step is repeated by itself, and a put
//! without a clear answer is settled by reading what the object holds. No two steps write the same content.

use bytes::Bytes;
use futures_util::future::{join, join_all};

use super::keys::ExportRoot;
use super::retry::{Patience, Request, Retrying};
use super::{Condition, Key, Object, Store, StoreError, Version};
use crate::sabotage::{Rule, breaks};
use crate::units::{ByteRange, RandomId};

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
    /// A ranged read does not return just the range.
    #[error("it does not return exactly the bytes of a range of an object")]
    WrongRange,
    /// Several of the racers were told that they won.
    #[error("of {RACERS} writers that raced for one object, {0} were told that they won")]
    Winners(usize),
}

/// Tries out every promise that the head of an export depends on. Each step is repeated for as long as a request is.
///
/// # Errors
/// [`ProbeError::Unfit`] names the promise broken; [`ProbeError::Store`] if the store could not be asked.
pub async fn probe(store: &Retrying, root: &ExportRoot) -> Result<(), ProbeError> {
    if breaks(Rule::BelieveStore) {
        return Ok(());
    }
    // Two servers may start at once.
    let name = RandomId::generate();
    let one = root.probe(&format!("{name}-one"));
    let race = root.probe(&format!("{name}-race"));
    let created = put(store, &one, &"created".into(), &Condition::IfAbsent).await;
    let has_landed = matches!(created, Ok(Outcome::Landed { .. }));
    let verdict = async {
        alone(store, &one, created?).await?;
        racing(store, &race).await
    }
    .await;
    let left = match verdict {
        // The time for a store that is away is up.
        Err(ProbeError::Store(StoreError::Unavailable { .. })) if has_landed => {
            join(store.delete_once(&one), store.delete_once(&race)).await
        }
        Err(ProbeError::Store(StoreError::Unavailable { .. })) => return verdict,
        _ => join(store.delete(&one), store.delete(&race)).await,
    };
    for (key, removed) in [(&one, left.0), (&race, left.1)] {
        // A store that refused to be asked has nothing of ours.
        if let (Err(error), true) = (removed, has_landed || matches!(verdict, Err(ProbeError::Unfit { .. }))) {
            tracing::warn!(%key, %error, "could not remove an object of the start-up probe; delete it by hand");
        }
    }
    verdict
}

/// What a conditional put came to.
#[derive(Debug)]
enum Outcome {
    /// It took place.
    Landed {
        version: Version,
        /// Whether the put itself was answered with the version; else it was read afterwards.
        answered: bool,
    },
    /// It did not, and this is the object instead.
    Rejected(Option<Object>),
}

/// Puts until it is clear what came of it. After a conflict, too, the object is read: it may hold the content of an earlier
/// attempt, of ours or of a proxy's, or of a put that the store claims to have rejected.
async fn put(store: &Retrying, key: &Key, content: &Bytes, condition: &Condition) -> Result<Outcome, StoreError> {
    let mut patience = store.patience();
    loop {
        let rejected = match put_once(store, &patience, key, content, condition).await {
            Ok(version) => return Ok(Outcome::Landed { version, answered: true }),
            Err(StoreError::Conflict { .. }) => true,
            Err(failure @ StoreError::Unavailable { .. }) => {
                pause_after(&mut patience, failure).await?;
                false
            }
            Err(e) => return Err(e),
        };
        match read(store, key).await? {
            Some(object) if object.bytes == *content => {
                return Ok(Outcome::Landed { version: object.version, answered: false });
            }
            standing if rejected => return Ok(Outcome::Rejected(standing)),
            _ => {}
        }
    }
}

async fn put_once(
    store: &Retrying,
    patience: &Patience<'_>,
    key: &Key,
    content: &Bytes,
    condition: &Condition,
) -> Result<Version, StoreError> {
    let request = Request { operation: "put", key };
    patience.cut(request, store.put(key, content.clone(), condition.clone())).await
}

/// Waits before a put is repeated, and says so the first time: nothing else of a start shows yet.
async fn pause_after(patience: &mut Patience<'_>, failure: StoreError) -> Result<(), StoreError> {
    if patience.is_fresh() {
        // Why, the health of the store has said.
        tracing::warn!("the store does not answer yet, trying for up to {} s", patience.limit().as_secs());
    }
    patience.pause_after(failure).await
}

async fn read(store: &Retrying, key: &Key) -> Result<Option<Object>, StoreError> {
    match store.get(key, MAX_PROBE_BYTES).await {
        Ok(object) => Ok(Some(object)),
        Err(StoreError::NotFound { .. }) => Ok(None),
        Err(e) => Err(e),
    }
}

/// One writer, step by step, from what its creation of the object came to.
async fn alone(store: &Retrying, key: &Key, created: Outcome) -> Result<(), ProbeError> {
    let unfit = |finding| Err(ProbeError::Unfit { key: key.clone(), finding });
    let Outcome::Landed { version: mut current, .. } = created else {
        return unfit(Finding::NewRefused);
    };
    if let Outcome::Landed { .. } = put(store, key, &"created again".into(), &Condition::IfAbsent).await? {
        return unfit(Finding::ExistingReplaced);
    }
    // Until a swap is answered by itself: a version that was read says nothing of those that puts return.
    let mut turn = 0;
    let (stale, content, swapped) = loop {
        turn += 1;
        let content = Bytes::from(format!("swapped {turn}"));
        match put(store, key, &content, &Condition::IfVersion(current.clone())).await? {
            Outcome::Rejected(_) => return unfit(Finding::CurrentRefused),
            Outcome::Landed { version, .. } if version == current => return unfit(Finding::VersionStuck),
            Outcome::Landed { version, answered: true } => break (current, content, version),
            Outcome::Landed { version, .. } => current = version,
        }
    };
    // A version the store has known, rather than an invented one that might be refused for its form.
    match put(store, key, &"stale".into(), &Condition::IfVersion(stale)).await? {
        Outcome::Landed { .. } => return unfit(Finding::StaleReplaced),
        Outcome::Rejected(Some(read)) if read.bytes == content && read.version == swapped => {}
        Outcome::Rejected(Some(read)) if read.bytes == content => return unfit(Finding::VersionDiffers),
        Outcome::Rejected(_) => return unfit(Finding::WrongContent),
    }
    if !serves_a_range(store, key, &content).await? {
        return unfit(Finding::WrongRange);
    }
    store.delete(key).await?;
    match put(store, key, &"gone".into(), &Condition::IfVersion(swapped)).await? {
        Outcome::Landed { .. } => unfit(Finding::StaleReplaced),
        Outcome::Rejected(_) => Ok(()),
    }
}

/// Whether a part of an object's content can be read, as chunks are.
async fn serves_a_range(store: &Retrying, key: &Key, content: &Bytes) -> Result<bool, StoreError> {
    let inner = 1..content.len() - 1;
    let Some(range) = ByteRange::new(1, inner.len() as u64) else { return Ok(true) };
    match store.get_range_unless_refused(key, range).await {
        Ok(bytes) => Ok(bytes == content.slice(inner)),
        Err(error @ (StoreError::Refused { .. } | StoreError::Short { .. })) => {
            tracing::error!(%key, "a range of an object of the start-up probe cannot be read: {error}");
            Ok(false)
        }
        Err(e) => Err(e),
    }
}

/// Many writers at once: first to create, then to replace.
async fn racing(store: &Retrying, key: &Key) -> Result<(), ProbeError> {
    heat(store, key, "create", Condition::IfAbsent, Finding::NewRefused).await?;
    let standing = store.get(key, MAX_PROBE_BYTES).await?.version;
    heat(store, key, "swap", Condition::IfVersion(standing), Finding::CurrentRefused).await
}

/// One race, run again while nothing of it landed and one of the answers was unclear.
async fn heat(
    store: &Retrying,
    key: &Key,
    name: &str,
    condition: Condition,
    no_winner: Finding,
) -> Result<(), ProbeError> {
    let contents: Vec<Bytes> = (0..RACERS).map(|racer| Bytes::from(format!("{name} {racer}"))).collect();
    let unfit = |finding| Err(ProbeError::Unfit { key: key.clone(), finding });
    let mut patience = store.patience();
    loop {
        let race = contents.iter().map(|content| put_once(store, &patience, key, content, &condition));
        let (mut winners, mut unclear) = (Vec::new(), None);
        for (answer, content) in join_all(race).await.into_iter().zip(&contents) {
            match answer {
                Ok(_) => winners.push(content),
                Err(StoreError::Conflict { .. }) => {}
                Err(e @ StoreError::Unavailable { .. }) => unclear = Some(e),
                Err(e) => return Err(e.into()),
            }
        }
        if winners.len() > 1 {
            return unfit(Finding::Winners(winners.len()));
        }
        let standing = read(store, key).await?.map(|object| object.bytes);
        let landed = standing.filter(|standing| contents.contains(standing));
        match (winners.first(), landed, unclear) {
            (Some(winner), landed, _) if landed.as_ref() != Some(*winner) => return unfit(Finding::WrongContent),
            // Without an answer to the winner, what stands there tells that there was one.
            (_, Some(_), _) => return Ok(()),
            (_, None, Some(failure)) => pause_after(&mut patience, failure).await?,
            (_, None, None) => return unfit(no_winner),
        }
    }
}

#[cfg(test)]
mod tests;
