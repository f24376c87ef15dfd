//! The files and objects of `docs/formats.md`, against golden copies that were checked by hand: what is written stays
//! what older releases and other tools read, and what they wrote stays readable.

#![allow(clippy::expect_used, clippy::unwrap_used, reason = "helpers of tests fail the test")]

use nbd_server::cache::journal::{Journal, Kind, Phase};
use nbd_server::manifest::format::{self, FormatError};
use nbd_server::manifest::head::{CloneSeed, CurrentRef, Head, Writer};
use nbd_server::manifest::{Manifest, Source};
use nbd_server::store::Key;
use nbd_server::store::keys::ExportRoot;
use nbd_server::units::{ByteRange, ChunkIndex, ExportId, Generation, Geometry, SnapshotId};
use proptest::prelude::*;
use serde_json::Value;

const MANIFEST: &str = include_str!("golden/manifest-v2.json");
const MANIFEST_BASE: &str = include_str!("golden/manifest-v2-base_ref.json");
const HEAD: &str = include_str!("golden/volume.json");
const HEAD_WRITTEN_BY: &str = include_str!("golden/volume-written-by.json");
const HEAD_CLONE: &str = include_str!("golden/volume-clone.json");
const HEAD_OTHERS: &str = include_str!("golden/volume-other-fields.json");
const CURRENT: &str = include_str!("golden/current.json");
const SEED: &str = include_str!("golden/clone.seed.json");
const JOURNAL: &str = include_str!("golden/snapshot.journal.json");
const JOURNAL_V1: &str = include_str!("golden/snapshot.journal-v1.json");

fn id(text: &str) -> ExportId {
    text.parse().expect("an export id")
}

fn key(text: &str) -> Key {
    text.parse().expect("a key")
}

fn snapshot(last: &str) -> SnapshotId {
    format!("0192f0c1d2e37abc8def0011223344{last}").parse().expect("a snapshot id")
}

fn root() -> ExportRoot {
    ExportRoot::new(key("exports"))
}

fn read_manifest(bytes: &[u8], export: &str) -> Result<Manifest, FormatError> {
    format::decode(bytes, &key("exports/vm/manifest.json"), &id(export), None, &root())
}

fn read_head(bytes: &[u8], export: &str) -> Result<Head, FormatError> {
    Head::decode(bytes, &id(export), &key("exports/vm/volume.json"))
}

fn range(offset: u64, len: u64) -> ByteRange {
    ByteRange::new(offset, len).expect("a range")
}

#[test]
fn a_clones_manifest_names_blobs_of_its_source() {
    let manifest = read_manifest(MANIFEST.as_bytes(), "vm-2").unwrap();
    let source = key("exports/vm-1/snapshots/0192f0c1d2e37abc8def001122334455/delta.blob");
    let at = |chunk| manifest.source(ChunkIndex(chunk));
    assert_eq!(at(0), Source::Packed { key: &source, range: range(4096, 4096), hash: [0xa1; 32] });
    assert_eq!(at(2), Source::Zero);
    let own = key("exports/vm-2/snapshots/0192f0c1d2e37abc8def001122334477/delta.blob");
    assert_eq!(at(4), Source::Packed { key: &own, range: range(4096, 2048), hash: [0x0d; 32] });
    assert_eq!(manifest.generation(), Generation(2));
    assert_eq!(manifest.parent(), Some(snapshot("66")));
    assert_eq!(String::from_utf8(format::encode(&manifest)).unwrap(), MANIFEST);
}

#[test]
fn a_manifest_of_an_older_tool_opens_with_its_base() {
    let manifest = read_manifest(MANIFEST_BASE.as_bytes(), "vm-1").unwrap();
    let base = key("exports/vm-1/snapshots/0192f0c1d2e37abc8def001122334455/base.blob");
    let at = |chunk| manifest.source(ChunkIndex(chunk));
    assert_eq!(at(0), Source::Base { key: &base, range: range(0, 4096) });
    assert!(matches!(at(1), Source::Packed { hash: [0xa1, ..], .. }));
    assert_eq!(at(2), Source::Base { key: &base, range: range(8192, 2048) });
    assert_eq!((manifest.generation(), manifest.parent()), (Generation(7), None));
    assert_eq!(read_manifest(&format::encode(&manifest), "vm-1").unwrap(), manifest);
}

#[test]
fn a_head_is_written_as_older_tools_read_it() {
    let geometry = Geometry::new(1 << 30, 4 << 20).unwrap();
    let text = |head: &Head| String::from_utf8(head.encode()).unwrap();
    let published = Head::new(id("vm-1"), geometry, None).published(snapshot("55")).bumped();
    assert_eq!(text(&published), HEAD);
    assert_eq!(read_head(HEAD.as_bytes(), "vm-1").unwrap(), published);
    // A head that a server of today created and published.
    let writer = Writer {
        cache_root_id: "00112233445566778899aabbccddeeff".parse().unwrap(),
        session_id: "fedcba9876543210fedcba9876543210".parse().unwrap(),
    };
    let mut today = published.written_by(writer);
    today.incarnation = Some("0123456789abcdef0123456789abcdef".parse().unwrap());
    assert_eq!(text(&today), HEAD_WRITTEN_BY);
    assert_eq!(read_head(HEAD_WRITTEN_BY.as_bytes(), "vm-1").unwrap(), today);
    assert_eq!(today.writer(), Some(writer));
    let by_an_older_server = today.published(snapshot("66"));
    assert_eq!(by_an_older_server.writer(), None, "the note is of the snapshot before");
    let seed = CloneSeed { source_export_id: id("vm-1"), source_snapshot_id: snapshot("55") };
    let clone = Head::new(id("vm-2"), geometry, Some(seed));
    assert_eq!(text(&clone), HEAD_CLONE);
    assert_eq!(read_head(HEAD_CLONE.as_bytes(), "vm-2").unwrap(), clone);
}

#[test]
fn a_publish_keeps_what_other_tools_wrote_into_the_head() {
    let head = read_head(HEAD_OTHERS.as_bytes(), "vm-1").unwrap();
    assert_eq!((head.current, &head.seed), (None, &None), "null says the same as no field");
    let written: Value = serde_json::from_slice(&head.published(snapshot("55")).encode()).unwrap();
    assert_eq!(written["labels"], serde_json::json!({"team": "storage"}));
    assert_eq!(written["protected"], Value::Bool(true));
}

#[test]
fn the_small_files_are_written_as_their_golden_copies() {
    let current = CurrentRef {
        generation: Generation(3),
        snapshot_id: snapshot("55"),
        manifest_key: root().export(&id("vm-1")).manifest(snapshot("55")).to_string(),
    };
    assert_eq!(String::from_utf8(current.encode()).unwrap(), CURRENT);
    assert_eq!(CurrentRef::decode(CURRENT.as_bytes(), &key("k")).unwrap(), current);

    let seed = CloneSeed { source_export_id: id("vm-1"), source_snapshot_id: snapshot("55") };
    assert_eq!(String::from_utf8(seed.encode()).unwrap(), SEED);
    assert_eq!(CloneSeed::decode(SEED.as_bytes()).unwrap(), seed);

    let folder = "exports/vm-1/snapshots/0192f0c1d2e37abc8def001122334466";
    let journal = Journal {
        phase: Phase::Prepared,
        kind: Kind::Snapshot,
        export_id: id("vm-1"),
        snapshot_id: snapshot("66"),
        parent: Some(snapshot("55")),
        generation: Generation(2),
        manifest_key: format!("{folder}/manifest.json"),
        blob_key: format!("{folder}/delta.blob"),
        incarnation: Some("0123456789abcdef0123456789abcdef".parse().unwrap()),
        session_id: Some("fedcba9876543210fedcba9876543210".parse().unwrap()),
    };
    assert_eq!(String::from_utf8(journal.encode()).unwrap(), JOURNAL);
    assert_eq!(Journal::decode(JOURNAL.as_bytes(), &id("vm-1")).unwrap(), journal);
    let of_an_older_server = Journal { incarnation: None, session_id: None, ..journal };
    assert_eq!(Journal::decode(JOURNAL_V1.as_bytes(), &id("vm-1")).unwrap(), of_an_older_server);
}

#[test]
fn an_image_of_a_tebibyte_takes_one_line_of_at_most_160_bytes_per_chunk() {
    use nbd_server::manifest::Change;
    const CHUNKS: u32 = 262_144;
    let geometry = Geometry::new(u64::from(CHUNKS) << 22, 1 << 22).unwrap();
    let new = |chunk: u32| {
        let hash = *blake3::hash(&chunk.to_le_bytes()).as_bytes();
        (ChunkIndex(chunk), Change::New { offset: u64::from(chunk) << 22, hash })
    };
    let (blob, date) = (root().export(&id("vm-1")).delta(snapshot("55")), std::time::UNIX_EPOCH);
    let empty = Manifest::empty(id("vm-1"), geometry);
    let manifest = empty.successor(id("vm-1"), None, date, blob, (0..CHUNKS).map(new).collect()).unwrap();
    let bytes = format::encode(&manifest);
    let chunks = usize::try_from(CHUNKS).unwrap();
    assert!(bytes.len() / chunks <= 160, "{} bytes per entry", bytes.len() / chunks);
    assert_eq!(bytes.iter().filter(|&&byte| byte == b'\n').count(), chunks + 14);
    assert!((bytes.len() as u64) < format::max_bytes(geometry));
    assert!(read_manifest(&bytes, "vm-1").unwrap() == manifest);
}

/// The JSON pointers of every value in a document.
fn pointers(value: &Value, at: &str, out: &mut Vec<String>) {
    let mut visit = |name: String, child| {
        let path = format!("{at}/{name}");
        out.push(path.clone());
        pointers(child, &path, out);
    };
    match value {
        Value::Object(map) => map.iter().for_each(|(name, child)| visit(name.clone(), child)),
        Value::Array(list) => list.iter().enumerate().for_each(|(at, child)| visit(at.to_string(), child)),
        _ => {}
    }
}

fn all_pointers(text: &str) -> (Value, Vec<String>) {
    let document: Value = serde_json::from_str(text).expect("a golden file is JSON");
    let mut out = Vec::new();
    pointers(&document, "", &mut out);
    (document, out)
}

fn remove(document: &mut Value, pointer: &str) {
    let (parent, name) = pointer.rsplit_once('/').expect("a pointer has a parent");
    match document.pointer_mut(parent) {
        Some(Value::Object(map)) => drop(map.remove(name)),
        Some(Value::Array(list)) => drop(list.remove(name.parse().expect("a position"))),
        _ => unreachable!("{pointer} was read off this document"),
    }
}

#[test]
fn a_field_taken_away_from_a_manifest_is_noticed_unless_it_is_optional() {
    let (document, pointers) = all_pointers(MANIFEST);
    for pointer in pointers {
        let mut less = document.clone();
        remove(&mut less, &pointer);
        let optional = pointer == "/parent_snapshot_id" || pointer == "/created_at";
        // An entry that is not there means zeros: a manifest is written whole or not at all, and named by the head
        // only after.
        let entry = pointer.starts_with("/entries/") && pointer.matches('/').count() == 2;
        let read = read_manifest(less.to_string().as_bytes(), "vm-2");
        assert_eq!(read.is_ok(), optional || entry, "{pointer}: {read:?}");
    }
}

#[test]
fn a_field_taken_away_from_a_journal_is_noticed() {
    let (document, pointers) = all_pointers(JOURNAL);
    for pointer in pointers {
        let mut less = document.clone();
        remove(&mut less, &pointer);
        assert!(Journal::decode(less.to_string().as_bytes(), &id("vm-1")).is_err(), "{pointer}");
    }
}

fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        (0u64..10_000).prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,40}".prop_map(Value::from),
        Just(serde_json::json!([])),
        Just(serde_json::json!({})),
    ]
}

/// Whatever a decoder lets through must be sound: every chunk has a source, and it reads back as itself.
fn assert_sound(manifest: &Manifest, export: &str) {
    for chunk in (0..manifest.geometry().chunk_count()).map(ChunkIndex) {
        if let Source::Packed { range, .. } | Source::Base { range, .. } = manifest.source(chunk) {
            assert_eq!(range.len(), manifest.geometry().chunk_range(chunk).len());
        }
    }
    assert_eq!(&read_manifest(&format::encode(manifest), export).unwrap(), manifest);
}

proptest! {
    #[test]
    fn a_manifest_with_a_value_replaced_is_refused_or_sound(at in any::<prop::sample::Index>(), value in any_value()) {
        for (golden, export) in [(MANIFEST, "vm-2"), (MANIFEST_BASE, "vm-1")] {
            let (mut document, pointers) = all_pointers(golden);
            *document.pointer_mut(&pointers[at.index(pointers.len())]).unwrap() = value.clone();
            if let Ok(manifest) = read_manifest(document.to_string().as_bytes(), export) {
                assert_sound(&manifest, export);
            }
        }
    }

    #[test]
    fn a_flipped_byte_is_refused_or_leaves_something_sound(at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let flipped = |golden: &str| {
            let mut bytes = golden.as_bytes().to_vec();
            bytes[at.index(golden.len())] = byte;
            bytes
        };
        if let Ok(manifest) = read_manifest(&flipped(MANIFEST), "vm-2") {
            assert_sound(&manifest, "vm-2");
        }
        if let Ok(head) = read_head(&flipped(HEAD), "vm-1") {
            prop_assert_eq!(read_head(&head.encode(), "vm-1").unwrap(), head);
        }
        if let Ok(journal) = Journal::decode(&flipped(JOURNAL), &id("vm-1")) {
            prop_assert_eq!(String::from_utf8(journal.encode()).unwrap(), JOURNAL);
        }
    }

    #[test]
    fn a_file_cut_short_is_refused(at in any::<prop::sample::Index>()) {
        let cut = |golden: &'static str| &golden.as_bytes()[..at.index(golden.trim_end().len())];
        prop_assert!(read_manifest(cut(MANIFEST), "vm-2").is_err());
        prop_assert!(read_manifest(cut(MANIFEST_BASE), "vm-1").is_err());
        prop_assert!(read_head(cut(HEAD), "vm-1").is_err());
        prop_assert!(CurrentRef::decode(cut(CURRENT), &key("k")).is_err());
        prop_assert!(CloneSeed::decode(cut(SEED)).is_err());
        prop_assert!(Journal::decode(cut(JOURNAL), &id("vm-1")).is_err());
    }

    #[test]
    fn any_bytes_are_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        prop_assert!(read_manifest(&bytes, "vm-1").is_err());
        prop_assert!(read_head(&bytes, "vm-1").is_err());
        prop_assert!(CurrentRef::decode(&bytes, &key("k")).is_err());
        prop_assert!(CloneSeed::decode(&bytes).is_err());
        prop_assert!(Journal::decode(&bytes, &id("vm-1")).is_err());
    }
}

#[test]
fn a_number_of_another_tool_keeps_all_its_digits() {
    let fields = "\"big\": 123456789012345678901234567890, \"exact\": 0.30000000000000004, \"revision\": 1,";
    let written_by_others =
        HEAD.replace("\"revision\": 1,", fields).replace("\"revision\": 1\n", &fields[..fields.len() - 1]);
    assert_ne!(written_by_others, HEAD);
    let rewritten =
        String::from_utf8(read_head(written_by_others.as_bytes(), "vm-1").unwrap().bumped().encode()).unwrap();
    assert!(rewritten.contains("123456789012345678901234567890") && rewritten.contains("0.30000000000000004"));
}

#[test]
fn an_error_never_repeats_a_whole_file() {
    let long = "long ".repeat(10_000);
    let head = HEAD.replace("1073741824", &format!("{long:?}"));
    let error = read_head(head.as_bytes(), "vm-1").unwrap_err().to_string();
    assert!(error.len() < 500 && error.contains("line 4"), "{error}");
    let manifest = MANIFEST.replacen("\"chunk_size\": 4096", &format!("\"chunk_size\": {long:?}"), 1);
    assert!(read_manifest(manifest.as_bytes(), "vm-2").unwrap_err().to_string().len() < 500);
    let journal = JOURNAL.replace("PREPARED", &long);
    assert!(Journal::decode(journal.as_bytes(), &id("vm-1")).unwrap_err().to_string().len() < 500);
}
