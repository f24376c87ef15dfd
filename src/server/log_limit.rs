//! Limit on repeated log lines: one event in a flood costs one line, and the rest are counted.
//!
//! The kind of a line is the place in the source that writes it, together with its export and the field `limit`, if it has
//! them. The export is a field of the line or of a span around it. No caller does anything for this: each line of the
//! server is under the limit.
//!
//! Guarantees: the log has at most [`LINES`] lines of a kind per [`INTERVAL`]; each further line is counted, and a line
//! with the field `left_out` tells the count when the interval is over, or the server stops.
//! Must not: hold back lines below INFO, which only an operator who wants them all asks for, or remember more than
//! [`MAX_KINDS`] kinds; lines of further kinds share one window.

use std::collections::HashMap;
use std::convert::Infallible;
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tracing::callsite::Identifier;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::layer::Context;
use tracing_subscriber::registry::LookupSpan;

/// Lines of a kind that an interval may have.
const LINES: u64 = 20;
/// How long a kind's window stays open, from its first line on.
const INTERVAL: Duration = Duration::from_secs(60);
/// How often windows that are over are looked for.
const REPORT_INTERVAL: Duration = Duration::from_secs(10);
/// Kinds with an open window.
const MAX_KINDS: usize = 1024;
/// How much of a line that was left out its summary repeats, in characters.
const SAMPLE_CHARS: usize = 256;

/// The limit on the lines of a process; its clones are one limit.
#[derive(Debug, Clone, Default)]
pub(super) struct LogLimit(Arc<Mutex<Windows>>);

impl LogLimit {
    /// Logs the summaries of windows that are over, for as long as it is polled.
    pub(super) async fn report_regularly(&self) -> Infallible {
        loop {
            tokio::time::sleep(REPORT_INTERVAL).await;
            let over = self.0.lock().close(|window| window.is_over(Instant::now()));
            over.iter().for_each(Summary::log);
        }
    }

    /// Logs the summaries of all windows, since the process ends.
    pub(super) fn report_all(&self) {
        let all = self.0.lock().close(|_| true);
        all.iter().for_each(Summary::log);
    }
}

// A layer below the log's filter. A `Filter` of the only layer must not disable by `event_enabled`: the state of
// `tracing_subscriber` 0.3 does not recover from it.
impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for LogLimit {
    fn event_enabled(&self, event: &Event<'_>, context: Context<'_, S>) -> bool {
        let metadata = event.metadata();
        // The summaries themselves are bounded by the windows.
        if *metadata.level() > Level::INFO || metadata.target() == module_path!() {
            return true;
        }
        let mut fields = Fields::default();
        event.record(&mut fields);
        let of_span = || {
            let scope = context.event_span(event)?.scope();
            scope.into_iter().find_map(|span| span.extensions().get::<SpanExport>().map(|export| export.0.clone()))
        };
        let export = fields.export.or_else(of_span);
        let kind = Kind { place: metadata.callsite(), export, limit: fields.limit };
        self.0.lock().admit(kind, Instant::now(), *metadata.level(), || fields.message)
    }

    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        note_export(fields, id, &context);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        values.record(&mut fields);
        note_export(fields, id, &context);
    }
}

/// The export that a span is about.
struct SpanExport(String);

fn note_export<S: for<'a> LookupSpan<'a> + Subscriber>(fields: Fields, id: &Id, context: &Context<'_, S>) {
    if let (Some(export), Some(span)) = (fields.export, context.span(id)) {
        span.extensions_mut().replace(SpanExport(export));
    }
}

/// The fields of a line or a span that matter here.
#[derive(Default)]
struct Fields {
    export: Option<String>,
    limit: Option<String>,
    message: String,
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "export" => self.export = Some(format!("{value:?}")),
            "limit" => self.limit = Some(format!("{value:?}")),
            "message" => self.message = format!("{value:?}"),
            _ => {}
        }
    }
}

/// What makes lines repetitions of each other.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Kind {
    place: Identifier,
    export: Option<String>,
    limit: Option<String>,
}

/// What the log had of one kind since the first line of an interval.
#[derive(Debug)]
struct Window {
    begun: Instant,
    lines: u64,
    level: Level,
    /// The first line that was left out.
    sample: String,
}

impl Window {
    fn is_over(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.begun) >= INTERVAL
    }

    fn left_out(&self) -> u64 {
        self.lines.saturating_sub(LINES)
    }
}

/// The open windows; that of no kind is for all kinds beyond [`MAX_KINDS`].
#[derive(Debug, Default)]
struct Windows(HashMap<Option<Kind>, Window>);

impl Windows {
    /// Takes note of a line; returns whether the log may have it.
    fn admit(&mut self, kind: Kind, now: Instant, level: Level, message: impl FnOnce() -> String) -> bool {
        let is_silent = |window: &Window| window.is_over(now) && window.left_out() == 0;
        let mut kind = Some(kind);
        if self.0.len() >= MAX_KINDS && !self.0.contains_key(&kind) {
            self.0.retain(|_, window| !is_silent(window));
            if self.0.len() >= MAX_KINDS {
                kind = None;
            }
        }
        let fresh = || Window { begun: now, lines: 0, level, sample: String::new() };
        let window = self.0.entry(kind).or_insert_with(fresh);
        if is_silent(window) {
            *window = fresh();
        }
        window.lines += 1;
        if window.left_out() == 1 {
            (window.level, window.sample) = (level, message().chars().take(SAMPLE_CHARS).collect());
        }
        window.left_out() == 0
    }

    /// Closes windows; returns what there is to say about them.
    fn close(&mut self, over: impl Fn(&Window) -> bool) -> Vec<Summary> {
        let mut summaries = Vec::new();
        self.0.retain(|kind, window| {
            let closed = over(window);
            if closed && window.left_out() > 0 {
                let export = kind.as_ref().and_then(|kind| kind.export.clone());
                let (left_out, sample) = (window.left_out(), std::mem::take(&mut window.sample));
                summaries.push(Summary { level: window.level, export, left_out, sample });
            }
            !closed
        });
        summaries
    }
}

/// How many lines of a kind the log does not have, and the first of them.
#[derive(Debug, PartialEq, Eq)]
struct Summary {
    level: Level,
    export: Option<String>,
    left_out: u64,
    sample: String,
}

impl Summary {
    fn log(&self) {
        let Self { level, left_out, sample, .. } = self;
        let export = self.export.as_deref();
        let text = format!("{left_out} more lines like this one were left out: {sample}");
        match *level {
            Level::ERROR => tracing::error!(export, left_out, "{text}"),
            Level::WARN => tracing::warn!(export, left_out, "{text}"),
            _ => tracing::info!(export, left_out, "{text}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use tracing::subscriber::Interest;
    use tracing::{Callsite, Metadata};

    use super::*;

    struct Place;

    impl Callsite for Place {
        fn set_interest(&self, _: Interest) {}

        fn metadata(&self) -> &Metadata<'_> {
            unreachable!("only its address counts")
        }
    }

    static PLACE: Place = Place;

    fn kind(export: usize) -> Kind {
        Kind { place: Identifier(&PLACE), export: Some(export.to_string()), limit: None }
    }

    fn admit(windows: &mut Windows, export: usize, now: Instant) -> bool {
        windows.admit(kind(export), now, Level::WARN, || "a line".to_owned())
    }

    #[test]
    fn lines_beyond_the_limit_are_counted_and_summed_up_once() {
        let (mut windows, begun) = (Windows::default(), Instant::now());
        let admitted = (0..LINES + 5).filter(|_| admit(&mut windows, 1, begun)).count();
        assert_eq!(u64::try_from(admitted).unwrap(), LINES);
        assert!(admit(&mut windows, 2, begun), "another export has a window of its own");
        let end = begun + INTERVAL;
        assert_eq!(windows.close(|window| window.is_over(end - Duration::from_millis(1))), []);
        // A window that has something to tell goes on until it was told.
        assert!(!admit(&mut windows, 1, end));
        let summary = Summary { level: Level::WARN, export: Some("1".into()), left_out: 6, sample: "a line".into() };
        assert_eq!(windows.close(|window| window.is_over(end)), [summary]);
        assert!(windows.0.is_empty());
        assert!(admit(&mut windows, 1, end));
    }

    #[test]
    fn a_slow_kind_is_never_left_out() {
        let (mut windows, begun) = (Windows::default(), Instant::now());
        for second in 0..600 {
            assert!(admit(&mut windows, 1, begun + Duration::from_secs(4 * second)), "{second}");
        }
        assert_eq!(windows.close(|_| true), []);
    }

    #[test]
    fn kinds_beyond_the_limit_share_one_window() {
        let (mut windows, begun) = (Windows::default(), Instant::now());
        let admitted = (0..2 * MAX_KINDS).filter(|export| admit(&mut windows, *export, begun)).count();
        assert_eq!(admitted, MAX_KINDS + usize::try_from(LINES).unwrap());
        assert_eq!(windows.0.len(), MAX_KINDS + 1);
        assert!(admit(&mut windows, 2 * MAX_KINDS, begun + INTERVAL), "silent windows make way");
        let summaries = windows.close(|_| true);
        assert!(
            matches!(&summaries[..], [Summary { export: None, left_out, .. }] if *left_out > 1000),
            "{summaries:?}"
        );
    }
}
