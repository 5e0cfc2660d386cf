//! Which VM has which Ethernet and IP addresses at this host, whence it came and where it has gone.

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::id::{MigrationId, VmId};
use super::mac::MacAddress;
use super::network::{ConflictKind, FoundIp, LearntFrom};
use super::schema::Schema;
use super::vlan::VlanTags;

/// A network card of a VM of this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownCard {
    /// The tap behind it.
    pub tap: String,
    /// The bridge that the tap is under, in the network namespace of whoever looked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bridge: Option<String>,
    /// Its Ethernet address.
    pub mac: MacAddress,
    /// How that became known.
    pub from: LearntFrom,
    /// The tags of its frames, where they are known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vlan: Option<VlanTags>,
    /// Its IP addresses.
    pub ips: Vec<FoundIp>,
}

/// A VM of this host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownVm {
    /// Its identity.
    pub vm_id: VmId,
    /// Its name.
    pub vm_name: String,
    /// Whether dunlin runs it.
    pub is_hosted: bool,
    /// Its process.
    pub pid: u32,
    /// Since when that process has been here, in milliseconds since 1970.
    pub since_unix_ms: u64,
    /// The migration that brought it; absent where none did, or it is not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub came_by: Option<MigrationId>,
    /// The host that it came from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub came_from: Option<String>,
    /// Where its migrations are logged; absent of another VMM's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_dir: Option<PathBuf>,
    /// Its network cards.
    pub cards: Vec<KnownCard>,
    /// Why its cards are not known, if they are not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub problem: Option<String>,
}

/// A VM that was here.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeftVm {
    /// Its identity.
    pub vm_id: VmId,
    /// Its name.
    pub vm_name: String,
    /// When it was seen to be gone, in milliseconds since 1970.
    pub left_unix_ms: u64,
    /// The migration that took it; absent of one that has ended here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub went_by: Option<MigrationId>,
    /// The host that it went to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub went_to: Option<String>,
    /// Its Ethernet addresses.
    pub macs: Vec<MacAddress>,
}

/// Two VMs of this host on one bridge have the same address.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedAddress {
    /// `address` (IP) or `mac`.
    pub kind: ConflictKind,
    /// The bridge.
    pub bridge: String,
    /// The Ethernet address that they share, or that of the first.
    pub mac: MacAddress,
    /// The IP address that they share.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
    /// Their names, in order.
    pub vm_names: Vec<String>,
}

impl SharedAddress {
    /// What it is about, in one sentence.
    pub fn sentence(&self) -> String {
        let what = self.ip.map_or_else(|| self.mac.to_string(), |ip| ip.to_string());
        format!("{} share {what} on bridge `{}`", self.vm_names.join(" and "), self.bridge)
    }
}

/// All that is known of who is where.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct AddressBook {
    /// When it was written, in milliseconds since 1970.
    pub unix_ms: u64,
    /// This host's name.
    pub host: String,
    /// The VMs that are here, by name and process.
    pub vms: Vec<KnownVm>,
    /// Those that have left, the last one first; as many as are kept.
    pub left: Vec<LeftVm>,
    /// Addresses that two VMs share.
    pub conflicts: Vec<SharedAddress>,
}

impl Schema for AddressBook {
    const SCHEMA: &'static str = "dunlin.addresses/v1";
}

impl AddressBook {
    /// VMs of which no IP address is known.
    pub fn without_address(&self) -> usize {
        self.vms.iter().filter(|vm| vm.cards.iter().all(|card| card.ips.is_empty())).count()
    }
}
