//! One bit a page, set by several threads.

use std::sync::atomic::{AtomicU64, Ordering};

/// Marks on the pages of one region: a manager's own, or in memory that outlives it.
pub(super) struct Marks<W = Vec<AtomicU64>>(W);

impl<'w> Marks<&'w [AtomicU64]> {
    /// Marks in these words.
    pub(super) fn within(words: &'w [AtomicU64]) -> Self {
        Self(words)
    }
}

impl Marks {
    /// These words, the lowest bit being the first page.
    pub(super) fn of(words: impl Iterator<Item = u64>) -> Self {
        Self(words.map(AtomicU64::new).collect())
    }

    /// None is set of so many pages.
    pub(super) fn none(pages: u64) -> Self {
        Self::of((0..pages.div_ceil(64)).map(|_| 0))
    }
}

impl<W: AsRef<[AtomicU64]>> Marks<W> {
    /// Whether a page is marked.
    pub(super) fn is_set(&self, page: u64) -> bool {
        self.word(page) >> (page % 64) & 1 == 1
    }

    /// The marks of the 64 pages among which a page is.
    pub(super) fn word(&self, page: u64) -> u64 {
        self.0.as_ref()[(page / 64) as usize].load(Ordering::Acquire)
    }

    /// Becomes what the other marks are. Nobody else may mark meanwhile.
    pub(super) fn become_like(&self, other: &Marks<&[AtomicU64]>) {
        for (to, from) in self.0.as_ref().iter().zip(other.0) {
            to.store(from.load(Ordering::Acquire), Ordering::Release);
        }
    }

    /// Marks a page; whether it was not marked. One that is marked already is only looked at.
    pub(super) fn set(&self, page: u64) -> bool {
        let bit = 1 << (page % 64);
        !self.is_set(page) && self.0.as_ref()[(page / 64) as usize].fetch_or(bit, Ordering::AcqRel) & bit == 0
    }
}
