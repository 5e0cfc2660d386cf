//! What the two managers say to one another on the control stream (wire version 1).
//!
//! Every message is postcard-encoded; the link bounds its length before it is decoded. Counts inside are checked by
//! whoever acts on them.

use serde::{Deserialize, Serialize};

use crate::model::{
    BlackoutLedger, MachineShape, MigrationId, NetworkPlace, RegionSpec, RelayedFrame, TunnelOffer, WaitReport,
    WireguardKey, WireguardOffer,
};

/// The source's offer: everything that the target must be able to provide.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Offer {
    /// The migration.
    pub migration_id: MigrationId,
    /// The machine.
    pub shape: MachineShape,
    /// What has bytes to move.
    pub regions: Vec<RegionSpec>,
    /// Page streams that the source is going to open.
    pub streams: u16,
    /// Whether all memory is hashed while the VM is paused.
    pub verify: bool,
}

/// The target's acceptance: memory, devices and the waiting machine exist.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accept {
    /// How long the reservation took, in nanoseconds.
    pub reservation_ns: u64,
}

/// The last message of the stop-and-copy stage.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handed {
    /// CPU and device state, in the machine's own versioned and checksummed format.
    #[serde(with = "serde_bytes")]
    pub state: Vec<u8>,
    /// The round that was sent while the VM was paused.
    pub round: u32,
    /// [`crate::migrate::page_digest`] summed over every page of that round.
    pub digest: u64,
    /// Under `--verify`: a hash of every [`crate::migrate::chunk_hashes`] chunk of every region, in order.
    pub chunk_hashes: Vec<u64>,
}

/// The end of an increment: with its pages, which came before on the first page stream's way back, the VM as it was then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Increment {
    /// Counted from 1; later ones have higher numbers, and pages of those before them that are not known to be safe.
    pub number: u32,
    /// CPU and device state.
    #[serde(with = "serde_bytes")]
    pub state: Vec<u8>,
    /// Its pages.
    pub pages: u64,
    /// [`crate::migrate::page_digest`] summed over them.
    pub digest: u64,
    /// How long the VM stood for it.
    pub stood_ns: u64,
    /// How long it took until the target knew the one before to be safe; 0 if none was.
    pub safe_ns: u64,
}

/// What a target knows of a migration, asked for after contact was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum TargetState {
    /// It holds a complete VM and waits for `commit`.
    Prepared,
    /// It owns the VM; the guest runs or is about to.
    Owner,
    /// It can never run the VM.
    NeverOwner,
}

/// A message on the control stream.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ControlMessage {
    /// Source → target, first.
    Offer(Box<Offer>),
    /// Target → source: resources are set aside.
    Accept(Accept),
    /// Target → source: no, and why. Nothing was set aside.
    Refuse(String),
    /// Target → source: every stream has delivered its part of a round.
    RoundReceived(u32),
    /// Source → target: the VM is paused, its last pages are sent, here is its state.
    Handed(Box<Handed>),
    /// Target → source: the state is restored, digest and hashes agree, `prepared` is journaled.
    Prepared(BlackoutLedger),
    /// Source → target: `released` is journaled; run it.
    Commit,
    /// Target → source: the guest runs.
    Running(BlackoutLedger),
    /// Either way, before `commit`: stop, and why.
    Cancel(String),
    /// Source → target on a new connection: what do you know?
    Query(MigrationId),
    /// Target → source: the answer.
    State(TargetState),
    /// Source → target: answer with `Pong` of the same number.
    Ping(u32),
    /// Target → source.
    Pong(u32),
    /// Source → target, before the first round: a part of what the guest was booted from, in order.
    BootImage {
        /// The next bytes of it.
        #[serde(with = "serde_bytes")]
        part: Vec<u8>,
        /// It is complete with them.
        last: bool,
    },
    /// Source → target: the VM is about to be paused; get ready for what comes.
    Pausing,
    /// Source → target: the VM is to run before all of its memory is there. The last page stream is for requests.
    PostCopy,
    /// Target → source: the machine's faults are caught.
    FaultsCaught,
    /// Source → target, before `Handed`: one bit for each page that is still to come.
    Owing(#[serde(with = "serde_bytes")] Vec<u8>),
    /// Target → source, after `Running`: every page is there.
    Complete(WaitReport),
    /// Source → target on a new connection, after `Running`: go on with what is owed. Answered with `Owing`, or `Complete`.
    Recover {
        /// The migration.
        migration: MigrationId,
        /// Page streams that the source is going to open; the last is for requests.
        streams: u16,
    },
    /// Source → target, before the first round, if pages may come packed: how, by the names of [`crate::model::Packing`].
    Reducing(Vec<String>),
    /// Source → target, in place of `PostCopy`: the VM is to run on loan before all of its memory is there.
    SafePostCopy {
        /// For how long the VM is lent at a time.
        lease_ms: u64,
        /// How often an increment is to come, at most.
        every_ms: u64,
    },
    /// Source → target, in place of `Commit`: `lent` is journaled; run it on loan.
    Lend,
    /// Target → source: lend it for longer.
    Renew(u32),
    /// Source → target: it is; counted from when the `Renew` of that number was sent.
    Granted(u32),
    /// Target → source: an increment is complete.
    Increment(Box<Increment>),
    /// Source → target: it goes on from this increment if it must.
    Safe(u32),
    /// Source → target, before `Commit` or `Lend`: what the network still brings here for the VM will follow it.
    Relaying,
    /// Source → target, after `Running`: these frames came here.
    Frames(Vec<RelayedFrame>),
    /// Source → target: all that came until `Running` is among them.
    CaughtUp,
    /// Source → target: no more will follow.
    RelayOver,
    /// Source → target, before the first ping: the VM's ports are there, and what is seen of the network may be told.
    Place(NetworkPlace),
    /// Target → source, to one that has said `Place`: a [`crate::model::NetworkWord`].
    Network(String),
    /// Source → target, before the first round: the VM keeps its addresses by a tunnel, whose other end is there; make yours.
    Tunnel(Box<TunnelOffer>),
    /// Target → source: it is made, and answers.
    TunnelMade,
    /// Source → target, in place of `Tunnel`: the same through WireGuard.
    SecretTunnel(Box<(TunnelOffer, WireguardOffer)>),
    /// Target → source, in place of `TunnelMade`: its key.
    SecretTunnelMade(WireguardKey),
}

impl ControlMessage {
    /// The message's name, for errors and logs; never its content.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Offer(_) => "offer",
            Self::Accept(_) => "accept",
            Self::Refuse(_) => "refuse",
            Self::RoundReceived(_) => "round-received",
            Self::Handed(_) => "handed",
            Self::Prepared(_) => "prepared",
            Self::Commit => "commit",
            Self::Running(_) => "running",
            Self::Cancel(_) => "cancel",
            Self::Query(_) => "query",
            Self::State(_) => "state",
            Self::Ping(_) => "ping",
            Self::Pong(_) => "pong",
            Self::BootImage { .. } => "boot-image",
            Self::Pausing => "pausing",
            Self::PostCopy => "post-copy",
            Self::FaultsCaught => "faults-caught",
            Self::Owing(_) => "owing",
            Self::Complete(_) => "complete",
            Self::Recover { .. } => "recover",
            Self::Reducing(_) => "reducing",
            Self::SafePostCopy { .. } => "safe-post-copy",
            Self::Lend => "lend",
            Self::Renew(_) => "renew",
            Self::Granted(_) => "granted",
            Self::Increment(_) => "increment",
            Self::Safe(_) => "safe",
            Self::Relaying => "relaying",
            Self::Frames(_) => "frames",
            Self::CaughtUp => "caught-up",
            Self::RelayOver => "relay-over",
            Self::Place(_) => "place",
            Self::Network(_) => "network",
            Self::Tunnel(_) => "tunnel",
            Self::TunnelMade => "tunnel-made",
            Self::SecretTunnel(_) => "secret-tunnel",
            Self::SecretTunnelMade(_) => "secret-tunnel-made",
        }
    }
}
