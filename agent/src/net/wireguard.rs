//! WireGuard devices: made over rtnetlink, given keys and their one peer over generic netlink.
//!
//! Owns the family `wireguard` (include/uapi/linux/wireguard.h). A private key is made here, given to the kernel, and kept nowhere else; the kernel says the public one. Must not know what is sent through.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use netlink_packet_generic::GenlMessage;
use netlink_packet_generic::ctrl::nlas::GenlCtrlAttrs;
use netlink_packet_generic::ctrl::{GenlCtrl, GenlCtrlCmd};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_wireguard::{
    WireguardAddressFamily, WireguardAllowedIp, WireguardAllowedIpAttr, WireguardAttribute, WireguardCmd,
    WireguardMessage, WireguardPeer as Peer, WireguardPeerAttribute, WireguardPeerFlags,
};
use rustix::rand::{GetRandomFlags, getrandom};

use super::NetError;
use super::netlink::Requests;
use super::{bridge, device, inner};
use crate::model::{WireguardKey, WireguardTraffic};
use crate::port::{WireguardDevice, WireguardPeer};

/// The family's name.
const FAMILY: &str = "wireguard";
/// So often something is sent that finds the way back through what lets only answers pass, in seconds (wg(8)).
const KEEPALIVE_S: u16 = 25;

/// What of the kernel is missing.
fn not_there() -> NetError {
    NetError::NotInKernel { what: "WireGuard", remedy: "it has been in Linux since 5.6, as module `wireguard`" }
}

/// Makes a device with a fresh key, gives it its address and the route to its peer's, and brings it up.
///
/// # Errors
/// The kernel has no WireGuard; there is a device of that name; its port is in use; no right to.
pub fn make(spec: &WireguardDevice) -> Result<(), NetError> {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(spec.name.clone()),
        LinkAttribute::Mtu(spec.device_mtu_bytes),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Wireguard)]),
    ];
    let action = format!("make the WireGuard device `{}`", spec.name);
    let made = device::create(&spec.name, message, &action, |index| {
        let key = fresh_key().map_err(|source| NetError::Kernel { action: "make a key".to_owned(), source })?;
        let attributes = vec![
            WireguardAttribute::IfIndex(index),
            WireguardAttribute::PrivateKey(key),
            WireguardAttribute::ListenPort(spec.port),
        ];
        set(attributes, &format!("give `{}` a key", spec.name))?;
        inner::give(index, spec.local)?;
        // It listens from here on.
        device::bring_up(&spec.name, index).map_err(|error| match error {
            NetError::Kernel { source, .. } if source.kind() == io::ErrorKind::AddrInUse => {
                NetError::PortInUse { port: spec.port }
            }
            error => error,
        })?;
        inner::lead(index, spec.local, spec.remote, spec.mtu_bytes)
    });
    made.map_err(|error| match error {
        NetError::Kernel { source, .. } if source.raw_os_error() == Some(libc::EOPNOTSUPP) => not_there(),
        error => error,
    })
}

/// Gives a device its one peer. It is greeted at once.
///
/// # Errors
/// There is no such device, or the kernel refuses.
pub fn meet(name: &str, peer: &WireguardPeer) -> Result<(), NetError> {
    let allowed = WireguardAllowedIp(vec![
        WireguardAllowedIpAttr::Family(WireguardAddressFamily::Ipv4),
        WireguardAllowedIpAttr::IpAddr(IpAddr::V4(peer.inner)),
        WireguardAllowedIpAttr::Cidr(32),
    ]);
    let peer = Peer(vec![
        WireguardPeerAttribute::PublicKey(peer.key.0),
        WireguardPeerAttribute::Flags(WireguardPeerFlags::ReplaceAllowedIps),
        WireguardPeerAttribute::Endpoint(peer.endpoint),
        WireguardPeerAttribute::PersistentKeepalive(KEEPALIVE_S),
        WireguardPeerAttribute::AllowedIps(vec![allowed]),
    ]);
    let index = bridge::link(name)?.index;
    let attributes = vec![WireguardAttribute::IfIndex(index), WireguardAttribute::Peers(vec![peer])];
    set(attributes, &format!("tell `{name}` its peer"))
}

/// The public key of a device.
///
/// # Errors
/// There is none of that name, or it has no key.
pub fn key_of(name: &str) -> Result<WireguardKey, NetError> {
    let key = get(name)?.into_iter().find_map(|attribute| match attribute {
        WireguardAttribute::PublicKey(key) => Some(WireguardKey(key)),
        _ => None,
    });
    let none = || NetError::WrongKind { name: name.to_owned(), expected: "WireGuard device with a key" };
    key.ok_or_else(none)
}

/// What a device and its peer have to say of one another; `None` if there is no device of that name.
///
/// # Errors
/// The kernel does not answer.
pub fn traffic(name: &str) -> Result<Option<WireguardTraffic>, NetError> {
    let attributes = match get(name) {
        Ok(attributes) => attributes,
        Err(NetError::NoSuchInterface { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    let mut traffic = WireguardTraffic::default();
    let peers = attributes.into_iter().filter_map(|attribute| match attribute {
        WireguardAttribute::Peers(peers) => Some(peers),
        _ => None,
    });
    for attribute in peers.flatten().flat_map(|peer| peer.0) {
        match attribute {
            // Zero: never.
            WireguardPeerAttribute::LastHandshake(time) => {
                let since = Duration::new(
                    u64::try_from(time.seconds).unwrap_or(0),
                    u32::try_from(time.nano_seconds).unwrap_or(0).min(999_999_999),
                );
                traffic.last_handshake_unix_ms = (!since.is_zero()).then_some(since.as_millis() as u64);
            }
            WireguardPeerAttribute::RxBytes(bytes) => traffic.received_bytes = bytes,
            WireguardPeerAttribute::TxBytes(bytes) => traffic.sent_bytes = bytes,
            _ => {}
        }
    }
    Ok(Some(traffic))
}

/// 32 random bytes; the kernel clears the bits that a key has not (RFC 7748, section 5).
fn fresh_key() -> io::Result<[u8; 32]> {
    let mut key = [0; 32];
    let got = getrandom(&mut key[..], GetRandomFlags::empty())?;
    if got == key.len() { Ok(key) } else { Err(io::Error::other("too few random bytes")) }
}

/// The number of the family since the module was loaded.
fn family() -> Result<u16, NetError> {
    let attributes = vec![GenlCtrlAttrs::FamilyName(FAMILY.to_owned())];
    let request = GenlMessage::from_payload(GenlCtrl { cmd: GenlCtrlCmd::GetFamily, nlas: attributes });
    let mut requests = Requests::<GenlMessage<GenlCtrl>>::open_generic()?;
    let answers = requests.ask(request, 0, "ask for the kernel's WireGuard").map_err(|error| match error {
        NetError::Kernel { source, .. } if source.kind() == io::ErrorKind::NotFound => not_there(),
        error => error,
    })?;
    let number = answers.iter().flat_map(|answer| &answer.payload.nlas).find_map(|attribute| match attribute {
        GenlCtrlAttrs::FamilyId(number) => Some(*number),
        _ => None,
    });
    number.ok_or_else(not_there)
}

/// A request to the family.
fn request(cmd: WireguardCmd, attributes: Vec<WireguardAttribute>) -> Result<GenlMessage<WireguardMessage>, NetError> {
    let mut request = GenlMessage::from_payload(WireguardMessage { cmd, attributes });
    request.set_resolved_family_id(family()?);
    Ok(request)
}

fn set(attributes: Vec<WireguardAttribute>, action: &str) -> Result<(), NetError> {
    let request = request(WireguardCmd::SetDevice, attributes)?;
    Requests::open_generic()?.change(request, 0, action)
}

/// All that the kernel says of a device: in several parts, if it is much.
fn get(name: &str) -> Result<Vec<WireguardAttribute>, NetError> {
    let index = bridge::link(name)?.index;
    let request = request(WireguardCmd::GetDevice, vec![WireguardAttribute::IfIndex(index)])?;
    let parts = Requests::open_generic()?.dump(&request, &format!("ask what `{name}` does"))?;
    Ok(parts.into_iter().flat_map(|part| part.payload.attributes).collect())
}
