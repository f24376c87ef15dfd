//! The examples of the man pages and the README's starts of a server, as tests: each is run verbatim.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod common;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use common::certs::Pki;
use common::images::{image, text};
use common::moto;
use common::server::{TestServer, nbd_server, run, run_to_end};
use serde_json::{Value, json};

/// How long the examples of one page may take, in seconds.
const PATIENCE_SECS: u32 = 120;

/// The man pages, as a reader sees them: name and text.
fn pages() -> Vec<(String, String)> {
    let dir = tempfile::tempdir().unwrap();
    assert!(run_to_end(nbd_server().arg("man").arg(dir.path())).status.success());
    let mut pages: Vec<_> = fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let mut groff = Command::new("groff");
            groff.args(["-man", "-Tascii", "-P-cbou", "-rLL=1000n", "-ww"]).arg(&path);
            let formatted = groff.output().expect("groff: run `make setup`, which installs it");
            let warnings = String::from_utf8_lossy(&formatted.stderr).into_owned();
            assert!(formatted.status.success() && warnings.is_empty(), "{}: {warnings}", path.display());
            let text = String::from_utf8(formatted.stdout).unwrap();
            // The last line is the page's foot.
            let text = text.trim_end().rsplit_once('\n').unwrap().0.to_owned();
            (path.file_stem().unwrap().to_str().unwrap().to_owned(), text)
        })
        .collect();
    pages.sort();
    assert!(pages.len() > 20);
    pages
}

/// The lines of a section, as they stand.
fn section(page: &str, title: &str) -> Vec<String> {
    let lines = page.lines().skip_while(|line| *line != title).skip(1);
    lines.take_while(|line| line.is_empty() || line.starts_with(' ')).map(|line| line.trim().to_owned()).collect()
}

fn examples(page: &str) -> Vec<String> {
    section(page, "EXAMPLES").into_iter().filter(|line| !line.is_empty()).collect()
}

/// A shell in which `nbd-server` is the program under test.
fn shell(dir: &Path, script: &str) -> Command {
    let binary = Path::new(env!("CARGO_BIN_EXE_nbd-server"));
    let mut command = Command::new("timeout");
    command.args([&PATIENCE_SECS.to_string(), "bash", "-euxo", "pipefail", "-c", script]).current_dir(dir);
    command.env_clear().env("HOME", dir).env("TMPDIR", dir).stdin(Stdio::null());
    command.env("PATH", format!("{}:{}", binary.parent().unwrap().display(), std::env::var("PATH").unwrap()));
    command
}

#[track_caller]
fn succeeds(command: &mut Command, what: &str) -> String {
    let output = command.output().unwrap();
    let (said, traced) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{what}: {}\n{said}\n{traced}", output.status);
    said.into_owned()
}

#[test]
fn the_examples_of_every_man_page_work_as_written() {
    let mut parents = Vec::new();
    for (name, page) in pages() {
        if !section(&page, "SUBCOMMANDS").is_empty() {
            parents.push(name);
            continue;
        }
        let lines = examples(&page);
        let own = name.strip_prefix("nbd-server-").unwrap();
        let shown = |line: &String| line.replace(' ', "-").contains(&format!("nbd-server-{own}"));
        assert!(lines.iter().any(shown), "{name} has no example of itself: {lines:?}");
        if own != "serve" {
            run_examples(&name, &lines.join("\n"));
        }
    }
    assert_eq!(
        parents,
        ["nbd-server", "nbd-server-cache", "nbd-server-config", "nbd-server-export", "nbd-server-snapshot"]
    );
}

/// Runs them where there is what they speak of: `vm-1` with two snapshots and newer data, `vm-2` in the store alone, and
/// images as files.
fn run_examples(name: &str, script: &str) {
    let server = TestServer::start(&[], &[]);
    let dir = tempfile::tempdir().unwrap();
    let raw = image(dir.path());
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&dir.path().join("disk.qcow2"))]);
    run("gzip", &["--keep", text(&raw)]);
    fs::write(dir.path().join("config.toml"), "listen = ['127.0.0.1:0']\n").unwrap();
    for id in ["vm-1", "vm-2"] {
        server.ok("POST", "/v1/exports/create", json!({"export_id": id, "size": 16 << 20}));
    }
    server.ok("DELETE", "/v1/exports/vm-2", Value::Null);
    for byte in ["1", "2", "3"] {
        let write = format!("write -P {byte} 0 64k");
        run("qemu-io", &["-f", "raw", "-c", &write, "-c", "flush", &server.nbd_uri("vm-1")]);
        if byte != "3" {
            server.ok("POST", "/v1/exports/vm-1/snapshot", Value::Null);
        }
    }
    let mut shell = shell(dir.path(), script);
    shell.env("NBD_SERVER_ADMIN_SOCK", server.socket());
    if script.contains("import") || script.contains("export-image") {
        shell.env("NBD_SERVER_LOCAL_ROOT", server.local_root());
    }
    succeeds(&mut shell, name);
}

/// What the starts of servers are run in: a network, a `/etc` and folders for state of their own, in which the addresses,
/// names and files that the examples speak of are there.
const STAGE: &str = r#"
mount -t tmpfs none /run; mount -t tmpfs none /var/lib
cp -r /etc "$HOME/etc" 2>/dev/null || true
mkdir -p "$HOME/etc/pki"; cp -r "$PKI/anonymous" "$HOME/etc/pki/nbd"
echo '127.0.0.1 localhost nbd.example.com' >"$HOME/etc/hosts"; mount --bind "$HOME/etc" /etc
cp "$PKI/server-cert.pem" server.pem; cp "$PKI/server-key.pem" server-key.pem
ip link set lo up
"$MOTO" -H 127.0.0.1 -p 9000 >/dev/null 2>&1 & moto=$! server=
trap 'kill $moto $server; wait' EXIT
until curl -sf -X PUT -H 'Host: s3.us-east-1.amazonaws.com' http://127.0.0.1:9000/my-disks; do sleep 0.1; done
export AWS_ACCESS_KEY_ID=x AWS_SECRET_ACCESS_KEY=y
serve() {
    "$@" 2>"$HOME/log" & server=$!
    until grep ready: "$HOME/log"; do kill -0 $server || { cat "$HOME/log"; exit 1; }; sleep 0.05; done
    nbd-server export create vm-1 1MiB || nbd-server export status vm-1
}
stopped() { kill $server; wait $server; server=; rm -r /var/lib/nbd-server; }
"#;

/// A script that runs lines of examples: a server must come to be ready, be there for the lines up to the next server, and
/// stop as it should.
fn staged(lines: &[&str]) -> String {
    let mut script = STAGE.to_owned();
    let mut runs = false;
    for line in lines {
        let serves = line.starts_with("nbd-server serve");
        if serves && std::mem::replace(&mut runs, true) {
            script += "stopped\n";
        }
        // The test's own endpoint in place of the provider's.
        if serves && line.contains("--bucket") && !line.contains("--endpoint-url") {
            script += "NBD_SERVER_ENDPOINT_URL=http://127.0.0.1:9000 ";
        }
        script += &format!("{}{line}\n", if serves { "serve " } else { "" });
    }
    assert!(runs, "no server in {lines:?}");
    script + "stopped\n"
}

fn run_staged(name: &str, lines: &[&str]) {
    let (dir, pki) = (tempfile::tempdir().unwrap(), Pki::new());
    fs::write(dir.path().join("config.toml"), "chunk-size = '64KiB'\n").unwrap();
    let shell = shell(dir.path(), &staged(lines));
    let mut alone = Command::new("unshare");
    alone.args(["--map-root-user", "--net", "--mount", "--"]).arg(shell.get_program()).args(shell.get_args());
    alone.envs(shell.get_envs().filter_map(|(name, value)| Some((name, value?)))).current_dir(dir.path());
    alone.env("MOTO", moto::program()).env("PKI", pki.path("")).stdin(Stdio::null());
    succeeds(&mut alone, name);
}

#[test]
fn every_server_that_the_manual_starts_comes_up() {
    let (name, page) = pages().into_iter().find(|(name, _)| name == "nbd-server-serve").unwrap();
    run_staged(&name, &examples(&page).iter().map(String::as_str).collect::<Vec<_>>());
}

#[test]
fn every_server_that_the_readme_starts_comes_up_and_serves_the_clients_shown() {
    let readme = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("README.md")).unwrap();
    let blocks = readme.split("\n```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let mut starts = 0;
    for block in blocks.filter(|block| block.contains("nbd-server serve")) {
        starts += block.matches("nbd-server serve").count();
        run_staged(block, &block.lines().collect::<Vec<_>>());
    }
    assert!(starts >= 4);
}
