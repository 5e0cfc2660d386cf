//! One simulated run: builds the two hosts, lets both managers work, and looks at what is left.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use uuid::Uuid;

use super::link::{SimSourceLink, SimTargetLink};
use super::machine::{SimJournal, SimMachine};
use super::scenario::{Fault, Scenario, Side};
use super::scheduler::{Process, Scheduler};
use super::world::{Gate, Vm};
use crate::announce::conflict::OnConflict;
use crate::migrate::outcomes::{Whereabouts, Window};
use crate::migrate::source::{Heard, Source};
use crate::migrate::target::{Asked, Host, Orphan, RelayPhase, Reservation, Target, Telling};
use crate::migrate::{ControlMessage, Observer, Offer, Pace, SourceOptions, answer};
use crate::model::network::{Conflict, ConflictKind};
use crate::model::{
    AskedReport, DirtyLogKind, Ending, MachineShape, MigrationId, MigrationReport, NetworkPlace, PAGE_SIZE,
    RoundReport, Step, VmId, WaitReport,
};
use crate::port::{Clock, ControlChannel, Journal, JournalRecord, LinkError, Region, TargetLink};

const MIGRATION: MigrationId = MigrationId(Uuid::from_u128(0x5eed));
const VM: VmId = VmId(Uuid::from_u128(0x76d));
/// The VM's vCPUs.
const CPUS: u32 = 2;
/// How long whoever has the VM's address takes to answer.
const ANSWERS: Duration = Duration::from_millis(300);
/// How long a target waits for a source to say what it wants.
const FIRST_MESSAGE_LIMIT: Duration = Duration::from_secs(30);

/// For how long a source may still ask: its stall limit and its time in doubt, with a margin.
const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// How often a target that answers questions looks around.
const ANSWER_TICK: Duration = Duration::from_millis(500);

/// What a run came to.
#[derive(Debug)]
pub struct Run {
    /// What the manager reported that took the place of the source's.
    pub recovered: Option<MigrationReport>,
    /// The source's report; `None` if its manager died or never reached the target.
    pub report: Option<MigrationReport>,
    /// The target's end: `Ok` if the VM arrived, else its words; `None` if its manager died.
    pub target: Option<Result<(), String>>,
    /// Each fault that struck, and when.
    pub struck: Vec<(Fault, Window)>,
    /// Where the VM was before an operator did anything.
    pub found: Whereabouts,
    /// Where it was after the operator had done what the outcome table advises.
    pub left: Whereabouts,
    /// Whether the operator found a prepared copy at the target of a VM that the source never gave up.
    pub stale_prepared: bool,
    /// Broken invariants. Empty, or there is a bug.
    pub violations: Vec<String>,
    /// Port operations of both sides until the source's manager had ended.
    pub operations: u64,
    /// Identifies the order of all events.
    pub trace_hash: u64,
    /// The last operations, for people.
    pub trace: String,
}

impl Run {
    /// How the source's manager says that it ended.
    pub fn ending(&self) -> Option<Ending> {
        self.report.as_ref().map(|report| report.ending)
    }
}

struct SimObserver {
    sim: Arc<Scheduler>,
    side: Side,
}

impl Observer for SimObserver {
    fn step(&self, step: Step, _detail: &str) {
        let side = self.side;
        self.sim.operation(step.name(), Duration::from_micros(1), |world| world.step(side, step));
    }

    fn round(&self, _round: &RoundReport) {}

    fn progress(&self, _round: u32, _sent_pages: u64, _due_pages: u64) {}
}

struct SimHost {
    sim: Arc<Scheduler>,
    conflict: Option<OnConflict>,
    /// When it began to ask.
    asked_at: Option<Duration>,
    is_told: bool,
}

impl SimHost {
    fn new(sim: &Arc<Scheduler>, scenario: &Scenario) -> Self {
        Self { sim: Arc::clone(sim), conflict: scenario.conflict, asked_at: None, is_told: false }
    }
}

impl Host for SimHost {
    fn reserve(&mut self, offer: &Offer) -> Result<Reservation, String> {
        let region = self.sim.operation("reserve", Duration::from_millis(3), |world| {
            let host = world.host(Side::Target);
            let region = Arc::clone(&host.region);
            host.vm = Some(Vm::new(region.spec().pages, Gate::Reserved));
            region
        });
        let mut machine = SimMachine::new(&self.sim, Side::Target);
        let journaled =
            SimJournal::new(&self.sim, Side::Target).append(offer.migration_id, VM, JournalRecord::Reserved);
        if let Err(error) = journaled {
            // Nothing stays behind a refusal.
            use crate::port::Gate as _;
            if machine.discard(offer.migration_id).is_err() {
                drop(machine);
            }
            return Err(error.to_string());
        }
        self.asked_at = Some(self.sim.now());
        Ok(Reservation { machine: Box::new(machine), region })
    }

    fn may_refuse(&self) -> bool {
        self.conflict == Some(OnConflict::Refuse)
    }

    fn asked(&mut self) -> Asked {
        let (Some(policy), Some(asked_at), false) = (self.conflict, self.asked_at, self.is_told) else {
            return Asked::Not;
        };
        if self.sim.now() < asked_at + ANSWERS {
            return Asked::Pending;
        }
        self.is_told = true;
        let conflict = Conflict {
            kind: ConflictKind::Address,
            mac: "02:00:00:00:00:02".parse().expect("a constant address is an address"),
            ip: "10.0.0.1".parse().ok(),
            ports: Vec::new(),
        };
        let refusal = (policy == OnConflict::Refuse).then(|| conflict.to_string());
        let conflicts = vec![conflict];
        Asked::Known {
            report: AskedReport { policy: policy.to_string(), conflicts, ..AskedReport::default() },
            refusal,
        }
    }
}

fn shape(scenario: &Scenario) -> MachineShape {
    MachineShape {
        vm_id: VM,
        name: "simulated".parse().expect("a constant name is a name"),
        memory_bytes: scenario.memory_pages * PAGE_SIZE as u64,
        // Only one writes; two threads serve the faults of two.
        cpus: CPUS,
        dirty_log: DirtyLogKind::Bitmap,
        tsc_khz: 1_000_000,
        cpuid: Vec::new(),
        nets: Vec::new(),
        disks: Vec::new(),
        rng: false,
        balloon: false,
        hugepages: false,
    }
}

fn source_main(sim: &Arc<Scheduler>, scenario: &Scenario, is_first: bool) -> Option<MigrationReport> {
    let options = SourceOptions {
        strategy: scenario.strategy,
        on_stuck: scenario.on_stuck,
        safety: scenario.safety,
        bandwidth: scenario.bandwidth_limit,
        downtime: scenario.downtime,
        fixed_cost: Duration::from_millis(1),
        streams: scenario.streams,
        reducers: scenario.reducers,
        verify: scenario.verify,
        stall: scenario.stall,
        peer: "simulated".to_owned(),
        // Any place will do.
        place: scenario.conflict.map(|_| NetworkPlace { boot_id: VM.0, device: 1, inode: 1 }),
        ..SourceOptions::default()
    };
    let mut machine = SimMachine::new(sim, Side::Source);
    let region = sim.with(|world| Arc::clone(&world.host(Side::Source).region));
    let mut link = SimSourceLink::dial(sim, scenario.stall).ok()?;
    let source = Source {
        id: MIGRATION,
        options: &options,
        shape: &shape(scenario),
        region: region.as_ref(),
        machine: &mut machine,
        link: &mut link,
        clock: sim.as_ref(),
        observer: &SimObserver { sim: Arc::clone(sim), side: Side::Source },
        cancel: sim.with(|world| world.cancelled[Side::Source.index()].clone()),
        pace: if is_first { sim.with(|world| world.pace.clone()) } else { Pace::new(options.bandwidth) },
        heard: Heard::default(),
        tunnel: None,
    };
    let lent = sim.with(|world| match world.host(Side::Source).journal.last() {
        Some(JournalRecord::Lent { lease_ms, .. }) => Some(Duration::from_millis(*lease_ms)),
        _ => None,
    });
    Some(match lent {
        _ if is_first => source.run(),
        Some(lease) => source.recover_loan(lease),
        None => source.recover(),
    })
}

fn first_message(control: &dyn ControlChannel<ControlMessage>) -> Result<ControlMessage, LinkError> {
    control
        .recv(FIRST_MESSAGE_LIMIT)?
        .ok_or(LinkError::Stalled { doing: "waiting for an offer", after: FIRST_MESSAGE_LIMIT })
}

fn target_main(sim: &Arc<Scheduler>, scenario: &Scenario) -> Result<(), String> {
    let mut link = SimTargetLink::accept(sim, scenario.stall, FIRST_MESSAGE_LIMIT).ok_or("nobody came")?;
    let first = first_message(link.control().as_ref()).map_err(|error| error.to_string())?;
    let target = Target {
        link: &mut link,
        host: &mut SimHost::new(sim, scenario),
        clock: sim.as_ref(),
        observer: &SimObserver { sim: Arc::clone(sim), side: Side::Target },
        cancel: sim.with(|world| world.cancelled[Side::Target.index()].clone()),
        stall: scenario.stall,
        relay: RelayPhase::default(),
        telling: Telling::default(),
    };
    let ended = target.run(first);
    answer_questions(sim, &mut link, ended.is_ok());
    ended.map(drop).map_err(|error| error.to_string())
}

/// The manager that takes the place of the target's.
fn other_target_main(sim: &Arc<Scheduler>, scenario: &Scenario) {
    let mut link = SimTargetLink::unconnected(sim, scenario.stall);
    let region = sim.with(|world| Arc::clone(&world.host(Side::Target).region));
    let machine = Box::new(SimMachine::new(sim, Side::Target));
    let target = Target {
        link: &mut link,
        host: &mut SimHost::new(sim, scenario),
        clock: sim.as_ref(),
        observer: &SimObserver { sim: Arc::clone(sim), side: Side::Target },
        cancel: crate::migrate::CancelFlag::default(),
        stall: scenario.stall,
        relay: RelayPhase::default(),
        telling: Telling::default(),
    };
    let ended = target.recover(Orphan { migration_id: MIGRATION, vm_id: VM, machine, region, cpus: CPUS });
    answer_questions(sim, &mut link, ended.is_ok());
}

/// Answers for as long as a source may ask.
fn answer_questions(sim: &Arc<Scheduler>, link: &mut dyn TargetLink<ControlMessage>, all_is_here: bool) {
    let journal = SimJournal::new(sim, Side::Target);
    let until = sim.now() + ANSWER_LIMIT;
    let mut connected = true;
    while sim.now() < until {
        if !connected {
            connected = link.reaccept(ANSWER_TICK);
            continue;
        }
        let control = link.control();
        match control.recv(ANSWER_TICK) {
            Ok(Some(ControlMessage::Query(asked))) => connected = answer(&journal, asked, control.as_ref()).is_ok(),
            Ok(Some(ControlMessage::Recover { .. })) if all_is_here => {
                connected = control.send(&ControlMessage::Complete(WaitReport::default())).is_ok();
            }
            Ok(Some(_)) => {}
            // Whoever dials anew takes the place of a connection on which nothing moves.
            Ok(None) => drop(link.reaccept(Duration::ZERO)),
            Err(_) => connected = false,
        }
    }
}

fn unpoisoned<T>(slot: &Mutex<T>) -> MutexGuard<'_, T> {
    slot.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How many this process has run.
pub(super) static COUNT: AtomicU64 = AtomicU64::new(0);

/// Runs `scenario` to its end.
///
/// # Panics
/// If the code under test panics.
pub fn simulate(scenario: &Scenario) -> Run {
    COUNT.fetch_add(1, Ordering::Relaxed);
    let sim = Arc::new(Scheduler::new(scenario));
    let source = Mutex::new((None, 0));
    let (target, recovered) = (Mutex::new(None), Mutex::new(None));
    let process = |side, generation| Process { side, generation };
    sim.run(vec![
        (
            process(Side::Source, 0),
            Box::new(|| {
                let ended = source_main(&sim, scenario, true);
                *unpoisoned(&source) = (ended, sim.operations());
            }),
        ),
        (process(Side::Target, 0), Box::new(|| *unpoisoned(&target) = Some(target_main(&sim, scenario)))),
        (
            process(Side::Source, 1),
            Box::new(|| {
                if sim.await_start() {
                    *unpoisoned(&recovered) = source_main(&sim, scenario, false);
                }
            }),
        ),
        (
            process(Side::Target, 1),
            Box::new(|| {
                if sim.await_start() {
                    other_target_main(&sim, scenario);
                }
            }),
        ),
    ]);
    let left = sim.with(|world| world.check_end());
    let (trace_hash, trace) = (sim.trace_hash(), sim.trace_text(60));
    let (report, operations) = std::mem::take(&mut *unpoisoned(&source));
    sim.with(|world| Run {
        recovered: unpoisoned(&recovered).take(),
        report,
        target: unpoisoned(&target).take(),
        struck: std::mem::take(&mut world.struck),
        found: world.before_operator.unwrap_or(left),
        left,
        stale_prepared: world.stale_prepared,
        violations: std::mem::take(&mut world.violations),
        operations,
        trace_hash,
        trace,
    })
}
