//! Slowing a VM of another VMM: what its vCPUs write is seen from outside, and a separate process limits the CPU time of single threads.
//!
//! A CPU limit is no limit of writing: the share that brings a vCPU to its limit follows from what it writes in a second of CPU time, looked at anew each time. Rewrites
//! only show while somebody has the VM's dirty log on: while its own VMM migrates it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::holder::Holder;
use super::{Actuator, StunError, StunRequest};
use crate::foreign::Permission;
use crate::model::{Attribution, PageBitmap, VcpuLimit, VcpuWrites, VmWrites};
use crate::port::EventSource;
use crate::probe::{Gives, KernelCounters};
use crate::service::watch::{WatchRequest, WatchedVm};
use crate::time::{monotonic_now, thread_time};

/// How often the VM's slots and threads are looked at again.
const REFRESH_EVERY: Duration = Duration::from_millis(500);

/// A vCPU's thread.
#[derive(Debug, Default)]
struct Thread {
    pages: u64,
    ran: Duration,
    /// Pages in a second of CPU time.
    speed: f64,
    held: Duration,
    held_before: Duration,
    /// The holder has it.
    taken: bool,
}

/// One foreign VM.
pub(super) struct Foreign {
    watched: WatchedVm,
    counters: KernelCounters,
    pages: PageBitmap,
    holder: Option<Holder>,
    threads: BTreeMap<u32, Thread>,
    refreshed: Instant,
}

impl Foreign {
    pub(super) fn open(request: &StunRequest, permission: Permission) -> Result<Self, StunError> {
        if !request.dry_run {
            clear_first();
        }
        let (watched, counters) = WatchedVm::open(&WatchRequest {
            run_dir: request.run_dir.clone(),
            vm: request.vm.clone(),
            wanted: vec![Gives::Pages, Gives::RingPages, Gives::HardwareLog],
            max_address_bytes: None,
            single_writes: None,
            probe_log: false,
        })?;
        tracing::info!(
            vm = watched.vm.name,
            allowed_by = permission.by(),
            "vCPU threads may be moved into cgroups of their own, below those that they are in"
        );
        let pages = counters.empty_pages();
        let holder =
            if request.dry_run { None } else { Some(Holder::start().map_err(super::holder::HolderError::Pipe)?) };
        Ok(Self { watched, counters, pages, holder, threads: BTreeMap::new(), refreshed: Instant::now() })
    }

    /// The threads that run vCPUs, by index.
    fn vcpu_threads(&self) -> Vec<(u32, u32)> {
        self.watched.vm.vcpus.iter().filter_map(|vcpu| Some((vcpu.index, vcpu.thread_id?))).collect()
    }
}

/// Clears leftovers, which stand in nobody's way if that fails.
fn clear_first() {
    match super::clear_leftovers() {
        Ok(cleared) => {
            for group in cleared.groups {
                tracing::warn!("{group} was left by a process that was killed; its threads are back");
            }
            for failure in cleared.failures {
                tracing::warn!("{failure}");
            }
        }
        Err(error) => tracing::debug!("{error}"),
    }
}

impl Actuator for Foreign {
    fn by(&self) -> &'static str {
        "cgroup"
    }

    fn look(&mut self) -> Result<Option<VmWrites>, StunError> {
        if self.refreshed.elapsed() >= REFRESH_EVERY {
            self.refreshed = Instant::now();
            if !self.watched.refresh() {
                return Ok(None);
            }
        }
        let sample = self.counters.sample(&mut self.pages)?;
        self.pages.clear();
        let pid = self.watched.vm.pid;
        let count = self.watched.vm.vcpus.iter().map(|vcpu| vcpu.index + 1).max().unwrap_or(0);
        let mut writes = VmWrites {
            at_ns: monotonic_now().as_nanos() as u64,
            vcpus: vec![VcpuWrites::default(); count as usize],
            others_pages: 0.0,
            attribution: Attribution::Faults,
        };
        let vcpus = self.vcpu_threads();
        for (&id, events) in &sample.threads {
            let pages = events.pages_made_writable.max(events.dirty_ring_pushes);
            let Some(&(index, _)) = vcpus.iter().find(|&&(_, thread)| thread == id) else {
                writes.others_pages += pages as f64;
                continue;
            };
            let thread = self.threads.entry(id).or_default();
            let ran = thread_time(pid, id).map_or(thread.ran, |time| time.ran);
            let (new, time) = (pages.saturating_sub(thread.pages), ran.saturating_sub(thread.ran));
            if time > Duration::from_millis(2) {
                let speed = new as f64 / time.as_secs_f64();
                thread.speed = if thread.speed > 0.0 { 0.7 * thread.speed + 0.3 * speed } else { speed };
                (thread.pages, thread.ran) = (pages, ran);
            }
            writes.vcpus[index as usize] = VcpuWrites {
                pages: pages as f64,
                held_ns: thread.held.as_nanos() as u64,
                owes: thread.taken && thread.held > thread.held_before,
                ..VcpuWrites::default()
            };
            thread.held_before = thread.held;
        }
        if let Some(holder) = &mut self.holder {
            holder.renew()?;
        }
        Ok(Some(writes))
    }

    fn is_moved(&self) -> bool {
        self.watched.vm.logged_bytes > 0
    }

    fn limit(&mut self, limits: &[Option<VcpuLimit>]) -> Result<(), StunError> {
        let vcpus = self.vcpu_threads();
        let pid = self.watched.vm.pid;
        let Some(holder) = &mut self.holder else { return Ok(()) };
        for (index, id) in vcpus {
            let thread = self.threads.entry(id).or_default();
            match limits.get(index as usize).copied().flatten() {
                Some(limit) if thread.speed > 0.0 => {
                    if !thread.taken {
                        holder.take(pid, id)?;
                        thread.taken = true;
                    }
                    let (_, held) = holder.limit(id, limit.rate.0 / thread.speed)?;
                    thread.held = held;
                }
                Some(_) => {}
                None if thread.taken => {
                    thread.taken = false;
                    holder.release(id)?;
                }
                None => {}
            }
        }
        Ok(())
    }

    fn let_go(&mut self) -> Result<(), StunError> {
        drop(self.holder.take());
        Ok(())
    }
}
