//! Interfaces that are made here: VXLAN devices (RFC 7348) and bridges; which bridge an interface is in; what a device has carried.
//!
//! Owns changing of links by `RTM_NEWLINK` and `RTM_DELLINK` (rtnetlink(7); attributes of include/uapi/linux/if_link.h). Must not know what they are made for.

use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, BridgeStpState, In6AddrGenMode, InfoBridge, InfoBridgePort, InfoData, InfoKind,
    InfoPortData, InfoPortKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};

use super::NetError;
use super::bridge;
use super::netlink::Requests;
use crate::model::TunnelTraffic;
use crate::port::VxlanDevice;

/// The first byte of the addresses of devices made here: locally administered, and higher than any other, since a bridge without an address of its own takes the lowest of its ports'.
const HIGH: u8 = 0xfe;

/// Makes a VXLAN device and brings it up. It learns nothing and sends everything to the one other host.
///
/// # Errors
/// There is one of that name, or of that identifier and port; the kernel has no VXLAN; no right to.
pub fn make_vxlan(device: &VxlanDevice) -> Result<(), NetError> {
    let mut data = vec![InfoVxlan::Id(device.vni.get()), InfoVxlan::Port(device.port), InfoVxlan::Learning(false)];
    data.push(match device.local {
        IpAddr::V4(local) => InfoVxlan::Local(local),
        IpAddr::V6(local) => InfoVxlan::Local6(local),
    });
    data.push(match device.remote {
        IpAddr::V4(remote) => InfoVxlan::Group(remote),
        IpAddr::V6(remote) => InfoVxlan::Group6(remote),
    });
    if let Some(through) = &device.through {
        data.push(InfoVxlan::Link(bridge::link(through)?.index));
    }
    let mut address = [0; 6];
    address.copy_from_slice(&uuid::Uuid::new_v4().as_bytes()[..6]);
    address[0] = HIGH;
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(device.name.clone()),
        LinkAttribute::Address(address.to_vec()),
        LinkAttribute::Mtu(device.mtu_bytes),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Vxlan), LinkInfo::Data(InfoData::Vxlan(data))]),
    ];
    let action =
        format!("make the VXLAN device `{}` with VNI {} and UDP port {}", device.name, device.vni, device.port);
    make(&device.name, message, &action)
}

/// Makes a bridge and brings it up: no STP, no wait before its ports forward, multicast as broadcast.
///
/// # Errors
/// There is an interface of that name; no right to.
pub fn make_bridge(name: &str, mtu_bytes: u32) -> Result<(), NetError> {
    let data = vec![
        InfoBridge::ForwardDelay(0),
        InfoBridge::StpState(BridgeStpState::Disabled),
        InfoBridge::MulticastSnooping(false),
    ];
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Mtu(mtu_bytes),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge), LinkInfo::Data(InfoData::Bridge(data))]),
    ];
    make(name, message, &format!("make the bridge `{name}`"))
}

/// Makes what `message` says, and brings it up without an IPv6 address of its own: it is to be silent. On failure nothing stays.
fn make(name: &str, message: LinkMessage, action: &str) -> Result<(), NetError> {
    create(name, message, action, |index| {
        let mut requests = Requests::open()?;
        let mut silent = of(index);
        let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
        silent.attributes.push(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])]));
        if let Err(error) = requests.change(RouteNetlinkMessage::SetLink(silent), 0, action) {
            tracing::debug!(name, "no IPv6 here: {error}");
        }
        bring_up(name, index)
    })
}

/// Makes what `message` says, and has `rest` complete it by its index. On failure nothing stays.
pub(super) fn create(
    name: &str,
    message: LinkMessage,
    action: &str,
    rest: impl FnOnce(u32) -> Result<(), NetError>,
) -> Result<(), NetError> {
    Requests::open()?.change(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL, action)?;
    bridge::link(name).and_then(|link| rest(link.index)).inspect_err(|_| {
        if let Err(error) = remove(name) {
            tracing::warn!("`{name}` stays behind: {error}");
        }
    })
}

/// Brings the link `index` up.
pub(super) fn bring_up(name: &str, index: u32) -> Result<(), NetError> {
    let mut up = of(index);
    (up.header.flags, up.header.change_mask) = (LinkFlags::Up, LinkFlags::Up);
    Requests::open()?.change(RouteNetlinkMessage::SetLink(up), 0, &format!("bring `{name}` up"))
}

/// Removes an interface; it is no error if there is none.
///
/// # Errors
/// It cannot be removed.
pub fn remove(name: &str) -> Result<(), NetError> {
    let link = match bridge::link(name) {
        Ok(link) => link,
        Err(NetError::NoSuchInterface { .. }) => return Ok(()),
        Err(error) => return Err(error),
    };
    Requests::open()?.change(RouteNetlinkMessage::DelLink(of(link.index)), 0, &format!("remove `{name}`"))
}

/// Puts an interface into a bridge. With `answers` the bridge answers questions for addresses that it knows to be behind this port, and does not send them there (`IFLA_BRPORT_NEIGH_SUPPRESS`).
///
/// # Errors
/// One of them is not there; no right to.
pub fn join(port: &str, bridge_name: &str, answers: bool) -> Result<(), NetError> {
    let index = bridge::link(port)?.index;
    let master = bridge::link(bridge_name)?;
    if master.kind != bridge::LinkKind::Bridge {
        return Err(NetError::WrongKind { name: bridge_name.to_owned(), expected: "bridge" });
    }
    let mut requests = Requests::open()?;
    let mut message = of(index);
    message.attributes.push(LinkAttribute::Controller(master.index));
    let action = format!("put `{port}` into bridge `{bridge_name}`");
    requests.change(RouteNetlinkMessage::SetLink(message), 0, &action)?;
    if answers {
        let mut message = of(index);
        let flags = InfoPortData::BridgePort(vec![InfoBridgePort::NeighSupress(true)]);
        message
            .attributes
            .push(LinkAttribute::LinkInfo(vec![LinkInfo::PortKind(InfoPortKind::Bridge), LinkInfo::PortData(flags)]));
        // An old kernel's bridge does not: then the VM answers for itself, through the tunnel.
        if let Err(error) = requests.change(RouteNetlinkMessage::NewLink(message), 0, &action) {
            tracing::warn!("bridge `{bridge_name}` will not answer for what is behind `{port}`: {error}");
        }
    }
    Ok(())
}

/// Takes an interface out of its bridge; it is no error if it is not there, or in another one.
///
/// # Errors
/// It cannot be taken out.
pub fn leave(port: &str, bridge_name: &str) -> Result<(), NetError> {
    let index = match bridge::bridge_of(port) {
        Ok(Some(now)) if now.name == bridge_name => bridge::link(port)?.index,
        Ok(_) | Err(NetError::NoSuchInterface { .. }) => return Ok(()),
        Err(error) => return Err(error),
    };
    let mut message = of(index);
    message.attributes.push(LinkAttribute::Controller(0));
    let action = format!("take `{port}` out of bridge `{bridge_name}`");
    Requests::open()?.change(RouteNetlinkMessage::SetLink(message), 0, &action)
}

/// An interface's MTU, in bytes.
///
/// # Errors
/// There is none of that name.
pub fn mtu_bytes(name: &str) -> Result<u32, NetError> {
    let message = look_up(name)?;
    let mtu = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    Ok(mtu.unwrap_or(1500))
}

/// What an interface has carried; `None` if there is none of that name.
///
/// # Errors
/// The kernel does not answer.
pub fn traffic(name: &str) -> Result<Option<TunnelTraffic>, NetError> {
    let message = match look_up(name) {
        Ok(message) => message,
        Err(NetError::NoSuchInterface { .. }) => return Ok(None),
        Err(error) => return Err(error),
    };
    let stats = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Stats64(stats) => Some(TunnelTraffic {
            received_bytes: stats.rx_bytes,
            received_packets: stats.rx_packets,
            sent_bytes: stats.tx_bytes,
            sent_packets: stats.tx_packets,
            lost_packets: stats.tx_errors + stats.tx_dropped,
        }),
        _ => None,
    });
    Ok(Some(stats.unwrap_or_default()))
}

/// A request about the link `index`.
fn of(index: u32) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message
}

fn look_up(name: &str) -> Result<LinkMessage, NetError> {
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let objects = Requests::open()?.dump(&request, "list the interfaces")?;
    let named = |message: &LinkMessage| {
        message.attributes.iter().any(|attribute| matches!(attribute, LinkAttribute::IfName(own) if own == name))
    };
    let found = objects.into_iter().find_map(|object| match object {
        RouteNetlinkMessage::NewLink(message) if named(&message) => Some(message),
        _ => None,
    });
    found.ok_or_else(|| NetError::NoSuchInterface { name: name.to_owned() })
}
