//! The small JSON files around a manifest: `volume.json`, `refs/current.json`, and locally `clone.seed.json`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use super::format::{FormatError, Versioned, from_json, geometry_of, shown};
use crate::store::Key;
use crate::units::{ExportId, Generation, Geometry, RandomId, SnapshotId};

/// The most bytes such a file may have.
pub const MAX_HEAD_BYTES: u64 = 1 << 20;
/// The local note of the snapshot that a clone starts from, until its first publish.
pub const CLONE_SEED_FILE: &str = "clone.seed.json";
const VERSION: u64 = 1;

/// The snapshot of another export that a clone starts from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloneSeed {
    /// The export it was published under.
    pub source_export_id: ExportId,
    /// The snapshot.
    pub source_snapshot_id: SnapshotId,
}

impl CloneSeed {
    /// The file's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        to_json(self)
    }

    /// The seed in a file.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        from_json(bytes).map_err(|problem| format!("not a clone seed: {problem}"))
    }
}

/// `volume.json`: the only authority on what is published.
#[derive(Debug, Clone, PartialEq)]
pub struct Head {
    /// The export.
    pub export_id: ExportId,
    /// The image's sizes.
    pub geometry: Geometry,
    /// The snapshot that is the image now; `None` if nothing was published.
    pub current: Option<SnapshotId>,
    /// What the image is while nothing was published; `None` for zeros.
    pub seed: Option<CloneSeed>,
    /// Tells this export from one of the same name that was deleted before; `None` in heads of older servers.
    pub incarnation: Option<RandomId>,
    /// Counts the times the file was rewritten only to change its version.
    revision: u64,
    written_by: Option<WrittenBy>,
    /// Fields of other tools, kept as they are.
    others: BTreeMap<String, Other>,
}

/// A run of a server over a cache root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Writer {
    /// The cache root.
    pub cache_root_id: RandomId,
    /// The run of the server.
    pub session_id: RandomId,
}

/// The server that last wrote a head, and what the head named then. Servers that do not know this field keep it as it is
/// when they publish: it counts only as long as the head names the same snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct WrittenBy {
    cache_root_id: RandomId,
    session_id: RandomId,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    current_snapshot_id: Option<SnapshotId>,
}

/// A value of another tool, as it was written: taken apart and put together again a long number would be another one.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(transparent)]
struct Other(Box<RawValue>);

impl PartialEq for Other {
    fn eq(&self, other: &Self) -> bool {
        self.0.get() == other.0.get()
    }
}

/// The fields of [`RawHead`] that are ours.
const OWN_FIELDS: [&str; 9] = [
    "version",
    "export_id",
    "incarnation",
    "image_size",
    "chunk_size",
    "current_snapshot_id",
    "clone_seed",
    "revision",
    "written_by",
];

#[derive(Serialize, Deserialize)]
struct RawHead {
    version: u64,
    export_id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    incarnation: Option<RandomId>,
    image_size: u64,
    chunk_size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    current_snapshot_id: Option<SnapshotId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    clone_seed: Option<CloneSeed>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    revision: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    written_by: Option<WrittenBy>,
    #[serde(flatten, skip_deserializing)]
    others: BTreeMap<String, Other>,
}

impl Head {
    /// The head of an export that was never published.
    #[must_use]
    pub fn new(export_id: ExportId, geometry: Geometry, seed: Option<CloneSeed>) -> Self {
        let (incarnation, written_by, others) = (None, None, BTreeMap::new());
        Self { export_id, geometry, current: None, seed, incarnation, revision: 0, written_by, others }
    }

    /// The head of an export that is created now: unlike every other, whatever its name and content.
    #[must_use]
    pub fn created(export_id: ExportId, geometry: Geometry, seed: Option<CloneSeed>) -> Self {
        Self { incarnation: Some(RandomId::generate()), ..Self::new(export_id, geometry, seed) }
    }

    /// The head once `snapshot` is published. A clone's seed goes: the manifest is complete.
    #[must_use]
    pub fn published(self, snapshot: SnapshotId) -> Self {
        Self { current: Some(snapshot), seed: None, ..self }
    }

    /// The same head in other bytes, and so under another version in the store, whatever that derives versions from.
    #[must_use]
    pub fn bumped(&self) -> Self {
        Self { revision: self.revision.wrapping_add(1), ..self.clone() }
    }

    /// The head with a note of the server that is about to write it.
    #[must_use]
    pub fn written_by(self, writer: Writer) -> Self {
        let Writer { cache_root_id, session_id } = writer;
        Self { written_by: Some(WrittenBy { cache_root_id, session_id, current_snapshot_id: self.current }), ..self }
    }

    /// The server that wrote this head, if it is known.
    #[must_use]
    pub fn writer(&self) -> Option<Writer> {
        let by = self.written_by.as_ref().filter(|by| by.current_snapshot_id == self.current)?;
        Some(Writer { cache_root_id: by.cache_root_id, session_id: by.session_id })
    }

    /// The file's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        to_json(&RawHead {
            version: VERSION,
            export_id: self.export_id.to_string(),
            incarnation: self.incarnation,
            image_size: self.geometry.image_size(),
            chunk_size: self.geometry.chunk_size(),
            current_snapshot_id: self.current,
            clone_seed: self.seed.clone(),
            revision: Some(self.revision).filter(|revision| *revision != 0),
            written_by: self.written_by.clone(),
            others: self.others.clone(),
        })
    }

    /// The head in a file at `key`, which should be that of `export_id`.
    ///
    /// # Errors
    /// [`FormatError`] naming the object and the field.
    pub fn decode(bytes: &[u8], export_id: &ExportId, key: &Key) -> Result<Self, FormatError> {
        let refused = |problem: String| FormatError { key: key.to_string(), problem };
        let not_a_head = |problem: String| refused(format!("not a volume head: {problem}"));
        // The version first: another one may have other fields.
        let version = from_json::<Versioned>(bytes).map_err(not_a_head)?.version;
        if version != VERSION {
            let text = format!("its version is {version}, this server knows {VERSION}: use the tool that wrote it");
            return Err(refused(text));
        }
        let raw: RawHead = from_json(bytes).map_err(not_a_head)?;
        if raw.export_id != export_id.as_str() {
            let found = shown(&raw.export_id);
            return Err(refused(format!("export_id is {found}, but should be \"{export_id}\"")));
        }
        let geometry = geometry_of(raw.image_size, raw.chunk_size).map_err(refused)?;
        let mut others: BTreeMap<String, Other> = from_json(bytes).map_err(not_a_head)?;
        others.retain(|field, _| !OWN_FIELDS.contains(&field.as_str()));
        Ok(Self {
            export_id: export_id.clone(),
            geometry,
            current: raw.current_snapshot_id,
            seed: raw.clone_seed,
            incarnation: raw.incarnation,
            revision: raw.revision.unwrap_or(0),
            written_by: raw.written_by,
            others,
        })
    }
}

/// `refs/current.json`: a copy of the head for readers of the older direct mode.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CurrentRef {
    /// The head's generation.
    pub generation: Generation,
    /// The head.
    pub snapshot_id: SnapshotId,
    /// Where its manifest is.
    pub manifest_key: String,
}

impl CurrentRef {
    /// The file's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        to_json(self)
    }

    /// The reference in a file at `key`.
    ///
    /// # Errors
    /// [`FormatError`] naming the object and the field.
    pub fn decode(bytes: &[u8], key: &Key) -> Result<Self, FormatError> {
        let refused = |problem: String| FormatError {
            key: key.to_string(),
            problem: format!("not a reference to the current snapshot: {problem}"),
        };
        let current: Self = from_json(bytes).map_err(refused)?;
        if current.generation == Generation(0) {
            let problem = "generation is 0, but a published snapshot has at least 1".to_owned();
            return Err(FormatError { key: key.to_string(), problem });
        }
        Ok(current)
    }
}

fn to_json(value: &impl Serialize) -> Vec<u8> {
    // Maps with text keys and numbers always serialize.
    let mut bytes = serde_json::to_vec_pretty(value).unwrap_or_default();
    bytes.push(b'\n');
    bytes
}
