//! The configuration file, with the real binary: which value counts, what is refused, and what is shown.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use common::server::{TestServer, nbd_server, run_to_end};
use serde_json::{Value, json};

/// A file `n.toml` in a directory of its own.
fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("n.toml");
    fs::write(&path, text).unwrap();
    (dir, path)
}

fn config(words: [&str; 2], dir: &Path) -> Command {
    let mut command = nbd_server();
    command.args(words).env("HOME", dir);
    command
}

/// Status, stdout, stderr.
fn run(command: &mut Command) -> (Option<i32>, String, String) {
    let output = run_to_end(command);
    let [out, err] = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    (output.status.code(), out, err)
}

#[test]
fn a_flag_goes_before_a_variable_before_the_file_before_the_default() {
    let (dir, path) = file("chunk-size = '8KiB'\nstore-timeout = 7\nlisten = ['127.0.0.1:1', '127.0.0.1:2']\n");
    let show = |flags: &[&str], variables: &[(&str, &str)]| {
        let mut command = config(["config", "show"], dir.path());
        command.arg("--config").arg(&path).args(flags).envs(variables.iter().copied());
        let (status, out, err) = run(&mut command);
        assert_eq!((status, err.as_str()), (Some(0), ""));
        out
    };
    let has = |text: &str, line: &str| assert!(text.lines().any(|l| l == line), "{line:?} is not in\n{text}");
    let from = |line: usize| format!("  # {} line {line}", path.display());

    let text = show(&[], &[]);
    has(&text, &format!("chunk-size = \"8KiB\"{}", from(1)));
    has(&text, &format!("store-timeout = 7{}", from(2)));
    has(&text, &format!("listen = [\"127.0.0.1:1\", \"127.0.0.1:2\"]{}", from(3)));
    has(&text, "export-root = \"exports\"  # default");
    has(&text, "log-level = \"info\"  # default");
    has(&text, "# bucket is not set");

    let variables = [("NBD_SERVER_CHUNK_SIZE", "16KiB"), ("NBD_SERVER_LISTEN", "127.0.0.1:3,127.0.0.1:4")];
    let text = show(&["--chunk-size=32KiB"], &variables);
    has(&text, "chunk-size = \"32KiB\"  # flag");
    let listen = "listen = [\"127.0.0.1:3\", \"127.0.0.1:4\"]  # environment variable NBD_SERVER_LISTEN";
    has(&text, listen);
    has(&text, &format!("store-timeout = 7{}", from(2)));

    // What is shown is a configuration, and the same one.
    let (again, copy) = file(&text);
    let (status, shown, err) =
        run(config(["config", "show"], again.path()).arg("--config").arg(&copy).env("HOME", dir.path()));
    assert_eq!(status, Some(0), "{err}");
    let values =
        |text: &str| text.lines().map(|line| line.split("  # ").next().unwrap().to_owned()).collect::<Vec<_>>();
    assert_eq!(values(&shown), values(&text));
}

#[test]
fn the_server_works_by_its_file() {
    let (_dir, path) = file("chunk-size = 4096\nmetrics-listen = '127.0.0.1:0'\n");
    let server = TestServer::start(&["--config", path.to_str().unwrap()], &[]);
    server.wait_for_log("metrics at http://127.0.0.1:");
    server.ok("POST", "/v1/exports/create", json!({"export_id": "vm", "size": 4097}));
    assert_eq!(server.ok("GET", "/v1/exports/vm/status", Value::Null)["chunk_count"], 2);
    let by_variable = TestServer::start(&[], &[("NBD_SERVER_CONFIG", path.to_str().unwrap())]);
    by_variable.wait_for_log("metrics at http://127.0.0.1:");
}

#[test]
fn a_file_is_checked_without_starting_anything() {
    let (dir, path) = file("storage-backend = 's3'\nbucket = 'b'\n");
    let (status, out, err) = run(config(["config", "check"], dir.path()).arg(&path));
    assert_eq!((status, out, err.as_str()), (Some(0), format!("{} can be used\n", path.display()), ""));
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was made");
}

#[test]
fn what_is_wrong_is_named_with_its_line_by_check_show_and_serve() {
    for (text, parts) in [
        ("\n\nfrobnicate = 1", &["line 3", "frobnicate", "serve --help"][..]),
        ("cache_root = '/x'", &["line 1", "cache_root", "it is called cache-root"]),
        ("config = '/x'", &["line 1", "no setting config"]),
        ("# note\nchunk-size = 5000", &["line 2", "5000", "power of two"]),
        ("chunk-size = 4096.0", &["line 1", "chunk-size is a float"]),
        ("cache-root = ['/a', '/b']", &["line 1", "cache-root has 2 values"]),
        ("listen = ['127.0.0.1:1', 'nowhere']", &["line 1", "nowhere", "unix:"]),
        ("cache-root = ''", &["line 1", "--cache-root"]),
        ("[tls]\ncert = '/x'", &["line 1", "tls is a table"]),
        ("bucket =", &["line 1", "no TOML"]),
        ("storage-backend = 's3'", &["--storage-backend s3 needs --bucket"]),
        ("tls = 'on'", &["--tls on needs --tls-cert"]),
    ] {
        let (dir, path) = file(text);
        let path = path.to_str().unwrap();
        let mut serve = nbd_server();
        serve.args(["serve", "--listen=127.0.0.1:0", "--config", path]).env("HOME", dir.path());
        for mut command in [config(["config", "check"], dir.path()), config(["config", "show"], dir.path()), serve] {
            match command.get_args().nth(1).and_then(|verb| verb.to_str()) {
                Some("check") => drop(command.arg(path)),
                Some("show") => drop(command.args(["--config", path])),
                _ => {}
            }
            let (status, out, err) = run(&mut command);
            assert_eq!((status, out.as_str()), (Some(2), ""), "{text}: {err}");
            assert!(parts.iter().all(|part| err.contains(part)), "{text}: {err}");
            assert_eq!(err.lines().count(), 1, "{err}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1, "nothing was made");
    }
    // Even where a flag overrides it.
    let (dir, path) = file("chunk-size = 5000");
    let (status, _, err) =
        run(config(["config", "show"], dir.path()).arg("--chunk-size=4096").arg("--config").arg(&path));
    assert!(status == Some(2) && err.contains("line 1"), "{err}");

    let (status, _, err) = run(config(["config", "check"], dir.path()).arg(dir.path().join("missing.toml")));
    assert!(status == Some(2) && err.contains("missing.toml cannot be read"), "{err}");
    fs::write(dir.path().join("large"), vec![b'#'; (1 << 20) + 1]).unwrap();
    let (status, _, err) = run(config(["config", "check"], dir.path()).arg(dir.path().join("large")));
    assert!(status == Some(2) && err.contains("1048576 bytes"), "{err}");
}

#[test]
fn no_secret_is_shown() {
    let (dir, path) = file("storage-backend = 's3'\nbucket = 'b'\nendpoint-url = 'http://me:hunter2@host'\n");
    let keys = [("AWS_ACCESS_KEY_ID", "AKIAIDENTITY"), ("AWS_SECRET_ACCESS_KEY", "hunter2")];
    let (status, out, err) = run(config(["config", "show"], dir.path()).arg("--config").arg(&path).envs(keys));
    assert_eq!(status, Some(0), "{err}");
    assert!(!out.contains("hunter2") && out.contains("endpoint-url = \"…@…\""), "{out}");
}

/// A value for each flag that is not its default, and what else it needs to have a meaning.
const VALUES: [(&str, &str, &[&str]); 21] = [
    ("--cache-root", "/x/cache", &[]),
    ("--listen", "127.0.0.1:7", &[]),
    ("--tls", "on", &["--tls-cert=/x/c.pem", "--tls-key=/x/k.pem"]),
    ("--tls-cert", "/x/c.pem", &["--tls=on", "--tls-key=/x/k.pem"]),
    ("--tls-key", "/x/k.pem", &["--tls=on", "--tls-cert=/x/c.pem"]),
    ("--tls-client-ca", "/x/ca.pem", &["--tls=on", "--tls-cert=/x/c.pem", "--tls-key=/x/k.pem"]),
    ("--admin-sock", "/x/admin.sock", &[]),
    ("--admin-group", "disks", &[]),
    ("--metrics-listen", "127.0.0.1:9464", &[]),
    ("--chunk-size", "64KiB", &[]),
    ("--export-root", "here", &[]),
    ("--storage-backend", "memory", &[]),
    ("--local-root", "/x/store", &[]),
    ("--bucket", "disks", &["--storage-backend=gcs"]),
    ("--endpoint-url", "http://127.0.0.1:9", &["--storage-backend=s3", "--bucket=disks"]),
    ("--region", "eu-central-1", &["--storage-backend=s3", "--bucket=disks"]),
    ("--r2-account-id", "0123456789abcdef0123456789abcdef", &["--storage-backend=r2", "--bucket=disks"]),
    ("--store-timeout", "7", &[]),
    ("--publish-memory", "64MiB", &[]),
    ("--log-level", "debug", &[]),
    ("--log-format", "json", &[]),
];

#[test]
fn every_setting_is_taken_as_flag_as_variable_and_from_the_file() {
    let show = |args: &[&str], env: Option<(&str, &str)>| {
        let home = tempfile::tempdir().unwrap();
        let mut command = config(["config", "show"], home.path());
        let (status, out, err) = run(command.args(args).envs(env));
        assert_eq!(status, Some(0), "{err}");
        out
    };
    let switch = ("--allow-unsafe-store", "true", &[][..]);
    for (flag, value, others) in VALUES.into_iter().chain([switch]) {
        let key = flag.trim_start_matches("--");
        let variable = format!("NBD_SERVER_{}", key.to_uppercase().replace('-', "_"));
        let given = if value.parse::<u64>().is_ok() { value.to_owned() } else { format!("{value:?}") };
        let (_dir, path) = file(&format!("{key} = {given}\n"));
        let shown = if key == "listen" { format!("[{given}]") } else { given };
        let (as_flag, from_file) = (format!("{flag}={value}"), format!("--config={}", path.display()));
        for (arg, env, whence) in [
            (Some(&as_flag), None, "flag".to_owned()),
            (None, Some((&*variable, value)), format!("environment variable {variable}")),
            (Some(&from_file), None, format!("{} line 1", path.display())),
        ] {
            let args: Vec<&str> = arg.map(String::as_str).into_iter().chain(others.iter().copied()).collect();
            let text = show(&args, env);
            let line = format!("{key} = {shown}  # {whence}");
            assert!(text.lines().any(|shown| shown == line), "{line:?} is not in\n{text}");
        }
    }
}

/// The file takes all that `serve` takes: whoever adds a flag adds a setting.
#[test]
fn every_flag_of_serve_is_a_setting() {
    let dir = tempfile::tempdir().unwrap();
    let (_, help, _) = run(nbd_server().args(["serve", "--help"]));
    let flags: Vec<_> = help
        .lines()
        .filter_map(|line| line.trim_start().strip_prefix("--"))
        .filter_map(|line| line.split([' ', '\n', '[']).next())
        .filter(|flag| !["config", "help"].contains(flag))
        .collect();
    assert!(flags.len() > 15, "{flags:?}");
    let (_, shown, _) = run(&mut config(["config", "show"], dir.path()));
    for flag in flags {
        let tried = VALUES.iter().any(|(tried, ..)| tried.trim_start_matches("--") == flag);
        assert!(tried || flag == "allow-unsafe-store", "{flag} is not tried above");
        let named = |line: &str| line.starts_with(&format!("{flag} = ")) || line == format!("# {flag} is not set");
        assert!(shown.lines().any(named), "{flag} is not in\n{shown}");
    }
}
