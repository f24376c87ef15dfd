//! The Debian package, made of the program under test as `make deb` makes it of a release.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::server::{nbd_server, run_to_end};

/// Builds it below a directory.
pub fn build(dir: &Path) -> PathBuf {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (target, package) = (dir.join("target"), dir.join("nbd-server.deb"));
    let pages = target.join("release/man");
    fs::create_dir_all(&pages).unwrap();
    fs::copy(env!("CARGO_BIN_EXE_nbd-server"), target.join("release/nbd-server")).unwrap();
    assert!(run_to_end(nbd_server().arg("man").arg(&pages)).status.success());
    let completions = run_to_end(nbd_server().args(["completions", "bash"])).stdout;
    fs::write(pages.join("nbd-server.bash"), completions).unwrap();
    write_notices(&target.join("release/THIRD-PARTY-LICENSES"));
    let mut cargo_deb = Command::new(repository.join(".tools/bin/cargo-deb"));
    cargo_deb.args(["--no-build", "--no-strip", "--fast", "--output"]).arg(&package);
    let output = cargo_deb.current_dir(repository).env("CARGO_TARGET_DIR", &target).output();
    let output = output.unwrap_or_else(|e| panic!("cargo-deb: {e}; run `make setup`, which installs it"));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    package
}

/// Writes the licence notices of what is linked into the program.
pub fn write_notices(file: &Path) {
    let repository = Path::new(env!("CARGO_MANIFEST_DIR"));
    let output =
        Command::new(repository.join("scripts/licenses.py")).arg(file).current_dir(repository).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}
