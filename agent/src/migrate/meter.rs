//! The CPU time of work that comes in many short pieces: one in some is measured, and stands for the others.

use std::time::Duration;

use crate::port::Clock;

/// One piece in so many is measured: reading a thread's clock is a system call.
const ONE_IN: u32 = 8;

/// What pieces of one kind of work have cost.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Meter {
    calls: u32,
    units: u64,
    measured_units: u64,
    measured: Duration,
}

impl Meter {
    /// Does a piece of work, of `units` of it.
    pub(super) fn time<T>(&mut self, clock: &dyn Clock, units: u64, work: impl FnOnce() -> T) -> T {
        let is_measured = self.calls.is_multiple_of(ONE_IN);
        self.calls = self.calls.wrapping_add(1);
        if !is_measured {
            self.units += units;
            return work();
        }
        let began = clock.thread_cpu();
        let done = work();
        self.add(units, clock.thread_cpu().saturating_sub(began));
        done
    }

    /// Notes a piece of work that was measured.
    pub(super) fn add(&mut self, units: u64, took: Duration) {
        self.units += units;
        self.measured_units += units;
        self.measured += took;
    }

    /// What all pieces have cost together, those that were not measured as much for each unit as the others.
    pub(super) fn total(&self) -> Duration {
        let share = self.units as f64 / self.measured_units.max(1) as f64;
        self.measured.mul_f64(share.max(1.0))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;
    use std::sync::Mutex;

    use super::*;

    struct Spent(Mutex<Duration>);

    impl Clock for Spent {
        fn now(&self) -> Duration {
            *self.0.lock().unwrap()
        }

        fn sleep(&self, duration: Duration) {
            *self.0.lock().unwrap() += duration;
        }
    }

    #[test]
    fn what_is_measured_stands_for_the_rest() {
        let (clock, done) = (Spent(Mutex::default()), Cell::new(0));
        let mut meter = Meter::default();
        assert_eq!(meter.total(), Duration::ZERO);
        for _ in 0..1000 {
            meter.time(&clock, 3, || {
                done.set(done.get() + 1);
                clock.sleep(Duration::from_micros(3));
            });
        }
        assert_eq!((done.get(), meter.total()), (1000, Duration::from_millis(3)));
    }
}
