//! Whole migrations in virtual time, from a seed: both managers' real code over simulated ports.
//!
//! Threads are real, but one runs at a time and time is virtual: the same seed gives the same order of events, faults
//! included. After every run the invariants of the design are checked. Compiled for tests and under the feature `sim`.
//!
//! Stands above `migrate`; nothing but tests and prediction may import it.

mod faults;
mod link;
mod machine;
mod memory;
mod network;
mod rng;
mod run;
mod scenario;
mod scheduler;
#[cfg(test)]
mod tests;
mod world;

pub use run::{Run, simulate};
pub use scenario::{Fault, GuestModel, NetworkModel, Sabotage, Scenario, Side, Trigger};
