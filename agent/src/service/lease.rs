//! A right that ends by itself: its holder must keep prolonging it, so the holder's death needs no notice.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The right. Held by nobody at first.
#[derive(Debug, Default)]
pub struct Lease {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    end: Option<Instant>,
    /// A thread waits for the end.
    watched: bool,
}

impl Lease {
    /// Grants or prolongs it. `ended` runs once, on a thread of its own, if it is neither prolonged nor given up in time; of
    /// several, the one that was given when nobody held the lease.
    ///
    /// # Errors
    /// The thread cannot be started; nothing is granted.
    pub fn grant(self: &Arc<Self>, time: Duration, ended: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let mut state = self.lock();
        if !state.watched {
            let lease = Arc::clone(self);
            std::thread::Builder::new().name("lease".into()).spawn(move || {
                if lease.watch() {
                    ended();
                }
            })?;
            state.watched = true;
        }
        state.end = Some(Instant::now() + time);
        self.changed.notify_all();
        Ok(())
    }

    /// Ends it in good order: nothing runs.
    pub fn give_up(&self) {
        self.lock().end = None;
        self.changed.notify_all();
    }

    /// Whether somebody holds it.
    pub fn is_held(&self) -> bool {
        self.lock().end.is_some()
    }

    /// Waits for the end; true if it came by itself.
    fn watch(&self) -> bool {
        let mut state = self.lock();
        loop {
            let left = state.end.map(|end| end.saturating_duration_since(Instant::now()));
            match left {
                Some(left) if !left.is_zero() => {
                    state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
                }
                over => {
                    *state = State::default();
                    return over.is_some();
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn it_ends_by_itself_unless_prolonged_or_given_up() {
        let (tell, ended) = channel();
        let lease = Arc::new(Lease::default());
        let grant = |name: &'static str, time| {
            let tell = tell.clone();
            lease.grant(time, move || tell.send(name).unwrap()).unwrap();
        };
        grant("given up", Duration::from_secs(60));
        lease.give_up();
        assert!(!lease.is_held());
        while lease.lock().watched {
            std::thread::yield_now();
        }
        let start = Instant::now();
        grant("first", Duration::from_millis(20));
        grant("prolonged", Duration::from_millis(200));
        assert_eq!(ended.recv(), Ok("first"));
        assert!(start.elapsed() >= Duration::from_millis(200) && !lease.is_held());
        grant("later", Duration::from_millis(1));
        assert_eq!(ended.recv(), Ok("later"));
    }
}
