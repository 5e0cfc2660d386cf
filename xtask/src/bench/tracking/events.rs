//! The case `events`: what the BPF programs cost for each event, by the kernel's own count of their run time. The measuring itself is
//! `dunlin-bench-events` (`tests/src/bin`), which needs the agent's crate.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use super::super::measure::{Aim, Row, Samples};
use super::super::ours::answer;
use super::BENCH;
use crate::run;
use crate::workspace::root;

/// The case.
pub(super) const EVENTS: &str = "events";
const PROGRAM: &str = "dunlin-bench-events";
/// Time of one measurement.
const MILLIS: u64 = 2000;
const QUICK_MILLIS: u64 = 500;
/// How long a measurement may take, with what it takes to begin and end.
const LIMIT: Duration = Duration::from_secs(30);
/// What an event may cost, in nanoseconds.
const AIM_EVENT_NS: f64 = 150.0;
/// The budget of all programs, in percent of one core.
const AIM_CORE_PERCENT: f64 = 1.0;

/// Who makes events.
struct Source {
    name: &'static str,
    vms: &'static str,
    rate: Option<&'static str>,
}

const SOURCES: [Source; 3] = [
    Source { name: "200k", vms: "1", rate: Some("200000") },
    Source { name: "max", vms: "1", rate: None },
    Source { name: "max-2-vms", vms: "2", rate: None },
];

/// What is attached; the first one is a program that does nothing.
const WHAT: [&str; 5] = ["empty", "counting", "first-writes", "attributing", SINGLE];
/// Only when somebody asks for each write by itself: no aim holds for it.
const SINGLE: &str = "single-writes";

/// One `EVENTS` line.
#[derive(Clone, Copy, Debug)]
struct Measured {
    elapsed_ns: f64,
    events: f64,
    event_run_time_ns: f64,
    run_time_ns: f64,
    lost: f64,
}

#[derive(Default)]
struct Side {
    event_ns: Samples,
    net_ns: Samples,
    rate: Samples,
    core: Samples,
    lost: Samples,
}

/// Builds the program.
pub(super) fn build() -> Result<PathBuf> {
    eprintln!("building {PROGRAM} (release)");
    let arguments = ["build", "--release", "--package", "dunlin-tests", "--bin", PROGRAM];
    run::run(Command::new("cargo").args(arguments).current_dir(root()).stdout(Stdio::null()))?;
    Ok(root().join("target/release").join(PROGRAM))
}

/// Measures.
pub(super) fn run(program: &Path, folder: &Path, runs: usize, quick: bool) -> Result<Vec<Row>> {
    let millis = if quick { QUICK_MILLIS } else { MILLIS }.to_string();
    let mut sides: Vec<[Side; WHAT.len()]> = SOURCES.iter().map(|_| Default::default()).collect();
    for turn in 0..runs {
        for (source, sides) in SOURCES.iter().zip(&mut sides) {
            let mut nothing_ns = f64::NAN;
            let mut said = Vec::new();
            for (what, side) in WHAT.iter().zip(sides) {
                let mut command = Command::new(program);
                command.args(["--millis", &millis, "--what", what, "--vms", source.vms]);
                command.args(source.rate.map(|rate| ["--rate", rate]).into_iter().flatten());
                let text = answer(command, folder, LIMIT)?;
                let measured = parse(&text).with_context(|| format!("`{text}`"))?;
                let event_ns = measured.event_run_time_ns / measured.events;
                if *what == WHAT[0] {
                    nothing_ns = event_ns;
                }
                side.event_ns.push(event_ns);
                side.net_ns.push(event_ns - nothing_ns);
                side.rate.push(measured.events * 1e9 / measured.elapsed_ns);
                side.core.push(measured.run_time_ns * 100.0 / measured.elapsed_ns);
                side.lost.push(measured.lost);
                said.push(format!("{what} {event_ns:.0} ns"));
            }
            eprintln!("{EVENTS} {}/{runs}, {}: {}", turn + 1, source.name, said.join(", "));
        }
    }
    let mut rows = Vec::new();
    for (source, sides) in SOURCES.iter().zip(&sides) {
        let empty = &sides[0];
        for (what, side) in WHAT.iter().zip(sides).skip(1) {
            let case = format!("{EVENTS}/{}/{what}", source.name);
            let row = |metric, unit, samples: &Samples, aim| Row::new(BENCH, &case, metric, unit, samples, aim);
            let of_counting = |aim| if *what == SINGLE { Aim::None } else { aim };
            let beside = |row: Row, samples: &Samples| row.beside(WHAT[0], samples, Aim::None);
            rows.push(beside(
                row("event_cost", "ns", &side.event_ns, of_counting(Aim::AtMost(AIM_EVENT_NS))),
                &empty.event_ns,
            ));
            rows.push(row("event_cost_net", "ns", &side.net_ns, Aim::None));
            rows.push(beside(row("events", "events/s", &side.rate, Aim::None), &empty.rate));
            rows.push(beside(
                row("core_share", "percent", &side.core, of_counting(Aim::AtMost(AIM_CORE_PERCENT))),
                &empty.core,
            ));
            rows.push(row("lost", "count", &side.lost, Aim::AtMost(0.0)));
        }
    }
    Ok(rows)
}

fn parse(text: &str) -> Option<Measured> {
    let line = text.lines().find_map(|line| line.strip_prefix("EVENTS "))?;
    let field = |name: &str| -> Option<f64> {
        line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok())
    };
    let events = field("events").filter(|&events| events > 0.0)?;
    Some(Measured {
        elapsed_ns: field("elapsed_ns")?,
        events,
        event_run_time_ns: field("event_run_time_ns")?,
        run_time_ns: field("run_time_ns")?,
        lost: field("lost")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_read_and_one_without_events_is_none() {
        let line =
            "EVENTS elapsed_ns=10 pages_written=4 events=4 event_runs=5 event_run_time_ns=600 run_time_ns=700 lost=0\n";
        let measured = parse(line).unwrap();
        let found = [measured.events, measured.event_run_time_ns, measured.run_time_ns].map(|value| value as u64);
        assert_eq!(found, [4, 600, 700]);
        assert!(parse(&line.replace("events=4", "events=0")).is_none());
        assert!(parse("nothing").is_none());
    }
}
