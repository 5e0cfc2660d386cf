//! The boot processor's state at the first instruction of a PVH guest.
//!
//! 32-bit protected mode, flat segments, no paging, EBX at the start structure. The other processors stay as KVM makes them:
//! waiting for INIT and SIPI.

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::VcpuFd;

use crate::kvm::boot::EntryPoint;
use crate::kvm::sys::KvmError;

/// CR0: protected mode, and the bit for the coprocessor's type that is always set.
const CR0_PE_ET: u64 = 0x11;
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

/// Sets the boot processor up. Its CPUID is already set.
pub(crate) fn set_up(vcpu: &VcpuFd, entry: EntryPoint) -> Result<(), KvmError> {
    let mut sregs = vcpu.get_sregs().map_err(KvmError::of("KVM_GET_SREGS"))?;
    sregs.cs = flat(0x08, 0xb);
    let data = flat(0x10, 0x3);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    // A busy 32-bit TSS.
    sregs.tr = kvm_segment { limit: 0x67, selector: 0x18, type_: 0xb, present: 1, ..Default::default() };
    sregs.gdt.limit = 0;
    sregs.idt.limit = 0;
    sregs.cr0 = CR0_PE_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    vcpu.set_sregs(&sregs).map_err(KvmError::of("KVM_SET_SREGS"))?;
    let regs = kvm_regs { rflags: RFLAGS_FIXED, rip: entry.entry, rbx: entry.start_info, ..Default::default() };
    vcpu.set_regs(&regs).map_err(KvmError::of("KVM_SET_REGS"))
}
