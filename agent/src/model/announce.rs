//! What is announced, and what came of it.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::config::NetSpec;
use super::mac::MacAddress;
use super::schema::Schema;

/// One network card of a VM: its Ethernet address and the IP addresses that answer on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Station {
    /// The Ethernet address that switches should relearn.
    pub mac: MacAddress,
    /// Addresses that neighbours should map to it; may be empty.
    pub ips: Vec<IpAddr>,
}

impl From<&NetSpec> for Station {
    fn from(spec: &NetSpec) -> Self {
        Self { mac: spec.mac, ips: spec.ips.clone() }
    }
}

/// One round of announcements.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AnnounceRound {
    /// Counted from 0; round 0 leaves before the guest's first instruction.
    pub round: u32,
    /// When it began, after the beginning of round 0.
    pub after_first_ns: u64,
    /// Frames that the interface took.
    pub frames_sent: u32,
    /// Frames that it refused.
    pub frames_failed: u32,
    /// The first refusal's reason.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

impl Schema for AnnounceRound {
    const SCHEMA: &'static str = "dunlin.announce-round/v1";
}

/// A whole announcement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AnnounceReport {
    /// The interface that was asked for.
    pub interface: String,
    /// The interface that carried the frames: the bridge, if a tap under a bridge was asked for.
    pub sent_on: String,
    /// Who was announced.
    pub stations: Vec<Station>,
    /// Rounds of the schedule.
    pub rounds_planned: u32,
    /// Rounds that were carried out.
    pub rounds_done: u32,
    /// Frames that the interface took, over all rounds.
    pub frames_sent: u32,
    /// Frames that it refused, over all rounds.
    pub frames_failed: u32,
    /// Whether it was stopped before the last round.
    pub cancelled: bool,
}

impl Schema for AnnounceReport {
    const SCHEMA: &'static str = "dunlin.announce/v1";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_as_documented() {
        let round =
            AnnounceRound { round: 1, after_first_ns: 50_000_000, frames_sent: 3, frames_failed: 0, error: None };
        assert_eq!(
            serde_json::to_string(&round.tagged()).unwrap(),
            r#"{"schema":"dunlin.announce-round/v1","round":1,"after_first_ns":50000000,"frames_sent":3,"frames_failed":0}"#
        );
        let report = AnnounceReport {
            interface: "tap0".into(),
            sent_on: "br0".into(),
            stations: vec![Station {
                mac: "02:00:00:00:00:01".parse().unwrap(),
                ips: vec!["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
            }],
            rounds_planned: 5,
            rounds_done: 5,
            frames_sent: 20,
            frames_failed: 0,
            cancelled: false,
        };
        assert_eq!(
            serde_json::to_string(&report.tagged()).unwrap(),
            concat!(
                r#"{"schema":"dunlin.announce/v1","interface":"tap0","sent_on":"br0","#,
                r#""stations":[{"mac":"02:00:00:00:00:01","ips":["10.0.0.2","fd00::2"]}],"#,
                r#""rounds_planned":5,"rounds_done":5,"frames_sent":20,"frames_failed":0,"cancelled":false}"#
            )
        );
    }
}
