//! One VM under watch: found, its counters loaded, its vCPUs known to the programs, and the means to write-protect its pages.
//!
//! Owns the joining of inventory and probes for one VM; what is measured with them is the business of [`super::observe`] and others.

use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::arm::ControlSocketArm;
use super::inventory::{self, FindError, HostVm};
use super::registry::Registry;
use crate::model::{PageCount, VmRef};
use crate::port::Arm;
use crate::probe::{Gives, KernelCounters, LoadOptions, ProbeError, Probes, SharedProbes};

/// Guest memory above the size that was asked for may lie behind a hole below 4 GiB.
const HOLE_BYTES: u64 = 4 << 30;

/// Which VM, and what of it.
#[derive(Clone, Debug)]
pub struct WatchRequest {
    /// Where hosted VMs are listed.
    pub run_dir: PathBuf,
    /// The VM.
    pub vm: VmRef,
    /// What is wanted; nothing else is attached.
    pub wanted: Vec<Gives>,
    /// The end of the guest physical addresses that are told apart; found out where not given.
    pub max_address_bytes: Option<u64>,
    /// The size in bytes of the buffer in which each write is told by itself too; none: it is not.
    pub single_writes: Option<u32>,
    /// Whether the BPF programs' own diagnostics are printed.
    pub probe_log: bool,
}

/// Why a VM cannot be watched.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// There is no such VM.
    #[error(transparent)]
    Find(#[from] FindError),
    /// The counters could not be attached.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// Only hosted VMs have a dirty log that can be asked for.
    #[error(
        "`{0}` is no VM that dunlin runs, so its dirty log cannot be switched on from outside: its own VMM may need it"
    )]
    NotHosted(String),
}

/// A VM, and the programs that watch it. Dropping both this and its counters detaches them.
#[derive(Debug)]
pub struct WatchedVm {
    /// As it was when it was last looked at.
    pub vm: HostVm,
    run_dir: PathBuf,
    probes: SharedProbes,
}

impl WatchedVm {
    /// Finds the VM and loads the programs for it alone.
    ///
    /// # Errors
    /// No such VM, or no way to count; says what to do.
    pub fn open(request: &WatchRequest) -> Result<(Self, KernelCounters), WatchError> {
        // A first look costs no program, and brings the process that alone is to be counted.
        let found = inventory::find(&request.run_dir, &request.vm, None)?;
        let known_bytes = found.memory_bytes.unwrap_or(found.process.address_space_bytes);
        let end_bytes = request.max_address_bytes.unwrap_or_else(|| known_bytes.saturating_add(HOLE_BYTES));
        let capacity = PageCount::covering(end_bytes);
        let mut probes = Probes::load(&LoadOptions {
            only: Some(found.pid),
            capacity,
            wanted: request.wanted.clone(),
            attribute: request.wanted.contains(&Gives::Pages),
            single_writes: request.single_writes,
            log: request.probe_log,
        })?;
        let vm = inventory::again(&found, &request.run_dir, &mut probes).unwrap_or(found);
        let slots_end =
            vm.kernel.as_ref().map(|kernel| PageCount::covering(kernel.end_bytes())).filter(|end| end.0 > 0);
        let frames =
            slots_end.filter(|_| request.max_address_bytes.is_none()).map_or(capacity, |end| end.min(capacity));
        if let Some(kernel) = &vm.kernel {
            probes.set_vcpus(std::slice::from_ref(kernel))?;
        }
        let probes = Arc::new(Mutex::new(probes));
        let counters = KernelCounters::track(&probes, vm.pid, frames)?;
        Ok((Self { vm, run_dir: request.run_dir.clone(), probes }, counters))
    }

    /// Looks at the VM again: new vCPU threads, slots, its dirty log. False: it has ended.
    pub fn refresh(&mut self) -> bool {
        let mut probes = self.probes.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let Some(vm) = inventory::again(&self.vm, &self.run_dir, &mut probes) else {
            return self.vm.process.is_alive();
        };
        if vm.vcpus != self.vm.vcpus
            && let Some(kernel) = &vm.kernel
            && let Err(error) = probes.set_vcpus(std::slice::from_ref(kernel))
        {
            tracing::warn!("{}: {error}", vm.name);
        }
        self.vm = vm;
        true
    }

    /// The programs.
    pub fn probes(&self) -> &SharedProbes {
        &self.probes
    }

    /// The means to write-protect its pages.
    ///
    /// # Errors
    /// The VM is not hosted.
    pub fn arm(&self) -> Result<Box<dyn Arm>, WatchError> {
        let entry = self.vm.entry.as_ref().ok_or_else(|| WatchError::NotHosted(self.vm.name.clone()))?;
        let socket = Registry::new(&self.run_dir).socket(&entry.name, "control");
        Ok(Box::new(ControlSocketArm::new(socket)))
    }
}
