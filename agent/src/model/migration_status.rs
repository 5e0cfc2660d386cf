//! What a migration that is under way says of itself.

use serde::{Deserialize, Serialize};

use super::foretold::Chosen;
use super::id::{MigrationId, VmId, VmName};
use super::report::RoundReport;
use super::schema::Schema;
use super::stage::{Stage, Step};
use super::stun::ThrottleView;

/// A migration under way, as its manager at the source sees it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrationStatus {
    /// The migration.
    pub migration_id: MigrationId,
    /// The VM.
    pub vm_id: VmId,
    /// The VM's name.
    pub vm_name: VmName,
    /// The manager's process.
    pub pid: u32,
    /// The target's address.
    pub target: String,
    /// How what is sent is encrypted: `tls1.3` and the cipher suite, or `none`; empty of an older version.
    #[serde(default)]
    pub encryption: String,
    /// The strategy's name.
    pub strategy: String,
    /// Which strategy was taken by itself, and why; absent where it was given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub chosen: Option<Chosen>,
    /// When it began, in milliseconds since 1970.
    pub since_unix_ms: u64,
    /// For how long it has been going on.
    pub elapsed_ns: u64,
    /// The step that was passed last.
    pub step: Step,
    /// The stage that this belongs to.
    pub stage: Stage,
    /// Whether it can still be cancelled: not once the VM is released.
    pub can_be_cancelled: bool,
    /// The round under way, or the last one; 0 before the first.
    pub round: u32,
    /// Pages due in it.
    pub due_pages: u64,
    /// Of these, pages that were sent.
    pub sent_pages: u64,
    /// Guest RAM.
    pub memory_bytes: u64,
    /// Contents of pages and of the boot image sent in all rounds so far, without headers and marks of zero pages.
    pub sent_bytes: u64,
    /// Of that, what was sent per second in the last two seconds of the round.
    pub goodput_bytes_per_second: u64,
    /// The most that may be sent; absent: as much as the link carries.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth_bytes_per_second: Option<u64>,
    /// The last round that has ended; absent in the first one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_round: Option<RoundReport>,
    /// Until the round under way ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub round_ends_in_ns: Option<u64>,
    /// Until the VM is paused; absent in the first round, while it stands, and where no end is in sight.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pauses_in_ns: Option<u64>,
    /// For how long it will stand; while it does, for how much longer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expected_blackout_ns: Option<u64>,
    /// Until it runs at the target.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ends_in_ns: Option<u64>,
    /// The blackout that was asked for as a limit.
    pub downtime_target_ns: u64,
    /// How the VM's writers are slowed; absent if that was not asked for, or while its process does not say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub throttle: Option<ThrottleView>,
}

impl Schema for MigrationStatus {
    const SCHEMA: &'static str = "dunlin.migration-status/v1";
}
