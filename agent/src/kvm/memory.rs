//! Guest RAM: one memory file, mapped as the guest's address ranges around the hole below 4 GiB.
//!
//! Owns where RAM lies in guest-physical space and in the file, and that every write by a device marks its pages in the
//! shared dirty bitmap. Must not know KVM's dirty log, devices, or how a guest is loaded.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;

use rustix::fs::FallocateFlags;
use vm_memory::bitmap::{Bitmap, BitmapSlice, WithBitmapSlice};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion, GuestRegionMmap, MmapRegion,
};

use crate::model::{PAGE_SIZE, PageCount, PageIndex, PageRun};
use crate::shm::hugetlb::{self, HugePagesError};
use crate::shm::{SharedBitmap, ram_file};

/// Where the hole below 4 GiB starts: low RAM ends here, devices and interrupt controllers lie above.
pub const HOLE_START: u64 = 0xc000_0000;
/// Where RAM goes on behind the hole.
pub const HIGH_RAM_START: u64 = 1 << 32;

/// Guest RAM as devices see it: every write through it marks its pages as dirty.
pub type GuestRam = GuestMemoryMmap<DirtyMarks>;

/// RAM could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    /// The size is zero, not whole pages, or does not fit this host's address space.
    #[error("guest memory of {0} bytes is not a number of whole pages that this host can map")]
    Size(u64),
    /// Huge pages cannot be had.
    #[error(transparent)]
    HugePages(#[from] HugePagesError),
    /// The kernel refused.
    #[error("guest memory: {action} failed")]
    Io {
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// The part of the shared dirty bitmap that one range of guest RAM marks; a slice of it starts further inside.
#[derive(Clone, Debug)]
pub struct DirtyMarks {
    bitmap: Arc<SharedBitmap>,
    /// Position in the memory file of this slice's first byte.
    file_offset: usize,
}

impl DirtyMarks {
    /// Marks for bytes that start at `first_page` of the memory file.
    pub fn new(bitmap: Arc<SharedBitmap>, first_page: PageIndex) -> Self {
        Self { bitmap, file_offset: first_page.0 as usize * PAGE_SIZE }
    }
}

impl WithBitmapSlice<'_> for DirtyMarks {
    type S = Self;
}

impl BitmapSlice for DirtyMarks {}

impl Bitmap for DirtyMarks {
    fn mark_dirty(&self, offset: usize, len: usize) {
        if len > 0 {
            let start = self.file_offset.saturating_add(offset);
            let (first, last) = (start / PAGE_SIZE, start.saturating_add(len - 1) / PAGE_SIZE);
            self.bitmap.set_run(first as u64, (last - first) as u64 + 1);
        }
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.bitmap.is_set((self.file_offset.saturating_add(offset) / PAGE_SIZE) as u64)
    }

    fn slice_at(&self, offset: usize) -> Self {
        Self { bitmap: self.bitmap.clone(), file_offset: self.file_offset.saturating_add(offset) }
    }
}

/// One contiguous range of guest RAM: a KVM memory slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRange {
    /// KVM's number for it.
    pub slot: u32,
    /// Where the guest sees it.
    pub guest_address: u64,
    /// Where this process has it mapped.
    pub host_address: u64,
    /// Its first page in the memory file.
    pub first_page: PageIndex,
    /// Its length.
    pub pages: PageCount,
}

impl RamRange {
    /// Whether it holds this page of the memory file.
    pub(super) fn holds(&self, page: u64) -> bool {
        (self.first_page.0..self.first_page.0 + self.pages.0).contains(&page)
    }
}

/// How guest memory is to be backed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryOptions {
    /// Ask the kernel for huge pages (a hint; it needs `shmem_enabled` at `advise` or above).
    pub huge_pages: bool,
}

impl Default for MemoryOptions {
    fn default() -> Self {
        Self { huge_pages: true }
    }
}

/// All of guest RAM, its file and its dirty bitmap.
#[derive(Clone, Debug)]
pub struct Memory {
    ram: Arc<GuestRam>,
    file: Arc<File>,
    dirty: Arc<SharedBitmap>,
    ranges: Vec<RamRange>,
    pages: PageCount,
    /// Pages that mappings hold or lack together.
    block_pages: u64,
}

impl Memory {
    /// Makes guest RAM of `bytes`, all zero and all clean.
    ///
    /// # Errors
    /// A size that is none, or what the kernel answered.
    pub fn new(bytes: u64, options: MemoryOptions) -> Result<Self, MemoryError> {
        check_size(bytes)?;
        let file = ram_file(bytes).map_err(|source| MemoryError::Io { action: "memory file", source })?;
        Self::of(file.into(), bytes, options, libc::MAP_NORESERVE)
    }

    /// Makes guest RAM of `bytes` of huge pages that the host has set aside, and reserves them: nobody else gets one as long as this lives.
    ///
    /// # Errors
    /// A size that is none, too few pages, or what the kernel answered.
    pub fn of_huge_pages(bytes: u64) -> Result<Self, MemoryError> {
        check_size(bytes)?;
        Self::of(hugetlb::huge_pages_file(bytes)?.into(), bytes, MemoryOptions { huge_pages: false }, 0)
    }

    fn of(file: File, bytes: u64, options: MemoryOptions, reserve: i32) -> Result<Self, MemoryError> {
        let failed = |action| move |source| MemoryError::Io { action, source };
        let pages = PageCount::covering(bytes);
        let block_pages = hugetlb::block_pages(&file).map_err(failed("asking what its pages are"))?;
        let file = Arc::new(file);
        let dirty = Arc::new(SharedBitmap::new(pages).map_err(failed("dirty bitmap"))?);
        let mut ranges = Vec::new();
        let mut regions = Vec::new();
        for (slot, (guest_address, offset, len)) in layout(bytes).into_iter().enumerate() {
            let first_page = PageIndex(offset / PAGE_SIZE as u64);
            let mapping: MmapRegion<DirtyMarks> =
                MmapRegionBuilder::new_with_bitmap(len as usize, DirtyMarks::new(dirty.clone(), first_page))
                    .with_file_offset(FileOffset::from_arc(file.clone(), offset))
                    .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
                    .with_mmap_flags(libc::MAP_SHARED | reserve)
                    .build()
                    .map_err(|e| failed("mapping")(io::Error::other(e)))?;
            if options.huge_pages {
                // SAFETY: the range is exactly the mapping just made; the advice changes none of its content.
                let _ = unsafe {
                    rustix::mm::madvise(mapping.as_ptr().cast(), len as usize, rustix::mm::Advice::LinuxHugepage)
                };
            }
            ranges.push(RamRange {
                slot: slot as u32,
                guest_address,
                host_address: mapping.as_ptr() as u64,
                first_page,
                pages: PageCount::covering(len),
            });
            regions.push(GuestRegionMmap::new(mapping, GuestAddress(guest_address)).ok_or(MemoryError::Size(bytes))?);
        }
        let ram = GuestRam::from_regions(regions).map_err(|e| failed("layout")(io::Error::other(e)))?;
        Ok(Self { ram: Arc::new(ram), file, dirty, ranges, pages, block_pages })
    }

    /// Pages that its mappings hold or lack together: 512 of RAM of huge pages, 1 of any other.
    pub fn block_pages(&self) -> u64 {
        self.block_pages
    }

    /// The RAM for devices: writes through it are marked.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The memory file: byte `n` of it is byte `n` of region 0 of a migration.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The dirty bitmap that is shared with a migration manager.
    pub fn dirty(&self) -> &Arc<SharedBitmap> {
        &self.dirty
    }

    /// The contiguous ranges, in ascending order.
    pub fn ranges(&self) -> &[RamRange] {
        &self.ranges
    }

    /// The size.
    pub fn pages(&self) -> PageCount {
        self.pages
    }

    /// Makes all of RAM zero again, giving it back to the host, and marks it.
    pub fn clear(&self) -> Result<(), MemoryError> {
        self.punch(0, self.pages.0)
    }

    /// Gives the pages of a run back to the host: they read as zero from now on, and are marked, so that a migration under
    /// way sends them as what they are now. Pages beyond RAM are left out; huge pages are zeroed and kept.
    pub fn give_back(&self, run: PageRun) -> Result<(), MemoryError> {
        let first = run.first.0.min(self.pages.0);
        let count = u64::from(run.count).min(self.pages.0 - first);
        if count == 0 { Ok(()) } else { self.punch(first, count) }
    }

    /// The marks come last: who takes one sees the page's zeros.
    fn punch(&self, first: u64, count: u64) -> Result<(), MemoryError> {
        let (offset, bytes) = (first * PAGE_SIZE as u64, count * PAGE_SIZE as u64);
        let done = if self.block_pages > 1 {
            hugetlb::zero(&self.file, offset, bytes)
        } else {
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&self.file, how, offset, bytes).map_err(io::Error::from)
        };
        done.map_err(|source| MemoryError::Io { action: "giving pages back", source })?;
        self.dirty.set_run(first, count);
        Ok(())
    }

    /// The pages of the memory file that lie whole in guest-physical `[address, address + bytes)`, as runs of at most
    /// `longest` pages in ascending order. What is no RAM is left out.
    pub fn runs_in(&self, address: u64, bytes: u64, longest: u32) -> impl Iterator<Item = PageRun> + '_ {
        let page = PAGE_SIZE as u64;
        let (begin, end) = (address.div_ceil(page), address.saturating_add(bytes) / page);
        self.ranges.iter().flat_map(move |range| {
            let base = range.guest_address / page;
            let from = begin.clamp(base, base + range.pages.0);
            let to = end.clamp(from, base + range.pages.0);
            let first = range.first_page.0 + (from - base);
            let step = u64::from(longest.max(1));
            (0..to - from)
                .step_by(step as usize)
                .map(move |inside| PageRun::new(first + inside, (to - from - inside).min(step) as u32))
        })
    }

    /// What the host keeps for guest RAM at the moment, in bytes.
    ///
    /// # Errors
    /// What the kernel answered.
    pub fn resident_bytes(&self) -> Result<u64, MemoryError> {
        let failed = |e: rustix::io::Errno| MemoryError::Io { action: "asking for its size", source: e.into() };
        Ok(rustix::fs::fstat(&self.file).map_err(failed)?.st_blocks as u64 * 512)
    }

    /// Where in the file the page with guest frame number `gfn` lies, if it is RAM.
    pub fn page_of_gfn(&self, gfn: u64) -> Option<PageIndex> {
        let address = GuestAddress(gfn.checked_mul(PAGE_SIZE as u64)?);
        let (region, inside) = self.ram.to_region_addr(address)?;
        let start = region.file_offset().map_or(0, FileOffset::start);
        Some(PageIndex((start + inside.0) / PAGE_SIZE as u64))
    }
}

fn check_size(bytes: u64) -> Result<(), MemoryError> {
    let fits = bytes > 0 && bytes.is_multiple_of(PAGE_SIZE as u64) && isize::try_from(bytes).is_ok();
    if fits { Ok(()) } else { Err(MemoryError::Size(bytes)) }
}

/// The ranges as (guest address, file offset, length): low RAM up to the hole, the rest from 4 GiB.
fn layout(bytes: u64) -> Vec<(u64, u64, u64)> {
    let low = bytes.min(HOLE_START);
    let mut ranges = vec![(0, 0, low)];
    if bytes > low {
        ranges.push((HIGH_RAM_START, low, bytes - low));
    }
    ranges
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemoryRegion};

    use super::*;
    use crate::model::PageBitmap;

    fn dirty_pages(memory: &Memory) -> Vec<u64> {
        let mut seen = PageBitmap::new(memory.pages());
        memory.dirty().take(&mut seen);
        seen.runs(u32::MAX).flat_map(|run| run.indices()).collect()
    }

    #[test]
    fn six_gibibytes_leave_the_hole_free_and_are_one_file() {
        let memory = Memory::new(6 << 30, MemoryOptions::default()).unwrap();
        let [low, high] = memory.ranges() else { panic!("two ranges expected") };
        assert_eq!((low.guest_address, low.pages.bytes()), (0, HOLE_START));
        assert_eq!((high.guest_address, high.first_page.0 * 4096, high.pages.bytes()), (1 << 32, HOLE_START, 3 << 30));
        assert_eq!(memory.page_of_gfn(HOLE_START / 4096), None);
        assert_eq!(memory.page_of_gfn((1 << 32) / 4096 + 5), Some(PageIndex(HOLE_START / 4096 + 5)));
        assert_eq!(memory.ram().iter().map(|region| region.len()).sum::<u64>(), 6 << 30);
    }

    #[test]
    fn every_write_of_a_device_marks_its_pages_at_their_place_in_the_file() {
        let memory = Memory::new(4 << 30, MemoryOptions { huge_pages: false }).unwrap();
        memory.ram().write_slice(&[1; 4098], GuestAddress(4095)).unwrap();
        memory.ram().write_obj(7u32, GuestAddress((1 << 32) + 8192)).unwrap();
        let high = HOLE_START / 4096;
        assert_eq!(dirty_pages(&memory), [0, 1, 2, high + 2]);
        memory.ram().read_obj::<u32>(GuestAddress(0)).unwrap();
        assert!(dirty_pages(&memory).is_empty());
        // Slices taken inside a region, as queues and scatter lists do it.
        let slice = memory.ram().get_slice(GuestAddress((1 << 32) + 4096), 8192).unwrap();
        slice.subslice(4096, 4).unwrap().copy_from(&[1u8, 2, 3, 4]);
        assert_eq!(dirty_pages(&memory), [high + 2]);
    }

    #[test]
    fn runs_are_whole_pages_of_ram_at_their_place_in_the_file() {
        let memory = Memory::new(4 << 30, MemoryOptions { huge_pages: false }).unwrap();
        let high = HOLE_START / 4096;
        let runs = |address, bytes, longest| {
            memory.runs_in(address, bytes, longest).map(|run| (run.first.0, run.count)).collect::<Vec<_>>()
        };
        assert_eq!(runs(4096, 8192, 9), [(1, 2)]);
        assert_eq!(runs(4095, 8192, 9), [(1, 1)], "pages that are covered in part");
        assert_eq!(runs(4097, 4096, 9), []);
        assert_eq!(runs(0, 5 * 4096, 2), [(0, 2), (2, 2), (4, 1)]);
        assert_eq!(runs(HOLE_START - 4096, HIGH_RAM_START - HOLE_START + 8192, 9), [(high - 1, 1), (high, 1)]);
        assert_eq!(runs(HOLE_START, HIGH_RAM_START - HOLE_START, 9), [], "the hole is no RAM");
        assert_eq!(runs(HIGH_RAM_START + (1 << 30) - 4096, u64::MAX, 9), [((4 << 30) / 4096 - 1, 1)]);
        assert_eq!(runs(u64::MAX, u64::MAX, 9), []);
        assert_eq!(runs(0, u64::MAX, u32::MAX).iter().map(|run| u64::from(run.1)).sum::<u64>(), (4 << 30) / 4096);
    }

    #[test]
    fn what_is_given_back_is_zero_marked_and_no_longer_kept() {
        let memory = Memory::new(4 << 20, MemoryOptions { huge_pages: false }).unwrap();
        memory.ram().write_slice(&vec![7; 4 << 20], GuestAddress(0)).unwrap();
        dirty_pages(&memory);
        let before = memory.resident_bytes().unwrap();
        memory.give_back(PageRun::new(3, 5)).unwrap();
        memory.give_back(PageRun::new(1023, 99)).unwrap();
        memory.give_back(PageRun::new(5000, 1)).unwrap();
        assert_eq!(dirty_pages(&memory), [3, 4, 5, 6, 7, 1023]);
        for (page, value) in [(2, 7), (3, 0), (7, 0), (8, 7), (1023, 0)] {
            assert_eq!(memory.ram().read_obj::<u8>(GuestAddress(page * 4096)).unwrap(), value, "page {page}");
        }
        // Reading made none of them anew in the file before it was asked.
        assert!(memory.resident_bytes().unwrap() <= before);
        let memory = Memory::new(4 << 20, MemoryOptions { huge_pages: false }).unwrap();
        memory.ram().write_slice(&vec![7; 4 << 20], GuestAddress(0)).unwrap();
        memory.give_back(PageRun::new(0, 512)).unwrap();
        assert_eq!(memory.resident_bytes().unwrap(), 2 << 20);
    }

    #[test]
    fn sizes_that_are_none_are_refused() {
        for bytes in [0, 4097, u64::MAX - 4095] {
            assert!(matches!(Memory::new(bytes, MemoryOptions::default()), Err(MemoryError::Size(_))), "{bytes}");
        }
    }
}
