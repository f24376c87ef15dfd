use std::time::{Duration, SystemTime};

use proptest::prelude::*;

use super::*;
use crate::manifest::head::Head;
use crate::manifest::{Change, Source};

fn root() -> ExportRoot {
    ExportRoot::new("exports".parse().unwrap())
}

fn key(text: &str) -> Key {
    text.parse().unwrap()
}

fn id() -> ExportId {
    "disk".parse().unwrap()
}

const BLOB: &str = "exports/disk/snapshots/00000000000000000000000000000001/delta.blob";
const FOREIGN: &str = "exports/source/snapshots/00000000000000000000000000000002/base.blob";

fn new(offset: u64, byte: u8) -> Change {
    Change::New { offset, hash: [byte; 32] }
}

fn sample() -> Manifest {
    let geometry = Geometry::new(4 * 4096 + 100, 4096).unwrap();
    let date = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
    let parent = Some("000000000000000000000000000000aa".parse().unwrap());
    let old = Change::Existing { blob: key(FOREIGN), offset: 8192, hash: [9; 32] };
    let changes = vec![(ChunkIndex(4), new(4096, 2)), (ChunkIndex(0), new(0, 1)), (ChunkIndex(2), old)];
    Manifest::empty(id(), geometry).successor(id(), parent, date, key(BLOB), changes).unwrap()
}

const GOLDEN: &str = r#"{
  "version": 2,
  "export_id": "disk",
  "generation": 1,
  "image_size": 16484,
  "chunk_size": 4096,
  "chunk_count": 5,
  "created_at": "2023-11-14T22:13:20.123Z",
  "parent_snapshot_id": "000000000000000000000000000000aa",
  "refs": [
    {"id": "r0", "path": "exports/disk/snapshots/00000000000000000000000000000001/delta.blob"},
    {"id": "r1", "path": "exports/source/snapshots/00000000000000000000000000000002/base.blob"}
  ],
  "entries": [
    {"index": 0, "ref": "r0", "offset": 0, "len": 4096, "blake3": "0101010101010101010101010101010101010101010101010101010101010101"},
    {"index": 2, "ref": "r1", "offset": 8192, "len": 4096, "blake3": "0909090909090909090909090909090909090909090909090909090909090909"},
    {"index": 4, "ref": "r0", "offset": 4096, "len": 100, "blake3": "0202020202020202020202020202020202020202020202020202020202020202"}
  ]
}
"#;

fn read(text: &str) -> Result<Manifest, FormatError> {
    decode(text.as_bytes(), &key("exports/disk/m.json"), &id(), None, &root())
}

#[test]
fn a_manifest_is_written_for_people_and_reads_back_the_same() {
    assert_eq!(String::from_utf8(encode(&sample())).unwrap(), GOLDEN);
    assert_eq!(read(GOLDEN).unwrap(), sample());
    let empty = Manifest::empty(id(), sample().geometry());
    let empty = empty.compacted(id(), None, SystemTime::UNIX_EPOCH, key(BLOB), Vec::new()).unwrap();
    assert_eq!(read(&String::from_utf8(encode(&empty)).unwrap()).unwrap(), empty);
}

#[test]
fn one_wrong_field_is_refused_by_its_name() {
    let cases = [
        (r#""version": 2"#, r#""version": 3"#, "version is 3"),
        (r#""export_id": "disk""#, r#""export_id": "dusk""#, "export_id"),
        (r#""generation": 1"#, r#""generation": 0"#, "generation"),
        (r#""generation": 1"#, r#""generation": -1"#, "not a manifest"),
        (r#""image_size": 16484"#, r#""image_size": 0"#, "image size 0"),
        (r#""chunk_size": 4096"#, r#""chunk_size": 4095"#, "chunk size 4095"),
        (r#""chunk_count": 5"#, r#""chunk_count": 6"#, "chunk_count"),
        (r#""index": 2"#, r#""index": 0"#, "entries[1]: index 0 does not ascend"),
        (r#""index": 4"#, r#""index": 5"#, "entries[2]: index 5"),
        (r#""index": 4"#, r#""index": 18446744073709551615"#, "entries[2]: index 18446744073709551615"),
        (r#""len": 100"#, r#""len": 4096"#, "entries[2]: len"),
        (r#""offset": 8192"#, r#""offset": 18446744073709551000"#, "entries[1]: offset"),
        (r#""offset": 4096"#, r#""offset": 4095"#, "overlap"),
        (r#""ref": "r1""#, r#""ref": "r9""#, "\"r9\" is not the id of a ref"),
        (r#"{"id": "r1""#, r#"{"id": "r0""#, "refs[1].id"),
        ("exports/source/snapshots/", "elsewhere/source/blobs/", "refs[1].path"),
        ("exports/source/", "exports/../secret/", "refs[1].path"),
        ("0909090909", "090909090", "blake3"),
        ("0909090909", "zz09090909", "blake3"),
        (r#""refs": ["#, r#""base_ref": "nothing", "refs": ["#, "base_ref"),
        ("}\n", "", "not a manifest"),
    ];
    for (good, bad, named) in cases {
        let text = GOLDEN.replacen(good, bad, 1);
        assert_ne!(text, GOLDEN, "{good}");
        let refused = read(&text).expect_err(bad).to_string();
        assert!(refused.contains(named) && refused.contains("exports/disk/m.json"), "{bad}: {refused}");
    }
    let other = Geometry::new(4096, 4096).unwrap();
    let refused = decode(GOLDEN.as_bytes(), &key("k"), &id(), Some(other), &root()).unwrap_err().to_string();
    assert!(refused.contains("image_size is 16484, but should be 4096"), "{refused}");
}

#[test]
fn two_names_of_one_blob_hide_no_overlap_and_a_number_is_a_name() {
    let aliased = GOLDEN
        .replacen("exports/source/snapshots/00000000000000000000000000000002/base.blob", BLOB, 1)
        .replacen(r#""offset": 8192"#, r#""offset": 100"#, 1);
    assert!(read(&aliased).unwrap_err().to_string().contains("overlap"));
    let numbered = GOLDEN.replace(r#""r0""#, "0").replace(r#""r1""#, "1");
    assert_eq!(read(&numbered).unwrap(), sample());
}

#[test]
fn an_error_repeats_only_the_beginning_of_a_long_text() {
    for field in [r#""disk""#, r#""r1""#, r#""0909090909090909090909090909090909090909090909090909090909090909""#] {
        let text = GOLDEN.replacen(field, &format!("\"{}\"", "x".repeat(1 << 20)), 1);
        let refused = read(&text).unwrap_err().to_string();
        assert!(refused.len() < 400, "{} bytes", refused.len());
    }
}

#[test]
fn a_clock_set_to_no_date_at_all_does_not_keep_anybody_from_publishing() {
    for date in [SystemTime::UNIX_EPOCH - Duration::from_secs(1), SystemTime::UNIX_EPOCH + Duration::from_secs(1 << 60)]
    {
        let blob = key("exports/disk/b");
        let next = sample().successor(id(), None, date, blob, Vec::new()).unwrap();
        assert_eq!(next.created_at(), "1970-01-01T00:00:00.000Z");
    }
}

#[test]
fn fields_of_other_tools_are_no_error() {
    let text = GOLDEN.replacen(r#""version": 2,"#, r#""version": 2, "tool": {"name": ["x"]},"#, 1);
    assert_eq!(read(&text).unwrap(), sample());
}

#[test]
fn a_blob_that_nobody_needs_any_more_is_not_named() {
    let next = |m: &Manifest, changes| m.successor(id(), None, SystemTime::UNIX_EPOCH, key("exports/disk/b"), changes);
    let moved = next(&sample(), vec![(ChunkIndex(2), Change::Zero), (ChunkIndex(1), new(0, 3))]).unwrap();
    assert_eq!(moved.blobs(), [key(BLOB), key("exports/disk/b")]);
    assert_eq!(moved.generation(), Generation(2));
    assert_eq!(moved.source(ChunkIndex(2)), Source::Zero);
    assert!(matches!(moved.source(ChunkIndex(4)), Source::Packed { range, .. } if range.len() == 100));
}

#[test]
fn a_chunk_of_an_older_base_image_is_never_published_without_a_hash() {
    let text = GOLDEN.replacen(r#""refs": ["#, r#""base_ref": "r1", "refs": ["#, 1);
    let based = read(&text).unwrap();
    assert!(matches!(based.source(ChunkIndex(1)), Source::Base { range, .. } if range.offset() == 4096));
    let next = |changes| based.successor(id(), None, SystemTime::UNIX_EPOCH, key("exports/disk/b"), changes);
    let refused = next(vec![(ChunkIndex(1), Change::Zero)]).unwrap_err();
    assert!(refused.to_string().contains("chunk 3"), "{refused}");
    let all = next(vec![(ChunkIndex(3), Change::Zero), (ChunkIndex(1), Change::Zero)]).unwrap();
    assert!(!all.has_base() && all.is_zero(ChunkIndex(1)));
}

#[test]
fn a_head_keeps_the_fields_of_other_tools_and_a_nudge_changes_only_its_bytes() {
    let at = key("exports/disk/volume.json");
    let text = r#"{"version":1,"export_id":"disk","image_size":8192,"chunk_size":4096,"owner":"tests"}"#;
    let head = Head::decode(text.as_bytes(), &id(), &at).unwrap();
    let bumped = Head::decode(&head.bumped().encode(), &id(), &at).unwrap();
    assert_ne!(bumped.encode(), head.encode());
    assert!(String::from_utf8(bumped.encode()).unwrap().contains(r#""owner": "tests""#));
    assert_eq!((bumped.current, bumped.geometry), (head.current, head.geometry));
    let cases = [
        (r#""version":1"#, r#""version":2"#, "version is 2"),
        (r#""export_id":"disk""#, r#""export_id":"d""#, "export_id"),
        (r#""image_size":8192"#, r#""image_size":0"#, "image size 0"),
        (r#""chunk_size":4096"#, r#""chunk_size":3"#, "chunk size 3"),
        (r#""owner":"tests""#, r#""current_snapshot_id":"xyz""#, "snapshot id"),
        (r#""owner":"tests""#, r#""clone_seed":{"source_export_id":"../x","source_snapshot_id":""}"#, "export id"),
    ];
    for (good, bad, named) in cases {
        let refused = Head::decode(text.replace(good, bad).as_bytes(), &id(), &at).expect_err(bad).to_string();
        assert!(refused.contains(named) && refused.contains("volume.json"), "{refused}");
    }
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..300), at in 0usize..1200) {
        let _ = decode(&bytes, &key("k"), &id(), None, &root());
        let mut text = GOLDEN.as_bytes().to_vec();
        let at = at.min(text.len());
        text.splice(at..(at + bytes.len().min(3)).min(text.len()), bytes.iter().copied().take(3));
        let _ = decode(&text, &key("k"), &id(), None, &root());
        let _ = Head::decode(&bytes, &id(), &key("k"));
    }

    #[test]
    fn any_manifest_reads_back(chunks in prop::collection::btree_set(0u32..64, 0..64), generation in 0u8..5) {
        let geometry = Geometry::new(64 * 4096, 4096).unwrap();
        let mut manifest = Manifest::empty(id(), geometry);
        for round in 0..=generation {
            let changes = chunks.iter().filter(|c| **c % 5 >= u32::from(round)).zip(0u64..);
            let changes = changes.map(|(c, i)| (ChunkIndex(*c), new(i * 4096, round))).collect();
            let blob = key(&format!("exports/disk/{round}"));
            manifest = manifest.successor(id(), None, SystemTime::UNIX_EPOCH, blob, changes).unwrap();
        }
        let decoded = decode(&encode(&manifest), &key("k"), &id(), Some(geometry), &root()).unwrap();
        prop_assert_eq!(decoded, manifest);
    }
}

#[test]
fn refs_beyond_what_the_chunks_can_need_are_refused_before_they_are_kept() {
    let geometry = sample().geometry();
    let most = usize::try_from(MAX_UNUSED_REFS).unwrap() + geometry.chunk_count() as usize;
    let with = |refs: usize| {
        let more: String = (2..refs).map(|i| format!(",{{\"id\": {i}, \"path\": \"{BLOB}\"}}")).collect();
        let text = GOLDEN.replace("base.blob\"}\n", &format!("base.blob\"}}{more}\n"));
        decode(text.as_bytes(), &key("exports/disk/m.json"), &id(), Some(geometry), &root())
    };
    with(most).unwrap();
    let error = with(most + 1).unwrap_err().to_string();
    assert!(error.starts_with("exports/disk/m.json: refs: there are 4102, more than the 4101"), "{error}");
}
