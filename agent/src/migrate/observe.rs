//! How a migration is watched and stopped from outside.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use crate::model::{RoundReport, Step};

/// Told of everything that an operator may want to see. Called from the manager's own thread.
pub trait Observer: Sync {
    /// A step was passed. May block: tests hold a manager here.
    fn step(&self, step: Step, detail: &str);

    /// A round has arrived at the target.
    fn round(&self, round: &RoundReport);

    /// Pages sent so far of those due in this round. Called from the page streams' threads, at most once per window.
    fn progress(&self, round: u32, sent_pages: u64, due_pages: u64);
}

/// An observer that looks away.
#[derive(Clone, Copy, Debug, Default)]
pub struct Quiet;

impl Observer for Quiet {
    fn step(&self, _step: Step, _detail: &str) {}
    fn round(&self, _round: &RoundReport) {}
    fn progress(&self, _round: u32, _sent_pages: u64, _due_pages: u64) {}
}

/// Set once, from a signal handler or another thread; obeyed up to the point of no return.
#[derive(Clone, Debug, Default)]
pub struct CancelFlag(Arc<AtomicBool>);

impl CancelFlag {
    /// Asks the migration to stop.
    pub fn set(&self) {
        self.0.store(true, Ordering::Release);
    }

    /// Whether it was asked to.
    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// The flag itself, for registering with a signal handler.
    pub fn as_atomic(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.0)
    }
}
