//! Announcing by hand: which interface carries the frames, and the whole schedule on it.
//!
//! Joins [`crate::announce`] and [`crate::net`]. A tap under a bridge leads to the VM, not to the network: then the frames
//! are sent on the bridge, and the bridge itself is told what it would have learnt from a frame out of the tap.
//!
//! - [`find`] finds out what a VM is to be announced with;
//! - [`probe`] asks whether somebody else has it, [`inquiry`] beside something else;
//! - [`follow`] watches whether the network follows.

pub mod find;
pub mod follow;
pub mod inquiry;
pub mod probe;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use self::find::FindCardsError;
use self::follow::{Began, Follow};
use super::audit::{self, Action};
use super::clock::MonotonicClock;
use super::pacing::{PacedPort, Pacer};
use crate::announce::conflict::OnConflict;
use crate::announce::pace::Urgency;
use crate::announce::{AddressError, Announcer, Schedule};
use crate::model::network::{Conflict, Followed, ProbeReport, Seen};
use crate::model::{AnnounceReport, AnnounceRound, Station, VmId};
use crate::net::bridge::{self, LinkKind};
use crate::net::pnet::PnetPort;
use crate::net::{NetError, fdb};
use crate::port::FramePort;

/// An interface of this network namespace, and who is announced on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// The interface.
    pub interface: String,
    /// Who.
    pub stations: Vec<Station>,
}

/// What is to be announced, and where.
#[derive(Clone, Debug)]
pub struct AnnounceOrder {
    /// Where, and who; at least one.
    pub places: Vec<Place>,
    /// When.
    pub schedule: Schedule,
    /// What all who announce at this host may send together; none: no limit.
    pub frames_per_second: Option<u32>,
    /// Where those who announce at this host meet.
    pub run_dir: PathBuf,
    /// Whether it is asked before who has the addresses.
    pub on_conflict: OnConflict,
    /// For how long answers are waited for.
    pub probe_for: Duration,
    /// Whose tables are followed.
    pub follow: Vec<Follow>,
    /// How long after the first round these may take.
    pub within: Duration,
    /// The VM that this is done for, and where the audit log is; none: only addresses were named.
    pub vm: Option<(VmId, PathBuf)>,
}

/// What happens meanwhile.
#[derive(Clone, Copy, Debug)]
pub enum News<'a> {
    /// It was asked who has the addresses.
    Probed(&'a ProbeReport),
    /// A round was sent.
    Round(&'a AnnounceRound),
    /// A table changed.
    Seen(&'a Seen),
}

/// Who is told of it, from several threads.
pub type Listener<'a> = &'a (dyn Fn(News<'_>) + Sync);

/// What came of an announcement.
#[derive(Clone, Debug)]
pub struct Announced {
    /// What was sent.
    pub report: AnnounceReport,
    /// What became of it in the tables that were followed.
    pub followed: Vec<Followed>,
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
    /// The VM.
    #[error(transparent)]
    Find(#[from] FindCardsError),
    /// A tap whose bridge takes no frames from it, so that it cannot hold a VM that talks.
    #[error(
        "bridge `{bridge}` takes no frames from tap `{tap}`: does a VM hold the tap open, is it up, and does STP let it forward?"
    )]
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
    /// Somebody else has what was to be announced.
    #[error("{0}; nothing was announced (--on-conflict warn announces all the same)")]
    Conflict(Conflict),
    /// There is nobody to ask for an answer.
    #[error("interface `{0}` has no Ethernet address, so no answer could come back to it")]
    NoAsker(String),
}

/// Carries out `order`, telling `listener` what happens, until the schedule ends or `cancel` is set.
///
/// # Errors
/// It was refused; nothing was sent. Frames refused later are counted in the report.
pub fn announce(
    order: &AnnounceOrder,
    cancel: &AtomicBool,
    listener: Listener<'_>,
) -> Result<Announced, AnnounceError> {
    let stations: Vec<Station> = order.places.iter().flat_map(|place| place.stations.iter().cloned()).collect();
    let announcer = Announcer::new(&stations, order.schedule)?;
    let mut ports = Ports::open(&order.places)?;
    if order.on_conflict != OnConflict::Off {
        for place in &order.places {
            let report = probe::probe(place, order.probe_for, cancel)?;
            listener(News::Probed(&report));
            if let (OnConflict::Refuse, Some(conflict)) = (order.on_conflict, report.conflicts.into_iter().next()) {
                return Err(AnnounceError::Conflict(conflict));
            }
        }
    }
    let watched = follow::beside(&stations, &order.follow, order.within, cancel, listener, |began| {
        send(order, &announcer, &mut ports, stations.clone(), began, cancel, listener)
    });
    let (report, followed) = watched?;
    if let Some((vm_id, state_dir)) = &order.vm {
        let result = match &report {
            Ok(report) => format!("{} frames on {}", report.frames_sent, report.sent_on),
            Err(error) => error.to_string(),
        };
        let (before, after) = (String::new(), String::new());
        audit::record(state_dir, &Action { who: audit::me(), what: "announce", vm_id: *vm_id, before, after, result });
    }
    Ok(Announced { report: report?, followed })
}

/// The rounds.
fn send(
    order: &AnnounceOrder,
    announcer: &Announcer,
    ports: &mut Ports,
    stations: Vec<Station>,
    began: &Began,
    cancel: &AtomicBool,
    listener: Listener<'_>,
) -> Result<AnnounceReport, NetError> {
    let mut report = AnnounceReport {
        interface: ports.asked_for.join(","),
        sent_on: ports.names.join(","),
        stations,
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
        listener(News::Round(round));
    };
    let clock = MonotonicClock;
    let pacer = Pacer::join(&order.run_dir, order.frames_per_second);
    began.now();
    ports.teach()?;
    let mut paced = PacedPort { port: ports, pacer: &pacer, urgency: Urgency::First, clock: &clock, cancel };
    let first = announcer.first_round(&mut paced, &clock, cancel);
    count(&first.round);
    paced.urgency = Urgency::Later;
    let cancelled = announcer.repeat(&first, &mut paced, &clock, cancel, &mut count);
    report.cancelled = cancelled;
    Ok(report)
}

/// The sockets that a VM's frames leave by: each frame by those of its own card, which its source address names.
struct Ports {
    /// The interfaces that were named, and those that carry their frames.
    asked_for: Vec<String>,
    names: Vec<String>,
    sockets: Vec<PnetPort>,
    by_source: HashMap<[u8; 6], Vec<usize>>,
    /// What bridges are told: a tap, and who is behind it.
    taps: Vec<Place>,
}

impl Ports {
    fn open(places: &[Place]) -> Result<Self, AnnounceError> {
        let empty = Vec::new;
        let mut open = Self {
            asked_for: empty(),
            names: empty(),
            sockets: Vec::new(),
            by_source: HashMap::new(),
            taps: Vec::new(),
        };
        for place in places {
            let carrier = match carrier_of(&place.interface) {
                Ok(carrier) => carrier,
                // Of several taps of a VM one may lead nowhere.
                Err(error @ (AnnounceError::DeadTap { .. } | AnnounceError::LoneTap { .. })) if places.len() > 1 => {
                    tracing::warn!("left out: {error}");
                    continue;
                }
                Err(error) => return Err(error),
            };
            if carrier != place.interface {
                open.taps.push(place.clone());
            }
            open.asked_for.push(place.interface.clone());
            let at = match open.names.iter().position(|name| *name == carrier) {
                Some(at) => at,
                None => {
                    open.sockets.push(PnetPort::open(&carrier)?);
                    open.names.push(carrier);
                    open.sockets.len() - 1
                }
            };
            for station in &place.stations {
                let ports = open.by_source.entry(station.mac.bytes()).or_default();
                if !ports.contains(&at) {
                    ports.push(at);
                }
            }
        }
        if open.sockets.is_empty() {
            return Err(places.first().map_or_else(
                || NetError::NoSuchInterface { name: String::new() }.into(),
                |place| AnnounceError::LoneTap { tap: place.interface.clone() },
            ));
        }
        Ok(open)
    }

    /// Tells the bridges of taps who is behind these.
    fn teach(&self) -> Result<(), NetError> {
        for place in &self.taps {
            for station in &place.stations {
                fdb::learn(station.mac, &place.interface)?;
            }
        }
        Ok(())
    }
}

impl FramePort for Ports {
    fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        let source = frame.get(6..12).and_then(|source| self.by_source.get(source));
        for &at in source.into_iter().flatten() {
            self.sockets[at].send(frame)?;
        }
        Ok(())
    }
}

/// The interface that leads to the network from `interface`, whether a VM behind that can talk or not.
fn way_out(interface: &str) -> Result<String, AnnounceError> {
    if bridge::link(interface)?.kind != LinkKind::Tap {
        return Ok(interface.to_owned());
    }
    match bridge::bridge_of(interface)? {
        Some(bridge) => Ok(bridge.name),
        None => Err(AnnounceError::LoneTap { tap: interface.to_owned() }),
    }
}

/// The interface that carries frames to the network for `interface`.
fn carrier_of(interface: &str) -> Result<String, AnnounceError> {
    let link = bridge::link(interface)?;
    if link.kind != LinkKind::Tap {
        return Ok(interface.to_owned());
    }
    let forwards = link.forwards();
    let tap = link.name;
    match bridge::bridge_of(interface)? {
        Some(bridge) if forwards => Ok(bridge.name),
        Some(bridge) => Err(AnnounceError::DeadTap { tap, bridge: bridge.name }),
        None => Err(AnnounceError::LoneTap { tap }),
    }
}
