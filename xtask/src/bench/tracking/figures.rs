//! What is said of a VM's writing: by `dunlin` (`docs/json.md`), and by QEMU.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;
use serde_json::{Value, json};

use super::super::ours::{Vm, answer};
use super::super::qemu::Side;
use super::truth::{Truth, mib_per_second};
use crate::interrupt;

/// How long a measurement may take.
const LIMIT: Duration = Duration::from_secs(60);
/// The intervals, in milliseconds, at which curves are held against the truth; the last is where they end.
pub(super) const CURVE_MS: [u32; 5] = [5, 20, 80, 320, 1280];
/// Sampled changes below which a standard error of 5 % cannot be had.
const ENOUGH_CHANGED: u64 = 400;
/// Time of QEMU's measurements, and of ours that answer to them.
const CALC_SECONDS: u64 = 1;
/// Different pages in an interval.
#[derive(Clone, Copy, Debug)]
pub(super) struct Figure {
    /// Pages.
    pub(super) pages: f64,
    /// The interval.
    pub(super) ns: f64,
}

impl Figure {
    /// As MiB/s.
    pub(super) fn mib_per_second(self) -> f64 {
        mib_per_second(self.pages, self.ns)
    }

    /// Distance from the truth, in percent of it.
    pub(super) fn error(self, truth: &Truth) -> f64 {
        (self.pages / truth.pages(self.ns) - 1.0).abs() * 100.0
    }
}

/// The parts of `dunlin.write-curve/v1` that are used here.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Profile {
    window_ns: u64,
    #[serde(default)]
    rest_ns: u64,
    curve: Curve,
    exact_unique_pages: Option<f64>,
    sampled: Option<Sampled>,
    cost: Option<Cost>,
}

#[derive(Clone, Debug, Deserialize)]
struct Curve {
    points: Vec<Point>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
struct Point {
    interval_ns: u64,
    unique_pages: f64,
    low_pages: f64,
    high_pages: f64,
}

#[derive(Clone, Debug, Deserialize)]
struct Sampled {
    windows: Vec<SampledWindow>,
    read_ns: u64,
    elapsed_ns: u64,
}

#[derive(Clone, Debug, Deserialize)]
struct SampledWindow {
    effective_interval_ns: u64,
    unique_pages: u64,
    unique_pages_low: u64,
    unique_pages_high: u64,
    changed_pages: u64,
}

#[derive(Clone, Debug, Deserialize)]
struct Cost {
    bpf_core_share: f64,
}

/// A curve's point beside the truth.
#[derive(Clone, Copy, Debug)]
pub(super) struct Held {
    /// Distance in percent of the truth.
    pub(super) error: f64,
    /// Whether the truth lies outside the stated interval.
    pub(super) outside: bool,
    /// Whether enough was seen for an error of some percent.
    pub(super) enough: bool,
}

impl Profile {
    fn parse(text: &str) -> Result<Self> {
        serde_json::from_str(text).context("the profile of `dunlin wws --json`")
    }

    /// Different pages in a window: by the bitmap where there is one, else by the longest sample.
    pub(super) fn figure(&self) -> Figure {
        let last = self.curve.points.last().copied().unwrap_or_default();
        match (self.exact_unique_pages, self.sampled.as_ref().and_then(|sampled| sampled.windows.last())) {
            (Some(pages), _) => Figure { pages, ns: self.window_ns as f64 },
            (None, Some(window)) => {
                Figure { pages: window.unique_pages as f64, ns: window.effective_interval_ns as f64 }
            }
            (None, None) => Figure { pages: last.unique_pages, ns: last.interval_ns as f64 },
        }
    }

    /// The curve at [`CURVE_MS`] beside the truth. A sampled one: each sample by itself, since the curve through them
    /// is smoothed.
    pub(super) fn held_against(&self, truth: &Truth) -> Vec<Held> {
        let held = |pages: f64, low: f64, high: f64, ns: f64, enough: bool| {
            let figure = Figure { pages, ns };
            let (least, most) = truth.range(ns);
            Held { error: figure.error(truth), outside: high < least || most < low, enough }
        };
        if let Some(sampled) = &self.sampled {
            let windows = sampled.windows.iter().map(|window| {
                let [pages, low, high] =
                    [window.unique_pages, window.unique_pages_low, window.unique_pages_high].map(|pages| pages as f64);
                let enough = window.changed_pages >= ENOUGH_CHANGED;
                held(pages, low, high, window.effective_interval_ns as f64, enough)
            });
            return windows.collect();
        }
        let last = self.curve.points.last().map_or(0.0, |point| point.interval_ns as f64);
        let intervals = CURVE_MS.iter().map(|&ms| f64::from(ms) * 1e6);
        intervals
            .map(|ns| ns.min(last))
            .map(|ns| {
                let point = self.curve.at(ns);
                held(point.unique_pages, point.low_pages, point.high_pages, ns, true)
            })
            .collect()
    }

    /// How long the VM is left alone before another.
    pub(super) fn rest(&self) -> Duration {
        Duration::from_nanos(self.rest_ns)
    }

    /// Whether the figure itself rests on enough.
    pub(super) fn enough(&self) -> bool {
        let last = self.sampled.as_ref().and_then(|sampled| sampled.windows.last());
        last.is_none_or(|window| window.changed_pages >= ENOUGH_CHANGED)
    }

    /// What it took of one core of the host, in percent: BPF programs, or reading.
    pub(super) fn core_percent(&self) -> f64 {
        match (&self.cost, &self.sampled) {
            (Some(cost), _) => cost.bpf_core_share * 100.0,
            (None, Some(sampled)) => sampled.read_ns as f64 * 100.0 / sampled.elapsed_ns.max(1) as f64,
            (None, None) => f64::NAN,
        }
    }
}

impl Curve {
    /// Between points on a straight line, as the agent reads its curves.
    fn at(&self, ns: f64) -> Point {
        let mut before = Point::default();
        for &point in &self.points {
            let (from, to) = (before.interval_ns as f64, point.interval_ns as f64);
            if ns <= to {
                let part = (ns - from) / (to - from);
                let between = |a: f64, b: f64| a + (b - a) * part;
                return Point {
                    interval_ns: ns as u64,
                    unique_pages: between(before.unique_pages, point.unique_pages),
                    low_pages: between(before.low_pages, point.low_pages),
                    high_pages: between(before.high_pages, point.high_pages),
                };
            }
            before = point;
        }
        before
    }
}

/// `dunlin wws` on a VM of ours.
pub(super) fn profile(vm: &Vm<'_>, regime: &str) -> Result<Profile> {
    let state = vm.state_dir();
    let state = state.to_str().context("a folder's name")?;
    Profile::parse(&vm.ask("wws", &["--regime", regime, "--state-dir", state], LIMIT)?)
}

/// `dunlin wws` on a process of QEMU, by its memory.
pub(super) fn profile_of_qemu(dunlin: &Path, side: &Side, folder: &Path) -> Result<Profile> {
    let mut command = Command::new(dunlin);
    command.args(["wws", &format!("pid:{}", side.process.id()), "--json"]);
    command.args(["--regime", "sampled", "--allow-read-memory", "--run-dir"]).arg(folder.join("run"));
    command.arg("--state-dir").arg(folder.join("state"));
    Profile::parse(&answer(command, folder, LIMIT)?)
}

/// `dunlin dirty-rate`: the last interval of `count`.
pub(super) fn dirty_rate(vm: &Vm<'_>, count: u32, arm: bool) -> Result<Figure> {
    #[derive(Deserialize)]
    struct Report {
        interval_ns: u64,
        unique_pages: u64,
    }
    let count = count.to_string();
    let mut arguments = vec!["--interval", "1s", "--count", count.as_str()];
    if arm {
        arguments.push("--arm");
    }
    let text = vm.ask("dirty-rate", &arguments, LIMIT)?;
    let last = text.lines().last().context("no report of `dunlin dirty-rate`")?;
    let report: Report = serde_json::from_str(last).with_context(|| format!("`{last}`"))?;
    Ok(Figure { pages: report.unique_pages as f64, ns: report.interval_ns as f64 })
}

/// QEMU's `calc-dirty-rate`.
pub(super) fn calc_dirty_rate(side: &mut Side, mode: &str, sample_pages: Option<u64>) -> Result<Figure> {
    let mut arguments = json!({ "calc-time": CALC_SECONDS, "mode": mode });
    if let (Some(pages), Some(arguments)) = (sample_pages, arguments.as_object_mut()) {
        arguments.insert("sample-pages".to_owned(), pages.into());
    }
    side.qmp.order("calc-dirty-rate", arguments)?;
    // It begins on a thread of its own, and is `unstarted` until that runs.
    let rate = interrupt::wait_for(LIMIT, "QEMU's dirty rate", || {
        side.process.check_alive()?;
        let answer = side.qmp.order("query-dirty-rate", json!({}))?;
        match answer.get("status").and_then(Value::as_str) {
            Some("measured") => Ok(Some(answer.get("dirty-rate").and_then(Value::as_f64).context("no rate of QEMU")?)),
            Some("measuring" | "unstarted") => Ok(None),
            _ => bail!("QEMU's measurement failed: {answer}"),
        }
    })?;
    // MiB/s in whole numbers.
    Ok(Figure { pages: rate * CALC_SECONDS as f64 * 256.0, ns: CALC_SECONDS as f64 * 1e9 })
}

#[cfg(test)]
mod tests {
    use super::super::truth::{Pattern, windows};
    use super::*;

    /// 1000 pages a second, one after the other, without books.
    fn truth() -> Truth {
        let line =
            "WINDOW cpu=0 start_tsc=0 end_tsc=2000 distinct=2000 books=0 written=2000 dropped=0 longest_gap_ns=0\n";
        Truth::of(Pattern::Sequential, &windows(line.as_bytes(), 1000), 1000).unwrap()
    }

    #[test]
    fn an_armed_curve_is_held_against_the_truth() {
        let text = r#"{"window_ns":1000000000,"exact_unique_pages":1108.8,"cost":{"bpf_core_share":0.02},"curve":{"points":[
            {"interval_ns":10000000,"unique_pages":10,"low_pages":9,"high_pages":11},
            {"interval_ns":1000000000,"unique_pages":1000,"low_pages":1000,"high_pages":1010}]}}"#;
        let profile = Profile::parse(text).unwrap();
        assert!((profile.figure().error(&truth()) - 10.0).abs() < 1e-6);
        assert!((profile.core_percent() - 2.0).abs() < 1e-9 && profile.enough());
        let held = profile.held_against(&truth());
        // At 5 ms the truth is 5 and 8 others, the curve 5; at the end the truth is 1008.
        assert_eq!(held.len(), 5);
        assert!(held[0].outside && !held[4].outside, "{held:?}");
    }

    #[test]
    fn a_sampled_one_by_its_samples() {
        let text = r#"{"window_ns":1000000000,"curve":{"points":[]},"sampled":{"read_ns":3,"elapsed_ns":100,"windows":[
            {"effective_interval_ns":100000000,"unique_pages":100,"unique_pages_low":90,"unique_pages_high":110,"changed_pages":399},
            {"effective_interval_ns":992000000,"unique_pages":900,"unique_pages_low":850,"unique_pages_high":950,"changed_pages":400}]}}"#;
        let profile = Profile::parse(text).unwrap();
        assert!((profile.figure().error(&truth()) - 10.0).abs() < 1e-6);
        let held = profile.held_against(&truth());
        assert_eq!(
            held.iter().map(|held| (held.outside, held.enough)).collect::<Vec<_>>(),
            [(false, false), (true, true)]
        );
        assert!((profile.core_percent() - 3.0).abs() < 1e-9);
    }
}
