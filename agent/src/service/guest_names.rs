//! Which guest process an address space belongs to, found by reading the guest's memory.

use std::collections::BTreeMap;

use super::inventory::HostVm;
use super::profile::ram_slots;
use crate::foreign::ProcessMemory;
use crate::guest_os::{Hints, LinuxGuest};
use crate::model::{AddressSpace, GuestProcess};
use crate::port::ThreadEvents;

/// Roots of page tables that the kernel is looked for with: those that wrote most.
const MOST_ROOTS: usize = 16;

/// A guest whose processes can be named: its kernel is found once.
#[derive(Debug, Default)]
pub(super) struct GuestNames {
    found: Option<(ProcessMemory, LinuxGuest)>,
}

impl GuestNames {
    /// The processes of a Linux guest, by those address spaces that were seen to write.
    ///
    /// # Errors
    /// Why they are not known, in words.
    pub(super) fn processes<'a>(
        &mut self,
        vm: &HostVm,
        may_read: bool,
        threads: impl Iterator<Item = &'a ThreadEvents>,
    ) -> Result<BTreeMap<AddressSpace, GuestProcess>, String> {
        if !may_read {
            return Err("reading this VM's memory is not allowed (--allow-read-memory)".to_owned());
        }
        let mut wrote: BTreeMap<AddressSpace, u64> = BTreeMap::new();
        for (&space, events) in threads.flat_map(|events| &events.spaces) {
            *wrote.entry(space).or_default() += events.pages_made_writable;
        }
        let mut roots: Vec<AddressSpace> = wrote.keys().copied().collect();
        roots.sort_by_key(|root| std::cmp::Reverse(wrote[root]));
        roots.truncate(MOST_ROOTS);
        let all = match self.found.as_mut().map(|(memory, guest)| guest.processes(memory)) {
            Some(Ok(all)) => all,
            // Not found yet, or the guest has restarted since.
            _ => {
                self.found = None;
                let memory = ProcessMemory::of(&vm.process, &ram_slots(vm)).map_err(|error| error.to_string())?;
                let mut guest =
                    LinuxGuest::find(&memory, &roots, &Hints::default()).map_err(|error| error.to_string())?;
                let all = guest.processes(&memory).map_err(|error| error.to_string())?;
                self.found = Some((memory, guest));
                all
            }
        };
        Ok(wrote.into_keys().filter_map(|space| Some((space, all.get(space)?.clone()))).collect())
    }
}
