//! Frames that reach a VM by two ways when it has just moved: through its port here, and by a relay from its former place.
//!
//! Owns their order. Until the relay has caught up the port's own frames wait, so that what was sent before comes before; what a switch flooded to both places is handed on once.
//! Must not know rings, taps or connections.

use std::collections::{HashMap, VecDeque};

use xxhash_rust::xxh3::xxh3_64;

/// The most that waits in either way, in bytes: a burst of 30 ms at 1 Gbit/s.
const MOST_BYTES: usize = 4 << 20;
/// So many of the port's own frames are remembered, for telling what comes by the relay as well.
const MOST_REMEMBERED: usize = 1024;

/// What has come, and not been handed on.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    phase: Phase,
    due: VecDeque<Vec<u8>>,
    due_bytes: usize,
    /// What came through the port and waits.
    kept_back: VecDeque<Vec<u8>>,
    kept_bytes: usize,
    /// How often a frame came by the relay while the port's own waited, by its hash.
    relayed: HashMap<u64, u32>,
    /// The last of the port's own frames, by their hashes.
    remembered: VecDeque<u64>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Phase {
    /// There is no relay.
    #[default]
    Off,
    /// The relay has not caught up.
    Waiting,
    /// What still comes by it comes late.
    Late,
}

impl Arrivals {
    /// A relay begins: what comes through the port waits for it.
    pub(super) fn await_relay(&mut self) {
        *self = Self { phase: Phase::Waiting, ..Self::default() };
    }

    /// Whether the port's own frames wait.
    pub(super) fn waits(&self) -> bool {
        self.phase == Phase::Waiting
    }

    /// Whether the port's own frames are to be told.
    pub(super) fn remembers(&self) -> bool {
        self.phase == Phase::Late
    }

    /// Whether another of the port's own frames may wait.
    pub(super) fn has_room(&self) -> bool {
        self.kept_bytes < MOST_BYTES
    }

    /// A frame came through the port, and waits.
    pub(super) fn keep_back(&mut self, frame: Vec<u8>) {
        self.kept_bytes += frame.len();
        self.kept_back.push_back(frame);
    }

    /// A frame came through the port, and is handed on.
    pub(super) fn remember(&mut self, frame: &[u8]) {
        if self.remembered.len() == MOST_REMEMBERED {
            self.remembered.pop_front();
        }
        self.remembered.push_back(xxh3_64(frame));
    }

    /// A frame came by the relay. `false` if it is dropped: it has come through the port, or there is no room.
    pub(super) fn relay(&mut self, frame: Vec<u8>) -> bool {
        let hash = xxh3_64(&frame);
        if self.phase == Phase::Late
            && let Some(at) = self.remembered.iter().position(|&seen| seen == hash)
        {
            self.remembered.remove(at);
            return false;
        }
        // One that has no room here excuses none that came through the port.
        if self.due_bytes + frame.len() > MOST_BYTES {
            return false;
        }
        if self.phase == Phase::Waiting {
            *self.relayed.entry(hash).or_default() += 1;
        }
        self.push(frame);
        true
    }

    /// The relay has brought what was at the former place when the VM ran here: what waited follows it, but for what came with it. Returns how many those were.
    pub(super) fn caught_up(&mut self) -> u64 {
        if self.phase != Phase::Waiting {
            return 0;
        }
        self.phase = Phase::Late;
        self.kept_bytes = 0;
        let (mut relayed, mut twice) = (std::mem::take(&mut self.relayed), 0);
        for frame in std::mem::take(&mut self.kept_back) {
            match relayed.get_mut(&xxh3_64(&frame)) {
                Some(count @ 1..) => {
                    *count -= 1;
                    twice += 1;
                }
                _ => {
                    self.remember(&frame);
                    self.push(frame);
                }
            }
        }
        twice
    }

    /// Nothing more comes by the relay.
    pub(super) fn end_relay(&mut self) -> u64 {
        let twice = self.caught_up();
        (self.phase, self.remembered) = (Phase::Off, VecDeque::new());
        twice
    }

    /// The next to be handed on.
    pub(super) fn next(&self) -> Option<&[u8]> {
        self.due.front().map(Vec::as_slice)
    }

    /// It was.
    pub(super) fn pop(&mut self) {
        if let Some(frame) = self.due.pop_front() {
            self.due_bytes -= frame.len();
        }
    }

    fn push(&mut self, frame: Vec<u8>) {
        self.due_bytes += frame.len();
        self.due.push_back(frame);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn taken(arrivals: &mut Arrivals) -> Vec<u8> {
        let mut taken = Vec::new();
        while let Some(frame) = arrivals.next() {
            taken.push(frame[0]);
            arrivals.pop();
        }
        taken
    }

    #[test]
    fn what_was_sent_to_the_former_place_comes_first_and_what_came_both_ways_once() {
        let mut arrivals = Arrivals::default();
        arrivals.await_relay();
        arrivals.keep_back(vec![2]);
        arrivals.keep_back(vec![3]);
        assert!(arrivals.relay(vec![1]) && arrivals.relay(vec![2]));
        assert_eq!((taken(&mut arrivals), arrivals.caught_up()), (vec![1, 2], 1));
        assert_eq!(taken(&mut arrivals), [3]);
        arrivals.remember(&[4]);
        let both_ways = [arrivals.relay(vec![3]), arrivals.relay(vec![4])];
        assert!(both_ways == [false; 2] && arrivals.relay(vec![4]), "each of them excuses one");
        assert_eq!(taken(&mut arrivals), [4]);
        arrivals.end_relay();
        assert!(!arrivals.waits() && !arrivals.remembers() && arrivals.caught_up() == 0);
    }

    #[test]
    fn a_flood_by_the_relay_is_bounded() {
        let mut arrivals = Arrivals::default();
        arrivals.await_relay();
        let had_room = (0..10_000).filter(|_| arrivals.relay(vec![0; 1500])).count();
        assert_eq!(had_room, MOST_BYTES / 1500);
        // What had no room there is not taken for a copy of what came through the port.
        assert!(!arrivals.relay(vec![1; 1500]));
        arrivals.keep_back(vec![1; 1500]);
        assert_eq!(arrivals.caught_up(), 0);
        assert_eq!(taken(&mut arrivals).len(), MOST_BYTES / 1500 + 1);
        arrivals.await_relay();
        let mut kept = 0;
        while arrivals.has_room() {
            arrivals.keep_back(vec![0; 1500]);
            kept += 1;
        }
        assert_eq!(kept, MOST_BYTES.div_ceil(1500));
    }

    proptest! {
        /// Numbered frames of one sender, each to one place or to both: none is lost, none comes twice, and those of each place come in their order.
        #[test]
        fn nothing_is_lost_doubled_or_turned_round(ways in prop::collection::vec(0..3u8, 0..60), catches_up_at in 0..60usize) {
            let mut arrivals = Arrivals::default();
            arrivals.await_relay();
            let mut got = Vec::new();
            for (number, &way) in ways.iter().enumerate() {
                if number == catches_up_at {
                    arrivals.caught_up();
                }
                let frame = vec![number as u8; 20];
                if way != 0 {
                    if arrivals.waits() {
                        arrivals.keep_back(frame.clone());
                    } else {
                        got.extend(taken(&mut arrivals));
                        arrivals.remember(&frame);
                        got.push(number as u8);
                    }
                }
                if way != 1 {
                    arrivals.relay(frame);
                }
            }
            arrivals.end_relay();
            got.extend(taken(&mut arrivals));
            let mut sorted = got.clone();
            sorted.sort_unstable();
            prop_assert_eq!(sorted, (0..ways.len() as u8).collect::<Vec<_>>());
            for way in [0, 1] {
                let of_way: Vec<u8> = got.iter().copied().filter(|&number| ways[usize::from(number)] == way).collect();
                prop_assert!(of_way.is_sorted());
            }
        }
    }
}
