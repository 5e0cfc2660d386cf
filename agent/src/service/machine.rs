//! Hosts one VM in this process: the machine, its ownership gate, the sessions of migration managers.
//!
//! Owns what a lost manager means. Must not know the wire between managers, nor HTTP ([`super::control`] does).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use serde::Serialize;

use super::audit::{self, Action};
use super::clock::MonotonicClock;
use super::gate::{GateError, GateState, OnLoss, OwnershipGate};
use super::lease::Lease;
use super::loan::Loan;
use super::pacing::Pacer;
use super::registry::{MachineEntry, Registry, RegistryError, boot_id, start_time_ticks};
use super::rounds;
use super::seat::{Seat, Turn};
use super::session::{Creation, MAX_FDS, Reply, Request, SESSION_VERSION, SessionError, SessionSocket};
use super::throttling::{Change, Throttling};
use crate::announce::{AddressError, Announcer, Schedule};
use crate::block::raw::RawDisk;
use crate::kvm::boot::BootImage;
use crate::kvm::bus::{Device, DeviceError};
use crate::kvm::machine::{BootConfig, HostedError, Hosting, Machine};
use crate::kvm::memory::Memory;
use crate::kvm::sys::KvmError;
use crate::kvm::virtio::{VirtioBalloon, VirtioBlk, VirtioNet, VirtioRng};
use crate::kvm::{Hurry, stand_back};
use crate::model::network::PortCounters;
use crate::model::schema::Schema;
use crate::model::{
    DirtyLogKind, DiskSpec, MachineShape, MigrationId, NetSpec, Owner, PageCount, PageRun, PageSubset, SerialSpec,
    Station, ThrottleView, VcpuLimit, VmId, VmWrites, chain,
};
use crate::net::tap::Tap;
use crate::port::{Clock, Faults as _, JournalError, Protected, THROTTLE_LEASE};
use crate::shm::{MappedAt, UserFaults};
use crate::store::FileJournal;

/// How long the dirty log stays on for tracking unless asked for again.
pub const TRACKING_TIME: Duration = Duration::from_secs(30);

/// How long a manager that has brought the VM here may take from its ownership to the guest's running.
const ARRIVAL_LIMIT: Duration = Duration::from_secs(2);

/// Journals of settled migrations are kept so long for late questions.
const JOURNAL_AGE: Duration = Duration::from_secs(7 * 24 * 3600);

/// Pages that are write-protected by one call while tracking: 4 GiB.
const PROTECT_PAGES: u64 = 1 << 20;

/// For so long a machine stands on that is to take itself apart, which keeps a CPU busy for milliseconds (KVM waits for grace periods, pages are given back): the VM may have gone on in
/// another process on these CPUs just now, and has much to catch up with.
const STANDS_ON: Duration = Duration::from_millis(20);
/// For how long at most what comes through the VM's ports waits for a relay. It takes a round trip; the rest is for hosts that have other work.
const RELAY_LIMIT: Duration = Duration::from_millis(500);
/// No schedule of announcements has more rounds ([`Schedule::new`]).
const MOST_ROUNDS: usize = 1000;
/// How long before it begins a window of write protection may be ordered.
const LONGEST_LEAD: Duration = Duration::from_secs(1);
/// What a sleep may oversleep: the rest is waited for without sleeping.
const LAST_MOMENT: Duration = Duration::from_micros(200);

/// A machine could not be hosted.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The machine itself.
    #[error(transparent)]
    Machine(#[from] HostedError),
    /// Its entry in the run folder.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// Its gate.
    #[error(transparent)]
    Gate(#[from] GateError),
    /// The journal.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// An address that cannot be announced.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// A session that broke before the machine existed.
    #[error(transparent)]
    Session(#[from] SessionError),
    /// A socket or thread.
    #[error("{action}: {source}")]
    Io {
        /// What was tried.
        action: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// This VM may run elsewhere.
    #[error(
        "VM {vm_id} may run elsewhere: migration {migration} ended in `{record}` here. Look at the other host, then settle \
         it with `dunlin resolve uuid:{vm_id} --owner here|there`"
    )]
    InDoubt {
        /// The VM.
        vm_id: VmId,
        /// The migration.
        migration: MigrationId,
        /// Its last record.
        record: String,
    },
    /// The manager is of another version.
    #[error("the manager speaks session version {0}, this machine {SESSION_VERSION}")]
    Version(u16),
    /// Not what a fresh machine process expects.
    #[error("the first request to a new machine must be `create`")]
    NotCreated,
}

/// What the machine's state is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunState {
    /// Guest code runs.
    Running,
    /// It stands, by an operator's order or while its last pages move.
    Paused,
    /// A target: memory is arriving.
    Receiving,
    /// A target that waits for the source's word.
    Prepared,
    /// A target that runs the VM on loan, or stands because the loan is over.
    Borrowed,
    /// A source that has lent the VM to its target.
    Lent,
    /// A source that has let go.
    Released,
    /// It has ended.
    Ended,
}

/// What `dunlin vm info` prints.
#[derive(Clone, Debug, Serialize, serde::Deserialize)]
pub struct VmInfo {
    /// The VM's name.
    pub name: String,
    /// The VM's identity.
    pub vm_id: VmId,
    /// The machine's process.
    pub pid: u32,
    /// Whether it runs.
    pub state: RunState,
    /// Guest RAM.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// Kernel thread numbers of the vCPUs.
    pub vcpu_thread_ids: Vec<i32>,
    /// How writes are logged.
    pub dirty_log: DirtyLogKind,
    /// Whether the dirty log is on.
    pub dirty_log_on: bool,
    /// Network ports.
    pub nets: Vec<NetSpec>,
    /// What passed through them since the machine's process began, in their order; none where that process is of an older version.
    #[serde(default)]
    pub ports: Vec<PortCounters>,
    /// Disks.
    pub disks: Vec<DiskSpec>,
    /// Whether it has a source of entropy.
    #[serde(default)]
    pub rng: bool,
    /// Whether it has a balloon.
    #[serde(default)]
    pub balloon: bool,
    /// Whether its memory is of huge pages that hosts set aside.
    #[serde(default)]
    pub hugepages: bool,
    /// How long this process has held the machine.
    pub uptime_ns: u64,
    /// Pages of its memory that are still at its former host; absent if there are none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub owed_pages: Option<u64>,
    /// The migration that has the machine, or had it last.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration_id: Option<MigrationId>,
    /// How its writers are slowed; absent where its process is of an older version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttle: Option<ThrottleView>,
    /// What this host's KVM lists and refuses.
    pub kvm_shortcomings: Vec<String>,
}

impl Schema for VmInfo {
    const SCHEMA: &'static str = "dunlin.vm/v1";
}

/// Where a machine's files are.
#[derive(Clone, Debug)]
pub struct Places {
    /// Sockets and entry.
    pub run_dir: PathBuf,
    /// Journal and audit log.
    pub state_dir: PathBuf,
}

/// One hosted VM.
pub struct Host {
    pub(super) machine: Arc<Machine>,
    pub(super) gate: Mutex<OwnershipGate>,
    /// Itself, for threads that outlive a call.
    pub(super) me: Weak<Self>,
    /// Whose turn it is: a migration's, or an order's.
    seat: Seat,
    announcer: Announcer,
    /// Ends the rounds of announcements that are being sent by themselves, when others take their place.
    announcing: Mutex<Arc<AtomicBool>>,
    paused_by_operator: AtomicBool,
    /// Who tracks has the dirty log switched on.
    tracking: Arc<Lease>,
    /// Who slows its writers outside of a migration, and until when at least.
    throttler: Mutex<Option<(String, Instant)>>,
    pub(super) faults: Mutex<Option<UserFaults>>,
    /// Who fills the pages that it is owed while it runs: one at a time.
    filler: Seat,
    /// A VM on loan.
    pub(super) loan: Loan,
    /// What is told of that, and of a migration that does it.
    throttling: Throttling,
    registry: Registry,
    state_dir: PathBuf,
    since: Instant,
}

fn refuse(socket: &mut SessionSocket, reason: String) {
    let _ = socket.send(&Reply::Failed(reason), &[]);
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What the devices of a machine are made from.
struct Parts {
    nets: Vec<NetSpec>,
    disks: Vec<DiskSpec>,
    rng: bool,
    balloon: bool,
}

/// Makes the devices of a shape: network ports first, then disks, the source of entropy, the balloon. The order decides
/// windows and interrupts, so it is the same for ever.
fn devices(parts: &Parts, memory: &Memory) -> Result<Vec<Arc<dyn Device>>, DeviceError> {
    let Parts { nets, disks, rng, balloon } = parts;
    let mut devices: Vec<Arc<dyn Device>> = Vec::new();
    for (index, net) in nets.iter().enumerate() {
        let failed = |problem: String| DeviceError::Worker { device: format!("net{index}"), problem };
        let tap = Tap::open(&net.tap).map_err(|error| failed(chain(&error)))?;
        devices.push(Arc::new(VirtioNet::new(index, memory.ram().clone(), tap, net.station.mac)?));
    }
    for (index, disk) in disks.iter().enumerate() {
        let failed = |problem: String| DeviceError::Worker { device: format!("disk{index}"), problem };
        let raw = RawDisk::open(disk).map_err(|error| failed(chain(&error)))?;
        devices.push(Arc::new(VirtioBlk::new(index, memory.ram().clone(), raw)?));
    }
    if *rng {
        devices.push(Arc::new(VirtioRng::new(memory.ram().clone())?));
    }
    if *balloon {
        devices.push(Arc::new(VirtioBalloon::new(memory)?));
    }
    Ok(devices)
}

/// Refuses to boot a VM that another host may own.
fn check_undoubted(journal: &FileJournal, vm_id: VmId) -> Result<(), HostError> {
    for (migration, vm, record) in journal.all()? {
        if vm == vm_id && record.leaves_doubt() {
            return Err(HostError::InDoubt { vm_id, migration, record: record.name().to_owned() });
        }
    }
    Ok(())
}

impl Host {
    /// Boots a VM; it stands until [`Host::start`].
    ///
    /// # Errors
    /// What could not be made; nothing stays behind.
    pub fn boot(config: BootConfig, serial: SerialSpec, places: &Places) -> Result<Arc<Self>, HostError> {
        let journal = FileJournal::open(&places.state_dir)?;
        if let Err(error) = journal.prune(JOURNAL_AGE) {
            tracing::warn!("old journals were not removed: {error}");
        }
        check_undoubted(&journal, config.vm_id)?;
        let gate = OwnershipGate::open(config.vm_id, Box::new(journal));
        let (nets, disks) = (config.nets.clone(), config.disks.clone());
        let parts = Parts { nets, disks, rng: config.rng, balloon: config.balloon };
        let hosting = Hosting { serial, ..Hosting::default() };
        let maker = Box::new(move |memory: &Memory| devices(&parts, memory));
        let machine = Machine::boot(config, &hosting, maker)?;
        Self::enter(machine, gate, places)
    }

    /// Becomes the machine that a manager at the other end of `socket` asks for. Returns the socket for
    /// [`Host::serve_first_session`].
    ///
    /// # Errors
    /// What could not be made; the manager has been told.
    pub fn incoming(mut socket: SessionSocket) -> Result<(Arc<Self>, SessionSocket), HostError> {
        let (Request::Create(creation), _) = socket.recv::<Request>()? else { return Err(HostError::NotCreated) };
        match Self::create(&creation) {
            Ok(host) => {
                host.welcome(&mut socket)?;
                Ok((host, socket))
            }
            Err(error) => {
                socket.send(&Reply::Failed(chain(&error)), &[])?;
                Err(error)
            }
        }
    }

    fn create(creation: &Creation) -> Result<Arc<Self>, HostError> {
        if creation.version != SESSION_VERSION {
            return Err(HostError::Version(creation.version));
        }
        let shape = creation.shape.clone();
        let journal = FileJournal::open(&creation.state_dir)?;
        let hosting = Hosting { serial: creation.serial.clone(), ..Hosting::default() };
        let (nets, disks) = (shape.nets.clone(), shape.disks.clone());
        let parts = Parts { nets, disks, rng: shape.rng, balloon: shape.balloon };
        let maker = Box::new(move |memory: &Memory| devices(&parts, memory));
        let machine = Machine::incoming(shape.clone(), &hosting, maker)?;
        let gate = OwnershipGate::receiving(shape.vm_id, creation.migration, Box::new(journal))?;
        let places = Places { run_dir: creation.run_dir.clone(), state_dir: creation.state_dir.clone() };
        Self::enter(machine, gate, &places)
    }

    fn enter(machine: Arc<Machine>, gate: OwnershipGate, places: &Places) -> Result<Arc<Self>, HostError> {
        let shape = machine.shape();
        let stations: Vec<Station> = shape.nets.iter().map(|net| net.station.clone()).collect();
        let announcer = Announcer::new(&stations, Schedule::default())?;
        let registry = Registry::new(&places.run_dir);
        let pid = std::process::id();
        registry.enter(&MachineEntry {
            name: shape.name.clone(),
            vm_id: shape.vm_id,
            pid,
            start_time_ticks: start_time_ticks(pid).unwrap_or_default(),
            boot_id: boot_id(),
            memory_bytes: shape.memory_bytes,
            cpus: shape.cpus,
            state_dir: places.state_dir.clone(),
        })?;
        Ok(Arc::new_cyclic(|me| Self {
            machine,
            gate: Mutex::new(gate),
            me: me.clone(),
            seat: Seat::default(),
            announcer,
            announcing: Mutex::default(),
            paused_by_operator: AtomicBool::new(false),
            tracking: Arc::default(),
            throttler: Mutex::default(),
            faults: Mutex::default(),
            filler: Seat::default(),
            loan: Loan::default(),
            throttling: Throttling::default(),
            registry,
            state_dir: places.state_dir.clone(),
            since: Instant::now(),
        }))
    }

    /// The machine.
    pub fn machine(&self) -> &Arc<Machine> {
        &self.machine
    }

    /// The path of one of the machine's sockets.
    pub fn socket(&self, which: &str) -> PathBuf {
        self.registry.socket(&self.machine.shape().name, which)
    }

    /// Where journal and audit log are.
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// Runs the guest, if the gate lets it.
    ///
    /// # Errors
    /// A shut gate, or what the machine could not do.
    pub fn start(&self) -> Result<(), HostError> {
        let gate = lock(&self.gate);
        if !gate.may_run() {
            return Err(GateError::State { order: "run", state: gate.state() }.into());
        }
        // The gate stays locked while the vCPUs are let go: it cannot shut in between.
        Ok(self.machine.resume()?)
    }

    /// What an operator sees of it.
    pub fn info(&self) -> VmInfo {
        let shape = self.machine.shape();
        let (gate, migration_id) = {
            let gate = lock(&self.gate);
            (gate.state(), gate.migration())
        };
        let state = match gate {
            _ if self.machine.exit().is_some() => RunState::Ended,
            GateState::Open if self.machine.is_running() => RunState::Running,
            GateState::Open => RunState::Paused,
            GateState::Receiving => RunState::Receiving,
            GateState::Prepared => RunState::Prepared,
            GateState::Borrowed => RunState::Borrowed,
            GateState::Lent => RunState::Lent,
            GateState::Released => RunState::Released,
            GateState::Closed => RunState::Ended,
        };
        VmInfo {
            name: shape.name.to_string(),
            vm_id: shape.vm_id,
            pid: std::process::id(),
            state,
            memory_bytes: shape.memory_bytes,
            cpus: shape.cpus,
            vcpu_thread_ids: self.machine.vcpu_threads(),
            dirty_log: shape.dirty_log,
            dirty_log_on: self.machine.log().is_on(),
            nets: shape.nets.clone(),
            ports: self.machine.devices().iter().filter_map(|device| device.counters()).collect(),
            disks: shape.disks.clone(),
            rng: shape.rng,
            balloon: shape.balloon,
            hugepages: shape.hugepages,
            uptime_ns: self.since.elapsed().as_nanos() as u64,
            owed_pages: lock(&self.faults).as_ref().map(|faults| {
                let here: u64 =
                    faults.here().iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum();
                PageCount::covering(shape.memory_bytes).0.saturating_sub(here)
            }),
            migration_id,
            throttle: Some(self.throttle_view()),
            kvm_shortcomings: self.machine.shortcomings(),
        }
    }

    /// How its writers are slowed.
    pub fn throttle_view(&self) -> ThrottleView {
        self.throttling.view(&self.machine.throttle_status())
    }

    /// A migration has its writers slowed, or not any more: that goes to the audit log. What `dunlin stun` does it writes there itself.
    fn audit_throttling(&self, changes: impl IntoIterator<Item = Change>) {
        for change in changes {
            let (holder, what, [before, after]) = match change {
                Change::Began(holder, whose) => (holder, whose, ["running", "stunned"]),
                Change::Ended(holder, lost) => (holder, format!("let go {lost}"), ["stunned", "running"]),
            };
            let Some(migration) = holder.migration_id else { continue };
            let what = format!("migrate --on-stuck stun, {migration}: {what}");
            let [before, after] = [before, after].map(str::to_owned);
            let vm_id = self.machine.shape().vm_id;
            let action = Action { who: holder.who, what: &what, vm_id, before, after, result: "ok".to_owned() };
            audit::record(&self.state_dir, &action);
        }
    }

    /// Everybody is let go: a migration does not slow them any more.
    fn end_throttling(&self) {
        self.machine.lift_throttle();
        self.audit_throttling(self.throttling.ended(&self.machine.throttle_status().writes));
    }

    /// An operator's action: carried out, and written to the audit log.
    fn act(&self, who: &str, what: &str, action: impl FnOnce() -> Result<(), String>) -> Result<(), String> {
        let state = || serde_json::to_string(&self.info().state).unwrap_or_default().trim_matches('"').to_owned();
        let before = state();
        let result = action();
        audit::record(
            &self.state_dir,
            &Action {
                who: who.to_owned(),
                what,
                vm_id: self.machine.shape().vm_id,
                before,
                after: state(),
                result: result.as_ref().map_or_else(String::clone, |()| "ok".to_owned()),
            },
        );
        result
    }

    /// A turn at the machine. A manager that has brought the VM here, which is ours already, is about to let it run: it is
    /// waited for.
    fn turn(&self) -> Option<Turn<'_>> {
        self.seat.take(self.patience())
    }

    /// How long to wait for who has the machine in passing.
    fn patience(&self) -> Duration {
        let ours = lock(&self.gate).may_run();
        if ours { ARRIVAL_LIMIT } else { Duration::ZERO }
    }

    /// Refuses an operator's order while a migration has the machine.
    fn unless_migrating(&self, order: &str) -> Result<Turn<'_>, String> {
        self.turn().ok_or_else(|| format!("cannot {order} while a migration has the VM; cancel it first"))
    }

    fn turn_to_track(&self) -> Result<Turn<'_>, String> {
        let turn = self.seat.take_for_tracking(self.patience());
        turn.ok_or_else(|| "cannot switch the dirty log while a migration has the VM".to_owned())
    }

    /// Pauses by an operator's order.
    pub fn pause(&self, who: &str) -> Result<(), String> {
        self.act(who, "pause", || {
            let _turn = self.unless_migrating("pause")?;
            self.machine.pause().map_err(|error| chain(&error))?;
            self.paused_by_operator.store(true, Ordering::Release);
            Ok(())
        })
    }

    /// Resumes by an operator's order.
    pub fn resume(&self, who: &str) -> Result<(), String> {
        self.act(who, "resume", || {
            let _turn = self.unless_migrating("resume")?;
            self.start().map_err(|error| chain(&error))?;
            self.paused_by_operator.store(false, Ordering::Release);
            Ok(())
        })
    }

    /// Ends the VM by an operator's order.
    pub fn stop(&self, who: &str) -> Result<(), String> {
        self.act(who, "stop", || {
            self.machine.stop();
            Ok(())
        })
    }

    /// Sets how much memory the guest is to have.
    pub fn set_balloon(&self, who: &str, size_bytes: u64) -> Result<(), String> {
        self.act(who, &format!("balloon --size {size_bytes}"), || {
            let _turn = self.unless_migrating("change the balloon")?;
            super::balloon::set_size(&self.machine, size_bytes)
        })
    }

    /// Asks the guest once for its free pages.
    pub fn ask_free(&self) -> Result<(), String> {
        let id = {
            let _turn = self.unless_migrating("ask for free pages")?;
            if !self.machine.is_running() {
                return Err("the VM does not run".to_owned());
            }
            super::balloon::start_asking(&self.machine)?
        };
        // Without a turn: how long it takes is the guest's choice, and nobody else may be kept waiting for that.
        super::balloon::await_answer(&self.machine, id)
    }

    /// Decides who owns a VM in doubt.
    pub fn resolve(&self, who: &str, owner: Owner) -> Result<(), String> {
        let what = if owner == Owner::Here { "resolve --owner here" } else { "resolve --owner there" };
        self.act(who, what, || {
            if owner == Owner::Here {
                self.go_on_from_increment()?;
            }
            lock(&self.gate).resolve(owner).map_err(|error| chain(&error))?;
            if owner == Owner::Here {
                self.end_loan();
                self.run_again();
            } else {
                self.machine.stop();
            }
            Ok(())
        })
    }

    /// Announces and runs: a machine whose gate has opened while nobody led it. Its guest has its memory again.
    fn run_again(&self) {
        super::balloon::relax(&self.machine);
        if let Err(error) = self.machine.log().stop() {
            tracing::error!("the dirty log could not be switched off: {error}");
        }
        if self.machine.is_running() || self.paused_by_operator.load(Ordering::Acquire) {
            return;
        }
        self.announce();
        if let Err(error) = self.start() {
            return tracing::error!("the VM could not be resumed: {}", chain(&error));
        }
        // Nobody is left who knows another schedule.
        self.announce_on(Schedule::default().instants().skip(1).collect(), None);
    }

    /// Switches the dirty log on for tracking outside a migration, and write-protects `subset` at the time `at_ns` by the monotonic
    /// clock, so that the next write to each of its pages makes an event. It goes off by itself [`TRACKING_TIME`] after the last such order: whoever tracks may be killed.
    pub fn track(self: &Arc<Self>, subset: PageSubset, at_ns: u64) -> Result<Protected, String> {
        let _turn = self.turn_to_track()?;
        let wait = Duration::from_nanos(at_ns).saturating_sub(MonotonicClock.now());
        if wait > LONGEST_LEAD {
            return Err(format!("a window may be ordered {LONGEST_LEAD:?} ahead at most, not {wait:?}"));
        }
        self.grant_tracking()?;
        self.protect(subset, at_ns).map_err(|error| error.to_string())
    }

    /// Has the log end by itself [`TRACKING_TIME`] from now.
    fn grant_tracking(self: &Arc<Self>) -> Result<(), String> {
        let host = Arc::clone(self);
        self.tracking.grant(TRACKING_TIME, move || host.end_tracking()).map_err(|error| error.to_string())
    }

    /// Limits what vCPUs may write outside of a migration, until [`THROTTLE_LEASE`] after the last such order; says what they have written, and protects it anew. `None` lets all go and
    /// switches the log off.
    pub fn throttle(self: &Arc<Self>, who: &str, limits: Option<&[Option<VcpuLimit>]>) -> Result<VmWrites, String> {
        let _turn = self.seat.take_for_tracking(self.patience()).ok_or_else(|| {
            "cannot slow writers while a migration has the VM: `dunlin migrate --on-stuck stun` does it".to_owned()
        })?;
        let mut throttler = lock(&self.throttler);
        if let Some((other, until)) = &*throttler
            && other != who
            && Instant::now() < *until
        {
            return Err(format!("{other} slows this VM already; end that first"));
        }
        let Some(limits) = limits else {
            let writes = self.machine.throttle(&[]).map_err(|error| error.to_string())?;
            self.end_throttling();
            *throttler = None;
            self.tracking.give_up();
            self.machine.log().stop().map_err(|error| error.to_string())?;
            return Ok(writes);
        };
        if let Some(limit) = limits.iter().flatten().find(|limit| !(0.0..f64::INFINITY).contains(&limit.rate.0)) {
            return Err(format!("a limit of {} pages a second is none: it must be 0 or more", limit.rate.0));
        }
        *throttler = Some((who.to_owned(), Instant::now() + THROTTLE_LEASE));
        self.grant_tracking()?;
        if !self.machine.log().is_on() {
            self.protect(PageSubset::ALL, 0).map_err(|error| error.to_string())?;
        }
        let writes = self.machine.throttle(limits).map_err(|error| error.to_string())?;
        self.audit_throttling(self.throttling.ordered(who, None, limits, &writes));
        self.protect(PageSubset::ALL, 0).map_err(|error| error.to_string())?;
        Ok(writes)
    }

    /// Switches it off.
    pub fn end_tracking_now(&self) -> Result<Protected, String> {
        let _turn = self.turn_to_track()?;
        self.tracking.give_up();
        let was_on = self.machine.log().is_on();
        self.machine.log().stop().map_err(|error| error.to_string())?;
        let now_ns = MonotonicClock.now().as_nanos() as u64;
        Ok(Protected { began_ns: now_ns, ended_ns: now_ns, subset: PageSubset::ALL.raw(), was_on })
    }

    fn protect(&self, subset: PageSubset, at_ns: u64) -> Result<Protected, KvmError> {
        let log = self.machine.log();
        let was_on = log.is_on();
        if was_on { log.harvest() } else { log.start() }?;
        let clock = MonotonicClock;
        let subset = if log.kind() == DirtyLogKind::Bitmap { subset } else { PageSubset::ALL };
        let at = Duration::from_nanos(at_ns);
        clock.sleep(at.saturating_sub(clock.now()).saturating_sub(LAST_MOMENT));
        while clock.now() < at {
            std::hint::spin_loop();
        }
        let began_ns = clock.now().as_nanos() as u64;
        let pages = PageCount::covering(self.machine.shape().memory_bytes).0;
        let mut first = 0;
        while first < pages {
            let count = (pages - first).min(PROTECT_PAGES);
            log.protect_some(PageRun::new(first, count as u32), subset)?;
            first += count;
        }
        Ok(Protected { began_ns, ended_ns: clock.now().as_nanos() as u64, subset: subset.raw(), was_on })
    }

    /// Nobody has asked for the log any more. A migration that has the VM by now has the log too, and sees to it.
    fn end_tracking(&self) {
        let Ok(_turn) = self.unless_migrating("end tracking") else { return };
        if self.tracking.is_held() {
            return;
        }
        tracing::warn!("the dirty log was left on by tracking; switching it off");
        if let Err(error) = self.machine.log().stop() {
            tracing::error!("the dirty log: {error}");
        }
    }

    /// Sends one round of announcements out of every network port, as if from the guest, and asks the guest to announce itself when it runs: only it knows all its
    /// addresses and VLANs. Returns the frames sent.
    fn announce(&self) -> u32 {
        let devices = self.machine.devices();
        for device in devices {
            device.ask_to_announce();
        }
        let nets = &self.machine.shape().nets;
        let mut sent = 0;
        for frame in self.announcer.frames() {
            let source = &frame.bytes()[6..12];
            let port = nets.iter().position(|net| net.station.mac.bytes() == source);
            let Some(device) = port.and_then(|index| devices.get(index)) else { continue };
            match device.send_frame(frame.bytes()) {
                Ok(()) => sent += 1,
                Err(error) => tracing::warn!(device = device.name(), "an announcement was not sent: {error}"),
            }
        }
        sent
    }

    /// Sends rounds of announcements at these times from now, for as long as the VM is here, on a thread of its own; those that were being sent so end.
    fn announce_on(&self, instants: Vec<Duration>, frames_per_second: Option<u32>) {
        let Some(host) = self.me.upgrade() else { return };
        let cancel = Arc::new(AtomicBool::new(false));
        let before = std::mem::replace(&mut *lock(&self.announcing), Arc::clone(&cancel));
        before.store(true, Ordering::Release);
        let pacer = Pacer::join(self.registry.run_dir(), frames_per_second);
        let announce = move || {
            rounds::repeat(instants, &pacer, &MonotonicClock, &cancel, || {
                let is_here = lock(&host.gate).may_run() && host.machine.exit().is_none();
                if is_here { Ok(host.announce()) } else { Err("the VM is not here") }
            });
        };
        if let Err(error) = std::thread::Builder::new().name("announce".into()).spawn(announce) {
            tracing::warn!("no thread for repeated announcements: {error}");
        }
    }

    fn welcome(&self, socket: &mut SessionSocket) -> Result<(), SessionError> {
        let memory = self.machine.memory();
        let fds: [BorrowedFd<'_>; 2] = [memory.file(), memory.dirty().as_fd()];
        socket.send(&Reply::Welcome(Box::new(self.machine.shape().clone())), &fds)
    }

    /// Answers managers that connect to `session.sock`, one session at a time, until the process ends.
    ///
    /// # Errors
    /// A socket that cannot be made.
    pub fn listen_for_sessions(self: &Arc<Self>) -> Result<(), HostError> {
        let path = self.socket("session");
        let failed = |source| HostError::Io { action: format!("listening at {}", path.display()), source };
        let listener = UnixListener::bind(&path).map_err(failed)?;
        let host = Arc::clone(self);
        let serve = move || {
            for stream in listener.incoming().flatten() {
                let host = Arc::clone(&host);
                let spawned = std::thread::Builder::new().name("session".into()).spawn(move || host.attach(stream));
                if let Err(error) = spawned {
                    tracing::error!("no thread for a session: {error}");
                }
            }
        };
        std::thread::Builder::new().name("sessions".into()).spawn(serve).map_err(failed)?;
        Ok(())
    }

    /// A manager has connected to a machine that exists: it must attach.
    fn attach(&self, stream: UnixStream) {
        let mut socket = SessionSocket::new(stream);
        let Ok((request, _)) = socket.recv::<Request>() else { return };
        let (version, migration) = match request {
            Request::Attach { version, migration } => (version, migration),
            Request::Reattach { version, migration } => return self.reattach(socket, version, migration),
            _ => return refuse(&mut socket, "a machine that exists must be attached to".to_owned()),
        };
        if version != SESSION_VERSION {
            return refuse(&mut socket, HostError::Version(version).to_string());
        }
        let Some(_turn) = self.turn() else {
            return refuse(&mut socket, "another migration has the VM".to_owned());
        };
        if self.paused_by_operator.load(Ordering::Acquire) {
            return refuse(&mut socket, "the VM is paused; resume it first".to_owned());
        }
        // Whoever moved it on would read zeros where pages are missing.
        if lock(&self.faults).is_some() {
            return refuse(
                &mut socket,
                "the VM has come by post-copy, and pages of it are still at its former host".to_owned(),
            );
        }
        if let Some((who, until)) = &*lock(&self.throttler)
            && Instant::now() < *until
        {
            return refuse(&mut socket, format!("`dunlin stun` of {who} slows its writers; end that first"));
        }
        if let Err(error) = lock(&self.gate).attach(migration) {
            return refuse(&mut socket, chain(&error));
        }
        if self.welcome(&mut socket).is_ok()
            && let Some(lost) = self.serve(&mut socket, false)
        {
            self.session_lost(&lost);
        }
    }

    /// A manager takes the place of one that died or gave up.
    fn reattach(&self, mut socket: SessionSocket, version: u16, migration: MigrationId) {
        let state = {
            let gate = lock(&self.gate);
            (gate.migration() == Some(migration)).then(|| gate.state())
        };
        let owes = lock(&self.faults).is_some();
        let turn = match state {
            Some(GateState::Open) if owes => self.filler.take(ARRIVAL_LIMIT),
            Some(GateState::Prepared | GateState::Borrowed | GateState::Lent | GateState::Released) => self.turn(),
            _ => {
                let reason =
                    format!("there is nothing of migration {migration} here that another manager could take over");
                return refuse(&mut socket, reason);
            }
        };
        let Some(turn) = turn else { return refuse(&mut socket, "another manager has the VM".to_owned()) };
        if version != SESSION_VERSION {
            return refuse(&mut socket, HostError::Version(version).to_string());
        }
        if self.welcome(&mut socket).is_err() {
            return;
        }
        if state == Some(GateState::Open) {
            return self.serve_running(&mut socket);
        }
        let arrives = matches!(state, Some(GateState::Prepared | GateState::Borrowed));
        if let Some(lost) = self.serve(&mut socket, arrives) {
            return self.session_lost(&lost);
        }
        drop(turn);
        let _turn = self.filler.take_for_arrival();
        self.serve_running(&mut socket);
    }

    /// Serves a manager of a VM that runs here: it may still ask for announcements, and for what concerns pages that are owed and frames that are relayed, and nothing else.
    fn serve_running(&self, socket: &mut SessionSocket) {
        while let Ok((request, _)) = socket.recv::<Request>() {
            let reply = match request {
                Request::Announce
                | Request::AllIsHere
                | Request::CaughtFaults
                | Request::Relay(_)
                | Request::CaughtUp
                | Request::EndRelay => self.handle(request, "").unwrap_or_else(Reply::Failed),
                _ => Reply::Failed("the migration has ended: the VM runs here".to_owned()),
            };
            if self.reply(socket, &reply).is_err() {
                break;
            }
        }
    }

    /// Answers a manager, with the descriptors that belong to it.
    fn reply(&self, socket: &mut SessionSocket, reply: &Reply) -> Result<(), SessionError> {
        match (reply, &*lock(&self.faults)) {
            (Reply::Faults(_), Some(faults)) => socket.send(reply, &faults.fds()),
            (Reply::Ports, _) => match self.machine.former_ports() {
                Ok(ports) if ports.len() <= MAX_FDS => {
                    socket.send(reply, &ports.iter().map(AsFd::as_fd).collect::<Vec<_>>())
                }
                Ok(ports) => socket.send(&Reply::Failed(format!("it has {} network ports", ports.len())), &[]),
                Err(error) => socket.send(&Reply::Failed(error.to_string()), &[]),
            },
            (Reply::Staging, _) => self.loan.with_staging(|file| socket.send(reply, &[file])).unwrap_or(Ok(())),
            _ => socket.send(reply, &[]),
        }
    }

    /// Serves the session that a target's machine was made with, to its end. Once the VM runs here the migration has it no
    /// more: its manager may still ask for announcements, and nothing else.
    pub fn serve_first_session(&self, mut socket: SessionSocket) {
        {
            let _turn = self.seat.take_for_arrival();
            if let Some(lost) = self.serve(&mut socket, true) {
                return self.session_lost(&lost);
            }
        }
        let _turn = self.filler.take_for_arrival();
        self.serve_running(&mut socket);
    }

    /// Answers a manager. `None` when the machine has ended by its order or, `until_it_runs`, when the VM was let go.
    fn serve(&self, socket: &mut SessionSocket, until_it_runs: bool) -> Option<SessionError> {
        // While the VM stands, this thread runs in front of other work on its CPU; so it does while the VM is on loan, and stands again in a moment. Beside vCPUs that keep another CPU busy an
        // ordinary thread of the same control group may wait for a second to be woken on a full one: the group's share there is as small as the thread's load.
        let is_on_loan = || matches!(lock(&self.gate).state(), GateState::Borrowed | GateState::Lent);
        let mut hurry = is_on_loan().then(Hurry::here);
        let manager = socket.peer_name();
        loop {
            let request = match socket.recv::<Request>() {
                Ok((request, _)) => request,
                Err(error) => return Some(error),
            };
            if matches!(request, Request::Pause | Request::RestoreState(_)) {
                hurry.get_or_insert_with(Hurry::here);
            }
            let (ends, runs) = (matches!(request, Request::Discard), matches!(request, Request::Resume));
            if ends {
                hurry = None;
            }
            let reply = self.handle(request, &manager).unwrap_or_else(Reply::Failed);
            let done = matches!(reply, Reply::Done);
            let sent = self.reply(socket, &reply);
            if (runs || self.machine.is_running()) && !is_on_loan() {
                hurry = None;
            }
            if ends && done {
                stand_back();
                std::thread::sleep(STANDS_ON);
                self.machine.stop();
                return None;
            }
            if let Err(error) = sent {
                return Some(error);
            }
            if until_it_runs && runs && done && lock(&self.gate).state() == GateState::Open {
                return None;
            }
        }
    }

    fn session_lost(&self, lost: &SessionError) {
        self.end_throttling();
        let meaning = {
            let mut gate = lock(&self.gate);
            gate.note_loss();
            gate.on_session_lost()
        };
        tracing::info!(?meaning, "the manager's session has ended: {lost}");
        match meaning {
            OnLoss::Run => self.run_again(),
            OnLoss::Exit => self.machine.stop(),
            OnLoss::Stand => tracing::warn!("in doubt: waiting for a manager, or for `dunlin resolve`"),
        }
    }

    /// From now on whoever touches RAM that is not mapped here waits for the manager. Kept as long as this process lives: whoever closed the last descriptor would have
    /// missing pages read as zeros.
    fn catch_faults(&self) -> Result<Reply, String> {
        if self.machine.is_running() {
            return Err("the VM runs".to_owned());
        }
        let part = |range: &crate::kvm::memory::RamRange| MappedAt {
            first_page: range.first_page.0,
            pages: range.pages.0,
            address: range.host_address,
        };
        let mapped: Vec<MappedAt> = self.machine.memory().ranges().iter().map(part).collect();
        let block_pages = self.machine.memory().block_pages();
        let faults =
            UserFaults::register(mapped.clone(), block_pages).map_err(|error| format!("userfaultfd: {error}"))?;
        self.owes_pages(true);
        *lock(&self.faults) = Some(faults);
        Ok(Reply::Faults(mapped))
    }

    /// A relay that does not catch up keeps the guest from the network for so long only, whatever becomes of the manager.
    fn bound_relay(&self) {
        let machine = Arc::clone(&self.machine);
        let bound = move || {
            std::thread::sleep(RELAY_LIMIT);
            machine.relay_caught_up();
        };
        if let Err(error) = std::thread::Builder::new().name("relay".into()).spawn(bound) {
            tracing::warn!("no thread for the relay's limit, so it is not waited for: {error}");
            self.machine.relay_caught_up();
        }
    }

    /// While pages are owed none is given back to the host: a page that comes late would come into the guest's way, and one that is gone again would not be caught. Nor is a vCPU put in
    /// front of whoever brings them.
    fn owes_pages(&self, owes: bool) {
        self.machine.pages_come_later(owes);
        if let Some(balloon) = self.machine.balloon() {
            balloon.hold(owes);
        }
    }

    fn handle(&self, request: Request, manager: &str) -> Result<Reply, String> {
        let machine = &self.machine;
        let done = |result: Result<(), GateError>| result.map(|()| Reply::Done).map_err(|error| chain(&error));
        match request {
            Request::CatchFaults => self.catch_faults(),
            Request::CaughtFaults => Ok(match &*lock(&self.faults) {
                Some(faults) => Reply::Faults(faults.mapped().to_vec()),
                None => Reply::Done,
            }),
            Request::AllIsHere => {
                *lock(&self.faults) = None;
                self.owes_pages(false);
                Ok(Reply::Done)
            }
            Request::Attach { .. } | Request::Reattach { .. } | Request::Create(_) => {
                Err("the session has begun already".to_owned())
            }
            Request::StartLog => machine.log().start().map(|()| Reply::Done).map_err(|error| chain(&error)),
            Request::Harvest => machine.log().harvest().map(|()| Reply::Done).map_err(|error| chain(&error)),
            Request::Protect(_, run) => machine.log().protect(run).map(|()| Reply::Done).map_err(|error| chain(&error)),
            Request::Disregard(_, runs) => {
                machine.log().disregard(&runs);
                Ok(Reply::Done)
            }
            Request::StopLog => {
                self.end_throttling();
                machine.log().stop().map(|()| Reply::Done).map_err(|error| chain(&error))
            }
            Request::Pause => {
                let pause = machine.pause().map_err(|error| chain(&error))?;
                Ok(Reply::Paused(pause.as_nanos() as u64))
            }
            Request::Resume => {
                let started = self.start();
                if started.is_err() {
                    self.run_when_lent();
                }
                started.map(|()| Reply::Done).map_err(|error| chain(&error))
            }
            Request::SaveState => machine.save_state().map(Reply::State).map_err(|error| chain(&error)),
            Request::EssentialPages => machine.essential_pages().map(Reply::Pages).map_err(|error| chain(&error)),
            Request::RestoreState(state) => {
                machine.restore_state(&state).map(|()| Reply::Done).map_err(|error| chain(&error))
            }
            Request::BootImage => {
                let image = machine.image().map(|image| image.to_bytes());
                Ok(Reply::BootImage(image.map(serde_bytes::ByteBuf::from)))
            }
            Request::SetBootImage(bytes) => {
                machine.set_image(BootImage::from_bytes(&bytes).map_err(|error| chain(&error))?);
                Ok(Reply::Done)
            }
            Request::Release(peer) => {
                if machine.is_running() {
                    return Err("the VM runs: pause it first".to_owned());
                }
                done(lock(&self.gate).release(peer))
            }
            Request::Reclaim | Request::TakeBack => {
                self.go_on_from_increment()?;
                let taken = done(lock(&self.gate).reclaim());
                if taken.is_ok() {
                    self.end_loan();
                }
                taken
            }
            Request::Lend { peer, lease_ms } => {
                if machine.is_running() {
                    return Err("the VM runs: pause it first".to_owned());
                }
                done(lock(&self.gate).lend(peer, lease_ms))
            }
            Request::Staging => self.make_staging().map(|()| Reply::Staging),
            Request::Advance { pages, state } => self.advance(&pages, state).map(|()| Reply::Done),
            Request::HoldOutput => {
                self.hold_output();
                Ok(Reply::Done)
            }
            Request::RunUntil(until_ns) => self.run_until(Duration::from_nanos(until_ns)).map(|()| Reply::Done),
            Request::BeginIncrement(number) => {
                machine.begin_increment(number).map(|()| Reply::Done).map_err(|error| chain(&error))
            }
            Request::LetOut(number) => {
                machine.let_out(number);
                Ok(Reply::Done)
            }
            Request::FormerPorts => Ok(Reply::Ports),
            Request::AwaitRelay => {
                machine.await_relay();
                self.bound_relay();
                Ok(Reply::Done)
            }
            Request::Relay(frames) => {
                machine.relay(frames);
                Ok(Reply::Done)
            }
            Request::CaughtUp => {
                machine.relay_caught_up();
                Ok(Reply::Done)
            }
            Request::EndRelay => {
                machine.end_relay();
                Ok(Reply::Done)
            }
            Request::ForeseePrepared => done(lock(&self.gate).foresee_prepared()),
            Request::Prepared => done(lock(&self.gate).prepared()),
            Request::TakeOwnership => {
                let mut gate = lock(&self.gate);
                if gate.state() == GateState::Open {
                    return Ok(Reply::OwnedAlready);
                }
                let taken = done(gate.take_ownership());
                drop(gate);
                if taken.is_ok() && self.loan.holds() {
                    self.end_loan();
                }
                taken
            }
            // A VM that has gone on from here must not be announced here.
            Request::Announce if !lock(&self.gate).may_run() => Err("the VM is not here".to_owned()),
            Request::Announce => Ok(Reply::Frames(self.announce())),
            Request::RepeatAnnouncements { .. } if !lock(&self.gate).may_run() => Err("the VM is not here".to_owned()),
            Request::RepeatAnnouncements { instants_ns, frames_per_second } => {
                if instants_ns.len() > MOST_ROUNDS {
                    return Err(format!("{} rounds are more than {MOST_ROUNDS}", instants_ns.len()));
                }
                self.announce_on(instants_ns.into_iter().map(Duration::from_nanos).collect(), frames_per_second);
                Ok(Reply::Done)
            }
            Request::Discard => {
                // It runs elsewhere by now: here is time to write down how it was slowed.
                self.end_throttling();
                self.stand_for_good();
                done(lock(&self.gate).discard())
            }
            Request::NameFreePages(patience_ns) => {
                super::balloon::name_free_pages(machine, Duration::from_nanos(patience_ns)).map(Reply::FreePages)
            }
            Request::SqueezeGuest(pages) => {
                let what = format!("migrate --balloon-before {}", pages.bytes());
                self.act(manager, &what, || super::balloon::squeeze(machine, pages)).map(|()| Reply::Done)
            }
            Request::GuestPages(patience_ns) => {
                super::balloon::guest_pages(machine, Duration::from_nanos(patience_ns)).map(Reply::GuestPages)
            }
            Request::Throttle(limits) => {
                let writes = machine.throttle(&limits).map_err(|error| chain(&error))?;
                let migration = lock(&self.gate).migration();
                self.audit_throttling(self.throttling.ordered(manager, migration, &limits, &writes));
                Ok(Reply::Writes(Box::new(writes)))
            }
        }
    }

    /// Waits until the machine has ended, at most `timeout`; then takes its entry out of the run folder.
    pub fn wait_end(&self, timeout: Duration) -> Option<crate::kvm::MachineExit> {
        let exit = self.machine.wait_exit(timeout)?;
        self.registry.leave(&self.machine.shape().name);
        Some(exit)
    }

    /// The shape.
    pub fn shape(&self) -> &MachineShape {
        self.machine.shape()
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.registry.leave(&self.machine.shape().name);
    }
}

/// Takes the descriptor that a parent process handed over as the first session.
///
/// # Errors
/// A number that is no open socket.
pub fn session_from_fd(fd: OwnedFd) -> Result<SessionSocket, HostError> {
    let failed = |source| HostError::Io { action: "taking the session's descriptor".to_owned(), source };
    rustix::net::sockopt::socket_type(fd.as_fd()).map_err(|error| failed(error.into()))?;
    Ok(SessionSocket::new(UnixStream::from(fd)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kvm::memory::MemoryOptions;

    /// A source and a target make the same windows, and so does a later build.
    #[test]
    fn devices_have_one_order_for_ever() {
        let memory = Memory::new(1 << 20, MemoryOptions { huge_pages: false }).unwrap();
        let disk = tempfile::NamedTempFile::new().unwrap();
        disk.as_file().set_len(4096).unwrap();
        let names = |rng, balloon| {
            let disks = vec![DiskSpec { path: disk.path().to_owned(), readonly: true }; 2];
            let made = devices(&Parts { nets: Vec::new(), disks, rng, balloon }, &memory).unwrap();
            made.iter().map(|device| device.name()).collect::<Vec<_>>()
        };
        assert_eq!(names(false, false), ["disk0", "disk1"]);
        assert_eq!(names(true, true), ["disk0", "disk1", "rng0", "balloon0"]);
        assert_eq!(names(false, true), ["disk0", "disk1", "balloon0"]);
    }
}
