//! Being told to end: Ctrl-C, SIGTERM, or a terminal that is gone. From the moment it listens none of them ends the
//! program by itself, so that a command can take back what it began.

use futures_util::future::select_all;
use tokio::signal::unix::{Signal, SignalKind, signal};

use super::CliError;

/// The signals that mean it.
#[derive(Debug)]
pub(super) struct Interrupts(Vec<Signal>);

impl Interrupts {
    /// Listens from now on, for a command that does its work itself; what comes while nobody waits is not lost.
    ///
    /// # Errors
    /// [`CliError::Io`].
    pub(super) fn listen() -> Result<Self, CliError> {
        Self::to(&[SignalKind::interrupt(), SignalKind::terminate(), SignalKind::hangup()])
    }

    /// The same for a command that waits for a server, which goes on if the terminal is lost.
    ///
    /// # Errors
    /// [`CliError::Io`].
    pub(super) fn listen_for_server() -> Result<Self, CliError> {
        Self::to(&[SignalKind::interrupt(), SignalKind::terminate()])
    }

    fn to(kinds: &[SignalKind]) -> Result<Self, CliError> {
        let signals: Result<_, _> = kinds.iter().map(|kind| signal(*kind)).collect();
        signals.map(Self).map_err(|source| CliError::Io { what: "Ctrl-C cannot be waited for".into(), source })
    }

    /// Ends once somebody wants the program to end.
    pub(super) async fn next(&mut self) {
        select_all(self.0.iter_mut().map(|signal| Box::pin(signal.recv()))).await;
    }
}
