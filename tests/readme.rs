//! The README, as a test: its commands are run verbatim against a real server, in the order in which a newcomer meets
//! them. What is set up beforehand is what the README says it uses: `$SOCK`, `$NBD`, and an image named `disk.img`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod common;

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use common::server::TestServer;
use serde_json::{Value, json};

/// What stands behind the three backquotes of a block that is run.
const RUN: [&str; 2] = ["sh api", "sh client"];
/// Every client command.
const COMMANDS: [&str; 18] = [
    "export list",
    "export create",
    "export open",
    "export clone",
    "export status",
    "export close",
    "export cancel",
    "snapshot create",
    "snapshot list",
    "compact",
    "import",
    "export-image",
    "cache reset",
    "cache trim",
    "status",
    "attach-command",
    "completions",
    "man",
];
const IMAGE_BYTES: usize = 5 << 20;
/// How long one command may take, in seconds.
const PATIENCE_SECS: u32 = 120;

fn readme() -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap()
}

/// The content of every fenced block whose info string is one of `kinds`, in order.
fn blocks(text: &str, kinds: &[&str]) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut open: Option<(bool, String)> = None;
    for line in text.lines() {
        match (line.strip_prefix("```"), &mut open) {
            (Some(info), None) => open = Some((kinds.contains(&info), String::new())),
            (Some(_), Some(_)) => blocks.extend(open.take().filter(|(wanted, _)| *wanted).map(|(_, block)| block)),
            (None, Some((_, block))) => *block += &format!("{line}\n"),
            (None, None) => {}
        }
    }
    assert!(open.is_none(), "a block is not closed");
    blocks
}

#[test]
fn the_commands_work_as_written() {
    let server = TestServer::start(&[], &[]);
    let dir = tempfile::tempdir().unwrap();
    let image: Vec<u8> = (0..=250).cycle().take(IMAGE_BYTES).collect();
    fs::write(dir.path().join("disk.img"), &image).unwrap();
    // A refusal must fail the command, and the README should not have to say so.
    fs::write(dir.path().join(".curlrc"), "fail-with-body\nsilent\nshow-error\n").unwrap();

    let binary = Path::new(env!("CARGO_BIN_EXE_nbd-server"));
    let script = blocks(&readme(), &RUN).join("\n");
    let output = Command::new("timeout")
        .args([&PATIENCE_SECS.to_string(), "bash", "-euxo", "pipefail", "-c", &script])
        .current_dir(dir.path())
        .env("HOME", dir.path())
        .env("SOCK", server.socket())
        .env("NBD_SERVER_LOCAL_ROOT", server.local_root())
        .env("NBD_SERVER_ADMIN_SOCK", server.socket())
        .env("PATH", format!("{}:{}", binary.parent().unwrap().display(), std::env::var("PATH").unwrap()))
        .env("NBD", server.nbd_uri("").trim_end_matches('/'))
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let (said, traced) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{}\n{said}\n{traced}", output.status);

    // Not only without an error, but with the effect described.
    let mut copy = File::open(dir.path().join("copy.img")).unwrap();
    assert_eq!(copy.metadata().unwrap().len(), 1 << 30, "the whole device");
    let mut start = vec![0; IMAGE_BYTES];
    copy.read_exact(&mut start).unwrap();
    assert!(start == image, "what was copied in comes out");
    assert!(said.contains("b'hello'"), "{said}");
    assert!(fs::read(dir.path().join("backup.img")).unwrap()[4096..].starts_with(b"hello"), "what was published");
    let exports = server.ok("GET", "/v1/exports", Value::Null);
    let ids: Vec<_> = exports.as_array().unwrap().iter().map(|export| export["export_id"].clone()).collect();
    assert_eq!(Value::from(ids), json!(["db-1", "vm-1", "vm-2", "vm-3", "vm-5"]));
    let status = server.ok("GET", "/v1/exports/vm-1/status", Value::Null);
    assert_eq!((&status["snapshot_generation"], &status["dirty_chunks"]), (&2.into(), &0.into()), "{status}");
}

#[test]
fn every_command_is_shown() {
    let shown = blocks(&readme(), &["sh api"]).concat();
    for command in COMMANDS {
        let ends = |rest: &str| rest.starts_with(|c: char| c.is_whitespace());
        assert!(shown.split(&format!("nbd-server {command}")).skip(1).any(ends), "{command} is not in the README");
    }
}

#[test]
fn the_two_first_commands_start_the_server_and_run_the_tests() {
    let plain = blocks(&readme(), &["sh"]);
    assert_eq!(plain[..2], ["cargo run --release -- serve\n", "make test\n"]);
}
