//! Exits from guest code to KVM, and from KVM to the VMM, and for how long.

use aya_ebpf::helpers::bpf_ktime_get_ns;
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use dunlin_ebpf::{EXIT_REASON_ERROR, ExitKind};

use crate::tracked::Event;
use crate::vcpu;

const EINTR: i32 = 4;
/// `KVM_EXIT_INTR`: a signal, or a kick, ended the run.
const KVM_EXIT_INTR: u32 = 10;

/// `kvm_userspace_exit(u32 reason, int errno)`.
#[raw_tracepoint(tracepoint = "kvm_userspace_exit")]
fn userspace_exit(ctx: RawTracePointContext) -> i32 {
    let Some(event) = Event::current() else { return 0 };
    let Some(thread) = event.thread(&ctx) else { return 0 };
    thread.userspace_exits += 1;
    let reason = match ctx.arg::<i32>(1) {
        error if error >= 0 => ctx.arg(0),
        error if error == -EINTR => KVM_EXIT_INTR,
        _ => EXIT_REASON_ERROR,
    };
    thread.userspace_exit_reason = reason;
    thread.left_kvm_ns = now();
    event.left(&ctx, ExitKind::Userspace, reason);
    0
}

/// `kvm_fpu(u32 load)`: the guest's registers are loaded when `KVM_RUN` begins, and put away when it ends. Every backend emits it, so it
/// says when the VMM came back.
#[raw_tracepoint(tracepoint = "kvm_fpu")]
fn guest_fpu(ctx: RawTracePointContext) -> i32 {
    let Some(event) = Event::current() else { return 0 };
    if ctx.arg::<u32>(0) == 0 {
        return 0;
    }
    let Some(thread) = event.thread(&ctx) else { return 0 };
    let left = core::mem::take(&mut thread.left_kvm_ns);
    if left != 0 {
        event.came_back(&ctx, ExitKind::Userspace, thread.userspace_exit_reason, now().saturating_sub(left));
    }
    0
}

/// `kvm_exit(struct kvm_vcpu *vcpu, u32 isa)`: guest code was left. Not every KVM backend emits it.
#[raw_tracepoint(tracepoint = "kvm_exit")]
fn guest_exit(ctx: RawTracePointContext) -> i32 {
    let Some(event) = Event::current() else { return 0 };
    let Some(thread) = event.thread(&ctx) else { return 0 };
    thread.guest_exits += 1;
    // Whoever runs it knows where it is.
    thread.vcpu = ctx.arg(0);
    let reason = vcpu::exit_reason(thread.vcpu).unwrap_or(EXIT_REASON_ERROR);
    thread.guest_exit_reason = reason;
    thread.left_guest_ns = now();
    event.left(&ctx, ExitKind::Guest, reason);
    0
}

/// `kvm_entry(struct kvm_vcpu *vcpu, …)`: guest code is about to go on.
#[raw_tracepoint(tracepoint = "kvm_entry")]
fn guest_entry(ctx: RawTracePointContext) -> i32 {
    let Some(event) = Event::current() else { return 0 };
    let Some(thread) = event.thread(&ctx) else { return 0 };
    let left = core::mem::take(&mut thread.left_guest_ns);
    if left != 0 {
        event.came_back(&ctx, ExitKind::Guest, thread.guest_exit_reason, now().saturating_sub(left));
    }
    0
}

#[inline(always)]
fn now() -> u64 {
    // SAFETY: has no precondition.
    unsafe { bpf_ktime_get_ns() }
}
