//! The link between two managers: one control channel, n bulk streams, all ordered and reliable.
//!
//! Control and final state have a stream of their own, so they never queue behind bulk pages.

use std::io;
use std::time::Duration;

use super::region::BytesView;
use crate::model::{PageRun, RegionId};

/// The link failed or the peer broke the protocol.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The stream ended or the kernel refused.
    #[error("the link to the peer failed while {doing}")]
    Io {
        /// What was being done.
        doing: &'static str,
        /// What the kernel said.
        #[source]
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
    /// Bytes that this protocol version cannot mean.
    #[error("the peer broke the protocol: {0}")]
    Protocol(String),
}

/// Messages, whole and in order. `M` is the policy's message type.
pub trait ControlChannel<M>: Send {
    /// Sends one message at once (never waits for Nagle).
    fn send(&mut self, message: &M) -> Result<(), LinkError>;

    /// Waits for one message; `Ok(None)` when `timeout` has passed without one.
    fn recv(&mut self, timeout: Duration) -> Result<Option<M>, LinkError>;
}

/// The sending end of one page stream.
pub trait BulkSender: Send {
    /// Sends the pages of `run`, read from `bytes`. Returns the bytes put on the wire.
    fn pages(&mut self, region: RegionId, run: PageRun, bytes: BytesView<'_>) -> Result<u64, LinkError>;

    /// Says that the pages of `run` are zero. Returns the bytes put on the wire.
    fn zeros(&mut self, region: RegionId, run: PageRun) -> Result<u64, LinkError>;

    /// Ends this stream's part of a round and pushes out what is buffered. Returns the bytes put on the wire.
    fn end_round(&mut self, round: u32) -> Result<u64, LinkError>;
}

/// What comes out of a page stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BulkItem {
    /// Pages follow; they must be taken with [`BulkReceiver::read_into`] before the next item. The run is the peer's
    /// word: check it.
    Pages(RegionId, PageRun),
    /// Pages that are zero. The run is the peer's word: check it.
    Zeros(RegionId, PageRun),
    /// This stream's part of the round has arrived.
    EndRound(u32),
    /// The peer closed the stream in order.
    Closed,
}

/// The receiving end of one page stream.
pub trait BulkReceiver: Send {
    /// Waits for the next item; fails with [`LinkError::Stalled`] when nothing moved for the stall limit *and* `keep_waiting`
    /// says no. It is asked about every quarter second.
    fn next(&mut self, keep_waiting: &mut dyn FnMut() -> bool) -> Result<BulkItem, LinkError>;

    /// Takes the bytes of the run announced last, straight into `target`.
    fn read_into(&mut self, target: BytesView<'_>) -> Result<(), LinkError>;
}
