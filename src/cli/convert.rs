//! Other formats than raw, through `qemu-img`: what it reads and writes is always a whole raw file beside it, never a
//! stream, since only then can it seek, and only then are holes kept.

use std::io;
use std::path::Path;
use std::process::Stdio;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{Child, Command};

use super::CliError;
use super::progress::Progress;

/// The program.
const QEMU_IMG: &str = "qemu-img";

/// What `qemu-img` says of an image.
///
/// # Errors
/// [`CliError::Image`] with what it says.
pub(super) async fn info(image: &Path, format: &str) -> Result<Value, CliError> {
    let mut info = Vec::new();
    let mut child = start(&["info", "--output=json", "-f", format], &[image])?;
    if let Some(mut stdout) = child.stdout.take() {
        let read = stdout.read_to_end(&mut info).await;
        read.map_err(|e| CliError::Image(format!("{QEMU_IMG} cannot be read: {e}")))?;
    }
    end(child).await?;
    Ok(serde_json::from_slice(&info).unwrap_or_default())
}

/// The size of the device in an image; 0 if nobody knows.
pub(super) fn virtual_bytes(info: &Value) -> u64 {
    info["virtual-size"].as_u64().unwrap_or_default()
}

/// Refuses an image that leads to other files: who made it would choose which file of this machine is read.
///
/// # Errors
/// [`CliError::Image`].
pub(super) fn refuse_references(image: &Path, format: &str, info: &Value) -> Result<(), CliError> {
    let data = &info["format-specific"]["data"];
    // The extents of a vmdk; one that is whole is its own extent.
    let extents = data["extents"].as_array().into_iter().flatten().map(|extent| &extent["filename"]);
    let others = [&info["backing-filename"], &data["data-file"]].into_iter().chain(extents);
    match others.filter_map(Value::as_str).find(|other| info["filename"] != *other) {
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
pub(super) async fn to_raw(image: &Path, format: &str, raw: &Path, progress: &Progress) -> Result<(), CliError> {
    progress.during(convert(&["-f", format, "-O", "raw"], &[image, raw], progress)).await
}

/// A raw file as an image of another format.
///
/// # Errors
/// [`CliError::Image`] with what `qemu-img` says.
pub(super) async fn from_raw(raw: &Path, format: &str, image: &Path, progress: &Progress) -> Result<(), CliError> {
    progress.during(convert(&["-f", "raw", "-O", format], &[raw, image], progress)).await
}

/// With `-p`, `qemu-img` writes `    (12.34/100%)\r` whenever it has done more.
async fn convert(formats: &[&str], files: &[&Path], progress: &Progress) -> Result<(), CliError> {
    let mut child = start(&[&["convert", "-p"], formats].concat(), files)?;
    if let Some(stdout) = child.stdout.take() {
        let mut pieces = BufReader::new(stdout).split(b'\r');
        while let Ok(Some(piece)) = pieces.next_segment().await {
            if let Some(hundredths) = hundredths(&piece) {
                progress.reach_share(hundredths, 10_000);
            }
        }
    }
    end(child).await
}

/// Of a percent.
fn hundredths(piece: &[u8]) -> Option<u64> {
    let (percent, _) = std::str::from_utf8(piece).ok()?.trim().strip_prefix('(')?.split_once("/100%)")?;
    let (whole, fraction) = percent.split_once('.')?;
    Some(whole.parse::<u64>().ok()?.checked_mul(100)? + fraction.get(..2)?.parse::<u64>().ok()?)
}

/// Its stdout is to be read to the end; it is killed when it is dropped.
fn start(args: &[&str], files: &[&Path]) -> Result<Child, CliError> {
    // Absolute, so that no name is taken for an option or a protocol.
    let absolute = |path: &&Path| std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let mut command = Command::new(QEMU_IMG);
    // A Ctrl-C is for us, who then end it; else it would fail first, and that would be what is told.
    command.args(args).args(files.iter().map(absolute)).kill_on_drop(true).process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().map_err(|e| match e.kind() {
        io::ErrorKind::NotFound => CliError::Image(
            "formats other than raw need qemu-img, which is not installed: install it (Debian: qemu-utils), or convert to raw elsewhere".into(),
        ),
        _ => CliError::Image(format!("{QEMU_IMG} cannot be started: {e}")),
    })
}

async fn end(child: Child) -> Result<(), CliError> {
    let output = child.wait_with_output().await;
    let output = output.map_err(|e| CliError::Image(format!("{QEMU_IMG} was lost: {e}")))?;
    match (output.status.success(), String::from_utf8_lossy(&output.stderr).trim()) {
        (true, _) => Ok(()),
        (false, "") => Err(CliError::Image(format!("{QEMU_IMG} ended with {}", output.status))),
        (false, said) => Err(CliError::Image(said.to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_qemu_img_says_of_its_progress_is_understood_and_nothing_else() {
        for (said, understood) in [
            ("    (12.34/100%)", Some(1234)),
            ("    (100.00/100%)", Some(10_000)),
            ("    (x/100%)", None),
            ("(1.2/100%)", None),
            ("\n", None),
        ] {
            assert_eq!(hundredths(said.as_bytes()), understood, "{said}");
        }
    }
}
