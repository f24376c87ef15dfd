//! `nbd-server`: network block devices that live in object storage, with a lazy local cache.
//!
//! The folders show the way a request takes, from the top down; imports run downward only.
//! `docs/architecture.md` draws the house.

pub mod admin;
pub mod background;
pub mod cache;
pub mod cli;
pub mod clock;
pub mod config;
pub mod disk;
pub mod manifest;
pub mod metrics;
pub mod nbd;
pub mod net;
pub mod sabotage;
pub mod server;
pub mod slices;
pub mod store;
pub mod sync;
pub mod units;
pub mod volume;
