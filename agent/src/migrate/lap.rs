//! Measures phase after phase, for the blackout ledger of either side.

use std::time::Duration;

use crate::port::Clock;

/// Where the phase being measured began.
pub(super) struct Lap<'a> {
    clock: &'a dyn Clock,
    last: Duration,
}

impl<'a> Lap<'a> {
    /// The first phase began at `start`, by `clock`.
    pub(super) fn since(clock: &'a dyn Clock, start: Duration) -> Self {
        Self { clock, last: start }
    }

    /// Ends a phase and begins the next; the time that it took.
    pub(super) fn next(&mut self) -> Duration {
        let now = self.clock.now();
        let phase = now.saturating_sub(self.last);
        self.last = now;
        phase
    }
}
