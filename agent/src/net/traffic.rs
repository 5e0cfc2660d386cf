//! What an interface has sent, by the kernel's own counters, and over which interface a peer is reached.
//!
//! Owns reading of `IFLA_STATS64`. Must not know who sent what.

use std::net::{IpAddr, SocketAddr, UdpSocket};

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};

use super::NetError;
use super::netlink::Requests;

/// An interface whose counters can be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meter {
    index: u32,
    name: String,
    is_loopback: bool,
}

impl Meter {
    /// The interface by which this network namespace reaches `peer`. Nothing is sent.
    ///
    /// # Errors
    /// There is no way there, or the kernel does not answer.
    pub fn toward(peer: SocketAddr) -> Result<Self, NetError> {
        let failed = |source| NetError::Kernel { action: format!("find the way to {}", peer.ip()), source };
        let any = if peer.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
        // A datagram socket that is connected has the address that its route gives it.
        let socket = UdpSocket::bind(any).map_err(failed)?;
        socket.connect(peer).map_err(failed)?;
        let own = socket.local_addr().map_err(failed)?.ip();
        let request = RouteNetlinkMessage::GetAddress(AddressMessage::default());
        let addresses = Requests::open()?.dump(&request, "list the addresses")?;
        let index = addresses.iter().find_map(|object| match object {
            RouteNetlinkMessage::NewAddress(message) if has(message, own) => Some(message.header.index),
            _ => None,
        });
        let links = links()?;
        let link = links.iter().find(|link| Some(link.header.index) == index);
        let link = link.ok_or_else(|| NetError::NoSuchInterface { name: format!("with {own}") })?;
        let name = link.attributes.iter().find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.clone()),
            _ => None,
        });
        Ok(Self {
            index: link.header.index,
            name: name.unwrap_or_default(),
            is_loopback: link.header.flags.contains(LinkFlags::Loopback),
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it joins this host with itself alone.
    pub fn is_loopback(&self) -> bool {
        self.is_loopback
    }

    /// Bytes that it has sent since it is there, headers of its own layer included.
    ///
    /// # Errors
    /// It is gone, or the kernel does not answer.
    pub fn sent_bytes(&self) -> Result<u64, NetError> {
        let links = links()?;
        let mut counters =
            links.iter().filter(|link| link.header.index == self.index).flat_map(|link| &link.attributes);
        let sent = counters.find_map(|attribute| match attribute {
            LinkAttribute::Stats64(stats) => Some(stats.tx_bytes),
            _ => None,
        });
        sent.ok_or_else(|| NetError::NoSuchInterface { name: self.name.clone() })
    }
}

fn links() -> Result<Vec<LinkMessage>, NetError> {
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let objects = Requests::open()?.dump(&request, "list the interfaces")?;
    let links = objects.into_iter().filter_map(|object| match object {
        RouteNetlinkMessage::NewLink(message) => Some(message),
        _ => None,
    });
    Ok(links.collect())
}

fn has(message: &AddressMessage, own: IpAddr) -> bool {
    message.attributes.iter().any(|attribute| match attribute {
        AddressAttribute::Address(address) | AddressAttribute::Local(address) => *address == own,
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn what_goes_over_loopback_is_counted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let meter = Meter::toward(listener.local_addr().unwrap()).unwrap();
        assert!(meter.is_loopback() && !meter.name().is_empty(), "{meter:?}");
        let before = meter.sent_bytes().unwrap();
        let mut sender = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let mut receiver = listener.accept().unwrap().0;
        sender.write_all(&vec![7; 60_000]).unwrap();
        receiver.read_exact(&mut vec![0; 60_000]).unwrap();
        assert!(meter.sent_bytes().unwrap() >= before + 60_000);
    }
}
