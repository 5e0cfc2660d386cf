//! The link between two managers: one control channel, n bulk streams, all ordered and reliable.
//!
//! Control and final state have a stream of their own, so they never queue behind bulk pages.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use super::region::BytesView;
use crate::model::{BytesPerSecond, MigrationId, Packing, PageRun, RegionId};

/// The link failed or the peer broke the protocol.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The stream ended or the kernel refused.
    #[error("the link to the peer failed while {doing}: {source}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Nothing moved for longer than the stall limit.
    #[error("the peer stalled: nothing moved for {after:?} while {doing}")]
    Stalled {
        /// What was being done.
        doing: &'static str,
        /// The limit.
        after: Duration,
    },
    /// The link is not encrypted as it should be, or the peers do not trust one another.
    #[error("the link is not secured: {0}")]
    Encryption(String),
    /// Bytes that this protocol version cannot mean.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
}

/// Messages, whole and in order. `M` is the policy's message type. One thread receives; any may send.
pub trait ControlChannel<M>: Send + Sync {
    /// Sends one message at once (never waits for Nagle).
    fn send(&self, message: &M) -> Result<(), LinkError>;

    /// Waits for one message; `Ok(None)` when `timeout` has passed without the start of one.
    fn recv(&self, timeout: Duration) -> Result<Option<M>, LinkError>;
}

/// The control channel of a target's link that nobody has dialled yet.
#[derive(Clone, Copy, Debug)]
pub struct Unconnected;

impl<M> ControlChannel<M> for Unconnected {
    fn send(&self, _: &M) -> Result<(), LinkError> {
        Err(LinkError::Io { doing: "sending a message", source: io::ErrorKind::NotConnected.into() })
    }

    fn recv(&self, _: Duration) -> Result<Option<M>, LinkError> {
        Err(LinkError::Io { doing: "receiving a message", source: io::ErrorKind::NotConnected.into() })
    }
}

/// The source's end of a link that has been dialled.
pub trait SourceLink<M>: Send {
    /// The control channel.
    fn control(&self) -> Arc<dyn ControlChannel<M>>;

    /// Opens page stream `index` of a migration. The stream is warmed up when this returns.
    fn open_bulk(&mut self, migration: MigrationId, index: u16) -> Result<Box<dyn BulkSender>, LinkError>;

    /// Dials the same peer again after the control channel was lost, once.
    fn redial(&mut self) -> Result<(), LinkError>;
}

/// The target's end of a link.
pub trait TargetLink<M>: Send {
    /// The control channel.
    fn control(&self) -> Arc<dyn ControlChannel<M>>;

    /// Waits until all `streams` page streams of a migration have been opened, in any order.
    fn accept_bulk(
        &mut self,
        migration: MigrationId,
        streams: u16,
        timeout: Duration,
    ) -> Result<Vec<Box<dyn BulkReceiver>>, LinkError>;

    /// Waits up to `timeout` for the peer to dial again; `true` when there is a new control channel.
    fn reaccept(&mut self, timeout: Duration) -> bool;
}

/// The sending end of one page stream.
pub trait BulkSender: Send {
    /// Begins this stream's part of a round. A `digested` round is the last one: the target hashes what it receives.
    fn start_round(&mut self, round: u32, digested: bool) -> Result<u64, LinkError>;

    /// Sends the pages of `run`, read from `bytes`. Returns the bytes put on the wire.
    fn pages(&mut self, region: RegionId, run: PageRun, bytes: BytesView<'_>) -> Result<u64, LinkError>;

    /// Sends the pages of `run` from a copy of them. Returns the bytes put on the wire.
    fn copied(&mut self, region: RegionId, run: PageRun, bytes: &[u8]) -> Result<u64, LinkError>;

    /// Sends what the pages of `run` were packed into, which is shorter than they are. Returns the bytes put on the wire.
    fn packed(&mut self, region: RegionId, run: PageRun, packing: Packing, bytes: &[u8]) -> Result<u64, LinkError>;

    /// Says that the pages of `run` are zero. Returns the bytes put on the wire.
    fn zeros(&mut self, region: RegionId, run: PageRun) -> Result<u64, LinkError>;

    /// Ends this stream's part of a round and pushes out what is buffered. Returns the bytes put on the wire.
    fn end_round(&mut self, round: u32) -> Result<u64, LinkError>;

    /// Asks for pages at once. Returns the bytes put on the wire.
    fn want(&mut self, region: RegionId, run: PageRun) -> Result<u64, LinkError>;

    /// Has the kernel send no faster than this, where it can; `None`: as fast as it goes. A hint that smooths what the sender keeps to anyway.
    fn pace(&mut self, _limit: Option<BytesPerSecond>) {}

    /// Pushes out what is buffered.
    fn flush(&mut self) -> Result<(), LinkError>;

    /// What the other end sends back on this stream; once.
    fn answers(&mut self) -> Result<Box<dyn BulkReceiver>, LinkError>;
}

/// What comes out of a page stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BulkItem {
    /// This stream's part of a round begins.
    StartRound {
        /// The round, counted from 1.
        round: u32,
        /// Whether the round's pages are hashed on arrival; no round follows.
        digested: bool,
    },
    /// Pages follow; they must be taken with [`BulkReceiver::read_into`] before the next item. The run is the peer's
    /// word: check it.
    Pages(RegionId, PageRun),
    /// Pages that are zero. The run is the peer's word: check it.
    Zeros(RegionId, PageRun),
    /// This stream's part of the round has arrived.
    EndRound(u32),
    /// The other end wants these pages. The run is the peer's word: check it.
    Want(RegionId, PageRun),
    /// Pages follow that were packed into so many bytes, fewer than the pages have; they must be taken with [`BulkReceiver::read_packed`] before the
    /// next item. The run is the peer's word: check it.
    Packed(RegionId, PageRun, Packing, u32),
}

/// The receiving end of one page stream. Whenever nothing arrives for a quarter second, `keep_waiting` is asked; its
/// "no" ends the wait with [`LinkError::Stalled`].
pub trait BulkReceiver: Send {
    /// Waits for the next item. The peer's closing of the stream is an error: a migration ends its streams itself.
    fn next(&mut self, keep_waiting: &mut dyn FnMut() -> bool) -> Result<BulkItem, LinkError>;

    /// Takes the bytes of the run announced last, straight into `target`.
    fn read_into(&mut self, target: BytesView<'_>, keep_waiting: &mut dyn FnMut() -> bool) -> Result<(), LinkError>;

    /// Takes the bytes of the packed run announced last; `target` has as many.
    fn read_packed(&mut self, target: &mut [u8], keep_waiting: &mut dyn FnMut() -> bool) -> Result<(), LinkError>;

    /// The way back on this stream; once.
    fn back(&mut self) -> Result<Box<dyn BulkSender>, LinkError>;
}
