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
/// Moves in a run: so many there, and so many back.
const MOVES: u32 = 10;
/// How long a move may take, with what is waited for before and after.
const MOVE_LIMIT: Duration = Duration::from_secs(15);
/// How long before the guest runs it is announced, in milliseconds, at most.
const AIM_ANNOUNCED_MS: f64 = 1.0;
/// What a client may miss beyond the blackout, in milliseconds.
const AIM_BEYOND_MS: f64 = 2.0;

/// As it is, and with nobody who tells the switch.
const ANNOUNCING: [(&str, &[&str]); 2] = [("", &[]), (" not announced,", &["--no-announce"])];
/// With a relay, and its peer: without one.
const RELAYS: [(&str, &str); 2] = [("relay", "2s"), ("no relay", "0s")];
const STRATEGIES: [&str; 2] = ["pre-copy", "post-copy"];

/// What the footer says of the metrics.
pub(super) const DEFINITIONS: &str = "\
A guest of 256 MiB that writes 2000 pages/s moves there and back between two hosts (network namespaces with a bridge and a tap each) behind one switch. From a third place clients send it numbered packets of UDP over IPv4
and over IPv6, each 1000 a second, ask it over one TCP connection 1000 times a second, and take over another one (IPv6) what it sends at a pace of its own, 2000 bytes each millisecond, all of it compared byte by byte. Each run is five moves there and five back. Here free memory
is taken and given back right before each move (512 MiB, as the target takes it), not before each run.
  lost             packets without an answer, of all moves of a run
  doubled          answers that came twice
  turned_round     answers that came behind one to a later packet
  udp_beyond       the time between the last answer from the former place and the first from the new one, less the blackout and the interval, of the worse family: the median move of a run
  tcp_beyond       the same of the TCP requests
  bulk_beyond      the same of the bulk: between two pieces of it, taken as they come
  paused_beyond    what udp_beyond is where the VM goes nowhere, but stands for 4 ms before each move and goes on in the same process: what scheduling and the guest make of it
  copying          the longest time between two answers (UDP, TCP requests) otherwise: while memory is copied, on the same CPUs
  quiet            the same in half a second before each move, in which nothing is copied
  guest_beyond     the longest time for which the vCPU that answers wanted to run and did not, by its own counter, less the blackout: what of the above is none of the network's
  waits            pages that the guest touched before they had come, of the median move of a run
  waited           for how long it waited for them, all of it together
  announced        from the beginning of the first announcement to the guest's going on, of the worst move of a run
  blackout         by the source's clock, of the median move of a run
  relayed          frames that were carried on
The peer is the same without a relay. Not announced: the switch hears of the VM's new place only when the guest happens to send something, by itself or because of a relayed frame; no aim is set there. Values are medians of so many runs.";

/// One line of the program.
#[derive(Debug, Deserialize)]
struct Move {
    blackout_ns: u64,
    packets: u64,
    lost: u64,
    doubled: u64,
    turned_round: u64,
    udp_gap_ns: u64,
    tcp_gap_ns: u64,
    bulk_gap_ns: u64,
    copying_gap_ns: u64,
    quiet_gap_ns: u64,
    paused_gap_ns: u64,
    stood_ns: u64,
    guest_gap_ns: u64,
    waits: u64,
    waited_ns: u64,
    announce_ns: u64,
    relayed: u64,
    relay_dropped: u64,
    announced_first: bool,
}

#[derive(Default)]
struct Side {
    lost: Samples,
    doubled: Samples,
    turned_round: Samples,
    udp_beyond: Samples,
    tcp_beyond: Samples,
    bulk_beyond: Samples,
    copying: Samples,
    quiet: Samples,
    paused_beyond: Samples,
    guest_beyond: Samples,
    waits: Samples,
    waited: Samples,
    announced: Samples,
    blackout: Samples,
    relayed: Samples,
    moves: u64,
    packets: u64,
    all_lost: u64,
}

impl Side {
    /// Adds a run.
    fn push(&mut self, moves: &[Move], is_announced: bool) -> Result<()> {
        let is_as_asked = |one: &Move| one.announced_first || !is_announced;
        ensure!(moves.iter().all(is_as_asked), "a guest ran before it was announced");
        ensure!(moves.iter().all(|one| one.relay_dropped == 0), "a relay dropped frames");
        let sum = |of: fn(&Move) -> u64| moves.iter().map(of).sum::<u64>();
        let most = |of: fn(&Move) -> f64| moves.iter().map(of).fold(0.0, f64::max);
        let middle = |of: fn(&Move) -> f64| {
            let mut of_moves = Samples::default();
            for one in moves {
                of_moves.push(of(one));
            }
            of_moves.median().unwrap_or_default()
        };
        self.lost.push(sum(|one| one.lost) as f64);
        self.doubled.push(sum(|one| one.doubled) as f64);
        self.turned_round.push(sum(|one| one.turned_round) as f64);
        self.relayed.push(sum(|one| one.relayed) as f64);
        self.blackout.push(middle(|one| one.blackout_ns as f64 / 1e6));
        self.udp_beyond.push(middle(|one| beyond_ms(one.udp_gap_ns, one.blackout_ns)));
        self.tcp_beyond.push(middle(|one| beyond_ms(one.tcp_gap_ns, one.blackout_ns)));
        self.bulk_beyond.push(middle(|one| beyond_ms(one.bulk_gap_ns, one.blackout_ns)));
        self.copying.push(middle(|one| one.copying_gap_ns as f64 / 1e6));
        self.quiet.push(middle(|one| one.quiet_gap_ns as f64 / 1e6));
        self.paused_beyond.push(middle(|one| beyond_ms(one.paused_gap_ns, one.stood_ns)));
        let guest_beyond = |one: &Move| one.guest_gap_ns.saturating_sub(one.blackout_ns) as f64 / 1e6;
        self.guest_beyond.push(middle(guest_beyond));
        self.waits.push(middle(|one| one.waits as f64));
        self.waited.push(middle(|one| one.waited_ns as f64 / 1e6));
        self.announced.push(most(|one| one.announce_ns as f64 / 1e6));
        self.moves += moves.len() as u64;
        self.packets += sum(|one| one.packets);
        self.all_lost += sum(|one| one.lost);
        Ok(())
    }
}

/// What of a gap between two answers to what comes each millisecond the VM's standing does not explain.
fn beyond_ms(gap_ns: u64, stood_ns: u64) -> f64 {
    gap_ns.saturating_sub(stood_ns).saturating_sub(1_000_000) as f64 / 1e6
}

/// Measures.
pub(super) fn run(places: &Places, effort: &Effort) -> Result<Vec<Row>> {
    let program = build()?;
    let chosen = |name: &&str| effort.cases.is_empty() || effort.cases.iter().any(|case| case == name);
    let strategies: Vec<&str> = STRATEGIES.into_iter().filter(chosen).collect();
    ensure!(!strategies.is_empty(), "the cases are {}", STRATEGIES.join(", "));
    let mut rows = Vec::new();
    for strategy in strategies {
        let mut cases = ANNOUNCING.map(|_| RELAYS.map(|_| Side::default()));
        for turn in 0..effort.runs {
            let mut said = Vec::new();
            for ((announcing, more), sides) in ANNOUNCING.iter().zip(&mut cases) {
                for ((name, relay), side) in RELAYS.iter().zip(sides) {
                    let moves = MOVES.to_string();
                    let arguments = ["--moves", &moves, "--strategy", strategy, "--relay", relay];
                    let moves = measure(&program, places, &[&arguments, *more].concat())?;
                    side.push(&moves, more.is_empty())?;
                    said.push(format!("{name}{announcing} {} of {} packets lost", side.all_lost, side.packets));
                }
            }
            eprintln!("{strategy} {}/{}: {} so far", turn + 1, effort.runs, said.join("; "));
            interrupt::check()?;
        }
        for ((announcing, more), sides) in ANNOUNCING.iter().zip(&cases) {
            rows.extend(rows_of(&format!("{strategy},{announcing}"), sides, more.is_empty()));
        }
    }
    Ok(rows)
}

fn rows_of(case: &str, [ours, theirs]: &[Side; 2], has_aims: bool) -> Vec<Row> {
    let case = format!("{case} {} moves", ours.moves);
    let row = |metric, unit, of: fn(&Side) -> &Samples, aim: Aim| {
        let aim = if has_aims { aim } else { Aim::None };
        Row::new(BENCH, &case, metric, unit, of(ours), aim.clone()).beside(RELAYS[1].0, of(theirs), aim)
    };
    vec![
        row("lost", "frames", |side| &side.lost, Aim::AtMost(0.0)),
        row("doubled", "frames", |side| &side.doubled, Aim::AtMost(0.0)),
        row("turned_round", "frames", |side| &side.turned_round, Aim::AtMost(0.0)),
        row("udp_beyond", "ms", |side| &side.udp_beyond, Aim::AtMost(AIM_BEYOND_MS)),
        row("tcp_beyond", "ms", |side| &side.tcp_beyond, Aim::AtMost(AIM_BEYOND_MS)),
        row("bulk_beyond", "ms", |side| &side.bulk_beyond, Aim::AtMost(AIM_BEYOND_MS)),
        row("paused_beyond", "ms", |side| &side.paused_beyond, Aim::None),
        row("copying", "ms", |side| &side.copying, Aim::None),
        row("quiet", "ms", |side| &side.quiet, Aim::None),
        row("guest_beyond", "ms", |side| &side.guest_beyond, Aim::None),
        row("waits", "pages", |side| &side.waits, Aim::None),
        row("waited", "ms", |side| &side.waited, Aim::None),
        row("announced", "ms", |side| &side.announced, Aim::AtMost(AIM_ANNOUNCED_MS)),
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
    let text = answer(command, &places.scratch, MOVE_LIMIT * MOVES)?;
    let lines = text.lines().map(|line| serde_json::from_str(line).with_context(|| format!("`{line}`")));
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_counts_all_of_its_moves_and_its_median() {
        let line = |lost, gap_ms: u64| {
            format!(
                r#"{{"blackout_ns":3000000,"packets":900,"lost":{lost},"doubled":0,"turned_round":1,"udp_gap_ns":{},"tcp_gap_ns":2000000,"bulk_gap_ns":0,"copying_gap_ns":9000000,"quiet_gap_ns":2000000,"paused_gap_ns":5700000,"stood_ns":4000000,"guest_gap_ns":4500000,"waits":7,"waited_ns":900000,"announce_ns":400000,"relayed":4,"relay_dropped":0,"announced_first":true}}"#,
                gap_ms * 1_000_000
            )
        };
        let moves: Vec<Move> =
            [line(2, 9), line(3, 7), line(0, 4)].iter().map(|line| serde_json::from_str(line).unwrap()).collect();
        let mut side = Side::default();
        side.push(&moves, true).unwrap();
        let medians = [
            &side.lost,
            &side.turned_round,
            &side.udp_beyond,
            &side.tcp_beyond,
            &side.copying,
            &side.quiet,
            &side.paused_beyond,
            &side.guest_beyond,
            &side.waits,
            &side.waited,
        ]
        .map(Samples::median);
        assert_eq!(medians, [5.0, 3.0, 3.0, 0.0, 9.0, 2.0, 0.7, 1.5, 7.0, 0.9].map(Some));
        assert_eq!((side.announced.median(), side.moves, side.packets, side.all_lost), (Some(0.4), 3, 2700, 5));
    }
}
