//! A tunnel for a VM that goes to another subnet: both ends are there, and tried, before anything is moved.
//!
//! Nothing is switched over later: the VM's first announcement comes through the tunnel, and tells its LAN where it is.

use super::{Source, SourceError, unexpected};
use crate::migrate::message::ControlMessage;
use crate::port::ControlChannel;

impl Source<'_> {
    /// Has both ends made, if the VM is to have a tunnel. Whoever owns this end takes it down when the migration comes to nothing.
    pub(super) fn lay_tunnel(&mut self, control: &dyn ControlChannel<ControlMessage>) -> Result<(), SourceError> {
        let Some(tunnel) = self.tunnel.as_mut() else { return Ok(()) };
        let (offer, wireguard) = tunnel.open()?;
        let is_secret = wireguard.is_some();
        control.send(&match wireguard {
            None => ControlMessage::Tunnel(Box::new(offer)),
            Some(wireguard) => ControlMessage::SecretTunnel(Box::new((offer, wireguard))),
        })?;
        let key = match self.expect(control, self.options.stall, "the target's end of the tunnel") {
            Ok(ControlMessage::TunnelMade) if !is_secret => None,
            Ok(ControlMessage::SecretTunnelMade(key)) if is_secret => Some(key),
            Ok(other) => return Err(unexpected(&other, if is_secret { "secret-tunnel-made" } else { "tunnel-made" })),
            Err(SourceError::PeerCancelled(reason)) => return Err(SourceError::Refused(reason)),
            Err(error) => return Err(error),
        };
        if let Some(tunnel) = self.tunnel.as_mut() {
            tunnel.try_it(key)?;
        }
        Ok(())
    }
}
