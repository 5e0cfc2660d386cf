//! Why one VM leaves its guest, how often, and for how long, interval after interval.

use std::collections::BTreeMap;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::interrupt::Interrupt;
use super::intervals::{Intervals, printed};
use super::observe::{Ended, MissingSource, Observed, missing_sources};
use super::watch::{WatchError, WatchRequest, WatchedVm};
use crate::model::schema::Schema;
use crate::model::{ExitTimes, VmRef};
use crate::port::{EventSample, EventSource, EventSourceError, ThreadEvents};
use crate::probe::{Backend, Gives};

/// What to count and how.
#[derive(Clone, Debug)]
pub struct ExitsRequest {
    /// Where hosted VMs are listed.
    pub run_dir: PathBuf,
    /// The VM.
    pub vm: VmRef,
    /// The length of an interval.
    pub interval: Duration,
    /// How many intervals; none for until interrupted.
    pub count: Option<u64>,
    /// Whether each vCPU has rows of its own.
    pub per_vcpu: bool,
}

/// One interval of one VM.
#[derive(Clone, Debug, Serialize)]
pub struct ExitsReport {
    /// Whose.
    pub vm: Observed,
    /// The interval's true length.
    pub interval_ns: u64,
    /// The processor's kind of virtualisation: `svm`, `vmx` or `other`.
    pub backend: &'static str,
    /// Exits from guest code and to the VMM, those that took longest in all first.
    pub exits: Vec<ExitRow>,
    /// Sources that could not be attached, and why.
    pub missing_sources: Vec<MissingSource>,
}

impl Schema for ExitsReport {
    const SCHEMA: &'static str = "dunlin.exits/v1";
}

/// Exits for one reason.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ExitRow {
    /// `kvm`: from guest code, until it went on; `vmm`: from KVM, until the VMM came back. The second are among the first.
    pub to: &'static str,
    /// Of which vCPU's thread; absent in rows of the whole VM.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thread_id: Option<u32>,
    /// Why.
    pub reason: String,
    /// How many.
    pub count: u64,
    /// The same per second.
    pub exits_per_second: f64,
    /// Sum of their times; absent where this kernel does not tell times.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub total_ns: Option<u64>,
    /// Their part of the interval, of one vCPU: 0 to the number of vCPUs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub time_share: Option<f64>,
    /// Mean time.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mean_ns: Option<f64>,
    /// Half of them took no longer; told in powers of two, so at most twice too high.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p50_ns: Option<u64>,
    /// 99 of 100 took no longer; likewise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub p99_ns: Option<u64>,
    /// The longest since counting began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub longest_ns: Option<u64>,
}

/// Why there is nothing to report.
#[derive(Debug, thiserror::Error)]
pub enum ExitsError {
    /// The VM cannot be watched.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// The counters cannot be read.
    #[error(transparent)]
    Source(#[from] EventSourceError),
    /// A report could not be printed.
    #[error("a report could not be printed")]
    Print(#[from] io::Error),
}

/// Reports interval after interval to `each`.
///
/// # Errors
/// No such VM, or no way to count; says what to do.
pub fn exits(
    request: &ExitsRequest,
    interrupt: &Interrupt,
    mut each: impl FnMut(&ExitsReport) -> io::Result<()>,
) -> Result<Ended, ExitsError> {
    let (mut watched, mut counters) = WatchedVm::open(&WatchRequest {
        run_dir: request.run_dir.clone(),
        vm: request.vm.clone(),
        wanted: vec![Gives::VmmExits, Gives::GuestExits],
        max_address_bytes: None,
        single_writes: None,
        probe_log: false,
    })?;
    let backend = match counters.probes().backend() {
        Backend::Svm => "svm",
        Backend::Vmx => "vmx",
        Backend::Other => "other",
    };
    let missing = missing_sources(counters.hooks());
    let mut pages = counters.empty_pages();
    let mut before = counters.sample(&mut pages)?;
    let mut began = Instant::now();
    let mut intervals = Intervals::begin(request.interval, request.count);
    loop {
        if let Err(ended) = intervals.wait(interrupt) {
            return Ok(ended);
        }
        if !watched.refresh() {
            return Ok(Ended::VmGone);
        }
        let after = counters.sample(&mut pages)?;
        let interval = began.elapsed();
        began = Instant::now();
        let report = ExitsReport {
            vm: Observed::of(&watched.vm),
            interval_ns: interval.as_nanos() as u64,
            backend,
            exits: rows(&before, &after, interval, request.per_vcpu),
            missing_sources: missing.clone(),
        };
        before = after;
        if let Some(ended) = printed(each(&report))? {
            return Ok(ended);
        }
    }
}

/// The rows of one interval.
fn rows(before: &EventSample, after: &EventSample, interval: Duration, per_vcpu: bool) -> Vec<ExitRow> {
    let nothing = ThreadEvents::default();
    let mut sums: BTreeMap<(&'static str, Option<u32>, String), ExitTimes> = BTreeMap::new();
    for (&thread, now) in &after.threads {
        let new = now.since(before.threads.get(&thread).unwrap_or(&nothing));
        let all = [("kvm", new.guest_exit_reasons), ("vmm", new.exits)];
        for (to, reason, times) in
            all.into_iter().flat_map(|(to, by)| by.into_iter().map(move |(reason, times)| (to, reason, times)))
        {
            if times.count > 0 {
                sums.entry((to, per_vcpu.then_some(thread), reason)).or_default().add(&times);
            }
        }
    }
    let seconds = interval.as_secs_f64().max(f64::MIN_POSITIVE);
    let mut rows: Vec<ExitRow> = sums
        .into_iter()
        .map(|((to, thread_id, reason), times)| {
            let mean_ns = times.mean_ns();
            let known = mean_ns.is_some();
            ExitRow {
                to,
                thread_id,
                reason,
                count: times.count,
                exits_per_second: times.count as f64 / seconds,
                total_ns: known.then_some(times.total_ns),
                time_share: known.then(|| times.total_ns as f64 / 1e9 / seconds),
                mean_ns,
                p50_ns: times.quantile_ns(0.5),
                p99_ns: times.quantile_ns(0.99),
                longest_ns: known.then_some(times.longest_ns),
            }
        })
        .collect();
    rows.sort_by(|a, b| b.total_ns.cmp(&a.total_ns).then(b.count.cmp(&a.count)).then_with(|| a.reason.cmp(&b.reason)));
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(count: u64, each_ns: u64) -> ExitTimes {
        let mut times = ExitTimes { count, total_ns: count * each_ns, longest_ns: each_ns, ..ExitTimes::default() };
        times.bins[each_ns.max(1).ilog2() as usize] = count as u32;
        times
    }

    fn sample(threads: &[(u32, &[(&str, ExitTimes)])]) -> EventSample {
        let threads = threads.iter().map(|&(thread, exits)| {
            let exits = exits.iter().map(|(reason, times)| ((*reason).to_owned(), times.clone())).collect();
            (thread, ThreadEvents { exits, ..ThreadEvents::default() })
        });
        EventSample { threads: threads.collect(), ..EventSample::default() }
    }

    #[test]
    fn rows_hold_what_is_new_and_the_costliest_comes_first() {
        let before = sample(&[(1, &[("io", times(10, 1000))])]);
        let after =
            sample(&[(1, &[("io", times(30, 1000)), ("mmio", times(1, 1_000_000))]), (2, &[("io", times(5, 1000))])]);
        let all = rows(&before, &after, Duration::from_millis(500), false);
        assert_eq!(
            all.iter().map(|row| (row.reason.as_str(), row.count)).collect::<Vec<_>>(),
            [("mmio", 1), ("io", 25)]
        );
        assert_eq!((all[1].total_ns, all[1].p50_ns), (Some(25_000), Some(1000)));
        assert!((all[1].exits_per_second - 50.0).abs() < 1e-9 && (all[0].time_share.unwrap() - 0.002).abs() < 1e-9);
        let each = rows(&before, &after, Duration::from_millis(500), true);
        assert_eq!(
            each.iter().filter(|row| row.reason == "io").map(|row| row.thread_id).collect::<Vec<_>>(),
            [Some(1), Some(2)]
        );
    }

    #[test]
    fn where_no_times_are_known_none_are_told() {
        let only_counts = ExitTimes { count: 7, ..ExitTimes::default() };
        let row =
            &rows(&EventSample::default(), &sample(&[(1, &[("io", only_counts)])]), Duration::from_secs(1), false)[0];
        assert_eq!((row.count, row.total_ns, row.mean_ns, row.p99_ns, row.longest_ns), (7, None, None, None, None));
    }
}
