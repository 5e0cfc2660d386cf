//! Trials of KVM: making a VM, running one, logging its writes.

use std::io;

use kvm_ioctls::Kvm;

/// Makes a VM and a vCPU.
///
/// # Errors
/// What opening `/dev/kvm` or KVM answered.
pub fn create_vm() -> io::Result<String> {
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    vm.create_vcpu(0)?;
    Ok(format!(
        "API {}, up to {} vCPUs and {} memory slots",
        kvm.get_api_version(),
        kvm.get_max_vcpus(),
        kvm.get_nr_memslots()
    ))
}

/// Runs a VM that writes to known pages, and compares the dirty bitmap with them.
///
/// # Errors
/// KVM refused, or its log differs.
#[cfg(target_arch = "x86_64")]
pub fn run_vm() -> io::Result<String> {
    use super::tiny_vm::TinyVm;
    use crate::model::{DirtyLogKind, PageCount};
    let mut vm = TinyVm::new(PageCount(64), DirtyLogKind::Bitmap)?;
    vm.write_pages(PageCount(64))?;
    vm.set_logging(true)?;
    vm.write_pages(PageCount(17))?;
    let logged: u32 = vm.fetch_log()?.iter().map(|word| word.count_ones()).sum();
    if logged != 17 {
        return Err(io::Error::other(format!("the guest wrote 17 pages and the dirty bitmap shows {logged}")));
    }
    Ok("a guest ran, and the dirty bitmap shows what it wrote".to_owned())
}

/// What a write to a write-protected page costs a guest on this host, beyond the write itself: the median of a few passes over the same
/// pages with and without protection.
///
/// # Errors
/// KVM refused.
#[cfg(target_arch = "x86_64")]
pub fn fault_cost() -> io::Result<std::time::Duration> {
    use std::time::Instant;

    use super::tiny_vm::TinyVm;
    use crate::model::{DirtyLogKind, PageCount};
    const PAGES: PageCount = PageCount(512);
    const PASSES: usize = 7;
    let mut vm = TinyVm::new(PAGES, DirtyLogKind::Bitmap)?;
    vm.write_pages(PAGES)?;
    let mut costs = Vec::with_capacity(PASSES);
    for _ in 0..PASSES {
        vm.set_logging(true)?;
        let began = Instant::now();
        vm.write_pages(PAGES)?;
        let protected = began.elapsed();
        let began = Instant::now();
        vm.write_pages(PAGES)?;
        costs.push(protected.saturating_sub(began.elapsed()) / PAGES.0 as u32);
        vm.set_logging(false)?;
    }
    costs.sort_unstable();
    Ok(costs[PASSES / 2])
}

/// Unknown: there is no trial guest for this architecture.
///
/// # Errors
/// Always.
#[cfg(not(target_arch = "x86_64"))]
pub fn fault_cost() -> io::Result<std::time::Duration> {
    Err(io::Error::other("hosted VMs run on x86-64 only"))
}

/// Runs nothing: there is no trial guest for this architecture.
///
/// # Errors
/// Always.
#[cfg(not(target_arch = "x86_64"))]
pub fn run_vm() -> io::Result<String> {
    Err(io::Error::other("hosted VMs run on x86-64 only"))
}

/// Runs a VM with a dirty ring.
///
/// # Errors
/// KVM refused.
#[cfg(target_arch = "x86_64")]
pub fn dirty_ring() -> io::Result<String> {
    use super::tiny_vm::TinyVm;
    use crate::model::{DirtyLogKind, PageCount};
    let mut vm = TinyVm::new(PageCount(64), DirtyLogKind::Ring)?;
    vm.set_logging(true)?;
    vm.write_pages(PageCount(17))?;
    let bytes = Kvm::new()?.check_extension_raw(kvm_bindings::KVM_CAP_DIRTY_LOG_RING_ACQ_REL.into()).max(0) as usize;
    Ok(format!("up to {} entries a vCPU", bytes / size_of::<kvm_bindings::kvm_dirty_gfn>()))
}

/// As [`run_vm`].
///
/// # Errors
/// Always.
#[cfg(not(target_arch = "x86_64"))]
pub fn dirty_ring() -> io::Result<String> {
    run_vm()
}

/// Asks for clearing of the dirty bitmap by hand, with all pages set at its start.
///
/// # Errors
/// KVM refused.
pub fn manual_protect() -> io::Result<String> {
    let kvm = Kvm::new()?;
    let vm = kvm.create_vm()?;
    let modes = vm.check_extension_raw(kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into()).max(0) as u64;
    if modes == 0 {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let cap = kvm_bindings::kvm_enable_cap {
        cap: kvm_bindings::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
        args: [modes, 0, 0, 0],
        ..Default::default()
    };
    vm.enable_cap(&cap)?;
    let all_set = if modes & u64::from(kvm_bindings::KVM_DIRTY_LOG_INITIALLY_SET) == 0 { "without" } else { "with" };
    Ok(format!("{all_set} all pages set at the start"))
}
