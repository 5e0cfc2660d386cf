//! Whether somebody else has what a VM is about to be announced with (RFC 5227 §2.1.1, RFC 4862 §5.4).
//!
//! Owns the judgement on what was heard after a question, and the policy. Must not know interfaces or tables.
//!
//! The VM itself may answer: while it is moved it still runs at its source. So an answer from its own Ethernet address is no conflict, and two stations with one
//! Ethernet address are told only by the tables that have seen both.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::Deserialize;

use super::heard::{Evidence, Heard};
use crate::model::network::{Conflict, ConflictKind};
use crate::model::{MacAddress, Station};

/// No more conflicts are listed: they are no list of who is in a network.
const MOST_CONFLICTS: usize = 64;

/// What a conflict is to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnConflict {
    /// Nobody asks.
    #[default]
    Off,
    /// It is said, and the VM is announced.
    Warn,
    /// The VM is not announced.
    Refuse,
}

/// A word that is no such policy.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no policy for conflicts; write refuse, warn or off")]
pub struct OnConflictError(String);

impl FromStr for OnConflict {
    type Err = OnConflictError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "off" => Ok(Self::Off),
            "warn" => Ok(Self::Warn),
            "refuse" => Ok(Self::Refuse),
            _ => Err(OnConflictError(text.to_owned())),
        }
    }
}

impl fmt::Display for OnConflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Warn => "warn",
            Self::Refuse => "refuse",
        })
    }
}

/// What was asked for, and who answered.
#[derive(Clone, Debug)]
pub struct Answers {
    asked: BTreeMap<IpAddr, MacAddress>,
    own: Vec<IpAddr>,
    conflicts: Vec<Conflict>,
}

impl Answers {
    /// Nobody has answered for the addresses of `stations` yet.
    pub fn to(stations: &[Station]) -> Self {
        let asked = stations.iter().flat_map(|station| station.ips.iter().map(|ip| (*ip, station.mac))).collect();
        Self { asked, own: Vec::new(), conflicts: Vec::new() }
    }

    /// The addresses that are asked for.
    pub fn asked(&self) -> impl Iterator<Item = IpAddr> {
        self.asked.keys().copied()
    }

    /// Takes a frame's word.
    pub fn hear(&mut self, heard: &Heard) {
        // Who merely sends from an address may be a translator or a test; who answers for it claims it.
        let Some((ip, Evidence::Arp | Evidence::Advertisement { .. })) = heard.ip else { return };
        let Some(owner) = self.asked.get(&ip) else { return };
        if heard.mac == *owner {
            if !self.own.contains(&ip) {
                self.own.push(ip);
            }
            return;
        }
        let conflict = Conflict { kind: ConflictKind::Address, mac: heard.mac, ip: Some(ip), ports: Vec::new() };
        if !self.conflicts.contains(&conflict) && self.conflicts.len() < MOST_CONFLICTS {
            self.conflicts.push(conflict);
        }
    }

    /// The addresses for which the VM itself answered, and what others answered for.
    pub fn into_parts(self) -> (Vec<IpAddr>, Vec<Conflict>) {
        (self.own, self.conflicts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::announce::frames;
    use crate::announce::heard;

    #[test]
    fn others_that_answer_are_conflicts_and_the_vm_itself_is_none() {
        let (own, other) = ("02:00:00:00:00:01".parse().unwrap(), "02:00:00:00:00:02".parse().unwrap());
        let (v4, v6) = ("10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap());
        let station: Station = "mac=02:00:00:00:00:01,ip=10.0.0.2,ip=fd00::2".parse().unwrap();
        let mut answers = Answers::to(&[station]);
        let mut hear = |frame: frames::Frame| answers.hear(&heard::read(frame.bytes()).unwrap());
        hear(frames::gratuitous_arp_reply(own, v4));
        hear(frames::gratuitous_arp_reply(other, "10.0.0.3".parse().unwrap()));
        hear(frames::arp_probe(other, v4));
        for _ in 0..2 {
            hear(frames::gratuitous_arp_reply(other, v4));
            hear(frames::unsolicited_na(other, v6, frames::RouterFlag::Host));
        }
        let (own_answers, conflicts) = answers.into_parts();
        assert_eq!(own_answers, [IpAddr::V4(v4)]);
        let found: Vec<_> = conflicts.iter().map(|conflict| (conflict.mac, conflict.ip.unwrap())).collect();
        assert_eq!(found, [(other, IpAddr::V4(v4)), (other, IpAddr::V6(v6))]);
        assert!(conflicts[0].to_string().contains("02:00:00:00:00:02 answers for 10.0.0.2"), "{}", conflicts[0]);
    }

    #[test]
    fn policies_read_as_they_are_written() {
        for policy in [OnConflict::Off, OnConflict::Warn, OnConflict::Refuse] {
            assert_eq!(policy.to_string().parse(), Ok(policy));
        }
        assert!("maybe".parse::<OnConflict>().is_err());
    }
}
