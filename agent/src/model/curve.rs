//! The writable working set curve U(t): how many different pages are written in an interval of length t.
//!
//! Owns the curve's form, what makes it one, and how it is read between and behind its points. Must not know how a curve
//! was measured nor what follows from it. U is concave, rises, and starts at zero: a page counts once, so the longer an
//! interval the more of its writes hit pages that were counted before (`U(t) = Σ_p 1 - exp(-λ_p·t)` for pages that are
//! written independently of one another).

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::shape::MAX_MEMORY_BYTES;
use super::units::PAGE_SIZE;

/// The most points that a curve may have.
pub const MAX_POINTS: usize = 256;
/// The longest interval, in nanoseconds: a day.
pub const MAX_INTERVAL_NS: u64 = 86_400_000_000_000;
/// The intervals that a curve is shown at, in milliseconds, four times as long each.
pub const SHOWN_MS: [u64; 5] = [5, 20, 80, 320, 1280];

const MAX_PAGES: f64 = (MAX_MEMORY_BYTES / PAGE_SIZE as u64) as f64;
/// How far rounding may carry a slope above the one before it, relative to it.
const ROUNDING: f64 = 1e-6;

/// One point. Where the number is exact, the band's edges equal it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct CurvePoint {
    /// The interval's length, above zero.
    pub interval_ns: u64,
    /// Different pages (4 KiB) written in it.
    pub unique_pages: f64,
    /// The lower edge of the 95 % band, in pages.
    pub low_pages: f64,
    /// The upper edge, in pages.
    pub high_pages: f64,
}

/// A curve: at least one point; all three numbers rise and are concave from (0, 0) on.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Parts")]
pub struct WriteCurve {
    /// The longest interval that was measured, in nanoseconds: points behind it were extrapolated.
    measured_until_ns: u64,
    points: Vec<CurvePoint>,
}

/// A curve as it was written, unchecked.
#[derive(Deserialize)]
struct Parts {
    measured_until_ns: u64,
    points: Vec<CurvePoint>,
}

/// The curve's value somewhere.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Different pages written.
    pub unique_pages: f64,
    /// Lower edge of the band.
    pub low_pages: f64,
    /// Upper edge.
    pub high_pages: f64,
    /// Whether the interval is longer than any that was measured.
    pub extrapolated: bool,
}

/// U(t)/t: the rate of unique pages over an interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct UniqueRate {
    /// Unique pages per second.
    pub pages_per_second: f64,
    /// Lower edge of the band.
    pub low_pages_per_second: f64,
    /// Upper edge.
    pub high_pages_per_second: f64,
    /// Whether the interval is longer than any that was measured.
    pub extrapolated: bool,
}

/// Why points are no curve.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CurveError {
    /// None.
    #[error("a curve needs a point; measure at least one interval")]
    Empty,
    /// More than [`MAX_POINTS`].
    #[error("{0} points are more than {MAX_POINTS}; give fewer intervals")]
    TooMany(usize),
    /// An interval of zero, too long, or not longer than the one before.
    #[error("the interval of {0} ns is not longer than the one before it and at most {MAX_INTERVAL_NS} ns; sort them")]
    Interval(u64),
    /// Not a number, negative, more than any VM has, or a band that does not hold its middle.
    #[error("at {0} ns the pages are no band `0 <= low <= unique <= high` within {MAX_MEMORY_BYTES} bytes")]
    Pages(u64),
    /// Falls, or bends upward.
    #[error("at {0} ns the curve falls or bends upward, which no count of unique pages does over longer intervals")]
    Shape(u64),
}

/// Which of a point's three numbers.
type Edge = fn(&CurvePoint) -> f64;
const EDGES: [Edge; 3] = [|p| p.unique_pages, |p| p.low_pages, |p| p.high_pages];

impl CurvePoint {
    /// A point with an exact number.
    pub const fn exact(interval_ns: u64, pages: f64) -> Self {
        Self { interval_ns, unique_pages: pages, low_pages: pages, high_pages: pages }
    }

    fn at(&self) -> f64 {
        self.interval_ns as f64
    }
}

impl WriteCurve {
    /// The curve through `points`, all of them measured.
    ///
    /// # Errors
    /// They are no curve: see [`CurveError`]. [`WriteCurve::from_measured`] makes one of counts that are noisy.
    pub fn new(points: Vec<CurvePoint>) -> Result<Self, CurveError> {
        let measured_until_ns = points.last().map_or(0, |point| point.interval_ns);
        Self::with_measured_until(points, measured_until_ns)
    }

    /// The curve through `points`, of which those behind `measured_until_ns` were extrapolated.
    ///
    /// # Errors
    /// As [`WriteCurve::new`].
    pub fn with_measured_until(points: Vec<CurvePoint>, measured_until_ns: u64) -> Result<Self, CurveError> {
        check_points(&points)?;
        for edge in EDGES {
            let mut before = (0.0, 0.0, f64::INFINITY);
            for point in &points {
                let (at, pages) = (point.at(), edge(point));
                let slope = (pages - before.1) / (at - before.0);
                // A page is the least that there is to see, so a bend below a thousandth of one is rounding.
                let allowed = before.2 * (1.0 + ROUNDING) + 1e-3 / (at - before.0);
                if pages < before.1 || slope > allowed {
                    return Err(CurveError::Shape(point.interval_ns));
                }
                before = (at, pages, slope.min(before.2));
            }
        }
        Ok(Self { measured_until_ns: measured_until_ns.min(MAX_INTERVAL_NS), points })
    }

    /// The least concave curve that is nowhere below the counts: what noise, or a burst in the midst of a window, bent upward is
    /// drawn straight. For first-write times that grow rarer it is the most likely curve (Grenander, "On the theory of
    /// mortality measurement", 1956).
    ///
    /// # Errors
    /// As [`WriteCurve::new`], but for the shape.
    pub fn from_measured(mut points: Vec<CurvePoint>) -> Result<Self, CurveError> {
        check_points(&points)?;
        let hulls = EDGES.map(|edge| hull(&points, edge));
        for (index, point) in points.iter_mut().enumerate() {
            let [unique, low, high] = [hulls[0][index], hulls[1][index], hulls[2][index]];
            // The hulls of an ordered band are ordered, but for rounding.
            (point.unique_pages, point.low_pages, point.high_pages) = (unique, low.min(unique), high.max(unique));
        }
        let measured_until_ns = points.last().map_or(0, |point| point.interval_ns);
        Ok(Self { measured_until_ns, points })
    }

    /// The points, by interval.
    pub fn points(&self) -> &[CurvePoint] {
        &self.points
    }

    /// The longest interval that was measured.
    pub const fn measured_until(&self) -> Duration {
        Duration::from_nanos(self.measured_until_ns)
    }

    /// The last point: the longest interval that the curve has.
    pub fn last(&self) -> CurvePoint {
        self.points.last().copied().unwrap_or(CurvePoint::exact(1, 0.0))
    }

    /// U(t).
    ///
    /// Between two points the value is on the straight line between them, which keeps it concave; as the true curve may bulge
    /// above that line, the upper edge is what concavity allows there: the neighbouring lines, drawn on. Behind the last
    /// point the truth lies between "nothing more" (lower edge) and the last line drawn on (upper edge); the value is the middle.
    pub fn at(&self, interval: Duration) -> Estimate {
        self.at_ns(interval.as_nanos() as f64)
    }

    /// U(t) over t; at t = 0, and for a t shorter than a nanosecond, what it is there.
    pub fn rate_over(&self, interval: Duration) -> UniqueRate {
        self.rate_over_ns(interval.as_nanos() as f64)
    }

    /// [`WriteCurve::at`] in nanoseconds, which need not be whole.
    pub fn at_ns(&self, at: f64) -> Estimate {
        let at = if at.is_finite() { at.clamp(0.0, MAX_INTERVAL_NS as f64) } else { MAX_INTERVAL_NS as f64 };
        let extrapolated = at > self.measured_until_ns as f64;
        let behind = self.points.partition_point(|point| point.at() < at);
        let [unique, low, high] = EDGES.map(|edge| self.line(behind, at, edge));
        if behind == self.points.len() {
            let last = self.last();
            // The upper edge may flatten where the middle still rises: it stays the bound.
            let most = high.min(MAX_PAGES);
            return Estimate {
                unique_pages: last.unique_pages.midpoint(unique).min(most),
                low_pages: last.low_pages,
                high_pages: most,
                extrapolated,
            };
        }
        let bulge = self.bulge(behind, at).max(high);
        Estimate { unique_pages: unique, low_pages: low, high_pages: bulge, extrapolated }
    }

    /// [`WriteCurve::rate_over`] in nanoseconds.
    pub fn rate_over_ns(&self, at: f64) -> UniqueRate {
        let at = at.max(1.0);
        let Estimate { unique_pages, low_pages, high_pages, extrapolated } = self.at_ns(at);
        let [pages_per_second, low_pages_per_second, high_pages_per_second] =
            [unique_pages, low_pages, high_pages].map(|pages| pages / at * 1e9);
        UniqueRate { pages_per_second, low_pages_per_second, high_pages_per_second, extrapolated }
    }

    /// The same curve at other intervals, which are sorted and, as far as they are none or beyond the last point, left out; the last
    /// point is kept.
    pub fn at_intervals(&self, intervals: &[Duration]) -> Self {
        let end = self.last().interval_ns;
        let mut all: Vec<u64> = intervals.iter().map(|interval| interval.as_nanos() as u64).collect();
        all.retain(|&interval| interval > 0 && interval < end);
        all.push(end);
        self.through(all)
    }

    /// The same curve at [`SHOWN_MS`] and at its last point.
    pub fn shown(&self) -> Self {
        self.at_intervals(&SHOWN_MS.map(Duration::from_millis))
    }

    /// The sum of the curves of writers, as far as all of them go; none if there are none. A page that two of them write counts
    /// twice, so it is an upper bound for what they write together. The edges add up too, as if all erred alike.
    pub fn sum<'a>(curves: impl IntoIterator<Item = &'a Self>) -> Option<Self> {
        let curves: Vec<&Self> = curves.into_iter().collect();
        let end = curves.iter().map(|curve| curve.last().interval_ns).min()?;
        let mut all: Vec<u64> =
            curves.iter().flat_map(|curve| &curve.points).map(|p| p.interval_ns).filter(|&at| at < end).collect();
        all.push(end);
        let points = thinned(all)
            .into_iter()
            .map(|interval_ns| {
                let mut sum = CurvePoint::exact(interval_ns, 0.0);
                for curve in &curves {
                    let here = curve.at_ns(interval_ns as f64);
                    sum.unique_pages = (sum.unique_pages + here.unique_pages).min(MAX_PAGES);
                    sum.low_pages = (sum.low_pages + here.low_pages).min(MAX_PAGES);
                    sum.high_pages = (sum.high_pages + here.high_pages).min(MAX_PAGES);
                }
                sum
            })
            .collect();
        let measured_until_ns = curves.iter().map(|curve| curve.measured_until_ns).min()?;
        Self::from_measured(points).ok().map(|sum| Self { measured_until_ns, ..sum })
    }

    /// The curve through its values at `intervals`.
    fn through(&self, intervals: Vec<u64>) -> Self {
        let points = thinned(intervals)
            .into_iter()
            .map(|interval_ns| {
                let Estimate { unique_pages, low_pages, high_pages, .. } = self.at_ns(interval_ns as f64);
                CurvePoint { interval_ns, unique_pages, low_pages, high_pages }
            })
            .collect();
        Self::from_measured(points)
            .map_or_else(|_| self.clone(), |curve| Self { measured_until_ns: self.measured_until_ns, ..curve })
    }

    /// The straight line into point `behind` from the one before it, at `at`; behind the last point, the last line drawn on.
    fn line(&self, behind: usize, at: f64, edge: Edge) -> f64 {
        let second = behind.min(self.points.len() - 1);
        let (from, from_pages) = self.before(second, edge);
        let (to, to_pages) = (self.points[second].at(), edge(&self.points[second]));
        from_pages + (to_pages - from_pages) * (at - from) / (to - from)
    }

    /// The highest that a concave curve through the upper edge's points can be at `at`, before point `behind`.
    fn bulge(&self, behind: usize, at: f64) -> f64 {
        let high: Edge = EDGES[2];
        let mut most = high(&self.points[behind]);
        if behind > 0 {
            most = most.min(self.line(behind - 1, at, high));
        }
        if behind + 1 < self.points.len() {
            most = most.min(self.line(behind + 1, at, high));
        }
        most
    }

    /// The place and pages of the point before `index`; the origin before the first.
    fn before(&self, index: usize, edge: Edge) -> (f64, f64) {
        index.checked_sub(1).map_or((0.0, 0.0), |before| (self.points[before].at(), edge(&self.points[before])))
    }
}

impl TryFrom<Parts> for WriteCurve {
    type Error = CurveError;

    fn try_from(parts: Parts) -> Result<Self, CurveError> {
        Self::with_measured_until(parts.points, parts.measured_until_ns)
    }
}

/// Everything but the shape.
fn check_points(points: &[CurvePoint]) -> Result<(), CurveError> {
    if points.is_empty() {
        return Err(CurveError::Empty);
    }
    if points.len() > MAX_POINTS {
        return Err(CurveError::TooMany(points.len()));
    }
    let mut before = 0;
    for point in points {
        if point.interval_ns <= before || point.interval_ns > MAX_INTERVAL_NS {
            return Err(CurveError::Interval(point.interval_ns));
        }
        before = point.interval_ns;
        // Comparisons with what is no number are false.
        let ordered = 0.0 <= point.low_pages
            && point.low_pages <= point.unique_pages
            && point.unique_pages <= point.high_pages
            && point.high_pages <= MAX_PAGES;
        if !ordered {
            return Err(CurveError::Pages(point.interval_ns));
        }
    }
    Ok(())
}

/// At each point, the least curve from (0, 0) that rises, is concave and is nowhere below `edge`.
fn hull(points: &[CurvePoint], edge: Edge) -> Vec<f64> {
    // The corners, by Andrew's monotone chain; the number that falls is lifted to the highest before it first.
    let mut corners: Vec<(f64, f64)> = vec![(0.0, 0.0)];
    let mut highest: f64 = 0.0;
    for point in points {
        highest = highest.max(edge(point));
        let next = (point.at(), highest);
        while let [.., a, b] = corners[..]
            && (b.1 - a.1) * (next.0 - a.0) <= (next.1 - a.1) * (b.0 - a.0)
        {
            corners.pop();
        }
        corners.push(next);
    }
    let mut right = 1;
    points
        .iter()
        .map(|point| {
            while corners[right].0 < point.at() {
                right += 1;
            }
            let ((x0, y0), (x1, y1)) = (corners[right - 1], corners[right]);
            // The corner itself without rounding.
            if point.at() < x1 { y0 + (y1 - y0) * (point.at() - x0) / (x1 - x0) } else { y1 }
        })
        .collect()
}

/// At most [`MAX_POINTS`] of `intervals`, sorted, each once, the last among them.
fn thinned(mut intervals: Vec<u64>) -> Vec<u64> {
    intervals.sort_unstable();
    intervals.dedup();
    let count = intervals.len();
    if count <= MAX_POINTS {
        return intervals;
    }
    (1..=MAX_POINTS).map(|part| intervals[part * count / MAX_POINTS - 1]).collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The curve of pages in classes `(pages, writes per second)`, at `ms`.
    pub(crate) fn curve_of(classes: &[(f64, f64)], ms: &[f64]) -> WriteCurve {
        let pages = |ms: f64| classes.iter().map(|(w, rate)| w * -(-rate * ms / 1e3).exp_m1()).sum();
        WriteCurve::new(ms.iter().map(|&ms| CurvePoint::exact((ms * 1e6) as u64, pages(ms))).collect()).unwrap()
    }

    /// Counts as a noisy measurement gives them.
    fn counts() -> impl Strategy<Value = Vec<CurvePoint>> {
        prop::collection::vec((1..2_000_000_000u64, 0.0..1e6, 0.0..1e5, 0.0..1e5), 1..40).prop_map(|raw| {
            let mut at = 0;
            raw.into_iter()
                .map(|(step, pages, below, above)| {
                    at += step;
                    CurvePoint {
                        interval_ns: at,
                        unique_pages: pages,
                        low_pages: f64::max(0.0, pages - below),
                        high_pages: pages + above,
                    }
                })
                .collect()
        })
    }

    fn near(a: f64, b: f64) -> bool {
        (a - b).abs() <= 1e-6 * (1.0 + a.abs() + b.abs())
    }

    proptest! {
        /// What noise is made into passes every check, lies nowhere below what was counted, and reads again.
        #[test]
        fn measured_counts_become_a_curve(points in counts()) {
            let curve = WriteCurve::from_measured(points.clone()).unwrap();
            prop_assert!(WriteCurve::new(curve.points().to_vec()).is_ok(), "{:?}", WriteCurve::new(curve.points().to_vec()));
            for (raw, point) in points.iter().zip(curve.points()) {
                prop_assert!(point.unique_pages >= raw.unique_pages - 1e-6 && point.high_pages >= raw.high_pages - 1e-6);
            }
            let text = serde_json::to_string(&curve).unwrap();
            let again: WriteCurve = serde_json::from_str(&text).unwrap();
            prop_assert_eq!(again.points().len(), curve.points().len());
        }

        /// Between points and behind them the value rises, bends down only, and lies in its band.
        #[test]
        fn values_between_and_behind_points_stay_concave(points in counts(), steps in 3..60u32) {
            let curve = WriteCurve::from_measured(points).unwrap();
            let end = curve.last().at() * 1.7;
            let at: Vec<Estimate> =
                (0..=steps).map(|i| curve.at_ns(end * f64::from(i) / f64::from(steps))).collect();
            prop_assert!(near(at[0].unique_pages, 0.0));
            for three in at.windows(3) {
                let [a, b, c] = [three[0].unique_pages, three[1].unique_pages, three[2].unique_pages];
                prop_assert!(b - a >= -1e-6 * (1.0 + b), "falls");
                prop_assert!(c - b <= (b - a) + 1e-6 * (1.0 + c), "bends upward");
            }
            for here in &at {
                prop_assert!(here.low_pages <= here.unique_pages + 1e-6 && here.unique_pages <= here.high_pages + 1e-6);
            }
            prop_assert!(at.last().unwrap().extrapolated && !at[0].extrapolated);
        }

        /// The true curve lies between the edges that are read from a few exact points of it.
        #[test]
        fn the_band_holds_the_true_curve(
            hot in 1.0..1e5f64, hot_rate in 1.0..1e4f64, cold in 1.0..1e6f64, cold_rate in 0.01..1.0f64, at in 5.0..2000.0f64,
        ) {
            let classes = [(hot, hot_rate), (cold, cold_rate)];
            let curve = curve_of(&classes, &[5.0, 20.0, 80.0, 320.0, 1280.0]);
            let truth = curve_of(&classes, &[at]).last().unique_pages;
            let read = curve.at_ns(at * 1e6);
            prop_assert!(read.low_pages <= truth + 1e-3 && truth <= read.high_pages + 1e-3, "{read:?} {truth}");
            prop_assert_eq!(read.extrapolated, at > 1280.0);
        }

        /// A sum is the sum of the values at each of its points.
        #[test]
        fn sums_add_up(a in counts(), b in counts()) {
            let (a, b) = (WriteCurve::from_measured(a).unwrap(), WriteCurve::from_measured(b).unwrap());
            let sum = WriteCurve::sum([&a, &b]).unwrap();
            prop_assert_eq!(sum.last().interval_ns, a.last().interval_ns.min(b.last().interval_ns));
            for point in sum.points() {
                let parts = a.at_ns(point.at()).unique_pages + b.at_ns(point.at()).unique_pages;
                prop_assert!(near(point.unique_pages, parts), "{} {}", point.unique_pages, parts);
            }
        }
    }

    #[test]
    fn what_is_no_curve_is_refused_with_the_reason() {
        let new =
            |points: &[(u64, f64)]| WriteCurve::new(points.iter().map(|&(t, u)| CurvePoint::exact(t, u)).collect());
        assert_eq!(new(&[]), Err(CurveError::Empty));
        assert_eq!(new(&vec![(1, 1.0); MAX_POINTS + 1]), Err(CurveError::TooMany(MAX_POINTS + 1)));
        for bad in [&[(0, 0.0)][..], &[(2, 1.0), (2, 1.0)], &[(3, 1.0), (2, 1.0)], &[(MAX_INTERVAL_NS + 1, 1.0)]] {
            assert!(matches!(new(bad), Err(CurveError::Interval(_))), "{bad:?}");
        }
        for bad in [f64::NAN, f64::INFINITY, -1.0, 1e12] {
            assert_eq!(new(&[(5, bad)]), Err(CurveError::Pages(5)));
        }
        let inside_out = CurvePoint { interval_ns: 5, unique_pages: 1.0, low_pages: 2.0, high_pages: 3.0 };
        assert_eq!(WriteCurve::new(vec![inside_out]), Err(CurveError::Pages(5)));
        assert_eq!(new(&[(5, 10.0), (10, 5.0)]), Err(CurveError::Shape(10)));
        assert_eq!(new(&[(5, 10.0), (10, 30.0)]), Err(CurveError::Shape(10)));
        assert!(new(&[(5, 10.0), (10, 20.0), (1000, 20.0)]).is_ok());
    }

    #[test]
    fn json_has_units_and_is_checked() {
        let curve = WriteCurve::new(vec![CurvePoint::exact(5, 2.0)]).unwrap();
        let text = r#"{"measured_until_ns":5,"points":[{"interval_ns":5,"unique_pages":2.0,"low_pages":2.0,"high_pages":2.0}]}"#;
        assert_eq!(serde_json::to_string(&curve).unwrap(), text);
        assert_eq!(serde_json::from_str::<WriteCurve>(text).unwrap(), curve);
        let error = serde_json::from_str::<WriteCurve>(&text.replace(":5,\"u", ":0,\"u")).unwrap_err();
        assert!(error.to_string().contains("sort them"), "{error}");
        assert!(serde_json::from_str::<WriteCurve>(&text.replace("_pages\":2.0", "_pages\":-2.0")).is_err());
    }

    #[test]
    fn rates_are_values_over_their_interval() {
        let curve = curve_of(&[(1000.0, 50.0)], &[5.0, 20.0, 80.0]);
        let over = curve.rate_over(Duration::from_millis(20));
        assert!(near(over.pages_per_second, curve.points()[1].unique_pages * 50.0));
        // At zero it is the slope there: that of the first line.
        assert!(near(curve.rate_over(Duration::ZERO).pages_per_second, curve.points()[0].unique_pages * 200.0));
        assert!(curve.rate_over(Duration::from_secs(1)).extrapolated);
        let shown = curve.shown();
        assert_eq!(
            shown.points().iter().map(|p| p.interval_ns).collect::<Vec<_>>(),
            [5_000_000, 20_000_000, 80_000_000]
        );
        assert!(curve.at(Duration::MAX).high_pages <= MAX_PAGES);
    }
}
