//! Every KVM VM of this host, hosted or foreign: joins the registry, `/proc`, and the kernel's own structures.

use std::path::Path;

use serde::Serialize;
use uuid::Uuid;

use super::registry::{MachineEntry, Registry, boot_id};
use crate::foreign::vmm::{self, VmmFacts};
use crate::foreign::{KvmProcess, ProcessError};
use crate::model::schema::Schema;
use crate::model::{KernelVm, KvmDescriptors, MemorySlot, VcpuFacts, VmId, VmRef};
use crate::probe::{Gives, LoadOptions, Probes};

/// Who runs a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Host {
    /// `dunlin vm run`: everything works on it.
    Hosted,
    /// Another VMM: watched, and never changed unless the operator allows it.
    Foreign,
}

/// One VM of this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostVm {
    /// Its name: its own, or its VMM's and its process id.
    pub name: String,
    /// Its identity: given to it, or made from this boot, its process and that process's start.
    pub vm_id: VmId,
    /// Whether dunlin runs it.
    pub host: Host,
    /// The VMM.
    pub vmm: String,
    /// Its process.
    pub pid: u32,
    /// When that process started, in clock ticks since boot.
    pub start_time_ticks: u64,
    /// Its vCPUs, and the threads that run them.
    pub vcpus: Vec<VcpuFacts>,
    /// Memory that the guest can write; where the kernel's structures cannot be read, what the registry says, or absent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub memory_bytes: Option<u64>,
    /// Its memory slots; empty where the kernel's structures cannot be read.
    pub slots: Vec<MemorySlot>,
    /// Bytes of its memory whose dirty log is on.
    pub logged_bytes: u64,
    /// Why the kernel's own view is not known; absent when it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kernel_view_missing: Option<String>,
    /// What `/proc` shows of its process, for those who go on from here.
    #[serde(skip)]
    pub process: KvmProcess,
    /// Its registry entry, if it is hosted.
    #[serde(skip)]
    pub entry: Option<MachineEntry>,
    /// What the kernel knows of it.
    #[serde(skip)]
    pub kernel: Option<KernelVm>,
}

impl Schema for HostVm {
    const SCHEMA: &'static str = "dunlin.host-vm/v1";
}

/// Why a VM was not found.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// Nothing here answers to that name.
    #[error(
        "no VM `{vm}` runs on this host (hosted ones are looked for under {run_dir}); `dunlin vm list --all` shows those that do"
    )]
    Unknown {
        /// What was asked for.
        vm: VmRef,
        /// Where hosted VMs are listed.
        run_dir: String,
    },
    /// Several do.
    #[error("{count} VMs are named `{vm}`; write pid:P or uuid:U (`dunlin vm list --all` shows them)")]
    Ambiguous {
        /// What was asked for.
        vm: VmRef,
        /// How many.
        count: usize,
    },
    /// The process is no VM, or may not be looked at.
    #[error(transparent)]
    Process(#[from] ProcessError),
}

/// Loads what reads the kernel's structures, and nothing that watches. None where this host does not let us.
pub fn kernel_view() -> Option<Probes> {
    let nothing: Vec<Gives> = Vec::new();
    let options = LoadOptions {
        only: None,
        capacity: crate::model::PageCount(64),
        wanted: nothing,
        attribute: false,
        single_writes: None,
        log: false,
    };
    match Probes::load(&options) {
        Ok(probes) => Some(probes),
        Err(error) => {
            tracing::debug!("no view into the kernel: {error}");
            None
        }
    }
}

/// All VMs, by process id. One that ends meanwhile is left out.
pub fn all(run_dir: &Path, probes: Option<&mut Probes>) -> Vec<HostVm> {
    of_processes(KvmProcess::all(), run_dir, probes)
}

/// The VM that `vm` names.
///
/// # Errors
/// None does, or several do.
pub fn find(run_dir: &Path, vm: &VmRef, probes: Option<&mut Probes>) -> Result<HostVm, FindError> {
    let unknown = || FindError::Unknown { vm: vm.clone(), run_dir: run_dir.display().to_string() };
    // A process id says it all; so does a hosted VM's entry.
    let pid = match (vm, Registry::new(run_dir).find(vm)) {
        (VmRef::Pid(pid), _) => Some(*pid),
        (_, Ok(entry)) => Some(entry.pid),
        _ => None,
    };
    if let Some(pid) = pid {
        return of_processes(vec![KvmProcess::open(pid)?], run_dir, probes).pop().ok_or_else(unknown);
    }
    let mut fitting: Vec<HostVm> = all(run_dir, probes)
        .into_iter()
        .filter(|found| match vm {
            VmRef::Name(name) => found.name == name.as_str(),
            VmRef::Uuid(id) => found.vm_id == *id,
            VmRef::Pid(pid) => found.pid == *pid,
        })
        .collect();
    match fitting.len() {
        0 => Err(unknown()),
        1 => fitting.pop().ok_or_else(unknown),
        count => Err(FindError::Ambiguous { vm: vm.clone(), count }),
    }
}

/// A VM without KVM (QEMU that emulates), which only its process id can name.
///
/// # Errors
/// `otherwise`, if it is none.
pub fn emulated(vm: &VmRef, otherwise: ProcessError) -> Result<HostVm, FindError> {
    let (VmRef::Pid(pid), ProcessError::NoVm(_)) = (vm, &otherwise) else { return Err(otherwise.into()) };
    let process = KvmProcess::open_any(*pid)?;
    if vmm::facts(&process.name, &process.command).vmm != "qemu" {
        return Err(otherwise.into());
    }
    Ok(host_vm(
        process,
        None,
        Err("it has no KVM VM: its VMM emulates, so no event of KVM tells of its writes".to_owned()),
    ))
}

/// Looks at one VM again; none if its process has ended, or has another VM now.
pub fn again(vm: &HostVm, run_dir: &Path, probes: &mut Probes) -> Option<HostVm> {
    let process = KvmProcess::open(vm.pid).ok().filter(|process| process.start_time_ticks == vm.start_time_ticks)?;
    of_processes(vec![process], run_dir, Some(probes)).pop()
}

/// The VMs of these processes, in their order.
pub(super) fn of_processes(processes: Vec<KvmProcess>, run_dir: &Path, probes: Option<&mut Probes>) -> Vec<HostVm> {
    let entries = Registry::new(run_dir).list();
    let descriptors: Vec<KvmDescriptors> = processes.iter().map(|process| process.descriptors.clone()).collect();
    let views: Vec<Result<KernelVm, String>> = match probes.map(|probes| probes.inventory(&descriptors)) {
        Some(Ok(answers)) => answers.into_iter().map(|answer| one_of(answer.map_err(|e| e.to_string())?)).collect(),
        Some(Err(error)) => vec![Err(error.to_string()); processes.len()],
        None => vec![
            Err("the programs that read it could not be loaded (`dunlin doctor` says why)".to_owned());
            processes.len()
        ],
    };
    let vms = processes.into_iter().zip(views).map(|(process, view)| {
        let entry =
            entries.iter().find(|entry| entry.pid == process.pid && entry.start_time_ticks == process.start_time_ticks);
        host_vm(process, entry.cloned(), view)
    });
    vms.collect()
}

/// A process is one VM to us: where it holds several, all their memory and vCPUs together.
fn one_of(vms: Vec<KernelVm>) -> Result<KernelVm, String> {
    let mut all = KernelVm { vcpus: Vec::new(), slots: Vec::new() };
    for vm in vms {
        all.vcpus.extend(vm.vcpus);
        all.slots.extend(vm.slots);
    }
    if all.slots.is_empty() && all.vcpus.is_empty() {
        Err("its VM has neither memory nor vCPUs yet".to_owned())
    } else {
        Ok(all)
    }
}

fn host_vm(process: KvmProcess, entry: Option<MachineEntry>, view: Result<KernelVm, String>) -> HostVm {
    let VmmFacts { vmm, name, uuid } = vmm::facts(&process.name, &process.command);
    let name =
        entry.as_ref().map(|entry| entry.name.to_string()).or(name).unwrap_or_else(|| format!("{vmm}-{}", process.pid));
    let vm_id = entry
        .as_ref()
        .map(|entry| entry.vm_id)
        .or(uuid.map(VmId))
        .unwrap_or_else(|| derived_id(process.pid, process.start_time_ticks));
    let (kernel, kernel_view_missing) = match view {
        Ok(kernel) => (Some(kernel), None),
        Err(reason) => (None, Some(reason)),
    };
    let known_bytes = kernel.as_ref().map(KernelVm::ram_bytes).filter(|&bytes| bytes > 0);
    let vcpus = match &kernel {
        Some(kernel) => kernel.vcpus.iter().map(|(facts, _)| facts.clone()).collect(),
        None => (0..process.cpus()).map(|index| VcpuFacts { index, thread_id: None }).collect(),
    };
    HostVm {
        name,
        vm_id,
        host: if entry.is_some() { Host::Hosted } else { Host::Foreign },
        vmm,
        pid: process.pid,
        start_time_ticks: process.start_time_ticks,
        vcpus,
        memory_bytes: known_bytes.or_else(|| entry.as_ref().map(|entry| entry.memory_bytes)),
        slots: kernel.as_ref().map(|kernel| kernel.slots.clone()).unwrap_or_default(),
        logged_bytes: kernel.as_ref().map_or(0, KernelVm::logged_bytes),
        kernel_view_missing,
        process,
        entry,
        kernel,
    }
}

/// The identity of a VM that was given none: the same for as long as its process lives, on any look (UUID version 5).
fn derived_id(pid: u32, start_time_ticks: u64) -> VmId {
    let words = format!("{}/{pid}/{start_time_ticks}", boot_id());
    VmId(Uuid::new_v5(&Uuid::NAMESPACE_OID, words.as_bytes()))
}

/// A VM with all that is printed of one.
#[cfg(test)]
pub(crate) fn sample() -> HostVm {
    use crate::model::{Gpa, MemoryRange};
    let slot = MemorySlot {
        id: 0,
        range: MemoryRange { start: Gpa(0), bytes: 4096 },
        host_address: 0,
        dirty_log: true,
        read_only: false,
    };
    let kernel = KernelVm { vcpus: vec![(VcpuFacts { index: 0, thread_id: Some(1) }, 1)], slots: vec![slot] };
    let process = KvmProcess {
        pid: 1,
        name: "qemu".to_owned(),
        command: Vec::new(),
        descriptors: KvmDescriptors::default(),
        address_space_bytes: 0,
        start_time_ticks: 0,
    };
    HostVm { kernel_view_missing: Some(String::new()), ..host_vm(process, None, Ok(kernel)) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{DirtyLogKind, PageCount};
    use crate::trial::tiny_vm::TinyVm;

    #[test]
    fn a_vm_has_one_identity_and_answers_to_it() {
        let _vm = TinyVm::new(PageCount(4), DirtyLogKind::Bitmap).unwrap();
        let run_dir = tempfile::tempdir().unwrap();
        let pid = std::process::id();
        let mine = all(run_dir.path(), None).into_iter().find(|vm| vm.pid == pid).unwrap();
        assert_eq!((mine.host, mine.memory_bytes), (Host::Foreign, None));
        assert!(mine.kernel_view_missing.is_some() && !mine.vcpus.is_empty());
        for vm in [VmRef::Pid(pid), VmRef::Uuid(mine.vm_id), VmRef::Name(mine.name.parse().unwrap())] {
            assert_eq!(find(run_dir.path(), &vm, None).unwrap().vm_id, mine.vm_id);
        }
        assert!(matches!(find(run_dir.path(), &VmRef::Pid(1), None), Err(FindError::Process(_))));
        assert!(matches!(find(run_dir.path(), &"nobody".parse().unwrap(), None), Err(FindError::Unknown { .. })));
        assert_ne!(derived_id(pid, 1), derived_id(pid, 2));
    }
}
