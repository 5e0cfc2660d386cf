//! Windows of write protection, one at a time, on a thread of their own: a VM's process that does not answer holds up no other figure.

use std::sync::PoisonError;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::tracked::{Key, SharedCounters};
use crate::port::Arm;
use crate::service::interrupt::{Interrupt, Wake};
use crate::service::inventory::HostVm;
use crate::service::profile::{ProfileError, Single, single};

/// One window to open.
pub(super) struct Job {
    /// Whose it is.
    pub(super) key: Key,
    /// The VM.
    pub(super) vm: HostVm,
    /// Its counters.
    pub(super) counters: SharedCounters,
    /// What protects it.
    pub(super) arm: Box<dyn Arm>,
    /// Whether writes are attributed to address spaces and code meanwhile.
    pub(super) attribute: bool,
    /// How long.
    pub(super) window: Duration,
}

/// The thread. Dropping it ends a window that is open.
pub(super) struct Windows {
    jobs: Option<Sender<Job>>,
    done: Receiver<(Key, Result<Single, String>)>,
    wake: Option<Wake>,
    thread: Option<JoinHandle<()>>,
    open: bool,
}

impl Windows {
    /// Starts the thread.
    pub(super) fn start() -> std::io::Result<Self> {
        let (jobs, todo) = channel::<Job>();
        let (answer, done) = channel();
        let (interrupt, wake) = Interrupt::by_hand()?;
        let thread = std::thread::Builder::new().name("windows".into()).spawn(move || {
            let mut fault_cost = None;
            for job in todo {
                let key = job.key;
                let outcome = open(job, &mut fault_cost, &interrupt).map_err(|error| error.to_string());
                if answer.send((key, outcome)).is_err() {
                    break;
                }
            }
        })?;
        Ok(Self { jobs: Some(jobs), done, wake: Some(wake), thread: Some(thread), open: false })
    }

    /// Whether one is open.
    pub(super) fn is_open(&self) -> bool {
        self.open
    }

    /// Opens one.
    pub(super) fn open(&mut self, job: Job) {
        self.open = self.jobs.as_ref().is_some_and(|jobs| jobs.send(job).is_ok());
    }

    /// What the last one showed, once, when it is closed.
    pub(super) fn closed(&mut self) -> Option<(Key, Result<Single, String>)> {
        let closed = self.done.try_recv().ok()?;
        self.open = false;
        Some(closed)
    }
}

impl Drop for Windows {
    fn drop(&mut self) {
        self.jobs = None;
        self.wake = None;
        if let Some(thread) = self.thread.take() {
            // It has already said why, if it panicked.
            let _ = thread.join();
        }
    }
}

fn open(job: Job, fault_cost: &mut Option<Duration>, interrupt: &Interrupt) -> Result<Single, ProfileError> {
    let Job { vm, counters, arm, attribute, window, .. } = job;
    let fault_cost = match fault_cost {
        Some(known) => *known,
        unknown => *unknown.insert(crate::trial::kvm::fault_cost().map_err(ProfileError::FaultCost)?),
    };
    if interrupt.wait_until(Instant::now()) {
        return Err(ProfileError::Interrupted);
    }
    // Held until it is closed: whoever looks meanwhile sees that it is open.
    let mut counters = counters.lock().unwrap_or_else(PoisonError::into_inner);
    counters.probes().attribute(attribute);
    let shown = single(&vm, &mut counters, arm, window, fault_cost, interrupt);
    counters.probes().attribute(false);
    shown
}
