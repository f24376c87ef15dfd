//! Switches that break one rule each, so that the tests themselves can be tested.
//!
//! `NBD_SABOTAGE=skip-raw-sync cargo test --features sabotage` builds a server that breaks the rule of that name, and
//! at least one test must fail; `scripts/sabotage.py` tries all of them, and `docs/testing.md` says which test catches
//! which. The choice is made by the compiler: without the feature every switch is the constant `false`, and nothing of
//! it is in the program.

/// A rule that can be broken; the numbers are those of `docs/testing.md`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "docs/testing.md has a line on each")]
pub enum Rule {
    SkipMark,
    MarkBeforeWholeOverwrite,
    BytesBeforeMark,
    SkipRawSync,
    SealBeforeRawSync,
    SkipSealSync,
    JoinRunningBarrier,
    TrustUnsealed,
    TrustCleanAfterPowerLoss,
    SealBeforeData,
    SkipCheckpointSync,
    SkipDirSync,
    ReuseSpareAtOnce,
    WriteSpareAtOnce,
    IgnoreDamage,
    RetrySync,
    ReadAfterFailedSync,
    ForgetFailedSync,
    MarkWithoutRoom,
    ServeUnverified,
    CleanBeforeBytes,
    KeepStaleFill,
    PunchBeforeMark,
    TrimForgets,
    TrustMissingBytes,
    PunchBeforeReset,
    PunchBeforeEviction,
    PunchRefilled,
    IgnoreOrder,
    SkipAside,
    TakeForAnotherCut,
    CleanRedirtied,
    CleanUnseen,
    HashOtherBytes,
    SkipIntent,
    SwapBeforeManifest,
    SkipPrepared,
    SkipCutSync,
    DropJournalBeforeMarks,
    TakeUnclearForFailed,
    BelieveSwapAnswer,
    SwapFromNewestHead,
    RemoveAtIntent,
    RetryConditionalPut,
    DeleteBeforeFence,
    OverwriteForeignHead,
    SwapUnconditionally,
    BelieveStore,
    FollowRedirects,
}

/// All rules by the names under which they are chosen.
#[cfg(feature = "sabotage")]
const NAMES: &[(&str, Rule)] = &[
    ("skip-mark", Rule::SkipMark),
    ("mark-before-whole-overwrite", Rule::MarkBeforeWholeOverwrite),
    ("bytes-before-mark", Rule::BytesBeforeMark),
    ("skip-raw-sync", Rule::SkipRawSync),
    ("seal-before-raw-sync", Rule::SealBeforeRawSync),
    ("skip-seal-sync", Rule::SkipSealSync),
    ("join-running-barrier", Rule::JoinRunningBarrier),
    ("trust-unsealed", Rule::TrustUnsealed),
    ("trust-clean-after-power-loss", Rule::TrustCleanAfterPowerLoss),
    ("seal-before-data", Rule::SealBeforeData),
    ("skip-checkpoint-sync", Rule::SkipCheckpointSync),
    ("skip-dir-sync", Rule::SkipDirSync),
    ("reuse-spare-at-once", Rule::ReuseSpareAtOnce),
    ("write-spare-at-once", Rule::WriteSpareAtOnce),
    ("ignore-damage", Rule::IgnoreDamage),
    ("retry-sync", Rule::RetrySync),
    ("read-after-failed-sync", Rule::ReadAfterFailedSync),
    ("forget-failed-sync", Rule::ForgetFailedSync),
    ("mark-without-room", Rule::MarkWithoutRoom),
    ("serve-unverified", Rule::ServeUnverified),
    ("clean-before-bytes", Rule::CleanBeforeBytes),
    ("keep-stale-fill", Rule::KeepStaleFill),
    ("punch-before-mark", Rule::PunchBeforeMark),
    ("trim-forgets", Rule::TrimForgets),
    ("trust-missing-bytes", Rule::TrustMissingBytes),
    ("punch-before-reset", Rule::PunchBeforeReset),
    ("punch-before-eviction", Rule::PunchBeforeEviction),
    ("punch-refilled", Rule::PunchRefilled),
    ("ignore-order", Rule::IgnoreOrder),
    ("skip-aside", Rule::SkipAside),
    ("take-for-another-cut", Rule::TakeForAnotherCut),
    ("clean-redirtied", Rule::CleanRedirtied),
    ("clean-unseen", Rule::CleanUnseen),
    ("hash-other-bytes", Rule::HashOtherBytes),
    ("skip-intent", Rule::SkipIntent),
    ("swap-before-manifest", Rule::SwapBeforeManifest),
    ("skip-prepared", Rule::SkipPrepared),
    ("skip-cut-sync", Rule::SkipCutSync),
    ("drop-journal-before-marks", Rule::DropJournalBeforeMarks),
    ("take-unclear-for-failed", Rule::TakeUnclearForFailed),
    ("believe-swap-answer", Rule::BelieveSwapAnswer),
    ("swap-from-newest-head", Rule::SwapFromNewestHead),
    ("remove-at-intent", Rule::RemoveAtIntent),
    ("retry-conditional-put", Rule::RetryConditionalPut),
    ("delete-before-fence", Rule::DeleteBeforeFence),
    ("overwrite-foreign-head", Rule::OverwriteForeignHead),
    ("swap-unconditionally", Rule::SwapUnconditionally),
    ("believe-store", Rule::BelieveStore),
    ("follow-redirects", Rule::FollowRedirects),
];

/// Whether this build breaks the rule.
#[cfg(feature = "sabotage")]
#[must_use]
pub const fn breaks(rule: Rule) -> bool {
    const CHOSEN: Option<Rule> = chosen(option_env!("NBD_SABOTAGE"));
    matches!(CHOSEN, Some(chosen) if chosen as u8 == rule as u8)
}

#[cfg(feature = "sabotage")]
#[allow(clippy::panic, reason = "at compile time")]
const fn chosen(name: Option<&str>) -> Option<Rule> {
    let Some(name) = name else { return None };
    let mut at = 0;
    while at < NAMES.len() {
        if same(NAMES[at].0.as_bytes(), name.as_bytes()) {
            return Some(NAMES[at].1);
        }
        at += 1;
    }
    panic!("NBD_SABOTAGE names no rule")
}

#[cfg(feature = "sabotage")]
const fn same(a: &[u8], b: &[u8]) -> bool {
    let (mut at, mut same) = (0, a.len() == b.len());
    while same && at < a.len() {
        same = a[at] == b[at];
        at += 1;
    }
    same
}

/// Whether this build breaks the rule: never.
#[cfg(not(feature = "sabotage"))]
#[must_use]
pub const fn breaks(_: Rule) -> bool {
    false
}
