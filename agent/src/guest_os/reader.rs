//! Guest memory with a budget: what the guest's own structures send the reader to is bounded, whatever they say.
//!
//! Owns the budget and the sorting of what can go wrong. Must not know what is read.

use std::cell::Cell;

use crate::model::Gpa;
use crate::port::{GuestMemory, GuestMemoryError};

/// What a read costs beside its bytes: about what the system call takes, in bytes copied meanwhile.
const READ_COST_BYTES: u64 = 256;

/// Why something was not read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ReadError {
    /// The guest maps nothing there, or no RAM: what led here is no pointer.
    Unmapped,
    /// The budget is used up.
    Exhausted,
    /// The VM has ended, or its memory cannot be read at all.
    Memory(GuestMemoryError),
}

/// Reads of one piece of work.
pub(super) struct Reader<'a> {
    memory: &'a dyn GuestMemory,
    left_bytes: Cell<u64>,
}

impl<'a> Reader<'a> {
    /// At most `budget_bytes` will be read, each read counted as a little more than it is.
    pub(super) fn new(memory: &'a dyn GuestMemory, budget_bytes: u64) -> Self {
        Self { memory, left_bytes: Cell::new(budget_bytes) }
    }

    /// Fills `into` from `at` on.
    pub(super) fn read(&self, at: Gpa, into: &mut [u8]) -> Result<(), ReadError> {
        self.pay(1, into.len())?;
        self.memory.read(at, into).map_err(sorted)
    }

    /// Fills each buffer from its address.
    pub(super) fn read_many(&self, what: &mut [(Gpa, &mut [u8])]) -> Result<(), ReadError> {
        self.pay(what.len(), what.iter().map(|(_, into)| into.len()).sum())?;
        self.memory.read_many(what).map_err(sorted)
    }

    /// The eight bytes at `at`, as x86 orders them.
    pub(super) fn word(&self, at: Gpa) -> Result<u64, ReadError> {
        let mut bytes = [0; 8];
        self.read(at, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    fn pay(&self, reads: usize, bytes: usize) -> Result<(), ReadError> {
        let cost = (reads as u64 * READ_COST_BYTES).saturating_add(bytes as u64);
        let left = self.left_bytes.get().checked_sub(cost).ok_or(ReadError::Exhausted);
        self.left_bytes.set(*left.as_ref().unwrap_or(&0));
        left.map(|_| ())
    }
}

fn sorted(error: GuestMemoryError) -> ReadError {
    match error {
        GuestMemoryError::NotRam(_) => ReadError::Unmapped,
        other => ReadError::Memory(other),
    }
}
