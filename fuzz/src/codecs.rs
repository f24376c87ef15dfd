//! Files and objects: arbitrary bytes are refused with a short error, or mean one thing; nothing is guessed.
//!
//! Checksums would keep nearly all mutated bytes out of the code behind them, so each checked format is tried a second
//! time with its checksums made right.

use std::fmt::Display;

use nbd_server::cache::journal::Journal;
use nbd_server::cache::meta::{self, HEADER_BYTES, RECORD_BYTES, Trust};
use nbd_server::cache::states::Content;
use nbd_server::manifest::format;
use nbd_server::manifest::head::{CloneSeed, CurrentRef, Head};
use nbd_server::store::Key;
use nbd_server::store::keys::ExportRoot;
use nbd_server::units::{ChunkIndex, ExportId};
use serde_json::Value;

/// An error is read by people: it names what is wrong and never repeats a whole file.
const MAX_ERROR_BYTES: usize = 2048;

fn check_error(error: &impl Display, names: &str) {
    let text = error.to_string();
    assert!(
        text.len() <= MAX_ERROR_BYTES,
        "an error of {} bytes: {}",
        text.len(),
        &text[..text.floor_char_boundary(200)]
    );
    assert!(text.contains(names), "the error does not name {names}: {text}");
}

/// `cache.meta`.
pub fn cache_meta(data: &[u8]) {
    one_cache_meta(data);
    one_cache_meta(&resealed_meta(data));
}

fn one_cache_meta(bytes: &[u8]) {
    let boot: [u8; 16] = bytes.get(56..72).map_or([0; 16], |id| id.try_into().unwrap());
    let other_boot = boot.map(|byte| !byte);
    let found = match meta::decode(bytes, boot) {
        Ok(found) => found,
        Err(error) => return check_error(&error, "its "),
    };
    assert_eq!(found.states.len(), found.header.geometry.chunk_count() as usize);
    assert!(found.next_seq >= found.header.first_seq);
    let (checkpoint, _) = meta::encode_checkpoint(&found.header, &found.states);
    let again = meta::decode(&checkpoint, boot).expect("what was written is read");
    let durable = |states: &[nbd_server::cache::states::ChunkState]| -> Vec<u8> {
        states.iter().map(|state| state.durable_bits()).collect()
    };
    assert_eq!((&again.header, durable(&again.states)), (&found.header, durable(&found.states)));

    let after_power_loss = meta::decode(bytes, other_boot).expect("the boot decides on trust, not on damage");
    if after_power_loss.trust == Trust::SealedOnly {
        let clean = |state: &nbd_server::cache::states::ChunkState| state.content() == Content::Clean;
        assert!(!after_power_loss.states.iter().any(clean), "a clean chunk is trusted after a power loss");
    }
    // Every bit of the checkpoint counts.
    let mut flipped = checkpoint;
    let runs = u64::from_le_bytes(flipped[80..88].try_into().unwrap());
    flip_somewhere(bytes, &mut flipped[..HEADER_BYTES + usize::try_from(runs).unwrap()]);
    assert!(meta::decode(&flipped, boot).is_err(), "a flipped bit goes unnoticed");
}

/// Flips one bit, which one depends on `data`.
fn flip_somewhere(data: &[u8], bytes: &mut [u8]) {
    let hash = blake3::hash(data);
    let at = u64::from_le_bytes(hash.as_bytes()[..8].try_into().unwrap());
    let len = bytes.len() as u64;
    bytes[usize::try_from(at % len).unwrap()] ^= 1 << (hash.as_bytes()[8] % 8);
}

/// The same file with its magic number, version, lengths and checksums in order.
fn resealed_meta(data: &[u8]) -> Vec<u8> {
    let mut bytes = data.to_vec();
    bytes.resize(bytes.len().max(HEADER_BYTES), 0);
    bytes[0..8].copy_from_slice(b"NBDCACHE");
    bytes[8..12].copy_from_slice(&1u32.to_le_bytes());
    let there = (bytes.len() - HEADER_BYTES) as u64;
    let runs = u64::from_le_bytes(bytes[80..88].try_into().unwrap()).min(there);
    bytes[80..88].copy_from_slice(&runs.to_le_bytes());
    let runs_end = HEADER_BYTES + usize::try_from(runs).unwrap();
    let hash = blake3::hash(&bytes[HEADER_BYTES..runs_end]);
    bytes[88..120].copy_from_slice(hash.as_bytes());
    let hash = blake3::hash(&bytes[..HEADER_BYTES - 32]);
    bytes[HEADER_BYTES - 32..HEADER_BYTES].copy_from_slice(hash.as_bytes());
    let log = runs_end.next_multiple_of(RECORD_BYTES).min(bytes.len());
    for record in bytes[log..].chunks_exact_mut(RECORD_BYTES) {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&hash.as_bytes()[..8]).update(&record[..28]);
        record[28..32].copy_from_slice(&hasher.finalize().as_bytes()[..4]);
    }
    bytes
}

/// `snapshot.journal.json`.
pub fn journal(data: &[u8]) {
    one_journal(data);
    if let Some(bytes) = resealed_journal(data) {
        one_journal(&bytes);
    }
}

fn one_journal(bytes: &[u8]) {
    let found = match Journal::decode(bytes, &export_of(bytes, "/journal/export_id")) {
        Ok(found) => found,
        Err(error) => return check_error(&error, "it"),
    };
    let id = found.export_id.clone();
    let mut written = found.encode();
    assert_eq!(Journal::decode(&written, &id).as_ref(), Ok(&found));
    flip_somewhere(bytes, &mut written);
    // White space may change, and nothing else.
    let flipped = Journal::decode(&written, &id);
    assert!(flipped.is_err() || flipped == Ok(found), "a flipped bit goes unnoticed");
}

fn resealed_journal(data: &[u8]) -> Option<Vec<u8>> {
    let mut file: Value = serde_json::from_slice(data).ok()?;
    let journal: Journal = serde_json::from_value(file.get("journal")?.clone()).ok()?;
    let hash = blake3::hash(&serde_json::to_vec(&journal).ok()?);
    file["checksum"] = hash.to_hex().to_string().into();
    file["version"] = 1.into();
    serde_json::to_vec(&file).ok()
}

/// The export that a file says it is of, or one.
fn export_of(bytes: &[u8], pointer: &str) -> ExportId {
    let value: Option<Value> = serde_json::from_slice(bytes).ok();
    let id = value.as_ref().and_then(|value| value.pointer(pointer)?.as_str()?.parse().ok());
    id.unwrap_or_else(|| "vm-1".parse().unwrap())
}

fn root() -> ExportRoot {
    ExportRoot::new("exports".parse().unwrap())
}

fn key() -> Key {
    "exports/vm/object.json".parse().unwrap()
}

/// `manifest.json`.
pub fn manifest(data: &[u8]) {
    let id = export_of(data, "/export_id");
    let found = match format::decode(data, &key(), &id, None, &root()) {
        Ok(found) => found,
        Err(error) => return check_error(&error, key().as_str()),
    };
    let geometry = found.geometry();
    let ascending = found.entries().windows(2).all(|pair| pair[0].chunk < pair[1].chunk);
    assert!(ascending, "entries that do not ascend");
    for entry in found.entries() {
        let end = entry.offset.checked_add(geometry.chunk_range(entry.chunk).len()).unwrap();
        assert!(entry.chunk.0 < geometry.chunk_count() && i64::try_from(end).is_ok());
        assert!(found.blobs()[entry.blob as usize].as_str().starts_with("exports/"));
        assert!(!found.is_zero(entry.chunk));
        let _ = found.source(entry.chunk);
    }
    let _ = found.source(ChunkIndex(geometry.chunk_count() - 1));
    let written = format::encode(&found);
    assert!(written.len() as u64 <= format::max_bytes(geometry), "a manifest of ours that is too long to be read");
    assert_eq!(format::decode(&written, &key(), &id, Some(geometry), &root()).as_ref(), Ok(&found));
}

/// `volume.json`, and the two small files like it.
pub fn head(data: &[u8]) {
    let id = export_of(data, "/export_id");
    match Head::decode(data, &id, &key()) {
        Ok(found) => {
            assert_eq!(Head::decode(&found.encode(), &id, &key()).as_ref(), Ok(&found));
            assert_ne!(found.bumped().encode(), found.encode(), "a bump changes nothing");
        }
        Err(error) => check_error(&error, key().as_str()),
    }
    match CurrentRef::decode(data, &key()) {
        Ok(found) => assert_eq!(CurrentRef::decode(&found.encode(), &key()).as_ref(), Ok(&found)),
        Err(error) => check_error(&error, key().as_str()),
    }
    match CloneSeed::decode(data) {
        Ok(found) => assert_eq!(CloneSeed::decode(&found.encode()).as_ref(), Ok(&found)),
        Err(error) => check_error(&error, ""),
    }
}
