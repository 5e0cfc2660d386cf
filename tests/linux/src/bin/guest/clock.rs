//! The guest's clocks, watched by itself: whether they ever go back, and how they go with one another.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};

use crate::state::State;

/// Between two looks.
const STEP: Duration = Duration::from_millis(5);

/// What was seen.
#[derive(Debug, Default)]
pub(crate) struct ClockState {
    looks: AtomicU64,
    /// Times that a clock was behind where it had been: monotonic, time-stamp counter.
    went_back: [AtomicU64; 2],
    /// The longest time between two looks, by the monotonic clock.
    largest_gap_ns: AtomicU64,
    /// The largest step of the real-time clock against the monotonic clock, forward and back.
    realtime_steps_ns: [AtomicI64; 2],
}

impl ClockState {
    /// As JSON.
    pub(crate) fn report(&self) -> Value {
        json!({
            "looks": self.looks.load(Ordering::Relaxed),
            "monotonic_went_back": self.went_back[0].load(Ordering::Relaxed),
            "tsc_went_back": self.went_back[1].load(Ordering::Relaxed),
            "largest_gap_ns": self.largest_gap_ns.load(Ordering::Relaxed),
            "realtime_step_forward_ns": self.realtime_steps_ns[0].load(Ordering::Relaxed),
            "realtime_step_back_ns": self.realtime_steps_ns[1].load(Ordering::Relaxed),
        })
    }

    fn look(&self, before: Moment, now: Moment) {
        self.looks.fetch_add(1, Ordering::Relaxed);
        for (counter, went_back) in
            self.went_back.iter().zip([now.monotonic_ns < before.monotonic_ns, now.tsc < before.tsc])
        {
            counter.fetch_add(went_back.into(), Ordering::Relaxed);
        }
        let elapsed = now.monotonic_ns.saturating_sub(before.monotonic_ns);
        self.largest_gap_ns.fetch_max(elapsed, Ordering::Relaxed);
        let step = (now.realtime_ns as i64).wrapping_sub(before.realtime_ns as i64).wrapping_sub(elapsed as i64);
        self.realtime_steps_ns[0].fetch_max(step, Ordering::Relaxed);
        self.realtime_steps_ns[1].fetch_min(step, Ordering::Relaxed);
    }
}

/// A clock's time in nanoseconds.
pub(crate) fn now_ns(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

/// The time-stamp counter.
pub(crate) fn tsc() -> u64 {
    // SAFETY: reads a counter, on any x86-64 processor.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[derive(Clone, Copy, Debug)]
struct Moment {
    monotonic_ns: u64,
    realtime_ns: u64,
    tsc: u64,
}

impl Moment {
    fn now() -> Self {
        Self { monotonic_ns: now_ns(ClockId::Monotonic), realtime_ns: now_ns(ClockId::Realtime), tsc: tsc() }
    }
}

/// Watches for good, on a thread.
pub(crate) fn watch(state: Arc<State>) -> Result<()> {
    let body = move || {
        let mut before = Moment::now();
        loop {
            std::thread::sleep(STEP);
            let now = Moment::now();
            state.clock.look(before, now);
            before = now;
        }
    };
    std::thread::Builder::new().name("clock".into()).spawn(body).context("thread of the clock")?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_goes_back_is_counted() {
        let at = |monotonic_ns, realtime_ns, tsc| Moment { monotonic_ns, realtime_ns, tsc };
        let clock = ClockState::default();
        clock.look(at(100, 1000, 5), at(200, 1100, 6));
        clock.look(at(200, 1100, 6), at(300, 1250, 5));
        clock.look(at(300, 1250, 5), at(290, 1240, 9));
        let report = clock.report();
        assert_eq!((&report["monotonic_went_back"], &report["tsc_went_back"]), (&1.into(), &1.into()));
        assert_eq!((&report["largest_gap_ns"], &report["realtime_step_forward_ns"]), (&100.into(), &50.into()));
        assert_eq!(report["realtime_step_back_ns"], -10);
    }
}
