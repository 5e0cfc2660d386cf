//! Files that outlive a process: the journal. Owns fsync and file layout; must not know the handover rules.

mod journal;

pub use journal::FileJournal;
