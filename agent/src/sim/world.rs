//! Everything that exists in a simulation besides threads: two hosts with machine, journal and manager, the guest, the
//! network, faults, and the operator who cleans up at the end. Also the oracle: what must never be is noted here.
//!
//! Plain data under the scheduler's lock; knows nothing of threads and of the policy's internals.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::faults::Missing;
use super::memory::{SimDirtyLog, SimRegion};
use super::network::{NEVER, Network};
use super::rng::{Rng, mix};
use super::scenario::{Fault, Sabotage, Scenario, Side, Trigger};
use super::scheduler::Process;
use crate::migrate::outcomes::{Whereabouts, Window};
use crate::model::bucket::Bucket;
use crate::model::{Owner, PageBitmap, PageCount, PageRun, Step, VcpuLimit, VcpuWrites, VmWrites};
use crate::port::{FaultError, JournalRecord, Region as _, THROTTLE_LEASE};

/// How long the operator waits, after the source's manager has ended, before looking at both hosts.
const OPERATOR_AFTER: Duration = Duration::from_secs(35);
/// When an operator finishes demand-paging, after the VM has begun to run at the target.
const FINISH_AFTER: Duration = Duration::from_millis(300);
/// How long everything may take to end after the operator has decided.
const END_AFTER: Duration = Duration::from_secs(100);

/// What a vCPU knows: it travels in the state blob.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cpu {
    sequence: u64,
    rng: Rng,
    since_last_write_ns: u64,
    busy_left_ns: u64,
}

impl Cpu {
    pub(super) fn encode(&self) -> Vec<u8> {
        let words = [self.sequence, self.rng.0, self.since_last_write_ns, self.busy_left_ns];
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let mut words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()));
        let cpu = Self {
            sequence: words.next()?,
            rng: Rng(words.next()?),
            since_last_write_ns: words.next()?,
            busy_left_ns: words.next()?,
        };
        (words.next().is_none()).then_some(cpu)
    }
}

/// The one guest there is: what its memory must hold, wherever it runs.
struct Guest {
    places: Vec<u64>,
    stamps: Vec<u64>,
    /// Places that it does not use at present: what they hold counts for nothing.
    free: Vec<bool>,
    frees_one_in: u64,
    hot: u64,
    write_interval_ns: u64,
    cpu: Cpu,
}

/// The ownership gate of a machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Gate {
    /// Source: the VM is its own.
    Open,
    /// Source: `released` is journaled.
    Released,
    /// Target: nothing is owed.
    Reserved,
    /// Target: `prepared` is journaled.
    Prepared,
    /// Target: the VM runs on loan.
    Borrowed,
    /// Source: `lent` is journaled.
    Lent,
    /// Target: `owner` is journaled.
    Owner,
}

/// A machine process.
pub(super) struct Vm {
    pub(super) alive: bool,
    pub(super) running: bool,
    pub(super) gate: Gate,
    pub(super) log: SimDirtyLog,
    pub(super) cpu: Option<Cpu>,
    /// `prepared` is journaled ahead of time.
    pub(super) foreseen: bool,
    /// What the guest boots from when it resets.
    pub(super) boot_image: Option<Vec<u8>>,
    pub(super) resolved: Option<Owner>,
    /// A manager is connected.
    pub(super) session: bool,
    /// It waits where it touches a page that nobody has mapped for it.
    pub(super) missing: Option<Missing>,
    /// Target: until when the VM is lent, and the increment that it is at.
    pub(super) lent_until_ns: u64,
    pub(super) increment: u32,
    /// Target: it stands because the lease was over.
    pub(super) stands_by_lease: bool,
    /// Source: the state of the last increment.
    pub(super) kept: Option<Cpu>,
    /// What its guest did not use when the log was switched on.
    pub(super) free_at_start: Option<PageBitmap>,
    /// It has run the guest at some time, as its own.
    pub(super) has_run: bool,
    /// It has stood, or has come, and the network was not told since where it is.
    pub(super) untold: bool,
    /// What its vCPU may write, and until when that holds.
    limit: Option<(Bucket, u64)>,
    writes: VcpuWrites,
}

/// What every guest was booted from.
const BOOT_IMAGE: &[u8] = b"what the guest was booted from";

/// How a manager stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Manager {
    Alive,
    Killed,
    Ended,
}

/// One host.
pub(super) struct Host {
    pub(super) manager: Manager,
    /// Which of its managers that is.
    pub(super) generation: u8,
    pub(super) vm: Option<Vm>,
    pub(super) region: Arc<SimRegion>,
    /// Where increments are gathered.
    pub(super) staging: Arc<SimRegion>,
    pub(super) journal: Vec<JournalRecord>,
    disk_full: bool,
    die_after_append: bool,
}

/// The guest as it was at the end of an increment.
struct Cut {
    number: u32,
    cpu: Cpu,
    stamps: Vec<u64>,
    free: Vec<bool>,
}

/// Why a record is not written, or its writer not heard of again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AppendError {
    DiskFull,
    /// The record is durable.
    WriterDied,
}

enum Event {
    SessionLost(Side),
    /// A lease may be over.
    LeaseOver(Side),
    /// Whoever waits until pages are asked for is told to finish.
    Finish,
    Heal,
    Operator,
    End,
}

pub(super) struct World {
    pub(super) now_ns: u64,
    pub(super) rng: Rng,
    pub(super) scenario: Scenario,
    pub(super) network: Network,
    pub(super) hosts: [Host; 2],
    guest: Guest,
    /// The guest when it was paused for its move, and at the end of each increment.
    cuts: Vec<Cut>,
    /// The increment that the source goes on from if it must, and the last whose output has left the target.
    safe: u32,
    out: u32,
    events: Vec<(u64, Event)>,
    steps: Vec<(Side, Step)>,
    /// Cancel flags to set; the managers' own are joined to them by the runner.
    pub(super) cancelled: [crate::migrate::CancelFlag; 2],
    /// How fast the source's first manager may send.
    pub(super) pace: crate::migrate::Pace,
    /// What has struck, and in which window.
    pub(super) struck: Vec<(Fault, Window)>,
    pub(super) violations: Vec<String>,
    /// Where the VM was when the operator came.
    pub(super) before_operator: Option<Whereabouts>,
    /// Whether the target was left holding a prepared VM that it must not run.
    pub(super) stale_prepared: bool,
    operator_is_due: bool,
    /// Time is up: every manager is killed.
    pub(super) over: bool,
}

impl World {
    pub(super) fn new(scenario: &Scenario) -> Self {
        let mut rng = Rng(scenario.seed);
        let guest = Guest::new(scenario, &mut rng.fork(1));
        let pages = PageCount(scenario.memory_pages);
        let host = |gate| Host {
            manager: Manager::Alive,
            generation: 0,
            vm: (gate == Gate::Open).then(|| Vm::new(pages, gate)),
            region: Arc::new(SimRegion::new(pages)),
            staging: Arc::new(SimRegion::new(pages)),
            journal: Vec::new(),
            disk_full: false,
            die_after_append: false,
        };
        let mut world = Self {
            now_ns: 1_000_000_000,
            network: Network::new(scenario.network, rng.fork(2)),
            rng,
            scenario: scenario.clone(),
            hosts: [host(Gate::Open), host(Gate::Reserved)],
            guest,
            cuts: Vec::new(),
            safe: 0,
            out: 0,
            events: Vec::new(),
            steps: Vec::new(),
            cancelled: Default::default(),
            pace: crate::migrate::Pace::new(scenario.bandwidth_limit),
            struck: Vec::new(),
            violations: Vec::new(),
            before_operator: None,
            stale_prepared: false,
            operator_is_due: false,
            over: false,
        };
        let source = &mut world.hosts[Side::Source.index()];
        for (&place, &stamp) in world.guest.places.iter().zip(&world.guest.stamps) {
            // Every other page of zeros has never been written, and has no memory yet.
            if stamp != 0 || place % 2 == 0 {
                source.region.stamp(place, stamp);
            }
        }
        if let Some(vm) = &mut source.vm {
            vm.cpu = Some(world.guest.cpu);
            vm.running = true;
        }
        world
    }

    pub(super) fn host(&mut self, side: Side) -> &mut Host {
        &mut self.hosts[side.index()]
    }

    /// The machine of a side, if its process lives.
    pub(super) fn vm(&mut self, side: Side) -> Option<&mut Vm> {
        self.host(side).vm.as_mut().filter(|vm| vm.alive)
    }

    fn runs(&self, side: Side) -> bool {
        self.hosts[side.index()].vm.as_ref().is_some_and(|vm| vm.alive && vm.running)
    }

    fn has(&self, side: Side, wanted: &JournalRecord) -> bool {
        let same = |record: &JournalRecord| std::mem::discriminant(record) == std::mem::discriminant(wanted);
        self.hosts[side.index()].journal.iter().any(same)
    }

    pub(super) fn violation(&mut self, text: String) {
        self.violations.push(format!("{:.6} s: {text}", self.now_ns as f64 / 1e9));
    }

    // ---- time ----

    /// When the next event is due.
    pub(super) fn next_event_at(&self) -> u64 {
        self.events.iter().map(|(at, _)| *at).min().unwrap_or(NEVER)
    }

    fn after(&mut self, delay: Duration, event: Event) {
        self.events.push((self.now_ns + delay.as_nanos() as u64, event));
    }

    fn heal_after(&mut self, delay: Option<Duration>) {
        if let Some(delay) = delay {
            self.after(delay, Event::Heal);
        }
    }

    /// Lets time pass: the guest runs wherever it runs.
    pub(super) fn advance(&mut self, to_ns: u64) {
        let passed = to_ns.saturating_sub(self.now_ns);
        self.now_ns = self.now_ns.max(to_ns);
        for side in Side::BOTH {
            if self.runs(side) {
                self.run_guest(side, passed);
            }
        }
    }

    fn run_guest(&mut self, side: Side, passed_ns: u64) {
        let guest = &mut self.guest;
        let host = &mut self.hosts[side.index()];
        let Some(vm) = &mut host.vm else { return };
        let Some(mut cpu) = vm.cpu else { return };
        if vm.missing.as_ref().is_some_and(Missing::waits) {
            return;
        }
        let passed = passed_ns.min(cpu.busy_left_ns);
        cpu.busy_left_ns -= passed;
        cpu.since_last_write_ns += passed;
        if vm.limit.is_some_and(|(_, until_ns)| self.now_ns >= until_ns) {
            vm.limit = None;
        }
        let now = Duration::from_nanos(self.now_ns);
        while cpu.since_last_write_ns >= guest.write_interval_ns {
            if vm.limit.is_some_and(|(bucket, _)| !bucket.debt(now).is_zero()) {
                // It is held: this time is lost to it.
                vm.writes.held_ns += cpu.since_last_write_ns;
                cpu.since_last_write_ns = 0;
                break;
            }
            let before = cpu;
            cpu.since_last_write_ns -= guest.write_interval_ns;
            cpu.sequence += 1;
            let all = guest.places.len() as u64;
            // Hot pages lie all over the working set, so that no stream has them alone.
            let hot = cpu.rng.below(guest.hot) * (all / guest.hot);
            let index = if cpu.rng.one_in(10) { cpu.rng.below(all) } else { hot } as usize;
            if guest.frees_one_in > 0 && !guest.free[index] && cpu.rng.one_in(guest.frees_one_in) {
                guest.free[index] = true;
                continue;
            }
            if let Some(missing) = &mut vm.missing
                && !missing.touch(guest.places[index])
            {
                // It waits in the middle of that, and the time is lost to it.
                cpu = Cpu { since_last_write_ns: guest.write_interval_ns, ..before };
                break;
            }
            let stamp = if cpu.rng.one_in(8) { 0 } else { mix(cpu.sequence) | 1 };
            host.region.stamp(guest.places[index], stamp);
            (guest.stamps[index], guest.free[index]) = (stamp, false);
            let forgotten = self.scenario.sabotage == Some(Sabotage::ForgetsWrites) && self.rng.one_in(2);
            if !forgotten && vm.log.note(guest.places[index]) {
                vm.writes.pages += 1.0;
                if let Some((bucket, _)) = &mut vm.limit {
                    bucket.charge(1.0, now);
                }
            }
        }
        vm.cpu = Some(cpu);
        guest.cpu = cpu;
    }

    /// When a guest that may meet a missing page touches one next.
    pub(super) fn next_touch_at(&self) -> u64 {
        let touches = Side::BOTH.map(|side| {
            let vm = self.hosts[side.index()].vm.as_ref().filter(|_| self.runs(side));
            let cpu = vm.filter(|vm| vm.missing.as_ref().is_some_and(|missing| !missing.waits())).and_then(|vm| vm.cpu);
            let busy = cpu.filter(|cpu| cpu.busy_left_ns > 0 && self.guest.write_interval_ns != NEVER);
            busy.map_or(NEVER, |cpu| self.now_ns + self.guest.write_interval_ns.saturating_sub(cpu.since_last_write_ns))
        });
        touches.into_iter().min().unwrap_or(NEVER)
    }

    /// Whether the machine there waits for a page of which no manager knows, or has died: a manager that waits is to look.
    pub(super) fn has_fault(&self, side: Side) -> bool {
        let vm = self.hosts[side.index()].vm.as_ref();
        vm.is_none_or(|vm| !vm.alive || vm.missing.as_ref().is_some_and(Missing::is_untold))
    }

    /// Fires the next event.
    pub(super) fn fire_event(&mut self) {
        let Some(index) = (0..self.events.len()).min_by_key(|&index| self.events[index].0) else { return };
        let (at, event) = self.events.remove(index);
        self.advance(at);
        match event {
            Event::SessionLost(side) => self.session_lost(side),
            Event::LeaseOver(side) => self.lease_over(side),
            Event::Finish => self.pace.finish(),
            Event::Heal => self.network.heal(self.now_ns),
            Event::Operator => self.operator(),
            Event::End => self.over = true,
        }
    }

    // ---- processes ----

    pub(super) fn is_dead(&self, process: Process) -> bool {
        let host = &self.hosts[process.side.index()];
        let now = host.generation == process.generation && host.manager == Manager::Killed;
        self.over || now || process.generation < host.generation
    }

    /// Whether the process is its side's, or was.
    pub(super) fn has_started(&self, process: Process) -> bool {
        process.generation <= self.hosts[process.side.index()].generation
    }

    /// An operator starts a manager in the place of one that is gone.
    fn replace_manager(&mut self, side: Side) {
        let host = self.host(side);
        if host.manager != Manager::Alive && host.generation == 0 {
            host.manager = Manager::Alive;
            host.generation = 1;
            if let Some(vm) = self.vm(side) {
                vm.session = true;
            }
            if side == Side::Target {
                self.network.listening = true;
            }
        }
    }

    fn kill_manager(&mut self, side: Side) {
        if self.host(side).manager == Manager::Alive {
            self.host(side).manager = Manager::Killed;
            self.network.process_ended(self.now_ns, side);
            self.end_session(side);
            self.manager_gone(side);
        }
    }

    /// A manager's process has ended by itself.
    pub(super) fn manager_ended(&mut self, process: Process) {
        let side = process.side;
        if self.host(side).manager == Manager::Alive && self.host(side).generation == process.generation {
            self.host(side).manager = Manager::Ended;
            self.network.process_ended(self.now_ns, side);
            self.end_session(side);
            self.manager_gone(side);
        }
    }

    fn manager_gone(&mut self, side: Side) {
        if side == Side::Source && !self.operator_is_due {
            self.operator_is_due = true;
            self.after(OPERATOR_AFTER, Event::Operator);
        }
    }

    /// The machine's session is closed: the machine notices soon.
    pub(super) fn end_session(&mut self, side: Side) {
        let delay = Duration::from_micros(self.rng.below(1000));
        if let Some(vm) = self.vm(side)
            && vm.session
        {
            vm.session = false;
            self.after(delay, Event::SessionLost(side));
        }
    }

    pub(super) fn kill_machine(&mut self, side: Side) {
        if let Some(vm) = &mut self.host(side).vm {
            vm.alive = false;
            vm.running = false;
        }
    }

    /// What the machine host does when its manager is gone.
    fn session_lost(&mut self, side: Side) {
        let sabotage = self.scenario.sabotage;
        let Some(vm) = self.vm(side) else { return };
        match vm.gate {
            Gate::Open => {
                if sabotage != Some(Sabotage::KeepsLogging) {
                    vm.log.stop();
                }
                vm.limit = None;
                self.start_running(side);
            }
            Gate::Released if sabotage == Some(Sabotage::ResumesAfterReleased) => self.start_running(side),
            Gate::Owner => {
                if let Some(missing) = &mut vm.missing
                    && sabotage == Some(Sabotage::ClosesFaults)
                {
                    missing.close();
                }
                self.start_running(side);
            }
            Gate::Reserved => {
                self.kill_machine(side);
                let _ = self.append(side, JournalRecord::NeverOwner);
            }
            Gate::Released | Gate::Prepared | Gate::Lent | Gate::Borrowed => {}
        }
    }

    // ---- loans ----

    /// The VM at the target may run until then.
    pub(super) fn lend_until(&mut self, side: Side, until_ns: u64) -> Option<()> {
        let now_ns = self.now_ns;
        let vm = self.vm(side).filter(|_| until_ns > now_ns)?;
        (vm.gate, vm.lent_until_ns) = (Gate::Borrowed, until_ns);
        let goes_on = std::mem::take(&mut vm.stands_by_lease);
        self.events.push((until_ns, Event::LeaseOver(side)));
        if goes_on {
            self.start_running(side);
        }
        Some(())
    }

    fn lease_over(&mut self, side: Side) {
        let (now_ns, sabotage) = (self.now_ns, self.scenario.sabotage);
        if let Some(vm) = self.vm(side)
            && vm.gate == Gate::Borrowed
            && vm.lent_until_ns <= now_ns
            && sabotage != Some(Sabotage::OutrunsLease)
        {
            vm.stands_by_lease |= vm.running;
            vm.running = false;
        }
    }

    /// The guest as it is now can be gone back to.
    pub(super) fn note_cut(&mut self, side: Side) {
        let number = self.vm(side).map_or(0, |vm| vm.increment);
        self.cuts.push(Cut {
            number,
            cpu: self.guest.cpu,
            stamps: self.guest.stamps.clone(),
            free: self.guest.free.clone(),
        });
    }

    /// The source goes on from this state if it must.
    pub(super) fn advance_loan(&mut self, pages: &crate::model::PageBitmap, cpu: Cpu) {
        let host = &self.hosts[Side::Source.index()];
        for run in pages.runs(1) {
            if host.staging.is_touched(run.first.0) {
                for (to, from) in host.region.bytes(run).iter().zip(host.staging.bytes(run)) {
                    to.store(from.load(Ordering::Relaxed), Ordering::Relaxed);
                }
            } else {
                host.region.zero(run);
            }
        }
        if let Some(vm) = self.vm(Side::Source) {
            vm.kept = Some(cpu);
        }
        match self.cuts.iter().rev().find(|cut| cut.cpu == cpu).map(|cut| cut.number) {
            Some(number) => self.safe = number,
            None => self.violation("I3: the source takes in an increment that never was".to_owned()),
        }
    }

    /// What the VM did up to an increment is seen outside of the target.
    pub(super) fn let_out(&mut self, number: u32) {
        self.out = self.out.max(number);
        if number > self.safe {
            let safe = self.safe;
            self.violation(format!("I2: increment {number} is let out, and the source has taken in {safe}"));
        }
    }

    /// The guest is what it was at the last increment that the source has.
    pub(super) fn go_back(&mut self) {
        let Some(vm) = self.vm(Side::Source) else { return };
        let kept = vm.kept.or(vm.cpu);
        vm.cpu = kept;
        let Some(cut) = self.cuts.iter().rev().find(|cut| Some(cut.cpu) == kept) else {
            return self.violation("I3: the source goes back to what never was".to_owned());
        };
        (self.guest.cpu, self.guest.stamps, self.guest.free) = (cut.cpu, cut.stamps.clone(), cut.free.clone());
        if self.out > cut.number {
            let (out, number) = (self.out, cut.number);
            self.violation(format!("I2: the VM goes back to increment {number}, and {out} has been seen"));
        }
    }

    pub(super) fn append(&mut self, side: Side, record: JournalRecord) -> Result<(), AppendError> {
        let host = self.host(side);
        if host.disk_full {
            return Err(AppendError::DiskFull);
        }
        host.journal.push(record);
        if std::mem::take(&mut host.die_after_append) {
            self.kill_machine(side);
            return Err(AppendError::WriterDied);
        }
        Ok(())
    }

    // ---- missing pages ----

    /// Lets the machine touch pages that are in memory, or, `zero`, that are not. The oracle looks at each.
    pub(super) fn map_pages(&mut self, side: Side, run: PageRun, zero: bool) -> Result<(), FaultError> {
        let region = Arc::clone(&self.host(side).region);
        for page in run.indices() {
            let Some(missing) = self.vm(side).and_then(|vm| vm.missing.as_mut()) else { return Err(FaultError::Gone) };
            if missing.mapped.contains(page) {
                missing.wake(page);
                continue;
            }
            match (zero, region.is_touched(page)) {
                (false, false) => return Err(FaultError::NotThere),
                // It has memory already, and is to be tried again.
                (true, true) => missing.wake(page),
                _ => {
                    missing.mapped.insert(page);
                    missing.wake(page);
                    self.check_mapped(side, page);
                }
            }
        }
        Ok(())
    }

    /// Lets the machine touch everything.
    pub(super) fn map_all(&mut self, side: Side) -> Result<(), FaultError> {
        let Some(missing) = self.vm(side).and_then(|vm| vm.missing.as_mut()) else { return Err(FaultError::Gone) };
        let pages: Vec<u64> = (0..missing.mapped.len().0).filter(|&page| !missing.mapped.contains(page)).collect();
        for &page in &pages {
            missing.mapped.insert(page);
            missing.wake(page);
        }
        for page in pages {
            self.check_mapped(side, page);
        }
        Ok(())
    }

    /// I3, of a page that the machine may touch from now on. One that does not own the VM is looked at when it begins to run.
    fn check_mapped(&mut self, side: Side, page: u64) {
        if self.vm(side).is_none_or(|vm| !matches!(vm.gate, Gate::Owner | Gate::Borrowed)) {
            return;
        }
        let guest = &self.guest;
        let is_right = match guest.places.binary_search(&page) {
            Ok(index) => guest.finds(index, &self.hosts[side.index()].region),
            Err(_) => self.hosts[side.index()].region.holds(page, 0),
        };
        if !is_right {
            self.violation(format!("I3: page {page} is mapped at the {side:?}, and is not what the guest left"));
        }
    }

    // ---- the guest ----

    /// The vCPUs go on. The oracle looks at everything here.
    pub(super) fn start_running(&mut self, side: Side) {
        if self.runs(side) {
            return;
        }
        if self.runs(side.other()) {
            self.violation(format!("I1: the VM starts to run at the {side:?} while it runs at the other host"));
        }
        self.check_guest(side);
        if self.vm(side).is_some_and(|vm| vm.boot_image.as_deref() != Some(BOOT_IMAGE)) {
            self.violation(format!("I3: the VM at the {side:?} has not what it was booted from"));
        }
        if let Some(vm) = self.vm(side) {
            vm.running = true;
            vm.has_run |= vm.gate != Gate::Borrowed;
        }
    }

    /// What the guest does not use: what it has freed, and what it never wrote.
    pub(super) fn free_pages(&self) -> PageBitmap {
        let mut free = PageBitmap::full(PageCount(self.scenario.memory_pages));
        let used = self.guest.places.iter().zip(&self.guest.free).filter(|(_, free)| !**free);
        used.for_each(|(&place, _)| free.remove(place));
        free
    }

    /// Whether the machine there has ever run the guest as its own.
    pub(super) fn has_run(&self, side: Side) -> bool {
        self.hosts[side.index()].vm.as_ref().is_some_and(|vm| vm.has_run)
    }

    /// I3: memory and CPU are what the guest left, byte for byte.
    fn check_guest(&mut self, side: Side) {
        let host = &self.hosts[side.index()];
        let guest = &self.guest;
        // What it cannot touch yet is looked at when it can.
        let missing = host.vm.as_ref().and_then(|vm| vm.missing.as_ref());
        let seen = |page: u64| missing.is_none_or(|missing| missing.mapped.contains(page));
        let mut wrong: Vec<u64> = (0..guest.places.len())
            .filter(|&index| seen(guest.places[index]) && !guest.finds(index, &host.region))
            .map(|index| guest.places[index])
            .collect();
        let foreign = host.region.touched_pages().into_iter().filter(|page| guest.places.binary_search(page).is_err());
        wrong.extend(foreign.filter(|&page| seen(page) && !host.region.holds(page, 0)));
        let cpu = host.vm.as_ref().and_then(|vm| vm.cpu);
        let cpu_is_right = cpu == Some(guest.cpu);
        if !wrong.is_empty() {
            self.violation(format!("I3: pages {wrong:?} at the {side:?} are not what the guest left"));
        }
        if !cpu_is_right {
            self.violation(format!("I3: the CPU at the {side:?} is not what the guest left"));
        }
    }

    // ---- faults ----

    /// A port operation is about to happen.
    pub(super) fn before_operation(&mut self, number: u64) {
        self.strike(|trigger| *trigger == Trigger::Operation(number));
    }

    /// A manager passes a step.
    pub(super) fn step(&mut self, side: Side, step: Step) {
        if !self.steps.contains(&(side, step)) {
            self.steps.push((side, step));
            if side == Side::Source && matches!(step, Step::Running | Step::Lent) {
                self.after(FINISH_AFTER, Event::Finish);
            }
            self.strike(|trigger| *trigger == Trigger::Step(side, step));
        }
    }

    fn strike(&mut self, is_now: impl Fn(&Trigger) -> bool) {
        while let Some(index) = self.scenario.faults.iter().position(|(trigger, _)| is_now(trigger)) {
            let (_, fault) = self.scenario.faults.remove(index);
            if matches!(fault, Fault::KillMachine(side) if self.vm(side).is_none()) {
                continue;
            }
            let window = self.window(&fault);
            self.struck.push((fault, window));
            match fault {
                Fault::KillManager(side) => self.kill_manager(side),
                Fault::KillMachine(side) => self.kill_machine(side),
                Fault::Cut { heals_after } => {
                    self.network.cut(self.now_ns);
                    self.heal_after(heals_after);
                }
                Fault::Stall { from_source, from_target, heals_after } => {
                    for (side, stalls) in [(Side::Source, from_source), (Side::Target, from_target)] {
                        if stalls {
                            self.network.stall(self.now_ns, side);
                        }
                    }
                    self.heal_after(heals_after);
                }
                Fault::DiskFull(side) => self.host(side).disk_full = true,
                Fault::DieAfterAppend(side) => self.host(side).die_after_append = true,
                Fault::FlipPageBit => self.network.flip_next = true,
                Fault::Cancel(side) => self.cancelled[side.index()].set(),
            }
        }
    }

    /// How far the handover has come: by what is durable, and at the target by its gate, since it journals `prepared` ahead of
    /// time. For its disk that record is behind it from then on.
    fn window(&self, fault: &Fault) -> Window {
        let prepared = match fault {
            Fault::DiskFull(Side::Target) => self.has(Side::Target, &JournalRecord::Prepared),
            _ => self.hosts[Side::Target.index()].vm.as_ref().is_some_and(|vm| vm.gate == Gate::Prepared),
        };
        let released = self.has(Side::Source, &JournalRecord::Released { peer: String::new() });
        let lent = self.has(Side::Source, &JournalRecord::Lent { peer: String::new(), lease_ms: 0 });
        let owes = self.hosts[Side::Target.index()].vm.as_ref().is_some_and(|vm| vm.missing.is_some());
        if lent && !released {
            Window::Lent
        } else if self.steps.contains(&(Side::Source, Step::Running)) {
            if owes { Window::Owing } else { Window::Done }
        } else if self.has(Side::Target, &JournalRecord::Owner) {
            Window::Owned
        } else if released {
            Window::Released
        } else if prepared {
            Window::Prepared
        } else {
            Window::BeforePrepared
        }
    }

    // ---- the end ----

    /// Where the VM is, as someone who sees both hosts knows it.
    pub(super) fn whereabouts(&mut self) -> Whereabouts {
        if self.runs(Side::Source) {
            return Whereabouts::RunsAtSource;
        }
        let missing = self.hosts[1].vm.as_ref().and_then(|vm| vm.missing.as_ref());
        let (owes, all_is_here) = (missing.is_some(), missing.is_none_or(Missing::all_is_here));
        let pages_are_lost = !all_is_here && self.vm(Side::Source).is_none();
        if self.runs(Side::Target) {
            return match (owes, pages_are_lost) {
                (false, _) => Whereabouts::RunsAtTarget,
                (true, false) => Whereabouts::RunsOwing,
                (true, true) => Whereabouts::Crashed,
            };
        }
        let owned = self.hosts[1].journal.last() == Some(&JournalRecord::Owner);
        let at_source = self.vm(Side::Source).is_some();
        let at_target =
            self.vm(Side::Target).is_some_and(|vm| matches!(vm.gate, Gate::Prepared | Gate::Borrowed | Gate::Owner));
        let complete_at_target = at_target && !pages_are_lost;
        if complete_at_target || (at_source && !owned) { Whereabouts::Waits } else { Whereabouts::Crashed }
    }

    /// An operator looks at both hosts and resolves what is in doubt, as the outcome table advises.
    fn operator(&mut self) {
        self.after(END_AFTER, Event::End);
        for host in &mut self.hosts {
            host.disk_full = false;
        }
        let before = self.whereabouts();
        self.before_operator = Some(before);
        let source_gate = self.vm(Side::Source).map(|vm| vm.gate);
        let target_gate = self.vm(Side::Target).map(|vm| vm.gate);
        if source_gate == Some(Gate::Open) && before != Whereabouts::RunsAtSource {
            self.violation("I4: the source's machine may run, but stands".to_owned());
        }
        // A prepared VM whose machine is dead has lost its memory: whoever resolves journals that first.
        if target_gate.is_none() && self.host(Side::Target).journal.last() == Some(&JournalRecord::Prepared) {
            let _ = self.append(Side::Target, JournalRecord::NeverOwner);
        }
        let owes = self.vm(Side::Target).is_some_and(|vm| vm.missing.is_some());
        let released = self.has(Side::Source, &JournalRecord::Released { peer: String::new() });
        match (source_gate, target_gate) {
            // It is on loan, and nobody lends it any more: whoever takes that manager's place goes on with it, or takes it back.
            (Some(Gate::Lent), _) => {
                self.network.heal(self.now_ns);
                self.replace_manager(Side::Target);
                self.replace_manager(Side::Source);
            }
            // The VM was let go before its memory was there: the link is seen to, and managers take the places of those that are gone.
            (Some(Gate::Released), Some(Gate::Prepared | Gate::Owner)) if owes => {
                self.network.heal(self.now_ns);
                self.replace_manager(Side::Target);
                self.replace_manager(Side::Source);
            }
            // It runs, and only its manager is gone; or its pages are.
            (None, Some(Gate::Owner)) if owes => self.replace_manager(Side::Target),
            (None, Some(Gate::Prepared)) if owes => self.resolve(Side::Target, Owner::There),
            // The VM never left: a target that still holds a copy is told to let go.
            (Some(Gate::Open), Some(Gate::Prepared | Gate::Borrowed)) => {
                self.stale_prepared = true;
                self.resolve(Side::Target, Owner::There);
            }
            (source, Some(Gate::Prepared | Gate::Borrowed)) => {
                // A source that died without a word of `released` in its journal may have run on: what waits is stale.
                let is_last = source == Some(Gate::Released) || released;
                self.resolve(Side::Target, if is_last { Owner::Here } else { Owner::There });
            }
            (Some(Gate::Released), None) => {
                if self.host(Side::Target).journal.last() == Some(&JournalRecord::Owner) {
                    self.resolve(Side::Source, Owner::There);
                } else {
                    self.resolve(Side::Source, Owner::Here);
                }
            }
            (Some(Gate::Released), Some(Gate::Owner)) => self.resolve(Side::Source, Owner::There),
            _ => {}
        }
    }

    /// `dunlin resolve`, as the machine hosts obey it.
    fn resolve(&mut self, side: Side, owner: Owner) {
        let now_managed = self.vm(side).is_some_and(|vm| vm.session);
        if let Some(vm) = self.vm(side) {
            vm.resolved = Some(owner);
        }
        match (side, owner) {
            // A manager that still waits sees the decision; without one the machine acts itself.
            (Side::Target, Owner::Here) if !now_managed => {
                let _ = self.append(side, JournalRecord::Owner);
                if let Some(vm) = self.vm(side) {
                    vm.gate = Gate::Owner;
                    vm.log.stop();
                }
                self.start_running(side);
            }
            (Side::Source, Owner::Here) => {
                let _ = self.append(side, JournalRecord::Owner);
                if let Some(vm) = self.vm(side) {
                    vm.gate = Gate::Open;
                    vm.log.stop();
                }
                self.start_running(side);
            }
            (Side::Source, _) => {
                let _ = self.append(side, JournalRecord::Discarded);
                self.kill_machine(side);
            }
            (Side::Target, Owner::There) => {
                let _ = self.append(side, JournalRecord::NeverOwner);
                self.kill_machine(side);
            }
            (Side::Target, _) => {}
        }
    }

    /// The last look: what must hold when everything has ended.
    pub(super) fn check_end(&mut self) -> Whereabouts {
        let place = self.whereabouts();
        for side in Side::BOTH {
            if self.runs(side) {
                self.check_guest(side);
            }
            if self.vm(side).is_some_and(|vm| vm.running && vm.log.is_on()) {
                self.violation(format!("I4: the {side:?} runs with its dirty log on"));
            }
            if self.vm(side).is_some_and(|vm| vm.running && vm.limit.is_some()) {
                self.violation(format!("I4: the {side:?} runs with a throttle on"));
            }
        }
        if place == Whereabouts::RunsAtSource {
            if self.vm(Side::Target).is_some() {
                self.violation("I4: the VM runs at the source, but a machine is left at the target".to_owned());
            }
            let last = self.host(Side::Target).journal.last().cloned();
            if !matches!(last, None | Some(JournalRecord::Reserved | JournalRecord::NeverOwner)) {
                self.violation(format!("I4: the VM runs at the source, but the target's journal ends with {last:?}"));
            }
        }
        if place == Whereabouts::RunsAtTarget && self.vm(Side::Source).is_some_and(|vm| vm.gate == Gate::Open) {
            self.violation("I1: the VM runs at the target, and the source's gate is open".to_owned());
        }
        place
    }
}

impl Vm {
    pub(super) fn new(pages: PageCount, gate: Gate) -> Self {
        Self {
            alive: true,
            running: false,
            gate,
            log: SimDirtyLog::new(pages),
            cpu: None,
            foreseen: false,
            boot_image: (gate == Gate::Open).then(|| BOOT_IMAGE.to_vec()),
            resolved: None,
            session: true,
            missing: None,
            lent_until_ns: 0,
            increment: 0,
            stands_by_lease: false,
            kept: None,
            free_at_start: None,
            has_run: false,
            untold: gate != Gate::Open,
            limit: None,
            writes: VcpuWrites::default(),
        }
    }

    /// Limits the vCPU for the lease, and says what it has written.
    pub(super) fn throttle(&mut self, limit: Option<VcpuLimit>, now_ns: u64) -> VmWrites {
        let now = Duration::from_nanos(now_ns);
        let before = self.limit.take();
        self.limit = limit.map(|VcpuLimit { rate, .. }| {
            let mut bucket = before.map_or_else(|| Bucket::new(rate, now), |(bucket, _)| bucket);
            bucket.set_rate(rate, now);
            (bucket, now_ns + THROTTLE_LEASE.as_nanos() as u64)
        });
        self.writes.owes = self.limit.is_some_and(|(bucket, _)| !bucket.debt(now).is_zero());
        VmWrites { at_ns: now_ns, vcpus: vec![self.writes.clone()], ..VmWrites::default() }
    }

    /// Lets it write as it likes.
    pub(super) fn lift(&mut self) {
        self.limit = None;
    }
}

impl Guest {
    fn new(scenario: &Scenario, rng: &mut Rng) -> Self {
        let (model, pages) = (scenario.guest, scenario.memory_pages);
        let mut places = BTreeSet::from([0, pages - 1]);
        let clusters: Vec<u64> = (0..6).map(|_| rng.below(pages)).collect();
        let wanted = model.working_set.clamp(2, pages);
        // A large working set does not fit where a small one lies close together.
        let spread = if wanted <= 100 { 24 } else { wanted };
        while (places.len() as u64) < wanted {
            let near = clusters[rng.below(clusters.len() as u64) as usize] + rng.below(spread);
            places.insert(near % pages);
        }
        let places: Vec<u64> = places.into_iter().collect();
        let stamps = places.iter().map(|_| if rng.one_in(3) { 0 } else { rng.next() | 1 }).collect();
        let write_interval_ns = 1_000_000_000u64.checked_div(model.writes_per_second).unwrap_or(NEVER);
        let busy_left_ns = if model.writes_per_second == 0 { 0 } else { model.busy.as_nanos() as u64 };
        let cpu = Cpu { sequence: 0, rng: rng.fork(3), since_last_write_ns: 0, busy_left_ns };
        let (hot, free) = (model.hot_set.clamp(1, places.len() as u64), vec![false; places.len()]);
        Self { hot, places, stamps, free, frees_one_in: model.frees_one_in, write_interval_ns, cpu }
    }

    /// Whether a place holds in `region` what it left there; where it left nothing that counts, that or nothing at all.
    fn finds(&self, index: usize, region: &SimRegion) -> bool {
        let place = self.places[index];
        region.holds(place, self.stamps[index]) || (self.free[index] && region.holds(place, 0))
    }
}
