//! What FLUSH and FUA promise over NBD, if the host goes down right after the reply.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]

mod common;

use std::sync::Arc;

use common::hooked::Hooked;
use common::nbd::{Raw, Served};
use common::volumes::{id, read};
use nbd_server::disk::RealDisk;
use nbd_server::nbd::wire::{Mode, cflag, cmd};

/// What is on the disk at the moment of the power loss, as a server in the next boot finds it: the first byte of each of
/// the first eight 64 KiB. What was never flushed is gone, since only sealed marks count.
fn after_a_power_loss(served: &mut Served) -> Vec<u8> {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let disk = Hooked::new(RealDisk::default()).after_boot(9);
        let registry = served.site.start_on("served", Arc::new(disk)).await;
        let volume = registry.volume(&id("disk")).await.unwrap();
        let image = read(&volume, 0, 8 << 16).await;
        image.chunks(1 << 16).map(|chunk| chunk[0]).collect()
    })
}

#[test]
fn a_flush_on_one_connection_covers_the_writes_of_all() {
    let mut served = Served::new();
    let mut clients: Vec<Raw> = (0..4).map(|_| Raw::attach(&served, "disk", Mode::Structured)).collect();
    for (at, client) in (0u64..).zip(&mut clients) {
        assert_eq!(client.write(at << 16, &[7; 512]).errno, 0);
    }
    assert_eq!(clients[3].call(0, cmd::FLUSH, 0, 0, &[]).errno, 0);
    // After the flush: not covered.
    assert_eq!(clients[0].write(5 << 16, &[8; 512]).errno, 0);
    assert_eq!(after_a_power_loss(&mut served), [7, 7, 7, 7, 0, 0, 0, 0]);
}

#[test]
fn a_change_with_fua_is_durable_when_it_is_replied_to() {
    let mut served = Served::new();
    let mut client = Raw::attach(&served, "disk", Mode::Simple);
    let mut fua = |kind, chunk: u64, payload: &[u8], len| {
        assert_eq!(client.call(cflag::FUA, kind, chunk << 16, len, payload).errno, 0);
    };
    fua(cmd::WRITE, 0, &[7; 512], 512);
    fua(cmd::WRITE, 1, &[7; 512], 512);
    fua(cmd::WRITE, 2, &[7; 512], 512);
    fua(cmd::WRITE_ZEROES, 1, &[], 1 << 16);
    fua(cmd::TRIM, 2, &[], 1 << 16);
    assert_eq!(client.write(3 << 16, &[8; 512]).errno, 0);
    assert_eq!(after_a_power_loss(&mut served), [7, 0, 0, 0, 0, 0, 0, 0]);
}
