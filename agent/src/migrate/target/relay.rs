//! Frames that came to the VM's former place, taken in while the VM runs here, or is about to.

use std::time::Duration;

use super::{TICK, Target};
use crate::migrate::message::ControlMessage;
use crate::model::MigrationId;
use crate::port::{Fate, Machine, MachineError};

/// How long a source that relays may be silent: it relays for a shorter time.
const PATIENCE: Duration = Duration::from_secs(5);

/// How far a relay is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RelayPhase {
    /// There is none, or it is over.
    #[default]
    Off,
    /// The source will relay when the VM runs.
    Due,
    /// The VM runs, and what comes through its port waits for frames from there.
    On,
    /// What still comes comes late.
    Late,
}

impl RelayPhase {
    /// How often whoever does something else meanwhile is to look whether frames have come.
    pub(super) fn pause(self) -> Duration {
        match self {
            Self::On => Duration::from_millis(1),
            Self::Late => Duration::from_millis(10),
            Self::Off | Self::Due => Duration::MAX,
        }
    }
}

impl Target<'_> {
    /// Takes what is said of a relay; anything else is handed back.
    pub(super) fn hear_relay(
        &mut self,
        id: MigrationId,
        message: ControlMessage,
        machine: &mut dyn Machine,
    ) -> Option<ControlMessage> {
        let done = match message {
            ControlMessage::Relaying => {
                self.relay = RelayPhase::Due;
                Ok(())
            }
            ControlMessage::Frames(frames) => machine.relay(frames),
            ControlMessage::CaughtUp => {
                self.relay = RelayPhase::Late;
                machine.caught_up()
            }
            ControlMessage::RelayOver => self.end_relay(machine),
            other => return Some(other),
        };
        if let Err(error) = done {
            tracing::warn!(migration = %id, "relayed frames are lost: {error}");
        }
        None
    }

    /// Before the first announcement: what comes by two ways is put in order from now on.
    pub(super) fn begin_relay(&mut self, id: MigrationId, machine: &mut dyn Machine) {
        if self.relay == RelayPhase::Due {
            self.relay = RelayPhase::On;
            if let Err(error) = machine.await_relay() {
                tracing::warn!(migration = %id, "frames are not relayed: {error}");
            }
        }
    }

    fn end_relay(&mut self, machine: &mut dyn Machine) -> Result<(), MachineError> {
        self.relay = RelayPhase::Off;
        machine.end_relay()
    }

    /// The VM is here, whole, and runs: stays for what is still relayed.
    pub(super) fn stay_for_relay(&mut self, id: MigrationId, machine: &mut dyn Machine) {
        let mut heard_at = self.clock.now();
        while matches!(self.relay, RelayPhase::On | RelayPhase::Late) {
            match self.link.control().recv(TICK) {
                Ok(Some(message)) => {
                    heard_at = self.clock.now();
                    if let Some(other) = self.hear_relay(id, message, machine) {
                        tracing::debug!(migration = %id, got = other.name(), "ignored beside relayed frames");
                    }
                }
                Ok(None) if self.clock.now().saturating_sub(heard_at) < PATIENCE && machine.fate() != Fate::Dead => {}
                Ok(None) | Err(_) => {
                    if let Err(error) = self.end_relay(machine) {
                        tracing::warn!(migration = %id, "{error}");
                    }
                }
            }
        }
    }
}
