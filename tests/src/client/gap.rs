//! The longest silence in a stream of events, and when it was.
//!
//! Owns the arithmetic of gaps. Must not know what the events are. Times are `CLOCK_MONOTONIC`, which every process of a
//! host shares, so that a gap can be laid beside another process's event log.

use std::ops::RangeInclusive;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

/// `CLOCK_MONOTONIC` in nanoseconds.
pub fn monotonic_ns() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// A silence between two events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Gap {
    /// Its length.
    pub length_ns: u64,
    /// The event before it, in `CLOCK_MONOTONIC`.
    pub from_monotonic_ns: u64,
}

impl Gap {
    /// Its length.
    pub fn length(self) -> Duration {
        Duration::from_nanos(self.length_ns)
    }

    /// Whether `at_ns` lies in it.
    pub fn holds(self, at_ns: u64) -> bool {
        self.reaches(&(at_ns..=at_ns))
    }

    /// Whether any moment of that time lies in it.
    fn reaches(self, time_ns: &RangeInclusive<u64>) -> bool {
        self.from_monotonic_ns <= *time_ns.end() && self.from_monotonic_ns + self.length_ns >= *time_ns.start()
    }
}

/// The longest gap of some time, and of the rest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Split {
    /// The longest that reaches into that time; without length if none of those that are kept does.
    pub within: Gap,
    /// The longest of the others.
    pub besides: Gap,
}

impl Split {
    /// Of these gaps, longest first, and that time (`CLOCK_MONOTONIC`).
    pub fn at(longest: &[Gap], time_ns: &RangeInclusive<u64>) -> Self {
        let within = longest.iter().copied().find(|gap| gap.reaches(time_ns));
        let besides = longest.iter().copied().find(|gap| Some(*gap) != within);
        Self { within: within.unwrap_or_default(), besides: besides.unwrap_or_default() }
    }
}

/// So many gaps are kept, the longest.
const KEPT: usize = 32;

/// Watches the times of events and keeps the longest gaps.
#[derive(Clone, Debug, Default)]
pub struct GapMeter {
    last_ns: Option<u64>,
    /// Longest first.
    longest: Vec<Gap>,
}

impl GapMeter {
    /// An event happened at `now_ns`.
    pub fn event(&mut self, now_ns: u64) {
        if let Some(last_ns) = self.last_ns {
            let length_ns = now_ns.saturating_sub(last_ns);
            let place = self.longest.partition_point(|gap| gap.length_ns >= length_ns);
            if place < KEPT {
                self.longest.truncate(KEPT - 1);
                self.longest.insert(place, Gap { length_ns, from_monotonic_ns: last_ns });
            }
        }
        self.last_ns = Some(now_ns);
    }

    /// The longest gap between two events since the start or the last [`GapMeter::restart`].
    pub fn largest(&self) -> Gap {
        self.longest.first().copied().unwrap_or_default()
    }

    /// The longest gaps, longest first.
    pub fn longest(&self) -> &[Gap] {
        &self.longest
    }

    /// Forgets the longest gaps. A gap that is open now still counts whole when it ends.
    pub fn restart(&mut self) {
        self.longest.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_wins_and_an_open_one_survives_a_restart() {
        let mut meter = GapMeter::default();
        assert_eq!(meter.largest(), Gap::default());
        for at in [10, 20, 50, 60] {
            meter.event(at);
        }
        assert_eq!(meter.largest(), Gap { length_ns: 30, from_monotonic_ns: 20 });
        assert!(meter.largest().holds(35) && !meter.largest().holds(51));
        assert_eq!(meter.longest().iter().map(|gap| gap.length_ns).collect::<Vec<_>>(), [30, 10, 10]);
        meter.restart();
        meter.event(75);
        meter.event(80);
        assert_eq!(meter.largest(), Gap { length_ns: 15, from_monotonic_ns: 60 });
        for at in 0..1000u64 {
            meter.event(at * at);
        }
        assert_eq!((meter.longest().len(), meter.largest().length_ns), (KEPT, 998 + 999));
    }

    #[test]
    fn a_time_splits_the_gaps_into_its_own_and_the_others() {
        let mut meter = GapMeter::default();
        for at in [10, 20, 50, 60, 100] {
            meter.event(at);
        }
        let gap = |length_ns, from_monotonic_ns| Gap { length_ns, from_monotonic_ns };
        let at = |time| Split::at(meter.longest(), &time);
        assert_eq!(at(15..=55), Split { within: gap(30, 20), besides: gap(40, 60) });
        assert_eq!(at(35..=35), Split { within: gap(30, 20), besides: gap(40, 60) });
        assert_eq!(at(55..=99), Split { within: gap(40, 60), besides: gap(30, 20) });
        assert_eq!(at(101..=109), Split { within: Gap::default(), besides: gap(40, 60) });
    }
}
