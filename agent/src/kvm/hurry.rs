//! Putting a thread in front of all others on its CPU for a moment: nobody else's work may lengthen a blackout.
//!
//! Owns the scheduling calls. A host that does not allow them (no CAP_SYS_NICE, a control group without real-time share) is
//! merely slower.

/// The lowest real-time priority is in front of every ordinary thread.
const PRIORITY: i32 = 1;

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

/// Puts an ordinary thread in front; whether it was moved.
pub(super) fn put_in_front(thread: i32) -> bool {
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
}
