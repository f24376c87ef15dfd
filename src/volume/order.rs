//! Overlapping changes take effect in the order in which they arrived (L11).
//!
//! A write may wait long for a fetch. If its connection dies meanwhile and the client sends newer data over another
//! one, the old write must not land on top of that, however late its chunk arrives. So each change stands in line from
//! its arrival to its end, and one that overlaps earlier ones waits for them. Changes that do not overlap never meet.

use std::sync::Arc;

use tokio::sync::watch;

use crate::sabotage::{Rule, breaks};
use crate::sync::Mutex;
use crate::units::ByteRange;

/// The changes under way, in the order of their arrival. Front ends bound how many there are.
#[derive(Debug, Default)]
pub struct Order(Arc<Mutex<Line>>);

#[derive(Debug, Default)]
struct Line {
    next_ticket: u64,
    places: Vec<Place>,
}

#[derive(Debug)]
struct Place {
    ticket: u64,
    range: ByteRange,
    /// There once somebody waits; dropped with the place, which wakes them.
    ended: Option<watch::Sender<()>>,
}

/// A change's place in the line; those behind it may go when it is dropped.
#[derive(Debug)]
pub struct Turn {
    line: Arc<Mutex<Line>>,
    ticket: u64,
    /// The earlier changes that it still has to wait for.
    before: Vec<watch::Receiver<()>>,
}

impl Order {
    /// Joins the line. Whoever joins later and overlaps waits, whenever this change's own work begins.
    #[must_use]
    pub fn join(&self, range: ByteRange) -> Turn {
        let line = &mut *self.0.lock();
        let overlapping = line.places.iter_mut().filter(|place| overlap(place.range, range));
        let ended = |place: &mut Place| place.ended.get_or_insert_with(|| watch::Sender::new(())).subscribe();
        let before = overlapping.map(ended).collect();
        self.enter(line, range, before)
    }

    /// Joins the line if that makes it this change's turn; `None`, and nothing was done, if it would have to wait.
    #[must_use]
    pub fn turn_at_once(&self, range: ByteRange) -> Option<Turn> {
        let line = &mut *self.0.lock();
        let free = breaks(Rule::IgnoreOrder) || !line.places.iter().any(|place| overlap(place.range, range));
        free.then(|| self.enter(line, range, Vec::new()))
    }

    fn enter(&self, line: &mut Line, range: ByteRange, before: Vec<watch::Receiver<()>>) -> Turn {
        let ticket = line.next_ticket;
        line.next_ticket += 1;
        line.places.push(Place { ticket, range, ended: None });
        Turn { line: Arc::clone(&self.0), ticket, before }
    }
}

impl Turn {
    /// Whether there was no earlier change of a byte of the range when this one arrived.
    pub fn has_come(&self) -> bool {
        self.before.is_empty() || breaks(Rule::IgnoreOrder)
    }

    /// Returns once no earlier change of a byte of the range is under way.
    pub async fn come(&mut self) {
        for mut earlier in self.before.drain(..).filter(|_| !breaks(Rule::IgnoreOrder)) {
            // Nothing is ever sent: the wait ends as the sender goes.
            let _ = earlier.changed().await;
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let places = &mut self.line.lock().places;
        if let Some(at) = places.iter().position(|place| place.ticket == self.ticket) {
            places.swap_remove(at);
        }
    }
}

fn overlap(a: ByteRange, b: ByteRange) -> bool {
    a.offset() < b.end() && b.offset() < a.end()
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;

    use super::*;

    fn range(offset: u64, len: u64) -> ByteRange {
        ByteRange::new(offset, len).unwrap()
    }

    async fn turn(order: &Order, range: ByteRange) -> Turn {
        let mut turn = order.join(range);
        turn.come().await;
        turn
    }

    #[test]
    fn overlapping_changes_wait_for_the_earlier_ones_and_others_do_not() {
        let order = Order::default();
        let first = turn(&order, range(0, 10)).now_or_never().unwrap();
        let mut second = std::pin::pin!(turn(&order, range(5, 10)));
        assert!(second.as_mut().now_or_never().is_none());
        let beside = turn(&order, range(15, 5)).now_or_never().unwrap();
        let mut third = std::pin::pin!(turn(&order, range(0, 20)));
        assert!(third.as_mut().now_or_never().is_none());
        drop(first);
        let second = second.now_or_never().unwrap();
        drop(beside);
        assert!(third.as_mut().now_or_never().is_none(), "behind the second");
        drop(second);
        assert!(third.now_or_never().is_some());
    }

    #[test]
    fn who_gives_up_waiting_leaves_the_line() {
        let order = Order::default();
        let first = turn(&order, range(0, 10)).now_or_never().unwrap();
        assert!(turn(&order, range(0, 10)).now_or_never().is_none());
        drop(first);
        assert!(turn(&order, range(0, 10)).now_or_never().is_some());
        assert!(order.0.lock().places.is_empty());
    }

    #[test]
    fn who_would_have_to_wait_gets_no_turn_at_once_and_who_has_it_is_waited_for() {
        let order = Order::default();
        // Joined, and not yet begun: that is what counts.
        let joined = order.join(range(0, 10));
        assert!(order.turn_at_once(range(9, 1)).is_none());
        let beside = order.turn_at_once(range(10, 10)).unwrap();
        let mut behind = std::pin::pin!(turn(&order, range(19, 1)));
        assert!(behind.as_mut().now_or_never().is_none());
        drop((joined, beside));
        assert!(behind.now_or_never().is_some());
        assert!(order.0.lock().places.is_empty());
    }
}
