//! Second-level (or shadow) page table entries that turn writable.

use aya_ebpf::helpers::bpf_probe_read_kernel;
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use dunlin_ebpf::{Loss, OFFSET_UNKNOWN};

use crate::tracked::Event;

/// The bit that lets the guest write: the same in shadow, nested (AMD) and extended (Intel) page tables.
const WRITABLE: u64 = 1 << 1;

/// See [`dunlin_ebpf::constant::PAGE_FAULT_GFN_OFFSET`].
#[unsafe(no_mangle)]
static PAGE_FAULT_GFN_OFFSET: u32 = OFFSET_UNKNOWN;

/// `kvm_mmu_set_spte(int level, gfn_t gfn, u64 *sptep)`: an entry was written.
#[raw_tracepoint(tracepoint = "kvm_mmu_set_spte")]
fn set_spte(ctx: RawTracePointContext) -> i32 {
    let Some(event) = Event::current() else { return 0 };
    match read(ctx.arg::<*const u64>(2)) {
        Some(entry) if entry & WRITABLE != 0 => event.made_writable(&ctx, ctx.arg(1), ctx.arg(0)),
        Some(_) => {}
        None => event.lose(&ctx, Loss::Unreadable),
    }
    0
}

/// `fast_page_fault(vcpu, struct kvm_page_fault *fault, u64 *sptep, u64 old_spte, int ret)`: a write-protect fault that
/// KVM resolved without its lock, and without the event above. The fast path only handles 4 KiB entries.
#[raw_tracepoint(tracepoint = "fast_page_fault")]
fn fast_page_fault(ctx: RawTracePointContext) -> i32 {
    let Some(event) = Event::current() else { return 0 };
    let sptep: *const u64 = ctx.arg(2);
    let before: u64 = ctx.arg(3);
    if sptep.is_null() || before & WRITABLE != 0 {
        return 0;
    }
    match read(sptep) {
        Some(entry) if entry & WRITABLE != 0 => {}
        Some(_) => return 0,
        None => {
            event.lose(&ctx, Loss::Unreadable);
            return 0;
        }
    }
    // SAFETY: a static of this program; volatile, since the loader writes it where the compiler cannot see.
    let offset = unsafe { core::ptr::read_volatile(&raw const PAGE_FAULT_GFN_OFFSET) };
    let fault: *const u8 = ctx.arg(1);
    let gfn = if offset == OFFSET_UNKNOWN { None } else { read(fault.wrapping_add(offset as usize).cast::<u64>()) };
    match gfn {
        Some(gfn) => event.made_writable(&ctx, gfn, 1),
        None => event.lose(&ctx, Loss::Unreadable),
    }
    0
}

/// Reads a word of kernel memory; none where it cannot be read.
#[inline(always)]
fn read(from: *const u64) -> Option<u64> {
    // SAFETY: the helper checks the address and fails instead of faulting.
    unsafe { bpf_probe_read_kernel(from) }.ok()
}
