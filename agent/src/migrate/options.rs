//! What an operator asks of a migration.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::reduce::Reducers;
use crate::model::{BytesPerSecond, NetworkPlace, PageCount};
use crate::stun::{STRETCH, StunPolicy};

/// How memory moves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Strategy {
    /// Rounds while the VM runs, a short pause for the rest (Clark et al., NSDI 2005).
    #[default]
    PreCopy,
    /// The VM is paused first; everything moves once.
    StopAndCopy,
    /// The VM moves first, and its pages follow only as it asks for them, until it is told to finish (Zayas, "Attacking the Process Migration Bottleneck", SOSP 1987).
    DemandPaging,
    /// The VM moves first, its pages follow: as it asks for them, and in between (Hines et al., SIGOPS OSR 43(3), 2009).
    PostCopy,
    /// Some rounds of pre-copy, then post-copy of the rest.
    Hybrid,
}

impl Strategy {
    /// Whether rounds are sent while the VM runs at the source.
    pub fn has_rounds(self) -> bool {
        matches!(self, Self::PreCopy | Self::Hybrid)
    }

    /// Whether the VM runs at the target before its memory is there.
    pub fn runs_owing(self) -> bool {
        matches!(self, Self::DemandPaging | Self::PostCopy | Self::Hybrid)
    }
}

impl fmt::Display for Strategy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PreCopy => "pre-copy",
            Self::StopAndCopy => "stop-and-copy",
            Self::DemandPaging => "demand-paging",
            Self::PostCopy => "post-copy",
            Self::Hybrid => "hybrid",
        })
    }
}

impl FromStr for Strategy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "pre-copy" => Ok(Self::PreCopy),
            "stop-and-copy" => Ok(Self::StopAndCopy),
            "demand-paging" => Ok(Self::DemandPaging),
            "post-copy" => Ok(Self::PostCopy),
            "hybrid" => Ok(Self::Hybrid),
            _ => Err(format!(
                "`{text}` is no strategy; write pre-copy, stop-and-copy, demand-paging, post-copy or hybrid"
            )),
        }
    }
}

/// What to do when pre-copy does not end by itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnStuck {
    /// Pause the VM and send what is left, however long that takes.
    #[default]
    Stop,
    /// Slow the writers that keep it from ending, by just enough; if that is not enough, pause the VM.
    Stun,
    /// Move the VM at once; what is left follows it.
    PostCopy,
    /// Leave the VM where it is.
    Cancel,
}

impl fmt::Display for OnStuck {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Stop => "stop",
            Self::Stun => "stun",
            Self::PostCopy => "post-copy",
            Self::Cancel => "cancel",
        })
    }
}

impl FromStr for OnStuck {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "stop" => Ok(Self::Stop),
            "stun" => Ok(Self::Stun),
            "post-copy" => Ok(Self::PostCopy),
            "cancel" => Ok(Self::Cancel),
            _ => Err(format!("`{text}` is nothing that can be done about it; write stop, stun, post-copy or cancel")),
        }
    }
}

/// How a VM is kept safe that runs at its target before its memory is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Safety {
    /// For how long the VM is lent at a time: so long after contact was lost it goes on at the source.
    pub lease: Duration,
    /// How often the target sends an increment, at most: what is lost with it.
    pub every: Duration,
}

impl Safety {
    /// Leases and intervals between these make sense.
    pub const LEASES: std::ops::RangeInclusive<Duration> = Duration::from_millis(500)..=Duration::from_secs(60);
    /// Between these.
    pub const INTERVALS: std::ops::RangeInclusive<Duration> = Duration::from_millis(5)..=Duration::from_secs(10);
}

impl Default for Safety {
    fn default() -> Self {
        Self { lease: Duration::from_secs(3), every: Duration::from_millis(100) }
    }
}

/// The options of one migration, as its source follows them.
#[derive(Clone, Debug)]
pub struct SourceOptions {
    /// How memory moves.
    pub strategy: Strategy,
    /// The most that all page streams together may send; `None` is as fast as the link goes.
    pub bandwidth: Option<BytesPerSecond>,
    /// Where that limit may rise to, as the VM dirties more; `None`: it stays.
    pub bandwidth_max: Option<BytesPerSecond>,
    /// The blackout to stay below, all fixed costs included.
    pub downtime: Duration,
    /// What switching over is expected to cost besides the last pages: taken off the budget.
    pub fixed_cost: Duration,
    /// After so many rounds pre-copy gives up and stops the VM for the rest.
    pub max_rounds: u32,
    /// Rounds of [`Strategy::Hybrid`] before the VM moves.
    pub hybrid_rounds: u32,
    /// What to do when pre-copy does not end by itself.
    pub on_stuck: OnStuck,
    /// The VM runs at the target on loan while it is owed pages, and can go on here until all is there.
    pub safety: Option<Safety>,
    /// How the writers may be slowed, if they may.
    pub stun: StunPolicy,
    /// By when slowed writers must let pre-copy end, in times that sending all memory once takes; above 1.
    pub stun_stretch: f64,
    /// Parallel page streams, at least 1.
    pub streams: u16,
    /// What is done so that fewer bytes travel.
    pub reducers: Reducers,
    /// What the guest is to go on with of its memory from before the first round to the end.
    pub squeeze_to: Option<PageCount>,
    /// How long the guest may take for that; then it goes on with what was got.
    pub squeeze_limit: Duration,
    /// Hash all memory while the VM is paused, and compare.
    pub verify: bool,
    /// Nothing moving for this long counts as a stalled peer.
    pub stall: Duration,
    /// For how long a target is dialled that may hold the VM: in doubt before the question is left to an operator, and
    /// after a rollback until it has let its copy go.
    pub doubt: Duration,
    /// For how long what the network still brings here for the VM is carried on, at most; zero: not at all.
    pub relay: Duration,
    /// The target's address, kept in the journal for reconnecting.
    pub peer: String,
    /// Where the VM's network ports are; `None`: the target is not told, and tells nothing of the network.
    pub place: Option<NetworkPlace>,
}

impl SourceOptions {
    /// Whether the VM may run at the target before its memory is there.
    pub fn may_run_owing(&self) -> bool {
        self.strategy.runs_owing() || (self.strategy == Strategy::PreCopy && self.on_stuck == OnStuck::PostCopy)
    }
}

impl Default for SourceOptions {
    fn default() -> Self {
        Self {
            strategy: Strategy::PreCopy,
            bandwidth: None,
            bandwidth_max: None,
            downtime: Duration::from_millis(30),
            fixed_cost: Duration::from_millis(3),
            max_rounds: 30,
            hybrid_rounds: 1,
            on_stuck: OnStuck::Stop,
            safety: None,
            stun: StunPolicy::default(),
            stun_stretch: STRETCH,
            streams: 2,
            reducers: Reducers::default(),
            squeeze_to: None,
            squeeze_limit: Duration::from_secs(30),
            verify: false,
            stall: Duration::from_secs(10),
            doubt: Duration::from_secs(20),
            relay: Duration::from_secs(2),
            peer: String::new(),
            place: None,
        }
    }
}
