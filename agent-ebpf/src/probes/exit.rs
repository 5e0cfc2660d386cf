//! Exits from guest code to KVM, and from KVM to the VMM.

use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use dunlin_ebpf::EXIT_REASON_ERROR;

use crate::tracked::Event;

const EINTR: i32 = 4;
/// `KVM_EXIT_INTR`: a signal, or a kick, ended the run.
const KVM_EXIT_INTR: u32 = 10;

/// `kvm_userspace_exit(u32 reason, int errno)`.
#[raw_tracepoint(tracepoint = "kvm_userspace_exit")]
fn userspace_exit(ctx: RawTracePointContext) -> i32 {
    let Some(event) = Event::current() else { return 0 };
    let Some(counters) = event.counters(&ctx) else { return 0 };
    counters.userspace_exits += 1;
    let reason = match ctx.arg::<i32>(1) {
        error if error >= 0 => ctx.arg(0),
        error if error == -EINTR => KVM_EXIT_INTR,
        _ => EXIT_REASON_ERROR,
    };
    event.exit(&ctx, reason);
    0
}

/// `kvm_exit(struct kvm_vcpu *vcpu, u32 isa)`: guest code was left. Not every KVM backend emits it.
#[raw_tracepoint(tracepoint = "kvm_exit")]
fn guest_exit(ctx: RawTracePointContext) -> i32 {
    if let Some(event) = Event::current()
        && let Some(counters) = event.counters(&ctx)
    {
        counters.guest_exits += 1;
    }
    0
}
