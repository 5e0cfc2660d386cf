//! Checks with their verdicts, and the one rule that all of them must hold.

use dunlin_tests::Hop;
use serde::Serialize;

/// One thing that had to hold.
#[derive(Debug, Serialize)]
pub(crate) struct Check {
    name: &'static str,
    ok: bool,
    detail: String,
}

/// All of them.
#[derive(Debug, Default, Serialize)]
#[serde(transparent)]
pub(crate) struct Checks(Vec<Check>);

impl Checks {
    /// Adds one; `detail` says what was seen.
    pub(crate) fn add(&mut self, name: &'static str, ok: bool, detail: impl Into<String>) {
        self.0.push(Check { name, ok, detail: detail.into() });
    }

    /// Whether all hold.
    pub(crate) fn all_hold(&self) -> bool {
        self.0.iter().all(|check| check.ok)
    }

    /// One line each.
    pub(crate) fn text(&self) -> String {
        let line = |check: &Check| {
            let verdict = if check.ok { "ok  " } else { "FAIL" };
            format!("  {verdict}  {}: {}\n", check.name, check.detail)
        };
        self.0.iter().map(line).collect()
    }
}

/// From the first announcement's arrival at the switch to the switch having relearned; the two are read by two threads,
/// so what is below zero counts as zero.
pub(crate) fn relearned_after_announcement_ns(hop: &Hop) -> Option<u64> {
    Some(hop.relearned_at_monotonic_ns?.saturating_sub(hop.first_announcement_ns()?))
}
