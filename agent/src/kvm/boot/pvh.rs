//! The start structure of a PVH guest.
//!
//! Owns its content (Xen: xen/include/public/arch-x86/hvm/start_info.h). Must not know where the kernel lies.

use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use vm_memory::ByteValued;

use super::layout::{COMMAND_LINE, MEMORY_MAP, MODULES, MapEntry};
use super::{Initrd, Place};

const MAGIC: u32 = 0x336e_c578;

/// The pieces to be put into memory; the structure itself comes last, and lies at `start_info`.
pub(super) fn pieces(start_info: u64, map: &[MapEntry], initrd: Option<Initrd<'_>>, rsdp: u64) -> Vec<Place> {
    let entries = map.iter().flat_map(|range| {
        let entry =
            hvm_memmap_table_entry { addr: range.address, size: range.bytes, type_: range.kind as u32, reserved: 0 };
        entry.as_slice().to_vec()
    });
    let mut pieces = vec![Place { address: MEMORY_MAP, bytes: entries.collect() }];
    let mut start = hvm_start_info {
        magic: MAGIC,
        version: 1,
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: rsdp,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    if let Some(initrd) = initrd {
        let module = hvm_modlist_entry { paddr: initrd.address, size: initrd.bytes.len() as u64, ..Default::default() };
        pieces.push(Place { address: MODULES, bytes: module.as_slice().to_vec() });
        (start.nr_modules, start.modlist_paddr) = (1, MODULES);
    }
    pieces.push(Place { address: start_info, bytes: start.as_slice().to_vec() });
    pieces
}
