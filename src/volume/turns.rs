//! Whose fetch begins next: over all exports of a server, bounded in number and in bytes.
//!
//! Promises: exports that wait take turns, and within one export the first that asked comes first. So an export whose fetches
//! fill every place delays another's by those under way, not by those that wait.
//! Must never: let a small fetch pass a large one whose turn it is. The large one would never find its room.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::oneshot;

use crate::units::ExportId;

/// What is free, and the fetches that wait for it.
#[derive(Debug)]
pub(super) struct Turns {
    state: Mutex<State>,
    all_bytes: u64,
}

#[derive(Debug)]
struct State {
    free: Room,
    lines: BTreeMap<ExportId, VecDeque<Waiting>>,
    /// The exports of `lines`, that whose turn is next first.
    order: VecDeque<ExportId>,
}

#[derive(Debug, Clone, Copy)]
struct Room {
    fetches: usize,
    bytes: u64,
}

#[derive(Debug)]
struct Waiting {
    bytes: u64,
    tell: oneshot::Sender<Turn>,
}

impl Turns {
    /// So many fetches at a time, of so many bytes together.
    pub(super) fn new(fetches: usize, bytes: u64) -> Arc<Self> {
        let state = State { free: Room { fetches, bytes }, lines: BTreeMap::new(), order: VecDeque::new() };
        Arc::new(Self { state: Mutex::new(state), all_bytes: bytes })
    }

    /// Waits for a turn to fetch `bytes`, at most all there are. `None` never happens while `self` lives.
    pub(super) async fn take(self: &Arc<Self>, export: &ExportId, bytes: u64) -> Option<Turn> {
        let (tell, told) = oneshot::channel();
        let bytes = bytes.min(self.all_bytes);
        self.state.lock().line_up(export, Waiting { bytes, tell });
        self.go_on();
        told.await.ok()
    }

    /// Begins every fetch that there is room for.
    fn go_on(self: &Arc<Self>) {
        loop {
            let Some(Waiting { bytes, tell }) = self.state.lock().next() else { return };
            let turn =
                Turn { place: Place { turns: Arc::clone(self) }, memory: Memory { turns: Arc::clone(self), bytes } };
            // A turn that is not wanted any more comes back by being dropped.
            drop(tell.send(turn));
        }
    }

    fn give_back(self: &Arc<Self>, room: Room) {
        let mut state = self.state.lock();
        state.free.fetches += room.fetches;
        state.free.bytes += room.bytes;
        drop(state);
        self.go_on();
    }
}

impl State {
    fn line_up(&mut self, export: &ExportId, waiting: Waiting) {
        if let Some(line) = self.lines.get_mut(export) {
            line.push_back(waiting);
        } else {
            self.lines.insert(export.clone(), VecDeque::from([waiting]));
            self.order.push_back(export.clone());
        }
    }

    /// The fetch whose turn it is, if there is room for it; the room is taken.
    fn next(&mut self) -> Option<Waiting> {
        loop {
            let line = self.lines.get_mut(self.order.front()?)?;
            while line.front().is_some_and(|waiting| waiting.tell.is_closed()) {
                line.pop_front();
            }
            let fits = |waiting: &Waiting| self.free.fetches > 0 && waiting.bytes <= self.free.bytes;
            if !line.front().is_none_or(fits) {
                return None;
            }
            let next = line.pop_front();
            let more = !line.is_empty();
            let export = self.order.pop_front()?;
            if more {
                self.order.push_back(export);
            } else {
                self.lines.remove(&export);
            }
            if let Some(waiting) = next {
                self.free.fetches -= 1;
                self.free.bytes -= waiting.bytes;
                return Some(waiting);
            }
        }
    }
}

/// A fetch that may begin.
#[derive(Debug)]
pub(super) struct Turn {
    /// Its place among the fetches under way, until its bytes are here.
    pub place: Place,
    /// The memory for its bytes, until nothing needs them any more.
    pub memory: Memory,
}

/// One of the fetches under way.
#[derive(Debug)]
pub(super) struct Place {
    turns: Arc<Turns>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.turns.give_back(Room { fetches: 1, bytes: 0 });
    }
}

/// Bytes of fetched chunks that may be held.
#[derive(Debug)]
pub(super) struct Memory {
    turns: Arc<Turns>,
    bytes: u64,
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.turns.give_back(Room { fetches: 0, bytes: self.bytes });
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use futures_util::future::BoxFuture;

    use super::*;

    type Asked = BoxFuture<'static, Option<Turn>>;

    /// Asks for a turn, which puts it in line.
    fn ask(turns: &Arc<Turns>, export: &str, bytes: u64) -> Asked {
        let (turns, export) = (Arc::clone(turns), export.parse::<ExportId>().unwrap());
        let mut asked = async move { turns.take(&export, bytes).await }.boxed();
        match (&mut asked).now_or_never() {
            Some(turn) => std::future::ready(turn).boxed(),
            None => asked,
        }
    }

    fn begun(asked: &mut Asked) -> Option<Turn> {
        asked.now_or_never().flatten()
    }

    #[test]
    fn no_more_fetches_than_places_and_one_more_with_each_that_ends() {
        let turns = Turns::new(2, 100);
        let mut asked: Vec<_> = (0..4).map(|_| ask(&turns, "a", 1)).collect();
        let mut under_way: Vec<_> = asked.iter_mut().filter_map(begun).collect();
        assert_eq!(under_way.len(), 2);
        let Turn { place, memory } = under_way.pop().unwrap();
        assert!(begun(&mut asked[2]).is_none());
        drop(place);
        let _third = begun(&mut asked[2]).expect("a place is free as soon as the bytes are here");
        drop(memory);
        assert!(begun(&mut asked[3]).is_none(), "memory is no place");
    }

    #[test]
    fn an_export_with_many_waiting_fetches_takes_turns_with_one_that_has_few() {
        let turns = Turns::new(1, 100);
        let mut under_way = begun(&mut ask(&turns, "many", 1));
        let mut many: Vec<_> = (0..50).map(|_| ask(&turns, "many", 1)).collect();
        let mut few: Vec<_> = (0..2).map(|_| ask(&turns, "few", 1)).collect();
        for round in 0..2 {
            under_way.take();
            under_way = begun(&mut many[round]);
            assert!(under_way.is_some(), "the first that waits, in round {round}");
            under_way.take();
            under_way = begun(&mut few[round]);
            assert!(under_way.is_some(), "and behind it the other export, in round {round}");
        }
    }

    #[test]
    fn a_large_fetch_whose_turn_it_is_is_not_passed_by_small_ones() {
        let turns = Turns::new(10, 100);
        let small = begun(&mut ask(&turns, "small", 1)).unwrap();
        let mut large = ask(&turns, "large", 1000);
        let mut next = ask(&turns, "small", 1);
        assert!(begun(&mut large).is_none() && begun(&mut next).is_none());
        drop(small);
        let large = begun(&mut large).expect("all the bytes there are");
        assert!(begun(&mut next).is_none());
        drop(large);
        assert!(begun(&mut next).is_some());
    }

    #[test]
    fn a_fetch_that_is_given_up_in_line_or_with_its_turn_holds_up_nothing() {
        let turns = Turns::new(1, 100);
        let first = begun(&mut ask(&turns, "a", 100)).unwrap();
        let mut waiting: Vec<_> = (0..3).map(|_| ask(&turns, "a", 100)).collect();
        drop(waiting.remove(0));
        drop(first);
        // The next one has its turn by now, and goes away without a look at it.
        drop(waiting.remove(0));
        let last = begun(&mut waiting[0]);
        assert!(last.is_some());
        drop(last);
        let state = turns.state.lock();
        assert_eq!((state.free.fetches, state.free.bytes), (1, 100));
        assert!(state.lines.is_empty() && state.order.is_empty());
    }
}
