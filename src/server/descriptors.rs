//! The files and sockets that the system lets this process have, and how many of them NBD clients may take.
//!
//! A client takes one. What clients never get is for everybody else: three for each open export, those of the admin API and
//! of collectors, the connections to the store. Without it clients that do nothing could lock out whoever would end them.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::nbd::Limits;

/// What is kept from clients, unless it is more than half of what there is.
const RESERVE: u64 = 4096;

/// Takes as many descriptors as the system grants.
pub fn take_all() {
    let granted = getrlimit(Resource::Nofile);
    if let Err(e) = setrlimit(Resource::Nofile, Rlimit { current: granted.maximum, ..granted }) {
        tracing::warn!("the limit on open files stays at {:?}: {e}", granted.current);
    }
}

/// The limits of NBD clients, with no more connections than there are descriptors for; a line of the log says so.
pub(super) fn limits_of_clients() -> Limits {
    let limits = Limits::default();
    let Some(descriptors) = getrlimit(Resource::Nofile).current else { return limits };
    let connections = for_clients(descriptors).min(limits.connections);
    if connections < limits.connections {
        tracing::info!(
            "at most {connections} NBD clients at once, not {}: the limit on open files is {descriptors} (ulimit -n, LimitNOFILE)",
            limits.connections
        );
    }
    Limits { connections, ..limits }
}

fn for_clients(descriptors: u64) -> usize {
    usize::try_from(descriptors - RESERVE.min(descriptors / 2)).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clients_leave_a_reserve_or_half_of_what_there_is() {
        for (descriptors, clients) in
            [(0, 0), (64, 32), (1024, 512), (8192, 4096), (20_480, 16_384), (1 << 20, 1_044_480)]
        {
            assert_eq!(for_clients(descriptors), clients);
        }
    }
}
