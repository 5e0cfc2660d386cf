//! Guest RAM as a region of page streams: a mapping of the machine's memory file.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::Errno;
use rustix::mm::Advice;

use super::hugetlb;
use super::memfd::Mapping;
use crate::model::{HUGE_PAGE_BYTES, PAGE_SIZE, PageRun, RegionSpec};
use crate::port::{BytesView, Region};

/// RAM mapped from its memory file.
#[derive(Debug)]
pub struct RamRegion {
    spec: RegionSpec,
    file: OwnedFd,
    mapping: Mapping,
    block_pages: u64,
}

impl RamRegion {
    /// Maps `file` as the region `spec`.
    ///
    /// # Errors
    /// A file that is smaller than the region, or what the kernel answered.
    pub fn new(spec: RegionSpec, file: OwnedFd) -> io::Result<Self> {
        let mapping = Mapping::of(&file, spec.pages.bytes() as usize)?;
        // SAFETY: the range is our own mapping; the advice changes no content. It is a hint: a kernel without huge pages
        // for shared memory refuses it, and nothing depends on it.
        let _ = unsafe { rustix::mm::madvise(mapping.as_ptr().cast(), mapping.len(), Advice::LinuxHugepage) };
        let block_pages = hugetlb::block_pages(&file)?;
        Ok(Self { spec, file, mapping, block_pages })
    }

    /// Pages that its mappings hold or lack together: 512 of RAM of huge pages, 1 of any other.
    pub fn block_pages(&self) -> u64 {
        self.block_pages
    }
}

impl RamRegion {
    /// A byte for each page of `run`, its lowest bit set if the page is in memory; empty if the kernel does not say.
    ///
    /// Not by SEEK_HOLE: the kernel walks every page up to the next hole, which may be the end of RAM, at each call.
    fn resident(&self, run: PageRun) -> Vec<u8> {
        if !run.fits(self.spec.pages) {
            return Vec::new();
        }
        let mut flags = vec![0; run.count as usize];
        let start = self.mapping.as_ptr().wrapping_add(run.byte_offset() as usize);
        // SAFETY: the range lies inside our own mapping, and `flags` has room for a byte a page.
        let answer = unsafe { libc::mincore(start.cast(), run.byte_len(), flags.as_mut_ptr()) };
        if answer == 0 { flags } else { Vec::new() }
    }

    /// The first page from `page` on that holds data, or about which the kernel does not say; none if there is none.
    fn next_data(&self, page: u64) -> Option<u64> {
        match rustix::fs::seek(&self.file, SeekFrom::Data(page * PAGE_SIZE as u64)) {
            Ok(data) => Some((data / PAGE_SIZE as u64).max(page)),
            // Past the last data.
            Err(Errno::NXIO) => None,
            Err(_) => Some(page),
        }
    }

    fn fill_with_zeros(&self, run: PageRun) {
        for byte in self.bytes(run) {
            byte.store(0, std::sync::atomic::Ordering::Relaxed);
        }
    }
}

impl RamRegion {
    /// Takes the pages of `run` from `other`, which is as large.
    ///
    /// # Panics
    /// If `run` does not fit into both.
    pub fn copy_from(&self, other: &Self, run: PageRun) {
        for data in other.data_within(run) {
            let (from, to) = (other.bytes(data), self.bytes(data));
            // SAFETY: both views are valid for the same length, are made of atomics, and belong to two mappings, so they do not overlap. Whoever else writes one of them meanwhile writes
            // plain bytes, of which the old or the new value is taken.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    from.as_ptr().cast::<u8>(),
                    to.as_ptr().cast::<u8>().cast_mut(),
                    from.len(),
                );
            }
        }
    }

    /// The file.
    pub fn file(&self) -> std::os::fd::BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl Region for RamRegion {
    fn spec(&self) -> &RegionSpec {
        &self.spec
    }

    fn bytes(&self, run: PageRun) -> BytesView<'_> {
        assert!(run.fits(self.spec.pages), "{run:?} does not fit into {:?}", self.spec);
        &self.mapping.bytes()[run.byte_offset() as usize..][..run.byte_len()]
    }

    fn data_within(&self, run: PageRun) -> Vec<PageRun> {
        // Of a file of huge pages the kernel tells neither.
        if self.block_pages > 1 {
            return vec![run];
        }
        let mut parts: Vec<PageRun> = Vec::new();
        let mut add = |page: u64| match parts.last_mut() {
            Some(last) if last.end() == page => last.count += 1,
            _ => parts.push(PageRun::new(page, 1)),
        };
        let mut page = self.next_data(run.first.0).unwrap_or(run.end());
        // The kernel looks for each page of a long hole by itself: those that the file skips are not asked for.
        let rest = PageRun::new(page.min(run.end()), run.end().saturating_sub(page) as u32);
        let resident = self.resident(rest);
        while page < run.end() {
            if resident.get((page - rest.first.0) as usize).is_none_or(|flags| flags & 1 == 1) {
                add(page);
                page += 1;
                continue;
            }
            // Never written, or swapped out: the file can tell.
            match self.next_data(page) {
                Some(data) if data > page => page = data,
                None => break,
                Some(_) => {
                    add(page);
                    page += 1;
                }
            }
        }
        parts
    }

    fn prepare_for_write(&self, run: PageRun) {
        if !run.fits(self.spec.pages) || (run.byte_len() as u64) < HUGE_PAGE_BYTES {
            return;
        }
        let start = self.mapping.as_ptr().wrapping_add(run.byte_offset() as usize).cast();
        // SAFETY: the range lies inside our own mapping; both kinds of advice change no content of it.
        let _ = unsafe { rustix::mm::madvise(start, run.byte_len(), Advice::LinuxPopulateWrite) };
    }

    fn zero(&self, run: PageRun) {
        if run.fits(self.spec.pages) {
            if self.block_pages > 1 {
                if let Err(error) = hugetlb::zero(&self.file, run.byte_offset(), run.byte_len() as u64) {
                    tracing::warn!("a part of a huge page is zeroed byte by byte: {error}");
                    self.fill_with_zeros(run);
                }
                return;
            }
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            if rustix::fs::fallocate(self.file.as_fd(), punch, run.byte_offset(), run.byte_len() as u64).is_err() {
                self.fill_with_zeros(run);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::model::{PageCount, RegionId, RegionKind};
    use crate::shm::memory_file;

    #[test]
    fn pages_are_taken_from_another_region() {
        let spec = RegionSpec { id: RegionId::RAM, kind: RegionKind::Ram, pages: PageCount(4) };
        let [one, other] = [1, 2].map(|value| {
            let ram = RamRegion::new(spec.clone(), memory_file("ram", 4 * 4096).unwrap()).unwrap();
            ram.bytes(PageRun::new(0, 4)).iter().for_each(|byte| byte.store(value, Ordering::Relaxed));
            ram
        });
        one.copy_from(&other, PageRun::new(1, 2));
        let values = [0, 1, 2, 3].map(|page| one.bytes(PageRun::new(page, 1))[4095].load(Ordering::Relaxed));
        assert_eq!(values, [1, 2, 2, 1]);
    }

    #[test]
    fn zeroed_pages_read_as_zero_and_their_neighbours_stay() {
        let spec = RegionSpec { id: RegionId::RAM, kind: RegionKind::Ram, pages: PageCount(4) };
        let ram = RamRegion::new(spec, memory_file("ram", 4 * 4096).unwrap()).unwrap();
        for byte in ram.bytes(PageRun::new(0, 4)) {
            byte.store(7, Ordering::Relaxed);
        }
        ram.zero(PageRun::new(1, 2));
        let sum =
            |first| ram.bytes(PageRun::new(first, 1)).iter().map(|b| u64::from(b.load(Ordering::Relaxed))).sum::<u64>();
        assert_eq!([sum(0), sum(3)], [7 * 4096, 7 * 4096]);
        assert_eq!(ram.data_within(PageRun::new(0, 4)), [PageRun::new(0, 1), PageRun::new(3, 1)]);
        assert_eq!(ram.data_within(PageRun::new(1, 2)), []);
        assert_eq!(ram.data_within(PageRun::new(2, 2)), [PageRun::new(3, 1)]);
        assert_eq!([sum(1), sum(2)], [0, 0]);
    }

    #[test]
    fn looking_at_one_page_costs_the_same_however_much_data_follows() {
        const PAGES: u64 = 64 << 8;
        let spec = RegionSpec { id: RegionId::RAM, kind: RegionKind::Ram, pages: PageCount(PAGES) };
        let ram = RamRegion::new(spec, memory_file("ram", PAGES * 4096).unwrap()).unwrap();
        for page in 0..PAGES {
            ram.bytes(PageRun::new(page, 1))[0].store(7, Ordering::Relaxed);
        }
        let mut took = [std::time::Duration::MAX; 2];
        for _ in 0..20 {
            for (place, took) in [PAGES - 300, 0].into_iter().zip(&mut took) {
                let began = std::time::Instant::now();
                for page in place..place + 200 {
                    assert_eq!(ram.data_within(PageRun::new(page, 1)), [PageRun::new(page, 1)]);
                }
                *took = began.elapsed().min(*took);
            }
        }
        assert!(took[1] < took[0] * 5, "{took:?}: the cost of a page depends on what follows it");
    }
}
