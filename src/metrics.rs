//! Counters and histograms, and the text in which Prometheus reads them.
//!
//! Promises: counting is a few relaxed additions: no lock, no allocation, no look-up by name, since whoever counts holds
//! the counter itself. The text is well-formed whatever stands in a label.
//! Must never: be relied on for anything but watching. A scrape sees each number at some moment of the scrape, so two of
//! them need not fit each other to the last request.

use std::fmt::{Display, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// The upper bounds of a histogram's buckets in seconds, ascending; a last one without bound is implied.
pub type Bounds = &'static [f64];

/// For what a client or a request waits for: from a memory copy to an outage.
pub const REQUEST_BOUNDS: Bounds = &[0.000_1, 0.000_25, 0.001, 0.002_5, 0.01, 0.025, 0.1, 0.25, 1.0, 2.5, 10.0, 60.0];
/// For what an operator waits for.
pub const PUBLISH_BOUNDS: Bounds = &[0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1_800.0, 7_200.0];

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Counts one more, and returns how many there were before.
    pub fn increment(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed)
    }

    /// Counts `more`.
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::Relaxed);
    }

    /// The count now.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// How many are inside right now.
#[derive(Debug, Default)]
pub struct Presence(AtomicU64);

/// One of those who are inside; it leaves when it is dropped.
#[derive(Debug)]
pub struct Present<'a>(&'a Presence);

impl Presence {
    /// One more is inside, until the returned value is dropped.
    #[must_use]
    pub fn enter(&self) -> Present<'_> {
        self.0.fetch_add(1, Ordering::Relaxed);
        Present(self)
    }

    /// How many are inside.
    #[must_use]
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Present<'_> {
    fn drop(&mut self) {
        self.0.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How long things took.
#[derive(Debug)]
pub struct Histogram {
    bounds: Bounds,
    /// One per bound and one beyond the last; each has what is not in those before it.
    buckets: Box<[AtomicU64]>,
    sum_ns: AtomicU64,
}

impl Histogram {
    /// An empty one.
    #[must_use]
    pub fn new(bounds: Bounds) -> Self {
        let buckets = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, buckets, sum_ns: AtomicU64::new(0) }
    }

    /// Counts something that took this long.
    pub fn observe(&self, took: Duration) {
        let seconds = took.as_secs_f64();
        let bucket = self.bounds.iter().position(|bound| seconds <= *bound).unwrap_or(self.bounds.len());
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_ns.fetch_add(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    /// How many were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.buckets.iter().map(|bucket| bucket.load(Ordering::Relaxed)).sum()
    }
}

/// What a family of samples is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// It only grows; its name ends in `_total`.
    Counter,
    /// It goes up and down.
    Gauge,
    /// Cumulative buckets of durations; its name ends in `_seconds`.
    Histogram,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
        }
    }
}

/// The names and values that tell the samples of a family apart.
pub type Labels<'a> = &'a [(&'a str, &'a str)];

/// A page in the text format, version 0.0.4, under construction.
#[derive(Debug, Default)]
pub struct Page(String);

/// The samples of one name, which stand together.
#[derive(Debug)]
pub struct Family<'a> {
    page: &'a mut String,
    name: &'static str,
}

impl Page {
    /// The content type of a page.
    pub const CONTENT_TYPE: &'static str = "text/plain; version=0.0.4; charset=utf-8";

    /// Begins the samples of a name; `help` is one line.
    pub fn family(&mut self, kind: Kind, name: &'static str, help: &str) -> Family<'_> {
        // Writing to a string does not fail.
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {}", kind.as_str());
        Family { page: &mut self.0, name }
    }

    /// The finished text.
    #[must_use]
    pub fn into_text(self) -> String {
        self.0
    }
}

impl Family<'_> {
    /// One sample.
    pub fn sample(&mut self, labels: Labels<'_>, value: impl Display) -> &mut Self {
        self.line("", labels, None, value);
        self
    }

    /// The samples of a histogram.
    pub fn histogram(&mut self, labels: Labels<'_>, histogram: &Histogram) -> &mut Self {
        let mut count = 0;
        for (i, bucket) in histogram.buckets.iter().enumerate() {
            count += bucket.load(Ordering::Relaxed);
            let bound = histogram.bounds.get(i).map_or_else(|| "+Inf".to_owned(), f64::to_string);
            self.line("_bucket", labels, Some(&bound), count);
        }
        let sum = Duration::from_nanos(histogram.sum_ns.load(Ordering::Relaxed));
        self.line("_sum", labels, None, sum.as_secs_f64());
        self.line("_count", labels, None, count);
        self
    }

    fn line(&mut self, suffix: &str, labels: Labels<'_>, bound: Option<&str>, value: impl Display) {
        let Self { page, name } = self;
        let _ = write!(page, "{name}{suffix}");
        let labels = labels.iter().copied().chain(bound.map(|bound| ("le", bound)));
        for (i, (label, text)) in labels.enumerate() {
            let _ = write!(page, "{}{label}=\"", if i == 0 { '{' } else { ',' });
            for c in text.chars() {
                match c {
                    '\\' => page.push_str("\\\\"),
                    '"' => page.push_str("\\\""),
                    '\n' => page.push_str("\\n"),
                    c => page.push(c),
                }
            }
            page.push('"');
        }
        if page.ends_with('"') {
            page.push('}');
        }
        let _ = writeln!(page, " {value}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_has_help_type_and_escaped_labels() {
        let mut page = Page::default();
        page.family(Kind::Counter, "a_total", "Of a.").sample(&[], 7).sample(&[("x", "q\"\\\n"), ("y", "")], 8);
        page.family(Kind::Gauge, "b", "Of b.").sample(&[], 0.5);
        let text = "# HELP a_total Of a.\n# TYPE a_total counter\na_total 7\na_total{x=\"q\\\"\\\\\\n\",y=\"\"} 8\n\
                    # HELP b Of b.\n# TYPE b gauge\nb 0.5\n";
        assert_eq!(page.into_text(), text);
    }

    #[test]
    fn a_histogram_counts_up_to_each_bound_and_a_bound_belongs_to_its_bucket() {
        let histogram = Histogram::new(&[0.5, 2.0]);
        for ms in [1, 500, 501, 2_000, 9_000] {
            histogram.observe(Duration::from_millis(ms));
        }
        let mut page = Page::default();
        page.family(Kind::Histogram, "d_seconds", "Of d.").histogram(&[("k", "v")], &histogram);
        let text = page.into_text();
        let samples: Vec<_> = text.lines().skip(2).collect();
        let expected = [
            "d_seconds_bucket{k=\"v\",le=\"0.5\"} 2",
            "d_seconds_bucket{k=\"v\",le=\"2\"} 4",
            "d_seconds_bucket{k=\"v\",le=\"+Inf\"} 5",
            "d_seconds_sum{k=\"v\"} 12.002",
            "d_seconds_count{k=\"v\"} 5",
        ];
        assert_eq!(samples, expected);
        assert_eq!(histogram.count(), 5);
    }

    #[test]
    fn who_is_inside_is_counted_until_it_leaves() {
        let presence = Presence::default();
        let (first, second) = (presence.enter(), presence.enter());
        assert_eq!(presence.get(), 2);
        drop((first, second));
        assert_eq!(presence.get(), 0);
    }

    #[test]
    fn the_bounds_ascend() {
        for bounds in [REQUEST_BOUNDS, PUBLISH_BOUNDS] {
            assert!(bounds.windows(2).all(|pair| pair[0] < pair[1]), "{bounds:?}");
        }
    }
}
