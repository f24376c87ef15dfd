//! The real binary is killed again and again while clients write, flush and publish.
//!
//! `NBD_TEST_KILL_ROUNDS` sets how often, `NBD_TEST_SEED` where chance begins; a failure says how to repeat it.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout, missing_docs)]

mod common;

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread::JoinHandle;
use std::time::Duration;

use common::server::{TestServer, run};
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};

const BLOCK: usize = 4096;
const BLOCKS: u64 = 512;
/// Connections at a time; each has every so-many-th block, so that they meet in every chunk.
const CONNECTIONS: u64 = 4;
/// How many of a thousand writes are flushed, in different rounds.
const FLUSHES_PER_MILLE: [u64; 3] = [0, 1, 40];
const DEFAULT_ROUNDS: u64 = 20;
/// How long a client may take to connect, on a machine that compiles.
const PATIENCE: Duration = Duration::from_secs(60);

fn variable(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|e| panic!("{name}={text}: {e}")))
}

/// Says how to repeat the run if the test fails.
struct HowToRepeat {
    seed: u64,
    rounds: u64,
}

impl Drop for HowToRepeat {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self { seed, rounds } = self;
            println!(
                "seed {seed}; repeat with: NBD_TEST_SEED={seed} NBD_TEST_KILL_ROUNDS={rounds} cargo test --test kill"
            );
        }
    }
}

/// What the clients saw of every block: the last number replied to, and the last sent.
#[derive(Default)]
struct Seen {
    acked: HashMap<u64, u64>,
    issued: HashMap<u64, u64>,
    flushes: usize,
}

impl Seen {
    fn take(&mut self, line: &str) {
        let mut words = line.split(' ');
        let kind = words.next().unwrap();
        let mut number = || words.next().unwrap().parse::<u64>().unwrap();
        match kind {
            "i" => drop(self.issued.insert(number(), number())),
            "a" => drop(self.acked.insert(number(), number())),
            "f" => self.flushes += 1,
            _ => {}
        }
    }

    fn last(&self) -> u64 {
        self.issued.values().copied().max().unwrap_or(0)
    }

    /// Every word of every block is one number between the last replied to, which is at least the last flushed, and
    /// the last sent; from there the next round goes on.
    fn check(&mut self, image: &[u8]) {
        for (block, bytes) in (0..BLOCKS).zip(image.chunks(BLOCK)) {
            let low = self.acked.get(&block).copied().unwrap_or(0);
            let high = self.issued.get(&block).copied().unwrap_or(0);
            for word in bytes.chunks(8) {
                let found = u64::from_le_bytes(word.try_into().unwrap());
                assert!((low..=high).contains(&found), "block {block}: {found}, not between {low} and {high}");
            }
            self.acked.insert(block, u64::from_le_bytes(bytes[..8].try_into().unwrap()));
        }
    }
}

/// One connection, whose client writes until its server is gone.
struct Client {
    child: Child,
    lines: JoinHandle<Vec<String>>,
}

impl Client {
    fn start(uri: &str, first: u64, per_mille: u64, seed: u64, number: u64, connected: mpsc::Sender<()>) -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/clients/counters.py");
        let numbers = [BLOCKS, first, CONNECTIONS, per_mille, seed, number].map(|n| n.to_string());
        let mut child = Command::new("/usr/bin/python3")
            .arg(script)
            .arg(uri)
            .args(numbers)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let read = move || {
            let tell = |line: &String| {
                if line == "connected" {
                    connected.send(()).unwrap();
                }
            };
            lines.map(Result::unwrap).inspect(tell).collect()
        };
        Self { child, lines: std::thread::Builder::new().spawn(read).unwrap() }
    }

    fn end(mut self) -> Vec<String> {
        self.child.wait().unwrap();
        self.lines.join().unwrap()
    }
}

/// Publishes one snapshot after the other until the server is gone.
fn publisher(server: &TestServer) -> Child {
    let script = r#"while curl -sS --unix-socket "$0" -X POST http://localhost/v1/exports/disk/snapshot; do :; done"#;
    let mut command = Command::new("sh");
    command.args(["-c", script]).arg(server.socket()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap()
}

fn image(server: &TestServer) -> Vec<u8> {
    let path = server.dir().join("disk.img");
    run("nbdcopy", &[&server.nbd_uri("disk"), path.to_str().unwrap()]);
    std::fs::read(path).unwrap()
}

#[test]
fn kill_9_under_load_loses_no_acknowledged_write() {
    let rounds = variable("NBD_TEST_KILL_ROUNDS").unwrap_or(DEFAULT_ROUNDS);
    let seed = variable("NBD_TEST_SEED").unwrap_or_else(rand::random);
    let _how = HowToRepeat { seed, rounds };
    let mut chance = StdRng::seed_from_u64(seed);
    let mut server = TestServer::start(&["--chunk-size", "65536"], &[]);
    server.ok("POST", "/v1/exports/create", json!({"export_id": "disk", "size": BLOCKS * BLOCK as u64}));
    let mut seen = Seen::default();
    for round in 0..rounds {
        let (connected, connections) = mpsc::channel();
        let uri = server.nbd_uri("disk");
        // What was never flushed must be there, too: a process that dies is no power loss.
        let per_mille = FLUSHES_PER_MILLE[chance.random_range(0..FLUSHES_PER_MILLE.len())];
        let start = |first| Client::start(&uri, first, per_mille, chance.random(), seen.last(), connected.clone());
        let clients: Vec<_> = (0..CONNECTIONS).map(start).collect();
        for _ in 0..CONNECTIONS {
            connections.recv_timeout(PATIENCE).expect("a client that connects");
        }
        // In two of three rounds snapshots are published all the while.
        let publisher = (round % 3 != 0).then(|| publisher(&server));
        std::thread::sleep(Duration::from_millis(chance.random_range(50..300)));
        server.kill9();
        if let Some(mut publisher) = publisher {
            publisher.wait().unwrap();
        }
        for client in clients {
            let lines = client.end();
            assert!(lines.len() > 1, "round {round}: a client did nothing");
            lines.iter().for_each(|line| seen.take(line));
        }
        server.start_again();
        println!("round {round}");
        seen.check(&image(&server));
    }
    assert!(seen.flushes > 0, "nothing was flushed");
    // What was published is the same, seen from a server that has nothing cached.
    server.ok("POST", "/v1/exports/disk/snapshot", Value::Null);
    let here = image(&server);
    server.stop();
    std::fs::remove_dir_all(server.cache_root()).unwrap();
    server.start_again();
    assert!(image(&server) == here, "another server reads another image");
    server.stop();
}
