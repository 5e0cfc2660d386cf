//! Loads and attaches the BPF programs of `agent-ebpf` and reads their maps. Thin; must not know what a rate means.
//!
//! Nothing is pinned: when the process ends, however it ends, the kernel detaches and frees everything.

mod counters;
mod exit_reason;
mod hook;
mod log;
mod mapped;
mod object;
pub mod syscall;

pub use counters::{KernelCounters, ProbeError, ProbeOptions};
pub use hook::{HOOKS, Hook};
pub use object::{NoObject, embedded_object};
