//! The counters of one VM, as a source of events.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use dunlin_ebpf::Armed;

use super::hook::Gives;
use super::probes::{LoadOptions, MAX_FRAMES, Place, ProbeError, Probes};
use crate::model::{GuestWrite, PageBitmap, PageCount, PageSubset};
use crate::port::{EventHook, EventSample, EventSource, EventSourceError};
use crate::time::monotonic_now;

/// Whom to count, and how far, where only one VM is watched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProbeOptions {
    /// The process that holds the VM.
    pub pid: u32,
    /// Guest frames `[0, frames)` are told apart; the rest is counted and reported as lost.
    pub frames: PageCount,
    /// Whether the programs' own diagnostics are printed.
    pub log: bool,
}

/// The programs, shared by those who watch VMs with them.
pub type SharedProbes = Arc<Mutex<Probes>>;

/// One VM's counters. Dropping it forgets the VM, and detaches the programs if nobody else uses them.
#[derive(Debug)]
pub struct KernelCounters {
    probes: SharedProbes,
    place: Place,
    frames: PageCount,
    hooks: Vec<EventHook>,
}

impl KernelCounters {
    /// Loads the programs for one process and attaches all of them.
    ///
    /// # Errors
    /// Each says whether the policy refuses or the kernel lacks something, and what to do.
    pub fn attach(options: ProbeOptions) -> Result<Self, ProbeError> {
        let frames = PageCount(options.frames.0.clamp(1, MAX_FRAMES));
        let wanted = vec![Gives::Pages, Gives::RingPages, Gives::HardwareLog, Gives::VmmExits, Gives::GuestExits];
        let load = LoadOptions {
            only: Some(options.pid),
            capacity: frames,
            wanted,
            attribute: true,
            single_writes: None,
            log: options.log,
        };
        let probes = Arc::new(Mutex::new(Probes::load(&load)?));
        Self::track(&probes, options.pid, frames)
    }

    /// Watches one more VM with programs that are loaded.
    ///
    /// # Errors
    /// There is no room.
    pub fn track(probes: &SharedProbes, pid: u32, frames: PageCount) -> Result<Self, ProbeError> {
        let frames = PageCount(frames.0.clamp(1, MAX_FRAMES));
        let mut locked = lock(probes);
        let place = locked.track(pid, frames)?;
        let hooks = locked.hooks();
        drop(locked);
        Ok(Self { probes: Arc::clone(probes), place, frames, hooks })
    }

    /// How many different pages have turned writable since they were last taken; takes them.
    pub fn count_pages(&self) -> PageCount {
        lock(&self.probes).count_pages(&self.place)
    }

    /// A window of write protection of these pages begins at this time, by the monotonic clock in nanoseconds. Until then no page is marked;
    /// in it, first writes to these pages are counted by their time, and to their writers.
    pub fn arm(&self, began_ns: u64, subset: PageSubset) {
        self.probes().arm(&self.place, Armed { began_ns, subset });
    }

    /// There is no such window any more.
    pub fn disarm(&self) {
        self.probes().disarm(&self.place);
    }

    /// The programs.
    pub fn probes(&self) -> MutexGuard<'_, Probes> {
        lock(&self.probes)
    }
}

impl EventSource for KernelCounters {
    fn hooks(&self) -> &[EventHook] {
        &self.hooks
    }

    fn empty_pages(&self) -> PageBitmap {
        PageBitmap::new(self.frames)
    }

    fn sample(&mut self, pages: &mut PageBitmap) -> Result<EventSample, EventSourceError> {
        let mut probes = lock(&self.probes);
        probes.take_pages(&self.place, pages);
        Ok(probes.sweep(Some(self.place.pid))?.remove(&self.place.pid).unwrap_or_default())
    }

    fn take_writes(&mut self, into: &mut Vec<GuestWrite>) {
        self.probes().take_writes(&self.place, into);
    }

    fn armed(&mut self, on: bool) {
        if on {
            self.arm(monotonic_now().as_nanos() as u64, PageSubset::ALL);
        } else {
            self.disarm();
        }
    }
}

impl Drop for KernelCounters {
    fn drop(&mut self) {
        lock(&self.probes).untrack(&self.place);
    }
}

/// A panic of another user leaves the maps as they are, and they are the kernel's.
fn lock(probes: &SharedProbes) -> MutexGuard<'_, Probes> {
    probes.lock().unwrap_or_else(PoisonError::into_inner)
}
