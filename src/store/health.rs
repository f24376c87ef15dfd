//! Whether the store answers: what the last attempt at a request came to, for whoever looks at a server in an outage.
//!
//! It is news, not a judgement: nothing is decided by it, and a store nobody asks keeps its last answer. Every attempt
//! counts, those that are repeated too, so that an outage shows while its requests are still waiting.

use std::time::SystemTime;

use parking_lot::Mutex;

use super::StoreError;

/// A store that does not answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outage {
    /// When the first of the attempts failed that have failed in a row.
    pub since: SystemTime,
    /// What the newest one ended with.
    pub last_error: String,
}

/// What is known of a store; shared by all that ask it.
#[derive(Debug, Default)]
pub struct Health(Mutex<Option<Outage>>);

impl Health {
    /// The outage, if the last attempt had no answer.
    #[must_use]
    pub fn outage(&self) -> Option<Outage> {
        self.0.lock().clone()
    }

    /// Takes note of an attempt that ended at `now`. A refusal is an answer, too: the caller hears what it says.
    pub(crate) fn note<T>(&self, now: SystemTime, outcome: &Result<T, StoreError>) {
        let mut outage = self.0.lock();
        match outcome {
            Err(error @ StoreError::Unavailable { .. }) => {
                let since = outage.as_ref().map_or(now, |outage| outage.since);
                *outage = Some(Outage { since, last_error: error.to_string() });
            }
            // Of the caller's own making: it says nothing about the store.
            Err(StoreError::Body { .. }) => {}
            Ok(_)
            | Err(
                StoreError::NotFound { .. }
                | StoreError::Conflict { .. }
                | StoreError::Refused { .. }
                | StoreError::TooLarge { .. },
            ) => *outage = None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::store::Key;

    #[test]
    fn an_outage_lasts_from_its_first_failure_to_the_next_answer() {
        let health = Health::default();
        let key: Key = "exports/vm/volume.json".parse().unwrap();
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let away = |text: &str| StoreError::Unavailable { operation: "get", key: key.clone(), source: text.into() };
        health.note(at(1), &Ok(()));
        assert_eq!(health.outage(), None);
        health.note::<()>(at(2), &Err(away("no route")));
        health.note::<()>(at(3), &Err(away("timed out")));
        health.note::<()>(at(4), &Err(StoreError::Body { key: key.clone(), source: "ours".into() }));
        let outage = health.outage().unwrap();
        assert_eq!(outage.since, at(2));
        assert!(outage.last_error.ends_with("timed out"), "{}", outage.last_error);
        for answer in [
            StoreError::NotFound { key: key.clone() },
            StoreError::Conflict { key: key.clone() },
            StoreError::Refused { operation: "get", key: key.clone(), source: "403".into() },
        ] {
            health.note::<()>(at(5), &Err(away("no route")));
            health.note::<()>(at(6), &Err(answer));
            assert_eq!(health.outage(), None);
        }
    }
}
