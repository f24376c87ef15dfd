//! Fixed-newstyle negotiation as a pure state machine: bytes in, replies and questions out.
//!
//! Promises: the stream stays in sync after every option, known or not, good or bad; every refusal carries a text that
//! says what to do; an unwelcome client gets an error, and is closed only where the protocol demands it or the limits
//! would be passed; memory is bounded by [`OptionLimits`].
//! Must never: do I/O, look at an export before a client has named it, reach transmission with state that was not
//! negotiated on this connection, or let anything said in plaintext count inside TLS.
//!
//! The driver feeds what it received and acts on the [`Step`]: read more, look an export up and call
//! [`Handshake::found`], list and call [`Handshake::listed`], start TLS and call [`Handshake::secured`], enter
//! transmission, or close. Replies are appended to the
//! output, which the driver sends before it waits for anything.

mod options;
#[cfg(test)]
mod tests;

use bytes::{Buf, BytesMut};

use self::options::{InfoRequest, Malformed, MetaRequest};
use super::context::Context;
use super::limits::{MAX_PAYLOAD_BYTES, OptionLimits};
use super::wire::{self, Mode, info, opt, rep, tflag};

/// The smallest block, in bytes: whatever a client sends is merged here.
const MIN_BLOCK_BYTES: u32 = 1;
/// The block size that serves best, in bytes.
const PREFERRED_BLOCK_BYTES: u32 = 4096;
/// How much of a name is echoed in an error text, in bytes; with the rest of the text far below the 4096 allowed.
const ECHOED_NAME_BYTES: usize = 256;
/// How much of a reason is sent in an error text, in bytes.
const MAX_TEXT_BYTES: usize = 2048;

/// What the driver has to do next.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Send the output, read more, feed again.
    NeedMore,
    /// Look up the export of that name (empty: the default) and call [`Handshake::found`].
    Find(String),
    /// Call [`Handshake::listed`] with every export that can be attached.
    List,
    /// Send the output, do the TLS handshake, and call [`Handshake::secured`]; if TLS fails, close. The input is empty:
    /// what a client, or somebody between, sent behind STARTTLS in plaintext was thrown away.
    StartTls,
    /// Send the output; the bytes left in the input are the first requests.
    Transmit(Negotiated),
    /// Send the output and close.
    Close(Close),
}

/// What TLS is to a connection; the first three are the server's choice, "constant for the connection".
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsState {
    /// There is none ("NOTLS").
    Off,
    /// The client may start it ("SELECTIVE", with every export open to plaintext).
    Offered,
    /// Nothing is answered before the client has started it ("FORCED").
    Required,
    /// It was started: whatever comes is encrypted.
    Active,
}

/// Why a connection ends in the handshake.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Close {
    /// The client asked to.
    Aborted,
    /// The protocol leaves no other answer; the text is for the log.
    Refused(&'static str),
    /// A limit was passed; the text is for the log.
    Limit(&'static str),
}

/// What was agreed on when transmission begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Negotiated {
    /// How requests and replies look.
    pub mode: Mode,
    /// The metadata contexts selected for this very export, in the order they were asked for.
    pub contexts: Vec<Context>,
}

/// What the handshake tells of an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportInfo {
    /// Its canonical name.
    pub name: String,
    /// Its size in bytes, below 2^63.
    pub size: u64,
    /// Whether writes are refused.
    pub read_only: bool,
    /// A text for humans.
    pub description: String,
}

impl ExportInfo {
    /// The transmission flags of this export in a mode.
    #[must_use]
    pub fn transmission_flags(&self, mode: Mode) -> u16 {
        let mut flags =
            tflag::HAS_FLAGS | tflag::SEND_FLUSH | tflag::SEND_FUA | tflag::SEND_CACHE | tflag::CAN_MULTI_CONN;
        // Commands that would always fail are not put on offer.
        flags |= if self.read_only {
            tflag::READ_ONLY
        } else {
            tflag::SEND_TRIM | tflag::SEND_WRITE_ZEROES | tflag::SEND_FAST_ZERO
        };
        // "MUST NOT be set unless structured replies or extended headers are negotiated."
        if mode >= Mode::Structured {
            flags |= tflag::SEND_DF;
        }
        // "MUST NOT be set unless extended headers are negotiated."
        if mode == Mode::Extended {
            flags |= tflag::BLOCK_STATUS_PAYLOAD;
        }
        flags
    }
}

/// Where in the conversation a connection is.
#[derive(Debug)]
enum Phase {
    ClientFlags,
    Option,
    /// Throwing away the data of an option that is too long to be read.
    Drain {
        option: u32,
        left: usize,
    },
    /// The driver was asked; it answers with `found`.
    Asked(Asked),
    /// The driver was asked; it answers with `listed`.
    Listing,
    /// The driver was told to start TLS; it answers with `secured`.
    Securing,
    Over,
}

/// What an export is looked up for.
#[derive(Debug)]
enum Asked {
    ExportName { name: String },
    Info { option: u32, request: InfoRequest },
    Meta { option: u32, request: MetaRequest },
}

/// One connection's negotiation.
#[derive(Debug)]
pub struct Handshake {
    limits: OptionLimits,
    tls: TlsState,
    phase: Phase,
    fixed: bool,
    no_zeroes: bool,
    options_seen: u32,
    /// How many exports the longest list had.
    listed: u32,
    mode: Mode,
    /// The last SET_META_CONTEXT: the name it was for, and what it selected.
    selected: Option<(String, Vec<Context>)>,
}

impl Handshake {
    /// A new negotiation; the greeting is appended to `out`.
    pub fn new(limits: OptionLimits, tls: TlsState, out: &mut Vec<u8>) -> Self {
        wire::encode_greeting(out);
        Self::fresh(limits, tls)
    }

    /// Nothing negotiated yet.
    fn fresh(limits: OptionLimits, tls: TlsState) -> Self {
        Self {
            limits,
            tls,
            phase: Phase::ClientFlags,
            fixed: false,
            no_zeroes: false,
            options_seen: 0,
            listed: 0,
            mode: Mode::Simple,
            selected: None,
        }
    }

    /// Takes what it can from `input` and says what to do next. `stopping`: the server takes no new clients.
    pub fn feed(&mut self, input: &mut BytesMut, out: &mut Vec<u8>, stopping: bool) -> Step {
        loop {
            let step = match self.phase {
                Phase::ClientFlags => self.client_flags(input),
                Phase::Option => self.option(input, out, stopping),
                Phase::Drain { option, left } => {
                    let taken = left.min(input.len());
                    input.advance(taken);
                    self.phase = Phase::Drain { option, left: left - taken };
                    if taken < left {
                        return Step::NeedMore;
                    }
                    self.drained(option, out)
                }
                Phase::Asked(_) | Phase::Listing | Phase::Securing | Phase::Over => return Step::NeedMore,
            };
            match step {
                None => {}
                Some(Step::StartTls) => {
                    input.clear();
                    return Step::StartTls;
                }
                Some(Step::Close(why)) => {
                    self.phase = Phase::Over;
                    return Step::Close(why);
                }
                Some(step) => return step,
            }
        }
    }

    /// "Client flags: u32. An unknown or unadvertised bit: the server MUST close."
    fn client_flags(&mut self, input: &mut BytesMut) -> Option<Step> {
        if input.len() < 4 {
            return Some(Step::NeedMore);
        }
        let flags = input.get_u32();
        if flags & !u32::from(wire::FIXED_NEWSTYLE | wire::NO_ZEROES) != 0 {
            return Some(Step::Close(Close::Refused("unknown client flags")));
        }
        self.fixed = flags & u32::from(wire::FIXED_NEWSTYLE) != 0;
        self.no_zeroes = flags & u32::from(wire::NO_ZEROES) != 0;
        // "Without C_FIXED_NEWSTYLE a server MUST be in NOTLS mode": such a client cannot ask for TLS.
        if !self.fixed && self.tls == TlsState::Required {
            return Some(Step::Close(Close::Refused("a client without fixed newstyle where TLS is required")));
        }
        self.phase = Phase::Option;
        None
    }

    /// One option: "u64 IHAVEOPT, u32 option, u32 length, data".
    fn option(&mut self, input: &mut BytesMut, out: &mut Vec<u8>, stopping: bool) -> Option<Step> {
        let mut header = wire::Reader(input);
        let Some(magic) = header.u64() else { return Some(Step::NeedMore) };
        if magic != wire::OPTION_MAGIC {
            return Some(Step::Close(Close::Refused("an option without its magic")));
        }
        let (Some(option), Some(len)) = (header.u32(), header.u32()) else { return Some(Step::NeedMore) };
        // Without C_FIXED_NEWSTYLE a client understands no option reply: only EXPORT_NAME is valid.
        if !self.fixed && option != opt::EXPORT_NAME {
            return Some(Step::Close(Close::Refused("an option other than EXPORT_NAME without fixed newstyle")));
        }
        let for_listed = self.listed.saturating_mul(self.limits.options_per_export);
        if self.options_seen >= self.limits.options.saturating_add(for_listed) {
            return Some(Step::Close(Close::Limit("a client sent too many options: its connection is closed")));
        }
        if option == opt::ABORT {
            // "MUST ACK; SHOULD ignore data"; and the data of a client that leaves is not waited for.
            reply(out, option, rep::ACK);
            return Some(Step::Close(Close::Aborted));
        }
        if len > self.limits.drained_bytes {
            return Some(self.too_long(option, len, out));
        }
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if len > usize::try_from(self.limits.read_bytes).unwrap_or(usize::MAX) {
            self.options_seen += 1;
            input.advance(wire::OPTION_HEADER_BYTES);
            self.phase = Phase::Drain { option, left: len };
            return None;
        }
        if input.len() - wire::OPTION_HEADER_BYTES < len {
            return Some(Step::NeedMore);
        }
        self.options_seen += 1;
        input.advance(wire::OPTION_HEADER_BYTES);
        let data = input.split_to(len);
        self.handle(option, &data, out, stopping)
    }

    /// Refuses an option by the length that it announces. Its data is not waited for, so the stream cannot go on.
    fn too_long(&self, option: u32, len: u32, out: &mut Vec<u8>) -> Step {
        if self.tls == TlsState::Required && option != opt::STARTTLS {
            tls_required(option, out);
        } else if option != opt::EXPORT_NAME {
            let most = self.limits.read_bytes;
            let text =
                format!("the option announces {len} bytes of data, and the connection is closed: send at most {most}");
            refuse(out, option, rep::ERR_TOO_BIG, &text);
        }
        Step::Close(Close::Limit("a client announced an option too long to be thrown away: its connection is closed"))
    }

    fn drained(&mut self, option: u32, out: &mut Vec<u8>) -> Option<Step> {
        self.phase = Phase::Option;
        if self.tls == TlsState::Required && option != opt::STARTTLS {
            return tls_required(option, out);
        }
        match option {
            opt::EXPORT_NAME => Some(Step::Close(Close::Refused("EXPORT_NAME with a name that cannot be"))),
            opt::STARTTLS => self.start_tls(true, out),
            _ if is_known(option) => {
                if option == opt::SET_META_CONTEXT {
                    self.selected = None;
                }
                refuse(out, option, rep::ERR_TOO_BIG, "the option's data is too long: send at most 64 KiB")
            }
            _ => unsupported(out, option),
        }
    }

    fn handle(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>, stopping: bool) -> Option<Step> {
        if self.tls == TlsState::Required && option != opt::STARTTLS {
            return tls_required(option, out);
        }
        // "During shutdown SHOULD reply ERR_SHUTDOWN to everything but ABORT"; EXPORT_NAME has no error reply.
        if stopping && option != opt::EXPORT_NAME {
            let text = "the server is stopping: connect again in a while";
            return refuse(out, option, rep::ERR_SHUTDOWN, text);
        }
        match option {
            opt::EXPORT_NAME if stopping => Some(Step::Close(Close::Refused("EXPORT_NAME while stopping"))),
            // "The client MUST NOT use EXPORT_NAME after extended headers": its answer has no place for an error.
            opt::EXPORT_NAME if self.mode == Mode::Extended => {
                Some(Step::Close(Close::Refused("EXPORT_NAME after EXTENDED_HEADERS")))
            }
            opt::EXPORT_NAME => match options::string(data) {
                Ok(name) => self.ask(name.clone(), Asked::ExportName { name }),
                Err(_) => Some(Step::Close(Close::Refused("EXPORT_NAME with a name that cannot be"))),
            },
            opt::LIST if data.is_empty() => {
                self.phase = Phase::Listing;
                Some(Step::List)
            }
            opt::STARTTLS => self.start_tls(!data.is_empty(), out),
            opt::INFO | opt::GO => match InfoRequest::parse(data) {
                Ok(request) => self.ask(request.name.clone(), Asked::Info { option, request }),
                Err(malformed) => invalid(out, option, malformed),
            },
            opt::STRUCTURED_REPLY if data.is_empty() => match self.mode {
                Mode::Simple => self.switch(Mode::Structured, out, option),
                Mode::Structured => invalid(out, option, "structured replies are negotiated already: go on"),
                Mode::Extended => {
                    let text = "extended headers are negotiated and include structured replies: go on";
                    refuse(out, option, rep::ERR_EXT_HEADER_REQD, text)
                }
            },
            opt::EXTENDED_HEADERS if data.is_empty() => match self.mode {
                Mode::Extended => invalid(out, option, "extended headers are negotiated already: go on"),
                Mode::Simple | Mode::Structured => self.switch(Mode::Extended, out, option),
            },
            opt::LIST | opt::STRUCTURED_REPLY | opt::EXTENDED_HEADERS => {
                invalid(out, option, "this option takes no data: send it with length 0")
            }
            opt::LIST_META_CONTEXT | opt::SET_META_CONTEXT => self.meta(option, data, out),
            // PEEK_EXPORT (4) was withdrawn and is as unknown as the rest.
            _ => unsupported(out, option),
        }
    }

    fn start_tls(&mut self, with_data: bool, out: &mut Vec<u8>) -> Option<Step> {
        match self.tls {
            // "MUST reply with POLICY or UNSUP", and qemu 4.2 understands only the latter.
            TlsState::Off => refuse(out, opt::STARTTLS, rep::ERR_UNSUP, "this server has no TLS: connect without it"),
            TlsState::Active => invalid(out, opt::STARTTLS, "TLS is on already: go on"),
            TlsState::Offered | TlsState::Required if with_data => {
                invalid(out, opt::STARTTLS, "this option takes no data: send it with length 0")
            }
            TlsState::Offered | TlsState::Required => {
                reply(out, opt::STARTTLS, rep::ACK);
                self.phase = Phase::Securing;
                Some(Step::StartTls)
            }
        }
    }

    /// Answers a [`Step::StartTls`]: the TLS handshake is done, and what is fed from now on came through it.
    ///
    /// "MUST discard all earlier state": all but the client flags, which are sent once, and the count of options.
    pub fn secured(&mut self) {
        if !matches!(self.phase, Phase::Securing) {
            return;
        }
        let (fixed, no_zeroes, options_seen) = (self.fixed, self.no_zeroes, self.options_seen);
        let fresh = Self::fresh(self.limits, TlsState::Active);
        *self = Self { phase: Phase::Option, fixed, no_zeroes, options_seen, ..fresh };
    }

    fn switch(&mut self, mode: Mode, out: &mut Vec<u8>, option: u32) -> Option<Step> {
        self.mode = mode;
        reply(out, option, rep::ACK);
        None
    }

    fn meta(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Option<Step> {
        if option == opt::SET_META_CONTEXT {
            // "MUST replace the old set, even on failure."
            self.selected = None;
            if self.mode == Mode::Simple {
                return invalid(out, option, "metadata contexts need STRUCTURED_REPLY first: negotiate it");
            }
        }
        match MetaRequest::parse(data) {
            Ok(request) => self.ask(request.name.clone(), Asked::Meta { option, request }),
            Err(malformed) => invalid(out, option, malformed),
        }
    }

    fn ask(&mut self, name: String, asked: Asked) -> Option<Step> {
        self.phase = Phase::Asked(asked);
        Some(Step::Find(name))
    }

    /// Answers a [`Step::List`]: "SERVER {u32 nlen, name, rest = description}*, ACK".
    pub fn listed<'a>(&mut self, exports: impl IntoIterator<Item = (&'a str, &'a str)>, out: &mut Vec<u8>) {
        if !matches!(self.phase, Phase::Listing) {
            return;
        }
        let mut listed = 0;
        for (name, description) in exports {
            listed += 1;
            let len = u32::try_from(name.len()).unwrap_or(u32::MAX);
            wire::encode_option_reply(
                out,
                opt::LIST,
                rep::SERVER,
                &[&len.to_be_bytes(), name.as_bytes(), description.as_bytes()],
            );
        }
        reply(out, opt::LIST, rep::ACK);
        self.listed = self.listed.max(listed);
        self.phase = Phase::Option;
    }

    /// Answers a [`Step::Find`] with the export, or with the reason why there is none to attach.
    /// `None`: feed again, there may be more in the input.
    pub fn found(&mut self, export: Result<&ExportInfo, &str>, out: &mut Vec<u8>) -> Option<Step> {
        let Phase::Asked(asked) = std::mem::replace(&mut self.phase, Phase::Option) else {
            return None;
        };
        match (asked, export) {
            (Asked::ExportName { name }, Ok(export)) => {
                out.extend_from_slice(&export.size.to_be_bytes());
                out.extend_from_slice(&export.transmission_flags(self.mode).to_be_bytes());
                if !self.no_zeroes {
                    out.extend_from_slice(&[0; wire::EXPORT_NAME_PADDING_BYTES]);
                }
                Some(self.transmit(&name))
            }
            // "Cannot satisfy: MUST close."
            (Asked::ExportName { .. }, Err(_)) => {
                self.phase = Phase::Over;
                Some(Step::Close(Close::Refused("EXPORT_NAME of an export that cannot be attached")))
            }
            (Asked::Info { option, request }, Ok(export)) => {
                self.describe(option, &request, export, out);
                (option == opt::GO).then(|| self.transmit(&request.name))
            }
            (Asked::Meta { option, request }, Ok(_)) => {
                self.contexts(option, request, out);
                None
            }
            // "Unknown export: ERR_UNKNOWN, without INFO."
            (Asked::Info { option, .. } | Asked::Meta { option, .. }, Err(reason)) => {
                refuse(out, option, rep::ERR_UNKNOWN, reason)
            }
        }
    }

    fn transmit(&mut self, name: &str) -> Step {
        self.phase = Phase::Over;
        // "Valid only if GO uses the same name."
        let contexts = match self.selected.take() {
            Some((selected_for, contexts)) if selected_for == name => contexts,
            _ => Vec::new(),
        };
        Step::Transmit(Negotiated { mode: self.mode, contexts })
    }

    fn describe(&self, option: u32, request: &InfoRequest, export: &ExportInfo, out: &mut Vec<u8>) {
        let mut send = |kind: u16, parts: [&[u8]; 3]| {
            let [a, b, c] = parts;
            wire::encode_option_reply(out, option, rep::INFO, &[&kind.to_be_bytes(), a, b, c]);
        };
        // "MUST send INFO_EXPORT even if not asked."
        let flags = export.transmission_flags(self.mode);
        send(info::EXPORT, [&export.size.to_be_bytes(), &flags.to_be_bytes(), &[]]);
        if request.infos.contains(&info::NAME) {
            send(info::NAME, [export.name.as_bytes(), &[], &[]]);
        }
        if request.infos.contains(&info::DESCRIPTION) {
            send(info::DESCRIPTION, [export.description.as_bytes(), &[], &[]]);
        }
        // Unrequested too: clients exist that never ask and still want it. Kinds we do not know are ignored.
        send(
            info::BLOCK_SIZE,
            [&MIN_BLOCK_BYTES.to_be_bytes(), &PREFERRED_BLOCK_BYTES.to_be_bytes(), &MAX_PAYLOAD_BYTES.to_be_bytes()],
        );
        reply(out, option, rep::ACK);
    }

    fn contexts(&mut self, option: u32, request: MetaRequest, out: &mut Vec<u8>) {
        let listing = option == opt::LIST_META_CONTEXT;
        let mut contexts: Vec<Context> = Vec::new();
        // "LIST with no query MUST list all; SET with none selects none."
        if listing && request.queries.is_empty() {
            contexts.extend(Context::ALL);
        }
        for query in &request.queries {
            // "`base:` is a wildcard in LIST, and MUST be ignored in SET. An unknown namespace MUST be ignored."
            let named = |context: &Context| {
                if listing { context.is_listed_by(query) } else { context.name() == query }
            };
            let new: Vec<Context> = Context::ALL.into_iter().filter(named).filter(|c| !contexts.contains(c)).collect();
            contexts.extend(new);
        }
        for context in &contexts {
            let id = if listing { 0 } else { context.id() };
            wire::encode_option_reply(out, option, rep::META_CONTEXT, &[&id.to_be_bytes(), context.name().as_bytes()]);
        }
        reply(out, option, rep::ACK);
        if !listing {
            self.selected = Some((request.name, contexts));
        }
    }
}

/// A client's name as an error text shows it: never so long that the text passes the protocol's 4096 bytes.
#[must_use]
pub fn echoed(name: &str) -> String {
    let shown = wire::truncated(name, ECHOED_NAME_BYTES);
    if shown.len() < name.len() { format!("{shown:?}… ({} bytes)", name.len()) } else { format!("{shown:?}") }
}

fn is_known(option: u32) -> bool {
    matches!(option, opt::EXPORT_NAME..=opt::LIST | opt::STARTTLS..=opt::EXTENDED_HEADERS)
}

fn reply(out: &mut Vec<u8>, option: u32, kind: u32) {
    wire::encode_option_reply(out, option, kind, &[]);
}

/// "An unwelcome client gets errors, not a disconnect."
fn refuse(out: &mut Vec<u8>, option: u32, kind: u32, text: &str) -> Option<Step> {
    wire::encode_option_reply(out, option, kind, &[wire::truncated(text, MAX_TEXT_BYTES).as_bytes()]);
    None
}

fn invalid(out: &mut Vec<u8>, option: u32, text: Malformed) -> Option<Step> {
    refuse(out, option, rep::ERR_INVALID, text)
}

/// "Everything except STARTTLS and ABORT gets TLS_REQD"; EXPORT_NAME has no error reply: "MUST close".
fn tls_required(option: u32, out: &mut Vec<u8>) -> Option<Step> {
    if option == opt::EXPORT_NAME {
        return Some(Step::Close(Close::Refused("EXPORT_NAME in plaintext where TLS is required")));
    }
    let text = "this server talks to clients over TLS alone: send STARTTLS first (libnbd: use an nbds:// URI)";
    refuse(out, option, rep::ERR_TLS_REQD, text)
}

/// "Unknown option: MUST drain the data, reply ERR_UNSUP, and stay in sync."
fn unsupported(out: &mut Vec<u8>, option: u32) -> Option<Step> {
    refuse(out, option, rep::ERR_UNSUP, &format!("option {option} is not known here: do without it"))
}
