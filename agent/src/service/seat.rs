//! Who has the machine: one migration at a time, or one order of an operator.
//!
//! Owns the turn, not what is done in it. A manager that has brought the VM here keeps its turn until it has let the guest
//! run, and a tracker has it for some milliseconds; whoever comes just then is let in when that is over, instead of being sent away.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Whose turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holder {
    /// The manager that brings the VM here.
    Arrival,
    /// Who opens a window of write protection: for as long as that takes.
    Tracker,
    /// A manager that moves the VM away, or an operator's order.
    Other,
}

/// The one seat of a machine.
#[derive(Default)]
pub(super) struct Seat {
    holder: Mutex<Option<Holder>>,
    freed: Condvar,
}

/// The turn; it ends when this is dropped.
pub(super) struct Turn<'a>(&'a Seat);

impl Seat {
    fn holder(&self) -> MutexGuard<'_, Option<Holder>> {
        self.holder.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the arrival's turn, however long.
    pub(super) fn take_for_arrival(&self) -> Turn<'_> {
        let free = self.freed.wait_while(self.holder(), |holder| holder.is_some());
        *free.unwrap_or_else(PoisonError::into_inner) = Some(Holder::Arrival);
        Turn(self)
    }

    /// A turn for a tracker, as [`Seat::take`].
    pub(super) fn take_for_tracking(&self, patience: Duration) -> Option<Turn<'_>> {
        self.take_as(Holder::Tracker, patience)
    }

    /// A turn for anybody else; `None` if it is someone's. An arrival's, and a tracker's, is waited for, up to `patience`.
    pub(super) fn take(&self, patience: Duration) -> Option<Turn<'_>> {
        self.take_as(Holder::Other, patience)
    }

    fn take_as(&self, who: Holder, patience: Duration) -> Option<Turn<'_>> {
        let passing = |holder: &mut Option<Holder>| matches!(holder, Some(Holder::Arrival | Holder::Tracker));
        let waited = self.freed.wait_timeout_while(self.holder(), patience, passing);
        let mut holder = waited.unwrap_or_else(PoisonError::into_inner).0;
        if holder.is_some() {
            return None;
        }
        *holder = Some(who);
        Some(Turn(self))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.holder() = None;
        self.0.freed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn only_an_arrival_and_a_tracker_are_waited_for() {
        let seat = Seat::default();
        let turn = seat.take(LONG).unwrap();
        assert!(seat.take(LONG).is_none() && seat.take_for_tracking(LONG).is_none());
        drop(turn);
        let ways: [for<'a> fn(&'a Seat) -> Turn<'a>; 2] =
            [|seat| seat.take_for_arrival(), |seat| seat.take_for_tracking(LONG).unwrap()];
        for passing in ways {
            let turn = passing(&seat);
            assert!(seat.take(Duration::ZERO).is_none());
            std::thread::scope(|scope| {
                let next = scope.spawn(|| seat.take(LONG).is_some());
                drop(turn);
                assert!(next.join().unwrap());
            });
        }
    }
}
