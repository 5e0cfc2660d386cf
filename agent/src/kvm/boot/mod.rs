//! Loading a guest: a PVH ELF, its command line, and the start structure that it reads.
//!
//! Owns what lies where in low memory at the first instruction. Must not know vCPUs: it only says where they start.
//! An image is checked completely before a byte of it is copied.

mod elf;
#[cfg(test)]
pub(crate) use elf::tests::pvh_elf as elf_for_tests;

use std::fs::File;
use std::io::{self, Cursor, Read};
use std::path::Path;
use std::sync::Arc;

use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_start_info};
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress};

use super::container::{self, Sections, StateError};
use super::memory::Memory;

/// Where the start structure lies.
const START_INFO: u64 = 0x6000;
/// Where the memory map lies.
const MEMORY_MAP: u64 = 0x7000;
/// Where the command line lies.
const COMMAND_LINE: u64 = 0x2_0000;
/// The longest command line, closing zero included.
pub const MAX_COMMAND_LINE_BYTES: usize = 0x1_0000;
/// The largest image.
pub const MAX_IMAGE_BYTES: u64 = 256 << 20;
/// Below this lies low memory, then the old hole for video and firmware; an image lies above.
const IMAGE_START: u64 = 1 << 20;
/// The sections of an image on its way to another host, and their newest version.
const KERNEL_TAG: &str = "kernel";
const CMDLINE_TAG: &str = "cmdline";
const IMAGE_VERSION: u32 = 1;
/// The most that a kernel, a command line and their framing can take.
const MAX_MOVED_BYTES: usize = MAX_IMAGE_BYTES as usize + MAX_COMMAND_LINE_BYTES + 4096;
/// End of the low memory that the map offers as RAM.
const LOW_MEMORY_END: u64 = 0x9_fc00;

const START_MAGIC: u32 = 0x336e_c578;
const MEMORY_MAP_RAM: u32 = 1;

/// A guest could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// The file cannot be read.
    #[error("kernel {path} cannot be read")]
    Read {
        /// The file.
        path: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file is no image that boots here.
    #[error("the kernel is no bootable PVH ELF: {0}")]
    Image(String),
    /// The image does not fit into guest RAM.
    #[error("the kernel does not fit: it ends at {end:#x}, low guest RAM at {ram:#x}")]
    TooBig {
        /// The address behind its last byte.
        end: u64,
        /// The address behind the last byte of low RAM.
        ram: u64,
    },
    /// The command line is too long, or holds a zero byte.
    #[error("the command line of {0} bytes is too long or holds a zero byte (at most {MAX_COMMAND_LINE_BYTES})")]
    CommandLine(usize),
    /// Guest RAM is too small for the start structures.
    #[error("guest RAM of {0} bytes is too small to boot in")]
    Memory(u64),
}

/// What a guest is started from; kept for a reset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootImage {
    /// The ELF file's bytes.
    pub kernel: Arc<[u8]>,
    /// The command line, complete.
    pub cmdline: String,
}

impl BootImage {
    /// Reads the kernel at `path`.
    pub fn read(path: &Path, cmdline: &str) -> Result<Self, BootError> {
        let failed = |source| BootError::Read { path: path.display().to_string(), source };
        let mut kernel = Vec::new();
        let file = File::open(path).map_err(failed)?;
        file.take(MAX_IMAGE_BYTES + 1).read_to_end(&mut kernel).map_err(failed)?;
        if kernel.len() as u64 > MAX_IMAGE_BYTES {
            return Err(BootError::Image(format!("it is larger than {MAX_IMAGE_BYTES} bytes")));
        }
        Ok(Self { kernel: kernel.into(), cmdline: cmdline.to_owned() })
    }

    /// Itself as another host is to have it: a [container] with the sections `kernel` and `cmdline`.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut writer = container::Writer::default();
        writer.section(KERNEL_TAG, IMAGE_VERSION, &self.kernel);
        writer.section(CMDLINE_TAG, IMAGE_VERSION, self.cmdline.as_bytes());
        writer.finish()
    }

    /// Reads what [`Self::to_bytes`] wrote. That the kernel boots is checked when it does.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        let mut sections = Sections::parse(bytes, MAX_MOVED_BYTES)?;
        let kernel = sections.take(KERNEL_TAG, IMAGE_VERSION)?;
        let cmdline = sections.take(CMDLINE_TAG, IMAGE_VERSION)?;
        sections.finish()?;
        let invalid =
            |what: &str, problem: &str| StateError::Invalid { what: what.to_owned(), problem: problem.to_owned() };
        if kernel.len() as u64 > MAX_IMAGE_BYTES {
            return Err(invalid(KERNEL_TAG, "it is too long"));
        }
        if cmdline.len() >= MAX_COMMAND_LINE_BYTES {
            return Err(invalid(CMDLINE_TAG, "it is too long"));
        }
        let cmdline = str::from_utf8(cmdline).map_err(|_| invalid(CMDLINE_TAG, "it is no text"))?;
        Ok(Self { kernel: kernel.into(), cmdline: cmdline.to_owned() })
    }
}

/// Where the boot processor starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EntryPoint {
    /// The first instruction.
    pub entry: u64,
    /// The start structure.
    pub start_info: u64,
}

/// Puts `image` into memory that is all zero.
pub fn load(memory: &Memory, image: &BootImage) -> Result<EntryPoint, BootError> {
    let low_end = memory.ranges()[0].pages.bytes();
    if low_end <= IMAGE_START {
        return Err(BootError::Memory(memory.pages().bytes()));
    }
    if image.cmdline.len() >= MAX_COMMAND_LINE_BYTES || image.cmdline.contains('\0') {
        return Err(BootError::CommandLine(image.cmdline.len()));
    }
    elf::check(&image.kernel, IMAGE_START, low_end)?;
    let ram = memory.ram();
    let loaded = Elf::load(ram.as_ref(), None, &mut Cursor::new(&image.kernel[..]), None)
        .map_err(|e| BootError::Image(e.to_string()))?;
    let PvhBootCapability::PvhEntryPresent(GuestAddress(entry)) = loaded.pvh_boot_cap else {
        return Err(BootError::Image("it has no PVH entry note".into()));
    };
    if !(IMAGE_START..low_end).contains(&entry) {
        return Err(BootError::Image(format!("its entry point {entry:#x} is not in RAM")));
    }

    let mut map = vec![(0, LOW_MEMORY_END), (IMAGE_START, low_end - IMAGE_START)];
    map.extend(memory.ranges()[1..].iter().map(|range| (range.guest_address, range.pages.bytes())));
    let write = |address, bytes: &[u8]| {
        ram.write_slice(bytes, GuestAddress(address)).map_err(|_| BootError::Memory(memory.pages().bytes()))
    };
    for (index, &(addr, size)) in map.iter().enumerate() {
        let entry = hvm_memmap_table_entry { addr, size, type_: MEMORY_MAP_RAM, reserved: 0 };
        write(MEMORY_MAP + (index * size_of_val(&entry)) as u64, vm_memory::ByteValued::as_slice(&entry))?;
    }
    let start = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        cmdline_paddr: COMMAND_LINE,
        memmap_paddr: MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    write(START_INFO, vm_memory::ByteValued::as_slice(&start))?;
    write(COMMAND_LINE, format!("{}\0", image.cmdline).as_bytes())?;
    Ok(EntryPoint { entry, start_info: START_INFO })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::elf::tests::pvh_elf;
    use super::*;
    use crate::kvm::memory::MemoryOptions;

    fn image(kernel: &[u8]) -> BootImage {
        BootImage { kernel: kernel.into(), cmdline: "a=b".into() }
    }

    fn memory() -> Memory {
        Memory::new(4 << 20, MemoryOptions::default()).unwrap()
    }

    #[test]
    fn a_pvh_elf_and_its_start_structure_lie_where_they_should() {
        let memory = memory();
        let entry = load(&memory, &image(&pvh_elf(0x10_0000, &[0xf4; 64]))).unwrap();
        assert_eq!(entry, EntryPoint { entry: 0x10_0000, start_info: START_INFO });
        let ram = memory.ram();
        assert_eq!(ram.read_obj::<u32>(GuestAddress(START_INFO)).unwrap(), START_MAGIC);
        assert_eq!(ram.read_obj::<u64>(GuestAddress(START_INFO + 24)).unwrap(), COMMAND_LINE);
        assert_eq!(ram.read_obj::<u64>(GuestAddress(START_INFO + 40)).unwrap(), MEMORY_MAP);
        assert_eq!(ram.read_obj::<u32>(GuestAddress(START_INFO + 48)).unwrap(), 2);
        assert_eq!(ram.read_obj::<[u64; 2]>(GuestAddress(MEMORY_MAP + 24)).unwrap(), [1 << 20, 3 << 20]);
        assert_eq!(ram.read_obj::<u64>(GuestAddress(0x10_0000)).unwrap(), 0xf4f4_f4f4_f4f4_f4f4);
        let mut text = [0; 4];
        ram.read_slice(&mut text, GuestAddress(COMMAND_LINE)).unwrap();
        assert_eq!(&text, b"a=b\0");
    }

    #[test]
    fn what_is_no_pvh_elf_is_refused_with_a_reason() {
        let memory = memory();
        let good = pvh_elf(0x10_0000, &[0xf4; 64]);
        for length in 0..good.len() {
            assert!(load(&memory, &image(&good[..length])).is_err(), "cut to {length} bytes");
        }
        assert!(matches!(load(&memory, &image(b"#!/bin/sh\n")), Err(BootError::Image(_))));
        for outside in [0, 0x9_0000, 4 << 20, 0xd000_0000, u64::MAX - 63] {
            assert!(load(&memory, &image(&pvh_elf(outside, &[0xf4; 64]))).is_err(), "loaded at {outside:#x}");
        }
        let mut too_long = image(&good);
        too_long.cmdline = "x".repeat(MAX_COMMAND_LINE_BYTES);
        assert!(matches!(load(&memory, &too_long), Err(BootError::CommandLine(_))));
        let small = Memory::new(1 << 20, MemoryOptions::default()).unwrap();
        assert!(matches!(load(&small, &image(&good)), Err(BootError::Memory(_))));
        let missing = BootImage::read(Path::new("/nonexistent/kernel"), "").unwrap_err();
        assert!(missing.to_string().contains("/nonexistent/kernel"));
    }

    proptest! {
        #[test]
        fn no_damaged_elf_panics(position in 0usize..300, value: u8, more in prop::collection::vec((0usize..300, any::<u8>()), 0..4)) {
            let mut bytes = pvh_elf(0x10_0000, &[0xf4; 64]);
            for (position, value) in more.into_iter().chain([(position, value)]) {
                let length = bytes.len();
                bytes[position % length] = value;
            }
            let _ = load(&memory(), &image(&bytes));
        }
    }
}
