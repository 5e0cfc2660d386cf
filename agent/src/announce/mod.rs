//! Announcing where a VM lives: which frames, in which order, when.
//!
//! Policy: generic over [`crate::port::FramePort`] and [`crate::port::Clock`]; runs in tests with no network. Must not know
//! interfaces, bridges or namespaces. Blocking; one thread per announcement is the caller's business.
//!
//! The order around a hand-over, which the caller keeps: the source's egress is muted, then [`Announcer::first_round`]
//! at the target, then the guest's first instruction, then [`Announcer::repeat`] beside the running guest.

pub mod conflict;
pub mod diagnose;
pub mod directory;
pub mod frames;
pub mod heard;
pub mod learn;
pub mod pace;
pub mod schedule;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

pub use frames::{AddressError, Frame, FrameKind};
pub use schedule::{Schedule, ScheduleError};

use crate::model::{AnnounceRound, Station};
use crate::port::{Clock, FramePort};

/// How long a sleeping announcer may take to notice that it is cancelled.
const CANCEL_LATENCY: Duration = Duration::from_millis(10);

/// The frames of some stations and the times to send them. Frames are built once, before the blackout.
#[derive(Clone, Debug)]
pub struct Announcer {
    frames: Vec<Frame>,
    schedule: Schedule,
}

/// What the first round leaves behind for the later ones.
#[derive(Clone, Debug)]
pub struct FirstRound {
    /// What was sent.
    pub round: AnnounceRound,
    /// When it began, by the clock.
    pub began: Duration,
}

impl Announcer {
    /// Builds the frames of all `stations`.
    ///
    /// # Errors
    /// An address that no station can have (multicast, unspecified, loopback, broadcast).
    pub fn new(stations: &[Station], schedule: Schedule) -> Result<Self, AddressError> {
        let mut all = Vec::new();
        for station in stations {
            all.extend(frames::of_station(station)?);
        }
        Ok(Self { frames: all, schedule })
    }

    /// The frames of one round, in the order of sending.
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// Sends the first round at once: the call to make after the source is muted and before the guest's first instruction.
    /// Never fails as a whole: a refused frame is counted, and the others are still sent, unless `cancel` is set.
    pub fn first_round(&self, port: &mut dyn FramePort, clock: &dyn Clock, cancel: &AtomicBool) -> FirstRound {
        let began = clock.now();
        FirstRound { round: self.send_round(port, 0, Duration::ZERO, cancel), began }
    }

    /// Sends the remaining rounds at their times after `first`, telling `on_round` of each. Returns early, with `true`,
    /// when `cancel` is set. A round whose time has passed is sent at once.
    pub fn repeat(
        &self,
        first: &FirstRound,
        port: &mut dyn FramePort,
        clock: &dyn Clock,
        cancel: &AtomicBool,
        on_round: &mut dyn FnMut(&AnnounceRound),
    ) -> bool {
        for (round, offset) in (0u32..).zip(self.schedule.instants()).skip(1) {
            loop {
                if cancel.load(Ordering::Acquire) {
                    return true;
                }
                let left = (first.began + offset).saturating_sub(clock.now());
                if left.is_zero() {
                    break;
                }
                clock.sleep(left.min(CANCEL_LATENCY));
            }
            let after_first = clock.now().saturating_sub(first.began);
            let sent = self.send_round(port, round, after_first, cancel);
            on_round(&sent);
            if self.is_cut_short(&sent) {
                return true;
            }
        }
        self.is_cut_short(&first.round)
    }

    /// Whether a round was cancelled before its end.
    fn is_cut_short(&self, round: &AnnounceRound) -> bool {
        ((round.frames_sent + round.frames_failed) as usize) < self.frames.len()
    }

    fn send_round(
        &self,
        port: &mut dyn FramePort,
        round: u32,
        after_first: Duration,
        cancel: &AtomicBool,
    ) -> AnnounceRound {
        let mut result = AnnounceRound {
            round,
            after_first_ns: u64::try_from(after_first.as_nanos()).unwrap_or(u64::MAX),
            frames_sent: 0,
            frames_failed: 0,
            error: None,
        };
        for frame in &self.frames {
            // A round of many frames, each of which waits for its turn, takes long.
            if cancel.load(Ordering::Acquire) {
                break;
            }
            match port.send(frame.bytes()) {
                Ok(()) => result.frames_sent += 1,
                Err(_) if cancel.load(Ordering::Acquire) => break,
                Err(error) => {
                    result.frames_failed += 1;
                    result.error.get_or_insert_with(|| format!("{}: {error}", frame.kind()));
                }
            }
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::io;
    use std::sync::Mutex;

    use super::*;

    /// A clock that moves only when somebody sleeps.
    #[derive(Default)]
    struct FakeClock(Mutex<Duration>);

    impl Clock for FakeClock {
        fn now(&self) -> Duration {
            *self.0.lock().unwrap()
        }

        fn sleep(&self, duration: Duration) {
            assert!(!duration.is_zero(), "a sleep that makes no progress");
            *self.0.lock().unwrap() += duration;
        }
    }

    /// Remembers when each frame was sent; refuses those of the kinds given.
    struct FakePort<'a> {
        clock: &'a FakeClock,
        sent: Vec<(Duration, usize)>,
        refuse_length: Option<usize>,
    }

    impl FramePort for FakePort<'_> {
        fn send(&mut self, frame: &[u8]) -> io::Result<()> {
            if self.refuse_length == Some(frame.len()) {
                return Err(io::Error::from(io::ErrorKind::NetworkDown));
            }
            self.sent.push((self.clock.now(), frame.len()));
            Ok(())
        }
    }

    fn station() -> Station {
        "mac=02:00:00:00:00:01,ip=10.0.0.2,ip=fd00::2".parse().unwrap()
    }

    static NEVER: AtomicBool = AtomicBool::new(false);

    #[test]
    fn rounds_leave_at_the_times_of_qemu() {
        let clock = FakeClock::default();
        clock.sleep(Duration::from_secs(1000));
        let mut port = FakePort { clock: &clock, sent: Vec::new(), refuse_length: None };
        let announcer = Announcer::new(&[station()], Schedule::default()).unwrap();
        let first = announcer.first_round(&mut port, &clock, &NEVER);
        assert_eq!((port.sent.len(), first.round.frames_sent), (4, 4), "RARP, two ARP, one NA before the guest runs");
        let mut rounds = Vec::new();
        let cancelled = announcer.repeat(&first, &mut port, &clock, &NEVER, &mut |round| rounds.push(round.clone()));
        assert!(!cancelled);
        let times_ms: Vec<u128> = port.sent.chunks(4).map(|round| round[0].0.as_millis() - 1_000_000).collect();
        assert_eq!(times_ms, [0, 50, 200, 450, 800]);
        assert_eq!(rounds.iter().map(|r| r.round).collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert_eq!(rounds[3].after_first_ns, 800_000_000);
    }

    #[test]
    fn a_cancel_stops_the_repetition_before_the_next_round() {
        let clock = FakeClock::default();
        let mut port = FakePort { clock: &clock, sent: Vec::new(), refuse_length: None };
        let announcer = Announcer::new(&[station()], Schedule::default()).unwrap();
        let first = announcer.first_round(&mut port, &clock, &NEVER);
        let cancel = AtomicBool::new(false);
        let cancelled = announcer.repeat(&first, &mut port, &clock, &cancel, &mut |round| {
            cancel.store(round.round == 2, Ordering::Release);
        });
        assert!(cancelled);
        assert_eq!(port.sent.len(), 12);
        assert_eq!(clock.now(), Duration::from_millis(200), "it did not even wait for the next round");
    }

    #[test]
    fn a_late_round_leaves_at_once_and_a_refused_frame_stops_nothing() {
        let clock = FakeClock::default();
        let mut port = FakePort { clock: &clock, sent: Vec::new(), refuse_length: Some(86) };
        let announcer = Announcer::new(&[station()], Schedule::default()).unwrap();
        let first = announcer.first_round(&mut port, &clock, &NEVER);
        assert_eq!((first.round.frames_sent, first.round.frames_failed), (3, 1));
        assert!(first.round.error.as_ref().unwrap().starts_with("neighbour advertisement: "), "{first:?}");
        clock.sleep(Duration::from_millis(300));
        let times = RefCell::new(Vec::new());
        announcer.repeat(&first, &mut port, &clock, &NEVER, &mut |round| {
            times.borrow_mut().push(round.after_first_ns / 1_000_000);
        });
        assert_eq!(times.into_inner(), [300, 300, 450, 800]);
    }
}
