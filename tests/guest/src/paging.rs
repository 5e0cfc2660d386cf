//! Owns the page tables: two address spaces for each vCPU.
//!
//! The service space maps all RAM and devices one to one. The writer space maps only the image, the LAPIC, and the vCPU's
//! working set and sequence table at addresses of their own; nothing of the working set is reachable there one to one. Both
//! have a canary page at the same address with different content. A task that wakes in the wrong space faults or sees it.

use dunlin_guest::memory::{CHUNK_BYTES, RamMap};

/// Where each space has its canary word.
pub const CANARY: u64 = 0x2000_0000_0000;
/// Where the writer space of vCPU 0 has its working set; each vCPU's is 1 TiB further on.
const WORKING_SET: u64 = 0x1000_0000_0000;
/// Where the sequence table follows, counted from the working set.
const TABLE_OFFSET: u64 = 0x40_0000_0000;

// Present, writable, user, accessed; the last two also spare the CPU or hypervisor the writing of these bits.
const TABLE: u64 = 0x27;
const LEAF: u64 = 0x67;
const LARGE: u64 = 0xe7;
const UNCACHED: u64 = 0x18;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
const LAPIC_CHUNK: u64 = 0xfee0_0000;

/// Hands out zeroed 4 KiB pages from one stretch of RAM.
pub struct PageSource {
    next: u64,
    end: u64,
}

impl PageSource {
    /// Pages between two addresses, which must be RAM that nothing else uses, mapped one to one.
    pub fn new(start: u64, end: u64) -> Self {
        Self { next: start, end }
    }

    fn page(&mut self) -> u64 {
        let page = self.next;
        assert!(page + 4096 <= self.end, "no room for page tables");
        self.next += 4096;
        // SAFETY: the stretch belongs to this source, is mapped one to one and this page was not handed out before.
        unsafe { core::ptr::write_bytes(page as *mut u8, 0, 4096) };
        page
    }
}

/// An address space under construction.
#[derive(Clone, Copy)]
pub struct Space {
    root: u64,
}

impl Space {
    /// An empty space.
    pub fn new(pages: &mut PageSource) -> Self {
        Self { root: pages.page() }
    }

    /// What CR3 must hold.
    pub fn root(self) -> u64 {
        self.root
    }

    fn entry(table: u64, address: u64, level: u32) -> *mut u64 {
        let index = address >> (12 + 9 * level) & 511;
        (table + 8 * index) as *mut u64
    }

    fn walk(self, pages: &mut PageSource, address: u64, to_level: u32) -> *mut u64 {
        let mut table = self.root;
        for level in (to_level + 1..4).rev() {
            let entry = Self::entry(table, address, level);
            // SAFETY: `table` is a page of tables from a `PageSource`, mapped one to one; the index is below 512.
            unsafe {
                if *entry == 0 {
                    *entry = pages.page() | TABLE;
                }
                table = *entry & ADDRESS;
            }
        }
        Self::entry(table, address, to_level)
    }

    fn map_chunk(self, pages: &mut PageSource, at: u64, physical: u64, extra: u64) {
        let entry = self.walk(pages, at, 1);
        // SAFETY: `walk` returns an entry of a table of this space.
        unsafe { *entry = physical | LARGE | extra };
    }

    fn map_page(self, pages: &mut PageSource, at: u64, physical: u64) {
        let entry = self.walk(pages, at, 0);
        // SAFETY: as in `map_chunk`.
        unsafe { *entry = physical | LEAF };
    }

    fn add_canary(self, pages: &mut PageSource, value: u64) {
        let page = pages.page();
        // SAFETY: a fresh page, mapped one to one.
        unsafe { *(page as *mut u64) = value };
        self.map_page(pages, CANARY, page);
    }
}

/// The value of a canary.
pub fn canary_value(cpu: usize, task: usize) -> u64 {
    0xca9a_d417_0000_0000 | (cpu as u64) << 8 | task as u64
}

/// True when the loaded address space is the one of this vCPU's task.
#[inline]
pub fn in_own_space(cpu: usize, task: usize) -> bool {
    // SAFETY: the page is mapped in every address space that a task runs in.
    let found = unsafe { core::ptr::read_volatile(CANARY as *const u64) };
    found == canary_value(cpu, task)
}

/// Builds the one-to-one part of all service spaces once; the spaces then share its tables.
pub fn identity(pages: &mut PageSource, ram: &RamMap) -> Space {
    let space = Space::new(pages);
    let end = ram.top().max(4 << 30);
    for chunk in (0..end).step_by(CHUNK_BYTES as usize) {
        let is_ram = ram.ranges().iter().any(|range| range.start < chunk + CHUNK_BYTES && range.end > chunk);
        space.map_chunk(pages, chunk, chunk, if is_ram { 0 } else { UNCACHED });
    }
    space
}

/// Makes the service space of a vCPU: all that `identity` maps, and its canary.
pub fn service_space(pages: &mut PageSource, identity: Space, cpu: usize) -> Space {
    let space = Space::new(pages);
    // SAFETY: both roots are pages of tables, mapped one to one.
    unsafe { *(space.root as *mut u64) = *(identity.root as *const u64) };
    space.add_canary(pages, canary_value(cpu, crate::cpu::SERVICE));
    space
}

/// Makes the writer space of a vCPU: image, LAPIC, working set, sequence table, canary.
pub fn writer_space(pages: &mut PageSource, image: (u64, u64), cpu: usize, data: &[u64], table: &[u64]) -> Space {
    let space = Space::new(pages);
    for chunk in (image.0..image.1).step_by(CHUNK_BYTES as usize) {
        space.map_chunk(pages, chunk, chunk, 0);
    }
    space.map_chunk(pages, LAPIC_CHUNK, LAPIC_CHUNK, UNCACHED);
    for (index, chunk) in data.iter().enumerate() {
        space.map_chunk(pages, working_set_address(cpu) + index as u64 * CHUNK_BYTES, *chunk, 0);
    }
    for (index, chunk) in table.iter().enumerate() {
        space.map_chunk(pages, table_address(cpu) + index as u64 * CHUNK_BYTES, *chunk, 0);
    }
    space.add_canary(pages, canary_value(cpu, crate::cpu::WRITER));
    space
}

/// Where the writer of this vCPU sees its working set.
pub fn working_set_address(cpu: usize) -> u64 {
    WORKING_SET + ((cpu as u64) << 40)
}

/// Where the writer of this vCPU sees its sequence table.
pub fn table_address(cpu: usize) -> u64 {
    working_set_address(cpu) + TABLE_OFFSET
}
