//! Memory that two processes share: memory files, mappings of them, and the dirty bitmap of a machine.
//!
//! Owns every `mmap` of guest memory outside [`crate::kvm`]. Must not know what the bytes mean. The unsafe code of the data plane lives here.

mod bitmap;
mod memfd;
mod ram;

pub use bitmap::SharedBitmap;
pub use memfd::{Mapping, memory_file};
pub use ram::RamRegion;
