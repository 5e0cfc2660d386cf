//! In which order the pages of a round go: by number, or those last that will probably be written again before the round has ended.
//!
//! What was dirty after both of the last rounds will probably be dirty after this one. Sent last, it has the least time for that.

use std::ops::Range;

use crate::model::{PageBitmap, PageCount, PageRun};

/// Pages that stay together: what one word of a bitmap holds, and what KVM protects with one order at least.
const BLOCK_PAGES: u64 = 64;

/// All pages of a region, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Order {
    /// Where each part begins in the order, and which pages it is.
    parts: Vec<(u64, Range<u64>)>,
    len: u64,
}

impl Order {
    /// By number.
    pub(super) fn plain(pages: PageCount) -> Self {
        Self { parts: vec![(0, 0..pages.0)], len: pages.0 }
    }

    /// By number, but last the blocks in which most of what is `due` is `hot`.
    pub(super) fn hot_last(due: &PageBitmap, hot: &PageBitmap) -> Self {
        let is_hot = |index: usize| {
            let (due, hot) = (due.words()[index], hot.words()[index]);
            (due & hot).count_ones() * 2 > due.count_ones()
        };
        let mut order = Self { parts: Vec::new(), len: 0 };
        for wanted in [false, true] {
            for index in (0..due.words().len()).filter(|&index| is_hot(index) == wanted) {
                let first = index as u64 * BLOCK_PAGES;
                order.append(first..(first + BLOCK_PAGES).min(due.len().0));
            }
        }
        order
    }

    fn append(&mut self, pages: Range<u64>) {
        let count = pages.end - pages.start;
        match self.parts.last_mut() {
            Some((_, last)) if last.end == pages.start => last.end = pages.end,
            _ => self.parts.push((self.len, pages)),
        }
        self.len += count;
    }

    /// The pages from position `from` on, `count` of them or as many as there are.
    pub(super) fn pages(&self, from: u64, count: u64) -> impl Iterator<Item = PageRun> + '_ {
        let to = from.saturating_add(count).min(self.len);
        let first = self.parts.partition_point(|(begin, pages)| begin + (pages.end - pages.start) <= from);
        self.parts[first..].iter().take_while(move |(begin, _)| *begin < to).map(move |(begin, pages)| {
            let skipped = from.saturating_sub(*begin);
            let end = pages.end.min(pages.start + (to - begin));
            PageRun::new(pages.start + skipped, (end - pages.start - skipped) as u32)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Every page once, whoever takes how much of it.
        #[test]
        fn an_order_has_every_page_once(
            len in 1..1000u64, due in prop::collection::vec(0..1000u64, 0..300), hot in prop::collection::vec(0..1000u64, 0..300), step in 1..300u64,
        ) {
            let set = |pages: &[u64]| {
                let mut set = PageBitmap::new(PageCount(len));
                for &page in pages {
                    set.insert(page);
                }
                set
            };
            for order in [Order::plain(PageCount(len)), Order::hot_last(&set(&due), &set(&hot))] {
                let mut taken: Vec<u64> = Vec::new();
                for from in (0..len + 5).step_by(step as usize) {
                    let runs: Vec<PageRun> = order.pages(from, step).collect();
                    prop_assert!(runs.iter().all(|run| run.fits(PageCount(len))));
                    taken.extend(runs.iter().flat_map(|run| run.indices()));
                }
                taken.sort_unstable();
                prop_assert_eq!(taken, (0..len).collect::<Vec<_>>());
            }
        }
    }

    #[test]
    fn hot_blocks_go_last() {
        let mut due = PageBitmap::new(PageCount(300));
        let mut hot = due.clone();
        for page in [70, 71, 72, 200, 201] {
            due.insert(page);
        }
        for page in [70, 71, 200, 299] {
            hot.insert(page);
        }
        let order = Order::hot_last(&due, &hot);
        let runs: Vec<PageRun> = order.pages(0, 300).collect();
        assert_eq!(runs, [PageRun::new(0, 64), PageRun::new(128, 172), PageRun::new(64, 64)], "half hot is not hot");
        assert_eq!(order.pages(60, 10).collect::<Vec<_>>(), [PageRun::new(60, 4), PageRun::new(128, 6)]);
    }
}
