//! The frames that tell switches and neighbours where a station is.
//!
//! Owns their bytes, built with etherparse. Must not know when or where they are sent. What each is for:
//! - RARP (RFC 903): MAC addresses only, so it teaches switches and can spoil no neighbour table; needs no IP address.
//! - Gratuitous ARP (RFC 826, RFC 5227 §3, RFC 5944 §4.6): neighbours that hold an entry update it; some stacks take only
//!   the request, some only the reply, so both are sent.
//! - Unsolicited neighbour advertisement (RFC 4861 §7.2.6): the same for IPv6.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::icmpv6::NeighborAdvertisementHeader;
use etherparse::{
    ArpHardwareId, ArpOperation, ArpPacket, EtherType, Ethernet2Header, Icmpv6Type, IpNumber, Ipv6FlowLabel, Ipv6Header,
};

use crate::model::{MacAddress, Station};

/// RARP's EtherType (RFC 903), which etherparse has no name for.
pub const ETHER_TYPE_RARP: EtherType = EtherType(0x8035);
/// RARP's "request reverse" (RFC 903), which etherparse has no name for.
pub const OPERATION_REQUEST_REVERSE: ArpOperation = ArpOperation(3);
/// Ethernet's least frame without its check sequence; shorter ones are padded with zeros.
const LEAST_FRAME_BYTES: usize = 60;
const BROADCAST: [u8; 6] = [0xff; 6];
/// The Ethernet group of the IPv6 group `ff02::1` (RFC 2464 §7).
const ALL_NODES_MAC: [u8; 6] = [0x33, 0x33, 0, 0, 0, 1];
/// All nodes of the link (RFC 4291 §2.7.1).
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// Neighbour discovery refuses packets that a router has forwarded (RFC 4861 §7.1.2).
const HOP_LIMIT: u8 = 255;
/// Option "target link-layer address" of one unit of eight bytes (RFC 4861 §4.6.1).
const TARGET_LINK_LAYER_ADDRESS: [u8; 2] = [2, 1];

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
}

impl fmt::Display for FrameKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Rarp => "RARP",
            Self::ArpRequest => "gratuitous ARP request",
            Self::ArpReply => "gratuitous ARP reply",
            Self::NeighbourAdvertisement => "neighbour advertisement",
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
}

/// An address that no station can have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is no address of a single station on a link; it cannot be announced")]
pub struct AddressError(pub IpAddr);

/// All frames of one round for `station`: RARP first (it teaches the switches, which the others then cross).
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
            IpAddr::V6(ip) => frames.push(unsolicited_na(station.mac, *ip, RouterFlag::Host)),
        }
    }
    Ok(frames)
}

fn check(ip: IpAddr) -> Result<(), AddressError> {
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
    let icmp = Icmpv6Type::NeighborAdvertisement(flags)
        .to_header(ip.octets(), ALL_NODES.octets(), &payload)
        .unwrap_or_else(|_| unreachable!("24 bytes fit into an IPv6 packet"))
        .to_bytes();
    let ipv6 = Ipv6Header {
        traffic_class: 0,
        flow_label: Ipv6FlowLabel::ZERO,
        payload_length: (icmp.len() + payload.len()) as u16,
        next_header: IpNumber::IPV6_ICMP,
        hop_limit: HOP_LIMIT,
        source: ip.octets(),
        destination: ALL_NODES.octets(),
    };
    let ethernet =
        Ethernet2Header { source: mac.bytes(), destination: ALL_NODES_MAC, ether_type: EtherType::IPV6 }.to_bytes();
    let bytes = [&ethernet[..], &ipv6.to_bytes(), &icmp, &payload].concat();
    Frame { kind: FrameKind::NeighbourAdvertisement, bytes }
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
    use etherparse::{LinkSlice, NetSlice, SlicedPacket, TransportSlice};
    use proptest::prelude::*;

    use super::*;

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
            Ok(of_station(&Station { mac, ips })?.iter().map(Frame::kind).collect())
        };
        use FrameKind::*;
        assert_eq!(kinds(&[]), Ok(vec![Rarp]));
        assert_eq!(
            kinds(&["10.0.0.2", "fe80::1", "10.0.0.3"]),
            Ok(vec![Rarp, ArpRequest, ArpReply, NeighbourAdvertisement, ArpRequest, ArpReply])
        );
        for bad in ["0.0.0.0", "::", "224.0.0.1", "ff02::1", "127.0.0.1", "::1", "255.255.255.255", "::ffff:10.0.0.1"] {
            assert_eq!(kinds(&["10.0.0.2", bad]), Err(AddressError(bad.parse().unwrap())), "{bad} was accepted");
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

    /// A second opinion: Wireshark's dissectors, where they are installed.
    #[test]
    fn tshark_reads_the_same() {
        const FIELDS: [&str; 7] = [
            "frame.protocols",
            "arp.opcode",
            "arp.isgratuitous",
            "icmpv6.nd.na.target_address",
            "icmpv6.nd.na.flag.o",
            "icmpv6.checksum.status",
            "_ws.malformed",
        ];
        let mac = "02:00:00:00:00:01".parse().unwrap();
        let station = Station { mac, ips: vec!["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()] };
        let mut capture = tempfile::NamedTempFile::new().unwrap();
        capture.write_all(&pcap(&of_station(&station).unwrap())).unwrap();
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
        let lines: Vec<_> = output.lines().collect();
        let truth = |text: &str| matches!(text, "1" | "True");
        assert_eq!(lines.len(), 4, "{output}");
        for (line, (protocols, opcode)) in lines.iter().zip([("arp", "3"), ("arp", "1"), ("arp", "2"), ("icmpv6", "")])
        {
            let fields: Vec<_> = line.split(';').collect();
            assert!(fields[0].ends_with(protocols), "{line}");
            assert_eq!((fields[1], fields[6]), (opcode, ""), "{line}");
            assert_eq!(truth(fields[2]), matches!(opcode, "1" | "2"), "{line}");
        }
        let na: Vec<_> = lines[3].split(';').collect();
        assert_eq!((na[3], truth(na[4]), na[5]), ("fd00::2", true, "1"), "target, override, good checksum");
    }
}
