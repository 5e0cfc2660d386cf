//! A VM's write profile: its curve U(t), who wrote, and where, under one regime.
//!
//! Owns the choice of the regime and the operator's permissions for it; `window` measures with the kernel's events, `sampled` by
//! reading memory. What follows from a profile (a forecast, rogues, drawings) is decided elsewhere.

mod average;
mod opener;
mod protector;
mod running;
mod sampled;
mod window;
mod writers;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

pub(super) use protector::ram_slots;
pub(super) use sampled::zero_pages;
pub use window::WindowCost;
pub(super) use window::{Single, single};

use self::protector::Protector;
use super::config::TrackConfig;
use super::guest_names::{GuestFileError, GuestFiles, GuestNames};
use super::interrupt::Interrupt;
use super::inventory::{self, FindError, HostVm};
use super::observe::{MissingSource, Observed};
use super::watch::{WatchError, WatchRequest, WatchedVm};
use crate::foreign::{MemoryOpenError, SoftDirtyError};
use crate::model::schema::Schema;
use crate::model::{MemoryRange, RegionHeat, VmRef, WriteCurve, Writer};
use crate::port::{ArmError, EventSourceError};
use crate::probe::Gives;
use crate::track::{Lost, Regime, SampledCurve, SamplingError};

/// Which regime to measure under.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum How {
    /// The most exact one that is possible and allowed.
    #[default]
    Auto,
    /// Write protection by the VM's own dirty log (hosted VMs).
    Armed,
    /// Write protection by soft-dirty marks (any VM, if allowed).
    SoftDirty,
    /// What shows while someone else has the VM's dirty log on.
    Logged,
    /// Comparing a sample of pages (any VM, if allowed).
    Sampled,
}

/// What an operator allows to be done to VMs of other VMMs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Allowed {
    /// Reading their memory.
    pub read_memory: bool,
    /// Write-protecting their memory by soft-dirty marks.
    pub soft_dirty: bool,
}

/// What to measure and how.
#[derive(Clone, Debug)]
pub struct ProfileRequest {
    /// Where hosted VMs are listed.
    pub run_dir: PathBuf,
    /// Where the audit log is.
    pub state_dir: PathBuf,
    /// The VM.
    pub vm: VmRef,
    /// Under which regime.
    pub how: How,
    /// What flags allow; the configuration may allow more.
    pub allowed: Allowed,
    /// What the configuration allows.
    pub config: TrackConfig,
    /// The length of a window.
    pub window: Duration,
    /// How many windows.
    pub windows: u32,
    /// The part of the time that windows may take, above 0, at most 1: between two of them the VM is left alone.
    pub duty: f64,
    /// Of how many pages one is to be write-protected, a power of two; none: of as few as lets the VM run as fast as it does.
    pub protect_one_in: Option<u64>,
    /// The part of the VM's time that windows may take on average: the VM is left alone for longer than `duty` says if that is needed.
    pub max_slowdown: f64,
    /// Whether the processes of a Linux guest are to be named.
    pub names: bool,
    /// What is known of the guest's kernel for that.
    pub guest_files: GuestFiles,
    /// Whether it must show who wrote: a regime that does not is refused before anything is measured.
    pub who: bool,
    /// Whether the BPF programs' own diagnostics are printed.
    pub probe_log: bool,
}

/// The longest window: a hosted VM ends its write protection by itself if nobody asks again.
pub const LONGEST_WINDOW: Duration = Duration::from_secs(10);
/// The shortest: below that, beginning and end of a window are most of it.
pub const SHORTEST_WINDOW: Duration = Duration::from_millis(5);

/// A VM's profile.
#[derive(Clone, Debug, Serialize)]
pub struct Profile {
    /// Whose.
    pub vm: Observed,
    /// Under which conditions.
    pub regime: Regime,
    /// What the figures mean then.
    pub meaning: &'static str,
    /// Whether the true figures may be higher.
    pub is_lower_bound: bool,
    /// The largest mapping that one write makes writable, in bytes: what is written at least, as far as can be seen; absent where pages are
    /// compared one by one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub granularity_bytes: Option<u64>,
    /// What else there is to say of the granularity, of addresses, of names.
    pub notes: Vec<String>,
    /// Mean length of the windows.
    pub window_ns: u64,
    /// How many there were.
    pub windows: u32,
    /// Guest memory that could be written.
    pub memory_bytes: u64,
    /// U(t): different pages written in an interval of length t.
    pub curve: WriteCurve,
    /// Of so many pages one was write-protected, and stands for the others; 1 where no page was chosen.
    pub protected_one_in: u64,
    /// What a window took at most, by an estimate, of the time of a vCPU that is never idle, with what leads up to it.
    pub guest_time_lost_ns: u64,
    /// How long the VM is to be left alone after a window, so that windows take no more than the allowed part of its time.
    pub rest_ns: u64,
    /// Different pages at the end of a window by the kernel's bitmap, on average; absent where none was kept, or not of all pages.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub exact_unique_pages: Option<f64>,
    /// What a first write costs the guest while it is write-protected, measured on this host; absent where nothing was protected.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault_cost_ns: Option<u64>,
    /// Who wrote; empty where that cannot be seen.
    pub writers: Vec<WriterProfile>,
    /// Where, in parts of 2 MiB or, sampled, in regions that may be larger; only those that were written.
    pub heat: Vec<RegionHeat>,
    /// Guest memory that could be written.
    #[serde(skip)]
    pub ram: Vec<MemoryRange>,
    /// What sampling saw; absent under other regimes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub sampled: Option<SampledCurve>,
    /// Events that were not counted in full.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lost_events: Option<Lost>,
    /// What the measurement cost the host.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cost: Option<WindowCost>,
    /// Sources that could not be attached, and why.
    pub missing_sources: Vec<MissingSource>,
}

impl Schema for Profile {
    const SCHEMA: &'static str = "dunlin.write-curve/v1";
}

impl Profile {
    /// All of guest memory in parts of 2 MiB, or in the regions that samples tell apart; those that were not written too.
    pub fn map(&self) -> Vec<RegionHeat> {
        if let Some(sampled) = &self.sampled {
            return sampled::heat(&sampled.heat).collect();
        }
        self.ram.iter().flat_map(|range| writers::all_regions(range, &self.heat)).collect()
    }
}

/// One writer's part.
#[derive(Clone, Debug, Serialize)]
pub struct WriterProfile {
    /// Who.
    pub writer: Writer,
    /// Its part of `curve`, or 1 if that is its own.
    pub share: f64,
    /// A curve that it is part of.
    pub curve: WriteCurve,
}

/// Why there is no profile.
#[derive(Debug, thiserror::Error)]
pub enum ProfileError {
    /// The VM cannot be watched.
    #[error(transparent)]
    Watch(#[from] WatchError),
    /// Nothing that tells how it writes is allowed.
    #[error(
        "`{vm}` is run by {vmm}: how it rewrites its memory cannot be seen without reading that memory (--allow-read-memory) or \
         write-protecting it (--allow-soft-dirty); both are off until you allow them, here or in the configuration ([track])"
    )]
    NotAllowed {
        /// The VM.
        vm: String,
        /// Its VMM.
        vmm: String,
    },
    /// The regime that was asked for is not allowed.
    #[error("`{vm}` is no VM that dunlin runs: `{what}` needs {flag}, or {key} in [track] of the configuration")]
    NeedsPermission {
        /// The VM.
        vm: String,
        /// The regime.
        what: &'static str,
        /// The flag that allows it.
        flag: &'static str,
        /// The key that does.
        key: &'static str,
    },
    /// A file about the guest's kernel does not help.
    #[error(transparent)]
    GuestFile(#[from] GuestFileError),
    /// Who wrote does not show in samples.
    #[error(
        "`{vm}` would be measured under the regime `sampled`, which shows what was written and where, not by which vCPU, address space or \
         process: measure under another regime"
    )]
    NotInSamples {
        /// The VM.
        vm: String,
    },
    /// Nobody logs.
    #[error("nobody has the dirty log of `{0}` on, so there is nothing to see under the regime `logged`")]
    NotLogged(String),
    /// Soft-dirty marks.
    #[error(transparent)]
    SoftDirty(#[from] SoftDirtyError),
    /// Guest memory.
    #[error(transparent)]
    Memory(#[from] MemoryOpenError),
    /// Sampling.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
    /// The counters.
    #[error(transparent)]
    Source(#[from] EventSourceError),
    /// The write protection.
    #[error(transparent)]
    Arm(#[from] ArmError),
    /// The VM ended.
    #[error("`{0}` has ended")]
    Gone(String),
    /// A signal came.
    #[error("interrupted")]
    Interrupted,
    /// What a fault costs could not be measured.
    #[error("what a write fault costs on this host could not be measured")]
    FaultCost(#[source] io::Error),
}

impl From<FindError> for ProfileError {
    fn from(error: FindError) -> Self {
        Self::Watch(error.into())
    }
}

/// Told while it goes on: windows done, windows in all.
pub type Progress<'a> = &'a mut dyn FnMut(u32, u32);

/// What measures one VM: found, allowed, and loaded once. Dropping it leaves nothing behind.
pub struct Profiler {
    request: ProfileRequest,
    by: By,
}

enum By {
    Events(Box<window::Events>),
    Reading(Box<sampled::Reading>),
}

impl Profiler {
    /// Finds the VM, chooses the regime and loads what it needs. Nothing is protected or read yet.
    ///
    /// # Errors
    /// No such VM, no way to see it, or none that is allowed; says what to do.
    pub fn open(request: &ProfileRequest) -> Result<Self, ProfileError> {
        let found = find(request)?;
        let allowed = allowed(request, &found);
        // Without KVM there are no events, whatever was asked for.
        let emulated = found.process.descriptors.machines.is_empty();
        let how = match (request.how, found.entry.is_some()) {
            _ if emulated => How::Sampled,
            (How::Auto, true) => How::Armed,
            (How::Auto, false) if allowed.soft_dirty && crate::trial::memory::soft_dirty().is_ok() => How::SoftDirty,
            (How::Auto, false) if allowed.read_memory => How::Sampled,
            (How::Auto, false) => How::Logged,
            (how, _) => how,
        };
        let known = request.guest_files.load()?;
        let by = if how == How::Sampled {
            if request.who {
                return Err(ProfileError::NotInSamples { vm: found.name });
            }
            By::Reading(Box::new(sampled::Reading::open(request, found, allowed)?))
        } else {
            By::Events(Box::new(events(request, &found, how, allowed, GuestNames::new(known))?))
        };
        Ok(Self { request: request.clone(), by })
    }

    /// Measures as many windows as were asked for.
    ///
    /// # Errors
    /// The VM ended, a signal came, or what is read fails. Whatever was switched on is off again.
    pub fn measure(&mut self, interrupt: &Interrupt, progress: Progress<'_>) -> Result<Profile, ProfileError> {
        match &mut self.by {
            By::Events(events) => events.measure(&self.request, interrupt, progress),
            By::Reading(reading) => reading.measure(interrupt, progress),
        }
    }
}

/// What measures by events.
fn events(
    request: &ProfileRequest,
    found: &HostVm,
    how: How,
    allowed: Allowed,
    names: GuestNames,
) -> Result<window::Events, ProfileError> {
    let (watched, counters) = WatchedVm::open(&WatchRequest {
        run_dir: request.run_dir.clone(),
        vm: VmRef::Pid(found.pid),
        wanted: vec![Gives::Pages, Gives::RingPages, Gives::HardwareLog],
        max_address_bytes: None,
        single_writes: None,
        probe_log: request.probe_log,
    })?;
    let name = || watched.vm.name.clone();
    let protector = match how {
        How::Armed => Protector::Log(watched.arm()?),
        How::SoftDirty if allowed.soft_dirty => Protector::soft_dirty(request, &watched.vm)?,
        How::SoftDirty => {
            let (flag, key) = ("--allow-soft-dirty", "soft_dirty");
            return Err(ProfileError::NeedsPermission { vm: name(), what: "soft-dirty", flag, key });
        }
        _ if watched.vm.logged_bytes > 0 => Protector::Others,
        _ if request.how == How::Auto => {
            return Err(ProfileError::NotAllowed { vm: name(), vmm: watched.vm.vmm.clone() });
        }
        _ => return Err(ProfileError::NotLogged(name())),
    };
    window::Events::new(watched, counters, protector, allowed, names)
}

/// Measures once.
///
/// # Errors
/// As [`Profiler::open`] and [`Profiler::measure`].
pub fn profile(
    request: &ProfileRequest,
    interrupt: &Interrupt,
    progress: Progress<'_>,
) -> Result<Profile, ProfileError> {
    Profiler::open(request)?.measure(interrupt, progress)
}

/// The VM that is asked for.
pub(super) fn find(request: &ProfileRequest) -> Result<HostVm, FindError> {
    match inventory::find(&request.run_dir, &request.vm, None) {
        Err(FindError::Process(error)) => inventory::emulated(&request.vm, error),
        other => other,
    }
}

/// What is allowed on this VM: everything on one of our own.
fn allowed(request: &ProfileRequest, vm: &HostVm) -> Allowed {
    let own = vm.entry.is_some();
    Allowed {
        read_memory: request.allowed.read_memory || may_read(&request.config.read_memory, vm),
        soft_dirty: own || request.allowed.soft_dirty || names(&request.config.soft_dirty, vm),
    }
}

/// Whether the memory of this VM may be read without a flag: that of our own, and what the configuration's list names.
pub(super) fn may_read(list: &[String], vm: &HostVm) -> bool {
    vm.entry.is_some() || names(list, vm)
}

/// Whether a list of the configuration names the VM: by `*`, its name, `uuid:U` or `pid:P`.
pub(in crate::service) fn names(list: &[String], vm: &HostVm) -> bool {
    super::config::names(list, &vm.name, vm.vm_id, vm.pid)
}
