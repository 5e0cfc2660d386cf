//! What of a VM has bytes that move: regions of RAM (later disks), and runs of pages within them.

use serde::{Deserialize, Serialize};

use super::units::{PAGE_SIZE, PageCount, PageIndex};

/// A region's name on the wire, from version 1 on. RAM is 0; disks follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct RegionId(pub u16);

impl RegionId {
    /// The whole of guest RAM, as one file.
    pub const RAM: Self = Self(0);
}

/// What a region holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RegionKind {
    /// Guest RAM; pages are counted from the start of the memory file.
    Ram,
    /// A disk; pages are counted from its first byte.
    Disk,
}

/// A region as it is offered to the target.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionSpec {
    /// Its name on the wire.
    pub id: RegionId,
    /// What it holds.
    pub kind: RegionKind,
    /// Its size; all regions are whole pages.
    pub pages: PageCount,
}

/// Consecutive pages `[first, first + count)` of one region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PageRun {
    /// The first page.
    pub first: PageIndex,
    /// How many pages; never zero in a run that was built by this crate.
    pub count: u32,
}

impl PageRun {
    /// A run of `count` pages from `first`.
    pub const fn new(first: u64, count: u32) -> Self {
        Self { first: PageIndex(first), count }
    }

    /// The index behind the last page.
    pub const fn end(self) -> u64 {
        self.first.0.saturating_add(self.count as u64)
    }

    /// The first byte's offset in the region.
    pub const fn byte_offset(self) -> u64 {
        self.first.0 * PAGE_SIZE as u64
    }

    /// The run's length in bytes.
    pub const fn byte_len(self) -> usize {
        self.count as usize * PAGE_SIZE
    }

    /// Whether the run is not empty and lies wholly inside a region of `pages`.
    pub const fn fits(self, pages: PageCount) -> bool {
        self.count > 0 && self.end() <= pages.0
    }

    /// The pages' indices in order.
    pub fn indices(self) -> impl Iterator<Item = u64> {
        self.first.0..self.end()
    }
}
