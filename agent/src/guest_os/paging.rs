//! Page tables of x86-64: where a guest's virtual addresses lie in its memory.
//!
//! Owns the walk with four and five levels and pages of 4 KiB, 2 MiB and 1 GiB. Must not know what is mapped. Only whether an entry is
//! present counts, not what it allows: the reader is no program of the guest.
//!
//! Format: Intel SDM volume 3, sections 4.5.4 and 4.5.5; AMD64 APM volume 2, section 5.3.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ops::RangeInclusive;

use dunlin_ebpf::TABLE_ADDRESS;

use super::reader::{ReadError, Reader};
use crate::model::{AddressSpace, Gpa, Gva, PAGE_SIZE};

/// Bit 0 of an entry.
const PRESENT: u64 = 1;
/// Bit 7 of an entry of levels 2 and 3: it maps a page itself.
const LARGE: u64 = 1 << 7;
/// Entries in a table.
const ENTRIES: u64 = 512;
/// Pages that are remembered; beyond that the walk starts afresh.
const MAX_KNOWN: usize = 1 << 14;
/// Stretches that a window may consist of.
const MAX_STRETCHES: usize = 1 << 16;

/// How deep the tables are: CR4.LA57 of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Levels {
    /// Addresses of 48 bits.
    Four = 4,
    /// Addresses of 57 bits.
    Five = 5,
}

/// Consecutive virtual addresses that lie at consecutive physical ones.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Stretch {
    /// The first virtual address.
    pub(super) start: Gva,
    /// Where that lies.
    pub(super) at: Gpa,
    /// The length, never zero.
    pub(super) bytes: u64,
}

impl Stretch {
    /// The last virtual address: the one behind it may be beyond the last that there is.
    fn last(&self) -> u64 {
        self.start.0 + (self.bytes - 1)
    }
}

/// The part of a CR3 that is the address of the root table, and names the address space.
pub(super) fn root_of(space: AddressSpace) -> Gpa {
    Gpa(space.0 & TABLE_ADDRESS)
}

/// An address space.
pub(super) struct Virtual<'a> {
    reader: &'a Reader<'a>,
    root: Gpa,
    levels: Levels,
    /// Pages found, by their first virtual address.
    known: RefCell<BTreeMap<u64, Stretch>>,
}

impl<'a> Virtual<'a> {
    /// That which `root` is the root of.
    pub(super) fn new(reader: &'a Reader<'a>, root: Gpa, levels: Levels) -> Self {
        Self { reader, root, levels, known: RefCell::default() }
    }

    /// Where its root table lies.
    pub(super) fn root(&self) -> Gpa {
        self.root
    }

    /// How deep its tables are.
    pub(super) fn levels(&self) -> Levels {
        self.levels
    }

    /// The memory below.
    pub(super) fn physical(&self) -> &'a Reader<'a> {
        self.reader
    }

    /// Where `address` lies.
    pub(super) fn translate(&self, address: Gva) -> Result<Gpa, ReadError> {
        let page = self.page(address)?;
        Ok(Gpa(page.at.0 + (address.0 - page.start.0)))
    }

    /// Fills `into` from `address` on.
    pub(super) fn read(&self, address: Gva, into: &mut [u8]) -> Result<(), ReadError> {
        self.read_many([(address, into)])
    }

    /// Fills each buffer from its address, with one call where the memory allows it.
    pub(super) fn read_many<'b>(&self, what: impl IntoIterator<Item = (Gva, &'b mut [u8])>) -> Result<(), ReadError> {
        let mut pieces = Vec::new();
        for (Gva(mut address), mut rest) in what {
            while !rest.is_empty() {
                let page = self.page(Gva(address))?;
                let offset = address - page.start.0;
                let here = (page.bytes - offset).min(rest.len() as u64);
                let (piece, behind) = rest.split_at_mut(here as usize);
                pieces.push((Gpa(page.at.0 + offset), piece));
                rest = behind;
                // Behind the last address there is nothing, and address zero is nobody's continuation.
                address = match address.checked_add(here) {
                    Some(next) => next,
                    None if rest.is_empty() => break,
                    None => return Err(ReadError::Unmapped),
                };
            }
        }
        self.reader.read_many(&mut pieces)
    }

    /// The eight bytes at `address`.
    pub(super) fn word(&self, address: Gva) -> Result<u64, ReadError> {
        let mut bytes = [0; 8];
        self.read(address, &mut bytes)?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// The four bytes at `address`.
    pub(super) fn half_word(&self, address: Gva) -> Result<u32, ReadError> {
        let mut bytes = [0; 4];
        self.read(address, &mut bytes)?;
        Ok(u32::from_le_bytes(bytes))
    }

    /// What is mapped of `window`, in order, as few stretches as there can be. A table that is no RAM maps nothing.
    pub(super) fn present(&self, window: RangeInclusive<u64>) -> Result<Vec<Stretch>, ReadError> {
        let mut found = Vec::new();
        self.collect(self.root, self.levels as u32, 0, &window, &mut found)?;
        Ok(found)
    }

    /// The page that holds `address`.
    fn page(&self, address: Gva) -> Result<Stretch, ReadError> {
        if self.canonical(address.0) != address.0 {
            return Err(ReadError::Unmapped);
        }
        let known = self.known.borrow().range(..=address.0).next_back().map(|(_, page)| *page);
        if let Some(page) = known.filter(|page| address.0 <= page.last()) {
            return Ok(page);
        }
        let (mut table, mut level) = (self.root, self.levels as u32);
        let page = loop {
            let index = address.0 >> shift(level) & (ENTRIES - 1);
            match step(self.reader.word(Gpa(table.0 + index * 8))?, level) {
                Step::Nothing => return Err(ReadError::Unmapped),
                Step::Table(next) => (table, level) = (next, level - 1),
                Step::Page(at) => {
                    let bytes = 1 << shift(level);
                    break Stretch { start: Gva(address.0 & !(bytes - 1)), at, bytes };
                }
            }
        };
        let mut known = self.known.borrow_mut();
        if known.len() >= MAX_KNOWN {
            known.clear();
        }
        known.insert(page.start.0, page);
        Ok(page)
    }

    /// Adds what the table of `level` that covers the addresses from `base` on maps of `window`. As deep as there are levels.
    fn collect(
        &self,
        table: Gpa,
        level: u32,
        base: u64,
        window: &RangeInclusive<u64>,
        found: &mut Vec<Stretch>,
    ) -> Result<(), ReadError> {
        let mut bytes = [0; PAGE_SIZE];
        match self.reader.read(table, &mut bytes) {
            Err(ReadError::Unmapped) => return Ok(()),
            done => done?,
        }
        for (index, entry) in bytes.chunks_exact(8).enumerate() {
            let first = self.canonical(base | (index as u64) << shift(level));
            let last = first + ((1 << shift(level)) - 1);
            let (from, to) = (first.max(*window.start()), last.min(*window.end()));
            if from > to {
                continue;
            }
            match step(u64::from_le_bytes(entry.try_into().unwrap_or_default()), level) {
                Step::Nothing => {}
                Step::Table(next) => self.collect(next, level - 1, first, window, found)?,
                Step::Page(at) => {
                    let piece = Stretch { start: Gva(from), at: Gpa(at.0 + (from - first)), bytes: to - from + 1 };
                    let full = found.len() == MAX_STRETCHES;
                    let joined = found.last_mut().filter(|last| {
                        last.last().checked_add(1) == Some(from) && last.at.0 + last.bytes == piece.at.0
                    });
                    match joined {
                        Some(last) => last.bytes += piece.bytes,
                        None if full => return Err(ReadError::Exhausted),
                        None => found.push(piece),
                    }
                }
            }
        }
        Ok(())
    }

    /// `address` with the bits above its highest as that is.
    fn canonical(&self, address: u64) -> u64 {
        let unused = 64 - shift(self.levels as u32 + 1);
        ((address << unused) as i64 >> unused) as u64
    }
}

/// What an entry leads to.
enum Step {
    Nothing,
    Table(Gpa),
    Page(Gpa),
}

/// Reads an entry of `level`: 1 maps 4 KiB.
fn step(entry: u64, level: u32) -> Step {
    let page_bytes = 1u64 << shift(level);
    match (entry & PRESENT != 0, level, entry & LARGE != 0) {
        (false, ..) => Step::Nothing,
        // Bit 7 of the last level is a memory type.
        (true, 1, _) => Step::Page(Gpa(entry & TABLE_ADDRESS)),
        (true, 2 | 3, true) => Step::Page(Gpa(entry & TABLE_ADDRESS & !(page_bytes - 1))),
        (true, _, false) => Step::Table(Gpa(entry & TABLE_ADDRESS)),
        // Reserved: the processor would fault.
        (true, _, true) => Step::Nothing,
    }
}

/// The lowest bit of an address that selects an entry of `level`.
const fn shift(level: u32) -> u32 {
    12 + 9 * (level - 1)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::guest_os::testing::{GuestRam, Tables};

    const BUDGET: u64 = 64 << 20;

    /// One page of each size: 4 KiB at 0x1000, 2 MiB at the end of the lower half, 1 GiB at the end of the upper.
    fn three(levels: Levels) -> (GuestRam, Gpa, [(u64, u64, u64); 3]) {
        let lower_end = if levels == Levels::Four { 1 << 47 } else { 1 << 56 };
        let pages = [
            (0x1000, 0x5000, 1 << 12),
            (lower_end - (2 << 20), 0x4000_0000, 2 << 20),
            (0u64.wrapping_sub(1 << 30), 0x8000_0000, 1 << 30),
        ];
        let ram = GuestRam::new(1 << 20);
        let mut tables = Tables::new(Gpa(0x10000), levels);
        for (from, to, bytes) in pages {
            tables.map(&ram, from, to, bytes);
        }
        (ram, tables.root, pages)
    }

    #[test]
    fn pages_of_every_size_are_found_where_they_lie() {
        for levels in [Levels::Four, Levels::Five] {
            let (ram, root, pages) = three(levels);
            let reader = Reader::new(&ram, BUDGET);
            let space = Virtual::new(&reader, root, levels);
            for (from, to, bytes) in pages {
                for offset in [0, 1, bytes / 2, bytes - 1] {
                    assert_eq!(space.translate(Gva(from + offset)), Ok(Gpa(to + offset)), "{levels:?} {from:#x}");
                }
                assert_eq!(space.translate(Gva(from - 1)), Err(ReadError::Unmapped), "{levels:?} {from:#x}");
            }
            let found = space.present(0..=u64::MAX).unwrap();
            let wanted = pages.map(|(from, to, bytes)| Stretch { start: Gva(from), at: Gpa(to), bytes });
            assert_eq!(found, wanted, "{levels:?}");
            let cut = space.present(0u64.wrapping_sub(1 << 29)..=u64::MAX - 4096).unwrap();
            assert_eq!(cut[0].at, Gpa(0x8000_0000 + (1 << 29)));
            assert_eq!((cut.len(), cut[0].bytes), (1, (1 << 29) - 4096));
        }
    }

    #[test]
    fn addresses_that_no_register_can_hold_lead_nowhere() {
        let ram = GuestRam::new(1 << 20);
        let mut tables = Tables::new(Gpa(0x10000), Levels::Four);
        for page in [0, 0x1000] {
            tables.map(&ram, page, 0x5000, 4096);
        }
        tables.map(&ram, 0u64.wrapping_sub(4096), 0x6000, 4096);
        let reader = Reader::new(&ram, BUDGET);
        let space = Virtual::new(&reader, tables.root, Levels::Four);
        // The entry is there; bit 48 is not a copy of bit 47.
        assert_eq!(space.translate(Gva(1 << 48 | 0x1000)), Err(ReadError::Unmapped));
        assert_eq!(space.translate(Gva(u64::MAX)), Ok(Gpa(0x6fff)));
        // Not on to address zero, whatever is there.
        assert_eq!(space.read(Gva(u64::MAX), &mut [0; 2]), Err(ReadError::Unmapped));
    }

    #[test]
    fn a_read_goes_on_in_the_next_page_wherever_that_lies() {
        let ram = GuestRam::new(1 << 20);
        let mut tables = Tables::new(Gpa(0x10000), Levels::Four);
        tables.map(&ram, 0x1000, 0x80000, 4096);
        tables.map(&ram, 0x2000, 0x6000, 4096);
        ram.write(0x80ffe, &[1, 2]);
        ram.write(0x6000, &[3, 4]);
        let reader = Reader::new(&ram, BUDGET);
        let space = Virtual::new(&reader, tables.root, Levels::Four);
        assert_eq!(space.half_word(Gva(0x1ffe)), Ok(0x0403_0201));
        assert_eq!(space.half_word(Gva(0x2ffe)), Err(ReadError::Unmapped));
    }

    #[test]
    fn tables_that_lead_to_themselves_cost_the_budget_and_no_more() {
        let ram = GuestRam::new(1 << 16);
        for entry in 0..ENTRIES {
            ram.write(0x1000 + entry * 8, &0x1001u64.to_le_bytes());
        }
        let reader = Reader::new(&ram, BUDGET);
        let space = Virtual::new(&reader, Gpa(0x1000), Levels::Five);
        assert_eq!(space.translate(Gva(0x7000)), Ok(Gpa(0x1000)));
        assert_eq!(space.present(0..=u64::MAX), Err(ReadError::Exhausted));
        assert!(ram.bytes_read() <= BUDGET);
    }

    proptest! {
        #[test]
        fn both_ways_of_walking_agree_on_any_memory(
            words in prop::collection::vec((0u64..0x3000, any::<u64>()), 1..200),
            addresses in prop::collection::vec(any::<u64>(), 1..20),
        ) {
            // Tables at 0x0, 0x1000 and 0x2000 that mostly lead to one another.
            let ram = GuestRam::new(0x4000);
            for (at, word) in &words {
                ram.write(at & !7, &(word & 0x8000_0000_0000_3087).to_le_bytes());
            }
            let reader = Reader::new(&ram, BUDGET);
            let space = Virtual::new(&reader, Gpa(0), Levels::Four);
            for (slot, address) in addresses.iter().zip(words.iter().map(|(at, _)| at / 8 % 512).cycle()) {
                let address = space.canonical(*slot << 39 | address & 0x7f_ffff_ffff);
                let one = space.translate(Gva(address)).ok();
                let all = space.present(address..=address).unwrap();
                prop_assert_eq!(one, all.first().map(|stretch| stretch.at));
            }
        }
    }
}
