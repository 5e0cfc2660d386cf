//! Whether the vCPUs run or stand, and why the machine ended.
//!
//! Owns the hand-over between whoever orders (pause, resume, stop) and the vCPU threads. Must not know KVM: the order
//! that takes a vCPU out of guest code is a [`Kick`].

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Takes one vCPU out of guest code, or keeps it from entering, until [`Kick::clear`].
pub(crate) trait Kick: Send + Sync {
    /// Its first moment, which begins soon, comes before other work on its CPU.
    fn hasten(&self) {}

    /// Called with the order already in place.
    fn kick(&self);

    /// Kicked, it has not come to stand: if it is one that [`Kick::kick`] does not put in front of other work, it is now, until [`Kick::relent`].
    fn press(&self) {}

    /// It is not any more.
    fn relent(&self) {}

    /// Called by the vCPU's own thread before it runs again.
    fn clear(&self);
}

/// How long a vCPU that may wait for a page is in front of other work at a time to come to stand, and how long it is not then. It takes microseconds. One that does wait cannot stand before the page
/// is there, and spins meanwhile: this keeps whoever brings the page from a CPU for no longer. Without it one that was preempted may have to wait for half a second on a full host.
const PRESSED: Duration = Duration::from_millis(1);
const RELENTED: Duration = Duration::from_millis(9);

/// Why a machine runs no more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MachineExit {
    /// The guest switched itself off.
    PowerOff,
    /// It was told to stop.
    Stopped,
    /// It cannot go on: triple fault, an exit that KVM cannot explain, a device that failed.
    Error(String),
}

/// What the vCPU threads are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Order {
    Stand,
    Run,
    Quit,
}

#[derive(Debug)]
struct State {
    order: Order,
    /// vCPUs that are in guest code or about to be.
    running: usize,
    /// The guest asked for a reset that has not been done.
    reset: bool,
    exit: Option<MachineExit>,
}

/// Shared by the machine and its vCPU threads.
pub(crate) struct RunControl {
    vcpus: Vec<Arc<dyn Kick>>,
    state: Mutex<State>,
    /// The order changed: for vCPU threads.
    ordered: Condvar,
    /// A vCPU came to stand, asked for a reset, or ended the machine: for those who wait on the vCPUs.
    reported: Condvar,
}

impl RunControl {
    /// All of `vcpus` stand.
    pub(crate) fn new(vcpus: Vec<Arc<dyn Kick>>) -> Self {
        Self {
            vcpus,
            state: Mutex::new(State { order: Order::Stand, running: 0, reset: false, exit: None }),
            ordered: Condvar::new(),
            reported: Condvar::new(),
        }
    }

    fn kick_all(&self) {
        self.vcpus.iter().for_each(|vcpu| vcpu.kick());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // No code under this lock can panic half-way through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// vCPU thread: waits for the order to run. False: quit.
    pub(crate) fn enter(&self, kick: &dyn Kick) -> bool {
        let mut state = self.lock();
        loop {
            match state.order {
                Order::Run => {
                    // Under the lock, so that a kick that belongs to a later order is not cleared.
                    kick.clear();
                    state.running += 1;
                    return true;
                }
                Order::Quit => return false,
                Order::Stand => {
                    state = self.ordered.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
            }
        }
    }

    /// vCPU thread, kicked and with nothing pending: whether it must stand. If not, the kick was for an order that has
    /// been withdrawn, and is cleared.
    pub(crate) fn must_stand(&self, kick: &dyn Kick) -> bool {
        let state = self.lock();
        if state.order == Order::Run {
            kick.clear();
        }
        state.order != Order::Run
    }

    /// vCPU thread, with nothing pending: stands still until then, or until `is_over` when it was woken. An order ends it at once.
    pub(crate) fn hold(&self, until: Instant, is_over: impl Fn() -> bool) {
        let mut state = self.lock();
        while state.order == Order::Run && !is_over() {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            state = self.ordered.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Has those who are held look whether they still must be.
    pub(crate) fn wake_held(&self) {
        // Under the lock, so that one that is about to wait does not miss it.
        drop(self.lock());
        self.ordered.notify_all();
    }

    /// vCPU thread: it stands now.
    pub(crate) fn left(&self) {
        self.lock().running -= 1;
        self.reported.notify_all();
    }

    /// vCPU thread: the guest asked for a reset. Everybody is to stand; somebody who waits in
    /// [`RunControl::wait_reset_or_exit`] does the rest.
    pub(crate) fn request_reset(&self) {
        let mut state = self.lock();
        state.reset = true;
        if state.order == Order::Run {
            state.order = Order::Stand;
        }
        drop(state);
        self.ordered.notify_all();
        self.kick_all();
        self.reported.notify_all();
    }

    /// Ends the machine, from any thread. The first reason stays.
    pub(crate) fn end(&self, exit: MachineExit) {
        let mut state = self.lock();
        state.exit.get_or_insert(exit);
        state.order = Order::Quit;
        drop(state);
        self.ordered.notify_all();
        self.kick_all();
        self.reported.notify_all();
    }

    /// Lets all vCPUs go for the first time. False if the machine has ended.
    pub(crate) fn start(&self) -> bool {
        self.vcpus.iter().for_each(|vcpu| vcpu.hasten());
        self.run()
    }

    /// Lets all vCPUs go. False if the machine has ended.
    pub(crate) fn run(&self) -> bool {
        let mut state = self.lock();
        if state.order == Order::Quit {
            return false;
        }
        state.order = Order::Run;
        drop(state);
        self.ordered.notify_all();
        true
    }

    /// Orders all vCPUs to stand, and does not wait for them: [`RunControl::stand`] follows.
    pub(crate) fn order_stand(&self) {
        let mut state = self.lock();
        if state.order == Order::Run {
            state.order = Order::Stand;
        }
        drop(state);
        self.ordered.notify_all();
        self.kick_all();
    }

    /// Orders all vCPUs to stand and returns when they do. The caller is in front of them if it is in front of other work.
    pub(crate) fn stand(&self) {
        let mut state = self.lock();
        if state.order == Order::Run {
            state.order = Order::Stand;
        }
        if state.running == 0 {
            return;
        }
        drop(state);
        // Whoever is held is not in guest code.
        self.ordered.notify_all();
        self.kick_all();
        loop {
            self.vcpus.iter().for_each(|vcpu| vcpu.press());
            let stand = self.stand_within(PRESSED);
            self.vcpus.iter().for_each(|vcpu| vcpu.relent());
            if stand || self.stand_within(RELENTED) {
                return;
            }
        }
    }

    /// Whether all vCPUs stand, waited for up to `limit`.
    fn stand_within(&self, limit: Duration) -> bool {
        let waited = self.reported.wait_timeout_while(self.lock(), limit, |state| state.running > 0);
        waited.unwrap_or_else(PoisonError::into_inner).0.running == 0
    }

    /// Takes the request for a reset, if there is one.
    pub(crate) fn take_reset(&self) -> bool {
        std::mem::take(&mut self.lock().reset)
    }

    /// Waits until the guest asks for a reset (`None`) or the machine ends.
    pub(crate) fn wait_reset_or_exit(&self) -> Option<MachineExit> {
        let mut state = self.lock();
        loop {
            if state.exit.is_some() || state.reset {
                return state.exit.clone();
            }
            state = self.reported.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until the machine has ended, at most `timeout`.
    pub(crate) fn wait_exit(&self, timeout: Duration) -> Option<MachineExit> {
        let state = self.lock();
        let (state, _) = self
            .reported
            .wait_timeout_while(state, timeout, |state| state.exit.is_none())
            .unwrap_or_else(PoisonError::into_inner);
        state.exit.clone()
    }

    /// How the machine ended, if it has.
    pub(crate) fn exit(&self) -> Option<MachineExit> {
        self.lock().exit.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

    /// A vCPU whose guest code spins until it is kicked.
    #[derive(Default)]
    struct Spinner {
        kicked: AtomicBool,
    }

    impl Kick for Spinner {
        fn kick(&self) {
            self.kicked.store(true, Ordering::SeqCst);
        }

        fn clear(&self) {
            self.kicked.store(false, Ordering::SeqCst);
        }
    }

    fn spin(control: &RunControl, vcpu: &Spinner) {
        while control.enter(vcpu) {
            while !(vcpu.kicked.load(Ordering::SeqCst) && control.must_stand(vcpu)) {
                std::thread::yield_now();
            }
            control.left();
        }
    }

    #[test]
    fn every_order_reaches_every_vcpu() {
        let vcpus: Vec<Arc<Spinner>> = (0..3).map(|_| Arc::default()).collect();
        let control = RunControl::new(vcpus.iter().map(|vcpu| vcpu.clone() as Arc<dyn Kick>).collect());
        std::thread::scope(|scope| {
            for vcpu in &vcpus {
                scope.spawn(|| spin(&control, vcpu));
            }
            for _ in 0..200 {
                assert!(control.run());
                control.stand();
                assert_eq!(control.lock().running, 0);
            }
            control.run();
            control.request_reset();
            assert_eq!(control.wait_reset_or_exit(), None);
            control.stand();
            assert!(control.take_reset() && !control.take_reset());
            assert_eq!(control.wait_exit(Duration::from_millis(1)), None);
            control.end(MachineExit::PowerOff);
            control.end(MachineExit::Stopped);
        });
        assert_eq!(control.wait_exit(Duration::ZERO), Some(MachineExit::PowerOff));
        assert!(!control.run());
    }

    /// A vCPU that comes to stand only when it has been pressed a few times.
    #[derive(Default)]
    struct Waiting {
        kicked: AtomicBool,
        pressed: AtomicBool,
        presses: AtomicU32,
    }

    impl Kick for Waiting {
        fn kick(&self) {
            self.kicked.store(true, Ordering::SeqCst);
        }

        fn press(&self) {
            assert!(self.kicked.load(Ordering::SeqCst) && !self.pressed.swap(true, Ordering::SeqCst));
            self.presses.fetch_add(1, Ordering::SeqCst);
        }

        fn relent(&self) {
            assert!(self.pressed.swap(false, Ordering::SeqCst));
        }

        fn clear(&self) {
            self.kicked.store(false, Ordering::SeqCst);
        }
    }

    #[test]
    fn one_that_does_not_come_is_pressed_in_turns_and_not_when_it_stands() {
        let vcpu = Arc::new(Waiting::default());
        let control = RunControl::new(vec![vcpu.clone()]);
        control.run();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert!(control.enter(vcpu.as_ref()));
                while vcpu.presses.load(Ordering::SeqCst) < 3 {
                    std::thread::yield_now();
                }
                control.left();
            });
            while control.lock().running == 0 {
                std::thread::yield_now();
            }
            control.stand();
        });
        assert!(vcpu.presses.load(Ordering::SeqCst) >= 3 && !vcpu.pressed.load(Ordering::SeqCst));
        let before = vcpu.presses.load(Ordering::SeqCst);
        control.stand();
        assert_eq!(vcpu.presses.load(Ordering::SeqCst), before);
    }

    #[test]
    fn standing_twice_waits_for_nobody() {
        let control = RunControl::new(Vec::new());
        let start = Instant::now();
        control.stand();
        control.stand();
        assert!(start.elapsed() < Duration::from_millis(100));
    }
}
