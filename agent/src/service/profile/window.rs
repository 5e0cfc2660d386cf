//! Measuring in windows in which every page is write-protected at the start, by whoever does it.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use serde::Serialize;

use super::writers::{self, Window};
use super::{Allowed, Profile, ProfileError, ProfileRequest, Progress, WriterProfile};
use crate::foreign::{Permission, SoftDirty};
use crate::model::{AddressSpace, GuestProcess, MemoryRange, PageBitmap, RamSlot, RegionHeat, WriteCurve};
use crate::port::{Arm, EventSample, EventSource, LostEvents};
use crate::probe::{KernelCounters, ProgramCost, syscall};
use crate::service::audit;
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
    one(window, counters, &mut Protector::Log(arm), interrupt, &mut measured)?;
    let mut nobodys = counters.empty_pages();
    let after = (Instant::now(), counters.sample(&mut nobodys)?);
    let Figures { curve, writers, .. } = measured.figures(vm, &BTreeMap::new(), fault_cost);
    Ok(Single { length: measured.spent(), unique_pages: measured.unique.iter().sum(), curve, writers, after })
}

/// Windows in which events were counted.
struct Measured {
    windows: Vec<Window>,
    /// All pages of all windows.
    pages: PageBitmap,
    /// Different pages in each window.
    unique: Vec<u64>,
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
        Self { windows: Vec::new(), pages, unique: Vec::new(), lost }
    }

    /// The length of all windows together.
    fn spent(&self) -> Duration {
        self.windows.iter().map(|window| window.length).sum()
    }

    /// What they say.
    fn figures(&self, vm: &HostVm, processes: &BTreeMap<AddressSpace, GuestProcess>, fault_cost: Duration) -> Figures {
        let window_ns = (self.spent().as_nanos() as u64 / self.windows.len().max(1) as u64).max(1);
        let numbers = writers::vcpu_numbers(&vm.vcpus, &self.windows);
        let (curve, mut writers) = writers::curves(&self.windows, &numbers, processes, fault_cost);
        let curve = curve.unwrap_or_else(|| still(window_ns));
        let ram: Vec<MemoryRange> = ram_slots(vm).iter().map(RamSlot::range).collect();
        let heat = writers::heat(&self.pages, &ram);
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
        let Self { watched, counters, protector, .. } = self;
        let measured = measure(request, watched, counters, protector, interrupt, progress)?;
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
        let count = measured.windows.len().max(1);
        let (granularity, note) = granularity(protector, measured);
        notes.extend(note);
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
            exact_unique_pages: Some(measured.unique.iter().sum::<u64>() as f64 / count as f64),
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
    interrupt: &Interrupt,
    progress: Progress<'_>,
) -> Result<Measured, ProfileError> {
    let mut measured = Measured::none(counters);
    let mut done = 0;
    while done < request.windows {
        progress(done, request.windows);
        let began = Instant::now();
        let result = one(request.window, counters, protector, interrupt, &mut measured);
        // Whatever failed of a VM that has ended, failed since it has.
        if !matches!(result, Err(ProfileError::Interrupted)) && !watched.refresh() {
            return Err(ProfileError::Gone(watched.vm.name.clone()));
        }
        result?;
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

/// One window. Whatever happens in it, the VM writes freely behind it.
fn one(
    window: Duration,
    counters: &mut KernelCounters,
    protector: &mut Protector,
    interrupt: &Interrupt,
    measured: &mut Measured,
) -> Result<(), ProfileError> {
    let mut pages = counters.empty_pages();
    let before = counters.sample(&mut pages)?;
    pages.clear();
    // From before the protection on, so that no first write is missed. Pages are protected one after the other, so that on average their
    // window begins in the middle of it.
    counters.armed(Some(Duration::ZERO));
    let (mut armed, protecting) = (Armed { protector, counters }, Instant::now());
    armed.protect()?;
    let half = protecting.elapsed() / 2;
    armed.counters.armed(Some(half));
    let began = Instant::now();
    let interrupted = interrupt.wait_until(began + window);
    let length = began.elapsed() + half;
    let after = armed.counters.sample(&mut pages)?;
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
    let window = Window { length, threads: since(&before, &after) };
    let lost = after.lost.since(&before.lost);
    // Marks hold what devices and the VMM wrote too; events do not.
    let (unique, seen) = marked.unwrap_or_else(|| (pages.count().0, pages));
    measured.unique.push(unique);
    for (index, &word) in seen.words().iter().enumerate().take(measured.pages.words().len()) {
        measured.pages.or_word(index, word);
    }
    measured.windows.push(window);
    measured.lost = measured.lost.plus(&lost);
    Ok(())
}

/// The protection of one window; gone on drop.
struct Armed<'a> {
    protector: &'a mut Protector,
    counters: &'a mut KernelCounters,
}

impl Armed<'_> {
    fn protect(&mut self) -> Result<(), crate::port::ArmError> {
        match self.protector {
            Protector::Log(arm) => arm.arm(),
            Protector::Marks(marks) => marks.arm(),
            Protector::Others => Ok(()),
        }
    }
}

impl Drop for Armed<'_> {
    fn drop(&mut self) {
        self.counters.armed(None);
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
