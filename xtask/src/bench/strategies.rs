//! The bench `strategies`: each way of moving a VM, with writers of each rate and over each link, ours and QEMU's by turns; what it takes beside the least that it can take,
//! what the guest loses, and how close the prediction was. Of it comes the table in the book that puts the strategies beside one another.

use std::time::Duration;

use anyhow::{Result, bail};

use super::guest::{Load, Rate};
use super::measure::{Aim, Row, Samples};
use super::ours::{Migration, Options, Places, Vm};
use super::qemu::{self, Mode, Qemu};
use super::raw_tcp::RawTcp;
use super::{Effort, fresh, interrupt};

const BENCH: &str = "strategies";
/// Guest RAM; its writer has 256 MiB of it.
const MEMORY_MIB: u64 = 1024;
/// How long a guest runs its load before anything is measured: so long its rate is measured, too.
const SETTLE: Duration = Duration::from_millis(600);
/// 1 Gbit/s in bytes.
const GBIT: u64 = 125_000_000;
const PAGE_BYTES: f64 = 4096.0;
/// Total time of post-copy, in times the ideal.
const AIM_POST_COPY: f64 = 1.05;
/// Total time of hybrid, in times what its round and what is left after it take at least.
const AIM_HYBRID: f64 = 1.15;
/// Bytes of post-copy on the wire for each that holds something.
const AIM_WIRE: f64 = 1.02;
/// What the guest misses at the switch where its memory follows.
const AIM_GAP_MS: f64 = 5.0;
/// Half of the waits, in times a round trip and a page's time.
const AIM_WAITS: f64 = 2.0;
/// 99 of 100 waits.
const AIM_WAIT_P99_MS: f64 = 5.0;
/// How long a guest has only what it touches, under demand-paging.
const FINISH_AFTER: Duration = Duration::from_secs(1);
/// How far a predicted total may be off, in percent.
const AIM_TOTAL_OFF: f64 = 10.0;
/// The cell whose rows make the book's table.
const BOOKS: (&str, &str) = ("50k", "1gbit");

const RATES: [(&str, Rate); 5] =
    [("idle", "0"), ("10k", "10000"), ("50k", "50000"), ("200k", "200000"), ("unthrottled", "max")];
const LINKS: [(&str, Option<u64>); 2] = [("1gbit", Some(GBIT)), ("unlimited", None)];
const QUICK_RATES: [&str; 2] = ["50k", "unthrottled"];
const PEERS: [Mode; 3] = [Mode::PreCopy, Mode::AutoConverge, Mode::PostCopy];

/// A way of moving.
#[derive(Clone, Copy, Debug)]
struct Way {
    name: &'static str,
    strategy: &'static str,
    stun: bool,
    /// QEMU's way that is nearest to it.
    peer: Option<Mode>,
    /// Whether memory follows the VM.
    follows: bool,
    /// What is not asked for by then is sent all the same: so long after the guest is heard at the target.
    finish_after: Option<Duration>,
    /// What else is asked for.
    more: &'static [&'static str],
    /// What the loss of means for the VM, for the book.
    survives: &'static str,
}

const ANY_BEFORE: &str = "the target, the link and either manager; not the source, until the switch";
const NONE_MEANWHILE: &str =
    "until the switch likewise; then the link and either manager, but neither host until the last page has come";

const NONE_BUT_THE_SOURCE: &str =
    "the target, the link and either manager; not the source, until the last page has come";

const WAYS: [Way; 7] = [
    Way {
        name: "stop-and-copy",
        strategy: "stop-and-copy",
        stun: false,
        peer: None,
        follows: false,
        finish_after: None,
        more: &[],
        survives: ANY_BEFORE,
    },
    Way {
        name: "pre-copy",
        strategy: "pre-copy",
        stun: false,
        peer: Some(Mode::PreCopy),
        follows: false,
        finish_after: None,
        more: &[],
        survives: ANY_BEFORE,
    },
    Way {
        name: "pre-copy-stun",
        strategy: "pre-copy",
        stun: true,
        peer: Some(Mode::AutoConverge),
        follows: false,
        finish_after: None,
        more: &[],
        survives: ANY_BEFORE,
    },
    Way {
        name: "post-copy",
        strategy: "post-copy",
        stun: false,
        peer: Some(Mode::PostCopy),
        follows: true,
        finish_after: None,
        more: &[],
        survives: NONE_MEANWHILE,
    },
    Way {
        name: "safe-post-copy",
        strategy: "post-copy",
        stun: false,
        peer: Some(Mode::PostCopy),
        follows: true,
        finish_after: None,
        more: &["--safe-post-copy"],
        survives: NONE_BUT_THE_SOURCE,
    },
    Way {
        name: "demand-paging",
        strategy: "demand-paging",
        stun: false,
        peer: None,
        follows: true,
        finish_after: Some(FINISH_AFTER),
        more: &[],
        survives: NONE_MEANWHILE,
    },
    Way {
        name: "hybrid",
        strategy: "hybrid",
        stun: false,
        peer: Some(Mode::PostCopy),
        follows: true,
        finish_after: None,
        more: &[],
        survives: NONE_MEANWHILE,
    },
];

/// What the footer says of the metrics.
pub(super) const DEFINITIONS: &str = "\
Guest: 1 GiB, 2 vCPUs; vCPU 0 beats on the serial console each millisecond, vCPU 1 writes in a working set of 256 MiB filled with random data, at the case's rate in pages/s. Source and
target are on this host, joined by loopback TCP: limited by each side's own limit to 1 Gbit/s, or not at all. QEMU runs the same ELF on its microvm; its post-copy is begun at once. Under demand-paging the rest
is asked for (`migrate --finish`) a second after the guest is heard at the target; that second is in its total.
  total_ratio      total / ideal: bytes of non-zero pages / 125 MB/s; without a limit what raw TCP takes for as many bytes, in the same run
  optimum_ratio    hybrid: total / what its round and the pages that followed take at the ideal's rate
  guest_gap        step of the guest's TSC between the heartbeats around the switch, less the heartbeat period
  wire_ratio       bytes on the wire / bytes of non-zero pages
  sent_again       pages with content that were sent beyond the first time
  writes_lost      1 - pages written per second from the begin to the end / the same before the migration
  wait_p50_ratio   half of the waits for pages that the guest touched / (round trip + a page's time); wait_p99: 99 of 100
  stood            safe-post-copy: the time that the guest stood for increments / the loan's; increments: how many the source took in
  safe_after       half of the increments were safe, and what they held out, so long after they were cut; rounded up to a power of two of a microsecond
  back_ratio       bytes that came back in increments / bytes of non-zero pages
  total_off        |predicted total / total - 1|; the prediction is from the VM's curve, measured before, and the log of migrations of this run
  blackout_off     |predicted blackout - blackout| / the larger of 20 % of it and 5 ms
Values are medians of so many runs; where the peer's is `-` it did not converge in the time it was given (--cap).";

#[derive(Default)]
struct Side {
    total_ms: Samples,
    total_ratio: Samples,
    gap: Samples,
    wire_ratio: Samples,
    writes_lost: Samples,
}

impl Side {
    fn push(&mut self, total_ms: f64, ideal_ms: f64, gap_ms: f64, wire_ratio: f64) {
        self.total_ms.push(total_ms);
        self.total_ratio.push(total_ms / ideal_ms);
        self.gap.push(gap_ms);
        self.wire_ratio.push(wire_ratio);
    }

    fn lost(&mut self, before: f64, throughout: Option<f64>) {
        if let Some(rate) = throughout.filter(|_| before > 0.0) {
            self.writes_lost.push((1.0 - rate / before) * 100.0);
        }
    }

    fn qemu(&mut self, migration: Option<&qemu::Migration>, nonzero_bytes: f64, ideal_ms: f64, before: f64) {
        let Some(migration) = migration else {
            for samples in [&mut self.total_ms, &mut self.total_ratio, &mut self.gap, &mut self.wire_ratio] {
                samples.push_none();
            }
            return;
        };
        let wire_ratio = migration.wire_bytes / nonzero_bytes;
        self.push(migration.total_ms, ideal_ms, migration.gaps.switch_ms, wire_ratio);
        self.lost(before, migration.pages_per_second_throughout);
    }
}

/// What one of our ways has shown in one cell.
#[derive(Default)]
struct Ours {
    side: Side,
    optimum_ratio: Samples,
    sent_again: Samples,
    wait_p50_ratio: Samples,
    wait_p99: Samples,
    total_off: Samples,
    blackout_off: Samples,
    increments: Samples,
    stood: Samples,
    safe_after: Samples,
    back_ratio: Samples,
}

impl Ours {
    fn push(&mut self, way: &Way, migration: &Migration, limit: Option<u64>, ideal_ms: f64, before: f64) {
        let report = &migration.report;
        self.side.push(report.total_ms(), ideal_ms, migration.gaps.switch_ms, report.wire_ratio());
        self.side.lost(before, migration.pages_per_second_throughout);
        self.sent_again.push(report.pages_sent_again() as f64);
        let rate = report.nonzero_bytes() as f64 / ideal_ms;
        if way.follows {
            let whole = report.nonzero_bytes() as f64 + report.pages_sent_again() as f64 * PAGE_BYTES;
            self.optimum_ratio.push(report.total_ms() / (whole / rate));
        }
        if let Some(waits) = report.post_copy.as_ref().map(|owed| owed.waits).filter(|waits| waits.count > 0) {
            let page_ns = limit.map_or(PAGE_BYTES / rate * 1e6, |limit| PAGE_BYTES * 1e9 / limit as f64);
            self.wait_p50_ratio.push(waits.p50_ns as f64 / (report.rtt_ns as f64 + page_ns));
            self.wait_p99.push(waits.p99_ns as f64 / 1e6);
        }
        if let Some(loan) = report.loan {
            self.increments.push(loan.increments as f64);
            self.stood.push(loan.stood_ns as f64 * 100.0 / loan.lasted_ns.max(1) as f64);
            self.safe_after.push(loan.safe_p50_ns as f64 / 1e6);
            self.back_ratio.push(loan.wire_bytes as f64 / report.nonzero_bytes() as f64);
        }
        match (report.total_off_percent(), report.blackout_off()) {
            (Some(total), Some(blackout)) => {
                self.total_off.push(total);
                self.blackout_off.push(blackout);
            }
            _ => {
                self.total_off.push_none();
                self.blackout_off.push_none();
            }
        }
    }

    /// What is aimed at beside a limit says nothing where the processors are the only one.
    fn rows(&self, case: &str, way: &Way, limited: bool, peer: Option<(&str, &Side)>) -> Vec<Row> {
        let row = |metric, unit, samples: &Samples, aim| Row::new(BENCH, case, metric, unit, samples, aim);
        let beside = |row: Row, theirs: fn(&Side) -> &Samples, aim: Aim| match peer {
            Some((name, side)) => row.beside(name, theirs(side), aim),
            None => row,
        };
        let aim = |limit: f64, applies: bool| if applies { Aim::AtMost(limit) } else { Aim::None };
        let is_pure = way.name == "post-copy";
        let total = aim(AIM_POST_COPY, is_pure && limited);
        let gap = aim(AIM_GAP_MS, way.follows);
        let wire = aim(AIM_WIRE, is_pure);
        let mut rows = vec![
            beside(row("total", "ms", &self.side.total_ms, Aim::None), |side| &side.total_ms, Aim::None),
            beside(row("total_ratio", "ratio", &self.side.total_ratio, total.clone()), |side| &side.total_ratio, total),
            beside(row("guest_gap", "ms", &self.side.gap, gap.clone()), |side| &side.gap, gap),
            beside(row("wire_ratio", "ratio", &self.side.wire_ratio, wire.clone()), |side| &side.wire_ratio, wire),
            row("sent_again", "pages", &self.sent_again, Aim::None),
        ];
        if self.side.writes_lost.runs() > 0 {
            let lost = row("writes_lost", "percent", &self.side.writes_lost, Aim::None);
            rows.push(beside(lost, |side| &side.writes_lost, Aim::None));
        }
        if way.name == "hybrid" {
            rows.push(row("optimum_ratio", "ratio", &self.optimum_ratio, aim(AIM_HYBRID, limited)));
        }
        if self.wait_p99.runs() > 0 {
            rows.push(row("wait_p50_ratio", "ratio", &self.wait_p50_ratio, aim(AIM_WAITS, limited)));
            rows.push(row("wait_p99", "ms", &self.wait_p99, aim(AIM_WAIT_P99_MS, limited)));
        }
        if self.stood.runs() > 0 {
            rows.push(row("increments", "count", &self.increments, Aim::None));
            rows.push(row("stood", "percent", &self.stood, Aim::None));
            rows.push(row("safe_after", "ms", &self.safe_after, Aim::None));
            rows.push(row("back_ratio", "ratio", &self.back_ratio, Aim::None));
        }
        // When somebody finishes demand-paging is nothing that can be foretold.
        if way.finish_after.is_none() {
            rows.push(row("total_off", "percent", &self.total_off, Aim::AtMost(AIM_TOTAL_OFF)));
            rows.push(row("blackout_off", "ratio", &self.blackout_off, Aim::AtMost(1.0)));
        }
        rows
    }

    /// Its line in the book's table.
    fn line(&self, way: &Way) -> String {
        let number = |samples: &Samples, digits| {
            samples.median().map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
        };
        format!(
            "| {} | {} ms ({}) | {} ms | {} | {} % | {} |",
            way.name,
            number(&self.side.total_ms, 0),
            number(&self.side.total_ratio, 2),
            number(&self.side.gap, 1),
            number(&self.sent_again, 0),
            number(&self.side.writes_lost, 0),
            way.survives
        )
    }
}

/// What of a kind is to be run: the names that were given of it, or all.
fn chosen<'n>(all: &[&'n str], quick: &[&'n str], effort: &Effort) -> Vec<&'n str> {
    let named: Vec<&str> = all.iter().copied().filter(|name| effort.cases.iter().any(|case| case == name)).collect();
    match (named.is_empty(), effort.quick) {
        (false, _) => named,
        (true, true) => quick.to_vec(),
        (true, false) => all.to_vec(),
    }
}

/// Runs the bench.
pub(super) fn run(places: &Places, effort: &Effort) -> Result<Vec<Row>> {
    let rates = RATES.map(|(name, _)| name);
    let links = LINKS.map(|(name, _)| name);
    let ways = WAYS.map(|way| way.name);
    let peers = PEERS.map(Mode::name);
    let known: Vec<&str> = [&rates[..], &links, &ways, &peers].concat();
    if let Some(unknown) = effort.cases.iter().find(|case| !known.contains(&case.as_str())) {
        bail!("there is no case `{unknown}`; the cases are {}", known.join(", "));
    }
    let rates = chosen(&rates, &QUICK_RATES, effort);
    let links = chosen(&links, &links[..1], effort);
    let ways = chosen(&ways, &ways, effort);
    let peers = chosen(&peers, &peers, effort);
    let qemu = Qemu::find(&places.kernel, &places.scratch)?;
    eprintln!("peer: {}", qemu.version());
    let raw = RawTcp::start((MEMORY_MIB << 19) as usize, &places.scratch)?;
    let (mut rows, mut book) = (Vec::new(), Vec::new());
    for (link, limit) in LINKS.into_iter().filter(|(name, _)| links.contains(name)) {
        // What earlier migrations say of the link and of this host is what predictions rest on: so there are some.
        for strategy in ["stop-and-copy", "pre-copy", "post-copy", "hybrid"] {
            let vm = Vm::boot(places, &Load::telling_often("0", MEMORY_MIB), "bitmap")?;
            vm.migrate(Options { limit, strategy: Some(strategy), ..Options::default() })?;
        }
        for (rate_name, rate) in RATES.into_iter().filter(|(name, _)| rates.contains(name)) {
            let load = Load::telling_often(rate, MEMORY_MIB);
            let cell = format!("{rate_name}@{link}");
            let chosen: Vec<&Way> = WAYS.iter().filter(|way| ways.contains(&way.name)).collect();
            let mut ours: Vec<Ours> = chosen.iter().map(|_| Ours::default()).collect();
            let modes: Vec<Mode> = PEERS.into_iter().filter(|mode| peers.contains(&mode.name())).collect();
            let mut theirs: Vec<Side> = modes.iter().map(|_| Side::default()).collect();
            for turn in 0..effort.runs {
                let (mut nonzero, mut ideal_ms, mut before) = (0.0, f64::NAN, 0.0);
                let mut said = Vec::new();
                for (way, found) in chosen.iter().zip(&mut ours) {
                    let vm = Vm::boot(places, &load, "bitmap")?;
                    before = vm.pages_per_second(SETTLE)?;
                    let options = Options {
                        limit,
                        stun: way.stun,
                        strategy: Some(way.strategy),
                        predict: true,
                        finish_after: way.finish_after,
                        more: way.more,
                        ..Options::default()
                    };
                    let migration = vm.migrate(options)?;
                    let bytes = migration.report.nonzero_bytes();
                    nonzero = bytes as f64;
                    ideal_ms = match limit {
                        Some(limit) => nonzero * 1e3 / limit as f64,
                        None => {
                            fresh::recall()?;
                            raw.send(bytes as usize, migration.report.streams, None)?.as_secs_f64() * 1e3
                        }
                    };
                    found.push(way, &migration, limit, ideal_ms, before);
                    let total = migration.report.total_ms() / ideal_ms;
                    said.push(format!("{} {total:.2} x, gap {:.1} ms", way.name, migration.gaps.switch_ms));
                }
                for (mode, side) in modes.iter().zip(&mut theirs) {
                    let migration = qemu.migrate(*mode, &load, limit, effort.cap, SETTLE)?;
                    side.qemu(migration.as_ref(), nonzero, ideal_ms, before);
                    said.push(match migration {
                        Some(found) => {
                            format!(
                                "{} {:.2} x, gap {:.1} ms",
                                mode.name(),
                                found.total_ms / ideal_ms,
                                found.gaps.switch_ms
                            )
                        }
                        None => format!("{} did not end in {} s", mode.name(), effort.cap.as_secs()),
                    });
                }
                eprintln!("{cell} {}/{}: {}", turn + 1, effort.runs, said.join(", "));
                interrupt::check()?;
            }
            for (way, found) in chosen.iter().zip(&ours) {
                let peer = modes.iter().zip(&theirs).find(|(mode, _)| Some(**mode) == way.peer);
                let peer = peer.map(|(mode, side)| (mode.name(), side));
                rows.extend(found.rows(&format!("{cell} {}", way.name), way, limit.is_some(), peer));
                if (rate_name, link) == BOOKS {
                    book.push(found.line(way));
                }
            }
        }
    }
    if !book.is_empty() {
        eprintln!(
            "\nThe book's table, {} pages/s at {}:\n| strategy | total (times the ideal) | blackout | pages sent again | writes lost | what may be lost meanwhile without the VM |\n|---|---|---|---|---|---|\n{}",
            BOOKS.0,
            BOOKS.1,
            book.join("\n")
        );
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_named_of_a_kind_is_run_and_all_of_the_others() {
        let effort = |cases: &[&str], quick| Effort {
            quick,
            runs: 1,
            cases: cases.iter().map(|&case| case.to_owned()).collect(),
            cap: Duration::ZERO,
            budget: None,
        };
        let (rates, links) = (["idle", "10k", "50k"], ["1gbit", "unlimited"]);
        let only = effort(&["50k", "unlimited"], true);
        assert_eq!(
            (chosen(&rates, &["10k"], &only), chosen(&links, &["1gbit"], &only)),
            (vec!["50k"], vec!["unlimited"])
        );
        assert_eq!(chosen(&rates, &["10k"], &effort(&[], true)), ["10k"]);
        assert_eq!(chosen(&rates, &["10k"], &effort(&["unlimited"], false)), rates);
    }
}
