//! The log: lines on stderr, as text or as JSON, whose level can change while the server runs.
//!
//! At `info` there is a line for what an operator acts on or looks for later, and none per request; lines that repeat are
//! counted (`log_limit.rs`). The libraries below
//! are heard only when something is wrong, at every level: what they say about requests is not under our control, and
//! credentials must never be in the log.

use std::ffi::OsString;

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt, reload};

use super::log_limit::LogLimit;
use crate::config::{self, Command, LogFormat, LogLevel, Origins, ReadError};

/// The setting that a reload takes.
const TAKEN: &str = "log-level";

/// The log of this process.
#[derive(Debug)]
pub struct Logging {
    level: LogLevel,
    filter: reload::Handle<Targets, Registry>,
    limit: LogLimit,
    /// What the level is read from again.
    args: Vec<OsString>,
    /// What came of them at the start.
    origins: Origins,
}

impl Logging {
    /// Begins to log, once per process. `args` are those of the program, `origins` what was read from them.
    #[must_use]
    pub fn start(level: LogLevel, format: LogFormat, args: Vec<OsString>, origins: Origins) -> Self {
        let (filter, handle) = reload::Layer::new(filter(level));
        let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(false).with_target(false);
        let lines = match format {
            LogFormat::Text => lines.boxed(),
            LogFormat::Json => lines.json().flatten_event(true).with_span_list(false).boxed(),
        };
        let limit = LogLimit::default();
        tracing_subscriber::registry().with(limit.clone().and_then(lines).with_filter(filter)).init();
        Self { level, filter: handle, limit, args, origins }
    }

    /// The limit on lines that repeat.
    pub(super) fn limit(&self) -> LogLimit {
        self.limit.clone()
    }

    /// Reads arguments, environment and configuration file again, and takes the log's level from them. Says which other
    /// settings have changed, and have no effect.
    ///
    /// # Errors
    /// [`ReadError`]; then the level stays.
    pub fn reload(&mut self) -> Result<(), ReadError> {
        let (cli, origins) = config::read(self.args.clone())?;
        let mut changed = origins.changed_since(&self.origins);
        changed.retain(|key| key != TAKEN);
        if !changed.is_empty() {
            tracing::warn!("SIGHUP: changed, but in force after a restart alone: {}", changed.join(", "));
        }
        let Command::Serve(flags) = cli.command else { return Ok(()) };
        let level = flags.log_level();
        if level != self.level && self.filter.reload(filter(level)).is_ok() {
            self.level = level;
            tracing::info!("the log's level is now {level:?}");
        }
        Ok(())
    }
}

/// Lets what is wrong on the way of a command be seen on stderr, once per process; its end it tells itself.
pub fn show_warnings() {
    let lines = fmt::layer().with_writer(std::io::stderr).with_ansi(false).with_target(false).without_time();
    tracing_subscriber::registry().with(lines.with_filter(filter(LogLevel::Warn))).init();
}

fn filter(level: LogLevel) -> Targets {
    let level = match level {
        LogLevel::Error => LevelFilter::ERROR,
        LogLevel::Warn => LevelFilter::WARN,
        LogLevel::Info => LevelFilter::INFO,
        LogLevel::Debug => LevelFilter::DEBUG,
        LogLevel::Trace => LevelFilter::TRACE,
    };
    Targets::new().with_default(level.min(LevelFilter::WARN)).with_target("nbd_server", level)
}
