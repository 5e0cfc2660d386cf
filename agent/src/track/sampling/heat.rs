//! Where a VM writes, from a sample of its pages: an estimate for each region of guest memory, with its interval. Pure.
//!
//! A region is 2 MiB where enough pages of the sample lie in one, else as many times twice that as it takes. Of a sample that is spread over
//! several windows the estimate is the mean over those windows.

use std::collections::BTreeMap;

use serde::Serialize;

use super::choose::Population;
use super::interval::{self, Count};
use crate::model::{Gpa, MemoryRange, PAGE_SIZE};

/// The smallest region, in bytes.
pub(super) const LEAST_REGION_BYTES: u64 = 2 << 20;
/// Pages of the sample that regions get on average: those of none that was written leave up to a tenth of the region open.
const WANTED_IN_REGION: u64 = 32;

/// Where different pages were written in windows of one length.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SampledHeat {
    /// The size of a region, at which they begin: the granularity of all of this.
    pub region_bytes: u64,
    /// The mean length of the windows.
    pub window_ns: u64,
    /// Over how many windows the sample was spread.
    pub windows: u64,
    /// All regions that hold RAM which can be read, in order of address.
    pub regions: Vec<SampledRegion>,
}

/// One region.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct SampledRegion {
    /// Where it lies; not all of it need be RAM.
    pub range: MemoryRange,
    /// Pages of RAM in it.
    pub pages: u64,
    /// Those that were read twice.
    pub sampled_pages: u64,
    /// Those of them that changed.
    pub changed_pages: u64,
    /// Different pages written in it in such a window: the estimate; 0 where no page was read.
    pub unique_pages: u64,
    /// Where its 95 % interval begins. It is this region's own: of twenty regions one lies outside of its.
    pub unique_pages_low: u64,
    /// Where it ends; all pages where none was read.
    pub unique_pages_high: u64,
}

/// What was seen of the smallest regions, by number.
#[derive(Clone, Debug, Default)]
pub(super) struct Seen {
    counts: BTreeMap<u64, Count>,
}

impl Seen {
    /// Adds a page that was read twice.
    pub(super) fn add(&mut self, at: Gpa, changed: bool) {
        self.counts.entry(at.0 / LEAST_REGION_BYTES).or_default().add(changed);
    }

    /// The estimates for a population of which `sampled` pages were read twice, in `windows` windows of `window_ns`.
    pub(super) fn heat(&self, population: &Population, sampled: u64, window_ns: u64, windows: u64) -> SampledHeat {
        let each = u128::from(population.pages()) * u128::from(WANTED_IN_REGION) / u128::from(sampled.max(1));
        let bytes = u64::try_from(each).ok().and_then(|pages| pages.max(1).checked_mul(PAGE_SIZE as u64));
        let region_bytes = bytes.and_then(u64::checked_next_power_of_two).unwrap_or(1 << 62).max(LEAST_REGION_BYTES);
        let mut counts: BTreeMap<u64, Count> = BTreeMap::new();
        for (number, count) in &self.counts {
            counts.entry(number / (region_bytes / LEAST_REGION_BYTES)).or_default().add_all(*count);
        }
        let region = |(number, pages): (u64, u64)| {
            let count = counts.get(&number).copied().unwrap_or_default();
            let share = interval::of_region(count, pages, windows == 1);
            let (middle, low, high) = share.unwrap_or((0.0, 0.0, 1.0));
            let part = |share: f64| share * pages as f64;
            SampledRegion {
                range: MemoryRange { start: Gpa(number * region_bytes), bytes: region_bytes },
                pages,
                sampled_pages: count.sampled,
                changed_pages: count.hits,
                unique_pages: part(middle).round() as u64,
                unique_pages_low: part(low).floor() as u64,
                unique_pages_high: part(high).ceil() as u64,
            }
        };
        let regions = population.by_region(region_bytes).into_iter().map(region).collect();
        SampledHeat { region_bytes, window_ns, windows, regions }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::Random;
    use crate::track::sampling::choose::Sample;

    /// Pages of a region in these tests: the smallest.
    const EACH: u64 = LEAST_REGION_BYTES / PAGE_SIZE as u64;
    /// Pages that are written in a region of each kind.
    const KINDS: [u64; 8] = [0, 3, 12, 40, 128, 256, 500, 512];

    fn population(regions: u64) -> Population {
        Population::new([MemoryRange { start: Gpa(0), bytes: regions * LEAST_REGION_BYTES }])
    }

    /// Whether a page is written in window number `window`; in each, as many pages of a region as its kind says, others each time.
    fn is_written(page: u64, window: u64, seed: u64) -> bool {
        let (region, within) = (page / EACH, page % EACH);
        // An odd factor makes a bijection of the pages of a region.
        let factor = crate::model::random::mix(seed ^ region << 8 ^ window) | 1;
        let place = (within.wrapping_mul(factor).wrapping_add(factor >> 32)) % EACH;
        place < KINDS[(region % 8) as usize]
    }

    /// How often the intervals of each kind hold the truth, and by how much estimates err together.
    fn coverage(regions: u64, wanted: u64, windows: u64, seeds: u64) -> ([f64; 8], f64) {
        let population = population(regions);
        let (mut inside, mut off) = ([0u64; 8], 0.0);
        for seed in 0..seeds {
            let sample = Sample::choose(population.pages(), wanted, &mut Random(seed));
            let mut seen = Seen::default();
            for (turn, &page) in sample.pages.iter().enumerate() {
                seen.add(population.address(page), is_written(page, turn as u64 % windows, seed));
            }
            let heat = seen.heat(&population, sample.pages.len() as u64, 1, windows);
            assert_eq!((heat.region_bytes, heat.regions.len() as u64), (LEAST_REGION_BYTES, regions));
            for (index, region) in heat.regions.iter().enumerate() {
                let truth = KINDS[index % 8];
                inside[index % 8] += u64::from((region.unique_pages_low..=region.unique_pages_high).contains(&truth));
                off += region.unique_pages as f64 - truth as f64;
            }
        }
        let each = (regions / 8 * seeds) as f64;
        (inside.map(|count| count as f64 / each), off / (each * 8.0))
    }

    #[test]
    fn intervals_of_regions_cover_the_truth_as_often_as_they_say() {
        // 32 pages of a region on average, and more; in one window, and in four in each of which other pages are written.
        for (wanted, windows) in [(128 * 32, 1), (128 * 96, 1), (128 * 32, 4), (128 * 256, 4)] {
            let (of_kinds, off) = coverage(128, wanted, windows, 60);
            let all = of_kinds.iter().sum::<f64>() / 8.0;
            println!("{wanted} pages in {windows} windows: coverage {all:.3}, {of_kinds:.3?}, off by {off:.3}");
            assert!(of_kinds.iter().all(|&part| part >= 0.90) && all >= 0.94, "{wanted} {windows}: {of_kinds:?}");
            assert!(off.abs() < 1.5, "{off} pages a region");
        }
        // Every page in one window leaves no doubt.
        let population = population(8);
        let mut seen = Seen::default();
        (0..population.pages()).for_each(|page| seen.add(population.address(page), is_written(page, 0, 1)));
        for (region, truth) in seen.heat(&population, population.pages(), 1, 1).regions.iter().zip(KINDS) {
            assert_eq!([region.unique_pages_low, region.unique_pages, region.unique_pages_high], [truth; 3]);
        }
    }

    #[test]
    fn regions_grow_until_enough_pages_lie_in_each_and_one_without_any_is_open() {
        let population = Population::new([
            MemoryRange { start: Gpa(0), bytes: 3 << 30 },
            MemoryRange { start: Gpa(4 << 30), bytes: 1 << 40 },
        ]);
        let heat = Seen::default().heat(&population, 16_000, 1, 1);
        let pages: u64 = heat.regions.iter().map(|region| region.pages).sum();
        assert_eq!((heat.region_bytes, pages), (4 << 30, population.pages()));
        let first = heat.regions[0];
        assert_eq!((first.pages, first.unique_pages, first.unique_pages_high), ((3 << 30) / 4096, 0, (3 << 30) / 4096));
        // However little was seen.
        assert!(!Seen::default().heat(&population, 0, 1, 0).regions.is_empty());
    }
}
