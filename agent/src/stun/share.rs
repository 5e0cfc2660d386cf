//! Dividing what may be written: max-min fair, so that small writers are untouched and what they leave goes to those who want more.

use crate::model::{PagesPerSecond, max_min};

/// What one vCPU writes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Demand {
    /// As measured.
    pub rate: PagesPerSecond,
    /// It is held, so that nobody knows what it would write.
    pub is_hungry: bool,
    /// It must not be held, whatever it writes: its share counts, and what it takes beyond that nobody pays for.
    pub is_exempt: bool,
}

/// What each may write: none for those who may go on as they do. `allowed` is for all of them and `others`, which cannot be held.
pub fn share(demands: &[Demand], others: PagesPerSecond, allowed: PagesPerSecond) -> Vec<Option<PagesPerSecond>> {
    let left = (allowed.0 - others.0.max(0.0)).max(0.0);
    // Whoever is hungry wants as much as there is, and no more than anybody could write.
    let wanted = |demand: &Demand| match demand {
        Demand { is_hungry: true, rate, .. } => rate.0.max(left) + 1.0,
        Demand { rate, .. } => rate.0,
    };
    let line = max_min(&demands.iter().map(wanted).collect::<Vec<_>>(), left).line;
    let limit = |demand: &Demand| {
        let line = line.filter(|&line| !demand.is_exempt && wanted(demand) > line)?;
        Some(PagesPerSecond(line))
    };
    demands.iter().map(limit).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(rate: f64) -> Demand {
        Demand { rate: PagesPerSecond(rate), is_hungry: false, is_exempt: false }
    }

    fn shared(demands: &[Demand], others: f64, allowed: f64) -> Vec<Option<f64>> {
        let limits = share(demands, PagesPerSecond(others), PagesPerSecond(allowed));
        limits.into_iter().map(|limit| limit.map(|rate| rate.0)).collect()
    }

    #[test]
    fn who_stands_above_the_water_line_is_brought_down_to_it_and_nobody_else_is_touched() {
        assert_eq!(shared(&[of(100.0), of(50.0)], 0.0, 200.0), [None, None]);
        assert_eq!(shared(&[of(9000.0), of(50.0)], 0.0, 1000.0), [Some(950.0), None]);
        assert_eq!(shared(&[of(9000.0), of(50.0), of(3000.0)], 50.0, 1000.0), [Some(450.0), None, Some(450.0)]);
        // Held ones take what the others leave, though they write no more than they may.
        let held = Demand { is_hungry: true, ..of(450.0) };
        assert_eq!(shared(&[held, of(50.0), held], 0.0, 2050.0), [Some(1000.0), None, Some(1000.0)]);
        // Who must not be held takes part, and nobody is brought below the line for it.
        let exempt = Demand { is_exempt: true, ..of(9000.0) };
        assert_eq!(shared(&[exempt, of(900.0), of(100.0)], 0.0, 1000.0), [None, Some(450.0), None]);
        assert_eq!(shared(&[exempt, of(900.0)], 5000.0, 1000.0), [None, Some(0.0)]);
        assert_eq!(shared(&[], 5.0, 1.0), []);
    }
}
