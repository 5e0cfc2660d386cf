//! `dunlin predict`.

use std::time::Duration;

use clap::Args;

use super::migrate::BandwidthArg;
use super::profiling::{ProfilingArgs, no_profile};
use crate::link::Address;
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::model::units::{display_bytes, display_duration, parse_duration};
use crate::model::{BytesPerSecond, VmRef};
use crate::predict::{Asked, Course};
use crate::service::config::Config;
use crate::service::interrupt::Interrupt;
use crate::service::out::{complain, say};
use crate::service::prediction::{self, PredictHistory, PredictTerms, PredictionError, PredictionReport, prediction};

/// Say what moving a VM would take, before anything is moved, and which strategy to take
///
/// Measures how the VM writes its memory, as `dunlin wws` does, and what of its memory is not zero. From that it reckons each strategy's total
/// time, blackout, bytes and slowdown of the guest, with what they may be at the better and at the worse end of what is known.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dunlin predict web-1 --bandwidth 10Gbit
  dunlin predict web-1 --bandwidth 1Gbit --downtime 50ms --to tcp://192.0.2.7:4460 --all
  dunlin predict --history
  dunlin predict pid:4711 --bandwidth 1Gbit --downtime 300ms --allow-soft-dirty --allow-read-memory --json

Exit codes: 0 a strategy that the VM can be moved by today is expected to keep to the downtime; 3 none is.")]
pub(super) struct PredictArgs {
    /// The VM: NAME, uuid:U or pid:P (any KVM process, or QEMU that emulates).
    #[arg(required_unless_present = "history", conflicts_with = "history")]
    vm: Option<VmRef>,

    #[command(flatten)]
    profiling: ProfilingArgs,

    /// Goodput of the link that the VM would be moved over, or the limit that `dunlin migrate` will be given; MIN..MAX is one that begins at MIN and follows what the VM dirties.
    #[arg(long, value_name = "RATE", required_unless_present = "history", conflicts_with = "history")]
    bandwidth: Option<BandwidthArg>,

    /// What the link carries, where --bandwidth is a limit below it: QEMU does not limit what it sends of the paused VM.
    #[arg(long, value_name = "RATE", conflicts_with = "history")]
    link: Option<BytesPerSecond>,

    /// Rounds of `hybrid` before the VM moves, 1 to 30.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=30))]
    hybrid_rounds: u32,

    /// Show how far predictions of migrations that this host has done were off.
    #[arg(long)]
    history: bool,

    /// Where it would be moved to: the fixed cost is then that of earlier migrations there.
    #[arg(long, value_name = "ADDRESS")]
    to: Option<Address>,

    /// The downtime that is allowed, fixed costs included [default: that of `dunlin migrate`].
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    downtime: Option<Duration>,

    /// What a switch costs besides the last pages [default: what it cost earlier migrations to that host, else to others, else 3 ms].
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    fixed_cost: Option<Duration>,

    /// The link's round trip.
    #[arg(long, value_name = "TIME", default_value = "1ms", value_parser = parse_duration)]
    rtt: Duration,

    /// Show strategies, too, by which this VM cannot be moved today: what their formulas say.
    #[arg(long)]
    all: bool,
}

impl PredictArgs {
    /// Runs the command.
    pub(super) fn run(self, json: bool, config: &Config) -> anyhow::Result<u8> {
        let Self { vm, profiling, bandwidth, link, hybrid_rounds, history, to, downtime, fixed_cost, rtt, all } = self;
        let (Some(vm), Some(bandwidth), false) = (vm, bandwidth, history) else {
            let found = prediction::history(&profiling.state_dir(config));
            if json {
                say!("{}", serde_json::to_string(&found.tagged())?);
            } else {
                say!("{}", history_text(&found));
            }
            return Ok(exit::DONE);
        };
        let request = match profiling.request(vm, config) {
            Ok(request) => request,
            Err(words) => {
                complain!("dunlin: {words}");
                return Ok(exit::USAGE);
            }
        };
        let terms = PredictTerms {
            bandwidth: bandwidth.most.unwrap_or(bandwidth.least),
            asked: Asked { link, least: bandwidth.most.map(|_| bandwidth.least), hybrid_rounds },
            downtime: downtime.unwrap_or(config.migrate.downtime),
            fixed_cost,
            rtt,
            peer: to.map(|to| to.host().to_owned()),
        };
        let interrupt = Interrupt::install()?;
        let bar = indicatif::ProgressBar::new(1).with_message(format!("measuring {}", request.vm));
        bar.enable_steady_tick(Duration::from_millis(200));
        let found = prediction(&request, &terms, &interrupt, &mut |done, windows| {
            bar.set_length(windows.into());
            bar.set_position(done.into());
        });
        bar.finish_and_clear();
        let report = match found {
            Err(PredictionError::Profile(error)) => return no_profile(error),
            Err(PredictionError::Terms(error)) => {
                complain!("dunlin: {error}");
                return Ok(exit::USAGE);
            }
            Ok(report) => report,
        };
        if json {
            say!("{}", serde_json::to_string(&report.tagged())?);
        } else {
            say!("{}", text(&report, all));
        }
        let keeps = report.chosen.as_ref().is_some_and(|choice| choice.meets_downtime);
        Ok(if keeps { exit::DONE } else { exit::REFUSED })
    }
}

/// How far predictions were off, as a person reads it.
fn history_text(history: &PredictHistory) -> String {
    use std::fmt::Write;
    let mut out = format!("{} migrations are in the log", history.migrations.len());
    if history.damaged_lines > 0 {
        let _ = write!(out, "; {} lines of it cannot be read", history.damaged_lines);
    }
    if history.errors.is_empty() {
        let _ = write!(out, ", none of them foretold");
        return out;
    }
    let _ = write!(out, "\n{:<19} {:>11} {:>21} {:>34}", "STRATEGY", "MIGRATIONS", "TOTAL OFF BY", "BLACKOUT OFF BY");
    let percent = |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.1} %"));
    let time =
        |value: Option<u64>| value.map_or_else(|| "-".to_owned(), |ns| display_duration(Duration::from_nanos(ns)));
    for errors in &history.errors {
        let total =
            format!("{} (at most {})", percent(errors.total_median_percent), percent(errors.total_worst_percent));
        let blackout = format!(
            "{}, {} (at most {})",
            percent(errors.blackout_median_percent),
            time(errors.blackout_median_ns),
            time(errors.blackout_worst_ns)
        );
        let _ = write!(out, "\n{:<19} {:>11} {total:>21} {blackout:>34}", errors.plan, errors.migrations);
    }
    out
}

fn text(report: &PredictionReport, all: bool) -> String {
    use std::fmt::Write;
    let time = |ns: u64| display_duration(Duration::from_nanos(ns));
    let mut out = String::new();
    let vm = &report.vm;
    let _ = writeln!(
        out,
        "{} (pid {}, run by {}) over {}{}/s within {}: {} of {} of memory are not zero ({} to {})",
        vm.name,
        vm.pid,
        report.vmm,
        report.least_bytes_per_second.map_or_else(String::new, |least| format!("{}/s to ", display_bytes(least))),
        display_bytes(report.bandwidth_bytes_per_second),
        time(report.downtime_ns),
        display_bytes(report.filled_bytes),
        display_bytes(report.memory_bytes),
        display_bytes(report.filled_bytes_low),
        display_bytes(report.filled_bytes_high),
    );
    let bound = if report.is_lower_bound { ", a lower bound" } else { "" };
    let _ = writeln!(
        out,
        "regime: {}{bound}; switching over takes {} ({}) and a round trip of {}",
        report.regime.word(),
        time(report.fixed_cost_ns),
        report.fixed_cost_from.words(),
        time(report.rtt_ns)
    );
    for note in &report.notes {
        let _ = writeln!(out, "note: {note}");
    }
    let _ = writeln!(
        out,
        "\n{:<19} {:>36} {:>36} {:>12} {:>7} {:>8}",
        "STRATEGY", "TOTAL", "BLACKOUT", "WIRE", "ROUNDS", "SLOWER"
    );
    let shown = report.strategies.iter().filter(|way| all || way.prediction.is_available);
    for way in shown {
        let found = &way.prediction;
        let band = |of: fn(&Course) -> Option<u64>| {
            let word = |ns: u64| if ns == u64::MAX { "never".to_owned() } else { time(ns) };
            let of = |course: &Course| of(course).unwrap_or(u64::MAX);
            let (least, most) = found.span(of);
            format!("{} ({} to {})", word(of(&found.expected)), word(least), word(most))
        };
        let mark = if found.is_available { "" } else { " *" };
        let _ = writeln!(
            out,
            "{:<19} {:>36} {:>36} {:>12} {:>7} {:>6.1} %",
            format!("{}{mark}", found.plan),
            band(|course| course.total_ns),
            band(|course| course.blackout_ns),
            display_bytes(found.expected.wire_bytes),
            found.expected.rounds,
            found.expected.guest_slowdown * 100.0,
        );
    }
    if all && report.strategies.iter().any(|way| !way.prediction.is_available) {
        let _ = writeln!(out, "* this VM cannot be moved so today: what the formula says");
    }
    match &report.chosen {
        None => {
            let _ = write!(out, "\nnothing is known of how {} moves its VMs", report.vmm);
        }
        Some(choice) => {
            let _ = write!(out, "\nauto: {}: {}", choice.plan, choice.reason);
            let chosen = report.strategies.iter().find(|way| way.prediction.plan == choice.plan);
            for command in chosen.iter().flat_map(|way| &way.commands) {
                let _ = write!(out, "\n  {command}");
            }
        }
    }
    out
}
