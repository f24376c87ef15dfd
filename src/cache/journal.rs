//! `snapshot.journal.json`: the publish under way, so that a start after a crash knows what to finish or undo.
//!
//! It is there exactly while a publish is in flight, and replaced in one step at each phase. A checksum covers all of
//! it: a damaged journal is refused by name, never guessed at.

use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::reserved::Reserved;
use crate::disk::Disk;
use crate::manifest::format::from_json;
use crate::units::{ExportId, Generation, RandomId, SnapshotId};

/// The file's name in the export's cache folder.
pub const JOURNAL_FILE: &str = "snapshot.journal.json";
/// Where older servers wrote it before it took its place.
pub const JOURNAL_STAGING: &str = "snapshot.journal.json.tmp";
/// The file, whose phases are written on a full disk as well.
pub const FILE: Reserved = Reserved {
    name: JOURNAL_FILE,
    spares: ["snapshot.journal.json.spare", "snapshot.journal.json.spare2"],
    max_bytes: 64 << 10,
};
/// Version 1 had neither `incarnation` nor `session_id`.
const VERSION: u64 = 2;

/// How far a publish came. What each means for recovery is told in `volume/recover.rs`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Phase {
    /// Objects may be uploaded; no swap was sent.
    Intent,
    /// All objects are there; a swap may have been sent.
    Prepared,
    /// The swap landed.
    Committed,
}

/// What is being published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The dirty chunks.
    Snapshot,
    /// The whole image.
    Compact,
}

impl Kind {
    /// As the API names it.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Snapshot => "snapshot",
            Self::Compact => "compact",
        }
    }
}

/// A publish under way.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Journal {
    /// How far it came.
    pub phase: Phase,
    /// What is being published.
    pub kind: Kind,
    /// The export.
    pub export_id: ExportId,
    /// The snapshot it will be.
    pub snapshot_id: SnapshotId,
    /// The head it builds on; `None` for an export's first.
    pub parent: Option<SnapshotId>,
    /// The generation it will be.
    pub generation: Generation,
    /// Its manifest, for whoever reads the file.
    pub manifest_key: String,
    /// Its blob, for whoever reads the file.
    pub blob_key: String,
    /// Tells the export from one of the same name that was deleted before; `None` in journals of older servers, and for
    /// exports that they created.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub incarnation: Option<RandomId>,
    /// The run of the server that publishes; `None` in journals of older servers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub session_id: Option<RandomId>,
}

/// Why a journal cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// Not as this server wrote it.
    #[error("it is damaged ({0})")]
    Damaged(String),
    /// Written by a newer server.
    #[error("its version is {0}, this server knows 1 to {VERSION}: use the server that wrote it")]
    Version(u64),
    /// It belongs to another export.
    #[error("its export_id is {0}, which is another export")]
    OtherExport(ExportId),
}

#[derive(Deserialize)]
struct Versioned {
    version: u64,
}

#[derive(Serialize, Deserialize)]
struct File {
    version: u64,
    checksum: String,
    journal: Journal,
}

impl Journal {
    /// The file's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let file = File { version: VERSION, checksum: self.checksum(), journal: self.clone() };
        // Plain fields always serialize.
        serde_json::to_vec_pretty(&file).unwrap_or_default()
    }

    /// The journal in a file, which should be that of `export_id`.
    ///
    /// # Errors
    /// [`JournalError`].
    pub fn decode(bytes: &[u8], export_id: &ExportId) -> Result<Self, JournalError> {
        // The version first: another one may have other fields.
        let version = from_json::<Versioned>(bytes).map_err(JournalError::Damaged)?.version;
        if !(1..=VERSION).contains(&version) {
            return Err(JournalError::Version(version));
        }
        let file: File = from_json(bytes).map_err(JournalError::Damaged)?;
        if file.checksum != file.journal.checksum() {
            return Err(JournalError::Damaged("its checksum is not that of its journal".into()));
        }
        if file.journal.export_id != *export_id {
            return Err(JournalError::OtherExport(file.journal.export_id));
        }
        Ok(file.journal)
    }

    fn checksum(&self) -> String {
        let plain = serde_json::to_vec(self).unwrap_or_default();
        blake3::hash(&plain).to_hex().to_string()
    }
}

/// The journal's bytes, or `None` if no publish was under way.
///
/// # Errors
/// Those of the disk.
pub fn load(disk: &dyn Disk, dir: &Path) -> io::Result<Option<Vec<u8>>> {
    FILE.load(disk, dir)
}

/// Replaces the journal, durably.
///
/// # Errors
/// Those of the disk.
pub fn store(disk: &dyn Disk, dir: &Path, bytes: &[u8]) -> io::Result<()> {
    FILE.store(disk, dir, bytes)
}

/// Removes the journal, durably.
///
/// # Errors
/// Those of the disk.
pub fn remove(disk: &dyn Disk, dir: &Path) -> io::Result<()> {
    FILE.remove(disk, dir)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal() -> Journal {
        Journal {
            phase: Phase::Prepared,
            kind: Kind::Snapshot,
            export_id: "disk".parse().unwrap(),
            snapshot_id: SnapshotId::generate(),
            parent: None,
            generation: Generation(1),
            manifest_key: "m".into(),
            blob_key: "b".into(),
            incarnation: None,
            session_id: Some(RandomId::generate()),
        }
    }

    #[test]
    fn a_journal_reads_back_and_any_changed_byte_is_refused() {
        let (journal, id) = (journal(), "disk".parse().unwrap());
        let good = journal.encode();
        assert_eq!(Journal::decode(&good, &id), Ok(journal.clone()));
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            if let Ok(found) = Journal::decode(&bad, &id) {
                // White space between the fields means nothing.
                assert_eq!(found, journal, "byte {at}");
            }
            assert!(Journal::decode(&good[..at], &id).is_err(), "cut at {at}");
        }
    }

    #[test]
    fn a_journal_of_another_export_or_version_is_refused_by_name() {
        let other = "other".parse().unwrap();
        assert!(
            matches!(Journal::decode(&journal().encode(), &other), Err(JournalError::OtherExport(id)) if id.as_str() == "disk")
        );
        let newer = String::from_utf8(journal().encode()).unwrap().replace("\"version\": 2", "\"version\": 3");
        assert_eq!(Journal::decode(newer.as_bytes(), &"disk".parse().unwrap()), Err(JournalError::Version(3)));
    }
}
