//! Links as the kernel lists them: which bridge a port belongs to, and whether the port forwards.
//!
//! Owns reading of `RTM_GETLINK` and its notifications. sysfs shows the namespace in which it was mounted, so it is not used.

use std::time::Duration;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    BridgePortState, InfoBridgePort, InfoKind, InfoPortData, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};

use super::NetError;
use super::netlink::{Event, Events, Requests};
use crate::model::MacAddress;
use crate::model::network::{PortFacts, PortState};
use crate::time::monotonic_now;

/// `RTNLGRP_LINK`.
const GROUP_LINK: u32 = 1;

/// What an interface is, as far as announcing has to know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkKind {
    /// A bridge.
    Bridge,
    /// A tun or tap: what is sent to it goes to the VM, not to the network.
    Tap,
    /// Anything else.
    Other,
}

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its index in this namespace.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// What it is.
    pub kind: LinkKind,
    /// The index of the bridge (or bond …) that it is a port of.
    pub master: Option<u32>,
    /// Administratively up.
    pub up: bool,
    /// Has a carrier; a tap has one while somebody holds it open.
    pub carrier: bool,
    /// Its own address.
    pub mac: Option<MacAddress>,
    /// Under a bridge: what the bridge does with frames from it.
    pub port: Option<PortFacts>,
}

impl Link {
    fn from_message(message: &LinkMessage) -> Option<Self> {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            kind: LinkKind::Other,
            master: None,
            up: message.header.flags.contains(LinkFlags::Up),
            carrier: message.header.flags.contains(LinkFlags::LowerUp),
            mac: None,
            port: None,
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::Controller(index) => link.master = Some(*index),
                LinkAttribute::LinkInfo(infos) => link.take(infos),
                LinkAttribute::Address(bytes) => {
                    link.mac = <[u8; 6]>::try_from(&bytes[..]).ok().and_then(|bytes| MacAddress::new(bytes).ok());
                }
                _ => {}
            }
        }
        (!link.name.is_empty()).then_some(link)
    }

    fn take(&mut self, infos: &[LinkInfo]) {
        for info in infos {
            match info {
                LinkInfo::Kind(InfoKind::Bridge) => self.kind = LinkKind::Bridge,
                LinkInfo::Kind(InfoKind::Tun) => self.kind = LinkKind::Tap,
                LinkInfo::PortData(InfoPortData::BridgePort(port)) => self.port = Some(port_facts(port)),
                _ => {}
            }
        }
    }

    /// Under a bridge: whether frames from it are learnt from and passed on.
    pub fn forwards(&self) -> bool {
        self.port.is_some_and(|port| port.state == PortState::Forwarding)
    }
}

/// What a port's attributes say (`IFLA_BRPORT_*`, include/uapi/linux/if_link.h).
fn port_facts(attributes: &[InfoBridgePort]) -> PortFacts {
    let mut facts = PortFacts { state: PortState::Disabled, learning: false, locked: false, mab: false };
    for attribute in attributes {
        match attribute {
            InfoBridgePort::State(state) => {
                facts.state = match state {
                    BridgePortState::Forwarding => PortState::Forwarding,
                    BridgePortState::Learning => PortState::Learning,
                    BridgePortState::Listening => PortState::Listening,
                    BridgePortState::Blocking => PortState::Blocking,
                    _ => PortState::Disabled,
                }
            }
            InfoBridgePort::Learning(on) => facts.learning = *on,
            InfoBridgePort::Locked(on) => facts.locked = *on,
            InfoBridgePort::Mab(on) => facts.mab = *on,
            _ => {}
        }
    }
    facts
}

/// All interfaces of this namespace.
///
/// # Errors
/// The kernel does not answer.
pub fn links() -> Result<Vec<Link>, NetError> {
    let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let objects = Requests::open()?.dump(&request, "list the interfaces")?;
    Ok(objects
        .iter()
        .filter_map(|object| match object {
            RouteNetlinkMessage::NewLink(message) => Link::from_message(message),
            _ => None,
        })
        .collect())
}

/// The interface called `name`.
///
/// # Errors
/// There is none.
pub fn link(name: &str) -> Result<Link, NetError> {
    let mut links = links()?;
    let at = links.iter().position(|link| link.name == name);
    at.map(|at| links.swap_remove(at)).ok_or_else(|| NetError::NoSuchInterface { name: name.to_owned() })
}

/// The bridge that the interface `port` belongs to; `None` if it belongs to none.
///
/// # Errors
/// There is no such interface.
pub fn bridge_of(port: &str) -> Result<Option<Link>, NetError> {
    let mut links = links()?;
    let Some(link) = links.iter().find(|link| link.name == port) else {
        return Err(NetError::NoSuchInterface { name: port.to_owned() });
    };
    let master = link.master;
    let at = links.iter().position(|link| Some(link.index) == master && link.kind == LinkKind::Bridge);
    Ok(at.map(|at| links.swap_remove(at)))
}

/// Waits until the bridge takes frames from its port `name`. A tap's carrier comes when it is opened, and the kernel tells
/// its bridge later, from a work queue: a target that has just opened its tap must wait for this before it announces.
///
/// # Errors
/// It does not forward within `limit`, or there is no such interface.
pub fn wait_forwarding(name: &str, limit: Duration) -> Result<(), NetError> {
    let deadline = monotonic_now() + limit;
    let mut events = Events::open(GROUP_LINK)?;
    loop {
        // Read the table after each event rather than trust one: bridge and link tell of a port in different messages.
        let link = link(name)?;
        if link.forwards() {
            return Ok(());
        }
        let concerned = loop {
            match events.next(deadline)? {
                Some(Event::Message(RouteNetlinkMessage::NewLink(message), _)) => {
                    if message.header.index == link.index {
                        break true;
                    }
                }
                Some(Event::Lost) => break true,
                Some(Event::Message(..)) => {}
                None => break false,
            }
        };
        if !concerned {
            let state = format!("up: {}, carrier: {}, bridge: {}", link.up, link.carrier, link.master.is_some());
            let what = format!("port `{name}` forwards ({state})");
            return Err(NetError::TimedOut { what, after: limit });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_there_and_nonsense_is_not() {
        let lo = link("lo").unwrap();
        assert_eq!((lo.kind, lo.master, lo.forwards()), (LinkKind::Other, None, false));
        assert_eq!(bridge_of("lo").unwrap(), None);
        assert!(matches!(link("nonesuch0"), Err(NetError::NoSuchInterface { .. })));
        assert!(matches!(wait_forwarding("lo", Duration::from_millis(1)), Err(NetError::TimedOut { .. })));
    }
}
