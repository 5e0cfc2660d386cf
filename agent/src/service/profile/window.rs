//! Measuring in windows in which every page is write-protected at the start, by whoever does it.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::writers::{self, Window};
use super::{Allowed, Profile, ProfileError, ProfileRequest, Progress, WriterProfile};
use crate::foreign::{Permission, SoftDirty, thread_time};
use crate::model::{
    AddressSpace, GuestProcess, MemoryRange, PAGE_SIZE, PageBitmap, PageSubset, RamSlot, RegionHeat, Slowed, WriteCurve,
};
use crate::port::{Arm, ArmError, Clock, EventSample, EventSource, LostEvents, Protected, ThreadEvents};
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

/// Pages of a huge mapping.
const PAGES_OF_HUGE: u64 = 512;
/// The log stays on between two windows that lie no further apart: a VM whose mappings are split runs some percent slower, and one whose
/// mappings are split again takes a fault a page.
const MAY_STAY_ON: Duration = Duration::from_secs(4);
/// How long a VM may take to map its memory again once its mappings have been split, and how often that is looked at.
const SETTLED_WITHIN: Duration = Duration::from_secs(1);
const SETTLING: Duration = Duration::from_millis(20);

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

/// The part of a window that a vCPU may wait for a CPU without a word.
const HELD_UP: f64 = 0.05;
/// How much of a busy vCPU's time small mappings take: between 3 and 12 % of guests that write 256 MiB without a pause, one page after the other,
/// or at random, where guest and host both have page tables of their own.
const SMALL_MAPPINGS: f64 = 0.15;
/// The part of a VM's time that windows may take on average, unless told otherwise.
const MAX_SLOWDOWN: f64 = 0.02;

/// How long to leave a VM alone after so much of its time was taken.
fn rest(lost: Duration, max_slowdown: f64) -> Duration {
    lost.div_f64(max_slowdown.clamp(0.001, 1.0)).saturating_sub(lost)
}

/// Opens windows of one VM.
struct Opener<'a> {
    vm: &'a HostVm,
    counters: &'a mut KernelCounters,
    protector: &'a mut Protector,
    interrupt: &'a Interrupt,
    /// What a fault costs.
    fault_cost: Duration,
    /// Of the next window's subset.
    seed: u64,
    /// Faults of each thread so far.
    faults: BTreeMap<u32, u64>,
    /// Since when the log is on.
    began: Instant,
}

impl<'a> Opener<'a> {
    fn new(
        vm: &'a HostVm,
        counters: &'a mut KernelCounters,
        protector: &'a mut Protector,
        interrupt: &'a Interrupt,
        fault_cost: Duration,
        seed: u64,
    ) -> Self {
        Self { vm, counters, protector, interrupt, fault_cost, seed, faults: BTreeMap::new(), began: Instant::now() }
    }

    /// What all this has taken, at most, of the time of any vCPU that is never idle; one that is makes up for it.
    fn lost(&self, idle: &BTreeMap<u32, f64>) -> Duration {
        let busy =
            self.faults.iter().filter(|(thread, _)| idle.get(thread).is_none_or(|&idle| idle < Slowed::PACED_IDLE));
        let Some(most) = busy.map(|(_, &faults)| faults).max() else { return Duration::ZERO };
        self.fault_cost.mul_f64(most as f64 * Slowed::LIKELY_DEARER) + self.began.elapsed().mul_f64(self.longer() / 2.0)
    }

    /// By which part longer small mappings may make a vCPU's work.
    fn longer(&self) -> f64 {
        if matches!(self.protector, Protector::Log(_)) { SMALL_MAPPINGS } else { 0.0 }
    }

    /// Adds what was made writable between two looks to the faults.
    fn count_faults(&mut self, threads: &BTreeMap<u32, ThreadEvents>) {
        for (&thread, events) in threads {
            // A huge mapping is one fault.
            let pages = events.pages_made_writable.saturating_sub(events.huge_mappings * PAGES_OF_HUGE);
            *self.faults.entry(thread).or_default() += pages;
        }
    }

    /// Switches the log on, has huge mappings split, and waits until little but writes to protected pages makes events. Who split them in the
    /// window would count what is read then too, and slow the VM down where it is measured.
    fn settle(&mut self) -> Result<(), ProfileError> {
        let Protector::Log(arm) = self.protector else { return Ok(()) };
        // Protecting one page splits the mapping that it is part of, and drops the other pages' parts of it: they come back as they are touched
        // (`kvm_mmu_slot_gfn_write_protect`, arch/x86/kvm/mmu/mmu.c), but where KVM splits eagerly.
        let each = PageSubset::one_in(PAGES_OF_HUGE.ilog2(), self.seed);
        if arm.arm_at(each, 0)?.is_none_or(|did| did.was_on || did.subset != each.raw()) {
            return Ok(());
        }
        let mut nobodys = self.counters.empty_pages();
        let mut before = self.counters.sample(&mut nobodys)?;
        let limit = Instant::now() + SETTLED_WITHIN;
        loop {
            let began = Instant::now();
            if self.interrupt.wait_until(began + SETTLING) {
                return Err(ProfileError::Interrupted);
            }
            let now = self.counters.sample(&mut nobodys)?;
            let new = since(&before, &now);
            self.count_faults(&new);
            let most = new.values().map(|events| events.pages_made_writable).max().unwrap_or(0);
            if wanted_shift(most, 1, began.elapsed(), self.fault_cost) == 0 || Instant::now() >= limit {
                return Ok(());
            }
            before = now;
        }
    }

    /// Which part of the pages to protect, as the exponent of [`PageSubset::one_in`]: as large a one as lets faults take no more than
    /// [`FAULT_SHARE`] of any vCPU's time.
    fn choose(&mut self) -> Result<u32, ProfileError> {
        if !matches!(self.protector, Protector::Log(_)) {
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
            let wanted = wanted_shift(most + 1, 1 << shift, shown.window.length, self.fault_cost);
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
        let times = || threads.iter().map(|&thread| thread_time(self.vm.pid, thread));
        let times_before: Vec<_> = times().collect();
        let (looked, now) = (clock.now(), Instant::now());
        let interrupted = self.interrupt.wait_until(now + (began + length).saturating_sub(looked));
        let (ended, after_window) = (clock.now(), armed.counters.sample(&mut pages)?);
        let watched_for = ended.saturating_sub(looked).as_secs_f64();
        let (mut idle, mut waited) = (BTreeMap::new(), 0.0f64);
        for ((&thread, before), now) in threads.iter().zip(times_before).zip(times()) {
            let (Some(before), Some(now)) = (before, now) else { continue };
            let share = |time: Duration| (time.as_secs_f64() / watched_for).min(1.0);
            let wait = now.waited.unwrap_or_default().saturating_sub(before.waited.unwrap_or_default());
            idle.insert(thread, (1.0 - share(now.ran.saturating_sub(before.ran) + wait)).max(0.0));
            waited = waited.max(share(wait));
        }
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
        let threads = since(&before, &after_window);
        self.count_faults(&threads);
        let window = Window {
            length: ended.saturating_sub(began),
            begin: (after, within),
            every: subset.every(),
            threads,
            idle,
            longer: self.longer(),
            waited,
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
            Protector::Others => {
                Some(Protected { began_ns: at_ns, ended_ns: at_ns, subset: subset.raw(), was_on: true })
            }
        };
        Ok(did.unwrap_or_else(|| Protected { began_ns, ended_ns: now(), subset: PageSubset::ALL.raw(), was_on: false }))
    }
}

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        self.counters.disarm();
    }
}

/// Someone protects, or gets ready to; on drop nobody does any more, and the VM writes freely.
struct Protecting<'a>(&'a mut Protector);

impl Protecting<'_> {
    fn let_go(&mut self) {
        let done = match self.0 {
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

impl Drop for Protecting<'_> {
    fn drop(&mut self) {
        self.let_go();
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
