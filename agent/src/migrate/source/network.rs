//! What a target tells of the network: kept for the report, and waited for where it may forbid the move.
//!
//! Owns how long it is waited for. Nothing of it is waited for while the VM stands.

use std::time::Duration;

use super::{Source, SourceError, TICK, unexpected};
use crate::migrate::message::ControlMessage;
use crate::model::{AskedReport, Ending, NetworkReport, NetworkWord};
use crate::port::ControlChannel;

/// How long a VM that runs waits for the word whether it may come; then it moves, and its target decides.
const INQUIRY_LIMIT: Duration = Duration::from_secs(2);
/// How long the target's last word is waited for when all else is over: it waits 400 ms itself.
const LAST_WORD_LIMIT: Duration = Duration::from_secs(1);

/// What a target has told.
#[derive(Debug, Default)]
pub struct Heard {
    asking: bool,
    asked: Option<AskedReport>,
    last: Option<NetworkReport>,
    /// Rounds of announcements that left here, since the VM runs here again.
    rounds_here: u32,
}

impl Source<'_> {
    /// Says where the VM's ports are: the target takes them for no others, and tells what it sees.
    pub(super) fn tell_place(&self, control: &dyn ControlChannel<ControlMessage>) -> Result<(), SourceError> {
        match self.options.place {
            Some(place) => Ok(control.send(&ControlMessage::Place(place))?),
            None => Ok(()),
        }
    }

    /// Takes a word of the network; anything else is handed back.
    pub(super) fn hear_network(&mut self, message: ControlMessage) -> Option<ControlMessage> {
        let ControlMessage::Network(text) = message else { return Some(message) };
        match NetworkWord::read(&text) {
            Some(NetworkWord::Asking) => self.heard.asking = true,
            Some(NetworkWord::Asked(report)) => {
                for conflict in &report.conflicts {
                    tracing::warn!(vm = %self.shape.name, migration = %self.id, "at the target: {conflict}");
                }
                (self.heard.asking, self.heard.asked) = (false, Some(report));
            }
            Some(NetworkWord::Last(report)) => self.heard.last = Some(report),
            None => tracing::debug!(migration = %self.id, "a word of the network that is not understood"),
        }
        None
    }

    /// The VM still runs: a target that asks whether it may have it has the time to find out.
    pub(super) fn await_inquiry(&mut self, control: &dyn ControlChannel<ControlMessage>) -> Result<(), SourceError> {
        let until = self.clock.now() + INQUIRY_LIMIT;
        while self.heard.asking && self.clock.now() < until {
            if self.cancel.is_set() {
                return Err(SourceError::Cancelled);
            }
            if let Some(message) = control.recv(TICK)?
                && let Some(other) = self.obey(message)?
            {
                return Err(unexpected(&other, "network"));
            }
        }
        Ok(())
    }

    /// The target has refused the VM: what it says besides.
    pub(super) fn hear_why(&mut self) {
        let control = self.link.control();
        while self.options.place.is_some()
            && self.heard.asked.is_none()
            && let Ok(Some(message)) = control.recv(TICK)
        {
            drop(self.hear_network(message));
        }
    }

    /// The VM is about to run here again, and the network may have it elsewhere, or have been told nothing of it for some time: says where it is before its first instruction.
    /// Whoever started this sends the rounds that follow.
    pub(super) fn announce_here(&mut self) {
        match self.machine.announce() {
            // A VM without cards has nothing to say.
            Ok(frames) => self.heard.rounds_here += u32::from(frames > 0),
            Err(error) => {
                tracing::warn!(migration = %self.id, "the announcement of the old place failed: {error}");
            }
        }
    }

    /// All is over: what the target has seen of its bridges by now.
    pub(super) fn await_last_word(&mut self, ending: Ending) {
        if ending != Ending::Moved || self.options.place.is_none() {
            return;
        }
        let deadline = self.clock.now() + LAST_WORD_LIMIT;
        let control = self.link.control();
        while self.heard.last.is_none() && self.clock.now() < deadline {
            match control.recv(TICK) {
                Ok(Some(message)) => drop(self.hear_network(message)),
                Ok(None) => {}
                Err(error) => {
                    tracing::debug!(migration = %self.id, "the target does not say what it saw of the network: {error}");
                    return;
                }
            }
        }
    }

    /// What is known of the network.
    pub(super) fn network_report(&self) -> Option<NetworkReport> {
        let mut report = self.heard.last.clone().unwrap_or_default();
        report.asked = self.heard.asked.clone().or(report.asked);
        report.rounds_here = self.heard.rounds_here;
        (!report.is_empty()).then_some(report)
    }
}
