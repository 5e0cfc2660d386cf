//! Measuring by reading guest memory: the only way where KVM tells nothing, and one that changes nothing in the VM.

use std::path::Path;
use std::time::{Duration, Instant};

use super::protector::ram_slots;
use super::writers;
use super::{Allowed, Profile, ProfileError, ProfileRequest, Progress, allowed, find};
use crate::foreign::{MemoryOpenError, ProcessMemory, guess_ram};
use crate::model::{CurvePoint, RamSlot, RegionHeat, WriteCurve};
use crate::service::clock::MonotonicClock;
use crate::service::interrupt::Interrupt;
use crate::service::inventory::{self, HostVm};
use crate::service::observe::Observed;
use crate::track::{SampledHeat, Sampler, SamplingError, SamplingOptions, ZeroPages};

/// All regions as they are drawn.
pub(super) fn heat(sampled: &SampledHeat) -> impl Iterator<Item = RegionHeat> + '_ {
    sampled.regions.iter().map(|region| RegionHeat {
        range: region.range,
        unique_pages: region.unique_pages,
        pages: region.pages,
    })
}

/// Pages that say how many are zeros.
const CONTENT_PAGES: u64 = 16_384;

/// A VM whose memory is open.
struct Opened {
    vm: HostVm,
    memory: ProcessMemory,
    slots: Vec<RamSlot>,
    /// How its RAM was guessed, if it was.
    guessed: Option<String>,
}

impl Opened {
    fn new(found: HostVm, run_dir: &Path) -> Result<Self, ProfileError> {
        let vm = match inventory::kernel_view() {
            Some(mut view) => inventory::again(&found, run_dir, &mut view).unwrap_or(found),
            None => found,
        };
        let mut slots = ram_slots(&vm);
        // A VM that ends at this moment has neither slots nor mappings, and is no VM without memory for that.
        let told = |error: MemoryOpenError| {
            if vm.process.has_memory() { error.into() } else { ProfileError::Gone(vm.name.clone()) }
        };
        let mut guessed = None;
        if slots.is_empty() {
            let ram = guess_ram(vm.pid).map_err(told)?;
            guessed = Some(ram.meaning);
            slots = ram.slots;
        }
        let memory = ProcessMemory::of(&vm.process, &slots).map_err(told)?;
        Ok(Self { vm, memory, slots, guessed })
    }
}

/// The part of a VM's memory that is zeros, from a sample; none where its memory may not be read.
///
/// # Errors
/// No such VM, or its memory cannot be read.
pub(in crate::service) fn zero_pages(request: &ProfileRequest) -> Result<Option<ZeroPages>, ProfileError> {
    let found = find(request)?;
    if !allowed(request, &found).read_memory {
        return Ok(None);
    }
    let opened = Opened::new(found, &request.run_dir)?;
    let options = SamplingOptions {
        windows: vec![Duration::from_millis(100)],
        pilot_pages: CONTENT_PAGES,
        changed_wanted: 1,
        seed: u64::from(opened.vm.pid),
        ..SamplingOptions::default()
    };
    Ok(Sampler::new(opened.memory, MonotonicClock, options)?.measure()?.zero_pages)
}

/// What measures one VM by reading its memory.
pub(super) struct Reading {
    vm: HostVm,
    sampler: Sampler<ProcessMemory, MonotonicClock>,
    slots: Vec<RamSlot>,
    notes: Vec<String>,
}

impl Reading {
    /// Opens the VM's memory.
    pub(super) fn open(request: &ProfileRequest, found: HostVm, allowed: Allowed) -> Result<Self, ProfileError> {
        if !allowed.read_memory {
            let (flag, key) = ("--allow-read-memory", "read_memory");
            return Err(ProfileError::NeedsPermission { vm: found.name, what: "sampled", flag, key });
        }
        let mut notes = vec!["sampling shows what was written and where, not by whom".to_owned()];
        let Opened { vm, memory, slots, guessed } = Opened::new(found, &request.run_dir)?;
        notes.extend(guessed);
        let shorter = SamplingOptions::default().windows.into_iter().filter(|length| *length < request.window);
        let windows = shorter.chain([request.window]).collect();
        let options = SamplingOptions { windows, seed: u64::from(vm.pid), ..SamplingOptions::default() };
        let sampler = Sampler::new(memory, MonotonicClock, options)?;
        Ok(Self { vm, sampler, slots, notes })
    }

    /// Measures the VM's profile.
    pub(super) fn measure(&mut self, interrupt: &Interrupt, progress: Progress<'_>) -> Result<Profile, ProfileError> {
        progress(0, 1);
        let sampled = self.sampler.measure()?;
        if interrupt.wait_until(Instant::now()) {
            return Err(ProfileError::Interrupted);
        }
        progress(1, 1);
        let points = sampled.windows.iter().map(|window| CurvePoint {
            interval_ns: window.effective_interval_ns.max(1),
            unique_pages: window.unique_pages as f64,
            low_pages: window.unique_pages_low as f64,
            high_pages: window.unique_pages_high as f64,
        });
        let nothing = |_| ProfileError::Sampling(SamplingError::Unreadable("no window was finished".to_owned()));
        let curve = WriteCurve::from_measured(points.collect()).map_err(nothing)?;
        let heat: Vec<RegionHeat> = heat(&sampled.heat).filter(|region| region.unique_pages > 0).collect();
        Ok(Profile {
            vm: Observed::of(&self.vm),
            regime: sampled.regime,
            meaning: sampled.meaning,
            is_lower_bound: sampled.regime.is_lower_bound(),
            granularity_bytes: None,
            notes: self.notes.clone(),
            window_ns: curve.last().interval_ns,
            windows: 1,
            memory_bytes: self.slots.iter().map(|slot| slot.bytes).sum(),
            writers: writers::regions(&heat, &curve),
            curve,
            protected_one_in: 1,
            guest_time_lost_ns: 0,
            rest_ns: 0,
            exact_unique_pages: None,
            fault_cost_ns: None,
            heat,
            ram: self.slots.iter().map(RamSlot::range).collect(),
            sampled: Some(sampled),
            lost_events: None,
            cost: None,
            missing_sources: Vec::new(),
        })
    }
}
