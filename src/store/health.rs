//! Whether the store serves requests: what the last attempt at one came to, for whoever looks at a server in an outage.
//!
//! It is news, not a judgement: nothing is decided by it, and a store nobody asks keeps its last answer. Every attempt
//! counts, those that are repeated and the parts of an upload too, so that an outage shows while its requests are still
//! waiting. A store is *up* if its last answer was a definite one, be it that an object is not there or that a condition
//! does not hold. One that refuses to serve (expired credentials, a bucket that is gone) is as useless as one that is
//! silent, and shows in the same way.

use std::time::SystemTime;

use parking_lot::Mutex;

use super::StoreError;
use crate::metrics::{Counter, Kind, Page};

/// How the store is, as the last attempt at a request found it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reachability {
    /// Whether it gave a definite answer.
    pub up: bool,
    /// Since when it is like that.
    pub since: SystemTime,
    /// What the last failure said, and when, however long ago.
    pub last_error: Option<(String, SystemTime)>,
}

/// A store that does not serve requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outage {
    /// When the first of the attempts failed that have failed in a row.
    pub since: SystemTime,
    /// What the newest one ended with.
    pub last_error: String,
}

/// What is known of a store; shared by all that ask it.
#[derive(Debug)]
pub struct Health {
    state: Mutex<Reachability>,
    retries: Counter,
}

impl Health {
    /// Of a store that nobody asked yet: up until an attempt fails.
    #[must_use]
    pub fn new(now: SystemTime) -> Self {
        let state = Mutex::new(Reachability { up: true, since: now, last_error: None });
        Self { state, retries: Counter::default() }
    }

    /// How the store is.
    #[must_use]
    pub fn reachability(&self) -> Reachability {
        self.state.lock().clone()
    }

    /// The outage, if the last attempt failed.
    #[must_use]
    pub fn outage(&self) -> Option<Outage> {
        match self.reachability() {
            Reachability { up: false, since, last_error: Some((last_error, _)) } => Some(Outage { since, last_error }),
            _ => None,
        }
    }

    /// Takes note of an attempt that ended at `now`.
    pub(crate) fn note<T>(&self, now: SystemTime, outcome: &Result<T, StoreError>) {
        let failure = match outcome {
            // Of the caller's own making: it says nothing about the store.
            Err(StoreError::Body { .. }) => return,
            Err(error @ (StoreError::Unavailable { .. } | StoreError::Refused { .. })) => Some(error.to_string()),
            Ok(_)
            | Err(
                StoreError::NotFound { .. }
                | StoreError::Conflict { .. }
                | StoreError::TooLarge { .. }
                | StoreError::Short { .. },
            ) => None,
        };
        let mut state = self.state.lock();
        let up = failure.is_none();
        if state.up != up {
            (state.up, state.since) = (up, now);
            match &failure {
                Some(error) => tracing::warn!("the store fails: {error}"),
                None => tracing::info!("the store answers again"),
            }
        }
        if let Some(error) = failure {
            state.last_error = Some((error, now));
        }
    }

    /// A request is made again.
    pub(crate) fn note_retry(&self) {
        self.retries.increment();
    }

    /// Writes it as metrics.
    pub fn describe(&self, page: &mut Page) {
        let help = "Whether the object store gave a definite answer to the last request.";
        page.family(Kind::Gauge, "nbd_server_store_up", help).sample(&[], u8::from(self.state.lock().up));
        let help = "Further attempts at requests, and at parts of uploads, that the object store had not served.";
        page.family(Kind::Counter, "nbd_server_store_retries_total", help).sample(&[], self.retries.get());
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::store::Key;
    use crate::store::retry::Request;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn up(health: &Health) -> bool {
        let mut page = Page::default();
        health.describe(&mut page);
        page.into_text().contains("nbd_server_store_up 1")
    }

    #[test]
    fn an_outage_lasts_from_its_first_failure_to_the_next_definite_answer() {
        let health = Health::new(at(0));
        let key: Key = "exports/vm/volume.json".parse().unwrap();
        let request = Request { operation: "get", key: &key };
        let body = || StoreError::Body { key: key.clone(), source: "ours".into() };
        health.note(at(1), &Ok(()));
        health.note::<()>(at(1), &Err(body()));
        assert_eq!(health.reachability(), Reachability { up: true, since: at(0), last_error: None });
        health.note::<()>(at(2), &Err(request.unavailable("no route")));
        health.note::<()>(at(3), &Err(request.refused("the token has expired")));
        health.note::<()>(at(4), &Err(body()));
        let outage = health.outage().unwrap();
        assert_eq!((outage.since, up(&health)), (at(2), false), "since the first failure");
        assert!(outage.last_error.ends_with("the token has expired"), "{}", outage.last_error);
        for answer in [
            Ok(()),
            Err(StoreError::NotFound { key: key.clone() }),
            Err(StoreError::Conflict { key: key.clone() }),
            Err(StoreError::TooLarge { key: key.clone(), max_bytes: 1 }),
        ] {
            health.note::<()>(at(5), &Err(request.unavailable("no route")));
            health.note(at(6), &answer);
            assert_eq!((health.outage(), up(&health)), (None, true));
        }
        let after = health.reachability();
        assert_eq!((after.up, after.since), (true, at(6)));
        assert_eq!(after.last_error.unwrap().1, at(5), "what was wrong can still be read");
    }
}
