//! `dunlin exits`.

use std::time::Duration;

use clap::Args;

use super::dirty_rate::{check_interval, printer, told};
use super::places::RunDir;
use crate::model::VmRef;
use crate::model::outcome::exit;
use crate::model::units::{display_duration, parse_duration};
use crate::service::config::Config;
use crate::service::exits::{ExitRow, ExitsReport, ExitsRequest, exits};
use crate::service::interrupt::Interrupt;
use crate::service::out::complain;

/// Show why a VM leaves its guest, how often and for how long
///
/// Counts in the kernel, per vCPU and reason, with a histogram of times: exits from guest code until the guest goes on (where this
/// KVM backend tells them), and exits to the VMM until it comes back. Works on any KVM process of this host and changes nothing in
/// it. An exit to the VMM is part of an exit from guest code, so the two kinds do not add up.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  dunlin exits web-1 --interval 1s --count 5\n  dunlin exits pid:4711 --per-vcpu --json"
)]
pub(super) struct ExitsArgs {
    /// The VM: NAME, uuid:U or pid:P (any KVM process).
    vm: VmRef,

    /// The length of an interval.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_duration)]
    interval: Duration,

    /// How many intervals to report [default: until Ctrl-C].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,

    /// Rows for each vCPU instead of for the whole VM.
    #[arg(long)]
    per_vcpu: bool,

    #[command(flatten)]
    run_dir: RunDir,
}

impl ExitsArgs {
    /// Runs the command.
    pub(super) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let Self { vm, interval, count, per_vcpu, run_dir } = self;
        if let Err(words) = check_interval(interval) {
            complain!("dunlin: {words}");
            return Ok(exit::USAGE);
        }
        let interrupt = Interrupt::install()?;
        let request = ExitsRequest { run_dir: run_dir.path(config), vm, interval, count, per_vcpu };
        let ended = exits(&request, &interrupt, printer(json, text))?;
        Ok(told(ended, &request.vm))
    }
}

/// One interval for people.
fn text(report: &ExitsReport, first: bool) -> String {
    use std::fmt::Write;
    let mut out = String::new();
    let vm = &report.vm;
    let _ = writeln!(
        out,
        "{} (pid {}, {} vCPUs, {}), {}",
        vm.name,
        vm.pid,
        vm.cpus,
        report.backend,
        display_duration(Duration::from_nanos(report.interval_ns))
    );
    if first {
        for missing in &report.missing_sources {
            let _ = writeln!(out, "  not seen: {} ({}: {})", missing.gives, missing.name, missing.reason);
        }
    }
    let _ = writeln!(
        out,
        "  {:<4} {:>8} {:<24} {:>10} {:>11} {:>8} {:>9} {:>9} {:>9} {:>9}",
        "TO", "THREAD", "REASON", "EXITS", "EXITS/s", "TIME", "MEAN", "P50", "P99", "MAX"
    );
    for row in &report.exits {
        let _ = writeln!(out, "{}", line(row));
    }
    if report.exits.is_empty() {
        let _ = writeln!(out, "  none");
    }
    out
}

fn line(row: &ExitRow) -> String {
    let time =
        |ns: Option<f64>| ns.map_or_else(|| "-".to_owned(), |ns| display_duration(Duration::from_nanos(ns as u64)));
    let whole = |ns: Option<u64>| time(ns.map(|ns| ns as f64));
    format!(
        "  {:<4} {:>8} {:<24} {:>10} {:>11.1} {:>8} {:>9} {:>9} {:>9} {:>9}",
        row.to,
        row.thread_id.map_or_else(|| "all".to_owned(), |id| id.to_string()),
        row.reason,
        row.count,
        row.exits_per_second,
        row.time_share.map_or_else(|| "-".to_owned(), |share| format!("{:.2} %", share * 100.0)),
        time(row.mean_ns),
        whole(row.p50_ns),
        whole(row.p99_ns),
        whole(row.longest_ns)
    )
}
