//! What a crash leaves.
//!
//! A process crash keeps everything that was written, with the last write perhaps cut short by the kill. A power loss
//! keeps what was synced; of the rest it keeps any subset of the changes of files, the last of them perhaps torn at a
//! sector, and any prefix of the changes of names. Few unsynced changes are tried in every combination, many in some
//! that a seed draws.

use bytes::Bytes;

use super::{Event, SECTOR, State, Walk};

/// Up to this many unsynced changes, all their subsets are tried.
const EXHAUSTIVE: usize = 5;

/// What a power loss leaves of the operations that no sync covered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Loss {
    /// All of them.
    Nothing,
    /// None of them.
    Everything,
    /// Those whose bit is set, counting from the oldest, and this many changes of names. The last write is torn if there
    /// is a seed.
    Some { kept: u64, names: usize, torn: Option<u64> },
}

/// A small generator; its seed names a case.
#[derive(Debug, Clone)]
pub struct Dice(pub u64);

impl Dice {
    pub fn roll(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.roll() % bound
    }

    pub fn flip(&mut self) -> bool {
        self.roll() & 1 == 1
    }
}

impl Walk {
    /// What a power loss leaves here.
    pub fn power_loss(&self, loss: Loss) -> State {
        let mut state = self.durable.clone();
        let last_write = self.pending.iter().rposition(|event| matches!(event, Event::Write { .. }));
        let (mut files, mut names) = (0, 0);
        for (at, event) in self.pending.iter().enumerate() {
            let torn = match loss {
                Loss::Nothing => None,
                Loss::Everything => continue,
                Loss::Some { names: kept, .. } if event.dir().is_some() => {
                    names += 1;
                    if names > kept {
                        continue;
                    }
                    None
                }
                Loss::Some { kept, torn, .. } => {
                    files += 1;
                    if kept >> ((files - 1) % 64) & 1 == 0 {
                        continue;
                    }
                    torn.filter(|_| Some(at) == last_write)
                }
            };
            match (torn, event) {
                (Some(seed), Event::Write { node, offset, bytes }) => {
                    let mut dice = Dice(seed);
                    for (at, sector) in (0u64..).step_by(SECTOR).zip(bytes.chunks(SECTOR)) {
                        if dice.flip() {
                            let bytes = Bytes::copy_from_slice(sector);
                            state.apply(&Event::Write { node: *node, offset: offset + at, bytes });
                        }
                    }
                }
                _ => state.apply(event),
            }
        }
        state
    }

    /// The losses to try here: all of them, or `random` of them.
    fn losses(&self, random: u64, dice: &mut Dice) -> Vec<Loss> {
        let names = self.pending.iter().filter(|event| event.dir().is_some()).count();
        let files = self.pending.len() - names;
        let torn_write = self.pending.iter().any(|e| matches!(e, Event::Write { bytes, .. } if bytes.len() > SECTOR));
        let mut losses = vec![Loss::Nothing, Loss::Everything];
        if files <= EXHAUSTIVE {
            for (kept, names) in (0..1u64 << files).flat_map(|kept| (0..=names).map(move |names| (kept, names))) {
                losses.push(Loss::Some { kept, names, torn: None });
                if torn_write && names % 2 == 0 {
                    losses.push(Loss::Some { kept, names, torn: Some(dice.roll()) });
                }
            }
        } else {
            for _ in 0..random {
                let torn = (torn_write && dice.flip()).then(|| dice.roll());
                let names = usize::try_from(dice.below(names as u64 + 1)).unwrap();
                losses.push(Loss::Some { kept: dice.roll(), names, torn });
            }
        }
        losses
    }
}

/// A crash: after how many operations, how, and the host it leaves.
#[derive(Debug, Clone)]
pub struct Moment {
    pub k: usize,
    pub how: String,
    pub power_lost: bool,
    pub host: Walk,
}

/// Walks along a recording and calls `at` with every crash at every operation of it that is `mine`.
pub fn every_crash(
    start: &Walk,
    events: &[Event],
    random: u64,
    mine: impl Fn(usize) -> bool,
    mut at: impl FnMut(Moment),
) {
    let mut walk = start.clone();
    for k in 0..=events.len() {
        if mine(k) {
            let mut dice = Dice(k as u64);
            if let Some(Event::Write { node, offset, bytes }) = events.get(k) {
                let sectors = bytes.len().div_ceil(SECTOR);
                let cuts = [1, sectors / 2, sectors.saturating_sub(1)];
                for cut in (0..cuts.len()).filter(|i| !cuts[..*i].contains(&cuts[*i])).map(|i| cuts[i]) {
                    if cut > 0 && cut < sectors {
                        let mut host = walk.clone();
                        let bytes = bytes.slice(..cut * SECTOR);
                        host.take(&Event::Write { node: *node, offset: *offset, bytes });
                        at(Moment {
                            k,
                            how: format!("killed after {cut} sectors of the next"),
                            power_lost: false,
                            host,
                        });
                    }
                }
            }
            at(Moment { k, how: "process".into(), power_lost: false, host: walk.clone() });
            for loss in walk.losses(random, &mut dice) {
                let host = Walk::from(walk.power_loss(loss));
                at(Moment { k, how: format!("power, {loss:?}"), power_lost: true, host });
            }
        }
        if let Some(event) = events.get(k) {
            walk.take(event);
        }
    }
}
