//! A device's one thread: it sleeps until there is something to serve, and stands still when told to.
//!
//! Owns the protocol of standing and going on. Must not know queues or guests: what it runs is a closure. A plain thread
//! with blocking I/O (data plane).

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::mmio::Served;
use crate::kvm::hurry;

/// How long a worker that goes on after it stood is in front of ordinary threads: what came meanwhile is behind as it is, and its passes are short. On a full host an ordinary thread
/// that is woken beside a vCPU has its turn milliseconds later.
const CATCHES_UP: Duration = Duration::from_millis(1);

/// What the worker runs.
pub(super) trait Job: Send {
    /// One bounded pass; returns early when `hold` says so.
    fn serve(&mut self, hold: &dyn Fn() -> bool) -> Served;
}

/// The thread is gone: it panicked.
#[derive(Debug, thiserror::Error)]
#[error("its thread died")]
pub(super) struct WorkerGone;

/// A worker; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Worker {
    control: Arc<Control>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Control {
    state: Mutex<State>,
    changed: Condvar,
    /// Held during a pass. Whoever sets `hold` and then gets this lock once knows that no pass runs or will begin: so a
    /// worker that sleeps need not be woken to stand.
    pass: Mutex<()>,
    /// Whether `state` wants anything but running.
    hold: AtomicBool,
    /// Ends the worker's sleep.
    wake: EventFd,
    /// The thread's number, once it runs.
    thread: AtomicI32,
}

#[derive(Debug)]
struct State {
    wanted: Wanted,
    gone: bool,
    /// It is in front of others until then.
    in_front_until: Option<Instant>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wanted {
    Stand,
    Run,
    End,
}

impl Worker {
    /// A worker that stands. It sleeps on `signals` and, as the job asks, on `watched`.
    ///
    /// # Errors
    /// No thread or descriptor is left.
    pub(super) fn spawn(
        name: &str,
        signals: Vec<EventFd>,
        watched: Option<OwnedFd>,
        mut job: impl Job + 'static,
    ) -> io::Result<Self> {
        let control = Arc::new(Control {
            state: Mutex::new(State { wanted: Wanted::Stand, gone: false, in_front_until: None }),
            changed: Condvar::new(),
            pass: Mutex::new(()),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            hold: AtomicBool::new(true),
            thread: AtomicI32::new(0),
        });
        let shared = control.clone();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let _farewell = Farewell(&shared);
            shared.thread.store(hurry::this_thread(), Ordering::Release);
            shared.run(&signals, watched, &mut job);
        })?;
        Ok(Self { control, thread: Some(thread) })
    }

    /// No piece of work begins any more; one that is under way ends by itself.
    pub(super) fn order_pause(&self) {
        self.control.want(Wanted::Stand);
    }

    /// Returns when no pass runs, and none begins until [`Worker::resume`].
    ///
    /// # Errors
    /// The thread died; it touches nothing either.
    pub(super) fn pause(&self) -> Result<(), WorkerGone> {
        self.control.want(Wanted::Stand);
        let pass = self.control.pass.lock();
        if pass.is_err() || self.control.state().gone { Err(WorkerGone) } else { Ok(()) }
    }

    /// Goes on with a pass over everything.
    ///
    /// # Errors
    /// The thread died.
    pub(super) fn resume(&self) -> Result<(), WorkerGone> {
        self.control.want(Wanted::Run);
        if self.control.state().gone { Err(WorkerGone) } else { Ok(()) }
    }

    /// Whether it was last told to stand.
    pub(super) fn is_paused(&self) -> bool {
        self.control.state().wanted == Wanted::Stand
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.control.want(Wanted::End);
        if let Some(thread) = self.thread.take() {
            // A panic was reported when it happened.
            let _ = thread.join();
        }
    }
}

impl Control {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn want(&self, wanted: Wanted) {
        let mut state = self.state();
        let thread = self.thread.load(Ordering::Acquire);
        if (state.wanted, wanted) == (Wanted::Stand, Wanted::Run) && thread != 0 && hurry::put_in_front(thread) {
            state.in_front_until = Some(Instant::now() + CATCHES_UP);
        }
        state.wanted = wanted;
        self.hold.store(wanted != Wanted::Run, Ordering::Release);
        drop(state);
        if wanted != Wanted::Stand {
            self.changed.notify_all();
            // Fails only when the counter is full, and then the worker is woken anyway.
            let _ = self.wake.write(1);
        }
    }

    /// Waits until running is wanted. False if the end is.
    fn may_run(&self) -> bool {
        let stand = |state: &mut State| state.wanted == Wanted::Stand;
        let mut state = self.changed.wait_while(self.state(), stand).unwrap_or_else(PoisonError::into_inner);
        if state.in_front_until.take_if(|until| *until <= Instant::now()).is_some() {
            hurry::put_back(self.thread.load(Ordering::Acquire));
        }
        state.wanted == Wanted::Run
    }

    /// How long the worker may sleep: one that is in front of others does not stay there.
    fn sleep_limit(&self) -> Option<Timespec> {
        let left = self.state().in_front_until?.saturating_duration_since(Instant::now());
        Timespec::try_from(left).ok()
    }

    fn run(&self, signals: &[EventFd], watched: Option<OwnedFd>, job: &mut impl Job) {
        let mut watched = watched;
        let hold = || self.hold.load(Ordering::Acquire);
        while self.may_run() {
            let pass = self.pass.lock();
            if hold() {
                continue;
            }
            let served = job.serve(&hold);
            drop(pass);
            if served.more || hold() {
                continue;
            }
            let mut interest = PollFlags::empty();
            interest.set(PollFlags::IN, served.readable);
            interest.set(PollFlags::OUT, served.writable);
            let mut fds = vec![sleep_on(&self.wake)];
            fds.extend(signals.iter().map(sleep_on));
            if let Some(watched) = watched.as_ref().filter(|_| !interest.is_empty()) {
                fds.push(PollFd::new(watched, interest));
            }
            // An interrupted sleep is one more pass.
            let _ = poll(&mut fds, self.sleep_limit().as_ref());
            let broken = PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL;
            let lost = fds.get(1 + signals.len()).is_some_and(|fd| fd.revents().intersects(broken));
            if lost {
                // It would end every sleep from now on.
                watched = None;
            }
            // Emptied before the pass: what is signalled during it is seen after it.
            for signal in std::iter::once(&self.wake).chain(signals) {
                let _ = signal.read();
            }
        }
    }
}

fn sleep_on(signal: &EventFd) -> PollFd<'_> {
    // SAFETY: the descriptor is open for as long as `signal` is borrowed.
    let descriptor = unsafe { BorrowedFd::borrow_raw(signal.as_raw_fd()) };
    PollFd::from_borrowed_fd(descriptor, PollFlags::IN)
}

/// Says that the thread is gone, however it went.
struct Farewell<'a>(&'a Control);

impl Drop for Farewell<'_> {
    fn drop(&mut self) {
        self.0.state().gone = true;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU32;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::kvm::testing::policy_in_front;

    struct Busy {
        passes: Arc<AtomicU32>,
        inside: Arc<AtomicBool>,
        more: bool,
    }

    impl Job for Busy {
        fn serve(&mut self, _: &dyn Fn() -> bool) -> Served {
            self.inside.store(true, Ordering::SeqCst);
            self.passes.fetch_add(1, Ordering::SeqCst);
            std::thread::sleep(Duration::from_micros(20));
            assert!(self.passes.load(Ordering::SeqCst) < 100_000, "endless");
            self.inside.store(false, Ordering::SeqCst);
            Served { more: self.more, ..Served::default() }
        }
    }

    #[test]
    fn nothing_runs_between_pause_and_resume() {
        let (passes, inside) = (Arc::default(), Arc::default());
        let job = Busy { passes: Arc::clone(&passes), inside: Arc::clone(&inside), more: true };
        let worker = Worker::spawn("busy", vec![], None, job).unwrap();
        worker.pause().unwrap();
        assert_eq!(passes.load(Ordering::SeqCst), 0, "a new worker stands");
        let mut longest = Duration::ZERO;
        for _ in 0..50 {
            let before = passes.load(Ordering::SeqCst);
            worker.resume().unwrap();
            while passes.load(Ordering::SeqCst) == before {
                std::hint::spin_loop();
            }
            let start = Instant::now();
            worker.pause().unwrap();
            longest = longest.max(start.elapsed());
            assert!(!inside.load(Ordering::SeqCst), "it stands inside a pass");
            let stood = passes.load(Ordering::SeqCst);
            std::thread::sleep(Duration::from_micros(500));
            assert_eq!(passes.load(Ordering::SeqCst), stood);
            worker.pause().unwrap();
        }
        assert!(longest < Duration::from_millis(500), "a pause took {longest:?}");
        // Pauses that meet the worker anywhere between waking and its first pass.
        for spins in 0..3000 {
            worker.resume().unwrap();
            (0..spins % 300 * 20).for_each(|_| std::hint::spin_loop());
            worker.pause().unwrap();
            let stood = passes.load(Ordering::SeqCst);
            assert!(!inside.load(Ordering::SeqCst), "it stands inside a pass");
            (0..500).for_each(|_| std::hint::spin_loop());
            assert_eq!(passes.load(Ordering::SeqCst), stood, "a pass began after the pause");
        }
    }

    #[test]
    fn a_signal_wakes_it_and_silence_lets_it_sleep() {
        let (passes, inside) = (Arc::default(), Arc::default());
        let job = Busy { passes: Arc::clone(&passes), inside, more: false };
        let signal = EventFd::new(EFD_NONBLOCK).unwrap();
        let worker = Worker::spawn("idle", vec![signal.try_clone().unwrap()], None, job).unwrap();
        worker.resume().unwrap();
        let wait_for = |count| {
            let deadline = Instant::now() + Duration::from_secs(5);
            while passes.load(Ordering::SeqCst) < count {
                assert!(Instant::now() < deadline, "pass {count} never came");
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        wait_for(1);
        std::thread::sleep(Duration::from_millis(20));
        let asleep = passes.load(Ordering::SeqCst);
        assert!(asleep <= 2, "{asleep} passes with nothing to do");
        signal.write(1).unwrap();
        wait_for(asleep + 1);
    }

    #[test]
    fn one_that_goes_on_is_in_front_until_it_has_caught_up() {
        let in_front = policy_in_front();
        let (passes, inside) = (Arc::new(AtomicU32::new(0)), Arc::default());
        let worker =
            Worker::spawn("front", vec![], None, Busy { passes: passes.clone(), inside, more: false }).unwrap();
        worker.resume().unwrap();
        while passes.load(Ordering::SeqCst) == 0 {
            std::thread::yield_now();
        }
        let thread = worker.control.thread.load(Ordering::SeqCst);
        let until_ordinary = || {
            let deadline = Instant::now() + Duration::from_secs(5);
            while hurry::policy_of(thread) != libc::SCHED_OTHER {
                assert!(Instant::now() < deadline, "it stays in front");
                std::thread::yield_now();
            }
        };
        until_ordinary();
        worker.pause().unwrap();
        // The lock keeps it from finding its time over before it was looked at.
        let pass = worker.control.pass.lock().unwrap();
        worker.resume().unwrap();
        assert_eq!(hurry::policy_of(thread), in_front);
        drop(pass);
        // With nothing to do it wakes by itself to stand back.
        until_ordinary();
    }

    #[test]
    fn a_watched_descriptor_that_is_dead_does_not_keep_it_awake() {
        struct Reader(Arc<AtomicU32>);

        impl Job for Reader {
            fn serve(&mut self, _: &dyn Fn() -> bool) -> Served {
                self.0.fetch_add(1, Ordering::SeqCst);
                Served { readable: true, ..Served::default() }
            }
        }

        let passes = Arc::new(AtomicU32::new(0));
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let worker = Worker::spawn("reader", vec![], Some(reader), Reader(passes.clone())).unwrap();
        worker.resume().unwrap();
        drop(writer);
        while passes.load(Ordering::SeqCst) == 0 {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_millis(50));
        let count = passes.load(Ordering::SeqCst);
        assert!(count < 5, "{count} passes");
    }

    struct Bomb;

    impl Job for Bomb {
        fn serve(&mut self, _: &dyn Fn() -> bool) -> Served {
            panic!("expected in this test")
        }
    }

    #[test]
    fn a_dead_thread_does_not_hang_a_pause() {
        let worker = Worker::spawn("bomb", vec![], None, Bomb).unwrap();
        worker.resume().ok();
        while !worker.control.state().gone {
            std::thread::yield_now();
        }
        assert!(worker.pause().is_err());
        assert!(worker.resume().is_err());
    }
}
