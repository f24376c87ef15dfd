//! The client commands of the real binary, against a real server: what they do, what they print, how they refuse.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod common;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::moto::Moto;
use common::proxy::{Proxy, State};
use common::server::{TestServer, nbd_server, nbd_server_through, run, run_to_end};
use serde_json::{Value, json};

fn client(server: &TestServer, args: &[&str]) -> Output {
    run_to_end(nbd_server().args(args).env("NBD_SERVER_ADMIN_SOCK", server.socket()))
}

/// What a command that must succeed prints.
#[track_caller]
fn done(server: &TestServer, args: &[&str]) -> String {
    let output = client(server, args);
    let (said, error) =
        (String::from_utf8(output.stdout).unwrap(), String::from_utf8_lossy(&output.stderr).into_owned());
    assert!(output.status.success(), "{args:?}: {error}");
    assert_eq!(error, "", "{args:?}");
    said
}

#[track_caller]
fn json_of(server: &TestServer, args: &[&str]) -> Value {
    let text = done(server, &[args, &["--json"]].concat());
    assert_eq!(text.lines().count(), 1, "{text}");
    serde_json::from_str(&text).unwrap()
}

/// What a command that must fail says on stderr.
#[track_caller]
fn refused(server: &TestServer, args: &[&str], status: i32) -> String {
    let output = client(server, args);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(status), "{args:?}: {error}");
    assert!(output.stdout.is_empty(), "errors belong on stderr");
    error
}

/// Writes over NBD, so that something is dirty.
fn write(server: &TestServer, export: &str) {
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 0 64k", "-c", "flush", &server.nbd_uri(export)]);
}

#[test]
fn an_export_lives_its_life_by_commands_alone() {
    let server = TestServer::start(&[], &[]);
    assert_eq!(done(&server, &["export", "create", "vm", "16MiB"]), "created vm, 16 MiB\n");
    let small = json_of(&server, &["export", "create", "small", "4k", "--chunk-size", "4KiB"]);
    assert_eq!((&small["image_size"], &small["chunk_size"]), (&json!(4096), &json!(4096)));
    write(&server, "vm");
    let status = done(&server, &["export", "status", "vm"]);
    for line in ["name:            vm\n", "size:            16 MiB\n", "dirty:           4 MiB (1 of 4 chunks)\n"] {
        assert!(status.contains(line), "{line}\n{status}");
    }
    let free = status.lines().find_map(|line| line.strip_prefix("free on disk: ")).unwrap().trim();
    assert!(free.ends_with('B') && free != "0 B", "{status}");
    let first = done(&server, &["snapshot", "create", "vm", "-q"]);
    assert!(done(&server, &["snapshot", "create", "vm"]).contains("nothing was published"));
    let compacted = json_of(&server, &["compact", "vm"]);
    assert_eq!(compacted["generation"], 2);
    let trimmed = done(&server, &["cache", "trim", "vm"]);
    assert!(trimmed.starts_with("dropped 4 MiB from the cache of vm; free on its disk: "), "{trimmed}");
    assert_eq!(json_of(&server, &["cache", "trim", "vm"])["freed_bytes"], 0);
    assert_eq!(json_of(&server, &["export", "status", "vm"])["resident_chunks"], 0);
    assert_eq!(done(&server, &["cache", "trim", "vm", "-q"]), "vm\n");
    let listed = done(&server, &["snapshot", "list", "vm", "--quiet"]);
    assert_eq!(listed, format!("{}\n{first}", compacted["snapshot_id"].as_str().unwrap()), "newest first");
    assert!(done(&server, &["snapshot", "list", "vm"]).contains("4 MiB"));

    let clone = ["export", "clone", "vm", "old", "--snapshot", first.trim()];
    assert_eq!(done(&server, &clone), "created old as a clone of vm\n");
    assert_eq!(done(&server, &["export", "list", "-q"]), "old\nsmall\nvm\n");
    assert!(done(&server, &["export", "close", "old"]).starts_with("closed old; "));
    assert_eq!(json_of(&server, &["export", "list"]).as_array().unwrap().len(), 2);
    assert_eq!(done(&server, &["export", "open", "old", "--read-only"]), "opened old, read-only\n");
    assert_eq!(json_of(&server, &["export", "status", "old"])["read_only"], true);
    let table = done(&server, &["export", "list"]);
    assert!(table.starts_with("NAME   SIZE    CHUNK  SNAPSHOT"), "{table}");
    assert_eq!(table.lines().count(), 4);
}

#[test]
fn nothing_is_destroyed_without_a_yes() {
    let server = TestServer::start(&[], &[]);
    done(&server, &["export", "create", "vm", "16M"]);
    write(&server, "vm");
    let error = refused(&server, &["cache", "reset", "vm"], 2);
    assert!(error.contains("with 1 chunks that were never published: add --yes"), "{error}");
    // At a terminal a person is asked; the shell's own words are around what the command says.
    let binary = env!("CARGO_BIN_EXE_nbd-server");
    let at_a_terminal = |answer: &str| {
        let reset = format!("{binary} cache reset vm --admin-sock {}; echo status $?", server.socket().display());
        let script = format!("echo {answer} | script -qec '{reset}' /dev/null");
        let output = Command::new("bash").args(["-c", &script]).output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let said = at_a_terminal("n");
    assert!(said.contains("Go on? [y/N]") && said.contains("nothing was done") && said.contains("status 2"), "{said}");
    assert_eq!(json_of(&server, &["export", "status", "vm"])["dirty_chunks"], 1);
    let said = at_a_terminal("y");
    assert!(said.contains("vm is as published") && said.contains("status 0"), "{said}");
    assert_eq!(json_of(&server, &["export", "status", "vm"])["dirty_chunks"], 0);
    write(&server, "vm");
    assert_eq!(done(&server, &["cache", "reset", "vm", "--yes", "-q"]), "vm\n");
    assert_eq!(json_of(&server, &["export", "status", "vm"])["dirty_chunks"], 0);
}

#[test]
fn a_refusal_is_the_apis_own_words_and_what_to_do() {
    let mut server = TestServer::start(&[], &[]);
    let error = refused(&server, &["export", "status", "nope"], 1);
    assert!(
        error.starts_with("error: export nope is not loaded here") && error.contains("(not-found)\nhint: "),
        "{error}"
    );
    done(&server, &["export", "create", "vm", "1M"]);
    assert!(refused(&server, &["export", "create", "vm", "1M"], 1).contains("`nbd-server export open NAME`"));
    assert!(refused(&server, &["export", "clone", "vm", "b"], 1).contains("`nbd-server snapshot create NAME`"));
    // The command line itself is wrong.
    assert!(refused(&server, &["export", "create", "b", "1M", "--chunk-size", "5000"], 2).contains("power of two"));
    assert!(refused(&server, &["export", "create", "b", "10GB"], 2).contains("GiB"));
    assert!(refused(&server, &["export", "create", "..", "1G"], 2).contains(".."));
    assert!(refused(&server, &["export", "list", "--json", "-q"], 2).contains("cannot be used with"));
    let socket = server.socket();
    server.stop();
    let error = refused(&server, &["status"], 3);
    assert!(error.contains(&*socket.to_string_lossy()) && error.contains("nbd-server serve"), "{error}");
    let flag = run_to_end(nbd_server().args(["status", "--admin-sock", "/nowhere/a.sock"]));
    assert_eq!(flag.status.code(), Some(3));
    assert!(String::from_utf8_lossy(&flag.stderr).contains("/nowhere/a.sock"));
}

#[test]
fn the_server_says_how_it_is_and_how_to_attach() {
    let server = TestServer::start(&[], &[]);
    done(&server, &["export", "create", "vm", "1M"]);
    let status = json_of(&server, &["status"]);
    assert_eq!(status["exports"], json!({"ready": 1, "discovering": 0, "degraded": 0, "failed": 0}));
    assert_eq!((&status["version"], &status["connections"]), (&json!(env!("CARGO_PKG_VERSION")), &json!(0)));
    assert_eq!((&status["store"]["backend"], &status["store"]["reachable"]), (&json!("local"), &json!(true)));
    let text = done(&server, &["status"]);
    assert!(
        text.contains("exports:  1 ready, 0 degraded, 0 failed\n") && text.contains("store:    local, answers\n"),
        "{text}"
    );

    let uri = server.nbd_uri("vm");
    assert_eq!(done(&server, &["attach-command", "vm", "-q"]), format!("{uri}\n"));
    let lines = done(&server, &["attach-command", "vm"]);
    let port = server.nbd_address().rsplit(':').next().unwrap().to_owned();
    assert!(lines.contains(&format!("\nnbd-client -N vm 127.0.0.1 {port} /dev/nbd0\n")), "{lines}");
    assert!(lines.contains(&format!("-drive file={uri},format=raw,if=virtio")), "{lines}");
    let nbdinfo = lines.lines().find(|line| line.starts_with("nbdinfo ")).unwrap();
    assert!(run("bash", &["-c", nbdinfo]).contains("export-size: 1048576"));
    assert!(refused(&server, &["attach-command", "nope"], 1).contains("not-found"));
    assert_eq!(json_of(&server, &["attach-command", "vm"])[0]["uri"], uri);
}

#[test]
fn ctrl_c_gives_a_snapshot_up_and_leaves_the_export_as_before() {
    let moto = Moto::with_bucket("disks");
    let proxy = Proxy::start(&moto.endpoint());
    let server = TestServer::on_s3(&proxy.endpoint(), "disks", &["--store-timeout", "20", "--chunk-size", "1MiB"]);
    done(&server, &["export", "create", "vm", "64MiB"]);
    assert!(done(&server, &["export", "cancel", "vm"]).starts_with("nothing was given up"));
    run("qemu-io", &["-f", "raw", "-c", "write -P 7 0 32M", "-c", "flush", &server.nbd_uri("vm")]);
    // In the middle of the upload the store falls silent.
    let half_way = || {
        proxy.set_after(4 << 20, State::Frozen);
        // Whoever runs the tests without a terminal may have had SIGHUP ignored.
        let mut create = nbd_server_through(&["env".to_owned(), "--default-signal=HUP".to_owned()]);
        create.args(["snapshot", "create", "vm"]).env("NBD_SERVER_ADMIN_SOCK", server.socket());
        let child = create.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        proxy.wait_for(State::Frozen);
        child
    };
    for signal in [Some("-INT"), Some("-TERM"), None] {
        let child = half_way();
        let during = json_of(&server, &["export", "status", "vm"]);
        assert_eq!(
            (&during["operation_state"], &during["progress"]["total_bytes"]),
            (&json!("snapshotting"), &json!(32 << 20))
        );
        assert!(done(&server, &["export", "status", "vm"]).contains(" of 32 MiB\n"));
        let cancel = signal.is_none().then(|| {
            let mut cancel = nbd_server();
            cancel.args(["export", "cancel", "vm", "--json"]).env("NBD_SERVER_ADMIN_SOCK", server.socket());
            cancel.stdout(Stdio::piped()).spawn().unwrap()
        });
        if let Some(signal) = signal {
            run("kill", &[signal, &child.id().to_string()]);
        }
        // What was uploaded is removed, for which the store has to answer again.
        std::thread::sleep(std::time::Duration::from_millis(300));
        proxy.set(State::Open);
        let output = child.wait_with_output().unwrap();
        let error = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{error}");
        assert!(error.contains("as it was before: the operation was cancelled (cancelled)"), "{error}");
        if let Some(cancel) = cancel {
            assert_eq!(cancel.wait_with_output().unwrap().stdout, b"{\"cancelled\":true}\n");
        }
        let after = json_of(&server, &["export", "status", "vm"]);
        assert_eq!((&after["operation_state"], &after["dirty_chunks"]), (&json!("idle"), &json!(32)));
        assert_eq!((&after["snapshot_generation"], after.get("progress")), (&json!(0), None));
    }
    // A terminal that is lost takes the command with it, and not what the server does.
    let child = half_way();
    run("kill", &["-HUP", &child.id().to_string()]);
    assert_eq!(child.wait_with_output().unwrap().status.signal(), Some(1));
    proxy.set(State::Open);
    while json_of(&server, &["export", "status", "vm"])["operation_state"] != "idle" {
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert_eq!(json_of(&server, &["export", "status", "vm"])["snapshot_generation"], 1);
}

/// Every command of the program, as the words that name it.
fn commands() -> Vec<Vec<String>> {
    fn below(words: &[String], all: &mut Vec<Vec<String>>) {
        let help = help(words);
        all.push(words.to_vec());
        let Some((_, list)) = help.split_once("Commands:\n") else { return };
        for line in list.lines().take_while(|line| !line.is_empty()) {
            let name = line.strip_prefix("  ").filter(|line| !line.starts_with(' '));
            match name.and_then(|line| line.split_whitespace().next()) {
                Some("help") | None => {}
                Some(name) => below(&[words, &[name.to_owned()]].concat(), all),
            }
        }
    }
    let mut all = Vec::new();
    below(&[], &mut all);
    all
}

fn help(words: &[String]) -> String {
    let output = run_to_end(nbd_server().args(words).arg("--help"));
    assert!(output.status.success(), "{words:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_help_texts_are_those_of_the_golden_files() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/help");
    let commands = commands();
    assert!(commands.len() > 15, "{commands:?}");
    let mut wrong = Vec::new();
    for words in &commands {
        let name = if words.is_empty() { "nbd-server".to_owned() } else { words.join("-") };
        let (path, text) = (folder.join(name + ".txt"), help(words));
        if std::env::var_os("NBD_TEST_BLESS").is_some() {
            fs::write(&path, &text).unwrap();
        }
        if fs::read_to_string(&path).ok() != Some(text) {
            wrong.push(path);
        }
    }
    assert!(wrong.is_empty(), "changed: {wrong:#?}\nif that is meant: NBD_TEST_BLESS=1 cargo test --test client help");
    assert_eq!(fs::read_dir(folder).unwrap().count(), commands.len(), "a file of a command that is gone");
}

#[test]
fn completions_and_man_pages_know_every_command() {
    for (shell, check) in [("bash", "bash -n"), ("zsh", "true"), ("fish", "true")] {
        let output = run_to_end(nbd_server().args(["completions", shell]));
        let script = String::from_utf8(output.stdout).unwrap();
        assert!(output.status.success() && script.contains("attach-command"), "{shell}");
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("script");
        fs::write(&path, script).unwrap();
        run("bash", &["-c", &format!("{check} {}", path.display())]);
    }
    let dir = tempfile::tempdir().unwrap();
    let written = run_to_end(nbd_server().arg("man").arg(dir.path()));
    assert!(written.status.success() && written.stdout.is_empty());
    for words in commands() {
        let words = [vec!["nbd-server".to_owned()], words].concat();
        let page = fs::read_to_string(dir.path().join(words.join("-") + ".1")).unwrap();
        assert!(page.contains(".SH SYNOPSIS"), "{words:?}");
    }
    let nowhere = run_to_end(nbd_server().args(["man", "/nowhere/at/all"]));
    assert_eq!(nowhere.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&nowhere.stderr).contains("name a directory that exists"));
}
