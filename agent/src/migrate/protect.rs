//! Write protection of all memory at once, where no round's windows lead it.

use crate::port::{Machine, MachineError, Region};

/// Pages that are protected with one order: 4 TiB.
const PAGES: u32 = 1 << 30;

/// Has every page that a harvest has moved (at the start: all) logged again when it is written.
pub(super) fn protect_all(machine: &mut dyn Machine, region: &dyn Region) -> Result<(), MachineError> {
    region.spec().pages.windows(PAGES).try_for_each(|window| machine.protect(region.spec().id, window))
}
