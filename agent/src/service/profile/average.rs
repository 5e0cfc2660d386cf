//! One curve from those of several windows. Pure.

use crate::model::{CurvePoint, WriteCurve};

/// The shortest interval of the common grid, in nanoseconds.
const FIRST_NS: f64 = 100_000.0;
/// Points of the grid.
const POINTS: usize = 48;
/// Standard errors that a 95 % interval of a mean reaches to each side.
const TWO_SIDED_95: f64 = 1.96;

/// The mean of the windows' curves. Its band is the mean of theirs, wider by how much the windows differ.
pub(super) fn average(curves: &[WriteCurve]) -> Option<WriteCurve> {
    let last = curves.iter().map(|curve| curve.last().interval_ns).min()?;
    if let [only] = curves {
        return Some(only.clone());
    }
    let last = last as f64;
    let first = FIRST_NS.min(last / 2.0);
    let count = curves.len() as f64;
    let points = (0..POINTS).map(|index| {
        let at = first * (last / first).powf(index as f64 / (POINTS - 1) as f64);
        let all: Vec<_> = curves.iter().map(|curve| curve.at_ns(at)).collect();
        let mean = |of: fn(&crate::model::Estimate) -> f64| all.iter().map(of).sum::<f64>() / count;
        let unique = mean(|e| e.unique_pages);
        let variance = all.iter().map(|e| (e.unique_pages - unique).powi(2)).sum::<f64>() / (count - 1.0);
        let more = TWO_SIDED_95 * (variance / count).sqrt();
        CurvePoint {
            interval_ns: at as u64,
            unique_pages: unique,
            low_pages: (mean(|e| e.low_pages) - more).max(0.0),
            high_pages: mean(|e| e.high_pages) + more,
        }
    });
    WriteCurve::from_measured(points.collect()).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(pages_per_ms: f64) -> WriteCurve {
        let points = [1u64, 10, 100].map(|ms| CurvePoint::exact(ms * 1_000_000, ms as f64 * pages_per_ms));
        WriteCurve::new(points.to_vec()).unwrap()
    }

    #[test]
    fn windows_that_agree_have_no_band_and_those_that_differ_have_one() {
        let same = average(&[line(10.0), line(10.0)]).unwrap();
        let last = same.last();
        assert!((last.unique_pages - 1000.0).abs() < 1.0 && last.high_pages - last.low_pages < 1e-6, "{last:?}");
        let differing = average(&[line(10.0), line(20.0), line(30.0)]).unwrap().last();
        assert!((differing.unique_pages - 2000.0).abs() < 2.0);
        assert!(differing.low_pages < 1000.0 && differing.high_pages > 3000.0, "{differing:?}");
        assert!(average(&[]).is_none());
    }
}
