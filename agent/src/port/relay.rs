//! What the network still brings to a place that a VM has left.

use std::io;
use std::time::Duration;

use super::machine::MachineError;
use crate::model::RelayedFrame;

/// A VM's ports at the host that it leaves. Nobody else takes frames there while it stands.
pub trait FormerPorts: Send {
    /// Waits for frames, at most `timeout`, and adds those that are there to `frames`, at most `most`.
    ///
    /// # Errors
    /// A port that cannot be read any more.
    fn take(&mut self, frames: &mut Vec<RelayedFrame>, most: usize, timeout: Duration) -> io::Result<()>;

    /// The VM stands: frames are taken out of the ports as they come, and kept for [`FormerPorts::take`], since ports hold few.
    fn keep(&mut self) {}

    /// The VM goes on here: what was kept, and what is still in the ports is theirs again.
    fn give_back(&mut self) -> Vec<RelayedFrame> {
        Vec::new()
    }
}

/// A machine whose VM gets what the network brings to its former place.
pub trait Relay: Send {
    /// Source: the VM's ports; `None` if it has none.
    ///
    /// # Errors
    /// They cannot be had.
    fn former_ports(&mut self) -> Result<Option<Box<dyn FormerPorts>>, MachineError> {
        Ok(None)
    }

    /// Target, before the first announcement: what has come from the network by now has come to the former place as well, and is thrown away; what comes from now on waits for
    /// [`Relay::caught_up`], but not for long.
    ///
    /// # Errors
    /// The machine is gone.
    fn await_relay(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    /// Target: these came to the former place.
    ///
    /// # Errors
    /// The machine is gone.
    fn relay(&mut self, frames: Vec<RelayedFrame>) -> Result<(), MachineError> {
        let _ = frames;
        Ok(())
    }

    /// Target: all that was at the former place when the VM ran here has been relayed; what waited goes on, but for what came both ways.
    ///
    /// # Errors
    /// The machine is gone.
    fn caught_up(&mut self) -> Result<(), MachineError> {
        Ok(())
    }

    /// Target: nothing more comes by the relay.
    ///
    /// # Errors
    /// The machine is gone.
    fn end_relay(&mut self) -> Result<(), MachineError> {
        Ok(())
    }
}
