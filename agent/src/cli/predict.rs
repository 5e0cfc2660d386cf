//! `dunlin predict`.

use std::time::Duration;

use clap::Args;

use super::profiling::{ProfilingArgs, no_profile};
use crate::migrate::SourceOptions;
use crate::model::BytesPerSecond;
use crate::model::outcome::exit;
use crate::model::schema::Schema;
use crate::model::units::{display_bytes, display_duration, parse_duration};
use crate::predict::Course;
use crate::service::config::Config;
use crate::service::interrupt::Interrupt;
use crate::service::out::{complain, say};
use crate::service::prediction::{PredictionError, PredictionReport, prediction};
use crate::track::Terms;

/// Say what moving a VM would take, before anything is moved, and which strategy to take
///
/// Measures how the VM writes its memory, as `dunlin wws` does, and what of its memory is not zero. From that it reckons each strategy's total
/// time, blackout, bytes and slowdown of the guest, with what they may be at the better and at the worse end of what is known.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  dunlin predict web-1 --bandwidth 10Gbit
  dunlin predict web-1 --bandwidth 1Gbit --downtime 50ms --all
  dunlin predict pid:4711 --bandwidth 1Gbit --downtime 300ms --allow-soft-dirty --allow-read-memory --json

Exit codes: 0 a strategy that the VM can be moved by today is expected to keep to the downtime; 3 none is.")]
pub(super) struct PredictArgs {
    #[command(flatten)]
    profiling: ProfilingArgs,

    /// Goodput of the link that the VM would be moved over.
    #[arg(long, value_name = "RATE")]
    bandwidth: BytesPerSecond,

    /// The downtime that is allowed, fixed costs included [default: that of `dunlin migrate`].
    #[arg(long, value_name = "TIME", value_parser = parse_duration)]
    downtime: Option<Duration>,

    /// What a switch costs besides the last pages [default: what `dunlin migrate` takes it to be].
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
        let Self { profiling, bandwidth, downtime, fixed_cost, rtt, all } = self;
        let request = match profiling.request(config) {
            Ok(request) => request,
            Err(words) => {
                complain!("dunlin: {words}");
                return Ok(exit::USAGE);
            }
        };
        let terms = Terms {
            bandwidth,
            downtime: downtime.unwrap_or(config.migrate.downtime),
            switch_cost: fixed_cost.unwrap_or(SourceOptions::default().fixed_cost),
            rtt,
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

fn text(report: &PredictionReport, all: bool) -> String {
    use std::fmt::Write;
    let time = |ns: u64| display_duration(Duration::from_nanos(ns));
    let mut out = String::new();
    let vm = &report.vm;
    let _ = writeln!(
        out,
        "{} (pid {}, run by {}) over {}/s within {}: {} of {} of memory are not zero ({} to {})",
        vm.name,
        vm.pid,
        report.vmm,
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
        "regime: {}{bound}; switching over takes {} and a round trip of {}",
        report.regime.word(),
        time(report.fixed_cost_ns),
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
