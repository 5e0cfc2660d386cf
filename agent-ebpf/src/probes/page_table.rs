//! Second-level (or shadow) page table entries that turn writable.

use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;

use crate::constants;
use crate::tracked::Event;
use crate::vcpu::{read, read_at};

/// The bit that lets the guest write: the same in shadow, nested (AMD) and extended (Intel) page tables.
const WRITABLE: u64 = 1 << 1;

/// `kvm_mmu_set_spte(int level, gfn_t gfn, u64 *sptep)`: an entry was written.
#[raw_tracepoint(tracepoint = "kvm_mmu_set_spte")]
fn set_spte(ctx: RawTracePointContext) -> i32 {
    let Some(event) = Event::current() else { return 0 };
    match read(ctx.arg(2)) {
        Some(entry) if entry & WRITABLE != 0 => event.made_writable(&ctx, ctx.arg(1), ctx.arg(0)),
        Some(_) => {}
        None => event.unreadable(&ctx),
    }
    0
}

/// `fast_page_fault(vcpu, struct kvm_page_fault *fault, u64 *sptep, u64 old_spte, int ret)`: a write-protect fault that
/// KVM resolved without its lock, and without the event above. The fast path only handles 4 KiB entries.
#[raw_tracepoint(tracepoint = "fast_page_fault")]
fn fast_page_fault(ctx: RawTracePointContext) -> i32 {
    let Some(event) = Event::current() else { return 0 };
    let sptep: u64 = ctx.arg(2);
    let before: u64 = ctx.arg(3);
    if sptep == 0 || before & WRITABLE != 0 {
        return 0;
    }
    match read(sptep) {
        Some(entry) if entry & WRITABLE != 0 => {}
        Some(_) => return 0,
        None => {
            event.unreadable(&ctx);
            return 0;
        }
    }
    let gfn = read_at(ctx.arg(1), constants::page_fault_gfn_offset());
    match gfn {
        Some(gfn) => event.made_writable(&ctx, gfn, 1),
        None => event.unreadable(&ctx),
    }
    0
}
