//! What the client sends, as bytes: one buffer that a receive fills with as many requests as there are.
//!
//! Promises: memory is the buffer, borrowed while there is something in it, and the payloads asked for; a long payload is
//! received into its own memory and never copied; a short one is handed out where it is, to be used before the next receive.
//! Must never: wait without end inside a frame, or hand out a part of a payload.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};

use super::pool::{self, Lease, Pool};
use super::shares::Account;

/// The receive buffer, in bytes: room for 60 requests with 4 KiB each.
const BUFFER_BYTES: usize = 256 << 10;
/// What is received at once where a long payload may follow, in bytes: one request. What is received with its header is
/// copied once more.
const WARY_BYTES: usize = 32;
/// A payload longer than this is received into its own memory, in bytes.
pub(super) const DIRECT_PAYLOAD_BYTES: usize = 64 << 10;

/// Why no more requests come.
#[derive(Debug, thiserror::Error)]
pub(super) enum Gone {
    /// The client closed between two requests.
    #[error("the client closed")]
    Closed,
    /// The client closed inside a request; it was not carried out.
    #[error("the client closed in the middle of a request")]
    Cut,
    /// The client left a request half sent.
    #[error("the client left a request half sent")]
    Stalled,
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Broken(#[from] io::Error),
}

/// The receiving side of a connection in transmission.
#[derive(Debug)]
pub(super) struct Inbox<R> {
    reader: R,
    /// Nothing while the client is waited for and there is nothing in it.
    buffer: Lease,
    start: usize,
    end: usize,
    /// The last request had a long payload, and so may the next one: a receive takes little more than its header.
    wary: bool,
    account: Arc<Account>,
}

impl<R: AsyncRead + Unpin> Inbox<R> {
    /// `early`: what came behind the handshake; clients need not wait.
    pub(super) fn new(reader: R, early: &[u8], account: Arc<Account>, pool: &Arc<Pool>) -> Self {
        let mut buffer = pool.lease(BUFFER_BYTES.max(early.len()));
        buffer[..early.len()].copy_from_slice(early);
        Self { reader, buffer, start: 0, end: early.len(), wary: false, account }
    }

    /// The stream itself; what was received and not taken is lost.
    pub(super) fn into_reader(self) -> R {
        self.reader
    }

    /// What was received and not yet taken.
    pub(super) fn received(&self) -> &[u8] {
        &self.buffer[self.start..self.end]
    }

    /// Whether a request has begun to arrive.
    pub(super) fn is_inside_request(&self) -> bool {
        self.start < self.end
    }

    /// Takes `len` bytes that were received.
    pub(super) fn take(&mut self, len: usize) {
        self.start += len;
        debug_assert!(self.start <= self.end);
    }

    /// Receives once more. Between requests a client may be silent for as long as it likes; inside one it may not.
    pub(super) async fn receive(&mut self) -> Result<(), Gone> {
        let inside = self.is_inside_request();
        let account = Arc::clone(&self.account);
        let reading = self.read();
        let got = if inside { account.client(reading).await.map_err(|_| Gone::Stalled)?? } else { reading.await? };
        if got == 0 {
            return Err(if inside { Gone::Cut } else { Gone::Closed });
        }
        account.moved(got);
        self.end += got;
        Ok(())
    }

    /// Reads what there is into the buffer. While there is nothing, here or there, there is no buffer either.
    async fn read(&mut self) -> io::Result<usize> {
        let most = if std::mem::take(&mut self.wary) { WARY_BYTES } else { BUFFER_BYTES };
        poll_fn(|context| {
            self.make_room();
            let room = self.end..self.buffer.len().min(self.end + most);
            let mut into = ReadBuf::new(&mut self.buffer[room]);
            let reading = Pin::new(&mut self.reader).poll_read(context, &mut into);
            let got = into.filled().len();
            if reading.is_pending() {
                self.let_go();
            }
            reading.map_ok(|()| got)
        })
        .await
    }

    /// Gives the buffer back, if there is nothing in it.
    fn let_go(&mut self) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
            self.buffer.give_back();
        }
    }

    /// Makes room behind what was received.
    fn make_room(&mut self) {
        if self.buffer.is_empty() {
            self.buffer.add(BUFFER_BYTES);
        }
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.buffer.len() {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
    }

    /// Receives until at least `len` bytes, no more than [`DIRECT_PAYLOAD_BYTES`], are there to be taken.
    pub(super) async fn gather(&mut self, len: usize) -> Result<&[u8], Gone> {
        while self.received().len() < len {
            self.more().await?;
        }
        Ok(&self.received()[..len])
    }

    /// Takes the next bytes into `payload`, all of them or none.
    pub(super) async fn payload_into(&mut self, payload: &mut [u8]) -> Result<(), Gone> {
        let here = self.received().len().min(payload.len());
        payload[..here].copy_from_slice(&self.received()[..here]);
        self.take(here);
        self.let_go();
        let mut got = here;
        while got < payload.len() {
            let reading = self.reader.read(&mut payload[got..]);
            let more = self.account.client(reading).await.map_err(|_| Gone::Stalled)??;
            if more == 0 {
                return Err(Gone::Cut);
            }
            self.account.moved(more);
            got += more;
        }
        self.wary = true;
        Ok(())
    }

    /// The next `len` bytes, all of them or none.
    pub(super) async fn payload(&mut self, len: usize) -> Result<Bytes, Gone> {
        if len <= DIRECT_PAYLOAD_BYTES {
            let payload = Bytes::copy_from_slice(self.gather(len).await?);
            self.take(len);
            return Ok(payload);
        }
        let mut payload = BytesMut::with_capacity(len);
        let here = self.received().len().min(len);
        payload.extend_from_slice(&self.received()[..here]);
        self.take(here);
        self.let_go();
        while payload.len() < len {
            let left = len - payload.len();
            let mut rest = (&mut payload).limit(left);
            let reading = self.reader.read_buf(&mut rest);
            let more = self.account.client(reading).await.map_err(|_| Gone::Stalled)??;
            if more == 0 {
                return Err(Gone::Cut);
            }
            self.account.moved(more);
        }
        self.wary = true;
        Ok(payload.freeze())
    }

    /// Throws the next `len` bytes away.
    pub(super) async fn discard(&mut self, mut len: u64) -> Result<(), Gone> {
        loop {
            let here = usize::try_from(len).unwrap_or(usize::MAX).min(self.received().len());
            self.take(here);
            len -= here as u64;
            if len == 0 {
                return Ok(());
            }
            self.more().await?;
        }
    }

    /// Receives once more, inside a request even if nothing of it is in the buffer.
    async fn more(&mut self) -> Result<(), Gone> {
        let account = Arc::clone(&self.account);
        match account.client(self.receive()).await {
            Err(_) => Err(Gone::Stalled),
            Ok(Err(Gone::Closed)) => Err(Gone::Cut),
            Ok(received) => received,
        }
    }
}

// Whatever is gathered fits, with a header before it.
const _: () = assert!(DIRECT_PAYLOAD_BYTES + WARY_BYTES < BUFFER_BYTES && BUFFER_BYTES <= pool::BUFFER_BYTES);

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::nbd::shares::Shares;
    use tokio::io::AsyncWriteExt;

    const SOON: Duration = Duration::from_millis(50);

    fn account() -> Arc<Account> {
        Shares::new(1 << 30, SOON).account("vm")
    }

    #[tokio::test]
    async fn payloads_of_every_length_arrive_as_sent_however_the_stream_is_cut() {
        for step in [1usize, 7, 4096, 1 << 20] {
            let (mut client, server) = tokio::io::duplex(step);
            let lengths = [0usize, 1, 511, 4096, DIRECT_PAYLOAD_BYTES, DIRECT_PAYLOAD_BYTES + 1, 300_000];
            let byte = |i: usize| u8::try_from(i % 251).unwrap();
            let all: Vec<u8> = (0..lengths.iter().sum()).map(byte).collect();
            let sent = all.clone();
            tokio::spawn(async move { client.write_all(&sent[3..]).await });
            let mut inbox = Inbox::new(server, &all[..3], account(), &Arc::default());
            let mut at = 0;
            for len in lengths {
                let gathered = len <= DIRECT_PAYLOAD_BYTES && inbox.gather(len).await.unwrap() == &all[at..at + len];
                assert!(gathered || len > DIRECT_PAYLOAD_BYTES, "{len} bytes in steps of {step}");
                let mut first = vec![0; len / 2];
                inbox.payload_into(&mut first).await.unwrap();
                let rest = inbox.payload(len - first.len()).await.unwrap();
                assert!([first, rest.into()].concat() == all[at..at + len], "{len} bytes in steps of {step}");
                at += len;
            }
            assert!(matches!(inbox.receive().await, Err(Gone::Closed)));
        }
    }

    #[tokio::test]
    async fn there_is_a_buffer_only_while_there_is_something_in_it() {
        let (mut client, server) = tokio::io::duplex(BUFFER_BYTES * 2);
        let pool = Arc::<Pool>::default();
        let mut inbox = Inbox::new(server, &[], account(), &pool);
        for len in [1, BUFFER_BYTES + 1] {
            assert!(tokio::time::timeout(SOON, inbox.receive()).await.is_err(), "still waiting");
            assert_eq!(pool.kept(), 1);
            let sent: Vec<u8> = (0..len).map(|i| u8::try_from(i % 251).unwrap()).collect();
            client.write_all(&sent).await.unwrap();
            let mut got = Vec::new();
            while got.len() < len {
                inbox.receive().await.unwrap();
                assert_eq!(pool.kept(), 0);
                got.extend_from_slice(inbox.received());
                inbox.take(inbox.received().len());
            }
            assert!(got == sent);
        }
        // Inside a request, but with nothing of it here, either.
        client.write_all(&[1]).await.unwrap();
        assert!(matches!(inbox.payload_into(&mut [0; 2]).await, Err(Gone::Stalled)));
        assert_eq!(pool.kept(), 1);
    }

    #[tokio::test]
    async fn silence_is_allowed_between_requests_and_not_inside_one() {
        let (mut client, server) = tokio::io::duplex(1024);
        let mut inbox = Inbox::new(server, &[], account(), &Arc::default());
        assert!(tokio::time::timeout(SOON * 3, inbox.receive()).await.is_err(), "still waiting");
        client.write_all(&[1]).await.unwrap();
        inbox.receive().await.unwrap();
        assert!(matches!(inbox.receive().await, Err(Gone::Stalled)));
        assert!(matches!(inbox.payload(2).await, Err(Gone::Stalled)));
        assert!(matches!(inbox.payload(DIRECT_PAYLOAD_BYTES + 1).await, Err(Gone::Stalled)));
        assert!(matches!(inbox.payload_into(&mut [0; 2]).await, Err(Gone::Stalled)));
    }

    #[tokio::test]
    async fn a_hang_up_in_mid_payload_yields_no_payload() {
        for len in [100, DIRECT_PAYLOAD_BYTES * 2] {
            let (mut client, server) = tokio::io::duplex(1024);
            client.write_all(&[1; 50]).await.unwrap();
            drop(client);
            assert!(matches!(Inbox::new(server, &[], account(), &Arc::default()).payload(len).await, Err(Gone::Cut)));
            let (mut client, server) = tokio::io::duplex(1024);
            client.write_all(&[1; 50]).await.unwrap();
            drop(client);
            assert!(matches!(
                Inbox::new(server, &[], account(), &Arc::default()).payload_into(&mut vec![0; len]).await,
                Err(Gone::Cut)
            ));
        }
    }
}
