//! Really trying what this host can do: one kernel interface a file, each trial the smallest use that would fail if the
//! real one did.
//!
//! Mechanism: leaves nothing behind, and must not know which trial matters to whom; that is the table of
//! [`crate::service::doctor`].

pub mod bpf;
pub mod capabilities;
pub mod files;
pub mod kvm;
pub mod memory;
pub mod net;
#[cfg(target_arch = "x86_64")]
pub mod tiny_vm;
mod verdict;

pub use verdict::Verdict;
