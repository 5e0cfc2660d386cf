//! Measuring one VM interval after interval, with or without write protection.

use std::time::Duration;

use super::rate::{DirtyRate, rate_between};
use super::regime::Protection;
use crate::model::{GuestWrite, PageBitmap};
use crate::port::{
    Arm, ArmError, Clock, EventHook, EventSample, EventSource, EventSourceError, Look, SampleLog, SampleLogError,
};

/// Why an observation ended early.
#[derive(Debug, thiserror::Error)]
pub enum ObserveError {
    /// The counters.
    #[error(transparent)]
    Source(#[from] EventSourceError),
    /// The write protection.
    #[error(transparent)]
    Arm(#[from] ArmError),
    /// What was seen could not be kept.
    #[error(transparent)]
    Log(#[from] SampleLogError),
}

/// The observation of one VM. Dropping it lets the VM write freely again.
pub struct Observer<S: EventSource, C: Clock> {
    source: S,
    clock: C,
    arm: Option<Box<dyn Arm>>,
    log: Option<Box<dyn SampleLog>>,
    pages: PageBitmap,
    writes: Vec<GuestWrite>,
    before: (Duration, EventSample),
}

impl<S: EventSource, C: Clock> std::fmt::Debug for Observer<S, C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Observer")
            .field("armed", &self.arm.is_some())
            .field("since", &self.before.0)
            .finish_non_exhaustive()
    }
}

impl<S: EventSource, C: Clock> Observer<S, C> {
    /// Begins: write-protects if there is an `arm`, and takes the first sample.
    ///
    /// # Errors
    /// The VM refused to be armed, or the counters cannot be read.
    pub fn start(source: S, clock: C, arm: Option<Box<dyn Arm>>) -> Result<Self, ObserveError> {
        Self::start_logged(source, clock, arm, None)
    }

    /// The same; every look is given to `log`, the first one too.
    ///
    /// # Errors
    /// As [`Observer::start`]; or a look could not be kept.
    pub fn start_logged(
        source: S,
        clock: C,
        arm: Option<Box<dyn Arm>>,
        log: Option<Box<dyn SampleLog>>,
    ) -> Result<Self, ObserveError> {
        let pages = source.empty_pages();
        let mut observer = Self { source, clock, arm, log, pages, writes: Vec::new(), before: Default::default() };
        if let Some(arm) = &mut observer.arm
            && let Err(error) = arm.arm()
        {
            // Nothing was switched on, so there is nothing for drop to switch off.
            observer.arm = None;
            return Err(error.into());
        }
        observer.source.armed(observer.arm.is_some());
        // What is there already is no event of any interval.
        observer.before = observer.sample(false)?;
        Ok(observer)
    }

    /// What is listened to.
    pub fn hooks(&self) -> &[EventHook] {
        self.source.hooks()
    }

    /// The single writes of the interval that ended last, if its source tells them.
    pub fn writes(&self) -> &[GuestWrite] {
        &self.writes
    }

    /// Ends the interval under way, reports it, and begins the next. `logged`: someone else had the VM's dirty log on.
    ///
    /// # Errors
    /// The observation cannot go on.
    pub fn measure(&mut self, logged: bool) -> Result<DirtyRate, ObserveError> {
        let now = self.sample(logged)?;
        let unique = self.pages.count();
        let interval = now.0.saturating_sub(self.before.0);
        let protection = match (&self.arm, logged) {
            (Some(_), _) => Protection::Ours,
            (None, true) => Protection::Others,
            (None, false) => Protection::Unseen,
        };
        let rate = rate_between(&self.before.1, &now.1, interval, unique, protection);
        if let Some(arm) = &mut self.arm {
            arm.rearm()?;
            self.source.armed(true);
        }
        self.before = now;
        Ok(rate)
    }

    /// Ends the observation and lets the VM write freely again.
    ///
    /// # Errors
    /// The VM did not confirm that it does.
    pub fn stop(mut self) -> Result<(), ArmError> {
        self.source.armed(false);
        self.arm.take().map_or(Ok(()), |mut arm| arm.disarm())
    }

    fn sample(&mut self, logged: bool) -> Result<(Duration, EventSample), ObserveError> {
        self.pages.clear();
        self.writes.clear();
        let sample = self.source.sample(&mut self.pages)?;
        self.source.take_writes(&mut self.writes);
        let at = self.clock.now();
        if let Some(log) = &mut self.log {
            log.look(&Look { at, logged, sample: &sample, pages: &self.pages, writes: &self.writes })?;
        }
        Ok((at, sample))
    }
}

impl<S: EventSource, C: Clock> Drop for Observer<S, C> {
    fn drop(&mut self) {
        if let Some(mut arm) = self.arm.take() {
            let _ = arm.disarm();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::model::PageCount;
    use crate::port::ThreadEvents;
    use crate::track::Regime;

    /// One second passes at each look.
    #[derive(Default)]
    struct Ticks(AtomicU64);

    impl Clock for Ticks {
        fn now(&self) -> Duration {
            Duration::from_secs(self.0.fetch_add(1, Ordering::Relaxed))
        }

        fn sleep(&self, _: Duration) {}
    }

    /// Before each sample the guest writes pages 0 to 9; a page that is not protected makes no event.
    struct Guest {
        protected: Arc<Mutex<PageBitmap>>,
        events: u64,
        fails: bool,
    }

    impl EventSource for Guest {
        fn hooks(&self) -> &[EventHook] {
            &[]
        }

        fn empty_pages(&self) -> PageBitmap {
            PageBitmap::new(PageCount(100))
        }

        fn sample(&mut self, pages: &mut PageBitmap) -> Result<EventSample, EventSourceError> {
            if self.fails {
                return Err(EventSourceError("gone".to_owned()));
            }
            let mut protected = self.protected.lock().unwrap();
            for page in 0..10 {
                if protected.contains(page) {
                    protected.remove(page);
                    pages.insert(page);
                    self.events += 1;
                }
            }
            let thread = ThreadEvents { pages_made_writable: self.events, ..ThreadEvents::default() };
            Ok(EventSample { threads: [(1, thread)].into(), ..EventSample::default() })
        }

        fn armed(&mut self, _: bool) {}
    }

    struct Protect(Arc<Mutex<PageBitmap>>, Arc<Mutex<Vec<&'static str>>>, bool);

    impl Arm for Protect {
        fn arm(&mut self) -> Result<(), ArmError> {
            if self.2 {
                return Err(ArmError { action: "on", reason: "a migration uses it".to_owned() });
            }
            self.1.lock().unwrap().push("on");
            Ok(())
        }

        fn rearm(&mut self) -> Result<(), ArmError> {
            *self.0.lock().unwrap() = PageBitmap::full(PageCount(100));
            self.1.lock().unwrap().push("again");
            Ok(())
        }

        fn disarm(&mut self) -> Result<(), ArmError> {
            self.1.lock().unwrap().push("off");
            Ok(())
        }
    }

    fn guest() -> (Guest, Arc<Mutex<PageBitmap>>) {
        let protected = Arc::new(Mutex::new(PageBitmap::full(PageCount(100))));
        (Guest { protected: Arc::clone(&protected), events: 0, fails: false }, protected)
    }

    #[test]
    fn rewrites_are_seen_only_when_armed() {
        let (passive, _) = guest();
        let mut observer = Observer::start(passive, Ticks::default(), None).unwrap();
        let second = observer.measure(false).unwrap();
        assert_eq!((second.unique_pages, second.regime), (0, Regime::Passive));

        let (armed, protected) = guest();
        let calls = Arc::default();
        let arm = Protect(protected, Arc::clone(&calls), false);
        let mut observer = Observer::start(armed, Ticks::default(), Some(Box::new(arm))).unwrap();
        observer.measure(false).unwrap();
        let later = observer.measure(false).unwrap();
        assert_eq!((later.unique_pages, later.regime, later.interval_ns), (10, Regime::Armed, 1_000_000_000));
        observer.stop().unwrap();
        assert_eq!(*calls.lock().unwrap(), ["on", "again", "again", "off"]);
    }

    #[test]
    fn protection_ends_with_the_observation_however_that_ends() {
        let (mut failing, protected) = guest();
        failing.fails = true;
        let calls = Arc::default();
        let arm = Protect(Arc::clone(&protected), Arc::clone(&calls), false);
        assert!(matches!(
            Observer::start(failing, Ticks::default(), Some(Box::new(arm))),
            Err(ObserveError::Source(_))
        ));
        assert_eq!(*calls.lock().unwrap(), ["on", "off"]);

        let calls = Arc::default();
        let refusing = Protect(Arc::clone(&protected), Arc::clone(&calls), true);
        let started = Observer::start(guest().0, Ticks::default(), Some(Box::new(refusing)));
        assert!(matches!(started, Err(ObserveError::Arm(_))));
        assert!(calls.lock().unwrap().is_empty(), "another's log was switched off");
    }
}
