//! How far a long operation is: a bar on a terminal, now and then a line otherwise, on stderr.

use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::size;
use crate::store::health::Outage;

/// How often a terminal is written to.
const REDRAW: Duration = Duration::from_millis(200);
/// How often a line is written where there is no terminal.
const NEW_LINE: Duration = Duration::from_secs(5);
/// Characters of the bar itself.
const WIDTH: u64 = 24;
/// The most characters of a line that is drawn again and again: one that is wrapped cannot be erased.
const MAX_REDRAWN: usize = 79;

/// The progress of one operation.
#[derive(Debug)]
pub(super) struct Progress {
    what: &'static str,
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
    started: Instant,
    /// Since when the store does not answer, and why.
    waiting: Mutex<Option<(Instant, String)>>,
    shown: Mutex<Option<Instant>>,
    terminal: bool,
    quiet: bool,
}

impl Progress {
    /// Of an operation that begins now. A total of 0 is one that nobody knows.
    pub(super) fn new(what: &'static str, total_bytes: u64, quiet: bool) -> Self {
        let terminal = std::io::stderr().is_terminal();
        let (done_bytes, total_bytes, started) = (AtomicU64::new(0), AtomicU64::new(total_bytes), Instant::now());
        Self {
            what,
            done_bytes,
            total_bytes,
            started,
            waiting: Mutex::default(),
            shown: Mutex::default(),
            terminal,
            quiet,
        }
    }

    /// There is that much to do, as has turned out.
    pub(super) fn plan(&self, total_bytes: u64) {
        self.total_bytes.store(total_bytes, Ordering::Relaxed);
    }

    /// Whether it waits for a store that does not answer, and what the last request ended with.
    pub(super) fn wait_for_store(&self, last_error: Option<&str>) {
        let mut waiting = self.waiting.lock();
        let since = waiting.take().map_or_else(Instant::now, |(since, _)| since);
        // What was asked for is of less use than why it failed.
        *waiting = last_error.map(|error| (since, error.split_once(": ").map_or(error, |(_, why)| why).to_owned()));
        let waits = waiting.is_some();
        drop(waiting);
        if waits {
            self.show_if_due();
        }
    }

    /// It is that far now.
    pub(super) fn reach(&self, done_bytes: u64) {
        self.done_bytes.store(done_bytes, Ordering::Relaxed);
        self.show_if_due();
    }

    /// It has done that share of all.
    pub(super) fn reach_share(&self, done: u64, of: u64) {
        let total_bytes = self.total_bytes.load(Ordering::Relaxed);
        let bytes = (u128::from(total_bytes) * u128::from(done)).checked_div(of.into()).unwrap_or(0);
        self.reach(u64::try_from(bytes).unwrap_or(total_bytes).min(total_bytes));
    }

    /// Does the work, and shows how far it is even while it does not get on.
    pub(super) async fn during<T>(&self, work: impl Future<Output = T>) -> T {
        self.during_on(|| None, work).await
    }

    /// The same with a store, whose outage shows.
    pub(super) async fn during_on<T>(&self, outage: impl Fn() -> Option<Outage>, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        let mut ticks = tokio::time::interval(REDRAW);
        loop {
            tokio::select! {
                done = &mut work => return done,
                _ = ticks.tick() => {
                    self.wait_for_store(outage().as_ref().map(|outage| outage.last_error.as_str()));
                    self.show_if_due();
                }
            }
        }
    }

    fn show_if_due(&self) {
        let mut shown = self.shown.lock();
        let due = if self.terminal { REDRAW } else { NEW_LINE };
        if self.quiet || shown.unwrap_or(self.started).elapsed() < due {
            return;
        }
        *shown = Some(Instant::now());
        let done_bytes = self.done_bytes.load(Ordering::Relaxed);
        let line = match &*self.waiting.lock() {
            Some((since, why)) => waiting_line(self.what, since.elapsed(), why),
            None => line(self.what, done_bytes, self.total_bytes.load(Ordering::Relaxed), self.started.elapsed()),
        };
        // A terminal that is gone misses nothing.
        let _ = if self.terminal {
            write!(std::io::stderr(), "\r\x1b[K{}", line.chars().take(MAX_REDRAWN).collect::<String>())
        } else {
            writeln!(std::io::stderr(), "{line}")
        };
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.terminal && self.shown.lock().is_some() {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

fn waiting_line(what: &str, elapsed: Duration, why: &str) -> String {
    format!("{what}: waiting for the store for {} s: {why}", elapsed.as_secs())
}

fn line(what: &str, done: u64, total: u64, elapsed: Duration) -> String {
    let millis = elapsed.as_millis().max(1);
    let rate = u64::try_from(u128::from(done) * 1000 / millis).unwrap_or(u64::MAX);
    if total == 0 {
        return format!("{what} {}, {}/s", size::shown(done), size::shown(rate));
    }
    let filled = (u128::from(done) * u128::from(WIDTH)).checked_div(total.into()).unwrap_or(0).min(WIDTH.into());
    let filled = usize::try_from(filled).unwrap_or(0);
    let bar = "#".repeat(filled) + &"-".repeat(usize::try_from(WIDTH).unwrap_or(filled).saturating_sub(filled));
    let left = total.saturating_sub(done).checked_div(rate).map_or_else(|| "?".to_owned(), |left| format!("{left} s"));
    format!("{what} [{bar}] {} of {}, {}/s, {left} left", size::shown(done), size::shown(total), size::shown(rate))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_says_how_much_how_fast_and_how_long_still() {
        let half = line("importing", 1 << 30, 2 << 30, Duration::from_secs(4));
        assert_eq!(half, "importing [############------------] 1 GiB of 2 GiB, 256 MiB/s, 4 s left");
        let start = line("importing", 0, 1, Duration::ZERO);
        assert_eq!(start, "importing [------------------------] 0 B of 1 B, 0 B/s, ? left");
        let waiting = waiting_line("publishing", Duration::from_secs(3), "s3.example answered HTTP 507");
        assert_eq!(waiting, "publishing: waiting for the store for 3 s: s3.example answered HTTP 507");
        let endless = line("reading stdin", 1 << 30, 0, Duration::from_secs(4));
        assert_eq!(endless, "reading stdin 1 GiB, 256 MiB/s");
    }
}
