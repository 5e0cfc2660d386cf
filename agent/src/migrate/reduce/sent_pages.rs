//! Copies of the pages that were sent last, each under the place that it was sent for: the bases of deltas. Bounded, shared by all streams.
//!
//! What is kept for a page is what the target holds there, or nothing is: whoever sends a page notes it here. A page is sent once in a round, by one stream, and rounds
//! are barriers, so nobody asks for a page that another stream is sending.

use std::sync::{Mutex, MutexGuard, PoisonError};

use xxhash_rust::xxh3::xxh3_64;

use super::Page;
use crate::model::{PAGE_SIZE, PageRun};

/// Places in one set; a page can be in one set only.
const WAYS: usize = 8;

/// A page as it was sent.
struct Sent {
    page: u64,
    round: u32,
    hash: u64,
    bytes: Box<Page>,
}

/// The copies.
pub(crate) struct SentPages {
    sets: Vec<Mutex<Vec<Sent>>>,
}

impl SentPages {
    /// Room for `bytes` of pages, at least one set.
    pub(crate) fn new(bytes: u64) -> Self {
        let sets = (bytes / PAGE_SIZE as u64 / WAYS as u64).max(1);
        Self { sets: (0..sets).map(|_| Mutex::default()).collect() }
    }

    fn set(&self, page: u64) -> MutexGuard<'_, Vec<Sent>> {
        let set = &self.sets[(page % self.sets.len() as u64) as usize];
        set.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was sent last for `page`, and its hash, if that is kept.
    pub(super) fn with<T>(&self, page: u64, look: impl FnOnce(&Page, u64) -> T) -> Option<T> {
        let set = self.set(page);
        set.iter().find(|sent| sent.page == page).map(|sent| look(&sent.bytes, sent.hash))
    }

    /// Notes that `bytes` were sent for `page` in `round`. They are kept if there is room, or something of an earlier round makes room: pages that are written
    /// again and again stay.
    pub(super) fn note(&self, page: u64, round: u32, bytes: &Page) {
        let mut set = self.set(page);
        let mut place = set.iter().position(|sent| sent.page == page);
        if place.is_none() && set.len() >= WAYS {
            place = (0..set.len()).filter(|&at| set[at].round < round).min_by_key(|&at| set[at].round);
            if place.is_none() {
                return;
            }
        }
        let hash = xxh3_64(bytes);
        match place.and_then(|at| set.get_mut(at)) {
            Some(sent) => {
                (sent.page, sent.round, sent.hash) = (page, round, hash);
                *sent.bytes = *bytes;
            }
            None => set.push(Sent { page, round, hash, bytes: Box::new(*bytes) }),
        }
    }

    /// Notes that something else was sent for these pages.
    pub(super) fn forget(&self, run: PageRun) {
        for page in run.indices() {
            self.set(page).retain(|sent| sent.page != page);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a plain map of what was sent: what is kept is that, and no more is kept than there is room for.
        #[test]
        fn what_is_kept_is_what_was_sent_last(sends in prop::collection::vec((0..60u64, any::<u8>(), any::<bool>()), 0..300)) {
            let kept = SentPages::new(16 * PAGE_SIZE as u64);
            let mut sent = BTreeMap::new();
            for (number, (page, value, zero)) in sends.into_iter().enumerate() {
                if zero {
                    kept.forget(PageRun::new(page, 1));
                    sent.remove(&page);
                } else {
                    kept.note(page, number as u32 / 40, &[value; PAGE_SIZE]);
                    sent.insert(page, value);
                }
                for page in 0..60 {
                    if let Some((value, hash)) = kept.with(page, |bytes, hash| (bytes[5], hash)) {
                        prop_assert_eq!(sent.get(&page), Some(&value));
                        prop_assert_eq!(hash, xxh3_64(&[value; PAGE_SIZE]));
                    }
                }
            }
            prop_assert!((0..60).filter(|&page| kept.with(page, |_, _| ()).is_some()).count() <= 16);
        }
    }

    #[test]
    fn what_is_written_again_and_again_stays() {
        let kept = SentPages::new(WAYS as u64 * PAGE_SIZE as u64);
        for page in 0..100 {
            kept.note(page, 1, &[1; PAGE_SIZE]);
        }
        let kept_pages = || (0..100).filter(|&page| kept.with(page, |_, _| ()).is_some()).collect::<Vec<_>>();
        assert_eq!(kept_pages(), (0..8).collect::<Vec<_>>(), "nothing of the same round makes room");
        for page in 90..96 {
            kept.note(page, 2, &[2; PAGE_SIZE]);
        }
        kept.note(7, 3, &[3; PAGE_SIZE]);
        assert_eq!(kept_pages().iter().filter(|&&page| page >= 90).count(), 6);
        assert_eq!(kept.with(7, |bytes, _| bytes[0]), Some(3));
    }
}
