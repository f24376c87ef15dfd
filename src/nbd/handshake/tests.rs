//! The handshake as vectors: what a client sends, byte for byte, and what it gets. Named after the rule.

use super::*;

const LIMITS: OptionLimits =
    OptionLimits { options: 1_000, options_per_export: 4, read_bytes: 64 << 10, drained_bytes: 1 << 20 };

/// A client of the pure handshake, with the exports `disk` (writable), `ro` and `broken` behind it.
struct Client {
    handshake: Handshake,
    input: BytesMut,
    out: Vec<u8>,
    stopping: bool,
    lookups: Vec<String>,
}

#[derive(Debug, PartialEq, Eq)]
struct Reply {
    option: u32,
    kind: u32,
    data: Vec<u8>,
}

impl Client {
    fn greeted(tls: TlsState) -> Self {
        let mut out = Vec::new();
        let handshake = Handshake::new(LIMITS, tls, &mut out);
        assert_eq!(out, b"NBDMAGICIHAVEOPT\x00\x03");
        out.clear();
        Self { handshake, input: BytesMut::new(), out, stopping: false, lookups: Vec::new() }
    }

    fn with_flags(flags: u32) -> Self {
        let mut client = Self::greeted(TlsState::Off);
        assert_eq!(client.send(&flags.to_be_bytes()), Step::NeedMore);
        client
    }

    fn new() -> Self {
        Self::with_flags(3)
    }

    fn with_tls(tls: TlsState) -> Self {
        let mut client = Self::greeted(tls);
        assert_eq!(client.send(&3u32.to_be_bytes()), Step::NeedMore);
        client
    }

    /// A client that has gone through the TLS handshake.
    fn in_tls(tls: TlsState) -> Self {
        let mut client = Self::with_tls(tls);
        client.start_tls();
        client
    }

    fn start_tls(&mut self) {
        assert_eq!(self.option(opt::STARTTLS, &[]), Step::StartTls);
        assert_eq!(self.kinds(), [rep::ACK]);
        self.handshake.secured();
    }

    /// Sends and answers lookups until the handshake wants more or is over.
    fn send(&mut self, bytes: &[u8]) -> Step {
        self.input.extend_from_slice(bytes);
        loop {
            match self.handshake.feed(&mut self.input, &mut self.out, self.stopping) {
                Step::Find(name) => {
                    self.lookups.push(name.clone());
                    let info = |name: &str, read_only| ExportInfo {
                        name: name.to_owned(),
                        size: 1 << 30,
                        read_only,
                        description: "a disk".to_owned(),
                    };
                    let export = match name.as_str() {
                        "" | "disk" => Ok(info("disk", false)),
                        "ro" => Ok(info("ro", true)),
                        other => Err(format!("there is no export {} here", echoed(other))),
                    };
                    let found = export.as_ref().map_err(String::as_str);
                    if let Some(step) = self.handshake.found(found, &mut self.out) {
                        return step;
                    }
                }
                Step::List => self.handshake.listed([("disk", "a disk"), ("ro", "")], &mut self.out),
                step => return step,
            }
        }
    }

    fn option(&mut self, option: u32, data: &[u8]) -> Step {
        self.send(&frame(option, data))
    }

    /// The replies so far; checks that they parse to the last byte.
    fn replies(&mut self) -> Vec<Reply> {
        let out = std::mem::take(&mut self.out);
        let mut reader = wire::Reader(&out);
        let mut replies = Vec::new();
        while let Some(magic) = reader.u64() {
            assert_eq!(magic, wire::OPTION_REPLY_MAGIC);
            let (option, kind) = (reader.u32().unwrap(), reader.u32().unwrap());
            let data = reader.string().unwrap().to_vec();
            assert!(data.len() <= 4096 || kind < 1 << 31, "error texts are at most 4096 bytes");
            replies.push(Reply { option, kind, data });
        }
        assert!(reader.0.is_empty());
        replies
    }

    fn kinds(&mut self) -> Vec<u32> {
        self.replies().iter().map(|reply| reply.kind).collect()
    }

    /// The one reply to an option is that error, with a text, and the stream is in sync afterwards.
    fn is_refused(&mut self, option: u32, data: &[u8], error: u32) {
        let about = format!("option {option}, {} bytes", data.len());
        assert_eq!(self.option(option, data), Step::NeedMore, "{about}");
        let replies = self.replies();
        assert_eq!(replies.len(), 1, "{about}");
        assert_eq!((replies[0].option, replies[0].kind), (option, error), "{about}");
        assert!(replies[0].data.len() > 10, "a text says what to do");
        self.is_in_sync();
    }

    fn is_in_sync(&mut self) {
        assert_eq!(self.option(opt::LIST, &[]), Step::NeedMore);
        let expected = match self.handshake.tls {
            TlsState::Required => rep::ERR_TLS_REQD,
            _ if self.stopping => rep::ERR_SHUTDOWN,
            _ => rep::ACK,
        };
        assert_eq!(self.kinds().last(), Some(&expected));
    }

    fn go(&mut self, name: &str) -> (Vec<Reply>, Negotiated) {
        let Step::Transmit(negotiated) = self.option(opt::GO, &info_data(name, &[])) else { panic!("GO is refused") };
        (self.replies(), negotiated)
    }
}

fn frame(option: u32, data: &[u8]) -> Vec<u8> {
    let len = u32::try_from(data.len()).unwrap();
    [&wire::OPTION_MAGIC.to_be_bytes(), &option.to_be_bytes()[..], &len.to_be_bytes(), data].concat()
}

fn header(option: u32, len: u32) -> Vec<u8> {
    [&wire::OPTION_MAGIC.to_be_bytes(), &option.to_be_bytes()[..], &len.to_be_bytes()].concat()
}

fn text(bytes: &[u8]) -> Vec<u8> {
    [&u32::try_from(bytes.len()).unwrap().to_be_bytes(), bytes].concat()
}

fn info_data(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = text(name.as_bytes());
    data.extend_from_slice(&u16::try_from(infos.len()).unwrap().to_be_bytes());
    infos.iter().for_each(|info| data.extend_from_slice(&info.to_be_bytes()));
    data
}

fn meta_data(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = text(name.as_bytes());
    data.extend_from_slice(&u32::try_from(queries.len()).unwrap().to_be_bytes());
    queries.iter().for_each(|query| data.extend_from_slice(&text(query.as_bytes())));
    data
}

fn closes(step: &Step) -> bool {
    matches!(step, Step::Close(Close::Refused(_) | Close::Limit(_)))
}

#[test]
fn an_unknown_client_flag_closes() {
    for flags in [4u32, 7, 0x8000_0000, u32::MAX] {
        let mut out = Vec::new();
        let mut handshake = Handshake::new(LIMITS, TlsState::Off, &mut out);
        let mut input = BytesMut::from(&flags.to_be_bytes()[..]);
        assert!(closes(&handshake.feed(&mut input, &mut out, false)), "{flags:#x}");
    }
}

#[test]
fn without_fixed_newstyle_only_export_name_is_valid() {
    for option in [opt::ABORT, opt::LIST, opt::STARTTLS, opt::INFO, opt::GO, opt::STRUCTURED_REPLY, 77] {
        let mut client = Client::with_flags(2);
        assert!(closes(&client.option(option, &[])), "{option}");
        assert!(client.out.is_empty(), "such a client understands no option reply");
    }
    assert!(matches!(Client::with_flags(0).option(opt::EXPORT_NAME, b"disk"), Step::Transmit(_)));
}

#[test]
fn export_name_answers_size_flags_and_124_zeros_unless_told_not_to() {
    for (flags, padding) in [(0, 124), (1, 124), (2, 0), (3, 0)] {
        let mut client = Client::with_flags(flags);
        assert!(matches!(client.option(opt::EXPORT_NAME, b"disk"), Step::Transmit(_)));
        assert_eq!(client.out.len(), 10 + padding);
        assert_eq!(client.out[..8], (1u64 << 30).to_be_bytes());
        assert!(client.out[10..].iter().all(|byte| *byte == 0));
    }
}

#[test]
fn export_name_that_cannot_be_satisfied_closes() {
    for name in [&b"nobody"[..], &[0xff, 0xfe], b"a\0b", &[b'a'; 4096], &[b'a'; 4097], &[b'a'; 70_000]] {
        let mut client = Client::new();
        assert!(closes(&client.option(opt::EXPORT_NAME, name)), "{} bytes", name.len());
        assert!(client.out.is_empty());
    }
}

#[test]
fn the_empty_name_is_asked_for_as_such() {
    let mut client = Client::new();
    assert!(matches!(client.option(opt::EXPORT_NAME, b""), Step::Transmit(_)));
    assert_eq!(client.lookups, [""]);
}

#[test]
fn export_name_after_extended_headers_closes() {
    let mut client = Client::new();
    client.option(opt::EXTENDED_HEADERS, &[]);
    client.out.clear();
    assert!(closes(&client.option(opt::EXPORT_NAME, b"disk")));
}

#[test]
fn abort_is_acked_and_its_data_is_not_waited_for() {
    for bytes in [frame(opt::ABORT, &[]), frame(opt::ABORT, b"bye"), header(opt::ABORT, u32::MAX)] {
        let mut client = Client::new();
        assert_eq!(client.send(&bytes), Step::Close(Close::Aborted));
        assert_eq!(client.kinds(), [rep::ACK]);
    }
}

#[test]
fn list_names_every_export_with_its_description() {
    let mut client = Client::new();
    client.option(opt::LIST, &[]);
    let replies = client.replies();
    assert_eq!(replies[0].data, [&text(b"disk")[..], b"a disk"].concat());
    assert_eq!(replies[1].data, text(b"ro"));
    assert_eq!(replies.iter().map(|reply| reply.kind).collect::<Vec<_>>(), [rep::SERVER, rep::SERVER, rep::ACK]);
}

#[test]
fn options_without_data_refuse_data() {
    for option in [opt::LIST, opt::STRUCTURED_REPLY, opt::EXTENDED_HEADERS] {
        Client::new().is_refused(option, b"x", rep::ERR_INVALID);
    }
}

#[test]
fn unknown_options_are_drained_and_unsupported() {
    for option in [0, 4, 12, 99, u32::MAX] {
        for len in [0, 1, 4096, 64 << 10, (64 << 10) + 1, 1 << 20] {
            Client::new().is_refused(option, &vec![0x49; len], rep::ERR_UNSUP);
        }
    }
}

#[test]
fn option_data_over_64_kib_is_too_big_and_over_1_mib_closes() {
    for option in [opt::LIST, opt::INFO, opt::GO, opt::LIST_META_CONTEXT, opt::SET_META_CONTEXT] {
        Client::new().is_refused(option, &vec![0; (64 << 10) + 1], rep::ERR_TOO_BIG);
        Client::new().is_refused(option, &vec![0; 1 << 20], rep::ERR_TOO_BIG);
    }
    // qemu CVE-2017-15119: a 4 GiB option.
    for len in [(1 << 20) + 1, u32::MAX] {
        for option in [opt::LIST, opt::GO, 99] {
            let mut client = Client::new();
            assert!(matches!(client.send(&header(option, len)), Step::Close(Close::Limit(_))));
            let [Reply { option: answered, kind: rep::ERR_TOO_BIG, data }] = &client.replies()[..] else { panic!() };
            assert_eq!(*answered, option);
            assert!(String::from_utf8_lossy(data).contains(&format!("announces {len} bytes")));
        }
        let mut client = Client::new();
        assert!(closes(&client.send(&header(opt::EXPORT_NAME, len))) && client.out.is_empty(), "it has no error reply");
        let mut client = Client::with_tls(TlsState::Required);
        assert!(closes(&client.send(&header(opt::LIST, len))));
        assert_eq!(client.kinds(), [rep::ERR_TLS_REQD]);
    }
}

#[test]
fn the_thousandth_option_is_served_and_the_next_closes() {
    let mut client = Client::new();
    for _ in 0..1_000 {
        assert_eq!(client.option(99, &[]), Step::NeedMore);
    }
    assert_eq!(client.kinds().len(), 1_000);
    assert!(matches!(client.option(99, &[]), Step::Close(Close::Limit(_))));
}

#[test]
fn each_listed_export_may_be_looked_at_and_listing_again_adds_nothing() {
    let mut client = Client::new();
    client.option(opt::LIST, &[]);
    client.option(opt::LIST, &[]);
    // Two exports were listed.
    for _ in 2..1_008 {
        assert_eq!(client.option(99, &[]), Step::NeedMore);
    }
    assert!(matches!(client.option(99, &[]), Step::Close(Close::Limit(_))));
}

#[test]
fn starttls_without_tls_is_unsup_and_never_tls_reqd() {
    let mut client = Client::new();
    client.is_refused(opt::STARTTLS, &[], rep::ERR_UNSUP);
    client.is_refused(opt::STARTTLS, &[], rep::ERR_UNSUP);
    client.is_refused(opt::STARTTLS, b"data", rep::ERR_UNSUP);
    client.is_refused(opt::STARTTLS, &vec![0; 70_000], rep::ERR_UNSUP);
}

#[test]
fn starttls_with_data_is_invalid_and_tls_can_still_be_started() {
    for tls in [TlsState::Offered, TlsState::Required] {
        let mut client = Client::with_tls(tls);
        for len in [1, 300, 64 << 10, (64 << 10) + 1, 1 << 20] {
            client.is_refused(opt::STARTTLS, &vec![0; len], rep::ERR_INVALID);
        }
        client.start_tls();
        client.is_in_sync();
    }
}

#[test]
fn a_second_starttls_is_invalid() {
    for tls in [TlsState::Offered, TlsState::Required] {
        let mut client = Client::in_tls(tls);
        client.is_refused(opt::STARTTLS, &[], rep::ERR_INVALID);
        client.is_refused(opt::STARTTLS, b"data", rep::ERR_INVALID);
        client.is_refused(opt::STARTTLS, &vec![0; 70_000], rep::ERR_INVALID);
        client.go("disk");
    }
}

#[test]
fn starttls_discards_structured_replies_extended_headers_and_contexts() {
    for option in [opt::STRUCTURED_REPLY, opt::EXTENDED_HEADERS] {
        let mut client = Client::with_tls(TlsState::Offered);
        client.option(option, &[]);
        client.option(opt::SET_META_CONTEXT, &meta_data("disk", &["base:allocation"]));
        client.out.clear();
        client.start_tls();
        // Neither "already negotiated" nor EXT_HEADER_REQD: nothing was.
        client.is_refused(opt::SET_META_CONTEXT, &meta_data("disk", &["base:allocation"]), rep::ERR_INVALID);
        assert_eq!(client.option(opt::STRUCTURED_REPLY, &[]), Step::NeedMore);
        assert_eq!(client.kinds(), [rep::ACK]);
        let (_, negotiated) = client.go("disk");
        assert_eq!(negotiated, Negotiated { mode: Mode::Structured, contexts: Vec::new() });
    }
    let mut client = Client::with_tls(TlsState::Offered);
    client.option(opt::EXTENDED_HEADERS, &[]);
    client.out.clear();
    client.start_tls();
    assert_eq!(client.go("disk").1.mode, Mode::Simple);
}

#[test]
fn starttls_keeps_what_the_client_flags_said() {
    for (flags, padding) in [(1u32, 124), (3, 0)] {
        let mut client = Client::greeted(TlsState::Required);
        client.send(&flags.to_be_bytes());
        client.start_tls();
        assert!(matches!(client.option(opt::EXPORT_NAME, b"disk"), Step::Transmit(_)));
        assert_eq!(client.out.len(), 10 + padding);
    }
}

#[test]
fn plaintext_behind_starttls_is_thrown_away() {
    for tls in [TlsState::Offered, TlsState::Required] {
        let mut client = Client::with_tls(tls);
        // CVE-2021-3716: what somebody between injects would count as said inside TLS.
        let injected = [frame(opt::STARTTLS, &[]), frame(opt::STRUCTURED_REPLY, &[]), frame(99, b"x")].concat();
        assert_eq!(client.send(&injected), Step::StartTls);
        assert!(client.input.is_empty());
        assert_eq!(client.kinds(), [rep::ACK]);
        assert_eq!(client.send(b"too early"), Step::NeedMore, "nothing is understood before TLS is there");
        client.input.clear();
        client.handshake.secured();
        let (replies, negotiated) = client.go("disk");
        assert_eq!(replies.iter().map(|reply| reply.option).collect::<Vec<_>>(), [opt::GO; 3]);
        assert_eq!(negotiated.mode, Mode::Simple);
    }
}

#[test]
fn options_before_and_after_starttls_count_together() {
    let mut client = Client::with_tls(TlsState::Required);
    for _ in 0..998 {
        client.option(99, &[]);
    }
    client.out.clear();
    client.start_tls();
    assert_eq!(client.option(99, &[]), Step::NeedMore);
    assert!(matches!(client.option(99, &[]), Step::Close(Close::Limit(_))));
}

#[test]
fn where_tls_is_required_everything_else_is_tls_reqd_with_its_payload_drained() {
    let mut client = Client::with_tls(TlsState::Required);
    for option in [
        opt::LIST,
        opt::INFO,
        opt::GO,
        opt::STRUCTURED_REPLY,
        opt::LIST_META_CONTEXT,
        opt::SET_META_CONTEXT,
        opt::EXTENDED_HEADERS,
        4,
        99,
        u32::MAX,
    ] {
        for data in [&[][..], b"x", &info_data("disk", &[]), &meta_data("disk", &[]), &[0; 64 << 10], &[0; 70_000]] {
            client.is_refused(option, data, rep::ERR_TLS_REQD);
        }
    }
    assert!(client.lookups.is_empty(), "nothing is looked up for a plaintext client");
    client.stopping = true;
    client.is_refused(opt::GO, &info_data("disk", &[]), rep::ERR_TLS_REQD);
    client.is_refused(opt::STARTTLS, &[], rep::ERR_SHUTDOWN);
    assert_eq!(client.option(opt::ABORT, b"bye"), Step::Close(Close::Aborted));
    assert_eq!(client.kinds(), [rep::ACK]);
}

#[test]
fn where_tls_is_required_export_name_closes() {
    for name in [&b"disk"[..], b"", &[b'a'; 70_000]] {
        let mut client = Client::with_tls(TlsState::Required);
        assert!(closes(&client.option(opt::EXPORT_NAME, name)));
        assert!(client.out.is_empty() && client.lookups.is_empty());
    }
}

#[test]
fn where_tls_is_required_a_client_without_fixed_newstyle_is_closed() {
    for flags in [0u32, 2] {
        let mut client = Client::greeted(TlsState::Required);
        assert!(closes(&client.send(&flags.to_be_bytes())));
        assert!(client.out.is_empty());
    }
    let mut client = Client::greeted(TlsState::Offered);
    client.send(&0u32.to_be_bytes());
    assert!(closes(&client.option(opt::STARTTLS, &[])), "it cannot ask for TLS either");
}

#[test]
fn where_tls_is_on_offer_plaintext_reaches_every_export() {
    let mut client = Client::with_tls(TlsState::Offered);
    assert_eq!(client.option(opt::LIST, &[]), Step::NeedMore);
    assert_eq!(client.kinds(), [rep::SERVER, rep::SERVER, rep::ACK]);
    client.is_refused(opt::INFO, &info_data("nobody", &[]), rep::ERR_UNKNOWN);
    client.go("disk");
}

#[test]
fn inside_tls_nothing_is_tls_reqd() {
    for tls in [TlsState::Offered, TlsState::Required] {
        let mut client = Client::in_tls(tls);
        client.is_refused(opt::INFO, &info_data("nobody", &[]), rep::ERR_UNKNOWN);
        client.is_refused(99, b"x", rep::ERR_UNSUP);
        client.is_refused(opt::GO, &[0; 70_000], rep::ERR_TOO_BIG);
        client.stopping = true;
        client.is_refused(opt::GO, &info_data("disk", &[]), rep::ERR_SHUTDOWN);
    }
}

#[test]
fn go_and_info_describe_the_export_even_if_nothing_is_asked() {
    for option in [opt::INFO, opt::GO] {
        let mut client = Client::new();
        let step = client.option(option, &info_data("disk", &[]));
        assert_eq!(matches!(step, Step::Transmit(_)), option == opt::GO);
        let replies = client.replies();
        let expected = [0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0b1101, 0b0110_1101];
        assert_eq!(replies[0].data, expected, "INFO_EXPORT, size, flags");
        assert_eq!(replies[1].data, [0, 3, 0, 0, 0, 1, 0, 0, 16, 0, 2, 0, 0, 0], "INFO_BLOCK_SIZE");
        assert_eq!(replies.len(), 3);
        assert_eq!((replies[2].kind, replies[2].data.len()), (rep::ACK, 0));
    }
}

#[test]
fn all_four_infos_are_there_and_unknown_ones_are_ignored() {
    let mut client = Client::new();
    client.option(opt::INFO, &info_data("disk", &[3, 2, 1, 0, 4, 99, u16::MAX, 1]));
    let replies = client.replies();
    let infos: Vec<&[u8]> = replies.iter().filter(|reply| reply.kind == rep::INFO).map(|r| &r.data[..]).collect();
    assert_eq!(infos.iter().map(|data| data[1]).collect::<Vec<_>>(), [0, 1, 2, 3]);
    assert_eq!((infos[1], infos[2]), (&b"\x00\x01disk"[..], &b"\x00\x02a disk"[..]));
}

#[test]
fn info_then_go_tells_the_same() {
    let mut client = Client::new();
    client.option(opt::INFO, &info_data("disk", &[1, 2, 3]));
    let info = client.replies();
    client.option(opt::GO, &info_data("disk", &[1, 2, 3]));
    let go = client.replies();
    let data = |replies: &[Reply]| replies.iter().map(|reply| reply.data.clone()).collect::<Vec<_>>();
    assert_eq!(data(&info), data(&go));
}

#[test]
fn an_unknown_export_is_err_unknown_without_info() {
    for option in [opt::INFO, opt::GO, opt::LIST_META_CONTEXT] {
        let data = if option == opt::LIST_META_CONTEXT { meta_data("nobody", &[]) } else { info_data("nobody", &[]) };
        Client::new().is_refused(option, &data, rep::ERR_UNKNOWN);
    }
}

#[test]
fn info_and_go_with_lengths_that_do_not_add_up_are_invalid() {
    let good = info_data("disk", &[1, 3]);
    let mut overrun = good.clone();
    overrun[..4].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut name_into_count = good.clone();
    name_into_count[..4].copy_from_slice(&9u32.to_be_bytes());
    let longer = [&good[..], &[0]].concat();
    let two_more = [&good[..], &[0, 0]].concat();
    for option in [opt::INFO, opt::GO] {
        // nbd-server CVE-2022-26495 (name length 0xffffffff) and CVE-2022-26496 (bad length).
        for data in [&overrun, &name_into_count, &longer, &two_more, &good[..good.len() - 1].to_vec()] {
            Client::new().is_refused(option, data, rep::ERR_INVALID);
        }
        for short in 0..6 {
            Client::new().is_refused(option, &vec![0; short], rep::ERR_INVALID);
        }
        let mut many = info_data("disk", &[]);
        many.truncate(8);
        many.extend_from_slice(&u16::MAX.to_be_bytes());
        Client::new().is_refused(option, &many, rep::ERR_INVALID);
    }
}

#[test]
fn names_are_utf_8_without_nul_and_at_most_4096_bytes() {
    let with = |name: &[u8]| [&text(name)[..], &[0, 0]].concat();
    for name in [&b"a\0"[..], &[0], &[0xff], &[0xc3], &[b'a'; 4097], &[b'a'; 60_000]] {
        Client::new().is_refused(opt::GO, &with(name), rep::ERR_INVALID);
    }
    // qemu CVE-2017-15118 (3000 bytes) and CVE-2020-10761 (the echo must not make the error text too long).
    for name in ["a".repeat(257), "a".repeat(3000), "a".repeat(4096), "é".repeat(2048), "\u{1}".repeat(4096)] {
        Client::new().is_refused(opt::GO, &with(name.as_bytes()), rep::ERR_UNKNOWN);
    }
}

#[test]
fn structured_reply_twice_is_invalid_and_after_extended_headers_ext_header_reqd() {
    let mut client = Client::new();
    client.option(opt::STRUCTURED_REPLY, &[]);
    assert_eq!(client.kinds(), [rep::ACK]);
    client.is_refused(opt::STRUCTURED_REPLY, &[], rep::ERR_INVALID);
    client.option(opt::EXTENDED_HEADERS, &[]);
    assert_eq!(client.kinds(), [rep::ACK]);
    client.is_refused(opt::STRUCTURED_REPLY, &[], rep::ERR_EXT_HEADER_REQD);
    client.is_refused(opt::EXTENDED_HEADERS, &[], rep::ERR_INVALID);
    assert_eq!(client.go("disk").1.mode, Mode::Extended);
}

#[test]
fn df_and_block_status_payload_are_advertised_only_in_their_modes() {
    for (option, df, payload) in
        [(None, false, false), (Some(opt::STRUCTURED_REPLY), true, false), (Some(opt::EXTENDED_HEADERS), true, true)]
    {
        let mut client = Client::new();
        if let Some(option) = option {
            client.option(option, &[]);
            client.out.clear();
        }
        let replies = client.go("disk").0;
        let flags = u16::from_be_bytes([replies[0].data[10], replies[0].data[11]]);
        assert_eq!((flags & tflag::SEND_DF != 0, flags & tflag::BLOCK_STATUS_PAYLOAD != 0), (df, payload));
    }
}

#[test]
fn a_read_only_export_says_so_and_offers_no_changes() {
    let replies = Client::new().go("ro").0;
    let flags = u16::from_be_bytes([replies[0].data[10], replies[0].data[11]]);
    assert_eq!(flags & (tflag::HAS_FLAGS | tflag::READ_ONLY), tflag::HAS_FLAGS | tflag::READ_ONLY);
    assert_eq!(flags & (tflag::SEND_TRIM | tflag::SEND_WRITE_ZEROES | tflag::SEND_FAST_ZERO), 0);
    assert_ne!(flags & tflag::CAN_MULTI_CONN, 0);
}

fn listed(queries: &[&str]) -> Vec<Vec<u8>> {
    let mut client = Client::new();
    client.option(opt::LIST_META_CONTEXT, &meta_data("disk", queries));
    let mut replies = client.replies();
    assert_eq!(replies.pop().unwrap().kind, rep::ACK);
    replies.into_iter().map(|reply| reply.data).collect()
}

#[test]
fn list_meta_context_knows_wildcards_and_ignores_unknown_namespaces() {
    let (base, ours) = (&b"\0\0\0\0base:allocation"[..], &b"\0\0\0\0nbd-server:residency"[..]);
    assert_eq!(listed(&[]), [base, ours]);
    assert_eq!(listed(&["base:"]), [base]);
    assert_eq!(listed(&["nbd-server:"]), [ours]);
    assert_eq!(listed(&["nbd-server:residency", "base:allocation"]), [ours, base]);
    assert_eq!(listed(&["base:allocation", "base:", "base:allocation"]), [base]);
    assert!(listed(&["", "qemu:dirty-bitmap:x", "base", "base:alloc", "base:allocation:x", ":", "BASE:"]).is_empty());
}

#[test]
fn set_meta_context_selects_by_exact_name_and_base_is_no_wildcard() {
    for (queries, expected) in [
        (&["base:allocation"][..], &[Context::Allocation][..]),
        (&["nbd-server:residency", "base:allocation"], &[Context::Residency, Context::Allocation]),
        (&["base:allocation", "base:allocation"], &[Context::Allocation]),
        (&["base:", "x:y", "base:nothing"], &[]),
        (&[], &[]),
    ] {
        let mut client = Client::new();
        client.option(opt::STRUCTURED_REPLY, &[]);
        client.option(opt::SET_META_CONTEXT, &meta_data("disk", queries));
        let ids: Vec<Vec<u8>> =
            client.replies().iter().filter(|r| r.kind == rep::META_CONTEXT).map(|r| r.data[..4].to_vec()).collect();
        assert_eq!(ids, expected.iter().map(|c| c.id().to_be_bytes().to_vec()).collect::<Vec<_>>());
        assert_eq!(client.go("disk").1.contexts, expected, "{queries:?}");
    }
}

#[test]
fn set_meta_context_without_structured_replies_is_invalid() {
    Client::new().is_refused(opt::SET_META_CONTEXT, &meta_data("disk", &["base:allocation"]), rep::ERR_INVALID);
}

#[test]
fn a_failed_set_meta_context_still_drops_the_old_selection() {
    let overrun = [&meta_data("disk", &[])[..8], &[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]].concat();
    let failures = [
        (meta_data("nobody", &["base:allocation"]), rep::ERR_UNKNOWN),
        (overrun, rep::ERR_INVALID),
        (vec![0; 70_000], rep::ERR_TOO_BIG),
    ];
    for (data, error) in failures {
        let mut client = Client::new();
        client.option(opt::STRUCTURED_REPLY, &[]);
        client.option(opt::SET_META_CONTEXT, &meta_data("disk", &["base:allocation"]));
        client.out.clear();
        client.is_refused(opt::SET_META_CONTEXT, &data, error);
        assert!(client.go("disk").1.contexts.is_empty());
    }
}

#[test]
fn a_selection_counts_only_for_the_name_it_was_made_for() {
    let mut client = Client::new();
    client.option(opt::STRUCTURED_REPLY, &[]);
    client.option(opt::SET_META_CONTEXT, &meta_data("disk", &["base:allocation"]));
    client.out.clear();
    assert!(client.go("ro").1.contexts.is_empty());
}

#[test]
fn meta_queries_that_overrun_the_option_are_invalid() {
    let good = meta_data("disk", &["base:allocation"]);
    let mut count = good.clone();
    count[8..12].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut name = good.clone();
    name[..4].copy_from_slice(&u32::MAX.to_be_bytes());
    let mut query = good.clone();
    query[12..16].copy_from_slice(&16u32.to_be_bytes());
    let longer = [&good[..], &[0]].concat();
    for data in [&count, &name, &query, &longer, &good[..11].to_vec(), &Vec::new()] {
        Client::new().is_refused(opt::LIST_META_CONTEXT, data, rep::ERR_INVALID);
    }
}

#[test]
fn garbage_where_an_option_has_to_stand_closes() {
    // qemu CVE-2017-7539.
    for garbage in [[0u8; 16], [0xff; 16], *b"GET / HTTP/1.1\r\n"] {
        let mut client = Client::new();
        assert!(closes(&client.send(&garbage)));
        assert!(client.out.is_empty());
    }
    let transmission_before_go = [&wire::REQUEST_MAGIC.to_be_bytes()[..], &[0; 24]].concat();
    assert!(closes(&Client::new().send(&transmission_before_go)));
}

#[test]
fn go_with_length_0_is_invalid_and_what_follows_is_out_of_sync() {
    // A client exists that sends GO with length 0 and then its payload anyway.
    let mut client = Client::new();
    client.is_refused(opt::GO, &[], rep::ERR_INVALID);
    assert!(closes(&client.send(&info_data("disk", &[]))));
}

#[test]
fn nothing_is_looked_up_before_a_client_names_it() {
    // nbdkit CVE-2019-14850: the backend was opened before negotiation.
    let mut client = Client::new();
    client.option(opt::LIST, &[]);
    client.option(opt::STRUCTURED_REPLY, &[]);
    client.option(opt::GO, &[]);
    assert!(client.lookups.is_empty());
}

#[test]
fn a_stopping_server_answers_err_shutdown_to_everything_but_abort() {
    let mut client = Client::new();
    client.stopping = true;
    for option in [opt::LIST, opt::INFO, opt::GO, opt::STRUCTURED_REPLY, opt::STARTTLS, 99] {
        client.is_refused(option, &[], rep::ERR_SHUTDOWN);
    }
    assert_eq!(client.option(opt::ABORT, &[]), Step::Close(Close::Aborted));
    assert_eq!(client.kinds(), [rep::ACK]);
    let mut client = Client::new();
    client.stopping = true;
    assert!(closes(&client.option(opt::EXPORT_NAME, b"disk")));
}

#[test]
fn the_conversation_is_the_same_however_the_bytes_are_cut() {
    let mut all = frame(opt::STRUCTURED_REPLY, &[]);
    all.extend(frame(99, &[7; 300]));
    all.extend(frame(opt::LIST, &[]));
    all.extend(frame(opt::SET_META_CONTEXT, &meta_data("disk", &["base:allocation"])));
    all.extend(frame(opt::INFO, &vec![0; 70_000]));
    all.extend(frame(opt::GO, &info_data("disk", &[3])));
    all.extend_from_slice(b"first request");
    let run = |step: usize| {
        let mut client = Client::new();
        let mut last = Step::NeedMore;
        for piece in all.chunks(step) {
            if matches!(last, Step::Transmit(_)) {
                client.input.extend_from_slice(piece);
            } else {
                last = client.send(piece);
            }
        }
        assert!(matches!(&last, Step::Transmit(agreed) if agreed.contexts == [Context::Allocation]));
        assert_eq!(&client.input[..], b"first request", "what came behind GO is left for the transmission");
        client.replies()
    };
    let whole = run(all.len());
    for step in [1, 2, 3, 15, 16, 17, 4096] {
        assert_eq!(run(step), whole, "in steps of {step}");
    }
}
