//! What is said of a throttle: what vCPUs write and lose, and what they may write.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::MigrationId;
use super::schema::Schema;
use super::units::PagesPerSecond;

/// What a vCPU has written and lost since its VM was throttled first; counters that only grow.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VcpuWrites {
    /// Different pages that it wrote between two protections of each.
    pub pages: f64,
    /// How long it was held, in nanoseconds.
    pub held_ns: u64,
    /// Of that, how long while other address spaces were on it too: what those lost at most that owed nothing.
    pub co_resident_held_ns: u64,
    /// Of what it was held, how long its guest was asked to hold its writers itself: the others on it went on.
    pub guest_held_ns: u64,
    /// Whether it owes time at present: it would write more.
    pub owes: bool,
}

/// What all vCPUs of a VM have written.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VmWrites {
    /// When, by the monotonic clock of the VM's host, in nanoseconds.
    pub at_ns: u64,
    /// Of each vCPU, in order.
    pub vcpus: Vec<VcpuWrites>,
    /// Pages that no vCPU wrote: devices, KVM itself.
    pub others_pages: f64,
    /// How pages are put down to vCPUs.
    pub attribution: Attribution,
}

/// How a page is put down to who wrote it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Attribution {
    /// Each vCPU has a ring of its own.
    Ring,
    /// By each vCPU's share of the write faults that KVM resolved.
    Faults,
    /// By each vCPU's share of the CPU time.
    #[default]
    CpuTime,
}

/// What one vCPU may write.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct VcpuLimit {
    /// In different pages per second.
    pub rate: PagesPerSecond,
    /// Whether only those address spaces of it that write most are held, while they are loaded.
    pub by_address_space: bool,
}

/// What was done to one vCPU.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VcpuStun {
    /// Its index.
    pub vcpu: u32,
    /// What it wrote per second before it was limited first.
    pub free_pages_per_second: f64,
    /// The lowest limit that it had.
    pub least_limit_pages_per_second: f64,
    /// The limit that it has, or had last.
    pub limit_pages_per_second: f64,
    /// The mean of its limits over the time for which it was limited.
    pub mean_limit_pages_per_second: f64,
    /// What it wrote per second while it was limited.
    pub limited_pages_per_second: f64,
    /// The mean of its limits from a second after it was limited first on; 0 if it was not limited for so long.
    pub settled_limit_pages_per_second: f64,
    /// What it wrote per second from then on.
    pub settled_pages_per_second: f64,
    /// How long it was limited.
    pub limited_ns: u64,
    /// How long it was held: guest time that was lost.
    pub held_ns: u64,
    /// Of that, what address spaces lost that owed nothing.
    pub co_resident_held_ns: u64,
    /// Of what it was held, how long its guest held its writers itself.
    pub guest_held_ns: u64,
}

/// What was done to a VM.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StunReport {
    /// From the first limit to the last look with one, in nanoseconds.
    pub stunned_ns: u64,
    /// Guest time lost by all vCPUs together.
    pub guest_time_lost_ns: u64,
    /// How pages are put down to vCPUs.
    pub attribution: Attribution,
    /// Those that were held at any time.
    pub vcpus: Vec<VcpuStun>,
    /// Why everybody was let go for good; empty if that was not needed.
    pub gave_up: String,
}

/// What the throttle of a machine does at present.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ThrottleStatus {
    /// Whether somebody asks for limits, and has writes counted.
    pub is_asked: bool,
    /// What each vCPU may write.
    pub limits: Vec<Option<VcpuLimit>>,
    /// What each has written and lost.
    pub writes: VmWrites,
}

/// How the writers of a VM are slowed at present, and what that has cost them so far.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ThrottleView {
    /// Whether any vCPU has a limit.
    pub stunned: bool,
    /// Who has writers watched, and slowed where they write too much; absent: nobody.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub holder: Option<ThrottleHolder>,
    /// How long all vCPUs together were held since the VM's process began.
    pub guest_time_lost_ns: u64,
    /// While there is a holder all vCPUs, else those that were held at any time.
    pub vcpus: Vec<VcpuThrottle>,
}

impl Schema for ThrottleView {
    const SCHEMA: &'static str = "dunlin.throttle/v1";
}

/// Who has the writers of a VM watched.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThrottleHolder {
    /// User and process.
    pub who: String,
    /// The migration that it is for; absent: `dunlin stun`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration_id: Option<MigrationId>,
    /// Since when, in milliseconds since 1970.
    pub since_unix_ms: u64,
}

impl fmt::Display for ThrottleHolder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.migration_id {
            Some(migration) => write!(f, "migration {migration} ({})", self.who),
            None => write!(f, "`dunlin stun` ({})", self.who),
        }
    }
}

/// One vCPU of a VM whose writers are watched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VcpuThrottle {
    /// Its index.
    pub vcpu: u32,
    /// What it may write, in different pages per second; absent: as much as it likes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_pages_per_second: Option<f64>,
    /// What it wrote per second of late; 0 while nobody counts.
    pub pages_per_second: f64,
    /// How long it was held since the VM's process began.
    pub held_ns: u64,
    /// Of that, how long while other address spaces were on it too: what those lost at most that owed nothing.
    pub co_resident_held_ns: u64,
}
