//! How a part of guest memory was written. Words only.

use serde::{Deserialize, Serialize};

use super::guest::MemoryRange;

/// What was written of one part of guest memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RegionHeat {
    /// Which part.
    pub range: MemoryRange,
    /// Different pages of it that were written.
    pub unique_pages: u64,
    /// Its pages.
    pub pages: u64,
}

impl RegionHeat {
    /// The part of its pages that was written, 0 to 1; zero of nothing.
    pub fn share(&self) -> f64 {
        if self.pages == 0 { 0.0 } else { (self.unique_pages as f64 / self.pages as f64).min(1.0) }
    }
}
