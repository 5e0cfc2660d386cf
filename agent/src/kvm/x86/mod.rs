//! What is x86 about a machine: ACPI tables, CPUID, start-up state, CPU and interrupt-controller state, MSRs, time.
//!
//! Must not know threads, devices or the container that states are kept in.

pub mod acpi;
pub mod cpuid;
pub(super) mod essential;
pub mod msr;
pub mod start;
pub mod state;
pub mod time;
pub(super) mod timer;
