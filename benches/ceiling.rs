//! The ceiling of the benchmarks: an NBD server that does nothing but the protocol. Its image is memory, each connection
//! has a thread, and all requests that one receive brought are answered by one send. What the sockets cost stays; a
//! server that also keeps data cannot be faster by much.
//!
//! With a file for its image it is the ceiling of every server that keeps its data in one: each request costs it one
//! read or write of the kernel's page cache more, and nothing else.
//!
//! `ceiling IMAGE_BYTES [FILE]` prints the port of 127.0.0.1 that it listens on, and serves any export name until it is
//! killed.

#![allow(clippy::print_stdout, clippy::disallowed_methods, reason = "a program of its own")]

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::sync::{Arc, PoisonError, RwLock};

use bytes::BytesMut;
use nbd_server::nbd::Limits;
use nbd_server::nbd::handshake::{ExportInfo, Handshake, Step, TlsState};
use nbd_server::nbd::wire::{self, ChunkHeader, Mode, Request, chunk, cmd};

/// Large enough for the longest request of the benchmarks.
const BUFFER_BYTES: usize = 4 << 20;
const REGION_BYTES: usize = 1 << 20;

/// Where the data is.
enum Image {
    Memory(Vec<RwLock<Box<[u8]>>>),
    File(File),
}

impl Image {
    fn in_memory(bytes: usize) -> Self {
        let region = || RwLock::new(vec![0; REGION_BYTES].into_boxed_slice());
        Self::Memory((0..bytes.div_ceil(REGION_BYTES)).map(|_| region()).collect())
    }

    fn in_file(path: &str, bytes: u64) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        file.set_len(bytes)?;
        Ok(Self::File(file))
    }

    fn read(&self, at: usize, len: usize, out: &mut Vec<u8>) -> io::Result<()> {
        match self {
            Self::Memory(regions) => parts(at, len, |region, start, here| {
                let region = regions[region].read().unwrap_or_else(PoisonError::into_inner);
                out.extend_from_slice(&region[start..start + here]);
            }),
            Self::File(file) => {
                let from = out.len();
                out.resize(from + len, 0);
                file.read_exact_at(&mut out[from..], at as u64)?;
            }
        }
        Ok(())
    }

    fn write(&self, at: usize, mut payload: &[u8]) -> io::Result<()> {
        match self {
            Self::Memory(regions) => parts(at, payload.len(), |region, start, here| {
                let (now, rest) = payload.split_at(here);
                let mut region = regions[region].write().unwrap_or_else(PoisonError::into_inner);
                region[start..start + here].copy_from_slice(now);
                payload = rest;
            }),
            Self::File(file) => file.write_all_at(payload, at as u64)?,
        }
        Ok(())
    }
}

/// Calls `each` with the parts of a range: the region, where in it, how much.
fn parts(mut at: usize, len: usize, mut each: impl FnMut(usize, usize, usize)) {
    let end = at + len;
    while at < end {
        let (start, here) = (at % REGION_BYTES, (end - at).min(REGION_BYTES - at % REGION_BYTES));
        each(at / REGION_BYTES, start, here);
        at += here;
    }
}

fn main() -> io::Result<()> {
    let bytes = std::env::args().nth(1).and_then(|bytes| bytes.parse().ok()).unwrap_or(1 << 30);
    let image = match std::env::args().nth(2) {
        Some(path) => Image::in_file(&path, bytes as u64)?,
        None => Image::in_memory(bytes),
    };
    let image = Arc::new(image);
    let listener = TcpListener::bind("127.0.0.1:0")?;
    println!("{}", listener.local_addr()?.port());
    for stream in listener.incoming() {
        let (stream, image) = (stream?, Arc::clone(&image));
        // A client that breaks off ends its thread, and that is all there is to it.
        std::thread::spawn(move || serve(stream, &image, bytes as u64));
    }
    Ok(())
}

fn serve(mut stream: TcpStream, image: &Image, size: u64) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let (mut input, mut out) = (BytesMut::new(), Vec::new());
    let mut handshake = Handshake::new(Limits::default().option, TlsState::Off, &mut out);
    let export = ExportInfo { name: "ceiling".into(), size, read_only: false, description: String::new() };
    let mode = loop {
        let step = match handshake.feed(&mut input, &mut out, false) {
            Step::Find(_) => handshake.found(Ok(&export), &mut out).unwrap_or(Step::NeedMore),
            step => step,
        };
        stream.write_all(&out)?;
        out.clear();
        match step {
            Step::Transmit(negotiated) => break negotiated.mode,
            Step::Close(_) => return Ok(()),
            _ => {}
        }
        let mut more = [0; 4096];
        let got = stream.read(&mut more)?;
        if got == 0 {
            return Ok(());
        }
        input.extend_from_slice(&more[..got]);
    };
    let mut buffer = vec![0; BUFFER_BYTES];
    let (mut start, mut end) = (0, input.len());
    buffer[..end].copy_from_slice(&input);
    loop {
        while let Some(used) = answer(mode, &buffer[start..end], image, &mut out)? {
            start += used;
        }
        stream.write_all(&out)?;
        out.clear();
        buffer.copy_within(start..end, 0);
        (start, end) = (0, end - start);
        match stream.read(&mut buffer[end..])? {
            0 => return Ok(()),
            got => end += got,
        }
    }
}

/// Answers the first request in `input` and returns its length; `None` if it is not all there.
fn answer(mode: Mode, input: &[u8], image: &Image, out: &mut Vec<u8>) -> io::Result<Option<usize>> {
    let bad = |_| io::Error::from(io::ErrorKind::InvalidData);
    let Some(Request { kind, cookie, offset, len, .. }) = wire::decode_request(mode, input).map_err(bad)? else {
        return Ok(None);
    };
    let head = mode.request_bytes();
    let (at, len) = (usize::try_from(offset).unwrap_or(0), usize::try_from(len).unwrap_or(0));
    let chunk = |kind, len| ChunkHeader { done: true, kind, cookie, offset, len };
    match kind {
        cmd::WRITE if input.len() < head + len => return Ok(None),
        cmd::WRITE => image.write(at, &input[head..head + len])?,
        cmd::DISC => return Err(io::ErrorKind::ConnectionAborted.into()),
        cmd::READ => {
            if mode == Mode::Simple {
                wire::encode_simple(out, 0, cookie);
            } else {
                let follows = u32::try_from(len + 8).unwrap_or(0);
                wire::encode_chunk(out, mode, chunk(chunk::OFFSET_DATA, follows));
                out.extend_from_slice(&offset.to_be_bytes());
            }
            image.read(at, len, out)?;
            return Ok(Some(head));
        }
        // Everything else is as good as done.
        _ => {}
    }
    if mode == Mode::Extended {
        wire::encode_chunk(out, mode, chunk(chunk::NONE, 0));
    } else {
        wire::encode_simple(out, 0, cookie);
    }
    Ok(Some(if kind == cmd::WRITE { head + len } else { head }))
}
