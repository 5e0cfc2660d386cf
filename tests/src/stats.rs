//! Median, percentile and extremes of a list of times. Pure.

use std::time::Duration;

use dunlin::model::units::display_duration;
use serde::Serialize;

/// What a list of nanoseconds says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Spread {
    /// How many.
    pub count: u64,
    /// The smallest.
    pub min_ns: u64,
    /// The middle one (the lower of the two, for an even count).
    pub median_ns: u64,
    /// The one that 99 of 100 do not exceed, by nearest rank: of fewer than 100 values the largest.
    pub p99_ns: u64,
    /// The largest.
    pub max_ns: u64,
}

impl Spread {
    /// Of a list; all zero for an empty one.
    pub fn of(values_ns: impl IntoIterator<Item = u64>) -> Self {
        let mut sorted: Vec<u64> = values_ns.into_iter().collect();
        sorted.sort_unstable();
        let rank = |percent: usize| (sorted.len() * percent).div_ceil(100).saturating_sub(1);
        let at = |index: usize| sorted.get(index).copied().unwrap_or(0);
        Self {
            count: sorted.len() as u64,
            min_ns: at(0),
            median_ns: at(rank(50)),
            p99_ns: at(rank(99)),
            max_ns: sorted.last().copied().unwrap_or(0),
        }
    }
}

impl std::fmt::Display for Spread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let [median, p99, max] = [self.median_ns, self.p99_ns, self.max_ns].map(time);
        write!(f, "median {median}, p99 {p99}, max {max} (n={})", self.count)
    }
}

/// Nanoseconds for people.
pub fn time(ns: u64) -> String {
    display_duration(Duration::from_nanos(ns))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_are_the_nearest() {
        let spread = Spread::of(1..=200);
        assert_eq!((spread.min_ns, spread.median_ns, spread.p99_ns, spread.max_ns), (1, 100, 198, 200));
        assert_eq!(Spread::of([7]), Spread { count: 1, min_ns: 7, median_ns: 7, p99_ns: 7, max_ns: 7 });
        assert_eq!(Spread::of([]), Spread::default());
    }
}
