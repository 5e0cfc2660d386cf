//! Time as policy sees it: monotonic, and able to be simulated.

use std::time::Duration;

/// A monotonic clock.
pub trait Clock: Send + Sync {
    /// Time since some fixed start.
    fn now(&self) -> Duration;

    /// Waits. Only for pacing and repeated announcements, never in place of an event.
    fn sleep(&self, duration: Duration);
}
