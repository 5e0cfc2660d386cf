//! What a host must remember of a migration across the death of any process: who may run the VM.

use std::io;

use serde::{Deserialize, Serialize};

use crate::model::{MigrationId, VmId};

/// A line of the journal. The last one of a migration decides.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "record")]
pub enum JournalRecord {
    /// Source: a manager has begun to move the VM away; it runs here.
    Offered,
    /// Target: resources are set aside; nothing is owed.
    Reserved,
    /// Target: it holds a complete VM and may complete the migration on the source's `commit`.
    Prepared,
    /// Source: the VM runs at the target on loan. It resumes here only when the target certainly runs it no more, or by an operator's word. Names the peer that has it.
    Lent {
        /// The target's address, for reconnecting.
        peer: String,
        /// So long after it was last prolonged the loan has certainly ended.
        lease_ms: u64,
    },
    /// Source: from here it never resumes by itself. Names the peer that may own the VM.
    Released {
        /// The target's address, for reconnecting.
        peer: String,
    },
    /// The VM runs here: the target after `commit`, or either side after `dunlin resolve --owner here`.
    Owner,
    /// Target: it can never run this VM (it lost the memory, or was told to let go).
    NeverOwner,
    /// Source: the VM runs at the target and everything here is gone.
    Discarded,
    /// Source: the attempt ended before `lent` or `released`; the VM runs here.
    Aborted,
}

impl JournalRecord {
    /// Whether the VM may run at another host, if this is the last of a migration.
    pub const fn leaves_doubt(&self) -> bool {
        matches!(self, Self::Lent { .. } | Self::Released { .. } | Self::Prepared)
    }

    /// Its word, as in the journal.
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Offered => "offered",
            Self::Reserved => "reserved",
            Self::Prepared => "prepared",
            Self::Lent { .. } => "lent",
            Self::Released { .. } => "released",
            Self::Owner => "owner",
            Self::NeverOwner => "never-owner",
            Self::Discarded => "discarded",
            Self::Aborted => "aborted",
        }
    }
}

/// A record that could not be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The file system refused; the record counts as not written.
    #[error("journal {path}: {action} failed")]
    Io {
        /// The file.
        path: String,
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file holds something that this version did not write.
    #[error("journal {path} line {line} is damaged: {problem}")]
    Damaged {
        /// The file.
        path: String,
        /// Counted from 1.
        line: usize,
        /// What is wrong with it.
        problem: String,
    },
}

/// The durable memory of one host.
pub trait Journal: Send {
    /// Writes a record and returns once it is on stable storage.
    ///
    /// # Errors
    /// The record must be taken as not written; a caller that has not passed the point of no return rolls back.
    fn append(&mut self, migration: MigrationId, vm: VmId, record: JournalRecord) -> Result<(), JournalError>;

    /// The last record of a migration.
    fn last(&self, migration: MigrationId) -> Result<Option<JournalRecord>, JournalError>;
}
