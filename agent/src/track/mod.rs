//! Tracking: turns counters and bitmaps into rates with their regime named, and curves into what they mean for a
//! migration: whether it would converge, and who keeps it from that. Policy: generic over ports.
//!
//! Must not know BPF, KVM or `/proc`: what is seen comes in through [`crate::port::EventSource`], or
//! is read through [`crate::port::GuestMemory`].

mod budget;
mod feasible;
mod fit;
mod observer;
mod rate;
mod regime;
mod rogue;
mod sampling;

pub use budget::{
    Action, BudgetJudge, BudgetReport, DEFAULT_BUDGET, Decision, MIN_INTERVALS_AWAY, ProgramCost, SourceSpec,
};
pub use feasible::{Feasibility, Forecast, Outlook, Terms, TermsError, forecast};
pub use fit::TwoClasses;
pub use observer::{ObserveError, Observer};
pub use rate::{DirtyRate, Lost, ThreadRate, rate_between};
pub use regime::{Protection, Regime};
pub use rogue::{DEFAULT_MARGIN, Observed, Patience, Ranked, Ranking, RogueChange, RogueWatch, rank};
pub use sampling::{
    Compression, SampledCurve, SampledHeat, SampledRegion, Sampler, SamplingError, SamplingOptions, UnreadableRange,
    WindowEstimate, ZeroPages,
};
