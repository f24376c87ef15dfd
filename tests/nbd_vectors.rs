//! Raw vectors over a socket: what a client sends, byte for byte, and what it gets, each named after its rule.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod common;

use std::io::Write;
use std::net::Shutdown;
use std::time::{Duration, Instant};

use common::nbd::{CHUNK, DISK_BYTES, LAZY_BYTE, LAZY_BYTES, MIB, Raw, Served, frame, go_data, meta_data};
use nbd_server::nbd::Limits;
use nbd_server::nbd::wire::{self, Mode, cflag, chunk, cmd, opt, rep};

const ALL: &[Mode] = &[Mode::Simple, Mode::Structured, Mode::Extended];
const CHUNKED: &[Mode] = &[Mode::Structured, Mode::Extended];
const COMPACT: &[Mode] = &[Mode::Simple, Mode::Structured];
const EXTENDED: &[Mode] = &[Mode::Extended];
const SIMPLE: &[Mode] = &[Mode::Simple];

const PERM: u32 = 1;
const INVAL: u32 = 22;
const NOSPC: u32 = 28;
const SHUTDOWN: u32 = 108;
const END: u64 = DISK_BYTES;
/// A command nobody knows.
const UNKNOWN: u16 = 77;
const RESIZE: u16 = 8;
const LAST_SECTOR: u64 = u64::MAX - 511;

struct Vector {
    rule: &'static str,
    export: &'static str,
    modes: &'static [Mode],
    kind: u16,
    flags: u16,
    offset: u64,
    len: u64,
    errno: u32,
}

const fn on(
    export: &'static str,
    rule: &'static str,
    modes: &'static [Mode],
    (kind, flags): (u16, u16),
    (offset, len): (u64, u64),
    errno: u32,
) -> Vector {
    Vector { rule, export, modes, kind, flags, offset, len, errno }
}

const fn v(rule: &'static str, modes: &'static [Mode], command: (u16, u16), range: (u64, u64), errno: u32) -> Vector {
    on("disk", rule, modes, command, range, errno)
}

const NONE: u16 = 0;
const NOWHERE: u16 = 1 << 15;

#[rustfmt::skip]
const VECTORS: &[Vector] = &[
    v("a read of one byte is served: the minimum block is 1", ALL, (cmd::READ, NONE), (1, 1), 0),
    v("a read of the last byte is served", ALL, (cmd::READ, NONE), (END - 1, 1), 0),
    v("a read across chunks is served", ALL, (cmd::READ, NONE), (CHUNK - 1, CHUNK + 2), 0),
    v("a read of the maximum block is served", ALL, (cmd::READ, NONE), (0, 32 * MIB), 0),
    v("a read over the maximum block is EINVAL, not a disconnect", ALL, (cmd::READ, NONE), (0, 32 * MIB + 1), INVAL),
    v("a read of 4 GiB is EINVAL, not a disconnect", ALL, (cmd::READ, NONE), (0, u32::MAX as u64), INVAL),
    v("a read of 2^64 - 1 is EINVAL, not a disconnect", EXTENDED, (cmd::READ, NONE), (0, u64::MAX), INVAL),
    v("a read at the end is EINVAL", ALL, (cmd::READ, NONE), (END, 1), INVAL),
    v("a read across the end is EINVAL", ALL, (cmd::READ, NONE), (END - 1, 2), INVAL),
    v("a read whose end overflows is EINVAL", ALL, (cmd::READ, NONE), (LAST_SECTOR, 512), INVAL),
    v("a read whose end overflows by far is EINVAL", ALL, (cmd::READ, NONE), (u64::MAX, u32::MAX as u64), INVAL),
    v("a read of nothing is no disconnect", ALL, (cmd::READ, NONE), (0, 0), 0),
    v("a read of nothing at the end is no disconnect", ALL, (cmd::READ, NONE), (END, 0), 0),
    v("a read of nothing past the end is EINVAL", ALL, (cmd::READ, NONE), (END + 1, 0), INVAL),
    v("FUA is accepted on a read", ALL, (cmd::READ, cflag::FUA), (0, 512), 0),
    v("DF without structured replies is EINVAL", SIMPLE, (cmd::READ, cflag::DF), (0, 512), INVAL),
    v("DF is accepted on a read", CHUNKED, (cmd::READ, cflag::DF), (0, 65_536), 0),
    v("DF is served up to the maximum block", CHUNKED, (cmd::READ, cflag::DF), (0, 32 * MIB), 0),
    v("NO_HOLE does not apply to a read", ALL, (cmd::READ, cflag::NO_HOLE), (0, 512), INVAL),
    v("REQ_ONE does not apply to a read", ALL, (cmd::READ, cflag::REQ_ONE), (0, 512), INVAL),
    v("FAST_ZERO does not apply to a read", ALL, (cmd::READ, cflag::FAST_ZERO), (0, 512), INVAL),
    v("PAYLOAD_LEN on a compact read is EINVAL and no payload follows", COMPACT, (cmd::READ, cflag::PAYLOAD_LEN), (0, 512), INVAL),
    v("PAYLOAD_LEN on an extended read is EINVAL and its payload is drained", EXTENDED, (cmd::READ, cflag::PAYLOAD_LEN), (0, 512), INVAL),
    v("an unknown flag on a read is EINVAL", ALL, (cmd::READ, NOWHERE), (0, 512), INVAL),

    v("a write of one byte is served", ALL, (cmd::WRITE, NONE), (3, 1), 0),
    v("a write of the last byte is served", ALL, (cmd::WRITE, NONE), (END - 1, 1), 0),
    v("a write across chunks is served", ALL, (cmd::WRITE, NONE), (CHUNK - 1, CHUNK + 2), 0),
    v("a write of the maximum block is served", ALL, (cmd::WRITE, NONE), (0, 32 * MIB), 0),
    v("a write over the maximum block is drained and refused", ALL, (cmd::WRITE, NONE), (0, 32 * MIB + 1), INVAL),
    v("a write of 64 MiB is drained and refused", ALL, (cmd::WRITE, NONE), (0, 64 * MIB), INVAL),
    v("a write at the end is ENOSPC and its payload is consumed", ALL, (cmd::WRITE, NONE), (END, 512), NOSPC),
    v("a write across the end is ENOSPC", ALL, (cmd::WRITE, NONE), (END - 511, 512), NOSPC),
    v("a write whose end overflows is ENOSPC", ALL, (cmd::WRITE, NONE), (LAST_SECTOR, 512), NOSPC),
    v("a write of nothing is no disconnect", ALL, (cmd::WRITE, NONE), (0, 0), 0),
    v("a write of nothing past the end is ENOSPC", ALL, (cmd::WRITE, NONE), (END + 1, 0), NOSPC),
    v("FUA is accepted on a write", ALL, (cmd::WRITE, cflag::FUA), (0, 512), 0),
    v("DF does not apply to a write", ALL, (cmd::WRITE, cflag::DF), (0, 512), INVAL),
    v("NO_HOLE does not apply to a write", ALL, (cmd::WRITE, cflag::NO_HOLE), (0, 512), INVAL),
    v("REQ_ONE does not apply to a write", ALL, (cmd::WRITE, cflag::REQ_ONE), (0, 512), INVAL),
    v("FAST_ZERO does not apply to a write", ALL, (cmd::WRITE, cflag::FAST_ZERO), (0, 512), INVAL),
    v("PAYLOAD_LEN on a compact write is EINVAL and its payload is consumed", COMPACT, (cmd::WRITE, cflag::PAYLOAD_LEN), (0, 512), INVAL),
    v("all unknown flags on a write are EINVAL and its payload is consumed", ALL, (cmd::WRITE, 0xffc0), (0, 70_000), INVAL),

    v("a flush is served", ALL, (cmd::FLUSH, NONE), (0, 0), 0),
    v("a flush with offset and length is served", ALL, (cmd::FLUSH, NONE), (LAST_SECTOR, 512), 0),
    v("FUA is accepted on a flush", ALL, (cmd::FLUSH, cflag::FUA), (0, 0), 0),
    v("DF does not apply to a flush", ALL, (cmd::FLUSH, cflag::DF), (0, 0), INVAL),

    v("a trim is served", ALL, (cmd::TRIM, NONE), (0, CHUNK), 0),
    v("a trim of odd bytes is served", ALL, (cmd::TRIM, NONE), (1, 3), 0),
    v("a trim over the maximum block is served: it has no payload", ALL, (cmd::TRIM, NONE), (0, DISK_BYTES), 0),
    v("FUA is accepted on a trim", ALL, (cmd::TRIM, cflag::FUA), (0, 512), 0),
    v("a trim past the end is EINVAL", ALL, (cmd::TRIM, NONE), (END - 511, 512), INVAL),
    v("a trim whose end overflows is EINVAL", ALL, (cmd::TRIM, NONE), (LAST_SECTOR, 512), INVAL),
    v("a trim of nothing is no disconnect", ALL, (cmd::TRIM, NONE), (0, 0), 0),
    v("NO_HOLE does not apply to a trim", ALL, (cmd::TRIM, cflag::NO_HOLE), (0, 512), INVAL),

    v("a cache is served", ALL, (cmd::CACHE, NONE), (0, CHUNK), 0),
    v("a cache of everything is served", ALL, (cmd::CACHE, NONE), (0, DISK_BYTES), 0),
    v("FUA is accepted on a cache", ALL, (cmd::CACHE, cflag::FUA), (0, 512), 0),
    v("a cache past the end is EINVAL", ALL, (cmd::CACHE, NONE), (END, 1), INVAL),
    v("a cache MUST reject unknown flags", ALL, (cmd::CACHE, NOWHERE), (0, 512), INVAL),
    v("DF does not apply to a cache", ALL, (cmd::CACHE, cflag::DF), (0, 512), INVAL),

    v("zeroing is served", ALL, (cmd::WRITE_ZEROES, NONE), (0, CHUNK), 0),
    v("zeroing of odd bytes is served", ALL, (cmd::WRITE_ZEROES, NONE), (1, 3), 0),
    v("zeroing over the maximum block is served: it has no payload", ALL, (cmd::WRITE_ZEROES, NONE), (0, DISK_BYTES), 0),
    v("zeroing with NO_HOLE is served", ALL, (cmd::WRITE_ZEROES, cflag::NO_HOLE), (0, 512), 0),
    v("zeroing with FAST_ZERO is served", ALL, (cmd::WRITE_ZEROES, cflag::FAST_ZERO), (0, 512), 0),
    v("zeroing with all its flags is served", ALL, (cmd::WRITE_ZEROES, cflag::FUA | cflag::NO_HOLE | cflag::FAST_ZERO), (5, 512), 0),
    v("zeroing past the end is ENOSPC", ALL, (cmd::WRITE_ZEROES, NONE), (END - 511, 512), NOSPC),
    v("FAST_ZERO past the end is ENOSPC, never EOVERFLOW", ALL, (cmd::WRITE_ZEROES, cflag::FAST_ZERO), (0, u32::MAX as u64), NOSPC),
    v("zeroing whose end overflows is ENOSPC", ALL, (cmd::WRITE_ZEROES, NONE), (LAST_SECTOR, 512), NOSPC),
    v("zeroing of nothing is no disconnect", ALL, (cmd::WRITE_ZEROES, NONE), (0, 0), 0),
    v("DF does not apply to zeroing", ALL, (cmd::WRITE_ZEROES, cflag::DF), (0, 512), INVAL),
    v("REQ_ONE does not apply to zeroing", ALL, (cmd::WRITE_ZEROES, cflag::REQ_ONE), (0, 512), INVAL),

    v("BLOCK_STATUS without a context is EINVAL", SIMPLE, (cmd::BLOCK_STATUS, NONE), (0, 512), INVAL),
    v("BLOCK_STATUS is served", CHUNKED, (cmd::BLOCK_STATUS, NONE), (0, 512), 0),
    v("BLOCK_STATUS of everything is served", CHUNKED, (cmd::BLOCK_STATUS, NONE), (0, DISK_BYTES), 0),
    v("BLOCK_STATUS with REQ_ONE is served", CHUNKED, (cmd::BLOCK_STATUS, cflag::REQ_ONE), (0, DISK_BYTES), 0),
    v("FUA is accepted on BLOCK_STATUS", CHUNKED, (cmd::BLOCK_STATUS, cflag::FUA), (0, 512), 0),
    v("BLOCK_STATUS of nothing is EINVAL", CHUNKED, (cmd::BLOCK_STATUS, NONE), (0, 0), INVAL),
    v("BLOCK_STATUS past the end is EINVAL", CHUNKED, (cmd::BLOCK_STATUS, NONE), (END - 1, 2), INVAL),
    v("BLOCK_STATUS whose end overflows is EINVAL", CHUNKED, (cmd::BLOCK_STATUS, NONE), (LAST_SECTOR, 512), INVAL),
    v("DF does not apply to BLOCK_STATUS", CHUNKED, (cmd::BLOCK_STATUS, cflag::DF), (0, 512), INVAL),
    v("a compact BLOCK_STATUS has no payload", &[Mode::Structured], (cmd::BLOCK_STATUS, cflag::PAYLOAD_LEN), (0, 512), INVAL),

    v("RESIZE is not on offer", ALL, (RESIZE, NONE), (DISK_BYTES * 2, 0), INVAL),
    v("an unknown command is EINVAL", ALL, (UNKNOWN, NONE), (0, 512), INVAL),
    v("the highest unknown command is EINVAL", ALL, (u16::MAX, NONE), (u64::MAX, u32::MAX as u64), INVAL),
    v("the payload of an unknown extended command is drained", EXTENDED, (UNKNOWN, cflag::PAYLOAD_LEN), (0, 70_000), INVAL),
    v("the payload of an extended trim is drained", EXTENDED, (cmd::TRIM, cflag::PAYLOAD_LEN), (0, 512), INVAL),

    on("ro", "a write to a read-only export is EPERM and its payload is consumed", ALL, (cmd::WRITE, NONE), (0, 512), PERM),
    on("ro", "a long write to a read-only export is drained", ALL, (cmd::WRITE, NONE), (0, 64 * MIB), PERM),
    on("ro", "a trim of a read-only export is EPERM", ALL, (cmd::TRIM, NONE), (0, 512), PERM),
    on("ro", "zeroing a read-only export is EPERM", ALL, (cmd::WRITE_ZEROES, NONE), (0, 512), PERM),
    on("ro", "a read of a read-only export is served", ALL, (cmd::READ, NONE), (0, 512), 0),
    on("ro", "a flush of a read-only export is served", ALL, (cmd::FLUSH, NONE), (0, 0), 0),
    on("ro", "a cache of a read-only export is served", ALL, (cmd::CACHE, NONE), (0, 512), 0),

    on("big", "a 64-bit cache is served", EXTENDED, (cmd::CACHE, NONE), (0, 5 << 30), 0),
    on("big", "a 64-bit trim is served", EXTENDED, (cmd::TRIM, NONE), (0, 5 << 30), 0),
    on("big", "64-bit zeroing is served", EXTENDED, (cmd::WRITE_ZEROES, cflag::FAST_ZERO), (0, 5 << 30), 0),
    on("big", "a 64-bit BLOCK_STATUS is served", EXTENDED, (cmd::BLOCK_STATUS, NONE), (0, 5 << 30), 0),
    on("big", "BLOCK_STATUS of 2^32 - 1 bytes is served in compact form", CHUNKED, (cmd::BLOCK_STATUS, NONE), (7, u32::MAX as u64), 0),
];

/// Every vector, in each of its modes, on one connection per export and mode: so each also shows that the stream is in
/// sync after the one before.
#[test]
fn each_vector_gets_its_answer_and_leaves_the_stream_in_sync() {
    let served = Served::new();
    let payload = vec![0x5a; usize::try_from(64 * MIB).unwrap()];
    let mut run = 0;
    for mode in ALL {
        for export in ["disk", "ro", "big"] {
            let mut client = Raw::attach(&served, export, *mode);
            for vector in VECTORS.iter().filter(|v| v.export == export && v.modes.contains(mode)) {
                let about = format!("{} ({mode:?})", vector.rule);
                let mut flags = vector.flags;
                if *mode == Mode::Extended && vector.kind == cmd::WRITE {
                    flags |= cflag::PAYLOAD_LEN;
                }
                let follows = vector.kind == cmd::WRITE || *mode == Mode::Extended && flags & cflag::PAYLOAD_LEN != 0;
                let payload = if follows { &payload[..usize::try_from(vector.len).unwrap()] } else { &[] };
                let reads = vector.kind == cmd::READ && vector.errno == 0;
                let request = client.encode(flags, vector.kind, run, vector.offset, vector.len);
                client.send(&[&request, payload].concat());
                let expected = if reads { usize::try_from(vector.len).unwrap() } else { 0 };
                let answer = client.answer(vector.offset, expected);
                assert_eq!((answer.cookie, answer.errno), (run, vector.errno), "{about}");
                let chunked = *mode == Mode::Extended
                    || *mode == Mode::Structured
                        && (vector.kind == cmd::READ || vector.kind == cmd::BLOCK_STATUS || vector.errno != 0);
                assert_eq!(answer.chunks.is_some(), chunked, "{about}");
                let probe = client.call(0, cmd::READ, 8 * CHUNK, 1, &[]);
                assert_eq!(probe.errno, 0, "in sync after: {about}");
                run += 1;
            }
        }
    }
    assert!(run >= 250, "{run} vectors");
}

fn served_disk(mode: Mode) -> (Served, Raw) {
    let served = Served::new();
    let client = Raw::attach(&served, "disk", mode);
    (served, client)
}

#[test]
fn what_was_written_is_read_in_every_mode_and_over_every_connection() {
    let served = Served::new();
    let data: Vec<u8> = (0..300_000u32).map(|i| u8::try_from(i % 251).unwrap()).collect();
    for (i, mode) in ALL.iter().enumerate() {
        let offset = MIB * (i as u64 + 1) + 17;
        assert_eq!(Raw::attach(&served, "disk", *mode).write(offset, &data).errno, 0);
        for reader in ALL {
            assert!(Raw::attach(&served, "disk", *reader).read(offset, data.len() as u64) == data);
        }
    }
    let mut client = Raw::attach(&served, "disk", Mode::Simple);
    assert_eq!(client.call(0, cmd::WRITE_ZEROES, MIB + 17, 300_000, &[]).errno, 0);
    assert!(client.read(MIB, 400_000).iter().all(|byte| *byte == 0));
    assert!(client.read(2 * MIB + 17, 300_000) == data);
}

#[test]
fn a_refused_write_changes_nothing() {
    let (_served, mut client) = served_disk(Mode::Simple);
    client.write(0, &[1; 4096]);
    assert_eq!(client.call(NOWHERE, cmd::WRITE, 0, 4096, &[2; 4096]).errno, INVAL);
    assert_eq!(client.read(0, 4096), [1; 4096]);
}

#[test]
fn zeros_arrive_as_holes_and_data_as_data() {
    for mode in CHUNKED {
        let (_served, mut client) = served_disk(*mode);
        client.write(8192, &[7; 4096]);
        let answer = client.call(0, cmd::READ, 0, 5 * 4096, &[]);
        let kinds: Vec<u16> = answer.chunks.unwrap().iter().map(|chunk| chunk.kind).collect();
        assert_eq!(kinds, [chunk::OFFSET_HOLE, chunk::OFFSET_DATA, chunk::OFFSET_HOLE]);
        assert_eq!(answer.data[8192..12288], [7; 4096]);
        let whole = client.call(cflag::DF, cmd::READ, 0, 5 * 4096, &[]).chunks.unwrap();
        assert_eq!((whole.len(), whole[0].kind), (1, chunk::OFFSET_DATA), "DF: at most one content chunk");
        let hole = client.call(cflag::DF, cmd::READ, MIB, MIB, &[]).chunks.unwrap();
        assert_eq!((hole.len(), hole[0].kind), (1, chunk::OFFSET_HOLE));
    }
}

#[test]
fn a_large_read_arrives_in_several_chunks() {
    for mode in CHUNKED {
        let (_served, mut client) = served_disk(*mode);
        let data = vec![1; usize::try_from(8 * MIB).unwrap()];
        client.write(0, &data);
        let answer = client.call(0, cmd::READ, 0, 8 * MIB, &[]);
        assert!(answer.chunks.unwrap().len() > 1);
        assert!(answer.data == data);
        assert_eq!(client.call(cflag::DF, cmd::READ, 0, 8 * MIB, &[]).chunks.unwrap().len(), 1);
    }
}

/// A status chunk taken apart: the context's id, and its extents.
fn extents(mode: Mode, payload: &[u8]) -> (u32, Vec<(u64, u64)>) {
    let mut reader = wire::Reader(payload);
    let id = reader.u32().unwrap();
    let mut extents = Vec::new();
    let count = (mode == Mode::Extended).then(|| reader.u32().unwrap());
    while !reader.0.is_empty() {
        extents.push(match mode {
            Mode::Extended => (reader.u64().unwrap(), reader.u64().unwrap()),
            _ => (u64::from(reader.u32().unwrap()), u64::from(reader.u32().unwrap())),
        });
    }
    assert!(count.is_none_or(|count| count as usize == extents.len()));
    (id, extents)
}

fn status(client: &mut Raw, flags: u16, offset: u64, len: u64, payload: &[u8]) -> Vec<(u32, Vec<(u64, u64)>)> {
    let answer = client.call(flags, cmd::BLOCK_STATUS, offset, len, payload);
    assert_eq!(answer.errno, 0);
    let mode = client.mode;
    answer.chunks.unwrap().iter().map(|chunk| extents(mode, &chunk.payload)).collect()
}

#[test]
fn block_status_tells_both_contexts_in_one_chunk_each() {
    for mode in CHUNKED {
        let served = Served::new();
        let mut client = Raw::attach(&served, "lazy", *mode);
        client.write(CHUNK, &vec![1; usize::try_from(CHUNK).unwrap()]);
        let half = LAZY_BYTES / 2;
        let all = status(&mut client, 0, 0, LAZY_BYTES, &[]);
        let allocation = vec![(CHUNK, 3), (CHUNK, 0), (half - 2 * CHUNK, 3), (half, 0)];
        let residency = vec![(CHUNK, 4), (CHUNK, 3), (half - 2 * CHUNK, 4), (half, 0)];
        assert_eq!(all, [(1, allocation), (2, residency)]);
        let one = status(&mut client, cflag::REQ_ONE, CHUNK / 2, LAZY_BYTES / 2, &[]);
        assert_eq!(one, [(1, vec![(CHUNK / 2, 3)]), (2, vec![(CHUNK / 2, 4)])]);
        served.gate.send(true).unwrap();
        // CACHE really prefetches.
        assert_eq!(client.call(0, cmd::CACHE, half, half, &[]).errno, 0);
        assert_eq!(status(&mut client, 0, half, half, &[])[1], (2, vec![(half, 1)]), "resident and clean");
    }
}

#[test]
fn extents_beyond_32_bits_survive() {
    let served = Served::new();
    let mut client = Raw::attach(&served, "big", Mode::Extended);
    assert_eq!(status(&mut client, 0, 1, 5 << 30, &[])[0], (1, vec![(5 << 30, 3)]));
    let mut client = Raw::attach(&served, "big", Mode::Structured);
    assert_eq!(status(&mut client, 0, 1, u64::from(u32::MAX), &[])[0], (1, vec![(u64::from(u32::MAX), 3)]));
}

fn status_payload(len: u64, ids: &[u32]) -> Vec<u8> {
    let mut payload = len.to_be_bytes().to_vec();
    ids.iter().for_each(|id| payload.extend_from_slice(&id.to_be_bytes()));
    payload
}

#[test]
fn a_block_status_payload_selects_contexts() {
    let (_served, mut client) = served_disk(Mode::Extended);
    let mut ask = |ids: &[u32]| {
        let payload = status_payload(4096, ids);
        let answer = client.call(cflag::PAYLOAD_LEN, cmd::BLOCK_STATUS, 0, payload.len() as u64, &payload);
        let contexts = |chunks: Vec<common::nbd::Chunk>| {
            chunks.iter().map(|chunk| extents(Mode::Extended, &chunk.payload).0).collect::<Vec<_>>()
        };
        if answer.errno == 0 { Ok(contexts(answer.chunks.unwrap())) } else { Err(answer.errno) }
    };
    assert_eq!(ask(&[1]), Ok(vec![1]));
    assert_eq!(ask(&[2]), Ok(vec![2]));
    assert_eq!(ask(&[2, 1]), Ok(vec![2, 1]));
    for bad in [&[][..], &[3], &[1, 1], &[1, 2, 3], &[0], &[1, 2, 1], &[9; 5000]] {
        assert_eq!(ask(bad), Err(INVAL), "{} ids", bad.len());
    }
    let past_the_end = status_payload(DISK_BYTES + 1, &[1]);
    assert_eq!(client.call(cflag::PAYLOAD_LEN, cmd::BLOCK_STATUS, 0, 12, &past_the_end).errno, INVAL);
    for short in [0, 1, 7, 8, 11] {
        let answer = client.call(cflag::PAYLOAD_LEN, cmd::BLOCK_STATUS, 0, short as u64, &past_the_end[..short]);
        assert_eq!(answer.errno, INVAL, "{short} bytes");
    }
}

#[test]
fn an_extended_write_without_payload_len_is_served_since_qemu_sends_it_so() {
    let (_served, mut client) = served_disk(Mode::Extended);
    assert_eq!(client.call(0, cmd::WRITE, 0, 512, &[1; 512]).errno, 0);
    assert_eq!(client.read(0, 512), [1; 512]);
}

#[test]
fn a_payload_beyond_64_mib_closes() {
    for (mode, flags, kind, len) in [
        (Mode::Simple, 0, cmd::WRITE, 64 * MIB + 1),
        (Mode::Structured, 0, cmd::WRITE, u64::from(u32::MAX)),
        (Mode::Extended, cflag::PAYLOAD_LEN, cmd::WRITE, u64::MAX),
        (Mode::Extended, cflag::PAYLOAD_LEN, cmd::READ, 1 << 40),
    ] {
        let (_served, mut client) = served_disk(mode);
        let request = client.encode(flags, kind, 1, 0, len);
        client.send(&request);
        assert!(client.is_closed());
    }
}

#[test]
fn a_request_with_another_magic_closes() {
    for (mode, magic) in [
        (Mode::Simple, wire::EXTENDED_REQUEST_MAGIC),
        (Mode::Structured, wire::EXTENDED_REQUEST_MAGIC),
        (Mode::Extended, wire::REQUEST_MAGIC),
        (Mode::Simple, 0),
        (Mode::Simple, u32::MAX),
    ] {
        let (_served, mut client) = served_disk(mode);
        client.send(&[&magic.to_be_bytes()[..], &[0; 28]].concat());
        assert!(client.is_closed());
    }
}

#[test]
fn fast_zero_is_enotsup_only_where_something_would_be_fetched() {
    let served = Served::new();
    let mut client = Raw::attach(&served, "lazy", Mode::Extended);
    let absent = LAZY_BYTES / 2 + 4 * CHUNK;
    let mut zero = |offset, len| client.call(cflag::FAST_ZERO, cmd::WRITE_ZEROES, offset, len, &[]).errno;
    assert_eq!(zero(1, 512), 0, "zeros already");
    assert_eq!(zero(absent + 1, CHUNK - 1), 95, "begins inside");
    assert_eq!(zero(absent, CHUNK - 1), 95, "ends inside");
    assert_eq!(zero(absent - 1, 3 * CHUNK), 95, "both");
    assert_eq!(zero(absent, 2 * CHUNK), 0, "whole chunks");
    assert_eq!(zero(absent + 7, 512), 0, "zeros by now");
    assert_eq!(zero(LAZY_BYTES - CHUNK, CHUNK), 0, "up to the end");
    served.gate.send(true).unwrap();
    let mut before = Raw::attach(&served, "lazy", Mode::Simple);
    assert_eq!(before.read(absent - CHUNK, CHUNK), vec![LAZY_BYTE; usize::try_from(CHUNK).unwrap()]);
}

#[test]
fn requests_in_one_segment_are_all_answered_each_with_its_cookie() {
    let (_served, mut client) = served_disk(Mode::Simple);
    let mut all = Vec::new();
    for cookie in 0..1000u64 {
        all.extend(client.encode(0, cmd::WRITE, cookie << 32, cookie * 512, 512));
        all.extend([u8::try_from(cookie % 256).unwrap(); 512]);
    }
    client.send(&all);
    let mut cookies: Vec<u64> = (0..1000).map(|_| client.answer(0, 0).cookie).collect();
    cookies.sort_unstable();
    assert_eq!(cookies, (0..1000).map(|i| i << 32).collect::<Vec<u64>>());
    let read = client.read(0, 512_000);
    assert!(read.chunks(512).enumerate().all(|(i, sector)| sector == [u8::try_from(i % 256).unwrap(); 512]));
}

#[test]
fn cookies_may_be_reused_at_once() {
    let (_served, mut client) = served_disk(Mode::Simple);
    let request = client.encode(0, cmd::READ, 5, 0, 1);
    client.send(&[&request[..], &request, &request].concat());
    for _ in 0..3 {
        assert_eq!(client.answer(0, 1).cookie, 5);
    }
}

#[test]
fn frames_may_arrive_byte_by_byte() {
    let served = Served::new();
    let mut client = Raw::connect(&served);
    for byte in frame(opt::GO, &go_data("disk")) {
        client.send(&[byte]);
    }
    assert_eq!(client.option_replies(opt::GO).last().unwrap().0, rep::ACK);
    let request = [client.encode(0, cmd::WRITE, 9, 4096, 100), vec![3; 100]].concat();
    for byte in request {
        client.send(&[byte]);
    }
    assert_eq!(client.answer(0, 0).cookie, 9);
    assert_eq!(client.read(4096, 100), [3; 100]);
}

#[test]
fn a_client_need_not_wait_between_go_and_its_first_requests() {
    let served = Served::new();
    let mut client = Raw::connect(&served);
    let write = [client.encode(0, cmd::WRITE, 1, 0, 512), vec![8; 512]].concat();
    client.send(&[frame(opt::GO, &go_data("disk")), write].concat());
    assert_eq!(client.option_replies(opt::GO).last().unwrap().0, rep::ACK);
    assert_eq!(client.answer(0, 0).cookie, 1);
    assert_eq!(client.read(0, 512), [8; 512]);
}

#[test]
fn a_client_that_half_closes_still_gets_its_replies() {
    let served = Served::new();
    let mut client = Raw::attach(&served, "lazy", Mode::Simple);
    for cookie in 0..3 {
        let request = client.encode(0, cmd::READ, cookie, LAZY_BYTES - CHUNK, 4096);
        client.send(&request);
    }
    client.stream.shutdown(Shutdown::Write).unwrap();
    std::thread::sleep(Duration::from_millis(50));
    served.gate.send(true).unwrap();
    for _ in 0..3 {
        assert_eq!(client.answer(0, 4096).data, [LAZY_BYTE; 4096]);
    }
    assert!(client.is_closed());
}

#[test]
fn disc_finishes_what_is_outstanding_and_gets_no_reply() {
    for mode in ALL {
        let served = Served::new();
        let mut client = Raw::attach(&served, "lazy", *mode);
        let read = client.encode(0, cmd::READ, 1, LAZY_BYTES - CHUNK, 4096);
        let disc = client.encode(NOWHERE, cmd::DISC, 2, 0, 0);
        client.send(&[read, disc].concat());
        std::thread::sleep(Duration::from_millis(50));
        served.gate.send(true).unwrap();
        assert_eq!(client.answer(LAZY_BYTES - CHUNK, 4096).data, [LAZY_BYTE; 4096]);
        assert_eq!(client.try_take(1).unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
    }
}

#[test]
fn a_slow_request_never_holds_up_those_behind_it() {
    let served = Served::new();
    let mut client = Raw::attach(&served, "lazy", Mode::Structured);
    let slow = client.encode(0, cmd::READ, 1, LAZY_BYTES - CHUNK, 4096);
    client.send(&slow);
    for _ in 0..100 {
        assert_eq!(client.read(0, 4096), [0; 4096]);
    }
    served.gate.send(true).unwrap();
    assert_eq!(client.answer(LAZY_BYTES - CHUNK, 4096).cookie, 1);
}

#[test]
fn a_hang_up_in_mid_payload_applies_nothing() {
    for len in [4096, 1 << 20] {
        let (served, mut client) = served_disk(Mode::Simple);
        let request = client.encode(0, cmd::WRITE, 1, 0, len);
        client.send(&[request, vec![1; usize::try_from(len).unwrap() - 1]].concat());
        drop(client);
        std::thread::sleep(Duration::from_millis(100));
        let mut other = Raw::attach(&served, "disk", Mode::Simple);
        assert!(other.read(0, len).iter().all(|byte| *byte == 0));
    }
}

#[test]
fn more_requests_than_the_limit_wait_and_are_all_answered() {
    let limits = Limits { requests: 4, connection_bytes: 1 << 16, ..Limits::default() };
    let served = Served::with(limits);
    let mut client = Raw::attach(&served, "disk", Mode::Simple);
    let mut all = Vec::new();
    for cookie in 0..500 {
        all.extend(client.encode(0, cmd::READ, cookie, 0, 100_000));
    }
    client.send(&all);
    let mut seen = [false; 500];
    for _ in 0..500 {
        let answer = client.answer(0, 100_000);
        seen[usize::try_from(answer.cookie).unwrap()] = true;
    }
    assert!(seen.iter().all(|seen| *seen));
}

#[test]
fn a_request_left_half_sent_is_closed_at_the_deadline_and_an_idle_client_is_not() {
    let limits = Limits { stalled: Duration::from_millis(200), ..Limits::default() };
    let served = Served::with(limits);
    let mut idle = Raw::attach(&served, "disk", Mode::Simple);
    for half in [10, 28, 28 + 100] {
        let mut client = Raw::attach(&served, "disk", Mode::Simple);
        let request = [client.encode(0, cmd::WRITE, 1, 0, 4096), vec![1; 4096]].concat();
        client.send(&request[..half]);
        assert!(client.is_closed(), "{half} bytes");
    }
    std::thread::sleep(Duration::from_millis(400));
    assert_eq!(idle.read(0, 1), [0]);
}

#[test]
fn the_handshake_has_a_deadline_that_a_slow_drip_does_not_move() {
    let limits = Limits { handshake: Duration::from_millis(400), ..Limits::default() };
    let served = Served::with(limits);
    let begun = Instant::now();
    let mut silent = Raw::connect(&served);
    let mut drip = Raw::connect(&served);
    for byte in frame(99, &[0; 200]) {
        if drip.stream.write_all(&[byte]).is_err() {
            break;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(silent.is_closed() && drip.is_closed());
    assert!(begun.elapsed() < Duration::from_secs(5));
    Raw::attach(&served, "disk", Mode::Simple);
}

#[test]
fn an_answered_option_renews_the_deadline_up_to_a_bound() {
    let (handshake, handshake_in_all) = (Duration::from_secs(2), Duration::from_secs(5));
    let served = Served::with(Limits { handshake, handshake_in_all, ..Limits::default() });
    let begun = Instant::now();
    let mut client = Raw::connect(&served);
    let mut last_answer = begun.elapsed();
    while client.stream.write_all(&frame(99, &[])).is_ok() && client.try_take(20).is_ok() {
        client.take("option 99 is not known here: do without it".len());
        last_answer = begun.elapsed();
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(last_answer > handshake + Duration::from_secs(1), "cut off after {last_answer:?}");
    assert!(begun.elapsed() >= handshake_in_all && last_answer < Duration::from_secs(20), "{last_answer:?}");
}

#[test]
fn one_connection_too_many_is_closed_and_a_place_that_is_left_can_be_taken() {
    let served = Served::with(Limits { connections: 2, ..Limits::default() });
    let mut first = Raw::attach(&served, "disk", Mode::Simple);
    let second = Raw::attach(&served, "disk", Mode::Simple);
    let stream = std::net::TcpStream::connect(served.host_port()).unwrap();
    assert!(Raw { stream, mode: Mode::Simple }.is_closed());
    drop(second);
    std::thread::sleep(Duration::from_millis(200));
    Raw::attach(&served, "disk", Mode::Simple);
    assert_eq!(first.read(0, 1), [0]);
}

#[test]
fn an_unknown_or_broken_export_harms_no_other_connection() {
    // nbd-server CVE-2013-7441.
    let served = Served::new();
    let mut other = Raw::attach(&served, "disk", Mode::Simple);
    let mut client = Raw::connect(&served);
    for (name, expected) in
        [("nobody", "\"nobody\""), ("../x", "\"../x\""), ("", "name one"), ("broken", "manifest.json is missing")]
    {
        for option in [opt::INFO, opt::GO] {
            let replies = client.option(option, &go_data(name));
            assert_eq!(replies.len(), 1);
            assert_eq!(replies[0].0, rep::ERR_UNKNOWN);
            let text = String::from_utf8(replies[0].1.clone()).unwrap();
            assert!(text.contains(expected), "{text}");
        }
    }
    let mut unlucky = Raw::connect(&served);
    unlucky.send(&frame(opt::EXPORT_NAME, b"nobody"));
    assert!(unlucky.is_closed());
    client.go("disk");
    assert_eq!(other.read(0, 1), [0]);
}

#[test]
fn the_empty_name_is_the_only_export() {
    let served = Served::start(Limits::default(), &"127.0.0.1:0".parse().unwrap(), common::nbd::registry_of_one);
    let mut client = Raw::connect(&served);
    let replies = client.option(opt::INFO, &[&common::nbd::text(b"")[..], &[0, 1, 0, 1]].concat());
    assert!(replies.iter().any(|(_, data)| data == b"\x00\x01only"), "the canonical name is told");
    client.go("");
    assert_eq!(client.read(MIB - 1, 1), [0]);
}

#[test]
fn export_name_attaches_with_and_without_the_124_zeros() {
    let served = Served::new();
    for (flags, answer) in [(1u32, 134), (3, 10)] {
        let stream = std::net::TcpStream::connect(served.host_port()).unwrap();
        let mut client = Raw { stream, mode: Mode::Simple };
        client.take(18);
        client.send(&flags.to_be_bytes());
        client.send(&frame(opt::EXPORT_NAME, b"disk"));
        assert_eq!(client.take(answer)[..8], DISK_BYTES.to_be_bytes());
        assert_eq!(client.read(0, 1), [0]);
    }
}

#[test]
fn list_shows_what_can_be_attached_and_leaves_out_what_is_broken() {
    let served = Served::new();
    let mut client = Raw::connect(&served);
    let replies = client.option(opt::LIST, &[]);
    let names: Vec<String> = replies
        .iter()
        .filter(|(kind, _)| *kind == rep::SERVER)
        .map(|(_, data)| String::from_utf8(wire::Reader(data).string().unwrap().to_vec()).unwrap())
        .collect();
    assert_eq!(names, ["big", "disk", "disk2", "lazy", "ro"]);
    let described = [&common::nbd::text(b"disk2")[..], b"1048576 bytes in chunks of 65536"].concat();
    assert!(replies.iter().any(|(_, data)| *data == described));
}

#[test]
fn block_status_needs_a_selection_for_this_very_export() {
    let served = Served::new();
    let mut client = Raw::connect(&served);
    client.option(opt::STRUCTURED_REPLY, &[]);
    client.option(opt::SET_META_CONTEXT, &meta_data("disk2", &["base:allocation"]));
    client.go("disk");
    client.mode = Mode::Structured;
    assert_eq!(client.call(0, cmd::BLOCK_STATUS, 0, 512, &[]).errno, INVAL);
}

#[test]
fn a_stop_answers_what_was_accepted_and_tells_those_in_the_handshake() {
    let served = Served::new();
    let mut busy = Raw::attach(&served, "lazy", Mode::Simple);
    let mut idle = Raw::attach(&served, "disk", Mode::Simple);
    let mut early = Raw::connect(&served);
    // Only once this is answered has the server taken the read before it.
    let slow = busy.encode(0, cmd::READ, 1, LAZY_BYTES - CHUNK, 4096);
    busy.send(&slow);
    busy.read(0, 1);
    served.tell_to_stop();
    assert!(idle.is_closed());
    assert_eq!(early.option(opt::LIST, &[])[0].0, rep::ERR_SHUTDOWN);
    assert_eq!(early.option(opt::GO, &go_data("disk"))[0].0, rep::ERR_SHUTDOWN);
    assert_eq!(early.option(opt::ABORT, &[])[0].0, rep::ACK);
    assert!(std::net::TcpStream::connect(served.host_port()).is_err(), "no new clients");
    served.gate.send(true).unwrap();
    assert_eq!(busy.answer(0, 4096).data, [LAZY_BYTE; 4096]);
    assert!(busy.is_closed());
    served.wait();
}

#[test]
fn an_unload_answers_what_was_accepted_and_ends_the_clients_of_the_export_alone() {
    let served = Served::new();
    let mut busy = Raw::attach(&served, "lazy", Mode::Simple);
    let mut idle = Raw::attach(&served, "disk", Mode::Simple);
    let mut other = Raw::attach(&served, "disk2", Mode::Simple);
    let slow = busy.encode(0, cmd::READ, 1, LAZY_BYTES - CHUNK, 4096);
    busy.send(&slow);
    busy.read(0, 1);
    // It does not wait for the store, which does not answer.
    served.unload("lazy");
    assert_eq!(busy.answer(0, 4096).errno, SHUTDOWN);
    assert!(busy.is_closed());
    served.unload("disk");
    assert!(idle.is_closed());
    assert_eq!(other.read(0, 4096), [0; 4096]);
}

#[test]
fn a_silent_client_in_the_handshake_does_not_hold_up_a_stop() {
    // qemu CVE-2024-7409.
    let served = Served::new();
    let _silent = Raw::connect(&served);
    std::thread::sleep(Duration::from_millis(100));
    let begun = Instant::now();
    served.tell_to_stop();
    served.wait();
    assert!(begun.elapsed() < Duration::from_secs(5), "well before the deadlines of handshake and drain");
}

#[test]
fn a_stop_waits_no_longer_than_its_deadline() {
    // A request that never ends.
    let limits = Limits { drain: Duration::from_millis(300), ..Limits::default() };
    let served = Served::with(limits);
    let _silent = Raw::connect(&served);
    let mut busy = Raw::attach(&served, "lazy", Mode::Simple);
    let slow = busy.encode(0, cmd::READ, 1, LAZY_BYTES - CHUNK, 4096);
    busy.send(&slow);
    busy.read(0, 1);
    let begun = Instant::now();
    served.tell_to_stop();
    served.wait();
    assert!(begun.elapsed() < Duration::from_secs(3));
}

#[test]
fn what_a_client_left_unread_as_it_hung_up_never_lands_on_newer_data() {
    let served = Served::with(Limits { requests: 4, ..Limits::default() });
    let mut old = Raw::attach(&served, "lazy", Mode::Simple);
    // Four writes wait for their chunks, and use up the limit; the fifth stays unread.
    let half = LAZY_BYTES / 2;
    for (cookie, offset) in
        [half + 1, half + CHUNK + 1, half + 2 * CHUNK + 1, half + 3 * CHUNK + 1, 0].into_iter().enumerate()
    {
        let request = old.encode(0, cmd::WRITE, cookie as u64, offset, 512);
        old.send(&[&request[..], &[1; 512]].concat());
    }
    std::thread::sleep(Duration::from_millis(100));
    // It is gone, as far as the server can tell; its replies could still be sent, so nothing else stops it.
    old.stream.shutdown(Shutdown::Write).unwrap();
    let mut new = Raw::attach(&served, "lazy", Mode::Simple);
    assert_eq!(new.write(0, &[2; 512]).errno, 0);
    served.gate.send(true).unwrap();
    // Until the four old ones have ended, in whatever order.
    while (0..4).any(|i| new.read(half + i * CHUNK + 1, 1) != [1]) {
        std::thread::sleep(Duration::from_millis(10));
    }
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(new.read(0, 512), [2; 512]);
}
