//! Which pages are looked at: a stratified random sample without replacement, the same for the same seed.
//!
//! Pure. Every page has the same chance as the others of its stratum, the last one too.

use std::collections::{BTreeMap, HashSet};

use crate::model::{Gpa, MemoryRange, PAGE_SIZE, Random};

/// Equal stretches of memory that each get their part of the sample, where there is enough for all of them.
const STRATA: u64 = 16;
/// Pages that a stratum must get for its own variance to mean something.
pub(super) const LEAST_IN_STRATUM: u64 = 24;

/// Guest memory as one row of pages.
#[derive(Clone, Debug, Default)]
pub(super) struct Population {
    /// The number of the first page of each range, and the range.
    ranges: Vec<(u64, MemoryRange)>,
    pages: u64,
}

impl Population {
    /// The whole pages of `ranges`.
    pub(super) fn new(ranges: impl IntoIterator<Item = MemoryRange>) -> Self {
        let mut population = Self::default();
        for range in ranges {
            population.ranges.push((population.pages, range));
            population.pages += range.bytes / PAGE_SIZE as u64;
        }
        population
    }

    /// How many pages lie in each region of `bytes`, by the region's number; in order, those without any left out.
    pub(super) fn by_region(&self, bytes: u64) -> BTreeMap<u64, u64> {
        let mut pages = BTreeMap::new();
        for (_, range) in &self.ranges {
            let end = range.start.0.saturating_add(range.bytes / PAGE_SIZE as u64 * PAGE_SIZE as u64);
            let mut at = range.start.0;
            while at < end {
                let next = (at / bytes).saturating_add(1).saturating_mul(bytes).min(end);
                *pages.entry(at / bytes).or_default() += (next - at) / PAGE_SIZE as u64;
                at = next;
            }
        }
        pages
    }

    /// How many there are.
    pub(super) fn pages(&self) -> u64 {
        self.pages
    }

    /// Where page number `page` is, which must be one.
    pub(super) fn address(&self, page: u64) -> Gpa {
        let behind = self.ranges.partition_point(|(first, _)| *first <= page);
        let (first, range) = &self.ranges[behind.saturating_sub(1)];
        Gpa(range.start.0 + (page - first) * PAGE_SIZE as u64)
    }
}

/// A stretch of the population, `[first, first + pages)`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stratum {
    pub(super) first: u64,
    pub(super) pages: u64,
}

/// A sample.
#[derive(Clone, Debug)]
pub(super) struct Sample {
    /// The strata, in ascending order.
    pub(super) strata: Vec<Stratum>,
    /// The pages, none twice, in an order that is random within a stratum and deals the strata out evenly: any run of them is a stratified
    /// sample itself.
    pub(super) pages: Vec<u64>,
}

impl Sample {
    /// Chooses `wanted` of `pages` pages, or all of them.
    pub(super) fn choose(pages: u64, wanted: u64, random: &mut Random) -> Self {
        let wanted = wanted.min(pages);
        let count = (wanted / LEAST_IN_STRATUM).clamp(1, STRATA);
        let cut = |of: u64, index: u64| (u128::from(of) * u128::from(index) / u128::from(count)) as u64;
        let mut strata = Vec::new();
        // Each page with its place in the order, 0 to 1.
        let mut dealt: Vec<(f64, u64)> = Vec::with_capacity(wanted as usize);
        for index in 0..count {
            let first = cut(pages, index);
            let stratum = Stratum { first, pages: cut(pages, index + 1) - first };
            let part = (cut(wanted, index + 1) - cut(wanted, index)).min(stratum.pages);
            let mut picked = pick(stratum, part, random);
            shuffle(&mut picked, random);
            let shift = random.below(1 << 20) as f64 / f64::from(1 << 20);
            let place = |(turn, page)| ((turn as f64 + shift) / part as f64, page);
            dealt.extend(picked.into_iter().enumerate().map(place));
            strata.push(stratum);
        }
        dealt.sort_by(|left, right| left.0.total_cmp(&right.0));
        Self { strata, pages: dealt.into_iter().map(|(_, page)| page).collect() }
    }

    /// The number of the stratum that holds `page`.
    pub(super) fn stratum_of(&self, page: u64) -> usize {
        self.strata.partition_point(|stratum| stratum.first <= page).saturating_sub(1)
    }
}

/// Picks `wanted` of a stratum's pages: Floyd's algorithm (Bentley and Floyd, CACM 30(9), 1987), which needs memory for what it picks only.
fn pick(stratum: Stratum, wanted: u64, random: &mut Random) -> Vec<u64> {
    if wanted == stratum.pages {
        return (stratum.first..stratum.first + stratum.pages).collect();
    }
    let mut picked = Vec::with_capacity(wanted as usize);
    let mut taken = HashSet::with_capacity(wanted as usize);
    for last in stratum.pages - wanted..stratum.pages {
        let candidate = random.below(last + 1);
        let page = if taken.insert(candidate) { candidate } else { last };
        taken.insert(page);
        picked.push(stratum.first + page);
    }
    picked
}

/// Puts `pages` into random order (Fisher and Yates).
pub(super) fn shuffle(pages: &mut [u64], random: &mut Random) {
    for index in (1..pages.len()).rev() {
        pages.swap(index, random.below(index as u64 + 1) as usize);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_sample_has_each_page_at_most_once_and_is_as_large_as_wanted(pages in 1u64..5000, wanted in 0u64..6000, seed: u64) {
            let sample = Sample::choose(pages, wanted, &mut Random(seed));
            let mut sorted = sample.pages.clone();
            sorted.sort_unstable();
            sorted.dedup();
            prop_assert_eq!(sorted.len(), sample.pages.len());
            prop_assert!(sorted.iter().all(|&page| page < pages));
            // Rounding may cost a page where a stratum would be wholly taken.
            prop_assert!(sample.pages.len() as u64 + STRATA >= wanted.min(pages) && sample.pages.len() as u64 <= wanted);
            prop_assert!(wanted < pages || sample.pages.len() as u64 == pages);
            prop_assert_eq!(sample.strata.iter().map(|stratum| stratum.pages).sum::<u64>(), pages);
            for &page in &sample.pages {
                let stratum = sample.strata[sample.stratum_of(page)];
                prop_assert!((stratum.first..stratum.first + stratum.pages).contains(&page));
            }
        }
    }

    #[test]
    fn every_page_is_chosen_equally_often_the_last_one_too() {
        let mut random = Random(1);
        // A few of few, where one page more or less shows, and half of many.
        for (pages, wanted, runs) in [(20, 3, 20_000), (1000, 500, 4000)] {
            let mut chosen = vec![0u32; pages as usize];
            for _ in 0..runs {
                for page in Sample::choose(pages, wanted, &mut random).pages {
                    chosen[page as usize] += 1;
                }
            }
            let share = wanted as f64 / pages as f64;
            let (mean, six) = (f64::from(runs) * share, 6.0 * (f64::from(runs) * share * (1.0 - share)).sqrt());
            assert!(chosen.iter().all(|&times| (f64::from(times) - mean).abs() < six), "{mean} {chosen:?}");
        }
    }

    #[test]
    fn a_part_of_a_sample_is_stratified_as_the_whole() {
        let sample = Sample::choose(16_000, 4800, &mut Random(3));
        for part in sample.pages.chunks(160) {
            let mut of = [0; 16];
            for &page in part {
                of[sample.stratum_of(page)] += 1;
            }
            assert!(of.iter().all(|count| (9..=11).contains(count)), "{of:?}");
        }
    }

    #[test]
    fn pages_have_their_addresses_across_holes() {
        let range = |start, pages| MemoryRange { start: Gpa(start), bytes: pages * PAGE_SIZE as u64 };
        let population = Population::new([range(0x1000, 2), range(0x10_0000, 1)]);
        assert_eq!(population.pages(), 3);
        assert_eq!([0, 1, 2].map(|page| population.address(page).0), [0x1000, 0x2000, 0x10_0000]);
        assert_eq!(population.by_region(0x2000).into_iter().collect::<Vec<_>>(), [(0, 1), (1, 1), (0x80, 1)]);
    }
}
