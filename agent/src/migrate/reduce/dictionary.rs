//! Pages that one stream has sent, by their content: a page that equals one of them goes as that one's place. Bounded.
//!
//! A reference holds as long as the target's page at that place is what this stream sent for it. Each page is sent once in a round, rounds are barriers, and a stream's
//! frames are taken in order: so it holds to the end of the round in which it was sent, and through every later round in which the place is not due. What is
//! due in a round is taken out as the round begins. The source keeps a copy of what it sent and compares byte by byte, so that pages whose
//! hashes collide are told apart; the hash that travels (XXH3, 64 bits) lets the target find a mistake instead of taking it.

use std::collections::{HashMap, VecDeque};

use xxhash_rust::xxh3::{xxh3_64, xxh3_128};

use super::Page;
use crate::model::{PAGE_SIZE, PageBitmap};

/// A page that was sent.
struct Entry {
    hash: u128,
    place: u64,
    bytes: Box<Page>,
}

/// A page's content, found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reference {
    /// Which page the target has it at.
    pub(super) place: u64,
    /// Its hash, for the target to check.
    pub(super) hash: u64,
}

/// What one stream has sent.
pub(super) struct Dictionary {
    /// Oldest first.
    entries: VecDeque<Entry>,
    /// By hash: how many entries were ever put in before it.
    by_hash: HashMap<u128, u64>,
    dropped: u64,
    most: usize,
}

impl Dictionary {
    /// Room for `bytes` of pages, at least one.
    pub(super) fn new(bytes: u64) -> Self {
        let most = (bytes / PAGE_SIZE as u64).max(1) as usize;
        Self { entries: VecDeque::new(), by_hash: HashMap::new(), dropped: 0, most }
    }

    /// A round begins in which the pages `due` are sent anew.
    pub(super) fn begin_round(&mut self, due: &PageBitmap) {
        self.entries.retain(|entry| !due.contains(entry.place));
        self.dropped = 0;
        self.by_hash = self.entries.iter().enumerate().map(|(index, entry)| (entry.hash, index as u64)).collect();
    }

    /// Where the target has a page of exactly these bytes; else they are noted as being sent for `place`.
    pub(super) fn find_or_note(&mut self, place: u64, bytes: &Page) -> Option<Reference> {
        let hash = xxh3_128(bytes);
        self.find(hash, bytes).or_else(|| {
            self.note(hash, place, bytes);
            None
        })
    }

    fn find(&self, hash: u128, bytes: &Page) -> Option<Reference> {
        let number = self.by_hash.get(&hash)?;
        let entry = self.entries.get(number.checked_sub(self.dropped)? as usize)?;
        (entry.bytes[..] == bytes[..]).then(|| Reference { place: entry.place, hash: xxh3_64(bytes) })
    }

    fn note(&mut self, hash: u128, place: u64, bytes: &Page) {
        let mut room = None;
        if self.entries.len() >= self.most
            && let Some(oldest) = self.entries.pop_front()
        {
            if self.by_hash.get(&oldest.hash) == Some(&self.dropped) {
                self.by_hash.remove(&oldest.hash);
            }
            self.dropped += 1;
            room = Some(oldest.bytes);
        }
        let mut room = room.unwrap_or_else(|| Box::new([0; PAGE_SIZE]));
        *room = *bytes;
        self.by_hash.insert(hash, self.dropped + self.entries.len() as u64);
        self.entries.push_back(Entry { hash, place, bytes: room });
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;
    use crate::model::PageCount;

    const PAGES: u64 = 24;

    fn content(value: u8) -> Page {
        let mut page = [value; PAGE_SIZE];
        page[0] = 1;
        page
    }

    proptest! {
        /// A target that takes what it is told, page by page, round by round: each reference finds what it speaks of.
        #[test]
        fn references_speak_of_what_the_target_holds(
            rounds in prop::collection::vec(prop::collection::btree_map(0..PAGES, 0..6u8, 0..20), 1..6), most in 1..8u64,
        ) {
            let mut dictionary = Dictionary::new(most * PAGE_SIZE as u64);
            let mut target = BTreeMap::new();
            for round in rounds {
                let mut due = PageBitmap::new(PageCount(PAGES));
                for &page in round.keys() {
                    due.insert(page);
                }
                dictionary.begin_round(&due);
                // What other streams send of it comes before, or after.
                for (&page, &value) in &round {
                    if page % 3 == 0 {
                        target.insert(page, content(value + 100));
                    }
                }
                for (&page, &value) in round.iter().filter(|(page, _)| *page % 3 != 0) {
                    let bytes = content(value);
                    if let Some(found) = dictionary.find_or_note(page, &bytes) {
                        prop_assert_eq!(target.get(&found.place), Some(&bytes));
                        prop_assert_eq!(found.hash, xxh3_64(&bytes));
                    }
                    target.insert(page, bytes);
                }
                prop_assert!(dictionary.entries.len() as u64 <= most);
            }
        }
    }

    #[test]
    fn a_page_is_found_until_its_place_is_due_or_it_is_too_old() {
        let mut dictionary = Dictionary::new(2 * PAGE_SIZE as u64);
        assert_eq!(dictionary.find_or_note(5, &content(1)), None);
        let place = |found: Option<Reference>| found.map(|found| found.place);
        assert_eq!(place(dictionary.find_or_note(6, &content(1))), Some(5));
        let mut due = PageBitmap::new(PageCount(PAGES));
        due.insert(6);
        dictionary.begin_round(&due);
        assert_eq!(place(dictionary.find_or_note(6, &content(1))), Some(5));
        due.insert(5);
        dictionary.begin_round(&due);
        assert_eq!(dictionary.find_or_note(7, &content(1)), None, "the target may hold something else by now");
        for value in 2..4 {
            assert_eq!(dictionary.find_or_note(u64::from(value) + 10, &content(value)), None);
        }
        assert_eq!(dictionary.find_or_note(20, &content(1)), None, "two newer ones took its room");
    }

    #[test]
    fn pages_of_one_hash_are_told_apart_by_their_bytes() {
        let mut dictionary = Dictionary::new(4 * PAGE_SIZE as u64);
        let hash = xxh3_128(&content(2));
        dictionary.note(hash, 1, &content(1));
        assert_eq!(dictionary.find_or_note(2, &content(2)), None);
        assert_eq!(dictionary.find_or_note(3, &content(2)).map(|found| found.place), Some(2));
    }
}
