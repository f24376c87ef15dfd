//! The protocol's numbers and frames: constants, encoders, decoders. Pure bytes; integers are big-endian.
//!
//! Promises: a decoder never panics, whatever it is given, and says "more bytes" or "not this frame" instead of
//! guessing; an encoder never makes a frame whose length field differs from what follows it.
//! Must never: know of sockets, exports or state. Which frame is allowed when is decided above.

/// `NBDMAGIC`, the first word of the server.
pub const SERVER_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, the second word of the server and the first of every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// The first word of every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// The first word of a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// The first word of a request with extended headers.
pub const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
/// The first word of a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// The first word of a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;
/// The first word of a chunk with extended headers.
pub const EXTENDED_CHUNK_MAGIC: u32 = 0x6e8a_278c;

/// Server flag: fixed newstyle. Client flag: the same, understood.
pub const FIXED_NEWSTYLE: u16 = 1 << 0;
/// Server flag: the 124 zero bytes can be left out. Client flag: leave them out.
pub const NO_ZEROES: u16 = 1 << 1;

/// The length of the header of an option, in bytes.
pub const OPTION_HEADER_BYTES: usize = 16;
/// The longest string of the protocol (name, query, message), in bytes.
pub const MAX_STRING_BYTES: usize = 4096;
/// The zeros behind the answer to EXPORT_NAME, in bytes.
pub const EXPORT_NAME_PADDING_BYTES: usize = 124;

/// Option numbers.
pub mod opt {
    /// Select an export and start; the old form, without an error reply.
    pub const EXPORT_NAME: u32 = 1;
    /// Leave.
    pub const ABORT: u32 = 2;
    /// Name the exports.
    pub const LIST: u32 = 3;
    /// Upgrade to TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and start.
    pub const GO: u32 = 7;
    /// Reply in chunks.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Name the metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Select metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Use 64-bit lengths.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Types of option replies.
pub mod rep {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export of the list.
    pub const SERVER: u32 = 2;
    /// A fact about an export.
    pub const INFO: u32 = 3;
    /// A metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// The option is not known or not to be had.
    pub const ERR_UNSUP: u32 = 0x8000_0001;
    /// The option's data is malformed, or it is not valid now.
    pub const ERR_INVALID: u32 = 0x8000_0003;
    /// The server answers this over TLS alone.
    pub const ERR_TLS_REQD: u32 = 0x8000_0005;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = 0x8000_0006;
    /// The server is stopping.
    pub const ERR_SHUTDOWN: u32 = 0x8000_0007;
    /// The option's data is too long.
    pub const ERR_TOO_BIG: u32 = 0x8000_0009;
    /// Extended headers are in force.
    pub const ERR_EXT_HEADER_REQD: u32 = 0x8000_000a;
}

/// Types of information about an export.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// The canonical name.
    pub const NAME: u16 = 1;
    /// A text for humans.
    pub const DESCRIPTION: u16 = 2;
    /// Minimum, preferred and maximum block size.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags.
pub mod tflag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes are refused.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is there.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA is there, on every command.
    pub const SEND_FUA: u16 = 1 << 3;
    /// TRIM is there.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES is there.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// DF is there; only with structured replies.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is there.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// FAST_ZERO is there.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
    /// BLOCK_STATUS takes a payload; only with extended headers.
    pub const BLOCK_STATUS_PAYLOAD: u16 = 1 << 12;
}

/// Command numbers.
pub mod cmd {
    /// Read bytes.
    pub const READ: u16 = 0;
    /// Write bytes.
    pub const WRITE: u16 = 1;
    /// Leave.
    pub const DISC: u16 = 2;
    /// Make what was written durable.
    pub const FLUSH: u16 = 3;
    /// Let go of content.
    pub const TRIM: u16 = 4;
    /// Prefetch.
    pub const CACHE: u16 = 5;
    /// Make a range read as zeros.
    pub const WRITE_ZEROES: u16 = 6;
    /// Describe a range.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flags.
pub mod cflag {
    /// Durable before the reply.
    pub const FUA: u16 = 1 << 0;
    /// Zeros shall be provisioned.
    pub const NO_HOLE: u16 = 1 << 1;
    /// One content chunk only.
    pub const DF: u16 = 1 << 2;
    /// One extent only.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Zero fast or not at all.
    pub const FAST_ZERO: u16 = 1 << 4;
    /// A payload of the header's length follows; only with extended headers.
    pub const PAYLOAD_LEN: u16 = 1 << 5;
}

/// Types of chunks.
pub mod chunk {
    /// No content.
    pub const NONE: u16 = 0;
    /// Bytes at an offset.
    pub const OFFSET_DATA: u16 = 1;
    /// Zeros at an offset.
    pub const OFFSET_HOLE: u16 = 2;
    /// Extents with 32-bit lengths.
    pub const BLOCK_STATUS: u16 = 5;
    /// Extents with 64-bit lengths.
    pub const BLOCK_STATUS_EXT: u16 = 6;
    /// An error for the whole request.
    pub const ERROR: u16 = 0x8001;
    /// Chunk flag: the last of its reply.
    pub const FLAG_DONE: u16 = 1;
}

/// How requests and replies look, as negotiated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Mode {
    /// 32-bit lengths, simple replies only.
    #[default]
    Simple,
    /// 32-bit lengths, replies in chunks where they need to be.
    Structured,
    /// 64-bit lengths, replies in chunks always.
    Extended,
}

impl Mode {
    /// The length of a request's header, in bytes.
    #[must_use]
    pub fn request_bytes(self) -> usize {
        if self == Self::Extended { 32 } else { 28 }
    }
}

/// A request as it came, unchecked but for its magic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Command flags.
    pub flags: u16,
    /// Command number.
    pub kind: u16,
    /// The client's name for the request; echoed, never interpreted.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// Length in bytes: of the range, or of the payload that follows.
    pub len: u64,
}

/// The bytes at hand are not the frame that has to stand here; there is no way back into sync.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("magic {found:#x} where {expected:#x} has to stand")]
pub struct BadMagic {
    /// What was there.
    pub found: u64,
    /// What should have been.
    pub expected: u64,
}

/// A cursor over received bytes that answers `None` once they run out.
#[derive(Debug, Clone, Copy)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// The next `len` bytes.
    pub fn bytes(&mut self, len: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(head)
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*head)
    }

    /// The next 16-bit number.
    pub fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    /// The next 32-bit number.
    pub fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    /// The next 64-bit number.
    pub fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    /// The next string: a 32-bit length and as many bytes.
    pub fn string(&mut self) -> Option<&'a [u8]> {
        let len = self.u32()?;
        self.bytes(usize::try_from(len).ok()?)
    }
}

/// Decodes the request header at the start of `bytes`; `None` if it is not all there.
///
/// # Errors
/// [`BadMagic`] as soon as the first four bytes are not those of the mode.
pub fn decode_request(mode: Mode, bytes: &[u8]) -> Result<Option<Request>, BadMagic> {
    let mut reader = Reader(bytes);
    let expected = if mode == Mode::Extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
    match reader.u32() {
        None => return Ok(None),
        Some(found) if found != expected => {
            return Err(BadMagic { found: u64::from(found), expected: u64::from(expected) });
        }
        Some(_) => {}
    }
    let mut body = || {
        Some(Request {
            flags: reader.u16()?,
            kind: reader.u16()?,
            cookie: reader.u64()?,
            offset: reader.u64()?,
            len: if mode == Mode::Extended { reader.u64()? } else { u64::from(reader.u32()?) },
        })
    };
    Ok(body())
}

/// Appends the server's greeting.
pub fn encode_greeting(out: &mut Vec<u8>) {
    out.extend_from_slice(&SERVER_MAGIC.to_be_bytes());
    out.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    out.extend_from_slice(&(FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
}

/// Appends a reply to option `option`, its data given in parts. Parts are ours and small: never 4 GiB.
pub fn encode_option_reply(out: &mut Vec<u8>, option: u32, kind: u32, parts: &[&[u8]]) {
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    let len: usize = parts.iter().map(|part| part.len()).sum();
    out.extend_from_slice(&u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes());
    for part in parts {
        out.extend_from_slice(part);
    }
}

/// The longest start of `text` that fits into `max` bytes and ends between characters.
#[must_use]
pub fn truncated(text: &str, max: usize) -> &str {
    &text[..text.floor_char_boundary(max)]
}

/// Appends a simple reply's header.
pub fn encode_simple(out: &mut Vec<u8>, error: u32, cookie: u64) {
    out.extend_from_slice(&SIMPLE_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&error.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
}

/// What a chunk's header says beside its magic.
#[derive(Debug, Clone, Copy)]
pub struct ChunkHeader {
    /// Whether it is the last of its reply.
    pub done: bool,
    /// Its type.
    pub kind: u16,
    /// The request's cookie.
    pub cookie: u64,
    /// The request's offset; only the extended form carries it.
    pub offset: u64,
    /// The length of its payload in bytes; below 4 GiB, since no reply of ours is longer.
    pub len: u32,
}

/// Appends a chunk's header in the form of the mode.
pub fn encode_chunk(out: &mut Vec<u8>, mode: Mode, header: ChunkHeader) {
    let extended = mode == Mode::Extended;
    let magic = if extended { EXTENDED_CHUNK_MAGIC } else { CHUNK_MAGIC };
    let flags = if header.done { chunk::FLAG_DONE } else { 0 };
    out.extend_from_slice(&magic.to_be_bytes());
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend_from_slice(&header.kind.to_be_bytes());
    out.extend_from_slice(&header.cookie.to_be_bytes());
    if extended {
        // "MUST be the same as the request's offset."
        out.extend_from_slice(&header.offset.to_be_bytes());
        out.extend_from_slice(&u64::from(header.len).to_be_bytes());
    } else {
        out.extend_from_slice(&header.len.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_greeting_is_the_18_bytes_of_the_protocol() {
        let mut out = Vec::new();
        encode_greeting(&mut out);
        assert_eq!(out, b"NBDMAGICIHAVEOPT\x00\x03");
    }

    #[test]
    fn a_request_is_decoded_only_once_its_last_byte_is_there() {
        for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
            let magic = if mode == Mode::Extended { EXTENDED_REQUEST_MAGIC } else { REQUEST_MAGIC };
            let mut frame = magic.to_be_bytes().to_vec();
            frame.extend_from_slice(&[0, 1, 0, 6]);
            frame.extend_from_slice(&7u64.to_be_bytes());
            frame.extend_from_slice(&(u64::MAX - 511).to_be_bytes());
            if mode == Mode::Extended {
                frame.extend_from_slice(&(1u64 << 40).to_be_bytes());
            } else {
                frame.extend_from_slice(&u32::MAX.to_be_bytes());
            }
            assert_eq!(frame.len(), mode.request_bytes());
            for short in 0..frame.len() {
                assert_eq!(decode_request(mode, &frame[..short]), Ok(None));
            }
            let len = if mode == Mode::Extended { 1 << 40 } else { u64::from(u32::MAX) };
            let expected = Request { flags: 1, kind: 6, cookie: 7, offset: u64::MAX - 511, len };
            assert_eq!(decode_request(mode, &frame), Ok(Some(expected)));
        }
    }

    #[test]
    fn the_magic_of_another_mode_is_no_request() {
        assert!(decode_request(Mode::Extended, &REQUEST_MAGIC.to_be_bytes()).is_err());
        assert!(decode_request(Mode::Simple, &EXTENDED_REQUEST_MAGIC.to_be_bytes()).is_err());
        assert!(decode_request(Mode::Structured, &EXTENDED_REQUEST_MAGIC.to_be_bytes()).is_err());
    }

    #[test]
    fn a_string_whose_length_overruns_the_data_is_none() {
        assert_eq!(Reader(&[0xff, 0xff, 0xff, 0xff, b'a']).string(), None);
        assert_eq!(Reader(&[0, 0, 0, 2, b'a']).string(), None);
        assert_eq!(Reader(&[0, 0, 0, 1, b'a']).string(), Some(&b"a"[..]));
    }

    #[test]
    fn a_text_is_cut_between_characters() {
        assert_eq!(truncated("aé", 2), "a");
        assert_eq!(truncated("aé", 3), "aé");
    }

    #[test]
    fn the_extended_chunk_header_carries_the_offset_and_a_64_bit_length() {
        let header = ChunkHeader { done: true, kind: chunk::NONE, cookie: 1, offset: 2, len: 3 };
        let (mut compact, mut extended) = (Vec::new(), Vec::new());
        encode_chunk(&mut compact, Mode::Structured, header);
        encode_chunk(&mut extended, Mode::Extended, header);
        assert_eq!(compact, [0x66, 0x8e, 0x33, 0xef, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 3]);
        assert_eq!(extended.len(), 32);
        assert_eq!(extended[16..], [0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3]);
    }
}
