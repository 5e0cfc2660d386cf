//! The KVM dirty ring: pages as KVM itself logs them.

use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;

use crate::tracked::Event;

/// `kvm_dirty_ring_push(struct kvm_dirty_ring *ring, u32 slot, u64 offset)`.
///
/// Counts only: the page is given as an offset into a memory slot, and the same write's page table entry brings the
/// guest frame number.
#[raw_tracepoint(tracepoint = "kvm_dirty_ring_push")]
fn dirty_ring_push(ctx: RawTracePointContext) -> i32 {
    if let Some(event) = Event::current()
        && let Some(counters) = event.counters(&ctx)
    {
        counters.dirty_ring_pushes += 1;
    }
    0
}
