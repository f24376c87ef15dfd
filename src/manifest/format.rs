//! `manifest.json`, version 2, in and out.
//!
//! Decoding trusts nothing: the size, the counts, the order, every reference and every range are checked before a
//! [`Manifest`] exists, and the error names the object and the field. What this file writes, it also reads; so do
//! older tools, to which the one optional field of ours (`parent_snapshot_id`) means nothing.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt::{self, Write as _};

use serde::de::{self, IgnoredAny, Visitor};
use serde::{Deserialize, Deserializer};

use super::{Entry, Manifest};
use crate::store::Key;
use crate::store::keys::ExportRoot;
use crate::units::{ByteRange, ChunkIndex, ExportId, Generation, Geometry, MAX_CHUNKS, SnapshotId, UnitError};

const VERSION: u64 = 2;
/// The most characters of a text from a file that an error repeats.
const MAX_SHOWN_CHARS: usize = 80;
/// The most bytes of a JSON parser's text that an error repeats.
const MAX_PROBLEM_BYTES: usize = 256;
/// What one entry may take in a file, white space and all.
const MAX_ENTRY_BYTES: u64 = 512;
/// How many refs a manifest may have beyond one for each chunk: an older tool may keep one for every snapshot it took.
const MAX_UNUSED_REFS: u64 = 4096;
/// What everything but the entries may take.
const MAX_REST_BYTES: u64 = 16 << 20;

/// The most bytes that a manifest of any image may have.
pub const MAX_BYTES: u64 = MAX_CHUNKS * MAX_ENTRY_BYTES + MAX_REST_BYTES;

/// Why an object of the remote layout cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key}: {problem}")]
pub struct FormatError {
    /// The object.
    pub key: String,
    /// Which field is wrong, and what would be right.
    pub problem: String,
}

/// The most bytes that a manifest of such an image may have.
#[must_use]
pub fn max_bytes(geometry: Geometry) -> u64 {
    u64::from(geometry.chunk_count()) * MAX_ENTRY_BYTES + MAX_REST_BYTES
}

#[derive(Deserialize)]
pub(super) struct Versioned {
    pub(super) version: u64,
}

/// What a manifest has of each kind; found out before any of it is kept in memory.
#[derive(Deserialize)]
struct Shape {
    version: u64,
    #[serde(default)]
    refs: Count,
    #[serde(default)]
    entries: Count,
}

impl Shape {
    /// No image needs more than these. A ref that no chunk uses is one that an older tool kept.
    fn check(&self, geometry: Option<Geometry>) -> Result<(), String> {
        let chunks = geometry.map_or(MAX_CHUNKS, |geometry| u64::from(geometry.chunk_count()));
        for (field, found, most) in
            [("refs", self.refs.0, chunks + MAX_UNUSED_REFS), ("entries", self.entries.0, chunks)]
        {
            if found > most {
                return Err(format!(
                    "{field}: there are {found}, more than the {most} that an image of {chunks} chunks may have"
                ));
            }
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct Sizes {
    image_size: u64,
    chunk_size: u64,
}

/// How many elements a list has; 0 for what is no list, which is found out later.
#[derive(Default)]
struct Count(u64);

impl<'de> Deserialize<'de> for Count {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Elements;
        impl<'de> Visitor<'de> for Elements {
            type Value = Count;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list")
            }
            fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<Count, A::Error> {
                let mut count = Count(0);
                while list.next_element::<IgnoredAny>()?.is_some() {
                    count.0 += 1;
                }
                Ok(count)
            }
            fn visit_map<A: de::MapAccess<'de>>(self, mut map: A) -> Result<Count, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Count(0))
            }
            fn visit_bool<E: de::Error>(self, _: bool) -> Result<Count, E> {
                Ok(Count(0))
            }
            fn visit_i64<E: de::Error>(self, _: i64) -> Result<Count, E> {
                Ok(Count(0))
            }
            fn visit_u64<E: de::Error>(self, _: u64) -> Result<Count, E> {
                Ok(Count(0))
            }
            fn visit_f64<E: de::Error>(self, _: f64) -> Result<Count, E> {
                Ok(Count(0))
            }
            fn visit_str<E: de::Error>(self, _: &str) -> Result<Count, E> {
                Ok(Count(0))
            }
            fn visit_unit<E: de::Error>(self) -> Result<Count, E> {
                Ok(Count(0))
            }
        }
        deserializer.deserialize_any(Elements)
    }
}

#[derive(Deserialize)]
struct RawManifest<'a> {
    export_id: String,
    generation: u64,
    image_size: u64,
    chunk_size: u64,
    chunk_count: u64,
    #[serde(default)]
    created_at: Option<String>,
    #[serde(default)]
    parent_snapshot_id: Option<SnapshotId>,
    #[serde(default, borrow)]
    base_ref: Option<RefId<'a>>,
    #[serde(borrow)]
    refs: Vec<RawRef<'a>>,
    #[serde(borrow)]
    entries: Vec<RawEntry<'a>>,
}

#[derive(Deserialize)]
struct RawRef<'a> {
    #[serde(borrow)]
    id: RefId<'a>,
    path: String,
}

#[derive(Deserialize)]
struct RawEntry<'a> {
    index: u64,
    #[serde(rename = "ref", borrow)]
    blob: RefId<'a>,
    offset: u64,
    len: u64,
    #[serde(borrow)]
    blake3: Cow<'a, str>,
}

/// A blob's name inside a manifest: a text, or with some older tools a number.
#[derive(PartialEq, Eq, Hash)]
struct RefId<'a>(Cow<'a, str>);

impl<'de: 'a, 'a> Deserialize<'de> for RefId<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnyId;
        impl<'de> Visitor<'de> for AnyId {
            type Value = RefId<'de>;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("the id of a ref")
            }
            fn visit_borrowed_str<E: de::Error>(self, id: &'de str) -> Result<Self::Value, E> {
                Ok(RefId(id.into()))
            }
            fn visit_str<E: de::Error>(self, id: &str) -> Result<Self::Value, E> {
                Ok(RefId(id.to_owned().into()))
            }
            fn visit_u64<E: de::Error>(self, id: u64) -> Result<Self::Value, E> {
                Ok(RefId(id.to_string().into()))
            }
        }
        deserializer.deserialize_any(AnyId)
    }
}

/// As much of a text from a file as an error repeats.
pub(super) fn shown(text: &str) -> String {
    format!("{:?}", text.chars().take(MAX_SHOWN_CHARS).collect::<String>())
}

/// Reads a file's JSON.
///
/// # Errors
/// What is wrong with it, by field, line and column.
pub fn from_json<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, String> {
    serde_json::from_slice(bytes).map_err(|error| {
        // Read once more for the name of the field, which is not worth its time in a file that is in order.
        let located = serde_path_to_error::deserialize::<_, T>(&mut serde_json::Deserializer::from_slice(bytes));
        let path = located.err().map(|e| e.path().to_string()).filter(|path| path != ".");
        let field = path.map(|path| path.chars().take(MAX_SHOWN_CHARS).chain(": ".chars()).collect::<String>());
        field.unwrap_or_default() + &json_problem(&error)
    })
}

/// What a JSON parser says of a file, without the texts from the file that it would repeat whole.
fn json_problem(error: &serde_json::Error) -> String {
    let text = error.to_string();
    let start = &text[..text.floor_char_boundary(MAX_PROBLEM_BYTES)];
    if start.len() == text.len() {
        return text;
    }
    format!("{start}… at line {} column {}", error.line(), error.column())
}

/// The manifest in a file that should be of `export_id` and, if given, of this geometry.
///
/// # Errors
/// [`FormatError`] naming the object and the first field that is wrong.
pub fn decode(
    bytes: &[u8],
    key: &Key,
    export_id: &ExportId,
    geometry: Option<Geometry>,
    root: &ExportRoot,
) -> Result<Manifest, FormatError> {
    decode_fields(bytes, export_id, geometry, root).map_err(|problem| FormatError { key: key.to_string(), problem })
}

fn decode_fields(
    bytes: &[u8],
    export_id: &ExportId,
    expected: Option<Geometry>,
    root: &ExportRoot,
) -> Result<Manifest, String> {
    let not_a_manifest = |problem: String| format!("not a manifest: {problem}");
    let shape = from_json::<Shape>(bytes).map_err(not_a_manifest)?;
    let version = shape.version;
    if version != VERSION {
        return Err(format!("its version is {version}, this server knows {VERSION}: use the tool that wrote it"));
    }
    if let Err(problem) = shape.check(expected) {
        // Too many for this image may be few enough for another one: then its sizes are what is wrong.
        let sizes: Sizes = from_json(bytes).map_err(not_a_manifest)?;
        if let Some(expected) = expected {
            same("image_size", sizes.image_size, expected.image_size())?;
            same("chunk_size", sizes.chunk_size, expected.chunk_size())?;
        }
        return Err(problem);
    }
    let raw: RawManifest<'_> = from_json(bytes).map_err(not_a_manifest)?;
    let geometry = geometry_of(raw.image_size, raw.chunk_size)?;
    same("export_id", shown(&raw.export_id), shown(export_id.as_str()))?;
    if let Some(expected) = expected {
        same("image_size", geometry.image_size(), expected.image_size())?;
        same("chunk_size", geometry.chunk_size(), expected.chunk_size())?;
    }
    same("chunk_count", raw.chunk_count, u64::from(geometry.chunk_count()))?;
    if raw.generation == 0 {
        return Err("generation is 0, but a published snapshot has at least 1".into());
    }
    let (mut blobs, mut by_path) = (Vec::with_capacity(raw.refs.len()), HashMap::with_capacity(raw.refs.len()));
    let mut positions = HashMap::with_capacity(raw.refs.len());
    for (i, blob) in raw.refs.iter().enumerate() {
        let key = root.resolve(&blob.path).map_err(|e| format!("refs[{i}].path: {e}"))?;
        // Two ids for one blob are one blob: overlaps are looked for in the object, not under a name.
        let position = *by_path.entry(key.clone()).or_insert_with(|| {
            blobs.push(key);
            blobs.len() - 1
        });
        let position = u32::try_from(position).map_err(|_| "refs: there are too many".to_owned())?;
        if positions.insert(&blob.id, position).is_some() {
            return Err(format!("refs[{i}].id {} is there twice", shown(&blob.id.0)));
        }
    }
    let position =
        |id: &RefId<'_>| positions.get(id).copied().ok_or_else(|| format!("{} is not the id of a ref", shown(&id.0)));
    let base = raw.base_ref.as_ref().map(position).transpose().map_err(|e| format!("base_ref: {e}"))?;
    let mut entries: Vec<Entry> = Vec::with_capacity(raw.entries.len());
    for (i, entry) in raw.entries.iter().enumerate() {
        let previous = entries.last().map(|e| e.chunk);
        let decoded = decode_entry(entry, geometry, previous).and_then(|(chunk, hash)| {
            let blob = position(&entry.blob).map_err(|e| format!("ref: {e}"))?;
            Ok(Entry { chunk, blob, offset: entry.offset, hash })
        });
        entries.push(decoded.map_err(|e| format!("entries[{i}]: {e}"))?);
    }
    check_overlap(&entries, geometry)?;
    Ok(Manifest {
        export_id: export_id.clone(),
        generation: Generation(raw.generation),
        geometry,
        created_at: raw.created_at.unwrap_or_default(),
        parent: raw.parent_snapshot_id,
        base,
        blobs,
        entries,
    })
}

/// The geometry that two fields of a file make.
pub(super) fn geometry_of(image_size: u64, chunk_size: u64) -> Result<Geometry, String> {
    Geometry::new(image_size, chunk_size).map_err(|e| match e {
        UnitError::ChunkSize(_) => format!("chunk_size: {e}"),
        _ => format!("image_size: {e}"),
    })
}

fn same<T: PartialEq + std::fmt::Display>(field: &str, found: T, expected: T) -> Result<(), String> {
    if found == expected { Ok(()) } else { Err(format!("{field} is {found}, but should be {expected}")) }
}

fn decode_entry(
    entry: &RawEntry<'_>,
    geometry: Geometry,
    previous: Option<ChunkIndex>,
) -> Result<(ChunkIndex, [u8; 32]), String> {
    let index = u32::try_from(entry.index).ok().filter(|i| *i < geometry.chunk_count());
    let count = geometry.chunk_count();
    let chunk = index.map(ChunkIndex).ok_or_else(|| format!("index {} is beyond the {count} chunks", entry.index))?;
    if previous.is_some_and(|previous| previous >= chunk) {
        return Err(format!("index {chunk} does not ascend"));
    }
    same("len", entry.len, geometry.chunk_range(chunk).len())?;
    if ByteRange::new(entry.offset, entry.len).is_none_or(|range| i64::try_from(range.end()).is_err()) {
        return Err(format!("offset {} is beyond any object", entry.offset));
    }
    let hash = decode_hex(&entry.blake3)
        .ok_or_else(|| format!("blake3 {} is not 64 lower-case hex digits", shown(&entry.blake3)))?;
    Ok((chunk, hash))
}

/// Two chunks in one place of a blob must be the same bytes, that is: one range, one hash.
fn check_overlap(entries: &[Entry], geometry: Geometry) -> Result<(), String> {
    let end = |e: &Entry| e.offset + geometry.chunk_range(e.chunk).len();
    let ascending = entries.windows(2).all(|w| w[0].blob != w[1].blob || end(&w[0]) <= w[1].offset);
    // The usual case, one blob written in the order of its chunks, needs no sorting.
    let blobs_once = entries.chunk_by(|a, b| a.blob == b.blob).count() <= 1;
    if ascending && blobs_once {
        return Ok(());
    }
    let mut order: Vec<&Entry> = entries.iter().collect();
    order.sort_by_key(|e| (e.blob, e.offset, end(e)));
    for pair in order.windows(2) {
        let (a, b) = (pair[0], pair[1]);
        let shared = a.offset == b.offset && end(a) == end(b) && a.hash == b.hash;
        if a.blob == b.blob && b.offset < end(a) && !shared {
            return Err(format!(
                "entries of chunks {} and {} overlap in their blob: the offset of one is wrong",
                a.chunk, b.chunk
            ));
        }
    }
    Ok(())
}

/// The manifest as a file: the head of it for people, then one line an entry.
#[must_use]
pub fn encode(manifest: &Manifest) -> Vec<u8> {
    let mut text = String::with_capacity(4096 + manifest.entries.len() * 160);
    let geometry = manifest.geometry;
    let mut field = |name: &str, value: serde_json::Value| {
        // Writing to a string does not fail.
        let _ = writeln!(text, "  \"{name}\": {value},");
    };
    field("version", VERSION.into());
    field("export_id", manifest.export_id.as_str().into());
    field("generation", manifest.generation.0.into());
    field("image_size", geometry.image_size().into());
    field("chunk_size", geometry.chunk_size().into());
    field("chunk_count", geometry.chunk_count().into());
    field("created_at", manifest.created_at.as_str().into());
    if let Some(parent) = manifest.parent {
        field("parent_snapshot_id", parent.to_string().into());
    }
    if let Some(base) = manifest.base {
        field("base_ref", ref_id(base).into());
    }
    text.insert_str(0, "{\n");
    text.push_str("  \"refs\": [");
    for (i, key) in (0..).zip(&manifest.blobs) {
        let comma = if i == 0 { "" } else { "," };
        let path = serde_json::Value::from(key.as_str());
        let _ = write!(text, "{comma}\n    {{\"id\": \"{}\", \"path\": {path}}}", ref_id(i));
    }
    text.push_str("\n  ],\n  \"entries\": [");
    for (i, entry) in manifest.entries.iter().enumerate() {
        let comma = if i == 0 { "" } else { "," };
        let len = geometry.chunk_range(entry.chunk).len();
        let _ = write!(
            text,
            "{comma}\n    {{\"index\": {}, \"ref\": \"{}\", \"offset\": {}, \"len\": {len}, \"blake3\": \"{}\"}}",
            entry.chunk,
            ref_id(entry.blob),
            entry.offset,
            blake3::Hash::from_bytes(entry.hash).to_hex()
        );
    }
    text.push_str("\n  ]\n}\n");
    text.into_bytes()
}

fn ref_id(position: u32) -> String {
    format!("r{position}")
}

fn decode_hex(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || text.bytes().any(|c| c.is_ascii_uppercase()) {
        return None;
    }
    blake3::Hash::from_hex(text).ok().map(|hash| *hash.as_bytes())
}

#[cfg(test)]
mod tests;
