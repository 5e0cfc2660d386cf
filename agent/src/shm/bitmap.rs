//! A bitmap that a machine shares with its migration manager: of dirty pages, or of pages that are here.
//!
//! The machine ORs bits in (harvested from KVM, or set by its devices as they write guest memory); the manager takes
//! them out. Both sides use atomic read-modify-write, so no bit is lost between them.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use super::memfd::{Mapping, memory_file};
use crate::model::{PAGE_SIZE, PageBitmap, PageCount};

/// One bit a page of guest RAM, in shared memory.
#[derive(Debug)]
pub struct SharedBitmap {
    file: OwnedFd,
    mapping: Mapping,
    pages: PageCount,
}

impl SharedBitmap {
    /// A new, empty bitmap over `pages`.
    pub fn new(pages: PageCount) -> io::Result<Self> {
        Self::named("dunlin-dirty", pages)
    }

    /// The same, its file of another name.
    pub(super) fn named(name: &str, pages: PageCount) -> io::Result<Self> {
        Self::open(memory_file(name, Self::file_bytes(pages) as u64)?, pages)
    }

    /// The bitmap in `file`, which another process made over the same number of pages.
    pub fn open(file: OwnedFd, pages: PageCount) -> io::Result<Self> {
        let mapping = Mapping::of(&file, Self::file_bytes(pages))?;
        Ok(Self { file, mapping, pages })
    }

    fn file_bytes(pages: PageCount) -> usize {
        (pages.0.div_ceil(64) as usize * 8).next_multiple_of(PAGE_SIZE).max(PAGE_SIZE)
    }

    /// The pages it covers.
    pub fn pages(&self) -> PageCount {
        self.pages
    }

    /// The file, for handing to the other process.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The words, 64 pages each, the lowest page in the lowest bit.
    pub(super) fn words(&self) -> &[AtomicU64] {
        &self.mapping.words()[..self.pages.0.div_ceil(64) as usize]
    }

    /// Marks one page; out of range is ignored.
    pub fn set(&self, page: u64) {
        if page < self.pages.0 {
            // A load first: most device writes hit pages that are marked already, and a read does not bounce the line.
            // The fence orders the write to the page before that load: without it a manager could take the mark and read
            // the page while the write still sits in this CPU's store buffer, and the write would be lost.
            fence(Ordering::SeqCst);
            let word = &self.words()[(page / 64) as usize];
            let bit = 1 << (page % 64);
            if word.load(Ordering::Relaxed) & bit == 0 {
                word.fetch_or(bit, Ordering::Release);
            }
        }
    }

    /// Marks the pages `[first, first + count)`.
    pub fn set_run(&self, first: u64, count: u64) {
        for page in first..first.saturating_add(count).min(self.pages.0) {
            self.set(page);
        }
    }

    /// Whether a page is marked.
    pub fn is_set(&self, page: u64) -> bool {
        page < self.pages.0 && self.words()[(page / 64) as usize].load(Ordering::Acquire) >> (page % 64) & 1 == 1
    }

    /// ORs the words of a dirty log in, its first bit being page `first` (a multiple of 64).
    pub fn or_words(&self, first: u64, log: &[u64]) {
        debug_assert!(first.is_multiple_of(64));
        let words = self.words();
        for (index, &bits) in log.iter().enumerate() {
            if bits != 0
                && let Some(word) = words.get((first / 64) as usize + index)
            {
                word.fetch_or(bits, Ordering::Release);
            }
        }
    }

    /// Moves all marks into `into`, leaving none, and returns how many were new to it.
    pub fn take(&self, into: &mut PageBitmap) -> PageCount {
        let mut added = 0;
        for (index, word) in self.words().iter().enumerate() {
            if word.load(Ordering::Relaxed) != 0 {
                let bits = word.swap(0, Ordering::AcqRel);
                added += u64::from((bits & !into.words()[index]).count_ones());
                into.or_word(index, bits);
            }
        }
        PageCount(added)
    }

    /// Forgets all marks.
    pub fn clear(&self) {
        for word in self.words() {
            word.store(0, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_mark_is_lost_between_two_mappings() {
        let machine = SharedBitmap::new(PageCount(1000)).unwrap();
        let copy = rustix::io::fcntl_dupfd_cloexec(machine.as_fd(), 0).unwrap();
        let manager = SharedBitmap::open(copy, PageCount(1000)).unwrap();
        let mut seen = PageBitmap::new(PageCount(1000));
        std::thread::scope(|scope| {
            let writer = scope.spawn(|| (0..1000).for_each(|page| machine.set(page)));
            while !writer.is_finished() {
                manager.take(&mut seen);
            }
        });
        manager.take(&mut seen);
        assert_eq!(seen.count(), PageCount(1000));
        machine.set(1000);
        assert_eq!(manager.take(&mut seen), PageCount(0));
    }

    #[test]
    fn a_file_that_is_too_short_is_refused() {
        let file = memory_file("short", 4096).unwrap();
        assert!(SharedBitmap::open(file, PageCount(1 << 20)).is_err());
    }
}
