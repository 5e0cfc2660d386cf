//! A guest's memory, read from outside while the guest runs.

use crate::model::{Gpa, MemoryRange};

/// Why guest memory could not be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GuestMemoryError {
    /// No RAM is there.
    #[error("guest physical address {0} is no RAM of this VM")]
    NotRam(Gpa),
    /// It is there and cannot be read (secret memory, a guest_memfd, rights).
    #[error("guest memory at {at} cannot be read: {reason}")]
    Unreadable {
        /// Where.
        at: Gpa,
        /// What the kernel said, and what would help.
        reason: String,
    },
    /// The VM has ended.
    #[error("the VM has ended")]
    Gone,
}

/// The RAM of a running VM. What is read may be torn: the guest writes meanwhile. What was never written reads as zeros, and reading
/// does not make it use memory.
pub trait GuestMemory: Send {
    /// All of it, in order, not overlapping, not touching.
    fn ranges(&self) -> &[MemoryRange];

    /// Fills `into` with the bytes from `at` on.
    ///
    /// # Errors
    /// Not all of them are RAM of the VM, they cannot be read, or the VM has ended. `into` may be partly filled then.
    fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), GuestMemoryError>;

    /// Fills each buffer from its address; in fewer system calls than one by one, where that is possible.
    ///
    /// # Errors
    /// As [`GuestMemory::read`].
    fn read_many(&self, what: &mut [(Gpa, &mut [u8])]) -> Result<(), GuestMemoryError> {
        what.iter_mut().try_for_each(|(at, into)| self.read(*at, into))
    }
}
