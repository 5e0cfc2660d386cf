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

/// How long a thread of this process has run; none: it has ended, or the kernel does not tell (`/proc/self/task/TID/schedstat`, first field).
pub(crate) fn thread_run_time(thread: i32) -> Option<Duration> {
    let text = std::fs::read_to_string(format!("/proc/self/task/{thread}/schedstat")).ok()?;
    text.split_ascii_whitespace().next()?.parse().ok().map(Duration::from_nanos)
}

fn now(clock: ClockId) -> Duration {
    let now = clock_gettime(clock);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}
