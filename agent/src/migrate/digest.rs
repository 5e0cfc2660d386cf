//! Hashes that prove that a page at the target is the page at the source.

use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_64_with_seed};

use crate::model::{PAGE_SIZE, PageBitmap, PageRun};
use crate::port::{BytesView, Region};

/// Pages in one chunk of a whole-memory hash (2 MiB).
const CHUNK_PAGES: u32 = 512;

/// The bytes of a VM that stands, as plain bytes.
fn settled(bytes: BytesView<'_>) -> &[u8] {
    // SAFETY: the view is valid for its length and stays borrowed. Hashes are only taken while the VM stands, or at a
    // target that has not run it, so nobody writes these bytes meanwhile.
    unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len()) }
}

/// The digest of one page at its place: XXH3 seeded with the page's index, so that a page at the wrong place counts as
/// wrong. Digests of a round are summed (wrapping), which makes the order of arrival irrelevant.
pub fn page_digest(page: u64, bytes: BytesView<'_>) -> u64 {
    xxh3_64_with_seed(settled(bytes), page)
}

/// The sum of the digests of a run's pages.
pub(super) fn run_digest(run: PageRun, bytes: BytesView<'_>) -> u64 {
    copy_digest(run, settled(bytes))
}

/// The same of a copy of them.
pub(super) fn copy_digest(run: PageRun, copy: &[u8]) -> u64 {
    let pages = run.indices().zip(copy.chunks(PAGE_SIZE));
    pages.fold(0, |sum, (page, bytes)| sum.wrapping_add(xxh3_64_with_seed(bytes, page)))
}

/// The same of pages that travel as marks.
pub(super) fn zeros_digest(run: PageRun) -> u64 {
    run.indices().fold(0, |sum, page| sum.wrapping_add(zero_digest(page)))
}

/// The digest of a page that travels as a mark: its place alone. Both ends know that its content is zero.
fn zero_digest(page: u64) -> u64 {
    xxh3_64(&page.to_le_bytes())
}

/// A hash of every 2 MiB of a region, in order: `--verify`. Pages of `as_zeros` count as zeros, whatever they hold: the guest does not use them, and the target has them so.
pub fn chunk_hashes(region: &dyn Region, as_zeros: &PageBitmap) -> Vec<u64> {
    let chunks = region.spec().pages.windows(CHUNK_PAGES);
    chunks
        .map(|run| {
            let bytes = settled(region.bytes(run));
            if as_zeros.runs_within(run.first.0, run.end(), 1).next().is_none() {
                return xxh3_64(bytes);
            }
            let mut hash = Xxh3::new();
            for (page, bytes) in run.indices().zip(bytes.chunks(PAGE_SIZE)) {
                hash.update(if as_zeros.contains(page) { &[0; PAGE_SIZE] } else { bytes });
            }
            hash.digest()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU8;

    use super::*;
    use crate::migrate::owed_testing::Memory;
    use crate::model::PageCount;

    fn page(fill: impl Fn(usize) -> u8) -> Vec<AtomicU8> {
        (0..PAGE_SIZE).map(|index| AtomicU8::new(fill(index))).collect()
    }

    #[test]
    fn free_pages_hash_as_zeros_and_no_others() {
        let pages = PageCount(1100);
        let (here, there) = (Memory::of(pages.0), Memory::of(pages.0));
        for memory in [&here, &there] {
            memory.fill(PageRun::new(500, 200), 7);
        }
        let none = PageBitmap::new(pages);
        assert_eq!(chunk_hashes(&here, &none), chunk_hashes(&there, &none));
        let mut free = PageBitmap::new(pages);
        for page in [0, 511, 512, 1099] {
            here.fill(PageRun::new(page, 1), 9);
            there.fill(PageRun::new(page, 1), 0);
            free.insert(page);
        }
        assert_eq!(chunk_hashes(&here, &free), chunk_hashes(&there, &none));
        free.remove(512);
        let (ours, theirs) = (chunk_hashes(&here, &free), chunk_hashes(&there, &none));
        assert_eq!([0, 1, 2].map(|chunk| ours[chunk] == theirs[chunk]), [true, false, true]);
    }

    #[test]
    fn a_page_at_the_wrong_place_has_another_digest() {
        let bytes = page(|index| index as u8);
        assert_ne!(page_digest(1, &bytes), page_digest(2, &bytes));
        assert_ne!(zero_digest(1), zero_digest(2));
    }
}
