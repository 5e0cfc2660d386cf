//! When pre-copy stops: the target is in reach, or another round buys nothing.
//!
//! With U(t) the unique pages written in an interval t and B the goodput, round n+1 takes t' = U(t)/B. U is concave, so
//! once a round no longer shrinks what is left, no later one will: give up then, not after a fixed number of rounds
//! (`docs/`, "Convergence"; the bound on rounds is Clark's rule and only the backstop). Each round shows one point of U:
//!
//! - A round that leaves at least as much as was sent in it is proof alone: U(t)/t is no less over any shorter round.
//! - Two rounds show how U bends. Drawn on as a power of t, x·(s/t)^b, it says at which length rounds stop shrinking: s* = t·(x/Bt)^(1/(1-b)). If that
//!   is not within the target, and the next round would be close to it, it is not begun. A bend that steepens towards short
//!   rounds, as that of most guests does, makes the real limit lower, so what is drawn on is read with all noise in favour of going on.
//!
//! Pages are protected when they are sent, so of what is written in the first round only what comes behind the sending counts: for U = c·t^b
//! a part 1/(1+b) of it.
//!
//! The downtime target is a ceiling and no aim: once what is left fits, rounds go on for as long as each halves it, down to
//! a third of what the blackout costs in any case. As U is concave, U(t')/U(t) is at least t'/t, so a next round that
//! takes more than half of the last one's time cannot halve anything and is not begun; whether one did is seen behind it, and
//! the first that did not is the last. A burst that comes meanwhile may lift what is left above the target again: from then
//! on the first fit is taken.

use std::time::Duration;

use crate::model::{BytesPerSecond, PAGE_SIZE, PageCount, PagesPerSecond};

/// A round that leaves more than this share of what the round before left is no gain.
const NO_GAIN: f64 = 0.9;
/// A next round must be expected to take at most this share of the last one's time to be worth it within the target.
const WORTH: f64 = 0.5;
/// What is left is not worth a round any more when sending it takes this share of the fixed cost.
const LITTLE: f64 = 1.0 / 3.0;
/// So many rounds without gain in a row end pre-copy; one alone may be a burst.
const PATIENCE: u32 = 2;
/// How far a count may lie above what the guest writes in the mean.
const NOISE: f64 = 0.05;
/// What is left is close to the limit if sending it takes at most so many times as long as the shortest round.
const CLOSE: f64 = 1.25;
/// A round that takes less than this share of the first is cheap: what shows that none fits must show twice, as it may be a burst.
const CHEAP: f64 = 0.1;
/// Bends that are tried between the first two rounds.
const BENDS: u32 = 100;

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

/// What a round showed: so many pages were written while it was sent.
#[derive(Clone, Copy, Debug)]
struct Point {
    took: Duration,
    left: PageCount,
}

/// The judge of one migration's rounds.
#[derive(Clone, Debug)]
pub struct Convergence {
    downtime: Duration,
    fixed_cost: Duration,
    max_rounds: u32,
    rounds: u32,
    least_left: Option<PageCount>,
    last: Option<Point>,
    /// How long the first round took.
    first: Duration,
    /// Rounds in a row that showed that none fits.
    doubts: u32,
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
            last: None,
            first: Duration::ZERO,
            doubts: 0,
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
        let here = Point { took: took.saturating_sub(rtt), left };
        let before = self.last.replace(here);
        if self.rounds == 1 {
            self.first = here.took;
        }
        if needed <= budget {
            self.met = true;
            let halved = least.is_none_or(|least| left.0 * 2 <= least.0);
            let can_halve = needed <= here.took.mul_f64(WORTH);
            let worth = needed > self.fixed_cost.mul_f64(LITTLE) && halved && can_halve && !self.missed;
            return if worth && self.rounds < self.max_rounds { Verdict::Another } else { Verdict::Converged };
        }
        self.missed |= self.met;
        let gained = least.is_none_or(|least| (left.0 as f64) < least.0 as f64 * NO_GAIN);
        self.without_gain = if gained { 0 } else { self.without_gain + 1 };
        let ms = |time: Duration| format!("{:.1} ms", time.as_secs_f64() * 1e3);
        let estimate = format!(
            "{} pages are left after round {}, {} at {goodput}, above the {} that the downtime target leaves",
            left.0,
            self.rounds,
            ms(needed),
            ms(budget)
        );
        // What comes behind a round that fitted is a burst, and says little.
        let limit = before.and_then(|before| self.limit(before, here, goodput));
        let doubt = if self.missed {
            None
        } else if self.is_hopeless(needed, goodput, here) {
            let rate = PagesPerSecond::over(left, here.took).mebibytes_per_second();
            Some(format!("in {} the VM wrote {rate:.1} MiB/s, and shorter rounds see no less", ms(here.took)))
        } else {
            let close = limit.filter(|&limit| limit > budget && needed <= limit.mul_f64(CLOSE));
            close.map(|limit| format!("rounds would not get much shorter than {}", ms(limit)))
        };
        self.doubts = if doubt.is_some() { self.doubts + 1 } else { 0 };
        let is_cheap = here.took < self.first.mul_f64(CHEAP);
        if let Some(why) = doubt
            && (!is_cheap || self.doubts >= PATIENCE)
        {
            return Verdict::GaveUp(format!("{why}: {estimate}"));
        }
        if self.without_gain >= PATIENCE {
            Verdict::GaveUp(format!("no gain in {PATIENCE} rounds: {estimate}"))
        } else if self.rounds >= self.max_rounds {
            Verdict::GaveUp(format!("round limit of {} reached: {estimate}", self.max_rounds))
        } else {
            Verdict::Another
        }
    }

    /// Whether this round alone shows that none fits: the next would take no less than this one did.
    fn is_hopeless(&self, needed: Duration, goodput: BytesPerSecond, here: Point) -> bool {
        let as_long = if self.rounds == 1 { here.took } else { here.took.mul_f64(1.0 - NOISE) };
        goodput.0 > 0 && !here.took.is_zero() && needed >= as_long
    }

    /// How long the shortest round would be, by how the curve bends between the last two; none where it cannot be told: rounds of about the same
    /// length, or a curve that does not bend.
    fn limit(&self, before: Point, here: Point, goodput: BytesPerSecond) -> Option<Duration> {
        let shorter = (here.took.as_secs_f64() / before.took.as_secs_f64()).ln();
        if !shorter.is_finite() || shorter > NO_GAIN.ln() || goodput.0 == 0 {
            return None;
        }
        let left = here.left.0 as f64 * (1.0 - NOISE);
        let fewer = left / before.left.0 as f64;
        if fewer > 1.0 {
            return None;
        }
        let bend = if self.rounds == 2 { bend_behind_the_first(fewer, shorter)? } else { fewer.ln() / shorter };
        let bend = bend.clamp(0.0, 1.0);
        let took = here.took.as_secs_f64();
        let shrinks_to = left / (goodput.0 as f64 / PAGE_SIZE as f64 * took);
        let limit = took * shrinks_to.powf(1.0 / (1.0 - bend));
        (bend < 1.0 && limit.is_finite()).then(|| Duration::from_secs_f64(limit.min(86_400.0)))
    }
}

/// How the curve bends between the first two rounds, of which the second left `fewer` times as much in a round `shorter` (a logarithm): the b
/// with fewer = (1 + b)·e^(b·shorter), of two the larger, which is in favour of going on. None if no b comes near it.
fn bend_behind_the_first(fewer: f64, shorter: f64) -> Option<f64> {
    let off = |bend: f64| ((1.0 + bend) * (bend * shorter).exp() - fewer).abs();
    let bends = (0..=BENDS).rev().map(|step| f64::from(step) / f64::from(BENDS));
    bends.min_by(|&a, &b| off(a).total_cmp(&off(b))).filter(|&bend| off(bend) <= 2.0 * NOISE)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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
        let long = Duration::from_millis(200);
        assert_eq!(judge().judge(PageCount(7060), long, GOODPUT, RTT), Verdict::Another);
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

    /// Judges rounds that left so many pages one after the other, each as long as sending what was left before takes.
    fn rounds(judge: &mut Convergence, first: u64, left: &[u64]) -> Vec<Verdict> {
        let mut due = first;
        let verdicts = left.iter().map(|&left| {
            let took = GOODPUT.time_for(PageCount(due).bytes()) + RTT;
            due = left;
            judge.judge(PageCount(left), took, GOODPUT, RTT)
        });
        verdicts.collect()
    }

    fn gave_up(verdict: &Verdict) -> &str {
        match verdict {
            Verdict::GaveUp(why) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_round_that_leaves_as_much_as_it_sent_is_proof() {
        let verdicts = rounds(&mut judge(), 100_000, &[100_001]);
        let why = gave_up(&verdicts[0]);
        assert!(
            why.starts_with("in 381.5 ms the VM wrote 1024.0 MiB/s, and shorter rounds see no less: 100001 pages"),
            "{why}"
        );
        // Within noise it is from the second on.
        let verdicts = rounds(&mut judge(), 200_000, &[100_000, 96_000]);
        assert_eq!(verdicts[0], Verdict::Another);
        gave_up(&verdicts[1]);
    }

    #[test]
    fn a_curve_that_flattens_above_the_target_is_seen_by_how_it_bends() {
        let verdicts = rounds(&mut judge(), 400_000, &[200_000, 120_000, 105_000]);
        assert_eq!(verdicts[..2], [Verdict::Another, Verdict::Another]);
        let why = gave_up(&verdicts[2]);
        assert!(why.starts_with("rounds would not get much shorter than 342."), "{why}");
        assert!(why.contains("105000 pages are left after round 3"), "{why}");
    }

    #[test]
    fn rounds_that_shrink_go_on_and_a_burst_on_the_way_does_not_end_them() {
        let all = rounds(&mut judge(), 400_000, &[200_000, 100_000, 50_000, 25_000, 12_500, 7_000]);
        assert!(all[..5].iter().all(|verdict| *verdict == Verdict::Another), "{all:?}");
        assert_eq!(all[5], Verdict::Converged);
        let all = rounds(&mut judge(), 400_000, &[200_000, 100_000, 50_000, 25_000, 24_000, 9_000, 5_000]);
        assert!(all[..6].iter().all(|verdict| *verdict == Verdict::Another), "{all:?}");
        assert_eq!(all[6], Verdict::Converged);
    }

    #[test]
    fn a_round_limit_is_the_backstop() {
        let mut convergence = Convergence::new(Duration::from_millis(1), Duration::ZERO, 3);
        let all = rounds(&mut convergence, 1 << 30, &[1 << 29, 1 << 28, 1 << 27]);
        assert_eq!(all[..2], [Verdict::Another, Verdict::Another]);
        assert!(gave_up(&all[2]).starts_with("round limit of 3 reached"));
    }

    #[test]
    fn a_dead_link_is_not_taken_for_convergence() {
        assert_eq!(judge().judge(PageCount(1), SHORT, BytesPerSecond(0), RTT), Verdict::Another);
    }

    /// How pre-copy of `memory` pages ends, and after how many rounds, if the guest writes `hot` pages, each so many times a second, and `cold`
    /// ones; counts are off by `noise`. Each page is protected when it is sent.
    fn ends(memory: f64, classes: [(f64, f64); 2], noise: &[f64]) -> (Verdict, usize, f64) {
        let mut judge = judge();
        let mut due = memory;
        let mut parts = [1.0f64; 2];
        for (round, off) in noise.iter().cycle().enumerate() {
            let took = GOODPUT.time_for(PageCount(due as u64).bytes()) + RTT;
            let mut left = 0.0;
            for (part, (pages, rate)) in parts.iter_mut().zip(classes) {
                let z = (rate * took.as_secs_f64()).max(1e-12);
                let (whole, mean) = (-(-z).exp_m1(), 1.0 + (-z).exp_m1() / z);
                *part = *part * mean + (1.0 - *part) * whole;
                left += *part * pages;
            }
            due = (left * off).min(memory);
            match judge.judge(PageCount(due as u64), took, GOODPUT, RTT) {
                Verdict::Another => {}
                end => return (end, round + 1, due),
            }
        }
        unreachable!("the noise goes on for ever")
    }

    proptest! {
        /// A fixed set that is rewritten faster than it is sent: known after two rounds, three with noise; whatever its size.
        #[test]
        fn a_fixed_set_that_does_not_fit_is_known_after_a_few_rounds(
            memory in 1e5..1e7f64, part in 0.2..1.0f64, noise in prop::collection::vec(0.97..1.03f64, 8),
        ) {
            let set = (memory * part).max(20_000.0);
            let rate = 40.0 * 262_144.0 / set;
            let (end, rounds, _) = ends(memory, [(set, rate), (0.0, 0.0)], &noise);
            prop_assert!(matches!(end, Verdict::GaveUp(_)) && rounds <= 3, "{end:?} after {rounds}");
            let (end, rounds, _) = ends(memory, [(set, rate), (0.0, 0.0)], &[1.0]);
            prop_assert!(matches!(end, Verdict::GaveUp(_)) && rounds <= 2, "{end:?} after {rounds}");
        }

        /// One that fits converges however fast it is written.
        #[test]
        fn a_fixed_set_that_fits_converges(
            memory in 1e5..1e7f64, set in 1.0..6_500.0f64, rate in 0.1..1e4f64, noise in prop::collection::vec(0.97..1.03f64, 8),
        ) {
            let (end, rounds, left) = ends(memory, [(set, rate), (0.0, 0.0)], &noise);
            prop_assert!(end == Verdict::Converged && rounds <= 7 && left <= 7_051.0, "{end:?} after {rounds}: {left}");
        }

        /// What is written evenly over much memory, at less than the link carries, shrinks to nothing in the end: pre-copy does not give up on it.
        #[test]
        fn an_even_writer_below_the_link_converges(
            memory in 1e5..1e7f64, share in 0.01..0.75f64, noise in prop::collection::vec(0.97..1.03f64, 8),
        ) {
            let pages = memory * 100.0;
            let (end, rounds, _) = ends(memory, [(pages, share * 262_144.0 / pages), (0.0, 0.0)], &noise);
            prop_assert!(end == Verdict::Converged, "{end:?} after {rounds}");
        }

        /// Whoever writes what, it is over after a few rounds or each round gained; and what was left when it gave up is no more than a third above
        /// what two thirds more rounds would have left.
        #[test]
        fn giving_up_costs_little(
            memory in 1e6..1e7f64, hot in 1e4..1e6f64, hot_rate in 0.1..100.0f64, cold in 1e4..1e6f64, cold_rate in 0.001..0.1f64,
        ) {
            let classes = [(hot, hot_rate), (cold, cold_rate)];
            // At about what the link carries rounds shrink by next to nothing each, without end: that is given up, however little would be left.
            let load = classes.iter().map(|(pages, rate)| pages * rate).sum::<f64>() / 262_144.0;
            prop_assume!(!(0.85..1.05).contains(&load));
            let (end, rounds, left) = ends(memory, classes, &[1.0]);
            if let Verdict::GaveUp(why) = end && !why.starts_with("round limit") {
                // The limit, found by going on for ever.
                let mut least = left;
                for _ in 0..200 {
                    let t = least / 262_144.0;
                    least = classes.iter().map(|(pages, rate)| -pages * (-rate * t).exp_m1()).sum();
                }
                prop_assert!(left <= least.max(7_000.0) * 1.4 || why.starts_with("in "), "{rounds}: {left} of {least}: {why}");
            }
        }
    }
}
