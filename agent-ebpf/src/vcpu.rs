//! What the kernel's structures say of a vCPU: where it was when it left guest code.

use aya_ebpf::helpers::bpf_probe_read_kernel;
use dunlin_ebpf::{OFFSET_UNKNOWN, TABLE_ADDRESS};

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

/// Words from the instruction pointer on in which the root is looked for.
const PLACE_WORDS: usize = 8;

/// Where guest code was left: the root of its page tables, without flag bits, and the instruction pointer, where that is known.
///
/// The two lie close together in `struct kvm_vcpu_arch` (registers, then control registers), so one read brings both: calls of helpers are
/// what an event costs. The offsets are constants to the verifier, which drops the way that is not taken.
#[inline(always)]
pub(crate) fn place(vcpu: u64) -> Option<(u64, Option<u64>)> {
    let (rip, root) = (constants::vcpu_rip_offset(), constants::vcpu_root_offset());
    let words = root.wrapping_sub(rip) / 8;
    if rip != OFFSET_UNKNOWN && root != OFFSET_UNKNOWN && root % 8 == rip % 8 && words < PLACE_WORDS as u32 {
        // SAFETY: as in `read`.
        let place = unsafe { bpf_probe_read_kernel((vcpu + u64::from(rip)) as *const [u64; PLACE_WORDS]) }.ok()?;
        return Some((place[words as usize % PLACE_WORDS] & TABLE_ADDRESS, Some(place[0])));
    }
    Some((read_at(vcpu, root)? & TABLE_ADDRESS, read_at(vcpu, rip)))
}

/// Why the processor left guest code: the low 32 bits of its reason.
#[inline(always)]
pub(crate) fn exit_reason(vcpu: u64) -> Option<u32> {
    let area = match constants::vcpu_area_offset() {
        OFFSET_UNKNOWN => vcpu,
        offset => read_at(vcpu, offset)?,
    };
    read_at(area, constants::exit_reason_offset()).map(|reason| reason as u32)
}
