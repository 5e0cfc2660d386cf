//! What a frame says of who sent it: its Ethernet address, an IP address that is the sender's own, whether the sender routes.
//!
//! Owns reading of frames that anybody may have sent: nothing in them is trusted beyond what it costs to believe it. An address is the sender's own only if the frame says so by itself: routers
//! pass on packets of others, under their own Ethernet address.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::icmpv6::{Icmpv6PayloadSlice, NdpOptionSlice};
use etherparse::{EtherType, Icmpv6Type, LinkExtSlice, LinkSlice, NetSlice, SlicedPacket, TransportSlice};

use super::frames;
use crate::model::{MacAddress, VlanId, VlanTags};

/// Where stacks begin to count a packet's hops down from: a packet with one of these has passed no router.
const FIRST_HOPS: [u8; 3] = [64, 128, 255];

/// By what an address was known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// The sender of an ARP request or reply (RFC 826).
    Arp,
    /// The target of a neighbour advertisement with the sender's link-layer address (RFC 4861 §4.4), and its flag R.
    Advertisement {
        /// Whether it says that it routes.
        router: bool,
    },
    /// The source of a router advertisement (RFC 4861 §4.2), which only routers send.
    RouterAdvertisement,
    /// The source of a packet that has passed no router.
    Source,
}

/// One frame's word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heard {
    /// Who sent it.
    pub mac: MacAddress,
    /// The tags that it came with.
    pub vlan: Option<VlanTags>,
    /// An address of the sender's, and why it is taken for one.
    pub ip: Option<(IpAddr, Evidence)>,
}

/// Reads a frame; none if it does not say who sent it.
pub fn read(frame: &[u8]) -> Option<Heard> {
    let mac = MacAddress::new(frame.get(6..12)?.try_into().ok()?).ok()?;
    let Ok(packet) = SlicedPacket::from_ethernet(frame) else { return Some(Heard { mac, vlan: None, ip: None }) };
    let ip = address(mac, &packet).filter(|(ip, _)| frames::check(*ip).is_ok());
    Some(Heard { mac, vlan: tags(&packet), ip })
}

fn tags(packet: &SlicedPacket<'_>) -> Option<VlanTags> {
    let Some(LinkSlice::Ethernet2(ethernet)) = &packet.link else { return None };
    let mut ids = packet.link_exts.iter().filter_map(|ext| match ext {
        LinkExtSlice::Vlan(tag) => Some(VlanId::new(tag.vlan_identifier().value())),
        LinkExtSlice::Macsec(_) => None,
    });
    match (ids.next(), ids.next()) {
        // Tag 0 is only a priority.
        (Some(id), None) => id.map(VlanTags::One),
        (Some(Some(outer)), Some(Some(inner))) if ethernet.ether_type() == EtherType::PROVIDER_BRIDGING => {
            Some(VlanTags::Two { outer, inner })
        }
        _ => None,
    }
}

fn address(mac: MacAddress, packet: &SlicedPacket<'_>) -> Option<(IpAddr, Evidence)> {
    match packet.net.as_ref()? {
        NetSlice::Arp(arp) => {
            // A frame whose Ethernet header names another than its sender field was passed on, or is a lie.
            let own = arp.sender_hw_addr() == mac.bytes() && arp.proto_addr_type() == EtherType::IPV4;
            let ip: [u8; 4] = arp.sender_protocol_addr().try_into().ok()?;
            own.then_some((Ipv4Addr::from(ip).into(), Evidence::Arp))
        }
        NetSlice::Ipv4(ip) => {
            let header = ip.header();
            FIRST_HOPS.contains(&header.ttl()).then_some((header.source_addr().into(), Evidence::Source))
        }
        NetSlice::Ipv6(ip) => {
            let header = ip.header();
            let source = header.source_addr();
            if let Some(TransportSlice::Icmpv6(icmp)) = &packet.transport
                // Only packets that no router has passed on count in neighbour discovery (RFC 4861 §7.1.2).
                && header.hop_limit() == 255
                && icmp.is_checksum_valid(header.source(), header.destination())
            {
                match (icmp.icmp_type(), icmp.payload_slice()) {
                    (Icmpv6Type::NeighborAdvertisement(flags), Ok(Icmpv6PayloadSlice::NeighborAdvertisement(na))) => {
                        let own = na.options_iterator().flatten().any(|option| {
                            matches!(option, NdpOptionSlice::TargetLinkLayerAddress(a) if a.link_layer_address() == mac.bytes())
                        });
                        // A solicited answer need not name its address again; one that was sent from the address itself is the owner's.
                        let own = own || na.target_address() == source;
                        let evidence = Evidence::Advertisement { router: flags.router };
                        return own.then_some((na.target_address().into(), evidence));
                    }
                    (Icmpv6Type::RouterAdvertisement(_), Ok(Icmpv6PayloadSlice::RouterAdvertisement(_))) => {
                        return Some((source.into(), Evidence::RouterAdvertisement));
                    }
                    _ => {}
                }
            }
            let first_hop = FIRST_HOPS.contains(&header.hop_limit()) && source != Ipv6Addr::UNSPECIFIED;
            first_hop.then_some((source.into(), Evidence::Source))
        }
    }
}

/// Reads any bytes as a frame.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz(input: &[u8]) {
    if let Some(Heard { ip: Some((ip, _)), .. }) = read(input) {
        assert!(frames::check(ip).is_ok(), "{ip} was taken for a station's");
    }
}

/// One frame of each kind.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz_seeds() -> Vec<Vec<u8>> {
    let Ok(mac) = MacAddress::new([2, 0, 0, 0, 0, 1]) else { return Vec::new() };
    let (v4, v6) = (Ipv4Addr::new(10, 0, 0, 2), Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2));
    let vlan = "100.42".parse().ok();
    let frames = [
        frames::rarp(mac),
        frames::gratuitous_arp_request(mac, v4),
        frames::unsolicited_na(mac, v6, frames::RouterFlag::Router).tagged(vlan),
        frames::duplicate_address_solicitation(mac, v6),
    ];
    frames.iter().map(|frame| frame.bytes().to_vec()).collect()
}

#[cfg(test)]
mod tests {
    use etherparse::PacketBuilder;

    use super::*;

    fn mac() -> MacAddress {
        "02:00:00:00:00:01".parse().unwrap()
    }

    fn udp(hops: u8) -> Vec<u8> {
        let builder =
            PacketBuilder::ethernet2(mac().bytes(), [2, 0, 0, 0, 0, 9]).ipv4([10, 0, 0, 2], [10, 0, 0, 9], hops);
        let mut frame = Vec::new();
        builder.udp(1, 2).write(&mut frame, b"payload").unwrap();
        frame
    }

    #[test]
    fn what_a_station_says_of_itself_is_taken() {
        let (v4, v6): (Ipv4Addr, Ipv6Addr) = ("10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap());
        let vlan = Some("100.42".parse().unwrap());
        let ip = |frame: frames::Frame| read(frame.bytes()).unwrap().ip;
        assert_eq!(ip(frames::gratuitous_arp_reply(mac(), v4)), Some((v4.into(), Evidence::Arp)));
        for (flag, router) in [(frames::RouterFlag::Host, false), (frames::RouterFlag::Router, true)] {
            let frame = frames::unsolicited_na(mac(), v6, flag).tagged(vlan);
            let wanted = Heard { mac: mac(), vlan, ip: Some((v6.into(), Evidence::Advertisement { router })) };
            assert_eq!(read(frame.bytes()), Some(wanted));
        }
        assert_eq!(read(&udp(64)).unwrap().ip, Some((v4.into(), Evidence::Source)));
    }

    #[test]
    fn what_says_nothing_of_its_sender_or_of_another_is_not() {
        let v6: Ipv6Addr = "fd00::2".parse().unwrap();
        assert_eq!(read(frames::rarp(mac()).bytes()), Some(Heard { mac: mac(), vlan: None, ip: None }));
        assert_eq!(read(frames::arp_probe(mac(), "10.0.0.2".parse().unwrap()).bytes()).unwrap().ip, None);
        assert_eq!(read(frames::duplicate_address_solicitation(mac(), v6).bytes()).unwrap().ip, None);
        assert_eq!(read(&udp(63)).unwrap().ip, None, "a router passed it on");
        let mut lie = frames::gratuitous_arp_request(mac(), "10.0.0.2".parse().unwrap()).bytes().to_vec();
        lie[11] = 7;
        assert_eq!(read(&lie).unwrap().ip, None, "it speaks of another station");
        let mut broken = frames::unsolicited_na(mac(), v6, frames::RouterFlag::Host).bytes().to_vec();
        broken[80] ^= 1;
        assert_ne!(read(&broken).unwrap().ip.map(|ip| ip.1), Some(Evidence::Advertisement { router: false }));
        assert_eq!(read(&[]), None);
        assert_eq!(read(&[0xff; 60]), None, "a group sends nothing");
    }
}
