//! The rounds of announcements that follow the first one, sent while the guest runs: where it has arrived, and where it runs again after a migration that failed.
//!
//! Owns their times and their pace. The first round, which leaves before the guest's first instruction, is whoever lets it run.

use std::fmt::Display;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::pacing::Pacer;
use crate::announce::pace::Urgency;
use crate::port::Clock;

/// How long a wait may take to notice that it is cancelled.
const CANCEL_LATENCY: Duration = Duration::from_millis(10);

/// What was sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sent {
    /// Rounds.
    pub(super) rounds: u32,
    /// Their frames.
    pub(super) frames: u32,
}

/// Has `announce` send a round at each of `instants` from now, until that fails or `cancel` is set; it returns the frames of a round.
pub(super) fn repeat<E: Display>(
    instants: impl IntoIterator<Item = Duration>,
    pacer: &Pacer,
    clock: &dyn Clock,
    cancel: &AtomicBool,
    mut announce: impl FnMut() -> Result<u32, E>,
) -> Sent {
    let began = clock.now();
    let mut sent = Sent::default();
    for instant in instants {
        loop {
            if cancel.load(Ordering::Acquire) {
                return sent;
            }
            let left = (began + instant).saturating_sub(clock.now());
            if left.is_zero() {
                break;
            }
            clock.sleep(left.min(CANCEL_LATENCY));
        }
        if !pacer.wait(1, Urgency::Later, clock, cancel) {
            return sent;
        }
        match announce() {
            Ok(frames) => {
                // How many frames a round has is known only now: the rest of it, and the first round, are paid for afterwards.
                let unpaid_rounds = if sent.rounds == 0 { 2 } else { 1 };
                pacer.charge((frames * unpaid_rounds).saturating_sub(1), clock);
                sent.rounds += 1;
                sent.frames += frames;
            }
            Err(error) => {
                tracing::debug!("announcing ended: {error}");
                return sent;
            }
        }
    }
    sent
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::announce::Schedule;

    /// A clock that moves only when somebody sleeps.
    #[derive(Default)]
    struct FakeClock(Mutex<Duration>);

    impl Clock for FakeClock {
        fn now(&self) -> Duration {
            *self.0.lock().unwrap()
        }

        fn sleep(&self, duration: Duration) {
            *self.0.lock().unwrap() += duration;
        }
    }

    #[test]
    fn rounds_leave_when_they_are_due_until_the_vm_is_gone_or_nobody_wants_them() {
        let folder = tempfile::tempdir().unwrap();
        let pacer = Pacer::join(folder.path(), None);
        let instants = || Schedule::default().instants().skip(1);
        let (clock, cancel) = (FakeClock::default(), AtomicBool::new(false));
        let mut at_ms = Vec::new();
        let sent = repeat(instants(), &pacer, &clock, &cancel, || {
            at_ms.push(clock.now().as_millis());
            Ok::<_, String>(4)
        });
        assert_eq!((at_ms, sent), (vec![50, 200, 450, 800], Sent { rounds: 4, frames: 16 }));
        let mut left = 2;
        let sent = repeat(instants(), &pacer, &clock, &cancel, || {
            left -= 1;
            if left == 0 { Err("the VM is not here") } else { Ok(4) }
        });
        assert_eq!(sent, Sent { rounds: 1, frames: 4 });
        let sent = repeat(instants(), &pacer, &clock, &cancel, || {
            cancel.store(true, Ordering::Release);
            Ok::<_, String>(4)
        });
        assert_eq!(sent.rounds, 1);
    }
}
