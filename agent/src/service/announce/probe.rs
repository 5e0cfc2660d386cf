//! Whether somebody else has what a VM is to be announced with: asks the network, and looks into the bridge's table.
//!
//! The questions come from the host's own address, not the VM's: a frame from that would already move it in every switch on the way. They are sent three times within the time that answers are
//! waited for, which is shorter than RFC 5227 has it for hosts that come up (7 s): the VM is out of reach meanwhile.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::{AnnounceError, Place, way_out};
use crate::announce::conflict::Answers;
use crate::announce::{frames, heard};
use crate::model::MacAddress;
use crate::model::network::{Conflict, ConflictKind, ProbeReport};
use crate::net::bridge::{self, Link, LinkKind};
use crate::net::fdb::{FdbEntry, FdbKind, FdbWatch};
use crate::net::listen;
use crate::net::pnet::PnetPort;
use crate::port::FramePort;
use crate::time::monotonic_now;

/// For how long answers are waited for, unless told otherwise.
pub const DEFAULT_PATIENCE: Duration = Duration::from_millis(300);
/// How often each question is asked (RFC 5227 §1.1, PROBE_NUM).
const QUESTIONS: u32 = 3;
/// How long a wait may take to notice that it is cancelled.
const CANCEL_LATENCY: Duration = Duration::from_millis(10);

/// Asks on the network of `place` for the addresses of its stations, and waits `patience` for answers.
///
/// # Errors
/// An interface that cannot be asked on or listened to; an address that no station has.
pub fn probe(place: &Place, patience: Duration, cancel: &AtomicBool) -> Result<ProbeReport, AnnounceError> {
    // It need not take frames from the VM yet.
    let asked_on = way_out(&place.interface)?;
    let link = bridge::link(&asked_on)?;
    let asker = link.mac.ok_or_else(|| AnnounceError::NoAsker(asked_on.clone()))?;
    let mut answers = Answers::to(&place.stations);
    let mut questions = Vec::new();
    for station in &place.stations {
        for ip in &station.ips {
            questions.push(frames::question(asker, *ip, station.vlan)?);
        }
    }
    let mut port = PnetPort::open(&asked_on)?;
    // Opened before the first question is sent.
    let mut listener = listen::Listener::open(&asked_on)?;
    let mut table = if link.kind == LinkKind::Bridge { Some(FdbWatch::open(&asked_on)?) } else { None };
    let mut places = table.as_mut().map(|table| table.entries()).transpose()?.unwrap_or_default();

    let began = monotonic_now();
    let (mut sent, mut rounds) = (0, 0);
    loop {
        let now = monotonic_now();
        if now >= began + patience || cancel.load(Ordering::Acquire) {
            break;
        }
        // All of them in the first half: the last has time to be answered.
        let due = |round: u32| began + patience * round / (2 * QUESTIONS);
        if rounds < QUESTIONS && now >= due(rounds) {
            for question in &questions {
                port.send(question.bytes()).map_err(|source| crate::net::NetError::Kernel {
                    action: format!("send a question on `{asked_on}`"),
                    source,
                })?;
                sent += 1;
            }
            rounds += 1;
        }
        let until = (began + patience).min(now + CANCEL_LATENCY);
        if let Some(passing) = listener.next(until)?
            && !passing.outgoing
            && let Some(heard) = heard::read(passing.frame)
        {
            answers.hear(&heard);
        }
    }
    if let Some(table) = &mut table {
        while let Some(change) = table.next_change(Duration::ZERO)? {
            if !change.removed {
                places.push(change.entry);
            }
        }
    }
    let waited = monotonic_now().saturating_sub(began);
    let addresses = answers.asked().count() as u32;
    let (own_answers, mut conflicts) = answers.into_parts();
    if let Some(table) = &mut table {
        say_where(&mut conflicts, &table.entries()?);
    }
    let links = bridge::links()?;
    for station in &place.stations {
        conflicts.extend(of_mac(station.mac, &place.interface, &places, &links));
    }
    Ok(ProbeReport {
        interface: place.interface.clone(),
        asked_on,
        addresses,
        questions_sent: sent,
        waited_ns: waited.as_nanos() as u64,
        own_answers,
        conflicts,
    })
}

/// Adds the ports that those who answered are behind.
fn say_where(conflicts: &mut [Conflict], table: &[FdbEntry]) {
    for conflict in conflicts {
        for entry in table.iter().filter(|entry| entry.mac == conflict.mac) {
            if !conflict.ports.contains(&entry.port) {
                conflict.ports.push(entry.port.clone());
            }
        }
    }
}

/// Whether another one of this host has `mac`: `seen` are the places at which the bridge has had it, in order.
fn of_mac(mac: MacAddress, interface: &str, seen: &[FdbEntry], links: &[Link]) -> Option<Conflict> {
    let conflict = |kind, ports: Vec<String>| Conflict { kind, mac, ip: None, ports };
    let mut ports: Vec<String> = Vec::new();
    for entry in seen.iter().filter(|entry| entry.mac == mac) {
        if ports.last() != Some(&entry.port) {
            ports.push(entry.port.clone());
        }
    }
    let local = seen.iter().find(|entry| entry.mac == mac && entry.kind == FdbKind::Local);
    if let Some(local) = local {
        return Some(conflict(ConflictKind::Mac, vec![local.port.clone()]));
    }
    let is_other_tap =
        |port: &String| port != interface && links.iter().any(|link| link.name == *port && link.kind == LinkKind::Tap);
    // Where a bridge was named, one of its taps may be the VM's own: only who changes places is told then.
    let named_tap = links.iter().any(|link| link.name == interface && link.kind == LinkKind::Tap);
    let taps: Vec<String> = ports.iter().filter(|port| named_tap && is_other_tap(port)).cloned().collect();
    if !taps.is_empty() {
        return Some(conflict(ConflictKind::Mac, taps));
    }
    // There and back: a VM that was moved while it was looked at goes only there.
    (ports.len() > 2).then(|| {
        ports.sort();
        ports.dedup();
        conflict(ConflictKind::Flapping, ports)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(port: &str, kind: FdbKind) -> FdbEntry {
        let mac = "02:00:00:00:00:01".parse().unwrap();
        FdbEntry { mac, port: port.to_owned(), vlan: None, kind, sticky: false, external: false, locked: false }
    }

    fn link(name: &str, kind: LinkKind) -> Link {
        Link { index: 1, name: name.to_owned(), kind, master: None, up: true, carrier: true, mac: None, port: None }
    }

    #[test]
    fn the_table_tells_others_with_the_same_ethernet_address() {
        let links = [link("tap0", LinkKind::Tap), link("tap1", LinkKind::Tap), link("up0", LinkKind::Other)];
        let mac = "02:00:00:00:00:01".parse().unwrap();
        let found = |ports: &[&str], kind| {
            let seen: Vec<_> = ports.iter().map(|port| entry(port, kind)).collect();
            of_mac(mac, "tap0", &seen, &links).map(|conflict| (conflict.kind, conflict.ports))
        };
        use FdbKind::{Learned, Local};
        assert_eq!(found(&[], Learned), None);
        assert_eq!(found(&["up0"], Learned), None, "it runs at its source");
        assert_eq!(found(&["up0", "tap0"], Learned), None, "it has just come");
        assert_eq!(found(&["tap1"], Learned), Some((ConflictKind::Mac, vec!["tap1".to_owned()])));
        assert_eq!(found(&["br0"], Local), Some((ConflictKind::Mac, vec!["br0".to_owned()])));
        let both = vec!["tap0".to_owned(), "up0".to_owned()];
        assert_eq!(found(&["up0", "tap0", "up0"], Learned), Some((ConflictKind::Flapping, both)));
    }
}
