//! Request → command: untrusted input is judged here, once; the code behind it relies on the verdict. Pure.
//!
//! Promises: a [`Command`] lies inside the image, carries only flags that apply, and is allowed on the export; a refusal
//! has the protocol's error number and a text that names the value. [`payload`] says how many bytes follow a header
//! whatever becomes of the request, so the stream stays in sync.
//! Must never: overflow; offset 2^64 − 512 is just another number.

use std::borrow::Cow;

use super::context::Context;
use super::errno::Errno;
use super::limits::MAX_PAYLOAD_BYTES;
use super::wire::{Mode, Reader, Request, cflag, cmd};
use crate::units::ByteRange;

/// What the requests of one connection are judged by.
#[derive(Debug, Clone)]
pub struct Attachment {
    /// How requests and replies look.
    pub mode: Mode,
    /// The metadata contexts selected.
    pub contexts: Vec<Context>,
    /// The size of the image in bytes.
    pub size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// Why a request is refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// The number for the client.
    pub errno: Errno,
    /// The text for a human.
    pub text: Cow<'static, str>,
}

impl Refusal {
    /// A refusal with EINVAL.
    #[must_use]
    pub fn invalid(text: impl Into<Cow<'static, str>>) -> Self {
        Self { errno: Errno::Inval, text: text.into() }
    }
}

/// A request that was found good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Read a range of at most [`MAX_PAYLOAD_BYTES`]; `whole`: in one content chunk.
    Read {
        /// What to read.
        range: ByteRange,
        /// DF: do not cut the reply.
        whole: bool,
    },
    /// Write the payload that follows, of at most [`MAX_PAYLOAD_BYTES`].
    Write {
        /// Where to.
        range: ByteRange,
    },
    /// Make durable what was replied to.
    Flush,
    /// Let go of a range.
    Trim {
        /// What to let go of.
        range: ByteRange,
    },
    /// Prefetch a range.
    Cache {
        /// What to prefetch.
        range: ByteRange,
    },
    /// Make a range read as zeros.
    WriteZeroes {
        /// What to zero.
        range: ByteRange,
        /// FAST_ZERO: refuse rather than be slow.
        fast: bool,
    },
    /// Describe a range; `one`: with a single extent.
    BlockStatus {
        /// What to describe.
        range: ByteRange,
        /// REQ_ONE.
        one: bool,
    },
    /// Describe a range; the payload that follows says how long it is and which contexts are asked.
    BlockStatusPayload {
        /// Its first byte.
        offset: u64,
        /// REQ_ONE.
        one: bool,
    },
    /// Finish what is outstanding and close.
    Disconnect,
}

/// How many bytes follow the header.
#[must_use]
pub fn payload(request: &Request, mode: Mode) -> u64 {
    // "With extended headers PAYLOAD_LEN MUST be set on a WRITE": a client that leaves it out has still sent the payload.
    let follows = request.kind == cmd::WRITE || (mode == Mode::Extended && request.flags & cflag::PAYLOAD_LEN != 0);
    if follows { request.len } else { 0 }
}

/// Judges a request.
///
/// # Errors
/// [`Refusal`], whose payload (if any) has still to be read.
pub fn validate(request: &Request, to: &Attachment) -> Result<Command, Refusal> {
    if request.kind == cmd::DISC {
        // "No reply": so there is none to refuse it with either.
        return Ok(Command::Disconnect);
    }
    let applicable = applicable_flags(request.kind, to.mode)
        .ok_or_else(|| Refusal::invalid(format!("command {} is not known here", request.kind)))?;
    // "Unknown or inapplicable flags: SHOULD reply EINVAL."
    if request.flags & !applicable != 0 {
        let bad = request.flags & !applicable;
        return Err(Refusal::invalid(format!("flags {bad:#x} do not apply to command {}", request.kind)));
    }
    // "With extended headers PAYLOAD_LEN MUST be set on a WRITE." qemu's client leaves it out, and can mean nothing else.
    let has_payload_flag = request.flags & cflag::PAYLOAD_LEN != 0;
    let writes = matches!(request.kind, cmd::WRITE | cmd::WRITE_ZEROES | cmd::TRIM);
    if writes && to.read_only {
        return Err(Refusal { errno: Errno::Perm, text: "the export is read-only".into() });
    }
    if request.kind == cmd::FLUSH {
        // Offset and length "are reserved and MUST be 0"; a client that sends others means the same.
        return Ok(Command::Flush);
    }
    if request.kind == cmd::BLOCK_STATUS && to.contexts.is_empty() {
        return Err(Refusal::invalid("BLOCK_STATUS needs a metadata context: select one with SET_META_CONTEXT"));
    }
    let one = request.flags & cflag::REQ_ONE != 0;
    if request.kind == cmd::BLOCK_STATUS && has_payload_flag {
        return Ok(Command::BlockStatusPayload { offset: request.offset, one });
    }
    let range = inside(request.kind, request.offset, request.len, to.size)?;
    match request.kind {
        cmd::READ => {
            payload_fits(request.len)?;
            Ok(Command::Read { range, whole: request.flags & cflag::DF != 0 })
        }
        cmd::WRITE => {
            payload_fits(request.len)?;
            Ok(Command::Write { range })
        }
        cmd::TRIM => Ok(Command::Trim { range }),
        cmd::CACHE => Ok(Command::Cache { range }),
        // NO_HOLE asks for provisioned zeros. The MUST is that they read as zeros; where the space comes from is a hint,
        // and zeros are never stored here, so it changes nothing.
        cmd::WRITE_ZEROES => Ok(Command::WriteZeroes { range, fast: request.flags & cflag::FAST_ZERO != 0 }),
        cmd::BLOCK_STATUS => block_status(range, one),
        _ => Err(Refusal::invalid("command not known here")),
    }
}

/// Reads the payload of a BLOCK_STATUS: "u64 effect length, n × u32 ids"; answers the command and its contexts.
///
/// # Errors
/// [`Refusal`] for a payload of another shape, an unknown or repeated id, or a range outside the image.
pub fn block_status_payload(
    offset: u64,
    one: bool,
    payload: &[u8],
    to: &Attachment,
) -> Result<(Command, Vec<Context>), Refusal> {
    let mut reader = Reader(payload);
    let Some(len) = reader.u64().filter(|_| payload.len().is_multiple_of(4) && payload.len() > 8) else {
        return Err(Refusal::invalid("a BLOCK_STATUS payload is a u64 length and one or more u32 context ids"));
    };
    let mut contexts = Vec::new();
    while let Some(id) = reader.u32() {
        match to.contexts.iter().find(|context| context.id() == id) {
            Some(context) if !contexts.contains(context) => contexts.push(*context),
            Some(_) => return Err(Refusal::invalid(format!("context id {id} is there twice"))),
            None => return Err(Refusal::invalid(format!("context id {id} was not selected with SET_META_CONTEXT"))),
        }
    }
    let command = block_status(inside(cmd::BLOCK_STATUS, offset, len, to.size)?, one)?;
    Ok((command, contexts))
}

/// The longest BLOCK_STATUS payload that can be good, in bytes: every context once.
pub const MAX_BLOCK_STATUS_PAYLOAD_BYTES: u64 = 8 + 4 * Context::ALL.len() as u64;

fn block_status(range: ByteRange, one: bool) -> Result<Command, Refusal> {
    // A reply needs at least one extent, and an extent at least one byte.
    if range.is_empty() {
        return Err(Refusal::invalid("BLOCK_STATUS of no bytes: ask for at least one"));
    }
    Ok(Command::BlockStatus { range, one })
}

fn applicable_flags(kind: u16, mode: Mode) -> Option<u16> {
    let payload = if mode == Mode::Extended { cflag::PAYLOAD_LEN } else { 0 };
    let df = if mode >= Mode::Structured { cflag::DF } else { 0 };
    // "FUA MUST be accepted on every command if it is advertised."
    Some(
        cflag::FUA
            | match kind {
                cmd::READ => df,
                cmd::WRITE => payload,
                cmd::FLUSH | cmd::TRIM | cmd::CACHE => 0,
                cmd::WRITE_ZEROES => cflag::NO_HOLE | cflag::FAST_ZERO,
                cmd::BLOCK_STATUS => cflag::REQ_ONE | payload,
                // RESIZE (8) is not on offer and as unknown as the rest.
                _ => return None,
            },
    )
}

fn inside(kind: u16, offset: u64, len: u64, size: u64) -> Result<ByteRange, Refusal> {
    if let Some(range) = ByteRange::new(offset, len).filter(|range| range.end() <= size) {
        return Ok(range);
    }
    // "Past the end: WRITE and WRITE_ZEROES ENOSPC, others EINVAL."
    let errno = if matches!(kind, cmd::WRITE | cmd::WRITE_ZEROES) { Errno::NoSpc } else { Errno::Inval };
    let text = format!("{len} bytes from {offset} leave the export of {size} bytes");
    Err(Refusal { errno, text: text.into() })
}

fn payload_fits(len: u64) -> Result<(), Refusal> {
    if len <= u64::from(MAX_PAYLOAD_BYTES) {
        return Ok(());
    }
    Err(Refusal::invalid(format!("{len} bytes in one request: send at most {MAX_PAYLOAD_BYTES}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: u64 = 1 << 30;

    fn to(mode: Mode) -> Attachment {
        Attachment { mode, contexts: vec![Context::Allocation], size: SIZE, read_only: false }
    }

    fn request(kind: u16, flags: u16, offset: u64, len: u64) -> Request {
        Request { flags, kind, cookie: 1, offset, len }
    }

    fn errno(verdict: Result<Command, Refusal>) -> u32 {
        verdict.map_or_else(|refusal| refusal.errno as u32, |_| 0)
    }

    #[test]
    fn past_the_end_is_enospc_for_writes_and_einval_for_the_rest() {
        for (kind, expected) in [(0, 22), (1, 28), (4, 22), (5, 22), (6, 28), (7, 22)] {
            for offset in [SIZE, SIZE - 511, u64::MAX - 511, u64::MAX] {
                assert_eq!(errno(validate(&request(kind, 0, offset, 512), &to(Mode::Structured))), expected, "{kind}");
            }
            assert_eq!(errno(validate(&request(kind, 0, SIZE - 512, 512), &to(Mode::Structured))), 0, "{kind}");
        }
    }

    #[test]
    fn fua_is_accepted_on_every_command() {
        for kind in [0, 1, 3, 4, 5, 6, 7] {
            assert_eq!(errno(validate(&request(kind, 1, 0, 512), &to(Mode::Structured))), 0, "{kind}");
        }
    }

    #[test]
    fn each_flag_is_refused_where_it_does_not_apply() {
        let applies = |kind: u16, bit: u16| {
            bit == 0 || matches!((kind, bit), (0, 2) | (6, 1 | 4) | (7, 3)) || matches!((kind, bit), (1 | 7, 5))
        };
        for kind in [0, 1, 3, 4, 5, 6, 7] {
            for bit in 0..16 {
                let mut flags = 1 << bit;
                if kind == 1 {
                    flags |= cflag::PAYLOAD_LEN;
                }
                let verdict = validate(&request(kind, flags, 0, 512), &to(Mode::Extended));
                assert_eq!(errno(verdict), if applies(kind, bit) { 0 } else { 22 }, "command {kind} flag bit {bit}");
            }
        }
    }

    #[test]
    fn df_and_payload_len_need_their_modes() {
        assert_eq!(errno(validate(&request(0, cflag::DF, 0, 512), &to(Mode::Simple))), 22);
        assert_eq!(errno(validate(&request(1, cflag::PAYLOAD_LEN, 0, 512), &to(Mode::Structured))), 22);
        assert_eq!(errno(validate(&request(1, 0, 0, 512), &to(Mode::Extended))), 0, "qemu's client sends it so");
    }

    #[test]
    fn the_payload_of_a_refused_request_is_still_counted() {
        assert_eq!(payload(&request(1, 0xffff, u64::MAX, 77), Mode::Simple), 77);
        assert_eq!(payload(&request(1, 0, 0, 77), Mode::Extended), 77);
        assert_eq!(payload(&request(9, cflag::PAYLOAD_LEN, 0, 77), Mode::Extended), 77);
        assert_eq!(payload(&request(9, cflag::PAYLOAD_LEN, 0, 77), Mode::Structured), 0);
        assert_eq!(payload(&request(0, 0, 0, 77), Mode::Extended), 0);
    }

    #[test]
    fn a_read_of_32_mib_is_served_and_a_longer_one_refused() {
        assert_eq!(errno(validate(&request(0, 0, 0, 32 << 20), &to(Mode::Simple))), 0);
        assert_eq!(errno(validate(&request(0, 0, 0, (32 << 20) + 1), &to(Mode::Simple))), 22);
    }

    #[test]
    fn a_read_only_export_refuses_every_change_with_eperm() {
        let to = Attachment { read_only: true, ..to(Mode::Structured) };
        for (kind, expected) in [(0, 0), (1, 1), (3, 0), (4, 1), (5, 0), (6, 1), (7, 0)] {
            assert_eq!(errno(validate(&request(kind, 0, 0, 512), &to)), expected, "{kind}");
        }
    }

    #[test]
    fn a_zero_length_is_good_but_for_block_status() {
        for (kind, expected) in [(0, 0), (1, 0), (4, 0), (5, 0), (6, 0), (7, 22)] {
            assert_eq!(errno(validate(&request(kind, 0, SIZE, 0), &to(Mode::Structured))), expected, "{kind}");
        }
    }

    #[test]
    fn unknown_commands_are_einval_and_resize_is_one_of_them() {
        for kind in [8, 9, 255, u16::MAX] {
            assert_eq!(errno(validate(&request(kind, 0, 0, 0), &to(Mode::Structured))), 22);
        }
    }

    #[test]
    fn a_block_status_payload_with_an_unknown_or_repeated_id_is_einval() {
        let with = |ids: &[u32]| {
            let mut payload = 512u64.to_be_bytes().to_vec();
            ids.iter().for_each(|id| payload.extend_from_slice(&id.to_be_bytes()));
            errno(block_status_payload(0, false, &payload, &to(Mode::Extended)).map(|(command, _)| command))
        };
        assert_eq!(with(&[1]), 0);
        for bad in [&[][..], &[1, 1], &[2], &[0], &[u32::MAX]] {
            assert_eq!(with(bad), 22, "{bad:?}");
        }
        for short in [0, 7, 8, 9, 11] {
            let verdict = block_status_payload(0, false, &[0; 16][..short], &to(Mode::Extended));
            assert_eq!(verdict.unwrap_err().errno, Errno::Inval);
        }
    }
}
