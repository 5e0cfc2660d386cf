//! When announcements are repeated.
//!
//! Owns the arithmetic; a pure iterator of instants. QEMU's rule (net/announce.c): the first round is not delayed, the gap
//! after round k (from 0) is `min(initial + k·step, max)`. Its defaults, kept here, give 0, 50, 200, 450, 800 ms.

use std::time::Duration;

/// Initial gap, growth, cap and number of rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Schedule {
    initial: Duration,
    step: Duration,
    max: Duration,
    rounds: u32,
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
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            initial: Duration::from_millis(50),
            step: Duration::from_millis(100),
            max: Duration::from_millis(550),
            rounds: 5,
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
        Ok(Self { initial, step, max, rounds })
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

    /// The time of each round after the first one's; begins with zero.
    pub fn instants(&self) -> impl Iterator<Item = Duration> + use<> {
        let Self { initial, step, max, rounds } = *self;
        (0..rounds).scan(Duration::ZERO, move |next, k| {
            let now = *next;
            *next += (initial + step * k).min(max);
            Some(now)
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

    proptest! {
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
