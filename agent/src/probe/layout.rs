//! Where members of KVM's and the kernel's structures lie in the running kernel, by its type information.
//!
//! Owns the knowledge of which structure has what, on which processor. Nothing here reads memory.

use std::fs;
use std::path::Path;

use dunlin_ebpf::OFFSET_UNKNOWN;

use super::entry::Function;
use crate::btf::{BtfError, KernelTypes, Kind};

/// The processor's kind of virtualisation that KVM uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    /// AMD: the guest's state is in the `vmcb`.
    Svm,
    /// Intel: it is in the VMCS, which cannot be read; KVM's own copy may be stale.
    Vmx,
    /// Anything else (PVM, another architecture): KVM's own copy.
    Other,
}

impl Backend {
    /// What this host uses.
    pub fn of_this_host() -> Self {
        let flags = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let has = |flag: &str| {
            flags.lines().any(|line| line.starts_with("flags") && line.split_whitespace().any(|f| f == flag))
        };
        let loaded = |module: &str| Path::new("/sys/module").join(module).exists();
        if has("svm") && loaded("kvm_amd") {
            Self::Svm
        } else if has("vmx") && loaded("kvm_intel") {
            Self::Vmx
        } else {
            Self::Other
        }
    }

    const fn module(self) -> Option<&'static str> {
        match self {
            Self::Svm => Some("kvm_amd"),
            Self::Vmx => Some("kvm_intel"),
            Self::Other => None,
        }
    }
}

/// Offsets for the BPF programs; [`OFFSET_UNKNOWN`] where the type information does not tell. See [`dunlin_ebpf::constant`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ProgramOffsets {
    pub(crate) page_fault_gfn: u32,
    pub(crate) vcpu_rip: u32,
    pub(crate) vcpu_root: u32,
    pub(crate) vcpu_area: u32,
    pub(crate) exit_reason: u32,
}

/// Offsets for walking the kernel's structures from user space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct WalkOffsets {
    pub(crate) task_tasks: u32,
    pub(crate) task_tgid: u32,
    pub(crate) task_leader: u32,
    pub(crate) task_mm: u32,
    pub(crate) task_files: u32,
    pub(crate) files_fdt: u32,
    pub(crate) fdt_max: u32,
    pub(crate) fdt_fd: u32,
    pub(crate) file_private: u32,
    pub(crate) kvm_mm: u32,
    pub(crate) kvm_memslots: u32,
    pub(crate) memslots_node: u32,
    pub(crate) memslots_hash: u32,
    pub(crate) memslots_hash_bytes: u32,
    pub(crate) slot_bytes: u32,
    pub(crate) slot_id_node: u32,
    pub(crate) slot_base: u32,
    pub(crate) slot_pages: u32,
    pub(crate) slot_address: u32,
    pub(crate) slot_flags: u32,
    pub(crate) slot_id: u32,
    pub(crate) vcpu_kvm: u32,
    pub(crate) vcpu_id: u32,
    pub(crate) vcpu_pid: u32,
    pub(crate) pid_number: u32,
}

/// What the type information told.
#[derive(Debug)]
pub struct KernelLayout {
    /// The processor's kind of virtualisation.
    pub backend: Backend,
    pub(crate) programs: ProgramOffsets,
    /// `mark_page_dirty_in_slot`.
    pub(crate) page_logged: Option<Function>,
    /// None with the first member that is missing.
    pub(crate) walk: Result<WalkOffsets, String>,
}

impl KernelLayout {
    /// Of the running kernel. Without type information nothing is known, which costs what `ProgramOffsets` and `WalkOffsets` are for.
    pub fn of_running_kernel() -> Self {
        let backend = Backend::of_this_host();
        match Self::read(backend) {
            Ok(layout) => layout,
            Err(error) => {
                Self { backend, programs: ProgramOffsets::NONE, page_logged: None, walk: Err(error.to_string()) }
            }
        }
    }

    fn read(backend: Backend) -> Result<Self, BtfError> {
        let kvm = KernelTypes::with_module("kvm")?;
        let processor = match backend.module() {
            Some(module) => Some(KernelTypes::with_module(module)?),
            None => None,
        };
        let programs = ProgramOffsets::of(backend, &kvm, processor.as_ref());
        let module = Path::new("/sys/kernel/btf/kvm").exists().then_some("kvm");
        let page_logged = kvm.id("mark_page_dirty_in_slot", Kind::Func).map(|id| Function { id, module });
        Ok(Self { backend, programs, page_logged, walk: WalkOffsets::of(&kvm) })
    }
}

impl ProgramOffsets {
    const NONE: Self = Self {
        page_fault_gfn: OFFSET_UNKNOWN,
        vcpu_rip: OFFSET_UNKNOWN,
        vcpu_root: OFFSET_UNKNOWN,
        vcpu_area: OFFSET_UNKNOWN,
        exit_reason: OFFSET_UNKNOWN,
    };

    fn of(backend: Backend, kvm: &KernelTypes, processor: Option<&KernelTypes>) -> Self {
        let of_kvm = |structure, path| kvm.member_offset(structure, path).unwrap_or(OFFSET_UNKNOWN);
        // x86 keeps the instruction pointer behind the general registers (arch/x86/include/asm/kvm_host.h, enum kvm_reg).
        let rip = kvm.enumerator("VCPU_REGS_RIP").zip(kvm.member_offset("kvm_vcpu", "arch.regs"));
        let mut offsets = Self {
            page_fault_gfn: of_kvm("kvm_page_fault", "gfn"),
            vcpu_rip: rip.map_or(OFFSET_UNKNOWN, |(index, regs)| regs + index as u32 * 8),
            // KVM's own copy. With nested paging on AMD it is taken from the vmcb at each exit, before the exit is handled (`svm_handle_exit`
            // in arch/x86/kvm/svm/svm.c); on Intel KVM reads it when it needs it.
            vcpu_root: of_kvm("kvm_vcpu", "arch.cr3"),
            ..Self::NONE
        };
        match (backend, processor) {
            (Backend::Svm, Some(types)) => {
                // `struct vcpu_svm` begins with `struct kvm_vcpu` (arch/x86/kvm/svm/svm.h).
                let found =
                    types.member_offset("vcpu_svm", "vmcb").zip(types.member_offset("vmcb", "control.exit_code"));
                if let Some((vcpu_area, exit_reason)) = found {
                    offsets = Self { vcpu_area, exit_reason, ..offsets };
                }
            }
            (Backend::Vmx, Some(types)) => {
                // Likewise; since Linux 6.17 inside a part that TDX shares.
                let reason = types.member_offset("vcpu_vmx", "exit_reason");
                offsets.exit_reason =
                    reason.or_else(|| types.member_offset("vcpu_vmx", "vt.exit_reason")).unwrap_or(OFFSET_UNKNOWN);
            }
            _ => {}
        }
        offsets
    }
}

impl WalkOffsets {
    /// The structures are those since Linux 5.17, which keeps slots in a hash table by number (include/linux/kvm_host.h).
    fn of(types: &KernelTypes) -> Result<Self, String> {
        let field = |structure: &str, path: &str| {
            types
                .field(structure, path)
                .ok_or_else(|| format!("this kernel's type information has no {structure}.{path}"))
        };
        let at = |structure: &str, path: &str| field(structure, path).map(|field| field.offset);
        let hash = field("kvm_memslots", "id_hash")?;
        Ok(Self {
            task_tasks: at("task_struct", "tasks")?,
            task_tgid: at("task_struct", "tgid")?,
            task_leader: at("task_struct", "group_leader")?,
            task_mm: at("task_struct", "mm")?,
            task_files: at("task_struct", "files")?,
            files_fdt: at("files_struct", "fdt")?,
            fdt_max: at("fdtable", "max_fds")?,
            fdt_fd: at("fdtable", "fd")?,
            file_private: at("file", "private_data")?,
            kvm_mm: at("kvm", "mm")?,
            kvm_memslots: at("kvm", "memslots")?,
            memslots_node: at("kvm_memslots", "node_idx")?,
            memslots_hash: hash.offset,
            memslots_hash_bytes: hash.bytes,
            slot_bytes: types.size_of("kvm_memory_slot").ok_or("no kvm_memory_slot")?,
            slot_id_node: at("kvm_memory_slot", "id_node")?,
            slot_base: at("kvm_memory_slot", "base_gfn")?,
            slot_pages: at("kvm_memory_slot", "npages")?,
            slot_address: at("kvm_memory_slot", "userspace_addr")?,
            slot_flags: at("kvm_memory_slot", "flags")?,
            slot_id: at("kvm_memory_slot", "id")?,
            vcpu_kvm: at("kvm_vcpu", "kvm")?,
            vcpu_id: at("kvm_vcpu", "vcpu_id")?,
            vcpu_pid: at("kvm_vcpu", "pid")?,
            pid_number: at("pid", "numbers")?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_without_types_is_told_apart_from_one_with() {
        let layout = KernelLayout::of_running_kernel();
        // Without type information that is doctor's business, not this test's.
        if KernelTypes::vmlinux().is_ok_and(|types| types.size_of("kvm_memory_slot").is_some()) {
            let walk = layout.walk.unwrap();
            assert!(walk.slot_bytes > walk.slot_flags && walk.memslots_hash_bytes == 128 * 8, "{walk:?}");
            assert_ne!(layout.programs.vcpu_root, OFFSET_UNKNOWN);
        } else {
            assert!(layout.walk.is_err());
        }
    }
}
