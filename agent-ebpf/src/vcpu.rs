//! What the kernel's structures say of a vCPU: where it was when it left guest code.

use aya_ebpf::helpers::bpf_probe_read_kernel;
use dunlin_ebpf::OFFSET_UNKNOWN;

use crate::constants;

/// Reads a word of kernel memory; none where it cannot be read.
#[inline(always)]
pub(crate) fn read(from: u64) -> Option<u64> {
    // SAFETY: the helper checks the address and fails instead of faulting.
    unsafe { bpf_probe_read_kernel(from as *const u64) }.ok()
}

/// Reads the word at an offset of a structure; none where the offset is not known.
#[inline(always)]
pub(crate) fn read_at(structure: u64, offset: u32) -> Option<u64> {
    if offset == OFFSET_UNKNOWN { None } else { read(structure.wrapping_add(u64::from(offset))) }
}

/// The structure that holds root and exit reason of a vCPU.
#[inline(always)]
fn area(vcpu: u64) -> Option<u64> {
    match constants::vcpu_area_offset() {
        OFFSET_UNKNOWN => Some(vcpu),
        offset => read_at(vcpu, offset),
    }
}

/// The root of the guest's page tables, without flag bits.
#[inline(always)]
pub(crate) fn root(vcpu: u64) -> Option<u64> {
    // Bits 12 to 51 (Intel SDM volume 3, table 4-12).
    read_at(area(vcpu)?, constants::root_offset()).map(|root| root & 0x000f_ffff_ffff_f000)
}

/// The guest's instruction pointer.
#[inline(always)]
pub(crate) fn instruction(vcpu: u64) -> Option<u64> {
    read_at(vcpu, constants::vcpu_rip_offset())
}

/// Why the processor left guest code: the low 32 bits of its reason.
#[inline(always)]
pub(crate) fn exit_reason(vcpu: u64) -> Option<u32> {
    read_at(area(vcpu)?, constants::exit_reason_offset()).map(|reason| reason as u32)
}
