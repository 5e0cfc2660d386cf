//! Which guest process an address space belongs to, found by reading the guest's memory.

use std::collections::BTreeMap;

use super::inventory::HostVm;
use crate::model::{AddressSpace, GuestProcess};
use crate::port::ThreadEvents;

/// The processes of a guest by address space.
///
/// # Errors
/// Why they are not known, in words.
pub(super) fn processes<'a>(
    _vm: &HostVm,
    may_read: bool,
    _threads: impl Iterator<Item = &'a ThreadEvents>,
) -> Result<BTreeMap<AddressSpace, GuestProcess>, String> {
    if !may_read {
        return Err("reading this VM's memory is not allowed (--allow-read-memory)".to_owned());
    }
    Ok(BTreeMap::new())
}
