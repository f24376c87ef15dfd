//! Being told to end: Ctrl-C, SIGTERM, or a terminal that is gone. From the moment it listens none of them ends the
//! program by itself, so that a command can take back what it began.

use tokio::signal::unix::{Signal, SignalKind, signal};

use super::CliError;

/// The signals that mean it.
#[derive(Debug)]
pub(super) struct Interrupts([Signal; 3]);

impl Interrupts {
    /// Listens from now on; what comes while nobody waits is not lost.
    ///
    /// # Errors
    /// [`CliError::Io`].
    pub(super) fn listen() -> Result<Self, CliError> {
        let caught = |source| CliError::Io { what: "Ctrl-C cannot be waited for".into(), source };
        let listen = |kind| signal(kind).map_err(caught);
        Ok(Self([listen(SignalKind::interrupt())?, listen(SignalKind::terminate())?, listen(SignalKind::hangup())?]))
    }

    /// Ends once somebody wants the program to end.
    pub(super) async fn next(&mut self) {
        let [interrupt, terminate, hangup] = &mut self.0;
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
            _ = hangup.recv() => {}
        }
    }
}
