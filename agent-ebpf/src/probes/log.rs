//! Dirty logs: pages as KVM itself logs them.

use aya_ebpf::macros::{kprobe, raw_tracepoint};
use aya_ebpf::programs::{ProbeContext, RawTracePointContext};

use crate::tracked::Event;

/// `kvm_dirty_ring_push(struct kvm_dirty_ring *ring, u32 slot, u64 offset)`.
///
/// Counts only: the page is given as an offset into a memory slot, and the same write's page table entry brings the
/// guest frame number.
#[raw_tracepoint(tracepoint = "kvm_dirty_ring_push")]
fn dirty_ring_push(ctx: RawTracePointContext) -> i32 {
    if let Some(event) = Event::current()
        && let Some(thread) = event.thread(&ctx)
    {
        thread.dirty_ring_pushes += 1;
    }
    0
}

/// [`page_logged`] at the function's entry, where the kernel lets programs be called without a breakpoint. A raw tracepoint program to the
/// BPF library, which cannot load it for a function of a module; the agent does, and the arguments lie alike.
#[raw_tracepoint]
fn page_logged_at_entry(ctx: RawTracePointContext) -> i32 {
    if let Some(event) = Event::current() {
        event.logged(&ctx, ctx.arg(2));
    }
    0
}

/// `mark_page_dirty_in_slot(struct kvm *kvm, const struct kvm_memory_slot *memslot, gfn_t gfn)`: also what the processor logged by itself, and
/// what KVM wrote. Not a count of guest writes.
#[kprobe(function = "mark_page_dirty_in_slot")]
fn page_logged(ctx: ProbeContext) -> u32 {
    if let Some(event) = Event::current()
        && let Some(gfn) = ctx.arg::<u64>(2)
    {
        event.logged(&ctx, gfn);
    }
    0
}
