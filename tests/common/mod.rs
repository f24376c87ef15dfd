//! Helpers that several test suites share. Each suite uses its own part of them.
#![allow(
    dead_code,
    unreachable_pub,
    missing_docs,
    reason = "no suite uses everything, and a suite is a crate of its own"
)]
#![allow(clippy::expect_used, clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail the test")]
#![allow(
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    reason = "small images; a failure says how to repeat it"
)]

pub mod attached;
pub mod certs;
pub mod hooked;
pub mod http;
pub mod images;
pub mod memory;
pub mod moto;
pub mod nbd;
pub mod package;
pub mod proxy;
pub mod scene;
pub mod server;
pub mod shaped;
pub mod sim;
pub mod volumes;
pub mod watched;

use std::path::Path;
use std::sync::Arc;

use nbd_server::clock::SystemClock;
use nbd_server::disk::RealDisk;
use nbd_server::store::remote::RemoteStore;
use nbd_server::volume::Services;
use nbd_server::volume::registry::Registry;

/// A registry over an empty store in memory, its cache in `dir`.
pub async fn registry(dir: &Path) -> Arc<Registry> {
    let (store, disk) = (Arc::new(RemoteStore::memory()), Arc::new(RealDisk::default()));
    let services = Services::new(store, volumes::root(), disk, Arc::new(SystemClock));
    Registry::discover(Arc::new(services), dir.to_owned()).await.unwrap()
}
