//! From what a sample showed to an estimate with its 95 % interval. Pure.
//!
//! The share is the stratified estimate. Its interval is Wilson's (JASA 22, 1927) with the finite population correction, by the number of
//! pages that a simple random sample would need for the same variance: fewer than were sampled where windows differ from one another by
//! more than chance, more where strata do.

use super::choose::LEAST_IN_STRATUM;

/// The quantile of the normal distribution that leaves 2.5 % above it.
const Z: f64 = 1.959_963_985;
/// The one that leaves 0.5 %: how sure one must be that windows differ.
const Z_DIFFER: f64 = 2.575_829_304;
/// How much narrower than a simple random sample's the interval may become by stratification: a stratum that shows no variance has some.
const LEAST_VARIANCE_RATIO: f64 = 0.25;
/// Changed, and unchanged, pages that a window must be expected to show for the comparison of windows.
const LEAST_IN_CELL: f64 = 5.0;
/// Windows to compare: fewer tell nothing of their spread.
const LEAST_CELLS: usize = 4;

/// How many were looked at, and how many of them had what is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Count {
    pub(super) sampled: u64,
    pub(super) hits: u64,
}

impl Count {
    /// Adds one page.
    pub(super) fn add(&mut self, hit: bool) {
        self.sampled += 1;
        self.hits += u64::from(hit);
    }

    /// Adds as many pages as another holds.
    pub(super) fn add_all(&mut self, other: Self) {
        self.sampled += other.sampled;
        self.hits += other.hits;
    }

    fn share(self) -> f64 {
        self.hits as f64 / self.sampled as f64
    }
}

/// A sample's outcome: by stratum, each with its size in pages, and by window in the order of time (one for each group of pages).
///
/// The pages that were written differ from window to window, so that only a sample that was taken in one window approaches a census of it.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    pub(super) strata: Vec<(u64, Count)>,
    pub(super) windows: Vec<Count>,
}

/// A share in `[0, 1]` with its interval.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Share {
    /// The estimate.
    pub(super) middle: f64,
    pub(super) low: f64,
    pub(super) high: f64,
    /// Its variance, in parts of a simple random sample's of the same size; above 1 if windows differed from one another.
    pub(super) variance_ratio: f64,
}

impl Tally {
    /// All strata together.
    pub(super) fn total(&self) -> Count {
        let of = |field: fn(&Count) -> u64| self.strata.iter().map(|(_, count)| field(count)).sum();
        Count { sampled: of(|count| count.sampled), hits: of(|count| count.hits) }
    }

    /// The estimate for a population of `pages`; none if nothing was sampled.
    pub(super) fn share(&self, pages: u64) -> Option<Share> {
        let total = self.total();
        if total.sampled == 0 {
            return None;
        }
        // Strata in which nothing could be read have no say.
        let seen = || self.strata.iter().filter(|(_, count)| count.sampled > 0);
        let weights: f64 = seen().map(|(pages, _)| *pages as f64).sum();
        let share: f64 = seen().map(|(pages, count)| *pages as f64 / weights * count.share()).sum();
        let share = share.clamp(0.0, 1.0);
        let sampled = total.sampled as f64;
        if let Some((ratio, freedom)) = self.spread_of_windows() {
            // Windows that were not looked at are as far apart as those that were: reading every page does not help.
            let quantile = student(freedom);
            let (low, high) = wilson(share, sampled / ratio, quantile * quantile);
            return Some(Share { middle: share, low, high, variance_ratio: ratio });
        }
        let ratio = self.gain_of_strata(share, weights);
        // Each window has a sample of its own from what was written in it: only its own size is taken off the population. And where different
        // windows show different pages (a writer moves on), the samples, which have no page in common, err to the same side: that much is added.
        let a_window = self.windows.iter().map(|count| (count.sampled as f64).powi(2)).sum::<f64>() / sampled;
        let less = share.min(1.0 - share);
        let together = (sampled - a_window).max(0.0) * less / (1.0 - less);
        let left = ((pages as f64 - a_window).max(0.0) + together) / (pages.max(2) - 1) as f64;
        let (low, high) = wilson(share, sampled / ratio, Z * Z * left);
        Some(Share { middle: share, low, high, variance_ratio: ratio })
    }

    /// The variance of the stratified estimate in parts of a simple random sample's.
    fn gain_of_strata(&self, share: f64, weights: f64) -> f64 {
        let seen = self.strata.iter().filter(|(_, count)| count.sampled > 0);
        let (mut variance, mut sampled) = (0.0, 0.0);
        for (pages, count) in seen {
            if count.sampled < LEAST_IN_STRATUM / 2 {
                return 1.0;
            }
            let (weight, n, own) = (*pages as f64 / weights, count.sampled as f64, count.share());
            variance += weight * weight * own * (1.0 - own) / (n - 1.0);
            sampled += n;
        }
        let simple = share * (1.0 - share) / (sampled - 1.0);
        if simple > 0.0 { (variance / simple).clamp(LEAST_VARIANCE_RATIO, 1.0) } else { 1.0 }
    }

    /// By how much the windows' variance exceeds chance, and its degrees of freedom; none if it does not for sure (a chi-square test of
    /// homogeneity at 0.5 %).
    fn spread_of_windows(&self) -> Option<(f64, f64)> {
        let all = self.windows.iter().fold(Count::default(), |sum, count| Count {
            sampled: sum.sampled + count.sampled,
            hits: sum.hits + count.hits,
        });
        if all.hits == 0 || all.hits == all.sampled {
            return None;
        }
        let share = all.share();
        let needed = LEAST_IN_CELL / share.min(1.0 - share);
        // Neighbours in time are put together until each shows enough.
        let mut cells: Vec<Count> = Vec::new();
        let mut open = Count::default();
        for count in &self.windows {
            open = Count { sampled: open.sampled + count.sampled, hits: open.hits + count.hits };
            if open.sampled as f64 >= needed {
                cells.push(std::mem::take(&mut open));
            }
        }
        if let Some(last) = cells.last_mut() {
            *last = Count { sampled: last.sampled + open.sampled, hits: last.hits + open.hits };
        }
        if cells.len() < LEAST_CELLS {
            return None;
        }
        let off = |cell: &Count| {
            let expected = cell.sampled as f64 * share;
            (cell.hits as f64 - expected).powi(2) / (expected * (1.0 - share))
        };
        let (sum, freedom) = (cells.iter().map(off).sum::<f64>(), cells.len() as f64 - 1.0);
        // Wilson and Hilferty's approximation of the quantile of chi-square (PNAS 17, 1931).
        let ninth = 2.0 / (9.0 * freedom);
        let limit = freedom * (1.0 - ninth + Z_DIFFER * ninth.sqrt()).powi(3);
        (sum > limit).then_some((sum / freedom, freedom))
    }
}

/// The share of a region of `pages` pages that was written, with its interval, low and high; none if nothing was sampled. Of one window a sample
/// approaches a census; of several it tells of their mean, and pages that were looked at in one of them are not known in the others. The
/// sample is a simple random one there: strata are larger, and windows whose shares differ only make it more even.
pub(super) fn of_region(count: Count, pages: u64, one_window: bool) -> Option<(f64, f64, f64)> {
    if count.sampled == 0 {
        return None;
    }
    let left = if one_window { pages.saturating_sub(count.sampled) as f64 / (pages.max(2) - 1) as f64 } else { 1.0 };
    let share = count.share();
    let (low, high) = wilson(share, count.sampled as f64, Z * Z * left);
    Some((share, low, high))
}

/// Wilson's interval of a share seen in `n` pages; `z2` is the square of the quantile, corrected for the population. Of no width for 0.
fn wilson(share: f64, n: f64, z2: f64) -> (f64, f64) {
    let middle = share + z2 / (2.0 * n);
    let half = (z2 * (share * (1.0 - share) / n + z2 / (4.0 * n * n))).sqrt();
    let scale = 1.0 + z2 / n;
    (((middle - half) / scale).clamp(0.0, share), ((middle + half) / scale).clamp(share, 1.0))
}

/// The quantile of Student's distribution that leaves 2.5 % above it, for 3 degrees of freedom and more to within 4 % (Cornish and
/// Fisher's expansion; Abramowitz and Stegun 26.7.5).
fn student(freedom: f64) -> f64 {
    let first = (Z.powi(3) + Z) / 4.0;
    let second = (5.0 * Z.powi(5) + 16.0 * Z.powi(3) + 3.0 * Z) / 96.0;
    Z + first / freedom + second / (freedom * freedom)
}

/// The mean of `values` with its 95 % interval; none for fewer than two.
pub(super) fn mean(values: &[f64]) -> Option<(f64, f64, f64)> {
    if values.len() < 2 {
        return None;
    }
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
    let half = student(n - 1.0) * (variance / n).sqrt();
    Some((mean, mean - half, mean + half))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(sampled: u64, hits: u64, pages: u64) -> Share {
        let count = Count { sampled, hits };
        Tally { strata: vec![(pages, count)], windows: vec![count] }.share(pages).unwrap()
    }

    fn close(left: f64, right: f64) -> bool {
        (left - right).abs() < 5e-4
    }

    #[test]
    fn intervals_are_those_of_the_textbook() {
        // Newcombe, Statistics in Medicine 17 (1998), table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
        for (n, hits, low, high) in
            [(263, 81, 0.2553, 0.3662), (148, 15, 0.0624, 0.1605), (20, 0, 0.0, 0.1611), (29, 1, 0.0061, 0.1718)]
        {
            let share = of(n, hits, 1 << 40);
            assert!(close(share.low, low) && close(share.high, high), "{hits} of {n}: {share:?}");
        }
        assert!(close(of(29, 29, 1 << 40).high, 1.0));
    }

    #[test]
    fn reading_every_page_leaves_no_doubt_and_half_of_them_less() {
        let all = of(263, 81, 263);
        assert!(all.low >= all.middle && all.high <= all.middle);
        let (half, few) = (of(263, 81, 526), of(263, 81, 1 << 40));
        assert!((half.high - half.low) / (few.high - few.low) < 0.72);
        // In two windows, half of it in each.
        let count = Count { sampled: 131, hits: 40 };
        let two = Tally { strata: vec![(262, Count { sampled: 262, hits: 80 })], windows: vec![count; 2] };
        let two = two.share(262).unwrap();
        let of_few = (two.high - two.low) / (few.high - few.low);
        assert!((0.8..0.9).contains(&of_few), "{two:?} {few:?}");
        assert!(Tally::default().share(0).is_none());
        assert!(close(of(1, 1, 1).low, 1.0));
    }

    #[test]
    fn windows_that_differ_widen_the_interval_and_those_that_do_not_leave_it() {
        let windows = |hits: [u64; 8]| {
            let windows: Vec<Count> = hits.into_iter().map(|hits| Count { sampled: 1000, hits }).collect();
            let hits = windows.iter().map(|window| window.hits).sum();
            Tally { strata: vec![(1 << 40, Count { sampled: 8000, hits })], windows }.share(1 << 40).unwrap()
        };
        let (even, uneven) = (windows([98, 105, 94, 103, 99, 108, 92, 101]), windows([0, 200, 0, 200, 0, 200, 0, 200]));
        assert!(close(even.variance_ratio, 1.0) && uneven.variance_ratio > 100.0, "{even:?} {uneven:?}");
        assert!(close(even.middle, uneven.middle) && uneven.low < 0.05 && uneven.high > 0.18, "{uneven:?}");
    }

    #[test]
    fn strata_that_differ_narrow_the_interval() {
        let strata = |hits: [u64; 4]| {
            let strata = hits.map(|hits| (1 << 38, Count { sampled: 500, hits })).to_vec();
            Tally { strata, windows: Vec::new() }.share(1 << 40).unwrap()
        };
        let (even, uneven) = (strata([125; 4]), strata([450, 30, 10, 10]));
        assert!(close(even.middle, uneven.middle));
        assert!(uneven.high - uneven.low < 0.7 * (even.high - even.low), "{even:?} {uneven:?}");
        // What shows no variance at all is still not believed to have none.
        let sure = strata([500, 0, 0, 0]);
        assert!(sure.high - sure.low > 0.45 * (even.high - even.low), "{sure:?}");
    }

    #[test]
    fn quantiles_and_means() {
        assert!((student(3.0) / 3.182 - 1.0).abs() < 0.04 && (student(10.0) / 2.228 - 1.0).abs() < 0.005);
        let (mean, low, high) = super::mean(&[1.0, 2.0, 3.0, 4.0, 5.0]).unwrap();
        assert!(close(mean, 3.0) && (high - low - 2.0 * 2.776 / 2.0_f64.sqrt()).abs() < 0.08);
        assert!(super::mean(&[1.0]).is_none());
    }
}
