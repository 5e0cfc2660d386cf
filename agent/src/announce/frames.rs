//! The frames that tell switches and neighbours where a station is.
//!
//! Owns their bytes, built with etherparse. Must not know when or where they are sent. What each is for:
//! - RARP (RFC 903): MAC addresses only, so it teaches switches and can spoil no neighbour table; needs no IP address.
//! - Gratuitous ARP (RFC 826, RFC 5227 §3, RFC 5944 §4.6): neighbours that hold an entry update it; some stacks take only
//!   the request, some only the reply, so both are sent.
//! - Unsolicited neighbour advertisement (RFC 4861 §7.2.6): the same for IPv6.
//! - Question for a gateway (RFC 826; RFC 4861 §7.2.2), in the station's name: the answer goes to the station, which so learns the Ethernet address that its router has at the new place. Linux takes it although it has not asked
//!   (net/ipv4/arp.c `arp_process`, net/ipv6/ndisc.c `ndisc_recv_na`): for IPv4 where its entry is older than `locktime`, 1 s.
//! - ARP probe (RFC 5227 §2.1.1) and the solicitation of duplicate address detection (RFC 4862 §5.4): they ask who has an
//!   address, and teach nobody anything about it.
//!
//! VLAN tags (IEEE 802.1Q-2022 §9) are put into whole frames: these stay of the least length when a switch takes them out.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::icmpv6::NeighborAdvertisementHeader;
use etherparse::{
    ArpHardwareId, ArpOperation, ArpPacket, EtherType, Ethernet2Header, Icmpv6Type, IpNumber, Ipv6FlowLabel, Ipv6Header,
};

use crate::model::{MacAddress, Station, VlanId, VlanTags};

/// RARP's EtherType (RFC 903), which etherparse has no name for.
pub const ETHER_TYPE_RARP: EtherType = EtherType(0x8035);
/// RARP's "request reverse" (RFC 903), which etherparse has no name for.
pub const OPERATION_REQUEST_REVERSE: ArpOperation = ArpOperation(3);
/// Ethernet's least frame without its check sequence; shorter ones are padded with zeros.
const LEAST_FRAME_BYTES: usize = 60;
/// Destination and source address, at a frame's beginning.
const ETHERNET_ADDRESSES_BYTES: usize = 12;
const BROADCAST: [u8; 6] = [0xff; 6];
/// All nodes of the link (RFC 4291 §2.7.1).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// Neighbour discovery refuses packets that a router has forwarded (RFC 4861 §7.1.2).
const HOP_LIMIT: u8 = 255;
/// Option "target link-layer address" of one unit of eight bytes (RFC 4861 §4.6.1).
const TARGET_LINK_LAYER_ADDRESS: [u8; 2] = [2, 1];
/// The same of the source (RFC 4861 §4.6.1).
const SOURCE_LINK_LAYER_ADDRESS: [u8; 2] = [1, 1];

/// What a frame is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// Reverse ARP request.
    Rarp,
    /// Gratuitous ARP request.
    ArpRequest,
    /// Gratuitous ARP reply.
    ArpReply,
    /// Unsolicited IPv6 neighbour advertisement.
    NeighbourAdvertisement,
    /// ARP probe.
    ArpProbe,
    /// Neighbour solicitation of duplicate address detection.
    NeighbourSolicitation,
    /// A station's question for the Ethernet address of a router that it sends by.
    GatewayQuestion,
}

impl fmt::Display for FrameKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rarp => "RARP",
            Self::ArpRequest => "gratuitous ARP request",
            Self::ArpReply => "gratuitous ARP reply",
            Self::NeighbourAdvertisement => "neighbour advertisement",
            Self::ArpProbe => "ARP probe",
            Self::NeighbourSolicitation => "neighbour solicitation",
            Self::GatewayQuestion => "question for a gateway",
        })
    }
}

/// A whole Ethernet frame, without FCS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    kind: FrameKind,
    bytes: Vec<u8>,
}

impl Frame {
    /// What it is.
    pub const fn kind(&self) -> FrameKind {
        self.kind
    }

    /// Its bytes, destination address first.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// The same frame with tags, which stand between the source address and the type.
    #[must_use]
    pub fn tagged(mut self, vlan: Option<VlanTags>) -> Self {
        let tag = |kind: EtherType, id: VlanId| (u32::from(kind.0) << 16 | u32::from(id.number())).to_be_bytes();
        let tags = match vlan {
            None => return self,
            Some(VlanTags::One(id)) => tag(EtherType::VLAN_TAGGED_FRAME, id).to_vec(),
            Some(VlanTags::Two { outer, inner }) => {
                [tag(EtherType::PROVIDER_BRIDGING, outer), tag(EtherType::VLAN_TAGGED_FRAME, inner)].concat()
            }
        };
        self.bytes.splice(ETHERNET_ADDRESSES_BYTES..ETHERNET_ADDRESSES_BYTES, tags);
        self
    }
}

/// An address that no station can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is no address of a single station on a link; it cannot be announced")]
pub struct AddressError(pub IpAddr);

/// All frames of one round for `station`: RARP first (it teaches the switches, which the others then cross), questions for its gateways last.
///
/// # Errors
/// An address that no station can have.
pub fn of_station(station: &Station) -> Result<Vec<Frame>, AddressError> {
    let mut frames = vec![rarp(station.mac)];
    for ip in &station.ips {
        check(*ip)?;
        match ip {
            IpAddr::V4(ip) => {
                frames.push(gratuitous_arp_request(station.mac, *ip));
                frames.push(gratuitous_arp_reply(station.mac, *ip));
            }
            IpAddr::V6(ip) => {
                let router = if station.routers.contains(ip) { RouterFlag::Router } else { RouterFlag::Host };
                frames.push(unsolicited_na(station.mac, *ip, router));
            }
        }
    }
    for gateway in &station.gateways {
        check(*gateway)?;
        let from = station.asks_from(*gateway).ok_or(AddressError(*gateway))?;
        frames.extend(gateway_question(station.mac, from, *gateway));
    }
    Ok(frames.into_iter().map(|frame| frame.tagged(station.vlan)).collect())
}

/// A station's question for the Ethernet address of `gateway`; none where they are of two families.
pub fn gateway_question(mac: MacAddress, ip: IpAddr, gateway: IpAddr) -> Option<Frame> {
    let kind = FrameKind::GatewayQuestion;
    match (ip, gateway) {
        (IpAddr::V4(ip), IpAddr::V4(gateway)) => {
            Some(arp_like(kind, EtherType::ARP, ArpOperation::REQUEST, mac, ip, [0; 6], gateway))
        }
        (IpAddr::V6(ip), IpAddr::V6(gateway)) => {
            let payload = [&gateway.octets()[..], &SOURCE_LINK_LAYER_ADDRESS, &mac.bytes()].concat();
            let group = solicited_node(gateway);
            Some(icmpv6(kind, (mac, ip), group, &Icmpv6Type::NeighborSolicitation, &payload))
        }
        _ => None,
    }
}

/// The question whether anybody has `ip`, from a station `asker` that has not.
///
/// # Errors
/// An address that no station can have.
pub fn question(asker: MacAddress, ip: IpAddr, vlan: Option<VlanTags>) -> Result<Frame, AddressError> {
    check(ip)?;
    let frame = match ip {
        IpAddr::V4(ip) => arp_probe(asker, ip),
        IpAddr::V6(ip) => duplicate_address_solicitation(asker, ip),
    };
    Ok(frame.tagged(vlan))
}

/// Refuses an address that no station can have.
///
/// # Errors
/// It is one.
pub fn check(ip: IpAddr) -> Result<(), AddressError> {
    let wrong = ip.is_unspecified()
        || ip.is_multicast()
        || ip.is_loopback()
        || match ip {
            IpAddr::V4(ip) => ip.is_broadcast(),
            // An IPv4 address in IPv6 writing is not on any link as such.
            IpAddr::V6(ip) => ip.to_ipv4_mapped().is_some(),
        };
    if wrong { Err(AddressError(ip)) } else { Ok(()) }
}

/// The RARP frame that QEMU sends (net/announce.c): broadcast, opcode 3, both hardware addresses the station's, both
/// protocol addresses zero, padded to 60 bytes.
pub fn rarp(mac: MacAddress) -> Frame {
    let none = Ipv4Addr::UNSPECIFIED;
    arp_like(FrameKind::Rarp, ETHER_TYPE_RARP, OPERATION_REQUEST_REVERSE, mac, none, mac.bytes(), none)
}

/// An ARP announcement (RFC 5227 §2.3): a request with sender and target address both `ip`, the target's hardware
/// address, which nobody knows in a request, zero.
pub fn gratuitous_arp_request(mac: MacAddress, ip: Ipv4Addr) -> Frame {
    arp_like(FrameKind::ArpRequest, EtherType::ARP, ArpOperation::REQUEST, mac, ip, [0; 6], ip)
}

/// A gratuitous ARP reply (RFC 5944 §4.6): both hardware addresses the station's. Linux takes a reply for gratuitous only
/// then.
pub fn gratuitous_arp_reply(mac: MacAddress, ip: Ipv4Addr) -> Frame {
    arp_like(FrameKind::ArpReply, EtherType::ARP, ArpOperation::REPLY, mac, ip, mac.bytes(), ip)
}

/// Whether the advertised station routes. Must be what the guest itself says: a router that seems to become a host is
/// dropped from its neighbours' router lists (RFC 4861 §7.2.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouterFlag {
    /// A host: flag clear.
    Host,
    /// A router: flag set.
    Router,
}

/// An unsolicited neighbour advertisement (RFC 4861 §4.4, §7.2.6): to all nodes, override set, solicited clear, with the
/// target link-layer address option.
pub fn unsolicited_na(mac: MacAddress, ip: Ipv6Addr, router: RouterFlag) -> Frame {
    let flags =
        NeighborAdvertisementHeader { router: router == RouterFlag::Router, solicited: false, r#override: true };
    let mut payload = [0; 24];
    payload[..16].copy_from_slice(&ip.octets());
    payload[16..18].copy_from_slice(&TARGET_LINK_LAYER_ADDRESS);
    payload[18..].copy_from_slice(&mac.bytes());
    icmpv6(FrameKind::NeighbourAdvertisement, (mac, ip), ALL_NODES, &Icmpv6Type::NeighborAdvertisement(flags), &payload)
}

/// An ARP probe (RFC 5227 §2.1.1): a request with no sender address, so that no neighbour table takes it.
pub fn arp_probe(asker: MacAddress, ip: Ipv4Addr) -> Frame {
    arp_like(FrameKind::ArpProbe, EtherType::ARP, ArpOperation::REQUEST, asker, Ipv4Addr::UNSPECIFIED, [0; 6], ip)
}

/// The solicitation of duplicate address detection (RFC 4862 §5.4.2): from no address, to the group of those whose
/// address ends so, with no link-layer address option (RFC 4861 §4.3). Whoever has the address answers to all nodes.
pub fn duplicate_address_solicitation(asker: MacAddress, ip: Ipv6Addr) -> Frame {
    icmpv6(
        FrameKind::NeighbourSolicitation,
        (asker, Ipv6Addr::UNSPECIFIED),
        solicited_node(ip),
        &Icmpv6Type::NeighborSolicitation,
        &ip.octets(),
    )
}

/// The group of the nodes whose addresses end like `ip` (RFC 4291 §2.7.1).
pub fn solicited_node(ip: Ipv6Addr) -> Ipv6Addr {
    let [.., a, b, c] = ip.octets();
    Ipv6Addr::from([0xff, 2, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0xff, a, b, c])
}

/// The Ethernet group of an IPv6 group (RFC 2464 §7).
fn group_mac(group: Ipv6Addr) -> [u8; 6] {
    let [.., a, b, c, d] = group.octets();
    [0x33, 0x33, a, b, c, d]
}

/// A frame of ICMPv6 to a group; `payload` follows the first eight bytes of ICMP.
fn icmpv6(
    kind: FrameKind,
    (mac, source): (MacAddress, Ipv6Addr),
    group: Ipv6Addr,
    what: &Icmpv6Type,
    payload: &[u8],
) -> Frame {
    let icmp = what
        .to_header(source.octets(), group.octets(), payload)
        .unwrap_or_else(|_| unreachable!("a few bytes fit into an IPv6 packet"))
        .to_bytes();
    let ipv6 = Ipv6Header {
        traffic_class: 0,
        flow_label: Ipv6FlowLabel::ZERO,
        payload_length: (icmp.len() + payload.len()) as u16,
        next_header: IpNumber::IPV6_ICMP,
        hop_limit: HOP_LIMIT,
        source: source.octets(),
        destination: group.octets(),
    };
    let ethernet =
        Ethernet2Header { source: mac.bytes(), destination: group_mac(group), ether_type: EtherType::IPV6 }.to_bytes();
    Frame { kind, bytes: [&ethernet[..], &ipv6.to_bytes(), &icmp, payload].concat() }
}

/// A broadcast frame of ARP's form.
fn arp_like(
    kind: FrameKind,
    ether_type: EtherType,
    operation: ArpOperation,
    sender: MacAddress,
    sender_ip: Ipv4Addr,
    target: [u8; 6],
    target_ip: Ipv4Addr,
) -> Frame {
    let packet = ArpPacket::new(
        ArpHardwareId::ETHERNET,
        EtherType::IPV4,
        operation,
        &sender.bytes(),
        &sender_ip.octets(),
        &target,
        &target_ip.octets(),
    )
    .unwrap_or_else(|_| unreachable!("the addresses of each pair have one length"));
    let ethernet = Ethernet2Header { source: sender.bytes(), destination: BROADCAST, ether_type }.to_bytes();
    let mut bytes = [&ethernet[..], &packet.to_bytes()].concat();
    bytes.resize(LEAST_FRAME_BYTES, 0);
    Frame { kind, bytes }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command, Stdio};

    use etherparse::icmpv6::{Icmpv6PayloadSlice, NdpOptionSlice};
    use etherparse::{LinkExtSlice, LinkSlice, NetSlice, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    use super::*;

    fn any_tags() -> impl Strategy<Value = Option<VlanTags>> {
        let id = || (1u16..=4094).prop_map(|number| VlanId::new(number).unwrap());
        prop_oneof![
            Just(None),
            id().prop_map(|id| Some(VlanTags::One(id))),
            (id(), id()).prop_map(|(outer, inner)| Some(VlanTags::Two { outer, inner })),
        ]
    }

    fn any_mac() -> impl Strategy<Value = MacAddress> {
        any::<[u8; 6]>().prop_filter_map("unicast", |bytes| MacAddress::new(bytes).ok())
    }

    fn ethernet(frame: &Frame) -> Ethernet2Header {
        Ethernet2Header::from_slice(frame.bytes()).unwrap().0
    }

    #[test]
    fn rarp_is_that_of_qemu_byte_for_byte() {
        let mac = "52:54:00:12:34:56".parse().unwrap();
        #[rustfmt::skip]
        let golden = [
            0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 0x80, 0x35,
            0x00, 0x01, 0x08, 0x00, 0x06, 0x04, 0x00, 0x03,
            0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 0, 0, 0, 0,
            0x52, 0x54, 0x00, 0x12, 0x34, 0x56, 0, 0, 0, 0,
            0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        ];
        assert_eq!(rarp(mac).bytes(), golden);
    }

    #[test]
    fn a_station_gets_all_its_frames_and_absurd_addresses_are_refused() {
        let mac: MacAddress = "02:00:00:00:00:01".parse().unwrap();
        let kinds = |ips: &[&str]| -> Result<Vec<FrameKind>, AddressError> {
            let ips = ips.iter().map(|ip| ip.parse().unwrap()).collect();
            Ok(of_station(&Station::new(mac, ips))?.iter().map(Frame::kind).collect())
        };
        use FrameKind::*;
        assert_eq!(kinds(&[]), Ok(vec![Rarp]));
        assert_eq!(
            kinds(&["10.0.0.2", "fe80::1", "10.0.0.3"]),
            Ok(vec![Rarp, ArpRequest, ArpReply, NeighbourAdvertisement, ArpRequest, ArpReply])
        );
        for bad in ["0.0.0.0", "::", "224.0.0.1", "ff02::1", "127.0.0.1", "::1", "255.255.255.255", "::ffff:10.0.0.1"] {
            assert_eq!(kinds(&["10.0.0.2", bad]), Err(AddressError(bad.parse().unwrap())), "{bad} was accepted");
            assert!(question(mac, bad.parse().unwrap(), None).is_err(), "{bad} was asked for");
        }
    }

    proptest! {
        #[test]
        fn rarp_reads_back(mac in any_mac()) {
            let frame = rarp(mac);
            prop_assert_eq!(frame.bytes().len(), 60);
            let header = ethernet(&frame);
            prop_assert_eq!((header.source, header.destination), (mac.bytes(), BROADCAST));
            prop_assert_eq!(header.ether_type, ETHER_TYPE_RARP);
            let packet = ArpPacket::from_slice(&frame.bytes()[14..]).unwrap();
            prop_assert_eq!(packet.operation, OPERATION_REQUEST_REVERSE);
            prop_assert_eq!((packet.sender_hw_addr(), packet.target_hw_addr()), (&mac.bytes()[..], &mac.bytes()[..]));
            prop_assert_eq!((packet.sender_protocol_addr(), packet.target_protocol_addr()), (&[0; 4][..], &[0; 4][..]));
        }

        #[test]
        fn gratuitous_arp_reads_back(mac in any_mac(), ip in any::<Ipv4Addr>()) {
            let pairs = [
                (gratuitous_arp_request(mac, ip), ArpOperation::REQUEST, [0; 6]),
                (gratuitous_arp_reply(mac, ip), ArpOperation::REPLY, mac.bytes()),
            ];
            for (frame, operation, target_mac) in pairs {
                prop_assert_eq!(frame.bytes().len(), 60);
                let packet = SlicedPacket::from_ethernet(frame.bytes()).unwrap();
                let Some(LinkSlice::Ethernet2(link)) = packet.link else { panic!("no Ethernet") };
                prop_assert_eq!((link.source(), link.destination()), (mac.bytes(), BROADCAST));
                let Some(NetSlice::Arp(arp)) = packet.net else { panic!("no ARP") };
                let arp = arp.to_packet().try_eth_ipv4().unwrap();
                prop_assert_eq!(arp.operation, operation);
                prop_assert_eq!((arp.sender_mac, arp.target_mac), (mac.bytes(), target_mac));
                prop_assert_eq!((arp.sender_ipv4, arp.target_ipv4), (ip.octets(), ip.octets()));
            }
        }

        /// A question teaches nobody an address, and reaches those who may have it.
        #[test]
        fn questions_read_back(mac in any_mac(), v4 in any::<Ipv4Addr>(), v6 in any::<Ipv6Addr>()) {
            let probe = arp_probe(mac, v4);
            let packet = SlicedPacket::from_ethernet(probe.bytes()).unwrap();
            let Some(NetSlice::Arp(arp)) = packet.net else { panic!("no ARP") };
            let arp = arp.to_packet().try_eth_ipv4().unwrap();
            prop_assert_eq!((arp.operation, arp.sender_mac, arp.target_mac), (ArpOperation::REQUEST, mac.bytes(), [0; 6]));
            prop_assert_eq!((arp.sender_ipv4, arp.target_ipv4), ([0; 4], v4.octets()));

            let solicitation = duplicate_address_solicitation(mac, v6);
            let packet = SlicedPacket::from_ethernet(solicitation.bytes()).unwrap();
            let [.., a, b, c] = v6.octets();
            let Some(LinkSlice::Ethernet2(link)) = packet.link else { panic!("no Ethernet") };
            prop_assert_eq!((link.source(), link.destination()), (mac.bytes(), [0x33, 0x33, 0xff, a, b, c]));
            let Some(NetSlice::Ipv6(ipv6)) = packet.net else { panic!("no IPv6") };
            let header = ipv6.header();
            prop_assert_eq!(header.source_addr(), Ipv6Addr::UNSPECIFIED);
            prop_assert_eq!(
                header.destination_addr(),
                Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, 0xff00 | u16::from(a), u16::from(b) << 8 | u16::from(c))
            );
            prop_assert_eq!(header.hop_limit(), 255);
            let Some(TransportSlice::Icmpv6(icmp)) = packet.transport else { panic!("no ICMPv6") };
            prop_assert!(icmp.is_checksum_valid(header.source(), header.destination()));
            let Ok(Icmpv6PayloadSlice::NeighborSolicitation(ns)) = icmp.payload_slice() else { panic!("no NS") };
            prop_assert_eq!((ns.target_address(), ns.options().len()), (v6, 0));
        }

        /// A question for a gateway comes from the station itself, so that the answer goes to it.
        #[test]
        fn questions_for_gateways_read_back(mac in any_mac(), v4: [Ipv4Addr; 2], v6: [Ipv6Addr; 2]) {
            let question = gateway_question(mac, v4[0].into(), v4[1].into()).unwrap();
            let packet = SlicedPacket::from_ethernet(question.bytes()).unwrap();
            let Some(NetSlice::Arp(arp)) = packet.net else { panic!("no ARP") };
            let arp = arp.to_packet().try_eth_ipv4().unwrap();
            prop_assert_eq!((arp.operation, arp.sender_mac, arp.target_mac), (ArpOperation::REQUEST, mac.bytes(), [0; 6]));
            prop_assert_eq!((arp.sender_ipv4, arp.target_ipv4), (v4[0].octets(), v4[1].octets()));

            let question = gateway_question(mac, v6[0].into(), v6[1].into()).unwrap();
            let packet = SlicedPacket::from_ethernet(question.bytes()).unwrap();
            let Some(NetSlice::Ipv6(ipv6)) = packet.net else { panic!("no IPv6") };
            let (source, destination) = (ipv6.header().source_addr(), ipv6.header().destination_addr());
            prop_assert_eq!((source, destination), (v6[0], solicited_node(v6[1])));
            let Some(TransportSlice::Icmpv6(icmp)) = packet.transport else { panic!("no ICMPv6") };
            prop_assert!(icmp.is_checksum_valid(source.octets(), destination.octets()));
            let Ok(Icmpv6PayloadSlice::NeighborSolicitation(ns)) = icmp.payload_slice() else { panic!("no NS") };
            prop_assert_eq!(ns.target_address(), v6[1]);
            let options: Vec<_> = ns.options_iterator().map(Result::unwrap).collect();
            let [NdpOptionSlice::SourceLinkLayerAddress(option)] = &options[..] else { panic!("{options:?}") };
            prop_assert_eq!(option.link_layer_address(), &mac.bytes()[..]);
            prop_assert!(gateway_question(mac, v4[0].into(), v6[1].into()).is_none());
        }

        /// Tags stand where they belong, and without them each frame is what it was.
        #[test]
        fn tags_read_back(mac in any_mac(), v4 in any::<Ipv4Addr>(), v6 in any::<Ipv6Addr>(), tags in any_tags()) {
            let plain = [
                rarp(mac), gratuitous_arp_request(mac, v4), gratuitous_arp_reply(mac, v4), arp_probe(mac, v4),
                unsolicited_na(mac, v6, RouterFlag::Router), duplicate_address_solicitation(mac, v6),
            ];
            for frame in plain {
                let tagged = frame.clone().tagged(tags);
                let packet = SlicedPacket::from_ethernet(tagged.bytes()).unwrap();
                let read: Vec<(u16, u16)> = packet.link_exts.iter().map(|ext| {
                    let LinkExtSlice::Vlan(tag) = ext else { panic!("no VLAN") };
                    (tag.vlan_identifier().value(), u16::from(u8::from(tag.priority_code_point())))
                }).collect();
                let (kind, wanted) = match tags {
                    None => (ethernet(&frame).ether_type, vec![]),
                    Some(VlanTags::One(id)) => (EtherType(0x8100), vec![(id.number(), 0)]),
                    Some(VlanTags::Two { outer, inner }) => (EtherType(0x88a8), vec![(outer.number(), 0), (inner.number(), 0)]),
                };
                prop_assert_eq!((ethernet(&tagged).ether_type, &read), (kind, &wanted));
                let tags_end = 12 + 4 * wanted.len();
                prop_assert_eq!([&tagged.bytes()[..12], &tagged.bytes()[tags_end..]].concat(), frame.bytes());
            }
        }

        #[test]
        fn neighbour_advertisement_reads_back(mac in any_mac(), ip in any::<Ipv6Addr>(), routes in any::<bool>()) {
            let router = if routes { RouterFlag::Router } else { RouterFlag::Host };
            let frame = unsolicited_na(mac, ip, router);
            prop_assert_eq!(frame.bytes().len(), 14 + 40 + 32);
            let packet = SlicedPacket::from_ethernet(frame.bytes()).unwrap();
            let Some(LinkSlice::Ethernet2(link)) = packet.link else { panic!("no Ethernet") };
            prop_assert_eq!((link.source(), link.destination()), (mac.bytes(), [0x33, 0x33, 0, 0, 0, 1]));
            let Some(NetSlice::Ipv6(ipv6)) = packet.net else { panic!("no IPv6") };
            let header = ipv6.header();
            prop_assert_eq!((header.source_addr(), header.destination_addr()), (ip, "ff02::1".parse().unwrap()));
            prop_assert_eq!(header.hop_limit(), 255);
            let Some(TransportSlice::Icmpv6(icmp)) = packet.transport else { panic!("no ICMPv6") };
            prop_assert!(icmp.is_checksum_valid(header.source(), header.destination()));
            let Icmpv6Type::NeighborAdvertisement(flags) = icmp.icmp_type() else { panic!("no NA") };
            prop_assert_eq!((flags.router, flags.solicited, flags.r#override), (routes, false, true));
            let Ok(Icmpv6PayloadSlice::NeighborAdvertisement(na)) = icmp.payload_slice() else { panic!("no payload") };
            prop_assert_eq!(na.target_address(), ip);
            let options: Vec<_> = na.options_iterator().map(Result::unwrap).collect();
            let [NdpOptionSlice::TargetLinkLayerAddress(option)] = &options[..] else { panic!("{options:?}") };
            prop_assert_eq!(option.link_layer_address(), &mac.bytes()[..]);
        }
    }

    /// A capture file (libpcap 2.4, microseconds, Ethernet) of `frames`.
    fn pcap(frames: &[Frame]) -> Vec<u8> {
        let mut file = Vec::new();
        for word in [0xa1b2_c3d4_u32, 0x0004_0002, 0, 0, 65_535, 1] {
            file.extend_from_slice(&word.to_ne_bytes());
        }
        for frame in frames {
            let length = frame.bytes().len() as u32;
            for word in [0, 0, length, length] {
                file.extend_from_slice(&word.to_ne_bytes());
            }
            file.extend_from_slice(frame.bytes());
        }
        file
    }

    /// A second opinion on every kind of frame with every kind of tags: Wireshark's dissectors, where they are installed.
    #[test]
    fn tshark_reads_the_same() {
        const FIELDS: [&str; 10] = [
            "frame.protocols",
            "ieee8021ad.id",
            "vlan.id",
            "arp.opcode",
            "arp.isprobe",
            "icmpv6.nd.na.target_address",
            "icmpv6.nd.ns.target_address",
            "icmpv6.nd.na.flag.r",
            "icmpv6.checksum.status",
            "_ws.expert.message",
        ];
        let mac: MacAddress = "02:00:00:00:00:01".parse().unwrap();
        let (v4, v6) = ("10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap());
        let mut frames = Vec::new();
        for vlan in [None, Some("42".parse().unwrap()), Some("100.42".parse().unwrap())] {
            let mut station = Station { vlan, ..Station::new(mac, vec![v4]) };
            station.add_router(v6);
            station.gateways = vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
            frames.extend(of_station(&station).unwrap());
            frames.extend([v4, v6.into()].map(|ip: IpAddr| question(mac, ip, vlan).unwrap()));
        }
        let mut capture = tempfile::NamedTempFile::new().unwrap();
        capture.write_all(&pcap(&frames)).unwrap();
        let mut tshark = Command::new("tshark");
        tshark.args(["-T", "fields", "-E", "separator=;", "-r"]).arg(capture.path()).stdin(Stdio::null());
        for field in FIELDS {
            tshark.args(["-e", field]);
        }
        let Ok(output) = tshark.output() else {
            eprintln!("tshark is not installed: nothing compared");
            return;
        };
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let output = String::from_utf8(output.stdout).unwrap();
        let truth = |text: &str| matches!(text, "1" | "True");
        assert_eq!((frames.len(), output.lines().count()), (24, 24), "{output}");
        for (k, (line, frame)) in output.lines().zip(&frames).enumerate() {
            let fields: Vec<_> = line.split(';').collect();
            let [protocols, outer, inner, opcode, probe, na, ns, router, checksum, complaint] = fields[..] else {
                panic!("{line}")
            };
            assert_eq!(complaint, "", "{line}");
            assert_eq!((outer, inner), [("", ""), ("", "42"), ("100", "42")][k / 8], "{line}");
            let (protocol, wanted) = match frame.kind() {
                FrameKind::Rarp => ("arp", ("3", false, "", "", false)),
                FrameKind::ArpRequest => ("arp", ("1", false, "", "", false)),
                FrameKind::ArpReply => ("arp", ("2", false, "", "", false)),
                FrameKind::ArpProbe => ("arp", ("1", true, "", "", false)),
                FrameKind::NeighbourAdvertisement => ("icmpv6", ("", false, "fd00::2", "", true)),
                FrameKind::NeighbourSolicitation => ("icmpv6", ("", false, "", "fd00::2", false)),
                FrameKind::GatewayQuestion if protocols.ends_with("arp") => ("arp", ("1", false, "", "", false)),
                FrameKind::GatewayQuestion => ("icmpv6", ("", false, "", "fd00::1", false)),
            };
            assert!(protocols.ends_with(protocol), "{line}");
            assert_eq!((opcode, truth(probe), na, ns, truth(router)), wanted, "{line}");
            // 1 is "good".
            assert_eq!(checksum, if protocol == "icmpv6" { "1" } else { "" }, "{line}");
        }
    }
}
