//! KVM processes that are not ours, as the kernel shows them. Thin: one interface a file; must not act on them.

pub mod process;
pub mod vmm;

pub use process::{KvmProcess, ProcessError};
