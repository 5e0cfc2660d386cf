//! VMs as the kernel has them: from a process's descriptors to `struct kvm`, its vCPUs and its memory slots.
//!
//! Owns the walk. Whatever it meets may change under it or be freed: each step is bounded, and what is found is checked against what
//! must be true of it (a vCPU's VM is this VM, a VM's address space is its process's).

use std::collections::BTreeMap;

use super::kernel_memory::{KernelMemory, PeekError, half_at, word_at};
use super::layout::WalkOffsets;
use crate::model::{Gpa, KernelVm, KvmDescriptors, MemoryRange, MemorySlot, PageCount, VcpuFacts};

/// Tasks that are walked before the list counts as broken: the kernel's own limit of process ids.
const MAX_TASKS: usize = 1 << 22;
/// Slots of one bucket that are walked; KVM has 32 764 of them at most.
const MAX_SLOTS: usize = 1 << 15;
/// `KVM_MEM_LOG_DIRTY_PAGES`, `KVM_MEM_READONLY` (include/uapi/linux/kvm.h).
const LOG_DIRTY_PAGES: u32 = 1;
const READ_ONLY: u32 = 2;
/// The last number that a VMM can give; the three slots behind it are KVM's own (include/linux/kvm_host.h, `KVM_USER_MEM_SLOTS`).
const MAX_USER_SLOT: u16 = i16::MAX as u16 - 4;

/// Why the kernel's view of a VM is not known.
#[derive(Debug, thiserror::Error)]
pub enum InventoryError {
    /// The kernel's structures are not known.
    #[error("the kernel's own view of VMs is not known: {0}")]
    NoLayout(String),
    /// There is no such process (any more).
    #[error("the kernel has no process {0}")]
    NoProcess(u32),
    /// The structures changed while they were read, or are others than they seemed.
    #[error("the kernel's structures changed while they were read: {0}")]
    Changed(&'static str),
    /// See [`PeekError`].
    #[error(transparent)]
    Peek(#[from] PeekError),
}

/// Where the kernel has processes.
#[derive(Debug, Default)]
pub(super) struct Tasks(BTreeMap<u32, u64>);

impl Tasks {
    /// Walks the list of all processes once, from the calling one on.
    pub(super) fn walk(memory: &mut KernelMemory, at: &WalkOffsets) -> Result<Self, InventoryError> {
        // Only a process's first thread is in the list.
        let current = memory.current_task()?;
        let start = memory.word(current + u64::from(at.task_leader))?.wrapping_add(at.task_tasks.into());
        let (low, high) = (at.task_tasks.min(at.task_tgid), at.task_tasks.max(at.task_tgid) + 8);
        let mut tasks = BTreeMap::new();
        let mut node = start;
        for _ in 0..MAX_TASKS {
            let task = node.wrapping_sub(at.task_tasks.into());
            // One read brings both the process id and the way on.
            let bytes = memory.read(task.wrapping_add(low.into()), high - low)?;
            tasks.insert(half_at(&bytes, at.task_tgid - low), task);
            node = word_at(&bytes, at.task_tasks - low);
            if node == start {
                return Ok(Self(tasks));
            }
        }
        Err(InventoryError::Changed("the list of processes has no end"))
    }
}

/// The VMs of one process, in the order of their descriptors.
pub(super) fn vms_of(
    memory: &mut KernelMemory,
    at: &WalkOffsets,
    tasks: &Tasks,
    process: &KvmDescriptors,
) -> Result<Vec<KernelVm>, InventoryError> {
    let &task = tasks.0.get(&process.pid).ok_or(InventoryError::NoProcess(process.pid))?;
    let mm = memory.word(task + u64::from(at.task_mm))?;
    let files = memory.word(task + u64::from(at.task_files))?;
    let fdt = memory.word(files.wrapping_add(at.files_fdt.into()))?;
    let max = half_at(&memory.read(fdt.wrapping_add(at.fdt_max.into()), 4)?, 0);
    let table = memory.word(fdt.wrapping_add(at.fdt_fd.into()))?;
    let mut behind = |fd: u32| -> Result<u64, InventoryError> {
        if fd >= max {
            return Err(InventoryError::Changed("a descriptor is gone"));
        }
        let file = memory.word(table.wrapping_add(u64::from(fd) * 8))?;
        Ok(memory.word(file.wrapping_add(at.file_private.into()))?)
    };
    let machines = process.machines.iter().map(|&fd| behind(fd)).collect::<Result<Vec<_>, _>>()?;
    let vcpus = process.vcpus.iter().map(|&fd| behind(fd)).collect::<Result<Vec<_>, _>>()?;
    let mut vms = Vec::new();
    for kvm in machines {
        if memory.word(kvm.wrapping_add(at.kvm_mm.into()))? != mm {
            // Inherited from the process that made it: not this one's.
            continue;
        }
        let mut vm = KernelVm { vcpus: Vec::new(), slots: slots(memory, at, kvm)? };
        for &vcpu in &vcpus {
            if memory.word(vcpu.wrapping_add(at.vcpu_kvm.into()))? != kvm {
                continue;
            }
            let index = half_at(&memory.read(vcpu.wrapping_add(at.vcpu_id.into()), 4)?, 0);
            let pid = memory.word(vcpu.wrapping_add(at.vcpu_pid.into()))?;
            let thread = match pid {
                0 => None,
                // The first number is that of the initial pid namespace.
                pid => Some(half_at(&memory.read(pid.wrapping_add(at.pid_number.into()), 4)?, 0)),
            };
            vm.vcpus.push((VcpuFacts { index, thread_id: thread }, vcpu));
        }
        vm.vcpus.sort_by_key(|(facts, _)| facts.index);
        vms.push(vm);
    }
    Ok(vms)
}

/// The memory slots of a VM's ordinary address space.
fn slots(memory: &mut KernelMemory, at: &WalkOffsets, kvm: u64) -> Result<Vec<MemorySlot>, InventoryError> {
    let memslots = memory.word(kvm.wrapping_add(at.kvm_memslots.into()))?;
    let node = half_at(&memory.read(memslots.wrapping_add(at.memslots_node.into()), 4)?, 0) & 1;
    let buckets = memory.read(memslots.wrapping_add(at.memslots_hash.into()), at.memslots_hash_bytes)?;
    // Two chains run through each slot, of which one is in use (struct hlist_node is two pointers).
    let link = at.slot_id_node + node * 16;
    let mut slots = Vec::new();
    for bucket in 0..at.memslots_hash_bytes / 8 {
        let mut next = word_at(&buckets, bucket * 8);
        while next != 0 {
            if slots.len() >= MAX_SLOTS {
                return Err(InventoryError::Changed("a list of memory slots has no end"));
            }
            let bytes = memory.read(next.wrapping_sub(link.into()), at.slot_bytes)?;
            next = word_at(&bytes, link);
            let id = half_at(&bytes, at.slot_id) as u16;
            let flags = half_at(&bytes, at.slot_flags);
            let pages = PageCount(word_at(&bytes, at.slot_pages) & (u64::MAX >> 12));
            if id > MAX_USER_SLOT || pages.0 == 0 {
                continue;
            }
            slots.push(MemorySlot {
                id,
                range: MemoryRange {
                    start: Gpa(word_at(&bytes, at.slot_base).wrapping_mul(4096)),
                    bytes: pages.bytes(),
                },
                host_address: word_at(&bytes, at.slot_address),
                dirty_log: flags & LOG_DIRTY_PAGES != 0,
                read_only: flags & READ_ONLY != 0,
            });
        }
    }
    slots.sort_by_key(|slot| slot.range.start);
    Ok(slots)
}
