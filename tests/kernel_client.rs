//! The Linux kernel's own client, in a virtual machine: file systems live on exports as they would on disks.
//!
//! One machine for all of it, since a boot costs most of the time: the test tells one story, in steps.
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;
mod vm;

use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use common::server::TestServer;
use serde_json::{Value, json};
use vm::{HOST, Vm};

const MIB: u64 = 1 << 20;

/// The kernel uses no more of them than it has processors.
const CONNECTIONS: usize = vm::PROCESSORS;

/// A file system on an export, attached as one device of the guest.
struct Disk {
    export: &'static str,
    device: &'static str,
    mount_point: &'static str,
    mkfs: &'static str,
    /// Changes nothing and fails on the least flaw.
    fsck: &'static str,
}

const EXT4: Disk = Disk {
    export: "ext4",
    device: "/dev/nbd0",
    mount_point: "/mnt/ext4",
    mkfs: "mke2fs -q -t ext4",
    fsck: "e2fsck -f -n",
};

const XFS: Disk =
    Disk { export: "xfs", device: "/dev/nbd1", mount_point: "/mnt/xfs", mkfs: "mkfs.xfs -q", fsck: "xfs_repair -n" };

const DISKS: [&Disk; 2] = [&EXT4, &XFS];

/// How long files are written before the server dies: some copies are whole on the export then, the newest is not.
const WRITING: Duration = Duration::from_secs(4);

/// Files that every guest has, the same ones as long as it runs.
const TREE: &str = "/usr";

impl Disk {
    /// Over several connections, which the kernel refuses unless the server promises that a flush covers them all.
    #[track_caller]
    fn attach(&self, vm: &mut Vm, server: &TestServer) {
        let address = server.nbd_address();
        let port = address.rsplit_once(':').unwrap().1;
        let Self { export, device, .. } = self;
        vm.run(&format!("nbd-client -N {export} {HOST} {port} {device} -C {CONNECTIONS}"));
        let queues = vm.run(&format!("ls /sys/block/{}/mq", device.trim_start_matches("/dev/")));
        assert_eq!(queues.split_whitespace().count(), CONNECTIONS, "{device} has the queues {queues}");
    }

    #[track_caller]
    fn detach(&self, vm: &mut Vm) {
        vm.run(&format!("nbd-client -d {}", self.device));
    }

    #[track_caller]
    fn format(&self, vm: &mut Vm) {
        vm.run(&format!("{} {}", self.mkfs, self.device));
    }

    #[track_caller]
    fn mount(&self, vm: &mut Vm) {
        let Self { device, mount_point, .. } = self;
        vm.run(&format!("mkdir -p {mount_point}; mount -t {} {device} {mount_point}", self.export));
    }

    #[track_caller]
    fn unmount(&self, vm: &mut Vm) {
        vm.run(&format!("umount {}", self.mount_point));
    }

    #[track_caller]
    fn copy_tree_to(&self, vm: &mut Vm, name: &str) {
        vm.run(&format!("cp -a {TREE} {}/{name}; sync", self.mount_point));
    }

    #[track_caller]
    fn has_whole_tree(&self, vm: &mut Vm, name: &str) {
        let copy = checksums(vm, &format!("{}/{name}", self.mount_point));
        assert!(copy == checksums(vm, TREE), "{}: {name} differs from what was copied", self.export);
    }

    #[track_caller]
    fn is_clean(&self, vm: &mut Vm) {
        vm.run(&format!("{} {}", self.fsck, self.device));
    }
}

/// Names and contents of everything in a folder of the guest.
fn checksums(vm: &mut Vm, folder: &str) -> String {
    // The links say where they point; busybox has no fancier way to see all of it.
    let sums = vm.run(&format!(
        "cd {folder}; find . -type f | sort | xargs sha256sum; find . ! -type f | sort | xargs stat -c '%N %a'"
    ));
    assert!(sums.lines().count() > 20, "too few files in {folder}:\n{sums}");
    sums
}

/// What an export takes of this host's disk.
fn allocated_bytes(server: &TestServer, disk: &Disk) -> u64 {
    server.cache_root().join(disk.export).join("cache.raw").metadata().unwrap().blocks() * 512
}

#[test]
fn the_kernels_client_keeps_its_file_systems_over_restart_crash_and_snapshot() {
    let mut server = TestServer::start(&[], &[]);
    for (disk, size) in [(&EXT4, 256 * MIB), (&XFS, 512 * MIB)] {
        server.ok("POST", "/v1/exports/create", json!({ "export_id": disk.export, "size": size }));
    }
    let vm = &mut Vm::boot();
    the_sample_nbdtab_attaches_a_device(vm, &server);

    for disk in DISKS {
        disk.attach(vm, &server);
        disk.format(vm);
        disk.mount(vm);
        disk.copy_tree_to(vm, "first");
        deleted_files_give_their_space_back(vm, &server, disk);
        disk.unmount(vm);
        disk.is_clean(vm);
        disk.detach(vm);
    }

    server.stop();
    server.start_again();
    for disk in DISKS {
        disk.attach(vm, &server);
        disk.is_clean(vm);
        disk.mount(vm);
        disk.has_whole_tree(vm, "first");
    }

    synced_files_survive_a_crash_of_the_server(vm, &mut server);
    a_snapshot_holds_the_file_systems(vm, &server);
}

/// As it stands: what is one host there is two here, so the guest carries connections on, well enough to attach.
fn the_sample_nbdtab_attaches_a_device(vm: &mut Vm, server: &TestServer) {
    server.ok("POST", "/v1/exports/create", json!({ "export_id": "vm-1", "size": 8 * MIB }));
    let sample = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/contrib/nbdtab")).unwrap();
    let port = server.nbd_address().rsplit_once(':').unwrap().1.to_owned();
    vm.run(&format!("nc -ll -p 10809 -e nc {HOST} {port} >/dev/null 2>&1 & echo $! >/tmp/relay; sleep 1"));
    let said = vm.run(&format!("cat >/etc/nbdtab <<'TABLE'\n{sample}TABLE\nnbd-client nbd0 2>&1"));
    assert!(!said.contains("arning"), "{said}");
    assert_eq!(vm.run("cat /sys/block/nbd0/size").trim(), (8 * MIB / 512).to_string());
    assert_eq!(vm.run("ls /sys/block/nbd0/mq").split_whitespace().count(), CONNECTIONS, "conns=4");
    vm.run("nbd-client -d /dev/nbd0; kill $(cat /tmp/relay)");
}

fn deleted_files_give_their_space_back(vm: &mut Vm, server: &TestServer, disk: &Disk) {
    let before = allocated_bytes(server, disk);
    let mount_point = disk.mount_point;
    vm.run(&format!("dd if=/dev/urandom of={mount_point}/large bs=1M count=32; sync"));
    let with_file = allocated_bytes(server, disk);
    assert!(with_file >= before + 30 * MIB, "{}: {before} bytes, then {with_file}", disk.export);
    vm.run(&format!("rm {mount_point}/large; sync; fstrim -v {mount_point}"));
    let trimmed = allocated_bytes(server, disk);
    assert!(trimmed + 30 * MIB <= with_file, "{}: {with_file} bytes, then {trimmed}", disk.export);
}

/// The server dies under mounted file systems that are being written to.
fn synced_files_survive_a_crash_of_the_server(vm: &mut Vm, server: &mut TestServer) {
    for disk in DISKS {
        disk.copy_tree_to(vm, "second");
    }
    for disk in DISKS {
        let third = format!("{}/third", disk.mount_point);
        let write = format!("rm -rf {third} && cp -a {TREE} {third} && sync");
        vm.run(&format!("(while {write}; do :; done) >/dev/null 2>&1 & echo $! >>/tmp/writers"));
    }
    std::thread::sleep(WRITING);
    server.kill9();
    for disk in DISKS {
        // First, since the kernel lets what was in flight wait for another 30 s else.
        disk.detach(vm);
    }
    // Without a device the file systems shut themselves down, and the writers end with an error.
    vm.run("for writer in $(cat /tmp/writers); do while [ -e /proc/$writer ]; do sleep 0.1; done; done");
    for disk in DISKS {
        disk.unmount(vm);
    }
    server.start_again();
    for disk in DISKS {
        disk.attach(vm, server);
        // Mounting replays the file system's journal; a repair that only looks would complain about it before.
        disk.mount(vm);
        disk.has_whole_tree(vm, "first");
        disk.has_whole_tree(vm, "second");
        disk.unmount(vm);
        disk.is_clean(vm);
    }
}

/// The snapshot of an attached export, read by another server that has nothing but the store.
fn a_snapshot_holds_the_file_systems(vm: &mut Vm, server: &TestServer) {
    for disk in DISKS {
        let snapshot = server.ok("POST", &format!("/v1/exports/{}/snapshot", disk.export), Value::Null);
        assert_eq!(snapshot["snapshot_created"], true, "{snapshot}");
        disk.detach(vm);
    }
    let store = server.local_root();
    let elsewhere = TestServer::start(&["--storage-backend", "local", "--local-root", store.to_str().unwrap()], &[]);
    for disk in DISKS {
        disk.attach(vm, &elsewhere);
        disk.is_clean(vm);
        disk.mount(vm);
        disk.has_whole_tree(vm, "first");
        disk.has_whole_tree(vm, "second");
        disk.unmount(vm);
        disk.detach(vm);
    }
}
