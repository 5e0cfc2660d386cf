//! A bridge's forwarding table: read it, change an entry, and wait until it has learnt where a station is.
//!
//! Owns `RTM_*NEIGH` of family `AF_BRIDGE`. Must not know why anybody waits. Waiting is by notification, never by
//! polling; the subscription is opened before the table is read, so nothing falls between.

use std::collections::HashMap;
use std::time::Duration;

use netlink_packet_route::neighbour::{
    NeighbourAttribute, NeighbourExtFlags, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};

use super::NetError;
use super::bridge::{self, Link, LinkKind};
use super::netlink::{Event, Events, Requests};
use crate::model::MacAddress;
use crate::model::network::EntryFacts;
use crate::time::monotonic_now;

/// `RTNLGRP_NEIGH`.
pub(super) const GROUP_NEIGH: u32 = 3;

/// How an entry came into the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FdbKind {
    /// Learnt from a frame; ages, and moves when the station does.
    Learned,
    /// Set by an operator; announcements do not move it.
    Static,
    /// The bridge's or port's own address.
    Local,
}

/// One line of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FdbEntry {
    /// The station.
    pub mac: MacAddress,
    /// The port it is behind (the bridge itself for its own address).
    pub port: String,
    /// The VLAN, where the bridge keeps them apart.
    pub vlan: Option<u16>,
    /// How it came here.
    pub kind: FdbKind,
    /// Does not move to another port (`NTF_STICKY`).
    pub sticky: bool,
    /// Set by another control plane (`NTF_EXT_LEARNED`).
    pub external: bool,
    /// Waits for authentication (`NTF_EXT_LOCKED`).
    pub locked: bool,
}

impl FdbEntry {
    /// What it says of why it does not move.
    pub fn facts(&self) -> EntryFacts {
        EntryFacts {
            port: self.port.clone(),
            local: self.kind == FdbKind::Local,
            fixed: self.kind == FdbKind::Static,
            sticky: self.sticky,
            external: self.external,
            locked: self.locked,
        }
    }
}

/// A change of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FdbChange {
    /// When the notification was read (`CLOCK_MONOTONIC`).
    pub seen_at: Duration,
    /// The entry as it is now, or as it was before it went.
    pub entry: FdbEntry,
    /// Whether it went.
    pub removed: bool,
}

/// When a bridge was seen to have learnt a station's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Learnt {
    /// When the notification was read, or the table if it held the entry already (`CLOCK_MONOTONIC`).
    pub seen_at: Duration,
    /// Whether the table held the entry when the wait began.
    pub already: bool,
}

/// Raw parts of an entry, before the port's index is given its name.
struct RawEntry {
    bridge_index: u32,
    port_index: u32,
    mac: MacAddress,
    vlan: Option<u16>,
    kind: FdbKind,
    sticky: bool,
    external: bool,
    locked: bool,
}

impl RawEntry {
    /// `None` for what is no unicast entry of a bridge's own table (NICs and tunnels list theirs under the same family).
    fn from_message(message: &NeighbourMessage) -> Option<Self> {
        if message.header.family != AddressFamily::Bridge {
            return None;
        }
        let (mut bridge_index, mut mac, mut vlan, mut locked) = (None, None, None, false);
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Controller(index) => bridge_index = Some(*index),
                NeighbourAttribute::LinkLayerAddress(bytes) => {
                    mac = <[u8; 6]>::try_from(&bytes[..]).ok().and_then(|bytes| MacAddress::new(bytes).ok());
                }
                NeighbourAttribute::Vlan(id) => vlan = Some(*id),
                NeighbourAttribute::ExtFlags(flags) => locked = flags.contains(NeighbourExtFlags::Locked),
                _ => {}
            }
        }
        let kind = match message.header.state {
            NeighbourState::Permanent => FdbKind::Local,
            NeighbourState::Noarp => FdbKind::Static,
            _ => FdbKind::Learned,
        };
        let flags = message.header.flags;
        Some(Self {
            bridge_index: bridge_index?,
            port_index: message.header.ifindex,
            mac: mac?,
            vlan,
            kind,
            sticky: flags.contains(NeighbourFlags::Sticky),
            external: flags.contains(NeighbourFlags::ExtLearned),
            locked,
        })
    }
}

/// A bridge whose table is followed.
pub struct FdbWatch {
    bridge: Link,
    names: HashMap<u32, String>,
    events: Events,
}

impl FdbWatch {
    /// Starts to follow the bridge `name`: every change from now on is seen by the calls that follow.
    ///
    /// # Errors
    /// There is no such interface, or it is no bridge.
    pub fn open(name: &str) -> Result<Self, NetError> {
        let events = Events::open(GROUP_NEIGH)?;
        let bridge = bridge::link(name)?;
        if bridge.kind != LinkKind::Bridge {
            return Err(NetError::WrongKind { name: name.to_owned(), expected: "bridge" });
        }
        let mut watch = Self { bridge, names: HashMap::new(), events };
        watch.read_names()?;
        Ok(watch)
    }

    /// The bridge's name.
    pub fn bridge(&self) -> &str {
        &self.bridge.name
    }

    /// The table as it is.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub fn entries(&mut self) -> Result<Vec<FdbEntry>, NetError> {
        let mut request = NeighbourMessage::default();
        request.header.family = AddressFamily::Bridge;
        let action = format!("read the forwarding table of `{}`", self.bridge.name);
        let objects = Requests::open()?.dump(&RouteNetlinkMessage::GetNeighbour(request), &action)?;
        objects
            .iter()
            .filter_map(|object| match object {
                RouteNetlinkMessage::NewNeighbour(message) => self.entry(message).transpose(),
                _ => None,
            })
            .collect()
    }

    /// The next change; `None` if there is none within `limit`. After an overrun of notifications, changes may be missing.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub fn next_change(&mut self, limit: Duration) -> Result<Option<FdbChange>, NetError> {
        let deadline = monotonic_now() + limit;
        loop {
            match self.events.next(deadline)? {
                None => return Ok(None),
                Some(Event::Lost) => {}
                Some(Event::Message(message, seen_at)) => {
                    if let Some(change) = self.change(&message, seen_at)? {
                        return Ok(Some(change));
                    }
                }
            }
        }
    }

    /// Waits until `mac` is behind `port`, in any VLAN, and says when that was seen. Changes from before the call are
    /// dropped: who wants the exact time waits, on a thread of its own, from before the announcement.
    ///
    /// # Errors
    /// It is not within `limit`; the error says where the station is instead.
    pub fn wait_behind(&mut self, mac: MacAddress, port: &str, limit: Duration) -> Result<Learnt, NetError> {
        let deadline = monotonic_now() + limit;
        let is_there = |entry: &FdbEntry| entry.mac == mac && entry.port == port;
        self.events.discard_pending()?;
        if self.entries()?.iter().any(is_there) {
            return Ok(Learnt { seen_at: monotonic_now(), already: true });
        }
        loop {
            let seen_at = match self.events.next(deadline)? {
                Some(Event::Lost) => monotonic_now(),
                Some(Event::Message(message, seen_at)) => {
                    if !self.change(&message, seen_at)?.is_some_and(|c| !c.removed && is_there(&c.entry)) {
                        continue;
                    }
                    seen_at
                }
                None => {
                    let found: Vec<String> = self
                        .entries()?
                        .iter()
                        .filter(|entry| entry.mac == mac)
                        .map(|entry| format!("`{}` ({:?})", entry.port, entry.kind))
                        .collect();
                    let instead = if found.is_empty() { "nowhere".to_owned() } else { found.join(", ") };
                    let what = format!("`{}` has {mac} behind `{port}` (it has it behind {instead})", self.bridge.name);
                    return Err(NetError::TimedOut { what, after: limit });
                }
            };
            // The event may be older than the table just read, and the station may have gone on since: only the table
            // says that it is there.
            if self.entries()?.iter().any(is_there) {
                return Ok(Learnt { seen_at, already: false });
            }
        }
    }

    fn change(&mut self, message: &RouteNetlinkMessage, seen_at: Duration) -> Result<Option<FdbChange>, NetError> {
        let (message, removed) = match message {
            RouteNetlinkMessage::NewNeighbour(message) => (message, false),
            RouteNetlinkMessage::DelNeighbour(message) => (message, true),
            _ => return Ok(None),
        };
        Ok(self.entry(message)?.map(|entry| FdbChange { seen_at, entry, removed }))
    }

    fn entry(&mut self, message: &NeighbourMessage) -> Result<Option<FdbEntry>, NetError> {
        let Some(raw) = RawEntry::from_message(message).filter(|raw| raw.bridge_index == self.bridge.index) else {
            return Ok(None);
        };
        if !self.names.contains_key(&raw.port_index) {
            self.read_names()?;
        }
        // A port that is gone by now has no name any more; its entries are going too.
        let port = self.names.get(&raw.port_index).cloned().unwrap_or_else(|| format!("if{}", raw.port_index));
        let RawEntry { mac, vlan, kind, sticky, external, locked, .. } = raw;
        Ok(Some(FdbEntry { mac, port, vlan, kind, sticky, external, locked }))
    }

    fn read_names(&mut self) -> Result<(), NetError> {
        self.names = bridge::links()?.into_iter().map(|link| (link.index, link.name)).collect();
        Ok(())
    }
}

/// The forwarding table of the bridge `name`.
///
/// # Errors
/// There is no such interface, or it is no bridge.
pub fn entries(name: &str) -> Result<Vec<FdbEntry>, NetError> {
    FdbWatch::open(name)?.entries()
}

/// Tells the bridge of `port` that `mac` is behind it, as if it had learnt it from a frame: a frame that the host sends
/// out of the bridge itself teaches other switches, but not this one.
///
/// # Errors
/// There is no such port, it is under no bridge or does not forward, or there is no right to.
pub fn learn(mac: MacAddress, port: &str) -> Result<(), NetError> {
    let link = bridge::link(port)?;
    // A port in another state is refused by the kernel with EPERM, which would read as a lack of rights.
    if !link.forwards() {
        return Err(NetError::WrongKind { name: port.to_owned(), expected: "forwarding port of a bridge" });
    }
    // NTF_MASTER: the bridge's table, not the port's own.
    put(mac, &link, NeighbourFlags::Controller)
}

/// Has the bridge of `port` send what is for `mac` there for as long as it hears nothing from `mac` elsewhere: unlike what it has learnt, such an entry does not age (`NTF_EXT_LEARNED`).
///
/// # Errors
/// There is no such port, it is under no bridge, or there is no right to.
pub fn point(mac: MacAddress, port: &str) -> Result<(), NetError> {
    let link = bridge::link(port)?;
    if link.port.is_none() {
        return Err(NetError::WrongKind { name: port.to_owned(), expected: "port of a bridge" });
    }
    put(mac, &link, NeighbourFlags::Controller | NeighbourFlags::ExtLearned)
}

fn put(mac: MacAddress, port: &Link, flags: NeighbourFlags) -> Result<(), NetError> {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = port.index;
    message.header.state = NeighbourState::Reachable;
    message.header.flags = flags;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.bytes().to_vec()));
    Requests::open()?.change(
        RouteNetlinkMessage::NewNeighbour(message),
        NLM_F_CREATE | NLM_F_REPLACE,
        &format!("put {mac} behind `{}`", port.name),
    )
}
