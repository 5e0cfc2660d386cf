//! Measuring in windows at whose start pages are write-protected, by whoever does it.
//!
//! Owns what windows say together, and how they follow one another; `opener` opens each.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::opener::{MAX_SLOWDOWN, Opener, Shown, first_seed, rest};
use super::protector::{Protecting, Protector, ram_slots};
use super::writers::{self, Window};
use super::{Allowed, Profile, ProfileError, ProfileRequest, Progress, WriterProfile};
use crate::model::{AddressSpace, GuestProcess, MemoryRange, PAGE_SIZE, PageBitmap, RamSlot, RegionHeat, WriteCurve};
use crate::port::{Arm, EventSample, EventSource, LostEvents};
use crate::probe::{KernelCounters, ProgramCost, syscall};
use crate::service::guest_names::GuestNames;
use crate::service::interrupt::Interrupt;
use crate::service::inventory::HostVm;
use crate::service::observe::{Observed, missing_sources};
use crate::service::watch::WatchedVm;
use crate::track::Regime;

/// The part of a window that a vCPU may wait for a CPU without a word.
const HELD_UP: f64 = 0.05;
/// The log stays on between two windows that lie no further apart: a VM whose mappings are split runs some percent slower, and one whose
/// mappings are split again takes a fault a page.
const MAY_STAY_ON: Duration = Duration::from_secs(4);

/// What the measurement cost the host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct WindowCost {
    /// Time that the BPF programs ran, by the kernel's count.
    pub bpf_run_time_ns: u64,
    /// How often they ran.
    pub bpf_runs: u64,
    /// The same as a part of one core, over the windows.
    pub bpf_core_share: f64,
}

/// What one window of a hosted VM showed, for those who watch it anyway.
pub(in crate::service) struct Single {
    /// Its length.
    pub(in crate::service) length: Duration,
    /// Different pages that were written in it.
    pub(in crate::service) unique_pages: u64,
    /// The VM's curve.
    pub(in crate::service) curve: WriteCurve,
    /// Who wrote, and where.
    pub(in crate::service) writers: Vec<WriterProfile>,
    /// How long the VM is to be left alone now.
    pub(in crate::service) rest: Duration,
    /// The counters when the VM wrote freely again, and when that was: what comes later belongs to no window.
    pub(in crate::service) after: (Instant, EventSample),
}

/// Opens one window of a VM whose counters the caller has. The VM writes freely behind it, whatever happens.
pub(in crate::service) fn single(
    vm: &HostVm,
    counters: &mut KernelCounters,
    arm: Box<dyn Arm>,
    window: Duration,
    fault_cost: Duration,
    interrupt: &Interrupt,
) -> Result<Single, ProfileError> {
    let mut measured = Measured::none(counters);
    let mut protector = Protector::Log(arm);
    let protecting = Protecting(&mut protector);
    let mut opener = Opener::new(vm, counters, protecting.0, interrupt, fault_cost, first_seed());
    opener.settle()?;
    let shift = opener.choose()?;
    let shown = opener.open(window, shift)?;
    let rest = rest(opener.lost(&shown.window.idle), MAX_SLOWDOWN);
    drop(protecting);
    measured.add(shown);
    let mut nobodys = counters.empty_pages();
    let after = (Instant::now(), counters.sample(&mut nobodys)?);
    let unique_pages = measured.unique_pages() as u64;
    let Figures { curve, writers, .. } = measured.figures(vm, &BTreeMap::new(), fault_cost);
    Ok(Single { length: measured.spent(), unique_pages, curve, writers, rest, after })
}

/// Windows in which events were counted.
struct Measured {
    windows: Vec<Window>,
    /// All pages of all windows.
    pages: PageBitmap,
    /// Different pages that were seen in each window.
    seen: Vec<u64>,
    /// The same by region, over all windows.
    seen_by_region: BTreeMap<u64, u64>,
    lost: LostEvents,
    /// What each window took of the time of the vCPU that it slowed down most.
    guest_time_lost: Vec<Duration>,
    /// How long the VM is to be left alone after the last.
    rest: Duration,
}

/// What windows say of a VM.
struct Figures {
    /// Mean length of the windows.
    window_ns: u64,
    curve: WriteCurve,
    writers: Vec<WriterProfile>,
    heat: Vec<RegionHeat>,
    ram: Vec<MemoryRange>,
}

impl Measured {
    /// No window yet.
    fn none(counters: &KernelCounters) -> Self {
        let (pages, lost) = (counters.empty_pages(), LostEvents::default());
        let (windows, seen, guest_time_lost) = (Vec::new(), Vec::new(), Vec::new());
        Self { windows, pages, seen, seen_by_region: BTreeMap::new(), lost, guest_time_lost, rest: Duration::ZERO }
    }

    fn add(&mut self, shown: Shown) {
        let Shown { window, seen, pages, lost, .. } = shown;
        self.seen.push(seen);
        for (region, pages) in writers::by_region(pages.words()) {
            *self.seen_by_region.entry(region).or_default() += pages;
        }
        for (index, &word) in pages.words().iter().enumerate().take(self.pages.words().len()) {
            self.pages.or_word(index, word);
        }
        self.windows.push(window);
        self.lost = self.lost.plus(&lost);
    }

    /// Pages that each page stands for.
    fn every(&self) -> u64 {
        self.windows.first().map_or(1, |window| window.every)
    }

    /// The length of all windows together.
    fn spent(&self) -> Duration {
        self.windows.iter().map(|window| window.length).sum()
    }

    /// Different pages in a window, on average.
    fn unique_pages(&self) -> f64 {
        (self.seen.iter().sum::<u64>() * self.every()) as f64 / self.seen.len().max(1) as f64
    }

    /// What they say.
    fn figures(&self, vm: &HostVm, processes: &BTreeMap<AddressSpace, GuestProcess>, fault_cost: Duration) -> Figures {
        let window_ns = (self.spent().as_nanos() as u64 / self.windows.len().max(1) as u64).max(1);
        let numbers = writers::vcpu_numbers(&vm.vcpus, &self.windows);
        let ram: Vec<MemoryRange> = ram_slots(vm).iter().map(RamSlot::range).collect();
        let known = ram.iter().map(|range| range.bytes).sum::<u64>() / PAGE_SIZE as u64;
        let population = if known > 0 { known } else { self.pages.len().0 };
        let (curve, mut writers) = writers::curves(&self.windows, &numbers, processes, fault_cost, population);
        let curve = curve.unwrap_or_else(|| still(window_ns));
        let heat = if self.every() == 1 {
            writers::heat(writers::by_region(self.pages.words()), &ram)
        } else {
            // Each window had other pages stand for all: the mean of what they say.
            let scale = self.every() as f64 / self.windows.len() as f64;
            let scaled = |(&region, &pages): (&u64, &u64)| (region, (pages as f64 * scale).round() as u64);
            writers::heat(self.seen_by_region.iter().map(scaled), &ram)
        };
        writers.extend(writers::regions(&heat, &curve));
        Figures { window_ns, curve, writers, heat, ram }
    }
}

/// What measures one VM by events.
pub(super) struct Events {
    watched: WatchedVm,
    counters: KernelCounters,
    protector: Protector,
    allowed: Allowed,
    fault_cost: Option<Duration>,
    names: GuestNames,
    /// While it is open, the kernel counts what programs cost.
    _counting: Option<OwnedFd>,
}

impl Events {
    /// Measures what a fault costs on this host.
    pub(super) fn new(
        watched: WatchedVm,
        counters: KernelCounters,
        protector: Protector,
        allowed: Allowed,
        names: GuestNames,
    ) -> Result<Self, ProfileError> {
        let fault_cost = match protector.regime() {
            Regime::Logged => None,
            _ => Some(crate::trial::kvm::fault_cost().map_err(ProfileError::FaultCost)?),
        };
        Ok(Self { watched, counters, protector, allowed, fault_cost, names, _counting: syscall::count_runs().ok() })
    }

    /// Measures the VM's profile.
    pub(super) fn measure(
        &mut self,
        request: &ProfileRequest,
        interrupt: &Interrupt,
        progress: Progress<'_>,
    ) -> Result<Profile, ProfileError> {
        let before = self.counters.probes().costs();
        let Self { watched, counters, protector, fault_cost, .. } = self;
        let cost_of_fault = fault_cost.unwrap_or_default();
        let measured = measure(request, watched, counters, protector, cost_of_fault, interrupt, progress)?;
        let cost = cost(&before, &self.counters.probes().costs(), measured.spent());
        let mut notes = Vec::new();
        let mut processes = BTreeMap::new();
        if request.names {
            let threads = measured.windows.iter().flat_map(|window| window.threads.values());
            match self.names.processes(&self.watched.vm, self.allowed.read_memory, threads) {
                Ok(found) => processes = found,
                Err(reason) => notes.push(format!("the guest's processes are not named: {reason}")),
            }
        }
        Ok(self.told(&measured, cost, &processes, notes))
    }

    /// The profile of what was measured.
    fn told(
        &self,
        measured: &Measured,
        cost: WindowCost,
        processes: &BTreeMap<AddressSpace, GuestProcess>,
        mut notes: Vec<String>,
    ) -> Profile {
        let Self { watched, counters, protector, fault_cost, .. } = self;
        let regime = protector.regime();
        let Figures { window_ns, curve, writers, heat, ram } =
            measured.figures(&watched.vm, processes, fault_cost.unwrap_or_default());
        let (granularity, note) = granularity(protector, measured);
        notes.extend(note);
        let waited = measured.windows.iter().map(|window| window.waited).fold(0.0, f64::max);
        if waited > HELD_UP {
            notes.push(format!(
                "a vCPU waited {:.0} % of a window for a CPU of the host: with more CPU the VM would write more",
                waited * 100.0
            ));
        }
        let every = measured.every();
        if every > 1 {
            notes.push(format!(
                "one page of {every} was write-protected and stands for the others, so that faults do not slow the VM down; the interval says how \
                 far that may be off (--protect-one-in 1 protects all)"
            ));
        }
        Profile {
            vm: Observed::of(&watched.vm),
            regime,
            meaning: regime.meaning(),
            is_lower_bound: regime.is_lower_bound(),
            granularity_bytes: Some(granularity),
            notes,
            window_ns,
            windows: measured.windows.len() as u32,
            memory_bytes: watched.vm.memory_bytes.unwrap_or(0),
            curve,
            protected_one_in: every,
            guest_time_lost_ns: measured.guest_time_lost.iter().max().map_or(0, |lost| lost.as_nanos() as u64),
            rest_ns: measured.rest.as_nanos() as u64,
            exact_unique_pages: (every == 1).then(|| measured.unique_pages()),
            fault_cost_ns: fault_cost.map(|cost| cost.as_nanos() as u64),
            writers,
            heat,
            ram,
            sampled: None,
            lost_events: Some(measured.lost.into()),
            cost: Some(cost),
            missing_sources: missing_sources(counters.hooks()),
        }
    }
}

/// The curve of a VM that wrote nothing.
fn still(window_ns: u64) -> WriteCurve {
    let point = crate::model::CurvePoint::exact(window_ns, 0.0);
    WriteCurve::from_measured(vec![point])
        .unwrap_or_else(|error| unreachable!("one point of a checked length is a curve: {error}"))
}

fn granularity(protector: &Protector, measured: &Measured) -> (u64, Option<String>) {
    const HUGE: u64 = 2 << 20;
    match protector {
        Protector::Marks(marks) => match marks.granularity() {
            Ok(granularity) => (granularity.largest_bytes, Some(format!("granularity: {granularity}"))),
            Err(error) => (4096, Some(error.to_string())),
        },
        _ => {
            let huge: u64 = measured.windows.iter().flat_map(|w| w.threads.values()).map(|e| e.huge_mappings).sum();
            (if huge > 0 { HUGE } else { 4096 }, None)
        }
    }
}

fn measure(
    request: &ProfileRequest,
    watched: &mut WatchedVm,
    counters: &mut KernelCounters,
    protector: &mut Protector,
    fault_cost: Duration,
    interrupt: &Interrupt,
    progress: Progress<'_>,
) -> Result<Measured, ProfileError> {
    let mut measured = Measured::none(counters);
    let (mut done, mut shift, mut seed) = (0, None, first_seed());
    let mut protecting = Protecting(protector);
    while done < request.windows {
        progress(done, request.windows);
        let began = Instant::now();
        let mut opener = Opener::new(&watched.vm, counters, protecting.0, interrupt, fault_cost, seed);
        let shown = opener.settle().and_then(|()| {
            let chosen = match (shift, request.protect_one_in) {
                (Some(shift), _) => shift,
                (None, Some(every)) => every.max(1).ilog2(),
                (None, None) => opener.choose()?,
            };
            shift = Some(chosen);
            opener.open(request.window, chosen)
        });
        seed = opener.seed;
        if let Ok(shown) = &shown {
            let lost = opener.lost(&shown.window.idle);
            measured.guest_time_lost.push(lost);
            measured.rest = rest(lost, request.max_slowdown);
        }
        // Whatever failed of a VM that has ended, failed since it has.
        if !matches!(shown, Err(ProfileError::Interrupted)) && !watched.refresh() {
            return Err(ProfileError::Gone(watched.vm.name.clone()));
        }
        measured.add(shown?);
        done += 1;
        // Between two windows the VM writes as it likes.
        let rest = began.elapsed().mul_f64((1.0 / request.duty.clamp(0.001, 1.0)) - 1.0).max(measured.rest);
        if rest > MAY_STAY_ON {
            protecting.let_go();
        }
        if done < request.windows && interrupt.wait_until(Instant::now() + rest) {
            return Err(ProfileError::Interrupted);
        }
    }
    progress(done, request.windows);
    Ok(measured)
}

/// What the programs have cost between two looks.
fn cost(before: &[ProgramCost], after: &[ProgramCost], spent: Duration) -> WindowCost {
    let sum = |costs: &[ProgramCost], of: fn(&ProgramCost) -> u64| costs.iter().map(of).sum::<u64>();
    let since = |of| sum(after, of).saturating_sub(sum(before, of));
    let bpf_run_time_ns = since(|cost| cost.stats.run_time_ns);
    let bpf_runs = since(|cost| cost.stats.run_count);
    let share = if spent.is_zero() { 0.0 } else { bpf_run_time_ns as f64 / spent.as_nanos() as f64 };
    WindowCost { bpf_run_time_ns, bpf_runs, bpf_core_share: share }
}
