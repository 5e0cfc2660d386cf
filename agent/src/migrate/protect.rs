//! Write protection of all memory at once, where no round's windows lead it.

use crate::model::{PageCount, PageRun};
use crate::port::{Machine, MachineError, Region};

/// Pages that are protected with one order: 4 TiB.
const PAGES: u64 = 1 << 30;

/// Has every page that a harvest has moved (at the start: all) logged again when it is written.
pub(super) fn protect_all(machine: &mut dyn Machine, region: &dyn Region) -> Result<(), MachineError> {
    let PageCount(pages) = region.spec().pages;
    for first in (0..pages).step_by(PAGES as usize) {
        machine.protect(region.spec().id, PageRun::new(first, (pages - first).min(PAGES) as u32))?;
    }
    Ok(())
}
