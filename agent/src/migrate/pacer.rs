//! Keeps all page streams together below a bandwidth limit, which may change meanwhile: a token bucket over [`Clock`].

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::model::BytesPerSecond;
use crate::port::Clock;

/// How much may be sent at once after an idle moment: 20 ms worth.
const BURST: Duration = Duration::from_millis(20);
/// The same while the VM runs at the target and is owed pages: its faults take the processors from the push again and again, and what the limit allowed meanwhile is still to be had.
const DEEP_BURST: Duration = Duration::from_millis(100);
/// What waiting is bounded by, so that sums of times stay times.
const LONGEST: Duration = Duration::from_hours(1 << 20);
/// Whoever waits looks this often whether the limit is another.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// How fast a migration may send, and what it has sent: shared with whoever watches and steers it.
#[derive(Clone, Debug, Default)]
pub struct Pace(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    /// In bytes per second; 0: none.
    limit: AtomicU64,
    sent_bytes: AtomicU64,
    /// Pages that are owed wait until they are asked for.
    only_asked: AtomicBool,
}

impl Pace {
    /// The pace of a migration that is limited to `limit`; `None` is as fast as the link goes.
    pub fn new(limit: Option<BytesPerSecond>) -> Self {
        let pace = Self::default();
        pace.set_limit(limit);
        pace
    }

    /// The most that all page streams together may send.
    pub fn limit(&self) -> Option<BytesPerSecond> {
        match self.0.limit.load(Ordering::Relaxed) {
            0 => None,
            limit => Some(BytesPerSecond(limit)),
        }
    }

    /// Changes the limit. Streams that wait for the old one take the new one within 50 ms.
    pub fn set_limit(&self, limit: Option<BytesPerSecond>) {
        self.0.limit.store(limit.map_or(0, |limit| limit.0), Ordering::Relaxed);
    }

    /// From now on pages that are owed wait until they are asked for.
    pub fn wait_until_asked(&self) {
        self.0.only_asked.store(true, Ordering::Relaxed);
    }

    /// All that is owed may go.
    pub fn finish(&self) {
        self.0.only_asked.store(false, Ordering::Relaxed);
    }

    /// Whether pages that are owed wait until they are asked for.
    pub fn waits_until_asked(&self) -> bool {
        self.0.only_asked.load(Ordering::Relaxed)
    }

    /// Contents of pages, packed or not, and of the boot image that were handed to the streams, in bytes. Headers, and marks of zero pages, are not
    /// among them.
    pub fn sent_bytes(&self) -> u64 {
        self.0.sent_bytes.load(Ordering::Relaxed)
    }
}

/// A token bucket that several streams draw from.
pub struct Pacer<'a> {
    clock: &'a dyn Clock,
    pace: Pace,
    burst: Duration,
    paid: Mutex<Paid>,
}

/// What was handed out.
#[derive(Clone, Copy, Debug, Default)]
struct Paid {
    /// When it will have been sent, at `limit`.
    until: Duration,
    limit: Option<BytesPerSecond>,
}

impl Paid {
    /// The same debt at another limit: what took so long at the old one takes so much less or more at the new one.
    fn at_limit(self, limit: Option<BytesPerSecond>, now: Duration) -> Self {
        let (Some(old), Some(new)) = (self.limit, limit) else { return Self { until: Duration::ZERO, limit } };
        if old == new {
            return self;
        }
        let owed = self.until.saturating_sub(now).as_secs_f64() * old.0 as f64 / new.0.max(1) as f64;
        Self { until: now + Duration::from_secs_f64(owed.min(LONGEST.as_secs_f64())), limit }
    }
}

/// What the kernel is asked to hold one of `streams` streams to: twice its share. The limit is kept here, where streams share it as they need it and make up for what they were held
/// up; the kernel only spreads what is handed to it at once.
pub(super) fn kernel_pace(limit: Option<BytesPerSecond>, streams: u16) -> Option<BytesPerSecond> {
    limit.map(|limit| BytesPerSecond((limit.0 / u64::from(streams.max(1))).saturating_mul(2)))
}

impl<'a> Pacer<'a> {
    /// A pacer for `pace`.
    pub fn new(clock: &'a dyn Clock, pace: Pace) -> Self {
        Self { clock, pace, burst: BURST, paid: Mutex::default() }
    }

    /// A pacer for pages that are owed to a VM that runs. It begins without a burst: the VM is just then to find the link and the processors free.
    pub fn for_push(clock: &'a dyn Clock, pace: Pace) -> Self {
        let paid = Paid { until: clock.now(), limit: pace.limit() };
        Self { burst: DEEP_BURST, paid: Mutex::new(paid), ..Self::new(clock, pace) }
    }

    /// Whether pages that are owed wait until they are asked for.
    pub fn waits_until_asked(&self) -> bool {
        self.pace.waits_until_asked()
    }

    /// The limit at present.
    pub fn limit(&self) -> Option<BytesPerSecond> {
        self.pace.limit()
    }

    /// Waits until the limit allows what was booked so far: whoever sends now keeps nobody from what it sends.
    pub fn await_turn(&self) {
        self.pay(0);
    }

    /// Books `bytes` and waits until the limit allows them.
    pub fn pay(&self, bytes: u64) {
        self.pay_packed(bytes, bytes);
    }

    /// The same for `content` bytes that were packed into `bytes`.
    pub fn pay_packed(&self, bytes: u64, content: u64) {
        let mut own = self.book(bytes);
        while own.limit.is_some() {
            let now = self.clock.now();
            own = own.at_limit(self.pace.limit(), now);
            let wait = own.until.saturating_sub(now).min(LOOK_EVERY);
            if wait.is_zero() {
                break;
            }
            self.clock.sleep(wait);
        }
        self.pace.0.sent_bytes.fetch_add(content, Ordering::Relaxed);
    }

    fn book(&self, bytes: u64) -> Paid {
        let Some(limit) = self.pace.limit() else {
            *self.paid.lock().unwrap_or_else(PoisonError::into_inner) = Paid::default();
            return Paid::default();
        };
        let now = self.clock.now();
        let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        *paid = paid.at_limit(Some(limit), now);
        paid.until = (paid.until.max(now.saturating_sub(self.burst)) + limit.time_for(bytes)).min(now + LONGEST);
        *paid
    }

    /// Books `bytes` that are sent at once: those that pay wait for them.
    pub fn ahead(&self, bytes: u64) {
        self.book(bytes);
        self.pace.0.sent_bytes.fetch_add(bytes, Ordering::Relaxed);
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
        let pacer = Pacer::new(&clock, Pace::new(Some(BytesPerSecond(1_000_000))));
        for _ in 0..100 {
            pacer.pay(50_000);
        }
        let elapsed = clock.now() - Duration::from_secs(100);
        let least = Duration::from_secs(5) - BURST;
        assert!(elapsed >= least && elapsed < Duration::from_millis(5_010), "5 MB at 1 MB/s took {elapsed:?}");
    }

    #[test]
    fn what_a_push_was_kept_from_sending_it_sends_later() {
        let clock = Stepped(Mutex::new(Duration::from_secs(100)));
        let pace = || Pace::new(Some(BytesPerSecond(1_000_000)));
        for (pacer, sent_at_once) in [(Pacer::new(&clock, pace()), 20_000), (Pacer::for_push(&clock, pace()), 100_000)]
        {
            pacer.pay(1);
            clock.sleep(Duration::from_secs(1));
            let now = clock.now();
            pacer.ahead(sent_at_once);
            pacer.await_turn();
            assert_eq!(clock.now(), now);
            pacer.ahead(1_000);
            pacer.await_turn();
            assert!(clock.now() >= now + Duration::from_micros(999), "{:?}", clock.now() - now);
        }
    }

    #[test]
    fn no_limit_never_waits() {
        let clock = Stepped(Mutex::new(Duration::ZERO));
        let pace = Pace::default();
        Pacer::new(&clock, pace.clone()).pay(1 << 40);
        assert_eq!((clock.now(), pace.sent_bytes()), (Duration::ZERO, 1 << 40));
    }

    #[test]
    fn a_new_limit_holds_from_then_on() {
        let clock = Stepped(Mutex::new(Duration::from_secs(100)));
        let pace = Pace::new(Some(BytesPerSecond(1_000_000)));
        let pacer = Pacer::new(&clock, pace.clone());
        let took = |bytes| {
            let before = clock.now();
            pacer.pay(bytes);
            clock.now() - before
        };
        took(1_000_000);
        pace.set_limit(Some(BytesPerSecond(10_000_000)));
        let fast = took(10_000_000);
        pace.set_limit(Some(BytesPerSecond(100_000)));
        let slow = took(100_000);
        for second in [fast, slow] {
            assert!(second.abs_diff(Duration::from_secs(1)) <= BURST, "{fast:?} {slow:?}");
        }
        pace.set_limit(None);
        assert_eq!(took(1 << 40), Duration::ZERO);
        pace.set_limit(Some(BytesPerSecond(1_000_000)));
        assert!(took(1_000_000) >= Duration::from_secs(1) - BURST);
    }

    /// A clock at which the operator changes his mind.
    struct Steered(Stepped, Pace);

    impl Clock for Steered {
        fn now(&self) -> Duration {
            self.0.now()
        }

        fn sleep(&self, duration: Duration) {
            self.0.sleep(duration);
            self.1.set_limit(Some(BytesPerSecond(1_000_000)));
        }
    }

    #[test]
    fn who_waits_for_the_old_limit_takes_the_new_one() {
        let pace = Pace::new(Some(BytesPerSecond(1)));
        let clock = Steered(Stepped(Mutex::new(Duration::from_secs(100))), pace.clone());
        Pacer::new(&clock, pace).pay(4096);
        assert!(clock.now() < Duration::from_secs(101), "an hour was waited for a page: {:?}", clock.now());
    }
}
