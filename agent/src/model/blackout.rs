//! The blackout ledger: where the time went in which no vCPU ran, phase by phase.
//!
//! The two hosts' clocks are never subtracted from one another: each side measures its own phases, and the network's
//! share is what the source's total leaves over.

use serde::{Deserialize, Serialize};

/// A phase of the blackout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BlackoutPhase {
    /// Source: vCPUs kicked out of the guest and parked, devices drained.
    Pause,
    /// Source: the last harvest of the dirty log.
    LastHarvest,
    /// Source: the last pages written to the streams.
    LastPages,
    /// Source: CPU and device state read, as far as that took longer than the last pages, beside which it is done.
    SaveState,
    /// Target: from the last page's arrival to the state restored and the digest checked.
    Restore,
    /// Target: the gate at `prepared`, which is journaled ahead of time.
    JournalPrepared,
    /// Source: `released` journaled.
    JournalReleased,
    /// Target: `owner` journaled.
    JournalOwner,
    /// Target: the first announcement.
    Announce,
    /// Target: vCPUs let go.
    Resume,
    /// What is left of the source's total: messages on the wire and waits between the phases.
    Wire,
}

/// The phases with their durations, in the order in which they happened.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlackoutLedger {
    /// The phases.
    pub phases: Vec<LedgerEntry>,
}

/// One line of the ledger.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LedgerEntry {
    /// What was done.
    pub phase: BlackoutPhase,
    /// How long it took, in nanoseconds of that host's monotonic clock.
    pub duration_ns: u64,
}

impl BlackoutLedger {
    /// Adds a phase.
    pub fn add(&mut self, phase: BlackoutPhase, duration: std::time::Duration) {
        self.phases.push(LedgerEntry { phase, duration_ns: duration.as_nanos() as u64 });
    }

    /// The sum of all phases, in nanoseconds.
    pub fn total_ns(&self) -> u64 {
        self.phases.iter().map(|entry| entry.duration_ns).sum()
    }

    /// Joins the target's phases in and books what `total_ns` leaves over as [`BlackoutPhase::Wire`].
    pub fn close(&mut self, target: &Self, total_ns: u64) {
        self.phases.extend_from_slice(&target.phases);
        let duration_ns = total_ns.saturating_sub(self.total_ns());
        self.phases.push(LedgerEntry { phase: BlackoutPhase::Wire, duration_ns });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_closed_ledger_adds_up_to_the_total() {
        let mut source = BlackoutLedger::default();
        source.add(BlackoutPhase::Pause, std::time::Duration::from_micros(300));
        let mut target = BlackoutLedger::default();
        target.add(BlackoutPhase::Restore, std::time::Duration::from_micros(500));
        source.close(&target, 1_000_000);
        assert_eq!(source.total_ns(), 1_000_000);
        assert_eq!(source.phases.last().map(|entry| entry.duration_ns), Some(200_000));
    }
}
