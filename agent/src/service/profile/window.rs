//! Measuring in windows in which every page is write-protected at the start, by whoever does it.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::writers::{self, Window};
use super::{Allowed, Profile, ProfileError, ProfileRequest, Progress, WriterProfile};
use crate::foreign::{Permission, SoftDirty, maps, thread_cpu_time};
use crate::model::{
    AddressSpace, GuestProcess, MemoryRange, PAGE_SIZE, PageBitmap, PageSubset, RamSlot, RegionHeat, WriteCurve,
};
use crate::port::{Arm, ArmError, Clock, EventSample, EventSource, LostEvents, Protected};
use crate::probe::{KernelCounters, ProgramCost, syscall};
use crate::service::audit;
use crate::service::clock::MonotonicClock;
use crate::service::guest_names::GuestNames;
use crate::service::interrupt::Interrupt;
use crate::service::inventory::HostVm;
use crate::service::observe::{Observed, missing_sources};
use crate::service::watch::WatchedVm;
use crate::track::Regime;

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

/// Who protects.
pub(super) enum Protector {
    /// The VM's own dirty log, switched on by us.
    Log(Box<dyn Arm>),
    /// Soft-dirty marks.
    Marks(SoftDirty),
    /// Someone else's dirty log.
    Others,
}

/// The slots that the guest can write.
pub(in crate::service) fn ram_slots(vm: &HostVm) -> Vec<RamSlot> {
    let slots = vm.slots.iter().filter(|slot| !slot.read_only);
    slots
        .map(|slot| RamSlot { start: slot.range.start, bytes: slot.range.bytes, host_address: slot.host_address })
        .collect()
}

impl Protector {
    /// Soft-dirty marks, with the operator's permission; recorded.
    pub(super) fn soft_dirty(request: &ProfileRequest, vm: &HostVm) -> Result<Self, ProfileError> {
        let by = if request.allowed.soft_dirty { "--allow-soft-dirty" } else { "[track] soft_dirty" };
        let marks = SoftDirty::of(&vm.process, &ram_slots(vm), Permission::granted(by));
        let action = audit::Action {
            who: audit::me(),
            what: "write-protect by soft-dirty marks",
            vm_id: vm.vm_id,
            before: "unprotected".to_owned(),
            after: format!("{} windows of {} ms, allowed by {by}", request.windows, request.window.as_millis()),
            result: marks.as_ref().map_or_else(ToString::to_string, |_| "ok".to_owned()),
        };
        audit::record(&request.state_dir, &action);
        Ok(Self::Marks(marks?))
    }

    fn regime(&self) -> Regime {
        match self {
            Self::Log(_) => Regime::Armed,
            Self::Marks(_) => Regime::SoftDirty,
            Self::Others => Regime::Logged,
        }
    }
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
    let mut opener = Opener { vm, counters, protector: &mut protector, interrupt, seed: first_seed() };
    let shift = opener.choose(fault_cost)?;
    measured.add(opener.open(window, shift)?);
    let mut nobodys = counters.empty_pages();
    let after = (Instant::now(), counters.sample(&mut nobodys)?);
    let unique_pages = measured.unique_pages() as u64;
    let Figures { curve, writers, .. } = measured.figures(vm, &BTreeMap::new(), fault_cost);
    Ok(Single { length: measured.spent(), unique_pages, curve, writers, after })
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
        Self { windows: Vec::new(), pages, seen: Vec::new(), seen_by_region: BTreeMap::new(), lost }
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
    ) -> Result<Self, ProfileError> {
        let fault_cost = match protector.regime() {
            Regime::Logged => None,
            _ => Some(crate::trial::kvm::fault_cost().map_err(ProfileError::FaultCost)?),
        };
        let names = GuestNames::default();
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
    while done < request.windows {
        progress(done, request.windows);
        let began = Instant::now();
        let mut opener = Opener { vm: &watched.vm, counters, protector, interrupt, seed };
        let chosen = match (shift, request.protect_one_in) {
            (Some(shift), _) => Ok(shift),
            (None, Some(every)) => Ok(every.max(1).ilog2()),
            (None, None) => opener.choose(fault_cost),
        };
        let shown = chosen.and_then(|chosen| {
            shift = Some(chosen);
            opener.open(request.window, chosen)
        });
        seed = opener.seed;
        // Whatever failed of a VM that has ended, failed since it has.
        if !matches!(shown, Err(ProfileError::Interrupted)) && !watched.refresh() {
            return Err(ProfileError::Gone(watched.vm.name.clone()));
        }
        measured.add(shown?);
        done += 1;
        // Between two windows the VM writes as it likes.
        let rest = began.elapsed().mul_f64((1.0 / request.duty.clamp(0.001, 1.0)) - 1.0);
        if done < request.windows && interrupt.wait_until(Instant::now() + rest) {
            return Err(ProfileError::Interrupted);
        }
    }
    progress(done, request.windows);
    Ok(measured)
}

/// A number that differs from measurement to measurement, so that their subsets do.
fn first_seed() -> u64 {
    MonotonicClock.now().as_nanos() as u64
}

/// How long before it begins a window is ordered: the log is on by then.
const LEAD: Duration = Duration::from_millis(10);
/// A window that began later than ordered by more is opened again, and ordered earlier: first writes are counted in bins that grow with time.
const LATE: Duration = Duration::from_millis(2);
/// How often that is tried, and by how much earlier each time.
const TRIES: u32 = 4;
const EARLIER: u32 = 3;

/// Windows that only show how much there is to see.
const PILOT: Duration = Duration::from_millis(20);
const PILOTS: usize = 4;
/// The part of the pages that the first of them protects: 2^-n.
const FIRST_SHIFT: u32 = 6;
/// How many times as many pages each further one protects at most, as an exponent.
const STEP: u32 = 4;
/// First writes in a pilot that say enough of the rate: within a half, for sure.
const ENOUGH: u64 = 16;
/// The part of a vCPU's time that faults may take at a window's begin, where they come most often; by the fault cost as it is measured.
const FAULT_SHARE: f64 = 0.035;

/// What one window showed.
struct Shown {
    window: Window,
    /// Different pages among those that were protected.
    seen: u64,
    /// These pages.
    pages: PageBitmap,
    lost: LostEvents,
    /// Whether these pages were protected, and no others.
    chosen: bool,
}

/// Opens windows of one VM. Whatever happens in one, the VM writes freely behind it.
struct Opener<'a> {
    vm: &'a HostVm,
    counters: &'a mut KernelCounters,
    protector: &'a mut Protector,
    interrupt: &'a Interrupt,
    /// Of the next window's subset.
    seed: u64,
}

impl Opener<'_> {
    /// Which part of the pages to protect, as the exponent of [`PageSubset::one_in`]: as large a one as lets faults take no more than
    /// [`FAULT_SHARE`] of any vCPU's time.
    fn choose(&mut self, fault_cost: Duration) -> Result<u32, ProfileError> {
        // Others protect what they protect; and a page of a huge mapping cannot be protected without all others of it.
        let can = match self.protector {
            Protector::Log(_) => !huge_mappings(self.vm),
            _ => false,
        };
        if !can {
            return Ok(0);
        }
        let mut shift = FIRST_SHIFT;
        for _ in 0..PILOTS {
            let shown = self.open(PILOT, shift)?;
            if !shown.chosen {
                return Ok(0);
            }
            let by_thread = shown.window.threads.values().map(|events| sum(&events.first_writes));
            let most = by_thread.max().unwrap_or(0);
            let wanted = wanted_shift(most + 1, 1 << shift, shown.window.length, fault_cost);
            if most >= ENOUGH || wanted >= shift || (wanted == 0 && shift <= STEP) {
                return Ok(wanted);
            }
            shift = wanted.max(shift.saturating_sub(STEP));
        }
        Ok(shift)
    }

    /// One window of one page of each `2^shift`.
    fn open(&mut self, length: Duration, shift: u32) -> Result<Shown, ProfileError> {
        let mut lead = LEAD;
        for further in (0..TRIES).rev() {
            if let Some(shown) = self.try_open(length, shift, lead, further == 0)? {
                return Ok(shown);
            }
            lead *= EARLIER;
        }
        unreachable!("the last try takes a late begin as it is")
    }

    /// One window, ordered so long before; none if it began late and must not.
    fn try_open(
        &mut self,
        length: Duration,
        shift: u32,
        lead: Duration,
        may_be_late: bool,
    ) -> Result<Option<Shown>, ProfileError> {
        let clock = MonotonicClock;
        self.seed = self.seed.wrapping_add(1);
        let subset = PageSubset::one_in(shift, self.seed);
        let ordered = match self.protector {
            Protector::Log(_) => clock.now() + lead,
            _ => clock.now(),
        };
        let ordered_ns = ordered.as_nanos() as u64;
        let mut pages = self.counters.empty_pages();
        // From here on to the begin no page is marked, so that each is marked in the window when it is written first.
        self.counters.arm(ordered_ns, subset);
        let before = self.counters.sample(&mut pages)?;
        pages.clear();
        let threads: Vec<u32> = self.vm.vcpus.iter().filter_map(|vcpu| vcpu.thread_id).collect();
        let mut armed = Armed { protector: self.protector, counters: self.counters };
        let did = armed.protect(subset, ordered_ns)?;
        // Pages are protected one after the other, so that on average their window begins in the middle of it.
        let after = Duration::from_nanos((did.began_ns / 2 + did.ended_ns / 2).saturating_sub(ordered_ns));
        let within = Duration::from_nanos(did.ended_ns.saturating_sub(did.began_ns) / 2);
        if !may_be_late && did.began_ns.saturating_sub(ordered_ns) > LATE.as_nanos() as u64 {
            return Ok(None);
        }
        let began = ordered + after;
        let ran_before: Vec<_> = threads.iter().map(|&thread| thread_cpu_time(self.vm.pid, thread)).collect();
        let (looked, now) = (clock.now(), Instant::now());
        let interrupted = self.interrupt.wait_until(now + (began + length).saturating_sub(looked));
        let (ended, after_window) = (clock.now(), armed.counters.sample(&mut pages)?);
        let watched_for = ended.saturating_sub(looked).as_secs_f64();
        let idle = threads.iter().zip(ran_before).filter_map(|(&thread, before)| {
            let ran = thread_cpu_time(self.vm.pid, thread)?.saturating_sub(before?);
            Some((thread, 1.0 - (ran.as_secs_f64() / watched_for).min(1.0)))
        });
        let idle = idle.collect();
        let marked = match &*armed.protector {
            Protector::Marks(marks) => {
                let mut marked = marks.empty_pages();
                let writes = marks.read(&mut marked)?;
                Some((writes.iter().map(|slot| slot.pages.0).sum::<u64>(), marked))
            }
            _ => None,
        };
        drop(armed);
        if interrupted {
            return Err(ProfileError::Interrupted);
        }
        if subset != PageSubset::ALL {
            pages.retain(|page| subset.holds(page));
        }
        // Marks hold what devices and the VMM wrote too; events do not.
        let (seen, pages) = marked.unwrap_or_else(|| (pages.count().0, pages));
        let window = Window {
            length: ended.saturating_sub(began),
            begin: (after, within),
            every: subset.every(),
            threads: since(&before, &after_window),
            idle,
        };
        Ok(Some(Shown {
            window,
            seen,
            pages,
            lost: after_window.lost.since(&before.lost),
            chosen: did.subset == subset.raw(),
        }))
    }
}

/// The smallest exponent with which faults take [`FAULT_SHARE`] of a writer's time at most, when so many pages, each for `every`, were written in
/// `length`.
fn wanted_shift(seen: u64, every: u64, length: Duration, fault_cost: Duration) -> u32 {
    let share = (seen * every) as f64 / length.as_secs_f64() * fault_cost.as_secs_f64();
    ((share / FAULT_SHARE).log2().ceil().max(0.0) as u32).min(PageSubset::MAX_SHIFT)
}

fn sum(bins: &[u32]) -> u64 {
    bins.iter().map(|&pages| u64::from(pages)).sum()
}

/// Whether memory of a VM that dunlin runs is mapped by more than single pages; taken for granted where that cannot be seen.
fn huge_mappings(vm: &HostVm) -> bool {
    // Its memory is a memfd's. Looking through all of its mappings takes long; where the kernel never uses huge pages for such, it is needless.
    let chosen = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
    if chosen.is_ok_and(|word| word.contains("[never]") || word.contains("[deny]")) {
        return false;
    }
    let ranges: Vec<_> = ram_slots(vm).iter().map(|slot| slot.host_address..slot.host_address + slot.bytes).collect();
    maps::largest_mapping(vm.pid, &ranges).map_or(true, |bytes| bytes > PAGE_SIZE as u64)
}

/// The protection of one window; gone on drop.
struct Armed<'a> {
    protector: &'a mut Protector,
    counters: &'a mut KernelCounters,
}

impl Armed<'_> {
    /// Protects at the time that was ordered, or at once, and says when that was.
    fn protect(&mut self, subset: PageSubset, at_ns: u64) -> Result<Protected, ArmError> {
        let now = || MonotonicClock.now().as_nanos() as u64;
        let began_ns = now();
        let did = match self.protector {
            Protector::Log(arm) => arm.arm_at(subset, at_ns)?,
            Protector::Marks(marks) => marks.arm().map(|()| None)?,
            Protector::Others => Some(Protected { began_ns: at_ns, ended_ns: at_ns, subset: subset.raw() }),
        };
        Ok(did.unwrap_or_else(|| Protected { began_ns, ended_ns: now(), subset: PageSubset::ALL.raw() }))
    }
}

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        self.counters.disarm();
        let done = match self.protector {
            Protector::Log(arm) => arm.disarm(),
            Protector::Marks(marks) => marks.disarm(),
            Protector::Others => Ok(()),
        };
        if let Err(error) = done {
            // The VM ends the protection by itself when nobody asks again.
            tracing::warn!("{error}");
        }
    }
}

fn since(before: &EventSample, after: &EventSample) -> BTreeMap<u32, crate::port::ThreadEvents> {
    let nothing = crate::port::ThreadEvents::default();
    let threads =
        after.threads.iter().map(|(&thread, now)| (thread, now.since(before.threads.get(&thread).unwrap_or(&nothing))));
    threads.filter(|(_, new)| new.pages_made_writable + new.pages_logged > 0).collect()
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
