//! Tunnels: how a VM keeps its addresses at a host in another subnet.
//!
//! A tunnel has two ends, each of one VXLAN device (RFC 7348) for each of the VM's network ports. At the VM's former host it takes the tap's place in the bridge of the VM's LAN; at its new host it is the only
//! other port of a bridge with the VM's tap. What these devices send goes to the other host plainly, or through a WireGuard device at each end. Owns names, limits and arithmetic. Must not know how anything of it
//! is made.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::id::{MigrationId, VmId, VmName};
use super::mac::MacAddress;
use super::schema::Schema;

/// The UDP port of VXLAN (RFC 7348, section 8).
pub const VXLAN_PORT: u16 = 4789;
/// The most ports of a VM that one tunnel carries.
pub const MOST_LINES: usize = 16;
/// What a LAN's own MTU may be, in bytes: the least that IPv6 allows (RFC 8200, section 5), and the largest of Ethernet devices.
pub const LAN_MTUS: std::ops::RangeInclusive<u32> = 1280..=65_535;
/// The least MTU that a tunnel is worth having with, in bytes: below it the kernel tells no sender of IPv6 (RFC 8200, section 5).
pub const LEAST_MTU: u32 = 1280;

/// The UDP port of WireGuard that everybody takes (wg(8)).
pub const WIREGUARD_PORT: u16 = 51_820;

/// The bytes that VXLAN adds to each packet: the inner Ethernet header (14), VXLAN (8), UDP (8), and the outer IP header (20, or 40 for IPv6).
pub const fn overhead_bytes(far_end: IpAddr) -> u32 {
    14 + 8 + 8 + if far_end.is_ipv4() { 20 } else { 40 }
}

/// The bytes that WireGuard adds to each packet: a header (16) and a tag (16) of its own (WireGuard whitepaper, 5.4.6), UDP (8), and the outer IP header (20, or 40 for IPv6).
pub const fn wireguard_overhead_bytes(far_end: IpAddr) -> u32 {
    16 + 16 + 8 + if far_end.is_ipv4() { 20 } else { 40 }
}

/// How many pairs [`inner_pair`] knows.
pub const INNER_PAIRS: u32 = 252 * 128;

/// A pair of addresses inside WireGuard, that of the former host first: a /31 (RFC 3021) of the addresses that no router forwards (RFC 3927), without the parts that are reserved there (the first and the last 256) and
/// those where clouds have services (169.254.169.0 to 169.254.170.255).
pub const fn inner_pair(number: u32) -> [Ipv4Addr; 2] {
    let number = number % INNER_PAIRS;
    let third = (1 + number / 128) as u8;
    let third = if third < 169 { third } else { third + 2 };
    let fourth = (number % 128) as u8 * 2;
    [Ipv4Addr::new(169, 254, third, fourth), Ipv4Addr::new(169, 254, third, fourth + 1)]
}

/// What carries the VM's packets between the hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TunnelKind {
    /// VXLAN, as it is: not encrypted.
    Vxlan,
    /// VXLAN inside WireGuard: encrypted, and each end knows that it is the other one that speaks.
    Wireguard,
}

impl TunnelKind {
    /// The UDP port between the hosts where none is named.
    pub const fn port(self) -> u16 {
        match self {
            Self::Vxlan => VXLAN_PORT,
            Self::Wireguard => WIREGUARD_PORT,
        }
    }

    /// In a word.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Vxlan => "vxlan",
            Self::Wireguard => "wireguard",
        }
    }
}

impl fmt::Display for TunnelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The public key of a WireGuard device (X25519, RFC 7748). The private one is in the kernel, and nowhere else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireguardKey(pub [u8; 32]);

/// A VXLAN network identifier: which tunnel a packet belongs to, 1 to 2^24 - 1 (RFC 7348, section 5). Zero is left out, since many devices treat it as none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Vni(u32);

/// A number that identifies no tunnel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0} is no VXLAN network identifier: 1 to 16777215")]
pub struct VniError(u32);

impl Vni {
    /// Takes a number.
    ///
    /// # Errors
    /// It does not have 24 bits, or is zero.
    pub const fn new(number: u32) -> Result<Self, VniError> {
        if number == 0 || number >> 24 != 0 { Err(VniError(number)) } else { Ok(Self(number)) }
    }

    /// One that a migration gets unless its operator names one: 24 bits of its random identity.
    pub fn of_migration(id: MigrationId) -> Self {
        Self((id.0.as_u64_pair().1 as u32 & 0xff_ffff).max(1))
    }

    /// The identifier of the VM's port `index`, counted on from this one.
    pub const fn line(self, index: u32) -> Self {
        Self((self.0 - 1 + index) % 0xff_ffff + 1)
    }

    /// The number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl TryFrom<u32> for Vni {
    type Error = VniError;

    fn try_from(number: u32) -> Result<Self, Self::Error> {
        Self::new(number)
    }
}

impl From<Vni> for u32 {
    fn from(vni: Vni) -> Self {
        vni.0
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// What an operator says of a tunnel: `vxlan|wireguard[,remote=IP][,local=IP][,port=N][,vni=N]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunnelSpec {
    /// What carries the packets.
    pub kind: TunnelKind,
    /// The new host's address; none: that of the migration's link.
    pub remote: Option<IpAddr>,
    /// This host's address; none: the one that the way to the other has.
    pub local: Option<IpAddr>,
    /// The UDP port at both hosts: of VXLAN, or of WireGuard.
    pub port: u16,
    /// The identifier of the VM's first port; none: one of the migration's own.
    pub vni: Option<Vni>,
}

impl TunnelSpec {
    /// One of a kind, of which nothing more is said.
    pub const fn of(kind: TunnelKind) -> Self {
        Self { kind, remote: None, local: None, port: kind.port(), vni: None }
    }
}

/// Text that describes no tunnel.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` {1}; write vxlan or wireguard, and [,remote=IP][,local=IP][,port=N][,vni=N]")]
pub struct TunnelSpecError(String, String);

impl FromStr for TunnelSpec {
    type Err = TunnelSpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = |why: String| TunnelSpecError(text.to_owned(), why);
        let mut parts = text.split(',');
        let word = parts.next();
        let Some(kind) = [TunnelKind::Vxlan, TunnelKind::Wireguard].into_iter().find(|kind| word == Some(kind.name()))
        else {
            return Err(wrong("is no kind of tunnel".to_owned()));
        };
        let mut spec = Self::of(kind);
        for part in parts {
            let (name, value) = part.split_once('=').ok_or_else(|| wrong(format!("has `{part}` without a value")))?;
            let address = || value.parse::<IpAddr>().map_err(|error| wrong(format!("has `{part}`: {error}")));
            match name {
                "remote" => spec.remote = Some(address()?),
                "local" => spec.local = Some(address()?),
                "port" => {
                    let port = value.parse().ok().filter(|port| *port > 0);
                    spec.port = port.ok_or_else(|| wrong(format!("has `{part}`, which is no port")))?;
                }
                "vni" => {
                    let vni = value.parse().ok().and_then(|number| Vni::new(number).ok());
                    spec.vni = Some(vni.ok_or_else(|| wrong(format!("has `{part}`, not between 1 and 16777215")))?);
                }
                _ => return Err(wrong(format!("has `{name}`, which a tunnel has not"))),
            }
        }
        if let (Some(remote), Some(local)) = (spec.remote, spec.local)
            && remote.is_ipv4() != local.is_ipv4()
        {
            return Err(wrong("mixes IPv4 and IPv6".to_owned()));
        }
        Ok(spec)
    }
}

impl fmt::Display for TunnelSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind.name())?;
        for (name, address) in [("remote", self.remote), ("local", self.local)] {
            if let Some(address) = address {
                write!(f, ",{name}={address}")?;
            }
        }
        if self.port != self.kind.port() {
            write!(f, ",port={}", self.port)?;
        }
        self.vni.map_or(Ok(()), |vni| write!(f, ",vni={vni}"))
    }
}

/// One network port of the VM, as the former host offers to carry it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OfferedLine {
    /// The VM's Ethernet address on it.
    pub mac: MacAddress,
    /// Which packets are its.
    pub vni: Vni,
    /// The MTU of the VM's LAN, in bytes.
    pub lan_mtu_bytes: u32,
}

/// What the former host tells the new one of a tunnel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelOffer {
    /// The former host's address, where the new one sends to.
    pub former: IpAddr,
    /// The new host's address, as the former one sends to it.
    pub new: IpAddr,
    /// The UDP port of VXLAN at both.
    pub port: u16,
    /// The VM's ports, in its order.
    pub lines: Vec<OfferedLine>,
}

/// An offer of a tunnel that cannot be meant.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a tunnel that cannot be: {0}")]
pub struct TunnelOfferError(String);

impl TunnelOffer {
    /// Checks what a peer says, before anything is made of it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), TunnelOfferError> {
        let wrong = |why: String| Err(TunnelOfferError(why));
        if self.lines.is_empty() || self.lines.len() > MOST_LINES {
            return wrong(format!("{} network ports, not 1 to {MOST_LINES}", self.lines.len()));
        }
        if self.former.is_ipv4() != self.new.is_ipv4() || self.former == self.new {
            return wrong(format!("from {} to {}", self.former, self.new));
        }
        for end in [self.former, self.new] {
            if end.is_unspecified() || end.is_multicast() || end == IpAddr::V4(std::net::Ipv4Addr::BROADCAST) {
                return wrong(format!("{end} is no address of a host"));
            }
        }
        if self.port == 0 {
            return wrong("UDP port 0".to_owned());
        }
        for (index, line) in self.lines.iter().enumerate() {
            if !LAN_MTUS.contains(&line.lan_mtu_bytes) {
                return wrong(format!("an MTU of {} bytes", line.lan_mtu_bytes));
            }
            if self.lines[..index].iter().any(|other| other.vni == line.vni || other.mac == line.mac) {
                return wrong(format!("{} or VNI {} twice", line.mac, line.vni));
            }
        }
        Ok(())
    }
}

/// What the former host tells the new one of the WireGuard devices that a tunnel goes through.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireguardOffer {
    /// Its UDP port at both.
    pub port: u16,
    /// The former host's key.
    pub key: WireguardKey,
    /// The former host's address inside.
    pub former: Ipv4Addr,
    /// The new host's.
    pub new: Ipv4Addr,
}

impl WireguardOffer {
    /// Checks what a peer says, before anything is made of it.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(&self) -> Result<(), TunnelOfferError> {
        let wrong = |why: String| Err(TunnelOfferError(why));
        if self.port == 0 {
            return wrong("UDP port 0".to_owned());
        }
        if self.key.0 == [0; 32] {
            return wrong("no key".to_owned());
        }
        let first = self.former.to_bits();
        if !self.former.is_link_local() || !first.is_multiple_of(2) || self.new.to_bits() != first + 1 {
            return wrong(format!("{} and {} inside are no pair of link-local addresses", self.former, self.new));
        }
        Ok(())
    }
}

/// Which end of a tunnel a host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum TunnelSide {
    /// The VM has left this host, or is about to: the tunnel stands for it in its LAN.
    Former,
    /// The VM is at this host, or is about to come: the tunnel is its way to its LAN.
    New,
}

impl fmt::Display for TunnelSide {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Former => "former",
            Self::New => "new",
        })
    }
}

/// What one network port of the VM has of a tunnel at one host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelLine {
    /// The VXLAN device.
    pub device: String,
    /// Which packets are its.
    pub vni: Vni,
    /// The VM's tap: at the former host the one that it left, at the new one the one that it has.
    pub tap: String,
    /// The bridge that the device is a port of: at the former host the VM's LAN, at the new one the tunnel's own.
    pub bridge: String,
    /// At the new host: the bridge that the tap was taken out of, and goes back to; empty if it was in none.
    #[serde(default)]
    pub taken_from: String,
    /// The VM's Ethernet address.
    pub mac: MacAddress,
    /// Its IP addresses that are known; at the former host the bridge answers for them.
    pub ips: Vec<IpAddr>,
    /// The MTU of the VM's LAN, in bytes.
    pub lan_mtu_bytes: u32,
}

/// The WireGuard device of one end, which its VXLAN devices send through.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireguardEnd {
    /// The device.
    pub device: String,
    /// This host's address inside.
    pub local: Ipv4Addr,
    /// The other host's.
    pub remote: Ipv4Addr,
    /// The largest packet that WireGuard takes so that what goes to the other host stays in one piece, in bytes.
    pub mtu_bytes: u32,
}

/// One end of a tunnel: what is in the run folder, so that whoever comes later can list it and take it down.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelEntry {
    /// What the tunnel is called at both hosts: the first identifier, in hexadecimal digits.
    pub id: String,
    /// The VM.
    pub vm_id: VmId,
    /// What it is called at this host.
    pub vm_name: VmName,
    /// The migration that the tunnel was made for.
    pub migration_id: MigrationId,
    /// Which end this is.
    pub side: TunnelSide,
    /// This host's address.
    pub local: IpAddr,
    /// The other host's.
    pub remote: IpAddr,
    /// The UDP port between the hosts.
    pub port: u16,
    /// What VXLAN goes through; absent where it goes plainly.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wireguard: Option<WireguardEnd>,
    /// The largest IP packet that goes through in one piece, in bytes, as it was when the tunnel was made.
    pub mtu_bytes: u32,
    /// When it was made.
    pub since_unix_ms: u64,
    /// The boot that it was made in: no device outlives that.
    pub boot_id: String,
    /// The network namespace that it was made in, by its inode's number.
    pub namespace: u64,
    /// Where the audit log is.
    pub state_dir: PathBuf,
    /// What each network port of the VM has.
    pub lines: Vec<TunnelLine>,
}

impl TunnelEntry {
    /// What carries the packets.
    pub const fn kind(&self) -> TunnelKind {
        if self.wireguard.is_some() { TunnelKind::Wireguard } else { TunnelKind::Vxlan }
    }
}

impl Schema for TunnelEntry {
    const SCHEMA: &'static str = "dunlin.tunnel-entry/v1";
}

/// What the kernel has counted at one device, seen from this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelTraffic {
    /// Bytes that came through the tunnel, inner Ethernet headers counted.
    pub received_bytes: u64,
    /// Packets that came.
    pub received_packets: u64,
    /// Bytes that went.
    pub sent_bytes: u64,
    /// Packets that went.
    pub sent_packets: u64,
    /// Packets that did not go: larger than the way carries, or the other host out of reach.
    pub lost_packets: u64,
}

/// What the kernel says of the WireGuard device of a tunnel, seen from this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WireguardTraffic {
    /// When the two ends last agreed on keys; absent if they never have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub last_handshake_unix_ms: Option<u64>,
    /// Bytes that came, WireGuard's own headers counted.
    pub received_bytes: u64,
    /// Bytes that went.
    pub sent_bytes: u64,
}

/// What a migration has of its tunnel, in its report.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct TunnelReport {
    /// What it is called, for `dunlin tunnel`.
    pub id: String,
    /// `vxlan` or `wireguard`.
    pub kind: String,
    /// This host's address.
    pub local: String,
    /// The other's.
    pub remote: String,
    /// The largest IP packet that goes through in one piece, in bytes.
    pub mtu_bytes: u32,
    /// A small frame through it and back, before the VM moved; zero if that was not tried.
    pub rtt_ns: u64,
    /// Whether it stays: the VM is at the other end.
    pub stays: bool,
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_tunnel_reads_as_it_is_written() {
        for kind in [TunnelKind::Vxlan, TunnelKind::Wireguard] {
            for rest in ["", ",remote=192.0.2.7,local=198.51.100.1,port=8472,vni=77", ",remote=fd00::7"] {
                let text = format!("{kind}{rest}");
                let spec = text.parse::<TunnelSpec>().unwrap();
                assert_eq!((spec.kind, spec.to_string()), (kind, text));
            }
        }
        assert_eq!("vxlan,port=4789".parse::<TunnelSpec>().unwrap().to_string(), "vxlan");
        assert_eq!("wireguard,port=51820".parse::<TunnelSpec>().unwrap().to_string(), "wireguard");
        assert_eq!("wireguard".parse::<TunnelSpec>().unwrap().port, 51_820);
    }

    #[test]
    fn what_is_no_tunnel_is_named() {
        let wrong = [
            "",
            "gre",
            "vxlan,",
            "vxlan,vni=0",
            "vxlan,vni=16777216",
            "vxlan,port=0",
            "vxlan,port=x",
            "vxlan,remote=host",
            "vxlan,remote=10.0.0.1,local=fd00::1",
            "vxlan,mtu=1400",
            "wireguard,key=x",
            "wireguardx",
        ];
        for text in wrong {
            let error = text.parse::<TunnelSpec>().unwrap_err().to_string();
            assert!(error.starts_with(&format!("`{text}`")) && error.contains("write vxlan"), "{error}");
        }
    }

    #[test]
    fn the_mtu_is_what_headers_leave() {
        let (v4, v6) = ("192.0.2.1".parse().unwrap(), "fd00::1".parse().unwrap());
        assert_eq!((overhead_bytes(v4), overhead_bytes(v6)), (50, 70));
        assert_eq!((wireguard_overhead_bytes(v4), wireguard_overhead_bytes(v6)), (60, 80));
    }

    fn wireguard_offer() -> WireguardOffer {
        let [former, new] = inner_pair(7);
        WireguardOffer { port: WIREGUARD_PORT, key: WireguardKey([9; 32]), former, new }
    }

    #[test]
    fn an_offer_of_wireguard_that_cannot_be_meant_is_refused() {
        wireguard_offer().check().unwrap();
        let refused = |change: fn(&mut WireguardOffer)| {
            let mut offer = wireguard_offer();
            change(&mut offer);
            offer.check().unwrap_err();
        };
        refused(|offer| offer.port = 0);
        refused(|offer| offer.key = WireguardKey([0; 32]));
        refused(|offer| std::mem::swap(&mut offer.former, &mut offer.new));
        refused(|offer| offer.new = offer.former);
        refused(|offer| offer.new = inner_pair(8)[1]);
        refused(|offer| (offer.former, offer.new) = ("10.0.0.2".parse().unwrap(), "10.0.0.3".parse().unwrap()));
        refused(|offer| (offer.former, offer.new) = ("10.0.0.2".parse().unwrap(), "169.254.0.3".parse().unwrap()));
    }

    fn offer() -> TunnelOffer {
        let line = |number: u32| OfferedLine {
            mac: format!("02:00:00:00:00:{number:02x}").parse().unwrap(),
            vni: Vni::new(number).unwrap(),
            lan_mtu_bytes: 1500,
        };
        let (former, new) = ("192.0.2.1".parse().unwrap(), "198.51.100.1".parse().unwrap());
        TunnelOffer { former, new, port: VXLAN_PORT, lines: vec![line(1), line(2)] }
    }

    #[test]
    fn an_offer_that_cannot_be_meant_is_refused() {
        offer().check().unwrap();
        let refused = |change: fn(&mut TunnelOffer)| {
            let mut offer = offer();
            change(&mut offer);
            offer.check().unwrap_err();
        };
        refused(|offer| offer.lines.clear());
        refused(|offer| offer.lines = vec![offer.lines[0].clone(); MOST_LINES + 1]);
        refused(|offer| offer.lines[1].vni = offer.lines[0].vni);
        refused(|offer| offer.lines[1].mac = offer.lines[0].mac);
        refused(|offer| offer.lines[1].lan_mtu_bytes = 1279);
        refused(|offer| offer.lines[1].lan_mtu_bytes = 65_536);
        refused(|offer| offer.port = 0);
        refused(|offer| offer.new = offer.former);
        refused(|offer| offer.new = "fd00::1".parse().unwrap());
        refused(|offer| offer.new = "0.0.0.0".parse().unwrap());
        refused(|offer| offer.former = "239.0.0.1".parse().unwrap());
        refused(|offer| offer.former = "255.255.255.255".parse().unwrap());
    }

    proptest! {
        #[test]
        fn pairs_of_inner_addresses_are_apart_and_away_from_what_others_have(number: u32) {
            let pair = inner_pair(number);
            let offer = WireguardOffer { former: pair[0], new: pair[1], ..wireguard_offer() };
            prop_assert_eq!(offer.check(), Ok(()));
            prop_assert!(!matches!(pair[0].octets()[2], 0 | 169 | 170 | 255), "{:?}", pair);
            prop_assert_ne!(pair, inner_pair(number.wrapping_add(1)));
        }

        #[test]
        fn every_port_has_an_identifier_of_its_own(first in 1u32..1 << 24) {
            let first = Vni::new(first).unwrap();
            let all: std::collections::BTreeSet<u32> = (0..MOST_LINES as u32).map(|index| first.line(index).get()).collect();
            prop_assert_eq!(all.len(), MOST_LINES);
            prop_assert!(all.iter().all(|&number| Vni::new(number).is_ok()));
        }
    }
}
