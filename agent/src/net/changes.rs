//! Changes of this namespace's neighbour and forwarding tables together, taken when somebody looks: one subscription, no thread.
//!
//! Owns one socket of `RTNLGRP_NEIGH`. What is not taken in time the kernel drops, and says so: then the tables have to be read again.

use std::time::Duration;

use netlink_packet_route::neighbour::NeighbourMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::NetError;
use super::fdb::GROUP_NEIGH;
use super::neighbour::Neighbour;
use super::netlink::{Event, Events};

/// No more changes are taken at once: the rest waits for the next look.
const MOST_AT_ONCE: usize = 16_384;

/// What has changed since the last look.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Neighbours as they are now, in the order of their changes.
    pub neighbours: Vec<Neighbour>,
    /// A bridge has learnt or forgotten something.
    pub bridges: bool,
    /// Changes may be missing.
    pub lost: bool,
}

/// The subscription.
pub struct TableChanges(Events);

impl TableChanges {
    /// Every change from now on is told.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn open() -> Result<Self, NetError> {
        Ok(Self(Events::open(GROUP_NEIGH)?))
    }

    /// What has changed; does not wait.
    ///
    /// # Errors
    /// The kernel does not answer.
    pub fn take(&mut self) -> Result<Changes, NetError> {
        let mut changes = Changes::default();
        for _ in 0..MOST_AT_ONCE {
            match self.0.next(Duration::ZERO)? {
                None => break,
                Some(Event::Lost) => changes.lost = true,
                Some(Event::Message(RouteNetlinkMessage::NewNeighbour(message), _)) => note(&mut changes, &message),
                Some(Event::Message(..)) => {}
            }
        }
        Ok(changes)
    }
}

fn note(changes: &mut Changes, message: &NeighbourMessage) {
    match message.header.family {
        AddressFamily::Bridge => changes.bridges = true,
        AddressFamily::Inet | AddressFamily::Inet6 => {
            changes.neighbours.extend(Neighbour::from_message(message).filter(|neighbour| !neighbour.doubtful));
        }
        _ => {}
    }
}
