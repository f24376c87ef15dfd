//! Overlapping changes take effect in the order in which they arrived (L11).
//!
//! A write may wait long for a fetch. If its connection dies meanwhile and the client sends newer data over another
//! one, the old write must not land on top of that, however late its chunk arrives. So each change stands in line from
//! its arrival to its end, and one that overlaps earlier ones waits for them. Changes that do not overlap never meet.

use tokio::sync::watch;

use crate::sabotage::{Rule, breaks};
use crate::sync::Mutex;
use crate::units::ByteRange;

/// The changes under way, in the order of their arrival. Front ends bound how many there are.
#[derive(Debug, Default)]
pub struct Order(Mutex<Line>);

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

/// A change's place in the line; the next one may go when it is dropped.
#[derive(Debug)]
pub struct Turn<'a> {
    order: &'a Order,
    ticket: u64,
}

impl Order {
    /// Joins the line, and returns once no earlier change of a byte of `range` is under way.
    pub async fn turn(&self, range: ByteRange) -> Turn<'_> {
        let (turn, before) = {
            let line = &mut *self.0.lock();
            let ticket = line.next_ticket;
            line.next_ticket += 1;
            let overlapping = line.places.iter_mut().filter(|place| overlap(place.range, range));
            let ended = |place: &mut Place| place.ended.get_or_insert_with(|| watch::Sender::new(())).subscribe();
            let before: Vec<_> = overlapping.map(ended).collect();
            line.places.push(Place { ticket, range, ended: None });
            (Turn { order: self, ticket }, before)
        };
        for mut earlier in before.into_iter().filter(|_| !breaks(Rule::IgnoreOrder)) {
            // Nothing is ever sent: the wait ends as the sender goes.
            let _ = earlier.changed().await;
        }
        turn
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let places = &mut self.order.0.lock().places;
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

    #[test]
    fn overlapping_changes_wait_for_the_earlier_ones_and_others_do_not() {
        let order = Order::default();
        let first = order.turn(range(0, 10)).now_or_never().unwrap();
        let mut second = std::pin::pin!(order.turn(range(5, 10)));
        assert!(second.as_mut().now_or_never().is_none());
        let beside = order.turn(range(15, 5)).now_or_never().unwrap();
        let mut third = std::pin::pin!(order.turn(range(0, 20)));
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
        let first = order.turn(range(0, 10)).now_or_never().unwrap();
        assert!(order.turn(range(0, 10)).now_or_never().is_none());
        drop(first);
        assert!(order.turn(range(0, 10)).now_or_never().is_some());
        assert!(order.0.lock().places.is_empty());
    }
}
