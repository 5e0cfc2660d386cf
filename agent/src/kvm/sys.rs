//! KVM calls that kvm-ioctls has no wrapper for, and the error of every KVM call.
//!
//! Owns the numbers and layouts of those calls. Must not know what a caller wants with them.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd};

use kvm_bindings::{KVMIO, kvm_clear_dirty_log, kvm_device_attr, kvm_dirty_log, kvm_dtable, kvm_segment, kvm_xsave};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{ioctl, ioctl_with_mut_ptr, ioctl_with_mut_ref, ioctl_with_ptr, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_ior_nr, ioctl_iow_nr, ioctl_iowr_nr};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// KVM refused a call.
#[derive(Debug, thiserror::Error)]
#[error("KVM: {action} failed")]
pub struct KvmError {
    /// What was tried, as the kernel documents it.
    pub action: &'static str,
    /// What the kernel said.
    #[source]
    pub source: io::Error,
}

impl KvmError {
    /// For `map_err`: names the call.
    pub(crate) fn of<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self { action, source: source.into() }
    }

    /// What `errno` says of a call that returned a negative number.
    fn last(action: &'static str) -> Self {
        Self { action, source: errno::Error::last().into() }
    }
}

mod numbers {
    #![allow(missing_docs, reason = "the names are those of the kernel's documentation")]
    #![allow(unreachable_pub, reason = "the macros make them pub")]
    use super::*;

    ioctl_iow_nr!(KVM_GET_DIRTY_LOG, KVMIO, 0x42, kvm_dirty_log);
    ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
    ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
    ioctl_ior_nr!(KVM_GET_SREGS2, KVMIO, 0xcc, Sregs2);
    ioctl_iow_nr!(KVM_SET_SREGS2, KVMIO, 0xcd, Sregs2);
    ioctl_ior_nr!(KVM_GET_XSAVE, KVMIO, 0xa4, kvm_xsave);
    ioctl_iow_nr!(KVM_SET_XSAVE, KVMIO, 0xa5, kvm_xsave);
    ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
    ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);
    ioctl_ior_nr!(KVM_GET_XSAVE2, KVMIO, 0xcf, kvm_xsave);
    ioctl_io_nr!(KVM_GET_STATS_FD, KVMIO, 0xce);
}

/// `struct kvm_sregs2`: the system registers with the PDPTRs.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Sregs2 {
    /// CS, DS, ES, FS, GS, SS, TR, LDT.
    pub segments: [kvm_segment; 8],
    /// GDT, IDT.
    pub tables: [kvm_dtable; 2],
    /// CR0, CR2, CR3, CR4, CR8, EFER, APIC base.
    pub control: [u64; 7],
    /// `KVM_SREGS2_FLAGS_*`.
    pub flags: u64,
    /// The page-directory-pointer-table entries of PAE paging.
    pub pdptrs: [u64; 4],
}

const _: () = assert!(size_of::<Sregs2>() == size_of::<kvm_bindings::kvm_sregs2>());

/// Fetches the dirty log of `slot` into `log`, one bit a page.
///
/// # Panics
/// If `log` is shorter than `pages` bits.
pub(crate) fn get_dirty_log(vm: &VmFd, slot: u32, pages: u64, log: &mut [u64]) -> Result<(), KvmError> {
    assert!(log.len() as u64 * 64 >= pages);
    let mut request = kvm_dirty_log { slot, ..Default::default() };
    request.__bindgen_anon_1.dirty_bitmap = log.as_mut_ptr().cast();
    // SAFETY: the kernel writes one bit a page of the slot, rounded up to words; the caller's slot has `pages` pages.
    match unsafe { ioctl_with_ref(vm, numbers::KVM_GET_DIRTY_LOG(), &request) } {
        0 => Ok(()),
        _ => Err(KvmError::last("KVM_GET_DIRTY_LOG")),
    }
}

/// Clears the set bits of `bits` in the dirty log of `slot`, bit 0 being page `first_page` (a multiple of 64), and
/// protects those of their pages that were dirty. `pages` is a multiple of 64, or reaches the slot's end.
///
/// # Panics
/// If `bits` is shorter than `pages` bits.
pub(crate) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first_page: u64,
    pages: u32,
    bits: &mut [u64],
) -> Result<(), KvmError> {
    assert!(bits.len() as u64 * 64 >= u64::from(pages));
    let mut request = kvm_clear_dirty_log { slot, first_page, num_pages: pages, ..Default::default() };
    request.__bindgen_anon_1.dirty_bitmap = bits.as_mut_ptr().cast();
    // SAFETY: the kernel reads `pages` bits, which `bits` has.
    match unsafe { ioctl_with_ref(vm, numbers::KVM_CLEAR_DIRTY_LOG(), &request) } {
        0 => Ok(()),
        _ => Err(KvmError::last("KVM_CLEAR_DIRTY_LOG")),
    }
}

/// Protects the pages of all ring entries that user space has harvested. Returns how many there were.
pub(crate) fn reset_dirty_rings(vm: &VmFd) -> Result<u64, KvmError> {
    // SAFETY: takes no argument; the kernel touches only the rings.
    match unsafe { ioctl(vm, numbers::KVM_RESET_DIRTY_RINGS()) } {
        count @ 0.. => Ok(count as u64),
        _ => Err(KvmError::last("KVM_RESET_DIRTY_RINGS")),
    }
}

/// Opens the file of a vCPU's statistics (`KVM_CAP_BINARY_STATS_FD`, Linux 5.14).
pub(crate) fn stats_fd(vcpu: &VcpuFd) -> Result<OwnedFd, KvmError> {
    // SAFETY: takes no argument.
    match unsafe { ioctl(vcpu, numbers::KVM_GET_STATS_FD()) } {
        // SAFETY: a descriptor that the kernel has just made for us.
        fd @ 0.. => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(KvmError::last("KVM_GET_STATS_FD")),
    }
}

/// Reads the system registers with the PDPTRs (`KVM_CAP_SREGS2`).
pub(crate) fn get_sregs2(vcpu: &VcpuFd) -> Result<Sregs2, KvmError> {
    let mut sregs = Sregs2::default();
    // SAFETY: the kernel fills exactly the structure whose size is in the call's number.
    match unsafe { ioctl_with_mut_ref(vcpu, numbers::KVM_GET_SREGS2(), &mut sregs) } {
        0 => Ok(sregs),
        _ => Err(KvmError::last("KVM_GET_SREGS2")),
    }
}

/// Writes the system registers with the PDPTRs.
pub(crate) fn set_sregs2(vcpu: &VcpuFd, sregs: &Sregs2) -> Result<(), KvmError> {
    // SAFETY: the kernel reads exactly the structure whose size is in the call's number.
    match unsafe { ioctl_with_ref(vcpu, numbers::KVM_SET_SREGS2(), sregs) } {
        0 => Ok(()),
        _ => Err(KvmError::last("KVM_SET_SREGS2")),
    }
}

/// How large an extended state is on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct XsaveSize {
    /// The size of `KVM_GET_XSAVE2`'s answer, at least 4096; `None` where only `KVM_GET_XSAVE` with its 4096 exists.
    xsave2: Option<usize>,
}

/// What `KVM_GET_XSAVE` always takes.
const XSAVE_BYTES: usize = 4096;

impl XsaveSize {
    /// Asks the VM.
    pub(crate) fn of(vm: &VmFd) -> Self {
        let size = vm.check_extension_int(kvm_ioctls::Cap::Xsave2);
        Self { xsave2: usize::try_from(size).ok().filter(|&size| size >= XSAVE_BYTES) }
    }

    #[cfg(test)]
    pub(crate) fn for_test(xsave2: Option<usize>) -> Self {
        Self { xsave2 }
    }

    /// The size in bytes.
    pub(crate) fn bytes(self) -> usize {
        self.xsave2.unwrap_or(XSAVE_BYTES)
    }
}

/// Reads x87, SSE, AVX … state.
pub(crate) fn get_xsave(vcpu: &VcpuFd, size: XsaveSize) -> Result<Vec<u8>, KvmError> {
    let mut state = vec![0u8; size.bytes()];
    let (action, number) = match size.xsave2 {
        Some(_) => ("KVM_GET_XSAVE2", numbers::KVM_GET_XSAVE2()),
        None => ("KVM_GET_XSAVE", numbers::KVM_GET_XSAVE()),
    };
    // SAFETY: the kernel copies out as many bytes as KVM_CAP_XSAVE2 said, or 4096, and `state` has those.
    match unsafe { ioctl_with_mut_ptr(vcpu, number, state.as_mut_ptr()) } {
        0 => Ok(state),
        _ => Err(KvmError::last(action)),
    }
}

/// Writes x87, SSE, AVX … state.
///
/// # Panics
/// If `state` is shorter than `size`.
pub(crate) fn set_xsave(vcpu: &VcpuFd, size: XsaveSize, state: &[u8]) -> Result<(), KvmError> {
    assert!(state.len() >= size.bytes());
    // SAFETY: the kernel copies in as many bytes as KVM_CAP_XSAVE2 said, or 4096, and `state` has those.
    match unsafe { ioctl_with_ptr(vcpu, numbers::KVM_SET_XSAVE(), state.as_ptr()) } {
        0 => Ok(()),
        _ => Err(KvmError::last("KVM_SET_XSAVE")),
    }
}

/// Group and number of a vCPU's TSC offset among the device attributes (`KVM_VCPU_TSC_CTRL`, `KVM_VCPU_TSC_OFFSET`).
fn tsc_offset_attribute(value: &mut u64) -> kvm_device_attr {
    kvm_device_attr { group: 0, attr: 0, addr: std::ptr::from_mut(value) as u64, flags: 0 }
}

/// Reads the difference between the guest's and the host's time-stamp counter; `None` where KVM does not tell it.
pub(crate) fn get_tsc_offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut value = 0;
    let attribute = tsc_offset_attribute(&mut value);
    // SAFETY: the kernel writes one u64 through the attribute's address, which is that of `value`.
    match unsafe { ioctl_with_ref(vcpu, numbers::KVM_GET_DEVICE_ATTR(), &attribute) } {
        0 => Some(value),
        _ => None,
    }
}

/// Sets the difference between the guest's and the host's time-stamp counter.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, mut value: u64) -> Result<(), KvmError> {
    // SAFETY: the kernel reads one u64 through the attribute's address, which is that of `value`.
    match unsafe { ioctl_with_ref(vcpu, numbers::KVM_SET_DEVICE_ATTR(), &tsc_offset_attribute(&mut value)) } {
        0 => Ok(()),
        _ => Err(KvmError::last("KVM_VCPU_TSC_OFFSET")),
    }
}
