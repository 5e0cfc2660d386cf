//! What tracking sees of a VM from outside: counters that only grow, and pages that turned writable.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::model::schema::Schema;
use crate::model::{AddressSpace, ExitTimes, GuestWrite, Gva, PageBitmap, PageSubset};

/// What one thread of the VM's process (a vCPU, or one that acts for it) has done since tracking began.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ThreadEvents {
    /// Guest pages that a mapping made writable, huge mappings counted by what they cover.
    pub pages_made_writable: u64,
    /// Mappings of 2 MiB and larger among them.
    pub huge_mappings: u64,
    /// Pages that KVM pushed to a dirty ring.
    pub dirty_ring_pushes: u64,
    /// Pages that KVM marked in a dirty log; zero where that cannot be seen.
    pub pages_logged: u64,
    /// Exits from guest code, those that KVM handles itself among them; zero where the KVM backend does not tell.
    pub guest_exits: u64,
    /// Exits to user space, by reason.
    pub exits: BTreeMap<String, ExitTimes>,
    /// Exits from guest code, by reason; empty where the KVM backend does not tell.
    pub guest_exit_reasons: BTreeMap<String, ExitTimes>,
    /// Pages by the time of their first write in a window of write protection, in the bins of [`dunlin_ebpf::first_write_bin`].
    pub first_writes: Vec<u32>,
    /// What was written in each guest address space that the thread had loaded; those that wrote long ago may be forgotten.
    pub spaces: BTreeMap<AddressSpace, SpaceEvents>,
    /// Pages by address space and guest instruction; likewise.
    pub code: BTreeMap<(AddressSpace, Gva), u64>,
}

impl ThreadEvents {
    /// What the thread did since `before`. A counter that went back belongs to a new thread of the same number.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        let difference = |now: u64, before: u64| now.checked_sub(before).unwrap_or(now);
        let times = |now: &BTreeMap<String, ExitTimes>, before: &BTreeMap<String, ExitTimes>| {
            let since = |(reason, times): (&String, &ExitTimes)| {
                (reason.clone(), before.get(reason).map_or_else(|| times.clone(), |before| times.since(before)))
            };
            now.iter().map(since).collect()
        };
        let spaces = self.spaces.iter().map(|(&space, now)| {
            (space, before.spaces.get(&space).map_or_else(|| now.clone(), |before| now.since(before)))
        });
        let code = self
            .code
            .iter()
            .map(|(&place, &pages)| (place, difference(pages, before.code.get(&place).copied().unwrap_or_default())));
        Self {
            pages_made_writable: difference(self.pages_made_writable, before.pages_made_writable),
            huge_mappings: difference(self.huge_mappings, before.huge_mappings),
            dirty_ring_pushes: difference(self.dirty_ring_pushes, before.dirty_ring_pushes),
            pages_logged: difference(self.pages_logged, before.pages_logged),
            guest_exits: difference(self.guest_exits, before.guest_exits),
            exits: times(&self.exits, &before.exits),
            guest_exit_reasons: times(&self.guest_exit_reasons, &before.guest_exit_reasons),
            first_writes: bins_since(&self.first_writes, &before.first_writes),
            spaces: spaces.collect(),
            code: code.collect(),
        }
    }
}

impl SpaceEvents {
    /// As [`ThreadEvents::since`]; an entry that was forgotten and made anew counts from then.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        match self.pages_made_writable.checked_sub(before.pages_made_writable) {
            Some(pages_made_writable) => {
                Self { pages_made_writable, first_writes: bins_since(&self.first_writes, &before.first_writes) }
            }
            None => self.clone(),
        }
    }
}

fn bins_since(now: &[u32], before: &[u32]) -> Vec<u32> {
    if before.len() == now.len() {
        now.iter().zip(before).map(|(&now, &before)| now.wrapping_sub(before)).collect()
    } else {
        now.to_vec()
    }
}

/// What was written in one address space.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SpaceEvents {
    /// As [`ThreadEvents::pages_made_writable`].
    pub pages_made_writable: u64,
    /// As [`ThreadEvents::first_writes`].
    pub first_writes: Vec<u32>,
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
    /// Writes whose address space or instruction could not be read: counted, and nobody's.
    pub unattributed: u64,
    /// Single writes that were counted and not told by themselves, for want of room.
    pub writes_full: u64,
}

impl LostEvents {
    /// All that make a figure of pages too low. Writes that are nobody's, and those that are only counted, do not.
    pub const fn total(&self) -> u64 {
        self.out_of_range + self.threads_full + self.exits_full + self.too_large + self.unreadable
    }

    /// Both together.
    #[must_use]
    pub const fn plus(&self, other: &Self) -> Self {
        Self {
            out_of_range: self.out_of_range + other.out_of_range,
            threads_full: self.threads_full + other.threads_full,
            exits_full: self.exits_full + other.exits_full,
            too_large: self.too_large + other.too_large,
            unreadable: self.unreadable + other.unreadable,
            unattributed: self.unattributed + other.unattributed,
            writes_full: self.writes_full + other.writes_full,
        }
    }

    /// What was lost since `before`.
    pub const fn since(&self, before: &Self) -> Self {
        Self {
            out_of_range: self.out_of_range.saturating_sub(before.out_of_range),
            threads_full: self.threads_full.saturating_sub(before.threads_full),
            exits_full: self.exits_full.saturating_sub(before.exits_full),
            too_large: self.too_large.saturating_sub(before.too_large),
            unreadable: self.unreadable.saturating_sub(before.unreadable),
            unattributed: self.unattributed.saturating_sub(before.unattributed),
            writes_full: self.writes_full.saturating_sub(before.writes_full),
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

    /// Moves the single writes since they were last taken into `into`, in the order of their times; a source that does not tell them has none.
    fn take_writes(&mut self, _into: &mut Vec<GuestWrite>) {}

    /// Says that every page has just been write-protected, so that the times of first writes count from now; or that none is any more.
    fn armed(&mut self, on: bool);
}

/// One look at a source, as policy took it.
#[derive(Clone, Copy, Debug)]
pub struct Look<'a> {
    /// When, by the clock of whoever looked.
    pub at: Duration,
    /// Whether someone else had the VM's dirty log on meanwhile.
    pub logged: bool,
    /// The counters.
    pub sample: &'a EventSample,
    /// The pages that turned writable since the look before.
    pub pages: &'a PageBitmap,
    /// The single writes since then, if they are told.
    pub writes: &'a [GuestWrite],
}

/// What was seen could not be kept.
#[derive(Debug, thiserror::Error)]
#[error("what was seen could not be recorded: {0}")]
pub struct SampleLogError(pub String);

/// Keeps what a source showed, look by look, so that the same figures can be made of it again.
pub trait SampleLog: Send {
    /// Keeps one look.
    ///
    /// # Errors
    /// It could not be kept; those before it are.
    fn look(&mut self, look: &Look<'_>) -> Result<(), SampleLogError>;
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

/// What was write-protected, and when: from the first page to the last, by the monotonic clock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Protected {
    /// Before the first page was.
    pub began_ns: u64,
    /// When the last page was.
    pub ended_ns: u64,
    /// The pages ([`PageSubset::raw`]).
    pub subset: u64,
    /// Whether the log was on before.
    pub was_on: bool,
}

impl Schema for Protected {
    const SCHEMA: &'static str = "dunlin.protected/v1";
}

/// Write protection of a VM that cooperates, so that each page's next write becomes an event.
pub trait Arm: Send {
    /// Protects every page.
    ///
    /// # Errors
    /// The VM refused (a migration already uses its log), or is gone.
    fn arm(&mut self) -> Result<(), ArmError>;

    /// Protects these pages, and no others, at this time by the monotonic clock, in nanoseconds; at once if that is over. Says what was done,
    /// or nothing if it cannot choose: then every page was protected at once.
    ///
    /// # Errors
    /// As [`Arm::arm`].
    fn arm_at(&mut self, _subset: PageSubset, _at_ns: u64) -> Result<Option<Protected>, ArmError> {
        self.arm().map(|()| None)
    }

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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_at_their_end_and_counters_that_begin_anew() {
        let at = |pages: u64, bins: &[u32]| ThreadEvents {
            pages_made_writable: pages,
            first_writes: bins.to_vec(),
            ..ThreadEvents::default()
        };
        // Bins have 32 bits and wrap; a difference is right as long as fewer than 2^32 were added.
        let new = at(u64::MAX, &[3, 7]).since(&at(u64::MAX - 10, &[u32::MAX - 1, 7]));
        assert_eq!((new.pages_made_writable, new.first_writes), (10, vec![5, 0]));
        // A thread that ended, and another with its number: all that it did is new.
        let new = at(4, &[1, 1]).since(&at(u64::MAX, &[1, 1]));
        assert_eq!(new.pages_made_writable, 4);
        // A thread that was only seen to exit before had no bins yet.
        assert_eq!(at(4, &[1, 3]).since(&at(0, &[])).first_writes, [1, 3]);
        let space = |pages, bin| SpaceEvents { pages_made_writable: pages, first_writes: vec![bin] };
        assert_eq!(space(2, 2).since(&space(9, 1)), space(2, 2), "an entry that was forgotten and made anew");
        let lost = LostEvents { unreadable: 1, ..LostEvents::default() };
        assert_eq!(lost.since(&LostEvents { unreadable: 5, ..LostEvents::default() }).total(), 0);
    }
}
