//! What hostile bytes are thrown at: one function per target, each asserting what must hold whatever the bytes are.
//!
//! Two drivers share them. `cargo +nightly fuzz run TARGET` searches with coverage for as long as it is let; it needs
//! cargo-fuzz and a nightly toolchain. `cargo test --test fuzz` replays every file of `corpus/TARGET/` and then mutates
//! them for a few seconds, on a stable toolchain. A file that once made a target fail is kept in the corpus, under a name
//! that says what it is.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    missing_docs,
    unreachable_pub,
    reason = "a target fails by panicking"
)]

mod codecs;
mod device;
mod handshake;
mod memory_disk;
mod replies;
mod requests;

pub use codecs::{cache_meta, head, journal, manifest};
pub use handshake::handshake;
pub use requests::{requests_extended, requests_simple, requests_structured};
