//! Keeps all page streams together below a bandwidth limit: a token bucket over [`Clock`].

use std::sync::Mutex;
use std::time::Duration;

use crate::model::BytesPerSecond;
use crate::port::Clock;

/// How much may be sent at once after an idle moment: 20 ms worth.
const BURST: Duration = Duration::from_millis(20);

/// A token bucket that several streams draw from.
pub struct Pacer<'a> {
    clock: &'a dyn Clock,
    limit: Option<BytesPerSecond>,
    /// When the bytes handed out so far will have been sent at the limit.
    paid_until: Mutex<Duration>,
}

impl<'a> Pacer<'a> {
    /// A pacer for `limit`; `None` never waits.
    pub fn new(clock: &'a dyn Clock, limit: Option<BytesPerSecond>) -> Self {
        Self { clock, limit, paid_until: Mutex::new(Duration::ZERO) }
    }

    /// Books `bytes` and waits until the limit allows them.
    pub fn pay(&self, bytes: u64) {
        let wait = self.book(bytes);
        if !wait.is_zero() {
            self.clock.sleep(wait);
        }
    }

    /// Books `bytes` that are sent at once: those that pay wait for them. Returns how long it would have to wait itself.
    pub fn book(&self, bytes: u64) -> Duration {
        let Some(limit) = self.limit else { return Duration::ZERO };
        let now = self.clock.now();
        let mut paid_until = self.paid_until.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        *paid_until = (*paid_until).max(now.saturating_sub(BURST)) + limit.time_for(bytes);
        paid_until.saturating_sub(now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Stepped(Mutex<Duration>);

    impl Clock for Stepped {
        fn now(&self) -> Duration {
            *self.0.lock().unwrap()
        }

        fn sleep(&self, duration: Duration) {
            *self.0.lock().unwrap() += duration;
        }
    }

    #[test]
    fn the_limit_holds_over_any_second() {
        let clock = Stepped(Mutex::new(Duration::from_secs(100)));
        let pacer = Pacer::new(&clock, Some(BytesPerSecond(1_000_000)));
        for _ in 0..100 {
            pacer.pay(50_000);
        }
        let elapsed = clock.now() - Duration::from_secs(100);
        let least = Duration::from_secs(5) - BURST;
        assert!(elapsed >= least && elapsed < Duration::from_millis(5_010), "5 MB at 1 MB/s took {elapsed:?}");
    }

    #[test]
    fn no_limit_never_waits() {
        let clock = Stepped(Mutex::new(Duration::ZERO));
        Pacer::new(&clock, None).pay(u64::MAX);
        assert_eq!(clock.now(), Duration::ZERO);
    }
}
