//! What sampling tells, as it is printed.

use serde::Serialize;

pub use super::heat::{SampledHeat, SampledRegion};
use crate::model::Gpa;
use crate::track::Regime;

/// The curve U(t), and what the memory holds.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SampledCurve {
    /// One point for each length of window, shortest first. Each is a sample of its own: a later one may by chance lie below an earlier.
    pub windows: Vec<WindowEstimate>,
    /// Always [`Regime::Sampled`].
    pub regime: Regime,
    /// What the figures mean under it.
    pub meaning: &'static str,
    /// Pages of RAM that the sample was taken from.
    pub population_pages: u64,
    /// Where it was written, by the longest window's sample.
    pub heat: SampledHeat,
    /// RAM that was left out, since it cannot be read.
    pub unreadable_ranges: Vec<UnreadableRange>,
    /// Pages that hold nothing but zeros; none if no page could be read.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zero_pages: Option<ZeroPages>,
    /// How far the other pages can be compressed; none if there are fewer than two.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compression: Option<Compression>,
    /// Time spent in reading, hashing and compressing: no less than the CPU time of it.
    pub read_ns: u64,
    /// Time that the whole measurement took.
    pub elapsed_ns: u64,
    /// What chose the sample.
    pub seed: u64,
}

/// One point of the curve.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WindowEstimate {
    /// The length that was asked for.
    pub window_ns: u64,
    /// The mean length that it had: what the estimate is true for.
    pub effective_interval_ns: u64,
    /// The shortest that any batch of pages had.
    pub shortest_interval_ns: u64,
    /// The longest.
    pub longest_interval_ns: u64,
    /// Different pages written in such a window: the estimate.
    pub unique_pages: u64,
    /// Where its 95 % interval begins. It covers the choice of pages, and, where at least four windows differ from one another by more than
    /// chance, the choice of windows.
    pub unique_pages_low: u64,
    /// Where it ends.
    pub unique_pages_high: u64,
    /// Whether all pages were read in one window, so that the interval has no width: exact for windows as long as they were, each between the
    /// shortest and the longest.
    pub is_exact: bool,
    /// Pages that were read twice.
    pub sampled_pages: u64,
    /// Those of them that changed.
    pub changed_pages: u64,
    /// Pages of the sample that could not be read; the estimate counts the memory that they stand for as not there.
    pub unreadable_pages: u64,
    /// Over how many windows the sample was spread.
    pub windows: u64,
    /// The estimate's variance in parts of what a simple random sample of this size would have: above 1 if the VM writes in bursts, so that
    /// windows differ.
    pub variance_ratio: f64,
    /// Time spent in reading, a pilot not counted: no less than the CPU time of it.
    pub read_ns: u64,
}

/// RAM that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct UnreadableRange {
    /// Where it begins.
    pub start: Gpa,
    /// Its length.
    pub bytes: u64,
    /// Why.
    pub reason: String,
}

/// The part of memory that is zeros, 0 to 1, with its 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct ZeroPages {
    /// The part.
    pub share: f64,
    /// Where its interval begins.
    pub share_low: f64,
    /// Where it ends.
    pub share_high: f64,
    /// Pages looked at.
    pub sampled_pages: u64,
}

/// What is left of a page, of those that are not zeros, when LZ4 has compressed it as a block of its own: compressed size in parts of the
/// uncompressed, 0 to 1 (a page that would grow counts as 1), with the mean's 95 % interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Compression {
    /// The mean.
    pub ratio: f64,
    /// Where its interval begins.
    pub ratio_low: f64,
    /// Where it ends.
    pub ratio_high: f64,
    /// Pages compressed.
    pub sampled_pages: u64,
}
