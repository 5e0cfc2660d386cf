//! Observing how one VM writes its memory, interval after interval: joins a watched VM and the policy of rates.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::clock::MonotonicClock;
use super::interrupt::Interrupt;
use super::intervals::{Intervals, printed};
use super::inventory::HostVm;
use super::machine::TRACKING_TIME;
use super::watch::{WatchError, WatchRequest, WatchedVm};
use crate::model::schema::Schema;
use crate::model::{VmId, VmRef};
use crate::port::{ArmError, EventHook, SampleLog};
use crate::probe::{Gives, KernelCounters};
use crate::store::recording::RecordingError;
use crate::track::{self, DirtyRate, Observer};

/// What to observe and how.
#[derive(Clone, Debug)]
pub struct ObserveRequest {
    /// Where hosted VMs are listed.
    pub run_dir: PathBuf,
    /// The VM.
    pub vm: VmRef,
    /// The length of an interval.
    pub interval: Duration,
    /// How many intervals; none for until interrupted.
    pub count: Option<u64>,
    /// The end of the guest physical addresses that are told apart; found out where not given.
    pub max_address_bytes: Option<u64>,
    /// Whether to write-protect the VM's pages meanwhile (hosted VMs only).
    pub arm: bool,
    /// The size in bytes of the buffer in which each write is told by itself too; none: it is not.
    pub single_writes: Option<u32>,
    /// Whether the BPF programs' own diagnostics are printed.
    pub probe_log: bool,
}

/// One interval of one VM, as it is printed.
#[derive(Clone, Debug, Serialize)]
pub struct DirtyRateReport {
    /// Whose.
    pub vm: Observed,
    /// The figures.
    #[serde(flatten)]
    pub rate: DirtyRate,
    /// Sources that could not be attached, and why.
    pub missing_sources: Vec<MissingSource>,
    /// Writes that were told by themselves too, where that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub single_writes: Option<u64>,
}

impl Schema for DirtyRateReport {
    const SCHEMA: &'static str = "dunlin.dirty-rate/v1";
}

/// The VM that is observed.
#[derive(Clone, Debug, Serialize)]
pub struct Observed {
    /// Its name: its own, or its VMM's and its process id.
    pub name: String,
    /// Its identity.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vm_id: Option<VmId>,
    /// Its process.
    pub pid: u32,
    /// Its vCPUs.
    pub cpus: u32,
}

impl Observed {
    /// What is printed of a VM.
    pub fn of(vm: &HostVm) -> Self {
        Self { name: vm.name.clone(), vm_id: Some(vm.vm_id), pid: vm.pid, cpus: vm.vcpus.len() as u32 }
    }
}

/// A tracepoint that is not listened to.
#[derive(Clone, Debug, Serialize)]
pub struct MissingSource {
    /// Its name.
    pub name: String,
    /// What is not seen without it.
    pub gives: String,
    /// Why.
    pub reason: String,
}

/// How an observation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// All intervals are done.
    Counted,
    /// A signal came.
    Interrupted,
    /// The VM's process ended.
    VmGone,
    /// Whoever read the reports has closed the pipe.
    NobodyReads,
}

/// Why there is nothing to report.
#[derive(Debug, thiserror::Error)]
pub enum ObserveVmError {
    /// The VM cannot be watched.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// The observation broke off.
    #[error(transparent)]
    Track(#[from] track::ObserveError),
    /// The file for what is seen could not be made.
    #[error(transparent)]
    Recording(#[from] RecordingError),
    /// A report could not be printed.
    #[error("a report could not be printed")]
    Print(#[from] io::Error),
    /// The VM could not be let go.
    #[error(transparent)]
    Disarm(#[from] ArmError),
    /// The write protection would end before the interval does.
    #[error(
        "with --arm an interval may last {0:?} at most: the VM ends its write protection by itself if nobody asks again"
    )]
    TooLong(Duration),
}

/// Reports interval after interval to `each`.
///
/// # Errors
/// No such VM, or no way to count; says what to do.
pub fn observe(
    request: &ObserveRequest,
    interrupt: &Interrupt,
    each: impl FnMut(&DirtyRateReport) -> io::Result<()>,
) -> Result<Ended, ObserveVmError> {
    observe_logged(request, interrupt, |_, _| Ok(None), each)
}

/// The same; what is seen goes into the log that `log` opens, once the VM and its sources are known.
///
/// # Errors
/// As [`observe`]; or what is seen could not be recorded.
pub(super) fn observe_logged(
    request: &ObserveRequest,
    interrupt: &Interrupt,
    log: impl FnOnce(&HostVm, &KernelCounters) -> Result<Option<Box<dyn SampleLog>>, RecordingError>,
    mut each: impl FnMut(&DirtyRateReport) -> io::Result<()>,
) -> Result<Ended, ObserveVmError> {
    if request.arm && request.interval > TRACKING_TIME / 2 {
        return Err(ObserveVmError::TooLong(TRACKING_TIME / 2));
    }
    let (mut watched, counters) = WatchedVm::open(&WatchRequest {
        run_dir: request.run_dir.clone(),
        vm: request.vm.clone(),
        wanted: vec![Gives::Pages, Gives::RingPages, Gives::HardwareLog, Gives::VmmExits, Gives::GuestExits],
        max_address_bytes: request.max_address_bytes,
        single_writes: request.single_writes,
        probe_log: request.probe_log,
    })?;
    let arm = if request.arm { Some(watched.arm()?) } else { None };
    let vm = Observed::of(&watched.vm);
    let log = log(&watched.vm, &counters)?;
    let mut observer = Observer::start_logged(counters, MonotonicClock, arm, log)?;
    let missing_sources = missing_sources(observer.hooks());
    let mut intervals = Intervals::begin(request.interval, request.count);
    let ended = loop {
        if let Err(ended) = intervals.wait(interrupt) {
            break ended;
        }
        // Whether someone has its dirty log on counts as it was during the interval.
        let logged = watched.vm.logged_bytes > 0;
        if !watched.refresh() {
            break Ended::VmGone;
        }
        let mut rate = observer.measure(logged || watched.vm.logged_bytes > 0)?;
        for thread in &mut rate.threads {
            thread.name = watched.vm.process.thread_name(thread.thread_id);
        }
        let single_writes = request.single_writes.map(|_| observer.writes().len() as u64);
        let missing_sources = missing_sources.clone();
        let report = DirtyRateReport { vm: vm.clone(), rate, missing_sources, single_writes };
        if let Some(ended) = printed(each(&report))? {
            break ended;
        }
    };
    if ended != Ended::VmGone {
        observer.stop()?;
    }
    Ok(ended)
}

/// The sources that were asked for and are not there.
pub(super) fn missing_sources(hooks: &[EventHook]) -> Vec<MissingSource> {
    let missing = hooks.iter().filter_map(|hook| {
        let reason = hook.missing.clone()?;
        Some(MissingSource { name: hook.name.clone(), gives: hook.gives.clone(), reason })
    });
    missing.collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::model::PageCount;
    use crate::port::{EventSample, ThreadEvents};
    use crate::track::Protection;

    #[test]
    fn the_reports_form_is_kept() {
        let mmio = crate::model::ExitTimes { count: 4, ..Default::default() };
        let exits = [("mmio".to_owned(), mmio)].into();
        let thread = ThreadEvents {
            pages_made_writable: 2,
            dirty_ring_pushes: 3,
            guest_exits: 6,
            exits,
            ..ThreadEvents::default()
        };
        let after = EventSample { threads: [(7, thread)].into(), ..EventSample::default() };
        let rate = track::rate_between(
            &EventSample::default(),
            &after,
            Duration::from_millis(500),
            PageCount(2),
            Protection::Ours,
        );
        let vm = Observed { name: "a".to_owned(), vm_id: None, pid: 5, cpus: 1 };
        let report = DirtyRateReport { vm, rate, missing_sources: Vec::new(), single_writes: None };
        let mut golden = json!({
            "schema": "dunlin.dirty-rate/v1",
            "vm": {"name": "a", "pid": 5, "cpus": 1},
            "interval_ns": 500_000_000,
            "pages_per_second": 4.0,
            "bytes_per_second": 16384.0,
            "unique_pages": 2,
            "unique_bytes": 8192,
            "regime": "armed",
            "is_lower_bound": false,
            "source": "kvm_mmu_set_spte, fast_page_fault",
            "dirty_ring_pushes_per_second": 6.0,
            "huge_mappings": 0,
            "threads": [{"thread_id": 7, "pages_per_second": 4.0, "share": 1.0, "exits_per_second": 8.0, "guest_exits_per_second": 12.0}],
            "exits": {"mmio": 4},
            "lost_events": {
                "total": 0, "out_of_range": 0, "threads_full": 0, "exits_full": 0, "too_large": 0, "unreadable": 0,
                "unattributed": 0, "writes_full": 0
            },
            "missing_sources": [],
        });
        golden["meaning"] = report.rate.meaning.into();
        assert_eq!(serde_json::to_value(report.tagged()).unwrap(), golden);
    }
}
