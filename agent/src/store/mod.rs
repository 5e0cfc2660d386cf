//! Files that outlive a process: the journal, the log of migrations that are over, and recordings of what tracking saw. Owns fsync and file layout; must not know the
//! handover rules, nor what figures are made of a recording.

pub(crate) mod history;
mod journal;
pub mod recording;

#[cfg(any(test, feature = "fuzz"))]
pub(crate) use journal::{fuzz_line, fuzz_seeds};

pub use history::{History, HistoryLog};
pub use journal::FileJournal;
