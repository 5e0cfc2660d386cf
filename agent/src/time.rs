//! This host's clocks, read.
//!
//! Must not know whose time it is.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

/// What user space is told times in: 100 a second on every Linux, whatever its own ticks (`USER_HZ`).
const USER_TICK_MS: u64 = 10;

/// `CLOCK_MONOTONIC`, which all processes of a host and the kernel's own events share: times of several can be laid side by side.
pub(crate) fn monotonic_now() -> Duration {
    now(ClockId::Monotonic)
}

/// Milliseconds since 1970 by the host's clock; 0 where that is set to before it.
pub(crate) fn unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64)
}

/// The CPU time of the calling thread.
pub(crate) fn thread_cpu_time() -> Duration {
    now(ClockId::ThreadCPUTime)
}

/// What a thread has had of the CPUs since it began.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ThreadTime {
    /// How long it ran, guest and host together.
    pub(crate) ran: Duration,
    /// How long it wanted to run and others had the CPU; none where the kernel does not tell.
    pub(crate) waited: Option<Duration>,
}

/// The times of a thread. None: it has ended.
///
/// `/proc/PID/task/TID/schedstat` tells them in nanoseconds (first two fields; Documentation/scheduler/sched-stats.rst); where the kernel has no such
/// file, `stat` tells the first in ticks of 10 ms (fields 14 and 15, user and system).
pub(crate) fn thread_time(pid: u32, thread: u32) -> Option<ThreadTime> {
    times(&format!("/proc/{pid}/task/{thread}"))
}

/// How long a thread of this process has run; none: it has ended.
pub(crate) fn thread_run_time(thread: i32) -> Option<Duration> {
    times(&format!("/proc/self/task/{thread}")).map(|times| times.ran)
}

fn times(folder: &str) -> Option<ThreadTime> {
    if let Ok(text) = std::fs::read_to_string(format!("{folder}/schedstat")) {
        let mut fields = text.split_ascii_whitespace().map(|field| field.parse().ok().map(Duration::from_nanos));
        return Some(ThreadTime { ran: fields.next()??, waited: fields.next().flatten() });
    }
    let stat = std::fs::read_to_string(format!("{folder}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    let user: u64 = fields.nth(11)?.parse().ok()?;
    let system: u64 = fields.next()?.parse().ok()?;
    let ran = Duration::from_millis(user.saturating_add(system).saturating_mul(USER_TICK_MS));
    Some(ThreadTime { ran, waited: None })
}

fn now(clock: ClockId) -> Duration {
    let now = clock_gettime(clock);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_works_uses_a_cpu() {
        let thread = rustix::thread::gettid().as_raw_nonzero().get() as u32;
        let used = || thread_time(std::process::id(), thread).unwrap().ran;
        let before = used();
        let began = std::time::Instant::now();
        while used() < before + Duration::from_millis(20) {
            assert!(began.elapsed() < Duration::from_secs(20), "no time was counted");
        }
        assert!(thread_run_time(thread as i32) >= Some(before));
        assert_eq!((thread_time(std::process::id(), u32::MAX), thread_run_time(-1)), (None, None));
    }
}
