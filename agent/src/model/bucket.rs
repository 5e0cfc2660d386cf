//! A rate with a debt: who has written more than its rate allows owes time.

use std::time::Duration;

use super::units::PagesPerSecond;

/// No debt is longer: whoever was charged for what cannot be (all of memory after an overrun) is not held for minutes.
pub const LONGEST_DEBT: Duration = Duration::from_secs(2);
/// What may be written at once without owing anything, in time at the rate; and in pages at least.
const BURST: Duration = Duration::from_millis(10);
const LEAST_BURST_PAGES: f64 = 16.0;

/// A token bucket that is charged afterwards: pages are counted when they have been written, so its level may fall below zero, and how far below
/// is what its owner owes (Turner, "New Directions in Communications", IEEE Communications 24(10), 1986, has the bucket).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Bucket {
    rate: f64,
    /// Pages that may still be written, when `at`; below zero: that were written too many.
    level: f64,
    at: Duration,
}

impl Bucket {
    /// A bucket of a rate, full. A rate that is negative or no number counts as zero.
    pub fn new(rate: PagesPerSecond, now: Duration) -> Self {
        let mut bucket = Self { rate: 0.0, level: 0.0, at: now };
        bucket.set_rate(rate, now);
        bucket.level = bucket.burst();
        bucket
    }

    /// Its rate.
    pub fn rate(&self) -> PagesPerSecond {
        PagesPerSecond(self.rate)
    }

    /// Another rate from now on; what is owed by now is owed.
    pub fn set_rate(&mut self, rate: PagesPerSecond, now: Duration) {
        self.fill(now);
        self.rate = if rate.0 > 0.0 { rate.0 } else { 0.0 };
        self.level = self.level.min(self.burst());
    }

    /// So many pages were written.
    pub fn charge(&mut self, pages: f64, now: Duration) {
        self.fill(now);
        self.level -= pages.max(0.0);
        self.level = self.level.max(-self.rate.max(1.0) * LONGEST_DEBT.as_secs_f64());
    }

    /// How long its owner must not write from now on; zero if it owes nothing.
    pub fn debt(&self, now: Duration) -> Duration {
        let mut filled = *self;
        filled.fill(now);
        if filled.level >= 0.0 {
            return Duration::ZERO;
        }
        // At a rate of zero a debt is never paid off: it is looked at again when the longest is over.
        if self.rate <= 0.0 { LONGEST_DEBT } else { Duration::from_secs_f64(-filled.level / self.rate) }
    }

    fn fill(&mut self, now: Duration) {
        let passed = now.saturating_sub(self.at).as_secs_f64();
        self.level = (self.level + passed * self.rate).min(self.burst());
        self.at = self.at.max(now);
    }

    fn burst(&self) -> f64 {
        if self.rate > 0.0 { (self.rate * BURST.as_secs_f64()).max(LEAST_BURST_PAGES) } else { 0.0 }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: Duration = Duration::from_secs(1000);

    fn after(ms: u64) -> Duration {
        START + Duration::from_millis(ms)
    }

    #[test]
    fn what_was_written_too_much_is_owed_in_time() {
        let mut bucket = Bucket::new(PagesPerSecond(10_000.0), START);
        bucket.charge(100.0, START);
        assert_eq!(bucket.debt(START), Duration::ZERO, "a burst of 10 ms is free");
        bucket.charge(500.0, START);
        assert_eq!(bucket.debt(START), Duration::from_millis(50));
        assert_eq!(bucket.debt(after(20)), Duration::from_millis(30));
        assert_eq!(bucket.debt(after(50)), Duration::ZERO);
        // Who slept long has no more credit than a burst.
        bucket.charge(200.0, after(5000));
        assert_eq!(bucket.debt(after(5000)), Duration::from_millis(10));
        // Half the rate: twice the time.
        bucket.set_rate(PagesPerSecond(5000.0), after(5000));
        assert_eq!(bucket.debt(after(5000)), Duration::from_millis(20));
    }

    #[test]
    fn no_rate_and_no_number_hold_for_a_while_and_not_for_ever() {
        for rate in [0.0, -3.0, f64::NAN] {
            let mut bucket = Bucket::new(PagesPerSecond(rate), START);
            assert_eq!(bucket.debt(START), Duration::ZERO, "nothing was written yet");
            bucket.charge(1.0, START);
            assert_eq!(bucket.debt(START), LONGEST_DEBT);
        }
        let mut bucket = Bucket::new(PagesPerSecond(1000.0), START);
        bucket.charge(1e12, START);
        assert_eq!(bucket.debt(START), LONGEST_DEBT);
    }

    proptest! {
        /// Whoever writes whenever it owes nothing, however much at once, keeps the rate.
        #[test]
        fn on_average_the_rate_is_kept(rate in 100.0f64..1e6, sizes in prop::collection::vec(1u64..400, 50..200)) {
            let mut bucket = Bucket::new(PagesPerSecond(rate), START);
            let (mut now, mut written) = (START, 0.0);
            for pages in sizes {
                // In time at the rate, so that no debt meets its bound.
                let pages = pages as f64 * rate / 1000.0;
                bucket.charge(pages, now);
                written += pages;
                now += bucket.debt(now);
            }
            let allowed = rate * (now - START).as_secs_f64();
            let burst = (rate * 0.01).max(16.0);
            prop_assert!(written <= allowed + burst + 1.0, "{written} of {allowed}");
            prop_assert!(written >= allowed - 1.0, "{written} of {allowed}");
        }
    }
}
