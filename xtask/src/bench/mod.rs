//! Benches: what Dunlin does beside what others do, in the same run on the same host.
//!
//! Each bench is a file that yields rows (`measure`). Everything that a bench starts ends with it, also on Ctrl-C.

mod fresh;
mod guest;
mod heartbeat;
mod measure;
mod migrate;
mod network;
mod ours;
mod qemu;
mod raw_tcp;
mod reducers;
mod strategies;
mod stun;
mod tracking;
mod zero_scan;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};

pub(crate) use raw_tcp::{RECEIVER_VERB, receiver};

use crate::interrupt;
use crate::process::Sweeper;
use crate::run;
use crate::workspace::root;
use measure::Row;
use ours::Places;

/// Runs of each case of `migrate` unless told otherwise.
const RUNS: usize = 5;
const QUICK_RUNS: usize = 3;
/// A run of `tracking` takes more than a minute a case.
const TRACKING_RUNS: usize = 3;
const QUICK_TRACKING_RUNS: usize = 1;
/// A run of `zero-scan` takes a second.
const ZERO_SCAN_RUNS: usize = 9;
/// How long a peer may take to converge.
const CAP: Duration = Duration::from_secs(20);
const QUICK_CAP: Duration = Duration::from_secs(5);
/// `--quick` starts no run that would probably end later than this.
const QUICK_BUDGET: Duration = Duration::from_secs(100);

/// Options of `cargo xtask bench`.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  cargo xtask bench migrate
  cargo xtask bench migrate --quick
  cargo xtask bench migrate --case idle --case unthrottled --runs 9 --json
  cargo xtask bench stun --case ring
  cargo xtask bench strategies --only 50k --only 1gbit --runs 3
  cargo xtask bench network --runs 50
  cargo xtask bench tracking --quick
  cargo xtask bench tracking --case random-50k --case events
  cargo xtask bench reducers --case text
  cargo xtask bench zero-scan")]
pub(crate) struct Arguments {
    /// Which bench.
    name: Name,

    /// Fewer cases and runs; ends within three minutes, building not counted.
    #[arg(long)]
    quick: bool,

    /// Print one JSON object a line on standard output instead of a table.
    #[arg(long)]
    json: bool,

    /// Runs of each case.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    runs: Option<u32>,

    /// Seconds after which a peer counts as not converging.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=3600))]
    cap: Option<u32>,

    /// Measure this binary instead of building one.
    #[arg(long, value_name = "FILE")]
    dunlin: Option<PathBuf>,

    /// Only this case; may be given several times. Of `strategies`: a rate, a link, a strategy or a peer; those not named of a kind are all run.
    #[arg(long = "case", visible_alias = "only", value_name = "NAME")]
    cases: Vec<String>,
}

/// The benches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Name {
    /// One live migration over loopback, beside raw TCP and QEMU.
    Migrate,
    /// A writer that would keep a migration from ending is slowed: what that costs it, and a bystander, beside QEMU's ways of throttling.
    Stun,
    /// Each strategy with writers of each rate on a link of 1 Gbit/s and one without a limit, beside QEMU's own ways.
    Strategies,
    /// What a client of a VM sees of its moves: frames lost, doubled, turned round, and for how long nothing comes; with a relay and without.
    Network,
    /// How exact the figures of a VM's writing are, and what they cost, beside QEMU's and the guest's own truth.
    Tracking,
    /// What each way of sending fewer bytes spares and costs at 1 Gbit/s, beside none of them.
    Reducers,
    /// How fast zero pages are found, beside how fast a core reads. Fails if that is below 0.8 of it.
    ZeroScan,
}

impl Name {
    /// Runs of each case unless told otherwise.
    fn runs(self, quick: bool) -> usize {
        match (self, quick) {
            (Self::Migrate | Self::Network | Self::Stun, false) => RUNS,
            (Self::Migrate | Self::Network | Self::Stun, true) | (Self::Reducers, false) => QUICK_RUNS,
            (Self::Reducers, true) | (Self::Strategies, _) => 1,
            (Self::ZeroScan, _) => ZERO_SCAN_RUNS,
            (Self::Tracking, false) => TRACKING_RUNS,
            (Self::Tracking, true) => QUICK_TRACKING_RUNS,
        }
    }
}

/// How much is to be measured.
#[derive(Debug)]
struct Effort {
    quick: bool,
    runs: usize,
    cases: Vec<String>,
    /// How long a peer may take to converge.
    cap: Duration,
    /// In what time to be done.
    budget: Option<Duration>,
}

/// Runs the verb.
pub(crate) fn run(arguments: &Arguments) -> Result<()> {
    let effort = Effort {
        quick: arguments.quick,
        runs: arguments.runs.map_or(arguments.name.runs(arguments.quick), |runs| runs as usize),
        cases: arguments.cases.clone(),
        cap: arguments
            .cap
            .map_or(if arguments.quick { QUICK_CAP } else { CAP }, |seconds| Duration::from_secs(seconds.into())),
        budget: arguments.quick.then_some(QUICK_BUDGET),
    };
    if arguments.name == Name::ZeroScan {
        let load = load_average();
        let rows = zero_scan::run(&effort)?;
        let footer = format!("Load average {load} at the start.\n{}", zero_scan::DEFINITIONS);
        print(&rows, arguments.json, &footer);
        // Nothing else of the host is in it: what misses here is slower than it should be.
        anyhow::ensure!(rows.iter().all(Row::is_kept), "an aim was missed");
        return Ok(());
    }
    let (dunlin, kernel) = build(arguments.dunlin.as_deref())?;
    interrupt::install()?;
    let load = load_average();
    // Declared in this order, so that on any way out processes end before their folders go.
    let scratch = tempfile::Builder::new().prefix("dunlin-bench-").tempdir().context("a folder for sockets")?;
    let disk = root().join("target");
    let state = tempfile::Builder::new().prefix("bench-state-").tempdir_in(&disk).context("a folder for journals")?;
    let _sweeper = Sweeper::new()?;
    let places = Places { dunlin, kernel, scratch: scratch.path().to_owned(), state: state.path().to_owned() };
    let free_memory = fresh::note()?;
    let (rows, definitions) = match arguments.name {
        Name::Migrate => (migrate::run(&places, &effort)?, migrate::DEFINITIONS),
        Name::Strategies => (strategies::run(&places, &effort)?, strategies::DEFINITIONS),
        Name::Network => (network::run(&places, &effort)?, network::DEFINITIONS),
        Name::Stun => (stun::run(&places, &effort)?, stun::DEFINITIONS),
        Name::Tracking => (tracking::run(&places, &effort)?, tracking::DEFINITIONS),
        Name::Reducers => (reducers::run(&places, &effort)?, reducers::DEFINITIONS),
        Name::ZeroScan => (Vec::new(), zero_scan::DEFINITIONS),
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let footer = format!(
        "We and the peers took turns; {cores} cores, load average {load} at the start; huge pages: private memory \
         {}, shared memory {}.\n{free_memory}\n{definitions}",
        huge_pages("enabled"),
        huge_pages("shmem_enabled")
    );
    print(&rows, arguments.json, &footer);
    Ok(())
}

/// Prints rows: one JSON object a line, or a table with words below it.
fn print(rows: &[Row], json: bool, footer: &str) {
    if json {
        print!("{}", measure::json(rows));
    } else {
        println!("{}\n{footer}", measure::table(rows));
    }
}

/// Builds what is measured, and says so first. Returns where `dunlin` and the guest are.
fn build(dunlin: Option<&Path>) -> Result<(PathBuf, PathBuf)> {
    let cargo = |arguments: &[&str], folder: &Path| {
        // Cargo speaks on standard error; what else it prints must not mix with JSON.
        run::run(Command::new("cargo").args(arguments).current_dir(folder).stdout(Stdio::null()))
    };
    let dunlin = match dunlin {
        Some(path) => fs::canonicalize(path).with_context(|| format!("{} is missing", path.display()))?,
        None => {
            eprintln!("building dunlin (release)");
            cargo(&["build", "--release", "--package", "dunlin"], root())?;
            root().join("target/release/dunlin")
        }
    };
    eprintln!("building the test guest (release)");
    cargo(&["build", "--release"], &root().join("tests/guest"))?;
    Ok((dunlin, guest::kernel(root())?))
}

fn load_average() -> String {
    let text = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or("unknown").to_owned()
}

/// The chosen word of a setting of transparent huge pages.
fn huge_pages(setting: &str) -> String {
    let text = fs::read_to_string(Path::new("/sys/kernel/mm/transparent_hugepage").join(setting)).unwrap_or_default();
    let chosen = text.split_once('[').and_then(|(_, rest)| rest.split_once(']'));
    chosen.map_or("unknown", |(word, _)| word).to_owned()
}
