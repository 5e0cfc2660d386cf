//! What a bench found: one row a metric and peer, as a table for people or one JSON object a line.

use std::fmt::Write as _;

use serde::Serialize;

/// The same thing measured several times; a run without a result (it did not converge) counts as infinitely slow.
#[derive(Clone, Debug, Default)]
pub(super) struct Samples(Vec<f64>);

impl Samples {
    /// Adds a run.
    pub(super) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// Adds a run that ended without a result.
    pub(super) fn push_none(&mut self) {
        self.0.push(f64::INFINITY);
    }

    /// Number of runs.
    pub(super) fn runs(&self) -> usize {
        self.0.len()
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }

    /// The median; none without runs or if it is infinite.
    pub(super) fn median(&self) -> Option<f64> {
        let sorted = self.sorted();
        let upper = *sorted.get(sorted.len() / 2)?;
        let lower = sorted[(sorted.len() - 1) / 2];
        Some(f64::midpoint(lower, upper)).filter(|median| median.is_finite())
    }

    fn min(&self) -> Option<f64> {
        self.sorted().first().copied().filter(|value| value.is_finite())
    }

    fn max(&self) -> Option<f64> {
        self.sorted().last().copied().filter(|value| value.is_finite())
    }
}

/// What a value is held against.
#[derive(Clone, Debug, Default)]
pub(super) enum Aim {
    /// Nothing.
    #[default]
    None,
    /// At most this.
    AtMost(f64),
    /// At most what the peer got. If it got nothing, at most this, up to which it was waited for; else undecided.
    Peer(Option<f64>),
}

/// One row.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Row {
    schema: &'static str,
    bench: &'static str,
    case: String,
    metric: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<f64>,
    unit: &'static str,
    runs: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    min: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer_value: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    aim: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ok: Option<bool>,
}

impl Row {
    /// A row of `bench` without a peer.
    pub(super) fn new(
        bench: &'static str,
        case: &str,
        metric: &'static str,
        unit: &'static str,
        ours: &Samples,
        aim: Aim,
    ) -> Self {
        let mut row = Self {
            schema: "dunlin.bench/v1",
            bench,
            case: case.to_owned(),
            metric,
            value: ours.median().map(short),
            unit,
            runs: ours.runs(),
            min: ours.min().map(short),
            max: ours.max().map(short),
            peer: None,
            peer_value: None,
            aim: None,
            ok: None,
        };
        row.judge(&aim);
        row
    }

    /// The same beside a peer.
    pub(super) fn beside(mut self, peer: &str, theirs: &Samples, aim: Aim) -> Self {
        self.peer = Some(peer.to_owned());
        self.peer_value = theirs.median().map(short);
        self.judge(&aim);
        self
    }

    /// Whether it has no aim, or keeps it.
    pub(super) fn is_kept(&self) -> bool {
        self.ok != Some(false)
    }

    fn judge(&mut self, aim: &Aim) {
        let limit = match aim {
            Aim::None => return,
            Aim::AtMost(limit) => Some(*limit),
            Aim::Peer(waited) => self.peer_value.or(*waited),
        };
        let kept = |value: f64| limit.map(|limit| value <= limit);
        self.ok = match self.value {
            // Slower than a peer that was given up on: nobody knows how slow that one is.
            Some(value) if self.peer.is_some() && self.peer_value.is_none() => kept(value).filter(|&kept| kept),
            Some(value) => kept(value),
            None => Some(false),
        };
        self.aim = limit;
    }
}

/// Three decimals are more than any of these measurements holds.
fn short(value: f64) -> f64 {
    (value * 1e3).round() / 1e3
}

/// The rows as JSON, one a line.
pub(super) fn json(rows: &[Row]) -> String {
    rows.iter().filter_map(|row| serde_json::to_string(row).ok()).fold(String::new(), |text, line| text + &line + "\n")
}

/// The rows as a table.
pub(super) fn table(rows: &[Row]) -> String {
    let heads = ["case", "metric", "value", "min", "max", "unit", "runs", "peer", "peer value", "aim", ""];
    let number = |value: Option<f64>| match value {
        None => "-".to_owned(),
        Some(value) if value.abs() >= 1000.0 => format!("{value:.0}"),
        Some(value) if value.abs() >= 100.0 => format!("{value:.1}"),
        Some(value) => format!("{value:.2}"),
    };
    let mut lines = vec![heads.map(str::to_owned)];
    let mut case = "";
    for row in rows {
        let verdict = row.ok.map_or("", |ok| if ok { "ok" } else { "MISSED" });
        lines.push([
            if row.case == case { String::new() } else { row.case.clone() },
            row.metric.to_owned(),
            number(row.value),
            number(row.min),
            number(row.max),
            row.unit.to_owned(),
            row.runs.to_string(),
            row.peer.clone().unwrap_or_default(),
            if row.peer.is_some() { number(row.peer_value) } else { String::new() },
            row.aim.map_or(String::new(), |aim| format!("<= {}", number(Some(aim)))),
            verdict.to_owned(),
        ]);
        case = &row.case;
    }
    let widths: Vec<usize> =
        (0..heads.len()).map(|column| lines.iter().map(|line| line[column].len()).max().unwrap_or(0)).collect();
    let mut text = String::new();
    for line in &lines {
        let mut out = String::new();
        for (column, (cell, &width)) in line.iter().zip(&widths).enumerate() {
            let _ = if [2, 3, 4, 6, 8].contains(&column) {
                write!(out, "{cell:>width$}  ")
            } else {
                write!(out, "{cell:<width$}  ")
            };
        }
        text.push_str(out.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(values: &[f64]) -> Samples {
        Samples(values.to_vec())
    }

    #[test]
    fn medians_bear_runs_that_did_not_converge() {
        assert_eq!(samples(&[]).median(), None);
        assert_eq!(samples(&[4.0, 1.0, 2.0, 3.0]).median(), Some(2.5));
        assert_eq!(samples(&[f64::INFINITY, 1.0, 2.0]).median(), Some(2.0));
        assert_eq!(samples(&[f64::INFINITY, f64::INFINITY, 2.0]).median(), None);
    }

    #[test]
    fn a_row_is_held_against_its_aim_and_its_peer() {
        let (ours, slower, never) = (samples(&[2.0]), samples(&[3.0]), samples(&[f64::INFINITY]));
        let row = || Row::new("b", "c", "m", "ms", &ours, Aim::None);
        assert_eq!(row().ok, None);
        assert_eq!(row().beside("p", &slower, Aim::Peer(None)).ok, Some(true));
        assert_eq!(row().beside("p", &never, Aim::Peer(None)).ok, None);
        assert_eq!(row().beside("p", &never, Aim::Peer(Some(20.0))).ok, Some(true));
        assert_eq!(row().beside("p", &never, Aim::Peer(Some(1.0))).ok, None);
        assert_eq!(row().beside("p", &slower, Aim::AtMost(1.0)).ok, Some(false));
        assert_eq!(Row::new("b", "c", "m", "ms", &never, Aim::AtMost(1.0)).ok, Some(false));
        let text = json(&[row()]);
        let parsed: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(parsed["schema"], "dunlin.bench/v1");
        assert!(parsed.get("peer").is_none(), "what is not known is absent");
    }

    #[test]
    fn the_table_names_a_case_once() {
        let row = Row::new("b", "idle", "total", "ms", &samples(&[1234.5]), Aim::AtMost(2000.0));
        let text = table(&[row.clone(), row]);
        assert_eq!(text.matches("idle").count(), 1);
        assert!(text.contains("1234") && text.contains("<= 2000") && text.contains("ok"), "{text}");
    }
}
