//! An export of a real server, attached over NBD, and what it must read as.

use nbd_server::nbd::wire::{Mode, cmd};

use super::nbd::{MIB, Raw};
use super::server::TestServer;

/// NBD error numbers.
pub const EIO: u32 = 5;
pub const ENOSPC: u32 = 28;

/// One connection, and the image that every write replied to makes up.
pub struct Attached {
    raw: Raw,
    export: String,
    pub image: Vec<u8>,
}

impl Attached {
    /// An export that reads as `image`.
    pub fn new(server: &TestServer, export: &str, image: Vec<u8>) -> Self {
        Self { raw: connect(server, export), export: export.to_owned(), image }
    }

    /// The same export of another server, or of another life of the same one.
    pub fn move_to(&mut self, server: &TestServer) {
        self.raw = connect(server, &self.export);
    }

    /// The error number, 0 for none; then the image has changed.
    pub fn try_write(&mut self, offset: usize, data: &[u8]) -> u32 {
        let errno = self.raw.write(offset as u64, data).errno;
        if errno == 0 {
            self.image[offset..offset + data.len()].copy_from_slice(data);
        }
        errno
    }

    #[track_caller]
    pub fn write(&mut self, offset: usize, data: &[u8]) {
        assert_eq!(self.try_write(offset, data), 0, "write of {} bytes at {offset}", data.len());
    }

    /// Has a range read as zeros.
    #[track_caller]
    pub fn zero(&mut self, offset: usize, len: usize) {
        assert_eq!(self.raw.call(0, cmd::WRITE_ZEROES, offset as u64, len as u64, &[]).errno, 0);
        self.image[offset..offset + len].fill(0);
    }

    #[track_caller]
    pub fn flush(&mut self) {
        assert_eq!(self.raw.call(0, cmd::FLUSH, 0, 0, &[]).errno, 0, "FLUSH");
    }

    /// The bytes of a range, or the error number.
    pub fn try_read(&mut self, offset: usize, len: usize) -> Result<Vec<u8>, u32> {
        let answer = self.raw.call(0, cmd::READ, offset as u64, len as u64, &[]);
        if answer.errno == 0 { Ok(answer.data) } else { Err(answer.errno) }
    }

    /// Reads a range, byte for byte as it must be.
    #[track_caller]
    pub fn check(&mut self, offset: usize, len: usize) {
        let piece = usize::try_from(MIB).unwrap();
        for at in (offset..offset + len).step_by(piece) {
            let len = piece.min(offset + len - at);
            let read = self.try_read(at, len).unwrap_or_else(|errno| panic!("error {errno} of a read at {at}"));
            let first = read.iter().zip(&self.image[at..]).position(|(read, written)| read != written);
            assert_eq!(first.map(|i| at + i), None, "the first byte that differs");
        }
    }

    #[track_caller]
    pub fn check_all(&mut self) {
        self.check(0, self.image.len());
    }
}

fn connect(server: &TestServer, export: &str) -> Raw {
    let mut raw = Raw::connect_to(&server.nbd_address());
    raw.negotiate(export, Mode::Structured);
    raw
}

/// Bytes that are like no others: of a seed and their place.
pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let words = (1..).map(|i: u64| (seed << 32 | i).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    words.flatten().take(len).collect()
}
