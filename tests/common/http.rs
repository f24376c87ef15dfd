//! The least HTTP a test needs over a Unix socket; what it sends is the test's own bytes.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

/// How long a test waits for bytes before it calls that a hang.
const PATIENCE: Duration = Duration::from_secs(60);

/// An answer, taken apart.
#[derive(Debug)]
pub struct Response {
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    pub body: Vec<u8>,
}

impl Response {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n == name).map(|(_, v)| v.as_str())
    }

    /// The body as JSON; null if it is empty.
    pub fn json(&self) -> Value {
        if self.body.is_empty() {
            return Value::Null;
        }
        serde_json::from_slice(&self.body).unwrap_or_else(|e| panic!("{e} in {}", String::from_utf8_lossy(&self.body)))
    }
}

pub fn connect(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).unwrap_or_else(|e| panic!("connect {}: {e}", socket.display()));
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    stream
}

/// Sends a well-formed request and reads the answer.
pub fn call(socket: &Path, method: &str, path: &str, body: &str) -> Response {
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n");
    raw(socket, format!("{head}content-length: {length}\r\n\r\n{body}").as_bytes())
}

/// Sends any bytes and reads the answer.
pub fn raw(socket: &Path, request: &[u8]) -> Response {
    let mut stream = connect(socket);
    // A server may answer and close before it has read everything.
    match stream.write_all(request) {
        Err(e) if !matches!(e.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
            panic!("send: {e}")
        }
        _ => {}
    }
    let shown = String::from_utf8_lossy(&request[..request.len().min(60)]);
    read_response(&mut BufReader::new(stream)).unwrap_or_else(|| panic!("closed without an answer to {shown:?}"))
}

/// Reads one answer, or `None` if the server closed the connection without one.
pub fn read_response(stream: &mut BufReader<UnixStream>) -> Option<Response> {
    let mut line = String::new();
    match stream.read_line(&mut line) {
        Ok(0) => return None,
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return None,
        Err(e) => panic!("no answer: {e}"),
    }
    let status = line.split(' ').nth(1).unwrap_or_else(|| panic!("status line {line:?}")).parse().unwrap();
    let mut headers = Vec::new();
    loop {
        let mut line = String::new();
        stream.read_line(&mut line).unwrap();
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let mut response = Response { status, headers, body: Vec::new() };
    if let Some(length) = response.header("content-length") {
        let length = length.parse().unwrap();
        response.body.resize(length, 0);
        stream.read_exact(&mut response.body).unwrap();
    } else if status != 204 {
        stream.read_to_end(&mut response.body).unwrap();
    }
    Some(response)
}
