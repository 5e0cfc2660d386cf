//! A machine (the process that holds the KVM descriptors) as a migration manager sees it.
//!
//! KVM refuses another process's ioctls, so the real twin of these traits is a client of the machine's session socket.

use std::sync::Arc;
use std::time::Duration;

use super::faults::Faults;
use super::free_pages::FreePages;
use super::region::Region;
use super::relay::Relay;
use super::throttle::Throttle;
use crate::model::{MigrationId, Owner, PageBitmap, PageCount, PageRun, RegionId};

/// The machine refused, failed, or is gone.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The machine answered with an error; it is still there.
    #[error("the machine could not {action}: {reason}")]
    Refused {
        /// What was asked.
        action: &'static str,
        /// Its words.
        reason: String,
    },
    /// The machine's session ended: the process died or broke the protocol.
    #[error("the machine is gone (asked to {action}): {reason}")]
    Gone {
        /// What was asked.
        action: &'static str,
        /// What was seen.
        reason: String,
    },
}

/// What pausing took.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PauseTiming {
    /// From the order until no vCPU ran and no device worked, in the machine's own clock.
    pub pause: Duration,
}

/// The vCPUs and devices as one thing that runs or stands.
pub trait Vcpus: Send {
    /// Lifts every throttle, stops all vCPUs, completes pending exits, mutes the egress of all network ports and drains
    /// all devices. Idempotent.
    fn pause(&mut self) -> Result<PauseTiming, MachineError>;

    /// Lets the vCPUs and devices go on, egress unmuted. Refused while the ownership gate is shut.
    fn resume(&mut self) -> Result<(), MachineError>;
}

/// The dirty log of all writers to RAM: vCPUs, devices, KVM itself.
pub trait DirtyLog: Send {
    /// Switches logging on. Every page counts as not yet protected: [`DirtyLog::protect`] must be called for a run before
    /// the run is read for the first time.
    fn start_log(&mut self) -> Result<(), MachineError>;

    /// Moves every page that was logged since it was last protected into `into`. What is moved stays unprotected until
    /// [`DirtyLog::protect`]. Returns how many pages were newly added.
    fn harvest(&mut self, into: &mut PageBitmap) -> Result<PageCount, MachineError>;

    /// Re-arms the log for those pages of `run` that the last harvest moved (at the start: for all), *before* they are
    /// read. Pages of the run that were written since that harvest and were clean in it stay logged.
    fn protect(&mut self, region: RegionId, run: PageRun) -> Result<(), MachineError>;

    /// Counts the pages of `runs` as not yet protected, as all are at the start: what was written to them until [`DirtyLog::protect`] is called for them next need not be found. Only for pages that
    /// are due.
    fn disregard(&mut self, region: RegionId, runs: &[PageRun]) -> Result<(), MachineError>;

    /// Switches logging off; the guest runs at full speed again.
    fn stop_log(&mut self) -> Result<(), MachineError>;
}

/// CPU and device state as a versioned, checksummed blob.
pub trait MachineState: Send {
    /// Reads the state of the paused machine.
    fn save_state(&mut self) -> Result<Vec<u8>, MachineError>;

    /// Pages of RAM without which no vCPU of the paused machine gets through its next instruction; it may know of none.
    fn essential_pages(&mut self) -> Result<Vec<u64>, MachineError> {
        Ok(Vec::new())
    }

    /// Puts a state into a machine that has not run yet.
    fn restore_state(&mut self, state: &[u8]) -> Result<(), MachineError>;

    /// What the guest was booted from, in the machine's own format: a guest that resets at the target boots from it again.
    /// `None` if the machine has none itself.
    fn boot_image(&mut self) -> Result<Option<Vec<u8>>, MachineError>;

    /// Takes what [`Self::boot_image`] gave at the source.
    fn set_boot_image(&mut self, image: &[u8]) -> Result<(), MachineError>;
}

/// What has become of a machine that waits behind a shut gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It waits.
    Waiting,
    /// Its process has certainly ended.
    Dead,
    /// An operator has decided (`dunlin resolve`).
    Resolved(Owner),
}

/// The ownership gate: the machine journals its own right to run, so that no manager's death can leave two owners.
pub trait Gate: Send {
    /// Source: journals `released` with fsync. From its return the machine never resumes by itself. If the machine has
    /// certainly died since, the record is written in its place: it cannot run any more, and the target may.
    fn release(&mut self, migration: MigrationId, peer: &str) -> Result<(), MachineError>;

    /// Source, after the target journaled `never-owner`: journals `owner` and opens the gate again.
    fn reclaim(&mut self, migration: MigrationId) -> Result<(), MachineError>;

    /// Target: the source is about to pause the VM. Journals `prepared` with fsync ahead of time, so that no VM stands
    /// waiting for the disk; if it does not come to [`Self::prepared`], `never-owner` is journaled behind it.
    fn foresee_prepared(&mut self, migration: MigrationId) -> Result<(), MachineError>;

    /// Target, after [`MachineState::restore_state`]: the VM is complete. Journals `prepared` with fsync unless that was
    /// done ahead of time.
    fn prepared(&mut self, migration: MigrationId) -> Result<(), MachineError>;

    /// Target: journals `owner` with fsync and opens the gate.
    fn take_ownership(&mut self, migration: MigrationId) -> Result<(), MachineError>;

    /// Target: writes down that this VM never ran here and never will. Only for a machine that is dead or was discarded.
    /// It may follow `owner`, if the machine died before [`Vcpus::resume`] was ordered; never after that.
    fn never_owner(&mut self, migration: MigrationId) -> Result<(), MachineError>;

    /// Sends one round of announcements through the machine's own network ports; returns the number of frames. Also at a
    /// source that takes the VM back: the target may have announced it.
    fn announce(&mut self) -> Result<u32, MachineError>;

    /// Source: the VM runs elsewhere; journals `discarded`, and the machine process ends.
    /// Target before `owner`: journals `never-owner`, and the machine process ends.
    /// If the record cannot be written the machine refuses and stays as it is.
    fn discard(&mut self, migration: MigrationId) -> Result<(), MachineError>;

    /// What has become of the machine.
    fn fate(&mut self) -> Fate;
}

/// A machine that may run before its memory is here.
pub trait FaultSource: Send {
    /// From now on the machine waits wherever it meets a page of RAM that nobody has mapped for it.
    ///
    /// # Errors
    /// The host cannot.
    fn catch_faults(&mut self) -> Result<Arc<dyn Faults>, MachineError> {
        Err(MachineError::Refused { action: "run before its memory is here", reason: "this machine cannot".to_owned() })
    }

    /// Those that a manager before this one had caught and not ended; `None` if nothing is owed to the machine.
    ///
    /// # Errors
    /// The machine is gone.
    fn caught_faults(&mut self) -> Result<Option<Arc<dyn Faults>>, MachineError> {
        Ok(None)
    }

    /// Every page is here: until this is said the machine lets nobody else move it on.
    ///
    /// # Errors
    /// The machine is gone.
    fn all_is_here(&mut self) -> Result<(), MachineError> {
        Ok(())
    }
}

/// A machine whose VM is on loan: it runs at the target for as long as the source lets it, and the source keeps what it takes to go on by itself.
///
/// What the VM does in one stretch between two increments is that of the later one. At the target it leaves the machine only when the source can go on from behind it: so whatever happens to
/// the target, nobody has seen anything of what is lost.
pub trait Loan: Send {
    /// Source: journals `lent` with fsync. From its return the machine runs only after [`Loan::take_back`].
    fn lend(&mut self, migration: MigrationId, peer: &str, lease: Duration) -> Result<(), MachineError>;

    /// Source: memory as large as RAM, in which the pages of an increment are gathered.
    fn staging(&mut self) -> Result<Arc<dyn Region>, MachineError>;

    /// Source: the VM is from now on what it was at an increment: `pages` of the staging memory go into RAM, and `state` is kept. Done as one, whatever becomes of the manager.
    fn advance(&mut self, pages: &PageBitmap, state: &[u8]) -> Result<(), MachineError>;

    /// Source, when the target certainly runs the VM no more: journals `owner`, puts the state of the last increment in place, and opens the gate.
    fn take_back(&mut self, migration: MigrationId) -> Result<(), MachineError>;

    /// Target, before the VM runs: what it sends and writes to disks is held from now on, as the first increment's.
    fn hold_output(&mut self) -> Result<(), MachineError>;

    /// Target, prepared: the VM may run until `until` by the host's monotonic clock. Then the machine stands by itself, whatever becomes of the manager; later it goes on if it is asked to again.
    fn run_until(&mut self, until: Duration) -> Result<(), MachineError>;

    /// Target, paused: what the VM sends and writes from now on is that of increment `number`.
    fn begin_increment(&mut self, number: u32) -> Result<(), MachineError>;

    /// Target: what is that of increments up to `number` goes out.
    fn let_out(&mut self, number: u32) -> Result<(), MachineError>;
}

/// All of a machine that a manager needs.
pub trait Machine: Vcpus + DirtyLog + MachineState + Gate + Throttle + FaultSource + FreePages + Loan + Relay {}

impl<T: Vcpus + DirtyLog + MachineState + Gate + Throttle + FaultSource + FreePages + Loan + Relay> Machine for T {}
