//! The bench `zero-scan`: how fast zero pages are found, beside how fast one core reads the same memory.

use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::Effort;
use super::measure::{Aim, Row, Samples};
use crate::run;
use crate::workspace::root;

const BENCH: &str = "zero-scan";
/// Far more than any cache.
const MEBIBYTES: usize = 1024;
/// Looking for zeros takes at most so many times as long as reading: 0.8 of its bandwidth.
const AIM_RATIO: f64 = 1.25;
const CASES: [&str; 3] = ["zero", "nonzero-at-the-end", "nonzero-at-the-start"];

/// What the footer says of the metrics.
pub(super) const DEFINITIONS: &str = "\
1 GiB in a memory file, as guest RAM is, every page of it there before. One core, the three in turn:
  time_ratio       looking for zeros (migrate::zero_bits) / reading (the sum of all words, by vectors of the same width), of the same run
  scan, words      bytes looked through per second: by vectors, and by atomic words, one at a time
  read             bytes read per second
A page that is nonzero at its start is known by its first bytes, so it is looked through faster than it could be read.";

/// Measures.
pub(super) fn run(effort: &Effort) -> Result<Vec<Row>> {
    let mut command = Command::new("cargo");
    command.args(["build", "--release", "--package", "dunlin", "--example", "zero_scan"]).current_dir(root());
    run::run(command.stdout(Stdio::null()))?;
    let mut command = Command::new(root().join("target/release/examples/zero_scan"));
    command.args([MEBIBYTES, effort.runs].map(|number| number.to_string()));
    let output = command.stderr(Stdio::inherit()).output().context("the scan could not be started")?;
    if !output.status.success() {
        bail!("the scan failed ({})", output.status);
    }
    let text = String::from_utf8(output.stdout).context("the scan's words")?;
    CASES.iter().map(|case| rows(case, &text)).collect::<Result<Vec<_>>>().map(|rows| rows.concat())
}

fn seconds(text: &str, case: &str, what: &str) -> Vec<f64> {
    let lines = text.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    lines
        .filter(|words| words[..words.len() - 1] == [case, what])
        .filter_map(|words| words.last()?.parse().ok())
        .collect()
}

fn rows(case: &str, text: &str) -> Result<Vec<Row>> {
    let samples = |values: &mut dyn Iterator<Item = f64>| {
        let mut samples = Samples::default();
        values.for_each(|value| samples.push(value));
        samples
    };
    let [read, scan, words] = ["read", "scan", "words"].map(|what| seconds(text, case, what));
    if scan.is_empty() || read.len() != scan.len() || words.len() != scan.len() {
        bail!("the scan said nothing of the case {case}: {text}");
    }
    let speed = |seconds: &[f64]| samples(&mut seconds.iter().map(|seconds| MEBIBYTES as f64 / 1024.0 / seconds));
    let ratio = samples(&mut scan.iter().zip(&read).map(|(scan, read)| scan / read));
    let row = |metric, unit, samples: &Samples, aim| Row::new(BENCH, case, metric, unit, samples, aim);
    Ok(vec![
        row("time_ratio", "ratio", &ratio, Aim::AtMost(AIM_RATIO)),
        row("scan", "GiB/s", &speed(&scan), Aim::None).beside("read", &speed(&read), Aim::None),
        row("words", "GiB/s", &speed(&words), Aim::None).beside("read", &speed(&read), Aim::None),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::measure::json;

    #[test]
    fn lines_become_ratios_and_speeds() {
        let text = "zero read 0.1\nzero scan 0.11\nzero words 0.2\nzero read 0.1\nzero scan 0.13\nzero words 0.2\n";
        let rows = rows("zero", text).unwrap();
        let lines: Vec<serde_json::Value> =
            json(&rows).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        assert_eq!((&lines[0]["value"], &lines[0]["ok"]), (&1.2.into(), &true.into()));
        assert_eq!((&lines[1]["value"], &lines[1]["peer_value"]), (&8.392.into(), &10.0.into()));
        assert!(super::rows("nonzero-at-the-end", text).is_err());
    }
}
