//! The boot processor's state at the first instruction.
//!
//! PVH: 32-bit protected mode, flat segments, no paging, EBX at the start structure. Linux' 64-bit boot protocol: long mode,
//! flat segments, paging, RSI at the boot parameters. The other processors stay as KVM makes them: waiting for INIT and SIPI.

use kvm_bindings::{kvm_dtable, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use crate::kvm::boot::EntryPoint;
use crate::kvm::sys::KvmError;

use super::msr;

/// CR0: protected mode, and the bit for the coprocessor's type that is always set.
const CR0_PE_ET: u64 = 0x11;
/// CR0: paging.
const CR0_PG: u64 = 1 << 31;
/// CR4: entries of page tables have 64 bits.
const CR4_PAE: u64 = 1 << 5;
/// EFER: long mode is wanted, and on.
const EFER_LME_LMA: u64 = 1 << 8 | 1 << 10;
/// IA32_MTRR_DEF_TYPE (SDM 3A, 12.11.2.1): on, memory is cached for reading and writing.
const MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ON_WRITE_BACK: u64 = 1 << 11 | 6;
/// RFLAGS: the bit that is always set.
const RFLAGS_FIXED: u64 = 2;

/// A flat 4 GiB segment of `kind` (code or data).
fn flat(selector: u16, kind: u8) -> kvm_segment {
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: kind,
        present: 1,
        db: 1,
        s: 1,
        g: 1,
        ..Default::default()
    }
}

/// What firmware does on every processor before it starts anything: memory types are on. Without, Linux reports that the
/// firmware left them off, and older ones do without the page attribute table then. Its CPUID is already set.
pub(crate) fn power_on(vcpu: &VcpuFd) {
    let entry = kvm_msr_entry { index: MTRR_DEF_TYPE, data: MTRR_ON_WRITE_BACK, ..Default::default() };
    if let Err(error) = msr::write(vcpu, &[entry]) {
        // KVM caches guest memory as it must anyway: the register is only looked at by the guest.
        tracing::debug!("memory types stay off: {error}");
    }
}

/// Sets the boot processor up. Its CPUID is already set.
pub(crate) fn set_up(vcpu: &VcpuFd, entry: EntryPoint) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(KvmError::of("KVM_GET_SREGS"))?;
    // A busy TSS, whose selector nobody loads.
    sregs.tr = kvm_segment { limit: 0x67, selector: 0x18, type_: 0xb, present: 1, ..Default::default() };
    sregs.idt.limit = 0;
    let mut regs = kvm_regs { rflags: RFLAGS_FIXED, ..Default::default() };
    let data = match entry {
        EntryPoint::Pvh { entry, start_info } => {
            sregs.cs = flat(0x08, 0xb);
            sregs.gdt.limit = 0;
            (sregs.cr0, sregs.cr4, sregs.efer) = (CR0_PE_ET, 0, 0);
            (regs.rip, regs.rbx) = (entry, start_info);
            flat(0x10, 0x3)
        }
        EntryPoint::Long { entry, params, page_tables, descriptors, descriptors_limit } => {
            sregs.cs = kvm_segment { l: 1, db: 0, ..flat(0x10, 0xb) };
            sregs.gdt = kvm_dtable { base: descriptors, limit: descriptors_limit, ..Default::default() };
            sregs.cr3 = page_tables;
            (sregs.cr0, sregs.cr4, sregs.efer) = (CR0_PE_ET | CR0_PG, CR4_PAE, EFER_LME_LMA);
            (regs.rip, regs.rsi) = (entry, params);
            flat(0x18, 0x3)
        }
    };
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    vcpu.set_sregs(&sregs).map_err(KvmError::of("KVM_SET_SREGS"))?;
    vcpu.set_regs(&regs).map_err(KvmError::of("KVM_SET_REGS"))
}
