//! `import` and `export-image`, told to end in each of their phases: the store, the file and the temporary folder are
//! as before. And what they show meanwhile.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod common;

use std::fs;
use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::images::{dense_image, done, image, left_over, offline, on_s3, text};
use common::moto::Moto;
use common::proxy::{Proxy, State};
use common::server::run;
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);
/// Chunks of the image that goes over the network: several parts of an upload.
const CHUNKS: u64 = 8;
/// After so many bytes the store falls silent: in the middle of it.
const MIDDLE_BYTES: usize = 12 << 20;

fn wait_until(what: &str, mut there: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !there() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn spawn(command: &mut Command) -> Child {
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Sends a signal, by name; the command must then end by itself, and say so.
#[track_caller]
fn told_to_end(mut child: Child, signal: &str, said: &str) {
    run("kill", &["-s", signal, &child.id().to_string()]);
    wait_until("its end", || child.try_wait().unwrap().is_some());
    let Output { status, stderr, .. } = child.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&stderr);
    assert_eq!(status.code(), Some(1), "{signal}: {error}");
    assert!(error.contains(&format!("error: cancelled: {said}")), "{signal}: {error}");
}

/// A `qemu-img` that never gets on; where it writes its process id once it has begun to convert.
fn slow_qemu_img(dir: &Path) -> (PathBuf, PathBuf) {
    let (bin, began) = (dir.join("bin"), dir.join("began"));
    fs::create_dir_all(&bin).unwrap();
    let program = bin.join("qemu-img");
    let script = format!(
        "#!/bin/sh\nif [ $1 = info ]; then echo '{{\"virtual-size\": 1048576}}'; exit; fi\n\
         echo $$ >{began}.new; mv {began}.new {began}; sleep 0.3; printf '    (50.00/100%%)\\r'\nexec sleep 600\n",
        began = began.display()
    );
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    (bin, began)
}

fn path_with(first: &Path) -> String {
    format!("{}:{}", first.display(), std::env::var("PATH").unwrap())
}

#[test]
fn an_import_that_waits_for_stdin_leaves_no_temporary_file() {
    let dir = tempfile::tempdir().unwrap();
    for signal in ["INT", "TERM", "HUP"] {
        let mut child = spawn(offline(dir.path(), &["import", "-", "vm"]).stdin(Stdio::piped()));
        // Nobody writes, and nobody closes it.
        let stdin = child.stdin.take();
        wait_until("a temporary file", || !left_over(dir.path()).is_empty());
        told_to_end(child, signal, "there is no export vm, as before");
        assert!(left_over(dir.path()).is_empty(), "{signal}");
        drop(stdin);
    }
    assert!(!dir.path().join("store/exports/vm").exists());
}

#[test]
fn a_conversion_that_is_cancelled_ends_with_its_program_and_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let (bin, began) = slow_qemu_img(dir.path());
    let (raw, back) = (image(dir.path()), dir.path().join("back.qcow2"));
    done(&mut offline(dir.path(), &["import", text(&raw), "vm"]));
    fs::write(&back, "as before").unwrap();
    for (args, said) in [
        (&["import", text(&raw), "new", "--format", "qcow2"][..], "there is no export new, as before"),
        (&["export-image", "vm", text(&back), "--format", "qcow2", "--force"], "back.qcow2 is as it was before"),
    ] {
        let child = spawn(offline(dir.path(), args).env("PATH", path_with(&bin)));
        wait_until("a conversion", || began.exists());
        let converter = fs::read_to_string(&began).unwrap().trim().to_owned();
        let said = if args[0] == "import" { said.to_owned() } else { format!("{}/{said}", dir.path().display()) };
        told_to_end(child, "INT", &said);
        wait_until("the converter's end", || !Path::new("/proc").join(&converter).join("exe").exists());
        assert!(left_over(dir.path()).is_empty(), "{args:?}");
        fs::remove_file(&began).unwrap();
    }
    assert_eq!(fs::read_to_string(&back).unwrap(), "as before");
}

#[test]
fn an_image_on_its_way_to_a_reader_that_sleeps_can_be_cancelled() {
    let dir = tempfile::tempdir().unwrap();
    done(&mut offline(dir.path(), &["import", text(&image(dir.path())), "vm"]));
    let mut child = spawn(&mut offline(dir.path(), &["export-image", "vm", "-"]));
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_exact(&mut [0; 1000]).unwrap();
    // Longer than it takes to fill a pipe.
    std::thread::sleep(Duration::from_millis(200));
    told_to_end(child, "INT", "what went to stdout is not the whole image");
}

/// A bucket that can fall silent, an image without zeros, and where it is to come back to.
struct Site {
    moto: Moto,
    proxy: Proxy,
    dir: TempDir,
    raw: PathBuf,
    back: PathBuf,
}

impl Site {
    fn new() -> Self {
        let moto = Moto::with_bucket("disks");
        let proxy = Proxy::start(&moto.endpoint());
        let dir = tempfile::tempdir().unwrap();
        let (raw, back) = (dense_image(dir.path(), CHUNKS), dir.path().join("back.img"));
        Self { moto, proxy, dir, raw, back }
    }
}

/// What the bucket lists of an export.
fn objects(moto: &Moto, export: &str) -> (bool, bool) {
    let listed = moto.request(&format!("GET /disks?list-type=2&prefix=exports/{export}/ HTTP/1.1")).unwrap();
    let parts = moto.request("GET /disks?uploads HTTP/1.1").unwrap();
    assert!(listed.contains("<ListBucketResult") && parts.contains("<ListMultipartUploadsResult"), "{listed}{parts}");
    (listed.contains("<Key>"), parts.contains("<Key>"))
}

#[test]
fn a_transfer_that_is_cancelled_leaves_the_bucket_and_the_file_as_before() {
    let Site { moto, proxy, dir, raw, back } = Site::new();
    let s3 = |args: &[&str]| on_s3(dir.path(), &proxy.endpoint(), args);
    for signal in ["INT", "TERM"] {
        proxy.set_after(MIDDLE_BYTES, State::Frozen);
        let child = spawn(&mut s3(&["import", text(&raw), "vm"]));
        proxy.wait_for(State::Frozen);
        assert_eq!(objects(&moto, "vm"), (false, true), "an upload under way");
        let heal = Duration::from_millis(300);
        std::thread::scope(|scope| {
            // What was uploaded is removed, for which the store has to answer again.
            scope.spawn(|| {
                std::thread::sleep(heal);
                proxy.set(State::Open);
            });
            told_to_end(child, signal, "there is no export vm, as before");
        });
        assert_eq!(objects(&moto, "vm"), (false, false), "{signal}");
    }
    done(&mut s3(&["import", text(&raw), "vm"]));
    for before in [None, Some("as before")] {
        before.inspect(|text| fs::write(&back, text).unwrap());
        proxy.set_after(MIDDLE_BYTES, State::Frozen);
        let child = spawn(&mut s3(&["export-image", "vm", text(&back), "--force"]));
        proxy.wait_for(State::Frozen);
        told_to_end(child, "INT", &format!("{} is as it was before", back.display()));
        proxy.set(State::Open);
        assert_eq!(fs::read_to_string(&back).ok().as_deref(), before);
        assert!(left_over(dir.path()).is_empty());
    }
}

/// Runs a command at a terminal of its own, with what is typed there; returns what the terminal showed.
fn at_a_terminal(command: &Command, keys: &str) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let line = words.map(|word| format!("'{}'", word.to_str().unwrap())).collect::<Vec<_>>().join(" ");
    let script = format!("{keys} | script -qec \"{line}; echo status \\$?\" /dev/null");
    let mut shell = Command::new("bash");
    shell.args(["-c", &script]).env_clear().env("SHELL", "/bin/bash");
    shell.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let output = shell.stdin(Stdio::null()).output().unwrap();
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn shows_a_bar(said: &str, what: &str) {
    let bars: Vec<_> = said.split("\r\u{1b}[K").filter(|line| line.starts_with(what)).collect();
    assert!(!bars.is_empty(), "{said:?}");
    for bar in bars {
        assert!(["[", "] ", " of 32 MiB, ", "/s, ", " left"].iter().all(|part| bar.contains(part)), "{bar}");
    }
}

#[test]
fn a_terminal_shows_a_bar_and_ctrl_c_is_a_key() {
    let Site { moto: _moto, proxy, dir, raw, back } = Site::new();
    let s3 = |args: &[&str]| on_s3(dir.path(), &proxy.endpoint(), args);
    // The store pauses for longer than a bar stands still.
    let slowly = |command: &Command, keys: &str| {
        proxy.set_after(MIDDLE_BYTES, State::Frozen);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                proxy.wait_for(State::Frozen);
                std::thread::sleep(Duration::from_millis(600));
                proxy.set(State::Open);
            });
            at_a_terminal(command, keys)
        })
    };
    let said = slowly(&s3(&["import", text(&raw), "vm"]), ":");
    shows_a_bar(&said, "importing ");
    assert!(said.contains("imported vm, 32 MiB") && said.contains("status 0"), "{said:?}");
    let said = slowly(&s3(&["export-image", "vm", text(&back)]), ":");
    shows_a_bar(&said, "exporting ");
    assert!(said.contains("32 MiB of vm as of snapshot") && said.contains("status 0"), "{said:?}");

    let quiet = slowly(&s3(&["export-image", "vm", text(&back), "--force", "-q"]), ":");
    assert_eq!(quiet.lines().count(), 2, "the id and the status: {quiet:?}");

    // The terminal makes a signal of the key.
    let (bin, began) = slow_qemu_img(dir.path());
    let mut import = offline(dir.path(), &["import", text(&raw), "typed", "--format", "qcow2"]);
    let keys = format!("(until [ -e {} ]; do sleep 0.1; done; sleep 1; printf '\\003'; sleep 1)", began.display());
    let said = at_a_terminal(import.env("PATH", path_with(&bin)), &keys);
    assert!(said.contains("converting [############------------] 512 KiB of 1 MiB, "), "{said:?}");
    assert!(said.contains("cancelled: there is no export typed") && said.contains("status 1"), "{said:?}");
    assert!(left_over(dir.path()).is_empty());
}

#[test]
fn without_a_terminal_there_is_a_line_now_and_then() {
    let dir = tempfile::tempdir().unwrap();
    let raw = image(dir.path());
    let mut command = Command::new("bash");
    let binary = env!("CARGO_BIN_EXE_nbd-server");
    let script = format!("(head -c 4M /dev/zero; sleep 5.5; head -c 4M /dev/zero) | {binary} import - vm");
    command.args(["-c", &script]).env("NBD_SERVER_LOCAL_ROOT", dir.path().join("store")).env("TMPDIR", dir.path());
    let output = command.output().unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(output.status.success(), "{said}");
    assert!(said.starts_with("reading stdin 4") && said.contains("/s\n") && !said.contains('\r'), "{said:?}");
    // A short operation says nothing, and what is asked to be quiet never does.
    let short = done(&mut offline(dir.path(), &["import", text(&raw), "short"]));
    assert!(short.stderr.is_empty());
}
