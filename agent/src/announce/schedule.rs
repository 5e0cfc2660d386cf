//! When announcements are repeated.
//!
//! Owns the arithmetic; a pure iterator of instants. QEMU's rule (net/announce.c): the first round is not delayed, the gap
//! after round k (from 0) is `min(initial + k·step, max)`. Its defaults, kept here, give 0, 50, 200, 450, 800 ms.
//! Jitter, which QEMU has not, moves each later round by a random time, so that many VMs that arrive together do not go on together.

use std::time::Duration;

use crate::model::Random;

/// No jitter is longer, like no gap.
const LONGEST_JITTER: Duration = Duration::from_secs(100);

/// Initial gap, growth, cap, number of rounds, and by how much these may be moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    initial: Duration,
    step: Duration,
    max: Duration,
    rounds: u32,
    jitter: Duration,
    seed: u64,
}

/// A schedule outside what QEMU's migration parameters allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ScheduleError {
    /// Too few or too many rounds.
    #[error("{0} rounds are not within 1..=1000")]
    Rounds(u32),
    /// Too long a first or largest gap.
    #[error("a gap of {0:?} is longer than 100 s")]
    Gap(Duration),
    /// Too long a step.
    #[error("a step of {0:?} is longer than 10 s")]
    Step(Duration),
    /// Too long a jitter.
    #[error("a jitter of {0:?} is longer than 100 s")]
    Jitter(Duration),
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            initial: Duration::from_millis(50),
            step: Duration::from_millis(100),
            max: Duration::from_millis(550),
            rounds: 5,
            jitter: Duration::ZERO,
            seed: 0,
        }
    }
}

impl Schedule {
    /// A schedule within QEMU's limits (announce-initial and -max up to 100 s, -step up to 10 s, -rounds up to 1000).
    ///
    /// # Errors
    /// A value outside of them; no round at all.
    pub fn new(initial: Duration, step: Duration, max: Duration, rounds: u32) -> Result<Self, ScheduleError> {
        if !(1..=1000).contains(&rounds) {
            return Err(ScheduleError::Rounds(rounds));
        }
        if let Some(long) = [initial, max].into_iter().find(|gap| *gap > Duration::from_secs(100)) {
            return Err(ScheduleError::Gap(long));
        }
        if step > Duration::from_secs(10) {
            return Err(ScheduleError::Step(step));
        }
        Ok(Self { initial, step, max, rounds, jitter: Duration::ZERO, seed: 0 })
    }

    /// The same, with each round after the first up to `jitter` later (at most 100 s, evenly spread).
    ///
    /// # Errors
    /// A longer jitter.
    pub fn with_jitter(self, jitter: Duration) -> Result<Self, ScheduleError> {
        if jitter > LONGEST_JITTER { Err(ScheduleError::Jitter(jitter)) } else { Ok(Self { jitter, ..self }) }
    }

    /// The same, with the seed that its jitter is drawn from: one of its own for each announcement.
    #[must_use]
    pub const fn seeded(self, seed: u64) -> Self {
        Self { seed, ..self }
    }

    /// By how much a round may be moved.
    pub const fn jitter(&self) -> Duration {
        self.jitter
    }

    /// The gap after the first round.
    pub const fn initial(&self) -> Duration {
        self.initial
    }

    /// By how much each gap is longer than the one before.
    pub const fn step(&self) -> Duration {
        self.step
    }

    /// The longest gap.
    pub const fn max(&self) -> Duration {
        self.max
    }

    /// Rounds, the first included.
    pub const fn rounds(&self) -> u32 {
        self.rounds
    }

    /// The time of each round after the first one's; begins with zero. No round comes before the one before it.
    pub fn instants(&self) -> impl Iterator<Item = Duration> + use<> {
        let Self { initial, step, max, rounds, jitter, seed } = *self;
        let (mut random, mut due, mut last) = (Random(seed), Duration::ZERO, Duration::ZERO);
        let jitter_ns = u64::try_from(jitter.as_nanos()).unwrap_or(u64::MAX);
        (0..rounds).map(move |k| {
            if k > 0 {
                last = last.max(due + Duration::from_nanos(random.below(jitter_ns)));
            }
            due += (initial + step * k).min(max);
            last
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ms(value: u64) -> Duration {
        Duration::from_millis(value)
    }

    #[test]
    fn the_default_is_that_of_qemu() {
        assert_eq!(
            Schedule::default().instants().collect::<Vec<_>>(),
            [0, 50, 200, 450, 800].map(ms),
            "0, +50, +150, +250, +350"
        );
    }

    #[test]
    fn the_cap_holds_the_gaps_down() {
        let schedule = Schedule::new(ms(50), ms(100), ms(200), 6).unwrap();
        assert_eq!(schedule.instants().collect::<Vec<_>>(), [0, 50, 200, 400, 600, 800].map(ms));
        let capped_at_once = Schedule::new(ms(500), ms(1), ms(20), 3).unwrap();
        assert_eq!(capped_at_once.instants().collect::<Vec<_>>(), [0, 20, 40].map(ms));
    }

    #[test]
    fn absurd_schedules_are_refused() {
        assert_eq!(Schedule::new(ms(1), ms(1), ms(1), 0), Err(ScheduleError::Rounds(0)));
        assert_eq!(Schedule::new(ms(1), ms(1), ms(1), 1001), Err(ScheduleError::Rounds(1001)));
        assert!(Schedule::new(ms(100_001), ms(1), ms(1), 1).is_err());
        assert!(Schedule::new(ms(1), ms(10_001), ms(1), 1).is_err());
    }

    #[test]
    fn jitter_moves_the_later_rounds_and_keeps_the_first() {
        let schedule = Schedule::default().with_jitter(ms(40)).unwrap();
        let times: Vec<Vec<Duration>> = (0..50).map(|seed| schedule.seeded(seed).instants().collect()).collect();
        for times in &times {
            assert_eq!(times[0], Duration::ZERO);
            for (time, due) in times.iter().zip([0, 50, 200, 450, 800].map(ms)) {
                assert!((due..due + ms(40)).contains(time), "{times:?}");
            }
        }
        let seconds: std::collections::BTreeSet<_> = times.iter().map(|times| times[1]).collect();
        assert!(seconds.len() > 40 && *seconds.first().unwrap() < ms(60) && *seconds.last().unwrap() > ms(80));
        assert_eq!(times[7], schedule.seeded(7).instants().collect::<Vec<_>>(), "a seed says it all");
        assert!(Schedule::default().with_jitter(ms(100_001)).is_err());
    }

    proptest! {
        /// A jitter longer than the gaps does not turn rounds round.
        #[test]
        fn rounds_stay_in_order(jitter in 0u64..=2000, seed in any::<u64>()) {
            let schedule = Schedule::default().with_jitter(ms(jitter)).unwrap().seeded(seed);
            let instants: Vec<_> = schedule.instants().collect();
            prop_assert!(instants.is_sorted());
            prop_assert!(instants.iter().zip(Schedule::default().instants()).all(|(time, due)| *time >= due));
        }

        #[test]
        fn every_allowed_schedule_is_finite_and_grows(
            initial in 0u64..=100_000, step in 0u64..=10_000, max in 0u64..=100_000, rounds in 1u32..=1000,
        ) {
            let schedule = Schedule::new(ms(initial), ms(step), ms(max), rounds).unwrap();
            let instants: Vec<_> = schedule.instants().collect();
            prop_assert_eq!(instants.len(), rounds as usize);
            prop_assert_eq!(instants[0], Duration::ZERO);
            prop_assert!(instants.windows(2).all(|pair| pair[1].checked_sub(pair[0]).is_some_and(|gap| gap <= ms(max))));
        }
    }
}
