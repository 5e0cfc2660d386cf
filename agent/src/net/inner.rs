//! The IPv4 address of a device that is made here, and the route to its one peer.
//!
//! Owns `RTM_NEWADDR`, `RTM_NEWROUTE` and the table of routes (rtnetlink(7)). Must not know what kind of device it is.

use std::net::{IpAddr, Ipv4Addr};

use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};

use super::NetError;
use super::netlink::Requests;

/// The length of the prefix of one address.
const ONE: u8 = 32;
/// Routes to larger parts of the link-local addresses than this (RFC 3927) are there on many hosts, and say of no address that somebody has it.
const PART: u8 = 16;

/// Gives the link `index` the address `local`.
///
/// # Errors
/// No right to.
pub fn give(index: u32, local: Ipv4Addr) -> Result<(), NetError> {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.prefix_len = ONE;
    message.header.index = index;
    message.attributes = vec![AddressAttribute::Local(IpAddr::V4(local)), AddressAttribute::Address(IpAddr::V4(local))];
    let request = RouteNetlinkMessage::NewAddress(message);
    Requests::open()?.change(request, NLM_F_CREATE | NLM_F_EXCL, &format!("give the address {local}"))
}

/// Has packets from `local` to `remote` go out by the link `index`, which is up, in pieces of at most so many bytes.
///
/// # Errors
/// There is a route to `remote`, or no right to.
pub fn lead(index: u32, local: Ipv4Addr, remote: Ipv4Addr, mtu_bytes: u32) -> Result<(), NetError> {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: AddressFamily::Inet,
        destination_prefix_length: ONE,
        table: RouteHeader::RT_TABLE_MAIN,
        protocol: RouteProtocol::Static,
        scope: RouteScope::Link,
        kind: RouteType::Unicast,
        ..RouteHeader::default()
    };
    message.attributes = vec![
        RouteAttribute::Destination(RouteAddress::Inet(remote)),
        RouteAttribute::PrefSource(RouteAddress::Inet(local)),
        RouteAttribute::Oif(index),
        RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu_bytes)]),
    ];
    let request = RouteNetlinkMessage::NewRoute(message);
    Requests::open()?.change(request, NLM_F_CREATE | NLM_F_EXCL, &format!("make a route to {remote}"))
}

/// Whether this host has one of these link-local addresses, or a way to it or to a small part of them that it is in.
///
/// # Errors
/// The kernel does not answer.
pub fn is_any_taken(addresses: [Ipv4Addr; 2]) -> Result<bool, NetError> {
    let mut request = RouteMessage::default();
    request.header.address_family = AddressFamily::Inet;
    // The table of the host's own addresses is among them.
    let objects = Requests::open()?.dump(&RouteNetlinkMessage::GetRoute(request), "read the routes")?;
    Ok(objects.iter().any(|object| {
        let RouteNetlinkMessage::NewRoute(message) = object else { return false };
        let length = message.header.destination_prefix_length;
        message.attributes.iter().any(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(to)) => {
                addresses.iter().any(|&address| length > PART && is_in(address, *to, length))
            }
            _ => false,
        })
    }))
}

/// Whether an address has the first `length` bits, 1 to 32, of `prefix`.
fn is_in(address: Ipv4Addr, prefix: Ipv4Addr, length: u8) -> bool {
    let differ = address.to_bits() ^ prefix.to_bits();
    differ.checked_shr(u32::from(ONE.saturating_sub(length))).unwrap_or(0) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_of_a_prefix_are_told() {
        let [a, b]: [Ipv4Addr; 2] = ["169.254.7.6", "169.254.7.7"].map(|text| text.parse().unwrap());
        assert!(is_in(a, a, 32) && !is_in(b, a, 32) && is_in(b, a, 31));
        assert!(is_in(b, "169.254.7.0".parse().unwrap(), 24) && !is_in(b, "169.254.8.0".parse().unwrap(), 24));
        assert!(is_in(b, Ipv4Addr::UNSPECIFIED, 0));
    }
}
