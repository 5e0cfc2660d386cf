//! A signal to oneself after a while: takes a vCPU's thread out of guest code again soon after it has entered.
//!
//! Owns one timer of one thread. Must not know what the signal is for.

use std::io;
use std::time::Duration;

/// A timer that signals the thread which made it. Deleted when dropped.
#[derive(Debug)]
pub(super) struct Alarm(libc::timer_t);

// SAFETY: a timer belongs to the process, and any of its threads may set or delete it; the signal goes to the thread that made it.
unsafe impl Send for Alarm {}

impl Alarm {
    /// A timer that signals the calling thread with `signal`.
    pub(super) fn for_this_thread(signal: i32) -> io::Result<Self> {
        // SAFETY: all-zero is a value of this structure of numbers and pointers.
        let mut event: libc::sigevent = unsafe { std::mem::zeroed() };
        event.sigev_notify = libc::SIGEV_THREAD_ID;
        event.sigev_signo = signal;
        event.sigev_notify_thread_id = super::hurry::this_thread();
        let mut timer: libc::timer_t = std::ptr::null_mut();
        // SAFETY: both point to locals for the duration of the call.
        match unsafe { libc::timer_create(libc::CLOCK_MONOTONIC, &raw mut event, &raw mut timer) } {
            0 => Ok(Self(timer)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Signals once, after this long; another call before that begins anew.
    pub(super) fn ring_in(&self, time: Duration) {
        let value = libc::timespec { tv_sec: time.as_secs() as i64, tv_nsec: i64::from(time.subsec_nanos().max(1)) };
        let setting = libc::itimerspec { it_interval: libc::timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        // SAFETY: the timer lives as long as `self`, and the setting for the duration of the call. It cannot fail for a sound time.
        unsafe { libc::timer_settime(self.0, 0, &raw const setting, std::ptr::null_mut()) };
    }
}

impl Drop for Alarm {
    fn drop(&mut self) {
        // SAFETY: made by `for_this_thread`, and not used any more.
        unsafe { libc::timer_delete(self.0) };
    }
}
