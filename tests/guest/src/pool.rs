//! Owns the memory that the guest can do without: which of its pages are free, named as free, given to the balloon, or used; and what is in those that are used.
//!
//! Free pages hold noise, like those of a system that has read files. Churn uses and frees pages all the time; what it wrote is checked before a page is free again. A page that was
//! named as free is used like any other.

use crate::memory::PAGES_PER_CHUNK;
use crate::page::{self, Fill, Page};
use crate::units;
use crate::workload::Dice;

/// Free.
const FREE: u32 = 0;
/// Free, and the host has been told so.
const NAMED: u32 = 1;
/// In the balloon.
const GIVEN: u32 = 2;
/// The host is being told that it is free, and may take its memory meanwhile.
const REPORTING: u32 = 3;
/// Free, and the host has its memory.
const REPORTED: u32 = 4;
/// Used: this or more is the sequence number of what was written.
const USED: u32 = 5;
/// Whose pages they are, in their tags.
const OWNER: u32 = 0xfe;

/// What is kept aside, and how busy it is (`dunlin.pool=size:96M,churn:5000,report:1`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Spec {
    /// Size; 0 is no pool, and no driver for the balloon.
    pub bytes: u64,
    /// Pages that are used or freed per second.
    pub churn_pages_per_second: u64,
    /// Whether the host is told of free pages without being asked.
    pub reports: bool,
}

impl Spec {
    /// Applies a list `name:value,name:value`; false when any part is not understood.
    pub fn set_list(&mut self, list: &str) -> bool {
        list.split(',').filter(|part| !part.is_empty()).fold(true, |good, part| {
            let done = match part.split_once(':') {
                Some(("size", value)) => units::size_bytes(value).map(|bytes| self.bytes = bytes),
                Some(("report", value)) => {
                    ["0", "1"].iter().position(|flag| *flag == value).map(|flag| self.reports = flag == 1)
                }
                Some(("churn", value)) => value.parse().ok().map(|rate| self.churn_pages_per_second = rate),
                _ => None,
            };
            good && done.is_some()
        })
    }
}

/// Counters of a pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    /// Pages that churn has used.
    pub used: u64,
    /// Of these, pages that had been named as free, and were not free any more a moment later.
    pub used_named: u64,
    /// Pages that were reported as free.
    pub reported: u64,
    /// Pages that were checked, and freed.
    pub freed: u64,
    /// Pages that were not what was last written there.
    pub mismatches: u64,
}

/// The pool. Pages are numbers from 0; who has them finds them by `at`.
pub struct Pool<'a> {
    table: &'a mut [u32],
    next_sequence: u32,
    cursor: usize,
    dice: Dice,
    /// What was done so far.
    pub counters: Counters,
}

impl<'a> Pool<'a> {
    /// Of as many free pages as `table` has entries.
    pub fn new(table: &'a mut [u32]) -> Self {
        table.fill(FREE);
        Self { table, next_sequence: USED, cursor: 0, dice: Dice::new(7), counters: Counters::default() }
    }

    /// Pages in all.
    pub fn pages(&self) -> u64 {
        self.table.len() as u64
    }

    /// Takes a free page for the balloon.
    pub fn give(&mut self) -> Option<u64> {
        self.find(|state| matches!(state, FREE | NAMED | REPORTED), GIVEN)
    }

    /// Takes a page out of the balloon again; it is free when the host has been told.
    pub fn take_back(&mut self) -> Option<u64> {
        self.find(|state| state == GIVEN, FREE)
    }

    fn find(&mut self, wanted: impl Fn(u32) -> bool, then: u32) -> Option<u64> {
        let len = self.table.len();
        let index = (0..len).map(|step| (self.cursor + step) % len).find(|&index| wanted(self.table[index]))?;
        self.table[index] = then;
        self.cursor = (index + 1) % len;
        Some(index as u64)
    }

    /// The next pages from `from` on that are free and were not named, all of one chunk: they count as named.
    pub fn name(&mut self, from: u64) -> Option<(u64, u64)> {
        let is_free = |state: u32| matches!(state, FREE | REPORTED);
        let first = (from as usize..self.table.len()).find(|&index| is_free(self.table[index]))?;
        let chunk_end = (first as u64 / PAGES_PER_CHUNK + 1) * PAGES_PER_CHUNK;
        let end = (chunk_end as usize).min(self.table.len());
        let count = self.table[first..end].iter_mut().take_while(|state| is_free(**state)).map(|state| *state = NAMED);
        Some((first as u64, count.count() as u64))
    }

    /// Takes a free page to report it.
    pub fn report(&mut self) -> Option<u64> {
        let page = self.find(|state| state == FREE, REPORTING)?;
        self.counters.reported += 1;
        Some(page)
    }

    /// The host has taken note of what was reported.
    pub fn reported(&mut self, page: u64) {
        self.table[page as usize] = REPORTED;
    }

    /// What was named may be used and named anew.
    pub fn forget_names(&mut self) {
        self.table.iter_mut().filter(|state| **state == NAMED).for_each(|state| *state = FREE);
    }

    /// Uses a page that was free, or checks one that was used and frees it.
    pub fn churn(&mut self, at: impl Fn(u64) -> &'a mut Page) {
        let index = self.dice.below(self.pages());
        match self.table[index as usize] {
            GIVEN | REPORTING => {}
            state @ (FREE | NAMED | REPORTED) => {
                let sequence = self.next_sequence;
                self.next_sequence = self.next_sequence.checked_add(1).unwrap_or(USED);
                page::initialise(at(index), page::tag(OWNER, index), sequence, Fill::Random);
                self.table[index as usize] = sequence;
                self.counters.used += 1;
                self.counters.used_named += u64::from(state == NAMED);
            }
            sequence => {
                self.check(index, sequence, at(index));
                self.table[index as usize] = FREE;
                self.counters.freed += 1;
            }
        }
    }

    /// Checks every page that is used; returns how many those are.
    pub fn check_all(&mut self, at: impl Fn(u64) -> &'a mut Page) -> u64 {
        let mut checked = 0;
        for index in 0..self.pages() {
            let sequence = self.table[index as usize];
            if sequence >= USED {
                self.check(index, sequence, at(index));
                checked += 1;
            }
        }
        checked
    }

    fn check(&mut self, index: u64, sequence: u32, page: &Page) {
        self.counters.mismatches += u64::from(page::verify(page, page::tag(OWNER, index), sequence).is_err());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_parse() {
        let mut spec = Spec::default();
        assert!(spec.set_list("size:96M,churn:5000,report:1"));
        assert_eq!(spec, Spec { bytes: 96 << 20, churn_pages_per_second: 5000, reports: true });
        for wrong in ["size", "size:x", "churn:-1", "report:yes", "what:1"] {
            assert!(!spec.set_list(wrong), "{wrong}");
        }
    }

    #[test]
    fn pages_are_named_once_and_by_chunks() {
        let mut table = vec![9; 700];
        let mut pool = Pool::new(&mut table);
        assert_eq!(pool.give(), Some(0));
        assert_eq!(pool.name(0), Some((1, 511)));
        assert_eq!(pool.name(0), Some((512, 188)));
        assert_eq!(pool.name(0), None);
        pool.forget_names();
        assert_eq!(pool.name(600), Some((600, 100)));
        assert_eq!(pool.take_back(), Some(0));
        assert_eq!(pool.take_back(), None);
        assert_eq!(pool.name(0), Some((0, 512)));
    }

    #[test]
    fn what_is_being_reported_is_nobodys() {
        let mut table = vec![0; 3];
        let mut pool = Pool::new(&mut table);
        assert_eq!([pool.report(), pool.report(), pool.give(), pool.report()], [Some(0), Some(1), Some(2), None]);
        assert_eq!(pool.name(0), None);
        pool.reported(1);
        assert_eq!((pool.report(), pool.name(0), pool.counters.reported), (None, Some((1, 1)), 2));
    }

    #[test]
    fn what_was_used_is_checked_and_a_lost_page_is_noticed() {
        let mut table = vec![0; 8];
        let mut pool = Pool::new(&mut table);
        let memory: &'static mut [Page] = Box::leak(vec![[0; page::PAGE_BYTES / 8]; 8].into_boxed_slice());
        let base = memory.as_mut_ptr();
        // SAFETY: one page at a time, of memory that lives for ever.
        let at = |index: u64| unsafe { &mut *base.add(index as usize) };
        pool.name(0);
        (0..1000).for_each(|_| pool.churn(at));
        let Counters { used, used_named, freed, mismatches, .. } = pool.counters;
        assert!((1..=8).contains(&used_named) && freed > 400 && used >= freed && mismatches == 0);
        let checked = pool.check_all(at);
        assert_eq!((checked, pool.counters.mismatches), (used - freed, 0));
        (0..8).for_each(|index| at(index)[0] = 0);
        assert_eq!((pool.check_all(at), pool.counters.mismatches), (checked, checked));
    }
}
