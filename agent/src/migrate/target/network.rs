//! What a target finds out of the network beside a migration: whether somebody else has the VM's addresses, and whether its bridges follow. Told to a source that can hear it.
//!
//! Owns when it is looked at and told. The network itself is the host's: see [`super::Host`].

use std::time::Duration;

use super::{TICK, Target, TargetError};
use crate::migrate::message::ControlMessage;
use crate::model::{AskedReport, MigrationId, NetworkPlace, NetworkReport, NetworkWord};
use crate::port::ControlChannel;

/// How often it is looked whether the network has answered.
const LOOK: Duration = Duration::from_millis(10);
/// A VM that stands already waits so long for that at most: its source did not know that it should.
const LATE_LIMIT: Duration = Duration::from_millis(500);
/// How long after the VM began to run bridges and neighbours may take before the last word is said.
const LAST_WORD: Duration = Duration::from_millis(400);

/// Whether somebody else has what a VM has.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Asked {
    /// Nobody asks.
    Not,
    /// It is not known yet.
    Pending,
    /// It is; told once.
    Known {
        /// What came of it.
        report: AskedReport,
        /// Why the VM is not taken, if it is not.
        refusal: Option<String>,
    },
}

/// What a target has found out and told.
#[derive(Debug, Default)]
pub struct Telling {
    /// The source hears it.
    tells: bool,
    /// Nothing more comes of asking.
    settled: bool,
    /// Why the VM is not taken, in full, until the source has been told.
    refused: Option<AskedReport>,
    ran_at: Duration,
}

impl Target<'_> {
    /// The source has said where the VM's ports are.
    pub(super) fn hear_place(
        &mut self,
        place: NetworkPlace,
        control: &dyn ControlChannel<ControlMessage>,
    ) -> Result<(), TargetError> {
        self.telling.tells = true;
        self.host.note_former_place(place);
        if !self.telling.settled && self.host.may_refuse() {
            control.send(&ControlMessage::Network(NetworkWord::Asking.to_text()))?;
        }
        Ok(())
    }

    /// How long the source may be waited for before it is looked again.
    pub(super) fn look_pause(&self) -> Duration {
        if self.telling.settled { TICK } else { LOOK }
    }

    /// Whether the network has answered: tells the source, and gives up if the VM cannot be taken.
    pub(super) fn look_at_inquiry(&mut self, control: &dyn ControlChannel<ControlMessage>) -> Result<(), TargetError> {
        if self.telling.settled {
            return Ok(());
        }
        match self.host.asked() {
            Asked::Pending => return Ok(()),
            Asked::Not => {}
            Asked::Known { report, refusal: Some(reason) } => {
                self.telling.refused = Some(report);
                return Err(TargetError::Conflict(reason));
            }
            Asked::Known { report, refusal: None } if self.telling.tells => {
                control.send(&ControlMessage::Network(NetworkWord::Asked(report).to_text()))?;
            }
            Asked::Known { .. } => {}
        }
        self.telling.settled = true;
        Ok(())
    }

    /// Before `prepared`: whether the VM may be taken must be known by now.
    pub(super) fn settle_inquiry(&mut self) -> Result<(), TargetError> {
        let control = self.link.control();
        let until = self.clock.now() + LATE_LIMIT;
        loop {
            self.look_at_inquiry(control.as_ref())?;
            if self.telling.settled || !self.host.may_refuse() || self.clock.now() >= until {
                return Ok(());
            }
            self.clock.sleep(LOOK);
        }
    }

    /// Tells the source that `error` is the end of it.
    pub(super) fn tell_end(&mut self, error: &TargetError) {
        let control = self.link.control();
        let told = match error {
            TargetError::Conflict(reason) if self.telling.tells => {
                let word = self.telling.refused.take().map(NetworkWord::Asked);
                control.send(&ControlMessage::Refuse(reason.clone())).and_then(|()| match word {
                    Some(word) => control.send(&ControlMessage::Network(word.to_text())),
                    None => Ok(()),
                })
            }
            _ => control.send(&ControlMessage::Cancel(error.to_string())),
        };
        if let Err(unheard) = told {
            tracing::debug!("the source does not hear the end: {unheard}");
        }
    }

    /// The VM runs from now on.
    pub(super) fn note_run(&mut self) {
        if self.telling.ran_at.is_zero() {
            self.telling.ran_at = self.clock.now();
        }
    }

    /// The VM is here and all is over: says what its bridges have done by now.
    pub(super) fn tell_last(&mut self, id: MigrationId) {
        if !self.telling.tells {
            return;
        }
        let until = self.telling.ran_at + LAST_WORD;
        let report: NetworkReport = loop {
            let is_late = self.clock.now() >= until;
            match self.host.network(is_late) {
                Some(report) => break report,
                None if is_late => break NetworkReport::default(),
                None => self.clock.sleep(LOOK),
            }
        };
        let word = NetworkWord::Last(report).to_text();
        if let Err(error) = self.link.control().send(&ControlMessage::Network(word)) {
            tracing::debug!(migration = %id, "the source does not hear what was seen of the network: {error}");
        }
    }
}
