//! What the kernel knows of a KVM VM: its vCPUs and its memory slots.

use serde::{Deserialize, Serialize};

use super::guest::MemoryRange;

/// A process and its KVM descriptors, as `/proc` shows them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct KvmDescriptors {
    /// The process.
    pub pid: u32,
    /// Its descriptors of VMs.
    pub machines: Vec<u32>,
    /// Its descriptors of vCPUs.
    pub vcpus: Vec<u32>,
}

/// One memory slot of a VM (`struct kvm_memory_slot`).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemorySlot {
    /// The slot's number, as its VMM chose it.
    pub id: u16,
    /// The guest physical addresses.
    #[serde(flatten)]
    pub range: MemoryRange,
    /// Where the VMM's process has that memory.
    pub host_address: u64,
    /// Whether its dirty log is on.
    pub dirty_log: bool,
    /// Whether the guest may not write it.
    pub read_only: bool,
}

/// One vCPU.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuFacts {
    /// Its number.
    pub index: u32,
    /// The thread that ran it last; none before its first run.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub thread_id: Option<u32>,
}

/// One VM as the kernel has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelVm {
    /// Its vCPUs, by number, with where the kernel has each.
    pub vcpus: Vec<(VcpuFacts, u64)>,
    /// Its memory slots, by guest physical address.
    pub slots: Vec<MemorySlot>,
}

impl KernelVm {
    /// The bytes that the guest can write: slots that are not read-only, each address once.
    pub fn ram_bytes(&self) -> u64 {
        self.slots.iter().filter(|slot| !slot.read_only).map(|slot| slot.range.bytes).sum()
    }

    /// The first address behind the last slot.
    pub fn end_bytes(&self) -> u64 {
        self.slots.iter().map(|slot| slot.range.end().0).max().unwrap_or(0)
    }

    /// Whether someone has a dirty log on for memory that the guest can write, and for how many bytes of it.
    pub fn logged_bytes(&self) -> u64 {
        self.slots.iter().filter(|slot| slot.dirty_log && !slot.read_only).map(|slot| slot.range.bytes).sum()
    }
}
