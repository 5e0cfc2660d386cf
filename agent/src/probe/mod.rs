//! Loads and attaches the BPF programs of `agent-ebpf`, reads their maps, and reads the kernel's structures through them. Thin; must not
//! know what a rate means.
//!
//! Nothing is pinned: when the process ends, however it ends, the kernel detaches and frees everything.

mod counters;
mod entry;
mod exit_reason;
mod hook;
mod inventory;
mod kernel_memory;
mod layout;
mod log;
mod mapped;
mod object;
mod probes;
mod runs;
pub mod syscall;
mod threads;
mod windows;
mod writes;

pub use counters::{KernelCounters, ProbeOptions, SharedProbes};
pub use hook::{Attach, Faster, Gives, HOOKS, Hook};
pub use inventory::InventoryError;
pub use kernel_memory::PeekError;
pub use layout::{Backend, KernelLayout};
pub use object::{NoObject, embedded_object};
pub use probes::{LoadOptions, ProbeError, Probes, ProgramCost, Tiers, Way};
