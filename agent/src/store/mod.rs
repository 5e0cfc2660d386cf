//! Files that outlive a process: the journal, and recordings of what tracking saw. Owns fsync and file layout; must not know the
//! handover rules, nor what figures are made of a recording.

mod journal;
pub mod recording;

#[cfg(any(test, feature = "fuzz"))]
pub(crate) use journal::{fuzz_line, fuzz_seeds};

pub use journal::FileJournal;
