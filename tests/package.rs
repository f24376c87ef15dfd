//! The Debian package on a machine of its own, with systemd: installed, used, upgraded, removed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;

/// How long all of it may take, in seconds.
const PATIENCE_SECS: &str = "180";

#[test]
fn an_installed_package_is_a_service_that_works_and_outlives_crashes_and_upgrades() {
    let shared = tempfile::tempdir().unwrap();
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/package");
    common::package::build(shared.path());
    fs::copy(here.join("checks.sh"), shared.path().join("checks.sh")).unwrap();
    // The namespaces of an ordinary user have no other users in them, which a package needs.
    let mut boot = Command::new(if rustix::process::geteuid().is_root() { "env" } else { "sudo" });
    boot.args(["timeout", "--kill-after=5", PATIENCE_SECS]).arg(here.join("boot.sh")).arg(shared.path());
    let output = boot.output().unwrap();
    let said = fs::read_to_string(shared.path().join("said")).unwrap_or_default();
    let refused = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(77) {
        eprintln!("the package was built and not installed: {refused}");
        return;
    }
    assert!(said.ends_with("\nPASSED\n"), "{}\n{said}\n{refused}", output.status);
}
