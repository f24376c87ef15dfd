//! The published image: which blob holds which chunk. Pure: nothing here reads or writes.
//!
//! A manifest is complete: it alone, with the blobs it names, is the whole image of one snapshot. A chunk without an
//! entry is zeros, unless older tools set a `base_ref`; what this server builds never has one, so that every byte
//! it publishes is covered by a hash.

pub mod format;
pub mod head;

use std::collections::HashMap;
use std::time::SystemTime;

use chrono::{DateTime, SecondsFormat, Utc};

use crate::store::Key;
use crate::units::{ByteRange, ChunkIndex, ExportId, Generation, Geometry, SnapshotId};
use head::CurrentRef;

/// One chunk that is not zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Which chunk.
    pub chunk: ChunkIndex,
    /// The blob that holds it, as a position in [`Manifest::blobs`].
    pub blob: u32,
    /// Where it starts in the blob, in bytes. It is as long as the chunk.
    pub offset: u64,
    /// The BLAKE3 of its bytes.
    pub hash: [u8; 32],
}

/// Where a chunk's published content is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source<'a> {
    /// Nowhere: it is all zeros.
    Zero,
    /// In a blob, and its hash is known.
    Packed {
        /// The blob.
        key: &'a Key,
        /// The chunk's bytes in it.
        range: ByteRange,
        /// Their BLAKE3.
        hash: [u8; 32],
    },
    /// In the flat base image of older tools, without a hash.
    Base {
        /// The base image.
        key: &'a Key,
        /// The chunk's bytes in it.
        range: ByteRange,
    },
}

/// What a publish makes of a chunk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// All zeros now.
    Zero,
    /// In the blob of this publish.
    New {
        /// Where it starts in the blob, in bytes.
        offset: u64,
        /// The BLAKE3 of its bytes.
        hash: [u8; 32],
    },
    /// In a blob that was there before.
    Existing {
        /// That blob.
        blob: Key,
        /// Where it starts in the blob, in bytes.
        offset: u64,
        /// The BLAKE3 of its bytes.
        hash: [u8; 32],
    },
}

/// A publish that would not describe its image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    /// A chunk of an older base image was left without a hash.
    #[error("chunk {0} would keep content without a hash")]
    Unhashed(ChunkIndex),
    /// More blobs than positions to name them.
    #[error("the image would be spread over more than {} blobs: compact the export first", u32::MAX)]
    TooManyBlobs,
}

/// The complete chunk map of one snapshot, or of an image that was never published.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    export_id: ExportId,
    generation: Generation,
    geometry: Geometry,
    created_at: String,
    parent: Option<SnapshotId>,
    base: Option<u32>,
    blobs: Vec<Key>,
    /// Strictly ascending by chunk.
    entries: Vec<Entry>,
}

impl Manifest {
    /// The image of an export that was never published: all zeros, generation 0.
    #[must_use]
    pub fn empty(export_id: ExportId, geometry: Geometry) -> Self {
        Self {
            export_id,
            generation: Generation(0),
            geometry,
            created_at: String::new(),
            parent: None,
            base: None,
            blobs: Vec::new(),
            entries: Vec::new(),
        }
    }

    /// The same image as the start of a clone: another export, never published.
    #[must_use]
    pub fn seed_of(self, export_id: ExportId) -> Self {
        Self { export_id, generation: Generation(0), parent: None, ..self }
    }

    /// The export it is a snapshot of.
    #[must_use]
    pub fn export_id(&self) -> &ExportId {
        &self.export_id
    }

    /// How many publishes led to it.
    #[must_use]
    pub fn generation(&self) -> Generation {
        self.generation
    }

    /// The image's sizes.
    #[must_use]
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// When it was published, as RFC 3339.
    #[must_use]
    pub fn created_at(&self) -> &str {
        &self.created_at
    }

    /// The snapshot it was built on, if it is not the first and its writer said so.
    #[must_use]
    pub fn parent(&self) -> Option<SnapshotId> {
        self.parent
    }

    /// Whether chunks without an entry are in a base image of older tools.
    #[must_use]
    pub fn has_base(&self) -> bool {
        self.base.is_some()
    }

    /// The blobs that entries name by their position.
    #[must_use]
    pub fn blobs(&self) -> &[Key] {
        &self.blobs
    }

    /// The chunks that are not zeros, strictly ascending.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// Where a chunk's content is.
    #[must_use]
    pub fn source(&self, chunk: ChunkIndex) -> Source<'_> {
        let whole = self.geometry.chunk_range(chunk);
        match (self.entry(chunk), self.base) {
            (Some(entry), _) => Source::Packed {
                key: &self.blobs[entry.blob as usize],
                // Checked when the manifest was decoded or built: the end does not overflow.
                range: ByteRange::new(entry.offset, whole.len()).unwrap_or(whole),
                hash: entry.hash,
            },
            (None, Some(base)) => Source::Base { key: &self.blobs[base as usize], range: whole },
            (None, None) => Source::Zero,
        }
    }

    /// Whether a chunk is all zeros.
    #[must_use]
    pub fn is_zero(&self, chunk: ChunkIndex) -> bool {
        self.base.is_none() && self.entry(chunk).is_none()
    }

    fn entry(&self, chunk: ChunkIndex) -> Option<&Entry> {
        let at = self.entries.binary_search_by_key(&chunk, |entry| entry.chunk).ok()?;
        Some(&self.entries[at])
    }

    /// The blobs that entries name, each with the length in bytes that it must have at least.
    #[must_use]
    pub fn blob_lengths(&self) -> Vec<(&Key, u64)> {
        let mut lengths: Vec<_> = self.blobs.iter().map(|key| (key, 0)).collect();
        for entry in &self.entries {
            let (_, needed) = &mut lengths[entry.blob as usize];
            *needed = entry.offset.saturating_add(self.geometry.chunk_range(entry.chunk).len()).max(*needed);
        }
        lengths
    }

    /// What `refs/current.json` says of this snapshot.
    #[must_use]
    pub fn current_ref(&self, snapshot_id: SnapshotId, manifest_key: &Key) -> CurrentRef {
        CurrentRef { generation: self.generation, snapshot_id, manifest_key: manifest_key.to_string() }
    }

    /// The next snapshot: this image with `changes` (in any order, one per chunk), of which the new ones are in
    /// `new_blob`. What is unchanged stays where it is; blobs that nobody needs any more are not named.
    ///
    /// # Errors
    /// [`ManifestError::Unhashed`] if a chunk under an older `base_ref` is not among the changes.
    pub fn successor(
        &self,
        export_id: ExportId,
        parent: Option<SnapshotId>,
        created_at: SystemTime,
        new_blob: Key,
        changes: Vec<(ChunkIndex, Change)>,
    ) -> Result<Self, ManifestError> {
        let changes = sorted(changes);
        if self.base.is_some() {
            let mut covered = changes.iter().map(|(chunk, _)| *chunk).peekable();
            for chunk in (0..self.geometry.chunk_count()).map(ChunkIndex) {
                let changed = covered.next_if_eq(&chunk).is_some();
                if !changed && self.entry(chunk).is_none() {
                    return Err(ManifestError::Unhashed(chunk));
                }
            }
        }
        let mut next = Builder::new(self.blobs.len());
        let mut kept = self.entries.iter().peekable();
        for (chunk, change) in changes {
            while let Some(entry) = kept.next_if(|entry| entry.chunk < chunk) {
                next.keep(&self.blobs, *entry)?;
            }
            kept.next_if(|entry| entry.chunk == chunk);
            next.change(&new_blob, chunk, change)?;
        }
        for entry in kept {
            next.keep(&self.blobs, *entry)?;
        }
        Ok(self.with(export_id, parent, created_at, next))
    }

    /// The next snapshot with every chunk that is not zeros among the `changes`.
    ///
    /// # Errors
    /// [`ManifestError::TooManyBlobs`].
    pub fn compacted(
        &self,
        export_id: ExportId,
        parent: Option<SnapshotId>,
        created_at: SystemTime,
        new_blob: Key,
        changes: Vec<(ChunkIndex, Change)>,
    ) -> Result<Self, ManifestError> {
        let mut next = Builder::new(0);
        for (chunk, change) in sorted(changes) {
            next.change(&new_blob, chunk, change)?;
        }
        Ok(self.with(export_id, parent, created_at, next))
    }

    fn with(&self, export_id: ExportId, parent: Option<SnapshotId>, created_at: SystemTime, next: Builder) -> Self {
        Self {
            export_id,
            generation: self.generation.next(),
            geometry: self.geometry,
            created_at: date(created_at),
            parent,
            base: None,
            blobs: next.blobs,
            entries: next.entries,
        }
    }
}

/// As RFC 3339; a clock that is set to no date at all counts from 1970.
fn date(time: SystemTime) -> String {
    let millis = time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_millis());
    let date = i64::try_from(millis).ok().and_then(DateTime::<Utc>::from_timestamp_millis).unwrap_or_default();
    date.to_rfc3339_opts(SecondsFormat::Millis, true)
}

fn sorted(mut changes: Vec<(ChunkIndex, Change)>) -> Vec<(ChunkIndex, Change)> {
    changes.sort_by_key(|(chunk, _)| *chunk);
    changes
}

/// Collects entries in order and names each blob once, as it is first needed.
struct Builder {
    blobs: Vec<Key>,
    positions: HashMap<Key, u32>,
    /// Old position → new position, so that keeping an entry costs no look-up by key.
    moved: Vec<Option<u32>>,
    entries: Vec<Entry>,
}

impl Builder {
    fn new(old_blobs: usize) -> Self {
        Self { blobs: Vec::new(), positions: HashMap::new(), moved: vec![None; old_blobs], entries: Vec::new() }
    }

    fn position(&mut self, key: &Key) -> Result<u32, ManifestError> {
        if let Some(position) = self.positions.get(key) {
            return Ok(*position);
        }
        let position = u32::try_from(self.blobs.len()).map_err(|_| ManifestError::TooManyBlobs)?;
        self.blobs.push(key.clone());
        self.positions.insert(key.clone(), position);
        Ok(position)
    }

    fn keep(&mut self, old_blobs: &[Key], entry: Entry) -> Result<(), ManifestError> {
        let old = entry.blob as usize;
        let blob = match self.moved[old] {
            Some(blob) => blob,
            None => self.position(&old_blobs[old])?,
        };
        self.moved[old] = Some(blob);
        self.entries.push(Entry { blob, ..entry });
        Ok(())
    }

    fn change(&mut self, new_blob: &Key, chunk: ChunkIndex, change: Change) -> Result<(), ManifestError> {
        let (key, offset, hash) = match &change {
            Change::Zero => return Ok(()),
            Change::New { offset, hash } => (new_blob, *offset, *hash),
            Change::Existing { blob, offset, hash } => (blob, *offset, *hash),
        };
        let blob = self.position(key)?;
        self.entries.push(Entry { chunk, blob, offset, hash });
        Ok(())
    }
}
