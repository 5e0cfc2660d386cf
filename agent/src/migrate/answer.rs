//! The target after its part has ended: answers a source that lost contact and asks what became of the VM.
//!
//! Contract: an answer repeats what the journal holds and changes nothing. Serve it for as long as a source may ask.

use std::time::Duration;

use super::message::{ControlMessage, TargetState};
use crate::model::MigrationId;
use crate::port::{Clock, JournalRecord, TargetLink};

/// For how long a source may still ask: its stall limit and its time in doubt, with a margin.
pub const ANSWER_LIMIT: Duration = Duration::from_secs(60);
/// How often waits look around.
const TICK: Duration = Duration::from_millis(500);

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
            | JournalRecord::Released { .. }
            | JournalRecord::Discarded
            | JournalRecord::Aborted => None,
        }
    }
}

/// Answers every question after migration `id` with `state`, for `patience`.
pub fn answer(
    link: &mut dyn TargetLink<ControlMessage>,
    id: MigrationId,
    state: TargetState,
    clock: &dyn Clock,
    patience: Duration,
) {
    let until = clock.now() + patience;
    let mut connected = true;
    while clock.now() < until {
        if !connected {
            connected = link.reaccept(TICK);
            continue;
        }
        match link.control().recv(TICK) {
            Ok(Some(ControlMessage::Query(asked))) if asked == id => {
                connected = link.control().send(&ControlMessage::State(state)).is_ok();
            }
            Ok(Some(_)) => {}
            // Whoever dials anew takes the place of a connection on which nothing moves.
            Ok(None) => drop(link.reaccept(Duration::ZERO)),
            Err(_) => connected = false,
        }
    }
}
