//! One curve from those of several windows. Pure.

use crate::model::{CurvePoint, WriteCurve};

/// The shortest interval of the common grid, in nanoseconds.
const FIRST_NS: f64 = 100_000.0;
/// Points of the grid.
const POINTS: usize = 48;
/// Standard errors that a 95 % interval reaches to each side.
const Z: f64 = 1.96;

/// What of a VM the windows' counts stand on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Basis {
    /// Pages that each counted one stands for.
    pub(super) every: u64,
    /// Pages that could have been written.
    pub(super) population: u64,
}

/// The mean of the windows' curves. Its band is the mean of theirs, wider by chance: by how much windows differ, and at least by how much they
/// would if pages were written independently of one another, and by the part of the pages that stands for all.
pub(super) fn average(curves: &[WriteCurve], basis: Basis) -> Option<WriteCurve> {
    let last = curves.iter().map(|curve| curve.last().interval_ns).min()? as f64;
    let grid: Vec<f64> = if let [only] = curves {
        only.points().iter().map(|point| point.interval_ns as f64).collect()
    } else {
        let first = FIRST_NS.min(last / 2.0);
        (0..POINTS).map(|index| first * (last / first).powf(index as f64 / (POINTS - 1) as f64)).collect()
    };
    let count = curves.len() as f64;
    let points = grid.into_iter().map(|at| {
        let all: Vec<_> = curves.iter().map(|curve| curve.at_ns(at)).collect();
        let mean = |of: fn(&crate::model::Estimate) -> f64| all.iter().map(of).sum::<f64>() / count;
        let unique = mean(|e| e.unique_pages);
        let squares = all.iter().map(|e| (e.unique_pages - unique).powi(2)).sum::<f64>();
        let spread = if count > 1.0 { Z * (squares / (count - 1.0) / count).sqrt() } else { 0.0 };
        let (least, most) = basis.chance(unique, count);
        CurvePoint {
            interval_ns: at as u64,
            unique_pages: unique,
            low_pages: (mean(|e| e.low_pages) - spread.max(unique - least)).max(0.0),
            high_pages: mean(|e| e.high_pages) + spread.max(most - unique),
        }
    });
    WriteCurve::from_measured(points.collect()).ok()
}

impl Basis {
    /// Between which true means `pages`, the mean of `windows` windows, may come about by chance.
    ///
    /// A window's count of pages that are written independently of one another is a sum of rare events: its variance is at most its mean, and at
    /// most what the pages that were not written leave (that of a binomial number). The interval is the score interval for such a count (Rao 1948;
    /// for proportions Wilson, JASA 22, 1927), which for no page at all reaches to 3.8 of them.
    fn chance(self, pages: f64, windows: f64) -> (f64, f64) {
        let scale = self.every as f64 / windows;
        let counted = pages / scale;
        let left = (1.0 - pages / self.population.max(1) as f64).clamp(0.0, 1.0);
        let z2 = Z * Z * left;
        let (middle, half) = (counted + z2 / 2.0, (z2 * (counted + z2 / 4.0)).sqrt());
        ((middle - half) * scale, (middle + half) * scale)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(pages_per_ms: f64) -> WriteCurve {
        let points = [1u64, 10, 100].map(|ms| CurvePoint::exact(ms * 1_000_000, ms as f64 * pages_per_ms));
        WriteCurve::new(points.to_vec()).unwrap()
    }

    const ALL: Basis = Basis { every: 1, population: 1 << 40 };

    #[test]
    fn windows_that_agree_have_the_band_of_chance_and_those_that_differ_more_a_wider_one() {
        let last = average(&[line(10.0), line(10.0)], ALL).unwrap().last();
        // 2000 pages in all, whose standard deviation is 45.
        assert!(
            (last.unique_pages - 1000.0).abs() < 1.0 && (last.high_pages - last.low_pages - 87.7).abs() < 1.0,
            "{last:?}"
        );
        let differing = average(&[line(10.0), line(20.0), line(30.0)], ALL).unwrap().last();
        assert!((differing.unique_pages - 2000.0).abs() < 2.0);
        assert!(differing.low_pages < 1000.0 && differing.high_pages > 3000.0, "{differing:?}");
        assert!(average(&[], ALL).is_none());
    }

    #[test]
    fn a_part_of_the_pages_says_less_and_all_pages_of_a_vm_say_all() {
        let band = |basis: Basis| {
            let last = average(&[line(10.0)], basis).unwrap().last();
            (last.low_pages.round(), last.high_pages.round())
        };
        assert_eq!(band(ALL), (940.0, 1064.0));
        // 62.5 of them were counted.
        assert_eq!(band(Basis { every: 16, ..ALL }), (781.0, 1281.0));
        assert_eq!(band(Basis { every: 16, population: 1000 }), (1000.0, 1000.0));
        let (least, most) = Basis { every: 64, ..ALL }.chance(0.0, 2.0);
        assert!(least.abs() < 1e-9 && (most - 32.0 * 3.84).abs() < 1.0, "{most}");
    }
}
