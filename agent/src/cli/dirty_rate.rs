//! `dunlin dirty-rate`.

use std::io::{self, Write as _};
use std::time::Duration;

use clap::Args;

use super::places::RunDir;
use crate::model::VmRef;
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::model::units::{display_bytes, display_duration, parse_duration, parse_size_bytes};
use crate::service::config::Config;
use crate::service::interrupt::Interrupt;
use crate::service::observe::{DirtyRateReport, Ended, ObserveRequest, observe};
use crate::service::out::complain;

/// Watch how a VM writes its memory, from outside it
///
/// Counts in the kernel which pages turn writable, per vCPU, and how many different ones in each interval. Works on any KVM
/// process of this host and changes nothing in it. Each figure says under which regime it was taken: while nothing
/// write-protects a VM's pages, rewrites of a page cannot be seen, and the figure is a lower bound.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  dunlin dirty-rate web-1 --interval 1s --count 5\n  dunlin dirty-rate pid:4711 --json"
)]
pub(super) struct DirtyRateArgs {
    #[command(flatten)]
    watch: WatchArgs,
}

/// What to watch, and how: what `dunlin record` takes too.
#[derive(Debug, Args)]
pub(super) struct WatchArgs {
    /// The VM: NAME, uuid:U or pid:P (any KVM process).
    vm: VmRef,

    /// The length of an interval.
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = parse_duration)]
    interval: Duration,

    /// How many intervals to report [default: until Ctrl-C].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,

    /// Write-protect the VM's pages in each interval, so that rewrites are seen too (VMs that dunlin runs; costs the guest
    /// about 2.5 µs for each page and interval).
    #[arg(long)]
    arm: bool,

    /// Tell guest pages apart up to this address [default: the VM's memory and 4 GiB].
    #[arg(long, value_name = "SIZE", value_parser = parse_size_bytes)]
    max_address: Option<u64>,

    /// Print diagnostics of the BPF programs themselves.
    #[arg(long)]
    probe_log: bool,

    #[command(flatten)]
    run_dir: RunDir,
}

/// Intervals shorter than this measure mostly themselves.
const SHORTEST: Duration = Duration::from_millis(10);

/// Whether intervals may be so short; else why not, in words.
pub(super) fn check_interval(interval: Duration) -> Result<(), String> {
    if interval < SHORTEST {
        return Err(format!("--interval must be at least {}", display_duration(SHORTEST)));
    }
    Ok(())
}

impl WatchArgs {
    /// What they ask for.
    ///
    /// # Errors
    /// In words, what cannot be.
    pub(super) fn request(self, config: &Config) -> Result<ObserveRequest, String> {
        let Self { vm, interval, count, arm, max_address, probe_log, run_dir } = self;
        check_interval(interval)?;
        let run_dir = run_dir.path(config);
        Ok(ObserveRequest {
            run_dir,
            vm,
            interval,
            count,
            max_address_bytes: max_address,
            arm,
            single_writes: None,
            probe_log,
        })
    }
}

impl DirtyRateArgs {
    /// Runs the command.
    pub(super) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let request = match self.watch.request(config) {
            Ok(request) => request,
            Err(words) => {
                complain!("dunlin: {words}");
                return Ok(exit::USAGE);
            }
        };
        let interrupt = Interrupt::install()?;
        let ended = observe(&request, &interrupt, printer(json, text))?;
        Ok(told(ended, &request.vm))
    }
}

/// Prints report after report: as JSON, or as `text` has it, which is told whether it is the first.
pub(super) fn printer<R: Schema>(json: bool, text: fn(&R, bool) -> String) -> impl FnMut(&R) -> io::Result<()> {
    let mut first = true;
    move |report| {
        let text = if json {
            serde_json::to_string(&report.tagged())? + "\n"
        } else {
            text(report, std::mem::take(&mut first))
        };
        let mut out = io::stdout().lock();
        out.write_all(text.as_bytes())?;
        out.flush()
    }
}

/// The exit code of an observation; says so if the VM has ended.
pub(super) fn told(ended: Ended, vm: &VmRef) -> u8 {
    match ended {
        Ended::Counted | Ended::Interrupted | Ended::NobodyReads => exit::DONE,
        Ended::VmGone => {
            complain!("dunlin: {vm} has ended");
            exit::ERROR
        }
    }
}

/// One interval for people; what stays the same is said once.
pub(super) fn text(report: &DirtyRateReport, first: bool) -> String {
    use std::fmt::Write;
    let DirtyRateReport { vm, rate, missing_sources, single_writes } = report;
    let mut out = String::new();
    let mut line = |text: std::fmt::Arguments<'_>| {
        let _ = out.write_fmt(text);
        out.push('\n');
    };
    if first {
        line(format_args!("{} (pid {}, {} vCPUs)", vm.name, vm.pid, vm.cpus));
        for missing in missing_sources {
            line(format_args!("  not attached: {} ({}): {}", missing.name, missing.gives, missing.reason));
        }
    }
    let bound = if rate.is_lower_bound { "at least " } else { "" };
    line(format_args!(
        "{bound}{:.0} pages/s ({:.2} MiB/s), {bound}{} unique pages ({}) in {}",
        rate.pages_per_second,
        rate.bytes_per_second / f64::from(1 << 20),
        rate.unique_pages,
        display_bytes(rate.unique_bytes),
        display_duration(Duration::from_nanos(rate.interval_ns)),
    ));
    for thread in &rate.threads {
        line(format_args!(
            "  {:<16} {:>7}  {:>10.0} pages/s  {:>5.1} %  {:>8.0} exits/s",
            thread.name.as_deref().unwrap_or("(ended)"),
            thread.thread_id,
            thread.pages_per_second,
            thread.share * 100.0,
            thread.exits_per_second,
        ));
    }
    if !rate.exits.is_empty() {
        let exits: Vec<String> = rate.exits.iter().map(|(reason, count)| format!("{reason} {count}")).collect();
        line(format_args!("  exits: {}", exits.join(", ")));
    }
    let lost = &rate.lost_events;
    let detail = [
        ("beyond the tracked addresses (--max-address)", lost.out_of_range),
        ("of too many threads", lost.threads_full),
        ("of too many exit reasons", lost.exits_full),
        ("of mappings above 2 MiB (no unique pages)", lost.too_large),
        ("unreadable", lost.unreadable),
    ];
    let detail: Vec<String> =
        detail.iter().filter(|(_, count)| *count > 0).map(|(what, count)| format!("{count} {what}")).collect();
    let detail = if detail.is_empty() { String::new() } else { format!(" ({})", detail.join(", ")) };
    line(format_args!("  source: {}; lost events: {}{detail}", rate.source, lost.total));
    if let Some(writes) = single_writes {
        line(format_args!("  single writes: {writes} kept, {} not, as the buffer was full", lost.writes_full));
    }
    let regime = rate.regime.word();
    if first {
        line(format_args!("  regime: {regime}; {}", rate.meaning));
    } else {
        line(format_args!("  regime: {regime}"));
    }
    out
}
