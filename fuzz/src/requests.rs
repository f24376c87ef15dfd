//! Transmission: any stream of requests against the real server over a socket.
//!
//! Each whole request gets exactly one reply of the right form; one that leaves the image never succeeds; on a healthy
//! disk and store nothing fails but what is wrong; and the answers are the same whether all requests come at once or one
//! waits for the other. In the latter case the content is known, and every read is compared with it.

use nbd_server::nbd::wire::{self, Mode, cflag, cmd};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;

use super::device::{Device, IMAGE_BYTES};
use super::replies::{Answer, take_answer};

const INVAL: u32 = 22;
const NOSPC: u32 = 28;
/// Longer payloads are not even thrown away.
const MAX_PAYLOAD_BYTES: u64 = 64 << 20;
/// Inputs are cut here: more requests find nothing new.
const MAX_INPUT_BYTES: usize = 8 << 10;

/// Requests with 32-bit lengths, simple replies.
pub fn requests_simple(data: &[u8]) {
    requests(Mode::Simple, data);
}

/// Requests with 32-bit lengths, structured replies.
pub fn requests_structured(data: &[u8]) {
    requests(Mode::Structured, data);
}

/// Requests with extended headers.
pub fn requests_extended(data: &[u8]) {
    requests(Mode::Extended, data);
}

/// A request that was sent whole, as the client knows it.
#[derive(Debug)]
pub struct Asked {
    pub flags: u16,
    pub kind: u16,
    pub cookie: u64,
    pub offset: u64,
    len: u64,
    payload: Vec<u8>,
    frame: Vec<u8>,
}

impl Asked {
    /// The length of the range; only of a request that lies inside the image.
    pub fn len(&self) -> usize {
        usize::try_from(self.len).unwrap()
    }

    /// The length that a BLOCK_STATUS asks about.
    pub fn status_len(&self) -> u64 {
        let in_payload = self.flags & cflag::PAYLOAD_LEN != 0;
        if in_payload { wire::Reader(&self.payload).u64().unwrap_or(0) } else { self.len }
    }

    fn is_inside(&self) -> bool {
        let len = if self.kind == cmd::BLOCK_STATUS { self.status_len() } else { self.len };
        self.kind == cmd::FLUSH || self.offset.checked_add(len).is_some_and(|end| end <= IMAGE_BYTES as u64)
    }

    fn span(&self) -> std::ops::Range<usize> {
        let start = usize::try_from(self.offset).unwrap();
        start..start + self.len()
    }
}

fn requests(mode: Mode, data: &[u8]) {
    let (asked, rest) = take_apart(mode, &data[..data.len().min(MAX_INPUT_BYTES)]);
    Device::with(|device| {
        let at_once = device.run(async { all_at_once(device.attach(mode).await, mode, &asked, &rest).await });
        let in_turn = device.run(async { one_by_one(device.attach(mode).await, mode, &asked, &rest).await });
        assert_eq!(at_once, in_turn, "the answers depend on how the requests arrive");
    });
}

/// The requests that are there whole, and what follows them. Cookies are made unique, or replies could not be told apart.
fn take_apart(mode: Mode, data: &[u8]) -> (Vec<Asked>, Vec<u8>) {
    let mut asked = Vec::new();
    let mut left = data;
    while let Ok(Some(request)) = wire::decode_request(mode, left) {
        let has_payload =
            request.kind == cmd::WRITE || (mode == Mode::Extended && request.flags & cflag::PAYLOAD_LEN != 0);
        let payload = if has_payload { request.len } else { 0 };
        let header = mode.request_bytes();
        let Ok(end) = usize::try_from(payload).map(|payload| header.saturating_add(payload)) else { break };
        if request.kind == cmd::DISC || payload > MAX_PAYLOAD_BYTES || left.len() < end {
            break;
        }
        let cookie = request.cookie & !0xffff | asked.len() as u64;
        let mut frame = left[..end].to_vec();
        frame[8..16].copy_from_slice(&cookie.to_be_bytes());
        let (flags, kind, offset, len) = (request.flags, request.kind, request.offset, request.len);
        asked.push(Asked { flags, kind, cookie, offset, len, payload: frame[header..].to_vec(), frame });
        left = &left[end..];
    }
    (asked, left.to_vec())
}

async fn all_at_once(stream: UnixStream, mode: Mode, asked: &[Asked], rest: &[u8]) -> Vec<u32> {
    let (mut reader, mut writer) = stream.into_split();
    let mut answers = vec![Answer::default(); asked.len()];
    let all: Vec<u8> = asked.iter().flat_map(|asked| &asked.frame).chain(rest).copied().collect();
    let sending = async {
        // The server may have closed: it is right to, if the rest is no request.
        let _ = writer.write_all(&all).await;
        let _ = writer.shutdown().await;
    };
    let taking = async { while take_answer(&mut reader, mode, asked, &mut answers).await.is_some() {} };
    tokio::join!(sending, taking);
    for (asked, answer) in asked.iter().zip(&answers) {
        assert!(answer.done, "{asked:?} was not answered");
    }
    answers.iter().map(|answer| answer.errno).collect()
}

async fn one_by_one(mut stream: UnixStream, mode: Mode, asked: &[Asked], rest: &[u8]) -> Vec<u32> {
    let mut image = whole_image(&mut stream, mode).await;
    let mut answers = vec![Answer::default(); asked.len()];
    for (i, request) in asked.iter().enumerate() {
        // Cut at an odd place: the server has to put the frame together.
        let (first, second) = request.frame.split_at(request.frame.len() / 3);
        stream.write_all(first).await.unwrap();
        tokio::task::yield_now().await;
        stream.write_all(second).await.unwrap();
        assert_eq!(take_answer(&mut stream, mode, asked, &mut answers).await, Some(i));
        check(request, &answers[i], &mut image);
    }
    let _ = stream.write_all(rest).await;
    let _ = stream.shutdown().await;
    assert_eq!(take_answer(&mut stream, mode, asked, &mut answers).await, None, "a reply that nobody asked for");
    answers.iter().map(|answer| answer.errno).collect()
}

async fn whole_image(stream: &mut UnixStream, mode: Mode) -> Vec<u8> {
    let magic = if mode == Mode::Extended { wire::EXTENDED_REQUEST_MAGIC } else { wire::REQUEST_MAGIC };
    let mut frame = magic.to_be_bytes().to_vec();
    frame.resize(mode.request_bytes() - 4, 0);
    frame.extend_from_slice(&u32::try_from(IMAGE_BYTES).unwrap().to_be_bytes());
    let (asked, _) = take_apart(mode, &frame);
    let mut answers = [Answer::default()];
    stream.write_all(&frame).await.unwrap();
    take_answer(stream, mode, &asked, &mut answers).await.unwrap();
    std::mem::take(&mut answers[0].data)
}

fn check(asked: &Asked, answer: &Answer, image: &mut [u8]) {
    if answer.errno != 0 {
        assert!(matches!(answer.errno, INVAL | NOSPC), "error {} on a healthy server: {asked:?}", answer.errno);
        return;
    }
    assert!(asked.is_inside(), "served although it leaves the image: {asked:?}");
    match asked.kind {
        cmd::READ => assert!(answer.data == image[asked.span()], "a read brought something else: {asked:?}"),
        cmd::WRITE => image[asked.span()].copy_from_slice(&asked.payload),
        cmd::TRIM | cmd::WRITE_ZEROES => image[asked.span()].fill(0),
        cmd::BLOCK_STATUS => check_extents(asked, answer, image),
        cmd::FLUSH | cmd::CACHE => {}
        kind => panic!("command {kind} was served"),
    }
}

/// "Must never call something zero that does not read as zeros."
fn check_extents(asked: &Asked, answer: &Answer, image: &[u8]) {
    const ALLOCATION: u32 = 1;
    const ZERO: u64 = 2;
    let start = usize::try_from(asked.offset).unwrap();
    for (_, extents) in answer.extents.iter().filter(|(id, _)| *id == ALLOCATION) {
        let mut at = start;
        for (len, status) in extents {
            let end = at + usize::try_from(*len).unwrap();
            assert!(status & ZERO == 0 || image[at..end].iter().all(|byte| *byte == 0), "data is called zero");
            at = end;
        }
    }
}
