//! What tracking sees of a VM from outside: counters that only grow, and pages that turned writable.

use std::collections::BTreeMap;

use crate::model::PageBitmap;

/// What one thread of the VM's process (a vCPU, or one that acts for it) has done since tracking began.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ThreadEvents {
    /// Guest pages that a mapping made writable, huge mappings counted by what they cover.
    pub pages_made_writable: u64,
    /// Mappings of 2 MiB and larger among them.
    pub huge_mappings: u64,
    /// Pages that KVM pushed to a dirty ring.
    pub dirty_ring_pushes: u64,
    /// Exits from guest code, those that KVM handles itself among them; zero where the KVM backend does not tell.
    pub guest_exits: u64,
    /// Exits to user space, by reason.
    pub exits: BTreeMap<String, u64>,
}

/// Events that were not, or not fully, counted since tracking began, by what was missing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LostEvents {
    /// Pages beyond the tracked range: in the rate, not among the unique pages.
    pub out_of_range: u64,
    /// Events of threads for which there was no room.
    pub threads_full: u64,
    /// Exits for whose reason there was no room.
    pub exits_full: u64,
    /// Mappings larger than 2 MiB: in the rate, not among the unique pages.
    pub too_large: u64,
    /// Page table entries that could not be read.
    pub unreadable: u64,
}

impl LostEvents {
    /// All of them.
    pub const fn total(&self) -> u64 {
        self.out_of_range + self.threads_full + self.exits_full + self.too_large + self.unreadable
    }

    /// What was lost since `before`.
    pub const fn since(&self, before: &Self) -> Self {
        Self {
            out_of_range: self.out_of_range.saturating_sub(before.out_of_range),
            threads_full: self.threads_full.saturating_sub(before.threads_full),
            exits_full: self.exits_full.saturating_sub(before.exits_full),
            too_large: self.too_large.saturating_sub(before.too_large),
            unreadable: self.unreadable.saturating_sub(before.unreadable),
        }
    }
}

/// The counters at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct EventSample {
    /// Per thread id.
    pub threads: BTreeMap<u32, ThreadEvents>,
    /// What was missed.
    pub lost: LostEvents,
}

/// One thing that a source listens to, or would.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EventHook {
    /// Its name.
    pub name: String,
    /// What it sees.
    pub gives: String,
    /// Why it is not attached; none when it is.
    pub missing: Option<String>,
}

/// The source failed; tracking of this VM is over.
#[derive(Debug, thiserror::Error)]
#[error("reading the event counters failed: {0}")]
pub struct EventSourceError(pub String);

/// Counts of one VM's writes, gathered outside it.
pub trait EventSource: Send {
    /// What is attached and what is not.
    fn hooks(&self) -> &[EventHook];

    /// A set with room for every page that the source can name.
    fn empty_pages(&self) -> PageBitmap;

    /// Reads the counters, and moves the pages that turned writable since the last sample into `pages` (guest frames).
    ///
    /// # Errors
    /// The counters can no longer be read.
    fn sample(&mut self, pages: &mut PageBitmap) -> Result<EventSample, EventSourceError>;
}

/// The VM's own process refused to switch its dirty log, or is gone.
#[derive(Debug, thiserror::Error)]
#[error("the VM's dirty log could not be switched {action}: {reason}")]
pub struct ArmError {
    /// `on`, `again` or `off`.
    pub action: &'static str,
    /// Its words.
    pub reason: String,
}

/// Write protection of a VM that cooperates, so that each page's next write becomes an event.
pub trait Arm: Send {
    /// Protects every page.
    ///
    /// # Errors
    /// The VM refused (a migration already uses its log), or is gone.
    fn arm(&mut self) -> Result<(), ArmError>;

    /// Protects again what was written since; called at the start of each interval.
    ///
    /// # Errors
    /// As [`Arm::arm`].
    fn rearm(&mut self) -> Result<(), ArmError>;

    /// Lets the VM write freely again. Must be done, and is tried even after an error.
    ///
    /// # Errors
    /// The VM is gone; there is nothing left to let go.
    fn disarm(&mut self) -> Result<(), ArmError>;
}
