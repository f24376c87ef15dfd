//! A virtual machine with Debian's kernel in it, to try that kernel's own NBD client.
//!
//! It is a machine in software alone (no KVM), made of what `scripts/setup-vm.sh` left in `.vm`, and reaches this host's
//! loopback as [`HOST`]. It never outlives its test: it is killed by its process id when it is dropped, when its time is
//! up, and by the kernel if the test dies without a word.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// This host's loopback as the guest sees it.
pub const HOST: &str = "10.0.2.2";

/// How long a machine may live; whoever waits for it then fails.
const LIFETIME: Duration = Duration::from_secs(170);

/// The guest's, whatever this host has.
pub const PROCESSORS: usize = 4;

const MEMORY_MIB: &str = "1024";

/// The script that fetches the machine: `.vm/made-by` is a copy of the one that did.
const SETUP: &[u8] = include_bytes!("../../scripts/setup-vm.sh");

/// A running guest.
pub struct Vm {
    machine: Child,
    scripts: ChildStdin,
    answers: Receiver<String>,
    deadline: Instant,
    dir: tempfile::TempDir,
}

impl Vm {
    /// Boots a guest; returns when it takes commands.
    pub fn boot() -> Self {
        let vm = Path::new(env!("CARGO_MANIFEST_DIR")).join(".vm");
        assert!(
            std::fs::read(vm.join("made-by")).is_ok_and(|made_by| made_by == SETUP),
            "the virtual machine in {} is missing or not the one that scripts/setup-vm.sh makes: run `make setup`",
            vm.display()
        );
        let dir = tempfile::tempdir().unwrap();
        let initramfs = pack_initramfs(&vm, dir.path());
        let mut machine = emulator(&vm)
            .args(["-M", "pc", "-accel", "tcg,thread=multi", "-cpu", "max", "-m", MEMORY_MIB])
            .args(["-smp", &PROCESSORS.to_string()])
            .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
            .arg("-kernel")
            .arg(vm.join("vmlinuz"))
            .arg("-initrd")
            .arg(initramfs)
            .args(["-append", "console=ttyS0 panic=-1"])
            .args(["-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile="])
            .arg("-serial")
            .arg(format!("file:{}", kernel_log(dir.path()).display()))
            .args(["-serial", "stdio"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, answers) = channel();
        let lines = BufReader::new(machine.stdout.take().unwrap()).lines();
        #[allow(clippy::disallowed_methods, reason = "a test's own thread")]
        std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| sender.send(line)));
        let scripts = machine.stdin.take().unwrap();
        let mut vm = Self { machine, scripts, answers, deadline: Instant::now() + LIFETIME, dir };
        vm.read_until("guest: ready");
        vm
    }

    /// Runs a shell script (`sh -eu`) in the guest; returns what it printed. Any other status than 0 fails the test.
    #[track_caller]
    pub fn run(&mut self, script: &str) -> String {
        let sent = format!("{}\nguest: run\n", script.trim());
        self.scripts.write_all(sent.as_bytes()).unwrap();
        let (output, status) = self.read_until("guest: exit ");
        assert_eq!(status, "0", "the guest's status of:\n{script}\nwhich said:\n{output}\n{}", self.kernel_log());
        output
    }

    /// The lines up to the one that starts with `marker`, and that one's rest.
    #[track_caller]
    fn read_until(&mut self, marker: &str) -> (String, String) {
        let mut output = String::new();
        loop {
            match self.answers.recv_timeout(self.deadline.saturating_duration_since(Instant::now())) {
                Ok(line) => match line.strip_prefix(marker) {
                    Some(rest) => return (output, rest.trim().to_owned()),
                    None => output = output + line.trim_end() + "\n",
                },
                Err(why) => {
                    let what = match why {
                        RecvTimeoutError::Timeout => "is not done in its time",
                        RecvTimeoutError::Disconnected => "ended",
                    };
                    panic!("the guest {what}, without {marker:?}; it said:\n{output}\n{}", self.kernel_log());
                }
            }
        }
    }

    /// The last lines of the guest's kernel log, as a text for a failed test.
    fn kernel_log(&self) -> String {
        const LINES: usize = 40;
        let log = std::fs::read(kernel_log(self.dir.path())).unwrap_or_default();
        let log = String::from_utf8_lossy(&log);
        let lines: Vec<&str> = log.lines().collect();
        format!("its kernel log ends with:\n{}", lines[lines.len().saturating_sub(LINES)..].join("\n"))
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = self.machine.kill();
        let _ = self.machine.wait();
    }
}

fn kernel_log(dir: &Path) -> PathBuf {
    dir.join("kernel.log")
}

fn pack_initramfs(vm: &Path, dir: &Path) -> PathBuf {
    let initramfs = dir.join("initramfs.cpio");
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/vm/initramfs.sh");
    let packed = Command::new(script).arg(vm).arg(&initramfs).output().unwrap();
    assert!(packed.status.success(), "packing the initramfs: {}", String::from_utf8_lossy(&packed.stderr));
    initramfs
}

/// The unpacked emulator, run by its own loader on its own libraries. `setpriv` ends it with this thread.
fn emulator(vm: &Path) -> Command {
    let root = vm.join("root/usr");
    let libraries = root.join("lib/x86_64-linux-gnu");
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--"])
        .arg(libraries.join("ld-linux-x86-64.so.2"))
        .arg("--library-path")
        .arg(&libraries)
        .arg(root.join("bin/qemu-system-x86_64"))
        .arg("-L")
        .arg(root.join("share/qemu"))
        .arg("-L")
        .arg(root.join("share/seabios"))
        .env("QEMU_MODULE_DIR", libraries.join("qemu"));
    command
}
