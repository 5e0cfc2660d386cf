//! What was expected of a migration before it was done, beside what it took, and what is kept of it for those that come after.
//!
//! Owns the words. Must not know how anything is predicted, nor where records are kept.

use serde::{Deserialize, Serialize};

use super::blackout::BlackoutPhase;
use super::id::{MigrationId, VmName};
use super::outcome::Ending;
use super::report::MigrationReport;
use super::schema::Schema;
use super::units::BytesPerSecond;

/// Rounds that moved less say more of latency than of what the link carries: 8 MiB.
const ENOUGH_BYTES: u64 = 8 << 20;

/// What a prediction was reckoned from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ForetoldFrom {
    /// The VM's writing, measured before anything was moved.
    Curve,
    /// What the first round left: one point of the curve.
    FirstRound,
    /// What of the VM's memory had ever been written.
    Memory,
}

/// Where the fixed cost of a switch was taken from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CostFrom {
    /// An operator said it.
    Given,
    /// Earlier migrations to the same peer.
    Peer,
    /// Earlier migrations to others.
    OtherPeers,
    /// Nothing is known: the default.
    Default,
}

impl CostFrom {
    /// For people.
    pub const fn words(self) -> &'static str {
        match self {
            Self::Given => "as given",
            Self::Peer => "measured with this peer",
            Self::OtherPeers => "measured with other peers",
            Self::Default => "the default",
        }
    }
}

/// What was expected of a migration, and how far that was off.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Foretold {
    /// The way of moving, as `dunlin predict` names it.
    pub plan: String,
    /// What it was reckoned from.
    pub from: ForetoldFrom,
    /// The goodput that was reckoned with.
    pub bandwidth_bytes_per_second: u64,
    /// What a switch was taken to cost besides the last pages, without a round trip.
    pub fixed_cost_ns: u64,
    /// Where that was taken from.
    pub fixed_cost_from: CostFrom,
    /// The time in all; absent if no end was foreseen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_ns: Option<u64>,
    /// The blackout; likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blackout_ns: Option<u64>,
    /// Bytes sent.
    pub wire_bytes: u64,
    /// Rounds while the VM runs at the source.
    pub rounds: u32,
    /// 100 × (expected / taken − 1); absent until it has moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total_error_percent: Option<f64>,
    /// The same of the blackout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub blackout_error_percent: Option<f64>,
    /// The same of the bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wire_error_percent: Option<f64>,
}

impl Foretold {
    /// The same beside what a migration took. Of one that did not move the VM nothing can be said.
    pub fn beside(mut self, report: &MigrationReport) -> Self {
        let error = |expected: Option<u64>, taken: u64| {
            let expected = expected.filter(|_| taken > 0 && report.ending == Ending::Moved)?;
            Some(((expected as f64 / taken as f64 - 1.0) * 1e3).round() / 10.0)
        };
        self.total_error_percent = error(self.total_ns, report.total_ns);
        self.blackout_error_percent = error(self.blackout_ns, report.blackout_ns);
        self.wire_error_percent = error(Some(self.wire_bytes), report.wire_bytes);
        self
    }
}

/// Which strategy was taken by itself, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Chosen {
    /// The way of moving, as `dunlin predict` names it.
    pub plan: String,
    /// Whether it was expected to keep to the downtime.
    pub meets_downtime: bool,
    /// Why, for people.
    pub reason: String,
}

/// What is kept of a migration that moved its VM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MigrationRecord {
    /// When it ended, in milliseconds since 1970.
    pub unix_ms: u64,
    /// The migration.
    pub migration_id: MigrationId,
    /// The VM's name.
    pub vm_name: VmName,
    /// The target's host, as it was dialled.
    pub peer: String,
    /// The strategy's name.
    pub strategy: String,
    /// Guest RAM.
    pub memory_bytes: u64,
    /// The bandwidth limit that it began with; absent where there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_bytes_per_second: Option<u64>,
    /// What the fastest of its longer parts carried; absent where none was long enough to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub goodput_bytes_per_second: Option<u64>,
    /// The smallest round trip.
    pub rtt_ns: u64,
    /// What switching over took besides the last pages and a round trip.
    pub fixed_cost_ns: u64,
    /// What was neither rounds nor blackout nor pages that followed: the reservation, the boot image.
    pub setup_ns: u64,
    /// The time in all.
    pub total_ns: u64,
    /// The blackout.
    pub blackout_ns: u64,
    /// Bytes sent.
    pub wire_bytes: u64,
    /// What had been expected; absent where nothing was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prediction: Option<Foretold>,
}

impl Schema for MigrationRecord {
    const SCHEMA: &'static str = "dunlin.migration-record/v1";
}

impl MigrationRecord {
    /// What is kept of a report; nothing of one that did not move its VM, or whose blackout was spent on hashing memory.
    pub fn of(
        report: &MigrationReport,
        peer: &str,
        limit: Option<BytesPerSecond>,
        unix_ms: u64,
    ) -> Option<MigrationRecord> {
        if report.ending != Ending::Moved || report.blackout_ns == 0 || report.verified_pages > 0 {
            return None;
        }
        let last_pages = report.blackout.phases.iter().filter(|entry| entry.phase == BlackoutPhase::LastPages);
        let moving: u64 = last_pages.map(|entry| entry.duration_ns).sum();
        let live = report.rounds.iter().map(|round| (round.wire_bytes, round.duration_ns));
        let owed = report.post_copy.iter().map(|owed| (owed.wire_bytes, owed.duration_ns));
        let parts = live.chain(owed).filter(|&(bytes, ns)| bytes >= ENOUGH_BYTES && ns > 0);
        let goodput = parts.map(|(bytes, ns)| (bytes as f64 * 1e9 / ns as f64) as u64).max();
        let rounds: u64 = report.rounds.iter().filter(|round| !round.paused).map(|round| round.duration_ns).sum();
        let followed = report.post_copy.as_ref().map_or(0, |owed| owed.duration_ns);
        Some(MigrationRecord {
            unix_ms,
            migration_id: report.migration_id,
            vm_name: report.vm_name.clone(),
            peer: peer.to_owned(),
            strategy: report.strategy.clone(),
            memory_bytes: report.memory_bytes,
            limit_bytes_per_second: limit.map(|limit| limit.0),
            goodput_bytes_per_second: goodput,
            rtt_ns: report.rtt_ns,
            fixed_cost_ns: report.blackout_ns.saturating_sub(moving).saturating_sub(report.rtt_ns),
            setup_ns: report.total_ns.saturating_sub(rounds + report.blackout_ns + followed),
            total_ns: report.total_ns,
            blackout_ns: report.blackout_ns,
            wire_bytes: report.wire_bytes,
            prediction: report.prediction.clone(),
        })
    }
}
