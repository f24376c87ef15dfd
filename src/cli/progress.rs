//! How far a long operation is: a bar on a terminal, now and then a line otherwise, on stderr.

use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

use super::size;

/// How often a terminal is written to.
const REDRAW: Duration = Duration::from_millis(200);
/// How often a line is written where there is no terminal.
const NEW_LINE: Duration = Duration::from_secs(10);
/// Characters of the bar itself.
const WIDTH: u64 = 24;

/// The progress of one operation.
#[derive(Debug)]
pub(super) struct Progress {
    what: &'static str,
    done_bytes: u64,
    total_bytes: u64,
    started: Instant,
    shown: Instant,
    terminal: bool,
    quiet: bool,
}

impl Progress {
    /// Of an operation that begins now.
    pub(super) fn new(what: &'static str, total_bytes: u64, quiet: bool) -> Self {
        let now = Instant::now();
        let terminal = std::io::stderr().is_terminal();
        Self { what, done_bytes: 0, total_bytes, started: now, shown: now, terminal, quiet }
    }

    /// It is that far now.
    pub(super) fn reach(&mut self, done_bytes: u64) {
        self.done_bytes = done_bytes;
        if !self.quiet && self.shown.elapsed() >= if self.terminal { REDRAW } else { NEW_LINE } {
            self.shown = Instant::now();
            let line = line(self.what, self.done_bytes, self.total_bytes, self.started.elapsed());
            // A terminal that is gone misses nothing.
            let _ = if self.terminal {
                write!(std::io::stderr(), "\r\x1b[K{line}")
            } else {
                writeln!(std::io::stderr(), "{line}")
            };
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.terminal && !self.quiet && self.shown != self.started {
            let _ = write!(std::io::stderr(), "\r\x1b[K");
        }
    }
}

fn line(what: &str, done: u64, total: u64, elapsed: Duration) -> String {
    let filled = (u128::from(done) * u128::from(WIDTH)).checked_div(total.into()).unwrap_or(0).min(WIDTH.into());
    let filled = usize::try_from(filled).unwrap_or(0);
    let bar = "#".repeat(filled) + &"-".repeat(usize::try_from(WIDTH).unwrap_or(filled).saturating_sub(filled));
    let millis = elapsed.as_millis().max(1);
    let rate = u64::try_from(u128::from(done) * 1000 / millis).unwrap_or(u64::MAX);
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
        let start = line("importing", 0, 0, Duration::ZERO);
        assert_eq!(start, "importing [------------------------] 0 B of 0 B, 0 B/s, ? left");
    }
}
