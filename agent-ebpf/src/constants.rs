//! What the loader knows and hands over: see [`dunlin_ebpf::constant`].

use dunlin_ebpf::OFFSET_UNKNOWN;

#[unsafe(no_mangle)]
static ONLY_TGID: u32 = 0;
#[unsafe(no_mangle)]
static PAGE_FAULT_GFN_OFFSET: u32 = OFFSET_UNKNOWN;
#[unsafe(no_mangle)]
static VCPU_RIP_OFFSET: u32 = OFFSET_UNKNOWN;
#[unsafe(no_mangle)]
static VCPU_ROOT_OFFSET: u32 = OFFSET_UNKNOWN;
#[unsafe(no_mangle)]
static VCPU_AREA_OFFSET: u32 = OFFSET_UNKNOWN;
#[unsafe(no_mangle)]
static EXIT_REASON_OFFSET: u32 = OFFSET_UNKNOWN;

macro_rules! constants {
    ($($(#[$doc:meta])* $function:ident, $name:ident;)*) => {$(
        $(#[$doc])*
        #[inline(always)]
        pub(crate) fn $function() -> u32 {
            // SAFETY: a static of this program; volatile, since the loader writes it where the compiler cannot see.
            unsafe { core::ptr::read_volatile(&raw const $name) }
        }
    )*};
}

constants! {
    /// The only process that counts, or 0.
    only_tgid, ONLY_TGID;
    /// Of the guest frame in a fault.
    page_fault_gfn_offset, PAGE_FAULT_GFN_OFFSET;
    /// Of the instruction pointer in a vCPU.
    vcpu_rip_offset, VCPU_RIP_OFFSET;
    /// Of the root page table in a vCPU.
    vcpu_root_offset, VCPU_ROOT_OFFSET;
    /// Of the pointer to the vCPU's area, or unknown.
    vcpu_area_offset, VCPU_AREA_OFFSET;
    /// Of the exit reason there.
    exit_reason_offset, EXIT_REASON_OFFSET;
}
