//! `cache.meta`, as bytes: a checkpoint of all chunk states, and a log of what changed since.
//!
//! ```text
//! 0      header, 4096 bytes (see `Header::encode`), ends in a BLAKE3 of itself
//! 4096   runs: {count u32, state u8, 0 0 0}…, their BLAKE3 stands in the header; padded to 32 bytes
//! …      records, 32 bytes each: {seq u64, durable u64, value u64, kind u8, 0 0 0, check u32}
//! ```
//! All integers are little-endian. Invariants:
//! - A checkpoint is written whole to another file and synced before the two change places: it is never torn.
//! - Records carry consecutive numbers; 32 divides 512, so no record spans two sectors, and a torn write damages
//!   whole records. Each names the newest record known durable when it was written: a damaged record that a later
//!   one calls durable is corruption and refused by name; any other damage is a torn tail and ends the log.
//! - A `Seal` vouches for all marks up to the number it names: their bytes in `cache.raw` were synced before it was
//!   written. After the host went down nothing else counts.
//!
//! This file never touches a disk and trusts no byte that it is given.

use super::states::{ChunkState, Content};
use crate::sabotage::{Rule, breaks};
use crate::units::{ChunkIndex, ExportId, Generation, Geometry, RandomId, SnapshotId};

/// The fixed size of the header, in bytes.
pub const HEADER_BYTES: usize = 4096;
/// The size of a log record, in bytes.
pub const RECORD_BYTES: usize = 32;
/// The size of a run, in bytes.
pub const RUN_BYTES: usize = 8;
const MAGIC: &[u8; 8] = b"NBDCACHE";
const VERSION: u32 = 1;
const HASH_AT: usize = HEADER_BYTES - 32;
const ID_AT: usize = 128;
const INCARNATION_AT: usize = 256;
/// No log comes near it; so counting on from a number in a file never overflows.
const MAX_SEQ: u64 = 1 << 62;

/// Why a `cache.meta` cannot be used. The texts name the field; the caller adds the path.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MetaError {
    /// Something is not as this server wrote it.
    #[error("{0} is damaged")]
    Damaged(String),
    /// Written by a newer server.
    #[error("its version is {0}, this server knows {VERSION}: use the server that wrote it")]
    Version(u32),
    /// It describes another image than the head does.
    #[error("its {field} is {found}, but the head says {expected}")]
    Mismatch {
        /// What differs.
        field: &'static str,
        /// As in the file.
        found: String,
        /// As in the head.
        expected: String,
    },
}

/// The published snapshot that clean and absent chunks stand for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Base {
    /// The snapshot, or `None` for an image of zeros that was never published.
    pub snapshot: Option<SnapshotId>,
    /// The export's own generation: 0 for a clone before its first publish.
    pub generation: Generation,
}

/// What the first 4096 bytes say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// The export the cache belongs to.
    pub export_id: ExportId,
    /// The image's sizes.
    pub geometry: Geometry,
    /// The snapshot the states are relative to.
    pub base: Base,
    /// The incarnation of the export; `None` if its head has none, or an older server wrote the file.
    pub incarnation: Option<RandomId>,
    /// The boot in which the file was written.
    pub boot_id: [u8; 16],
    /// The number of the first record.
    pub first_seq: u64,
}

/// One entry of the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Record {
    /// A chunk has new content; it leaves the cut, if it was in it.
    Mark(ChunkIndex, Content),
    /// All marks up to this number are backed by synced bytes.
    Seal(u64),
    /// A publish began: whatever is dirty is part of it.
    Cut,
    /// The publish was given up.
    Uncut,
    /// The server stopped in good order; nothing follows.
    CleanStop,
}

impl Record {
    fn parts(self) -> (u8, u64) {
        match self {
            Self::Mark(chunk, content) => (ChunkState::new(content).durable_bits(), u64::from(chunk.0)),
            Self::Seal(through) => (8, through),
            Self::Cut => (9, 0),
            Self::Uncut => (10, 0),
            Self::CleanStop => (11, 0),
        }
    }

    /// What record `seq` says, or what in it is wrong.
    fn from_parts(seq: u64, kind: u8, value: u64) -> Result<Self, String> {
        let content = ChunkState::from_durable_bits(kind).map(ChunkState::content);
        match (kind, content) {
            (0..=3, Some(content)) => {
                let chunk = u32::try_from(value).map_err(|_| format!("chunk {value}"))?;
                Ok(Self::Mark(ChunkIndex(chunk), content))
            }
            (8, _) if value >= seq => Err(format!("it seals marks up to {value}, which come after it")),
            (8, _) => Ok(Self::Seal(value)),
            (9..=11, _) if value != 0 => Err(format!("its value is {value}, but should be 0")),
            (9, _) => Ok(Self::Cut),
            (10, _) => Ok(Self::Uncut),
            (11, _) => Ok(Self::CleanStop),
            _ => Err(format!("kind {kind}")),
        }
    }

    /// The record's 32 bytes. `epoch` ties it to its file, so that a stale block of another one never passes.
    #[must_use]
    pub fn encode(self, seq: u64, durable: u64, epoch: u64) -> [u8; RECORD_BYTES] {
        let (kind, value) = self.parts();
        let mut bytes = [0; RECORD_BYTES];
        bytes[0..8].copy_from_slice(&seq.to_le_bytes());
        bytes[8..16].copy_from_slice(&durable.to_le_bytes());
        bytes[16..24].copy_from_slice(&value.to_le_bytes());
        bytes[24] = kind;
        let check = record_check(&bytes[..28], epoch);
        bytes[28..32].copy_from_slice(&check);
        bytes
    }

    /// The numbers of a record that is whole, and what it says; what was never written whole is `None`.
    fn decode(bytes: &[u8], epoch: u64) -> Option<(u64, u64, Result<Self, String>)> {
        if bytes.len() != RECORD_BYTES || bytes[28..32] != record_check(&bytes[..28], epoch) {
            return None;
        }
        let seq = u64_at(bytes, 0);
        Some((seq, u64_at(bytes, 8), Self::from_parts(seq, bytes[24], u64_at(bytes, 16))))
    }
}

fn record_check(bytes: &[u8], epoch: u64) -> [u8; 4] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&epoch.to_le_bytes()).update(bytes);
    let mut check = [0; 4];
    check.copy_from_slice(&hasher.finalize().as_bytes()[..4]);
    check
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(word)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_le_bytes(word)
}

fn id_at(bytes: &[u8], at: usize) -> [u8; 16] {
    let mut id = [0; 16];
    id.copy_from_slice(&bytes[at..at + 16]);
    id
}

/// A checkpoint as bytes: header and runs, and the epoch its records carry.
#[must_use]
pub fn encode_checkpoint(header: &Header, states: &[ChunkState]) -> (Vec<u8>, u64) {
    let mut runs = Vec::new();
    for run in states.chunk_by(|a, b| a.durable_bits() == b.durable_bits()) {
        // A run is at most MAX_CHUNKS long, which fits.
        runs.extend_from_slice(&u32::try_from(run.len()).unwrap_or(u32::MAX).to_le_bytes());
        runs.extend_from_slice(&[run[0].durable_bits(), 0, 0, 0]);
    }
    let mut bytes = vec![0; HEADER_BYTES];
    bytes[0..8].copy_from_slice(MAGIC);
    bytes[8..12].copy_from_slice(&VERSION.to_le_bytes());
    bytes[16..24].copy_from_slice(&header.geometry.image_size().to_le_bytes());
    bytes[24..32].copy_from_slice(&header.geometry.chunk_size().to_le_bytes());
    bytes[32..40].copy_from_slice(&header.base.generation.0.to_le_bytes());
    bytes[40..56].copy_from_slice(&header.base.snapshot.map_or([0; 16], SnapshotId::to_bytes));
    bytes[56..72].copy_from_slice(&header.boot_id);
    bytes[72..80].copy_from_slice(&header.first_seq.to_le_bytes());
    bytes[80..88].copy_from_slice(&(runs.len() as u64).to_le_bytes());
    bytes[88..120].copy_from_slice(blake3::hash(&runs).as_bytes());
    let id = header.export_id.as_str().as_bytes();
    bytes[120..128].copy_from_slice(&(id.len() as u64).to_le_bytes());
    bytes[ID_AT..ID_AT + id.len()].copy_from_slice(id);
    let incarnation = header.incarnation.map_or([0; 16], RandomId::to_bytes);
    bytes[INCARNATION_AT..INCARNATION_AT + 16].copy_from_slice(&incarnation);
    let hash = blake3::hash(&bytes[..HASH_AT]);
    bytes[HASH_AT..].copy_from_slice(hash.as_bytes());
    bytes.extend_from_slice(&runs);
    bytes.resize(bytes.len().next_multiple_of(RECORD_BYTES), 0);
    (bytes, epoch_of(hash.as_bytes()))
}

fn epoch_of(header_hash: &[u8]) -> u64 {
    u64_at(header_hash, 0)
}

/// How much of the file counts, by what happened to the server that wrote it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Trust {
    /// It stopped in good order: everything.
    CleanStop,
    /// The process died, the kernel lived: every mark, for the page cache lived, too.
    SameBoot,
    /// The host went down: sealed marks alone, and no clean chunk.
    SealedOnly,
}

/// A whole `cache.meta`, checked and replayed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Replayed {
    /// The header as written.
    pub header: Header,
    /// What every chunk is, by [`Trust`].
    pub states: Vec<ChunkState>,
    /// What happened to the server that wrote the file.
    pub trust: Trust,
    /// The number the next checkpoint starts at.
    pub next_seq: u64,
}

/// Reads a whole file, of which nothing is known, for a server in boot `boot_id`.
///
/// # Errors
/// [`MetaError`] if it is no `cache.meta`, of another version, or damaged in a place that had been made durable.
pub fn decode(bytes: &[u8], boot_id: [u8; 16]) -> Result<Replayed, MetaError> {
    let (header, runs_len, runs_hash, epoch) = decode_header(bytes)?;
    let runs_end = HEADER_BYTES.checked_add(runs_len).filter(|end| *end <= bytes.len());
    let runs_end = runs_end.ok_or_else(|| MetaError::Damaged("the length of its chunk states".into()))?;
    let runs = &bytes[HEADER_BYTES..runs_end];
    if blake3::hash(runs).as_bytes() != &runs_hash {
        return Err(MetaError::Damaged("the table of its chunk states".into()));
    }
    let mut states = decode_runs(runs, header.geometry.chunk_count())?;
    let log_at = runs_end.next_multiple_of(RECORD_BYTES).min(bytes.len());
    let log = decode_log(&bytes[log_at..], header.first_seq, epoch)?;
    let trust = match log.last() {
        Some((_, Record::CleanStop)) => Trust::CleanStop,
        _ if header.boot_id == boot_id => Trust::SameBoot,
        _ => Trust::SealedOnly,
    };
    replay(&mut states, &log, trust)?;
    let next_seq = log.last().map_or(header.first_seq, |(seq, _)| seq + 1);
    Ok(Replayed { header, states, trust, next_seq })
}

fn decode_header(bytes: &[u8]) -> Result<(Header, usize, [u8; 32], u64), MetaError> {
    let damaged = |what: &str| MetaError::Damaged(what.to_owned());
    if bytes.len() < HEADER_BYTES || &bytes[0..8] != MAGIC {
        return Err(damaged("its header (no magic number)"));
    }
    let version = u32_at(bytes, 8);
    if version != VERSION {
        return Err(MetaError::Version(version));
    }
    let hash = blake3::hash(&bytes[..HASH_AT]);
    if hash.as_bytes() != &bytes[HASH_AT..HEADER_BYTES] {
        return Err(damaged("its header (checksum)"));
    }
    let geometry =
        Geometry::new(u64_at(bytes, 16), u64_at(bytes, 24)).map_err(|e| damaged(&format!("its header ({e})")))?;
    let (snapshot, boot_id) = (id_at(bytes, 40), id_at(bytes, 56));
    let mut runs_hash = [0; 32];
    runs_hash.copy_from_slice(&bytes[88..120]);
    let id_len = usize::try_from(u64_at(bytes, 120)).unwrap_or(usize::MAX);
    let id = bytes.get(ID_AT..).and_then(|rest| rest.get(..id_len.min(HASH_AT))).unwrap_or_default();
    let id = std::str::from_utf8(id).ok().and_then(|id| id.parse().ok());
    let export_id: ExportId = id.ok_or_else(|| damaged("the export id in its header"))?;
    let first_seq = u64_at(bytes, 72);
    if !(1..=MAX_SEQ).contains(&first_seq) {
        return Err(damaged(&format!("the number of the first log record in its header ({first_seq})")));
    }
    let base = Base {
        snapshot: (snapshot != [0; 16]).then(|| SnapshotId::from_bytes(snapshot)),
        generation: Generation(u64_at(bytes, 32)),
    };
    if base.snapshot.is_none() && base.generation != Generation(0) {
        let text = format!("the base in its header (generation {} without a snapshot)", base.generation);
        return Err(damaged(&text));
    }
    let incarnation = RandomId::from_bytes(id_at(bytes, INCARNATION_AT));
    let header = Header { export_id, geometry, base, incarnation, boot_id, first_seq };
    let runs_len = usize::try_from(u64_at(bytes, 80)).map_err(|_| damaged("the length of its chunk states"))?;
    Ok((header, runs_len, runs_hash, epoch_of(hash.as_bytes())))
}

fn decode_runs(runs: &[u8], chunk_count: u32) -> Result<Vec<ChunkState>, MetaError> {
    let damaged = || MetaError::Damaged("the table of its chunk states".into());
    let mut states = Vec::with_capacity(chunk_count as usize);
    for run in runs.chunks(RUN_BYTES) {
        let count = (run.len() == RUN_BYTES).then(|| u32_at(run, 0) as usize).ok_or_else(damaged)?;
        let state = ChunkState::from_durable_bits(run[4]).ok_or_else(damaged)?;
        if states.len() + count > chunk_count as usize {
            return Err(damaged());
        }
        states.resize(states.len() + count, state);
    }
    if states.len() == chunk_count as usize { Ok(states) } else { Err(damaged()) }
}

fn decode_log(log: &[u8], first_seq: u64, epoch: u64) -> Result<Vec<(u64, Record)>, MetaError> {
    let mut records = Vec::new();
    for (expected, (i, bytes)) in (first_seq..).zip(log.chunks(RECORD_BYTES).enumerate()) {
        match Record::decode(bytes, epoch) {
            // Whole, so no torn tail: what it says counts, or the file is refused.
            Some((seq, _, record)) if seq == expected => {
                let damaged = |problem| MetaError::Damaged(format!("record {seq} of its log ({problem})"));
                records.push((seq, record.map_err(damaged)?));
            }
            _ => {
                // A record stands where its number says; what else passes for one is left from an older use of the file.
                let later = (expected..).zip(log[i * RECORD_BYTES..].chunks(RECORD_BYTES));
                let mut later = later.filter_map(|(at, b)| Record::decode(b, epoch).filter(|(seq, ..)| *seq == at));
                if later.any(|(_, durable, _)| durable >= expected) && !breaks(Rule::IgnoreDamage) {
                    return Err(MetaError::Damaged(format!("record {expected} of its log")));
                }
                break;
            }
        }
    }
    Ok(records)
}

fn replay(states: &mut [ChunkState], log: &[(u64, Record)], trust: Trust) -> Result<(), MetaError> {
    let sealed = log.iter().rev().find_map(|(_, r)| if let Record::Seal(through) = r { Some(*through) } else { None });
    for (seq, record) in log {
        match *record {
            Record::Mark(chunk, content) => {
                let state = states.get_mut(chunk.slot());
                let state =
                    state.ok_or_else(|| MetaError::Damaged(format!("record {seq} of its log (chunk {chunk})")))?;
                let counts = sealed.is_some_and(|through| *seq <= through) || breaks(Rule::TrustUnsealed);
                if trust != Trust::SealedOnly || counts {
                    *state = ChunkState::new(content);
                }
            }
            Record::Cut => states.iter_mut().for_each(|s| *s = s.uncut().cut().taken()),
            Record::Uncut => states.iter_mut().for_each(|s| *s = s.uncut()),
            Record::Seal(_) | Record::CleanStop => {}
        }
    }
    if trust == Trust::SealedOnly && !breaks(Rule::TrustCleanAfterPowerLoss) {
        let clean = ChunkState::new(Content::Clean);
        states.iter_mut().filter(|s| **s == clean).for_each(|s| *s = ChunkState::new(Content::Absent));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
