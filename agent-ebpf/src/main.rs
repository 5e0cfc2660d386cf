//! The BPF programs: count, in the kernel, how tracked VMs write their memory and leave KVM.
//!
//! Owns counting and nothing else: no rates, no policy. Only processes in `TRACKED` cost more than one comparison.
//! Built for the BPF target by `cargo xtask build-ebpf`.
#![no_std]
#![no_main]
#![feature(core_intrinsics, asm_experimental_arch)]
#![allow(internal_features, reason = "the BPF target has no atomic types, only the intrinsics")]

mod atomic;
mod constants;
mod maps;
mod probes;
mod tracked;
mod vcpu;

/// The kernel refuses a program that is not under a licence compatible with its helpers'.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    // No path of these programs panics; the verifier would refuse this loop if one did.
    loop {}
}
