//! Other formats than raw, through `qemu-img`: what it reads and writes is always a whole raw file beside it, never a
//! stream, since only then can it seek, and only then are holes kept.

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use serde_json::Value;
use tokio::process::Command;

use super::CliError;

/// The program.
const QEMU_IMG: &str = "qemu-img";
/// How much of a file is looked at to tell its format.
const MAGIC_BYTES: u64 = 16;

/// The format that the first bytes of a file speak of, by the name that `qemu-img` has for it; `raw` if none does.
pub(super) fn format_of(path: &Path) -> io::Result<&'static str> {
    let mut start = Vec::new();
    File::open(path)?.take(MAGIC_BYTES).read_to_end(&mut start)?;
    let known: [(&[u8], &str); 6] = [
        (b"QFI\xfb", "qcow2"),
        (b"KDMV", "vmdk"),
        (b"# Disk Descripto", "vmdk"),
        (b"vhdxfile", "vhdx"),
        (b"conectix", "vpc"),
        (b"QED\0", "qed"),
    ];
    Ok(known.iter().find(|(magic, _)| start.starts_with(magic)).map_or("raw", |(_, format)| format))
}

/// Refuses an image that leads to other files: who made it would choose which file of this machine is read.
///
/// # Errors
/// [`CliError::Image`].
pub(super) async fn refuse_references(image: &Path, format: &str) -> Result<(), CliError> {
    let info = run(&["info", "--output=json", "-f", format], &[image]).await?;
    let info: Value = serde_json::from_slice(&info).unwrap_or_default();
    let backing = info["backing-filename"].as_str().or_else(|| info["format-specific"]["data"]["data-file"].as_str());
    match backing {
        None => Ok(()),
        Some(other) => Err(CliError::Image(format!(
            "{} builds on another file, {other:?}: if you trust it, say so with --format {format}",
            image.display()
        ))),
    }
}

/// An image of any format as a sparse raw file.
///
/// # Errors
/// [`CliError::Image`] with what `qemu-img` says.
pub(super) async fn to_raw(image: &Path, format: &str, raw: &Path) -> Result<(), CliError> {
    run(&["convert", "-f", format, "-O", "raw"], &[image, raw]).await.map(drop)
}

/// A raw file as an image of another format.
///
/// # Errors
/// [`CliError::Image`] with what `qemu-img` says.
pub(super) async fn from_raw(raw: &Path, format: &str, image: &Path) -> Result<(), CliError> {
    run(&["convert", "-f", "raw", "-O", format], &[raw, image]).await.map(drop)
}

async fn run(args: &[&str], files: &[&Path]) -> Result<Vec<u8>, CliError> {
    // Absolute, so that no name is taken for an option or a protocol.
    let absolute = |path: &&Path| std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let mut command = Command::new(QEMU_IMG);
    command.args(args).args(files.iter().map(absolute)).stdin(std::process::Stdio::null()).kill_on_drop(true);
    let output = command.output().await.map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => CliError::Image(
            "formats other than raw need qemu-img, which is not installed: install it (Debian: qemu-utils), or convert to raw elsewhere".into(),
        ),
        _ => CliError::Image(format!("{QEMU_IMG} cannot be started: {e}")),
    })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(CliError::Image(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}
