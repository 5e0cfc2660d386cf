//! `dunlin doctor --prove`: the test guest on this very host, and what it shows: that VMs run and move here, how far tracking
//! is from the truth, and what tracking costs.
//!
//! Owns the experiments and the arithmetic of their figures. The guest counts the pages that it writes by itself and says so
//! on its console (`tests/guest/README.md`); that is the truth that all else is compared with. Everything lives in one private
//! folder and in processes of ours; neither survives, however it ends. No network but loopback.
//!
//! A figure of cost is a ratio to the same guest untracked in the same run, and stands beside the noise floor: two untracked
//! spells compared in the same way.

use std::fs;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::arm::ControlSocketArm;
use super::clock::MonotonicClock;
use super::doctor::{Finding, ResultKind, Tier};
use super::machine::Places;
use super::migration::{MigrateRequest, migrate};
use super::out::complain;
use super::receive::{ReceiveRequest, receive};
use super::registry::Registry;
use crate::announce::Schedule;
use crate::link::{Address, Listener};
use crate::migrate::{CancelFlag, SourceOptions};
use crate::model::id::VmName;
use crate::model::schema::Schema;
use crate::model::units::display_duration;
use crate::model::{Ending, MigrationReport, PageCount, SerialSpec, VmRef, chain};
use crate::port::Arm;
use crate::probe::{KernelCounters, ProbeError, ProbeOptions};
use crate::track::Observer;

/// The guest inside this binary; empty if it was built without.
static GUEST: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/dunlin-guest.elf"));

/// How long all of it may take.
const LIMIT: Duration = Duration::from_secs(60);
/// How long a guest may take to be ready, or to say something.
const GUEST_LIMIT: Duration = Duration::from_secs(15);
/// How long a migration may take to be seen through by its target.
const MOVE_LIMIT: Duration = Duration::from_secs(20);
/// The VM's name.
const NAME: &str = "prove";
/// The VM's memory.
const MEMORY_BYTES: u64 = 256 << 20;
/// How often the guest tells its counters.
const STAT: Duration = Duration::from_millis(50);
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

/// Why one experiment has no figures.
#[derive(Debug)]
enum Obstacle {
    /// This host lacks it.
    Missing(String),
    /// This host forbids it.
    Refused(String),
    /// It went wrong.
    Failed(String),
    Cancelled,
}

impl From<ProbeError> for Obstacle {
    fn from(error: ProbeError) -> Self {
        match error {
            ProbeError::Refused(_) => Self::Refused(error.to_string()),
            _ => Self::Missing(chain(&error)),
        }
    }
}

fn failed(what: &str, error: &dyn std::error::Error) -> Obstacle {
    Obstacle::Failed(format!("{what}: {}", chain(error)))
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
    let lab = Lab { folder: &folder.0, kernel, cancel, deadline: began + LIMIT, request };

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

fn file(path: &Path, source: io::Error) -> ProveError {
    ProveError::File { path: path.display().to_string(), source }
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

/// What an experiment has at hand.
struct Lab<'a> {
    folder: &'a Path,
    kernel: PathBuf,
    cancel: &'a CancelFlag,
    deadline: Instant,
    request: &'a ProveRequest,
}

impl Lab<'_> {
    fn tell(&self, words: &str) {
        if self.request.show_progress {
            complain!("{words}");
        }
    }

    /// Waits for something, or until it is too late for it.
    fn wait<T>(
        &self,
        what: &str,
        limit: Duration,
        mut happened: impl FnMut() -> Result<Option<T>, Obstacle>,
    ) -> Result<T, Obstacle> {
        let end = (Instant::now() + limit).min(self.deadline);
        loop {
            if self.cancel.is_set() {
                return Err(Obstacle::Cancelled);
            }
            if let Some(value) = happened()? {
                return Ok(value);
            }
            if Instant::now() >= end {
                return Err(Obstacle::Failed(format!("waited in vain for {what}")));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Lets time pass.
    fn pass(&self, span: Duration) -> Result<(), Obstacle> {
        let until = Instant::now() + span;
        if until > self.deadline {
            return Err(Obstacle::Failed(format!("{} were not enough", display_duration(LIMIT))));
        }
        self.wait("the clock", span * 2, || Ok((Instant::now() >= until).then_some(())))
    }

    /// Boots a guest whose vCPUs each do `workload`, and waits until it is ready.
    fn boot(&self, workload: &str) -> Result<Guest, Obstacle> {
        let places = self.places("a");
        let console = self.folder.join("console-a");
        let _ = fs::remove_file(&console);
        let exe = std::env::current_exe().map_err(|e| failed("this program's own file", &e))?;
        let log = fs::File::create(self.folder.join("log-a")).map_err(|e| failed("a log", &e))?;
        let mut command = Command::new(exe);
        command
            .args(["vm", "run", "--name", NAME, "--cpus", "2", "--memory", &MEMORY_BYTES.to_string(), "--kernel"])
            .arg(&self.kernel)
            .args(["--cmdline", &format!("dunlin.stat={}ms dunlin.wl={workload}", STAT.as_millis())])
            .arg("--serial")
            .arg(format!("file={}", console.display()))
            .arg("--run-dir")
            .arg(&places.run_dir)
            .arg("--state-dir")
            .arg(&places.state_dir)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log);
        // SAFETY: between fork and exec only async-signal-safe calls are made. A session of its own keeps the terminal's
        // Ctrl-C from it, which this process answers in order; and it does not outlive this process.
        unsafe {
            command.pre_exec(|| {
                rustix::process::setsid()?;
                Ok(rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?)
            });
        }
        let child = command.spawn().map_err(|e| failed("starting a machine", &e))?;
        let mut guest = Guest { process: OwnChild(child), console, places };
        self.wait("a guest that is ready", GUEST_LIMIT, || {
            if let Ok(Some(status)) = guest.process.0.try_wait() {
                let log = fs::read_to_string(self.folder.join("log-a")).unwrap_or_default();
                let last = log.lines().next_back().unwrap_or("it says nothing").to_owned();
                return Err(Obstacle::Failed(format!("the machine ended ({status}): {last}")));
            }
            Ok(guest.lines().iter().any(|line| line.starts_with("READY ")).then_some(()))
        })?;
        Ok(guest)
    }

    fn places(&self, host: &str) -> Places {
        Places { run_dir: self.folder.join(host).join("run"), state_dir: self.folder.join(host).join("state") }
    }
}

/// A folder that goes away with its content.
struct Folder(PathBuf);

impl Folder {
    fn make() -> Result<Self, ProveError> {
        use std::os::unix::fs::DirBuilderExt;
        let path = std::env::temp_dir().join(format!("dunlin-prove-{}", uuid::Uuid::new_v4().simple()));
        fs::DirBuilder::new().mode(0o700).create(&path).map_err(|source| file(&path, source))?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            complain!("dunlin: {} could not be removed: {error}", self.0.display());
        }
    }
}

/// A process that is killed and waited for when it is no longer needed.
struct OwnChild(Child);

impl Drop for OwnChild {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A guest that runs.
struct Guest {
    process: OwnChild,
    console: PathBuf,
    places: Places,
}

/// What the guest says of itself in one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stat {
    uptime_ns: u64,
    pages_written: u64,
    /// What it found wrong with its memory, interrupts and timers.
    errors: u64,
}

/// The members of a `STAT` line that count what must not happen.
const ERRORS: [&str; 5] = ["page_mismatches", "ipi_lost", "ipi_doubled", "timer_stalls", "address_space_mismatches"];

impl Stat {
    /// The guest's word is checked like anybody's: a line that is none is no line.
    fn parse(line: &str) -> Option<Self> {
        let line = line.strip_prefix("STAT ")?;
        let find =
            |name: &str| line.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('=')?.parse().ok());
        let errors = ERRORS.iter().try_fold(0u64, |sum, name| Some(sum.saturating_add(find(name)?)))?;
        Some(Self { uptime_ns: find("uptime_ns")?, pages_written: find("pages_written")?, errors })
    }

    /// Pages a second since `before`; `None` if no time passed.
    fn rate_since(&self, before: &Self) -> Option<f64> {
        let ns = self.uptime_ns.checked_sub(before.uptime_ns).filter(|&ns| ns > 0)?;
        let pages = self.pages_written.checked_sub(before.pages_written)?;
        Some(pages as f64 * 1e9 / ns as f64)
    }
}

/// A heartbeat's number and time stamp.
fn heartbeat(line: &str) -> Option<(u64, u64)> {
    let (number, tsc) = line.strip_prefix("HB ")?.split_once(' ')?;
    Some((number.parse().ok()?, u64::from_str_radix(tsc, 16).ok()?))
}

impl Guest {
    /// All whole lines of the console.
    fn lines(&self) -> Vec<String> {
        lines_of(&self.console)
    }

    /// The guest's counters as of now: the first line that comes from here on.
    fn stat(&self, lab: &Lab<'_>) -> Result<Stat, Obstacle> {
        let count = |lines: &[String]| lines.iter().filter(|line| line.starts_with("STAT ")).count();
        let before = count(&self.lines());
        lab.wait("the guest's counters", GUEST_LIMIT, || {
            let lines = self.lines();
            Ok(if count(&lines) > before { lines.iter().rev().find_map(|line| Stat::parse(line)) } else { None })
        })
    }

    /// What the guest itself wrote in pages a second while `act` went on.
    fn rate_while(&self, lab: &Lab<'_>, act: impl FnOnce() -> Result<(), Obstacle>) -> Result<f64, Obstacle> {
        let before = self.stat(lab)?;
        act()?;
        self.stat(lab)?.rate_since(&before).ok_or_else(|| Obstacle::Failed("the guest's counters went back".to_owned()))
    }

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

fn lines_of(console: &Path) -> Vec<String> {
    let bytes = fs::read(console).unwrap_or_default();
    let whole = bytes.iter().rposition(|&byte| byte == b'\n').map_or(0, |last| last + 1);
    String::from_utf8_lossy(&bytes[..whole]).lines().map(str::to_owned).collect()
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
            let rate = observer.measure().map_err(|e| failed("tracking", &e))?;
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
    let mut worst: f64 = 0.0;
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
        worst = worst.max(error.median.abs());
        words.push(format!("{:+.2} % at {truth:.0} pages/s", error.median));
        figures.push(error);
        figures.extend(Figure::of(format!("guest-wrote-at-{}", rate * 2), "pages_per_second", vec![truth]));
    }
    let detail = format!("armed: {} (medians of {INTERVALS})", words.join(", "));
    if worst > TOLERABLE_ERROR {
        return Err(Obstacle::Failed(format!("{detail}; more than {TOLERABLE_ERROR} % off")));
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
                observer.measure().map_err(|e| failed("tracking", &e))?;
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
    let listener = Listener::bind(&address).map_err(|e| failed("listening on loopback", &e))?;
    let to = listener.local_address().map_err(|e| failed("listening on loopback", &e))?;
    let target = ReceiveRequest {
        name: None,
        nets: Vec::new(),
        disks: Vec::new(),
        serial: SerialSpec::File(console.clone()),
        places: places.clone(),
        schedule: Schedule::default(),
        events: None,
        hold: None,
        stall: Duration::from_secs(5),
    };
    let order = MigrateRequest {
        vm: VmRef::Name(NAME.parse().map_err(|e| Obstacle::Failed(format!("a name: {e}")))?),
        to,
        options: SourceOptions { verify, stall: target.stall, doubt: target.stall, ..SourceOptions::default() },
        run_dir: guest.places.run_dir.clone(),
        insecure_plaintext: false,
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
            std::thread::sleep(Duration::from_millis(5));
        }
        (report, receiver.join())
    });
    let received = received.map_err(|_| Obstacle::Failed("the target's manager panicked".to_owned()))?;
    let moved = received.map(|received| received.map(|received| (received.verified_pages, OwnChild(received.child))));
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
    use proptest::prelude::*;

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

    #[test]
    fn the_guests_lines_are_read() {
        let line = "STAT uptime_ns=2000000000 pages_written=500 page_mismatches=1 ipi_lost=0 ipi_doubled=2 ticks=9 \
                    timer_stalls=0 address_space_mismatches=0 irq_lost=0 block_mismatches=0 block_errors=0";
        let stat = Stat::parse(line).unwrap();
        assert_eq!(stat, Stat { uptime_ns: 2_000_000_000, pages_written: 500, errors: 3 });
        let before = Stat { uptime_ns: 1_000_000_000, pages_written: 100, errors: 0 };
        assert_eq!(stat.rate_since(&before), Some(400.0));
        assert_eq!((before.rate_since(&stat), stat.rate_since(&stat)), (None, None));
        assert_eq!(Stat::parse("STAT uptime_ns=2 pages_written=500"), None);
        assert_eq!(heartbeat("HB 7 ff"), Some((7, 255)));
        assert_eq!(heartbeat("HB 7 zz"), None);
    }

    proptest! {
        #[test]
        fn no_line_makes_the_reader_panic(line in "(STAT|HB)? ?[a-z_=0-9 ]{0,200}") {
            let _ = Stat::parse(&line);
            let _ = heartbeat(&line);
        }
    }
}
