//! A machine in another process, as the ports want it: every call is a request on the session socket.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{PidfdFlags, pidfd_open};

use super::frame::{SessionError, SessionSocket};
use super::{Creation, Reply, Request, SESSION_VERSION};
use crate::foreign::process::has_ended;
use crate::model::{
    MachineShape, MigrationId, Owner, PageBitmap, PageCount, PageRun, RegionId, RelayedFrame, VcpuLimit, VmId, VmWrites,
};
use crate::net::former::FormerTaps;
use crate::port::{
    DirtyLog, Fate, FaultSource, Faults, FormerPorts, FreePages, Gate, Journal, JournalRecord, Loan, MachineError,
    MachineState, PauseTiming, Region, Relay, Throttle, Vcpus,
};
use crate::shm::{RamRegion, SharedBitmap, UserFaults};
use crate::store::FileJournal;

/// How long any one request may take: the longest is the creation of a machine with much memory.
const PATIENCE: Duration = Duration::from_secs(60);
/// What is asked of a machine whose faults are to be caught.
const CATCH: &str = "have its faults caught";
/// How long a machine whose session broke may take to be seen dead.
const DEATH_LIMIT: Duration = Duration::from_secs(2);

/// A machine's session, and what became of its process.
pub struct RemoteMachine {
    socket: SessionSocket,
    pidfd: OwnedFd,
    shape: MachineShape,
    region: Arc<RamRegion>,
    dirty: SharedBitmap,
    migration: MigrationId,
    journal: FileJournal,
    /// This manager has asked the machine to take the VM: an `owner` in the journal is no operator's any more.
    asked_to_own: bool,
    /// The guest may have run since the VM is here.
    may_have_run: bool,
    /// It was let run on loan.
    runs_on_loan: bool,
}

impl RemoteMachine {
    /// Attaches to the running machine that listens at `socket`.
    ///
    /// # Errors
    /// No machine there, or one that refuses: another migration has it.
    pub fn attach(socket: &Path, migration: MigrationId, journal: FileJournal) -> Result<Self, MachineError> {
        let stream =
            UnixStream::connect(socket).map_err(|error| gone("attach", format!("{}: {error}", socket.display())))?;
        Self::begin(stream, &Request::Attach { version: SESSION_VERSION, migration }, migration, journal)
    }

    /// Takes the place of a manager that died or gave up: of a machine that stands in doubt, or that runs and is owed pages.
    ///
    /// # Errors
    /// No machine there, or one that has nothing to be taken over.
    pub fn reattach(socket: &Path, migration: MigrationId, journal: FileJournal) -> Result<Self, MachineError> {
        let stream =
            UnixStream::connect(socket).map_err(|error| gone("attach", format!("{}: {error}", socket.display())))?;
        let request = Request::Reattach { version: SESSION_VERSION, migration };
        let mut machine = Self::begin(stream, &request, migration, journal)?;
        let owned = matches!(machine.journal.last(migration), Ok(Some(JournalRecord::Owner)));
        (machine.asked_to_own, machine.may_have_run) = (owned, owned);
        Ok(machine)
    }

    /// Makes the machine process at the other end of `stream` become a waiting machine.
    ///
    /// # Errors
    /// What the process could not provide.
    pub fn create(stream: UnixStream, creation: Creation, journal: FileJournal) -> Result<Self, MachineError> {
        let migration = creation.migration;
        Self::begin(stream, &Request::Create(Box::new(creation)), migration, journal)
    }

    fn begin(
        stream: UnixStream,
        request: &Request,
        migration: MigrationId,
        journal: FileJournal,
    ) -> Result<Self, MachineError> {
        const ACTION: &str = "begin a session";
        let fail = |error: &dyn std::fmt::Display| gone(ACTION, error.to_string());
        let mut socket = SessionSocket::new(stream);
        socket.set_patience(Some(PATIENCE)).map_err(|error| fail(&error))?;
        socket.send(request, &[]).map_err(|error| fail(&error))?;
        let (reply, fds) = socket.recv::<Reply>().map_err(|error| fail(&error))?;
        let shape = match reply {
            Reply::Welcome(shape) => *shape,
            Reply::Failed(reason) => return Err(MachineError::Refused { action: ACTION, reason }),
            other => return Err(fail(&format!("unexpected answer {other:?}"))),
        };
        // The welcome comes from the machine's own process, so its credentials are the machine's.
        let pid = socket.peer_pid().map_err(|error| fail(&error))?;
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|error| fail(&error))?;
        let [ram, dirty] = <[OwnedFd; 2]>::try_from(fds).map_err(|fds| fail(&format!("{} descriptors", fds.len())))?;
        let spec = shape.regions().swap_remove(0);
        let dirty = SharedBitmap::open(dirty, spec.pages).map_err(|error| fail(&error))?;
        let region = RamRegion::new(spec, ram).map_err(|error| fail(&error))?;
        Ok(Self {
            socket,
            pidfd,
            shape,
            region: Arc::new(region),
            dirty,
            migration,
            journal,
            asked_to_own: false,
            may_have_run: false,
            runs_on_loan: false,
        })
    }

    /// Takes the process that a socketpair was handed to as the machine: credentials of a socketpair name its maker.
    ///
    /// # Errors
    /// A process that has ended already.
    pub fn set_process(&mut self, pid: u32) -> Result<(), MachineError> {
        let pid = rustix::process::Pid::from_raw(pid as i32).ok_or_else(|| gone("watch it", "pid 0".to_owned()))?;
        self.pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(|error| gone("watch it", error.to_string()))?;
        Ok(())
    }

    /// What the machine is made of.
    pub fn shape(&self) -> &MachineShape {
        &self.shape
    }

    /// The machine's RAM, mapped here.
    pub fn region(&self) -> Arc<RamRegion> {
        Arc::clone(&self.region)
    }

    fn vm(&self) -> VmId {
        self.shape.vm_id
    }

    fn call(&mut self, action: &'static str, request: &Request) -> Result<Reply, MachineError> {
        Ok(self.call_for_fds(action, request)?.0)
    }

    /// The same, of what is answered with descriptors beside it.
    fn call_for_fds(&mut self, action: &'static str, request: &Request) -> Result<(Reply, Vec<OwnedFd>), MachineError> {
        let exchange = |socket: &mut SessionSocket| -> Result<(Reply, Vec<OwnedFd>), SessionError> {
            socket.send(request, &[])?;
            socket.recv::<Reply>()
        };
        match exchange(&mut self.socket) {
            Ok((Reply::Failed(reason), _)) => Err(MachineError::Refused { action, reason }),
            Ok(answer) => Ok(answer),
            Err(error) => Err(gone(action, error.to_string())),
        }
    }

    fn order(&mut self, action: &'static str, request: &Request) -> Result<(), MachineError> {
        match self.call(action, request)? {
            Reply::Done => Ok(()),
            other => Err(gone(action, format!("unexpected answer {other:?}"))),
        }
    }

    /// Has the machine, whose VM runs here again, send the rounds of announcements that follow the first one, whatever becomes of this manager.
    ///
    /// # Errors
    /// It does not run, or the machine is gone.
    pub fn repeat_announcements(
        &mut self,
        instants: impl Iterator<Item = Duration>,
        frames_per_second: Option<u32>,
    ) -> Result<(), MachineError> {
        let instants_ns = instants.map(|instant| instant.as_nanos() as u64).collect();
        self.order("announce on", &Request::RepeatAnnouncements { instants_ns, frames_per_second })
    }

    /// Takes over the descriptors of its faults, if there are any.
    fn faults(&mut self, request: &Request) -> Result<Option<Arc<dyn Faults>>, MachineError> {
        let fail = |error: &dyn std::fmt::Display| gone(CATCH, error.to_string());
        let (reply, fds) = self.call_for_fds(CATCH, request)?;
        match (reply, <[OwnedFd; 2]>::try_from(fds)) {
            (Reply::Faults(mapped), Ok([faults, here])) => {
                let faults =
                    UserFaults::adopt(faults, here, mapped, self.region.block_pages()).map_err(|error| fail(&error))?;
                Ok(Some(Arc::new(faults)))
            }
            (Reply::Done, _) => Ok(None),
            (other, _) => Err(fail(&format!("unexpected answer {other:?}"))),
        }
    }

    /// Writes a record in the place of a machine that has certainly died.
    fn write_for_dead(
        &mut self,
        action: &'static str,
        record: JournalRecord,
        error: MachineError,
    ) -> Result<(), MachineError> {
        if !matches!(error, MachineError::Gone { .. }) || !has_ended(&self.pidfd, DEATH_LIMIT) {
            return Err(error);
        }
        let vm = self.vm();
        self.journal
            .append(self.migration, vm, record)
            .map_err(|error| MachineError::Refused { action, reason: format!("it died, and {error}") })
    }
}

fn gone(action: &'static str, reason: String) -> MachineError {
    MachineError::Gone { action, reason }
}

impl Vcpus for RemoteMachine {
    fn pause(&mut self) -> Result<PauseTiming, MachineError> {
        match self.call("pause", &Request::Pause)? {
            Reply::Paused(pause_ns) => Ok(PauseTiming { pause: Duration::from_nanos(pause_ns) }),
            other => Err(gone("pause", format!("unexpected answer {other:?}"))),
        }
    }

    fn resume(&mut self) -> Result<(), MachineError> {
        // On loan it runs as the source's.
        self.may_have_run |= self.asked_to_own;
        self.order("resume", &Request::Resume)
    }
}

impl DirtyLog for RemoteMachine {
    fn start_log(&mut self) -> Result<(), MachineError> {
        self.order("start the dirty log", &Request::StartLog)
    }

    fn harvest(&mut self, into: &mut PageBitmap) -> Result<PageCount, MachineError> {
        self.order("harvest the dirty log", &Request::Harvest)?;
        Ok(self.dirty.take(into))
    }

    fn protect(&mut self, region: RegionId, run: PageRun) -> Result<(), MachineError> {
        self.order("protect pages", &Request::Protect(region, run))
    }

    fn disregard(&mut self, region: RegionId, runs: &[PageRun]) -> Result<(), MachineError> {
        self.order("disregard what is due", &Request::Disregard(region, runs.to_vec()))
    }

    fn stop_log(&mut self) -> Result<(), MachineError> {
        self.order("stop the dirty log", &Request::StopLog)
    }
}

impl MachineState for RemoteMachine {
    fn save_state(&mut self) -> Result<Vec<u8>, MachineError> {
        match self.call("save its state", &Request::SaveState)? {
            Reply::State(state) => Ok(state),
            other => Err(gone("save its state", format!("unexpected answer {other:?}"))),
        }
    }

    fn essential_pages(&mut self) -> Result<Vec<u64>, MachineError> {
        const ACTION: &str = "say which pages it needs";
        match self.call(ACTION, &Request::EssentialPages)? {
            Reply::Pages(pages) => Ok(pages),
            other => Err(gone(ACTION, format!("unexpected answer {other:?}"))),
        }
    }

    fn restore_state(&mut self, state: &[u8]) -> Result<(), MachineError> {
        self.order("restore a state", &Request::RestoreState(state.to_vec()))
    }

    fn boot_image(&mut self) -> Result<Option<Vec<u8>>, MachineError> {
        const ACTION: &str = "give its boot image";
        match self.call(ACTION, &Request::BootImage)? {
            Reply::BootImage(image) => Ok(image.map(serde_bytes::ByteBuf::into_vec)),
            other => Err(gone(ACTION, format!("unexpected answer {other:?}"))),
        }
    }

    fn set_boot_image(&mut self, image: &[u8]) -> Result<(), MachineError> {
        self.order("take a boot image", &Request::SetBootImage(image.to_vec()))
    }
}

impl FaultSource for RemoteMachine {
    fn catch_faults(&mut self) -> Result<Arc<dyn Faults>, MachineError> {
        let caught = self.faults(&Request::CatchFaults)?;
        caught.ok_or_else(|| gone(CATCH, "it says that there are none".to_owned()))
    }

    fn caught_faults(&mut self) -> Result<Option<Arc<dyn Faults>>, MachineError> {
        self.faults(&Request::CaughtFaults)
    }

    fn all_is_here(&mut self) -> Result<(), MachineError> {
        self.order("be told that its memory is here", &Request::AllIsHere)
    }
}

impl Relay for RemoteMachine {
    fn former_ports(&mut self) -> Result<Option<Box<dyn FormerPorts>>, MachineError> {
        const ACTION: &str = "hand out its network ports";
        if self.shape.nets.is_empty() {
            return Ok(None);
        }
        match self.call_for_fds(ACTION, &Request::FormerPorts)? {
            (Reply::Ports, taps) => Ok(Some(Box::new(FormerTaps::new(taps)))),
            (other, _) => Err(gone(ACTION, format!("unexpected answer {other:?}"))),
        }
    }

    fn await_relay(&mut self) -> Result<(), MachineError> {
        self.order("wait for a relay", &Request::AwaitRelay)
    }

    fn relay(&mut self, frames: Vec<RelayedFrame>) -> Result<(), MachineError> {
        self.order("take relayed frames", &Request::Relay(frames))
    }

    fn caught_up(&mut self) -> Result<(), MachineError> {
        self.order("go on behind relayed frames", &Request::CaughtUp)
    }

    fn end_relay(&mut self) -> Result<(), MachineError> {
        self.order("end a relay", &Request::EndRelay)
    }
}

impl FreePages for RemoteMachine {
    fn name_free_pages(&mut self, into: &mut PageBitmap, patience: Duration) -> Result<(), MachineError> {
        const ACTION: &str = "name its free pages";
        let pages = into.len();
        match self.call(ACTION, &Request::NameFreePages(patience.as_nanos() as u64))? {
            Reply::FreePages(runs) => {
                for run in runs.into_iter().filter(|run| run.fits(pages)) {
                    into.insert_run(run);
                }
                Ok(())
            }
            other => Err(gone(ACTION, format!("unexpected answer {other:?}"))),
        }
    }

    fn squeeze_guest(&mut self, pages: PageCount) -> Result<(), MachineError> {
        self.order("have its guest give up memory", &Request::SqueezeGuest(pages))
    }

    fn guest_pages(&mut self, patience: Duration) -> Result<PageCount, MachineError> {
        const ACTION: &str = "say what its guest has";
        match self.call(ACTION, &Request::GuestPages(patience.as_nanos() as u64))? {
            Reply::GuestPages(pages) => Ok(pages),
            other => Err(gone(ACTION, format!("unexpected answer {other:?}"))),
        }
    }
}

impl Throttle for RemoteMachine {
    fn throttle(&mut self, limits: &[Option<VcpuLimit>]) -> Result<VmWrites, MachineError> {
        const ACTION: &str = "throttle its vCPUs";
        match self.call(ACTION, &Request::Throttle(limits.to_vec()))? {
            Reply::Writes(writes) => Ok(*writes),
            other => Err(gone(ACTION, format!("unexpected answer {other:?}"))),
        }
    }
}

impl Loan for RemoteMachine {
    fn lend(&mut self, _migration: MigrationId, peer: &str, lease: Duration) -> Result<(), MachineError> {
        let request = Request::Lend { peer: peer.to_owned(), lease_ms: lease.as_millis() as u64 };
        self.order("lend the VM", &request)
    }

    fn staging(&mut self) -> Result<Arc<dyn Region>, MachineError> {
        const ACTION: &str = "make room for increments";
        let fail = |error: &dyn std::fmt::Display| gone(ACTION, error.to_string());
        let (reply, fds) = self.call_for_fds(ACTION, &Request::Staging)?;
        match (reply, <[OwnedFd; 1]>::try_from(fds)) {
            (Reply::Staging, Ok([file])) => {
                let region = RamRegion::new(self.region.spec().clone(), file).map_err(|error| fail(&error))?;
                Ok(Arc::new(region))
            }
            (other, _) => Err(fail(&format!("unexpected answer {other:?}"))),
        }
    }

    fn advance(&mut self, pages: &PageBitmap, state: &[u8]) -> Result<(), MachineError> {
        let pages = pages.words().iter().flat_map(|word| word.to_le_bytes()).collect();
        self.order("take an increment in", &Request::Advance { pages, state: state.to_vec() })
    }

    fn take_back(&mut self, _migration: MigrationId) -> Result<(), MachineError> {
        self.order("take the VM back", &Request::TakeBack)
    }

    fn hold_output(&mut self) -> Result<(), MachineError> {
        self.order("hold what the VM sends and writes", &Request::HoldOutput)
    }

    fn run_until(&mut self, until: Duration) -> Result<(), MachineError> {
        self.runs_on_loan = true;
        self.order("run the VM on loan", &Request::RunUntil(until.as_nanos() as u64))
    }

    fn begin_increment(&mut self, number: u32) -> Result<(), MachineError> {
        self.order("end an increment", &Request::BeginIncrement(number))
    }

    fn let_out(&mut self, number: u32) -> Result<(), MachineError> {
        self.order("let out what the VM sent and wrote", &Request::LetOut(number))
    }
}

impl Gate for RemoteMachine {
    fn release(&mut self, migration: MigrationId, peer: &str) -> Result<(), MachineError> {
        debug_assert_eq!(migration, self.migration);
        let released = self.order("release the VM", &Request::Release(peer.to_owned()));
        released.or_else(|error| {
            self.write_for_dead("release the VM", JournalRecord::Released { peer: peer.to_owned() }, error)
        })
    }

    fn reclaim(&mut self, _migration: MigrationId) -> Result<(), MachineError> {
        self.order("take the VM back", &Request::Reclaim)
    }

    fn foresee_prepared(&mut self, _migration: MigrationId) -> Result<(), MachineError> {
        self.order("journal `prepared` ahead of time", &Request::ForeseePrepared)
    }

    fn prepared(&mut self, _migration: MigrationId) -> Result<(), MachineError> {
        self.order("journal `prepared`", &Request::Prepared)
    }

    fn take_ownership(&mut self, _migration: MigrationId) -> Result<(), MachineError> {
        const ACTION: &str = "take ownership";
        self.asked_to_own = true;
        let answer = self.call(ACTION, &Request::TakeOwnership);
        // Unless it says itself that this order opened its gate, an operator may have been faster, and the guest ran.
        self.may_have_run |= !matches!(answer, Ok(Reply::Done) | Err(MachineError::Refused { .. }));
        match answer? {
            Reply::Done | Reply::OwnedAlready => {
                // One that runs on loan goes on running.
                self.may_have_run |= self.runs_on_loan;
                Ok(())
            }
            other => Err(gone(ACTION, format!("unexpected answer {other:?}"))),
        }
    }

    fn never_owner(&mut self, migration: MigrationId) -> Result<(), MachineError> {
        const ACTION: &str = "journal `never-owner`";
        if !has_ended(&self.pidfd, DEATH_LIMIT) {
            return Err(MachineError::Refused { action: ACTION, reason: "it still runs".to_owned() });
        }
        let last = self.journal.last(migration);
        let refuse = |reason: String| MachineError::Refused { action: ACTION, reason };
        match last.map_err(|error| refuse(error.to_string()))? {
            Some(JournalRecord::Owner) if self.may_have_run => {
                Err(refuse("it had journaled `owner`, and its guest may have run, before it died".to_owned()))
            }
            Some(JournalRecord::NeverOwner) => Ok(()),
            _ => {
                let vm = self.vm();
                let written = self.journal.append(migration, vm, JournalRecord::NeverOwner);
                written.map_err(|error| refuse(error.to_string()))
            }
        }
    }

    fn announce(&mut self) -> Result<u32, MachineError> {
        match self.call("announce", &Request::Announce)? {
            Reply::Frames(frames) => Ok(frames),
            other => Err(gone("announce", format!("unexpected answer {other:?}"))),
        }
    }

    fn discard(&mut self, migration: MigrationId) -> Result<(), MachineError> {
        const ACTION: &str = "let go of the VM";
        let discarded = self.order(ACTION, &Request::Discard);
        if discarded.is_ok() && !has_ended(&self.pidfd, DEATH_LIMIT) {
            return Err(gone(ACTION, "its process did not end".to_owned()));
        }
        discarded.or_else(|error| {
            let last = self.journal.last(migration).ok().flatten();
            let record = match last {
                Some(JournalRecord::Released { .. }) => JournalRecord::Discarded,
                _ => JournalRecord::NeverOwner,
            };
            if last == Some(JournalRecord::Owner) { Err(error) } else { self.write_for_dead(ACTION, record, error) }
        })
    }

    fn fate(&mut self) -> Fate {
        match self.journal.last(self.migration) {
            Ok(Some(JournalRecord::Owner)) if !self.asked_to_own => {
                self.may_have_run = true;
                Fate::Resolved(Owner::Here)
            }
            Ok(Some(JournalRecord::NeverOwner | JournalRecord::Discarded)) => Fate::Resolved(Owner::There),
            _ if has_ended(&self.pidfd, Duration::ZERO) => Fate::Dead,
            Ok(Some(JournalRecord::Owner)) => Fate::Resolved(Owner::Here),
            _ => Fate::Waiting,
        }
    }
}
