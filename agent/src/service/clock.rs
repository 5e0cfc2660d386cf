//! The real twin of [`crate::port::Clock`].

use std::thread;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

use crate::port::Clock;

/// `CLOCK_MONOTONIC`, which all processes of a host share: times of several processes can be laid side by side.
#[derive(Clone, Copy, Debug, Default)]
pub struct MonotonicClock;

impl Clock for MonotonicClock {
    fn now(&self) -> Duration {
        let now = clock_gettime(ClockId::Monotonic);
        Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
    }

    fn sleep(&self, duration: Duration) {
        thread::sleep(duration);
    }
}
