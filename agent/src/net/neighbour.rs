//! The host's own neighbour tables (ARP and IPv6 neighbour discovery): read an entry, set one, wait until it says what it should.
//!
//! Owns `RTM_*NEIGH` of the families `AF_INET` and `AF_INET6`. Waiting is by notification, as in [`super::fdb`].

use std::net::IpAddr;
use std::time::Duration;

use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};

use super::NetError;
use super::bridge;
use super::fdb::GROUP_NEIGH;
use super::netlink::{Event, Events, Requests};
use crate::model::MacAddress;
use crate::time::monotonic_now;

/// One line of the tables that names an Ethernet address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// The neighbour's address.
    pub ip: IpAddr,
    /// Its Ethernet address.
    pub mac: MacAddress,
    /// Whether it said that it routes (`NTF_ROUTER`; IPv6).
    pub router: bool,
    /// Whether the last attempt to reach it failed, or the entry was set by hand: it says nothing of where the address is.
    pub doubtful: bool,
}

impl Neighbour {
    pub(super) fn from_message(message: &NeighbourMessage) -> Option<Self> {
        let (mut ip, mut mac) = (None, None);
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => ip = Some(IpAddr::V4(*v4)),
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => ip = Some(IpAddr::V6(*v6)),
                NeighbourAttribute::LinkLayerAddress(bytes) => {
                    mac = <[u8; 6]>::try_from(&bytes[..]).ok().and_then(|bytes| MacAddress::new(bytes).ok());
                }
                _ => {}
            }
        }
        Some(Self {
            ip: ip?,
            mac: mac?,
            router: message.header.flags.contains(NeighbourFlags::Router),
            doubtful: matches!(
                message.header.state,
                NeighbourState::Failed | NeighbourState::Incomplete | NeighbourState::Noarp
            ),
        })
    }
}

/// The Ethernet address that `message` gives for `ip`; `None` if it is about another address or knows none.
fn mac_of(message: &NeighbourMessage, ip: IpAddr) -> Option<MacAddress> {
    Neighbour::from_message(message).filter(|neighbour| neighbour.ip == ip).map(|neighbour| neighbour.mac)
}

/// All that this namespace has an Ethernet address for, on any interface.
///
/// # Errors
/// The kernel does not answer.
pub fn all() -> Result<Vec<Neighbour>, NetError> {
    let mut found = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut request = NeighbourMessage::default();
        request.header.family = family;
        let request = RouteNetlinkMessage::GetNeighbour(request);
        let objects = Requests::open()?.dump(&request, "read the neighbour tables")?;
        found.extend(objects.iter().filter_map(|object| match object {
            RouteNetlinkMessage::NewNeighbour(message) => Neighbour::from_message(message),
            _ => None,
        }));
    }
    Ok(found)
}

/// The Ethernet address that this namespace has for `ip` on any interface.
///
/// # Errors
/// The kernel does not answer.
pub fn lookup(ip: IpAddr) -> Result<Option<MacAddress>, NetError> {
    let mut request = NeighbourMessage::default();
    request.header.family = if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let objects = Requests::open()?.dump(&RouteNetlinkMessage::GetNeighbour(request), "read the neighbour table")?;
    Ok(objects.iter().find_map(|object| match object {
        RouteNetlinkMessage::NewNeighbour(message) => mac_of(message, ip),
        _ => None,
    }))
}

/// An entry of the table of one interface, as a message about it.
fn about(interface: u32, ip: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    message.header.ifindex = interface;
    message.attributes.push(NeighbourAttribute::Destination(match ip {
        IpAddr::V4(ip) => NeighbourAddress::Inet(ip),
        IpAddr::V6(ip) => NeighbourAddress::Inet6(ip),
    }));
    message
}

/// Has this host know that `ip` is `mac` on `interface`, for good, whatever it hears.
///
/// # Errors
/// There is no such interface, it has no such protocol, or there is no right to.
pub fn set(interface: &str, ip: IpAddr, mac: MacAddress) -> Result<(), NetError> {
    let mut message = about(bridge::link(interface)?.index, ip);
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.bytes().to_vec()));
    Requests::open()?.change(
        RouteNetlinkMessage::NewNeighbour(message),
        NLM_F_CREATE | NLM_F_REPLACE,
        &format!("set {ip} to {mac} on `{interface}`"),
    )
}

/// Takes back what [`set`] has done, if it is still so; it is no error if it is not.
///
/// # Errors
/// The kernel does not answer, or there is no right to.
pub fn unset(interface: &str, ip: IpAddr, mac: MacAddress) -> Result<(), NetError> {
    let index = match bridge::link(interface) {
        Ok(link) => link.index,
        Err(NetError::NoSuchInterface { .. }) => return Ok(()),
        Err(error) => return Err(error),
    };
    let mut request = NeighbourMessage::default();
    request.header.family = if ip.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
    let mut requests = Requests::open()?;
    let objects = requests.dump(&RouteNetlinkMessage::GetNeighbour(request), "read the neighbour table")?;
    let ours = objects.iter().any(|object| match object {
        RouteNetlinkMessage::NewNeighbour(message) => {
            message.header.ifindex == index
                && message.header.state == NeighbourState::Permanent
                && mac_of(message, ip) == Some(mac)
        }
        _ => false,
    });
    if !ours {
        return Ok(());
    }
    let action = format!("forget {ip} on `{interface}`");
    requests.change(RouteNetlinkMessage::DelNeighbour(about(index, ip)), 0, &action)
}

/// A neighbour table that is followed.
pub struct NeighbourWatch {
    events: Events,
}

impl NeighbourWatch {
    /// Starts to follow the tables of this namespace.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn open() -> Result<Self, NetError> {
        Ok(Self { events: Events::open(GROUP_NEIGH)? })
    }

    /// The next neighbour whose entry changed, and when that was seen (`CLOCK_MONOTONIC`); `None` if there is none within `limit`. After an overrun of notifications,
    /// changes may be missing.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub fn next_change(&mut self, limit: Duration) -> Result<Option<(Neighbour, Duration)>, NetError> {
        let deadline = monotonic_now() + limit;
        loop {
            match self.events.next(deadline)? {
                None => return Ok(None),
                Some(Event::Message(RouteNetlinkMessage::NewNeighbour(message), seen_at))
                    if matches!(message.header.family, AddressFamily::Inet | AddressFamily::Inet6) =>
                {
                    if let Some(neighbour) = Neighbour::from_message(&message) {
                        return Ok(Some((neighbour, seen_at)));
                    }
                }
                Some(_) => {}
            }
        }
    }

    /// Waits until the table has `mac` for `ip`; returns when that was seen (`CLOCK_MONOTONIC`).
    ///
    /// # Errors
    /// It has not within `limit`; the error says what it has instead.
    pub fn wait_mac(&mut self, ip: IpAddr, mac: MacAddress, limit: Duration) -> Result<Duration, NetError> {
        let deadline = monotonic_now() + limit;
        self.events.discard_pending()?;
        let mut seen_at = monotonic_now();
        loop {
            // Only the table says what is true now; an event may be older than a table read before it.
            if lookup(ip)? == Some(mac) {
                return Ok(seen_at);
            }
            seen_at = loop {
                match self.events.next(deadline)? {
                    Some(Event::Message(RouteNetlinkMessage::NewNeighbour(message), seen_at)) => {
                        if mac_of(&message, ip) == Some(mac) {
                            break seen_at;
                        }
                    }
                    Some(Event::Lost) => break monotonic_now(),
                    Some(Event::Message(..)) => {}
                    None => {
                        let found = lookup(ip)?.map_or_else(|| "none".to_owned(), |mac| mac.to_string());
                        let what = format!("{ip} is known as {mac} (known: {found})");
                        return Err(NetError::TimedOut { what, after: limit });
                    }
                }
            };
        }
    }
}
