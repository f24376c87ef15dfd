//! The memory for payloads in flight that all clients share, and who may have how much of it.
//!
//! Guarantees: a request is granted memory only if enough stays free: [`CLIENT_LEAVES`] times what its client then holds,
//! and a part of what its export then holds ([`EXPORT_TAKES`]). So greedy clients leave room for the requests of all others,
//! and no number of clients has to be known for that. While a request waits, clients that hold as much as it wants, or more,
//! have to move bytes at a minimum rate: what they hold within [`Limits::stalled`](super::Limits::stalled). A client that is
//! slower is cut off, and its memory goes to those that wait. Exports whose requests wait take turns. A request that has
//! waited for long, while its client held nothing, needs no more than its own memory and its export's part, and no request of
//! its export overtakes it; nor does one of another export, unless it waits for what its own export holds.
//! Must not: blame a client for what it does not cause. Only the time counts in which the server waits for the client, to
//! take replies or to send its payload; and without a request that waits no client is judged at all.
//! Locks: one, held across arithmetic and a look at up to [`LOOKS`] requests of each export that waits; once per
//! [`Shares::tick`], and only while a request waits, across a look at all that wait and all clients that hold memory.

use std::collections::{HashMap, VecDeque};
use std::future::{Future, poll_fn};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Poll, Waker};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::time::error::Elapsed;
use tokio::time::{Instant, sleep};

/// A client leaves so many times what it holds. With 16 clients of 64 MiB half of 1 GiB would be left, so they get less.
const CLIENT_LEAVES: usize = 8;
/// The clients of one export together hold at most so many times what they leave.
const EXPORT_TAKES: usize = 3;
/// The minimum rate is judged over this part of the time in which a client has to move all that it holds; a request that has
/// waited for as long is not overtaken.
const PART: u32 = 12;
/// Requests of each waiting export that a grant looks at; with each tick it looks at all.
const LOOKS: usize = 4;

/// What is shared, and with how much of it free.
#[derive(Debug)]
pub(super) struct Shares {
    total: usize,
    /// How long a client may take to move all that it holds, while others wait.
    hold: Duration,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    free: usize,
    /// Clients that hold something, by their number.
    holders: HashMap<u64, Holder>,
    /// What the clients of each export hold, as far as it is more than nothing.
    exports: HashMap<Arc<str>, usize>,
    /// The requests of each export that wait; no line is empty.
    waiting: HashMap<Arc<str>, VecDeque<Waiting>>,
    /// The exports of `waiting`, that whose turn is next first.
    turns: VecDeque<Arc<str>>,
    judged: Option<Instant>,
    /// The number of the next client or request.
    next: u64,
}

#[derive(Debug)]
struct Holder {
    held: usize,
    account: Arc<Account>,
    /// When the time over which it is judged began, and what it had moved by then.
    judged_since: Option<(Instant, u64)>,
}

/// A request that waits for memory.
#[derive(Debug)]
struct Waiting {
    request: u64,
    account: Arc<Account>,
    wanted: usize,
    since: Instant,
    granted: oneshot::Sender<()>,
}

/// What a look at an export's line came to.
enum Look {
    Granted,
    /// Other exports go on.
    Waits,
    /// No other export may overtake it.
    Blocks,
}

/// A client's account of what it holds and moves.
#[derive(Debug)]
pub(super) struct Account {
    client: u64,
    export: Arc<str>,
    shares: Arc<Shares>,
    /// How long it may leave the server waiting without one byte of progress.
    stalled: Duration,
    moved: AtomicU64,
    /// How many of its two halves wait for the client.
    waits: AtomicUsize,
    cut: AtomicBool,
    /// Polls the connection, so that it hears of the cut.
    waker: Mutex<Option<Waker>>,
}

/// Whether a request fits: it leaves enough of what is `free`, out of `total`. A request with nothing beside it always does.
fn fits(total: usize, free: usize, held: usize, held_of_export: usize, wanted: usize) -> bool {
    if free == total {
        return wanted <= total;
    }
    let Some(left) = free.checked_sub(wanted) else { return false };
    (held + wanted).saturating_mul(CLIENT_LEAVES) <= left && fits_export(total, free, held_of_export, wanted)
}

/// Whether there is memory for a request within the part of its export.
fn fits_export(total: usize, free: usize, held_of_export: usize, wanted: usize) -> bool {
    if free == total {
        return wanted <= total;
    }
    let Some(left) = free.checked_sub(wanted) else { return false };
    held_of_export + wanted <= left.saturating_mul(EXPORT_TAKES)
}

/// Whether a client that holds so much moved too little: less than all of it in `hold`.
fn is_too_slow(held: usize, moved: u64, elapsed: Duration, hold: Duration) -> bool {
    u128::from(moved) * hold.as_micros() < held as u128 * elapsed.as_micros()
}

impl Shares {
    pub(super) fn new(total: usize, hold: Duration) -> Arc<Self> {
        let state = State {
            free: total,
            holders: HashMap::new(),
            exports: HashMap::new(),
            waiting: HashMap::new(),
            turns: VecDeque::new(),
            judged: None,
            next: 0,
        };
        Arc::new(Self { total, hold, state: Mutex::new(state) })
    }

    /// The account of a client that attached an export.
    pub(super) fn account(self: &Arc<Self>, export: &str) -> Arc<Account> {
        let client = self.state.lock().number();
        Arc::new(Account {
            client,
            export: export.into(),
            shares: Arc::clone(self),
            stalled: self.hold,
            moved: AtomicU64::new(0),
            waits: AtomicUsize::new(0),
            cut: AtomicBool::new(false),
            waker: Mutex::new(None),
        })
    }

    #[cfg(test)]
    pub(super) fn free(&self) -> usize {
        self.state.lock().free
    }

    /// The time over which a client is judged, and for which a request may be overtaken.
    fn patience(&self) -> Duration {
        self.hold / PART
    }

    /// How often clients are judged.
    fn tick(&self) -> Duration {
        self.patience() / 4
    }
}

impl State {
    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn held(&self, account: &Account) -> usize {
        self.holders.get(&account.client).map_or(0, |holder| holder.held)
    }

    fn held_of_export(&self, account: &Account) -> usize {
        self.exports.get(&account.export).copied().unwrap_or(0)
    }

    /// Takes memory, if it fits.
    fn take(&mut self, total: usize, account: &Arc<Account>, wanted: usize) -> bool {
        let fits = fits(total, self.free, self.held(account), self.held_of_export(account), wanted);
        if fits {
            self.hand_out(account, wanted);
        }
        fits
    }

    /// Takes memory for a request that has aged, if it fits.
    fn take_aged(&mut self, total: usize, account: &Arc<Account>, wanted: usize) -> bool {
        let fits = fits_export(total, self.free, self.held_of_export(account), wanted);
        if fits {
            self.hand_out(account, wanted);
        }
        fits
    }

    fn hand_out(&mut self, account: &Arc<Account>, wanted: usize) {
        self.free -= wanted;
        *self.exports.entry(Arc::clone(&account.export)).or_default() += wanted;
        let new = || Holder { held: 0, account: Arc::clone(account), judged_since: None };
        self.holders.entry(account.client).or_insert_with(new).held += wanted;
    }

    fn give_back(&mut self, account: &Account, bytes: usize) {
        self.free += bytes;
        if let Some(held) = self.exports.get_mut(&account.export) {
            *held -= bytes;
            if *held == 0 {
                self.exports.remove(&account.export);
            }
        }
        if let Some(holder) = self.holders.get_mut(&account.client) {
            holder.held -= bytes;
            if holder.held == 0 {
                self.holders.remove(&account.client);
            }
        }
    }

    fn line_up(&mut self, waiting: Waiting) {
        let export = Arc::clone(&waiting.account.export);
        let line = self.waiting.entry(Arc::clone(&export)).or_default();
        if line.is_empty() {
            self.turns.push_back(export);
        }
        line.push_back(waiting);
    }

    /// Takes a request out of its line; false if it waits no more.
    fn leave(&mut self, export: &str, request: u64) -> bool {
        let Some(line) = self.waiting.get_mut(export) else { return false };
        let Some(nth) = line.iter().position(|waiting| waiting.request == request) else { return false };
        line.remove(nth);
        if line.is_empty() {
            self.waiting.remove(export);
            self.turns.retain(|turn| **turn != *export);
        }
        true
    }

    /// Grants what fits to those that wait, export by export, with so many looks at each.
    fn grant(&mut self, shares: &Shares, looks: usize) {
        if self.waiting.is_empty() {
            return;
        }
        let now = Instant::now();
        let mut nth = 0;
        while let Some(export) = self.turns.get(nth).cloned() {
            match self.look_at(&export, shares, now, looks) {
                Look::Granted => {
                    self.turns.remove(nth);
                    if self.waiting.get(&export).is_some_and(|line| !line.is_empty()) {
                        self.turns.push_back(export);
                    } else {
                        self.waiting.remove(&export);
                    }
                }
                Look::Waits => nth += 1,
                Look::Blocks => return,
            }
        }
    }

    /// Grants memory to the first request of an export. One that may wait for its own client goes behind the others.
    fn look_at(&mut self, export: &str, shares: &Shares, now: Instant, looks: usize) -> Look {
        let most = self.waiting.get(export).map_or(0, VecDeque::len).min(looks);
        for _ in 0..most {
            let Some(first) = self.waiting.get(export).and_then(VecDeque::front) else { break };
            let (account, wanted) = (Arc::clone(&first.account), first.wanted);
            let aged = self.has_aged(first, shares, now);
            let blocks = aged && !self.waits_for_its_export(first, shares.total);
            let taken = match aged {
                true => self.take_aged(shares.total, &account, wanted),
                false => self.take(shares.total, &account, wanted),
            };
            let holds = self.held(&account) > 0;
            let Some(line) = self.waiting.get_mut(export) else { break };
            if taken {
                let granted = line.pop_front().is_some_and(|waiting| waiting.granted.send(()).is_ok());
                if !granted {
                    self.give_back(&account, wanted);
                }
                return Look::Granted;
            }
            if !holds {
                return if blocks { Look::Blocks } else { Look::Waits };
            }
            line.rotate_left(1);
        }
        Look::Waits
    }

    /// Whether a request has waited for long, and not for its own client.
    fn has_aged(&self, waiting: &Waiting, shares: &Shares, now: Instant) -> bool {
        now.saturating_duration_since(waiting.since) >= shares.patience() && self.held(&waiting.account) == 0
    }

    /// Whether a request would fit if its export held nothing.
    fn waits_for_its_export(&self, waiting: &Waiting, total: usize) -> bool {
        fits_export(total, self.free + self.held_of_export(&waiting.account), 0, waiting.wanted)
    }

    /// Whether a newcomer would overtake a request that has aged.
    fn overtakes(&self, newcomer: &Account, shares: &Shares) -> bool {
        if self.waiting.is_empty() {
            return false;
        }
        let now = Instant::now();
        self.waiting.values().filter_map(VecDeque::front).any(|first| {
            self.has_aged(first, shares, now)
                && (first.account.export == newcomer.export || !self.waits_for_its_export(first, shares.total))
        })
    }

    /// Judges the clients and looks at all that wait, if it is time.
    fn tick(&mut self, shares: &Shares, now: Instant) {
        let since_last = self.judged.map(|last| now.saturating_duration_since(last));
        if since_last.is_some_and(|since| since < shares.tick()) {
            return;
        }
        self.judged = Some(now);
        // No request waited meanwhile: what was moved then does not matter.
        let afresh = since_last.is_none_or(|since| since >= shares.patience());
        self.judge(shares, now, afresh);
        self.grant(shares, usize::MAX);
    }

    /// Cuts clients off that hold too much for what they move.
    fn judge(&mut self, shares: &Shares, now: Instant, afresh: bool) {
        let claim = |waiting: &Waiting| self.held(&waiting.account) + waiting.wanted;
        let Some(least) = self.waiting.values().flatten().map(claim).min() else { return };
        for holder in self.holders.values_mut() {
            let moved = holder.account.moved.load(Ordering::Relaxed);
            let judged_since = holder.judged_since.filter(|_| !afresh && holder.account.is_waited_for());
            let Some((since, moved_then)) = judged_since else {
                holder.judged_since = Some((now, moved));
                continue;
            };
            let elapsed = now.saturating_duration_since(since);
            if elapsed < shares.patience() {
                continue;
            }
            if holder.held >= least && is_too_slow(holder.held, moved - moved_then, elapsed, shares.hold) {
                holder.account.cut_off();
            }
            holder.judged_since = Some((now, moved));
        }
    }
}

impl Account {
    /// Takes memory, if it need not wait.
    pub(super) fn try_take(self: &Arc<Self>, bytes: usize) -> bool {
        let state = &mut *self.shares.state.lock();
        !state.overtakes(self, &self.shares) && state.take(self.shares.total, self, bytes)
    }

    /// Waits for memory; no more than there is in all.
    pub(super) async fn take(self: &Arc<Self>, bytes: usize) {
        let (granted, mut told) = oneshot::channel();
        let mut place = {
            let state = &mut *self.shares.state.lock();
            let request = state.number();
            let (account, wanted) = (Arc::clone(self), bytes.min(self.shares.total));
            state.line_up(Waiting { request, account, wanted, since: Instant::now(), granted });
            // What was given back before this.
            state.grant(&self.shares, LOOKS);
            Place { request, wanted, account: self, taken: false }
        };
        loop {
            tokio::select! {
                biased;
                _ = &mut told => break,
                () = sleep(self.shares.tick()) => self.shares.state.lock().tick(&self.shares, Instant::now()),
            }
        }
        place.taken = true;
    }

    pub(super) fn give_back(&self, bytes: usize) {
        let state = &mut *self.shares.state.lock();
        state.give_back(self, bytes);
        state.grant(&self.shares, LOOKS);
    }

    /// Waits for the client no longer than it may stall. What is ready at once costs no timer.
    ///
    /// # Errors
    /// [`Elapsed`].
    pub(super) async fn client<F: Future>(&self, future: F) -> Result<F::Output, Elapsed> {
        let mut future = pin!(future);
        match poll_fn(|context| Poll::Ready(future.as_mut().poll(context))).await {
            Poll::Ready(done) => Ok(done),
            Poll::Pending => {
                self.waits.fetch_add(1, Ordering::Relaxed);
                let _waits = WaitsForClient(self);
                tokio::time::timeout(self.stalled, future).await
            }
        }
    }

    /// Takes note of bytes that the client sent or took.
    pub(super) fn moved(&self, bytes: usize) {
        self.moved.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Returns once the client is cut off.
    pub(super) async fn is_cut_off(&self) {
        poll_fn(|context| {
            if self.cut.load(Ordering::Acquire) {
                return Poll::Ready(());
            }
            let waker = &mut *self.waker.lock();
            match waker {
                Some(waker) => waker.clone_from(context.waker()),
                none => *none = Some(context.waker().clone()),
            }
            // It may have been cut off meanwhile, before there was a waker.
            if self.cut.load(Ordering::Acquire) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    fn cut_off(&self) {
        self.cut.store(true, Ordering::Release);
        if let Some(waker) = self.waker.lock().take() {
            waker.wake();
        }
    }

    fn is_waited_for(&self) -> bool {
        self.waits.load(Ordering::Relaxed) > 0
    }
}

/// A half of a connection that waits for its client.
struct WaitsForClient<'a>(&'a Account);

impl Drop for WaitsForClient<'_> {
    fn drop(&mut self) {
        self.0.waits.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A place among the waiting requests; left when it is dropped, with what was granted and not taken.
struct Place<'a> {
    request: u64,
    wanted: usize,
    account: &'a Arc<Account>,
    taken: bool,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        if self.taken {
            return;
        }
        let shares = &self.account.shares;
        let state = &mut *shares.state.lock();
        if !state.leave(&self.account.export, self.request) {
            state.give_back(self.account, self.wanted);
        }
        // Others may have waited behind it.
        state.grant(shares, LOOKS);
    }
}

#[cfg(test)]
mod tests;
