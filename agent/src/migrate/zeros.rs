//! Finds pages of zeros in memory that the guest may be writing, as fast as a core reads memory (`cargo xtask bench zero-scan`).
//!
//! Wide loads by the processor's own instructions, the widest of those that this build knows and this host has; elsewhere words.

use crate::model::PAGE_SIZE;
use crate::port::BytesView;

/// The most pages that are looked at in one go: as many as an answer has bits.
pub const BLOCK_PAGES: u32 = 64;

/// One bit for each page of `bytes`, at most [`BLOCK_PAGES`], the lowest for the first: set if it holds only zeros. A page that is written meanwhile may be taken
/// for what it was before.
///
/// # Panics
/// If there are more pages.
pub fn zero_bits(bytes: BytesView<'_>) -> u64 {
    let pages = bytes.len() / PAGE_SIZE;
    assert!(pages <= BLOCK_PAGES as usize, "at most {BLOCK_PAGES} pages at a time");
    let start = bytes.as_ptr().cast::<u8>();
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2, and the view is valid for reads of so many pages for as long as it is borrowed.
            return unsafe { x86::zero_bits_avx2(start, pages) };
        }
        // SAFETY: as above; every x86-64 has SSE2.
        unsafe { x86::zero_bits_sse2(start, pages) }
    }
    #[cfg(not(target_arch = "x86_64"))]
    words::zero_bits(bytes, pages)
}

/// For `page` in `0..pages` the bit of `is_zero(page)`.
#[expect(clippy::inline_always, reason = "code is only made of wide loads inside of the function that has them")]
#[inline(always)]
fn bits(pages: usize, is_zero: impl Fn(usize) -> bool) -> u64 {
    (0..pages).fold(0, |bits, page| bits | u64::from(is_zero(page)) << page)
}

/// Loads that the guest's writes may cross. SAFETY, for all of it: callers give memory that is valid for reads of `pages` pages. Intrinsics read through a raw
/// pointer, and no reference to plain bytes is made; where the guest or another thread writes at the same moment, the processor gives old or new bytes, all of them valid,
/// and nothing but whether they are zero is made of them. The compiler may at most read twice, with the same right.
#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, __m256i, _mm_cmpeq_epi8, _mm_loadu_si128, _mm_movemask_epi8, _mm_or_si128, _mm_setzero_si128,
        _mm256_loadu_si256, _mm256_or_si256, _mm256_testz_si256,
    };

    use super::{PAGE_SIZE, bits};

    /// Vectors between two looks.
    const STRIDE: usize = 8;

    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn zero_bits_avx2(start: *const u8, pages: usize) -> u64 {
        bits(pages, |page| {
            // SAFETY: `page` is one of `pages`, and every vector lies inside of it.
            let load = |index: usize| unsafe {
                _mm256_loadu_si256(start.add(page * PAGE_SIZE + index * size_of::<__m256i>()).cast())
            };
            // Most pages that are not zero show it in their first line: then no other is fetched.
            let line = _mm256_or_si256(load(0), load(1));
            if _mm256_testz_si256(line, line) == 0 {
                return false;
            }
            (0..PAGE_SIZE / size_of::<__m256i>()).step_by(STRIDE).all(|first| {
                let low = _mm256_or_si256(
                    _mm256_or_si256(load(first), load(first + 1)),
                    _mm256_or_si256(load(first + 2), load(first + 3)),
                );
                let high = _mm256_or_si256(
                    _mm256_or_si256(load(first + 4), load(first + 5)),
                    _mm256_or_si256(load(first + 6), load(first + 7)),
                );
                let all = _mm256_or_si256(low, high);
                _mm256_testz_si256(all, all) == 1
            })
        })
    }

    pub(super) unsafe fn zero_bits_sse2(start: *const u8, pages: usize) -> u64 {
        bits(pages, |page| {
            // SAFETY: `page` is one of `pages`, and every vector lies inside of it.
            let load = |index: usize| unsafe {
                _mm_loadu_si128(start.add(page * PAGE_SIZE + index * size_of::<__m128i>()).cast())
            };
            (0..PAGE_SIZE / size_of::<__m128i>()).step_by(STRIDE).all(|first| {
                let all = (first + 1..first + STRIDE).fold(load(first), |all, index| {
                    // SAFETY: every x86-64 has SSE2.
                    unsafe { _mm_or_si128(all, load(index)) }
                });
                // SAFETY: as above.
                unsafe { _mm_movemask_epi8(_mm_cmpeq_epi8(all, _mm_setzero_si128())) == 0xffff }
            })
        })
    }
}

/// Any processor. Also what the others are held against.
#[cfg(any(test, not(target_arch = "x86_64")))]
mod words {
    use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

    use super::{PAGE_SIZE, bits};
    use crate::port::BytesView;

    pub(super) fn zero_bits(bytes: BytesView<'_>, pages: usize) -> u64 {
        bits(pages, |page| {
            // SAFETY: AtomicU64 has no invalid values, and the view stays borrowed for as long as the words are.
            let (head, words, tail) = unsafe { bytes[page * PAGE_SIZE..][..PAGE_SIZE].align_to::<AtomicU64>() };
            let is_zero = |byte: &AtomicU8| byte.load(Ordering::Relaxed) == 0;
            head.iter().chain(tail).all(is_zero)
                && words.chunks(8).all(|line| line.iter().fold(0, |sum, word| sum | word.load(Ordering::Relaxed)) == 0)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU8, Ordering};

    use proptest::prelude::*;

    use super::*;

    fn memory(pages: usize) -> Vec<AtomicU8> {
        (0..pages * PAGE_SIZE).map(|_| AtomicU8::new(0)).collect()
    }

    /// Every way that this host has.
    fn ways(bytes: BytesView<'_>) -> Vec<(&'static str, u64)> {
        let pages = bytes.len() / PAGE_SIZE;
        let mut found = vec![("chosen", zero_bits(bytes)), ("words", words::zero_bits(bytes, pages))];
        #[cfg(target_arch = "x86_64")]
        {
            let start = bytes.as_ptr().cast::<u8>();
            // SAFETY: the bytes are there, and every x86-64 has SSE2.
            found.push(("sse2", unsafe { x86::zero_bits_sse2(start, pages) }));
            if is_x86_feature_detected!("avx2") {
                // SAFETY: the bytes are there, and so is AVX2.
                found.push(("avx2", unsafe { x86::zero_bits_avx2(start, pages) }));
            }
        }
        found
    }

    #[test]
    fn one_byte_makes_a_page_nonzero_wherever_it_is() {
        let memory = memory(3);
        assert!(ways(&memory).iter().all(|&(_, bits)| bits == 0b111));
        for place in 0..PAGE_SIZE {
            memory[PAGE_SIZE + place].store(1 << (place % 8), Ordering::Relaxed);
            for (way, bits) in ways(&memory) {
                assert_eq!(bits, 0b101, "{way}: byte {place}");
            }
            memory[PAGE_SIZE + place].store(0, Ordering::Relaxed);
        }
    }

    proptest! {
        /// Any bytes in any pages, at any address.
        #[test]
        fn all_ways_agree(pages in 0..=64usize, shift in 0..64usize, bytes in prop::collection::vec((0..64 * PAGE_SIZE, any::<u8>()), 0..40)) {
            let memory = memory(pages + 1);
            let view = &memory[shift..shift + pages * PAGE_SIZE];
            let mut expected = if pages == 64 { u64::MAX } else { (1 << pages) - 1 };
            for (place, value) in bytes.into_iter().filter(|&(place, value)| place < view.len() && value != 0) {
                view[place].store(value, Ordering::Relaxed);
                expected &= !(1 << (place / PAGE_SIZE));
            }
            for (way, bits) in ways(view) {
                prop_assert_eq!(bits, expected, "{}", way);
            }
        }
    }
}
