//! Who has the machine: one migration at a time, or one order of an operator.
//!
//! Owns the turn, not what is done in it. A manager that has brought the VM here keeps its turn until it has let the guest
//! run; whoever comes just then is let in when it has, instead of being sent away.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Whose turn it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Holder {
    /// The manager that brings the VM here.
    Arrival,
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

    /// A turn for anybody else; `None` if it is someone's. An arrival's is waited for, up to `patience`.
    pub(super) fn take(&self, patience: Duration) -> Option<Turn<'_>> {
        let arriving = |holder: &mut Option<Holder>| *holder == Some(Holder::Arrival);
        let waited = self.freed.wait_timeout_while(self.holder(), patience, arriving);
        let mut holder = waited.unwrap_or_else(PoisonError::into_inner).0;
        if holder.is_some() {
            return None;
        }
        *holder = Some(Holder::Other);
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
    fn only_an_arrival_is_waited_for() {
        let seat = Seat::default();
        let turn = seat.take(LONG).unwrap();
        assert!(seat.take(LONG).is_none());
        drop(turn);
        let arrival = seat.take_for_arrival();
        assert!(seat.take(Duration::ZERO).is_none());
        std::thread::scope(|scope| {
            let next = scope.spawn(|| seat.take(LONG).is_some());
            drop(arrival);
            assert!(next.join().unwrap());
        });
    }
}
