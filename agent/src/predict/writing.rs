//! A guest's writing as groups of pages, so that one can say which of those that a round sent are written behind it.
//!
//! A concave curve of straight pieces is a sum of U(t) = W·min(t/τ, 1): groups of W pages, each page written once in every τ. That is no guess about the
//! guest but the curve itself in another form. What is taken for granted is that when a page is written has nothing to do with when it is sent.

use crate::model::{PageCount, WriteCurve};

/// Which edge of the curve.
#[derive(Clone, Copy, Debug)]
pub(super) enum Edge {
    Low,
    Middle,
    High,
}

/// When pages are protected, so that a write to them shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Protected {
    /// All of them when a round begins (QEMU, but for VMs of many GiB): a page that is written before it is sent is sent once more.
    AtOnce,
    /// Each just before it is sent: what is written before that travels with it.
    PageByPage,
}

/// Pages that are each written once in every `period` seconds.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Group {
    pages: f64,
    period: f64,
}

impl Group {
    /// The chance that one of its pages is written within `seconds`.
    fn within(&self, seconds: f64) -> f64 {
        (seconds / self.period).min(1.0)
    }

    /// The same in the mean over all beginnings within `seconds`: behind the sending of a page that is sent at any moment of a round.
    fn behind(&self, seconds: f64) -> f64 {
        let z = seconds / self.period;
        if z <= 1.0 { z / 2.0 } else { 1.0 - 0.5 / z }
    }
}

/// How a guest writes.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Writing {
    groups: Vec<Group>,
}

/// What of each group is to be sent again: a part of it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Due(Vec<f64>);

impl Writing {
    /// The groups of one edge of `curve`; no more than all of memory is ever written.
    pub(super) fn new(curve: &WriteCurve, edge: Edge, memory: PageCount) -> Self {
        let most = memory.0 as f64;
        let points: Vec<(f64, f64)> = curve
            .points()
            .iter()
            .map(|point| {
                let pages = match edge {
                    Edge::Low => point.low_pages,
                    Edge::Middle => point.unique_pages,
                    Edge::High => point.high_pages,
                };
                (point.interval_ns as f64 / 1e9, pages.min(most))
            })
            .collect();
        let mut slopes: Vec<f64> = Vec::with_capacity(points.len() + 1);
        let mut before = (0.0, 0.0);
        for &(at, pages) in &points {
            let slope = (pages - before.1) / (at - before.0);
            // Rounding may bend it upward.
            slopes.push(slope.min(slopes.last().copied().unwrap_or(f64::INFINITY)).max(0.0));
            before = (at, pages);
        }
        let bends = points.iter().zip(slopes.windows(2));
        let mut groups: Vec<Group> =
            bends.map(|(&(period, _), slope)| Group { pages: (slope[0] - slope[1]) * period, period }).collect();
        // As steep as it ends it goes on, until all of memory has been written.
        if let (Some(&slope), Some(&(end, _))) = (slopes.last(), points.last())
            && slope > 0.0
        {
            let others: f64 = groups.iter().map(|group| group.pages).sum();
            let pages = (most - others).max(slope * end);
            groups.push(Group { pages, period: pages / slope });
        }
        Self { groups: groups.into_iter().filter(|group| group.pages > 0.0).collect() }
    }

    /// Everything is to be sent.
    pub(super) fn all_due(&self) -> Due {
        Due(vec![1.0; self.groups.len()])
    }

    /// U(t): different pages written in `seconds`.
    pub(super) fn pages(&self, seconds: f64) -> f64 {
        self.groups.iter().map(|group| group.pages * group.within(seconds)).sum()
    }

    /// Of those that are due, pages that the guest touches in `seconds` before they have come, if they come evenly in that time:
    /// (1/t)·∫U, a page being needed before it comes with a chance of 1 - s/t at s.
    pub(super) fn touched_before_they_come(&self, due: &Due, seconds: f64) -> f64 {
        self.groups.iter().zip(&due.0).map(|(group, due)| group.pages * due * group.behind(seconds)).sum()
    }

    /// Pages that are due.
    pub(super) fn due_pages(&self, due: &Due) -> f64 {
        self.groups.iter().zip(&due.0).map(|(group, due)| group.pages * due).sum()
    }

    /// What is due when `due` has been sent in `seconds`, of which the guest had the part `speed` to write in: what was sent is written again
    /// only behind its protection, what was not has been protected all the time.
    pub(super) fn after_round(&self, due: &Due, seconds: f64, speed: f64, protected: Protected) -> Due {
        let seconds = seconds * speed;
        let parts = self.groups.iter().zip(&due.0).map(|(group, &due)| match protected {
            Protected::AtOnce => group.within(seconds),
            Protected::PageByPage => due * group.behind(seconds) + (1.0 - due) * group.within(seconds),
        });
        Due(parts.collect())
    }
}

impl Due {
    /// The same part less of each group.
    pub(super) fn scaled(mut self, by: f64) -> Self {
        self.0.iter_mut().for_each(|part| *part *= by);
        self
    }
}
