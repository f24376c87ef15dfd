//! Replies as a strict client takes them: every rule about their form is asserted.

use std::io;

use nbd_server::nbd::context::Context;
use nbd_server::nbd::wire::{self, Mode, cflag, chunk, cmd};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::requests::Asked;

/// The most bytes of an error's text that the protocol allows.
const MAX_TEXT_BYTES: usize = 4096;

/// What came back for one request.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Answer {
    pub errno: u32,
    pub data: Vec<u8>,
    /// Each context's (length, status) pairs.
    pub extents: Vec<(u32, Vec<(u64, u64)>)>,
    covered: usize,
    pub done: bool,
}

/// Takes frames until one ends a reply; answers which request it belongs to, or `None` at the end of the stream.
pub async fn take_answer<R: AsyncRead + Unpin>(
    stream: &mut R,
    mode: Mode,
    asked: &[Asked],
    answers: &mut [Answer],
) -> Option<usize> {
    loop {
        let mut magic = [0; 4];
        match stream.read_exact(&mut magic).await {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return None,
            result => result.map(drop).unwrap(),
        }
        let magic = u32::from_be_bytes(magic);
        let (at, done) = if magic == wire::SIMPLE_REPLY_MAGIC {
            simple(stream, mode, asked, answers).await
        } else {
            one_chunk(stream, magic, mode, asked, answers).await
        };
        if done {
            check_whole(&asked[at], mode, &answers[at]);
            return Some(at);
        }
    }
}

fn find(asked: &[Asked], answers: &[Answer], cookie: u64) -> usize {
    let at = asked.iter().position(|asked| asked.cookie == cookie).expect("a reply to a request that was sent whole");
    assert!(!answers[at].done, "a second reply to one request");
    at
}

async fn bytes<R: AsyncRead + Unpin>(stream: &mut R, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    stream.read_exact(&mut bytes).await.expect("a frame is sent whole");
    bytes
}

async fn simple<R: AsyncRead + Unpin>(
    stream: &mut R,
    mode: Mode,
    asked: &[Asked],
    answers: &mut [Answer],
) -> (usize, bool) {
    let head = bytes(stream, 12).await;
    let mut reader = wire::Reader(&head);
    let (errno, cookie) = (reader.u32().unwrap(), reader.u64().unwrap());
    let at = find(asked, answers, cookie);
    let is_read = asked[at].kind == cmd::READ;
    assert!(mode == Mode::Simple || (mode == Mode::Structured && !is_read), "a simple reply where chunks are due");
    let len = if is_read && errno == 0 { asked[at].len() } else { 0 };
    answers[at] = Answer { errno, data: bytes(stream, len).await, covered: len, done: true, ..Answer::default() };
    (at, true)
}

async fn one_chunk<R: AsyncRead + Unpin>(
    stream: &mut R,
    magic: u32,
    mode: Mode,
    asked: &[Asked],
    answers: &mut [Answer],
) -> (usize, bool) {
    let extended = mode == Mode::Extended;
    assert_ne!(mode, Mode::Simple, "no chunks unless they were negotiated");
    assert_eq!(magic, if extended { wire::EXTENDED_CHUNK_MAGIC } else { wire::CHUNK_MAGIC });
    let head = bytes(stream, if extended { 28 } else { 16 }).await;
    let mut reader = wire::Reader(&head);
    let (flags, kind, cookie) = (reader.u16().unwrap(), reader.u16().unwrap(), reader.u64().unwrap());
    let at = find(asked, answers, cookie);
    let (asked, answer) = (&asked[at], &mut answers[at]);
    let len = if extended {
        assert_eq!(reader.u64(), Some(asked.offset), "the offset MUST be the request's");
        reader.u64().unwrap()
    } else {
        u64::from(reader.u32().unwrap())
    };
    assert!(flags & !chunk::FLAG_DONE == 0);
    answer.done = flags & chunk::FLAG_DONE != 0;
    let payload = bytes(stream, usize::try_from(len).unwrap()).await;
    let mut body = wire::Reader(&payload);
    match kind {
        chunk::NONE => assert!(payload.is_empty() && answer.done),
        chunk::OFFSET_DATA | chunk::OFFSET_HOLE => {
            assert_eq!(asked.kind, cmd::READ);
            let offset = body.u64().unwrap();
            let hole = kind == chunk::OFFSET_HOLE;
            let len = if hole { body.u32().unwrap() as usize } else { body.0.len() };
            assert!(len > 0);
            let start = usize::try_from(offset.checked_sub(asked.offset).unwrap()).unwrap();
            // Any order is allowed; ours is ascending, which makes "exactly once" simple to see.
            assert_eq!(start, answer.covered, "a gap or an overlap");
            answer.covered += len;
            answer.data.extend_from_slice(if hole { &[] } else { body.0 });
            answer.data.resize(answer.covered, 0);
        }
        chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT => {
            assert_eq!((asked.kind, kind == chunk::BLOCK_STATUS_EXT), (cmd::BLOCK_STATUS, extended));
            let id = body.u32().unwrap();
            let count = if extended { body.u32() } else { None };
            let mut extents = Vec::new();
            while !body.0.is_empty() {
                let wide =
                    |reader: &mut wire::Reader<'_>| if extended { reader.u64() } else { reader.u32().map(u64::from) };
                extents.push((wide(&mut body).unwrap(), wide(&mut body).unwrap()));
            }
            assert!(count.is_none_or(|count| count as usize == extents.len()));
            answer.extents.push((id, extents));
        }
        chunk::ERROR => {
            answer.errno = body.u32().unwrap();
            let len = usize::from(body.u16().unwrap());
            assert!(answer.errno != 0 && len == body.0.len() && len <= MAX_TEXT_BYTES);
            std::str::from_utf8(body.0).expect("an error's text is UTF-8");
        }
        _ => panic!("chunk type {kind:#x}"),
    }
    (at, answer.done)
}

fn check_whole(asked: &Asked, mode: Mode, answer: &Answer) {
    if answer.errno != 0 {
        return;
    }
    if asked.kind == cmd::READ {
        assert_eq!(answer.covered, asked.len(), "a read that covers another length");
        assert_eq!(answer.data.len(), asked.len());
    }
    if asked.kind == cmd::BLOCK_STATUS {
        assert!(mode != Mode::Simple && !answer.extents.is_empty());
        let known = |id: u32| Context::ALL.iter().any(|context| context.id() == id);
        for (i, (id, extents)) in answer.extents.iter().enumerate() {
            assert!(known(*id) && answer.extents[..i].iter().all(|(other, _)| other != id));
            assert!(!extents.is_empty() && extents.iter().all(|(len, _)| *len > 0));
            let described: u64 = extents.iter().map(|(len, _)| len).sum();
            assert!(described <= asked.status_len());
            assert!(asked.flags & cflag::REQ_ONE == 0 || extents.len() == 1);
        }
    }
}
