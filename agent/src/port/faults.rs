//! The faults of a VM that runs before all of its memory is here.

use std::io;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use crate::model::PageRun;

/// A fault cannot be taken or resolved.
#[derive(Debug, thiserror::Error)]
pub enum FaultError {
    /// A page of the run is not in memory: it is to be mapped as zeros, or filled first.
    #[error("a page that is to be mapped is not in memory")]
    NotThere,
    /// The machine's process has ended.
    #[error("the machine is gone")]
    Gone,
    /// The kernel.
    #[error("userfaultfd: {0}")]
    Io(io::Error),
}

/// Whoever touches a page that is not mapped waits until somebody maps it here. Any thread may call anything.
pub trait Faults: Send + Sync {
    /// Waits for faults, at most `timeout`; puts their pages into `pages`, which may stay empty.
    ///
    /// # Errors
    /// The machine is gone, or the kernel.
    fn next(&self, pages: &mut Vec<u64>, timeout: Duration) -> Result<(), FaultError>;

    /// Pages that are mapped together, a power of two: one that is missing keeps the others from being mapped. 512 where RAM is of huge pages.
    fn block_pages(&self) -> u64 {
        1
    }

    /// Maps pages that are in memory, and wakes who waits for them; those that are mapped stay so. Whole blocks.
    ///
    /// # Errors
    /// [`FaultError::NotThere`] if one is not in memory: those before it are mapped.
    fn map(&self, run: PageRun) -> Result<(), FaultError>;

    /// Maps pages that are not in memory as zeros, and wakes who waits for them. Not where blocks are of several pages: those get their memory first.
    ///
    /// # Errors
    /// The machine is gone, or the kernel.
    fn map_zero(&self, run: PageRun) -> Result<(), FaultError>;

    /// One bit a page, the lowest of the first word being the first page: it is here, and fit to be mapped. Kept by the machine: whoever takes the place of a manager that
    /// died reads there what had come. All is unset at first.
    fn here(&self) -> &[AtomicU64];

    /// All of memory is here: nobody waits any more, and what is not in memory reads as zeros.
    ///
    /// # Errors
    /// The machine is gone, or the kernel.
    fn end(&self) -> Result<(), FaultError>;
}
