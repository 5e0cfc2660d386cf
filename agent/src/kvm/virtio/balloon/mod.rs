//! The virtio balloon (virtio 1.2, 5.5): memory that a guest gives back, and what it says of its free pages.
//!
//! Owns what a host can ask of a guest's memory. Must not know migration, nor why memory is wanted.
//!
//! - **Balloon**: [`VirtioBalloon::set_target`] asks the guest to put pages into the balloon or take some out.
//! - **Reporting**: a guest names free pages by itself. Both kinds of pages are given back to the host: they become holes of
//!   the memory file, and are marked as dirty, so that a migration under way sends the zeros they are now.
//! - **Hinting**: [`VirtioBalloon::start_hint`] asks once for the pages that are free now. Nothing is done with them: who asked
//!   [takes](VirtioBalloon::take_hints) the set. A page of it was free at some moment after the request; the guest may have
//!   used it since, and then a dirty log that was armed before the request has it.
//! - [`VirtioBalloon::hold`]: pages are only acknowledged. For a time in which their content belongs to somebody else.
//!
//! | file | owns |
//! |---|---|
//! | `config` | the configuration space, and what moves |
//! | `request` | what requests say |
//! | `backend` | the queues |

mod backend;
mod config;
mod request;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

pub(super) use backend::BalloonBackend;
use config::{COMMAND_DONE, COMMAND_STOP};
pub use request::GuestStats;

use super::device::VirtioDevice;
use crate::kvm::bus::DeviceError;
use crate::kvm::memory::Memory;
use crate::model::{PageBitmap, PageCount};

/// Feature bits (virtio 1.2, 5.5.3), as masks.
pub(super) mod feature {
    /// The guest tells statistics of its memory (bit 1).
    pub(crate) const STATS_VQ: u64 = 1 << 1;
    /// The guest takes pages out of the balloon rather than kill (bit 2).
    pub(crate) const DEFLATE_ON_OOM: u64 = 1 << 2;
    /// The guest names its free pages when asked (bit 3).
    pub(crate) const FREE_PAGE_HINT: u64 = 1 << 3;
    /// The guest expects its free pages to hold `poison_val` (bit 4).
    pub(crate) const PAGE_POISON: u64 = 1 << 4;
    /// The guest names its free pages by itself (bit 5).
    pub(crate) const REPORTING: u64 = 1 << 5;
    /// What is offered.
    pub(crate) const ALL: u64 = STATS_VQ | DEFLATE_ON_OOM | FREE_PAGE_HINT | PAGE_POISON | REPORTING;
}

/// The balloon of a VM.
pub type VirtioBalloon = VirtioDevice<BalloonBackend>;

/// The balloon cannot do what it was asked.
#[derive(Clone, Copy, Debug, thiserror::Error, PartialEq, Eq)]
pub enum BalloonError {
    /// More than the VM's memory, or more than the 32-bit number of pages that a balloon can have.
    #[error("a balloon of {} does not fit a VM of {}", .0, .1)]
    Target(PageCount, PageCount),
    /// The guest has no driver for it, or it is not running.
    #[error("the guest's driver does not run the balloon (is the module virtio_balloon loaded?)")]
    NoDriver,
    /// The guest's driver cannot hint.
    #[error("the guest's balloon driver names no free pages")]
    NoHints,
    /// Hints are of no use where the content of a free page counts.
    #[error("the guest poisons or clears its free pages, so what they hold counts: no hints")]
    Poisoned,
}

/// What is known of the balloon.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BalloonStatus {
    /// Pages the host wants in it.
    pub target: PageCount,
    /// Pages the guest says are there.
    pub actual: PageCount,
    /// Whether a driver runs it.
    pub driver: bool,
    /// Whether the driver reports free pages by itself.
    pub reporting: bool,
    /// Whether the driver names free pages when asked.
    pub hinting: bool,
    /// Whether free pages must keep what they hold: reported ones then stay the guest's.
    pub poisoned: bool,
    /// Whether pages are only acknowledged ([`VirtioBalloon::hold`]).
    pub held: bool,
    /// Pages given back because they were put into the balloon, since this process has the machine.
    pub inflated: PageCount,
    /// Pages given back because they were reported as free, since this process has the machine.
    pub reported: PageCount,
    /// The round of hints that is under way or was the last.
    pub round: Option<HintRound>,
    /// What the guest last said of its memory.
    pub stats: Option<GuestStats>,
}

/// A round of hints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HintRound {
    /// Its command id: all of its hints were asked for by this id.
    pub id: u32,
    /// Pages hinted in it, whether taken or not.
    pub hinted: PageCount,
    /// Whether the guest has said that these are all.
    pub complete: bool,
}

/// Something about a balloon that somebody may wait for has changed.
#[derive(Debug, Default)]
pub(in crate::kvm::virtio) struct Progress {
    count: Mutex<u64>,
    changed: Condvar,
}

impl Progress {
    fn count(&self) -> MutexGuard<'_, u64> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn note(&self) {
        *self.count() += 1;
        self.changed.notify_all();
    }

    /// Waits until the count is beyond `seen`, at most until `deadline`; returns it.
    fn wait(&self, seen: u64, deadline: Instant) -> u64 {
        let left = deadline.saturating_duration_since(Instant::now());
        let waited = self.changed.wait_timeout_while(self.count(), left, |count| *count == seen);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }
}

impl VirtioBalloon {
    /// The one of a machine: `balloon0`.
    ///
    /// # Errors
    /// No thread or descriptor is left.
    pub fn new(memory: &Memory) -> Result<Self, DeviceError> {
        let backend = BalloonBackend::new(memory.clone(), Arc::default());
        Self::assemble("balloon0", memory.ram().clone(), backend, None)
    }

    fn progress(&self) -> Arc<Progress> {
        self.transport().with_backend(|backend| backend.progress())
    }

    /// Asks the guest to have `pages` in the balloon. It follows when it can, or never.
    ///
    /// # Errors
    /// More than the VM has.
    pub fn set_target(&self, pages: PageCount) -> Result<(), BalloonError> {
        self.transport().with_backend(|backend| {
            backend.config.target = backend.checked_target(pages)?;
            Ok(())
        })
    }

    /// Asks for the same until [`VirtioBalloon::relax`], or until another host has the machine and lets it run: then what was wanted before is wanted again.
    ///
    /// # Errors
    /// More than the VM has, or nobody to follow.
    pub fn squeeze(&self, pages: PageCount) -> Result<(), BalloonError> {
        self.transport().with_live(|backend, features| {
            features.ok_or(BalloonError::NoDriver)?;
            let target = backend.checked_target(pages)?;
            backend.config.squeeze(target);
            Ok(())
        })
    }

    /// The guest may have again what it had before it was squeezed.
    pub fn relax(&self) {
        self.transport().with_backend(|backend| backend.config.relax());
    }

    /// What is known of it.
    pub fn status(&self) -> BalloonStatus {
        self.transport().with_live(|backend, features| {
            let has = |bit| features.is_some_and(|features| features & bit != 0);
            BalloonStatus {
                target: PageCount(backend.config.target.into()),
                actual: PageCount(backend.config.actual.into()),
                driver: features.is_some(),
                reporting: has(feature::REPORTING),
                hinting: has(feature::FREE_PAGE_HINT) && !has(feature::PAGE_POISON),
                poisoned: has(feature::PAGE_POISON) && backend.config.poison != 0,
                held: backend.held,
                inflated: backend.inflated,
                reported: backend.reported,
                round: backend.round_status(),
                stats: backend.stats,
            }
        })
    }

    /// Waits until the guest may have come nearer to the target, more is known of a round of hints, or `patience` is over;
    /// `seen` is what the last call returned, 0 at first.
    pub fn wait_progress(&self, seen: u64, patience: Duration) -> u64 {
        self.progress().wait(seen, Instant::now() + patience)
    }

    /// Asks the guest how its memory is used, and waits at most `patience` for the answer. `None` if it gives none.
    pub fn ask_stats(&self, patience: Duration) -> Option<GuestStats> {
        let deadline = Instant::now() + patience;
        let progress = self.progress();
        let mut seen = *progress.count();
        let before = self.transport().with_live(|backend, features| {
            features.filter(|features| features & feature::STATS_VQ != 0)?;
            backend.want_stats();
            Some(backend.answers)
        })?;
        self.look_again();
        loop {
            let answer = self.transport().with_backend(|backend| backend.stats.filter(|_| backend.answers > before));
            if answer.is_some() || Instant::now() >= deadline {
                return answer;
            }
            seen = progress.wait(seen, deadline);
        }
    }

    /// Whether pages that the guest gives up are only acknowledged and stay as they are. When this returns, no page is being
    /// given back.
    pub fn hold(&self, held: bool) {
        self.transport().with_backend(|backend| backend.held = held);
    }

    /// Begins a round of hints: asks the guest to name its free pages; forgets those of the round before. Returns the
    /// round's command id. A page may be left out of a migration for a hint only if it was write-protected before this call.
    ///
    /// # Errors
    /// A guest that does not hint, or whose free pages must keep what they hold.
    pub fn start_hint(&self) -> Result<u32, BalloonError> {
        self.transport().with_live(|backend, features| {
            let features = features.ok_or(BalloonError::NoDriver)?;
            if features & feature::FREE_PAGE_HINT == 0 {
                return Err(BalloonError::NoHints);
            }
            if features & feature::PAGE_POISON != 0 {
                return Err(BalloonError::Poisoned);
            }
            Ok(backend.begin_round())
        })
    }

    /// Stops the round: what the guest names from now on is dropped. The guest keeps the pages back that it named, so that
    /// they stay free; [`VirtioBalloon::finish_hint`] lets it use them.
    pub fn stop_hint(&self) {
        self.transport().with_backend(|backend| backend.end_round(COMMAND_STOP));
    }

    /// Stops the round if it goes on, and lets the guest use the pages again that it named.
    pub fn finish_hint(&self) {
        self.transport().with_backend(|backend| backend.end_round(COMMAND_DONE));
    }

    /// Moves the pages named so far in the round into `into`, as pages of the memory file. All of them were named for the
    /// round's id. `None` if there was no round since the driver began.
    pub fn take_hints(&self, into: &mut PageBitmap) -> Option<HintRound> {
        self.transport().with_backend(|backend| {
            if let Some(round) = &mut backend.round {
                into.union(&round.pages);
                round.pages.clear();
            }
            backend.round_status()
        })
    }
}
