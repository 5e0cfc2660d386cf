//! Memory that two processes share: memory files, mappings of them, the dirty bitmap of a machine, and vectored I/O.
//!
//! Owns every `mmap` of guest memory outside [`crate::kvm`]. Must not know what the bytes mean. The unsafe code of the data plane lives here.

mod bitmap;
pub mod hugetlb;
mod memfd;
mod ram;
mod userfault;
mod vectored;

pub use bitmap::SharedBitmap;
pub use memfd::{Mapping, memory_file, ram_file};
pub use ram::RamRegion;
pub use userfault::{MappedAt, UserFaults};
pub use vectored::{Sink, Source};
