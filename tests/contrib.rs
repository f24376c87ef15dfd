//! What `contrib/` hands to operators fits the program: units, package, image, alerts, dashboard.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod common;

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use common::nbd::Raw;
use common::server::{TestServer, nbd_server, run_to_end};
use nbd_server::nbd::wire::Mode;
use serde_json::{Value, json};

fn contrib(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("contrib").join(name)
}

fn read(name: &str) -> String {
    fs::read_to_string(contrib(name)).unwrap()
}

#[track_caller]
fn succeeds(command: &mut Command) -> String {
    let Output { status, stdout, stderr } =
        command.output().unwrap_or_else(|e| panic!("{command:?}: {e}; `make test` installs what is missing"));
    let said = [stdout, stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    assert!(status.success(), "{command:?}: {said}");
    said
}

/// The values of a key in a unit or a Dockerfile.
fn values<'a>(text: &'a str, key: &str) -> Vec<&'a str> {
    text.lines().filter_map(|line| line.strip_prefix(key)).map(str::trim).collect()
}

/// The package, built around the program under test and unpacked.
fn unpacked() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let package = common::package::build(dir.path());
    succeeds(Command::new("dpkg-deb").arg("-x").arg(&package).arg(dir.path().join("root")));
    succeeds(Command::new("dpkg-deb").arg("-e").arg(&package).arg(dir.path().join("control")));
    dir
}

#[test]
fn the_package_holds_a_service_that_starts_as_its_unit_says() {
    let dir = unpacked();
    let root = dir.path().join("root");
    for (name, mode) in [
        ("usr/bin/nbd-server", 0o755),
        ("lib/systemd/system/nbd-server.service", 0o644),
        ("lib/systemd/system/nbd-server.socket", 0o644),
        ("usr/lib/sysusers.d/nbd-server.conf", 0o644),
        ("etc/nbd-server/config.toml", 0o644),
        ("usr/share/doc/nbd-server-objects/operations.md", 0o644),
        ("usr/share/doc/nbd-server-objects/THIRD-PARTY-LICENSES", 0o644),
        ("usr/share/man/man1/nbd-server-serve.1", 0o644),
        ("usr/share/bash-completion/completions/nbd-server", 0o644),
    ] {
        assert_eq!(fs::metadata(root.join(name)).unwrap().permissions().mode() & 0o777, mode, "{name}");
    }
    let control = fs::read_to_string(dir.path().join("control/control")).unwrap();
    assert!(control.contains(concat!("Version: ", env!("CARGO_PKG_VERSION"), "-1\n")), "{control}");
    for script in ["postinst", "prerm", "postrm"] {
        succeeds(Command::new("sh").arg("-n").arg(dir.path().join("control").join(script)));
    }

    // As ExecStart has it, in the folder instead of in the system; what is of the system is overridden by variables.
    let unit = fs::read_to_string(root.join("lib/systemd/system/nbd-server.service")).unwrap();
    let [start] = values(&unit, "ExecStart=")[..] else { panic!("{unit}") };
    let mut words = start.split(' ').map(|word| match word.strip_prefix('/') {
        Some(path) => root.join(path).display().to_string(),
        None => word.to_owned(),
    });
    let program = words.next().unwrap();
    assert_eq!(program, root.join("usr/bin/nbd-server").display().to_string());
    let state = dir.path().join("state");
    let output = run_to_end(
        Command::new(&program)
            .args(["config", "show"])
            .args(words.skip(1))
            .env_clear()
            .env("NBD_SERVER_CACHE_ROOT", state.join("cache")),
    );
    let said = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for setting in ["admin-group = \"nbd-server\"", "admin-sock = \"/run/nbd-server/nbd-server.sock\"", "environment"] {
        assert!(said.contains(setting), "{setting} is not in\n{said}");
    }
    let config = root.join("etc/nbd-server/config.toml");
    let config = config.to_str().unwrap();
    let mut server = TestServer::start(&["--config", config], &[("NBD_SERVER_ADMIN_GROUP", "")]);
    server.ok("POST", "/v1/exports/create", json!({"export_id": "vm", "size": 4096}));
    server.stop();
}

#[test]
fn the_package_names_every_crate_in_the_program_with_its_licence_and_the_text() {
    let dir = tempfile::tempdir().unwrap();
    let notices = dir.path().join("notices");
    common::package::write_notices(&notices);
    let notices = fs::read_to_string(notices).unwrap();
    let mut named = std::collections::BTreeMap::<String, Vec<String>>::new();
    for group in notices.split(&format!("\n{}\n", "=".repeat(78))).skip(1) {
        let (names, text) = group.split_once(&format!("\n{}\n", "-".repeat(78))).unwrap();
        for name in names.lines() {
            let (name, licence) = name.split_once(" (").unwrap();
            assert!(licence.ends_with(')'), "{name} ({licence}");
            named.entry(name.to_owned()).or_default().push(text.to_owned());
        }
    }
    let mut tree = Command::new(env!("CARGO"));
    tree.args(["tree", "--locked", "--offline", "--edges", "normal,no-proc-macro", "--prefix", "none"]);
    let crates = succeeds(tree.args(["--format", "{p}"]).current_dir(env!("CARGO_MANIFEST_DIR")));
    let crates =
        crates.lines().skip(1).map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" ").replace(" v", " "));
    let crates = crates.collect::<std::collections::BTreeSet<_>>();
    assert!(crates.len() > 100, "{crates:?}");
    let has_text = |texts: &Vec<String>| texts.iter().any(|text| text.len() > 500);
    let missing = crates.iter().filter(|name| !named.get(*name).is_some_and(has_text)).collect::<Vec<_>>();
    assert!(missing.is_empty(), "{missing:?}");
    // The C code in them, too.
    let allocator = named.iter().find(|(name, _)| name.starts_with("libmimalloc-sys ")).unwrap().1;
    assert!(allocator.iter().any(|text| text.contains("Microsoft")), "{allocator:?}");
    assert!(named.keys().any(|name| name.starts_with("std ")));
}

#[test]
fn systemd_finds_nothing_wrong_with_the_units() {
    let dir = unpacked();
    let units = dir.path().join("root/lib/systemd/system");
    // The program is not installed here: its place in the package stands for its place in the system.
    let service = fs::read_to_string(units.join("nbd-server.service")).unwrap();
    let here = dir.path().join("root/usr/bin/nbd-server").display().to_string();
    fs::write(units.join("nbd-server.service"), service.replace("/usr/bin/nbd-server", &here)).unwrap();
    let verified = Command::new("systemd-analyze")
        .args(["verify", "--man=no", "--recursive-errors=no"])
        .args(["nbd-server.service", "nbd-server.socket"].map(|unit| units.join(unit)))
        .output()
        .expect("systemd-analyze: run `make test`, which installs it");
    let said = String::from_utf8_lossy(&verified.stderr).into_owned();
    let about_ours: Vec<_> = said.lines().filter(|line| line.contains("nbd-server")).collect();
    assert!(verified.status.success() && about_ours.is_empty(), "{said}");

    let seconds = |key: &str| {
        let text = values(&service, key)[0].to_owned();
        match text.strip_suffix("min") {
            Some(minutes) => minutes.parse::<u64>().unwrap() * 60,
            None => text.parse().unwrap(),
        }
    };
    assert!(seconds("TimeoutStopSec=") > nbd_server::server::DRAIN_TIMEOUT.as_secs());
    assert!(seconds("WatchdogSec=") >= 10);
}

#[test]
fn the_image_copies_what_exists_and_runs_what_the_program_takes() {
    let text = read("Dockerfile");
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut copied = 0;
    for copy in values(&text, "COPY ").into_iter().filter(|copy| !copy.starts_with("--from")) {
        let words: Vec<_> = copy.split(' ').collect();
        for source in &words[..words.len() - 1] {
            assert!(repository.join(source).exists(), "COPY {source}");
            copied += 1;
        }
    }
    assert!(copied >= 3, "{text}");
    let [command] = values(&text, "CMD ")[..] else { panic!("{text}") };
    let command: Vec<String> = serde_json::from_str(command).unwrap();
    assert_eq!(command[0], "serve");
    let environment = text.split("\nENV ").nth(1).unwrap().split("\nVOLUME").next().unwrap().replace('\\', " ");
    let environment: Vec<_> = environment.split_whitespace().map(|pair| pair.split_once('=').unwrap()).collect();
    assert!(environment.len() >= 3);
    let output =
        run_to_end(nbd_server().args(["config", "show"]).args(&command[1..]).envs(environment.iter().copied()));
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    for (name, value) in environment {
        assert!(shown.contains(&format!("\"{value}\"  # environment variable {name}")), "{name}: {shown}");
    }
}

/// Every name of a metric in a text.
fn metrics_in(text: &str) -> BTreeSet<String> {
    let name = |c: char| c.is_ascii_lowercase() || c == '_';
    text.split(|c| !name(c)).filter(|word| word.starts_with("nbd_server_")).map(str::to_owned).collect()
}

#[test]
fn alerts_and_dashboard_use_only_metrics_that_exist() {
    let server = TestServer::start(&[], &[]);
    server.ok("POST", "/v1/exports/create", json!({"export_id": "vm", "size": 4096}));
    Raw::connect_to(&server.nbd_address()).negotiate("vm", Mode::Simple);
    let mut client = Raw::connect_to(&server.nbd_address());
    client.negotiate("vm", Mode::Simple);
    client.write(0, &[1; 4096]);
    let page = String::from_utf8(server.http("GET", "/metrics", "").body).unwrap();
    let sample_names = page.lines().filter(|line| !line.starts_with('#')).collect::<Vec<_>>().join("\n");
    let exist = metrics_in(&sample_names);
    assert!(exist.len() > 30, "{exist:?}");
    for (file, least) in [("prometheus/alerts.yml", 5), ("grafana/nbd-server.json", 15)] {
        let used = metrics_in(&read(file));
        assert!(used.len() >= least, "{file}: {used:?}");
        let unknown: Vec<_> = used.difference(&exist).collect();
        assert!(unknown.is_empty(), "{file} uses {unknown:?}");
    }
    // Labels, too: each that an expression selects by is on the page.
    for file in ["prometheus/alerts.yml", "grafana/nbd-server.json"] {
        let text = read(file).replace("\\\"", "\"");
        for label in ["outcome=\"error\"", "outcome=\"conflict\"", "outcome=\"failed\""] {
            assert!(!text.contains(label) || page.contains(label), "{file}: {label}");
        }
    }
    let dashboard: Value = serde_json::from_str(&read("grafana/nbd-server.json")).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    assert!(panels.iter().all(|panel| panel["targets"][0]["expr"].as_str().is_some_and(|expr| !expr.is_empty())));
}

#[test]
fn promtool_accepts_the_alerts_and_they_fire_when_they_should() {
    let said = succeeds(Command::new("promtool").args(["check", "rules"]).arg(contrib("prometheus/alerts.yml")));
    assert!(said.contains("9 rules found"), "{said}");
    succeeds(Command::new("promtool").args(["test", "rules", "alerts-test.yml"]).current_dir(contrib("prometheus")));
}

/// Prometheus itself parses each expression of the dashboard, as a rule.
#[test]
fn promtool_accepts_every_expression_of_the_dashboard() {
    let dashboard: Value = serde_json::from_str(&read("grafana/nbd-server.json")).unwrap();
    let targets = dashboard["panels"].as_array().unwrap().iter().flat_map(|panel| panel["targets"].as_array().unwrap());
    let rules: Vec<_> = targets
        .enumerate()
        .map(|(i, target)| {
            let expr = target["expr"].as_str().unwrap().replace("$__rate_interval", "5m");
            json!({"record": format!("panel:{i}"), "expr": expr})
        })
        .collect();
    assert!(rules.len() >= 17);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("rules.yml");
    // JSON is YAML.
    fs::write(&file, json!({"groups": [{"name": "dashboard", "rules": rules}]}).to_string()).unwrap();
    succeeds(Command::new("promtool").args(["check", "rules"]).arg(file));
}
