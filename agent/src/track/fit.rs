//! Two classes of pages, hot and cold, fitted to a curve: U(t) = Σ W_i·(1 - exp(-λ_i·t)).
//!
//! What a curve of pages that are written independently of one another looks like when they fall in two classes (Che's
//! approximation; most real curves do). Used behind the longest window that was measured: pre-copy's first round takes
//! seconds to minutes, and nobody arms a guest for so long.

use std::ops::RangeInclusive;
use std::time::Duration;

use serde::Serialize;

use crate::model::curve::{MAX_INTERVAL_NS, MAX_POINTS};
use crate::model::{CurvePoint, PageCount, WriteCurve};

/// Rates that are tried first, evenly in their logarithm.
const GRID: usize = 48;
/// The grid's pairs fall in so many bands by their slower rate; the search goes on from the best of each, as the best pair of all may
/// lie in another valley than the best of the grid.
const BANDS: usize = 6;
/// Steps of each search after that.
const STEPS: u32 = 150;
/// A fit whose numbers are further off than this says little.
const GOOD: f64 = 0.1;

/// A fit. The hot class is the one that is written more often; a class without pages is written never.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct TwoClasses {
    /// Hot pages.
    pub hot_pages: f64,
    /// How often each is written, a second.
    pub hot_writes_per_second: f64,
    /// Cold pages.
    pub cold_pages: f64,
    /// How often each is written, a second.
    pub cold_writes_per_second: f64,
    /// How far the curve is from the fit: root of the mean square of the relative differences at the curve's points.
    pub residual: f64,
}

/// The curve's points for the search: seconds, pages, and the weight that makes differences relative.
struct Data {
    points: Vec<(f64, f64, f64)>,
    most_pages: f64,
}

/// Pages of two classes, and what they leave as squares.
#[derive(Clone, Copy)]
struct Found {
    rates: [f64; 2],
    pages: [f64; 2],
    squares: f64,
}

impl TwoClasses {
    /// The best fit of `curve` for a VM of `memory`: neither class has more pages than that, nor less than none.
    ///
    /// For a pair of rates the pages are a problem of least squares with bounds, which two variables let solve outright;
    /// the pairs are searched, first on a grid, then downhill from its best. Always ends, after the same work.
    pub fn fit(curve: &WriteCurve, memory: PageCount) -> Self {
        let points =
            curve.points().iter().filter(|point| point.interval_ns <= curve.measured_until().as_nanos() as u64);
        let points: Vec<(f64, f64, f64)> = points
            .map(|point| (point.interval_ns as f64 / 1e9, point.unique_pages, 1.0 / point.unique_pages.max(1.0)))
            .collect();
        let (Some(first), Some(last)) = (points.first(), points.last()) else { return Self::nothing() };
        // Slower than this is a straight line, faster a step, as far as the points can tell.
        let (slowest, fastest) = ((0.02 / last.0).ln(), (10.0 / first.0).ln());
        let data = Data { most_pages: (memory.0 as f64).max(last.1), points };
        let step = (fastest - slowest) / (GRID - 1) as f64;
        let grid: Vec<Vec<f64>> = (0..GRID).map(|i| data.column((slowest + step * i as f64).exp())).collect();
        let nothing = Found { rates: [slowest; 2], pages: [0.0; 2], squares: f64::INFINITY };
        let mut bands = [nothing; BANDS];
        for hot in 0..GRID {
            for cold in 0..=hot {
                let rates = [hot, cold].map(|i| slowest + step * i as f64);
                data.better(&mut bands[cold * BANDS / GRID], rates, &grid[hot], &grid[cold]);
            }
        }
        let searched = bands.map(|start| data.search(start, step, slowest..=fastest));
        let best = searched.into_iter().min_by(|a, b| a.squares.total_cmp(&b.squares)).unwrap_or(nothing);
        let mut classes = [0, 1].map(|i| {
            let there = best.pages[i] > 0.0;
            (best.pages[i], if there { best.rates[i].exp() } else { 0.0 })
        });
        classes.sort_by(|a, b| b.1.total_cmp(&a.1));
        Self {
            hot_pages: classes[0].0,
            hot_writes_per_second: classes[0].1,
            cold_pages: classes[1].0,
            cold_writes_per_second: classes[1].1,
            residual: (best.squares / data.points.len() as f64).sqrt(),
        }
    }

    /// No pages.
    const fn nothing() -> Self {
        Self { hot_pages: 0.0, hot_writes_per_second: 0.0, cold_pages: 0.0, cold_writes_per_second: 0.0, residual: 0.0 }
    }

    /// Whether the curve is as good as two classes.
    pub fn is_good(&self) -> bool {
        self.residual <= GOOD
    }

    /// U(t) of the two classes.
    pub fn at(&self, interval: Duration) -> f64 {
        self.at_seconds(interval.as_secs_f64())
    }

    fn at_seconds(&self, seconds: f64) -> f64 {
        self.hot_pages * written(self.hot_writes_per_second, seconds)
            + self.cold_pages * written(self.cold_writes_per_second, seconds)
    }

    /// `curve` drawn on until `until`: as far above its last point as the fit grows from there, but nowhere steeper than it ended, and
    /// within `memory`. The band of what is drawn on is all that a concave curve leaves possible: from nothing more to the
    /// last line drawn on; so a bad fit costs the middle, never the band.
    pub fn extend(&self, curve: &WriteCurve, until: Duration, memory: PageCount) -> WriteCurve {
        let last = curve.last();
        let most = (memory.0 as f64).max(last.high_pages);
        let until = u64::try_from(until.as_nanos()).unwrap_or(u64::MAX).min(MAX_INTERVAL_NS);
        let mut further = Vec::new();
        let mut at = last.interval_ns;
        while at < until {
            at = at.saturating_mul(2).min(until);
            further.push(at);
        }
        let mut points = curve.points().to_vec();
        while points.len() + further.len() > MAX_POINTS {
            // Every other, the last among them: lines between points of a concave curve make a concave curve.
            let kept = points.len() % 2;
            points = points.into_iter().skip(1 - kept).step_by(2).collect();
        }
        let from = self.at_seconds(last.interval_ns as f64 / 1e9);
        points.extend(further.into_iter().map(|interval_ns| {
            let line = curve.at_ns(interval_ns as f64);
            // The curve's own guess is half of its last line.
            let steepest = 2.0 * (line.unique_pages - last.unique_pages);
            let grown = (self.at_seconds(interval_ns as f64 / 1e9) - from).clamp(0.0, steepest.max(0.0));
            let high_pages = line.high_pages.min(most);
            let unique_pages = (last.unique_pages + grown).min(high_pages);
            CurvePoint { interval_ns, unique_pages, low_pages: last.low_pages, high_pages }
        }));
        let measured_until_ns = curve.measured_until().as_nanos() as u64;
        let extended = WriteCurve::with_measured_until(points, measured_until_ns);
        extended.unwrap_or_else(|_| curve.clone())
    }
}

impl Data {
    /// What a class with this rate adds to each point, for each of its pages, weighted.
    fn column(&self, rate: f64) -> Vec<f64> {
        self.points.iter().map(|&(seconds, _, weight)| written(rate, seconds) * weight).collect()
    }

    /// The best pair that the downhill simplex finds from `start`, with neighbours at first `step` away, within `range`; all logarithms. It
    /// follows the narrow valleys that two rates make, where steps along one rate alone get stuck (Nelder and Mead, "A simplex
    /// method for function minimization", 1965).
    fn search(&self, start: Found, step: f64, range: RangeInclusive<f64>) -> Found {
        let at = |rates: [f64; 2]| {
            let rates = rates.map(|rate| rate.clamp(*range.start(), *range.end()));
            let mut found = Found { rates, pages: [0.0; 2], squares: f64::INFINITY };
            let [hot, cold] = rates.map(|rate| self.column(rate.exp()));
            self.better(&mut found, rates, &hot, &cold);
            found
        };
        let [hot, cold] = start.rates;
        let mut corners = [start, at([hot - step, cold]), at([hot, cold - step])];
        for _ in 0..STEPS {
            corners.sort_by(|a, b| a.squares.total_cmp(&b.squares));
            let [best, second, worst] = corners;
            // So far from the worst corner on the line through the middle of the others.
            let away = |by: f64| {
                at([0, 1].map(|i| {
                    let middle = f64::midpoint(best.rates[i], second.rates[i]);
                    middle + by * (middle - worst.rates[i])
                }))
            };
            let mirrored = away(1.0);
            let next = if mirrored.squares < best.squares {
                let further = away(2.0);
                if further.squares < mirrored.squares { further } else { mirrored }
            } else if mirrored.squares < second.squares {
                mirrored
            } else {
                away(if mirrored.squares < worst.squares { 0.5 } else { -0.5 })
            };
            if next.squares < worst.squares {
                corners[2] = next;
            } else {
                let halfway = |corner: Found| at([0, 1].map(|i| f64::midpoint(best.rates[i], corner.rates[i])));
                corners = [best, halfway(second), halfway(worst)];
            }
        }
        corners.into_iter().min_by(|a, b| a.squares.total_cmp(&b.squares)).unwrap_or(start)
    }

    /// Takes these rates (logarithms) with their best pages, if they leave less than `best`.
    fn better(&self, best: &mut Found, rates: [f64; 2], hot: &[f64], cold: &[f64]) {
        let (mut aa, mut ab, mut bb, mut ay, mut by, mut yy) = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0);
        for ((&a, &b), &(_, pages, weight)) in hot.iter().zip(cold).zip(&self.points) {
            let y = pages * weight;
            aa += a * a;
            ab += a * b;
            bb += b * b;
            ay += a * y;
            by += b * y;
            yy += y * y;
        }
        let squares = |w: [f64; 2]| {
            yy - 2.0 * (w[0] * ay + w[1] * by) + w[0] * w[0] * aa + 2.0 * w[0] * w[1] * ab + w[1] * w[1] * bb
        };
        let within = |w: f64| if w.is_finite() { w.clamp(0.0, self.most_pages) } else { 0.0 };
        let determinant = aa * bb - ab * ab;
        let inside = [(ay * bb - by * ab) / determinant, (by * aa - ay * ab) / determinant];
        let allowed = 0.0..=self.most_pages;
        let free = determinant > aa * bb * 1e-12 && inside.iter().all(|w| allowed.contains(w));
        // The squares are convex: the least within the bounds is inside them or on one of their four sides.
        let sides = [0.0, self.most_pages]
            .into_iter()
            .flat_map(|w| [[w, within((by - w * ab) / bb)], [within((ay - w * ab) / aa), w]]);
        for pages in free.then_some(inside).into_iter().chain(sides) {
            let squares = squares(pages).max(0.0);
            if squares < best.squares {
                *best = Found { rates, pages, squares };
            }
        }
    }
}

/// The part of a class of pages that is written at least once in `seconds`.
fn written(rate: f64, seconds: f64) -> f64 {
    -(-rate * seconds).exp_m1()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::model::curve::tests::curve_of;

    const MS: [f64; 5] = [5.0, 20.0, 80.0, 320.0, 1280.0];
    const MEMORY: PageCount = PageCount(4 << 20);

    proptest! {
        /// Two classes that the window can tell apart are found again.
        #[test]
        fn two_classes_are_found_again(
            hot in 1e3..1e5f64, hot_rate in 20.0..200.0f64, cold in 1e4..1e6f64, cold_rate in 0.3..1.5f64,
        ) {
            let curve = curve_of(&[(hot, hot_rate), (cold, cold_rate)], &MS);
            let fit = TwoClasses::fit(&curve, MEMORY);
            prop_assert!(fit.residual < 0.01, "{fit:?}");
            // Drawn on, it goes where the truth goes.
            let after = fit.extend(&curve, Duration::from_secs(20), MEMORY).at(Duration::from_secs(5)).unique_pages;
            let truth = hot * written(hot_rate, 5.0) + cold * written(cold_rate, 5.0);
            prop_assert!((after / truth - 1.0).abs() < 0.15, "{after} {truth} {fit:?}");
            for ms in [10u64, 100, 1000, 5000] {
                let seconds = ms as f64 / 1e3;
                let truth = hot * written(hot_rate, seconds) + cold * written(cold_rate, seconds);
                let read = fit.at(Duration::from_millis(ms));
                prop_assert!((read / truth - 1.0).abs() < 0.15, "{ms} ms: {read} {truth} {fit:?}");
            }
        }

        /// Whatever the curve, a fit ends within its bounds, and what is drawn on is a curve with its band.
        #[test]
        fn any_curve_is_drawn_on(
            steps in prop::collection::vec((1..10_000_000_000u64, 0.0..1e5f64, 0.0..10.0f64), 1..256), until in 1..200_000_000_000u64,
        ) {
            let mut at = 0;
            let points = steps.into_iter().map(|(step, pages, band)| {
                at += step;
                CurvePoint { interval_ns: at, unique_pages: pages, low_pages: pages / (1.0 + band), high_pages: pages * (1.0 + band) }
            });
            let curve = WriteCurve::from_measured(points.collect()).unwrap();
            let fit = TwoClasses::fit(&curve, MEMORY);
            prop_assert!(fit.hot_pages >= 0.0 && fit.cold_pages >= 0.0 && fit.hot_pages.max(fit.cold_pages) <= MEMORY.0 as f64);
            prop_assert!(fit.residual.is_finite() && fit.hot_writes_per_second >= fit.cold_writes_per_second);
            let until = Duration::from_nanos(curve.last().interval_ns + until);
            let longer = fit.extend(&curve, until, MEMORY);
            prop_assert_eq!(longer.last().interval_ns, until.as_nanos() as u64);
            prop_assert_eq!(longer.measured_until(), curve.measured_until());
            prop_assert!(longer.last().high_pages <= MEMORY.0 as f64);
            prop_assert!(longer.at(until).extrapolated);
        }
    }

    #[test]
    fn one_class_and_none_are_found_too() {
        let one = TwoClasses::fit(&curve_of(&[(5000.0, 30.0)], &MS), MEMORY);
        assert!((one.hot_pages + one.cold_pages - 5000.0).abs() < 50.0 && one.is_good(), "{one:?}");
        let none = TwoClasses::fit(&curve_of(&[], &MS), MEMORY);
        assert!(none.at(Duration::from_secs(9)) < 1.0 && none.is_good());
    }

    #[test]
    fn a_window_that_ends_too_soon_leaves_the_band_and_not_a_guess_alone() {
        // The cold class has hardly begun: its size cannot be known.
        let curve = curve_of(&[(2000.0, 100.0), (1e6, 0.05)], &MS);
        let fit = TwoClasses::fit(&curve, MEMORY);
        let longer = fit.extend(&curve, Duration::from_secs(60), MEMORY);
        let (truth, end) = (2000.0 + 1e6 * written(0.05, 60.0), longer.last());
        assert!(end.low_pages <= truth && truth <= end.high_pages, "{end:?} {truth}");
        assert!(end.high_pages > 1.2 * end.unique_pages || end.unique_pages > 0.8 * truth);
    }

    #[test]
    fn the_check_of_the_literature_is_met() {
        // Peter Xu's run: 20 GiB written at 800 MB/s, as one class.
        let pages = f64::from(20 << 18);
        let rate = 800e6 / 4096.0 / pages;
        let curve = curve_of(&[(pages, rate)], &MS);
        let fit = TwoClasses::fit(&curve, PageCount(24 << 18));
        let after = fit.at(Duration::from_secs(20));
        let truth = pages * written(rate, 20.0);
        assert!((after / truth - 1.0).abs() < 0.25, "{after} {truth} {fit:?}");
    }
}
