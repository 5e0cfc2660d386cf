//! Hashes that prove that a page at the target is the page at the source.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::model::PageRun;
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

/// The same of a copy of it.
pub(super) fn copy_digest(page: u64, copy: &[u8]) -> u64 {
    xxh3_64_with_seed(copy, page)
}

/// The digest of a page that travels as a mark: its place alone. Both ends know that its content is zero.
pub(super) fn zero_digest(page: u64) -> u64 {
    xxh3_64(&page.to_le_bytes())
}

/// A hash of every 2 MiB of every region, in order: `--verify`.
pub fn chunk_hashes(regions: &[&dyn Region]) -> Vec<u64> {
    let mut hashes = Vec::new();
    for region in regions {
        let pages = region.spec().pages.0;
        for first in (0..pages).step_by(CHUNK_PAGES as usize) {
            let run = PageRun::new(first, CHUNK_PAGES.min((pages - first) as u32));
            hashes.push(xxh3_64(settled(region.bytes(run))));
        }
    }
    hashes
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU8;

    use super::*;
    use crate::model::PAGE_SIZE;

    fn page(fill: impl Fn(usize) -> u8) -> Vec<AtomicU8> {
        (0..PAGE_SIZE).map(|index| AtomicU8::new(fill(index))).collect()
    }

    #[test]
    fn a_page_at_the_wrong_place_has_another_digest() {
        let bytes = page(|index| index as u8);
        assert_ne!(page_digest(1, &bytes), page_digest(2, &bytes));
        assert_ne!(zero_digest(1), zero_digest(2));
    }
}
