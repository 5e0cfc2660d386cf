//! `dunlin rogue`.

use std::time::Duration;

use clap::Args;

use super::profiling::{GuestFilesArgs, ProfilingArgs, no_profile};
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::model::units::{PAGE_SIZE, display_bytes, display_duration, parse_duration};
use crate::model::{BytesPerSecond, VmRef, Writer};
use crate::service::config::Config;
use crate::service::interrupt::Interrupt;
use crate::service::out::{complain, say};
use crate::service::profile::ProfileRequest;
use crate::service::rogues::{RogueError, RogueReport, rogues};
use crate::track::{DEFAULT_MARGIN, Regime, Terms};

/// Say who keeps a VM from migrating, and how far that writer would have to be slowed
///
/// Measures several windows, and forecasts from the curve whether pre-copy would get within the downtime on this link. If not, it shares
/// out what the link carries max-min fairly among vCPUs, and within these among guest address spaces and code: whoever stays above
/// its share in three of four windows is a rogue. A burst is none. Nothing is slowed.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dunlin rogue web-1 --bandwidth 10Gbit --downtime 300ms
  dunlin rogue pid:4711 --bandwidth 1Gbit --downtime 100ms --regime soft-dirty --allow-soft-dirty --allow-read-memory --json
  dunlin rogue pid:4711 --bandwidth 1Gbit --allow-soft-dirty --allow-read-memory --system-map System.map-6.1 --btf vmlinux-6.1

Exit codes: 0 it converges and nobody must be slowed, or the rogues were found; 3 it does not converge, and slowing vCPUs is not enough.")]
pub(super) struct RogueArgs {
    /// The VM: NAME, uuid:U or pid:P (any KVM process, or QEMU that emulates).
    vm: VmRef,

    #[command(flatten)]
    profiling: ProfilingArgs,

    /// Goodput of the link that the VM would be moved over.
    #[arg(long, value_name = "RATE")]
    bandwidth: BytesPerSecond,

    /// The downtime that is allowed.
    #[arg(long, value_name = "TIME", default_value = "300ms", value_parser = parse_duration)]
    downtime: Duration,

    /// What a switch costs in any case, before the first page.
    #[arg(long, value_name = "TIME", default_value = "5ms", value_parser = parse_duration)]
    switch_cost: Duration,

    /// The link's round trip.
    #[arg(long, value_name = "TIME", default_value = "1ms", value_parser = parse_duration)]
    rtt: Duration,

    /// Do not look for the names of the guest's processes.
    #[arg(long, conflicts_with_all = ["system_map", "btf"])]
    no_names: bool,

    #[command(flatten)]
    guest_files: GuestFilesArgs,

    /// How often to look.
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    looks: u32,
}

impl RogueArgs {
    /// Runs the command.
    pub(super) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let Self { vm, profiling, bandwidth, downtime, switch_cost, rtt, no_names, looks, guest_files } = self;
        let guest_files = guest_files.files();
        let who = !guest_files.is_empty();
        let request = match profiling.request(vm, config) {
            Ok(request) => ProfileRequest { names: !no_names, who, guest_files, ..request },
            Err(words) => {
                complain!("dunlin: {words}");
                return Ok(exit::USAGE);
            }
        };
        let terms = Terms { bandwidth, downtime, switch_cost, rtt };
        let interrupt = Interrupt::install()?;
        let bar = indicatif::ProgressBar::new(looks.into()).with_message(format!("looking at {}", request.vm));
        bar.enable_steady_tick(Duration::from_millis(200));
        let found =
            rogues(&request, &terms, DEFAULT_MARGIN, looks, &interrupt, &mut |done, _| bar.set_position(done.into()));
        bar.finish_and_clear();
        let report = match found {
            Err(RogueError::Profile(error)) => return no_profile(error),
            Err(RogueError::Terms(error)) => {
                complain!("dunlin: {error}");
                return Ok(exit::USAGE);
            }
            other => other?,
        };
        if json {
            say!("{}", serde_json::to_string(&report.tagged())?);
        } else {
            say!("{}", text(&report));
        }
        let helpless = !report.ranking.converges() && !report.ranking.enough;
        Ok(if helpless { exit::REFUSED } else { exit::DONE })
    }
}

fn text(report: &RogueReport) -> String {
    use std::fmt::Write;
    let mut out = String::new();
    let rate = |pages: f64| format!("{:.0} pages/s ({}/s)", pages, display_bytes((pages * PAGE_SIZE as f64) as u64));
    let vm = &report.vm;
    let _ = writeln!(
        out,
        "{} (pid {}) on {}/s within {}: {}",
        vm.name,
        vm.pid,
        display_bytes(report.bandwidth_bytes_per_second),
        display_duration(Duration::from_nanos(report.downtime_ns)),
        report.forecast.reason
    );
    let bound = if report.is_lower_bound { ", a lower bound" } else { "" };
    let _ = writeln!(
        out,
        "regime: {}{bound}; it writes {} of different pages over {}, and may write {}",
        report.regime.word(),
        rate(report.ranking.total_pages_per_second),
        display_duration(Duration::from_nanos(report.forecast.memory_time_ns)),
        rate(report.ranking.allowed_pages_per_second)
    );
    for note in &report.notes {
        let _ = writeln!(out, "note: {note}");
    }
    let _ = writeln!(out, "\n{:>12} {:>7} {:>12}  WRITER", "PAGES/s", "SHARE", "LIMIT");
    let shown = report.ranking.writers.iter().filter(|ranked| ranked.writer != Writer::Vm).take(12);
    for ranked in shown {
        let limit = ranked.limit_pages_per_second.map_or_else(|| "-".to_owned(), |limit| format!("{limit:.0}"));
        let _ = writeln!(
            out,
            "{:>12.0} {:>5.1} % {limit:>12}  {}",
            ranked.pages_per_second,
            ranked.share * 100.0,
            ranked.writer
        );
    }
    out.push('\n');
    if report.rogues.is_empty() {
        let _ = write!(out, "no rogue in {} looks", report.observations);
    }
    for (index, rogue) in report.rogues.iter().enumerate() {
        let limit = rogue
            .limit_pages_per_second
            .map_or_else(String::new, |limit| format!(", would have to write {} at most", rate(limit)));
        let end = if index + 1 < report.rogues.len() { "\n" } else { "" };
        let _ = write!(out, "rogue: {}: {}{limit}{end}", rogue.words, rate(rogue.pages_per_second));
    }
    if report.regime == Regime::Sampled {
        let _ = write!(
            out,
            "\nsampled: who writes does not show, only where; regions are estimates, and slowing is a vCPU's: measure under another regime"
        );
    } else if !report.ranking.enough {
        let _ =
            write!(out, "\nslowing vCPUs is not enough: too much is written by devices, by KVM, or by nobody known");
    }
    out
}
