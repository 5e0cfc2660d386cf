//! Reading kernel memory for the agent, which then finds its way through the kernel's structures by itself.

use aya_ebpf::helpers::{bpf_get_current_task, bpf_probe_read_kernel_buf};
use aya_ebpf::macros::raw_tracepoint;
use aya_ebpf::programs::RawTracePointContext;
use dunlin_ebpf::PEEK_BYTES;

use crate::maps::PEEKED;

/// `peek(u64 address, u64 bytes)`: run by the agent (`BPF_PROG_TEST_RUN`), attached to nothing. Address 0 asks for the caller's own
/// `struct task_struct *`. Returns 0, or 1 if the memory cannot be read.
#[raw_tracepoint]
fn peek(ctx: RawTracePointContext) -> i32 {
    let Some(value) = PEEKED.get_ptr_mut(0) else { return 1 };
    // SAFETY: a live map value; the agent runs one peek at a time.
    let value = unsafe { &mut *value };
    let address: u64 = ctx.arg(0);
    let bytes: u64 = ctx.arg(1);
    if address == 0 {
        // SAFETY: has no precondition.
        let task = unsafe { bpf_get_current_task() };
        // SAFETY: the value is page-aligned and longer than a word.
        unsafe { value.as_mut_ptr().cast::<u64>().write(task) };
        return 0;
    }
    let Some(into) = value.get_mut(..(bytes.min(u64::from(PEEK_BYTES)) as usize)) else { return 1 };
    // SAFETY: the helper checks the address and fails instead of faulting.
    i32::from(unsafe { bpf_probe_read_kernel_buf(address as *const u8, into) }.is_err())
}
