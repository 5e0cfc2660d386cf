//! The target after its part has ended: answers a source that lost contact and asks what became of the VM.
//!
//! Contract: an answer repeats what the journal holds and changes nothing. Serve it for as long as a source may ask.

use super::message::{ControlMessage, TargetState};
use crate::model::MigrationId;
use crate::port::{ControlChannel, Journal, JournalError, JournalRecord, LinkError};

/// A question that could not be answered; the source asks again.
#[derive(Debug, thiserror::Error)]
pub enum AnswerError {
    /// What happened cannot be read.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The source cannot be reached.
    #[error(transparent)]
    Link(#[from] LinkError),
}

impl TargetState {
    /// What a target's last record of a migration says. `None` where it says nothing that may be answered: no record,
    /// or a reservation that never became a VM (its source never released it).
    pub fn recorded(record: Option<&JournalRecord>) -> Option<Self> {
        match record? {
            JournalRecord::Prepared => Some(Self::Prepared),
            JournalRecord::Owner => Some(Self::Owner),
            JournalRecord::NeverOwner => Some(Self::NeverOwner),
            JournalRecord::Offered
            | JournalRecord::Reserved
            | JournalRecord::Lent { .. }
            | JournalRecord::Released { .. }
            | JournalRecord::Discarded
            | JournalRecord::Aborted => None,
        }
    }
}

/// Tells a source that asks what became of a migration. Of one that is not known here nothing is said, rather than a wrong
/// thing: unknown is no "never", since the journal may be on another disk.
///
/// # Errors
/// A journal that cannot be read, or a source that cannot be told.
pub fn answer(
    journal: &dyn Journal,
    asked: MigrationId,
    control: &dyn ControlChannel<ControlMessage>,
) -> Result<(), AnswerError> {
    let last = journal.last(asked)?;
    let Some(state) = TargetState::recorded(last.as_ref()) else {
        let last = last.as_ref().map_or("nothing", JournalRecord::name);
        tracing::warn!(migration = %asked, "asked about a migration of which the journal here says: {last}");
        return Ok(());
    };
    Ok(control.send(&ControlMessage::State(state))?)
}
