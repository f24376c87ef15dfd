use proptest::prelude::*;

use super::*;

const BOOT: [u8; 16] = [7; 16];
const OTHER_BOOT: [u8; 16] = [8; 16];

fn header(chunks: u64) -> Header {
    Header {
        export_id: "disk-1".parse().unwrap(),
        geometry: Geometry::new(chunks * 4096 - 512, 4096).unwrap(),
        base: Base { snapshot: Some(SnapshotId::generate()), generation: Generation(3) },
        incarnation: Some(RandomId::generate()),
        boot_id: BOOT,
        first_seq: 10,
    }
}

fn states(chunks: u64) -> Vec<ChunkState> {
    vec![ChunkState::new(Content::Absent); usize::try_from(chunks).unwrap()]
}

/// A file with a checkpoint of missing chunks and these records; each names the newest durable one.
fn file(records: &[(Record, u64)]) -> Vec<u8> {
    let (mut bytes, epoch) = encode_checkpoint(&header(8), &states(8));
    for (seq, (record, durable)) in (10..).zip(records) {
        bytes.extend_from_slice(&record.encode(seq, *durable, epoch));
    }
    bytes
}

fn mark(chunk: u32, content: Content) -> (Record, u64) {
    (Record::Mark(ChunkIndex(chunk), content), 9)
}

fn contents(bytes: &[u8], boot: [u8; 16]) -> Vec<Content> {
    decode(bytes, boot).unwrap().states.iter().map(|s| s.content()).collect()
}

#[test]
fn a_checkpoint_reads_back_as_written() {
    let mut all = states(8);
    all[1] = ChunkState::new(Content::Clean);
    all[2] = ChunkState::new(Content::Dirty).cut();
    all[3] = ChunkState::new(Content::Zero);
    let header = header(8);
    let (bytes, _) = encode_checkpoint(&header, &all);
    let found = decode(&bytes, BOOT).unwrap();
    assert_eq!(found.header, header);
    assert_eq!(found.trust, Trust::SameBoot);
    let durable: Vec<u8> = all.iter().map(|s| s.durable_bits()).collect();
    assert_eq!(found.states.iter().map(|s| s.durable_bits()).collect::<Vec<_>>(), durable);
}

#[test]
fn in_the_same_boot_every_mark_counts() {
    let bytes = file(&[mark(0, Content::Dirty), mark(1, Content::Clean), mark(0, Content::Zero)]);
    assert_eq!(contents(&bytes, BOOT)[..2], [Content::Zero, Content::Clean]);
}

#[test]
fn after_another_boot_only_sealed_marks_count_and_no_clean_chunk() {
    let sealed = [mark(0, Content::Dirty), mark(1, Content::Clean), (Record::Seal(11), 9), mark(2, Content::Dirty)];
    let bytes = file(&sealed);
    assert_eq!(contents(&bytes, OTHER_BOOT)[..3], [Content::Dirty, Content::Absent, Content::Absent]);
    // A seal vouches for the marks it names, not for all before it in the file.
    let bytes = file(&[mark(0, Content::Dirty), mark(1, Content::Dirty), (Record::Seal(10), 9)]);
    assert_eq!(contents(&bytes, OTHER_BOOT)[..2], [Content::Dirty, Content::Absent]);
}

#[test]
fn a_clean_stop_is_one_only_if_nothing_follows_it() {
    let bytes = file(&[mark(1, Content::Clean), (Record::CleanStop, 10)]);
    assert_eq!(decode(&bytes, OTHER_BOOT).unwrap().trust, Trust::CleanStop);
    let bytes = file(&[mark(1, Content::Clean), (Record::CleanStop, 10), mark(2, Content::Dirty)]);
    assert_eq!(decode(&bytes, OTHER_BOOT).unwrap().trust, Trust::SealedOnly);
}

#[test]
fn chunks_written_after_the_cut_are_not_in_it() {
    let bytes = file(&[mark(0, Content::Dirty), mark(1, Content::Dirty), (Record::Cut, 9), mark(1, Content::Dirty)]);
    let states = decode(&bytes, BOOT).unwrap().states;
    assert!(states[0].in_cut() && !states[1].in_cut());
    assert_eq!(states[0].published().content(), Content::Clean);
    assert_eq!(states[1].published().content(), Content::Dirty);
    let bytes = file(&[mark(0, Content::Dirty), (Record::Cut, 9), (Record::Uncut, 9)]);
    assert!(!decode(&bytes, BOOT).unwrap().states[0].in_cut());
}

#[test]
fn a_torn_tail_ends_the_log() {
    let whole = file(&[mark(0, Content::Dirty), mark(1, Content::Dirty)]);
    for cut in 1..RECORD_BYTES {
        assert_eq!(contents(&whole[..whole.len() - cut], BOOT)[..2], [Content::Dirty, Content::Absent]);
    }
    // What was not synced may reach the disk in any order: a later record without the one before it is a tear, too.
    let mut reordered = file(&[mark(0, Content::Dirty), mark(1, Content::Dirty)]);
    let first = reordered.len() - 2 * RECORD_BYTES;
    reordered[first..first + RECORD_BYTES].fill(0);
    assert_eq!(contents(&reordered, BOOT)[..2], [Content::Absent, Content::Absent]);
}

#[test]
fn damage_to_what_was_durable_is_refused_by_name() {
    let mut bytes =
        file(&[mark(0, Content::Dirty), (Record::Seal(10), 9), (Record::Mark(ChunkIndex(1), Content::Dirty), 11)]);
    let first = bytes.len() - 3 * RECORD_BYTES;
    bytes[first + 16] ^= 1;
    assert_eq!(decode(&bytes, BOOT), Err(MetaError::Damaged("record 10 of its log".into())));
}

#[test]
fn any_changed_byte_of_the_checkpoint_is_refused() {
    let (good, _) = encode_checkpoint(&header(8), &states(8));
    for at in 0..HEADER_BYTES + RUN_BYTES {
        let mut bad = good.clone();
        bad[at] ^= 0x40;
        assert!(decode(&bad, BOOT).is_err(), "byte {at}");
    }
    assert!(decode(&good[..good.len() - RECORD_BYTES], BOOT).is_err());
}

#[test]
fn another_version_is_refused_by_name() {
    let (mut bytes, _) = encode_checkpoint(&header(8), &states(8));
    bytes[8] = 2;
    assert_eq!(decode(&bytes, BOOT), Err(MetaError::Version(2)));
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..6000), keep in 0usize..5000) {
        let _ = decode(&bytes, BOOT);
        let mut grafted = file(&[mark(0, Content::Dirty)]);
        grafted.truncate(keep.min(grafted.len()));
        grafted.extend_from_slice(&bytes);
        let _ = decode(&grafted, OTHER_BOOT);
    }

    #[test]
    fn any_states_read_back(bits in prop::collection::vec(0u8..4, 8)) {
        let all: Vec<_> = bits.iter().map(|b| ChunkState::from_durable_bits(*b).unwrap()).collect();
        let (bytes, _) = encode_checkpoint(&header(8), &all);
        prop_assert_eq!(decode(&bytes, BOOT).unwrap().states, all);
    }
}
