//! What one client, and all of them together, may cost. Every wait and every buffer of this floor is bounded here.

use std::time::Duration;

use crate::metrics::Counter;

/// The longest payload that is served, in bytes; also the maximum block size that clients are told.
pub const MAX_PAYLOAD_BYTES: u32 = 32 << 20;
/// A WRITE longer than [`MAX_PAYLOAD_BYTES`] is read, thrown away and refused up to this many bytes; beyond it the
/// connection is closed.
pub const MAX_DRAINED_PAYLOAD_BYTES: u64 = 64 << 20;

/// What a connection always has for itself of payload bytes in flight, unless said otherwise.
pub const ALLOWANCE_BYTES: usize = 256 << 10;

/// The bounds of the handshake; they alone keep the pure part of it in check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionLimits {
    /// Options per connection, beside those for what was listed; one more closes it. 1,000 unless said otherwise.
    pub options: u32,
    /// Further options for each export that the client had listed, so that it may look at each. 4.
    pub options_per_export: u32,
    /// Option data is read and understood up to this many bytes. 64 KiB, which holds the longest legal GO.
    pub read_bytes: u32,
    /// Longer option data is thrown away and refused up to this many bytes. An option that announces more is refused at
    /// once and the connection closed; so much of what follows is thrown away at most, as after every close in the
    /// handshake. 1 MiB.
    pub drained_bytes: u32,
}

/// All bounds of a server's NBD side. The defaults are right for nearly everybody.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Connections at once; one more is closed at once. 16,384, if there are descriptors for as many.
    pub connections: usize,
    /// Busy connections that have a thread of their own; the others share those of the runtime. 256.
    pub threads: usize,
    /// How long a client in the handshake may take for its next whole option, and for taking what it is answered. 10 s.
    /// The time that the server takes to open an export does not count, here and in all.
    pub handshake: Duration,
    /// How long it may take for the whole of it, from the greeting to an attached export. 10 minutes: `nbdinfo --list`
    /// takes 0.2 s for each export, because it leaves half of its options to the kernel's timer (`MSG_MORE`).
    pub handshake_in_all: Duration,
    /// The bounds of the options.
    pub option: OptionLimits,
    /// Requests in flight per connection, replies not yet taken included; the rest waits in the socket. 256 (the kernel's
    /// client has 128).
    pub requests: usize,
    /// Payload bytes in flight per connection. 64 MiB: two of the longest requests.
    pub connection_bytes: usize,
    /// Payload bytes in flight of all connections together, beyond the allowance each one has. 1 GiB.
    pub shared_bytes: usize,
    /// Payload bytes in flight that a connection always has for itself, so that small requests go on when greedy clients
    /// have used up `shared_bytes`. 256 KiB.
    pub allowance_bytes: usize,
    /// How long a client may leave a reply untaken, or a request half sent, without one byte of progress. While others
    /// wait for a part of `shared_bytes` it is also the time in which a client has to move all that it holds of it. 60 s.
    pub stalled: Duration,
    /// How long a stop waits for what was accepted. 10 s.
    pub drain: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 16_384,
            threads: 256,
            handshake: Duration::from_secs(10),
            handshake_in_all: Duration::from_secs(600),
            option: OptionLimits {
                options: 1_000,
                options_per_export: 4,
                read_bytes: 64 << 10,
                drained_bytes: 1 << 20,
            },
            requests: 256,
            connection_bytes: 64 << 20,
            shared_bytes: 1 << 30,
            allowance_bytes: ALLOWANCE_BYTES,
            stalled: Duration::from_secs(60),
            drain: Duration::from_secs(10),
        }
    }
}

// A request of the longest legal payload must fit, or it would wait for ever.
const _: () = assert!((MAX_PAYLOAD_BYTES as u64) < MAX_DRAINED_PAYLOAD_BYTES);

/// How often clients met each limit.
#[derive(Debug)]
pub(super) struct Bites {
    pub(super) connections: Bite,
    pub(super) handshake: Bite,
    pub(super) options: Bite,
    pub(super) requests: Bite,
    pub(super) bytes: Bite,
    pub(super) payload: Bite,
    pub(super) stalled: Bite,
    pub(super) slow: Bite,
    pub(super) drain: Bite,
}

impl Bites {
    /// Every limit, met by no client yet.
    pub(super) fn none() -> Self {
        Self {
            connections: Bite::of("connections"),
            handshake: Bite::of("handshake"),
            options: Bite::of("options"),
            requests: Bite::of("requests"),
            bytes: Bite::of("bytes"),
            payload: Bite::of("payload"),
            stalled: Bite::of("stalled"),
            slow: Bite::of("slow"),
            drain: Bite::of("drain"),
        }
    }

    /// How often each limit has bitten.
    pub(super) fn counts(&self) -> [(&'static str, u64); 9] {
        let Self { connections, handshake, options, requests, bytes, payload, stalled, slow, drain } = self;
        [connections, handshake, options, requests, bytes, payload, stalled, slow, drain]
            .map(|bite| (bite.limit, bite.count.get()))
    }
}

/// How often clients met one limit.
#[derive(Debug)]
pub(super) struct Bite {
    limit: &'static str,
    count: Counter,
}

impl Bite {
    fn of(limit: &'static str) -> Self {
        Self { limit, count: Counter::default() }
    }

    /// Counts and logs a client that was refused or cut off.
    pub(super) fn log(&self, text: &str) {
        self.count.increment();
        tracing::warn!(limit = self.limit, "{text}");
    }

    /// Counts a request that has to wait, and logs the first one alone: there may be as many of them as of requests.
    pub(super) fn note_wait(&self, text: &str) {
        if self.count.increment() == 0 {
            tracing::warn!(limit = self.limit, "{text} (further cases are counted, but not logged)");
        }
    }
}
