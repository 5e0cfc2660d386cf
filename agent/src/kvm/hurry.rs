//! Putting a thread in front of all others on its CPU for a moment: nobody else's work may lengthen a blackout. And the reverse: a process that has nothing more to
//! do than to take itself apart stands back, or it would lengthen what the VM's users see of the move where the VM runs now on the same CPUs, and of other VMs here.
//!
//! Owns the scheduling calls. A host that does not allow them (no CAP_SYS_NICE, a control group without real-time share) is
//! merely slower.

use std::sync::atomic::{AtomicBool, Ordering};

/// The lowest real-time priority is in front of every ordinary thread.
const PRIORITY: i32 = 1;
/// The least weight of an ordinary thread: about a seventieth of the usual one (`sched_prio_to_weight`, kernel/sched/core.c).
/// Not `SCHED_IDLE`, which has a fifth of that again: on a full host the end of the process would take long.
const LEAST_NICE: i32 = 19;

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
        // SAFETY: no argument, cannot fail.
        let thread = unsafe { libc::gettid() };
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

/// From now on everything that this process does is less urgent than the work of others: all of its threads, and those that they start.
pub fn stand_back() {
    STANDS_BACK.store(true, Ordering::SeqCst);
    let threads = std::fs::read_dir("/proc/self/task").into_iter().flatten().flatten();
    threads.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).for_each(set_back);
}

/// Puts a thread behind others, wherever it was.
fn set_back(thread: i32) {
    put_back(thread);
    // SAFETY: names a thread by its number; no pointer. One that has ended meanwhile is an error, which changes nothing.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, thread as libc::id_t, LEAST_NICE) };
}

/// Puts an ordinary thread in front; whether it was moved.
pub(super) fn put_in_front(thread: i32) -> bool {
    if STANDS_BACK.load(Ordering::SeqCst) {
        return false;
    }
    // SAFETY: asks for the policy of a thread by number; no pointer.
    let policy = unsafe { libc::sched_getscheduler(thread) };
    policy == libc::SCHED_OTHER && set_policy(thread, libc::SCHED_FIFO, PRIORITY)
}

/// Makes a thread ordinary again.
pub(super) fn put_back(thread: i32) {
    set_policy(thread, libc::SCHED_OTHER, 0);
}

fn set_policy(thread: i32, policy: i32, priority: i32) -> bool {
    let parameters = libc::sched_param { sched_priority: priority };
    // SAFETY: the parameters outlive the call.
    unsafe { libc::sched_setscheduler(thread, policy, &raw const parameters) == 0 }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy() -> i32 {
        // SAFETY: asks for the calling thread's policy; no pointer.
        unsafe { libc::sched_getscheduler(0) }
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

    /// One thread only: the process that runs the tests goes on.
    #[test]
    fn a_thread_that_was_in_front_is_behind_when_it_is_set_back() {
        let set_back = std::thread::spawn(|| {
            let hurry = Hurry::here();
            // SAFETY: no argument; then asks for the calling thread's own priority, no pointer.
            let (thread, nice) = unsafe { (libc::gettid(), || libc::getpriority(libc::PRIO_PROCESS, 0)) };
            set_back(thread);
            let behind = (policy(), nice());
            drop(hurry);
            (behind, policy(), nice())
        });
        let behind = (libc::SCHED_OTHER, LEAST_NICE);
        assert_eq!(set_back.join().unwrap(), (behind, behind.0, behind.1));
    }
}
