//! How fast zero pages are found, beside how fast one core reads the same memory: `cargo xtask bench zero-scan` runs this and judges.
//!
//! Prints one line a measurement: `CASE WHAT SECONDS`. Memory is a memory file, as guest RAM is, every page of it taken before anything is measured.

use std::hint::black_box;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Instant;

use dunlin::migrate::{BLOCK_PAGES, zero_bits};
use dunlin::model::{PAGE_SIZE, PageCount, PageRun, RegionId, RegionKind, RegionSpec};
use dunlin::port::Region;
use dunlin::shm::{RamRegion, memory_file};

/// What the pages hold.
const CASES: [(&str, Option<usize>); 3] =
    [("zero", None), ("nonzero-at-the-end", Some(PAGE_SIZE - 1)), ("nonzero-at-the-start", Some(0))];

fn main() {
    let mut arguments = std::env::args().skip(1).map(|word| word.parse::<u64>());
    let (Some(Ok(mebibytes)), Some(Ok(runs))) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: zero_scan MEBIBYTES RUNS");
        std::process::exit(2);
    };
    let pages = PageCount::covering(mebibytes << 20);
    let spec = RegionSpec { id: RegionId::RAM, kind: RegionKind::Ram, pages };
    let file = memory_file("zero-scan", pages.bytes()).expect("a memory file");
    let memory = RamRegion::new(spec, file).expect("a mapping of it");
    for (case, place) in CASES {
        for page in 0..pages.0 {
            // What the last case left, then this one's.
            let bytes = memory.bytes(PageRun::new(page, 1));
            for at in [0, PAGE_SIZE - 1] {
                bytes[at].store(u8::from(place == Some(at)), Ordering::Relaxed);
            }
        }
        let expected = if place.is_none() { pages.0 } else { 0 };
        for _ in 0..runs {
            measure(case, "read", || {
                black_box(read(&memory));
                true
            });
            measure(case, "scan", || zero_pages(&memory, zero_bits) == expected);
            measure(case, "words", || zero_pages(&memory, zero_bits_by_words) == expected);
        }
    }
}

fn measure(case: &str, what: &str, work: impl FnOnce() -> bool) {
    let began = Instant::now();
    assert!(work(), "{what} of {case} came to something else than is there");
    println!("{case} {what} {}", began.elapsed().as_secs_f64());
}

/// Blocks as a round looks at them.
fn blocks(memory: &RamRegion) -> impl Iterator<Item = &[AtomicU8]> {
    let pages = memory.spec().pages.0;
    (0..pages)
        .step_by(BLOCK_PAGES as usize)
        .map(move |first| memory.bytes(PageRun::new(first, u64::from(BLOCK_PAGES).min(pages - first) as u32)))
}

fn zero_pages(memory: &RamRegion, zero_bits: impl Fn(&[AtomicU8]) -> u64) -> u64 {
    blocks(memory).map(|block| u64::from(zero_bits(block).count_ones())).sum()
}

/// The sum of all words: nothing but reading.
fn read(memory: &RamRegion) -> u64 {
    blocks(memory).fold(0, |sum, block| {
        // SAFETY: nobody writes this memory but this thread, and not now.
        let (_, words, _) = unsafe { block.align_to::<u64>() };
        sum.wrapping_add(sum_of(words))
    })
}

#[cfg(target_arch = "x86_64")]
fn sum_of(words: &[u64]) -> u64 {
    /// As wide as the scan reads.
    #[target_feature(enable = "avx2")]
    fn wide(words: &[u64]) -> u64 {
        words.iter().fold(0, |sum, word| sum.wrapping_add(*word))
    }
    if is_x86_feature_detected!("avx2") {
        // SAFETY: the processor has AVX2.
        unsafe { wide(words) }
    } else {
        words.iter().fold(0, |sum, word| sum.wrapping_add(*word))
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn sum_of(words: &[u64]) -> u64 {
    words.iter().fold(0, |sum, word| sum.wrapping_add(*word))
}

/// The same by atomic words, which no compiler makes vectors of.
fn zero_bits_by_words(block: &[AtomicU8]) -> u64 {
    block.chunks_exact(PAGE_SIZE).enumerate().fold(0, |bits, (page, bytes)| {
        // SAFETY: AtomicU64 has no invalid values, and the view stays borrowed for as long as the words are.
        let (_, words, _) = unsafe { bytes.align_to::<AtomicU64>() };
        let is_zero =
            words.chunks(8).all(|line| line.iter().fold(0, |sum, word| sum | word.load(Ordering::Relaxed)) == 0);
        bits | u64::from(is_zero) << page
    })
}
