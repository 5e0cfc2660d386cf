//! The bench `network`: what a client of a VM sees of its moves, with a relay of what still comes to the former place and without one. The moving itself is `dunlin-bench-network`
//! (`tests/src/bin`), which has the LAN of namespaces that the suites move VMs across.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::measure::{Aim, Row, Samples};
use super::ours::{Places, answer};
use super::{Effort, interrupt};
use crate::run;
use crate::workspace::root;

const BENCH: &str = "network";
const PROGRAM: &str = "dunlin-bench-network";
/// How long a move may take, with what is waited for before and after.
const MOVE_LIMIT: Duration = Duration::from_secs(15);
/// What a client may miss beyond the blackout, in milliseconds.
const AIM_BEYOND_MS: f64 = 2.0;

/// With a relay, and its peer: without one.
const RELAYS: [(&str, &str); 2] = [("relay", "2s"), ("no relay", "0s")];
const STRATEGIES: [&str; 2] = ["pre-copy", "post-copy"];

/// What the footer says of the metrics.
pub(super) const DEFINITIONS: &str = "\
A guest of 256 MiB that writes 2000 pages/s moves there and back between two hosts (network namespaces with a bridge and a tap each) behind one switch; from a third place a client pings it and asks it over one
TCP connection, each 1000 times a second. Each run is a move there and one back.
  lost             pings without an answer, of all moves of a run
  doubled          answers that came twice
  turned_round     answers that came behind one to a later ping
  ping_beyond      the longest time between two answers to pings less the blackout and the pings' interval, of the worse move of a run
  tcp_beyond       the same of the TCP connection
  blackout         by the source's clock, of the worse move of a run
  relayed          frames that were carried on
The peer is the same without a relay. Values are medians of so many runs.";

/// One line of the program.
#[derive(Debug, Deserialize)]
struct Move {
    blackout_ns: u64,
    pings: u64,
    lost: u64,
    doubled: u64,
    turned_round: u64,
    ping_gap_ns: u64,
    tcp_gap_ns: u64,
    relayed: u64,
    relay_dropped: u64,
    announced_first: bool,
}

#[derive(Default)]
struct Side {
    lost: Samples,
    doubled: Samples,
    turned_round: Samples,
    ping_beyond: Samples,
    tcp_beyond: Samples,
    blackout: Samples,
    relayed: Samples,
    moves: u64,
    pings: u64,
    all_lost: u64,
}

impl Side {
    /// Adds a run: a move there and one back.
    fn push(&mut self, moves: &[Move]) -> Result<()> {
        ensure!(moves.iter().all(|one| one.announced_first), "a guest ran before it was announced");
        ensure!(moves.iter().all(|one| one.relay_dropped == 0), "a relay dropped frames");
        let sum = |of: fn(&Move) -> u64| moves.iter().map(of).sum::<u64>();
        let most = |of: fn(&Move) -> f64| moves.iter().map(of).fold(0.0, f64::max);
        self.lost.push(sum(|one| one.lost) as f64);
        self.doubled.push(sum(|one| one.doubled) as f64);
        self.turned_round.push(sum(|one| one.turned_round) as f64);
        self.relayed.push(sum(|one| one.relayed) as f64);
        self.blackout.push(most(|one| one.blackout_ns as f64 / 1e6));
        self.ping_beyond.push(most(|one| beyond_ms(one.ping_gap_ns, one.blackout_ns)));
        self.tcp_beyond.push(most(|one| beyond_ms(one.tcp_gap_ns, one.blackout_ns)));
        self.moves += moves.len() as u64;
        self.pings += sum(|one| one.pings);
        self.all_lost += sum(|one| one.lost);
        Ok(())
    }
}

/// What of a gap between two answers to what comes each millisecond the blackout does not explain.
fn beyond_ms(gap_ns: u64, blackout_ns: u64) -> f64 {
    gap_ns.saturating_sub(blackout_ns).saturating_sub(1_000_000) as f64 / 1e6
}

/// Measures.
pub(super) fn run(places: &Places, effort: &Effort) -> Result<Vec<Row>> {
    let program = build()?;
    let chosen = |name: &&str| effort.cases.is_empty() || effort.cases.iter().any(|case| case == name);
    let strategies: Vec<&str> = STRATEGIES.into_iter().filter(chosen).collect();
    ensure!(!strategies.is_empty(), "the cases are {}", STRATEGIES.join(", "));
    let mut rows = Vec::new();
    for strategy in strategies {
        let mut sides = RELAYS.map(|_| Side::default());
        for turn in 0..effort.runs {
            let mut said = Vec::new();
            for ((name, relay), side) in RELAYS.iter().zip(&mut sides) {
                let moves = measure(&program, places, &["--moves", "2", "--strategy", strategy, "--relay", relay])?;
                side.push(&moves)?;
                said.push(format!("{name} {} of {} pings lost", side.all_lost, side.pings));
            }
            eprintln!("{strategy} {}/{}: {} so far", turn + 1, effort.runs, said.join(", "));
            interrupt::check()?;
        }
        rows.extend(rows_of(strategy, &sides));
    }
    Ok(rows)
}

fn rows_of(strategy: &str, [ours, theirs]: &[Side; 2]) -> Vec<Row> {
    let case = format!("{strategy}, {} moves", ours.moves);
    let row = |metric, unit, of: fn(&Side) -> &Samples, aim: Aim| {
        Row::new(BENCH, &case, metric, unit, of(ours), aim.clone()).beside(RELAYS[1].0, of(theirs), aim)
    };
    vec![
        row("lost", "frames", |side| &side.lost, Aim::AtMost(0.0)),
        row("doubled", "frames", |side| &side.doubled, Aim::AtMost(0.0)),
        row("turned_round", "frames", |side| &side.turned_round, Aim::AtMost(0.0)),
        row("ping_beyond", "ms", |side| &side.ping_beyond, Aim::AtMost(AIM_BEYOND_MS)),
        row("tcp_beyond", "ms", |side| &side.tcp_beyond, Aim::AtMost(AIM_BEYOND_MS)),
        row("blackout", "ms", |side| &side.blackout, Aim::None),
        row("relayed", "frames", |side| &side.relayed, Aim::None),
    ]
}

fn build() -> Result<PathBuf> {
    eprintln!("building {PROGRAM} (release)");
    let arguments = ["build", "--release", "--package", "dunlin-tests", "--bin", PROGRAM];
    run::run(Command::new("cargo").args(arguments).current_dir(root()).stdout(Stdio::null()))?;
    Ok(root().join("target/release").join(PROGRAM))
}

fn measure(program: &Path, places: &Places, arguments: &[&str]) -> Result<Vec<Move>> {
    let mut command = Command::new(program);
    command.args(arguments).env("DUNLIN_BIN", &places.dunlin);
    let text = answer(command, &places.scratch, MOVE_LIMIT * 4)?;
    let lines = text.lines().map(|line| serde_json::from_str(line).with_context(|| format!("`{line}`")));
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_counts_all_of_its_moves_and_its_worst() {
        let line = |lost, gap_ms: u64| {
            format!(
                r#"{{"blackout_ns":3000000,"pings":900,"lost":{lost},"doubled":0,"turned_round":1,"ping_gap_ns":{},"tcp_gap_ns":2000000,"relayed":4,"relay_dropped":0,"announced_first":true}}"#,
                gap_ms * 1_000_000
            )
        };
        let moves: Vec<Move> =
            [line(2, 9), line(3, 5)].iter().map(|line| serde_json::from_str(line).unwrap()).collect();
        let mut side = Side::default();
        side.push(&moves).unwrap();
        let medians =
            [&side.lost, &side.turned_round, &side.ping_beyond, &side.tcp_beyond, &side.relayed].map(Samples::median);
        assert_eq!(medians, [5.0, 2.0, 5.0, 0.0, 8.0].map(Some));
        assert_eq!((side.moves, side.pings, side.all_lost), (2, 1800, 5));
    }
}
