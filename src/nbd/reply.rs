//! Outcome → reply frames, in the form the mode demands. Pure.
//!
//! Promises: one request, one reply: a simple one, or chunks of which the last alone says DONE; READ gets chunks as soon
//! as structured replies are negotiated, "even for an early EINVAL", and with extended headers everything does; the
//! data and hole chunks of a READ cover its range exactly once.
//! Must never: call something a hole that was not read as zeros; copy the data of a long READ.

use std::borrow::Cow;
use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;

use super::errno::Errno;
use super::pool::{Lease, Pool};
use super::request::Refusal;
use super::wire::{self, ChunkHeader, Mode, Request, chunk, cmd};

/// Holes are looked for in aligned blocks of this size, in bytes. It is the page and the block of the file systems
/// above, so their holes begin and end there; and a 4 KiB hole already costs less to find (a block with data gives itself
/// away in its first words) than its zeros would cost to send.
const HOLE_BLOCK_BYTES: usize = 4096;
/// A longer stretch of data goes out in several chunks of this size, in bytes, so that a client can use the first while
/// the rest is on its way.
const MAX_DATA_CHUNK_BYTES: usize = 2 << 20;
/// How much of an error's text is sent, in bytes; the protocol allows 4096.
const MAX_TEXT_BYTES: usize = 1024;

/// The extents of one metadata context: its id, and (length, status) pairs.
pub type ContextExtents = (u32, Vec<(u64, u32)>);

/// What became of a request.
#[derive(Debug)]
pub enum Outcome {
    /// Done; there is nothing to send but that.
    Done,
    /// What was read; `whole`: in one content chunk.
    Data {
        /// The bytes, as long as the request asked for.
        bytes: Bytes,
        /// DF.
        whole: bool,
    },
    /// The extents of each context asked for, in order; at least one context with at least one extent.
    Status(Vec<ContextExtents>),
    /// It was not done.
    Failed {
        /// The number for the client.
        errno: Errno,
        /// The text for a human.
        text: Cow<'static, str>,
    },
}

impl From<Refusal> for Outcome {
    fn from(refusal: Refusal) -> Self {
        Self::Failed { errno: refusal.errno, text: refusal.text }
    }
}

/// How many stretches of bytes, and bytes of a head, memory is kept for while there are none.
const KEPT_SEGMENTS: usize = 64;
const KEPT_HEAD_BYTES: usize = 1024;

/// Frames ready to be sent: small parts are gathered in one buffer, the data of READs is only referred to.
#[derive(Debug)]
pub struct Frames {
    heads: Lease,
    /// Where a head is encoded first.
    scratch: Vec<u8>,
    segments: Vec<Segment>,
    /// The length of what is only referred to.
    body_bytes: usize,
}

#[derive(Debug)]
enum Segment {
    Head(Range<usize>),
    Body(Bytes),
}

/// With memory of their own, for who has no server.
impl Default for Frames {
    fn default() -> Self {
        Self::new(&Arc::default())
    }
}

impl Frames {
    pub(super) fn new(pool: &Arc<Pool>) -> Self {
        Self { heads: pool.nothing(), scratch: Vec::new(), segments: Vec::new(), body_bytes: 0 }
    }

    /// Forgets everything, and keeps memory for the next few.
    pub fn clear(&mut self) {
        self.heads.give_back();
        self.scratch.clear();
        self.scratch.shrink_to(KEPT_HEAD_BYTES);
        self.segments.clear();
        self.segments.shrink_to(KEPT_SEGMENTS);
        self.body_bytes = 0;
    }

    /// The stretches of bytes to send, in order; none is empty.
    pub fn slices(&self) -> impl Iterator<Item = &[u8]> + Clone {
        self.segments.iter().map(|segment| match segment {
            Segment::Head(range) => &self.heads[range.clone()],
            Segment::Body(bytes) => bytes,
        })
    }

    /// Whether there is nothing to send.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// How many bytes there are to send.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.heads.len() + self.body_bytes
    }

    /// Appends what another has gathered.
    pub fn append(&mut self, other: Self) {
        if self.is_empty() {
            *self = other;
            return;
        }
        let base = self.heads.len();
        self.heads.append(&other.heads);
        self.segments.extend(other.segments.into_iter().map(|segment| match segment {
            Segment::Head(range) => Segment::Head(base + range.start..base + range.end),
            body @ Segment::Body(_) => body,
        }));
        self.body_bytes += other.body_bytes;
    }

    /// All there is to send, if no data of a READ is among it.
    #[must_use]
    pub fn only_head(&self) -> &[u8] {
        if self.body_bytes == 0 { &self.heads } else { &[] }
    }

    /// Forgets the first `len` bytes of [`only_head`](Self::only_head).
    pub fn drop_front(&mut self, len: usize) {
        if len > 0 {
            self.heads.drop_front(len);
            self.segments.clear();
            self.head_from(0);
        }
    }

    fn head(&mut self, encode: impl FnOnce(&mut Vec<u8>)) {
        let start = self.heads.len();
        self.scratch.clear();
        encode(&mut self.scratch);
        self.heads.append(&self.scratch);
        self.head_from(start);
    }

    /// What the heads hold from `start` on is to be sent next.
    fn head_from(&mut self, start: usize) {
        let end = self.heads.len();
        match self.segments.last_mut() {
            _ if start == end => {}
            Some(Segment::Head(range)) => range.end = end,
            _ => self.segments.push(Segment::Head(start..end)),
        }
    }

    fn body(&mut self, bytes: Bytes) {
        if !bytes.is_empty() {
            self.body_bytes += bytes.len();
            self.segments.push(Segment::Body(bytes));
        }
    }

    fn chunk(&mut self, to: &Asked, kind: u16, done: bool, payload: &[&[u8]], follows: usize) {
        let len: usize = payload.iter().map(|part| part.len()).sum::<usize>() + follows;
        // Data chunks are cut, DF reads bounded and extents counted far below 4 GiB.
        let len = u32::try_from(len).unwrap_or(u32::MAX);
        let header = ChunkHeader { done, kind, cookie: to.cookie, offset: to.offset, len };
        self.head(|out| {
            wire::encode_chunk(out, to.mode, header);
            payload.iter().for_each(|part| out.extend_from_slice(part));
        });
    }
}

/// What of a request its reply depends on.
#[derive(Debug, Clone, Copy)]
pub struct Asked {
    mode: Mode,
    is_read: bool,
    cookie: u64,
    offset: u64,
}

impl Asked {
    /// What the reply to this request depends on.
    #[must_use]
    pub fn new(request: &Request, mode: Mode) -> Self {
        Self { mode, is_read: request.kind == cmd::READ, cookie: request.cookie, offset: request.offset }
    }

    /// Appends the reply.
    pub fn encode(&self, outcome: Outcome, frames: &mut Frames) {
        match outcome {
            Outcome::Failed { errno, text } => self.encode_error(errno, &text, frames),
            Outcome::Data { bytes, .. } if self.mode == Mode::Simple => {
                frames.head(|out| wire::encode_simple(out, 0, self.cookie));
                frames.body(bytes);
            }
            Outcome::Data { bytes, whole } if !bytes.is_empty() => self.encode_data(&bytes, whole, frames),
            Outcome::Status(contexts) => self.encode_status(&contexts, frames),
            // "With SR, READ never gets a simple reply; with EXT nothing does." Everything else may, and it is shorter.
            Outcome::Done | Outcome::Data { .. } if self.in_chunks() => frames.chunk(self, chunk::NONE, true, &[], 0),
            Outcome::Done | Outcome::Data { .. } => frames.head(|out| wire::encode_simple(out, 0, self.cookie)),
        }
    }

    /// Appends the reply to a READ of `len` bytes, not 0, that `read` puts where they are sent from; `whole`: in one
    /// content chunk. If it says `false`, nothing is appended. For short reads: holes in them cost a copy.
    pub fn encode_read(
        &self,
        len: usize,
        whole: bool,
        frames: &mut Frames,
        read: impl FnOnce(&mut [u8]) -> bool,
    ) -> bool {
        let Frames { heads, scratch, .. } = frames;
        let start = heads.len();
        scratch.clear();
        if self.in_chunks() {
            let follows = u32::try_from(len).unwrap_or(u32::MAX);
            let header = ChunkHeader {
                done: true,
                kind: chunk::OFFSET_DATA,
                cookie: self.cookie,
                offset: self.offset,
                len: 8 + follows,
            };
            wire::encode_chunk(scratch, self.mode, header);
            scratch.extend_from_slice(&self.offset.to_be_bytes());
        } else {
            wire::encode_simple(scratch, 0, self.cookie);
        }
        heads.append(scratch);
        let data = heads.add(len);
        if !read(data) {
            heads.truncate(start);
            return false;
        }
        if self.in_chunks() && blocks(self.offset, data).any(|block| block.hole) {
            let bytes = Bytes::copy_from_slice(data);
            heads.truncate(start);
            self.encode_data(&bytes, whole, frames);
        } else {
            frames.head_from(start);
        }
        true
    }

    fn in_chunks(&self) -> bool {
        self.mode == Mode::Extended || (self.mode == Mode::Structured && self.is_read)
    }

    fn encode_error(&self, errno: Errno, text: &str, frames: &mut Frames) {
        if self.mode == Mode::Simple {
            return frames.head(|out| wire::encode_simple(out, errno as u32, self.cookie));
        }
        let text = wire::truncated(text, MAX_TEXT_BYTES);
        let len = u16::try_from(text.len()).unwrap_or(0);
        let number = (errno as u32).to_be_bytes();
        frames.chunk(self, chunk::ERROR, true, &[&number, &len.to_be_bytes(), text.as_bytes()], 0);
    }

    /// "Chunks MUST cover the range exactly once; DONE on data only if no error remains possible": all was read already.
    fn encode_data(&self, bytes: &Bytes, whole: bool, frames: &mut Frames) {
        // Holes are found in the very bytes that were read. Asking for extents would be a second look at an image that
        // others write to meanwhile, and could call new data a hole.
        let pieces = if whole { vec![whole_piece(bytes)] } else { pieces(self.offset, bytes) };
        let last = pieces.len() - 1;
        for (i, piece) in pieces.into_iter().enumerate() {
            let done = i == last;
            let offset = (self.offset + piece.at.start as u64).to_be_bytes();
            if piece.hole {
                let len = u32::try_from(piece.at.len()).unwrap_or(u32::MAX).to_be_bytes();
                frames.chunk(self, chunk::OFFSET_HOLE, done, &[&offset, &len], 0);
            } else {
                frames.chunk(self, chunk::OFFSET_DATA, done, &[&offset], piece.at.len());
                frames.body(bytes.slice(piece.at));
            }
        }
    }

    /// "One chunk per context."
    fn encode_status(&self, contexts: &[ContextExtents], frames: &mut Frames) {
        let extended = self.mode == Mode::Extended;
        let kind = if extended { chunk::BLOCK_STATUS_EXT } else { chunk::BLOCK_STATUS };
        let mut payload = Vec::new();
        for (i, (id, extents)) in contexts.iter().enumerate() {
            payload.clear();
            payload.extend_from_slice(&id.to_be_bytes());
            if extended {
                payload.extend_from_slice(&u32::try_from(extents.len()).unwrap_or(u32::MAX).to_be_bytes());
            }
            for &(len, status) in extents {
                if extended {
                    payload.extend_from_slice(&len.to_be_bytes());
                    // "Zero upper bits": a client may take the 64-bit flags apart.
                    payload.extend_from_slice(&u64::from(status).to_be_bytes());
                } else {
                    // Lengths are within the request's, which has 32 bits in this form.
                    payload.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
                    payload.extend_from_slice(&status.to_be_bytes());
                }
            }
            frames.chunk(self, kind, i + 1 == contexts.len(), &[&payload], 0);
        }
    }
}

/// A stretch of what was read.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Piece {
    at: Range<usize>,
    hole: bool,
}

fn whole_piece(bytes: &[u8]) -> Piece {
    Piece { at: 0..bytes.len(), hole: bytes.len() >= HOLE_BLOCK_BYTES && is_zero(bytes) }
}

/// Cuts what was read at `offset` into data and holes. Holes are whole blocks, aligned in the image.
fn pieces(offset: u64, bytes: &[u8]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::with_capacity(1);
    for block in blocks(offset, bytes) {
        match pieces.last_mut() {
            Some(last)
                if last.hole == block.hole && (block.hole || block.at.end - last.at.start <= MAX_DATA_CHUNK_BYTES) =>
            {
                last.at.end = block.at.end;
            }
            _ => pieces.push(block),
        }
    }
    pieces
}

/// What was read at `offset`, block by block.
fn blocks(offset: u64, bytes: &[u8]) -> impl Iterator<Item = Piece> {
    let misaligned = usize::try_from(offset % HOLE_BLOCK_BYTES as u64).unwrap_or(0);
    let mut start = 0;
    std::iter::from_fn(move || {
        let block = HOLE_BLOCK_BYTES - (start + misaligned) % HOLE_BLOCK_BYTES;
        let at = start..bytes.len().min(start + block);
        start = at.end;
        let hole = at.len() == HOLE_BLOCK_BYTES && is_zero(&bytes[at.clone()]);
        (!at.is_empty()).then_some(Piece { at, hole })
    })
}

fn is_zero(bytes: &[u8]) -> bool {
    // Wide steps that end at the first byte that is not zero.
    bytes.chunks(64).all(|step| step.iter().fold(0, |seen, byte| seen | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded(kind: u16, mode: Mode, outcome: Outcome) -> Vec<u8> {
        let request = Request { flags: 0, kind, cookie: 0x0102, offset: 4096, len: 0 };
        let mut frames = Frames::default();
        Asked::new(&request, mode).encode(outcome, &mut frames);
        frames.slices().flatten().copied().collect()
    }

    fn data(bytes: Vec<u8>, whole: bool) -> Outcome {
        Outcome::Data { bytes: bytes.into(), whole }
    }

    #[test]
    fn holes_and_data_cover_what_was_read_exactly_once() {
        let mut image = vec![0u8; 10 * 4096];
        image[4096 * 3 + 5] = 1;
        image[4096 * 7..4096 * 9].fill(2);
        for start in [0usize, 1, 511, 512, 4095, 4096, 9000] {
            for end in [start + 1, start + 512, 5 * 4096, 10 * 4096 - 1, 10 * 4096] {
                let bytes = &image[start..end];
                let mut at = 0;
                let mut last_hole = None;
                for piece in pieces(start as u64, bytes) {
                    assert_eq!(piece.at.start, at);
                    assert!(!piece.at.is_empty());
                    assert_ne!(last_hole, Some(piece.hole), "neighbours are merged");
                    assert!(!piece.hole || is_zero(&bytes[piece.at.clone()]));
                    (at, last_hole) = (piece.at.end, Some(piece.hole));
                }
                assert_eq!(at, bytes.len());
            }
        }
        assert_eq!(pieces(0, &image).iter().filter(|piece| piece.hole).count(), 3);
        assert_eq!(pieces(0, &image)[0], Piece { at: 0..3 * 4096, hole: true });
    }

    #[test]
    fn long_data_goes_out_in_several_chunks_and_with_df_in_one() {
        let bytes = vec![1u8; 5 << 20];
        assert_eq!(pieces(0, &bytes).len(), 3);
        assert_eq!(whole_piece(&bytes), Piece { at: 0..5 << 20, hole: false });
        let out = encoded(cmd::READ, Mode::Structured, data(bytes, true));
        assert_eq!(out.len(), 20 + 8 + (5 << 20));
        assert_eq!(out[4..8], [0, 1, 0, 1], "DONE, OFFSET_DATA");
    }

    #[test]
    fn read_errors_are_chunks_as_soon_as_structured_replies_are_negotiated() {
        let failed = || Outcome::Failed { errno: Errno::Inval, text: "no".into() };
        assert_eq!(encoded(cmd::READ, Mode::Simple, failed())[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 22]);
        for mode in [Mode::Structured, Mode::Extended] {
            for kind in [cmd::READ, cmd::WRITE, 99] {
                let out = encoded(kind, mode, failed());
                assert_ne!(out[..4], [0x67, 0x44, 0x66, 0x98]);
                assert_eq!(out[4..8], [0, 1, 0x80, 1], "DONE, ERROR");
                assert_eq!(out[out.len() - 8..], [0, 0, 0, 22, 0, 2, b'n', b'o']);
            }
        }
    }

    #[test]
    fn success_without_content_is_simple_but_in_extended_mode() {
        assert_eq!(encoded(cmd::WRITE, Mode::Structured, Outcome::Done).len(), 16);
        let out = encoded(cmd::WRITE, Mode::Extended, Outcome::Done);
        assert_eq!((out.len(), &out[4..8]), (32, &[0, 1, 0, 0][..]));
    }

    #[test]
    fn an_empty_read_is_a_none_chunk() {
        let out = encoded(cmd::READ, Mode::Structured, data(Vec::new(), false));
        assert_eq!((out.len(), &out[4..8]), (20, &[0, 1, 0, 0][..]));
    }

    #[test]
    fn block_status_sends_one_chunk_per_context_and_done_on_the_last() {
        let status = || Outcome::Status(vec![(1, vec![(512, 3)]), (2, vec![(512, 6)])]);
        let out = encoded(cmd::BLOCK_STATUS, Mode::Structured, status());
        assert_eq!(out.len(), 2 * (20 + 4 + 8));
        assert_eq!((&out[4..8], &out[36..40]), (&[0, 0, 0, 5][..], &[0, 1, 0, 5][..]));
        let out = encoded(cmd::BLOCK_STATUS, Mode::Extended, status());
        assert_eq!(out.len(), 2 * (32 + 8 + 16));
        assert_eq!((&out[4..8], &out[60..64]), (&[0, 0, 0, 6][..], &[0, 1, 0, 6][..]));
        assert_eq!(out[32..56], [0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 0, 3]);
    }

    #[test]
    fn an_error_text_is_cut_to_its_bound() {
        let text = "é".repeat(4096).into();
        let out = encoded(cmd::READ, Mode::Structured, Outcome::Failed { errno: Errno::Io, text });
        assert_eq!(out.len(), 20 + 6 + MAX_TEXT_BYTES);
    }
}
