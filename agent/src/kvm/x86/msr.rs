//! Model-specific registers: which of them this host can read and write, and their transfer.
//!
//! The list is the kernel's; those that it lists and then refuses are found by trial once a machine, and named in one
//! warning. The time-stamp counter and its deadline are apart, because their order with the LAPIC matters; so are the registers
//! of the KVM clock, which stand behind the counter.
//!
//! IA32_TSC_ADJUST is a register like others: when the guest writes it KVM moves the counter, when the VMM writes it KVM only
//! notes the value (arch/x86/kvm/x86.c, `kvm_set_msr_common`, `host_initiated`). So nothing counts twice.

use std::ops::RangeInclusive;

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::kvm::sys::KvmError;

/// IA32_TIME_STAMP_COUNTER.
pub(crate) const TSC: u32 = 0x10;
/// IA32_TSC_DEADLINE.
pub(crate) const TSC_DEADLINE: u32 = 0x6e0;
/// MSR_KVM_SYSTEM_TIME, old and new: where KVM keeps a vCPU's clock in guest memory.
const SYSTEM_TIME: [u32; 2] = [0x12, 0x4b56_4d01];
/// MSR_KVM_WALL_CLOCK, old and new.
///
/// Orders, not state: KVM writes the time of boot to guest memory at the moment of the write, and never again
/// (Documentation/virt/kvm/x86/msr.rst). They do not move: a write at the target would change the guest's memory at an address
/// that may have been given up long ago (a kernel that came by kexec does not reset it).
const WALL_CLOCK: [u32; 2] = [0x11, 0x4b56_4d00];

/// The memory-type range registers (SDM 3A, 12.11): KVM keeps them, and lists them in no version. What a guest has written
/// there would be lost.
const MTRRS: [RangeInclusive<u32>; 5] = [0x200..=0x20f, 0x250..=0x250, 0x258..=0x259, 0x268..=0x26f, 0x2ff..=0x2ff];

/// How many registers one call takes (`KVM_GET_MSRS` refuses more than 255).
const CHUNK: usize = 255;

/// The registers that move with a vCPU of this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct MsrList {
    indices: Vec<u32>,
    has_deadline: bool,
    refused: Vec<u32>,
}

impl MsrList {
    /// Tries every register that KVM lists on `vcpu`, which has its CPUID and has not run: read, then write back what was
    /// read.
    pub(crate) fn by_trial(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Self, KvmError> {
        let listed = kvm.get_msr_index_list().map_err(KvmError::of("KVM_GET_MSR_INDEX_LIST"))?;
        let (mut indices, mut refused) = (Vec::new(), Vec::new());
        for &index in listed.as_slice().iter().filter(|&&index| index != TSC && !is_order(index)) {
            let works = read(vcpu, &[index]).is_ok_and(|entries| write(vcpu, &entries).is_ok());
            if works { indices.push(index) } else { refused.push(index) }
        }
        let has_deadline = indices.contains(&TSC_DEADLINE);
        indices.retain(|&index| index != TSC_DEADLINE);
        // KVM has made no promise about these: if they do not work, there is nothing to warn of.
        indices.extend(MTRRS.into_iter().flatten().filter(|&index| {
            !listed.as_slice().contains(&index)
                && read(vcpu, &[index]).is_ok_and(|entries| write(vcpu, &entries).is_ok())
        }));
        if !refused.is_empty() {
            let names: Vec<String> = refused.iter().map(|index| format!("{index:#x}")).collect();
            tracing::warn!("this host lists MSRs that it refuses; they do not move: {}", names.join(" "));
        }
        Ok(Self { indices, has_deadline, refused })
    }

    /// All registers but the time-stamp counter and its deadline.
    pub(crate) fn indices(&self) -> &[u32] {
        &self.indices
    }

    /// Whether the deadline timer exists.
    pub(crate) fn has_deadline(&self) -> bool {
        self.has_deadline
    }

    /// What was listed and refused.
    pub(crate) fn refused(&self) -> &[u32] {
        &self.refused
    }
}

/// Whether a register is written for its effect and holds nothing that must move.
pub(crate) fn is_order(index: u32) -> bool {
    WALL_CLOCK.contains(&index)
}

/// Whether a register belongs behind the time-stamp counter and the VM's clock.
pub(crate) fn is_clock(index: u32) -> bool {
    SYSTEM_TIME.contains(&index)
}

/// A register and its value.
pub(crate) fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
}

/// Reads registers.
pub(crate) fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, KvmError> {
    let mut all = Vec::with_capacity(indices.len());
    for chunk in indices.chunks(CHUNK) {
        let entries: Vec<_> = chunk.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = wrap(&entries)?;
        let done = vcpu.get_msrs(&mut msrs).map_err(KvmError::of("KVM_GET_MSRS"))?;
        all.extend_from_slice(msrs.as_slice());
        stopped_at(chunk.get(done).copied(), "KVM_GET_MSRS")?;
    }
    Ok(all)
}

/// Writes registers, in order.
pub(crate) fn write(vcpu: &VcpuFd, entries: &[kvm_msr_entry]) -> Result<(), KvmError> {
    for chunk in entries.chunks(CHUNK) {
        let done = vcpu.set_msrs(&wrap(chunk)?).map_err(KvmError::of("KVM_SET_MSRS"))?;
        stopped_at(chunk.get(done).map(|entry| entry.index), "KVM_SET_MSRS")?;
    }
    Ok(())
}

fn wrap(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries)
        .map_err(|e| KvmError { action: "list of MSRs", source: std::io::Error::other(format!("{e:?}")) })
}

fn stopped_at(index: Option<u32>, action: &'static str) -> Result<(), KvmError> {
    index.map_or(Ok(()), |index| {
        Err(KvmError { action, source: std::io::Error::other(format!("MSR {index:#x} is refused")) })
    })
}
