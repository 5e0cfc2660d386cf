//! What is announced, and what came of it.

use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::mac::MacAddress;
use super::schema::Schema;
use super::spec::SpecError;
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
    /// Routers that the station sends by: each is asked, in the station's name, for its Ethernet address, which may be another one at a new place. The station hears the answer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gateways: Vec<IpAddr>,
}

impl Station {
    /// A station with no tags, of which no address is a router's.
    pub fn new(mac: MacAddress, ips: Vec<IpAddr>) -> Self {
        Self { mac, ips, routers: Vec::new(), vlan: None, gateways: Vec::new() }
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

    /// Takes what is said of it for another place: whatever is not said there stays as it was.
    pub fn place_as(&mut self, there: &Self) {
        if !there.ips.is_empty() {
            (self.ips, self.routers) = (there.ips.clone(), there.routers.clone());
        }
        if !there.gateways.is_empty() {
            self.gateways.clone_from(&there.gateways);
        }
        self.vlan = there.vlan.or(self.vlan);
    }

    /// Which of its addresses it asks for `gateway` from: one of the same family, for a link-local one a link-local one. None if it has no such.
    pub fn asks_from(&self, gateway: IpAddr) -> Option<IpAddr> {
        let is_local = |ip: &IpAddr| matches!(ip, IpAddr::V6(ip) if ip.is_unicast_link_local());
        let mut of_family = self.ips.iter().filter(|ip| ip.is_ipv4() == gateway.is_ipv4());
        of_family.clone().find(|ip| is_local(ip) == is_local(&gateway)).or_else(|| of_family.next()).copied()
    }

    /// What it has beyond its addresses, as it is written; empty if it has nothing.
    pub fn further(&self) -> String {
        let routers = self.routers.iter().map(|ip| format!("router={ip}"));
        let gateways = self.gateways.iter().map(|ip| format!("gateway={ip}"));
        let vlan = self.vlan.iter().map(|tags| format!("vlan={tags}"));
        routers.chain(gateways).chain(vlan).collect::<Vec<_>>().join(",")
    }

    /// Takes what [`Station::further`] has written.
    ///
    /// # Errors
    /// Text that is none of it.
    pub fn take_further(&mut self, text: &str) -> Result<(), SpecError> {
        text.split(',').try_for_each(|part| self.take(text, part))
    }

    /// Takes one `part` of `text`.
    fn take(&mut self, text: &str, part: &str) -> Result<(), SpecError> {
        let wrong = |problem: String| SpecError::new(text, problem);
        let address = |text: &str| text.parse().map_err(|_| wrong(format!("has a bad address `{text}`")));
        match part.split_once('=') {
            Some(("ip", ip)) => self.add_ip(address(ip)?),
            Some(("router", ip)) => {
                self.add_router(ip.parse().map_err(|_| wrong(format!("has `{ip}`, which is no IPv6 address")))?);
            }
            Some(("gateway", ip)) => {
                let gateway = address(ip)?;
                if !self.gateways.contains(&gateway) {
                    self.gateways.push(gateway);
                }
            }
            Some(("vlan", tags)) if self.vlan.is_none() => {
                self.vlan = Some(tags.parse().map_err(|error| wrong(format!("has a bad VLAN: {error}")))?);
            }
            _ => return Err(wrong(format!("has `{part}`; write {FORM}"))),
        }
        Ok(())
    }

    /// Whether each of its gateways can be asked.
    fn check(&self, text: &str) -> Result<(), SpecError> {
        match self.gateways.iter().find(|gateway| self.asks_from(**gateway).is_none()) {
            None => Ok(()),
            Some(gateway) => {
                Err(SpecError::new(text, format!("names the gateway {gateway} and no ip= of its family to ask from")))
            }
        }
    }
}

/// How a station is written.
const FORM: &str = "mac=M[,ip=A]...[,router=A]...[,gateway=A]...[,vlan=V]";

/// `mac=M[,ip=A]...[,router=A]...[,gateway=A]...[,vlan=V]`; `router=` is an IPv6 address of a station that routes, `gateway=` a router that it sends by.
impl FromStr for Station {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let wrong = |problem: String| SpecError::new(text, problem);
        let mut parts = text.split(',');
        let mac = parts.next().and_then(|part| part.strip_prefix("mac="));
        let mac = mac.ok_or_else(|| wrong("must begin with mac=".to_owned()))?;
        let mac = mac.parse().map_err(|error| wrong(format!("has a bad MAC: {error}")))?;
        let mut station = Self::new(mac, Vec::new());
        parts.try_for_each(|part| station.take(text, part))?;
        station.check(text)?;
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
            "mac=02:00:00:00:00:01,ip=10.0.0.2,router=fd00::2,ip=fd00::2,vlan=100.42,gateway=10.0.0.1".parse().unwrap();
        assert_eq!(station.ips, ["10.0.0.2", "fd00::2"].map(|ip| ip.parse::<IpAddr>().unwrap()));
        assert_eq!(station.routers, ["fd00::2".parse::<Ipv6Addr>().unwrap()]);
        let json = serde_json::to_string(&station).unwrap();
        assert_eq!(
            json,
            r#"{"mac":"02:00:00:00:00:01","ips":["10.0.0.2","fd00::2"],"routers":["fd00::2"],"vlan":"100.42","gateways":["10.0.0.1"]}"#
        );
        assert_eq!(station.further(), "router=fd00::2,gateway=10.0.0.1,vlan=100.42");
        let mut again = Station::new(station.mac, station.ips.clone());
        again.take_further(&station.further()).unwrap();
        assert_eq!(again, station);
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
            "mac=02:00:00:00:00:01,gateway=10.0.0.1",
            "mac=02:00:00:00:00:01,ip=10.0.0.2,gateway=fe80::1",
        ] {
            assert!(bad.parse::<Station>().is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn a_gateway_is_asked_for_from_an_address_that_it_can_answer() {
        let station: Station = "mac=02:00:00:00:00:01,ip=fd00::2,ip=10.0.0.2,ip=fe80::2".parse().unwrap();
        let asks = |gateway: &str| station.asks_from(gateway.parse().unwrap()).map(|ip| ip.to_string());
        let from = ["10.0.0.1", "fd00::1", "fe80::1"].map(asks);
        assert_eq!(from, ["10.0.0.2", "fd00::2", "fe80::2"].map(|ip| Some(ip.to_owned())));
        assert_eq!(Station::new(station.mac, Vec::new()).asks_from("10.0.0.1".parse().unwrap()), None);
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
