//! The descriptor table and page tables of a guest that starts in long mode.
//!
//! Owns their content: Linux' boot protocol wants the selectors 0x10 (code) and 0x18 (data), and its memory mapped where it
//! lies (Documentation/arch/x86/boot.rst, "64-bit boot protocol").

use super::layout::PAGE_TABLES;

/// The descriptor table: flat 64-bit code at 0x10, flat data at 0x18 (SDM 3A, 3.4.5).
pub(super) const DESCRIPTORS: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

/// How much is mapped: all below 4 GiB.
const MAPPED_BYTES: u64 = 1 << 32;
/// A page that is mapped by an entry of the third level.
const LARGE_PAGE_BYTES: u64 = 2 << 20;
const ENTRIES: u64 = 512;
const TABLE_BYTES: u64 = ENTRIES * 8;
/// Present and writable.
const TABLE: u64 = 0b11;
/// Present, writable, 2 MiB.
const LARGE_PAGE: u64 = 0b1000_0011;

/// The tables, to be put at [`PAGE_TABLES`], the first level first: it goes into CR3.
pub(super) fn page_tables() -> Vec<u8> {
    let (second, third) = (PAGE_TABLES + TABLE_BYTES, PAGE_TABLES + 2 * TABLE_BYTES);
    let thirds = MAPPED_BYTES / (LARGE_PAGE_BYTES * ENTRIES);
    let mut entries = vec![0u64; ((2 + thirds) * ENTRIES) as usize];
    entries[0] = second | TABLE;
    for index in 0..thirds {
        entries[(ENTRIES + index) as usize] = (third + index * TABLE_BYTES) | TABLE;
    }
    for index in 0..thirds * ENTRIES {
        entries[(2 * ENTRIES + index) as usize] = (index * LARGE_PAGE_BYTES) | LARGE_PAGE;
    }
    entries.into_iter().flat_map(u64::to_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_address_below_four_gibibytes_leads_to_itself() {
        let tables = page_tables();
        let entry = |table: u64, index: u64| {
            let at = (table - PAGE_TABLES + index * 8) as usize;
            u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())
        };
        for address in [0, 0x9000, 0x10_0000, 0x3fff_ffff, 0x4000_0000, 0xbfff_f123, 0xffff_ffff_u64] {
            let second = entry(PAGE_TABLES, address >> 39) & !0xfff;
            let third = entry(second, address >> 30 & 511) & !0xfff;
            let page = entry(third, address >> 21 & 511);
            assert_eq!(page & 0xfff, LARGE_PAGE);
            assert_eq!((page & !0xfff) | (address & (LARGE_PAGE_BYTES - 1)), address);
        }
        assert_eq!(entry(PAGE_TABLES, 1), 0, "nothing above");
    }
}
