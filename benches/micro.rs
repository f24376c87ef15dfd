//! What the code alone costs, without sockets and disks: `cargo bench --bench micro`.

#![allow(clippy::unwrap_used, missing_docs)]

use std::fmt::Write;
use std::hint::black_box;

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use nbd_server::cache::states::{ChunkState, ChunkStates, Content};
use nbd_server::manifest::format;
use nbd_server::nbd::reply::{Asked, Frames};
use nbd_server::nbd::request::{self, Attachment};
use nbd_server::nbd::wire::{self, Mode};
use nbd_server::store::keys::{ExportKeys, ExportRoot};
use nbd_server::units::{ByteRange, Geometry, SnapshotId};

const IMAGE_BYTES: u64 = 64 << 30;
const CHUNK_BYTES: u64 = 4 << 20;
const SNAPSHOT: &str = "0192f0c1d2e37abc8def001122334455";

fn main() {
    divan::main();
}

/// Reads of 4 KiB, as many as one receive brings.
fn requests(count: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for i in 0..count {
        bytes.extend(wire::REQUEST_MAGIC.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(i.to_be_bytes());
        bytes.extend((i * 4096).to_be_bytes());
        bytes.extend(4096u32.to_be_bytes());
    }
    bytes
}

#[divan::bench(args = [1, 32])]
fn parse_and_judge_requests(bencher: Bencher, count: u64) {
    let bytes = requests(count);
    let attachment = Attachment { mode: Mode::Structured, contexts: Vec::new(), size: IMAGE_BYTES, read_only: false };
    bencher.counter(ItemsCount::new(count)).bench_local(|| {
        let mut rest = &bytes[..];
        while let Ok(Some(request)) = wire::decode_request(attachment.mode, rest) {
            let _ = black_box(request::validate(&request, &attachment));
            rest = &rest[attachment.mode.request_bytes()..];
        }
    });
}

#[divan::bench(args = [512, 4096, 16384])]
fn encode_the_reply_to_a_read(bencher: Bencher, len: usize) {
    let request = wire::decode_request(Mode::Structured, &requests(1)).unwrap().unwrap();
    let asked = Asked::new(&request, Mode::Structured);
    let mut frames = Frames::default();
    bencher.counter(BytesCount::new(len)).bench_local(|| {
        frames.clear();
        // The last byte alone: the search for holes sees all of the block.
        asked.encode_read(len, false, &mut frames, |buf| buf.last_mut().map(|last| *last = 1).is_some())
    });
}

#[divan::bench(args = [4096, 1 << 20, 32 << 20])]
fn look_up_the_chunks_of_a_range(bencher: Bencher, len: u64) {
    let geometry = Geometry::new(IMAGE_BYTES, CHUNK_BYTES).unwrap();
    let states = vec![ChunkState::new(Content::Dirty); usize::try_from(geometry.chunk_count()).unwrap()];
    let states = ChunkStates::new(&states);
    let mut at = 0;
    bencher.bench_local(|| {
        at = (at + 7919 * 4096) % (IMAGE_BYTES - len);
        let range = ByteRange::new(at, len).unwrap();
        geometry.split(range).all(|(chunk, _)| states.get(chunk).takes_writes_freely())
    });
}

/// A manifest of so many chunks, each with its entry, as it is in the store.
fn manifest(chunks: u64) -> String {
    let mut text = format!(
        r#"{{"version":2,"export_id":"disk","generation":1,"image_size":{},"chunk_size":{CHUNK_BYTES},"chunk_count":{chunks},"created_at":"2024-01-01T00:00:00Z","refs":[{{"id":"b","path":"exports/disk/snapshots/{SNAPSHOT}/delta.blob"}}],"entries":["#,
        chunks * CHUNK_BYTES
    );
    for i in 0..chunks {
        let comma = if i == 0 { "" } else { "," };
        let offset = i * CHUNK_BYTES;
        write!(text, r#"{comma}{{"index":{i},"ref":"b","offset":{offset},"len":{CHUNK_BYTES},"blake3":"{i:064x}"}}"#)
            .unwrap();
    }
    text + "]}"
}

#[divan::bench(args = [256, 16384])]
fn load_a_manifest(bencher: Bencher, chunks: u64) {
    let (text, export, root) = (manifest(chunks), "disk".parse().unwrap(), ExportRoot::new("exports".parse().unwrap()));
    let snapshot: SnapshotId = SNAPSHOT.parse().unwrap();
    let keys: ExportKeys = root.export(&export);
    let key = keys.manifest(snapshot);
    bencher
        .counter(BytesCount::new(text.len()))
        .bench_local(|| format::decode(text.as_bytes(), &key, &export, None, &root).unwrap().entries().len());
}
