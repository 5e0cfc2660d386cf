//! One move of the VM to the other host, and what was seen of it from outside.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use dunlin::migrate::Strategy;
use dunlin::model::{MacAddress, MigrationReport};
use dunlin::net::fdb::FdbWatch;
use serde::{Deserialize, Serialize};

use super::{Rig, VM_NAME};
use crate::OwnProcess;
use crate::interrupt;
use crate::netns::Netns;
use crate::topology::SWITCH;
use crate::wire::{FrameKind, SeenFrame, WireWatch};

/// How long a receiver may take to listen.
const LISTEN_LIMIT: Duration = Duration::from_secs(10);
/// How long a move may take.
const MOVE_LIMIT: Duration = Duration::from_secs(120);
/// How long after the move the switch may take to have relearned.
const RELEARN_LIMIT: Duration = Duration::from_secs(2);
/// How often the watcher of the switch looks whether it should end.
const SLICE: Duration = Duration::from_millis(50);

/// How to move.
#[derive(Clone, Debug, Default)]
pub struct HopOptions {
    /// The strategy.
    pub strategy: Strategy,
    /// Whether `dunlin migrate` chooses the strategy itself.
    pub auto: bool,
    /// Whether all memory is compared at both ends during the blackout.
    pub verify: bool,
    /// Further options of `dunlin migrate`.
    pub more: Vec<String>,
}

/// A move that is over.
#[derive(Clone, Debug, Serialize)]
pub struct Hop {
    /// What `dunlin migrate` reported.
    pub report: MigrationReport,
    /// Its exit code.
    pub exit_code: Option<i32>,
    /// The switch's port that the VM is behind now.
    pub port: &'static str,
    /// When the switch was seen to have the VM behind that port (`CLOCK_MONOTONIC`).
    pub relearned_at_monotonic_ns: Option<u64>,
    /// The first frames of the VM that came in at that port.
    pub frames: Vec<SeenFrame>,
    /// Pages that the target compared.
    pub verified_pages: u64,
    /// The steps that the target passed, in their order.
    pub target_steps: Vec<String>,
    /// How the machine at the source ended: 0 is what a moved one says.
    pub source_exit_code: Option<i32>,
}

impl Hop {
    /// When the first announcement came in at the switch, if one came before any other frame of the VM.
    pub fn first_announcement_ns(&self) -> Option<u64> {
        self.frames.first().filter(|frame| frame.kind != FrameKind::Traffic).map(|frame| frame.at_monotonic_ns)
    }

    /// The target announced before it let the guest run, by its own log.
    pub fn says_announced_before_running(&self) -> bool {
        let step = |name| self.target_steps.iter().position(|step| step == name);
        matches!((step("announced"), step("running")), (Some(announced), Some(running)) if announced < running)
    }

    /// The target announced before it let the guest run: in its own log, and on the wire.
    pub fn announced_before_running(&self) -> bool {
        let rounds = |kind| self.frames.iter().take_while(|f| f.kind != FrameKind::Traffic).any(|f| f.kind == kind);
        self.says_announced_before_running() && rounds(FrameKind::Rarp) && rounds(FrameKind::GratuitousArp)
    }
}

/// Who waits for the VM at the other host.
#[derive(Debug)]
pub struct Receiver {
    /// The process.
    pub process: OwnProcess,
    /// Where it listens.
    pub address: String,
    label: String,
    events: PathBuf,
}

#[derive(Deserialize)]
struct Listening {
    address: String,
}

#[derive(Deserialize)]
struct Came {
    verified_pages: u64,
}

#[derive(Deserialize)]
struct Event {
    step: Option<String>,
}

impl Rig {
    /// Moves the VM to the other host. A move that ended otherwise than with the VM there is an error.
    ///
    /// # Errors
    /// What failed, with the words of every process.
    pub fn hop(&mut self, options: &HopOptions) -> Result<Hop> {
        let (from, to) = (self.at, self.at.other());
        let Receiver { process: mut receiver, address, label: receive_label, events } = self.receive()?;
        let port = self.host(to).switch_port;
        let wire = self.switch.enter(|| WireWatch::start(port, Self::mac())).context("watch the wire")?;
        let watch = self.switch.enter(|| FdbWatch::open(SWITCH))?;
        let over = AtomicBool::new(false);
        let (moved, relearned) = thread::scope(|scope| {
            let relearned = scope.spawn(|| follow(&self.switch, watch, Self::mac(), port, &over));
            let moved = self.migrate(&address, options);
            if moved.is_ok() {
                // The table follows the first frame within microseconds; the limit is for a table that does not.
                let _interrupted = interrupt::wait(RELEARN_LIMIT, || Ok(relearned.is_finished().then_some(())));
            }
            over.store(true, Ordering::Release);
            (moved, relearned.join().unwrap_or(Ok(None)))
        });
        let (report, exit_code) = moved?;
        if exit_code != Some(0) {
            bail!("dunlin migrate exited with {exit_code:?}: {:?} {}{}", report.ending, report.reason, self.words());
        }
        let came: Came = self.wait_object(&mut receiver, &receive_label, "dunlin.received/v1", LISTEN_LIMIT)?;
        let mut source = self.machine.replace(receiver).context("no machine ran at the source")?;
        self.at = to;
        self.boots = 0;
        let source_status = self.wait_end(&mut source)?;
        ensure!(self.host(from).netns.inmates()?.is_empty(), "processes stay behind at the source{}", self.words());
        let target_steps = fs::read_to_string(&events)?
            .lines()
            .map(|line| serde_json::from_str::<Event>(line).map(|event| event.step))
            .filter_map(Result::transpose)
            .collect::<Result<_, _>>()
            .context("the target's events")?;
        Ok(Hop {
            report,
            exit_code,
            port,
            relearned_at_monotonic_ns: relearned?,
            frames: wire.finish(),
            verified_pages: came.verified_pages,
            target_steps,
            source_exit_code: source_status.code(),
        })
    }

    /// Has the other host wait for the VM.
    ///
    /// # Errors
    /// It does not listen.
    pub fn receive(&mut self) -> Result<Receiver> {
        interrupt::check()?;
        let to = self.at.other();
        self.hops += 1;
        let label = format!("receive-{}", self.hops);
        let events = self.output_file(&label, "events");
        let mut command = crate::dunlin();
        let listen = format!("tcp://{}:0", self.host(to).migration_ip);
        command.args(["vm", "receive", "--json", "--listen", &listen, "--events"]).arg(&events);
        command.args(self.device_arguments("")).args(&self.receive_more);
        self.add_places(&mut command, to);
        let mut process = self.start(to, &mut command, &label)?;
        let listening: Listening = self.wait_object(&mut process, &label, "dunlin.listening/v1", LISTEN_LIMIT)?;
        Ok(Receiver { process, address: listening.address, label, events })
    }

    /// Begins to move the VM to a receiver.
    ///
    /// # Errors
    /// The manager cannot be started.
    pub fn start_migration(&self, to: &str, options: &HopOptions) -> Result<OwnProcess> {
        let strategy = if options.auto { "auto".to_owned() } else { options.strategy.to_string() };
        let mut command = self.dunlin_here(&["migrate", VM_NAME, "--to", to, "--json", "--strategy", &strategy]);
        if options.verify {
            command.arg("--verify");
        }
        command.args(&options.more);
        self.start(self.at, &mut command, &self.migrate_label())
    }

    /// The end of a migration that was begun last: its report and its exit code.
    ///
    /// # Errors
    /// It does not end, or makes no report.
    pub fn end_of_migration(&self, manager: &mut OwnProcess) -> Result<(MigrationReport, Option<i32>)> {
        let status = interrupt::wait(MOVE_LIMIT, || manager.wait_for(Duration::from_millis(1)))?
            .with_context(|| format!("dunlin migrate had not ended after {MOVE_LIMIT:?}{}", self.words()))?;
        let label = self.migrate_label();
        let report = self.wait_object(manager, &label, "dunlin.migration/v1", Duration::from_secs(1))?;
        Ok((report, status.code()))
    }

    fn migrate_label(&self) -> String {
        format!("migrate-{}", self.hops)
    }

    fn migrate(&self, to: &str, options: &HopOptions) -> Result<(MigrationReport, Option<i32>)> {
        let mut manager = self.start_migration(to, options)?;
        self.end_of_migration(&mut manager)
    }
}

/// Waits until `mac` is learnt behind `port`, or until the move is over without that.
fn follow(switch: &Netns, mut watch: FdbWatch, mac: MacAddress, port: &str, over: &AtomicBool) -> Result<Option<u64>> {
    switch.enter(|| {
        loop {
            if let Some(change) = watch.next_change(SLICE)?
                && !change.removed
                && change.entry.mac == mac
                && change.entry.port == port
            {
                return Ok(Some(change.seen_at.as_nanos() as u64));
            }
            if over.load(Ordering::Acquire) {
                return Ok(None);
            }
        }
    })
}
