//! The cache under every order of its calls that a checker comes up with: readers, writers, fills, publishes, resets,
//! flushes and stops run on the real code, and at each lock, atomic and disk operation another thread may go on.
//!
//! Built with the feature `shuttle` alone, which puts the checker under `src/sync.rs`. A failure prints how to repeat it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "tests fail by panicking")]
#![allow(clippy::print_stderr, reason = "the seed and the count belong into the output of the test")]

#[path = "interleavings/checker.rs"]
mod checker;
#[path = "common/sim/mod.rs"]
#[allow(dead_code, unused_imports, reason = "its store is for others")]
mod sim;
#[path = "interleavings/stepping.rs"]
mod stepping;
#[path = "interleavings/world.rs"]
mod world;

use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::{Either, select};
use nbd_server::cache::CacheError;
use nbd_server::cache::states::Content;
use nbd_server::units::ByteRange;
use nbd_server::volume::order::Order;
use shuttle::rand::{Rng, thread_rng};
use shuttle::thread;

use checker::check;
use sim::Loss;
use world::{First, Halves, Image, Second, Whole, World};

/// The published image of most scenarios; the last chunk is zeros.
const PUBLISHED: Image = [[10, 11], [12, 13], [14, 15], [0, 0]];
/// Another one.
const NEWER: Image = [[20, 21], [22, 23], [0, 0], [24, 25]];

/// How many crashes of a schedule are looked at; there are thousands of schedules.
const CRASHES: usize = 4;

/// Crashes from the moment `from` on, and looks at what a start makes of it.
fn assert_crashes_keep_what_they_must(world: &World, from: usize) {
    let mut random = thread_rng();
    let flushes = world.flushes();
    for _ in 0..CRASHES {
        let moment = match random.gen_range(0..3) {
            0 if !flushes.is_empty() => flushes[random.gen_range(0..flushes.len())],
            1 => world.now(),
            _ => random.gen_range(from..=world.now()),
        };
        let loss = any_loss();
        let (left, boot, kept) = match random.gen_range(0..3) {
            0 => (world.host_at(moment).live, 1, moment),
            _ => (world.host_at(moment).power_loss(loss), 2, world.flushed_by(moment)),
        };
        let what = if boot == 1 { "a process crash".to_owned() } else { format!("a power loss of {loss:?}") };
        world.assert_holds(&world.recovered(left, boot).1, kept, moment, &what);
    }
}

fn any_loss() -> Loss {
    match thread_rng().gen_range(0..3) {
        0 => Loss::Everything,
        1 => Loss::Nothing,
        _ => {
            let (kept, names, torn) = (thread_rng().r#gen(), thread_rng().gen_range(0..4), Some(thread_rng().r#gen()));
            Loss::Some { kept, names, torn }
        }
    }
}

#[test]
fn no_reader_sees_a_chunk_before_it_is_whole() {
    check("no_reader_sees_a_chunk_before_it_is_whole", || {
        let world = World::new(PUBLISHED);
        world.begin();
        thread::scope(|s| {
            s.spawn(|| world.fill(0));
            s.spawn(|| {
                assert_eq!(world.read(0), [10, 11]);
                world.write(1, First, 1);
            });
            s.spawn(|| {
                assert_eq!(world.read(0), [10, 11]);
                let seen = world.read(1);
                assert!(seen == [12, 13] || seen == [1, 13], "{seen:?}");
            });
        });
        assert_eq!((world.read(0), world.read(1)), ([10, 11], [1, 13]));
    });
}

#[test]
fn a_fill_never_replaces_a_write_or_a_zero() {
    check("a_fill_never_replaces_a_write_or_a_zero", || {
        let world = World::new(PUBLISHED);
        world.begin();
        thread::scope(|s| {
            s.spawn(|| world.fill(0));
            s.spawn(|| world.write(0, Whole, 1));
            s.spawn(|| {
                world.fill(1);
                world.fill(2);
            });
            s.spawn(|| {
                world.write(1, Second, 2);
                world.zero(2, Whole);
            });
        });
        assert_eq!([0, 1, 2].map(|at| world.read(at)), [[1, 1], [12, 2], [0, 0]]);
        assert_crashes_keep_what_they_must(&world, world.now());
    });
}

#[test]
fn writes_to_the_halves_of_a_chunk_both_stay() {
    check("writes_to_the_halves_of_a_chunk_both_stay", || {
        let world = World::new(PUBLISHED);
        world.begin();
        let begun = world.now();
        thread::scope(|s| {
            s.spawn(|| {
                world.write(0, First, 1);
                world.write(3, First, 3);
            });
            s.spawn(|| {
                world.write(0, Second, 2);
                world.write(3, Second, 4);
            });
            s.spawn(|| world.zero(1, First));
            s.spawn(|| world.write(1, Second, 5));
        });
        assert_eq!([0, 1, 3].map(|at| world.read(at)), [[1, 2], [0, 5], [3, 4]]);
        assert_crashes_keep_what_they_must(&world, begun);
    });
}

/// Chunks 0 and 1 written and sealed, 2 zeroed.
fn with_dirty_chunks() -> World {
    with_dirty_chunks_of(PUBLISHED)
}

fn with_dirty_chunks_of(image: Image) -> World {
    let world = World::new(image);
    world.write(0, Whole, 1);
    world.write(1, Whole, 2);
    world.zero(2, Whole);
    world.begin();
    world
}

#[test]
fn a_publish_holds_one_moment_and_cleans_only_what_was_not_rewritten() {
    check("a_publish_holds_one_moment_and_cleans_only_what_was_not_rewritten", || {
        let world = with_dirty_chunks();
        let begun = world.now();
        let (mut chunks, mut image) = (Vec::new(), PUBLISHED);
        thread::scope(|s| {
            s.spawn(|| {
                // One after the other: the cut may not hold the second without the first.
                world.write(0, Whole, 3);
                world.write(1, First, 4);
            });
            s.spawn(|| {
                world.write(2, Second, 5);
                world.write(3, Whole, 6);
            });
            s.spawn(|| {
                // A write under way may be seen in part, but nothing else.
                let seen: [Halves; 2] = [world.read(0), world.read(1)];
                assert!(seen[0].iter().all(|half| [1, 3].contains(half)), "{seen:?}");
                assert!([[2, 2], [4, 2]].contains(&seen[1]), "{seen:?}");
            });
            (chunks, image) = world.publish();
        });
        let now = [[3, 3], [4, 2], [0, 5], [6, 6]];
        assert_eq!([0, 1, 2, 3].map(|at| world.read(at)), now);
        for (at, old) in [[1, 1], [2, 2], [0, 0], [0, 0]].into_iter().enumerate() {
            assert!(image[at] == old || image[at] == now[at], "chunk {at} was published as {:?}", image[at]);
            assert!(world.is_free_of_a_publish(at));
            let dirty = matches!(world.content(at), Content::Dirty | Content::Zero);
            assert_eq!(dirty, image[at] != now[at], "chunk {at} is {:?}: {image:?}", world.content(at));
        }
        assert!(image[0] == [3, 3] || image[1] == [2, 2], "a write without the one before it: {image:?}");
        assert!(chunks.starts_with(&[0, 1, 2]));
        assert_crashes_keep_what_they_must(&world, begun);
        // Whatever was written meanwhile is in the next one.
        assert_eq!(world.publish().1, now);
        assert!((0..4).all(|at| matches!(world.content(at), Content::Clean | Content::Absent)));
        assert_crashes_keep_what_they_must(&world, begun);
    });
}

#[test]
fn a_publish_given_up_leaves_everything_dirty_for_the_next() {
    check("a_publish_given_up_leaves_everything_dirty_for_the_next", || {
        let world = with_dirty_chunks();
        let begun = world.now();
        thread::scope(|s| {
            s.spawn(|| world.write(0, First, 3));
            s.spawn(|| world.zero(1, Second));
            let (_, image) = world.cut_and_take();
            image.unwrap();
            world.cache.uncut().unwrap();
        });
        assert!((0..4).all(|at| world.is_free_of_a_publish(at)));
        assert_eq!([0, 1, 2].map(|at| world.content(at)), [Content::Dirty, Content::Dirty, Content::Zero]);
        assert_crashes_keep_what_they_must(&world, begun);
        assert_eq!(world.publish(), (vec![0, 1, 2], [[3, 1], [2, 0], [0, 0], [0, 0]]));
    });
}

#[test]
fn a_cut_beside_writes_while_an_earlier_one_still_stands_holds_one_moment() {
    check("a_cut_beside_writes_while_an_earlier_one_still_stands_holds_one_moment", || {
        let world = with_dirty_chunks();
        // Its publish failed, and so did the look at how far it had come.
        world.cache.cut().unwrap();
        let mut image = PUBLISHED;
        thread::scope(|s| {
            s.spawn(|| world.write(0, First, 3));
            s.spawn(|| world.zero(1, Second));
            image = world.publish().1;
        });
        let now = [[3, 1], [2, 0], [0, 0], [0, 0]];
        for (at, old) in [[1, 1], [2, 2], [0, 0], [0, 0]].into_iter().enumerate() {
            assert!(image[at] == old || image[at] == now[at], "chunk {at} was published as {:?}", image[at]);
        }
        assert_eq!(world.publish().1, now, "whatever it did not hold is in the next");
    });
}

#[test]
fn a_read_of_the_cut_that_outlives_its_publish_changes_nothing() {
    check("a_read_of_the_cut_that_outlives_its_publish_changes_nothing", || {
        let world = with_dirty_chunks();
        let first = world.cache.cut().unwrap()[0];
        let publishes_again: bool = thread_rng().r#gen();
        let commits: bool = thread_rng().r#gen();
        let mut published = None;
        thread::scope(|s| {
            s.spawn(|| {
                if let Ok(taken) = world.take(first) {
                    assert_eq!(taken, [1, 1]);
                }
            });
            s.spawn(|| world.write(0, First, 3));
            if commits {
                let mut image = PUBLISHED;
                (image[0], image[1], image[2]) = ([1, 1], [2, 2], [0, 0]);
                world.commit(image);
            } else {
                world.cache.uncut().unwrap();
            }
            if publishes_again {
                published = Some(world.publish().1);
            }
        });
        assert!((0..4).all(|at| world.is_free_of_a_publish(at)), "a flag of the cut was left behind");
        let now = [[3, 1], [2, 2], [0, 0], [0, 0]];
        assert_eq!([0, 1, 2, 3].map(|at| world.read(at)), now);
        if let Some(image) = published {
            assert!([[1, 1], [3, 1]].contains(&image[0]) && image[1..] == now[1..], "{image:?}");
        }
        for (at, (published, now)) in world.published().iter().zip(&now).enumerate() {
            let dirty = matches!(world.content(at), Content::Dirty | Content::Zero);
            assert_eq!(dirty, published != now, "chunk {at} is {:?}", world.content(at));
        }
    });
}

#[test]
fn a_flush_covers_every_write_that_had_returned_before_it() {
    check("a_flush_covers_every_write_that_had_returned_before_it", || {
        let world = World::new(PUBLISHED);
        world.write(2, Whole, 1);
        world.begin();
        let begun = world.now();
        thread::scope(|s| {
            s.spawn(|| {
                world.write(0, First, 2);
                world.flush();
                world.write(0, First, 3);
            });
            s.spawn(|| {
                world.write(1, Whole, 4);
                world.flush();
                world.zero(1, Whole);
            });
            s.spawn(|| {
                // Beside the first thread's half: whoever finds the chunk marked by the other needs that mark, too.
                world.write(0, Second, 5);
                world.flush();
                world.zero(2, First);
            });
        });
        assert_crashes_keep_what_they_must(&world, begun);
    });
}

#[test]
fn a_flush_covers_marks_that_a_new_checkpoint_carries_over() {
    check("a_flush_covers_marks_that_a_new_checkpoint_carries_over", || {
        let world = with_dirty_chunks();
        let begun = world.now();
        thread::scope(|s| {
            s.spawn(|| {
                world.write(0, First, 3);
                world.flush();
                world.zero(3, Whole);
            });
            s.spawn(|| {
                world.write(3, First, 4);
                world.flush();
            });
            world.publish();
        });
        assert_crashes_keep_what_they_must(&world, begun);
    });
}

#[test]
fn a_reset_lets_no_older_byte_shine_through() {
    check("a_reset_lets_no_older_byte_shine_through", || {
        let world = with_dirty_chunks_of([PUBLISHED[0], PUBLISHED[1], PUBLISHED[2], [16, 17]]);
        let mut reset_at = 0;
        thread::scope(|s| {
            // Chunk 3 is fetched from the older image; the others hold what was never published.
            s.spawn(|| world.write(0, First, 3));
            s.spawn(|| world.write(2, Second, 4));
            s.spawn(|| {
                world.fill(3);
                let seen = world.read(1);
                assert!([[2, 2], NEWER[1]].contains(&seen), "{seen:?}");
                let seen = world.read(0);
                assert!([[1, 1], [3, 1], NEWER[0], [3, NEWER[0][1]]].contains(&seen), "{seen:?}");
            });
            s.spawn(|| world.cache.flush().unwrap());
            world.reset(NEWER);
            reset_at = world.now();
        });
        // A write came before the reset, and is gone with all else, or after it.
        let allowed = [vec![NEWER[0], [3, NEWER[0][1]]], vec![NEWER[1]], vec![[0, 0], [0, 4]], vec![NEWER[3]]];
        let now = [0, 1, 2, 3].map(|at| world.read(at));
        assert!((0..4).all(|at| allowed[at].contains(&now[at])), "{now:?}");
        for moment in [reset_at, world.now()] {
            let loss = any_loss();
            let left = world.host_at(moment).power_loss(loss);
            for (at, sectors) in world.recovered(left, 2).1.iter().enumerate() {
                let fits = |sector: usize| allowed[at].iter().any(|halves| halves[sector / 4] == sectors[sector]);
                assert!((0..8).all(fits), "chunk {at} after {loss:?} at {moment}: {sectors:?}");
            }
        }
    });
}

#[test]
fn an_eviction_drops_no_write_and_no_byte_that_is_read() {
    check("an_eviction_drops_no_write_and_no_byte_that_is_read", || {
        let world = World::new([PUBLISHED[0], PUBLISHED[1], PUBLISHED[2], [16, 17]]);
        (0..3).for_each(|at| {
            world.fill(at);
        });
        world.write(3, Whole, 9);
        world.begin();
        let begun = world.now();
        thread::scope(|s| {
            s.spawn(|| {
                assert_eq!(world.read(0), [10, 11]);
                assert_eq!(world.read(0), [10, 11]);
            });
            s.spawn(|| {
                world.write(1, First, 1);
                world.flush();
            });
            s.spawn(|| world.write(2, Whole, 2));
            s.spawn(|| world.zero(3, Second));
            world.cache.evict_clean().unwrap();
        });
        assert_eq!([0, 1, 2, 3].map(|at| world.read(at)), [[10, 11], [1, 13], [2, 2], [9, 0]]);
        assert_crashes_keep_what_they_must(&world, begun);
        assert_eq!(world.publish(), (vec![1, 2, 3], [[10, 11], [1, 13], [2, 2], [9, 0]]));
    });
}

#[test]
fn nothing_changes_after_a_clean_stop_and_the_next_start_trusts_all_of_it() {
    check("nothing_changes_after_a_clean_stop_and_the_next_start_trusts_all_of_it", || {
        let world = with_dirty_chunks();
        let first = world.cache.cut().unwrap()[0];
        world.fill(3);
        let mut closed_at = 0;
        thread::scope(|s| {
            // What may still be under way: reads of a publish that was given up, and a flush.
            s.spawn(|| drop(world.take(first)));
            s.spawn(|| world.cache.flush().unwrap());
            s.spawn(|| assert_eq!(world.read(1), [2, 2]));
            let writes = s.spawn(|| world.write(1, Whole, 2));
            world.cache.uncut().unwrap();
            writes.join().unwrap();
            world.cache.close().unwrap();
            closed_at = world.now();
        });
        world.cache.close().unwrap();
        let states = |cache: &nbd_server::cache::Cache| {
            [0, 1, 2, 3].map(|at| cache.state(nbd_server::units::ChunkIndex(at)).content())
        };
        assert!((0..4).all(|at| world.is_free_of_a_publish(at)));
        for moment in [closed_at, world.now()] {
            let left = world.host_at(moment).power_loss(Loss::Everything);
            let (cache, contents) = world.recovered(left, 2);
            assert_eq!(states(&cache), states(&world.cache), "another boot, and still all of it is trusted");
            world.assert_holds(&contents, moment, moment, "a clean stop");
        }
    });
}

#[test]
fn a_failed_sync_fails_every_flush_that_shared_it_and_all_after() {
    check("a_failed_sync_fails_every_flush_that_shared_it_and_all_after", || {
        let world = with_dirty_chunks();
        world.fail_next_sync();
        let fails =
            |result: Result<(), CacheError>| assert!(matches!(result, Err(CacheError::Failed(_))), "{result:?}");
        thread::scope(|s| {
            // Three, so that two may wait for one barrier.
            s.spawn(|| fails(world.cache.flush()));
            s.spawn(|| fails(world.cache.flush()));
            s.spawn(|| fails(world.cache.flush()));
            s.spawn(|| drop(world.try_write(3, Whole, 9)));
            s.spawn(|| drop(world.try_read(0)));
        });
        fails(world.cache.flush());
        fails(world.try_write(0, Whole, 9));
        fails(world.try_read(0).map(drop));
        assert!(world.list().iter().any(|name| name == "cache.failed"));
    });
}

#[test]
fn overlapping_changes_have_their_turns_one_after_the_other() {
    check("overlapping_changes_have_their_turns_one_after_the_other", || {
        let order = Arc::new(Order::default());
        let range = |offset, len| ByteRange::new(offset, len).unwrap();
        let (first_byte, turns) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        // Each has the byte 5 in it, beside others; whoever has its turn finds nobody there.
        let change = |offset, len| {
            let (order, inside, turns) = (Arc::clone(&order), Arc::clone(&first_byte), Arc::clone(&turns));
            thread::spawn(move || {
                shuttle::future::block_on(async move {
                    let mut turn = order.join(range(offset, len));
                    turn.come().await;
                    assert_eq!(inside.fetch_add(1, Ordering::Relaxed), 0);
                    shuttle::future::yield_now().await;
                    inside.fetch_sub(1, Ordering::Relaxed);
                    turns.fetch_add(1, Ordering::Relaxed);
                });
            })
        };
        let mut changes = vec![change(0, 10), change(5, 1), change(4, 4)];
        // One that gives up waiting after a while holds nobody up.
        let impatient = Arc::clone(&order);
        changes.push(thread::spawn(move || {
            shuttle::future::block_on(async move {
                let mut turn = impatient.join(range(3, 3));
                let (come, patience) = (pin!(turn.come()), pin!(shuttle::future::yield_now()));
                match select(come, patience).await {
                    Either::Left(((), _)) | Either::Right(((), _)) => {}
                }
            });
        }));
        for change in changes {
            change.join().unwrap();
        }
        assert_eq!(turns.load(Ordering::Relaxed), 3);
        assert!(order.turn_at_once(range(0, 20)).is_some(), "the line is empty");
    });
}
