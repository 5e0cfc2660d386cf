//! What a tunnel is made of, and how a migration has one made.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use crate::model::{MacAddress, TunnelOffer, Vni, WireguardKey, WireguardOffer};

/// What could not be made, changed or asked of a host's network, and why, in words for an operator.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct WireError(pub String);

/// A VXLAN device that is to be made (RFC 7348).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VxlanDevice {
    /// What it is called.
    pub name: String,
    /// Which packets are its.
    pub vni: Vni,
    /// This host's address.
    pub local: IpAddr,
    /// The other host's.
    pub remote: IpAddr,
    /// The UDP port at both.
    pub port: u16,
    /// The one interface that its packets leave by, and without which it goes; none: the way that the host has.
    pub through: Option<String>,
    /// Its own MTU, in bytes: that of the LAN. What is larger than the way to the other host carries is told to its sender by the kernel.
    pub mtu_bytes: u32,
}

/// A WireGuard device that is to be made, with one other one as its peer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WireguardDevice {
    /// What it is called.
    pub name: String,
    /// Where it listens.
    pub port: u16,
    /// This host's address inside.
    pub local: Ipv4Addr,
    /// The other host's: all that is sent through.
    pub remote: Ipv4Addr,
    /// The largest packet for the other host that stays in one piece on the outside, in bytes.
    pub mtu_bytes: u32,
    /// Its own MTU, in bytes: the largest packet that is ever sent through.
    pub device_mtu_bytes: u32,
}

/// The other end of a WireGuard device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WireguardPeer {
    /// Its key.
    pub key: WireguardKey,
    /// Where it listens.
    pub endpoint: SocketAddr,
    /// Its address inside: the only one that it may send from, and be sent to.
    pub inner: Ipv4Addr,
}

/// The interfaces of one host. Taking away what is not there is no error.
pub trait Wires {
    /// Makes a VXLAN device, and brings it up.
    fn make_vxlan(&mut self, device: &VxlanDevice) -> Result<(), WireError>;

    /// Makes a WireGuard device with a fresh key, and brings it up. It speaks to nobody until it knows whom.
    fn make_wireguard(&mut self, device: &WireguardDevice) -> Result<(), WireError>;

    /// The public key of a WireGuard device.
    fn key_of(&mut self, device: &str) -> Result<WireguardKey, WireError>;

    /// Has a WireGuard device speak to this peer.
    fn meet(&mut self, device: &str, peer: &WireguardPeer) -> Result<(), WireError>;

    /// Makes a bridge without STP, and brings it up.
    fn make_bridge(&mut self, name: &str, mtu_bytes: u32) -> Result<(), WireError>;

    /// Removes an interface that was made here.
    fn remove(&mut self, name: &str) -> Result<(), WireError>;

    /// Puts an interface into a bridge. With `answers` the bridge itself answers those who ask for addresses that it knows to be behind this port.
    fn join(&mut self, port: &str, bridge: &str, answers: bool) -> Result<(), WireError>;

    /// Takes an interface out of `bridge`, if it is there.
    fn leave(&mut self, port: &str, bridge: &str) -> Result<(), WireError>;

    /// The bridge that an interface is in.
    fn bridge_of(&mut self, port: &str) -> Result<Option<String>, WireError>;

    /// Has `bridge` know that `ip` is `mac`, for good.
    fn know(&mut self, bridge: &str, ip: IpAddr, mac: MacAddress) -> Result<(), WireError>;

    /// Takes that back, if it is still so.
    fn forget(&mut self, bridge: &str, ip: IpAddr, mac: MacAddress) -> Result<(), WireError>;

    /// Has the bridge of `port` send what is for `mac` there, until it hears it from somewhere else.
    fn point(&mut self, mac: MacAddress, port: &str) -> Result<(), WireError>;
}

/// The former host's end of the tunnel of one migration.
pub trait SourceTunnel: Send {
    /// Makes this end; what the other one has to know, and what of WireGuard, if the tunnel goes through that.
    ///
    /// # Errors
    /// Why not; nothing stays.
    fn open(&mut self) -> Result<(TunnelOffer, Option<WireguardOffer>), WireError>;

    /// The other end is there, with this key if the tunnel goes through WireGuard: whether it answers through the tunnel, with frames as large as it carries.
    ///
    /// # Errors
    /// It does not.
    fn try_it(&mut self, key: Option<WireguardKey>) -> Result<(), WireError>;
}
