//! Memory files of huge pages that a host has set aside (hugetlb: Documentation/admin-guide/mm/hugetlbpage.rst).
//!
//! Owns how such a file is made, told from others, and zeroed with its pages kept: one that was given back anybody may take, and whoever touched it again would be killed. Must not
//! know whose memory it is.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::Ordering;

use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};

use super::memfd::Mapping;
use crate::model::{HUGE_PAGE_BYTES, PAGE_SIZE};

/// `HUGETLBFS_MAGIC` of include/uapi/linux/magic.h.
const MAGIC: u32 = 0x9584_58f6;
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB";

/// RAM of huge pages cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum HugePagesError {
    /// The host has not set aside enough.
    #[error(
        "guest RAM takes {needed} huge pages of 2 MiB, and of the {total} that this host has set aside {free} are free; \
         set more aside with `sysctl vm.nr_hugepages={}`", total + needed.saturating_sub(*free)
    )]
    TooFew {
        /// How many it takes.
        needed: u64,
        /// How many are nobody's.
        free: u64,
        /// All that there are.
        total: u64,
    },
    /// A part of a huge page cannot be zeroed.
    #[error("this kernel does not zero parts of huge pages, as Linux does from 6.0 on; run the VM without --hugepages")]
    Parts,
    /// The kernel.
    #[error("a memory file of huge pages: {0}; does this kernel have hugetlbfs (CONFIG_HUGETLBFS)?")]
    Io(#[from] io::Error),
}

/// Looks whether `bytes` of huge pages can be had now.
///
/// # Errors
/// [`HugePagesError::TooFew`].
pub fn check(bytes: u64) -> Result<(), HugePagesError> {
    let count = |name: &str| std::fs::read_to_string(format!("{POOL}/{name}")).ok()?.trim().parse::<u64>().ok();
    // Where the kernel does not say, mapping them will.
    let (Some(total), Some(free)) = (count("nr_hugepages"), count("free_hugepages")) else { return Ok(()) };
    let reserved = count("resv_hugepages").unwrap_or(0);
    // Beyond those that are set aside the kernel may make so many.
    let beyond = count("nr_overcommit_hugepages").unwrap_or(0).saturating_sub(count("surplus_hugepages").unwrap_or(0));
    let (needed, free) = (bytes.div_ceil(HUGE_PAGE_BYTES), free.saturating_sub(reserved) + beyond);
    if needed <= free { Ok(()) } else { Err(HugePagesError::TooFew { needed, free, total }) }
}

/// Makes a memory file of huge pages, sealed against change of size. A mapping of it reserves them.
///
/// # Errors
/// Too few are free, or a kernel that cannot.
pub fn huge_pages_file(bytes: u64) -> Result<OwnedFd, HugePagesError> {
    check(bytes)?;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let file = rustix::fs::memfd_create("dunlin-ram", flags).map_err(io::Error::from)?;
    rustix::fs::ftruncate(&file, bytes).map_err(io::Error::from)?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals).map_err(io::Error::from)?;
    let first = Mapping::of(&file, HUGE_PAGE_BYTES as usize)?;
    first.bytes()[0].store(1, Ordering::Relaxed);
    zero(&file, 0, PAGE_SIZE as u64)?;
    if first.bytes()[0].load(Ordering::Relaxed) == 0 { Ok(file) } else { Err(HugePagesError::Parts) }
}

/// Pages that a memory file's mappings hold or lack together: 512 of one of huge pages, 1 of any other.
///
/// # Errors
/// What the kernel answered.
pub fn block_pages(file: impl AsFd) -> io::Result<u64> {
    let kind = rustix::fs::fstatfs(file)?.f_type as u32;
    Ok(if kind == MAGIC { HUGE_PAGE_BYTES / PAGE_SIZE as u64 } else { 1 })
}

/// Zeroes a range of a file of huge pages, in bytes. Pages that are in memory stay there, and none is made: the kernel zeroes the part of a page that a hole touches, and
/// gives back what a hole covers, so no hole covers a page.
///
/// # Errors
/// What the kernel answered.
pub fn zero(file: impl AsFd, offset: u64, bytes: u64) -> io::Result<()> {
    const HALF: u64 = HUGE_PAGE_BYTES / 2;
    let (mut at, end) = (offset, offset + bytes);
    while at < end {
        let until = end.min((at / HALF + 1) * HALF);
        let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(file.as_fd(), hole, at, until - at)?;
        at = until;
    }
    Ok(())
}
