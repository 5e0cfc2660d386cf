//! What is announced, and what came of it.

use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::config::{NetSpec, SpecError};
use super::mac::MacAddress;
use super::schema::Schema;
use super::vlan::VlanTags;

/// One network card of a VM: its Ethernet address and the IP addresses that answer on it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Station {
    /// The Ethernet address that switches should relearn.
    pub mac: MacAddress,
    /// Addresses that neighbours should map to it; may be empty.
    pub ips: Vec<IpAddr>,
    /// Those of them behind which a router is: their advertisements say so (RFC 4861 §4.4, flag R).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub routers: Vec<Ipv6Addr>,
    /// The tags that its frames carry where they are announced; none: they have no tag.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<VlanTags>,
}

impl Station {
    /// A station with no tags, of which no address is a router's.
    pub fn new(mac: MacAddress, ips: Vec<IpAddr>) -> Self {
        Self { mac, ips, routers: Vec::new(), vlan: None }
    }

    /// Adds an address, once.
    pub fn add_ip(&mut self, ip: IpAddr) {
        if !self.ips.contains(&ip) {
            self.ips.push(ip);
        }
    }

    /// Adds an address behind which a router is.
    pub fn add_router(&mut self, ip: Ipv6Addr) {
        self.add_ip(ip.into());
        if !self.routers.contains(&ip) {
            self.routers.push(ip);
        }
    }
}

impl From<&NetSpec> for Station {
    fn from(spec: &NetSpec) -> Self {
        Self::new(spec.mac, spec.ips.clone())
    }
}

/// `mac=M[,ip=A]...[,router=A]...[,vlan=V]`; `router=` is an IPv6 address of a station that routes.
impl FromStr for Station {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = |problem: String| SpecError::new(text, problem);
        let mut parts = text.split(',');
        let mac = parts.next().and_then(|part| part.strip_prefix("mac="));
        let mac = mac.ok_or_else(|| wrong("must begin with mac=".to_owned()))?;
        let mac = mac.parse().map_err(|error| wrong(format!("has a bad MAC: {error}")))?;
        let mut station = Self::new(mac, Vec::new());
        for part in parts {
            match part.split_once('=') {
                Some(("ip", address)) => {
                    station.add_ip(address.parse().map_err(|_| wrong(format!("has a bad address `{address}`")))?);
                }
                Some(("router", address)) => station.add_router(
                    address.parse().map_err(|_| wrong(format!("has `{address}`, which is no IPv6 address")))?,
                ),
                Some(("vlan", tags)) if station.vlan.is_none() => {
                    station.vlan = Some(tags.parse().map_err(|error| wrong(format!("has a bad VLAN: {error}")))?);
                }
                _ => return Err(wrong(format!("has `{part}`; write mac=M[,ip=A]...[,router=A]...[,vlan=V]"))),
            }
        }
        Ok(station)
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
    fn stations_read_as_documented() {
        let station: Station =
            "mac=02:00:00:00:00:01,ip=10.0.0.2,router=fd00::2,ip=fd00::2,vlan=100.42".parse().unwrap();
        assert_eq!(station.ips, ["10.0.0.2", "fd00::2"].map(|ip| ip.parse::<IpAddr>().unwrap()));
        assert_eq!(station.routers, ["fd00::2".parse::<Ipv6Addr>().unwrap()]);
        let json = serde_json::to_string(&station).unwrap();
        assert_eq!(
            json,
            r#"{"mac":"02:00:00:00:00:01","ips":["10.0.0.2","fd00::2"],"routers":["fd00::2"],"vlan":"100.42"}"#
        );
        assert_eq!(serde_json::from_str::<Station>(&json).unwrap(), station);
        for bad in [
            "",
            "ip=10.0.0.2",
            "mac=01:00:00:00:00:01",
            "mac=02:00:00:00:00:01,",
            "mac=02:00:00:00:00:01,router=10.0.0.1",
            "mac=02:00:00:00:00:01,vlan=1,vlan=2",
            "mac=02:00:00:00:00:01,vlan=5000",
            "mac=02:00:00:00:00:01,ip=nowhere",
        ] {
            assert!(bad.parse::<Station>().is_err(), "{bad} was accepted");
        }
    }

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
            stations: vec!["mac=02:00:00:00:00:01,ip=10.0.0.2,ip=fd00::2".parse().unwrap()],
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
