//! Clients nobody here wrote, against a served set of exports: they have to find what the protocol promises them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod common;

use std::os::unix::fs::FileExt;
use std::process::Command;
use std::time::{Duration, Instant};

use common::nbd::{DISK_BYTES, LAZY_BYTES, MIB, Raw, Served, registry_of, scratch};
use nbd_server::nbd::wire::Mode;
use nbd_server::nbd::{Limits, ListenAddr};

/// Runs a command to its end and hands back what it printed; its failure fails the test with all it said.
fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new("timeout").args(["-k", "5", "120", program]).args(args).output().unwrap();
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {args:?}: {}\n{out}\n{err}", output.status);
    out.into_owned()
}

fn json(text: &str) -> serde_json::Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// Bytes with stretches of zeros in them, some aligned and some not.
fn image(len: u64) -> Vec<u8> {
    let mut state = 0x9e37_79b9u32;
    let mut bytes: Vec<u8> = (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        })
        .collect();
    let at = |part: u64| usize::try_from(len / 8 * part).unwrap();
    bytes[at(1)..at(3)].fill(0);
    bytes[at(5) + 1000..at(6) - 77].fill(0);
    bytes
}

fn image_file(len: u64) -> (tempfile::TempDir, String) {
    let (dir, path) = scratch("image");
    std::fs::write(&path, image(len)).unwrap();
    (dir, path.to_str().unwrap().to_owned())
}

#[test]
fn nbdinfo_sees_every_capability() {
    let served = Served::new();
    let info = json(&run("nbdinfo", &["--json", &served.uri("disk")]));
    assert_eq!(info["protocol"], "newstyle-fixed");
    assert_eq!(info["structured"], true);
    let export = &info["exports"][0];
    assert_eq!(export["export-name"], "disk");
    assert_eq!(export["export-size"], DISK_BYTES);
    assert_eq!(export["description"], format!("{DISK_BYTES} bytes in chunks of 65536"));
    for can in
        ["can_cache", "can_df", "can_fast_zero", "can_flush", "can_fua", "can_multi_conn", "can_trim", "can_zero"]
    {
        assert_eq!(export[can], true, "{can}");
    }
    assert_eq!(export["is_read_only"], false);
    assert_eq!((&export["block_size_minimum"], &export["block_size_preferred"]), (&1.into(), &4096.into()));
    assert_eq!(export["block_size_maximum"], 32 * MIB);
    let contexts: Vec<&str> =
        export["contexts"].as_array().unwrap().iter().map(|context| context.as_str().unwrap()).collect();
    assert_eq!(contexts, ["base:allocation", "nbd-server:residency"]);
    let read_only = json(&run("nbdinfo", &["--json", &served.uri("ro")]));
    assert_eq!(read_only["exports"][0]["is_read_only"], true);
}

#[test]
fn nbdinfo_lists_what_can_be_attached() {
    let served = Served::new();
    let list = json(&run("nbdinfo", &["--json", "--list", &served.uri("")]));
    let names: Vec<&str> =
        list["exports"].as_array().unwrap().iter().map(|export| export["export-name"].as_str().unwrap()).collect();
    assert_eq!(names, ["big", "disk", "disk2", "lazy", "ro"]);
    let list = run("qemu-nbd", &["--list", &format!("--bind={}", host(&served)), &format!("--port={}", port(&served))]);
    for name in names {
        assert!(list.contains(&format!("export: '{name}'")), "{list}");
    }
}

/// It takes 0.2 s for each export, all on one connection.
#[test]
fn nbdinfo_lists_more_exports_than_fit_into_one_deadline() {
    const EXPORTS: usize = 20;
    let served = Served::start(
        Limits { handshake: Duration::from_secs(2), ..Limits::default() },
        &"127.0.0.1:0".parse().unwrap(),
        async |_| registry_of(&(0..EXPORTS).map(|nth| format!("vm-{nth}")).collect::<Vec<_>>()).await,
    );
    let list = json(&run("nbdinfo", &["--json", "--list", &served.uri("")]));
    assert_eq!(list["exports"].as_array().unwrap().len(), EXPORTS);
}

fn host(served: &Served) -> String {
    served.host_port().rsplit_once(':').unwrap().0.to_owned()
}

fn port(served: &Served) -> String {
    served.host_port().rsplit_once(':').unwrap().1.to_owned()
}

#[test]
fn nbdinfo_maps_both_contexts() {
    let served = Served::new();
    Raw::attach(&served, "lazy", Mode::Simple).write(0, &[1; 65_536]);
    let triples = |context: &str| {
        let map = json(&run("nbdinfo", &["--json", &format!("--map={context}"), &served.uri("lazy")]));
        let number = |entry: &serde_json::Value, key: &str| entry[key].as_u64().unwrap();
        let entries = map.as_array().unwrap().iter();
        entries.map(|e| (number(e, "offset"), number(e, "length"), number(e, "type"))).collect::<Vec<_>>()
    };
    let half = LAZY_BYTES / 2;
    assert_eq!(triples("base:allocation"), [(0, 65_536, 0), (65_536, half - 65_536, 3), (half, half, 0)]);
    assert_eq!(triples("nbd-server:residency"), [(0, 65_536, 3), (65_536, half - 65_536, 4), (half, half, 0)]);
}

#[test]
fn nbdcopy_brings_an_image_in_and_out_over_several_connections() {
    let served = Served::new();
    let (_dir, path) = image_file(DISK_BYTES);
    run("nbdcopy", &["--connections=4", "--flush", &path, &served.uri("disk")]);
    let (_out, back) = scratch("back");
    run("nbdcopy", &["--connections=4", &served.uri("disk"), back.to_str().unwrap()]);
    assert!(std::fs::read(&back).unwrap() == image(DISK_BYTES));
    // From export to export, and over the synchronous engine, which reads without structured replies' asynchrony.
    run("nbdcopy", &["--synchronous", "--destination-is-zero", &served.uri("ro"), &served.uri("disk2")]);
}

#[test]
fn nbdcopy_works_over_a_unix_socket() {
    let (_guard, socket) = scratch("nbd.sock");
    let served = Served::start(Limits::default(), &ListenAddr::Unix(socket), common::nbd::registry);
    let (_dir, path) = image_file(MIB);
    run("nbdcopy", &[&path, &served.uri("disk2")]);
    let (_out, back) = scratch("back");
    run("nbdcopy", &[&served.uri("disk2"), back.to_str().unwrap()]);
    assert!(std::fs::read(&back).unwrap() == image(MIB));
}

#[test]
fn qemu_img_converts_compares_and_maps() {
    let served = Served::new();
    let (_dir, path) = image_file(DISK_BYTES);
    let uri = served.uri("disk");
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "-m", "8", "-W", &path, &uri]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &path, &uri]);
    assert!(Raw::attach(&served, "disk", Mode::Extended).read(0, 32 * MIB) == image(DISK_BYTES)[..32 << 20]);
    let map = json(&run("qemu-img", &["map", "--output=json", "-f", "raw", &uri]));
    let zero = map.as_array().unwrap().iter().filter(|entry| entry["zero"] == true && entry["data"] == false);
    let zero_bytes: u64 = zero.map(|entry| entry["length"].as_u64().unwrap()).sum();
    assert!(zero_bytes >= DISK_BYTES / 4, "{map}");
    run("qemu-img", &["bench", "-f", "raw", "-w", "-c", "2000", "-d", "32", "-s", "4096", "-t", "none", &uri]);
}

#[test]
fn qemu_io_writes_zeroes_discards_and_verifies() {
    let served = Served::new();
    let commands = [
        "write -P 0x11 0 1M",
        "write -f -P 0x22 1M 4k",
        "write -z 4k 8k",
        "write -z -u 64k 64k",
        "discard 128k 64k",
        "flush",
        "read -P 0x11 0 4k",
        "read -P 0 4k 8k",
        "read -P 0x11 12k 4k",
        "read -P 0 64k 64k",
        "read -P 0x22 1M 4k",
        "aio_write -P 0x33 2M 64k",
        "aio_flush",
        "read -P 0x33 2M 64k",
        "write -P 0x44 513 1",
        "read -P 0x44 513 1",
    ];
    let mut args: Vec<&str> = vec!["-f", "raw"];
    commands.iter().for_each(|command| args.extend(["-c", command]));
    let uri = served.uri("disk");
    args.push(&uri);
    let out = run("qemu-io", &args);
    assert!(!out.contains("failed") && !out.contains("error"), "{out}");
    let refused = Command::new("qemu-io").args(["-r", "-f", "raw", "-c", "write 0 1", &served.uri("ro")]).output();
    assert!(!refused.unwrap().status.success(), "a read-only export takes no writes");
}

#[test]
fn fio_verifies_random_writes_and_trims() {
    let served = Served::new();
    let uri = format!("--uri={}", served.uri("disk"));
    let (_guard, dir) = scratch("fio");
    std::fs::create_dir(&dir).unwrap();
    let aux = format!("--aux-path={}", dir.to_str().unwrap());
    let common = ["--name=t", "--ioengine=nbd", &uri, &aux, "--size=32m", "--iodepth=32", "--output-format=json"];
    let with = |args: &[&str]| {
        let all = [&common[..], args].concat();
        // It greets before the report begins.
        let said = run("fio", &all);
        json(&said[said.find('{').unwrap()..])
    };
    let report = with(&[
        "--rw=randwrite",
        "--bssplit=512/20:4k/60:64k/20",
        "--verify=crc32c",
        "--verify_fatal=1",
        "--do_verify=1",
        "--fsync=64",
    ]);
    assert_eq!(report["jobs"][0]["error"], 0);
    assert!(report["jobs"][0]["read"]["io_bytes"].as_u64().unwrap() > 0, "it was verified");
    let report = with(&["--rw=randtrim", "--bs=64k", "--number_ios=200"]);
    assert_eq!(report["jobs"][0]["error"], 0);
    assert!(report["jobs"][0]["trim"]["total_ios"].as_u64().unwrap() > 0);
}

#[test]
fn libnbd_finds_every_command_flag_and_error() {
    let served = Served::new();
    let said = run("/usr/bin/python3", &["tests/clients/libnbd.py", &host(&served), &port(&served)]);
    assert_eq!(said.trim(), "all is well");
}

/// Mounting needs root and FUSE; where either is missing there is nothing to try, and the test says so.
#[test]
fn nbdfuse_shows_an_export_as_a_file() {
    let mount = tempfile::tempdir().unwrap();
    let root = rustix::process::geteuid().is_root();
    if !root || std::fs::File::open("/dev/fuse").is_err() {
        println!("not tried: it takes root and /dev/fuse");
        return;
    }
    let served = Served::new();
    let file = mount.path().join("disk");
    let mut fuse = Command::new("nbdfuse").arg(&file).arg(served.uri("disk")).spawn().unwrap();
    let begun = Instant::now();
    while !file.exists() {
        assert!(begun.elapsed() < Duration::from_secs(20), "nbdfuse does not mount");
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(std::fs::metadata(&file).unwrap().len(), DISK_BYTES);
    let written = image(3 * MIB);
    let disk = std::fs::File::options().read(true).write(true).open(&file).unwrap();
    disk.write_all_at(&written, MIB + 77).unwrap();
    disk.sync_all().unwrap();
    drop(disk);
    run("umount", &[mount.path().to_str().unwrap()]);
    assert!(fuse.wait().unwrap().success());
    let mut client = Raw::attach(&served, "disk", Mode::Simple);
    assert!(client.read(MIB + 77, 3 * MIB) == written);
}
