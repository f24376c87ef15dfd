//! Valid files of every format with one field changed: the decoder refuses it by name, or the format says that the
//! change is harmless. Never a panic, never a guess.

#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

mod common;

use std::fs;

use common::volumes::{Site, create, id, write};
use nbd_server::cache::journal::Journal;
use nbd_server::cache::meta::{self, HEADER_BYTES, Header, MetaError, RECORD_BYTES, Record};
use nbd_server::cache::states::{ChunkState, Content};
use nbd_server::cache::{Base, journal};
use nbd_server::manifest::format;
use nbd_server::manifest::head::{CloneSeed, CurrentRef, Head};
use nbd_server::store::keys::ExportRoot;
use nbd_server::store::{Condition, Key, Store};
use nbd_server::units::{ChunkIndex, Generation, Geometry, SnapshotId};
use serde_json::{Value, json};

const MANIFEST: &str = include_str!("golden/manifest-v2.json");
const MANIFEST_BASE: &str = include_str!("golden/manifest-v2-base_ref.json");
const HEAD: &str = include_str!("golden/volume-written-by.json");
const HEAD_CLONE: &str = include_str!("golden/volume-clone.json");
const CURRENT: &str = include_str!("golden/current.json");
const SEED: &str = include_str!("golden/clone.seed.json");
const JOURNAL: &str = include_str!("golden/snapshot.journal.json");

const KEY: &str = "exports/vm/the-object";

fn key() -> Key {
    KEY.parse().unwrap()
}

/// A decoder as its callers use it: nothing, or the whole text of the refusal.
type Decode = fn(&[u8]) -> Result<(), String>;

fn manifest_of(bytes: &[u8], export: &str) -> Result<(), String> {
    let root = ExportRoot::new("exports".parse().unwrap());
    format::decode(bytes, &key(), &id(export), None, &root).map(drop).map_err(|e| e.to_string())
}

fn head_of(bytes: &[u8], export: &str) -> Result<(), String> {
    Head::decode(bytes, &id(export), &key()).map(drop).map_err(|e| e.to_string())
}

// Who loads the two local files adds their path: `volume/recover.rs`, `volume/open.rs`.
const KINDS: [(&str, Decode); 7] = [
    (MANIFEST, |bytes| manifest_of(bytes, "vm-2")),
    (MANIFEST_BASE, |bytes| manifest_of(bytes, "vm-1")),
    (HEAD, |bytes| head_of(bytes, "vm-1")),
    (HEAD_CLONE, |bytes| head_of(bytes, "vm-2")),
    (CURRENT, |bytes| CurrentRef::decode(bytes, &key()).map(drop).map_err(|e| e.to_string())),
    (SEED, |bytes| CloneSeed::decode(bytes).map(drop).map_err(|problem| format!("{KEY}: {problem}"))),
    (JOURNAL, |bytes| Journal::decode(bytes, &id("vm-1")).map(drop).map_err(|e| format!("{KEY}: {e}"))),
];

/// The fields that may be absent, and are then as if `null`.
const OPTIONAL: [&str; 8] = [
    "parent_snapshot_id",
    "created_at",
    "base_ref",
    "current_snapshot_id",
    "clone_seed",
    "revision",
    "incarnation",
    "written_by",
];

/// The optional fields of the journal: its checksum says when one was taken away.
const OPTIONAL_IN_JOURNAL: [&str; 3] = ["parent", "incarnation", "session_id"];

fn pointers(value: &Value, at: &str, out: &mut Vec<String>) {
    let children: Vec<(String, &Value)> = match value {
        Value::Object(map) => map.iter().map(|(name, child)| (name.clone(), child)).collect(),
        Value::Array(list) => list.iter().enumerate().map(|(at, child)| (at.to_string(), child)).collect(),
        _ => Vec::new(),
    };
    for (name, child) in children {
        let path = format!("{at}/{name}");
        out.push(path.clone());
        pointers(child, &path, out);
    }
}

/// Every field of a file: where it is, and what it is called (elements of a list by the name of the list).
fn fields(document: &Value) -> Vec<(String, String)> {
    let mut out = Vec::new();
    pointers(document, "", &mut out);
    let name = |pointer: &str| {
        let is_position = |part: &&str| part.bytes().all(|c| c.is_ascii_digit());
        pointer.rsplit('/').find(|part| !is_position(part)).unwrap().to_owned()
    };
    // One golden file has fields of another tool.
    let ours = |pointer: &String| !pointer.starts_with("/note") && !pointer.ends_with("/size");
    out.into_iter().filter(ours).map(|pointer| (pointer.clone(), name(&pointer))).collect()
}

fn assert_refused(result: Result<(), String>, field: &str, what: &str) {
    let text = result.expect_err(what);
    assert!(text.contains(KEY) && text.contains(field), "{what}: {text:?} does not name {field}");
}

#[test]
fn a_field_of_another_type_is_refused_by_name() {
    let huge: Value = serde_json::from_str("123456789012345678901234567890").unwrap();
    for (golden, decode) in KINDS {
        let document: Value = serde_json::from_str(golden).unwrap();
        for (pointer, field) in fields(&document) {
            let there = document.pointer(&pointer).unwrap();
            for wrong in
                [json!(null), json!(true), json!(-1), json!(1.5), huge.clone(), json!([7]), json!({"a": 7}), json!("?")]
            {
                let mut changed = document.clone();
                *changed.pointer_mut(&pointer).unwrap() = wrong.clone();
                let what = format!("{pointer} = {wrong}");
                let result = decode(changed.to_string().as_bytes());
                let checksummed = golden == JOURNAL && OPTIONAL_IN_JOURNAL.contains(&field.as_str());
                let absent = wrong.is_null() && !checksummed && OPTIONAL.contains(&field.as_str());
                // For people, or for other readers: any text is one.
                let free =
                    wrong.is_string() && there.is_string() && ["created_at", "manifest_key"].contains(&field.as_str());
                if absent || (free && golden != JOURNAL) {
                    assert_eq!(result, Ok(()), "{what}");
                } else if golden == JOURNAL && field.ends_with("_key") && wrong.is_string()
                    || checksummed && wrong.is_null()
                {
                    assert_refused(result, "checksum", &what);
                } else if ["id", "base_ref"].contains(&field.as_str()) && wrong.is_string() {
                    // A name that nothing has, or that what names it does not know.
                    assert_refused(result, "is not the id of a ref", &what);
                } else {
                    assert_refused(result, &field, &what);
                }
            }
        }
    }
}

#[test]
fn a_field_that_is_missing_is_refused_by_name_unless_it_is_optional() {
    for (golden, decode) in KINDS {
        let document: Value = serde_json::from_str(golden).unwrap();
        for (pointer, field) in fields(&document) {
            let (parent, name) = pointer.rsplit_once('/').unwrap();
            let mut less = document.clone();
            let Some(Value::Object(map)) = less.pointer_mut(parent) else { continue };
            map.remove(name);
            let result = decode(less.to_string().as_bytes());
            if golden == JOURNAL && OPTIONAL_IN_JOURNAL.contains(&field.as_str()) {
                assert_refused(result, "checksum", &pointer);
            } else if OPTIONAL.contains(&field.as_str()) {
                assert_eq!(result, Ok(()), "{pointer}");
            } else {
                assert_refused(result, &field, &pointer);
            }
        }
    }
}

#[test]
fn a_field_that_is_there_twice_is_refused_by_name_and_one_that_is_unknown_means_nothing() {
    for (golden, decode) in KINDS {
        let document: Value = serde_json::from_str(golden).unwrap();
        for (pointer, field) in fields(&document) {
            let (parent, name) = pointer.rsplit_once('/').unwrap();
            let Some(Value::Object(_)) = document.pointer(parent) else { continue };
            // A field that no format has marks the place, in the text, where the second one goes.
            let mut marked = document.clone();
            marked.pointer_mut(parent).unwrap()["of another tool"] = json!("mark");
            let text = marked.to_string();
            assert_eq!(decode(text.as_bytes()), Ok(()), "an unknown field in {parent}/");
            let value = document.pointer(&pointer).unwrap();
            let twice = text.replace("\"of another tool\":\"mark\"", &format!("\"{name}\":{value}"));
            assert_ne!(twice, text);
            assert_refused(decode(twice.as_bytes()), &field, &format!("{pointer} twice"));
        }
    }
}

#[test]
fn a_value_that_contradicts_another_or_leaves_its_bounds_is_refused_by_name() {
    let (manifest, head) = (KINDS[0].1, KINDS[2].1);
    let long = "a".repeat(2000);
    let id33 = "0192f0c1d2e37abc8def0011223344556";
    let cases: [(&str, Decode, &str, Value, &str); 40] = [
        (MANIFEST, manifest, "/version", json!(1), "version"),
        (MANIFEST, manifest, "/version", json!(3), "version"),
        (MANIFEST, manifest, "/export_id", json!("vm-1"), "export_id"),
        (MANIFEST, manifest, "/generation", json!(0), "generation"),
        (MANIFEST, manifest, "/image_size", json!(0), "image_size"),
        (MANIFEST, manifest, "/image_size", json!(1u64 << 63), "image_size"),
        (MANIFEST, manifest, "/image_size", json!(i64::MAX), "image_size"),
        (MANIFEST, manifest, "/chunk_size", json!(0), "chunk_size"),
        (MANIFEST, manifest, "/chunk_size", json!(2048), "chunk_size"),
        (MANIFEST, manifest, "/chunk_size", json!(6000), "chunk_size"),
        (MANIFEST, manifest, "/chunk_size", json!(1u64 << 27), "chunk_size"),
        (MANIFEST, manifest, "/chunk_count", json!(4), "chunk_count"),
        (MANIFEST, manifest, "/chunk_count", json!(u64::MAX), "chunk_count"),
        (MANIFEST, manifest, "/parent_snapshot_id", json!(id33), "parent_snapshot_id"),
        (MANIFEST, manifest, "/refs/0/path", json!("other/vm-1/delta.blob"), "refs[0].path"),
        (MANIFEST, manifest, "/refs/0/path", json!("exports/../secret"), "refs[0].path"),
        (MANIFEST, manifest, "/refs/0/path", json!("/exports/vm-1/delta.blob"), "refs[0].path"),
        (MANIFEST, manifest, "/refs/0/path", json!("exports//delta.blob"), "refs[0].path"),
        (MANIFEST, manifest, "/refs/0/path", json!(""), "refs[0].path"),
        (MANIFEST, manifest, "/refs/0/path", json!(long), "refs[0].path"),
        (MANIFEST, manifest, "/refs/1/id", json!("r0"), "refs[1].id"),
        (MANIFEST, manifest, "/entries/1/index", json!(0), "entries[1]: index"),
        (MANIFEST, manifest, "/entries/1/index", json!(3), "entries[2]: index"),
        (MANIFEST, manifest, "/entries/3/index", json!(5), "entries[3]: index"),
        (MANIFEST, manifest, "/entries/3/index", json!(u64::MAX), "entries[3]: index"),
        (MANIFEST, manifest, "/entries/0/ref", json!("r9"), "entries[0]: ref"),
        (MANIFEST, manifest, "/entries/0/len", json!(2048), "entries[0]: len"),
        (MANIFEST, manifest, "/entries/3/len", json!(4096), "entries[3]: len"),
        (MANIFEST, manifest, "/entries/0/offset", json!(u64::MAX), "entries[0]: offset"),
        (MANIFEST, manifest, "/entries/0/offset", json!(i64::MAX), "entries[0]: offset"),
        (MANIFEST, manifest, "/entries/3/offset", json!(4095), "offset"),
        (MANIFEST, manifest, "/entries/0/blake3", json!("a1"), "entries[0]: blake3"),
        (MANIFEST, manifest, "/entries/0/blake3", json!("A1".repeat(32)), "entries[0]: blake3"),
        (HEAD, head, "/version", json!(2), "version"),
        (HEAD, head, "/export_id", json!("../vm-1"), "export_id"),
        (HEAD, head, "/chunk_size", json!(4097), "chunk_size"),
        (HEAD, head, "/current_snapshot_id", json!("../../other"), "current_snapshot_id"),
        (HEAD_CLONE, KINDS[3].1, "/clone_seed/source_export_id", json!("../vm"), "source_export_id"),
        (CURRENT, KINDS[4].1, "/generation", json!(0), "generation"),
        (SEED, KINDS[5].1, "/source_snapshot_id", json!(id33), "source_snapshot_id"),
    ];
    for (golden, decode, pointer, value, field) in cases {
        let mut changed: Value = serde_json::from_str(golden).unwrap();
        *changed.pointer_mut(pointer).unwrap() = value.clone();
        let what = format!("{pointer} = {value}");
        assert_refused(decode(changed.to_string().as_bytes()), field, &what);
    }
}

#[test]
fn a_journal_with_a_field_changed_and_its_checksum_not_is_refused() {
    let good: Value = serde_json::from_str(JOURNAL).unwrap();
    for (field, value, named) in [
        ("phase", json!("INTENT"), "checksum"),
        ("phase", json!("DONE"), "phase"),
        ("kind", json!("compact"), "checksum"),
        ("kind", json!("copy"), "kind"),
        ("export_id", json!("vm-2"), "checksum"),
        ("export_id", json!("../vm"), "export_id"),
        ("snapshot_id", json!("0192f0c1d2e37abc8def001122334477"), "checksum"),
        ("snapshot_id", json!("../snapshot"), "snapshot_id"),
        ("generation", json!(3), "checksum"),
        ("manifest_key", json!("elsewhere"), "checksum"),
    ] {
        let mut changed = good.clone();
        changed["journal"][field] = value;
        assert_refused(KINDS[6].1(changed.to_string().as_bytes()), named, field);
    }
    let other = Journal::decode(JOURNAL.as_bytes(), &id("vm-2")).unwrap_err();
    assert!(
        matches!(&other, journal::JournalError::OtherExport(_)) && other.to_string().contains("export_id"),
        "{other}"
    );
}

const CHUNKS: u32 = 5;
const BOOT: [u8; 16] = [7; 16];

/// A `cache.meta` of five chunks in three runs, with no record.
fn good_meta() -> Vec<u8> {
    let header = Header {
        export_id: id("vm-1"),
        geometry: Geometry::new(u64::from(CHUNKS) * 4096, 4096).unwrap(),
        base: Base { snapshot: Some(SnapshotId::from_bytes([1; 16])), generation: Generation(3) },
        incarnation: None,
        boot_id: BOOT,
        first_seq: 10,
    };
    let states = [Content::Absent, Content::Clean, Content::Clean, Content::Dirty, Content::Dirty].map(ChunkState::new);
    meta::encode_checkpoint(&header, &states).0
}

/// Puts the checksums right that a change of header or runs broke.
fn with_checksums(mut bytes: Vec<u8>) -> Vec<u8> {
    let len = u64::from_le_bytes(bytes[80..88].try_into().unwrap());
    let end = usize::try_from(len).ok().and_then(|len| len.checked_add(HEADER_BYTES)).filter(|end| *end <= bytes.len());
    if let Some(end) = end {
        let hash = blake3::hash(&bytes[HEADER_BYTES..end]);
        bytes[88..120].copy_from_slice(hash.as_bytes());
    }
    let hash = blake3::hash(&bytes[..HEADER_BYTES - 32]);
    bytes[HEADER_BYTES - 32..HEADER_BYTES].copy_from_slice(hash.as_bytes());
    bytes
}

fn epoch(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes[HEADER_BYTES - 32..HEADER_BYTES - 24].try_into().unwrap())
}

#[test]
fn a_header_field_of_cache_meta_with_a_right_checksum_is_refused_by_name_or_harmless() {
    assert!(meta::decode(&good_meta(), BOOT).is_ok());
    let word = |value: u64| value.to_le_bytes().to_vec();
    let run = |count: u32, state: u8| [count.to_le_bytes().to_vec(), vec![state, 0, 0, 0]].concat();
    let cases: Vec<(usize, Vec<u8>, Option<&str>)> = vec![
        (0, b"NBDCACHF".to_vec(), Some("magic")),
        (8, vec![0; 4], Some("version")),
        (8, vec![2, 0, 0, 0], Some("version")),
        // Zeros of this version, which are not read: a later writer may use them.
        (12, vec![9; 4], None),
        (16, word(0), Some("image size")),
        (16, word(4 * 4096), Some("chunk states")),
        (16, word(5 * 4096 + 1), Some("chunk states")),
        (16, word(u64::MAX), Some("image size")),
        (24, word(0), Some("chunk size")),
        (24, word(8192), Some("chunk states")),
        (24, word(u64::MAX), Some("chunk size")),
        (32, word(0), None),
        (40, vec![0; 16], Some("generation 3 without a snapshot")),
        (56, vec![8; 16], None),
        (72, word(0), Some("first log record")),
        (72, word(u64::MAX), Some("first log record")),
        (80, word(0), Some("chunk states")),
        (80, word(16), Some("chunk states")),
        (80, word(25), Some("chunk states")),
        (80, word(u64::MAX), Some("chunk states")),
        (120, word(0), Some("export id")),
        (120, word(3), None),
        (120, word(129), Some("export id")),
        (120, word(u64::MAX), Some("export id")),
        (128, b"../1".to_vec(), Some("export id")),
        (128, vec![0xff; 4], Some("export id")),
        (HEADER_BYTES, run(0, 0), Some("chunk states")),
        (HEADER_BYTES, run(2, 0), Some("chunk states")),
        (HEADER_BYTES, run(u32::MAX, 0), Some("chunk states")),
        (HEADER_BYTES, run(1, 4), Some("chunk states")),
        (HEADER_BYTES, run(1, 8), Some("chunk states")),
        (HEADER_BYTES, run(1, 255), Some("chunk states")),
        (HEADER_BYTES + 5, vec![1, 1, 1], None),
    ];
    for (at, value, refused) in cases {
        let mut bytes = good_meta();
        bytes[at..at + value.len()].copy_from_slice(&value);
        let result = meta::decode(&with_checksums(bytes), BOOT);
        match (result, refused) {
            (Ok(_), None) => {}
            (Err(e), Some(field)) if e.to_string().contains(field) => {}
            (other, expected) => panic!("{value:?} at {at} gives {other:?}, expected is {expected:?}"),
        }
    }
    // Without its checksum put right, any change of the header says just that.
    for at in 12..HEADER_BYTES {
        let mut bytes = good_meta();
        bytes[at] ^= 1;
        assert_eq!(meta::decode(&bytes, BOOT), Err(MetaError::Damaged("its header (checksum)".into())), "byte {at}");
    }
}

#[test]
fn a_whole_record_that_says_what_no_server_writes_is_refused_by_its_number() {
    let decode_with = |change: &dyn Fn(&mut [u8; RECORD_BYTES])| {
        let mut bytes = good_meta();
        let epoch = epoch(&bytes);
        let mark = |chunk| Record::Mark(ChunkIndex(chunk), Content::Dirty);
        bytes.extend_from_slice(&mark(0).encode(10, 9, epoch));
        let mut record = Record::Seal(10).encode(11, 10, epoch);
        change(&mut record);
        let mut hasher = blake3::Hasher::new();
        hasher.update(&epoch.to_le_bytes()).update(&record[..28]);
        record[28..].copy_from_slice(&hasher.finalize().as_bytes()[..4]);
        bytes.extend_from_slice(&record);
        meta::decode(&bytes, BOOT)
    };
    assert!(decode_with(&|_| {}).is_ok());
    let set = |kind: u8, value: u64| {
        decode_with(&move |record: &mut [u8; RECORD_BYTES]| {
            record[16..24].copy_from_slice(&value.to_le_bytes());
            record[24] = kind;
        })
    };
    for (kind, value) in [(0, 4), (1, 0), (2, 4), (3, 1), (8, 0), (8, 10), (9, 0), (10, 0), (11, 0)] {
        assert!(set(kind, value).is_ok(), "kind {kind}, value {value}");
    }
    let mut wrong =
        vec![(0, 5), (2, u64::from(u32::MAX)), (3, u64::MAX), (8, 11), (8, u64::MAX), (9, 1), (10, 1), (11, 1)];
    wrong.extend((0..=u8::MAX).filter(|kind| !matches!(kind, 0..=3 | 8..=11)).map(|kind| (kind, 0)));
    for (kind, value) in wrong {
        let error = set(kind, value).expect_err("refused").to_string();
        assert!(error.contains("record 11 of its log ("), "kind {kind}, value {value}: {error}");
    }
    // Another number, and it is no next record: the log ends before it, as with a torn one.
    for seq in [0, 10, 12, u64::MAX] {
        let replayed = decode_with(&|record| record[..8].copy_from_slice(&u64::to_le_bytes(seq)));
        let cut_short = replayed.is_ok_and(|replayed| replayed.next_seq == 11);
        assert!(cut_short, "number {seq}");
    }
}

#[tokio::test]
async fn the_refusal_that_a_user_sees_names_the_file_and_the_field() {
    let mut site = Site::new();
    let registry = site.start("here").await;
    write(&create(&registry, "vm-1", 4).await, 0, 1, 4096).await;
    registry.snapshot(&id("vm-1")).await.unwrap();
    registry.close().await;

    let folder = site.cache_root("here").join("vm-1");
    let (journal, meta) = (folder.join("snapshot.journal.json"), folder.join("cache.meta"));
    let good_meta = fs::read(&meta).unwrap();
    let mut newer_meta = good_meta.clone();
    newer_meta[8] = 2;
    let head: Key = "exports/vm-1/volume.json".parse().unwrap();
    let good_head = site.store.get(&head, 1 << 20).await.unwrap().bytes;
    let bad_head =
        String::from_utf8(good_head.to_vec()).unwrap().replace("\"chunk_size\": 4096", "\"chunk_size\": \"4k\"");

    let refused = async |site: &mut Site| {
        let registry = site.start("here").await;
        let text = registry.volume(&id("vm-1")).await.unwrap_err().to_string();
        let listed = registry.list().remove(0).failed.unwrap();
        registry.close().await;
        (text, listed)
    };
    let assert_names = |(text, listed): (String, String), file: &str, field: &str| {
        for said in [text, listed] {
            assert!(said.contains(file) && said.contains(field), "{said:?} does not name {field} of {file}");
        }
    };
    fs::write(&journal, JOURNAL.replace("\"PREPARED\"", "7")).unwrap();
    assert_names(refused(&mut site).await, journal.to_str().unwrap(), "journal.phase");
    fs::remove_file(&journal).unwrap();

    fs::write(&meta, newer_meta).unwrap();
    assert_names(refused(&mut site).await, meta.to_str().unwrap(), "version is 2");
    fs::write(&meta, good_meta).unwrap();

    site.store.put(&head, bad_head.into(), Condition::Always).await.unwrap();
    assert_names(refused(&mut site).await, head.as_str(), "chunk_size");
    site.store.put(&head, good_head, Condition::Always).await.unwrap();

    let registry = site.start("here").await;
    registry.volume(&id("vm-1")).await.unwrap();
    registry.close().await;
}
