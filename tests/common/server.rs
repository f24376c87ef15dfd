//! The real binary as a black box: started in a directory of its own, on a free port, ended by its process id.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use serde_json::Value;

use super::http::{self, Response};

/// How long a server may take to be ready, or to stop.
const PATIENCE: Duration = Duration::from_secs(60);

/// Credentials that no endpoint of a test looks at.
pub const S3_KEYS: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "test"), ("AWS_SECRET_ACCESS_KEY", "test-secret")];

/// A command that runs the binary with nothing of this process's environment.
pub fn nbd_server() -> Command {
    nbd_server_through(&[])
}

/// The same through a program that becomes it; an empty launcher is none.
pub fn nbd_server_through(launcher: &[String]) -> Command {
    let server = env!("CARGO_BIN_EXE_nbd-server");
    let mut command = match launcher {
        [] => Command::new(server),
        [program, args @ ..] => {
            let mut command = Command::new(program);
            command.args(args).arg(server);
            command
        }
    };
    command.env_clear().env("PATH", std::env::var_os("PATH").unwrap_or_default()).stdin(Stdio::null());
    command
}

/// Runs the binary until it ends by itself; one that is still there after a while is a failed test.
pub fn run_to_end(command: &mut Command) -> Output {
    let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        if Instant::now() > deadline {
            child.kill().unwrap();
            let output = child.wait_with_output().unwrap();
            panic!("still running; it said: {}", String::from_utf8_lossy(&output.stderr));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    child.wait_with_output().unwrap()
}

/// Runs another program, which must succeed, and returns what it wrote.
pub fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).stdin(Stdio::null()).output();
    let output = output.unwrap_or_else(|e| panic!("{program}: {e}; run `make setup`"));
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {args:?}: {error}");
    String::from_utf8(output.stdout).unwrap()
}

/// A running server with its directories, which go when it is dropped.
pub struct TestServer {
    dir: tempfile::TempDir,
    launcher: Vec<String>,
    args: Vec<OsString>,
    env: Vec<(String, String)>,
    running: Option<Running>,
}

struct Running {
    child: Child,
    log: Arc<Log>,
    /// The first NBD address of the ready line, as a URI without an export.
    uri: String,
}

impl Drop for Running {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a server wrote to stderr so far.
#[derive(Default)]
struct Log {
    lines: Mutex<(Vec<String>, bool)>,
    grown: Condvar,
}

impl TestServer {
    /// Starts `serve` with everything in a new directory, `--listen 127.0.0.1:0`, and the given further flags and
    /// variables; returns when it is ready.
    pub fn start(args: &[&str], env: &[(&str, &str)]) -> Self {
        Self::start_through(Vec::new(), args, env)
    }

    /// The same on a bucket of an S3 endpoint.
    pub fn on_s3(endpoint: &str, bucket: &str, args: &[&str]) -> Self {
        let s3 = ["--storage-backend", "s3", "--bucket", bucket, "--endpoint-url", endpoint];
        Self::start(&[&s3, args].concat(), &S3_KEYS)
    }

    /// The same through a launcher, which says where it listens unless the flags do.
    pub fn start_through(launcher: Vec<String>, args: &[&str], env: &[(&str, &str)]) -> Self {
        let env = env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let args = args.iter().map(OsString::from).collect();
        let mut server = Self { dir: tempfile::tempdir().unwrap(), launcher, args, env, running: None };
        server.start_again();
        server
    }

    /// The command that [`TestServer::start`] runs.
    pub fn command(&self) -> Command {
        let mut command = nbd_server_through(&self.launcher);
        command.arg("serve").arg("--admin-sock").arg(self.socket());
        let given = |flag: &str| self.args.iter().any(|arg| arg.to_string_lossy().starts_with(flag));
        if !given("--listen") && self.launcher.is_empty() {
            command.args(["--listen", "127.0.0.1:0"]);
        }
        if !given("--cache-root") {
            command.arg("--cache-root").arg(self.cache_root());
        }
        if !given("--storage-backend") {
            command.arg("--local-root").arg(self.local_root());
        }
        command.args(&self.args).envs(self.env.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Starts a server that was stopped or killed again, on the same directories.
    pub fn start_again(&mut self) {
        assert!(self.running.is_none(), "it is running");
        let mut child = self.command().stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Log::default());
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let sink = Arc::clone(&log);
        #[allow(clippy::disallowed_methods, reason = "a test's own thread")]
        std::thread::spawn(move || sink.follow(lines));
        let mut running = Running { child, log, uri: String::new() };
        let ready = running.log.wait_for("ready: ");
        let uri = ready.split_whitespace().find(|word| word.starts_with("nbd"));
        running.uri = uri.unwrap().trim_end_matches(';').to_owned();
        self.running = Some(running);
    }

    fn running(&self) -> &Running {
        self.running.as_ref().expect("a running server")
    }

    /// The directory of everything.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// The cache root, unless the arguments chose another.
    pub fn cache_root(&self) -> PathBuf {
        self.dir().join("cache")
    }

    /// The object store, unless the arguments chose another backend.
    pub fn local_root(&self) -> PathBuf {
        self.dir().join("store")
    }

    pub fn socket(&self) -> PathBuf {
        self.dir().join("admin.sock")
    }

    pub fn pid(&self) -> u32 {
        self.running().child.id()
    }

    /// The URI of an export on the first address.
    pub fn nbd_uri(&self, export: &str) -> String {
        let uri = &self.running().uri;
        match uri.split_once('?') {
            Some((start, query)) => format!("{start}{export}?{query}"),
            None => format!("{uri}{export}"),
        }
    }

    /// The first TCP address, `127.0.0.1:PORT`.
    pub fn nbd_address(&self) -> String {
        self.running().uri.strip_prefix("nbd://").expect("a TCP address").trim_end_matches('/').to_owned()
    }

    /// An API call: status and JSON. A null body is none.
    pub fn api(&self, method: &str, path: &str, body: Value) -> (u16, Value) {
        let response = self.http(method, path, &if body.is_null() { String::new() } else { body.to_string() });
        (response.status, response.json())
    }

    /// An API call with any body.
    pub fn http(&self, method: &str, path: &str, body: &str) -> Response {
        http::call(&self.socket(), method, path, body)
    }

    /// An API call that must succeed.
    #[track_caller]
    pub fn ok(&self, method: &str, path: &str, body: Value) -> Value {
        let (status, answer) = self.api(method, path, body);
        assert!((200..300).contains(&status), "{method} {path}: {status} {answer}");
        answer
    }

    /// Everything written to stderr so far by the server that runs.
    pub fn log(&self) -> String {
        self.running().log.text()
    }

    /// The first log line with `part` in it, once it is there.
    pub fn wait_for_log(&self, part: &str) -> String {
        self.running().log.wait_for(part)
    }

    /// Sends a signal, by number.
    pub fn signal(&self, number: i32) {
        let status = Command::new("kill").arg(format!("-{number}")).arg(self.pid().to_string()).status().unwrap();
        assert!(status.success());
    }

    /// Waits until the process has ended by itself.
    pub fn wait(&mut self) -> ExitStatus {
        let mut running = self.running.take().expect("a running server");
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = running.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "still running: {}", running.log.text());
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends the process with SIGKILL, as a crash would.
    pub fn kill9(&mut self) {
        self.signal(9);
        assert_eq!(self.wait().signal(), Some(9));
    }

    /// Stops the server with SIGTERM; it must end with status 0.
    pub fn stop(&mut self) {
        self.signal(15);
        let log = Arc::clone(&self.running().log);
        let status = self.wait();
        assert_eq!(status.code(), Some(0), "{}", log.text());
    }
}

impl Log {
    fn follow(&self, lines: impl Iterator<Item = std::io::Result<String>>) {
        for line in lines.map_while(Result::ok) {
            self.lines.lock().unwrap().0.push(line);
            self.grown.notify_all();
        }
        self.lines.lock().unwrap().1 = true;
        self.grown.notify_all();
    }

    fn text(&self) -> String {
        self.lines.lock().unwrap().0.join("\n")
    }

    fn wait_for(&self, part: &str) -> String {
        let deadline = Instant::now() + PATIENCE;
        let mut state = self.lines.lock().unwrap();
        loop {
            if let Some(line) = state.0.iter().find(|line| line.contains(part)) {
                return line.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.1 || left.is_zero() {
                // Not while the lock is held: that would poison it for the others.
                let said = state.0.join("\n");
                drop(state);
                panic!("the server ended or fell silent without {part:?}; it said:\n{said}");
            }
            state = self.grown.wait_timeout(state, left).unwrap().0;
        }
    }
}
