//! Tracking: turns counters and bitmaps into rates with their regime named. Policy: generic over ports.
//!
//! Must not know BPF, KVM or `/proc`: what is seen comes in through [`crate::port::EventSource`], or
//! is read through [`crate::port::GuestMemory`].

mod observer;
mod rate;
mod regime;
mod sampling;

pub use observer::{ObserveError, Observer};
pub use rate::{DirtyRate, Lost, ThreadRate, rate_between};
pub use regime::Regime;
pub use sampling::{
    Compression, SampledCurve, Sampler, SamplingError, SamplingOptions, UnreadableRange, WindowEstimate, ZeroPages,
};
