//! Stun: slows the writers that keep a VM from converging, by just enough, and nobody else. Policy: generic over ports.
//!
//! `budget` says what all may write; `share` divides it; `controller` looks at what was written, ten times a second, and says what each vCPU may write
//! until it looks again. Must not know how a vCPU is held.

mod budget;
mod controller;
mod share;

pub use budget::{Budget, Remaining, STRETCH, steady};
pub use controller::{Controller, StunPolicy};
pub use share::{Demand, share};
