//! The bench `reducers`: what each way of sending fewer bytes spares and costs, beside none of them in the same run.

use anyhow::{Result, bail};

use super::guest::Load;
use super::measure::{Aim, Row, Samples};
use super::ours::{Options, Places, Vm};
use super::{Effort, fresh};

const BENCH: &str = "reducers";
/// 1 Gbit/s in bytes.
const LIMIT: u64 = 125_000_000;
/// The writer's working set, in MiB.
const WORKING_SET: u64 = 128;
/// Fewer of everything, and what is measured against.
const NONE: &str = "none";

/// What the writer does: a case's name, and its workload.
const LOADS: [(&str, &str); 2] =
    [("text", "rate:20000,pattern:hotcold,fill:text"), ("random-5%", "rate:20000,pattern:hotcold,share:5,fill:random")];

/// What is asked for. Zero pages go as a mark in all of them that do not say otherwise.
const WAYS: [(&str, &[&str]); 10] = [
    ("zeros-too", &["--zero-pages=false"]),
    (NONE, &[]),
    ("lz4", &["--compress", "lz4"]),
    ("zstd", &["--compress", "zstd"]),
    ("auto", &["--compress", "auto"]),
    ("delta", &["--delta", "64MiB"]),
    ("dedup", &["--dedup"]),
    ("dedup-zeros-too", &["--dedup", "--zero-pages=false"]),
    ("skip-hot", &["--skip-hot"]),
    ("all", &["--compress", "auto", "--delta", "64MiB", "--dedup", "--skip-hot"]),
];

/// What the footer says of the metrics.
pub(super) const DEFINITIONS: &str = "\
Guest: 512 MiB, 2 vCPUs, of which one writes 20 000 pages/s in a working set of 128 MiB, nine in ten of them to a tenth of it: pages of text that are rewritten
whole (text), or 5 % of pages of random data (random-5%). One migration by pre-copy over loopback at 1 Gbit/s, each way in turn; `none` marks zero pages and
does nothing else, `zeros-too` sends them as well. The guest's text compresses better than most, and it has hardly a page twice but zeros. The peer is `none` of the same run.
  wire_ratio       bytes on the wire / those of `none`
  total_ratio      from the offer to `running`, reservation counted / that of `none`
  wire, total      the same, not as a ratio
  blackout         by the source's clock
  cpu              CPU time of the source's stream threads that the reducers took, looking for zeros included";

/// One way's samples.
#[derive(Default)]
struct Side {
    wire: Samples,
    wire_ratio: Samples,
    total: Samples,
    total_ratio: Samples,
    blackout: Samples,
    cpu: Samples,
}

/// Runs the loads named by `effort`, or all of them.
pub(super) fn run(places: &Places, effort: &Effort) -> Result<Vec<Row>> {
    if let Some(unknown) = effort.cases.iter().find(|name| LOADS.iter().all(|(load, _)| load != name)) {
        bail!("there is no case `{unknown}`; the cases are {}", LOADS.map(|(name, _)| name).join(", "));
    }
    let mut rows = Vec::new();
    for (load, workload) in LOADS {
        if !effort.cases.is_empty() && effort.cases.iter().all(|case| case != load) {
            continue;
        }
        let mut sides = WAYS.map(|_| Side::default());
        for number in 0..effort.runs {
            let mut reports = Vec::new();
            for (_, more) in WAYS {
                let vm = Vm::boot(places, &Load::filled(WORKING_SET, workload), "bitmap")?;
                fresh::recall()?;
                reports.push(vm.migrate(Options { limit: Some(LIMIT), more, ..Options::default() })?.report);
            }
            let Some(none) = WAYS.iter().position(|(name, _)| *name == NONE).map(|index| reports[index].clone()) else {
                bail!("no `{NONE}` to measure against");
            };
            for (side, report) in sides.iter_mut().zip(&reports) {
                side.wire.push(report.wire_mib());
                side.wire_ratio.push(report.wire_mib() / none.wire_mib());
                side.total.push(report.total_ms());
                side.total_ratio.push(report.total_ms() / none.total_ms());
                side.blackout.push(report.blackout_ms());
                side.cpu.push(report.reducers_cpu_ms());
            }
            let said =
                WAYS.iter().zip(&reports).map(|((name, _), report)| format!("{name} {:.0} ms", report.total_ms()));
            eprintln!("{load} {}/{}: {}", number + 1, effort.runs, said.collect::<Vec<_>>().join(", "));
        }
        let none = &sides[1];
        for ((name, _), side) in WAYS.iter().zip(&sides) {
            let row = |metric, unit, samples: &Samples| {
                Row::new(BENCH, &format!("{load}/{name}"), metric, unit, samples, Aim::None)
            };
            rows.extend([
                row("wire_ratio", "ratio", &side.wire_ratio),
                row("total_ratio", "ratio", &side.total_ratio),
                row("wire", "MiB", &side.wire).beside(NONE, &none.wire, Aim::None),
                row("total", "ms", &side.total).beside(NONE, &none.total, Aim::None),
                row("blackout", "ms", &side.blackout).beside(NONE, &none.blackout, Aim::None),
                row("cpu", "ms", &side.cpu).beside(NONE, &none.cpu, Aim::None),
            ]);
        }
    }
    Ok(rows)
}
