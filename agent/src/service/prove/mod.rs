//! `dunlin doctor --prove`: the test guest on this very host, and what it shows: that VMs run and move here, how far tracking
//! is from the truth, and what tracking costs.
//!
//! Owns the experiments and the arithmetic of their figures. The guest counts the pages that it writes by itself and says so
//! on its console (`tests/guest/README.md`); that is the truth that all else is compared with. Everything lives in one private
//! folder and in processes of ours; neither survives, however it ends. No network but loopback.
//!
//! A figure of cost is a ratio to the same guest untracked in the same run, and stands beside the noise floor: two untracked
//! spells compared in the same way.

mod lab;

#[cfg(any(test, feature = "fuzz"))]
pub(crate) use self::lab::{fuzz_line, fuzz_seeds};

use std::fs;
use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use serde::Serialize;

use self::lab::{
    Folder, Guest, LIMIT, Lab, MEMORY_BYTES, NAME, Obstacle, OwnChild, failed, file, heartbeat, kill_machines,
};
use crate::announce::conflict::OnConflict;
use crate::link::{Address, Listener};
use crate::migrate::{CancelFlag, SourceOptions};
use crate::model::id::VmName;
use crate::model::schema::Schema;
use crate::model::units::display_duration;
use crate::model::{Ending, MigrationReport, PageCount, SerialSpec, VmRef};
use crate::port::Arm;
use crate::probe::{KernelCounters, ProbeOptions};
use crate::service::arm::ControlSocketArm;
use crate::service::clock::MonotonicClock;
use crate::service::config::AnnounceConfig;
use crate::service::doctor::{Finding, ResultKind, Tier};
use crate::service::foresight::Foresee;
use crate::service::migration::{MigrateRequest, migrate};
use crate::service::receive::{ReceiveRequest, receive};
use crate::service::registry::Registry;
use crate::service::trust::TlsOptions;
use crate::track::Observer;

/// The guest inside this binary; empty if it was built without.
static GUEST: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/dunlin-guest.elf"));

/// How long a migration may take to be seen through by its target.
const MOVE_LIMIT: Duration = Duration::from_secs(20);
/// One interval of tracking: at the highest rate far fewer pages than a working set has.
const INTERVAL: Duration = Duration::from_millis(250);
/// Intervals for each rate.
const INTERVALS: usize = 6;
/// What each of the two vCPUs writes, pages a second.
const RATES: [u64; 3] = [500, 2500, 10_000];
/// One spell of a cost measurement.
const SPELL: Duration = Duration::from_millis(400);
/// Rounds of a cost measurement, four spells each.
const ROUNDS: usize = 5;
/// The largest median error of armed tracking that counts as working, in percent.
const TOLERABLE_ERROR: f64 = 10.0;
/// What a guest may write beside its working set in one interval, in pages: stacks, counters, and the page tables whose
/// accessed and dirty bits its CPU sets. It counts none of those, tracking sees them all.
const BESIDE: f64 = 64.0;
/// The largest gap between two heartbeats (every 10 ms) that is no failure: a busy host keeps a vCPU waiting, too. The gap itself
/// is in the figures.
const STOOD_STILL: Duration = Duration::from_secs(5);

/// What is to be proven, and where.
#[derive(Clone, Debug)]
pub struct ProveRequest {
    /// The guest's ELF, instead of the one inside this binary.
    pub guest: Option<PathBuf>,
    /// Whether progress is told on standard error.
    pub show_progress: bool,
}

/// All that was found.
#[derive(Clone, Debug, Serialize)]
pub struct ProofReport {
    /// Whether everything that is required worked.
    pub proven: bool,
    /// Linux, as `uname -r` says.
    pub kernel: String,
    /// How long it took.
    pub duration_ns: u64,
    /// Line by line.
    pub checks: Vec<Proof>,
}

impl Schema for ProofReport {
    const SCHEMA: &'static str = "dunlin.proof/v1";
}

/// One finding with what was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Proof {
    /// What was tried, and what came of it.
    #[serde(flatten)]
    pub finding: Finding,
    /// What was measured.
    pub figures: Vec<Figure>,
}

/// A measured quantity.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    /// What it is.
    pub name: String,
    /// `percent`, `ratio`, `ns`, `pages` or `pages_per_second`.
    pub unit: &'static str,
    /// The median of all samples.
    pub median: f64,
    /// The smallest sample.
    pub least: f64,
    /// The largest sample.
    pub most: f64,
    /// How many samples.
    pub samples: usize,
}

impl Figure {
    /// `None` without samples.
    fn of(name: impl Into<String>, unit: &'static str, mut samples: Vec<f64>) -> Option<Self> {
        samples.retain(|sample| sample.is_finite());
        samples.sort_by(f64::total_cmp);
        let (&least, &most) = (samples.first()?, samples.last()?);
        let middle = samples.len() / 2;
        let median =
            if samples.len() % 2 == 1 { samples[middle] } else { f64::midpoint(samples[middle - 1], samples[middle]) };
        Some(Self { name: name.into(), unit, median, least, most, samples: samples.len() })
    }
}

/// Why nothing could be tried at all.
#[derive(Debug, thiserror::Error)]
pub enum ProveError {
    /// The binary has no guest.
    #[error(
        "built without the test guest: run `cargo xtask build-guest` and build again, or name its ELF with --guest"
    )]
    NoGuest,
    /// The guest, or the folder for the experiments.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Somebody asked for an end.
    #[error("cancelled; nothing is left behind")]
    Cancelled,
}

/// Words about a success, and its figures.
struct Success {
    detail: String,
    figures: Vec<Figure>,
}

/// Runs all experiments.
///
/// # Errors
/// There is no guest, no folder, or somebody cancelled.
pub fn prove(request: &ProveRequest, cancel: &CancelFlag) -> Result<ProofReport, ProveError> {
    let began = Instant::now();
    let folder = Folder::make()?;
    let kernel = folder.0.join("guest.elf");
    let image = match &request.guest {
        Some(path) => fs::read(path).map_err(|source| file(path, source))?,
        None if GUEST.is_empty() => return Err(ProveError::NoGuest),
        None => GUEST.to_vec(),
    };
    fs::write(&kernel, image).map_err(|source| file(&kernel, source))?;
    let lab = Lab { folder: &folder.0, kernel, cancel, deadline: began + LIMIT, show_progress: request.show_progress };

    let mut checks = Vec::new();
    for experiment in &EXPERIMENTS {
        lab.tell(&format!("{} ...", experiment.why));
        let (result, detail, figures) = match (experiment.run)(&lab) {
            Ok(Success { detail, figures }) => (ResultKind::Works, detail, figures),
            Err(Obstacle::Missing(reason)) => (ResultKind::Missing, reason, Vec::new()),
            Err(Obstacle::Refused(reason)) => (ResultKind::Refused, reason, Vec::new()),
            Err(Obstacle::Failed(reason)) => (ResultKind::Failed, reason, Vec::new()),
            Err(Obstacle::Cancelled) => return Err(ProveError::Cancelled),
        };
        let remedy = (result != ResultKind::Works).then(|| experiment.remedy.to_owned());
        let finding = Finding {
            name: experiment.name.to_owned(),
            tier: experiment.tier,
            why: experiment.why.to_owned(),
            result,
            detail,
            remedy,
        };
        checks.push(Proof { finding, figures });
    }
    let works = |proof: &Proof| proof.finding.result == ResultKind::Works;
    Ok(ProofReport {
        proven: checks.iter().all(|proof| proof.finding.tier != Tier::Required || works(proof)),
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        duration_ns: u64::try_from(began.elapsed().as_nanos()).unwrap_or(u64::MAX),
        checks,
    })
}

/// One line of the table.
struct Experiment {
    name: &'static str,
    tier: Tier,
    why: &'static str,
    remedy: &'static str,
    run: fn(&Lab<'_>) -> Result<Success, Obstacle>,
}

const SEE_DOCTOR: &str = "`dunlin doctor` shows what this host lacks";

const EXPERIMENTS: [Experiment; 5] = [
    Experiment {
        name: "guest",
        tier: Tier::Required,
        why: "a guest with two vCPUs boots and keeps time",
        remedy: SEE_DOCTOR,
        run: guest,
    },
    Experiment {
        name: "tracking-error",
        tier: Tier::Tracking,
        why: "how far tracking is from what the guest wrote",
        remedy: SEE_DOCTOR,
        run: tracking_error,
    },
    Experiment {
        name: "tracking-cost",
        tier: Tier::Tracking,
        why: "what tracking costs a guest that writes as fast as it can",
        remedy: SEE_DOCTOR,
        run: tracking_cost,
    },
    Experiment {
        name: "migration",
        tier: Tier::Required,
        why: "a writing guest moves within this host",
        remedy: "loopback must be up, and 1 GiB of memory free; the reason says more",
        run: |lab| migration(lab, false),
    },
    Experiment {
        name: "migration-verified",
        tier: Tier::Required,
        why: "its memory arrives byte for byte",
        remedy: "do not move VMs on this host before the cause is known",
        run: |lab| migration(lab, true),
    },
];

impl Guest {
    /// Starts to count what the guest writes, from outside.
    fn observe(&self, armed: bool) -> Result<Observer<KernelCounters, MonotonicClock>, Obstacle> {
        let frames = PageCount::covering(MEMORY_BYTES);
        let counters = KernelCounters::attach(ProbeOptions { pid: self.process.0.id(), frames, log: false })?;
        let name: VmName = NAME.parse().map_err(|e| Obstacle::Failed(format!("a name: {e}")))?;
        let socket = Registry::new(&self.places.run_dir).socket(&name, "control");
        let arm = armed.then(|| Box::new(ControlSocketArm::new(socket)) as Box<dyn Arm>);
        Observer::start(counters, MonotonicClock, arm).map_err(|e| failed("tracking", &e))
    }
}

fn guest(lab: &Lab<'_>) -> Result<Success, Obstacle> {
    let began = Instant::now();
    let guest = lab.boot("ws:32M,rate:1000")?;
    let ready = began.elapsed();
    let first = guest.stat(lab)?;
    lab.pass(Duration::from_secs(1))?;
    let last = guest.stat(lab)?;
    if last.errors > 0 {
        return Err(Obstacle::Failed(format!(
            "the guest found {} errors in its memory, timers or interrupts",
            last.errors
        )));
    }
    let lines = guest.lines();
    let hz = lines.iter().find_map(|line| {
        line.strip_prefix("READY ")?.split(' ').find_map(|word| word.strip_prefix("tsc_hz=")?.parse::<u64>().ok())
    });
    let hz = hz.filter(|&hz| hz > 0).ok_or_else(|| Obstacle::Failed("the guest knows no clock".to_owned()))?;
    let beats: Vec<_> = lines.iter().filter_map(|line| heartbeat(line)).collect();
    let gaps: Vec<f64> =
        beats.windows(2).map(|pair| pair[1].1.saturating_sub(pair[0].1) as f64 * 1e9 / hz as f64).collect();
    let gap = Figure::of("heartbeat-gap", "ns", gaps).ok_or_else(|| Obstacle::Failed("no heartbeat".to_owned()))?;
    if gap.most > STOOD_STILL.as_nanos() as f64 {
        return Err(Obstacle::Failed(format!("its heart stood still for {}", span(gap.most))));
    }
    let told = last.rate_since(&first).unwrap_or_default();
    let detail = format!(
        "ready after {}; {} heartbeats, {} apart, {} at most; wrote {told:.0} pages/s of 2000",
        display_duration(ready),
        beats.len(),
        span(gap.median),
        span(gap.most)
    );
    let boot = Figure::of("ready-after", "ns", vec![ready.as_nanos() as f64]);
    let rate = Figure::of("pages-written", "pages_per_second", vec![told]);
    Ok(Success { detail, figures: [Some(gap), boot, rate].into_iter().flatten().collect() })
}

/// What tracking said of one guest, in pages a second, and what the guest said.
fn track(lab: &Lab<'_>, guest: &Guest, armed: bool, intervals: usize) -> Result<(Vec<f64>, f64), Obstacle> {
    let mut observer = guest.observe(armed)?;
    let mut told = Vec::new();
    let truth = guest.rate_while(lab, || {
        // The first interval is no whole one: it began before the guest's count did.
        for interval in 0..=intervals {
            lab.pass(INTERVAL)?;
            let rate = observer.measure(false).map_err(|e| failed("tracking", &e))?;
            if interval > 0 {
                told.push(rate.pages_per_second);
            }
        }
        Ok(())
    })?;
    observer.stop().map_err(|e| failed("ending the write protection", &e))?;
    Ok((told, truth))
}

fn tracking_error(lab: &Lab<'_>) -> Result<Success, Obstacle> {
    let mut figures = Vec::new();
    let mut off = false;
    let mut words = Vec::new();
    for rate in RATES {
        let guest = lab.boot(&format!("ws:64M,rate:{rate}"))?;
        if rate == RATES[RATES.len() - 1] {
            // Before anything is write-protected, which lasts until each page is written again.
            let (told, truth) = track(lab, &guest, false, INTERVALS / 2)?;
            let seen = told.iter().map(|told| told / truth * 100.0).collect();
            figures.extend(Figure::of(format!("passive-seen-at-{}", rate * 2), "percent", seen));
        }
        let (told, truth) = track(lab, &guest, true, INTERVALS)?;
        if truth <= 0.0 {
            return Err(Obstacle::Failed("the guest wrote nothing".to_owned()));
        }
        let errors = told.iter().map(|told| (told / truth - 1.0) * 100.0).collect();
        let Some(error) = Figure::of(format!("armed-error-at-{}", rate * 2), "percent", errors) else { continue };
        let pages = (error.median / 100.0 * truth * INTERVAL.as_secs_f64()).abs();
        off |= error.median.abs() > TOLERABLE_ERROR && pages > BESIDE;
        words.push(format!("{:+.2} % at {truth:.0} pages/s", error.median));
        figures.push(error);
        figures.extend(Figure::of(format!("guest-wrote-at-{}", rate * 2), "pages_per_second", vec![truth]));
    }
    let detail = format!("armed: {} (medians of {INTERVALS})", words.join(", "));
    if off {
        return Err(Obstacle::Failed(format!("{detail}; more than {TOLERABLE_ERROR} % and {BESIDE} pages off")));
    }
    Ok(Success { detail, figures })
}

fn tracking_cost(lab: &Lab<'_>) -> Result<Success, Obstacle> {
    let guest = lab.boot("ws:32M,rate:max")?;
    // Said at once if it cannot be tracked at all.
    drop(guest.observe(false)?);
    let (mut passive, mut armed, mut noise, mut off) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let untracked = |lab: &Lab<'_>| guest.rate_while(lab, || lab.pass(SPELL));
    let tracked = |lab: &Lab<'_>, armed: bool| {
        let mut observer = guest.observe(armed)?;
        let rate = guest.rate_while(lab, || {
            for _ in 0..2 {
                lab.pass(SPELL / 2)?;
                observer.measure(false).map_err(|e| failed("tracking", &e))?;
            }
            Ok(())
        })?;
        observer.stop().map_err(|e| failed("ending the write protection", &e))?;
        Ok::<f64, Obstacle>(rate)
    };
    for _ in 0..ROUNDS {
        let before = untracked(lab)?;
        let while_passive = tracked(lab, false)?;
        let while_armed = tracked(lab, true)?;
        let after = untracked(lab)?;
        let base = f64::midpoint(before, after);
        off.push(base);
        noise.push(after / before);
        passive.push(while_passive / base);
        armed.push(while_armed / base);
    }
    let figures: Vec<Figure> = [
        Figure::of("untracked", "pages_per_second", off),
        Figure::of("passive-to-untracked", "ratio", passive),
        Figure::of("armed-to-untracked", "ratio", armed),
        Figure::of("untracked-to-untracked", "ratio", noise),
    ]
    .into_iter()
    .flatten()
    .collect();
    let [_, passive, armed, noise] = &figures[..] else {
        return Err(Obstacle::Failed("the guest wrote nothing".to_owned()));
    };
    let detail = format!(
        "throughput to untracked: passive {:.3}, armed {:.3}; noise {:.3} to {:.3} (medians of {ROUNDS})",
        passive.median, armed.median, noise.least, noise.most
    );
    Ok(Success { detail, figures })
}

fn migration(lab: &Lab<'_>, verify: bool) -> Result<Success, Obstacle> {
    let guest = lab.boot("ws:32M,rate:5000")?;
    let host = if verify { "c" } else { "b" };
    let (places, console) = (lab.places(host), lab.folder.join(format!("console-{host}")));
    let address: Address = "tcp://127.0.0.1:0".parse().map_err(|e| Obstacle::Failed(format!("loopback: {e}")))?;
    let listener = Listener::bind(&address, None).map_err(|e| failed("listening on loopback", &e))?;
    let to = listener.local_address().map_err(|e| failed("listening on loopback", &e))?;
    let target = ReceiveRequest {
        name: None,
        nets: Vec::new(),
        disks: Vec::new(),
        serial: SerialSpec::File(console.clone()),
        tunnel: false,
        places: places.clone(),
        announce: AnnounceConfig::default(),
        announces: true,
        on_conflict: OnConflict::Off,
        events: None,
        hold: None,
        stall: Duration::from_secs(5),
    };
    let order = MigrateRequest {
        vm: VmRef::Name(NAME.parse().map_err(|e| Obstacle::Failed(format!("a name: {e}")))?),
        to,
        options: SourceOptions { verify, stall: target.stall, doubt: target.stall, ..SourceOptions::default() },
        foresee: Foresee::AsItGoes,
        announce: AnnounceConfig::default(),
        never_stunned: Vec::new(),
        run_dir: guest.places.run_dir.clone(),
        insecure_plaintext: false,
        tls: TlsOptions::default(),
        tunnel: None,
        events: None,
        show_progress: false,
        hold: None,
    };
    // The target's wait ends when the source is done without it, and when all is to end.
    let waiting = CancelFlag::default();
    let (report, received) = std::thread::scope(|scope| {
        let receiver = scope.spawn(|| receive(&target, &listener, &waiting));
        let report = migrate(order, lab.cancel.clone());
        if !matches!(&report, Ok(report) if report.ending == Ending::Moved) {
            waiting.set();
        }
        let end = Instant::now() + MOVE_LIMIT;
        while !receiver.is_finished() {
            if lab.cancel.is_set() || Instant::now() > end {
                waiting.set();
            }
            if Instant::now() > end + MOVE_LIMIT {
                // A manager in doubt waits for its machine's fate, whatever else; this is one.
                kill_machines(&places);
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        (report, receiver.join())
    });
    let received = received.map_err(|_| Obstacle::Failed("the target's manager panicked".to_owned()))?;
    let moved = received.map(|received| {
        received.and_then(|received| Some((received.verified_pages, OwnChild(received.process.into_child()?))))
    });
    if lab.cancel.is_set() {
        return Err(Obstacle::Cancelled);
    }
    let report = report.map_err(|e| failed("the migration", &e))?;
    if report.ending != Ending::Moved {
        return Err(Obstacle::Failed(format!("it did not move: {}", report.reason)));
    }
    let (verified_pages, process) = moved
        .map_err(|e| failed("the target", &e))?
        .ok_or_else(|| Obstacle::Failed("the source says that it moved, the target has nothing".to_owned()))?;
    let guest = Guest { process, console, places };
    let last = guest.stat(lab)?;
    if last.errors > 0 {
        return Err(Obstacle::Failed(format!("after the move the guest found {} errors", last.errors)));
    }
    if verify && verified_pages != MEMORY_BYTES / 4096 {
        return Err(Obstacle::Failed(format!("only {verified_pages} pages were compared")));
    }
    Ok(moved_words(&report, verify))
}

fn moved_words(report: &MigrationReport, verify: bool) -> Success {
    let total = span(report.total_ns as f64);
    let figure = |name, unit, value: u64| Figure::of(name, unit, vec![value as f64]);
    let (detail, figures) = if verify {
        let pages = report.verified_pages;
        (format!("{pages} pages compared, all equal; {total} in all"), [figure("verified", "pages", pages), None])
    } else {
        let blackout = span(report.blackout_ns as f64);
        let detail =
            format!("{total} in all, blackout {blackout}, {} rounds; the guest found no error", report.rounds.len());
        (detail, [figure("total", "ns", report.total_ns), figure("blackout", "ns", report.blackout_ns)])
    };
    Success { detail, figures: figures.into_iter().flatten().collect() }
}

/// Nanoseconds as a person reads them.
fn span(ns: f64) -> String {
    display_duration(Duration::from_nanos(ns.max(0.0) as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_is_a_median_and_a_range() {
        let of = |samples: &[f64]| Figure::of("x", "ratio", samples.to_vec());
        let odd = of(&[3.0, 1.0, 2.0]).unwrap();
        assert_eq!((odd.median, odd.least, odd.most, odd.samples), (2.0, 1.0, 3.0, 3));
        assert_eq!(of(&[4.0, 1.0, f64::NAN, 2.0, 3.0]).map(|figure| (figure.median * 2.0) as u64), Some(5));
        assert_eq!(of(&[]), None);
        assert_eq!(of(&[f64::INFINITY]), None);
    }
}
