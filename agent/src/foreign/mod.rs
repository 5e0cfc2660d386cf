//! KVM processes that are not ours, as the kernel shows them, and the monitors that they offer. Thin: one interface a file. None of it acts on a VM, but for
//! [`SoftDirty`], which takes a [`Permission`] for it, and what is ordered of a monitor ([`qmp`]).

pub mod maps;
pub mod memory;
pub mod nics;
mod permission;
pub mod process;
pub mod qmp;
pub mod soft_dirty;
mod vm_read;
pub mod vmm;

pub use memory::{GuessedRam, MemoryOpenError, ProcessMemory, guess_ram};
pub use permission::Permission;
pub use process::{KvmProcess, ProcessError};
pub use soft_dirty::{Granularity, SlotWrites, SoftDirty, SoftDirtyError};
