//! Raw Ethernet frames on a named interface (`AF_PACKET`, packet(7)), through pnet.
//!
//! Owns one sending socket. Must not know what the frames mean. Where a frame goes depends on the interface: sent on a
//! bridge it leaves by all its ports, sent on a NIC it leaves by its cable, sent on a *tap* it goes to the VM behind it.

use std::io;
use std::os::fd::IntoRawFd;
use std::time::Duration;

use pnet::datalink::{self, Channel, ChannelType, Config, DataLinkSender};
use socket2::{Domain, Socket, Type};

use super::NetError;
use crate::port::FramePort;

/// A full transmit queue is waited for this long; an announcement later than that is worth nothing.
const SEND_LIMIT: Duration = Duration::from_millis(100);

/// Sends frames on one interface.
pub struct PnetPort {
    name: String,
    sender: Box<dyn DataLinkSender>,
}

impl PnetPort {
    /// Opens the interface `name` of the calling thread's network namespace.
    ///
    /// # Errors
    /// There is none, it is down, or there is no right to (CAP_NET_RAW).
    pub fn open(name: &str) -> Result<Self, NetError> {
        let interface = datalink::interfaces()
            .into_iter()
            .find(|interface| interface.name == name)
            .ok_or_else(|| NetError::NoSuchInterface { name: name.to_owned() })?;
        if !interface.is_up() {
            return Err(NetError::Down { name: name.to_owned() });
        }
        let fail = |e| NetError::from_io(format!("open a raw socket on `{name}`"), "CAP_NET_RAW", e);
        // Protocol 0, here and in the bind that pnet makes of the "layer 3" type, keeps the socket from receiving: pnet's
        // own choice would copy every frame of the interface into a queue that nobody reads. The socket itself is raw.
        let socket = Socket::new(Domain::PACKET, Type::RAW, None).map_err(fail)?;
        let config = Config {
            channel_type: ChannelType::Layer3(0),
            socket_fd: Some(socket.into_raw_fd()),
            promiscuous: false,
            write_timeout: Some(SEND_LIMIT),
            ..Config::default()
        };
        match datalink::channel(&interface, config).map_err(fail)? {
            Channel::Ethernet(sender, _receiver) => Ok(Self { name: name.to_owned(), sender }),
            _ => Err(fail(io::Error::from(io::ErrorKind::Unsupported))),
        }
    }

    /// The interface's name.
    pub fn name(&self) -> &str {
        &self.name
    }
}

impl FramePort for PnetPort {
    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        loop {
            // `None` is pnet's word for "frame too large for my buffer".
            match self.sender.send_to(frame, None).unwrap_or_else(|| Err(io::ErrorKind::InvalidInput.into())) {
                Ok(()) => return Ok(()),
                // A signal came while pnet waited for room in the queue; nothing was sent.
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(io::Error::new(error.kind(), format!("`{}`: {error}", self.name))),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_interface_is_named() {
        let Err(error) = PnetPort::open("nonesuch0") else { panic!("it was opened") };
        assert!(error.to_string().contains("`nonesuch0`"), "{error}");
    }
}
