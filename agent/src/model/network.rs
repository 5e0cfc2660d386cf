//! What is known of a VM's place in a network: where its addresses were learnt, which table has relearned them, who else claims them, what passed through its ports.

use std::fmt;
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::id::VmId;
use super::mac::MacAddress;
use super::schema::Schema;
use super::vlan::VlanTags;

/// What passed through a port since the machine started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct PortCounters {
    /// Frames given to the guest.
    pub rx_frames: u64,
    /// Their bytes.
    pub rx_bytes: u64,
    /// Frames that fit no buffer of the guest, or found a malformed one.
    pub rx_dropped_frames: u64,
    /// Frames sent for the guest.
    pub tx_frames: u64,
    /// Their bytes.
    pub tx_bytes: u64,
    /// Frames of the guest that were malformed or that the tap refused (is it up?).
    pub tx_dropped_frames: u64,
    /// Frames sent on the guest's behalf, such as announcements.
    pub announced_frames: u64,
    /// Times that the guest's driver, asked to, has announced the guest itself, in all its VLANs.
    pub guest_announcements: u64,
    /// Of the frames given to the guest, those that came by a relay from its former place.
    pub relayed_frames: u64,
    /// Frames that came both through the port and by a relay, and were given to the guest once; or that had no room while they waited.
    pub relay_dropped_frames: u64,
}

/// How an address of a VM became known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LearntFrom {
    /// The operator said so.
    Given,
    /// A VM that dunlin runs was started with it.
    Configuration,
    /// Its VMM's command line.
    CommandLine,
    /// Its VMM's monitor.
    Monitor,
    /// The bridge's forwarding table has it behind the VM's tap.
    ForwardingTable,
    /// This host's neighbour table has it for the VM's Ethernet address.
    NeighbourTable,
    /// The VM sent a frame that says so.
    Traffic,
}

impl fmt::Display for LearntFrom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Given => "given",
            Self::Configuration => "its configuration",
            Self::CommandLine => "its command line",
            Self::Monitor => "its monitor",
            Self::ForwardingTable => "the forwarding table",
            Self::NeighbourTable => "the neighbour table",
            Self::Traffic => "its traffic",
        })
    }
}

/// An IP address of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FoundIp {
    /// The address.
    pub ip: IpAddr,
    /// How it became known.
    pub from: LearntFrom,
    /// Whether it said that it routes (IPv6); none if it has not said either.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub router: Option<bool>,
}

/// A network card of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FoundCard {
    /// The tap behind it.
    pub tap: String,
    /// Its Ethernet address.
    pub mac: MacAddress,
    /// How that became known.
    pub from: LearntFrom,
    /// The tags of its frames.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vlan: Option<VlanTags>,
    /// Its addresses.
    pub ips: Vec<FoundIp>,
}

/// What was found out about a VM, before it is announced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FoundVm {
    /// Its name.
    pub vm_name: String,
    /// Its identity.
    pub vm_id: VmId,
    /// Its process.
    pub pid: u32,
    /// For how long its taps were listened to.
    pub listened_ns: u64,
    /// Frames of the VM that were heard meanwhile.
    pub frames_heard: u64,
    /// Its network cards.
    pub cards: Vec<FoundCard>,
}

impl Schema for FoundVm {
    const SCHEMA: &'static str = "dunlin.announce-found/v1";
}

/// What a bridge does with frames from one of its ports (IEEE 802.1D-2004 §7.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PortState {
    /// Nothing: it is down, or has no carrier.
    Disabled,
    /// STP keeps it shut.
    Blocking,
    /// STP waits.
    Listening,
    /// Learns, and passes nothing on.
    Learning,
    /// Learns and passes on.
    Forwarding,
}

/// A port of a bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PortFacts {
    /// What it does with frames.
    pub state: PortState,
    /// Whether it learns addresses.
    pub learning: bool,
    /// Whether it takes frames of known addresses only (802.1X).
    pub locked: bool,
    /// Whether addresses that a locked port does not know are entered as locked (MAC authentication bypass).
    pub mab: bool,
}

/// An entry of a forwarding table for one address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryFacts {
    /// The port that it names.
    pub port: String,
    /// The bridge's or a port's own address.
    pub local: bool,
    /// Set by hand.
    pub fixed: bool,
    /// Does not move to another port.
    pub sticky: bool,
    /// Set by somebody else's control plane, as EVPN does.
    pub external: bool,
    /// Waits for authentication.
    pub locked: bool,
}

/// Why a bridge has not relearned where a station is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StuckCause {
    /// The bridge has no such port.
    NoSuchPort,
    /// The port is down or has no carrier.
    PortDown,
    /// STP keeps the port from forwarding.
    NotForwarding,
    /// The port does not learn.
    LearningOff,
    /// Port security takes only known addresses.
    PortLocked,
    /// The address waits for authentication.
    AwaitsAuthentication,
    /// An entry that never moves.
    StickyEntry,
    /// An entry set by hand.
    StaticEntry,
    /// An entry of another control plane.
    ExternalEntry,
    /// The address is the bridge's own.
    OwnAddress,
    /// It was there, and went elsewhere.
    MovedAway,
    /// No frame came by.
    Silence,
}

impl StuckCause {
    /// What is the case, in one sentence.
    pub const fn sentence(self) -> &'static str {
        match self {
            Self::NoSuchPort => "the bridge has no port of that name",
            Self::PortDown => "the port is down or has no carrier, so no frame comes in by it",
            Self::NotForwarding => "the spanning tree protocol does not let the port forward yet, or at all",
            Self::LearningOff => "the port does not learn addresses",
            Self::PortLocked => {
                "port security is on: the port drops frames from addresses that its table does not have behind it"
            }
            Self::AwaitsAuthentication => {
                "port security is on: the address was noted as locked, and waits to be authenticated"
            }
            Self::StickyEntry => "the table has a sticky entry for the address, which does not move to another port",
            Self::StaticEntry => "the table has a static entry for the address, set by hand",
            Self::ExternalEntry => {
                "another control plane (such as EVPN) has set the entry for the address, and decides where it is"
            }
            Self::OwnAddress => "the address is one of the bridge's or of its ports' own",
            Self::MovedAway => {
                "the address was relearned and then moved away again: somebody still sends frames from it elsewhere"
            }
            Self::Silence => "nothing forbids it: no announcement has come in by that port",
        }
    }

    /// What an operator can do about it.
    pub const fn remedy(self) -> &'static str {
        match self {
            Self::NoSuchPort => "`bridge link` lists the ports",
            Self::PortDown => "set the port up (`ip link set PORT up`), and see that its other end is",
            Self::NotForwarding => {
                "wait until it forwards and announce again, or make it an edge port (`stp_state 0`, a forward delay of 0, or `bpdu_guard` with portfast)"
            }
            Self::LearningOff => "`bridge link set dev PORT learning on`, or set the entry where it belongs",
            Self::PortLocked => {
                "add the address behind the port (`bridge fdb replace MAC dev PORT master static`), or `bridge link set dev PORT locked off`"
            }
            Self::AwaitsAuthentication => {
                "let the authenticator accept the address, or replace the entry without the flag `locked`"
            }
            Self::StickyEntry | Self::StaticEntry => {
                "`bridge fdb del MAC dev PORT master`, where PORT is the one that the entry names"
            }
            Self::ExternalEntry => {
                "let the control plane know that the VM has moved; some freeze an address that moves often (RFC 7432 §15.1), until that is cleared"
            }
            Self::OwnAddress => "give the VM or the interface another address",
            Self::MovedAway => {
                "see that the VM does not send at its old place any more, and that no other one has its address"
            }
            Self::Silence => "look at the switches and VLANs between the announcer and this port",
        }
    }

    /// As it is written.
    pub fn diagnosis(self) -> Diagnosis {
        Diagnosis { cause: self, sentence: self.sentence(), remedy: self.remedy() }
    }
}

/// A cause with its words. Where it is read, the words are those of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Diagnosis {
    /// Which.
    pub cause: StuckCause,
    /// What is the case.
    pub sentence: &'static str,
    /// What to do.
    pub remedy: &'static str,
}

impl<'de> Deserialize<'de> for Diagnosis {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        struct Read {
            cause: StuckCause,
        }
        Read::deserialize(deserializer).map(|read| read.cause.diagnosis())
    }
}

/// A table of this network namespace was seen to change for an announced station.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Seen {
    /// The station.
    pub mac: MacAddress,
    /// When it was seen, after the first announcement began.
    pub after_first_ns: u64,
    /// The bridge whose forwarding table changed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// The port that the station is behind now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<String>,
    /// The address for which the neighbour table has the station now.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
}

impl Schema for Seen {
    const SCHEMA: &'static str = "dunlin.announce-seen/v1";
}

/// What became of one station in one bridge's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// It was relearned behind the port that was named, or behind another one where none was.
    Relearned,
    /// It was there before.
    WasThere,
    /// No port was named, and it is where it was.
    Unchanged,
    /// It is not behind the port that was named, or in no table at all.
    NotRelearned,
}

/// A bridge's table at the end of an announcement.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Followed {
    /// The bridge.
    pub bridge: String,
    /// The port that was named.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expected_port: Option<String>,
    /// The station.
    pub mac: MacAddress,
    /// What became of it.
    pub verdict: Verdict,
    /// The port that it is behind.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub port: Option<String>,
    /// When it was last seen to come there, after the first announcement began.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub after_first_ns: Option<u64>,
    /// How often it changed its port.
    pub moves: u32,
    /// Why it was not relearned, likeliest first.
    pub causes: Vec<Diagnosis>,
}

impl Schema for Followed {
    const SCHEMA: &'static str = "dunlin.announce-followed/v1";
}

/// How somebody else claims what a VM has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ConflictKind {
    /// Another Ethernet address answers for the IP address.
    Address,
    /// Another port or interface of this host has the Ethernet address.
    Mac,
    /// The Ethernet address is seen behind several ports in turn.
    Flapping,
}

/// Somebody else claims what a VM has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Conflict {
    /// What about.
    pub kind: ConflictKind,
    /// The Ethernet address of whoever claims it.
    pub mac: MacAddress,
    /// The IP address that it answers for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
    /// The ports that it is behind.
    pub ports: Vec<String>,
}

impl Conflict {
    /// What an operator can do about it.
    pub const fn remedy(&self) -> &'static str {
        match self.kind {
            ConflictKind::Address => {
                "find who has that Ethernet address (`bridge fdb` on the switches leads to it) and give one of the two another IP address"
            }
            ConflictKind::Mac => "give one of the two another Ethernet address, or remove the interface that has it",
            ConflictKind::Flapping => "end one of the two, or give it another Ethernet address",
        }
    }
}

impl fmt::Display for Conflict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ports = self.ports.join("`, `");
        match (self.kind, self.ip) {
            (ConflictKind::Address, Some(ip)) if self.ports.is_empty() => {
                write!(f, "{} answers for {ip}: another station has that address", self.mac)
            }
            (ConflictKind::Address, Some(ip)) => {
                write!(f, "{} behind `{ports}` answers for {ip}: another station has that address", self.mac)
            }
            (ConflictKind::Flapping, _) => {
                write!(f, "{} is seen behind `{ports}` in turn: two stations have that address", self.mac)
            }
            _ => write!(f, "{} is behind `{ports}` of this host already: another station has that address", self.mac),
        }
    }
}

/// Who has a VM's addresses, before it is announced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ProbeReport {
    /// The interface that was asked for.
    pub interface: String,
    /// The interface that the questions left by.
    pub asked_on: String,
    /// IP addresses that were asked for.
    pub addresses: u32,
    /// Questions that were sent.
    pub questions_sent: u32,
    /// For how long answers were waited for.
    pub waited_ns: u64,
    /// Addresses for which the VM itself answered: it runs somewhere in this network.
    pub own_answers: Vec<IpAddr>,
    /// What else has its addresses.
    pub conflicts: Vec<Conflict>,
}

impl Schema for ProbeReport {
    const SCHEMA: &'static str = "dunlin.announce-probe/v1";
}
