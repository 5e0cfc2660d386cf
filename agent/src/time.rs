//! This host's clocks, read.
//!
//! Must not know whose time it is.

use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// `CLOCK_MONOTONIC`, which all processes of a host and the kernel's own events share: times of several can be laid side by side.
pub(crate) fn monotonic_now() -> Duration {
    now(ClockId::Monotonic)
}

/// The CPU time of the calling thread.
pub(crate) fn thread_cpu_time() -> Duration {
    now(ClockId::ThreadCPUTime)
}

fn now(clock: ClockId) -> Duration {
    let now = clock_gettime(clock);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}
