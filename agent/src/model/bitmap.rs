//! A set of pages of one region, as a bitmap, and its walk in runs.
//!
//! Owned by one thread; the bitmap that machine and manager share is [`crate::shm::SharedBitmap`].

use super::region::PageRun;
use super::units::PageCount;

/// A set of page indices in `[0, len)`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PageBitmap {
    words: Vec<u64>,
    len: u64,
}

impl PageBitmap {
    /// The empty set over a region of `pages`.
    pub fn new(pages: PageCount) -> Self {
        Self { words: vec![0; pages.0.div_ceil(64) as usize], len: pages.0 }
    }

    /// The set of all pages of a region of `pages`.
    pub fn full(pages: PageCount) -> Self {
        let mut all = Self { words: vec![u64::MAX; pages.0.div_ceil(64) as usize], len: pages.0 };
        all.trim();
        all
    }

    /// The size of the region, in pages.
    pub fn len(&self) -> PageCount {
        PageCount(self.len)
    }

    /// Whether no page is in the set.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// How many pages are in the set.
    pub fn count(&self) -> PageCount {
        PageCount(self.words.iter().map(|word| u64::from(word.count_ones())).sum())
    }

    /// Adds one page; out of range is ignored, since the set is over a fixed region.
    pub fn insert(&mut self, page: u64) {
        if page < self.len {
            self.words[(page / 64) as usize] |= 1 << (page % 64);
        }
    }

    /// Adds the pages of a run; those out of range are ignored.
    pub fn insert_run(&mut self, run: PageRun) {
        run.indices().for_each(|page| self.insert(page));
    }

    /// Takes one page out.
    pub fn remove(&mut self, page: u64) {
        if page < self.len {
            self.words[(page / 64) as usize] &= !(1 << (page % 64));
        }
    }

    /// Whether `page` is in the set.
    pub fn contains(&self, page: u64) -> bool {
        page < self.len && self.words[(page / 64) as usize] >> (page % 64) & 1 == 1
    }

    /// Takes out every page that `keep` does not hold.
    pub fn retain(&mut self, keep: impl Fn(u64) -> bool) {
        for (index, word) in self.words.iter_mut().enumerate() {
            let mut left = *word;
            while left != 0 {
                let bit = left.trailing_zeros();
                left &= left - 1;
                if !keep(index as u64 * 64 + u64::from(bit)) {
                    *word &= !(1 << bit);
                }
            }
        }
    }

    /// Takes all pages out.
    pub fn clear(&mut self) {
        self.words.fill(0);
    }

    /// Adds every page of `other`, which is over the same region.
    pub fn union(&mut self, other: &Self) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine |= theirs;
        }
        self.trim();
    }

    /// Takes out every page of `other`, which is over the same region.
    pub fn subtract(&mut self, other: &Self) {
        for (mine, theirs) in self.words.iter_mut().zip(&other.words) {
            *mine &= !theirs;
        }
    }

    /// The pages that are in `other`, too, which is over the same region.
    #[must_use]
    pub fn both(&self, other: &Self) -> Self {
        let words = self.words.iter().zip(&other.words).map(|(mine, theirs)| mine & theirs).collect();
        Self { words, len: self.len }
    }

    /// The words, 64 pages each, lowest page in the lowest bit (the layout of `KVM_GET_DIRTY_LOG`).
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    /// ORs `bits` into word `index`; bits beyond the region are dropped.
    pub fn or_word(&mut self, index: usize, bits: u64) {
        if let Some(word) = self.words.get_mut(index) {
            *word |= bits;
            if index + 1 == self.words.len() {
                self.trim();
            }
        }
    }

    /// The set as runs of at most `longest` pages, in ascending order.
    pub fn runs(&self, longest: u32) -> Runs<'_> {
        self.runs_within(0, self.len, longest)
    }

    /// The runs of at most `longest` pages inside `[from, to)`.
    pub fn runs_within(&self, from: u64, to: u64, longest: u32) -> Runs<'_> {
        Runs { set: self, next: from, end: to.min(self.len), longest: longest.max(1) }
    }

    /// The lowest page in the set at or after `from`, if it is below `end`.
    fn next_set(&self, from: u64, end: u64) -> Option<u64> {
        self.scan(from, end, |word| word)
    }

    /// The lowest page not in the set at or after `from`, or `end`.
    fn next_clear(&self, from: u64, end: u64) -> u64 {
        self.scan(from, end, |word| !word).unwrap_or(end)
    }

    fn scan(&self, from: u64, end: u64, view: impl Fn(u64) -> u64) -> Option<u64> {
        if from >= end {
            return None;
        }
        let mut index = (from / 64) as usize;
        let mut word = view(self.words[index]) & (u64::MAX << (from % 64));
        while word == 0 {
            index += 1;
            if index as u64 * 64 >= end {
                return None;
            }
            word = view(self.words[index]);
        }
        let page = index as u64 * 64 + u64::from(word.trailing_zeros());
        (page < end).then_some(page)
    }

    fn trim(&mut self) {
        if !self.len.is_multiple_of(64)
            && let Some(last) = self.words.last_mut()
        {
            *last &= (1 << (self.len % 64)) - 1;
        }
    }
}

/// Iterator of [`PageBitmap::runs`].
#[derive(Debug)]
pub struct Runs<'a> {
    set: &'a PageBitmap,
    next: u64,
    end: u64,
    longest: u32,
}

impl Iterator for Runs<'_> {
    type Item = PageRun;

    fn next(&mut self) -> Option<PageRun> {
        let first = self.set.next_set(self.next, self.end)?;
        let limit = self.end.min(first.saturating_add(u64::from(self.longest)));
        let end = self.set.next_clear(first, limit);
        self.next = end;
        Some(PageRun::new(first, (end - first) as u32))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// The bitmap against a plain set of numbers.
        #[test]
        fn runs_cover_exactly_the_set(len in 1u64..400, pages in prop::collection::btree_set(0u64..400, 0..200), longest in 1u32..70) {
            let pages: BTreeSet<u64> = pages.into_iter().filter(|&page| page < len).collect();
            let mut set = PageBitmap::new(PageCount(len));
            for &page in &pages {
                set.insert(page);
            }
            prop_assert_eq!(set.count().0, pages.len() as u64);
            let runs: Vec<PageRun> = set.runs(longest).collect();
            prop_assert!(runs.iter().all(|run| run.count <= longest && run.fits(PageCount(len))));
            let walked: Vec<u64> = runs.iter().flat_map(|run| run.indices()).collect();
            prop_assert_eq!(walked, pages.into_iter().collect::<Vec<_>>());
        }

        #[test]
        fn windows_of_runs_join_to_the_whole(len in 1u64..400, cut in 0u64..400, pages in prop::collection::vec(0u64..400, 0..200)) {
            let mut set = PageBitmap::new(PageCount(len));
            for page in pages {
                set.insert(page);
            }
            let cut = cut.min(len);
            let halves: Vec<u64> =
                set.runs_within(0, cut, 512).chain(set.runs_within(cut, len, 512)).flat_map(|run| run.indices()).collect();
            prop_assert_eq!(halves, set.runs(512).flat_map(|run| run.indices()).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_full_set_has_no_page_beyond_the_region() {
        let all = PageBitmap::full(PageCount(70));
        assert_eq!(all.count(), PageCount(70));
        let mut some = PageBitmap::new(PageCount(70));
        some.or_word(1, u64::MAX);
        assert_eq!(some.count(), PageCount(6));
        assert!(!some.contains(70));
    }
}
