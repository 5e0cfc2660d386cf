//! What a tunnel is made of, and how a migration has one made.

use std::net::IpAddr;

use crate::model::{MacAddress, TunnelOffer, Vni};

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
    /// Its own MTU, in bytes: that of the LAN. What is larger than the way to the other host carries is told to its sender by the kernel.
    pub mtu_bytes: u32,
}

/// The interfaces of one host. Taking away what is not there is no error.
pub trait Wires {
    /// Makes a VXLAN device, and brings it up.
    fn make_vxlan(&mut self, device: &VxlanDevice) -> Result<(), WireError>;

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
    /// Makes this end; what the other one has to know.
    ///
    /// # Errors
    /// Why not; nothing stays.
    fn open(&mut self) -> Result<TunnelOffer, WireError>;

    /// The other end is there: whether it answers through the tunnel, with frames as large as it carries.
    ///
    /// # Errors
    /// It does not.
    fn try_it(&mut self) -> Result<(), WireError>;
}
