//! What a VM may write while it moves: as much as lets pre-copy end in time.
//!
//! With B the goodput in pages per second, R(t) the pages that are still to be sent of this round or were dirtied since they were sent, and q what is
//! dirtied per second, R falls by B - q. It has to fall to what the paused VM may still send, D'·B (D' the memory's part of the downtime), by the
//! time T. So q may be
//!
//!     q(t) = B - (R(t) - D'·B) / (T - t)
//!
//! which is reckoned anew at each look: what was written too much is made up for, and a guest that writes less than q is not touched at all. T is a
//! multiple of the time that sending each page once takes; rounds that shrink by q/B each take 1/(1 - q/B) of it in all.

use std::time::Duration;

use crate::model::{PageCount, PagesPerSecond};

/// How long a migration may take, in times that sending each page once takes, unless told otherwise: what is dirtied meanwhile is 40 % of memory then.
pub const STRETCH: f64 = 1.4;

/// What may be written while somebody else's pre-copy goes on, of which nothing is known but the link: rounds that shrink to a part p of the one before take
/// 1/(1 - p) of the first all together, which is [`STRETCH`] with p = 1 - 1/1.4 of what the link carries.
pub fn steady(goodput: PagesPerSecond) -> PagesPerSecond {
    PagesPerSecond(goodput.0 * (1.0 - 1.0 / STRETCH))
}

/// The part of the link that is left free for what no forecast knows.
const MARGIN: f64 = 0.05;
/// And never more than this part of it may be dirtied: rounds that do not halve are no end in sight, however little is left.
const MOST: f64 = 0.5;
/// However late it is, this part of the link may be dirtied: a VM is never held altogether.
const LEAST: f64 = 0.05;

/// What a migration is to keep to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Budget {
    /// T, in times that sending each page once takes.
    pub stretch: f64,
    /// D': what the downtime leaves for memory.
    pub memory_time: Duration,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Remaining {
    /// Since the first page was sent.
    pub elapsed: Duration,
    /// Pages that each must be sent once: those that are not zero.
    pub memory: PageCount,
    /// Pages of the round under way that are still to be sent.
    pub unsent: PageCount,
    /// Pages that were dirtied since they were sent.
    pub dirty: PageCount,
    /// Goodput.
    pub goodput: PagesPerSecond,
}

impl Budget {
    /// What all writers together may dirty per second; none while nothing is known of the link.
    pub fn allowed(&self, so_far: &Remaining) -> Option<PagesPerSecond> {
        let goodput = so_far.goodput.0;
        if !goodput.is_finite() || goodput <= 0.0 {
            return None;
        }
        let total = so_far.memory.0 as f64 / goodput * self.stretch.max(1.0);
        let left = total - so_far.elapsed.as_secs_f64();
        let fits = goodput * self.memory_time.as_secs_f64();
        let due = (so_far.unsent.0 as f64 + so_far.dirty.0 as f64 - fits).max(0.0);
        let carried = goodput * (1.0 - MARGIN);
        let least = goodput * LEAST;
        let wanted = if left > 0.0 { carried - due / left } else { least };
        Some(PagesPerSecond(wanted.clamp(least, goodput * MOST)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: Budget = Budget { stretch: STRETCH, memory_time: Duration::from_millis(7) };
    const GOODPUT: PagesPerSecond = PagesPerSecond(30_000.0);

    fn remaining(elapsed_ms: u64, unsent: u64, dirty: u64) -> Remaining {
        Remaining {
            elapsed: Duration::from_millis(elapsed_ms),
            memory: PageCount(120_000),
            unsent: PageCount(unsent),
            dirty: PageCount(dirty),
            goodput: GOODPUT,
        }
    }

    fn allowed(elapsed_ms: u64, unsent: u64, dirty: u64) -> f64 {
        BUDGET.allowed(&remaining(elapsed_ms, unsent, dirty)).unwrap().0
    }

    #[test]
    fn as_much_may_be_written_as_lets_it_end_in_time() {
        // 4 s for each page once, 5.6 s in all: 119 790 pages in 5.6 s take 21 391 a second of 28 500.
        assert!((allowed(0, 120_000, 0) - 7109.0).abs() < 1.0, "{}", allowed(0, 120_000, 0));
        // Half sent in half of the time, and little dirtied: more may be.
        assert!(allowed(2000, 60_000, 5000) > allowed(0, 120_000, 0));
        // Much dirtied: less.
        assert!(allowed(2000, 60_000, 30_000) < 5000.0);
        // What fits the downtime is no work that is left; yet rounds have to halve.
        assert!((allowed(5500, 0, 200) - 15_000.0).abs() < 1.0);
        // Too late: the least, and never nothing.
        assert!((allowed(6000, 0, 5000) - 1500.0).abs() < 1.0 && (allowed(5599, 0, 90_000) - 1500.0).abs() < 1.0);
        let unknown = Remaining { goodput: PagesPerSecond(0.0), ..remaining(0, 1, 1) };
        assert_eq!(BUDGET.allowed(&unknown), None);
    }

    #[test]
    fn rounds_with_a_steady_writer_take_what_was_said_in_all() {
        let part = steady(GOODPUT).0 / GOODPUT.0;
        let rounds: f64 = (0..40).map(|round| part.powi(round)).sum();
        assert!((rounds - STRETCH).abs() < 1e-9 && part < MOST, "{rounds}");
    }

    /// A writer that takes all that it may: rounds as pre-copy makes them end in time.
    #[test]
    fn rounds_end_in_time_whoever_takes_all_it_may() {
        for tick_ms in [10u64, 100] {
            let (mut elapsed_ms, mut due, mut dirty) = (0u64, 120_000.0f64, 0.0f64);
            let fits = GOODPUT.0 * 0.007;
            let mut unsent = due;
            while due > fits {
                let tick = tick_ms as f64 / 1000.0;
                let allowed = allowed(elapsed_ms, unsent as u64, dirty as u64);
                let sending = (unsent / GOODPUT.0).min(tick);
                unsent -= sending * GOODPUT.0;
                dirty += allowed * sending;
                elapsed_ms += (sending * 1000.0).ceil() as u64;
                if unsent < 1.0 {
                    (due, unsent, dirty) = (dirty, dirty, 0.0);
                }
                assert!(elapsed_ms < 6000, "{due} pages are due after {elapsed_ms} ms at {tick_ms} ms a look");
            }
            assert!(elapsed_ms > 5000, "{elapsed_ms} ms: the guest was slowed down for nothing");
        }
    }
}
