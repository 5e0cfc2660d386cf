//! The bench `stun`: a writer that no link of 1 Gbit/s carries and a latency-bound bystander on two vCPUs, moved by us with the writer stunned, and by QEMU with its two
//! ways of throttling; beside both a control: the same guest left where it is while the same bytes are sent by others.

use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::guest::{Load, MEMORY_MIB};
use super::heartbeat::steps_ms;
use super::measure::{Aim, Row, Samples};
use super::ours::{Options, Places, Vm};
use super::qemu::{Mode, Qemu};
use super::raw_tcp::RawTcp;
use super::{Effort, fresh, interrupt};

const BENCH: &str = "stun";
const SETTLE: Duration = Duration::from_millis(500);
/// 1 Gbit/s in bytes.
const GBIT: u64 = 125_000_000;
/// The downtime that we are told to stay below.
const DOWNTIME_MS: u64 = 10;
/// Total time, in times that sending each non-zero byte once takes.
const AIM_TOTAL: f64 = 1.5;
/// The guest's own gap at the switch.
const AIM_GAP_MS: f64 = 10.0;
/// How much worse the bystander may be, in percent.
const AIM_BYSTANDER: f64 = 5.0;
/// How far the writer may be from its quota, in percent.
const AIM_QUOTA: f64 = 5.0;

const KINDS: [&str; 2] = ["ring", "bitmap"];
const PEERS: [Mode; 2] = [Mode::AutoConverge, Mode::DirtyLimit];

/// What the footer says of the metrics.
pub(super) const DEFINITIONS: &str = "\
Guest: 512 MiB, 2 vCPUs; vCPU 0 beats on the serial console each millisecond and does nothing else (the bystander), vCPU 1 writes as fast as it can in a working
set of 256 MiB filled with random data (the writer). Source and target are on this host, joined by loopback TCP of 1 Gbit/s (each side's own limit).
  total_ratio      total / (bytes of the non-zero pages of our first round / 125 MB/s)
  guest_gap        step of the guest's TSC between the bystander's beats around the switch, less its period
  quota_error      |what the writer wrote per second / the mean of its limits - 1|, from a second after it was limited first on
  beats_lost       1 - beats per second during the migration, without the switch / the control's
  p99_worse        99th percentile of the time between two beats / the control's - 1
  control          the same guest, not migrated, while another process sends the same bytes at the same rate (raw TCP); noise: the same figure of two halves of one control
  writer_rate      what the writer wrote per second during the migration
  guest_time_lost  for how long the writer was held
Values are medians of so many runs; where the peer's is `-` it did not converge in the time it was given (--cap).";

/// What the bystander did in a span.
#[derive(Clone, Copy, Debug)]
struct Bystander {
    beats_per_second: f64,
    p99_ms: f64,
}

impl Bystander {
    /// `steps`: milliseconds between beats.
    fn of(steps: &[f64]) -> Option<Self> {
        let mut sorted = steps.to_vec();
        sorted.sort_by(f64::total_cmp);
        let total: f64 = steps.iter().sum();
        let p99_ms = *sorted.get((sorted.len() * 99).div_ceil(100).checked_sub(1)?)?;
        (total > 0.0).then(|| Self { beats_per_second: steps.len() as f64 * 1e3 / total, p99_ms })
    }

    /// How much fewer beats, and how much longer steps, in percent.
    fn worse_than(&self, control: &Self) -> (f64, f64) {
        let lost = (1.0 - self.beats_per_second / control.beats_per_second) * 100.0;
        (lost, (self.p99_ms / control.p99_ms - 1.0) * 100.0)
    }
}

#[derive(Default)]
struct Side {
    total_ratio: Samples,
    gap: Samples,
    beats_lost: Samples,
    p99_worse: Samples,
    writer_rate: Samples,
}

impl Side {
    fn none(&mut self) {
        for samples in
            [&mut self.total_ratio, &mut self.gap, &mut self.beats_lost, &mut self.p99_worse, &mut self.writer_rate]
        {
            samples.push_none();
        }
    }
}

/// Runs the bench.
pub(super) fn run(places: &Places, effort: &Effort) -> Result<Vec<Row>> {
    if let Some(unknown) = effort.cases.iter().find(|case| !KINDS.contains(&case.as_str())) {
        bail!("there is no case `{unknown}`; the cases are {}", KINDS.join(", "));
    }
    let kinds: Vec<&str> = KINDS
        .into_iter()
        .filter(|kind| effort.cases.is_empty() || effort.cases.iter().any(|case| case == kind))
        .collect();
    let qemu = Qemu::find(&places.kernel, &places.scratch)?;
    eprintln!("peer: {}", qemu.version());
    let raw = RawTcp::start((MEMORY_MIB << 20) as usize, &places.scratch)?;
    let mut ours: Vec<Side> = kinds.iter().map(|_| Side::default()).collect();
    let (mut quota, mut lost): (Vec<Samples>, Vec<Samples>) = kinds.iter().map(|_| Default::default()).unzip();
    let mut rounds: Vec<Samples> = kinds.iter().map(|_| Samples::default()).collect();
    let mut theirs: Vec<Side> = PEERS.iter().map(|_| Side::default()).collect();
    let (mut noise_beats, mut noise_p99) = (Samples::default(), Samples::default());
    let mut bytes = 0u64;
    for turn in 0..effort.runs {
        let mut said = Vec::new();
        if bytes == 0 {
            bytes = Vm::start(places, "max", kinds[0])?.migrate(stunning())?.report.nonzero_bytes();
        }
        let ideal_ms = bytes as f64 * 1e3 / GBIT as f64;
        let control = control(places, &raw, bytes, kinds[turn % kinds.len()])?;
        let halves = control.split_at(control.len() / 2);
        let whole = Bystander::of(&control).context("no beats in the control")?;
        if let (Some(first), Some(second)) = (Bystander::of(halves.0), Bystander::of(halves.1)) {
            let (beats, p99) = second.worse_than(&first);
            noise_beats.push(beats.abs());
            noise_p99.push(p99.abs());
        }
        for (index, kind) in kinds.iter().enumerate() {
            let vm = Vm::start(places, "max", kind)?;
            interrupt::sleep(SETTLE)?;
            let migration = vm.migrate(stunning())?;
            let report = &migration.report;
            let side = &mut ours[index];
            side.total_ratio.push(report.total_ms() / ideal_ms);
            side.gap.push(migration.gaps.switch_ms);
            let bystander = Bystander::of(&migration.steps_ms).context("no beats during the migration")?;
            let (beats, p99) = bystander.worse_than(&whole);
            side.beats_lost.push(beats);
            side.p99_worse.push(p99);
            side.writer_rate.push(migration.pages_per_second.unwrap_or(f64::NAN));
            rounds[index].push(report.rounds());
            match report.writer() {
                Some(writer) => {
                    let (wrote, limit) = (writer.settled_pages_per_second, writer.settled_limit_pages_per_second);
                    if limit > 0.0 {
                        quota[index].push((wrote / limit - 1.0).abs() * 100.0);
                    } else {
                        quota[index].push_none();
                    }
                    lost[index].push(writer.held_ns as f64 / 1e6);
                }
                None => {
                    quota[index].push_none();
                    lost[index].push(0.0);
                }
            }
            said.push(format!("{kind} {:.2} x, gap {:.1} ms", report.total_ms() / ideal_ms, migration.gaps.switch_ms));
        }
        for (mode, side) in PEERS.into_iter().zip(&mut theirs) {
            let migration = qemu.migrate(mode, "max", Some(GBIT), effort.cap, SETTLE)?;
            let Some(migration) = migration else {
                side.none();
                said.push(format!("{} did not converge in {} s", mode.name(), effort.cap.as_secs()));
                continue;
            };
            side.total_ratio.push(migration.total_ms / ideal_ms);
            side.gap.push(migration.gaps.switch_ms);
            if let Some(bystander) = Bystander::of(&migration.steps_ms) {
                let (beats, p99) = bystander.worse_than(&whole);
                side.beats_lost.push(beats);
                side.p99_worse.push(p99);
            }
            side.writer_rate.push(migration.pages_per_second.unwrap_or(f64::NAN));
            said.push(format!(
                "{} {:.2} x, gap {:.1} ms",
                mode.name(),
                migration.total_ms / ideal_ms,
                migration.gaps.switch_ms
            ));
        }
        eprintln!("{BENCH} {}/{}: {}", turn + 1, effort.runs, said.join(", "));
    }
    let mut rows = Vec::new();
    for (index, kind) in kinds.iter().enumerate() {
        let side = &ours[index];
        let row = |metric, unit, samples: &Samples, aim| Row::new(BENCH, kind, metric, unit, samples, aim);
        type Of = fn(&Side) -> &Samples;
        let metrics: [(&str, &str, Of, Aim); 5] = [
            ("total_ratio", "ratio", |side| &side.total_ratio, Aim::AtMost(AIM_TOTAL)),
            ("guest_gap", "ms", |side| &side.gap, Aim::AtMost(AIM_GAP_MS)),
            ("beats_lost", "percent", |side| &side.beats_lost, Aim::AtMost(AIM_BYSTANDER)),
            ("p99_worse", "percent", |side| &side.p99_worse, Aim::AtMost(AIM_BYSTANDER)),
            ("writer_rate", "pages/s", |side| &side.writer_rate, Aim::None),
        ];
        for (metric, unit, of, aim) in metrics {
            for (mode, peer) in PEERS.iter().zip(&theirs) {
                rows.push(row(metric, unit, of(side), aim.clone()).beside(mode.name(), of(peer), Aim::None));
            }
        }
        rows.push(row("quota_error", "percent", &quota[index], Aim::AtMost(AIM_QUOTA)));
        rows.push(row("guest_time_lost", "ms", &lost[index], Aim::None));
        rows.push(row("rounds", "count", &rounds[index], Aim::None));
    }
    rows.push(Row::new(BENCH, "control", "noise_beats", "percent", &noise_beats, Aim::None));
    rows.push(Row::new(BENCH, "control", "noise_p99", "percent", &noise_p99, Aim::None));
    Ok(rows)
}

fn stunning() -> Options {
    Options { limit: Some(GBIT), stun: true, downtime_ms: Some(DOWNTIME_MS), ..Options::default() }
}

/// The steps between the bystander's beats while the bytes of a migration are sent by others.
fn control(places: &Places, raw: &RawTcp, bytes: u64, kind: &str) -> Result<Vec<f64>> {
    let vm = Vm::boot(places, &Load::beating("max"), kind)?;
    interrupt::sleep(SETTLE)?;
    fresh::recall()?;
    let began = vm.console().len();
    raw.send(bytes as usize, 2, Some(GBIT))?;
    let console = vm.console().bytes();
    Ok(steps_ms(&console, began, vm.tsc_hz()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bystander_is_its_beats_and_the_longest_of_a_hundred_steps() {
        let mut steps = vec![1.0; 199];
        steps.push(51.0);
        let control = Bystander::of(&steps).unwrap();
        assert!((control.beats_per_second - 800.0).abs() < 1e-9 && (control.p99_ms - 1.0).abs() < 1e-9);
        let worse = Bystander { beats_per_second: 400.0, p99_ms: 2.0 };
        let (beats, p99) = worse.worse_than(&control);
        assert!((beats - 50.0).abs() < 1e-9 && (p99 - 100.0).abs() < 1e-9);
        assert!(Bystander::of(&[]).is_none());
    }
}
