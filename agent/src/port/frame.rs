//! A place where raw Ethernet frames leave a host.

use std::io;

/// Sends raw frames toward the network, as if from the VM.
pub trait FramePort: Send {
    /// Sends one whole frame, destination address first, without FCS.
    ///
    /// # Errors
    /// What the interface answered; the frame was not sent.
    fn send(&mut self, frame: &[u8]) -> io::Result<()>;
}
