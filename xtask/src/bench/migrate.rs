//! The bench `migrate`: cases, runs in which we and the peers take turns, and the rows that come of them.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::guest::{Load, Rate};
use super::measure::{Aim, Row, Samples};
use super::ours::{Migration, Options, Places, Vm};
use super::qemu::{self, Mode, Qemu};
use super::raw_tcp::RawTcp;
use super::{Effort, fresh, guest, interrupt};

const BENCH: &str = "migrate";
/// How long a guest runs its load before anything is measured.
const SETTLE: Duration = Duration::from_millis(300);
/// 1 Gbit/s in bytes.
const GBIT: u64 = 125_000_000;
/// Total time, idle, as a ratio to raw TCP.
const AIM_RATIO: f64 = 1.10;
/// Blackout that does not depend on memory, in milliseconds.
const AIM_FIXED_MS: f64 = 3.0;
/// The case that compares the two dirty logs.
const DIRTY_LOG: &str = "dirty-log";

/// One load.
#[derive(Clone, Copy, Debug)]
struct Case {
    name: &'static str,
    rate: Rate,
    limit: Option<u64>,
    modes: &'static [Mode],
    /// Part of `--quick`.
    quick: bool,
    /// Total time has an aim as a ratio to raw TCP.
    ratio_aim: Option<f64>,
}

const BOTH: &[Mode] = &[Mode::PreCopy, Mode::Multifd];
const IDLE: &[Mode] = &[Mode::PreCopy, Mode::Multifd, Mode::MultifdShared];
const ALL: &[Mode] = &[Mode::PreCopy, Mode::Multifd, Mode::AutoConverge];

const fn case(name: &'static str, rate: Rate, modes: &'static [Mode]) -> Case {
    Case { name, rate, limit: None, modes, quick: false, ratio_aim: None }
}

const CASES: [Case; 6] = [
    Case { quick: true, ratio_aim: Some(AIM_RATIO), ..case("idle", "0", IDLE) },
    case("10k", "10000", BOTH),
    Case { quick: true, ..case("50k", "50000", BOTH) },
    case("200k", "200000", BOTH),
    Case { quick: true, ..case("unthrottled", "max", ALL) },
    // At random: with few cycles through the working set, it would count where the writer stands when the copying begins.
    Case { limit: Some(GBIT), ..case("10k-at-1gbit", "10000,pattern:random", BOTH) },
];

/// What the footer says of the metrics.
pub(super) const DEFINITIONS: &str = "\
Guest: 512 MiB, 2 vCPUs; vCPU 0 beats on the serial console each millisecond, vCPU 1 writes in a working set of 256 MiB filled
with random data, at the case's rate in pages/s. Source and target are on this host, joined by loopback TCP.
QEMU runs the same ELF on its microvm with private memory, where the kernel gives huge pages; -memfd is shared memory like ours.
  total            ours: from the offer to `running`, reservation counted (total_ns); QEMU: total-time; raw TCP: from the first
                   dial to the receiver's word, the bytes of the non-zero pages of our first round, as many streams as ours,
                   into a fresh memory file in another process, sent while the same guest runs beside
  total_ratio      total / raw TCP's total, of the same run
  blackout         ours: the source's clock, from the order to pause to the target's `running`; QEMU: downtime
  fixed_blackout   blackout - last round's bytes / best goodput - round trip
  guest_gap        step of the guest's TSC between the heartbeats around the switch, less the heartbeat period
  guest_worst_gap  the largest such step from the start of the migration on, as the load of the host has it too
  wire_ratio       bytes on the wire / bytes of the non-zero pages of our first round
Values are medians of so many runs; where the peer's is `-` it did not converge in the time it was given (--cap), and an empty
verdict is undecided.";

/// The names of all cases.
pub(super) fn names() -> Vec<&'static str> {
    CASES.iter().map(|case| case.name).chain([DIRTY_LOG]).collect()
}

/// Everything that the cases need, set up once.
struct Bench<'a> {
    places: &'a Places,
    qemu: Qemu,
    raw: RawTcp,
    effort: &'a Effort,
    until: Option<Instant>,
}

/// Runs the cases named by `effort`, or all of them.
pub(super) fn run(places: &Places, effort: &Effort) -> Result<Vec<Row>> {
    if let Some(unknown) = effort.cases.iter().find(|name| !names().contains(&name.as_str())) {
        bail!("there is no case `{unknown}`; the cases are {}", names().join(", "));
    }
    let bench = Bench {
        places,
        qemu: Qemu::find(&places.kernel, &places.scratch)?,
        raw: RawTcp::start((guest::MEMORY_MIB << 20) as usize, &places.scratch)?,
        effort,
        until: effort.budget.map(|budget| Instant::now() + budget),
    };
    eprintln!("peer: {}", bench.qemu.version());
    let chosen = |name: &str, quick: bool| {
        if effort.cases.is_empty() { quick || !effort.quick } else { effort.cases.iter().any(|case| case == name) }
    };
    let mut rows = Vec::new();
    let cases: Vec<&Case> = CASES.iter().filter(|case| chosen(case.name, case.quick)).collect();
    let dirty_log = chosen(DIRTY_LOG, false);
    let mut left = cases.len() + usize::from(dirty_log);
    for case in cases {
        rows.extend(bench.case(case, bench.share(left))?);
        left -= 1;
    }
    if dirty_log {
        rows.extend(bench.dirty_log(bench.share(left))?);
    }
    Ok(rows)
}

/// Samples of one side.
#[derive(Default)]
struct Side {
    total: Samples,
    blackout: Samples,
    gap: Samples,
    worst_gap: Samples,
    wire_ratio: Samples,
}

impl Side {
    fn qemu(&mut self, migration: Option<&qemu::Migration>, nonzero_bytes: u64) {
        let Some(migration) = migration else {
            for samples in
                [&mut self.total, &mut self.blackout, &mut self.gap, &mut self.worst_gap, &mut self.wire_ratio]
            {
                samples.push_none();
            }
            return;
        };
        self.total.push(migration.total_ms);
        self.blackout.push(migration.downtime_ms);
        self.gap.push(migration.gaps.switch_ms);
        self.worst_gap.push(migration.gaps.largest_ms);
        self.wire_ratio.push(migration.wire_bytes / nonzero_bytes.max(1) as f64);
    }

    fn ours(&mut self, migration: &Migration) {
        self.total.push(migration.report.total_ms());
        self.blackout.push(migration.report.blackout_ms());
        self.gap.push(migration.gaps.switch_ms);
        self.worst_gap.push(migration.gaps.largest_ms);
        self.wire_ratio.push(migration.report.wire_ratio());
    }
}

impl Bench<'_> {
    /// When a case must end so that those after it have their share of the time.
    fn share(&self, left: usize) -> Option<Instant> {
        let until = self.until?;
        let now = Instant::now();
        Some(now + until.saturating_duration_since(now) / left.max(1) as u32)
    }

    fn case(&self, case: &Case, until: Option<Instant>) -> Result<Vec<Row>> {
        let (mut ours, mut raw, mut ratio) = (Side::default(), Samples::default(), Samples::default());
        let (mut fixed, mut rounds) = (Samples::default(), Samples::default());
        let mut peers: Vec<(Mode, Side)> = case.modes.iter().map(|&mode| (mode, Side::default())).collect();
        // How much raw TCP must move, and with how many streams, is known once we have moved it.
        let warm_up = Vm::start(self.places, case.rate, "bitmap")?
            .migrate(Options { limit: case.limit, ..Options::default() })?
            .report;
        let (bytes, streams) = (warm_up.nonzero_bytes(), warm_up.streams);
        self.runs(case.name, until, |turn| {
            let mut said = Vec::new();
            let mut we = || -> Result<()> {
                let vm = Vm::start(self.places, case.rate, "bitmap")?;
                interrupt::sleep(SETTLE)?;
                fresh::recall()?;
                let raw_ms = self.raw.send(bytes as usize, streams, case.limit)?.as_secs_f64() * 1e3;
                let migration = vm.migrate(Options { limit: case.limit, ..Options::default() })?;
                raw.push(raw_ms);
                ratio.push(migration.report.total_ms() / raw_ms);
                ours.ours(&migration);
                fixed.push(migration.report.fixed_blackout_ms());
                rounds.push(migration.report.rounds());
                said.push(format!("raw TCP {raw_ms:.0} ms, ours {:.0} ms", migration.report.total_ms()));
                Ok(())
            };
            if turn % 2 == 0 {
                we()?;
            }
            let mut theirs = Vec::new();
            for (mode, side) in &mut peers {
                let migration =
                    self.qemu.migrate(*mode, &Load::beating(case.rate), case.limit, self.effort.cap, SETTLE)?;
                side.qemu(migration.as_ref(), bytes);
                theirs.push(match migration {
                    Some(migration) => format!("{} {:.0} ms", mode.name(), migration.total_ms),
                    None => format!("{} did not converge in {} s", mode.name(), self.effort.cap.as_secs()),
                });
            }
            if turn % 2 == 1 {
                we()?;
            }
            said.extend(theirs);
            Ok(said.join(", "))
        })?;

        let cap_ms = self.effort.cap.as_secs_f64() * 1e3;
        let row = |metric, unit, samples: &Samples, aim| Row::new(BENCH, case.name, metric, unit, samples, aim);
        let mut rows = vec![
            row("total_ratio", "ratio", &ratio, case.ratio_aim.map_or(Aim::None, Aim::AtMost)),
            row("total", "ms", &ours.total, Aim::None).beside("raw-tcp", &raw, Aim::None),
        ];
        for (mode, side) in &peers {
            rows.push(row("total", "ms", &ours.total, Aim::None).beside(
                mode.name(),
                &side.total,
                Aim::Peer(Some(cap_ms)),
            ));
        }
        for (mode, side) in &peers {
            rows.push(row("guest_gap", "ms", &ours.gap, Aim::None).beside(mode.name(), &side.gap, Aim::Peer(None)));
        }
        for (mode, side) in &peers {
            let row = row("guest_worst_gap", "ms", &ours.worst_gap, Aim::None);
            rows.push(row.beside(mode.name(), &side.worst_gap, Aim::None));
        }
        for (mode, side) in &peers {
            rows.push(row("blackout", "ms", &ours.blackout, Aim::None).beside(mode.name(), &side.blackout, Aim::None));
        }
        rows.push(row("fixed_blackout", "ms", &fixed, Aim::AtMost(AIM_FIXED_MS)));
        for (mode, side) in &peers {
            let row = row("wire_ratio", "ratio", &ours.wire_ratio, Aim::None);
            rows.push(row.beside(mode.name(), &side.wire_ratio, Aim::None));
        }
        rows.push(row("rounds", "count", &rounds, Aim::None));
        Ok(rows)
    }

    /// Bitmap against ring: a whole migration of an unthrottled writer, and how much the writer is slowed during a longer one.
    fn dirty_log(&self, until: Option<Instant>) -> Result<Vec<Row>> {
        const KINDS: [&str; 2] = ["bitmap", "ring"];
        const BEFORE: Duration = Duration::from_millis(2300);
        let mut sides = [Side::default(), Side::default()];
        let mut slowdowns = [Samples::default(), Samples::default()];
        let mut during = [Samples::default(), Samples::default()];
        self.runs(DIRTY_LOG, until, |turn| {
            let mut said = Vec::new();
            for index in [turn % 2, (turn + 1) % 2] {
                let kind = KINDS[index];
                let vm = Vm::start(self.places, "max", kind)?;
                interrupt::sleep(SETTLE)?;
                let migration = vm.migrate(Options::default())?;
                sides[index].ours(&migration);
                // Limited, so that it lasts for several of the guest's reports of one second.
                let vm = Vm::start(self.places, "max", kind)?;
                let before = vm.pages_per_second(BEFORE)?;
                let limited = vm.migrate(Options { limit: Some(GBIT), ..Options::default() })?;
                match limited.pages_per_second {
                    Some(rate) => {
                        during[index].push(rate);
                        slowdowns[index].push((1.0 - rate / before) * 100.0);
                    }
                    None => bail!("the limited migration was too short to see the writer's rate"),
                }
                said.push(format!("{kind} {:.0} ms", migration.report.total_ms()));
            }
            Ok(said.join(", "))
        })?;
        let row = |metric, unit, pair: [&Samples; 2]| {
            Row::new(BENCH, DIRTY_LOG, metric, unit, pair[0], Aim::None).beside(KINDS[1], pair[1], Aim::None)
        };
        let [bitmap, ring] = &sides;
        Ok(vec![
            row("total", "ms", [&bitmap.total, &ring.total]),
            row("blackout", "ms", [&bitmap.blackout, &ring.blackout]),
            row("guest_gap", "ms", [&bitmap.gap, &ring.gap]),
            row("wire_ratio", "ratio", [&bitmap.wire_ratio, &ring.wire_ratio]),
            row("writer_rate", "pages/s", [&during[0], &during[1]]),
            row("writer_slowdown", "percent", [&slowdowns[0], &slowdowns[1]]),
        ])
    }

    /// Takes turns until there are enough, or until the time is up and there is one.
    fn runs(&self, case: &str, until: Option<Instant>, mut turn: impl FnMut(usize) -> Result<String>) -> Result<()> {
        for number in 0..self.effort.runs {
            let began = Instant::now();
            let said = turn(number)?;
            eprintln!("{case} {}/{}: {said}", number + 1, self.effort.runs);
            if until.is_some_and(|until| Instant::now() + began.elapsed() > until) {
                break;
            }
        }
        Ok(())
    }
}
