//! Two servers on one store: at every call that one of them makes while it publishes, the other publishes the same export.
//! Whoever is later is told so, and nothing is lost on either side (S6–S8).

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::scene::{runtime, start, start_with_patience};
use common::sim::faults::{Plan, StoreFault};
use common::sim::{Sim, SimStore, State};
use common::volumes::*;
use nbd_server::store::retry::RetryPolicy;
use nbd_server::store::{Condition, Store};
use nbd_server::volume::registry::{ExportError, Published, Registry};

/// Two servers, each with a store of its own that leads to the same objects, and an export of 4 published chunks.
struct Hosts {
    sim: Arc<Sim>,
    stores: [SimStore; 2],
    servers: [Arc<Registry>; 2],
}

const CACHES: [&str; 2] = ["/a", "/b"];

impl Hosts {
    async fn new() -> Self {
        let sim = Sim::new(State::default(), 1);
        let stores = [SimStore::new(Arc::clone(&sim)), SimStore::new(Arc::clone(&sim))];
        let a = start(&sim, &stores[0], CACHES[0]).await.unwrap();
        let volume = create(&a, "disk", 4).await;
        write(&volume, 0, 1, 4 * CHUNK).await;
        a.snapshot(&id("disk")).await.unwrap();
        let b = start(&sim, &stores[1], CACHES[1]).await.unwrap();
        write(&volume, 0, 0xaa, CHUNK).await;
        write(&b.volume(&id("disk")).await.unwrap(), CHUNK, 0xbb, CHUNK).await;
        Self { sim, stores, servers: [a, b] }
    }

    /// What a server with an empty cache reads: the first byte of the first two chunks.
    async fn published(&self) -> [u8; 2] {
        let store = SimStore::new(Arc::clone(&self.sim));
        let all = image(&start(&self.sim, &store, "/elsewhere").await.unwrap(), "disk").await;
        [all[0], all[usize::try_from(CHUNK).unwrap()]]
    }

    /// The loser keeps its dirty data across a restart, is refused again, and follows the winner once it is reset.
    async fn loser_keeps_its_data(&mut self, loser: usize) {
        let own = [[0xaa, 1], [1, 0xbb]][loser];
        let restarted = start(&self.sim, &self.stores[loser], CACHES[loser]).await.unwrap();
        let all = image(&restarted, "disk").await;
        assert_eq!([all[0], all[usize::try_from(CHUNK).unwrap()]], own, "the loser's own data");
        assert!(matches!(restarted.snapshot(&id("disk")).await, Err(ExportError::Conflict { .. })));
        assert_eq!(status(&restarted, "disk").await.dirty_chunks, 1);
        restarted.reset(&id("disk")).await.unwrap();
        let all = image(&restarted, "disk").await;
        assert_eq!([all[0], all[usize::try_from(CHUNK).unwrap()]], self.published().await);
        self.servers[loser] = restarted;
    }
}

fn names_both(refused: &ExportError, winner: Published) {
    let ExportError::Conflict { expected, found, .. } = refused else { panic!("{refused}") };
    assert_eq!(*found, winner.snapshot_id.unwrap().to_string());
    assert_ne!(expected, found);
    let text = refused.to_string();
    assert!(text.contains(expected.as_str()) && text.contains(found.as_str()), "{text}");
}

#[test]
fn whenever_another_server_publishes_one_wins_and_the_other_keeps_its_data() {
    for at in 0.. {
        let calls = runtime().block_on(async {
            let mut hosts = Hosts::new().await;
            let (calls, other) = (Arc::new(AtomicUsize::new(0)), Arc::clone(&hosts.servers[1]));
            let (seen, theirs) = (Arc::clone(&calls), Arc::new(std::sync::Mutex::new(None)));
            let into = Arc::clone(&theirs);
            hosts.stores[0].meanwhile(move |_, _| {
                let (now, other, into) =
                    (seen.fetch_add(1, Ordering::Relaxed) == at, Arc::clone(&other), Arc::clone(&into));
                now.then(|| -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> {
                    Box::pin(async move {
                        let published = other.snapshot(&id("disk")).await;
                        *into.lock().unwrap() = Some(published);
                    })
                })
            });
            let ours = hosts.servers[0].snapshot(&id("disk")).await;
            hosts.stores[0].meanwhile(|_, _| None);
            let theirs = theirs.lock().unwrap().take();
            match (ours, theirs) {
                (Ok(published), None) => assert!(published.created),
                (Err(refused), Some(Ok(winner))) => {
                    names_both(&refused, winner);
                    assert_eq!(hosts.published().await, [1, 0xbb]);
                    hosts.loser_keeps_its_data(0).await;
                }
                (Ok(winner), Some(Err(refused))) => {
                    names_both(&refused, winner);
                    assert_eq!(hosts.published().await, [0xaa, 1]);
                    hosts.loser_keeps_its_data(1).await;
                }
                (ours, theirs) => panic!("call {at}: exactly one must win: {ours:?}, {theirs:?}"),
            }
            calls.load(Ordering::Relaxed)
        });
        if calls <= at {
            assert!(at > 5, "only {at} calls");
            break;
        }
    }
}

/// A's swap is on its way when A gives up; it arrives any number of calls later. Whatever the head is then, all it names
/// is there.
#[test]
fn a_delayed_swap_never_lands_on_deleted_blobs() {
    for late in 1..16 {
        for at in 0.. {
            let struck = runtime().block_on(async {
                let mut hosts = Hosts::new().await;
                let before = hosts.sim.faults(|faults| faults.store_calls);
                let plan = Plan { at: before + at, fault: StoreFault::Late(late), sticky: false };
                hosts.sim.faults(|faults| faults.store = Some(plan));
                let _ = hosts.servers[0].snapshot(&id("disk")).await;
                let struck = hosts.sim.faults(|faults| {
                    faults.end();
                    faults.store_calls > before + at
                });
                hosts.stores[0].land_late_puts();
                let there = hosts.published().await;
                assert!([[1, 1], [0xaa, 1]].contains(&there), "late by {late}, call {at}: {there:?}");
                // Its next publish says the same as everybody sees.
                hosts.servers[0].snapshot(&id("disk")).await.unwrap();
                assert_eq!(hosts.published().await, [0xaa, 1]);
                let refused = hosts.servers[1].snapshot(&id("disk")).await.unwrap_err();
                assert!(matches!(refused, ExportError::Conflict { .. }), "{refused}");
                hosts.loser_keeps_its_data(1).await;
                struck
            });
            if !struck {
                break;
            }
        }
    }
}

/// The answer to our own swap is lost, and the retry of somebody below meets the conflict with itself.
#[test]
fn a_swap_that_landed_unseen_is_our_own_even_if_another_built_upon_it() {
    runtime().block_on(async {
        let mut hosts = Hosts::new().await;
        let (other, done) = (start(&hosts.sim, &hosts.stores[1], "/c").await.unwrap(), Arc::new(AtomicUsize::new(0)));
        let (head, inner) = (root().export(&id("disk")).head(), hosts.stores[1].clone());
        hosts.stores[0].meanwhile(move |operation, key| {
            if operation != "put" || *key != head || done.fetch_add(1, Ordering::Relaxed) != 0 {
                return None;
            }
            // It lands; before its sender hears of it, a third server publishes on top of it.
            let (other, inner, head) = (Arc::clone(&other), inner.clone(), head.clone());
            Some(Box::pin(async move {
                let folders = inner.list_folders(&"exports/disk/snapshots".parse().unwrap()).await.unwrap();
                let object = inner.get(&head, 1 << 20).await.unwrap();
                let text = String::from_utf8(object.bytes.to_vec()).unwrap();
                let current = folders.iter().find(|name| text.contains(name.as_str())).unwrap();
                let ours = folders.iter().find(|name| *name != current).unwrap();
                let landed = text.replace(current.as_str(), ours).into_bytes();
                inner.put(&head, landed.into(), Condition::IfVersion(object.version)).await.unwrap();
                write(&other.volume(&id("disk")).await.unwrap(), 2 * CHUNK, 0xcc, CHUNK).await;
                other.snapshot(&id("disk")).await.unwrap();
            }))
        });
        let published = hosts.servers[0].snapshot(&id("disk")).await.unwrap();
        assert!(published.created, "ours led to the head");
        assert_eq!(status(&hosts.servers[0], "disk").await.dirty_chunks, 0);
        assert_eq!(hosts.published().await, [0xaa, 1]);
        hosts.loser_keeps_its_data(1).await;
    });
}

/// The swap of A is not answered, and A, which tries it once, gives up; it is still on its way. Before A removes its objects
/// it sees to it that the swap can only fail (S7).
#[test]
fn a_swap_given_up_on_never_lands_on_deleted_blobs() {
    let once = RetryPolicy { limit: Duration::ZERO, ..RetryPolicy::default() };
    for late in 1..24 {
        runtime().block_on(async {
            let mut hosts = Hosts::new().await;
            hosts.servers[0] = start_with_patience(&hosts.sim, &hosts.stores[0], CACHES[0], once).await.unwrap();
            let (sim, head, swaps) = (Arc::clone(&hosts.sim), root().export(&id("disk")).head(), AtomicUsize::new(0));
            hosts.stores[0].meanwhile(move |operation, key| {
                if operation == "put" && *key == head && swaps.fetch_add(1, Ordering::Relaxed) == 0 {
                    let fault = StoreFault::Late(late);
                    sim.faults(|f| f.store = Some(Plan { at: f.store_calls, fault, sticky: false }));
                }
                None
            });
            let outcome = hosts.servers[0].snapshot(&id("disk")).await;
            hosts.sim.faults(|faults| faults.end());
            hosts.stores[0].land_late_puts();
            let there = hosts.published().await;
            // It may have landed while A was giving up; whatever is published is whole.
            let whole = there == [0xaa, 1] || (there == [1, 1] && outcome.is_err());
            assert!(whole, "late by {late}: {there:?}, {outcome:?}");
            hosts.servers[0].snapshot(&id("disk")).await.unwrap();
            assert_eq!(hosts.published().await, [0xaa, 1]);
            hosts.loser_keeps_its_data(1).await;
        });
    }
}

/// What of a publish's cache folder a server over a copy of it may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum CopyStarts {
    /// At the moment of the copy, while the original uploads.
    AtOnce,
    /// Once the original has published.
    Afterwards,
}

/// A copy of A's cache is taken at every call that A makes while it publishes (a backup, a clone of its machine), and a
/// server starts over it. Whatever it finds of A's publish, nothing that a head names is ever removed (S7).
#[test]
fn a_server_over_a_copied_cache_removes_nothing_that_a_head_names() {
    for starts in [CopyStarts::AtOnce, CopyStarts::Afterwards] {
        for at in 0.. {
            let calls = runtime().block_on(async {
                let hosts = Hosts::new().await;
                let calls = Arc::new(AtomicUsize::new(0));
                let (seen, sim, store) = (Arc::clone(&calls), Arc::clone(&hosts.sim), hosts.stores[1].clone());
                hosts.stores[0].meanwhile(move |_, _| {
                    if seen.fetch_add(1, Ordering::Relaxed) != at {
                        return None;
                    }
                    sim.copy_folder(CACHES[0], "/a.copy");
                    let (sim, store) = (Arc::clone(&sim), store.clone());
                    (starts == CopyStarts::AtOnce).then(|| -> std::pin::Pin<Box<dyn Future<Output = ()> + Send>> {
                        Box::pin(async move { drop(start(&sim, &store, "/a.copy").await.unwrap()) })
                    })
                });
                let outcome = hosts.servers[0].snapshot(&id("disk")).await;
                hosts.stores[0].meanwhile(|_, _| None);
                if starts == CopyStarts::Afterwards {
                    outcome.as_ref().unwrap();
                }
                let copy = start(&hosts.sim, &hosts.stores[1], "/a.copy").await.unwrap();
                let there = hosts.published().await;
                let expected = if outcome.is_ok() { [0xaa, 1] } else { [1, 1] };
                assert_eq!(there, expected, "{starts:?}, call {at}: {outcome:?}");
                // Either goes on by the usual rules, and what is published stays whole.
                let again = hosts.servers[0].snapshot(&id("disk")).await.unwrap();
                assert_eq!(hosts.published().await, [0xaa, 1], "{starts:?}, call {at}: {again:?}");
                let _ = copy.snapshot(&id("disk")).await;
                assert_eq!(hosts.published().await, [0xaa, 1], "{starts:?}, call {at}");
                calls.load(Ordering::Relaxed)
            });
            if calls <= at {
                assert!(at > 4, "only {at} calls");
                break;
            }
        }
    }
}
