//! Measuring by reading guest memory: the only way where KVM tells nothing, and one that changes nothing in the VM.

use super::window::ram_slots;
use super::{Allowed, Profile, ProfileError, ProfileRequest, Progress};
use crate::foreign::{ProcessMemory, guess_ram};
use crate::model::{CurvePoint, RamSlot, WriteCurve};
use crate::service::clock::MonotonicClock;
use crate::service::interrupt::Interrupt;
use crate::service::inventory::{self, HostVm};
use crate::service::observe::Observed;
use crate::track::{Sampler, SamplingOptions};

/// Measures a VM's profile by sampling.
pub(super) fn profile(
    request: &ProfileRequest,
    found: HostVm,
    allowed: Allowed,
    interrupt: &Interrupt,
    progress: Progress<'_>,
) -> Result<Profile, ProfileError> {
    if !allowed.read_memory {
        return Err(ProfileError::NeedsPermission {
            vm: found.name,
            what: "sampled",
            flag: "--allow-read-memory",
            key: "read_memory",
        });
    }
    let mut notes = vec!["sampling shows what was written, not by whom nor where".to_owned()];
    let vm = match inventory::kernel_view() {
        Some(mut view) => inventory::again(&found, &request.run_dir, &mut view).unwrap_or(found),
        None => found,
    };
    let slots = ram_slots(&vm);
    let slots = if slots.is_empty() {
        let guessed = guess_ram(vm.pid)?;
        notes.push(guessed.meaning);
        guessed.slots
    } else {
        slots
    };
    let memory = ProcessMemory::of_pid(vm.pid, &slots)?;
    progress(0, 1);
    let mut windows: Vec<_> =
        SamplingOptions::default().windows.into_iter().filter(|length| *length < request.window).collect();
    windows.push(request.window);
    let options = SamplingOptions { windows, seed: u64::from(vm.pid), ..SamplingOptions::default() };
    let mut sampler = Sampler::new(memory, MonotonicClock, options)?;
    let sampled = sampler.measure()?;
    if interrupt.wait_until(std::time::Instant::now()) {
        return Err(ProfileError::Interrupted);
    }
    progress(1, 1);
    let points = sampled.windows.iter().map(|window| CurvePoint {
        interval_ns: window.effective_interval_ns.max(1),
        unique_pages: window.unique_pages as f64,
        low_pages: window.unique_pages_low as f64,
        high_pages: window.unique_pages_high as f64,
    });
    let last = sampled.windows.last().map_or(1, |window| window.effective_interval_ns);
    let curve = WriteCurve::from_measured(points.collect()).map_err(|_| {
        ProfileError::Sampling(crate::track::SamplingError::Unreadable("no window was finished".to_owned()))
    })?;
    Ok(Profile {
        vm: Observed::of(&vm),
        regime: sampled.regime,
        meaning: sampled.meaning,
        is_lower_bound: sampled.regime.is_lower_bound(),
        granularity_bytes: None,
        notes,
        window_ns: last,
        windows: 1,
        memory_bytes: slots.iter().map(|slot: &RamSlot| slot.bytes).sum(),
        curve,
        exact_unique_pages: None,
        fault_cost_ns: None,
        writers: Vec::new(),
        heat: Vec::new(),
        ram: slots.iter().map(RamSlot::range).collect(),
        sampled: Some(sampled),
        lost_events: None,
        cost: None,
        missing_sources: Vec::new(),
    })
}
