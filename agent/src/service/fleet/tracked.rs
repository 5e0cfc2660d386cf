//! One VM of the fleet: what is remembered of it between two looks, and the figures that follow.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use super::names::Known;
use super::view::{ArmedView, ExitRate, FleetVcpu, FleetVm, HISTORY, PastRate, RogueProcess};
use crate::model::{ExitTimes, PAGE_SIZE, PageCount, ThrottleView, VcpuFacts, Writer};
use crate::port::{EventSample, ThreadEvents};
use crate::probe::{KernelCounters, SharedProbes};
use crate::service::inventory::HostVm;
use crate::time::thread_time;
use crate::track::{DirtyRate, Protection, RogueWatch, ThreadRate, rate_between};

/// The counters of one VM, shared with whoever opens a window on it.
pub(super) type SharedCounters = Arc<Mutex<KernelCounters>>;

/// Who a VM is for as long as its process lives: a process id alone may be used again.
pub(super) type Key = (u32, u64);

/// Reasons of exits that are shown of one VM, the most frequent.
const MOST_EXITS: usize = 32;

/// One VM.
pub(super) struct Tracked {
    /// As it was at the last look.
    pub(super) vm: HostVm,
    /// Its counters; none where there was no room, or nothing is loaded.
    pub(super) counters: Option<SharedCounters>,
    /// Whether its different pages have a place in the bitmap.
    unique_known: bool,
    /// Why something is not counted.
    note: Option<String>,
    /// The counters at the beginning of the interval under way.
    pub(super) before: Option<(Instant, EventSample)>,
    logged: bool,
    cpu: HashMap<u32, (Instant, Duration)>,
    figures: Option<Figures>,
    cpu_shares: HashMap<u32, f64>,
    history: VecDeque<PastRate>,
    /// What its windows showed.
    pub(super) armed: Option<ArmedView>,
    /// Why the last one did not open.
    pub(super) armed_problem: Option<String>,
    /// Who its address spaces are.
    pub(super) names: Known,
    /// Who stays above the line.
    pub(super) watch: RogueWatch,
    /// Windows so far.
    pub(super) windows: u64,
    /// When the last one began.
    pub(super) last_window: Option<Instant>,
    /// Until when no other window may open, so that windows do not slow it down too much.
    pub(super) rests_until: Option<Instant>,
    /// How its writers are slowed, as its process said last; none of a foreign VM, and of one that does not say.
    pub(super) throttle: Option<ThrottleView>,
    /// Whether one is open.
    pub(super) window_open: bool,
    /// Whether one has closed since the VM was last measured: what the inventory saw of its log may have been ours.
    pub(super) window_closed: bool,
}

/// The figures of one interval.
#[derive(Clone, Debug)]
struct Figures {
    rate: DirtyRate,
    exits: Vec<ExitRate>,
    exits_per_second: f64,
    guest_exits_per_second: f64,
}

impl Tracked {
    /// A VM that has appeared. Where there is no room for its pages, only its rates are counted; where there is none at all, nothing.
    pub(super) fn begin(vm: HostVm, probes: Option<&SharedProbes>) -> Self {
        let (mut counters, mut unique_known, mut note) = (None, false, None);
        if let Some(probes) = probes {
            match KernelCounters::track(probes, vm.pid, frames(&vm)) {
                Ok(all) => (counters, unique_known) = (Some(all), true),
                Err(full) => match KernelCounters::track(probes, vm.pid, PageCount(1)) {
                    Ok(rates) => {
                        counters = Some(rates);
                        note = Some(format!("its different pages are not counted: {full}"));
                    }
                    Err(error) => note = Some(format!("it is not counted: {error}")),
                },
            }
            if let Some(note) = &note {
                tracing::warn!("{} (pid {}): {note}", vm.name, vm.pid);
            }
        }
        Self {
            logged: vm.logged_bytes > 0,
            vm,
            counters: counters.map(|counters| Arc::new(Mutex::new(counters))),
            unique_known,
            note,
            before: None,
            cpu: HashMap::new(),
            figures: None,
            cpu_shares: HashMap::new(),
            history: VecDeque::new(),
            armed: None,
            armed_problem: None,
            names: Known::default(),
            watch: RogueWatch::default(),
            windows: 0,
            last_window: None,
            rests_until: None,
            throttle: None,
            window_open: false,
            window_closed: false,
        }
    }

    /// Takes the counters at the end of an interval. Nothing happens while a window is open: the interval goes on behind it.
    pub(super) fn measure(&mut self, now: Instant, sample: EventSample) {
        self.use_of_cpus();
        let Some(counters) = self.counters.as_ref().filter(|_| !self.window_open) else { return };
        let unique = match counters.try_lock() {
            Ok(counters) => counters.count_pages(),
            Err(TryLockError::Poisoned(poisoned)) => PoisonError::into_inner(poisoned).count_pages(),
            Err(TryLockError::WouldBlock) => return,
        };
        // Whether someone has its dirty log on counts as it was during the interval; our own window is nobody else's log.
        let logged = self.vm.logged_bytes > 0 && !std::mem::take(&mut self.window_closed);
        let others = std::mem::replace(&mut self.logged, logged) || logged;
        let protection = if others { Protection::Others } else { Protection::Unseen };
        if let Some((since, before)) = &self.before {
            let unique = if self.unique_known { unique } else { PageCount(0) };
            let figures = figures(before, &sample, now.saturating_duration_since(*since), unique, protection);
            self.history
                .push_back(PastRate { bytes_per_second: figures.rate.bytes_per_second, regime: figures.rate.regime });
            self.history.drain(..self.history.len().saturating_sub(HISTORY));
            self.figures = Some(figures);
        }
        self.before = Some((now, sample));
    }

    /// How much of a CPU each vCPU's thread has had since the last look.
    fn use_of_cpus(&mut self) {
        let mut used = HashMap::new();
        self.cpu_shares.clear();
        for thread in self.vm.vcpus.iter().filter_map(|vcpu| vcpu.thread_id) {
            let Some(time) = thread_time(self.vm.pid, thread).map(|time| time.ran) else { continue };
            let now = Instant::now();
            if let Some((then, before)) = self.cpu.get(&thread) {
                let wall = now.saturating_duration_since(*then).as_secs_f64();
                if wall > 0.0 {
                    let share = time.saturating_sub(*before).as_secs_f64() / wall;
                    self.cpu_shares.insert(thread, share.min(1.0));
                }
            }
            used.insert(thread, (now, time));
        }
        self.cpu = used;
    }

    /// Gives the writers of the last window the names that are known.
    pub(super) fn show_names(&mut self) {
        let Some(armed) = &mut self.armed else { return };
        for ranked in armed.ranking.iter_mut().flat_map(|ranking| &mut ranking.writers) {
            self.names.name(&mut ranked.writer);
        }
        // Two address spaces may be one process's: under page-table isolation each has two.
        let mut processes: BTreeMap<(u32, String, String), f64> = BTreeMap::new();
        for rogue in &mut armed.rogues {
            self.names.name(&mut rogue.writer);
            rogue.words = rogue.writer.to_string();
            if let Writer::AddressSpace { vcpu, process: Some(process), .. } = &rogue.writer {
                let (pid, name) = if self.names.is_told_apart(process) {
                    (process.pid.to_string(), process.name.clone())
                } else {
                    (String::new(), "other".to_owned())
                };
                *processes.entry((*vcpu, pid, name)).or_default() += rogue.pages_per_second * PAGE_SIZE as f64;
            }
        }
        let of = |((vcpu, pid, name), bytes_per_second)| RogueProcess { vcpu, pid, name, bytes_per_second };
        armed.rogue_processes = processes.into_iter().map(of).collect();
        armed.names_missing = self.names.problem().cloned();
    }

    /// What is shown of it.
    pub(super) fn view(&self) -> FleetVm {
        let vm = &self.vm;
        let figures = self.figures.as_ref();
        FleetVm {
            name: vm.name.clone(),
            vm_id: vm.vm_id,
            host: vm.host,
            vmm: vm.vmm.clone(),
            pid: vm.pid,
            start_time_ticks: vm.start_time_ticks,
            memory_bytes: vm.memory_bytes,
            logged_bytes: vm.logged_bytes,
            notes: vm.kernel_view_missing.iter().chain(&self.note).cloned().collect(),
            unique_known: self.unique_known,
            rate: figures.map(|figures| figures.rate.clone()),
            exits_per_second: figures.map_or(0.0, |figures| figures.exits_per_second),
            guest_exits_per_second: figures.map_or(0.0, |figures| figures.guest_exits_per_second),
            exits: figures.map(|figures| figures.exits.clone()).unwrap_or_default(),
            vcpus: vcpus(&vm.vcpus, figures.map(|figures| &figures.rate), &self.cpu_shares),
            history: self.history.clone(),
            armed: self.armed.clone(),
            armed_problem: self.armed_problem.clone(),
            throttle: self.throttle.clone(),
        }
    }
}

/// The guest frames that can occur: up to the end of the last memory slot; where that is not known, what memory it has, and the hole below
/// 4 GiB.
fn frames(vm: &HostVm) -> PageCount {
    const HOLE_BYTES: u64 = 4 << 30;
    let known = vm.kernel.as_ref().map(|kernel| kernel.end_bytes()).filter(|&end| end > 0);
    let guess = || vm.memory_bytes.unwrap_or(vm.process.address_space_bytes).saturating_add(HOLE_BYTES);
    PageCount::covering(known.unwrap_or_else(guess))
}

fn figures(
    before: &EventSample,
    after: &EventSample,
    interval: Duration,
    unique: PageCount,
    protection: Protection,
) -> Figures {
    let rate = rate_between(before, after, interval, unique, protection);
    let seconds = interval.as_secs_f64().max(f64::MIN_POSITIVE);
    let nothing = ThreadEvents::default();
    // Since counting began, and in the interval.
    let mut sums: BTreeMap<(&'static str, String), (u64, ExitTimes)> = BTreeMap::new();
    for (thread, now) in &after.threads {
        let new = now.since(before.threads.get(thread).unwrap_or(&nothing));
        let all = [("kvm", &now.guest_exit_reasons, &new.guest_exit_reasons), ("vmm", &now.exits, &new.exits)];
        for (to, all, new) in all {
            for (reason, times) in all {
                let sum = sums.entry((to, reason.clone())).or_default();
                sum.0 += times.count;
                if let Some(times) = new.get(reason) {
                    sum.1.add(times);
                }
            }
        }
    }
    let mut exits: Vec<ExitRate> = sums
        .into_iter()
        .map(|((to, reason), (count, times))| ExitRate {
            to,
            reason,
            count,
            exits_per_second: times.count as f64 / seconds,
            mean_ns: times.mean_ns(),
        })
        .collect();
    // The same are shown again and again: by all that was counted.
    exits.sort_by_key(|exit| std::cmp::Reverse(exit.count));
    exits.truncate(MOST_EXITS);
    exits.sort_by(|a, b| b.exits_per_second.total_cmp(&a.exits_per_second));
    // The sum of nothing is -0.0, which no reader wants to see.
    let sum = |of: fn(&ThreadRate) -> f64| rate.threads.iter().map(of).fold(0.0, |sum, rate| sum + rate);
    let exits_per_second = sum(|thread| thread.exits_per_second);
    let guest_exits_per_second = sum(|thread| thread.guest_exits_per_second);
    Figures { rate, exits, exits_per_second, guest_exits_per_second }
}

/// The vCPUs with what their threads did. Where the kernel's structures do not tell the threads, those that caused events are taken, in
/// order.
fn vcpus(facts: &[VcpuFacts], rate: Option<&DirtyRate>, cpu_shares: &HashMap<u32, f64>) -> Vec<FleetVcpu> {
    let threads = rate.map(|rate| rate.threads.as_slice()).unwrap_or_default();
    let mut known: Vec<VcpuFacts> = facts.to_vec();
    if known.iter().all(|vcpu| vcpu.thread_id.is_none()) {
        let mut ids: Vec<u32> = threads.iter().map(|thread| thread.thread_id).collect();
        ids.sort_unstable();
        for (vcpu, id) in known.iter_mut().zip(ids) {
            vcpu.thread_id = Some(id);
        }
    }
    known.sort_by_key(|vcpu| vcpu.index);
    let of = |vcpu: VcpuFacts| {
        let thread = threads.iter().find(|thread| Some(thread.thread_id) == vcpu.thread_id);
        FleetVcpu {
            index: vcpu.index,
            thread_id: vcpu.thread_id,
            pages_per_second: thread.map_or(0.0, |thread| thread.pages_per_second),
            exits_per_second: thread.map_or(0.0, |thread| thread.exits_per_second),
            guest_exits_per_second: thread.map_or(0.0, |thread| thread.guest_exits_per_second),
            cpu_share: vcpu.thread_id.and_then(|id| cpu_shares.get(&id).copied()),
        }
    };
    known.into_iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::track::Regime;

    fn sample(threads: &[(u32, u64, u64)]) -> EventSample {
        let threads = threads.iter().map(|&(id, pages_made_writable, mmio)| {
            let exits = BTreeMap::from([("mmio".to_owned(), ExitTimes { count: mmio, ..ExitTimes::default() })]);
            (id, ThreadEvents { pages_made_writable, exits, guest_exits: 2 * mmio, ..ThreadEvents::default() })
        });
        EventSample { threads: threads.collect(), ..EventSample::default() }
    }

    #[test]
    fn a_vms_figures_are_those_of_the_interval() {
        let mut vm = Tracked::begin(crate::service::inventory::sample(), None);
        assert!(vm.view().rate.is_none() && vm.view().vcpus.len() == 1);
        let half = Duration::from_millis(500);
        let found = figures(&sample(&[(1, 10, 1)]), &sample(&[(1, 60, 11)]), half, PageCount(40), Protection::Unseen);
        assert!((found.exits_per_second - 20.0).abs() < 1e-9 && (found.guest_exits_per_second - 40.0).abs() < 1e-9);
        assert_eq!(found.exits[0].count, 11);
        assert_eq!((found.exits[0].to, found.exits[0].reason.as_str(), found.exits.len()), ("vmm", "mmio", 1));
        vm.figures = Some(found);
        vm.cpu_shares.insert(1, 0.25);
        let view = vm.view();
        let rate = view.rate.unwrap();
        assert_eq!((rate.regime, rate.unique_pages), (Regime::Passive, 40));
        assert_eq!((view.vcpus[0].index, view.vcpus[0].thread_id, view.vcpus[0].cpu_share), (0, Some(1), Some(0.25)));
        assert!((view.vcpus[0].pages_per_second - 100.0).abs() < 1e-9);
    }

    #[test]
    fn where_the_kernel_tells_no_threads_those_with_events_are_vcpus() {
        let rate = rate_between(
            &EventSample::default(),
            &sample(&[(9, 10, 0), (5, 30, 0)]),
            Duration::from_secs(1),
            PageCount(1),
            Protection::Unseen,
        );
        let facts = [0, 1, 2].map(|index| VcpuFacts { index, thread_id: None });
        let found = vcpus(&facts, Some(&rate), &HashMap::new());
        assert_eq!(found.iter().map(|vcpu| vcpu.thread_id).collect::<Vec<_>>(), [Some(5), Some(9), None]);
        assert!((found[0].pages_per_second - 30.0).abs() < 1e-9);
    }
}
