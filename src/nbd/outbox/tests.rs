use super::*;
use crate::nbd::shares::Shares;
use crate::nbd::wire::{Mode, Request};
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::Duration;
use tokio::io::AsyncReadExt;

fn asked(cookie: u64) -> Asked {
    Asked::new(&Request { flags: 0, kind: 0, cookie, offset: 0, len: 0 }, Mode::Simple)
}

/// A socket that nothing can be sent on beside the stream.
fn no_socket() -> Socket {
    Socket::plain(Arc::new(UnixStream::pair().unwrap().0.into())).under_tls()
}

fn shares(limits: Limits) -> Arc<Shares> {
    Shares::new(limits.shared_bytes, limits.stalled)
}

fn outbox(limits: Limits) -> Arc<Outbox> {
    Outbox::new(limits, shares(limits).account("vm"), no_socket(), Arc::default())
}

#[tokio::test]
async fn replies_arrive_whole_however_small_the_pieces_the_client_takes() {
    let outbox = outbox(Limits::default());
    let mut expected = Vec::new();
    for cookie in 0..200u64 {
        let bytes: Vec<u8> = (0..cookie * 7).map(|i| u8::try_from(i % 251).unwrap()).collect();
        expected.extend_from_slice(&[0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0]);
        expected.extend_from_slice(&cookie.to_be_bytes());
        expected.extend_from_slice(&bytes);
        let (slot, _) = outbox.slot(bytes.len(), &Bites::none()).await.unwrap();
        let data = Outcome::Data { bytes: bytes.into(), whole: false };
        // From another thread and from the connection's own, in turn.
        match cookie % 2 {
            0 => Outbox::ticket(asked(cookie), slot).answer(data),
            _ => Outbox::answer_at_once(asked(cookie), slot, data),
        }
    }
    outbox.close();
    let (mut ours, mut theirs) = tokio::io::duplex(13);
    let from = Arc::clone(&outbox);
    let sender = tokio::spawn(async move { send_all(&mut ours, &from).await });
    let mut got = Vec::new();
    theirs.read_to_end(&mut got).await.unwrap();
    sender.await.unwrap().unwrap();
    assert!(got == expected);
    tokio::time::timeout(Duration::from_secs(1), outbox.all_back()).await.expect("every slot came back");
}

#[tokio::test]
async fn a_ticket_that_is_dropped_unanswered_answers_eio() {
    let outbox = outbox(Limits::default());
    let (slot, _) = outbox.slot(0, &Bites::none()).await.unwrap();
    drop(Outbox::ticket(asked(1), slot));
    let mut frames = Frames::default();
    let sending = outbox.next(&mut frames).await.unwrap();
    let sent: Vec<u8> = sending.frames.slices().flatten().copied().collect();
    assert_eq!(sent, [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 1]);
}

/// All that connections share, held by one of them; and another one.
async fn beside_a_greedy_one() -> (Slot, Arc<Outbox>) {
    let limits = Limits { shared_bytes: 1 << 20, ..Limits::default() };
    let shared = shares(limits);
    let [greedy, modest] =
        ["vm-1", "vm-2"].map(|export| Outbox::new(limits, shared.account(export), no_socket(), Arc::default()));
    let (held, _) = greedy.slot(limits.shared_bytes, &Bites::none()).await.unwrap();
    (held, modest)
}

#[tokio::test]
async fn small_requests_go_on_when_others_have_used_up_what_is_shared() {
    let (_held, modest) = beside_a_greedy_one().await;
    let bites = Bites::none();
    let soon = Duration::from_millis(50);
    assert!(tokio::time::timeout(soon, modest.slot(1 << 20, &bites)).await.is_err());
    assert!(tokio::time::timeout(soon, modest.slot(4096, &bites)).await.is_ok());
}

#[tokio::test]
async fn a_small_request_waits_for_those_of_its_own_connection_but_not_for_greedy_ones() {
    let (_held, modest) = beside_a_greedy_one().await;
    let bites = Bites::none();
    let mut taken = Vec::new();
    let limits = modest.limits;
    for _ in 0..limits.allowance_bytes / 4096 {
        taken.push(modest.slot(4096, &bites).await.unwrap().0);
    }
    let mut next = std::pin::pin!(modest.slot(4096, &bites));
    let soon = Duration::from_millis(50);
    assert!(tokio::time::timeout(soon, next.as_mut()).await.is_err(), "its own limit");
    taken.pop();
    let (slot, waited) = tokio::time::timeout(soon, next).await.expect("its own allowance is back").unwrap();
    assert!(waited.0);
    drop((taken, slot));
    tokio::time::timeout(soon, modest.all_back()).await.expect("every slot came back");
    assert_eq!(modest.allowance.available_permits(), limits.allowance_bytes);
    assert_eq!(modest.connection.available_permits(), limits.connection_bytes, "what it did not wait for to the end");
}

#[tokio::test]
async fn a_client_that_takes_nothing_is_given_up_after_the_deadline() {
    let outbox = outbox(Limits { stalled: Duration::from_millis(20), ..Limits::default() });
    let (slot, _) = outbox.slot(0, &Bites::none()).await.unwrap();
    let late = Outbox::ticket(asked(2), outbox.slot(0, &Bites::none()).await.unwrap().0);
    Outbox::ticket(asked(1), slot).answer(Outcome::Data { bytes: vec![1; 4096].into(), whole: false });
    let (mut ours, _theirs) = tokio::io::duplex(16);
    let error = send_all(&mut ours, &outbox).await.unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::TimedOut);
    outbox.abandon();
    late.answer(Outcome::Done);
    tokio::time::timeout(Duration::from_secs(1), outbox.all_back()).await.expect("every slot came back");
}

#[tokio::test]
async fn replies_that_are_never_sent_give_back_what_all_share() {
    let limits = Limits::default();
    let shared = shares(limits);
    let outbox = Outbox::new(limits, shared.account("vm"), no_socket(), Arc::default());
    let (slot, _) = outbox.slot(1 << 20, &Bites::none()).await.unwrap();
    Outbox::answer_at_once(asked(1), slot, Outcome::Done);
    assert!(shared.free() < limits.shared_bytes);
    drop(outbox);
    assert_eq!(shared.free(), limits.shared_bytes);
}

/// A connection whose other threads may send, and its client's end.
fn with_socket() -> (Arc<Outbox>, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let limits = Limits::default();
    let (shared, socket) = (shares(limits).account("vm"), Socket::plain(Arc::new(ours.into())));
    (Outbox::new(limits, shared, socket, Arc::default()), theirs)
}

async fn ticket(outbox: &Arc<Outbox>, cookie: u64) -> Ticket {
    Outbox::ticket(asked(cookie), outbox.slot(0, &Bites::none()).await.unwrap().0)
}

fn reply(cookie: u8) -> [u8; 16] {
    [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, cookie]
}

#[tokio::test]
async fn the_only_reply_owed_is_sent_by_who_has_it_and_gives_its_slot_back() {
    let (outbox, mut client) = with_socket();
    let mut got = [0; 16];
    for cookie in 1..3 {
        ticket(&outbox, u64::from(cookie)).await.answer(Outcome::Done);
        client.read_exact(&mut got).unwrap();
        assert_eq!(got, reply(cookie));
    }
    tokio::time::timeout(Duration::from_secs(1), outbox.all_back()).await.expect("every slot came back");
}

#[tokio::test]
async fn nothing_is_sent_past_replies_that_wait_or_are_being_sent_or_owed() {
    let (outbox, mut client) = with_socket();
    let (first, second) = (ticket(&outbox, 1).await, ticket(&outbox, 2).await);
    first.answer(Outcome::Done);
    // Owed a second one, the first waits to be sent with it.
    assert!(client.read(&mut [0; 1]).is_err());
    second.answer(Outcome::Done);
    assert!(client.read(&mut [0; 1]).is_err(), "the first goes first");
    let mut frames = Frames::default();
    let sending = outbox.next(&mut frames).await.unwrap();
    ticket(&outbox, 3).await.answer(Outcome::Done);
    assert!(client.read(&mut [0; 1]).is_err(), "the writer is at it");
    assert_eq!(sending.frames.bytes(), 32);
    drop(sending);
    assert_eq!(outbox.next(&mut frames).await.unwrap().frames.bytes(), 16);
    // A writer that failed comes for no more. What it sent last may be half there, so nothing may follow.
    ticket(&outbox, 4).await.answer(Outcome::Done);
    assert!(client.read(&mut [0; 1]).is_err());
}

#[tokio::test]
async fn what_a_full_socket_does_not_take_is_left_to_the_writer() {
    let (outbox, mut client) = with_socket();
    let mut sent = 0;
    while outbox.line.lock().frames.is_empty() {
        ticket(&outbox, 1).await.answer(Outcome::Done);
        sent += 16;
    }
    let mut got = Vec::new();
    let _would_block = client.read_to_end(&mut got);
    let mut frames = Frames::default();
    got.extend(outbox.next(&mut frames).await.unwrap().frames.slices().flatten());
    assert!(got.len() == sent && got.chunks(16).all(|each| each == reply(1)));
}

#[tokio::test]
async fn the_last_reply_of_a_connection_wakes_its_writer_to_the_end() {
    let (outbox, _client) = with_socket();
    let last = ticket(&outbox, 1).await;
    outbox.close();
    let mut frames = Frames::default();
    let mut next = std::pin::pin!(async { outbox.next(&mut frames).await.map(|sending| sending.frames.bytes()) });
    assert!(tokio::time::timeout(Duration::from_millis(10), next.as_mut()).await.is_err());
    last.answer(Outcome::Done);
    assert_eq!(tokio::time::timeout(Duration::from_secs(1), next).await.unwrap(), Some(16));
}

#[tokio::test]
async fn replies_hold_memory_until_they_are_sent_or_nobody_gets_them_and_a_read_that_must_wait_none() {
    let pool = Arc::<Pool>::default();
    let limits = Limits::default();
    let outbox = Outbox::new(limits, shares(limits).account("vm"), no_socket(), Arc::clone(&pool));
    let slot = async || outbox.slot(4096, &Bites::none()).await.unwrap().0;
    drop(Outbox::read_at_once(asked(1), slot().await, 4096, false, |_| false).unwrap_err());
    assert_eq!(pool.kept(), 1);
    let mut frames = Frames::new(&pool);
    Outbox::read_at_once(asked(1), slot().await, 4096, false, |_| true).unwrap();
    let sending = outbox.next(&mut frames).await.unwrap();
    assert_eq!(pool.kept(), 0);
    drop(sending);
    assert_eq!(pool.kept(), 1);
    Outbox::read_at_once(asked(1), slot().await, 4096, false, |_| true).unwrap();
    assert_eq!(pool.kept(), 0);
    outbox.abandon();
    assert_eq!(pool.kept(), 1);
}
