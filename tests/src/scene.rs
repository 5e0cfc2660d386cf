//! What the fault suites share: two hosts with a VM and a migration between them, what is true of them, and the
//! comparison with the outcome table. One worker pool runs the cells of a matrix side by side.

use std::fmt::Debug;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use crate::hosted::{Receiver, Running, TestHost, VM};
use crate::wait::wait_for;
use anyhow::{Context, Result, bail, ensure};
use dunlin::migrate::outcomes::{Failure, Whereabouts, Window, outcome};
use dunlin::model::{Ending, Step};
use dunlin::port::JournalRecord;
use dunlin::service::machine::{RunState, VmInfo};

/// The longest that a migration may take in these suites: the source's time in doubt, and a margin for a busy host.
pub const MIGRATION_LIMIT: Duration = Duration::from_secs(60);
/// For how long a source in doubt dials: short, and longer than dialling once into nothing.
const DOUBT: &str = "6s";
/// By when both sides must have come to rest.
const REST_LIMIT: Duration = Duration::from_secs(15);
/// For how long the state at rest is watched: many heartbeats.
const WATCH: Duration = Duration::from_millis(120);
/// Cells that run side by side in one test: most of their time is waiting.
const WORKERS: usize = 4;

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Host {
    /// Where the VM runs at first.
    Source,
    /// Where it is to run.
    Target,
}

impl Host {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Target => "target",
        }
    }
}

/// What was found when everything had come to rest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// Where the VM is.
    pub vm: Whereabouts,
    /// A prepared copy waits at the target of a VM that runs at the source.
    pub copy_waits: bool,
}

impl Found {
    /// For the printed table.
    pub fn copy_note(self) -> &'static str {
        if self.copy_waits { ", a copy waits at the target" } else { "" }
    }
}

/// The steps at which a manager can be held.
pub const STEPS: &[(Host, Step)] = &[
    (Host::Source, Step::Connected),
    (Host::Source, Step::Offered),
    (Host::Source, Step::Reserved),
    (Host::Source, Step::Round),
    (Host::Source, Step::Paused),
    (Host::Source, Step::StateMoved),
    (Host::Source, Step::Prepared),
    (Host::Source, Step::Released),
    (Host::Source, Step::Running),
    (Host::Source, Step::Discarded),
    (Host::Target, Step::Offered),
    (Host::Target, Step::Reserved),
    (Host::Target, Step::StateMoved),
    (Host::Target, Step::Prepared),
    (Host::Target, Step::Owned),
    (Host::Target, Step::Announced),
    (Host::Target, Step::Running),
];

/// Runs all cells, a few at a time; prints what each found, and fails with all failures.
pub fn run_cells<C: Copy + Send + Sync + Debug>(cells: Vec<C>, run: impl Fn(C) -> Result<String> + Sync) {
    let (next, told) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let only = std::env::var("DUNLIN_FAULT_CELL").ok();
    let cells: Vec<C> =
        cells.into_iter().filter(|cell| only.as_ref().is_none_or(|only| format!("{cell:?}").contains(only))).collect();
    std::thread::scope(|scope| {
        for _ in 0..WORKERS.min(cells.len()) {
            scope.spawn(|| {
                while let Some(&cell) = cells.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let began = Instant::now();
                    let result = run(cell);
                    let took = began.elapsed();
                    told.lock().expect("no worker panics").push((format!("{cell:?}"), result, took));
                }
            });
        }
    });
    let told = told.into_inner().expect("no worker panicked");
    for (cell, result, took) in &told {
        println!("{:5.1} s  {}", took.as_secs_f64(), result.as_ref().unwrap_or(cell));
    }
    let failed: Vec<_> =
        told.iter().filter_map(|(_, result, _)| result.as_ref().err().map(|error| format!("{error:#}"))).collect();
    assert!(failed.is_empty(), "{} of {} cells failed:\n\n{}", failed.len(), cells.len(), failed.join("\n\n"));
}

/// Plays one cell in a scene of its own; a failure tells the cell and what the scene's programs said.
///
/// # Errors
/// What `play` found wrong.
pub fn in_scene<C: Copy + Debug>(cell: C, play: impl Fn(&mut Scene, C) -> Result<String>) -> Result<String> {
    let mut scene = Scene::new(&[])?;
    let told = play(&mut scene, cell);
    told.with_context(|| format!("{cell:?}\n{}", scene.story()))
}

/// Whether a host's manager has passed a step.
fn passed(host: &TestHost, step: Step) -> bool {
    let text = std::fs::read_to_string(host.path("events")).unwrap_or_default();
    text.contains(&format!("\"step\":\"{step}\""))
}

/// Two hosts, a VM on the first, a receiver on the second, and the migration between them.
pub struct Scene {
    /// Where the VM was booted.
    pub source: TestHost,
    /// Where it is to go.
    pub target: TestHost,
    /// The machine that was booted.
    pub vm: Running,
    /// The target's manager.
    pub receiver: Option<Receiver>,
    /// The source's manager.
    pub migrate: Option<Running>,
}

impl Scene {
    /// Boots a VM.
    pub fn new(vm_options: &[&str]) -> Result<Self> {
        Self::on(TestHost::new()?, TestHost::new()?, vm_options)
    }

    /// The same on hosts that were made before.
    pub fn on(source: TestHost, target: TestHost, vm_options: &[&str]) -> Result<Self> {
        let vm = source.boot(vm_options)?;
        Ok(Self { source, target, vm, receiver: None, migrate: None })
    }

    /// One of the two hosts.
    pub fn host(&self, host: Host) -> &TestHost {
        match host {
            Host::Source => &self.source,
            Host::Target => &self.target,
        }
    }

    /// Starts a receiver and a migration to it.
    pub fn start(&mut self, migrate: &[&str], receive: &[&str]) -> Result<()> {
        let address = self.listen(receive)?;
        self.start_to(&address, migrate)
    }

    /// Starts a receiver; its address.
    pub fn listen(&mut self, receive: &[&str]) -> Result<String> {
        let events = self.target.path("events");
        let events = events.display().to_string();
        let options = [&["--events", events.as_str()], receive].concat();
        let receiver = self.receiver.insert(self.target.receive(&options)?);
        Ok(receiver.address.clone())
    }

    /// Starts the migration by way of another address.
    pub fn start_to(&mut self, address: &str, migrate: &[&str]) -> Result<()> {
        let events = self.source.path("events");
        let events = events.display().to_string();
        let options = [&["--events", events.as_str(), "--doubt", DOUBT], migrate].concat();
        self.migrate = Some(self.source.migrate(address, &options)?);
        Ok(())
    }

    /// Waits until `dunlin migrate` has ended. `None` if it made no report: it never reached the target.
    pub fn end_of_migration(&mut self, limit: Duration) -> Result<Option<Ending>> {
        let migrate = self.migrate.as_mut().context("no migration was started")?;
        let code = migrate.exit_code(limit)?;
        let report = migrate.report();
        let ending = report.map(|report| report.ending);
        let wanted = ending.map_or(dunlin::model::outcome::exit::REFUSED, Ending::exit_code);
        ensure!(code == Some(i32::from(wanted)), "exit code {code:?} does not fit the report: {ending:?}");
        Ok(ending)
    }

    /// With one side held at a step: waits until the other has come as far as it can, so that a cell is one case.
    pub fn await_other_side(&mut self, held: Host, at: Step) -> Result<()> {
        let target = &self.target;
        let target_is_prepared = || passed(target, Step::Prepared).then_some(());
        match (held, at) {
            (Host::Source, Step::Offered) => {
                wait_for("the target's machine", REST_LIMIT, || target.machine()).map(drop)
            }
            (Host::Source, Step::StateMoved) => wait_for("`prepared` at the target", REST_LIMIT, target_is_prepared),
            (Host::Source, Step::Running) => wait_for("the VM at the target", REST_LIMIT, || {
                target.info().filter(|info| info.state == RunState::Running)
            })
            .map(drop),
            (Host::Target, Step::Running) => self.end_of_migration(MIGRATION_LIMIT).map(drop),
            _ => Ok(()),
        }
    }

    /// Whether the source's manager has passed a step.
    pub fn source_passed(&self, step: Step) -> bool {
        passed(&self.source, step)
    }

    /// How far the handover has come, by the two journals and by whether the target has said that it is prepared.
    pub fn window(&self) -> Window {
        match self.journaled_window() {
            Window::Prepared if !passed(&self.target, Step::Prepared) => Window::BeforePrepared,
            window => window,
        }
    }

    /// How far the handover has come, by the two journals alone.
    pub fn journaled_window(&self) -> Window {
        let (source, target) = (self.source.journal(None), self.target.journal(None));
        match (source, target) {
            _ if self.source_passed(Step::Running) => Window::Done,
            (_, Some(JournalRecord::Owner)) => Window::Owned,
            (Some(JournalRecord::Released { .. }), _) => Window::Released,
            (_, Some(JournalRecord::Prepared)) => Window::Prepared,
            _ => Window::BeforePrepared,
        }
    }

    /// What is true now; `None` while something is on its way.
    fn look(&self) -> Result<Option<Found>> {
        let (source, target) = (self.source.info(), self.target.info());
        let state = |info: &Option<VmInfo>| info.as_ref().map(|info| info.state);
        let found = |vm, copy_waits| Some(Found { vm, copy_waits });
        Ok(match (state(&source), state(&target)) {
            (Some(RunState::Running), Some(RunState::Running)) => bail!("I1: it runs on both hosts"),
            (Some(RunState::Running), None) => found(Whereabouts::RunsAtSource, false),
            (Some(RunState::Running), Some(RunState::Prepared | RunState::Borrowed)) => {
                found(Whereabouts::RunsAtSource, true)
            }
            (None | Some(RunState::Released), Some(RunState::Running)) => found(Whereabouts::RunsAtTarget, false),
            (Some(RunState::Released), None | Some(RunState::Prepared)) | (None, Some(RunState::Prepared)) => {
                found(Whereabouts::Waits, false)
            }
            (None, None) => found(Whereabouts::Crashed, false),
            _ => None,
        })
    }

    /// Waits until what is found is in the table's row, and watches that it stays so: the guest's heart beats where it
    /// is said to run, and nowhere else.
    pub fn check_against_table(&self, failure: Failure, window: Window, ending: Option<Ending>) -> Result<Found> {
        let row = outcome(failure, window).context("no such row")?;
        let mut last = None;
        let fits = |found: Found| row.ends.contains(&(ending, found.vm)) && (row.copy_may_wait || !found.copy_waits);
        let found = wait_for("the outcome that the table names", REST_LIMIT, || {
            last = self.look().transpose();
            match &last {
                Some(Ok(found)) if fits(*found) => Some(Ok(*found)),
                Some(Err(_)) => last.take(),
                _ => None,
            }
        })
        .with_context(|| {
            format!(
                "{failure}, {window}: ended {ending:?}, found {last:?}; the table: {:?}, copy may wait: {}",
                row.ends, row.copy_may_wait
            )
        })??;
        // What is on its way may look like an end for a moment.
        if self.watch(found)? { Ok(found) } else { self.check_against_table(failure, window, ending) }
    }

    /// Looks that it stays so; `false` if something is on its way again.
    fn watch(&self, found: Found) -> Result<bool> {
        let beats = || (self.source.serial().heartbeat(), self.target.serial().heartbeat());
        let before = beats();
        match found.vm {
            Whereabouts::RunsAtSource => self.source.serial().await_beat()?,
            Whereabouts::RunsAtTarget => self.target.serial().await_beat()?,
            // Nothing may happen: there is no event to wait for.
            Whereabouts::Waits | Whereabouts::RunsOwing | Whereabouts::Crashed => std::thread::sleep(WATCH),
        }
        let after = beats();
        ensure!(found.vm == Whereabouts::RunsAtSource || before.0 == after.0, "the guest's heart beats at the source");
        ensure!(found.vm == Whereabouts::RunsAtTarget || before.1 == after.1, "the guest's heart beats at the target");
        let now = self.look()?;
        ensure!(now.is_none_or(|now| now == found), "it did not stay so: {found:?}, then {now:?}");
        Ok(now.is_some())
    }

    /// Does what the operator's column says, and checks that then the VM runs on one host with nothing lost, that nothing
    /// is left on the other, and that it can be moved (again).
    pub fn settle(&mut self, found: Found, settle_at: Host) -> Result<()> {
        let runs_at = match found.vm {
            Whereabouts::RunsAtSource => {
                if found.copy_waits {
                    self.target.resolve(VM, "there")?;
                }
                Some(Host::Source)
            }
            Whereabouts::RunsAtTarget => {
                if self.source.machine().is_some() {
                    self.source.resolve(VM, "there")?;
                }
                Some(Host::Target)
            }
            Whereabouts::Waits => Some(self.resolve_doubt(settle_at)?),
            Whereabouts::RunsOwing | Whereabouts::Crashed => None,
        };
        let expected = Found {
            vm: match runs_at {
                Some(Host::Source) => Whereabouts::RunsAtSource,
                Some(Host::Target) => Whereabouts::RunsAtTarget,
                None => Whereabouts::Crashed,
            },
            copy_waits: false,
        };
        // As above: what is on its way (a reservation for a source that is dead) may look like the end for a moment.
        wait_for("the settled state, to stay", REST_LIMIT, || {
            if self.look().ok()? != Some(expected) {
                return None;
            }
            match self.watch(expected) {
                Ok(stayed) => stayed.then_some(Ok(())),
                Err(error) => Some(Err(error)),
            }
        })??;
        let empty = |host: &TestHost| {
            wait_for("the end of leftovers", REST_LIMIT, || host.leftovers().is_empty().then_some(()))
                .with_context(|| format!("left behind: {:?}", host.leftovers()))
        };
        match runs_at {
            Some(Host::Source) => {
                empty(&self.target).context("target")?;
                ensure!(!self.source.info().context("gone")?.dirty_log_on, "the dirty log was left on");
                Self::move_on(&self.source)
            }
            Some(Host::Target) => {
                empty(&self.source).context("source")?;
                ensure!(!self.target.info().context("gone")?.dirty_log_on, "the dirty log was left on");
                Self::move_on(&self.target)
            }
            None => {
                empty(&self.source).context("source")?;
                empty(&self.target).context("target")
            }
        }
    }

    /// `dunlin resolve` on both hosts; returns where the VM runs then.
    fn resolve_doubt(&self, settle_at: Host) -> Result<Host> {
        let (at_source, at_target) = (self.source.info(), self.target.info());
        let vm_id = at_source.as_ref().or(at_target.as_ref()).context("no VM on either host")?.vm_id;
        let here = if at_target.is_none() {
            Host::Source
        } else if at_source.is_none() {
            Host::Target
        } else {
            settle_at
        };
        let (source, target) = if here == Host::Source { ("here", "there") } else { ("there", "here") };
        // First the one that lets go.
        let mut orders = vec![(&self.source, source), (&self.target, target)];
        if here == Host::Source {
            orders.reverse();
        }
        for (host, owner) in orders {
            if host.machine().is_some() {
                host.resolve(VM, owner)?;
            } else if host.leftovers().iter().any(|left| left.contains("journal")) {
                host.resolve(&format!("uuid:{vm_id}"), owner)?;
            }
        }
        Ok(here)
    }

    /// Moves the VM from `host` to a third one, verified, and looks at the guest there.
    fn move_on(host: &TestHost) -> Result<()> {
        let third = TestHost::new()?;
        let receiver = third.receive(&[])?;
        let mut migrate = host.migrate(&receiver.address, &["--verify"])?;
        let code = migrate.exit_code(MIGRATION_LIMIT)?;
        ensure!(code == Some(0), "the next migration: exit {code:?}: {}\n{}", migrate.output.text(), third.story());
        third.serial().await_beat()?;
        third.serial().check_guest()?;
        wait_for("the end of leftovers after the next migration", REST_LIMIT, || {
            host.leftovers().is_empty().then_some(())
        })
        .with_context(|| format!("left behind: {:?}", host.leftovers()))
    }

    /// What all commands said.
    pub fn story(&self) -> String {
        format!("  source:\n{}  target:\n{}", self.source.story(), self.target.story())
    }
}
