//! Announcing by hand: which interface carries the frames, and the whole schedule on it.
//!
//! Joins [`crate::announce`] and [`crate::net`]. A tap under a bridge leads to the VM, not to the network: then the frames
//! are sent on the bridge, and the bridge itself is told what it would have learnt from a frame out of the tap.

use std::path::PathBuf;
use std::sync::atomic::AtomicBool;

use super::clock::MonotonicClock;
use super::pacing::{PacedPort, Pacer};
use crate::announce::pace::Urgency;
use crate::announce::{AddressError, Announcer, Schedule};
use crate::model::{AnnounceReport, AnnounceRound, Station};
use crate::net::bridge::{self, LinkKind};
use crate::net::pnet::PnetPort;
use crate::net::{NetError, fdb};

/// What is to be announced, and where.
#[derive(Clone, Debug)]
pub struct AnnounceOrder {
    /// An interface of this network namespace.
    pub interface: String,
    /// Who.
    pub stations: Vec<Station>,
    /// When.
    pub schedule: Schedule,
    /// What all who announce at this host may send together; none: no limit.
    pub frames_per_second: Option<u32>,
    /// Where those who announce at this host meet.
    pub run_dir: PathBuf,
}

/// Refused before a frame was sent.
#[derive(Debug, thiserror::Error)]
pub enum AnnounceError {
    /// An address that cannot be announced.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The interface.
    #[error(transparent)]
    Interface(#[from] NetError),
    /// A tap whose bridge takes no frames from it, so that it cannot hold a VM that talks.
    #[error("bridge `{bridge}` takes no frames from tap `{tap}`: does a VM hold the tap open, and is it up?")]
    DeadTap {
        /// Its name.
        tap: String,
        /// The bridge it is under.
        bridge: String,
    },
    /// A tap that leads nowhere but to its VM.
    #[error("interface `{tap}` is a tap under no bridge: frames sent on it reach only the VM behind it")]
    LoneTap {
        /// Its name.
        tap: String,
    },
}

/// Carries out `order`, telling `on_round` of each round, until the schedule ends or `cancel` is set.
///
/// # Errors
/// It was refused; nothing was sent. Frames refused later are counted in the report.
pub fn announce(
    order: &AnnounceOrder,
    cancel: &AtomicBool,
    on_round: &mut dyn FnMut(&AnnounceRound),
) -> Result<AnnounceReport, AnnounceError> {
    let announcer = Announcer::new(&order.stations, order.schedule)?;
    let sent_on = carrier_of(&order.interface)?;
    let mut port = PnetPort::open(&sent_on)?;
    if sent_on != order.interface {
        for station in &order.stations {
            fdb::learn(station.mac, &order.interface)?;
        }
    }
    let mut report = AnnounceReport {
        interface: order.interface.clone(),
        sent_on,
        stations: order.stations.clone(),
        rounds_planned: order.schedule.rounds(),
        rounds_done: 0,
        frames_sent: 0,
        frames_failed: 0,
        cancelled: false,
    };
    let mut count = |round: &AnnounceRound| {
        report.rounds_done += 1;
        report.frames_sent += round.frames_sent;
        report.frames_failed += round.frames_failed;
        on_round(round);
    };
    let clock = MonotonicClock;
    let pacer = Pacer::join(&order.run_dir, order.frames_per_second);
    let mut paced = PacedPort { port: &mut port, pacer: &pacer, urgency: Urgency::First, clock: &clock, cancel };
    let first = announcer.first_round(&mut paced, &clock, cancel);
    count(&first.round);
    paced.urgency = Urgency::Later;
    let cancelled = announcer.repeat(&first, &mut paced, &clock, cancel, &mut count);
    report.cancelled = cancelled;
    Ok(report)
}

/// The interface that carries frames to the network for `interface`.
fn carrier_of(interface: &str) -> Result<String, AnnounceError> {
    let link = bridge::link(interface)?;
    if link.kind != LinkKind::Tap {
        return Ok(interface.to_owned());
    }
    let tap = link.name;
    match bridge::bridge_of(interface)? {
        Some(bridge) if link.forwarding => Ok(bridge.name),
        Some(bridge) => Err(AnnounceError::DeadTap { tap, bridge: bridge.name }),
        None => Err(AnnounceError::LoneTap { tap }),
    }
}
