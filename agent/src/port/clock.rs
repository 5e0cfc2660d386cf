//! Time as policy sees it, and the waits that spend it: monotonic, and able to be simulated.
//!
//! Threads that wait for one another do so through this port too, so that a simulation can run them one at a time in
//! virtual time. No lock of policy's own may be held across a call that can wait.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// Work for a thread of its own.
pub type Job<'a> = Box<dyn FnOnce() + Send + 'a>;

/// Rung by one thread to wake others that wait through [`Clock::wait`].
///
/// Read [`Bell::rings`], look whether what you wait for has come, and if not wait for a ring beyond those: none is missed.
#[derive(Debug, Default)]
pub struct Bell {
    rings: Arc<AtomicU64>,
    lock: Mutex<()>,
    rung: Condvar,
}

impl Bell {
    /// How often it was rung.
    pub fn rings(&self) -> u64 {
        self.rings.load(Ordering::Acquire)
    }

    /// Rings: whoever waits looks again.
    pub fn ring(&self) {
        let guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.rings.fetch_add(1, Ordering::Release);
        drop(guard);
        self.rung.notify_all();
    }

    /// The count itself, for a clock that does not wait in real time.
    pub fn counter(&self) -> Arc<AtomicU64> {
        Arc::clone(&self.rings)
    }

    fn wait(&self, seen: u64, timeout: Duration) {
        let guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.rung.wait_timeout_while(guard, timeout, |()| self.rings() == seen));
    }
}

/// Where a thread stands among those that want its CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// A VM waits for what it does, which is to be short pieces: in front of ordinary threads.
    InFront,
    /// Among them.
    Among,
}

/// A monotonic clock.
pub trait Clock: Send + Sync {
    /// Time since some fixed start.
    fn now(&self) -> Duration;

    /// Waits. Only for pacing and repeated announcements, never in place of an event.
    fn sleep(&self, duration: Duration);

    /// CPU time that the calling thread has spent. Where nobody counts it, [`Clock::now`]: then all the time that passes counts.
    fn thread_cpu(&self) -> Duration {
        self.now()
    }

    /// Where the calling thread is to stand from now on, where somebody can see to that.
    fn stand(&self, _place: Place) {}

    /// Waits until `bell` has been rung more often than `seen`, at most `timeout`.
    fn wait(&self, bell: &Bell, seen: u64, timeout: Duration) {
        bell.wait(seen, timeout);
    }

    /// Runs every job on a thread of its own and `lead` on the calling one, and returns when all have ended.
    ///
    /// # Panics
    /// If one of them does.
    fn run_beside(&self, jobs: Vec<Job<'_>>, lead: Job<'_>) {
        std::thread::scope(|scope| {
            for job in jobs {
                scope.spawn(job);
            }
            lead();
        });
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    struct Real;

    impl Clock for Real {
        fn now(&self) -> Duration {
            Duration::ZERO
        }

        fn sleep(&self, duration: Duration) {
            std::thread::sleep(duration);
        }
    }

    #[test]
    fn a_ring_before_the_wait_is_not_missed() {
        let bell = Bell::default();
        let seen = bell.rings();
        bell.ring();
        let started = Instant::now();
        Real.wait(&bell, seen, Duration::from_secs(60));
        assert!(started.elapsed() < Duration::from_secs(30));
    }

    #[test]
    fn jobs_and_lead_run_beside_one_another() {
        let (bell, done) = (Bell::default(), AtomicU64::new(0));
        let job = || {
            let seen = bell.rings();
            if seen == 0 {
                Real.wait(&bell, seen, Duration::from_secs(60));
            }
            done.fetch_add(1, Ordering::Relaxed);
        };
        Real.run_beside(vec![Box::new(job), Box::new(job)], Box::new(|| bell.ring()));
        assert_eq!(done.load(Ordering::Relaxed), 2);
    }
}
