//! Simulated twins of machine and journal: a manager's session with the machine process of its host.
//!
//! The machine process itself, what it does when a session ends and what it remembers, is [`super::world`]'s.

use std::sync::Arc;
use std::time::Duration;

use super::faults::{Missing, SimFaults};
use super::scenario::{Sabotage, Side};
use super::scheduler::Scheduler;
use super::world::{AppendError, Cpu, Gate, Vm, World};
use crate::model::{MigrationId, Owner, PageBitmap, PageCount, PageRun, RegionId, VcpuLimit, VmId, VmWrites};
use crate::port::{
    DirtyLog, Fate, FaultSource, Faults, FreePages, Gate as GatePort, Journal, JournalError, JournalRecord, Loan,
    MachineError, MachineState, PauseTiming, Region, Relay, Throttle, Vcpus,
};

/// One order over the session socket.
const ORDER: Duration = Duration::from_micros(30);
/// What a guest takes to name its free pages.
const ANSWER: Duration = Duration::from_millis(1);
/// An order that ends with an fsync.
const FSYNC: Duration = Duration::from_micros(200);

fn gone(action: &'static str) -> MachineError {
    MachineError::Gone { action, reason: "the session has ended".to_owned() }
}

fn refused(action: &'static str, reason: &str) -> MachineError {
    MachineError::Refused { action, reason: reason.to_owned() }
}

fn not_journaled(action: &'static str) -> impl Fn(AppendError) -> MachineError {
    move |error| match error {
        AppendError::DiskFull => refused(action, "no space left on device"),
        AppendError::WriterDied => gone(action),
    }
}

/// A manager's session with its machine. Dropping it ends the session.
pub(super) struct SimMachine {
    sim: Arc<Scheduler>,
    side: Side,
}

impl SimMachine {
    pub(super) fn new(sim: &Arc<Scheduler>, side: Side) -> Self {
        Self { sim: Arc::clone(sim), side }
    }

    fn order<R>(
        &self,
        action: &'static str,
        cost: Duration,
        effect: impl FnOnce(&mut World, Side) -> Result<R, MachineError>,
    ) -> Result<R, MachineError> {
        let side = self.side;
        self.sim.operation(
            action,
            cost,
            |world| {
                if world.vm(side).is_none() { Err(gone(action)) } else { effect(world, side) }
            },
        )
    }

    fn on_vm<R>(
        &self,
        action: &'static str,
        effect: impl FnOnce(&mut Vm) -> Result<R, MachineError>,
    ) -> Result<R, MachineError> {
        self.order(action, ORDER, |world, side| effect(world.vm(side).ok_or_else(|| gone(action))?))
    }
}

impl Drop for SimMachine {
    fn drop(&mut self) {
        let side = self.side;
        self.sim.with(|world| world.end_session(side));
    }
}

impl Vcpus for SimMachine {
    fn pause(&mut self) -> Result<PauseTiming, MachineError> {
        self.on_vm("pause", |vm| {
            vm.running = false;
            vm.untold = true;
            vm.lift();
            Ok(PauseTiming { pause: ORDER })
        })
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        self.order("resume", ORDER, |world, side| {
            let now_ns = world.now_ns;
            match world.vm(side).map(|vm| vm.gate) {
                Some(Gate::Open | Gate::Owner) => {
                    if world.vm(side).is_some_and(|vm| vm.untold && !vm.running) {
                        world.violation(format!("N1: the VM runs at the {side:?} before it was announced there"));
                    }
                    world.start_running(side);
                }
                Some(Gate::Borrowed) if world.vm(side).is_some_and(|vm| vm.lent_until_ns > now_ns) => {
                    world.start_running(side);
                }
                Some(Gate::Borrowed) => {
                    if let Some(vm) = world.vm(side) {
                        vm.stands_by_lease = true;
                    }
                    return Err(refused("resume", "the lease is over"));
                }
                gate => return Err(refused("resume", &format!("the gate is shut: {gate:?}"))),
            }
            Ok(())
        })
    }
}

impl DirtyLog for SimMachine {
    fn start_log(&mut self) -> Result<(), MachineError> {
        self.order("start log", ORDER, |world, side| {
            let free = world.free_pages();
            let vm = world.vm(side).ok_or_else(|| gone("start log"))?;
            vm.log.start();
            vm.free_at_start = Some(free);
            Ok(())
        })
    }

    fn harvest(&mut self, into: &mut PageBitmap) -> Result<PageCount, MachineError> {
        self.on_vm("harvest", |vm| Ok(vm.log.harvest(into)))
    }

    fn protect(&mut self, _region: RegionId, run: PageRun) -> Result<(), MachineError> {
        let side = self.side;
        self.sim.operation_in_lock("protect", ORDER, |world| {
            world.vm(side).ok_or_else(|| gone("protect"))?.log.protect(run);
            Ok(())
        })
    }

    fn disregard(&mut self, _region: RegionId, runs: &[PageRun]) -> Result<(), MachineError> {
        self.on_vm("disregard", |vm| {
            for run in runs {
                vm.log.disregard(*run);
            }
            Ok(())
        })
    }

    fn stop_log(&mut self) -> Result<(), MachineError> {
        self.on_vm("stop log", |vm| {
            vm.lift();
            vm.log.stop();
            Ok(())
        })
    }
}

impl FaultSource for SimMachine {
    fn catch_faults(&mut self) -> Result<Arc<dyn Faults>, MachineError> {
        self.on_vm("catch faults", |vm| {
            vm.missing = Some(Missing::new(vm.log.pages()));
            Ok(())
        })?;
        self.caught_faults()?.ok_or_else(|| gone("catch faults"))
    }

    fn caught_faults(&mut self) -> Result<Option<Arc<dyn Faults>>, MachineError> {
        let here =
            self.on_vm("caught faults", |vm| Ok(vm.missing.as_ref().map(|missing| Arc::clone(&missing.here))))?;
        let (sim, side) = (&self.sim, self.side);
        Ok(here.map(|here| Arc::new(SimFaults { sim: Arc::clone(sim), side, here }) as Arc<dyn Faults>))
    }

    fn all_is_here(&mut self) -> Result<(), MachineError> {
        self.on_vm("all is here", |vm| {
            vm.missing = None;
            Ok(())
        })
    }
}

impl FreePages for SimMachine {
    /// The guest goes on between what it names and the end of the answer, and uses again what it has named.
    fn name_free_pages(&mut self, into: &mut PageBitmap, patience: Duration) -> Result<(), MachineError> {
        let named = self.order("ask for free pages", ORDER, |world, side| {
            let now = world.free_pages();
            let is_broken = world.scenario.sabotage == Some(Sabotage::NamesOldFreePages);
            let old = world.vm(side).and_then(|vm| vm.free_at_start.clone()).filter(|_| is_broken);
            Ok(old.unwrap_or(now))
        })?;
        self.order("name free pages", ANSWER.min(patience), |_, _| Ok(()))?;
        into.union(&named);
        Ok(())
    }
}

impl Throttle for SimMachine {
    fn throttle(&mut self, limits: &[Option<VcpuLimit>]) -> Result<VmWrites, MachineError> {
        let (side, limit) = (self.side, limits.first().copied().flatten());
        self.sim.operation_in_lock("throttle", ORDER, |world| {
            let now_ns = world.now_ns;
            Ok(world.vm(side).ok_or_else(|| gone("throttle"))?.throttle(limit, now_ns))
        })
    }
}

impl MachineState for SimMachine {
    fn save_state(&mut self) -> Result<Vec<u8>, MachineError> {
        self.order("save state", ORDER, |world, side| {
            let state = match world.vm(side).map(|vm| (vm.cpu, vm.running)) {
                Some((Some(cpu), false)) => cpu.encode(),
                _ => return Err(refused("save state", "the VM runs")),
            };
            world.note_cut(side);
            Ok(state)
        })
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<(), MachineError> {
        self.on_vm("restore state", |vm| {
            vm.cpu = Some(Cpu::decode(state).ok_or_else(|| refused("restore state", "it is damaged"))?);
            Ok(())
        })
    }

    fn boot_image(&mut self) -> Result<Option<Vec<u8>>, MachineError> {
        self.on_vm("boot image", |vm| Ok(vm.boot_image.clone()))
    }

    fn set_boot_image(&mut self, image: &[u8]) -> Result<(), MachineError> {
        let cost = self.sim.with(|world| world.scenario.image_cost);
        self.order("set boot image", cost, |world, side| {
            world.vm(side).ok_or_else(|| gone("set boot image"))?.boot_image = Some(image.to_vec());
            Ok(())
        })
    }
}

impl Relay for SimMachine {}

impl Loan for SimMachine {
    fn lend(&mut self, _migration: MigrationId, peer: &str, lease: Duration) -> Result<(), MachineError> {
        let record = JournalRecord::Lent { peer: peer.to_owned(), lease_ms: lease.as_millis() as u64 };
        self.order("lend", FSYNC, |world, side| {
            world.append(side, record).map_err(not_journaled("journal `lent`"))?;
            world.vm(side).ok_or_else(|| gone("lend"))?.gate = Gate::Lent;
            Ok(())
        })
    }

    fn staging(&mut self) -> Result<Arc<dyn Region>, MachineError> {
        self.order("staging", ORDER, |world, side| Ok(Arc::clone(&world.host(side).staging) as Arc<dyn Region>))
    }

    fn advance(&mut self, pages: &PageBitmap, state: &[u8]) -> Result<(), MachineError> {
        self.order("advance", ORDER, |world, _| {
            let cpu = Cpu::decode(state).ok_or_else(|| refused("advance", "the state is damaged"))?;
            world.advance_loan(pages, cpu);
            Ok(())
        })
    }

    fn take_back(&mut self, _migration: MigrationId) -> Result<(), MachineError> {
        self.order("take back", FSYNC, |world, side| {
            if world.vm(side).is_none_or(|vm| vm.gate != Gate::Lent) {
                return Err(refused("take back", "it is not lent"));
            }
            world.append(side, JournalRecord::Owner).map_err(not_journaled("take back"))?;
            world.vm(side).ok_or_else(|| gone("take back"))?.gate = Gate::Open;
            world.go_back();
            Ok(())
        })
    }

    fn hold_output(&mut self) -> Result<(), MachineError> {
        self.begin_increment(1)
    }

    fn run_until(&mut self, until: Duration) -> Result<(), MachineError> {
        self.order("run until", ORDER, |world, side| match world.vm(side).map(|vm| vm.gate) {
            Some(Gate::Prepared | Gate::Borrowed) => {
                world.lend_until(side, until.as_nanos() as u64).ok_or_else(|| refused("run until", "that is over"))
            }
            gate => Err(refused("run until", &format!("the gate is {gate:?}"))),
        })
    }

    fn begin_increment(&mut self, number: u32) -> Result<(), MachineError> {
        self.on_vm("begin increment", |vm| {
            vm.increment = number;
            Ok(())
        })
    }

    fn let_out(&mut self, number: u32) -> Result<(), MachineError> {
        self.order("let out", ORDER, |world, _| {
            world.let_out(number);
            Ok(())
        })
    }
}

impl GatePort for SimMachine {
    fn release(&mut self, _migration: MigrationId, peer: &str) -> Result<(), MachineError> {
        let side = self.side;
        let record = JournalRecord::Released { peer: peer.to_owned() };
        self.sim.order("release", FSYNC, |world| match world.append(side, record) {
            Ok(()) => {
                if let Some(vm) = world.vm(side) {
                    vm.gate = Gate::Released;
                }
                Ok(())
            }
            // It died with the record written: the manager reads it.
            Err(AppendError::WriterDied) => Ok(()),
            Err(error) => Err(not_journaled("journal `released`")(error)),
        })
    }

    fn reclaim(&mut self, _migration: MigrationId) -> Result<(), MachineError> {
        self.order("reclaim", FSYNC, |world, side| {
            world.append(side, JournalRecord::Owner).map_err(not_journaled("reclaim"))?;
            world.vm(side).ok_or_else(|| gone("reclaim"))?.gate = Gate::Open;
            world.go_back();
            Ok(())
        })
    }

    fn foresee_prepared(&mut self, _migration: MigrationId) -> Result<(), MachineError> {
        self.order("foresee prepared", FSYNC, |world, side| {
            world.append(side, JournalRecord::Prepared).map_err(not_journaled("journal `prepared`"))?;
            world.vm(side).ok_or_else(|| gone("foresee prepared"))?.foreseen = true;
            Ok(())
        })
    }

    fn prepared(&mut self, _migration: MigrationId) -> Result<(), MachineError> {
        self.order("prepared", ORDER, |world, side| {
            if !world.vm(side).ok_or_else(|| gone("prepared"))?.foreseen {
                world.append(side, JournalRecord::Prepared).map_err(not_journaled("journal `prepared`"))?;
            }
            world.vm(side).ok_or_else(|| gone("prepared"))?.gate = Gate::Prepared;
            Ok(())
        })
    }

    fn take_ownership(&mut self, _migration: MigrationId) -> Result<(), MachineError> {
        self.order("take ownership", FSYNC, |world, side| {
            let vm = world.vm(side).ok_or_else(|| gone("take ownership"))?;
            if !matches!(vm.gate, Gate::Prepared | Gate::Borrowed) {
                return Err(refused("take ownership", "it is not prepared"));
            }
            world.append(side, JournalRecord::Owner).map_err(not_journaled("journal `owner`"))?;
            let vm = world.vm(side).ok_or_else(|| gone("take ownership"))?;
            vm.log.stop();
            vm.gate = Gate::Owner;
            vm.has_run |= vm.running;
            Ok(())
        })
    }

    fn never_owner(&mut self, _migration: MigrationId) -> Result<(), MachineError> {
        let side = self.side;
        self.sim.operation("never owner", FSYNC, |world| {
            if world.vm(side).is_some() {
                return Err(refused("journal `never-owner`", "the machine lives"));
            }
            let has_run = world.has_run(side);
            match world.host(side).journal.last() {
                Some(JournalRecord::Owner) if has_run => {
                    world.violation("I1: `never-owner` is asked for of a VM that has run there".to_owned());
                    Err(refused("journal `never-owner`", "it has run the VM"))
                }
                Some(JournalRecord::NeverOwner) => Ok(()),
                _ => world.append(side, JournalRecord::NeverOwner).map_err(not_journaled("journal `never-owner`")),
            }
        })
    }

    fn announce(&mut self) -> Result<u32, MachineError> {
        self.on_vm("announce", |vm| {
            vm.untold = false;
            Ok(1)
        })
    }

    fn discard(&mut self, _migration: MigrationId) -> Result<(), MachineError> {
        self.order("discard", FSYNC, |world, side| {
            let record = match world.vm(side).map(|vm| vm.gate) {
                Some(Gate::Reserved | Gate::Prepared | Gate::Borrowed) => JournalRecord::NeverOwner,
                Some(Gate::Released) => JournalRecord::Discarded,
                gate => return Err(refused("discard", &format!("the VM is its own: {gate:?}"))),
            };
            match world.append(side, record) {
                Err(AppendError::DiskFull) => Err(not_journaled("discard")(AppendError::DiskFull)),
                Ok(()) | Err(AppendError::WriterDied) => {
                    world.kill_machine(side);
                    Ok(())
                }
            }
        })
    }

    fn fate(&mut self) -> Fate {
        let side = self.side;
        self.sim.operation("fate", Duration::from_micros(1), |world| {
            let vm = world.host(side).vm.as_ref().map(|vm| (vm.alive, vm.resolved, vm.gate));
            match vm {
                Some((_, Some(owner @ (Owner::Here | Owner::There)), _)) => Fate::Resolved(owner),
                Some((true, _, Gate::Owner)) => Fate::Resolved(Owner::Here),
                Some((true, ..)) => Fate::Waiting,
                Some((false, ..)) | None => Fate::Dead,
            }
        })
    }
}

/// The durable memory of a simulated host. It outlives every process.
pub(super) struct SimJournal {
    sim: Arc<Scheduler>,
    side: Side,
}

impl SimJournal {
    pub(super) fn new(sim: &Arc<Scheduler>, side: Side) -> Self {
        Self { sim: Arc::clone(sim), side }
    }
}

impl Journal for SimJournal {
    fn append(&mut self, _migration: MigrationId, _vm: VmId, record: JournalRecord) -> Result<(), JournalError> {
        let side = self.side;
        let written = self.sim.operation("append", FSYNC, |world| world.append(side, record));
        written.map_err(|_| JournalError::Io {
            path: "simulated".to_owned(),
            action: "writing",
            source: std::io::ErrorKind::StorageFull.into(),
        })
    }

    fn last(&self, _migration: MigrationId) -> Result<Option<JournalRecord>, JournalError> {
        let side = self.side;
        Ok(self.sim.operation("read journal", ORDER, |world| world.host(side).journal.last().cloned()))
    }
}
