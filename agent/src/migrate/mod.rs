//! Moving a running VM: the six-stage state machine at both ends, its messages, convergence and pacing.
//!
//! Policy: generic over [`crate::port`], so a whole migration runs in a test with no KVM, no root and no network. The
//! two ends are written as the same list of stages: [`source`] and [`target`] can be read side by side.
//!
//! The data plane (page streams) is plain threads with blocking I/O; nothing here is async.

mod adapt;
mod answer;
mod bytes;
mod converge;
mod digest;
mod eta;
mod increment;
mod lap;
mod lease;
mod marks;
mod message;
mod meter;
mod observe;
mod options;
mod order;
pub mod outcomes;
mod owed;
#[cfg(test)]
mod owed_testing;
mod pacer;
mod pieces;
mod protect;
mod push;
mod reduce;
mod rounds;
pub mod source;
mod steward;
pub mod target;
mod zeros;

pub use adapt::{Adaptive, KEPT_TO};
pub use answer::{AnswerError, answer};
pub use converge::{Convergence, Verdict};
pub use digest::{chunk_hashes, page_digest};
pub use eta::{Eta, Going, eta};
pub use message::{Accept, ControlMessage, Handed, Increment, Offer, TargetState};
pub use observe::{CancelFlag, Observer, Quiet};
pub use options::{OnStuck, Safety, SourceOptions, Strategy};
pub use owed::GUEST_FIRST;
pub use pacer::{Pace, Pacer};
pub use reduce::{Compress, Reducers};
#[cfg(any(test, feature = "fuzz"))]
pub(crate) use reduce::{fuzz as fuzz_packed, fuzz_seeds as packed_seeds};
pub use steward::LOOK_EVERY;
pub use zeros::{BLOCK_PAGES, zero_bits};
