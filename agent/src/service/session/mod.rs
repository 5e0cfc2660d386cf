//! The session between a machine and the migration manager that works on it: a Unix socket, one session at a time.
//!
//! The manager gets the machine's RAM and dirty bitmap as file descriptors and maps them; everything that needs the KVM
//! descriptors is a request here. A session that ends, for whatever reason, is the machine's signal that its manager is
//! gone. Same build on both ends in the normal case; a version is checked all the same, since a manager may be newer.

mod client;
mod frame;

pub use client::RemoteMachine;
pub(super) use frame::MAX_FDS;
pub use frame::{SessionError, SessionSocket};

use serde::{Deserialize, Serialize};

use crate::model::{
    MachineShape, MigrationId, PageCount, PageRun, RegionId, RelayedFrame, SerialSpec, VcpuLimit, VmWrites,
};
use crate::shm::MappedAt;

/// The session protocol's version; both ends must agree.
pub const SESSION_VERSION: u16 = 4;

/// What a manager asks of a machine.
#[derive(Debug, Serialize, Deserialize)]
pub enum Request {
    /// First at a source: take this machine over for a migration.
    Attach {
        /// [`SESSION_VERSION`] of the manager.
        version: u16,
        /// The migration.
        migration: MigrationId,
    },
    /// First, instead of a manager that died or gave up: take over a machine that stands in doubt, or that runs and is owed pages.
    Reattach {
        /// [`SESSION_VERSION`] of the manager.
        version: u16,
        /// The migration that left it so.
        migration: MigrationId,
    },
    /// First at a target, to a machine process that was just started: become this machine, and wait.
    Create(Box<Creation>),
    /// [`crate::port::DirtyLog::start_log`]
    StartLog,
    /// [`crate::port::DirtyLog::harvest`]; marks arrive in the shared bitmap.
    Harvest,
    /// [`crate::port::DirtyLog::protect`]
    Protect(RegionId, PageRun),
    /// [`crate::port::DirtyLog::stop_log`]
    StopLog,
    /// [`crate::port::Vcpus::pause`]
    Pause,
    /// [`crate::port::Vcpus::resume`]
    Resume,
    /// [`crate::port::MachineState::save_state`]
    SaveState,
    /// [`crate::port::MachineState::restore_state`]
    RestoreState(#[serde(with = "serde_bytes")] Vec<u8>),
    /// [`crate::port::MachineState::boot_image`]
    BootImage,
    /// [`crate::port::MachineState::set_boot_image`]
    SetBootImage(#[serde(with = "serde_bytes")] Vec<u8>),
    /// [`crate::port::Gate::release`], with the peer's address.
    Release(String),
    /// [`crate::port::Gate::reclaim`]
    Reclaim,
    /// [`crate::port::Gate::foresee_prepared`]
    ForeseePrepared,
    /// [`crate::port::Gate::prepared`]
    Prepared,
    /// [`crate::port::Gate::take_ownership`]
    TakeOwnership,
    /// [`crate::port::Gate::announce`]
    Announce,
    /// [`crate::port::Gate::discard`]
    Discard,
    /// [`crate::port::Throttle::throttle`]
    Throttle(Vec<Option<VcpuLimit>>),
    /// [`crate::port::FaultSource::catch_faults`]
    CatchFaults,
    /// [`crate::port::FaultSource::caught_faults`]
    CaughtFaults,
    /// [`crate::port::MachineState::essential_pages`]
    EssentialPages,
    /// [`crate::port::FaultSource::all_is_here`]
    AllIsHere,
    /// [`crate::port::Loan::lend`]
    Lend {
        /// The target's address.
        peer: String,
        /// The lease.
        lease_ms: u64,
    },
    /// [`crate::port::Loan::staging`]
    Staging,
    /// [`crate::port::Loan::advance`]
    Advance {
        /// One bit a page, in little-endian words.
        #[serde(with = "serde_bytes")]
        pages: Vec<u8>,
        /// The state.
        #[serde(with = "serde_bytes")]
        state: Vec<u8>,
    },
    /// [`crate::port::Loan::take_back`]
    TakeBack,
    /// [`crate::port::Loan::hold_output`]
    HoldOutput,
    /// [`crate::port::Loan::run_until`], in nanoseconds of `CLOCK_MONOTONIC`.
    RunUntil(u64),
    /// [`crate::port::Loan::begin_increment`]
    BeginIncrement(u32),
    /// [`crate::port::Loan::let_out`]
    LetOut(u32),
    /// [`crate::port::FreePages::name_free_pages`], with the patience in nanoseconds.
    NameFreePages(u64),
    /// [`crate::port::FreePages::squeeze_guest`]
    SqueezeGuest(PageCount),
    /// [`crate::port::FreePages::guest_pages`], with the patience in nanoseconds.
    GuestPages(u64),
    /// [`crate::port::DirtyLog::disregard`]
    Disregard(RegionId, Vec<PageRun>),
    /// [`crate::port::Relay::former_ports`]
    FormerPorts,
    /// [`crate::port::Relay::await_relay`]
    AwaitRelay,
    /// [`crate::port::Relay::relay`]
    Relay(Vec<RelayedFrame>),
    /// [`crate::port::Relay::caught_up`]
    CaughtUp,
    /// [`crate::port::Relay::end_relay`]
    EndRelay,
    /// The VM runs here again: send rounds of announcements at these times from now, by yourself.
    RepeatAnnouncements {
        /// Nanoseconds from now, at most 1000 of them.
        instants_ns: Vec<u64>,
        /// What all who announce at this host may send together; none: no limit.
        frames_per_second: Option<u32>,
    },
}

/// What a target's machine process is to become.
#[derive(Debug, Serialize, Deserialize)]
pub struct Creation {
    /// [`SESSION_VERSION`] of the manager.
    pub version: u16,
    /// The migration.
    pub migration: MigrationId,
    /// The machine, its taps and disk paths already those of this host.
    pub shape: MachineShape,
    /// Where the console goes.
    pub serial: SerialSpec,
    /// Where the machine's sockets go.
    pub run_dir: std::path::PathBuf,
    /// Where the journal is.
    pub state_dir: std::path::PathBuf,
}

/// What a machine answers.
#[derive(Debug, Serialize, Deserialize)]
pub enum Reply {
    /// To `Attach` and `Create`; RAM and dirty bitmap travel beside it, in this order.
    Welcome(Box<MachineShape>),
    /// It is done.
    Done,
    /// The machine stands; nanoseconds that pausing took.
    Paused(u64),
    /// To `SaveState`.
    State(#[serde(with = "serde_bytes")] Vec<u8>),
    /// To `BootImage`.
    BootImage(Option<serde_bytes::ByteBuf>),
    /// To `Announce`: frames sent.
    Frames(u32),
    /// It could not be done; the machine is as it was.
    Failed(String),
    /// To `TakeOwnership`: an operator was faster, and the guest may have run since.
    OwnedAlready,
    /// To `EssentialPages`.
    Pages(Vec<u64>),
    /// To `Throttle`: what has been written.
    Writes(Box<VmWrites>),
    /// To `CatchFaults` and `CaughtFaults`: where RAM is mapped; the descriptors of faults and of the marks of what is here travel beside it.
    Faults(Vec<MappedAt>),
    /// To `Staging`: its file travels beside it.
    Staging,
    /// To `NameFreePages`.
    FreePages(Vec<PageRun>),
    /// To `GuestPages`.
    GuestPages(PageCount),
    /// To `FormerPorts`: their descriptors travel beside it.
    Ports,
}
