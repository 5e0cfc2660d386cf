//! Guest RAM as a region of page streams: a mapping of the machine's memory file.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::mm::Advice;

use super::memfd::Mapping;
use crate::model::{PAGE_SIZE, PageRun, RegionSpec};
use crate::port::{BytesView, Region};

/// Huge pages of x86-64 and most others; only a hint's granularity.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// RAM mapped from its memory file.
#[derive(Debug)]
pub struct RamRegion {
    spec: RegionSpec,
    file: OwnedFd,
    mapping: Mapping,
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
        Ok(Self { spec, file, mapping })
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
        let page = PAGE_SIZE as u64;
        let (mut at, end) = (run.byte_offset(), run.end() * page);
        let mut parts = Vec::new();
        while at < end {
            // Past the last data SEEK_DATA answers ENXIO; a file system that cannot tell answers with the start itself.
            let Ok(data) = rustix::fs::seek(&self.file, SeekFrom::Data(at)) else { break };
            if data >= end {
                break;
            }
            let hole = rustix::fs::seek(&self.file, SeekFrom::Hole(data)).unwrap_or(end).min(end);
            let (first, last) = (data / page, hole.div_ceil(page));
            parts.push(PageRun::new(first, (last - first) as u32));
            at = hole;
        }
        parts
    }

    fn prepare_for_write(&self, run: PageRun) {
        if !run.fits(self.spec.pages) || run.byte_len() < HUGE_PAGE_BYTES {
            return;
        }
        let start = self.mapping.as_ptr().wrapping_add(run.byte_offset() as usize).cast();
        // SAFETY: the range lies inside our own mapping; both kinds of advice change no content of it.
        let _ = unsafe { rustix::mm::madvise(start, run.byte_len(), Advice::LinuxPopulateWrite) };
    }

    fn zero(&self, run: PageRun) {
        if run.fits(self.spec.pages) {
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            if rustix::fs::fallocate(self.file.as_fd(), punch, run.byte_offset(), run.byte_len() as u64).is_err() {
                for byte in self.bytes(run) {
                    byte.store(0, std::sync::atomic::Ordering::Relaxed);
                }
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
        assert_eq!([sum(1), sum(2)], [0, 0]);
    }
}
