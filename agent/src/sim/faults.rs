//! Simulated faults: pages of a machine that nobody has mapped for it yet, and the manager's hold of them.
//!
//! Like userfaultfd on shared memory: one that is touched unmapped waits until somebody maps it, and what is mapped is what lies in memory then. The oracle looks at that moment.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::scenario::Side;
use super::scheduler::{Scheduler, Wait};
use crate::model::{PageBitmap, PageCount, PageRun};
use crate::port::{FaultError, Faults};

/// A system call.
const CALL: Duration = Duration::from_micros(3);

/// What a machine has of its memory that it may touch. Outlives managers.
pub(super) struct Missing {
    pub(super) mapped: PageBitmap,
    /// What a manager has marked as here.
    pub(super) here: Arc<[AtomicU64]>,
    /// The page that the vCPU waits for, and whether a manager has been told.
    waiting: Option<(u64, bool)>,
}

impl Missing {
    pub(super) fn new(pages: PageCount) -> Self {
        let here = (0..pages.0.div_ceil(64)).map(|_| AtomicU64::new(0)).collect();
        Self { mapped: PageBitmap::new(pages), here, waiting: None }
    }

    /// Nobody waits any more, whatever is here.
    pub(super) fn close(&mut self) {
        *self = Self { mapped: PageBitmap::full(self.mapped.len()), here: Arc::clone(&self.here), waiting: None };
    }

    /// Whether every page is here.
    pub(super) fn all_is_here(&self) -> bool {
        (0..self.mapped.len().0)
            .all(|page| self.here[(page / 64) as usize].load(Ordering::Acquire) >> (page % 64) & 1 == 1)
    }

    /// The vCPU touches a page: whether it may go on.
    pub(super) fn touch(&mut self, page: u64) -> bool {
        let may = self.mapped.contains(page);
        if !may {
            self.waiting = Some((page, false));
        }
        may
    }

    pub(super) fn waits(&self) -> bool {
        self.waiting.is_some()
    }

    pub(super) fn is_untold(&self) -> bool {
        matches!(self.waiting, Some((_, false)))
    }

    fn tell(&mut self) -> Option<u64> {
        let (page, told) = self.waiting.as_mut().filter(|(_, told)| !told)?;
        *told = true;
        Some(*page)
    }

    /// It is mapped, or to be tried again.
    pub(super) fn wake(&mut self, page: u64) {
        if let Some((waiting, told)) = &mut self.waiting
            && *waiting == page
        {
            *told = false;
            if self.mapped.contains(page) {
                self.waiting = None;
            }
        }
    }
}

/// A manager's hold of a machine's faults.
pub(super) struct SimFaults {
    pub(super) sim: Arc<Scheduler>,
    pub(super) side: Side,
    pub(super) here: Arc<[AtomicU64]>,
}

impl SimFaults {
    fn fill(&self, action: &'static str, run: PageRun, zero: bool) -> Result<(), FaultError> {
        self.sim.operation(action, CALL, |world| world.map_pages(self.side, run, zero))
    }
}

impl Faults for SimFaults {
    fn next(&self, pages: &mut Vec<u64>, timeout: Duration) -> Result<(), FaultError> {
        pages.clear();
        let side = self.side;
        let deadline_ns = self.sim.with(|world| world.now_ns) + timeout.as_nanos() as u64;
        let found = self.sim.wait_for("fault", &Wait::Fault { side, deadline_ns }, deadline_ns, |world| {
            let Some(vm) = world.vm(side) else { return Some(Err(FaultError::Gone)) };
            vm.missing.as_mut().and_then(Missing::tell).map(Ok)
        });
        if let Some(page) = found.transpose()? {
            pages.push(page);
        }
        Ok(())
    }

    fn map(&self, run: PageRun) -> Result<(), FaultError> {
        self.fill("map", run, false)
    }

    fn map_zero(&self, run: PageRun) -> Result<(), FaultError> {
        self.fill("map zeros", run, true)
    }

    fn here(&self) -> &[AtomicU64] {
        &self.here
    }

    fn end(&self) -> Result<(), FaultError> {
        self.sim.operation("end faults", CALL, |world| world.map_all(self.side))
    }
}
