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

/// A name, and what is asked for.
type Way = (&'static str, &'static [&'static str]);

/// What the writer does: a case's name, its workload, and what is measured on it.
const LOADS: [(&str, &str, &[Way]); 3] = [
    ("text", "rate:20000,pattern:hotcold,fill:text", &WAYS),
    ("random-5%", "rate:20000,pattern:hotcold,share:5,fill:random", &WAYS),
    ("pool", "rate:20000,pattern:hotcold,fill:random dunlin.pool=size:192M,churn:2000", &GUEST_WAYS),
];

/// What the guest is asked for.
const GUEST_WAYS: [Way; 3] =
    [(NONE, &[]), ("free-pages", &["--free-pages"]), ("balloon-before", &["--balloon-before", "384MiB"])];

/// What is asked for. Zero pages go as a mark in all of them that do not say otherwise.
const WAYS: [Way; 10] = [
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
whole (text), or 5 % of pages of random data (random-5%); or random pages, beside 192 MiB that it does not need, of which it uses or frees 2000 pages/s (pool). One migration by pre-copy over loopback at 1 Gbit/s, each way in turn; `none` marks zero pages and
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
    if let Some(unknown) = effort.cases.iter().find(|name| LOADS.iter().all(|(load, ..)| load != name)) {
        bail!("there is no case `{unknown}`; the cases are {}", LOADS.map(|(name, ..)| name).join(", "));
    }
    let mut rows = Vec::new();
    for (load, workload, ways) in LOADS {
        if !effort.cases.is_empty() && effort.cases.iter().all(|case| case != load) {
            continue;
        }
        let mut sides: Vec<Side> = ways.iter().map(|_| Side::default()).collect();
        let Some(index_of_none) = ways.iter().position(|(name, _)| *name == NONE) else {
            bail!("no `{NONE}` to measure against");
        };
        for number in 0..effort.runs {
            let mut reports = Vec::new();
            for (_, more) in ways {
                let vm = Vm::boot(places, &Load::filled(WORKING_SET, workload), "bitmap")?;
                fresh::recall()?;
                reports.push(vm.migrate(Options { limit: Some(LIMIT), more, ..Options::default() })?.report);
            }
            let none = reports[index_of_none].clone();
            for (side, report) in sides.iter_mut().zip(&reports) {
                side.wire.push(report.wire_mib());
                side.wire_ratio.push(report.wire_mib() / none.wire_mib());
                side.total.push(report.total_ms());
                side.total_ratio.push(report.total_ms() / none.total_ms());
                side.blackout.push(report.blackout_ms());
                side.cpu.push(report.reducers_cpu_ms());
            }
            let said =
                ways.iter().zip(&reports).map(|((name, _), report)| format!("{name} {:.0} ms", report.total_ms()));
            eprintln!("{load} {}/{}: {}", number + 1, effort.runs, said.collect::<Vec<_>>().join(", "));
        }
        let none = &sides[index_of_none];
        for ((name, _), side) in ways.iter().zip(&sides) {
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
