//! Putting a thread in front of all others on its CPU for a moment: nobody else's work may lengthen a blackout. A process that has nothing more to
//! do than to take itself apart hurries no more.
//!
//! Owns the scheduling calls. A host that does not allow them (no CAP_SYS_NICE, a control group without real-time share) is
//! merely slower.

use std::cell::RefCell;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::port::Place;

/// The lowest real-time priorities are in front of every ordinary thread: first that of vCPUs, then that of all who have to do with them. What a vCPU waits for is never behind it.
const VCPU_PRIORITY: i32 = 1;
const PRIORITY: i32 = 2;

/// This process stands back: none of its threads is put in front any more.
static STANDS_BACK: AtomicBool = AtomicBool::new(false);

/// The calling thread is in front until this is dropped.
#[derive(Debug)]
pub struct Hurry {
    /// The thread, if it was moved.
    thread: Option<i32>,
    /// Dropped where it was made.
    _here: std::marker::PhantomData<*const ()>,
}

impl Hurry {
    /// Puts the calling thread in front. One that has a policy of its own keeps it.
    pub fn here() -> Self {
        let thread = this_thread();
        Self { thread: put_in_front(thread).then_some(thread), _here: std::marker::PhantomData }
    }
}

impl Drop for Hurry {
    fn drop(&mut self) {
        if let Some(thread) = self.thread {
            put_back(thread);
        }
    }
}

thread_local! {
    /// The calling thread was told to stand in front.
    static IN_FRONT: RefCell<Option<Hurry>> = const { RefCell::new(None) };
}

/// Puts the calling thread there, until it is put elsewhere or ends. Nothing is done where it stands there already.
pub fn stand(place: Place) {
    match place {
        Place::InFront => IN_FRONT.with_borrow_mut(|hurry| {
            hurry.get_or_insert_with(Hurry::here);
        }),
        Place::Among => drop(IN_FRONT.take()),
    }
}

/// From now on no thread of this process is in front of others, and none is put there. Not behind them either: on a full host a process that gives way to all (nice 19) ends tens of times
/// later.
pub fn stand_back() {
    STANDS_BACK.store(true, Ordering::SeqCst);
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    threads.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).for_each(put_back);
}

/// The calling thread's number.
pub(super) fn this_thread() -> i32 {
    rustix::thread::gettid().as_raw_nonzero().get()
}

/// Puts an ordinary thread in front; whether it was moved.
pub(super) fn put_in_front(thread: i32) -> bool {
    put_at(thread, PRIORITY)
}

/// The same for the thread of a vCPU, which stays behind those that [`put_in_front`] has moved.
pub(super) fn put_vcpu_in_front(thread: i32) -> bool {
    put_at(thread, VCPU_PRIORITY)
}

fn put_at(thread: i32, priority: i32) -> bool {
    if STANDS_BACK.load(Ordering::SeqCst) {
        return false;
    }
    // Threads that it starts meanwhile are ordinary ones.
    policy_of(thread) == libc::SCHED_OTHER && set_policy(thread, libc::SCHED_FIFO | libc::SCHED_RESET_ON_FORK, priority)
}

/// Makes a thread ordinary again.
pub(super) fn put_back(thread: i32) {
    set_policy(thread, libc::SCHED_OTHER, 0);
}

/// A thread's policy; 0 is the calling one.
pub(super) fn policy_of(thread: i32) -> i32 {
    // SAFETY: asks for the policy of a thread by number; no pointer.
    let policy = unsafe { libc::sched_getscheduler(thread) };
    if policy < 0 { policy } else { policy & !libc::SCHED_RESET_ON_FORK }
}

fn set_policy(thread: i32, policy: i32, priority: i32) -> bool {
    let parameters = libc::sched_param { sched_priority: priority };
    // SAFETY: the parameters outlive the call.
    unsafe { libc::sched_setscheduler(thread, policy, &raw const parameters) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::testing::policy_in_front;

    fn policy() -> i32 {
        policy_of(0)
    }

    #[test]
    fn a_thread_is_ordinary_again_afterwards() {
        {
            let outer = Hurry::here();
            let expected = if outer.thread.is_some() { libc::SCHED_FIFO } else { libc::SCHED_OTHER };
            // The inner one finds the thread moved already and leaves it to the outer one.
            drop(Hurry::here());
            assert_eq!(policy(), expected);
        }
        assert_eq!(policy(), libc::SCHED_OTHER);
    }

    #[test]
    fn what_a_thread_in_front_starts_is_ordinary() {
        let hurry = Hurry::here();
        assert_eq!(std::thread::spawn(policy).join().unwrap(), libc::SCHED_OTHER);
        drop(hurry);
        assert_eq!(policy(), libc::SCHED_OTHER);
    }

    #[test]
    fn a_thread_stands_where_it_is_told() {
        std::thread::spawn(|| {
            let foremost = policy_in_front();
            stand(Place::InFront);
            stand(Place::InFront);
            assert_eq!(policy(), foremost);
            stand(Place::Among);
            assert_eq!(policy(), libc::SCHED_OTHER);
        })
        .join()
        .unwrap();
    }

    /// One that is in front by somebody else's will is not put elsewhere.
    #[test]
    fn what_another_has_put_in_front_stays_there() {
        let hurry = Hurry::here();
        let before = policy();
        stand(Place::Among);
        assert_eq!(policy(), before);
        drop(hurry);
    }

    /// Others in this process are merely slower afterwards.
    #[test]
    fn a_process_that_stands_back_has_no_thread_in_front_any_more() {
        let (tell, told) = std::sync::mpsc::channel();
        let (stop, stopped) = std::sync::mpsc::channel::<()>();
        let other = std::thread::spawn(move || {
            let hurry = Hurry::here();
            tell.send(policy()).unwrap();
            stopped.recv().unwrap_err();
            let after = policy();
            drop(hurry);
            after
        });
        let before = told.recv().unwrap();
        assert!([libc::SCHED_FIFO, libc::SCHED_OTHER].contains(&before));
        stand_back();
        drop(stop);
        assert_eq!(other.join().unwrap(), libc::SCHED_OTHER);
        let hurry = Hurry::here();
        assert!(hurry.thread.is_none() && policy() == libc::SCHED_OTHER);
    }
}
