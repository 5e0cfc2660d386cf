//! Interval after interval, as commands report them: when one is over, and what ends the row of them.

use std::io;
use std::time::{Duration, Instant};

use super::interrupt::Interrupt;
use super::observe::Ended;

/// Intervals of one length, which do not drift with the time that reporting takes.
#[derive(Debug)]
pub(super) struct Intervals {
    interval: Duration,
    left: Option<u64>,
    deadline: Instant,
}

impl Intervals {
    /// `count` of them, or without end, from now on.
    pub(super) fn begin(interval: Duration, count: Option<u64>) -> Self {
        Self { interval, left: count, deadline: Instant::now() }
    }

    /// Waits for the end of the next one.
    ///
    /// # Errors
    /// There is none: all are done, or a signal has come.
    pub(super) fn wait(&mut self, interrupt: &Interrupt) -> Result<(), Ended> {
        if self.left == Some(0) {
            return Err(Ended::Counted);
        }
        self.left = self.left.map(|left| left - 1);
        // From the start of the last interval, not from now.
        self.deadline = (self.deadline + self.interval).max(Instant::now());
        if interrupt.wait_until(self.deadline) { Err(Ended::Interrupted) } else { Ok(()) }
    }
}

/// Whether printing goes on: what ended it is no failure where the reader has had enough.
///
/// # Errors
/// It could not be printed.
pub(super) fn printed(result: io::Result<()>) -> io::Result<Option<Ended>> {
    match result {
        Ok(()) => Ok(None),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(Some(Ended::NobodyReads)),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_are_counted_and_do_not_drift_and_a_signal_ends_them() {
        let (interrupt, wake) = Interrupt::by_hand().unwrap();
        let (each, began) = (Duration::from_millis(20), Instant::now());
        let mut intervals = Intervals::begin(each, Some(3));
        for _ in 0..3 {
            intervals.wait(&interrupt).unwrap();
        }
        assert!(began.elapsed() >= 3 * each);
        assert_eq!(intervals.wait(&interrupt), Err(Ended::Counted));
        drop(wake);
        assert_eq!(Intervals::begin(Duration::from_hours(1), None).wait(&interrupt), Err(Ended::Interrupted));
    }

    #[test]
    fn a_reader_that_has_gone_is_no_failure() {
        assert_eq!(printed(Ok(())).unwrap(), None);
        assert_eq!(printed(Err(io::ErrorKind::BrokenPipe.into())).unwrap(), Some(Ended::NobodyReads));
        assert!(printed(Err(io::ErrorKind::StorageFull.into())).is_err());
    }
}
