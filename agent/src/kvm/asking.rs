//! When a guest is asked to hold the writers of one vCPU, for how long, and whether it does.
//!
//! Owns the times. Must not know how it is asked. A hold ends by itself, so that nothing is left if nobody asks any more; one that is to go on is asked for
//! anew shortly before its end. A guest that goes on writing is not believed for a while.

use std::time::Duration;

use crate::model::PagesPerSecond;

/// Less than this is not asked for: the words take as long.
const LEAST: Duration = Duration::from_millis(2);
/// The longest hold that is asked for at a time.
const LONGEST: Duration = Duration::from_millis(100);
/// A hold is asked for anew so long before its end.
const AHEAD: Duration = Duration::from_millis(10);
/// So long after it was asked first a guest holds its writers, even if its vCPU had to wait for a CPU.
const ANSWERS_WITHIN: Duration = Duration::from_millis(100);
/// What it may write in a hold: its limit, for whoever is not held, and what fits into the time that the words take.
const SLACK_PAGES: f64 = 4096.0;
/// How long it is not asked after it has not done as it was asked: twice as long each time.
const SHUNNED: Duration = Duration::from_secs(2);
const LONGEST_SHUNNED: Duration = Duration::from_mins(1);

/// A hold that is in force, or a row of them without a gap.
#[derive(Clone, Copy, Debug)]
struct Hold {
    since: Duration,
    until: Duration,
    /// When it must have been in force, and what the vCPU had written then.
    in_force: Option<(Duration, f64)>,
}

/// What was asked for one vCPU.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Asking {
    hold: Option<Hold>,
    /// Up to when it was reckoned for how long the guest has held.
    reckoned: Duration,
    shunned: Duration,
    shunned_until: Duration,
}

impl Asking {
    /// Looks at a vCPU that owes `debt` and has written `pages` so far; returns for how long its writers are to be held from now on, if that is to be said.
    pub(super) fn look(&mut self, debt: Duration, pages: f64, rate: PagesPerSecond, now: Duration) -> Option<Duration> {
        if self.is_shunned(now) {
            return None;
        }
        if let Some(hold) = &mut self.hold {
            if now >= hold.until {
                self.hold = None;
            } else if let Some((when, before)) = hold.in_force {
                let may = rate.0.max(0.0) * now.saturating_sub(when).as_secs_f64();
                if pages - before > may + SLACK_PAGES {
                    self.hold = None;
                    self.shunned = (self.shunned * 2).clamp(SHUNNED, LONGEST_SHUNNED);
                    self.shunned_until = now + self.shunned;
                    return None;
                }
            } else if now.saturating_sub(hold.since) >= ANSWERS_WITHIN {
                hold.in_force = Some((now, pages));
            }
        }
        let left = self.hold.map_or(Duration::ZERO, |hold| hold.until - now);
        if debt < left + LEAST || left > AHEAD {
            return None;
        }
        let time = debt.min(LONGEST);
        match &mut self.hold {
            Some(hold) => hold.until = now + time,
            None => {
                self.hold = Some(Hold { since: now, until: now + time, in_force: None });
                self.reckoned = now;
            }
        }
        Some(time)
    }

    /// For how long the guest was to hold since this was asked last.
    pub(super) fn held(&mut self, now: Duration) -> Duration {
        let Some(hold) = self.hold else { return Duration::ZERO };
        let until = now.min(hold.until);
        let held = until.saturating_sub(self.reckoned);
        self.reckoned = until.max(self.reckoned);
        held
    }

    /// Whether it is not asked for now, because it did not do as it was asked.
    pub(super) fn is_shunned(&self, now: Duration) -> bool {
        now < self.shunned_until
    }

    /// Whether the guest holds.
    pub(super) fn is_held(&self, now: Duration) -> bool {
        self.hold.is_some_and(|hold| now < hold.until)
    }

    /// Nobody is to be held any more; whether that is to be said.
    pub(super) fn let_go(&mut self, now: Duration) -> bool {
        self.hold.take().is_some_and(|hold| now < hold.until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::bucket::Bucket;

    const RATE: PagesPerSecond = PagesPerSecond(8000.0);

    fn ms(ms: u64) -> Duration {
        Duration::from_secs(50) + Duration::from_millis(ms)
    }

    /// A guest whose writer does 250 pages a millisecond unless it is held, which takes it `latency` milliseconds. What it wrote in the last two of three seconds, and the asking.
    fn run(latency: u64, obeys: bool) -> (f64, Asking, Duration) {
        let (mut asking, mut bucket) = (Asking::default(), Bucket::new(RATE, ms(0)));
        let (mut pages, mut at_one, mut held) = (0.0, 0.0, Duration::ZERO);
        let mut orders: Vec<(u64, Duration)> = Vec::new();
        let mut holds_until = ms(0);
        for now in 1..=3000 {
            for &(_, until) in orders.iter().filter(|(at, _)| at + latency == now) {
                holds_until = until;
            }
            if ms(now) >= holds_until || !obeys {
                pages += 250.0;
                bucket.charge(250.0, ms(now));
            }
            held += asking.held(ms(now));
            if let Some(time) = asking.look(bucket.debt(ms(now)), pages, RATE, ms(now)) {
                assert!(time <= LONGEST);
                orders.push((now, ms(now + latency) + time));
            }
            if now == 1000 {
                at_one = pages;
            }
        }
        (pages - at_one, asking, held)
    }

    #[test]
    fn a_guest_that_obeys_keeps_the_limit_however_long_its_words_take() {
        for latency in [1, 3, 8] {
            let (written, asking, held) = run(latency, true);
            assert!(!asking.is_shunned(ms(3000)), "{latency} ms");
            // What it writes too much before the words arrive is owed.
            assert!((written / 16_000.0 - 1.0).abs() < 0.15, "{written} after {latency} ms");
            assert!(held > Duration::from_millis(2700), "{held:?}");
        }
    }

    #[test]
    fn one_that_does_not_is_not_believed_for_a_while() {
        let (written, asking, held) = run(1, false);
        assert!(written > 450_000.0 && held < Duration::from_millis(500), "{written} {held:?}");
        assert!(asking.shunned_until > ms(2000));
    }

    #[test]
    fn who_is_let_go_is_told_so_once() {
        let mut asking = Asking::default();
        assert!(!asking.let_go(ms(0)));
        assert_eq!(asking.look(Duration::from_millis(1), 0.0, RATE, ms(1)), None, "too little to speak of");
        assert_eq!(asking.look(Duration::from_secs(2), 0.0, RATE, ms(2)), Some(LONGEST));
        assert!(asking.is_held(ms(101)) && !asking.is_held(ms(102)));
        assert!(asking.let_go(ms(50)) && !asking.let_go(ms(50)));
    }
}
