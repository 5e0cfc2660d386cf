//! How a VM's vCPUs spend a span of time: running, waiting for a CPU, or idle.
//!
//! Must not know what follows from it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::service::inventory::HostVm;
use crate::time::{ThreadTime, thread_time};

/// A span under way.
#[derive(Debug)]
pub(super) struct Running {
    pid: u32,
    began: Instant,
    before: Vec<(u32, ThreadTime)>,
}

/// How it went.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Spent {
    /// Of each thread that has not ended, the part of the span for which it had nothing to do.
    pub(super) idle: BTreeMap<u32, f64>,
    /// The largest part for which any of them wanted to run and had no CPU.
    pub(super) waited: f64,
}

impl Running {
    /// Begins a span now.
    pub(super) fn begin(vm: &HostVm) -> Self {
        let threads = vm.vcpus.iter().filter_map(|vcpu| vcpu.thread_id);
        let before = threads.filter_map(|thread| Some((thread, thread_time(vm.pid, thread)?))).collect();
        Self { pid: vm.pid, began: Instant::now(), before }
    }

    /// How long it has lasted so far.
    pub(super) fn elapsed(&self) -> Duration {
        self.began.elapsed()
    }

    /// How it has gone so far.
    pub(super) fn spent(&self) -> Spent {
        let now: Vec<_> = self.before.iter().map(|&(thread, _)| thread_time(self.pid, thread)).collect();
        let span = self.elapsed().as_secs_f64();
        let mut spent = Spent::default();
        for (&(thread, before), now) in self.before.iter().zip(now) {
            let Some(now) = now else { continue };
            let wait = now.waited.unwrap_or_default().saturating_sub(before.waited.unwrap_or_default());
            let busy = now.ran.saturating_sub(before.ran) + wait;
            spent.idle.insert(thread, (1.0 - busy.as_secs_f64() / span).max(0.0));
            spent.waited = spent.waited.max((wait.as_secs_f64() / span).min(1.0));
        }
        spent
    }
}
