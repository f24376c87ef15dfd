//! The handshake: whatever a client sends, the server's side of the conversation is whole, bounded, and the same however
//! the bytes are cut.

use std::ops::RangeInclusive;

use bytes::BytesMut;
use nbd_server::nbd::Limits;
use nbd_server::nbd::context::Context;
use nbd_server::nbd::handshake::{ExportInfo, Handshake, Step, TlsState};
use nbd_server::nbd::wire::{self, Mode, info, opt, rep};

const EXPORTS: [(&str, &str); 2] = [("disk", "a disk"), ("disk2", "")];
const GREETING: &[u8] = b"NBDMAGICIHAVEOPT\x00\x03";
/// No answer to one option of ours is longer, in bytes.
const MAX_ANSWER_BYTES: usize = 4096;
/// Longer inputs are not fed byte by byte.
const MAX_BYTEWISE_BYTES: usize = 8 << 10;
const ERRORS: RangeInclusive<u32> = rep::ERR_UNSUP..=rep::ERR_EXT_HEADER_REQD;

/// One connection, from the client flags on.
pub fn handshake(data: &[u8]) {
    let whole = converse(data, data.len().max(1), false);
    check(data, &whole);
    // Byte by byte takes long where there are many, and finds nothing that the next prime does not.
    let smallest = if data.len() <= MAX_BYTEWISE_BYTES { 1 } else { 61 };
    for step in [smallest, 7 * smallest, 4096] {
        assert_eq!(converse(data, step, false), whole, "in pieces of {step} bytes the conversation is another");
    }
    let stopping = converse(data, 4096, true);
    assert!(!matches!(stopping.last, Step::Transmit(_)), "a server that stops takes a new client");
    check(data, &stopping);
}

#[derive(Debug, PartialEq, Eq)]
struct Conversation {
    said: Vec<u8>,
    last: Step,
    /// What is left for the transmission.
    left: Vec<u8>,
}

fn converse(data: &[u8], step: usize, stopping: bool) -> Conversation {
    let limits = Limits::default().option;
    let (mut said, mut input) = (Vec::new(), BytesMut::new());
    let mut handshake = Handshake::new(limits, TlsState::Off, &mut said);
    let mut last = Step::NeedMore;
    let mut pieces = data.chunks(step);
    'pieces: for piece in pieces.by_ref() {
        input.extend_from_slice(piece);
        loop {
            let mut step = handshake.feed(&mut input, &mut said, stopping);
            if let Step::Find(name) = &step {
                let found = export(name);
                let reason = "there is none of that name";
                match handshake.found(found.as_ref().ok_or(reason), &mut said) {
                    None => continue,
                    Some(next) => step = next,
                }
            }
            match step {
                Step::List => handshake.listed(EXPORTS, &mut said),
                Step::NeedMore => break,
                Step::Transmit(_) | Step::Close(_) => {
                    last = step;
                    break 'pieces;
                }
                Step::Find(_) => panic!("asked for an export in answer to an export"),
                Step::StartTls => panic!("TLS begins where there is none"),
            }
        }
        let most = limits.read_bytes as usize + wire::OPTION_HEADER_BYTES;
        assert!(input.len() < most, "{} bytes are kept unread", input.len());
    }
    let rest = pieces.flatten();
    // What a client that is closed still sent belongs to nobody.
    let left = if matches!(last, Step::Close(_)) { Vec::new() } else { input.iter().chain(rest).copied().collect() };
    Conversation { said, last, left }
}

fn export(name: &str) -> Option<ExportInfo> {
    let name = if name.is_empty() { "disk" } else { name };
    let (name, description) = EXPORTS.into_iter().find(|(known, _)| *known == name)?;
    Some(ExportInfo { name: name.into(), size: 1 << 20, read_only: name == "disk2", description: description.into() })
}

/// The options that may be answered: those whose every byte is in `data`, in order, and those that are answered by their
/// header alone.
fn whole_options(data: &[u8]) -> Vec<u32> {
    let mut reader = wire::Reader(data.get(4..).unwrap_or_default());
    let mut next = || {
        reader.u64().filter(|magic| *magic == wire::OPTION_MAGIC)?;
        let (option, len) = (reader.u32()?, reader.u32()?);
        // ABORT is answered at once, without waiting for its data, and so is what announces too much.
        let at_once = option == opt::ABORT || len > Limits::default().option.drained_bytes;
        let data = reader.bytes(len as usize);
        (data.is_some() || at_once).then_some(option)
    };
    std::iter::from_fn(&mut next).collect()
}

fn check(data: &[u8], conversation: &Conversation) {
    let mut reader = wire::Reader(conversation.said.strip_prefix(GREETING).expect("the greeting comes first"));
    let mut answered = Vec::new();
    let mut described = false;
    while reader.0.starts_with(&wire::OPTION_REPLY_MAGIC.to_be_bytes()) {
        reader.u64();
        let (option, kind) = (reader.u32().unwrap(), reader.u32().unwrap());
        let payload = reader.string().expect("a reply is as long as it says");
        match kind {
            rep::ACK => {
                assert!(payload.is_empty());
                assert!(described || !matches!(option, opt::INFO | opt::GO), "an export without INFO_EXPORT");
            }
            rep::SERVER => assert!(option == opt::LIST && wire::Reader(payload).string().is_some()),
            rep::INFO => {
                let kind = wire::Reader(payload).u16().unwrap();
                described |= kind == info::EXPORT && payload.len() == 12;
            }
            rep::META_CONTEXT => {
                let name = payload.get(4..).unwrap();
                assert!(Context::ALL.iter().any(|context| context.name().as_bytes() == name));
            }
            _ => {
                assert!(ERRORS.contains(&kind), "reply type {kind:#x}");
                assert!(!described, "INFO before a refusal");
                let text = std::str::from_utf8(payload).expect("an error's text is UTF-8");
                assert!(!text.is_empty() && text.len() <= wire::MAX_STRING_BYTES && !text.contains('\0'));
            }
        }
        if kind == rep::ACK || ERRORS.contains(&kind) {
            answered.push(option);
            described = false;
        }
    }
    let asked = whole_options(data);
    let mode = match &conversation.last {
        Step::Transmit(agreed) => {
            assert!(agreed.contexts.is_empty() || agreed.mode != Mode::Simple);
            let twice = agreed.contexts.iter().enumerate().any(|(i, context)| agreed.contexts[..i].contains(context));
            assert!(!twice, "a context is selected twice");
            Some(agreed.mode)
        }
        _ => None,
    };
    if reader.0.is_empty() {
        assert!(asked.starts_with(&answered), "{asked:?} were asked, {answered:?} answered");
    } else {
        // EXPORT_NAME has an answer of its own: size, flags, and 124 zeros unless they were declined.
        assert!(mode.is_some_and(|mode| mode != Mode::Extended));
        assert!(matches!(reader.0.len(), 10 | 134), "{} bytes follow the replies", reader.0.len());
        assert_eq!(asked.get(answered.len()), Some(&opt::EXPORT_NAME));
    }
    if conversation.last == Step::NeedMore {
        assert_eq!(answered, asked, "an option without an answer");
    }
    assert!(conversation.said.len() <= GREETING.len() + (answered.len() + 1) * MAX_ANSWER_BYTES);
}
