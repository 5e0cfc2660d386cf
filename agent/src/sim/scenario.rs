//! What a simulated migration is made of: seed, guest, network, and the faults that strike it.

use std::time::Duration;

use super::rng::Rng;
use crate::announce::conflict::OnConflict;
use crate::migrate::outcomes::Failure;
use crate::migrate::{Compress, OnStuck, Reducers, Safety, Strategy};
use crate::model::{BytesPerSecond, Step};

/// One of the two hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Where the VM runs at first.
    Source,
    /// Where it is to run.
    Target,
}

impl Side {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::Source, Self::Target];

    pub(super) const fn index(self) -> usize {
        self as usize
    }

    /// The other one.
    pub const fn other(self) -> Self {
        match self {
            Self::Source => Self::Target,
            Self::Target => Self::Source,
        }
    }
}

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// SIGKILL for the manager: its connections close, its machine's session ends.
    KillManager(Side),
    /// SIGKILL for the machine.
    KillMachine(Side),
    /// All connections are reset, new ones fail until `heals_after`.
    Cut {
        /// When dialling works again; `None` is never.
        heals_after: Option<Duration>,
    },
    /// What is sent by these sides no longer arrives, and nobody is told.
    Stall {
        /// Nothing that the source sends arrives.
        from_source: bool,
        /// Nothing that the target sends arrives.
        from_target: bool,
        /// When all that was held back arrives; `None` is never.
        heals_after: Option<Duration>,
    },
    /// No journal record can be written there any more, until an operator makes room.
    DiskFull(Side),
    /// The next record that the journal there takes is durable, but its writer dies before it can say so.
    DieAfterAppend(Side),
    /// One bit of the next page on the wire is flipped.
    FlipPageBit,
    /// An operator cancels.
    Cancel(Side),
}

impl Fault {
    /// The failure of the outcome table that it is. `None` for what the table does not speak of.
    pub const fn failure(self) -> Option<Failure> {
        Some(match self {
            Self::KillManager(Side::Source) => Failure::SourceManagerDies,
            Self::KillManager(Side::Target) => Failure::TargetManagerDies,
            Self::KillMachine(Side::Source) => Failure::SourceMachineDies,
            Self::KillMachine(Side::Target) => Failure::TargetMachineDies,
            Self::Cut { heals_after: None } => Failure::LinkCut,
            Self::Cut { .. } => Failure::LinkCutHeals,
            Self::Stall { heals_after: None, .. } => Failure::LinkStalls,
            Self::Stall { .. } => Failure::LinkStallHeals,
            Self::DiskFull(Side::Source) => Failure::SourceDiskFull,
            Self::DiskFull(Side::Target) => Failure::TargetDiskFull,
            Self::Cancel(_) => Failure::Cancelled,
            Self::DieAfterAppend(_) | Self::FlipPageBit => return None,
        })
    }
}

/// When it goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// As that side's manager passes a step for the first time.
    Step(Side, Step),
    /// Before the n-th port operation of the whole run, counted from 1.
    Operation(u64),
}

/// How a simulated machine is broken on purpose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// Every other write is not logged.
    ForgetsWrites,
    /// Its gate does not hold: it resumes without a manager even after `released`.
    ResumesAfterReleased,
    /// It goes on to log after its manager has gone.
    KeepsLogging,
    /// It runs on when its lease is over.
    OutrunsLease,
    /// With its manager goes what makes it wait for missing pages: they read as zeros.
    ClosesFaults,
    /// Asked for free pages, it names those that were free when the log was switched on: before any page was protected.
    NamesOldFreePages,
}

/// How the guest writes.
#[derive(Clone, Copy, Debug)]
pub struct GuestModel {
    /// Writes a second, while it runs.
    pub writes_per_second: u64,
    /// Pages that it ever writes.
    pub working_set: u64,
    /// Of these, pages that take nine writes in ten.
    pub hot_set: u64,
    /// It writes for so long (of its own running time) and idles then.
    pub busy: Duration,
    /// One in so many times it frees the page instead, and uses it again when it comes to it next; 0 is never.
    pub frees_one_in: u64,
}

/// How the link carries.
#[derive(Clone, Copy, Debug)]
pub struct NetworkModel {
    /// Bytes a second in each direction.
    pub bandwidth: BytesPerSecond,
    /// One way.
    pub latency: Duration,
}

/// A whole run.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Decides every tie, jitter and choice.
    pub seed: u64,
    /// How memory moves.
    pub strategy: Strategy,
    /// What is done when pre-copy does not end.
    pub on_stuck: OnStuck,
    /// The VM is kept safe while it is owed pages.
    pub safety: Option<Safety>,
    /// Page streams.
    pub streams: u16,
    /// What is done so that fewer bytes travel.
    pub reducers: Reducers,
    /// Hash all memory. Slow here as it is outside.
    pub verify: bool,
    /// The operator's bandwidth limit.
    pub bandwidth_limit: Option<BytesPerSecond>,
    /// The blackout asked for.
    pub downtime: Duration,
    /// Guest RAM in pages.
    pub memory_pages: u64,
    /// The guest.
    pub guest: GuestModel,
    /// The link.
    pub network: NetworkModel,
    /// The managers' stall limit.
    pub stall: Duration,
    /// How long the target's machine takes to put its boot image away.
    pub image_cost: Duration,
    /// Somebody in the target's network has the VM's address; none: nobody asks.
    pub conflict: Option<OnConflict>,
    /// What strikes.
    pub faults: Vec<(Trigger, Fault)>,
    /// A machine that is broken on purpose. Proves that the checks bite.
    pub sabotage: Option<Sabotage>,
}

impl Scenario {
    /// A small pre-copy migration over two streams with no fault. RAM spans three send windows, so that streams share
    /// the work, and ends in the middle of a bitmap word.
    pub fn new(seed: u64) -> Self {
        Self {
            seed,
            strategy: Strategy::PreCopy,
            on_stuck: OnStuck::Stop,
            safety: None,
            streams: 2,
            reducers: Reducers::default(),
            verify: false,
            bandwidth_limit: None,
            downtime: Duration::from_millis(4),
            memory_pages: 2 * 8192 + 300,
            guest: GuestModel {
                writes_per_second: 20_000,
                working_set: 48,
                hot_set: 6,
                busy: Duration::from_millis(500),
                frees_one_in: 0,
            },
            network: NetworkModel { bandwidth: BytesPerSecond(100 << 20), latency: Duration::from_micros(100) },
            stall: Duration::from_secs(2),
            image_cost: Duration::from_micros(30),
            conflict: None,
            faults: Vec::new(),
            sabotage: None,
        }
    }

    /// Everything that a seed can choose: strategy, streams, writer rate and spread, link, limits, reducers.
    pub fn random(seed: u64) -> Self {
        let mut rng = Rng(seed ^ 0x5ce0);
        let mut scenario = Self::new(seed);
        use Strategy::{DemandPaging, Hybrid, PostCopy, PreCopy, StopAndCopy};
        let strategies = [PreCopy, PreCopy, PreCopy, StopAndCopy, PostCopy, Hybrid, DemandPaging];
        scenario.strategy = strategies[rng.below(7) as usize];
        scenario.streams = 1 + rng.below(3) as u16;
        scenario.guest.writes_per_second = [0, 300, 5_000, 20_000, 100_000][rng.below(5) as usize];
        scenario.guest.working_set = 8 + rng.below(80);
        scenario.guest.hot_set = 1 + rng.below(8);
        scenario.network.bandwidth = BytesPerSecond((4 << 20) << rng.below(8));
        scenario.network.latency = Duration::from_micros(20 << rng.below(8));
        scenario.downtime = Duration::from_millis(1 + rng.below(20));
        if rng.one_in(4) {
            scenario.bandwidth_limit = Some(BytesPerSecond((2 << 20) << rng.below(6)));
        }
        scenario.on_stuck = [OnStuck::Stop, OnStuck::Stun, OnStuck::PostCopy][rng.below(3) as usize];
        scenario.reducers = Reducers {
            // A marked page costs nothing here, a sent one much.
            zero_pages: true,
            compress: [Compress::None, Compress::None, Compress::Lz4, Compress::Auto][rng.below(4) as usize],
            delta_bytes: [0, 64 << 10, 64 << 20][rng.below(3) as usize],
            dedup: rng.one_in(2),
            skip_hot: rng.one_in(2),
            free_pages: rng.one_in(2),
        };
        scenario.guest.frees_one_in = [0, 2, 5][rng.below(3) as usize];
        scenario
    }

    /// Whether the VM may run at the target before its memory is there.
    pub fn may_run_owing(&self) -> bool {
        self.strategy.runs_owing() || (self.strategy == Strategy::PreCopy && self.on_stuck == OnStuck::PostCopy)
    }

    /// The same with one fault.
    pub fn with(mut self, trigger: Trigger, fault: Fault) -> Self {
        self.faults.push((trigger, fault));
        self
    }
}
