//! A real S3 endpoint over HTTP: `moto_server` as a child process on a free port, gone with the value that holds it.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How long the server may take until it answers; it is a Python program on a machine that compiles.
const START_LIMIT: Duration = Duration::from_secs(60);
/// How often a port that somebody else took in the meantime is replaced by another.
const START_ATTEMPTS: usize = 3;
/// How long one small request may take.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);

/// A running S3 endpoint with its buckets in memory.
#[derive(Debug)]
pub struct Moto {
    child: Child,
    address: SocketAddr,
}

impl Moto {
    /// Starts a server and waits until it answers.
    ///
    /// # Panics
    /// With the remedy, if there is no `moto_server` or it does not come up.
    #[must_use]
    pub fn start() -> Self {
        let program = program();
        for _ in 0..START_ATTEMPTS {
            if let Some(moto) = Self::try_start(&program) {
                return moto;
            }
        }
        panic!("{} ended or did not answer within {START_LIMIT:?}, {START_ATTEMPTS} times", program.display());
    }

    /// The same, with an empty bucket in it.
    ///
    /// # Panics
    /// As [`start`](Self::start).
    #[must_use]
    pub fn with_bucket(name: &str) -> Self {
        let moto = Self::start();
        moto.create_bucket(name);
        moto
    }

    fn try_start(program: &Path) -> Option<Self> {
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let address = free.local_addr().expect("the port's number");
        drop(free);
        let child = command(program)
            .args(["-H", "127.0.0.1", "-p", &address.port().to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|e| panic!("cannot run {}: {e}", program.display()));
        let mut moto = Self { child, address };
        let deadline = Instant::now() + START_LIMIT;
        while Instant::now() < deadline {
            if moto.child.try_wait().expect("the child's state").is_some() {
                return None;
            }
            if moto.request("GET /moto-api/ HTTP/1.1").is_ok() {
                return Some(moto);
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        None
    }

    /// The URL to give as `--endpoint-url`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Creates a bucket. The server takes unsigned requests.
    ///
    /// # Panics
    /// If the server refuses.
    pub fn create_bucket(&self, name: &str) {
        let answer = self.request(&format!("PUT /{name} HTTP/1.1")).expect("an answer");
        assert!(answer.starts_with("HTTP/1.1 200"), "creating bucket {name}: {answer}");
    }

    /// What the server answers to a request without body; also for looking behind the back of the code under test.
    pub fn request(&self, first_line: &str) -> std::io::Result<String> {
        let mut stream = TcpStream::connect_timeout(&self.address, REQUEST_LIMIT)?;
        stream.set_read_timeout(Some(REQUEST_LIMIT))?;
        // The region's own host name makes the server take the request for one to S3.
        let host = "s3.us-east-1.amazonaws.com";
        write!(stream, "{first_line}\r\nHost: {host}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        Ok(String::from_utf8_lossy(&answer).into_owned())
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        // By its own process id, also when the test panics.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What starts the program: by our own script, where the Python it was installed for is beside it.
fn command(program: &Path) -> Command {
    let python = program.with_file_name("python3");
    if !python.exists() {
        return Command::new(program);
    }
    let mut command = Command::new(python);
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/common/moto_server.py"));
    command
}

/// The program.
///
/// # Panics
/// With the remedy, if there is none.
#[must_use]
pub fn program() -> PathBuf {
    if let Some(path) = std::env::var_os("NBD_TEST_MOTO") {
        return path.into();
    }
    let local = Path::new(env!("CARGO_MANIFEST_DIR")).join(".venv/bin/moto_server");
    if local.exists() {
        return local;
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).map(|folder| folder.join("moto_server")).find(|file| file.exists()).unwrap_or_else(
        || panic!("there is no moto_server: run `make test`, which installs it, or name one in NBD_TEST_MOTO"),
    )
}
