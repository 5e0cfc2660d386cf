//! Drives `dunlin`: a VM, a receiver, one migration between them on this host, and its report.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::Deserialize;

use super::fresh;
use super::guest::{self, Console, HEARTBEAT_MS, Load, Rate};
use super::heartbeat::{Gaps, gaps, steps_ms};
use crate::interrupt;
use crate::process::OwnChild;

/// The VM's name.
const NAME: &str = "bench";
/// How long one migration may take.
const MIGRATION_LIMIT: Duration = Duration::from_secs(60);
/// How long orders and ends may take.
const ORDER_LIMIT: Duration = Duration::from_secs(10);
/// How long the guest beats on at the target before it is stopped.
const AFTER: Duration = Duration::from_millis(200);
const PAGE_BYTES: u64 = 4096;
/// The log of the source's migrations.
const HISTORY: &str = "source/migrations.jsonl";

/// Programs and folders that every run uses.
#[derive(Clone, Debug)]
pub(super) struct Places {
    /// `dunlin`.
    pub(super) dunlin: PathBuf,
    /// The guest's ELF.
    pub(super) kernel: PathBuf,
    /// For sockets, consoles and words on standard error; short paths.
    pub(super) scratch: PathBuf,
    /// For journals: on a disk, where fsync costs what it costs.
    pub(super) state: PathBuf,
}

/// The options of a migration that cases set.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Options {
    /// Bandwidth limit in bytes per second.
    pub(super) limit: Option<u64>,
    /// Whether writers that keep it from ending are slowed.
    pub(super) stun: bool,
    /// The blackout to stay below; what `dunlin` does by itself without.
    pub(super) downtime_ms: Option<u64>,
    /// How memory moves; what `dunlin` does by itself without.
    pub(super) strategy: Option<&'static str>,
    /// Whether how the VM writes is measured first, for a prediction in the report.
    pub(super) predict: bool,
    /// So long after the guest has been heard at the target the rest is asked for, without which demand-paging does not end.
    pub(super) finish_after: Option<Duration>,
    /// What else is asked for.
    pub(super) more: &'static [&'static str],
}

/// The part of the migration report (`docs/json.md`) that is used here.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Report {
    ending: String,
    reason: String,
    pub(super) streams: usize,
    rounds: Vec<Round>,
    wire_bytes: u64,
    total_ns: u64,
    blackout_ns: u64,
    pub(super) rtt_ns: u64,
    #[serde(default)]
    reducers: Vec<Reducer>,
    stun: Option<Stun>,
    pub(super) post_copy: Option<PostCopy>,
    pub(super) loan: Option<Loan>,
    pub(super) prediction: Option<Prediction>,
}

/// What followed the VM.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct PostCopy {
    sent_pages: u64,
    zero_pages: u64,
    pub(super) waits: Waits,
}

/// What it took that it could have gone on at the source.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct Loan {
    pub(super) increments: u64,
    pub(super) wire_bytes: u64,
    pub(super) stood_ns: u64,
    pub(super) safe_p50_ns: u64,
    pub(super) lasted_ns: u64,
}

/// How long it waited for pages that it touched.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct Waits {
    pub(super) count: u64,
    pub(super) p50_ns: u64,
    pub(super) p99_ns: u64,
}

/// What had been expected.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct Prediction {
    pub(super) total_ns: Option<u64>,
    pub(super) blackout_ns: Option<u64>,
}

#[derive(Clone, Debug, Deserialize)]
struct Reducer {
    cpu_ns: u64,
}

#[derive(Clone, Debug, Deserialize)]
struct Stun {
    vcpus: Vec<Writer>,
}

/// A writer that was slowed.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(super) struct Writer {
    pub(super) settled_pages_per_second: f64,
    pub(super) settled_limit_pages_per_second: f64,
    pub(super) held_ns: u64,
}

#[derive(Clone, Debug, Deserialize)]
struct Round {
    paused: bool,
    pages: u64,
    zero_pages: u64,
    wire_bytes: u64,
    duration_ns: u64,
}

impl Report {
    /// Bytes of the pages that the first round, or where there is none what followed the VM, found to hold more than zeros.
    pub(super) fn nonzero_bytes(&self) -> u64 {
        let first = self.rounds.first().map(|round| (round.pages - round.zero_pages) * PAGE_BYTES);
        first.unwrap_or_else(|| self.followed_bytes())
    }

    /// Bytes of the pages with content that followed the VM.
    pub(super) fn followed_bytes(&self) -> u64 {
        self.post_copy.as_ref().map_or(0, |owed| (owed.sent_pages - owed.zero_pages) * PAGE_BYTES)
    }

    /// Pages with content that were sent beyond the first time.
    pub(super) fn pages_sent_again(&self) -> u64 {
        let rounds: u64 = self.rounds.iter().map(|round| round.pages - round.zero_pages).sum();
        (rounds + self.followed_bytes() / PAGE_BYTES).saturating_sub(self.nonzero_bytes() / PAGE_BYTES)
    }

    /// What had been expected and is known of how it came.
    pub(super) fn total_off_percent(&self) -> Option<f64> {
        let expected = self.prediction?.total_ns?;
        Some((expected as f64 / self.total_ns as f64 - 1.0).abs() * 100.0)
    }

    /// How far the blackout was off, in times the larger of a fifth of it and 5 ms.
    pub(super) fn blackout_off(&self) -> Option<f64> {
        let expected = self.prediction?.blackout_ns?;
        let allowed = (self.blackout_ns as f64 * 0.2).max(5e6);
        Some(expected.abs_diff(self.blackout_ns) as f64 / allowed)
    }

    /// From the offer to `running`, reservation counted.
    pub(super) fn total_ms(&self) -> f64 {
        self.total_ns as f64 / 1e6
    }

    /// Bytes on the wire, in MiB.
    pub(super) fn wire_mib(&self) -> f64 {
        self.wire_bytes as f64 / f64::from(1 << 20)
    }

    /// CPU time of all reducers together.
    pub(super) fn reducers_cpu_ms(&self) -> f64 {
        self.reducers.iter().map(|reducer| reducer.cpu_ns).sum::<u64>() as f64 / 1e6
    }

    /// By the source's clock.
    pub(super) fn blackout_ms(&self) -> f64 {
        self.blackout_ns as f64 / 1e6
    }

    /// Bytes on the wire for each byte that held something.
    pub(super) fn wire_ratio(&self) -> f64 {
        self.wire_bytes as f64 / self.nonzero_bytes().max(1) as f64
    }

    /// The writer that was held longest, if any was.
    pub(super) fn writer(&self) -> Option<&Writer> {
        self.stun.iter().flat_map(|stun| &stun.vcpus).max_by_key(|writer| writer.held_ns)
    }

    /// Number of rounds, the paused one included.
    pub(super) fn rounds(&self) -> f64 {
        self.rounds.len() as f64
    }

    /// The blackout less the time of the last pages at the best round's goodput, less the round trip: as
    /// `MigrationReport::fixed_blackout_ns` of the agent has it.
    pub(super) fn fixed_blackout_ms(&self) -> f64 {
        let moved = self.rounds.iter().filter(|round| round.wire_bytes >= 1 << 20 && round.duration_ns > 0);
        let goodput = moved.map(|round| round.wire_bytes as f64 / round.duration_ns as f64).fold(0.0, f64::max);
        let last: u64 = self.rounds.iter().filter(|round| round.paused).map(|round| round.wire_bytes).sum();
        let moving_ns = if goodput > 0.0 { last as f64 / goodput } else { 0.0 };
        ((self.blackout_ns as f64 - moving_ns - self.rtt_ns as f64) / 1e6).max(0.0)
    }
}

/// One migration as it was measured.
#[derive(Clone, Debug)]
pub(super) struct Migration {
    pub(super) report: Report,
    /// The guest's own view.
    pub(super) gaps: Gaps,
    /// Pages that the guest wrote per second while the migration ran; none if it was too short to say.
    pub(super) pages_per_second: Option<f64>,
    /// The same from before it began until behind its end, at both hosts; none where the guest did not say.
    pub(super) pages_per_second_throughout: Option<f64>,
    /// Between the guest's heartbeats while the migration ran, in milliseconds.
    pub(super) steps_ms: Vec<f64>,
}

/// A running VM.
#[derive(Debug)]
pub(super) struct Vm<'a> {
    places: &'a Places,
    folder: PathBuf,
    state: PathBuf,
    machine: OwnChild,
    console: Console,
    tsc_hz: u64,
}

impl<'a> Vm<'a> {
    /// Boots a VM whose guest writes at `rate`, and waits until it does.
    pub(super) fn start(places: &'a Places, rate: Rate, dirty_log: &str) -> Result<Self> {
        Self::boot(places, &Load::beating(rate), dirty_log)
    }

    /// Boots a VM with a guest under `load`, and waits until it is.
    pub(super) fn boot(places: &'a Places, load: &Load, dirty_log: &str) -> Result<Self> {
        let folder = fresh(&places.scratch.join("ours"))?;
        // What is kept of earlier migrations: predictions come of it.
        let kept = fs::read(places.state.join("ours").join(HISTORY));
        let state = fresh(&places.state.join("ours"))?;
        if let Ok(kept) = kept {
            fs::create_dir_all(state.join("source"))?;
            fs::write(state.join(HISTORY), kept)?;
        }
        let console = Console(folder.join("source.log"));
        let mut command = Command::new(&places.dunlin);
        command
            .args(["vm", "run", "--name", NAME, "--dirty-log", dirty_log])
            .args(["--memory", &format!("{}MiB", load.memory_mib), "--cpus", &load.cpus.to_string()])
            .args(["--cmdline", &load.cmdline])
            .arg("--kernel")
            .arg(&places.kernel);
        if load.cmdline.contains("dunlin.pool=") {
            command.arg("--balloon");
        }
        side(&mut command, "source", &folder, &state, &console).stdout(Stdio::null());
        let mut machine = OwnChild::start(&mut command, &folder.join("source.err"))?;
        let tsc_hz = console.wait_ready(&mut machine)?;
        Ok(Self { places, folder, state, machine, console, tsc_hz })
    }

    /// Its console.
    pub(super) fn console(&self) -> &Console {
        &self.console
    }

    /// Where its side keeps journals.
    pub(super) fn state_dir(&self) -> PathBuf {
        self.state.join("source")
    }

    /// What the frequency of its time stamp counter is.
    pub(super) fn tsc_hz(&self) -> u64 {
        self.tsc_hz
    }

    /// Runs `dunlin VERB` on it with these further arguments; what it printed.
    pub(super) fn ask(&self, verb: &str, arguments: &[&str], limit: Duration) -> Result<String> {
        let mut command = Command::new(&self.places.dunlin);
        command.args([verb, NAME, "--json", "--run-dir"]).arg(self.folder.join("source")).args(arguments);
        answer(command, &self.folder, limit)
    }

    /// Pages that the guest writes per second, seen over `window`.
    pub(super) fn pages_per_second(&self, window: Duration) -> Result<f64> {
        let from = self.console.len();
        interrupt::sleep(window)?;
        let bytes = self.console.bytes();
        guest::pages_per_second(&bytes[from..]).context("no two STAT lines in the window")
    }

    /// Moves it to a receiver on this host, and ends it there.
    pub(super) fn migrate(mut self, options: Options) -> Result<Migration> {
        fresh::recall()?;
        let target_console = Console(self.folder.join("target.log"));
        let mut command = Command::new(&self.places.dunlin);
        command.args(["--json", "vm", "receive", "--listen", "tcp://127.0.0.1:0"]);
        let words = self.folder.join("receive.json");
        command.stdout(File::create(&words).context("a file for the receiver's words")?);
        side(&mut command, "target", &self.folder, &self.state, &target_console);
        let mut receiver = OwnChild::start(&mut command, &self.folder.join("receive.err"))?;
        let address = listening(&mut receiver, &words)?;

        let report_path = self.folder.join("report.json");
        let mut command = Command::new(&self.places.dunlin);
        command.args(["--json", "migrate", NAME, "--to", &address]);
        if let Some(limit) = options.limit {
            command.args(["--bandwidth", &format!("{}bit", limit * 8)]);
        }
        if let Some(strategy) = options.strategy {
            command.args(["--strategy", strategy]);
        }
        let events = self.folder.join("events.json");
        if options.predict {
            command.args(["--predict", "--events"]).arg(&events);
        }
        if options.stun {
            command.args(["--on-stuck", "stun"]);
        }
        if let Some(downtime) = options.downtime_ms {
            command.args(["--downtime", &format!("{downtime}ms")]);
        }
        command.args(options.more);
        command.arg("--run-dir").arg(self.folder.join("source"));
        command.stdout(File::create(&report_path).context("a file for the report")?);
        let mut began = self.console.len();
        let mut migrate = OwnChild::start(&mut command, &self.folder.join("migrate.err"))?;
        if options.predict {
            // Before that nothing moves.
            interrupt::wait_for(ORDER_LIMIT, "the migration's begin", || {
                Ok(fs::metadata(&events).is_ok_and(|file| file.len() > 0).then_some(()))
            })?;
            began = self.console.len();
        }
        if let Some(after) = options.finish_after {
            interrupt::wait_for(MIGRATION_LIMIT, "the guest to be heard at the target", || {
                migrate.check_alive()?;
                Ok((target_console.len() > 0).then_some(()))
            })?;
            interrupt::sleep(after)?;
            self.ask("migrate", &["--finish"], ORDER_LIMIT)?;
        }
        migrate.finish(MIGRATION_LIMIT)?;
        let during = self.console.bytes();
        let ended = during.len() + target_console.len();
        let report: Report =
            serde_json::from_slice(&fs::read(&report_path)?).context("the report of `dunlin migrate --json`")?;
        if report.ending != "moved" {
            bail!("the migration ended as {}: {}", report.ending, report.reason);
        }
        interrupt::sleep(AFTER)?;
        self.machine.finish(ORDER_LIMIT)?;
        self.stop_at_target()?;
        receiver.finish(ORDER_LIMIT)?;

        let target = target_console.bytes();
        if let Some(found @ 1..) = guest::mismatches(&target) {
            bail!("the guest found {found} pages that are not what it wrote");
        }
        let gaps = gaps(&self.console.bytes(), &target, began, self.tsc_hz, HEARTBEAT_MS)
            .context("no heartbeats around the switch")?;
        let steps_ms = steps_ms(&during, began, self.tsc_hz);
        let both = [self.console.bytes(), target].concat();
        Ok(Migration {
            report,
            gaps,
            pages_per_second: guest::pages_per_second(&during[began..]),
            pages_per_second_throughout: guest::pages_per_second_around(&both, began, ended),
            steps_ms,
        })
    }

    fn stop_at_target(&self) -> Result<()> {
        let mut command = Command::new(&self.places.dunlin);
        command.args(["vm", "stop", NAME, "--run-dir"]).arg(self.folder.join("target")).stdout(Stdio::null());
        OwnChild::start(&mut command, &self.folder.join("stop.err"))?.finish(ORDER_LIMIT)
    }
}

/// Runs a command to its end; what it printed on standard output. Files go to `folder`.
pub(super) fn answer(mut command: Command, folder: &Path, limit: Duration) -> Result<String> {
    let words = folder.join("answer");
    command.stdout(File::create(&words).context("a file for an answer")?);
    OwnChild::start(&mut command, &folder.join("answer.err"))?.finish(limit)?;
    fs::read_to_string(&words).context("reading an answer")
}

/// The options of one side: where its VMs, journals and console are.
fn side<'c>(command: &'c mut Command, name: &str, folder: &Path, state: &Path, console: &Console) -> &'c mut Command {
    command.arg("--run-dir").arg(folder.join(name)).arg("--state-dir").arg(state.join(name));
    command.arg("--serial").arg(format!("file={}", console.0.display()))
}

/// Waits for the receiver's first words: where it listens.
fn listening(receiver: &mut OwnChild, words: &Path) -> Result<String> {
    #[derive(Deserialize)]
    struct Listening {
        address: String,
    }
    let line = interrupt::wait_for(ORDER_LIMIT, "the receiver's address", || {
        receiver.check_alive()?;
        let text = fs::read_to_string(words)?;
        Ok(text.split_once('\n').map(|(line, _)| line.to_owned()))
    })?;
    Ok(serde_json::from_str::<Listening>(&line).with_context(|| format!("`{line}`"))?.address)
}

/// An empty folder.
fn fresh(folder: &Path) -> Result<PathBuf> {
    match fs::remove_dir_all(folder) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(error).with_context(|| format!("{} could not be removed", folder.display())),
    }
    fs::create_dir_all(folder).with_context(|| format!("{} could not be made", folder.display()))?;
    Ok(folder.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_yields_the_figures_of_the_bench() {
        let text = r#"{"schema":"dunlin.migration/v1","ending":"moved","reason":"","streams":2,"wire_bytes":5000000,
            "total_ns":300000000,"blackout_ns":9000000,"rtt_ns":1000000,"rounds":[
            {"round":1,"paused":false,"pages":2000,"zero_pages":1000,"wire_bytes":4000000,"duration_ns":4000000},
            {"round":2,"paused":true,"pages":500,"zero_pages":0,"wire_bytes":2000000,"duration_ns":8000000}]}"#;
        let report: Report = serde_json::from_str(text).unwrap();
        assert_eq!(report.nonzero_bytes(), 4_096_000);
        assert!((report.total_ms() - 300.0).abs() < 1e-9);
        // 9 ms less 2 MB at 1 byte/ns less 1 ms.
        assert!((report.fixed_blackout_ms() - 6.0).abs() < 1e-9);
    }
}
