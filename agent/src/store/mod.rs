//! Files that outlive a process: the journal. Owns fsync and file layout; must not know the handover rules.

mod journal;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) use journal::{fuzz_line, fuzz_seeds};

pub use journal::FileJournal;
