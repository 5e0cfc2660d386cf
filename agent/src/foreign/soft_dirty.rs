//! Write protection of a foreign VM with no help from it: the kernel's soft-dirty marks
//! (Documentation/admin-guide/mm/soft-dirty.rst).
//!
//! Owns `/proc/PID/clear_refs` and bit 55 of `/proc/PID/pagemap`. Clearing write-protects every page of the process and tells KVM to drop the
//! mappings that it has made of them; the next write to each page makes a fault, which the tracepoints of KVM see, and sets the page's mark. Must
//! not know who watches those faults, nor decide whether the VM may be slowed down: [`Permission`] is the proof that somebody has.
//!
//! What it costs. It is for the whole process, the VMM's own memory too: the kernel walks all its page tables under its memory's lock, while
//! the process cannot map or unmap, and flushes its TLB. KVM drops *all* its mappings of these pages, so that the guest's next *read* of a page
//! faults as well. Every first write to a page takes one fault of the guest, and one of the host for the page itself.
//!
//! What it cannot see. Marks are of mappings: a write into a transparent huge page marks all 2 MiB of it. Pages written by another process that
//! maps the same file (vhost-user, virtiofsd) get no mark here. Pages of a shared file lose their marks when the kernel reclaims their mapping,
//! and mappings that the process makes or joins anew are marked whole. A write between reading the marks and clearing them is not seen.
//! Memory of hugetlbfs has no marks. There is nothing to switch off: pages become writable with their next write, and marks harm nobody;
//! but whoever else uses the marks of the process (checkpointing by CRIU) loses them.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use super::maps;
use super::permission::Permission;
use super::process::KvmProcess;
use crate::model::units::display_bytes;
use crate::model::{PAGE_SIZE, PageBitmap, PageCount, RamSlot};
use crate::port::{Arm, ArmError};
use crate::trial;
use crate::trial::memory::SOFT_DIRTY;

/// What one entry of a middle page table maps.
const HUGE_BYTES: u64 = 2 << 20;
const HUGE_PAGES: u64 = HUGE_BYTES / PAGE_SIZE as u64;
/// Entries of `pagemap` that one call reads.
const CHUNK_PAGES: u64 = 1 << 15;
/// Guest frames that a set of pages names, at most: 8 TiB of guest addresses. What lies above is counted only.
const MOST_FRAMES: u64 = 1 << 31;

/// Why a VM cannot be watched by soft-dirty marks.
#[derive(Debug, thiserror::Error)]
pub enum SoftDirtyError {
    /// The kernel has none.
    #[error(
        "soft-dirty marks do not work here ({0}): take a kernel with CONFIG_MEM_SOFT_DIRTY, or sample the memory instead"
    )]
    Missing(String),
    /// The VM's process has ended.
    #[error("there is no process {0}: the VM has ended")]
    Gone(u32),
    /// Not allowed.
    #[error("the marks of process {pid} may not be {action} ({source}): run as root, or with CAP_SYS_PTRACE")]
    Refused {
        /// The process.
        pid: u32,
        /// `read` or `cleared`.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// RAM of hugetlbfs.
    #[error(
        "guest RAM at {at:#x} of process {pid} is of hugetlbfs ({page_bytes} bytes a page), for which the kernel keeps no soft-dirty marks: \
         sample the memory instead"
    )]
    HugeTlb {
        /// The process.
        pid: u32,
        /// An address in the process.
        at: u64,
        /// The size of its pages.
        page_bytes: u64,
    },
    /// A slot that no VM can have.
    #[error("memory slot {0:?} is not whole pages, or wraps: the VM's slots were read wrongly")]
    BadSlot(RamSlot),
}

/// How large the pieces are that marks are kept for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Granularity {
    /// The size of the largest: 4 KiB or 2 MiB.
    pub largest_bytes: u64,
    /// How much of guest RAM is mapped by pieces of 2 MiB, as far as the kernel tells: whole mappings are counted that lie in RAM in part.
    pub huge_mapped_bytes: u64,
}

impl fmt::Display for Granularity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.huge_mapped_bytes {
            0 => f.write_str("4 KiB"),
            bytes => write!(f, "4 KiB, but 2 MiB in {} of RAM", display_bytes(bytes)),
        }
    }
}

/// The marks of one slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotWrites {
    /// The slot.
    pub slot: RamSlot,
    /// Pages with a mark.
    pub pages: PageCount,
    /// Aligned blocks of 2 MiB all of whose pages have one: as many may owe it to one write each where huge pages are mapped.
    pub whole_huge_blocks: u64,
    /// Those of the pages whose frame the set has no room for.
    pub out_of_range: PageCount,
}

/// The soft-dirty marks of one VM. Clones share them.
#[derive(Clone, Debug)]
pub struct SoftDirty(Arc<Marks>);

#[derive(Debug)]
struct Marks {
    pid: u32,
    slots: Vec<RamSlot>,
    /// Bound to the process, not to its number.
    clear_refs: File,
    /// Likewise.
    pagemap: File,
    permission: Permission,
}

impl SoftDirty {
    /// Looks whether the kernel can do it for the RAM in `slots`. Protects nothing yet.
    ///
    /// # Errors
    /// It cannot: see [`SoftDirtyError`].
    pub fn of(process: &KvmProcess, slots: &[RamSlot], permission: Permission) -> Result<Self, SoftDirtyError> {
        let marks = Self::of_pid(process.pid, slots, permission)?;
        // The files are of the process that was meant if that one lives: both have the number.
        if process.is_alive() && marks.is_alive() { Ok(marks) } else { Err(SoftDirtyError::Gone(process.pid)) }
    }

    /// The same by number alone.
    ///
    /// # Errors
    /// As [`SoftDirty::of`].
    pub fn of_pid(pid: u32, slots: &[RamSlot], permission: Permission) -> Result<Self, SoftDirtyError> {
        if let Some(&slot) = slots.iter().find(|slot| !slot.is_sound()) {
            return Err(SoftDirtyError::BadSlot(slot));
        }
        trial::memory::soft_dirty().map_err(|error| SoftDirtyError::Missing(error.to_string()))?;
        let path = |name: &str| format!("/proc/{pid}/{name}");
        let pagemap = File::open(path("pagemap")).map_err(|error| refused(pid, "read", error))?;
        let clear_refs = OpenOptions::new().write(true).open(path("clear_refs"));
        let clear_refs = clear_refs.map_err(|error| refused(pid, "cleared", error))?;
        let marks = Self(Arc::new(Marks { pid, slots: slots.to_vec(), clear_refs, pagemap, permission }));
        marks.granularity()?;
        Ok(marks)
    }

    /// The operator's word that allows for it.
    pub fn permission(&self) -> &Permission {
        &self.0.permission
    }

    /// At which granularity the kernel keeps the marks now: huge pages come and go.
    ///
    /// # Errors
    /// The VM has ended, may not be looked at, or has RAM of hugetlbfs.
    pub fn granularity(&self) -> Result<Granularity, SoftDirtyError> {
        let pid = self.0.pid;
        let ranges: Vec<Range<u64>> =
            self.0.slots.iter().map(|slot| slot.host_address..slot.host_address + slot.bytes).collect();
        let mut huge_mapped_bytes = 0u64;
        for (mapping, detail) in maps::detailed(pid, &ranges).map_err(|error| refused(pid, "read", error))? {
            if detail.is_hugetlb || detail.kernel_page_bytes > PAGE_SIZE as u64 {
                return Err(SoftDirtyError::HugeTlb { pid, at: mapping.start, page_bytes: detail.kernel_page_bytes });
            }
            huge_mapped_bytes = huge_mapped_bytes.saturating_add(detail.huge_mapped_bytes);
        }
        let largest_bytes = if huge_mapped_bytes > 0 { HUGE_BYTES } else { PAGE_SIZE as u64 };
        Ok(Granularity { largest_bytes, huge_mapped_bytes })
    }

    /// A set with room for every guest frame of RAM, or those below 8 TiB.
    pub fn empty_pages(&self) -> PageBitmap {
        let end = self.0.slots.iter().map(|slot| slot.range().end().frame().0).max();
        PageBitmap::new(PageCount(end.unwrap_or(0).min(MOST_FRAMES)))
    }

    /// Adds the guest frames that were written since the marks were last cleared to `pages`, and counts them by slot. Clears nothing.
    ///
    /// # Errors
    /// The VM has ended, or may not be looked at.
    pub fn read(&self, pages: &mut PageBitmap) -> Result<Vec<SlotWrites>, SoftDirtyError> {
        self.0.slots.iter().map(|&slot| self.read_slot(slot, pages)).collect()
    }

    fn read_slot(&self, slot: RamSlot, pages: &mut PageBitmap) -> Result<SlotWrites, SoftDirtyError> {
        let all = slot.bytes / PAGE_SIZE as u64;
        let mut entries = vec![0; (CHUNK_PAGES.min(all) * 8) as usize];
        let mut writes = SlotWrites { slot, pages: PageCount(0), whole_huge_blocks: 0, out_of_range: PageCount(0) };
        let (first_host, first_guest) = (slot.host_address / PAGE_SIZE as u64, slot.start.frame().0);
        // Marked pages one after the other since the beginning of a block.
        let mut in_block = 0;
        let mut done = 0;
        while done < all {
            let now = CHUNK_PAGES.min(all - done);
            let entries = &mut entries[..(now * 8) as usize];
            self.0
                .pagemap
                .read_exact_at(entries, (first_host + done) * 8)
                .map_err(|error| refused(self.0.pid, "read", error))?;
            for (index, entry) in entries.chunks_exact(8).enumerate() {
                let page = done + index as u64;
                if (first_host + page).is_multiple_of(HUGE_PAGES) {
                    in_block = 0;
                }
                let entry = entry.try_into().map_or(0, u64::from_le_bytes);
                if entry & SOFT_DIRTY == 0 {
                    continue;
                }
                in_block += 1;
                writes.whole_huge_blocks += u64::from(in_block == HUGE_PAGES);
                writes.pages.0 += 1;
                let frame = first_guest + page;
                writes.out_of_range.0 += u64::from(frame >= pages.len().0);
                pages.insert(frame);
            }
            done += now;
        }
        Ok(writes)
    }

    /// Clears all marks of the process, which write-protects its pages.
    fn clear(&self, action: &'static str) -> Result<(), ArmError> {
        (&self.0.clear_refs).write_all(b"4").map_err(|error| {
            let reason = refused(self.0.pid, "cleared", error).to_string();
            ArmError { action, reason }
        })
    }

    /// Whether the process still has its memory.
    fn is_alive(&self) -> bool {
        self.0.slots.first().is_none_or(|slot| {
            self.0.pagemap.read_exact_at(&mut [0; 8], slot.host_address / PAGE_SIZE as u64 * 8).is_ok()
        })
    }
}

impl Arm for SoftDirty {
    fn arm(&mut self) -> Result<(), ArmError> {
        self.clear("on")
    }

    fn rearm(&mut self) -> Result<(), ArmError> {
        self.clear("again")
    }

    fn disarm(&mut self) -> Result<(), ArmError> {
        // The pages that are still protected become writable one by one, as they are written.
        if self.is_alive() {
            return Ok(());
        }
        Err(ArmError { action: "off", reason: SoftDirtyError::Gone(self.0.pid).to_string() })
    }
}

fn refused(pid: u32, action: &'static str, source: io::Error) -> SoftDirtyError {
    match source.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH) => SoftDirtyError::Gone(pid),
        // The process has given up its memory: nothing is left to read.
        None if source.kind() == io::ErrorKind::UnexpectedEof => SoftDirtyError::Gone(pid),
        _ if !fs::exists(format!("/proc/{pid}")).unwrap_or(true) => SoftDirtyError::Gone(pid),
        _ => SoftDirtyError::Refused { pid, action, source },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Gpa;

    fn permission() -> Permission {
        Permission::granted("a test")
    }

    #[test]
    fn what_the_kernel_lacks_or_has_is_found_by_trying() {
        let slot = RamSlot { start: Gpa(0), bytes: 1, host_address: 0 };
        assert!(matches!(SoftDirty::of_pid(1, &[slot], permission()), Err(SoftDirtyError::BadSlot(_))));
        let made = SoftDirty::of_pid(std::process::id(), &[], permission());
        match trial::memory::soft_dirty() {
            Ok(_) => assert_eq!(made.unwrap().permission().by(), "a test"),
            Err(error) => assert!(made.unwrap_err().to_string().contains(&error.to_string())),
        }
    }
}
