//! Which guest process an address space belongs to, found by reading the guest's memory; with what an operator knows of the guest's kernel.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use super::inventory::HostVm;
use super::profile::ram_slots;
use crate::btf::{BtfFileError, KernelTypes, kernel_types_of};
use crate::foreign::ProcessMemory;
use crate::guest_os::{Hints, LinuxGuest, Symbols, SymbolsError};
use crate::model::{AddressSpace, GuestProcess};
use crate::port::ThreadEvents;

/// Roots of page tables that the kernel is looked for with: those that wrote most.
const MOST_ROOTS: usize = 16;

/// The largest list of symbols that is read, in bytes; a kernel's has 5 to 15 MiB.
const MAX_SYMBOLS_BYTES: u64 = 128 << 20;

/// Files of an operator's about the kernel of a guest. None need be given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuestFiles {
    /// Its `System.map`, or a copy of its `/proc/kallsyms`.
    pub system_map: Option<PathBuf>,
    /// Its types: `vmlinux`, or BTF alone.
    pub btf: Option<PathBuf>,
}

/// A file that does not help.
#[derive(Debug, thiserror::Error)]
pub enum GuestFileError {
    /// It cannot be read.
    #[error("{} cannot be read: {reason}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: io::Error,
    },
    /// It holds no symbols.
    #[error("{} is no System.map of the guest's: {reason}", path.display())]
    Symbols {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: SymbolsError,
    },
    /// It holds no types.
    #[error("{} gives no types of the guest's kernel: {reason}", path.display())]
    Types {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: BtfFileError,
    },
}

impl GuestFiles {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Reads them. Whether they are of the kernel that runs shows when it is looked for.
    ///
    /// # Errors
    /// Which file does not help, and why.
    pub(super) fn load(&self) -> Result<Known, GuestFileError> {
        Ok(Known {
            symbols: self.system_map.as_deref().map(symbols_in).transpose()?,
            types: self.btf.as_deref().map(types_in).transpose()?,
        })
    }
}

/// What is known of a guest's kernel beforehand.
#[derive(Debug, Default)]
pub(super) struct Known {
    symbols: Option<Symbols>,
    types: Option<KernelTypes>,
}

/// A file that has an end: reading anything else may wait for ever.
fn opened(path: &Path) -> Result<File, GuestFileError> {
    let of = || {
        if std::fs::metadata(path)?.is_file() {
            File::open(path)
        } else {
            Err(io::Error::other("it is no regular file"))
        }
    };
    of().map_err(|reason| GuestFileError::Unreadable { path: path.to_owned(), reason })
}

fn symbols_in(path: &Path) -> Result<Symbols, GuestFileError> {
    let unreadable = |reason| GuestFileError::Unreadable { path: path.to_owned(), reason };
    let mut text = Vec::new();
    opened(path)?.take(MAX_SYMBOLS_BYTES + 1).read_to_end(&mut text).map_err(unreadable)?;
    if text.len() as u64 > MAX_SYMBOLS_BYTES {
        return Err(unreadable(io::Error::other(format!("it is longer than {MAX_SYMBOLS_BYTES} bytes"))));
    }
    Symbols::parse(&text).map_err(|reason| GuestFileError::Symbols { path: path.to_owned(), reason })
}

fn types_in(path: &Path) -> Result<KernelTypes, GuestFileError> {
    let failed = |reason| match reason {
        BtfFileError::Read(reason) => GuestFileError::Unreadable { path: path.to_owned(), reason },
        reason => GuestFileError::Types { path: path.to_owned(), reason },
    };
    kernel_types_of(opened(path)?).map_err(failed)
}

/// A guest whose processes can be named: its kernel is found once.
#[derive(Debug, Default)]
pub(super) struct GuestNames {
    known: Known,
    found: Option<(ProcessMemory, LinuxGuest)>,
}

impl GuestNames {
    /// With what is known beforehand.
    pub(super) fn new(known: Known) -> Self {
        Self { known, found: None }
    }

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
        let mut spaces: Vec<AddressSpace> = wrote.keys().copied().collect();
        spaces.sort_by_key(|space| std::cmp::Reverse(wrote[space]));
        self.of_spaces(vm, &spaces)
    }

    /// The processes of those address spaces that have one; those that wrote most come first. That the VM's memory may be read is the
    /// caller's to know.
    ///
    /// # Errors
    /// Why they are not known, in words.
    pub(super) fn of_spaces(
        &mut self,
        vm: &HostVm,
        spaces: &[AddressSpace],
    ) -> Result<BTreeMap<AddressSpace, GuestProcess>, String> {
        let roots = &spaces[..spaces.len().min(MOST_ROOTS)];
        let all = match self.found.as_mut().map(|(memory, guest)| guest.processes(memory)) {
            Some(Ok(all)) => all,
            // Not found yet, or the guest has restarted since.
            _ => {
                self.found = None;
                let memory = ProcessMemory::of(&vm.process, &ram_slots(vm)).map_err(|error| error.to_string())?;
                let hints = Hints { symbols: self.known.symbols.as_ref(), types: self.known.types.as_ref() };
                let mut guest = LinuxGuest::find(&memory, roots, &hints).map_err(|error| error.to_string())?;
                let all = guest.processes(&memory).map_err(|error| error.to_string())?;
                self.found = Some((memory, guest));
                all
            }
        };
        Ok(spaces.iter().filter_map(|&space| Some((space, all.get(space)?.clone()))).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_do_not_help_are_named_with_the_reason() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, bytes: &[u8]| {
            let path = folder.path().join(name);
            std::fs::write(&path, bytes).unwrap();
            path
        };
        let map = file("map", b"ffffffff81000000 T _text\nffffffff82000000 D init_task\n");
        let types = file("types", &crate::guest_os::testing::types(&[]));
        let words = |system_map: &Path, btf: &Path| {
            let files = GuestFiles { system_map: Some(system_map.to_owned()), btf: Some(btf.to_owned()) };
            files.load().map_or_else(|error| error.to_string(), |_| "fine".to_owned())
        };
        assert_eq!(words(&map, &types), "fine");
        assert!(words(&types, &types).ends_with("lines like `ffffffff81000000 T _text`"), "{}", words(&types, &types));
        assert!(words(&map, &map).contains("map gives no types of the guest's kernel: it is neither"));
        assert!(words(&folder.path().join("none"), &types).contains("none cannot be read"));
        assert!(words(Path::new("/dev/zero"), &types).contains("no regular file"));
        assert!(words(&map, folder.path()).contains("no regular file"));
        let endless = folder.path().join("endless");
        File::create(&endless).unwrap().set_len(MAX_SYMBOLS_BYTES + 1).unwrap();
        assert!(words(&endless, &types).contains("longer than"));
    }
}
