//! Simulated guest RAM: heap pages that are touched on demand, and the dirty log with manual protect.
//!
//! Owns bytes and bits; knows nothing of time, hosts or guests.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use crate::model::{PAGE_SIZE, PageBitmap, PageCount, PageRun, RegionId, RegionKind, RegionSpec};
use crate::port::{BytesView, Region};

/// 64-bit words in a page.
const PAGE_WORDS: usize = PAGE_SIZE / 8;

/// RAM of one simulated machine.
#[derive(Debug)]
pub(super) struct SimRegion {
    spec: RegionSpec,
    words: Box<[AtomicU64]>,
    /// Pages that may hold something else than zeros.
    touched: Box<[AtomicU64]>,
}

impl SimRegion {
    /// RAM of `pages` zero pages. Costs memory for touched pages only.
    pub(super) fn new(pages: PageCount) -> Self {
        let zeros = vec![0u64; pages.0 as usize * PAGE_WORDS].into_boxed_slice();
        // SAFETY: AtomicU64 has the size, the bit validity and (on 64-bit targets, checked below) the alignment of u64;
        // the box is unique. Made this way the allocator hands out untouched zero pages.
        let words = unsafe { Box::from_raw(Box::into_raw(zeros) as *mut [AtomicU64]) };
        const { assert!(align_of::<AtomicU64>() == align_of::<u64>()) };
        Self {
            spec: RegionSpec { id: RegionId::RAM, kind: RegionKind::Ram, pages },
            words,
            touched: (0..pages.0.div_ceil(64)).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    fn touch(&self, page: u64) {
        self.touched[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::Relaxed);
    }

    /// Whether the page has memory.
    pub(super) fn is_touched(&self, page: u64) -> bool {
        self.touched[(page / 64) as usize].load(Ordering::Relaxed) >> (page % 64) & 1 == 1
    }

    fn page(&self, page: u64) -> &[AtomicU64] {
        &self.words[page as usize * PAGE_WORDS..][..PAGE_WORDS]
    }

    /// The guest's write: `stamp` at the start, in the middle and at the end of `page`, so that a torn copy shows. Zero
    /// makes it a zero page.
    pub(super) fn stamp(&self, page: u64, stamp: u64) {
        self.touch(page);
        for word in [0, PAGE_WORDS / 2 + 1, PAGE_WORDS - 1] {
            self.page(page)[word].store(stamp, Ordering::Relaxed);
        }
    }

    /// Whether `page` holds exactly what [`SimRegion::stamp`] left.
    pub(super) fn holds(&self, page: u64, stamp: u64) -> bool {
        if !self.is_touched(page) {
            return stamp == 0;
        }
        self.page(page).iter().enumerate().all(|(index, word)| {
            let stamped = [0, PAGE_WORDS / 2 + 1, PAGE_WORDS - 1].contains(&index);
            word.load(Ordering::Relaxed) == if stamped { stamp } else { 0 }
        })
    }

    /// Pages that may hold something else than zeros.
    pub(super) fn touched_pages(&self) -> Vec<u64> {
        (0..self.spec.pages.0).filter(|&page| self.is_touched(page)).collect()
    }
}

impl Region for SimRegion {
    fn spec(&self) -> &RegionSpec {
        &self.spec
    }

    fn bytes(&self, run: PageRun) -> BytesView<'_> {
        assert!(run.fits(self.spec.pages), "{run:?} does not fit into {:?}", self.spec);
        run.indices().for_each(|page| self.touch(page));
        let words = &self.words[run.first.0 as usize * PAGE_WORDS..run.end() as usize * PAGE_WORDS];
        // SAFETY: the view covers exactly the words, for as long as they are borrowed; both are atomics without invalid
        // values. Mixed-size access is not a data race here: the scheduler lets one thread run at a time.
        unsafe { std::slice::from_raw_parts(words.as_ptr().cast::<AtomicU8>(), size_of_val(words)) }
    }

    fn data_within(&self, run: PageRun) -> Vec<PageRun> {
        let mut parts: Vec<PageRun> = Vec::new();
        let mut page = run.first.0;
        while page < run.end() {
            if page.is_multiple_of(64) && self.touched[(page / 64) as usize].load(Ordering::Relaxed) == 0 {
                page += 64;
                continue;
            }
            if self.is_touched(page) {
                match parts.last_mut() {
                    Some(part) if part.end() == page => part.count += 1,
                    _ => parts.push(PageRun::new(page, 1)),
                }
            }
            page += 1;
        }
        parts
    }

    fn prepare_for_write(&self, _run: PageRun) {}

    fn zero(&self, run: PageRun) {
        for page in run.indices().filter(|&page| self.is_touched(page)) {
            self.page(page).iter().for_each(|word| word.store(0, Ordering::Relaxed));
        }
    }
}

/// A dirty bitmap with manual protect, all set at the start (`KVM_DIRTY_LOG_INITIALLY_SET`).
#[derive(Clone, Debug)]
pub(super) struct SimDirtyLog {
    on: bool,
    /// Pages that are not write-protected: logged, or never protected yet.
    logged: PageBitmap,
    /// Of these, what a harvest has moved (at the start: all) and [`SimDirtyLog::protect`] may re-arm.
    moved: PageBitmap,
}

impl SimDirtyLog {
    /// A log that is off.
    pub(super) fn new(pages: PageCount) -> Self {
        Self { on: false, logged: PageBitmap::new(pages), moved: PageBitmap::new(pages) }
    }

    /// How many pages it is about.
    pub(super) fn pages(&self) -> PageCount {
        self.logged.len()
    }

    /// Whether writes are logged.
    pub(super) fn is_on(&self) -> bool {
        self.on
    }

    /// On, with every page unprotected.
    pub(super) fn start(&mut self) {
        let all = PageBitmap::full(self.logged.len());
        *self = Self { on: true, logged: all.clone(), moved: all };
    }

    /// Off.
    pub(super) fn stop(&mut self) {
        self.on = false;
    }

    /// A write to `page`; whether it is the first since the page was protected.
    pub(super) fn note(&mut self, page: u64) -> bool {
        let is_new = self.on && !self.logged.contains(page);
        if is_new {
            self.logged.insert(page);
        }
        is_new
    }

    /// Moves what is logged into `into`; returns how many pages that added.
    pub(super) fn harvest(&mut self, into: &mut PageBitmap) -> PageCount {
        let before = into.count().0;
        into.union(&self.logged);
        self.moved = self.logged.clone();
        PageCount(into.count().0 - before)
    }

    /// Counts these pages as moved, so that what is logged of them goes when they are protected next.
    pub(super) fn disregard(&mut self, run: PageRun) {
        self.moved.insert_run(run);
    }

    /// Re-arms those pages of `run` that were moved.
    pub(super) fn protect(&mut self, run: PageRun) {
        let pages: Vec<u64> =
            self.moved.runs_within(run.first.0, run.end(), u32::MAX).flat_map(PageRun::indices).collect();
        for page in pages {
            self.logged.remove(page);
            self.moved.remove(page);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_between_harvest_and_protect_stays_logged_if_it_was_clean() {
        let mut log = SimDirtyLog::new(PageCount(8));
        log.start();
        log.protect(PageRun::new(0, 8));
        log.note(1);
        let mut due = PageBitmap::new(PageCount(8));
        assert_eq!(log.harvest(&mut due), PageCount(1));
        log.note(2);
        log.protect(PageRun::new(0, 8));
        due.clear();
        assert_eq!(log.harvest(&mut due), PageCount(1));
        assert!(due.contains(2) && !due.contains(1));
        // What was moved and not protected comes again.
        due.clear();
        assert_eq!(log.harvest(&mut due), PageCount(1));
        // What is due need not be found until it is protected.
        log.protect(PageRun::new(0, 8));
        log.disregard(PageRun::new(3, 2));
        for page in [3, 4, 5] {
            log.note(page);
        }
        log.protect(PageRun::new(0, 8));
        log.note(4);
        due.clear();
        assert_eq!(log.harvest(&mut due), PageCount(2));
        assert!(due.contains(4) && due.contains(5));
    }

    #[test]
    fn a_page_holds_what_was_stamped_and_nothing_else() {
        let region = SimRegion::new(PageCount(70));
        assert!(region.holds(3, 0) && !region.holds(3, 1));
        region.stamp(3, 7);
        assert!(region.holds(3, 7));
        region.bytes(PageRun::new(3, 1))[100].store(1, Ordering::Relaxed);
        assert!(!region.holds(3, 7));
        region.zero(PageRun::new(0, 70));
        assert!(region.holds(3, 0));
        assert_eq!(region.data_within(PageRun::new(0, 70)), [PageRun::new(3, 1)]);
    }
}
