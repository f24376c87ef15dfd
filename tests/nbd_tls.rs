//! TLS over sockets: what libnbd's and qemu's clients and a raw one get, what they are refused, and that nothing said in
//! plaintext counts inside.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod common;

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::{Command, Output};
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::certs::Pki;
use common::nbd::{DISK_BYTES, MIB, Raw, Served, frame, go_data, scratch};
use common::server::TestServer;
use nbd_server::nbd::tls::{Tls, TlsConfig, TlsError};
use nbd_server::nbd::wire::{Mode, cmd, opt, rep};
use nbd_server::nbd::{Limits, ListenAddr};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::version::{TLS12, TLS13};
use rustls::{ClientConfig, ClientConnection, ProtocolVersion, RootCertStore, StreamOwned, SupportedProtocolVersion};

fn served(tls: TlsConfig) -> Served {
    served_with(Limits::default(), tls)
}

fn served_with(limits: Limits, tls: TlsConfig) -> Served {
    Served::start_with_tls(limits, Some(tls), &"127.0.0.1:0".parse().unwrap(), common::nbd::registry)
}

/// The URI of an export over TLS, for a client with the files in `dir`.
fn secure(uri: &str, dir: &str) -> String {
    let query = if uri.contains('?') { '&' } else { '?' };
    format!("{}{query}tls-certificates={dir}", uri.replacen("nbd", "nbds", 1))
}

fn output(program: &str, args: &[&str]) -> Output {
    Command::new("timeout").args(["-k", "5", "60", program]).args(args).output().unwrap()
}

#[track_caller]
fn works(program: &str, args: &[&str]) -> String {
    let output = output(program, args);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {}\n{out}\n{err}", output.status);
    out.into_owned()
}

/// The client fails by itself, without waiting for a deadline; what it said.
#[track_caller]
fn fails(program: &str, args: &[&str]) -> String {
    let begun = Instant::now();
    let output = output(program, args);
    let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert_eq!(output.status.code(), Some(1), "{program} {args:?}: {said}");
    assert!(begun.elapsed() < Duration::from_secs(8), "it was refused, not left waiting: {said}");
    said
}

type Session = StreamOwned<ClientConnection, TcpStream>;

/// Takes a raw client through STARTTLS, behind which `injected` is sent in plaintext.
fn start_tls(mut raw: Raw, pki: &Pki, version: &'static SupportedProtocolVersion, injected: &[u8]) -> Raw<Session> {
    raw.send(&[&frame(opt::STARTTLS, &[]), injected].concat());
    assert_eq!(raw.option_replies(opt::STARTTLS), [(rep::ACK, Vec::new())]);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(pki.path("ca-cert.pem")).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let session = ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap();
    let mut stream = StreamOwned::new(session, raw.stream);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock).unwrap();
    }
    Raw { stream, mode: Mode::Simple }
}

#[test]
fn nbdinfo_and_nbdcopy_work_over_tls_with_client_certificates() {
    let pki = Pki::new();
    let served = served(pki.strict_server());
    let uri = secure(&served.uri("disk"), &pki.known());
    let info: serde_json::Value = serde_json::from_str(&works("nbdinfo", &["--json", &uri])).unwrap();
    assert_eq!((&info["TLS"], &info["structured"]), (&true.into(), &true.into()));
    assert_eq!(info["exports"][0]["export-size"], DISK_BYTES);
    assert_eq!(info["exports"][0]["can_multi_conn"], true);
    let list = works("nbdinfo", &["--list", &secure(&served.uri(""), &pki.known())]);
    assert!(list.contains("export=\"disk2\""), "{list}");

    let (_dir, path) = scratch("image");
    let image: Vec<u8> = (0..16 * MIB / 8).flat_map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes()).collect();
    fs::write(&path, &image).unwrap();
    works("nbdcopy", &["--connections=4", "--flush", path.to_str().unwrap(), &uri]);
    let (_out, back) = scratch("back");
    works("nbdcopy", &["--connections=4", &uri, back.to_str().unwrap()]);
    assert!(fs::read(&back).unwrap()[..image.len()] == image);
}

#[test]
fn tls_works_over_a_unix_socket() {
    let pki = Pki::new();
    let (_guard, socket) = scratch("nbd.sock");
    let addr = ListenAddr::Unix(socket);
    let served = Served::start_with_tls(Limits::default(), Some(pki.server(true)), &addr, common::nbd::registry);
    let uri = format!("{}&tls-hostname=localhost", secure(&served.uri("disk"), &pki.anonymous()));
    assert_eq!(works("nbdinfo", &["--size", &uri]).trim(), DISK_BYTES.to_string());
}

fn qemu(served: &Served, dir: &str, priority: &str) -> [String; 3] {
    let addr = served.host_port();
    let (host, port) = addr.rsplit_once(':').unwrap();
    [
        format!("tls-creds-x509,id=tls,endpoint=client,dir={dir}{priority}"),
        "--image-opts".to_owned(),
        format!("driver=nbd,host={host},port={port},export=disk,tls-creds=tls"),
    ]
}

#[test]
fn qemu_img_and_qemu_io_work_over_tls() {
    let pki = Pki::new();
    let served = served(pki.strict_server());
    let [object, opts, image] = qemu(&served, &pki.known(), "");
    let info = works("qemu-img", &["info", "--output=json", "--object", &object, &opts, &image]);
    assert!(info.contains(&format!("\"virtual-size\": {DISK_BYTES}")), "{info}");
    let commands = ["write -P 0x5a 1M 3M", "flush", "read -P 0x5a 1M 3M", "write -z 2M 64k", "read -P 0 2M 64k"];
    let commands: Vec<&str> = commands.iter().flat_map(|command| ["-c", command]).collect();
    works("qemu-io", &[&["--object", &object, &opts][..], &commands, &[&image]].concat());
    // What was written inside is what another connection reads.
    let said = works("qemu-io", &["--object", &object, &opts, "-c", "read -P 0x5a 1M 1M", &image]);
    assert!(!said.contains("failed"), "{said}");
}

#[test]
fn tls_1_2_and_1_3_alone_are_enough_and_1_1_is_too_old() {
    let pki = Pki::new();
    let served = served(pki.server(true));
    for (priority, fits) in [("1.2", true), ("1.3", true), ("1.1", false)] {
        let [object, opts, image] =
            qemu(&served, &pki.anonymous(), &format!(",priority=NORMAL:-VERS-ALL:+VERS-TLS{priority}"));
        let args = ["info", "--object", &object, &opts, &image];
        if fits { drop(works("qemu-img", &args)) } else { drop(fails("qemu-img", &args)) }
    }
    for (version, negotiated) in [(&TLS12, ProtocolVersion::TLSv1_2), (&TLS13, ProtocolVersion::TLSv1_3)] {
        let raw = start_tls(Raw::connect(&served), &pki, version, &[]);
        assert_eq!(raw.stream.conn.protocol_version(), Some(negotiated));
    }
}

#[test]
fn every_mode_reads_and_writes_over_tls() {
    let pki = Pki::new();
    let served = served(pki.server(true));
    for (mode, version) in [(Mode::Simple, &TLS12), (Mode::Structured, &TLS13), (Mode::Extended, &TLS13)] {
        let mut client = start_tls(Raw::connect(&served), &pki, version, &[]);
        client.negotiate("disk", mode);
        let bytes: Vec<u8> = (0..3 * MIB + 511).map(|n| u8::try_from(n % 251).unwrap()).collect();
        assert_eq!(client.write(4097, &bytes).errno, 0);
        assert!(client.read(4097, bytes.len() as u64) == bytes);
        assert_eq!(client.call(0, cmd::FLUSH, 0, 0, &[]).errno, 0);
        // The longest read there is, most of it zeros.
        assert!(client.read(0, 32 * MIB)[4097..4097 + bytes.len()] == bytes);
        // An orderly end: nothing was cut off inside TLS.
        client.send(&client.encode(0, cmd::DISC, 1, 0, 0));
        assert_eq!(client.stream.read(&mut [0; 1]).unwrap(), 0, "the close is announced");
    }
}

#[test]
fn where_tls_is_required_plaintext_clients_are_turned_away() {
    let pki = Pki::new();
    let served = served(pki.server(true));
    let said = fails("nbdinfo", &["--size", &served.uri("disk")]);
    assert!(said.contains("TLS"), "{said}");
    fails("nbdinfo", &["--list", &served.uri("")]);
    fails("qemu-img", &["info", &served.uri("disk")]);
    let mut raw = Raw::connect(&served);
    for (option, data) in [(opt::GO, go_data("disk")), (opt::LIST, vec![7; 100_000]), (99, vec![1; 300])] {
        let replies = raw.option(option, &data);
        assert_eq!((replies.len(), replies[0].0), (1, rep::ERR_TLS_REQD), "option {option}");
    }
    // In sync after all that, and inside it is TLS_REQD no more.
    let mut client = start_tls(raw, &pki, &TLS13, &[]);
    assert_eq!(client.option(opt::GO, &go_data("nobody"))[0].0, rep::ERR_UNKNOWN);
    assert_eq!(client.option(opt::STARTTLS, &[])[0].0, rep::ERR_INVALID);
    client.negotiate("disk", Mode::Extended);
    let mut raw = Raw::connect(&served);
    raw.send(&frame(opt::EXPORT_NAME, b"disk"));
    assert!(raw.is_closed());
}

#[test]
fn where_tls_is_on_offer_both_kinds_of_clients_are_served() {
    let pki = Pki::new();
    let served = served(pki.server(false));
    assert_eq!(works("nbdinfo", &["--size", &served.uri("disk")]).trim(), DISK_BYTES.to_string());
    let uri = secure(&served.uri("disk"), &pki.anonymous());
    assert_eq!(works("nbdinfo", &["--size", &uri]).trim(), DISK_BYTES.to_string());
    let mut plain = Raw::attach(&served, "disk", Mode::Simple);
    let mut encrypted = start_tls(Raw::connect(&served), &pki, &TLS13, &[]);
    encrypted.negotiate("disk", Mode::Structured);
    assert_eq!(encrypted.write(0, &[9; 4096]).errno, 0);
    assert_eq!(plain.read(0, 4096), [9; 4096]);
}

#[test]
fn without_tls_a_client_that_insists_on_it_fails_at_once() {
    let pki = Pki::new();
    let served = Served::new();
    fails("nbdinfo", &["--size", &secure(&served.uri("disk"), &pki.anonymous())]);
    assert_eq!(Raw::connect(&served).option(opt::STARTTLS, &[])[0].0, rep::ERR_UNSUP);
}

#[test]
fn a_wrong_ca_is_refused_on_either_side() {
    let (ours, theirs) = (Pki::new(), Pki::new());
    let served = served(ours.strict_server());
    let uri = |dir: &str| secure(&served.uri("disk"), dir);
    // The client does not trust the server, unless told not to look.
    fails("nbdinfo", &["--size", &uri(&theirs.known())]);
    // The server does not trust the client: one without a certificate, and one of another CA.
    fails("nbdinfo", &["--size", &uri(&ours.anonymous())]);
    fs::copy(ours.path("ca-cert.pem"), theirs.path("known/ca-cert.pem")).unwrap();
    fails("nbdinfo", &["--size", &uri(&theirs.known())]);
    let [object, opts, image] = qemu(&served, &ours.anonymous(), "");
    fails("qemu-img", &["info", "--object", &object, &opts, &image]);
    // Nobody else noticed.
    works("nbdinfo", &["--size", &uri(&ours.known())]);
}

#[test]
fn a_client_that_does_not_verify_its_peer_gets_in_with_any_ca() {
    let (ours, theirs) = (Pki::new(), Pki::new());
    let served = served(ours.server(true));
    let uri = secure(&served.uri("disk"), &theirs.anonymous());
    fails("nbdinfo", &["--size", &uri]);
    let careless = "import nbd, sys\n\
        h = nbd.NBD()\n\
        h.set_tls(nbd.TLS_REQUIRE)\n\
        h.set_tls_verify_peer(False)\n\
        h.set_uri_allow_local_file(True)\n\
        h.connect_uri(sys.argv[1])\n\
        print(h.get_size())";
    assert_eq!(works("/usr/bin/python3", &["-c", careless, &uri]).trim(), DISK_BYTES.to_string());
}

#[test]
fn plaintext_injected_behind_starttls_is_never_heard() {
    let pki = Pki::new();
    for required in [false, true] {
        let served = served(pki.server(required));
        let injected = [frame(opt::EXTENDED_HEADERS, &[]), frame(opt::LIST, &[]), frame(99, b"x")].concat();
        let mut client = start_tls(Raw::connect(&served), &pki, &TLS13, &injected);
        // No stray reply, and no state: contexts would need what was injected.
        let replies = client.option(opt::SET_META_CONTEXT, &common::nbd::meta_data("disk", &["base:allocation"]));
        assert_eq!(replies[0].0, rep::ERR_INVALID);
        client.negotiate("disk", Mode::Simple);
        assert_eq!(client.read(0, 512), [0; 512]);
    }
}

#[test]
fn what_was_negotiated_in_plaintext_is_forgotten() {
    let pki = Pki::new();
    let served = served(pki.server(false));
    let mut raw = Raw::connect(&served);
    assert_eq!(raw.option(opt::EXTENDED_HEADERS, &[])[0].0, rep::ACK);
    let mut client = start_tls(raw, &pki, &TLS12, &[]);
    // With extended headers in force this would be EXT_HEADER_REQD.
    client.negotiate("disk", Mode::Structured);
    assert_eq!(client.read(0, 512), [0; 512]);
}

#[test]
fn a_failed_tls_handshake_closes_and_harms_nobody() {
    let pki = Pki::new();
    let served = served(pki.server(false));
    let mut other = Raw::attach(&served, "disk", Mode::Simple);
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 70_000], &frame(opt::LIST, &[])] {
        let mut raw = Raw::connect(&served);
        assert_eq!(raw.option(opt::STARTTLS, &[])[0].0, rep::ACK);
        // It may close before all of it was sent.
        let _ = raw.stream.write_all(garbage);
        assert!(raw.is_closed());
    }
    assert_eq!(other.read(0, 512), [0; 512]);
}

#[test]
fn the_deadline_of_the_handshake_covers_that_of_tls() {
    let pki = Pki::new();
    let limits = Limits { handshake: Duration::from_millis(500), ..Limits::default() };
    let served = served_with(limits, pki.server(true));
    let begun = Instant::now();
    let mut raw = Raw::connect(&served);
    assert_eq!(raw.option(opt::STARTTLS, &[])[0].0, rep::ACK);
    // The start of a ClientHello that never ends.
    raw.send(&[0x16, 3, 1, 2, 0, 1]);
    assert!(raw.is_closed());
    assert!(begun.elapsed() >= Duration::from_millis(400) && begun.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_stop_does_not_wait_for_a_tls_handshake_and_answers_what_was_accepted_inside() {
    let pki = Pki::new();
    let served = served(pki.server(true));
    let mut slow = Raw::connect(&served);
    assert_eq!(slow.option(opt::STARTTLS, &[])[0].0, rep::ACK);
    let mut client = start_tls(Raw::connect(&served), &pki, &TLS13, &[]);
    client.negotiate("disk", Mode::Simple);
    assert_eq!(client.write(0, &[5; 4096]).errno, 0);
    let begun = Instant::now();
    served.tell_to_stop();
    assert_eq!(client.stream.read(&mut [0; 1]).unwrap(), 0, "an announced end");
    drop(client);
    served.wait();
    assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn files_that_do_not_serve_are_refused_by_flag_and_path() {
    let (pki, other) = (Pki::new(), Pki::new());
    let good = pki.strict_server();
    let junk = pki.path("junk.pem");
    fs::write(&junk, "-----BEGIN CERTIFICATE-----\nAAAA\n").unwrap();
    let large = pki.path("large.pem");
    fs::write(&large, vec![b'\n'; (1 << 20) + 1]).unwrap();
    for (config, parts) in [
        (TlsConfig { cert: pki.path("none"), ..good.clone() }, ["--tls-cert", "none", "cannot be read"]),
        (TlsConfig { key: pki.path("none"), ..good.clone() }, ["--tls-key", "none", "cannot be read"]),
        (
            TlsConfig { client_ca: Some(pki.path("none")), ..good.clone() },
            ["--tls-client-ca", "none", "cannot be read"],
        ),
        (
            TlsConfig { cert: good.key.clone(), ..good.clone() },
            ["--tls-cert", "server-key.pem", "holds no certificate"],
        ),
        (TlsConfig { key: good.cert.clone(), ..good.clone() }, ["--tls-key", "server-cert.pem", "holds no key"]),
        (TlsConfig { cert: junk, ..good.clone() }, ["--tls-cert", "junk.pem", "is damaged"]),
        (TlsConfig { cert: large, ..good.clone() }, ["--tls-cert", "large.pem", "more than 1048576 bytes"]),
        (TlsConfig { key: other.path("server-key.pem"), ..good.clone() }, ["--tls-cert", "--tls-key", "its own key"]),
    ] {
        let refused: TlsError = Tls::load(config).await.map(drop).unwrap_err();
        let text = refused.to_string();
        parts.iter().for_each(|part| assert!(text.contains(part), "{part:?} is not in {text}"));
    }
}

/// A server whose certificates lie in its own directory, to be replaced.
fn reloading(pki: &Pki) -> (tempfile::TempDir, TestServer) {
    let dir = tempfile::tempdir().unwrap();
    pki.copy_server_files_to(dir.path());
    let file = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
    let flags = [format!("--tls-cert={}", file("server-cert.pem")), format!("--tls-key={}", file("server-key.pem"))];
    let server = TestServer::start(&["--tls=required", &flags[0], &flags[1]], &[]);
    server.ok("POST", "/v1/exports/create", serde_json::json!({"export_id": "vm", "size": 1 << 20}));
    (dir, server)
}

#[test]
fn sighup_brings_new_certificates_and_a_broken_one_keeps_the_old() {
    let (old, new) = (Pki::new(), Pki::new());
    let (dir, mut server) = reloading(&old);
    let uri = |pki: &Pki| format!("{}?tls-certificates={}", server.nbd_uri("vm"), pki.anonymous());
    let (old_uri, new_uri) = (uri(&old), uri(&new));
    assert!(old_uri.starts_with("nbds://"), "the ready line says so: {old_uri}");
    works("nbdinfo", &["--size", &old_uri]);
    fails("nbdinfo", &["--size", &new_uri]);
    let host_port = old_uri.strip_prefix("nbds://").unwrap().split('/').next().unwrap();
    let mut connected = start_tls(Raw::connect_to(host_port), &old, &TLS13, &[]);
    connected.negotiate("vm", Mode::Simple);

    // Half of a replacement: the certificate without its key.
    fs::copy(new.path("server-cert.pem"), dir.path().join("server-cert.pem")).unwrap();
    server.signal(1);
    let line = server.wait_for_log("the TLS certificates in use stay");
    assert!(line.contains("ERROR") && line.contains("server-cert.pem") && line.contains("server-key.pem"), "{line}");
    works("nbdinfo", &["--size", &old_uri]);

    new.copy_server_files_to(dir.path());
    server.signal(1);
    server.wait_for_log("SIGHUP: new clients get the certificate in ");
    works("nbdinfo", &["--size", &new_uri]);
    fails("nbdinfo", &["--size", &old_uri]);
    assert_eq!(connected.write(0, &[1; 512]).errno, 0, "who is connected stays");
    assert_eq!(connected.read(0, 512), [1; 512]);
    server.stop();
}

#[test]
fn sighup_without_tls_ends_nothing() {
    let mut server = TestServer::start(&[], &[]);
    server.signal(1);
    server.wait_for_log("no certificates to read again");
    server.stop();
}
