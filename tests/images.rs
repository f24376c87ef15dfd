//! Disk images in and out of the store with the real binary, with no server at all and beside one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests fail the test")]

mod common;

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use common::images::{MIB, SIZE, done, image, left_over, offline, on_s3, refused, same, text};
use common::moto::Moto;
use common::server::{S3_KEYS, TestServer, nbd_server, run, run_to_end};
use common::volumes::{self, Site};
use common::watched::Fate;
use futures_util::FutureExt;
use futures_util::stream::{self, StreamExt};
use nbd_server::disk::RealDisk;
use nbd_server::store::retry::DEFAULT_LIMIT;
use nbd_server::store::{Condition, Key};
use nbd_server::units::ChunkIndex;
use nbd_server::volume::registry::{ExportError, Published};
use serde_json::{Value, json};

#[test]
fn an_image_comes_back_to_the_byte_and_as_sparse_as_it_was() {
    let dir = tempfile::tempdir().unwrap();
    let (image, back) = (image(dir.path()), dir.path().join("back.img"));
    let import = done(&mut offline(dir.path(), &["import", text(&image), "vm", "--json"]));
    let imported: Value = serde_json::from_slice(&import.stdout).unwrap();
    assert_eq!((&imported["image_size"], &imported["generation"]), (&json!(SIZE), &json!(1)));
    // Four chunks of data, of which the last is short; the written zeros are none.
    let id = imported["snapshot_id"].as_str().unwrap();
    let blob = dir.path().join(format!("store/exports/vm/snapshots/{id}/base.blob"));
    assert_eq!(fs::metadata(blob).unwrap().len(), 3 * 4 * MIB + SIZE % (4 * MIB));
    done(&mut offline(dir.path(), &["export-image", "vm", text(&back)]));
    same(&image, &back);
    assert!(fs::metadata(&back).unwrap().blocks() * 512 < 17 * MIB, "holes stay holes");
    refused(&mut offline(dir.path(), &["export-image", "vm", text(&back)]), 2, "--force");
    let named = format!("vm@{id}");
    let by_id = done(&mut offline(dir.path(), &["export-image", &named, text(&back), "--force", "-q"]));
    assert_eq!(String::from_utf8(by_id.stdout).unwrap(), format!("{id}\n"));
    same(&image, &back);
    let by_id = done(&mut offline(dir.path(), &["export-image", &named, text(&back), "--force", "--json"]));
    let expected = json!({
        "export_id": "vm", "snapshot_id": id, "image_size": SIZE, "format": "raw", "file": text(&back),
    });
    assert_eq!(serde_json::from_slice::<Value>(&by_id.stdout).unwrap(), expected);
    assert!(left_over(dir.path()).is_empty());
}

#[test]
fn stdin_and_stdout_carry_raw_images() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let stdin = Stdio::from(File::open(&image).unwrap());
    let small = ["import", "-", "vm", "--chunk-size", "64KiB", "-q"];
    let id = String::from_utf8(done(offline(dir.path(), &small).stdin(stdin)).stdout).unwrap();
    assert_eq!(id.trim().len(), 32, "{id}");
    let out = offline(dir.path(), &["export-image", "vm", "-"]).stderr(Stdio::piped()).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    assert!(out.stdout == fs::read(&image).unwrap());
    refused(&mut offline(dir.path(), &["export-image", "vm", "-", "--format", "qcow2"]), 2, "name a file");
    refused(&mut offline(dir.path(), &["export-image", "vm", "-", "--json"]), 2, "no place for --json");
    refused(&mut offline(dir.path(), &["import", "-", "b", "--format", "qcow2"]), 2, "name a file");
    assert!(left_over(dir.path()).is_empty());
}

#[test]
fn what_is_no_file_and_no_block_device_is_never_replaced_by_an_image() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    done(&mut offline(dir.path(), &["import", text(&image), "vm"]));
    let (fifo, link) = (dir.path().join("fifo"), dir.path().join("link"));
    run("mkfifo", &[text(&fifo)]);
    std::os::unix::fs::symlink(&fifo, &link).unwrap();
    for path in [&fifo, &link, dir.path()] {
        for force in [&["--force"][..], &[]] {
            let args = [&["export-image", "vm", text(path)], force].concat();
            refused(&mut offline(dir.path(), &args), 2, "- writes to stdout");
        }
    }
    assert!(fs::symlink_metadata(&fifo).unwrap().file_type().is_fifo());
    assert!(fs::symlink_metadata(&link).unwrap().file_type().is_symlink());
}

/// A block device over a file, gone with its test.
struct LoopDevice(String);

impl LoopDevice {
    /// `None`: only root has them, and not in every container.
    fn over(file: &Path) -> Option<Self> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output().ok()?;
        output.status.success().then(|| Self(String::from_utf8(output.stdout).unwrap().trim().to_owned()))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        run("losetup", &["--detach", &self.0]);
    }
}

#[test]
fn a_block_device_is_written_over_only_if_the_image_fits() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    done(&mut offline(dir.path(), &["import", text(&image), "vm"]));
    let sectors = SIZE.div_ceil(512);
    for (sectors, fits) in [(sectors - 1, false), (sectors, true)] {
        let disk = dir.path().join(format!("{sectors}.disk"));
        fs::write(&disk, vec![7; usize::try_from(sectors * 512).unwrap()]).unwrap();
        let Some(device) = LoopDevice::over(&disk) else {
            println!("skipped: this machine gives no loop device");
            return;
        };
        let mut export = offline(dir.path(), &["export-image", "vm", &device.0, "--force"]);
        if fits {
            done(&mut export);
        } else {
            refused(&mut export, 1, "a larger device");
        }
        drop(device);
        let (written, expected) = (fs::read(&disk).unwrap(), fs::read(&image).unwrap());
        let (start, rest) = if fits { written.split_at(expected.len()) } else { (&[][..], &written[..]) };
        assert!(rest.iter().all(|byte| *byte == 7), "what is beyond the image stays");
        assert!(!fits || start == expected);
    }
}

#[test]
fn other_formats_come_in_and_go_out_through_qemu_img() {
    let dir = tempfile::tempdir().unwrap();
    let raw = image(dir.path());
    // Formats count in sectors.
    File::options().write(true).open(&raw).unwrap().set_len(33 * MIB + 1024).unwrap();
    for format in ["qcow2", "vmdk", "vhdx"] {
        let (packed, back) = (dir.path().join(format), dir.path().join(format!("back.{format}")));
        run("qemu-img", &["convert", "-f", "raw", "-O", format, text(&raw), text(&packed)]);
        done(&mut offline(dir.path(), &["import", text(&packed), format]));
        done(&mut offline(dir.path(), &["export-image", format, text(&back), "--format", format]));
        run("qemu-img", &["compare", "-f", format, "-F", format, text(&packed), text(&back)]);
    }
    // Who made an image must not choose which file of this machine is read.
    let overlay = dir.path().join("overlay");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", text(&raw), text(&overlay)]);
    refused(&mut offline(dir.path(), &["import", text(&overlay), "o"]), 1, "builds on another file");
    done(&mut offline(dir.path(), &["import", text(&overlay), "o", "--format", "qcow2"]));
    let back = dir.path().join("o.img");
    done(&mut offline(dir.path(), &["export-image", "o", text(&back)]));
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", text(&raw), text(&back)]);
    let flat = dir.path().join("flat.vmdk");
    run("qemu-img", &["create", "-q", "-f", "vmdk", "-o", "subformat=monolithicFlat", text(&flat), "1M"]);
    refused(&mut offline(dir.path(), &["import", text(&flat), "f"]), 1, "flat-flat.vmdk\": if you trust it");
    done(&mut offline(dir.path(), &["import", text(&flat), "f", "--format", "vmdk"]));
    let without = dir.path().join("none");
    refused(
        offline(dir.path(), &["import", text(&overlay), "p"]).env("PATH", &without),
        1,
        "install it (Debian: qemu-utils)",
    );
    assert!(left_over(dir.path()).is_empty());
}

#[test]
fn every_format_that_qemu_img_writes_is_known_by_its_content() {
    let dir = tempfile::tempdir().unwrap();
    let raw = image(dir.path());
    File::options().write(true).open(&raw).unwrap().set_len(34 * MIB).unwrap();
    for (number, (format, options)) in [
        ("qcow2", ""),
        ("qcow", ""),
        ("qed", ""),
        ("vdi", ""),
        ("vhdx", ""),
        ("parallels", ""),
        ("vmdk", "subformat=monolithicSparse"),
        ("vmdk", "subformat=streamOptimized"),
        ("vpc", "subformat=dynamic,force_size=on"),
        ("vpc", "subformat=fixed,force_size=on"),
    ]
    .into_iter()
    .enumerate()
    {
        let name = format!("image-{number}");
        let (packed, back) = (dir.path().join(&name), dir.path().join("back.img"));
        let convert = ["convert", "-f", "raw", "-O", format, "-o", options, text(&raw), text(&packed)];
        run(
            "qemu-img",
            if options.is_empty() { [&convert[..5], &convert[7..]].concat() } else { convert.to_vec() }.as_slice(),
        );
        done(&mut offline(dir.path(), &["import", text(&packed), &name]));
        done(&mut offline(dir.path(), &["export-image", &name, text(&back), "--force"]));
        same(&raw, &back);
        let import = ["import", "-", "streamed"];
        for how in [&["--format", format][..], &[]] {
            let mut command = offline(dir.path(), &[&import, how].concat());
            refused(command.stdin(File::open(&packed).unwrap()), 2, "name a file instead");
        }
        let name = format!("{name}-as-it-is");
        done(&mut offline(dir.path(), &["import", text(&packed), &name, "--format", "raw"]));
        done(&mut offline(dir.path(), &["export-image", &name, text(&back), "--force"]));
        assert!(fs::read(&packed).unwrap() == fs::read(&back).unwrap(), "{format} {options}");
    }
    assert!(!dir.path().join("store/exports/streamed").exists() && left_over(dir.path()).is_empty());
}

/// A FIFO that a program writes the file into, as soon as it is read.
fn fifo(dir: &Path, of: &Path) -> (std::path::PathBuf, std::process::Child) {
    let fifo = dir.join("fifo");
    let _ = fs::remove_file(&fifo);
    run("mkfifo", &[text(&fifo)]);
    let script = ["-c", "exec cat \"$1\" > \"$2\"", "sh", text(of), text(&fifo)];
    let writer = Command::new("sh").args(script).stderr(Stdio::null()).spawn().unwrap();
    (fifo, writer)
}

#[test]
fn what_is_no_disk_is_refused_by_name_from_a_file_and_from_streams() {
    let dir = tempfile::tempdir().unwrap();
    let raw = image(dir.path());
    for (program, args, said) in [
        ("gzip", "-c disk.img", "is a gzip file, no disk image: unpack it with `gzip -dc`"),
        ("xz", "-0 -c disk.img", "is an xz file"),
        ("xz", "-0 --format=lzma -c disk.img", "is an lzma file"),
        ("bzip2", "-c disk.img", "is a bzip2 file"),
        ("zstd", "-c disk.img", "is a zstd file"),
        ("lz4", "-c disk.img", "is an lz4 file"),
        ("zip", "- disk.img", "is a zip archive"),
        ("tar", "-c disk.img", "is a tar archive (such as an OVA)"),
    ] {
        let packed = dir.path().join("packed");
        let mut command = Command::new(program);
        command.args(args.split(' ')).current_dir(dir.path()).stdout(File::create(&packed).unwrap());
        match command.stderr(Stdio::null()).status() {
            Ok(status) => assert!(status.success(), "{program}"),
            Err(e) if program != "gzip" && program != "tar" => {
                println!("without {program}: {e}");
                continue;
            }
            Err(e) => panic!("{program}: {e}"),
        }
        refused(&mut offline(dir.path(), &["import", text(&packed), "vm"]), 2, said);
        let stdin = File::open(&packed).unwrap();
        refused(offline(dir.path(), &["import", "-", "vm"]).stdin(stdin), 2, &format!("stdin {said}"));
        let (fifo, mut writer) = fifo(dir.path(), &packed);
        refused(&mut offline(dir.path(), &["import", text(&fifo), "vm"]), 2, "add --format raw");
        writer.wait().unwrap();
    }
    // At once, though more is to come.
    let mut child = offline(dir.path(), &["import", "-", "vm"]);
    let mut child = child.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&[&b"\x28\xb5\x2f\xfd"[..], &[7; 1000]].concat()).unwrap();
    let status = child.wait().unwrap();
    drop(stdin);
    assert_eq!(status.code(), Some(2));
    assert!(!dir.path().join("store/exports/vm").exists() && left_over(dir.path()).is_empty());

    // Not one byte of a stream is lost by the look at its start; and what is meant as it is comes in as it is.
    let (source, mut writer) = fifo(dir.path(), &raw);
    done(&mut offline(dir.path(), &["import", text(&source), "vm"]));
    writer.wait().unwrap();
    let packed = dir.path().join("packed");
    let stdin = File::open(&packed).unwrap();
    done(offline(dir.path(), &["import", "-", "as-it-is", "--format", "raw"]).stdin(stdin));
    let back = dir.path().join("back.img");
    for (name, original) in [("vm", &raw), ("as-it-is", &packed)] {
        done(&mut offline(dir.path(), &["export-image", name, text(&back), "--force"]));
        assert!(fs::read(original).unwrap() == fs::read(&back).unwrap(), "{name}");
    }
}

#[test]
fn images_go_to_a_bucket_and_come_back_with_and_without_a_server() {
    let moto = Moto::with_bucket("disks");
    let endpoint = moto.endpoint();
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let s3 = |args: &[&str]| done(&mut on_s3(dir.path(), &endpoint, args));
    s3(&["import", text(&image), "vm"]);
    let packed = dir.path().join("disk.qcow2");
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", text(&image), text(&packed)]);
    s3(&["import", text(&packed), "packed"]);
    // Nobody serves it yet.
    let (back, back_packed) = (dir.path().join("back.img"), dir.path().join("back.qcow2"));
    s3(&["export-image", "vm", text(&back)]);
    same(&image, &back);
    s3(&["export-image", "packed", text(&back_packed), "--format", "qcow2"]);
    run("qemu-img", &["compare", "-f", "qcow2", "-F", "qcow2", text(&packed), text(&back_packed)]);
    // A server serves what was imported before its start and beside it, and what it publishes goes out.
    let server = TestServer::on_s3(&endpoint, "disks", &[]);
    s3(&["import", text(&image), "late"]);
    server.ok("POST", "/v1/exports/open", json!({"export_id": "late"}));
    for name in ["vm", "late"] {
        run("nbdcopy", &[&server.nbd_uri(name), text(&back)]);
        same(&image, &back);
        run("qemu-io", &["-f", "raw", "-c", "write -P 9 8M 64k", "-c", "flush", &server.nbd_uri(name)]);
        server.ok("POST", &format!("/v1/exports/{name}/snapshot"), Value::Null);
        s3(&["export-image", name, text(&back), "--force"]);
        assert!(fs::read(&back).unwrap()[8 << 20..][..65_536] == [9; 65_536]);
    }
    assert!(left_over(dir.path()).is_empty());
}

#[test]
fn an_export_that_exists_is_never_touched_and_a_server_serves_what_was_imported() {
    let server = TestServer::start(&[], &[]);
    let image = image(server.dir());
    server.ok("POST", "/v1/exports/create", json!({"export_id": "taken", "size": 4096}));
    let head = server.local_root().join("exports/taken/volume.json");
    let before = fs::read(&head).unwrap();
    refused(&mut offline(server.dir(), &["import", text(&image), "taken"]), 1, "exists already");
    assert_eq!(fs::read(&head).unwrap(), before);
    done(&mut offline(server.dir(), &["import", text(&image), "vm"]));
    server.ok("POST", "/v1/exports/open", json!({"export_id": "vm"}));
    let served = server.dir().join("served.img");
    run("nbdcopy", &[&server.nbd_uri("vm"), text(&served)]);
    same(&image, &served);
    // What a client writes is not in the image until it is published, and the older one stays readable.
    let first = server.ok("GET", "/v1/exports/vm/snapshots", Value::Null)["snapshots"][0]["snapshot_id"].clone();
    run("qemu-io", &["-f", "raw", "-c", "write -P 9 8M 64k", "-c", "flush", &server.nbd_uri("vm")]);
    let (older, newer) = (server.dir().join("older.img"), server.dir().join("newer.img"));
    done(&mut offline(server.dir(), &["export-image", "vm", text(&older)]));
    same(&image, &older);
    server.ok("POST", "/v1/exports/vm/snapshot", Value::Null);
    done(&mut offline(server.dir(), &["export-image", "vm", text(&newer)]));
    assert!(fs::read(&newer).unwrap()[8 << 20..][..65_536] == [9; 65_536]);
    let named = format!("vm@{}", first.as_str().unwrap());
    done(&mut offline(server.dir(), &["export-image", &named, text(&older), "--force"]));
    same(&image, &older);
    refused(&mut offline(server.dir(), &["export-image", "taken", text(&newer), "--force"]), 1, "take a snapshot");
    refused(&mut offline(server.dir(), &["export-image", "nope", "x.img"]), 1, "storage flags");
}

#[test]
fn a_damaged_chunk_ends_an_export_and_leaves_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let (image, back) = (image(dir.path()), dir.path().join("back.img"));
    let id = done(&mut offline(dir.path(), &["import", text(&image), "vm", "-q"]));
    let id = String::from_utf8(id.stdout).unwrap();
    let blob = dir.path().join(format!("store/exports/vm/snapshots/{}/base.blob", id.trim()));
    File::options().write(true).open(blob).unwrap().write_all_at(b"damage", 5 * MIB).unwrap();
    refused(&mut offline(dir.path(), &["export-image", "vm", text(&back)]), 1, "BLAKE3");
    assert!(!back.exists() && left_over(dir.path()).is_empty());
}

#[test]
fn an_import_that_is_interrupted_leaves_nothing_in_the_store() {
    let dir = tempfile::tempdir().unwrap();
    let large = dir.path().join("large.img");
    let file = File::create(&large).unwrap();
    file.set_len(2 << 30).unwrap();
    // Enough that it lasts: a byte in every chunk.
    for chunk in 0..512 {
        file.write_all_at(b"x", chunk * 4 * MIB).unwrap();
    }
    let mut child = offline(dir.path(), &["import", text(&large), "vm"]).stderr(Stdio::piped()).spawn().unwrap();
    let store = dir.path().join("store");
    fs::create_dir_all(&store).unwrap();
    let uploaded = || run("bash", &["-c", &format!("find {} -type f -size +1M 2>/dev/null || true", text(&store))]);
    while uploaded().is_empty() {
        assert!(child.try_wait().unwrap().is_none(), "it ended before it could be interrupted");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    run("kill", &["-INT", &child.id().to_string()]);
    let output = child.wait_with_output().unwrap();
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("cancelled"), "{error}");
    let found = run("find", &[text(&store), "-type", "f", "-path", "*/vm/*"]);
    assert_eq!((found.as_str(), uploaded().as_str()), ("", ""), "no object is left, nor a part of one");
}

#[test]
fn what_cannot_be_an_export_is_refused_before_anything_is_stored() {
    let dir = tempfile::tempdir().unwrap();
    let empty = dir.path().join("empty.img");
    fs::write(&empty, "").unwrap();
    refused(&mut offline(dir.path(), &["import", text(&empty), "vm"]), 1, "cannot become an export");
    refused(&mut offline(dir.path(), &["import", "/nowhere.img", "vm"]), 1, "/nowhere.img cannot be read");
    for path in [text(dir.path()), "/dev/null"] {
        for format in ["raw", "qcow2", ""] {
            let mut args = vec!["import", path, "vm", "--format", format];
            args.truncate(if format.is_empty() { 3 } else { 5 });
            refused(&mut offline(dir.path(), &args), 2, "neither a file nor a block device");
        }
    }
    // At once, though stdin does not end: not after hours of reading it.
    let endless = ["import", "-", "vm", "--chunk-size", "5000"];
    refused(offline(dir.path(), &endless).stdin(Stdio::piped()), 2, "power of two");
    let memory = ["import", text(&empty), "vm", "--storage-backend", "memory"];
    refused(nbd_server().args(memory).env("HOME", dir.path()), 2, "inside one server alone");
    // The settings of a file hold for these commands too.
    let config = dir.path().join("config.toml");
    fs::write(&config, format!("local-root = {:?}\n", text(&dir.path().join("elsewhere")))).unwrap();
    let image = image(dir.path());
    done(nbd_server().args(["import", text(&image), "vm", "--config", text(&config)]));
    assert!(dir.path().join("elsewhere/exports/vm/volume.json").exists());
}

#[test]
fn a_store_that_does_not_answer_is_waited_for_and_the_user_hears_why() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path());
    let away = ["--storage-backend=s3", "--bucket=disks", "--endpoint-url=http://127.0.0.1:9", "--store-timeout=1"];
    let output = run_to_end(nbd_server().args(["import", text(&image), "vm"]).args(away).envs(S3_KEYS));
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("the store does not answer yet, trying for up to 1 s"), "{said}");
    assert!(said.lines().last().unwrap().starts_with("error: the store did not serve"), "{said}");
}

/// The image of the tests over a store that fails to order: eight chunks, one of them zeros.
fn chunks() -> Vec<(ChunkIndex, Bytes)> {
    let chunk = |index: u32| (ChunkIndex(index), Bytes::from(vec![u8::from(index != 5); 4096]));
    (0..8).map(chunk).collect()
}

async fn import(site: &Site, name: &str) -> Result<Published, ExportError> {
    let services = site.services(Arc::new(RealDisk::default()));
    let body = stream::iter(chunks().into_iter().map(Ok)).boxed();
    services.import(&volumes::id(name), volumes::geometry(8), body, std::future::pending()).await
}

async fn is_whole(site: &mut Site, name: &str) {
    let expected: Vec<u8> = chunks().into_iter().flat_map(|(_, bytes)| bytes.to_vec()).collect();
    assert!(volumes::image(&site.elsewhere().await, name).await == expected);
}

#[tokio::test]
async fn an_import_whose_last_step_is_unclear_is_settled_by_reading_the_head() {
    let mut site = Site::new();
    let mut once = true;
    site.store.judge(move |op, key| {
        let head = op == "put" && key.as_str().ends_with("volume.json");
        if head && std::mem::take(&mut once) { Fate::LandedUnseen } else { Fate::Served }
    });
    assert!(import(&site, "vm").await.unwrap().created);
    is_whole(&mut site, "vm").await;
}

#[tokio::test(start_paused = true)]
async fn an_import_outlasts_a_store_that_throttles_its_last_step_for_a_while() {
    let mut site = Site::simulated();
    site.store.throttle_heads(Duration::from_secs(2));
    assert!(import(&site, "vm").await.unwrap().created);
    is_whole(&mut site, "vm").await;

    site.store.throttle_heads(DEFAULT_LIMIT * 10);
    let begun = tokio::time::Instant::now();
    let refused = import(&site, "other").await.unwrap_err().to_string();
    assert!(begun.elapsed() <= DEFAULT_LIMIT, "{:?}", begun.elapsed());
    assert!(refused.contains("gave up after") && refused.ends_with("as the test wishes"), "{refused}");
}

#[tokio::test]
async fn what_a_head_may_still_name_is_not_deleted() {
    let site = Site::new();
    let key: Key = "exports/vm/volume.json".parse().unwrap();
    let foreign = r#"{"version":1,"export_id":"vm","image_size":32768,"chunk_size":4096}"#;
    let inner = Arc::clone(&site.store.inner);
    let mut once = true;
    // Nobody knows what became of our head; and then there is one of another server's.
    site.store.judge(move |op, asked| {
        let unclear = op == "put" && asked.as_str().ends_with("volume.json") && std::mem::take(&mut once);
        if unclear {
            inner
                .put(&key, Bytes::from_static(foreign.as_bytes()), Condition::IfAbsent)
                .now_or_never()
                .unwrap()
                .unwrap();
        }
        if unclear { Fate::Failed } else { Fate::Served }
    });
    let refused = import(&site, "vm").await;
    assert!(matches!(refused, Err(ExportError::Exists(_))), "{refused:?}");
    let left = site.store.inner.list(&"exports/vm/snapshots".parse().unwrap()).await.unwrap();
    assert_eq!(left.len(), 2, "blob and manifest: {left:?}");
}

#[tokio::test]
async fn an_import_that_the_store_fails_at_any_call_is_whole_or_not_there() {
    for fate in [Fate::Failed, Fate::LandedUnseen] {
        for fatal in 0.. {
            let mut site = Site::new();
            let mut call = 0;
            // From that call on it is away; or just that one is, and its effect unclear.
            site.store.judge(move |_, _| {
                call += 1;
                let struck = if fate == Fate::Failed { call > fatal } else { call == fatal + 1 };
                if struck { fate } else { Fate::Served }
            });
            let imported = import(&site, "vm").await;
            site.store.serve_all();
            let head = site.store.inner.get(&"exports/vm/volume.json".parse().unwrap(), 4096).await.is_ok();
            // One whose head could not be read back is there all the same, and its error says that this is not known.
            let unknown = imported.as_ref().is_err_and(|e| e.to_string().contains("is not known"));
            assert!(imported.is_ok() == head || head && unknown, "{fate:?} at {fatal}: {imported:?}");
            if head {
                is_whole(&mut site, "vm").await;
            } else {
                // What cannot land any more is taken back, if the store can be asked to.
                let left = site.store.inner.list(&"exports/vm/snapshots".parse().unwrap()).await.unwrap();
                assert!(fate == Fate::Failed || left.is_empty(), "{fatal}: {left:?}");
                assert!(import(&site, "vm").await.unwrap().created, "it can be tried again");
                is_whole(&mut site, "vm").await;
            }
            if imported.is_ok() && fatal > 6 {
                break;
            }
        }
    }
}

#[tokio::test]
async fn of_two_imports_under_one_name_exactly_one_takes_place() {
    let mut site = Site::new();
    *site.store.delay.lock().unwrap() = Duration::from_millis(2);
    let (one, other) = tokio::join!(import(&site, "vm"), import(&site, "vm"));
    let refused = if one.is_ok() { other } else { one };
    assert!(matches!(refused, Err(ExportError::Exists(_))), "{refused:?}");
    is_whole(&mut site, "vm").await;
    let left = site.store.inner.list(&"exports/vm/snapshots".parse().unwrap()).await.unwrap();
    assert_eq!(left.len(), 2, "blob and manifest of the one: {left:?}");
}
