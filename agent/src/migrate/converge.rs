//! When pre-copy stops: the target is in reach, or another round buys nothing.
//!
//! With U(t) the unique pages written in an interval t and B the goodput, round n+1 takes t' = U(t)/B. U is concave, so
//! once a round no longer shrinks what is left, no later one will: give up then, not after a fixed number of rounds
//! (`docs/`, "Convergence"; the bound on rounds is Clark's rule and only the backstop).
//!
//! The downtime target is a ceiling and no aim: once what is left fits, rounds go on for as long as each halves it, down to
//! a third of what the blackout costs in any case. As U is concave, U(t')/U(t) is at least t'/t, so a next round that
//! takes more than half of the last one's time cannot halve anything and is not begun; whether one did is seen behind it, and
//! the first that did not is the last. A burst that comes meanwhile may lift what is left above the target again: from then
//! on the first fit is taken.

use std::time::Duration;

use crate::model::{BytesPerSecond, PageCount};

/// A round that leaves more than this share of what the round before left is no gain.
const NO_GAIN: f64 = 0.9;
/// A next round must be expected to take at most this share of the last one's time to be worth it within the target.
const WORTH: f64 = 0.5;
/// What is left is not worth a round any more when sending it takes this share of the fixed cost.
const LITTLE: f64 = 1.0 / 3.0;
/// So many rounds without gain in a row end pre-copy; one alone may be a burst.
const PATIENCE: u32 = 2;

/// What to do after a round.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// Send what is left while the VM runs.
    Another,
    /// What is left fits the downtime target, and another round would buy little: pause.
    Converged,
    /// It will not fit; pause all the same, and say why.
    GaveUp(String),
}

/// The judge of one migration's rounds.
#[derive(Clone, Debug)]
pub struct Convergence {
    downtime: Duration,
    fixed_cost: Duration,
    max_rounds: u32,
    rounds: u32,
    least_left: Option<PageCount>,
    without_gain: u32,
    /// What was left has fitted already.
    met: bool,
    /// It fitted, and does not any more: the next fit is taken.
    missed: bool,
}

impl Convergence {
    /// A judge for a downtime target, of which `fixed_cost` and the round trip are spent in any case.
    pub fn new(downtime: Duration, fixed_cost: Duration, max_rounds: u32) -> Self {
        Self {
            downtime,
            fixed_cost,
            max_rounds,
            rounds: 0,
            least_left: None,
            without_gain: 0,
            met: false,
            missed: false,
        }
    }

    /// Judges after a round that took `took` and left `left` pages dirty, with goodput `goodput` and round trip `rtt`.
    pub fn judge(&mut self, left: PageCount, took: Duration, goodput: BytesPerSecond, rtt: Duration) -> Verdict {
        self.rounds += 1;
        let budget = self.downtime.saturating_sub(self.fixed_cost + rtt);
        let needed = if left.0 == 0 { Duration::ZERO } else { goodput.time_for(left.bytes()) };
        let least = self.least_left;
        self.least_left = Some(least.map_or(left, |least| least.min(left)));
        if needed <= budget {
            self.met = true;
            let halved = least.is_none_or(|least| left.0 * 2 <= least.0);
            let can_halve = needed <= took.saturating_sub(rtt).mul_f64(WORTH);
            let worth = needed > self.fixed_cost.mul_f64(LITTLE) && halved && can_halve && !self.missed;
            return if worth && self.rounds < self.max_rounds { Verdict::Another } else { Verdict::Converged };
        }
        self.missed |= self.met;
        let gained = least.is_none_or(|least| (left.0 as f64) < least.0 as f64 * NO_GAIN);
        self.without_gain = if gained { 0 } else { self.without_gain + 1 };
        let estimate = format!(
            "{} pages are left after round {}, {:.1} ms at {goodput}, above the {:.1} ms that the downtime target leaves",
            left.0,
            self.rounds,
            needed.as_secs_f64() * 1e3,
            budget.as_secs_f64() * 1e3
        );
        if self.without_gain >= PATIENCE {
            Verdict::GaveUp(format!("no gain in {PATIENCE} rounds: {estimate}"))
        } else if self.rounds >= self.max_rounds {
            Verdict::GaveUp(format!("round limit of {} reached: {estimate}", self.max_rounds))
        } else {
            Verdict::Another
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOODPUT: BytesPerSecond = BytesPerSecond(1 << 30);
    const RTT: Duration = Duration::from_micros(100);
    /// A round after which no other is worth its time once the target is in reach.
    const SHORT: Duration = Duration::from_millis(20);

    fn judge() -> Convergence {
        Convergence::new(Duration::from_millis(30), Duration::from_millis(3), 30)
    }

    #[test]
    fn an_idle_guest_converges_at_once() {
        assert_eq!(judge().judge(PageCount(0), SHORT, GOODPUT, RTT), Verdict::Converged);
    }

    #[test]
    fn fixed_cost_and_round_trip_come_off_the_budget() {
        // 26.9 ms at 1 GiB/s are 7051 pages.
        assert_eq!(judge().judge(PageCount(7050), SHORT, GOODPUT, RTT), Verdict::Converged);
        assert_eq!(judge().judge(PageCount(7060), SHORT, GOODPUT, RTT), Verdict::Another);
    }

    #[test]
    fn within_the_target_rounds_go_on_while_each_halves_what_is_left() {
        let mut convergence = judge();
        let ms = Duration::from_millis;
        // 4000 pages take 15.3 ms, an eighth of the first round.
        assert_eq!(convergence.judge(PageCount(4000), ms(120), GOODPUT, RTT), Verdict::Another);
        // 1800 pages take 6.9 ms, less than half of it; 1000 take 3.8 ms, more than half.
        assert_eq!(convergence.judge(PageCount(1800), ms(15), GOODPUT, RTT), Verdict::Another);
        assert_eq!(convergence.judge(PageCount(1000), ms(7), GOODPUT, RTT), Verdict::Converged);
        // A third of the fixed cost is never worth a round; and the backstop holds here, too.
        assert_eq!(judge().judge(PageCount(250), ms(120), GOODPUT, RTT), Verdict::Converged);
        let mut hasty = Convergence::new(ms(30), ms(3), 1);
        assert_eq!(hasty.judge(PageCount(4000), ms(120), GOODPUT, RTT), Verdict::Converged);
    }

    #[test]
    fn within_the_target_a_round_that_does_not_halve_what_is_left_is_the_last() {
        let mut convergence = judge();
        let ms = Duration::from_millis;
        // Rounds that take ten times what their bytes need, as scattered pages do.
        assert_eq!(convergence.judge(PageCount(1000), ms(120), GOODPUT, RTT), Verdict::Another);
        assert_eq!(convergence.judge(PageCount(1000), ms(40), GOODPUT, RTT), Verdict::Converged);
    }

    #[test]
    fn after_a_burst_the_first_fit_is_taken() {
        let mut convergence = judge();
        let ms = Duration::from_millis;
        assert_eq!(convergence.judge(PageCount(4000), ms(120), GOODPUT, RTT), Verdict::Another);
        assert_eq!(convergence.judge(PageCount(20_000), ms(15), GOODPUT, RTT), Verdict::Another);
        assert_eq!(convergence.judge(PageCount(1500), ms(80), GOODPUT, RTT), Verdict::Converged);
    }

    #[test]
    fn shrinking_rounds_go_on_and_flat_ones_end_it() {
        let mut convergence = judge();
        for left in [100_000, 50_000, 25_000] {
            assert_eq!(convergence.judge(PageCount(left), SHORT, GOODPUT, RTT), Verdict::Another);
        }
        assert_eq!(convergence.judge(PageCount(24_000), SHORT, GOODPUT, RTT), Verdict::Another);
        assert!(matches!(convergence.judge(PageCount(24_500), SHORT, GOODPUT, RTT), Verdict::GaveUp(_)));
    }

    #[test]
    fn a_round_limit_is_the_backstop() {
        let mut convergence = Convergence::new(Duration::from_millis(1), Duration::ZERO, 3);
        assert_eq!(convergence.judge(PageCount(1 << 30), SHORT, GOODPUT, RTT), Verdict::Another);
        assert_eq!(convergence.judge(PageCount(1 << 29), SHORT, GOODPUT, RTT), Verdict::Another);
        assert!(matches!(convergence.judge(PageCount(1 << 28), SHORT, GOODPUT, RTT), Verdict::GaveUp(_)));
    }

    #[test]
    fn a_dead_link_is_not_taken_for_convergence() {
        assert_eq!(judge().judge(PageCount(1), SHORT, BytesPerSecond(0), RTT), Verdict::Another);
    }
}
