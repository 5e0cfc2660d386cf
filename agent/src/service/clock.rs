//! The real twin of [`crate::port::Clock`].

use std::thread;
use std::time::Duration;

use crate::kvm::stand;
use crate::port::{Clock, Place};
use crate::time::{monotonic_now, thread_cpu_time};

/// `CLOCK_MONOTONIC`, which all processes of a host share: times of several processes can be laid side by side.
#[derive(Clone, Copy, Debug, Default)]
pub struct MonotonicClock;

impl Clock for MonotonicClock {
    fn now(&self) -> Duration {
        monotonic_now()
    }

    fn sleep(&self, duration: Duration) {
        thread::sleep(duration);
    }

    fn thread_cpu(&self) -> Duration {
        thread_cpu_time()
    }

    fn stand(&self, place: Place) {
        stand(place);
    }
}
