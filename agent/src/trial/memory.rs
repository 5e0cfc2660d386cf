//! Trials of memory: sealed memory files, huge pages in them, marks of written pages, other processes' memory, faults handled in user space.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};

use super::capabilities::{Effective, SYS_PTRACE};
use crate::model::PAGE_SIZE;
use crate::shm::{Mapping, memory_file};

/// Makes, seals and maps a memory file.
///
/// # Errors
/// What the kernel answered.
pub fn sealed_memory_file() -> io::Result<String> {
    Mapping::of(memory_file("dunlin-trial", 4096)?, 4096)?;
    Ok(String::new())
}

/// Reads whether shared memory may use huge pages.
///
/// # Errors
/// It may not, or the kernel cannot.
pub fn huge_pages() -> io::Result<String> {
    let modes = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled")?;
    let chosen = modes.split_once('[').and_then(|(_, rest)| rest.split_once(']')).map_or("", |(mode, _)| mode);
    match chosen {
        "always" | "within_size" | "advise" | "force" => Ok(chosen.to_owned()),
        other => Err(io::Error::other(format!("shmem_enabled is `{other}`"))),
    }
}

/// Looks whether this process may read the memory of others: it has CAP_SYS_PTRACE, and no policy forbids that to everybody.
///
/// # Errors
/// What is missing.
pub fn read_of_other_processes() -> io::Result<String> {
    // Yama (Documentation/admin-guide/LSM/Yama.rst): with 3 nobody may.
    if std::fs::read_to_string("/proc/sys/kernel/yama/ptrace_scope").is_ok_and(|scope| scope.trim() == "3") {
        return Err(io::Error::other("kernel.yama.ptrace_scope is 3: nobody may, until the next boot"));
    }
    match Effective::own() {
        Some(own) if own.has(SYS_PTRACE) => Ok(String::new()),
        _ => Err(io::Error::from_raw_os_error(libc::EPERM)),
    }
}

/// Bit 55 of an entry of `/proc/PID/pagemap` (Documentation/admin-guide/mm/soft-dirty.rst).
pub const SOFT_DIRTY: u64 = 1 << 55;

/// Clears the soft-dirty marks of this very process, writes a page, and looks whether it is marked.
///
/// # Errors
/// It is not: the kernel has no such marks (`CONFIG_MEM_SOFT_DIRTY`); or what the kernel answered.
pub fn soft_dirty() -> io::Result<String> {
    // Clearing is for the whole process: two trials at once would clear one another's marks.
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let page = Mapping::of(memory_file("dunlin-trial", PAGE_SIZE as u64)?, PAGE_SIZE)?;
    let pagemap = File::open("/proc/self/pagemap")?;
    let is_marked = || {
        let mut entry = [0; 8];
        pagemap.read_exact_at(&mut entry, page.as_ptr() as u64 / PAGE_SIZE as u64 * 8)?;
        io::Result::Ok(u64::from_le_bytes(entry) & SOFT_DIRTY != 0)
    };
    page.bytes()[0].store(1, Ordering::Relaxed);
    std::fs::write("/proc/self/clear_refs", "4")?;
    if is_marked()? {
        return Err(io::Error::other("soft-dirty marks stay when they are cleared"));
    }
    page.bytes()[0].store(2, Ordering::Relaxed);
    if !is_marked()? {
        return Err(io::Error::other("the kernel marks no written pages (CONFIG_MEM_SOFT_DIRTY is off)"));
    }
    Ok(String::new())
}

#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `UFFD_API` and `UFFDIO_API` (include/uapi/linux/userfaultfd.h).
const UFFD_API: u64 = 0xaa;
const UFFDIO_API: libc::c_ulong = 0xc018_aa3f;
/// `UFFD_FEATURE_MINOR_SHMEM`: faults on pages that are in the file and not yet in the mapping.
const FEATURE_MINOR_SHMEM: u64 = 1 << 10;
/// `UFFD_FEATURE_MISSING_SHMEM`.
const FEATURE_MISSING_SHMEM: u64 = 1 << 5;

/// Opens a userfaultfd and asks what it can do.
///
/// # Errors
/// What the kernel answered, or a feature that post-copy needs and it lacks.
pub fn user_faults() -> io::Result<String> {
    // SAFETY: no pointers; the kernel makes a descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made this descriptor for us.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let mut api = UffdioApi { api: UFFD_API, features: 0, ioctls: 0 };
    // SAFETY: the request writes one structure of exactly this layout, which lives through the call.
    if unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, &raw mut api) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let needed = FEATURE_MISSING_SHMEM | FEATURE_MINOR_SHMEM;
    if api.features & needed != needed {
        return Err(io::Error::other(format!(
            "features {:#x} lack missing or minor faults of shared memory",
            api.features
        )));
    }
    Ok(format!("features {:#x}", api.features))
}
