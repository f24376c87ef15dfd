//! Disk images and the commands that carry them in and out of a store without a server.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::server::{S3_KEYS, nbd_server, run, run_to_end};

pub const MIB: u64 = 1 << 20;
/// Not a multiple of a chunk, nor of a sector.
pub const SIZE: u64 = 33 * MIB + 1000;

/// An image with data, holes and written zeros.
pub fn image(dir: &Path) -> PathBuf {
    let path = dir.join("disk.img");
    let file = File::create(&path).unwrap();
    file.set_len(SIZE).unwrap();
    for (offset, byte) in [(0, 1), (5 * MIB - 3, 2), (20 * MIB, 3), (SIZE - 10, 4)] {
        file.write_all_at(&[byte; 10], offset).unwrap();
    }
    file.write_all_at(&vec![0; 4 << 20], 12 * MIB).unwrap();
    path
}

/// An image without a zero: as many chunks of the default size as it has.
pub fn dense_image(dir: &Path, chunks: u64) -> PathBuf {
    let path = dir.join("dense.img");
    let file = File::create(&path).unwrap();
    for chunk in 0..chunks {
        file.write_all_at(&vec![u8::try_from(chunk % 255 + 1).unwrap(); 4 << 20], chunk * 4 * MIB).unwrap();
    }
    path
}

/// A command on the store below a directory, without a server.
pub fn offline(dir: &Path, args: &[&str]) -> Command {
    let mut command = nbd_server();
    command.args(args).arg("--local-root").arg(dir.join("store")).env("TMPDIR", dir);
    command
}

/// A command on the bucket `disks` of an S3 endpoint, without a server.
pub fn on_s3(dir: &Path, endpoint: &str, args: &[&str]) -> Command {
    let mut command = nbd_server();
    command.args(args).args(["--storage-backend", "s3", "--bucket", "disks", "--endpoint-url", endpoint]);
    command.args(["--store-timeout", "20"]).envs(S3_KEYS).env("TMPDIR", dir);
    command
}

#[track_caller]
pub fn done(command: &mut Command) -> Output {
    let output = run_to_end(command);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output
}

#[track_caller]
pub fn refused(command: &mut Command, status: i32, part: &str) {
    let output = run_to_end(command);
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(status), "{error}");
    assert!(error.contains(part), "{part:?} is not in: {error}");
    assert!(output.stdout.is_empty());
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[track_caller]
pub fn same(a: &Path, b: &Path) {
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(a), text(b)]);
    assert!(fs::read(a).unwrap() == fs::read(b).unwrap(), "to the byte, beyond the last sector too");
}

/// Temporary files in a directory.
pub fn left_over(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name.contains("nbd-server-")).collect()
}
