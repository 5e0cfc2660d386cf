//! This network namespace's interfaces, as tunnels are made of them.

use std::net::IpAddr;

use super::{NetError, bridge, device, fdb, neighbour, wireguard};
use crate::model::{MacAddress, WireguardKey, chain};
use crate::port::{VxlanDevice, WireError, WireguardDevice, WireguardPeer, Wires};

/// The interfaces of the calling thread's network namespace.
#[derive(Clone, Copy, Debug, Default)]
pub struct HostWires;

impl From<NetError> for WireError {
    fn from(error: NetError) -> Self {
        Self(chain(&error))
    }
}

impl Wires for HostWires {
    fn make_vxlan(&mut self, device: &VxlanDevice) -> Result<(), WireError> {
        Ok(device::make_vxlan(device)?)
    }

    fn make_wireguard(&mut self, device: &WireguardDevice) -> Result<(), WireError> {
        Ok(wireguard::make(device)?)
    }

    fn key_of(&mut self, device: &str) -> Result<WireguardKey, WireError> {
        Ok(wireguard::key_of(device)?)
    }

    fn meet(&mut self, device: &str, peer: &WireguardPeer) -> Result<(), WireError> {
        Ok(wireguard::meet(device, peer)?)
    }

    fn make_bridge(&mut self, name: &str, mtu_bytes: u32) -> Result<(), WireError> {
        Ok(device::make_bridge(name, mtu_bytes)?)
    }

    fn remove(&mut self, name: &str) -> Result<(), WireError> {
        Ok(device::remove(name)?)
    }

    fn join(&mut self, port: &str, bridge: &str, answers: bool) -> Result<(), WireError> {
        Ok(device::join(port, bridge, answers)?)
    }

    fn leave(&mut self, port: &str, bridge: &str) -> Result<(), WireError> {
        Ok(device::leave(port, bridge)?)
    }

    fn bridge_of(&mut self, port: &str) -> Result<Option<String>, WireError> {
        Ok(bridge::bridge_of(port)?.map(|bridge| bridge.name))
    }

    fn know(&mut self, bridge: &str, ip: IpAddr, mac: MacAddress) -> Result<(), WireError> {
        Ok(neighbour::set(bridge, ip, mac)?)
    }

    fn forget(&mut self, bridge: &str, ip: IpAddr, mac: MacAddress) -> Result<(), WireError> {
        Ok(neighbour::unset(bridge, ip, mac)?)
    }

    fn point(&mut self, mac: MacAddress, port: &str) -> Result<(), WireError> {
        Ok(fdb::point(mac, port)?)
    }
}
