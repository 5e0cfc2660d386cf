//! Where things lie in guest memory before the first instruction.
//!
//! Owns the addresses below 1 MiB and the memory map that a guest is told. Must not know what the things are made of.
//!
//! ```text
//! 0x00_5000  descriptor table       0x01_0000  boot_params (one page)
//! 0x00_6000  PVH start info         0x02_0000  command line (64 KiB)
//! 0x00_6800  PVH module list        0x09_fc00  end of low RAM
//! 0x00_7000  PVH memory map         0x0e_0000  ACPI tables (64 KiB), not RAM to the guest
//! 0x00_9000  page tables (6 pages)  0x0f_fff0  reset vector
//!                                   0x10_0000  kernels, initrds
//! ```

use crate::kvm::memory::Memory;

/// The descriptor table of a guest that starts in long mode.
pub(super) const DESCRIPTORS: u64 = 0x5000;
/// The PVH start structure.
pub(super) const START_INFO: u64 = 0x6000;
/// The PVH list of modules.
pub(super) const MODULES: u64 = 0x6800;
/// The PVH memory map.
pub(super) const MEMORY_MAP: u64 = 0x7000;
/// The page tables of a guest that starts in long mode.
pub(super) const PAGE_TABLES: u64 = 0x9000;
/// Linux' boot_params.
pub(super) const BOOT_PARAMS: u64 = 0x1_0000;
/// The command line.
pub(super) const COMMAND_LINE: u64 = 0x2_0000;
/// The ACPI tables, root pointer first: where a PC's firmware has it, so that a guest that is not told finds it too.
pub(super) const ACPI: u64 = 0xe_0000;
/// Room for the ACPI tables, in bytes.
pub(super) const ACPI_BYTES: u64 = 0x1_0000;
/// Where a PC's processor goes on after a reset in real mode, and where a guest jumps that wants one.
pub(super) const RESET_VECTOR: u64 = 0xf_fff0;
/// The end of what takes a firmware's place.
const FIRMWARE_END: u64 = 0x10_0000;
/// Below this lies low memory, then the old hole for video and firmware; a kernel lies above.
pub(super) const IMAGE_START: u64 = 1 << 20;
/// End of the low memory that the map offers as RAM.
const LOW_MEMORY_END: u64 = 0x9_fc00;

/// What a range of the memory map is; the numbers are the same for PVH and for Linux' e820 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum Kind {
    /// RAM.
    Ram = 1,
    /// ACPI tables.
    Acpi = 3,
}

/// One range of the memory map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct MapEntry {
    /// Its first byte.
    pub(super) address: u64,
    /// Its length.
    pub(super) bytes: u64,
    /// What it is.
    pub(super) kind: Kind,
}

/// The memory map of a guest with `memory`, whose low RAM reaches above [`IMAGE_START`]; ascending.
pub(super) fn memory_map(memory: &Memory) -> Vec<MapEntry> {
    let ram = |address, bytes| MapEntry { address, bytes, kind: Kind::Ram };
    let mut map = vec![
        ram(0, LOW_MEMORY_END),
        MapEntry { address: ACPI, bytes: FIRMWARE_END - ACPI, kind: Kind::Acpi },
        ram(IMAGE_START, low_end(memory) - IMAGE_START),
    ];
    map.extend(memory.ranges()[1..].iter().map(|range| ram(range.guest_address, range.pages.bytes())));
    map
}

/// The address behind the last byte of low RAM.
pub(super) fn low_end(memory: &Memory) -> u64 {
    memory.ranges()[0].pages.bytes()
}
