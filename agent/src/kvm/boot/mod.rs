//! Loading a guest: a PVH ELF or a Linux bzImage, an initrd, the command line, ACPI tables, and the start structure that it
//! reads.
//!
//! Owns what lies where in guest memory at the first instruction. Must not know vCPUs: it only says where they start.
//! Everything is checked before a byte of it is copied.

mod bzimage;
mod elf;
mod layout;
mod long_mode;
mod pvh;
#[cfg(any(test, feature = "fuzz"))]
pub(crate) mod sample;
#[cfg(test)]
pub(crate) use elf::tests::pvh_elf as elf_for_tests;

use std::fs::File;
use std::io::{self, Cursor, Read};
use std::path::Path;
use std::sync::Arc;

use linux_loader::loader::elf::PvhBootCapability;
use linux_loader::loader::{Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress};

use self::layout::{
    ACPI, ACPI_BYTES, BOOT_PARAMS, COMMAND_LINE, DESCRIPTORS, IMAGE_START, PAGE_TABLES, RESET_VECTOR, START_INFO,
};
use super::container::{self, Sections, StateError};
use super::memory::Memory;
use super::ports::{RESET_BYTE, RESET_PORT};
use super::x86::acpi::{self, Board};
use crate::model::{MAX_BOOT_IMAGE_BYTES, PAGE_SIZE};

/// The longest command line, closing zero included. A Linux kernel may take less.
pub const MAX_COMMAND_LINE_BYTES: usize = 0x1_0000;
/// The largest kernel.
pub const MAX_KERNEL_BYTES: u64 = 256 << 20;
/// The largest kernel and initrd together.
pub const MAX_LOADED_BYTES: u64 = 512 << 20;
/// The sections of an image on its way to another host, and their newest version.
const KERNEL_TAG: &str = "kernel";
const CMDLINE_TAG: &str = "cmdline";
const INITRD_TAG: &str = "initrd";
const IMAGE_VERSION: u32 = 1;
/// The most that the framing of an image takes.
const FRAMING_BYTES: usize = 4096;

/// All the firmware that there is: `mov al, RESET_BYTE; out RESET_PORT, al; hlt; jmp` to the `hlt`. A jump there in real mode
/// resets the machine. Linux has no other way on hardware-reduced ACPI without EFI (arch/x86/kernel/reboot.c: `BOOT_EFI`, then
/// `BOOT_BIOS`).
const RESET_CODE: [u8; 7] = [0xb0, RESET_BYTE, 0xe6, RESET_PORT as u8, 0xf4, 0xeb, 0xfd];

const _: () = assert!(MAX_LOADED_BYTES as usize + MAX_COMMAND_LINE_BYTES + FRAMING_BYTES <= MAX_BOOT_IMAGE_BYTES);

/// A guest could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("{what} {path} cannot be read")]
    Read {
        /// What it is to be.
        what: &'static str,
        /// The file.
        path: String,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The file is no kernel that boots here.
    #[error("the kernel does not boot here: {0}")]
    Image(String),
    /// A file is larger than any that is taken.
    #[error("{what}: more than {limit} bytes; {advice}")]
    TooLarge {
        /// What it is.
        what: &'static str,
        /// What is allowed.
        limit: u64,
        /// What to do.
        advice: &'static str,
    },
    /// The kernel does not fit into guest RAM.
    #[error(
        "the kernel does not fit: it needs RAM up to {end:#x}, low guest RAM ends at {ram:#x}; give the VM more memory"
    )]
    TooBig {
        /// The address behind its last byte.
        end: u64,
        /// The address behind the last byte of low RAM.
        ram: u64,
    },
    /// The initrd does not fit beside the kernel.
    #[error(
        "the initrd of {bytes} bytes does not fit: it must lie between the kernel's end at {from:#x} and {to:#x}; \
         give the VM more memory, or make the initrd smaller"
    )]
    Initrd {
        /// Its size.
        bytes: u64,
        /// The address behind the kernel.
        from: u64,
        /// The address behind the last byte that it may have.
        to: u64,
    },
    /// An initrd of no bytes.
    #[error("the initrd is empty")]
    EmptyInitrd,
    /// The command line is too long, or holds a zero byte.
    #[error("the command line of {bytes} bytes is too long (at most {limit}) or holds a zero byte")]
    CommandLine {
        /// Its length.
        bytes: usize,
        /// The longest that this kernel takes, closing zero not counted.
        limit: u64,
    },
    /// Guest RAM is too small for the start structures.
    #[error("guest RAM of {0} bytes is too small to boot in")]
    Memory(u64),
}

/// What a guest is started from; kept for a reset.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BootImage {
    /// The kernel's file: a PVH ELF or a bzImage.
    pub kernel: Arc<[u8]>,
    /// The initrd's file, if there is one.
    pub initrd: Option<Arc<[u8]>>,
    /// The command line, complete.
    pub cmdline: String,
}

/// Reads at most `limit` bytes, and one more to see that there are more.
fn read_file(what: &'static str, path: &Path, limit: u64) -> Result<Vec<u8>, BootError> {
    let failed = |source| BootError::Read { what, path: path.display().to_string(), source };
    let mut bytes = Vec::new();
    File::open(path).map_err(failed)?.take(limit + 1).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

impl BootImage {
    /// Reads the kernel and the initrd, and puts `cmdline` beside them.
    ///
    /// # Errors
    /// A file that cannot be read, or is larger than any that is taken. That the kernel boots is checked when it does.
    pub fn read(kernel: &Path, initrd: Option<&Path>, cmdline: &str) -> Result<Self, BootError> {
        let read = |what, path: &Path, limit| read_file(what, path, limit).map(Arc::<[u8]>::from);
        let image = Self {
            kernel: read("kernel", kernel, MAX_KERNEL_BYTES)?,
            initrd: initrd.map(|path| read("initrd", path, MAX_LOADED_BYTES)).transpose()?,
            cmdline: cmdline.to_owned(),
        };
        image.check_size()?;
        Ok(image)
    }

    /// Whether the kernel is a Linux bzImage: such a guest reads ACPI tables, and is told of devices by nothing else.
    pub fn is_bzimage(&self) -> bool {
        bzimage::is(&self.kernel)
    }

    fn initrd_bytes(&self) -> u64 {
        self.initrd.as_ref().map_or(0, |initrd| initrd.len() as u64)
    }

    /// How many bytes [`Self::to_bytes`] gives at most.
    fn moved_bytes(&self) -> u64 {
        self.kernel.len() as u64 + self.initrd_bytes() + (self.cmdline.len() + FRAMING_BYTES) as u64
    }

    /// Refuses what is larger than any image.
    fn check_size(&self) -> Result<(), BootError> {
        if self.kernel.len() as u64 > MAX_KERNEL_BYTES {
            let advice = "strip it of its debugging sections";
            return Err(BootError::TooLarge { what: "the kernel", limit: MAX_KERNEL_BYTES, advice });
        }
        if self.kernel.len() as u64 + self.initrd_bytes() > MAX_LOADED_BYTES {
            let advice = "make the initrd smaller";
            return Err(BootError::TooLarge { what: "kernel and initrd", limit: MAX_LOADED_BYTES, advice });
        }
        Ok(())
    }

    /// Itself as another host is to have it: a [container] with the sections `kernel`, `cmdline` and, if there is one,
    /// `initrd`.
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut writer = container::Writer::default();
        writer.section(KERNEL_TAG, IMAGE_VERSION, &self.kernel);
        writer.section(CMDLINE_TAG, IMAGE_VERSION, self.cmdline.as_bytes());
        if let Some(initrd) = &self.initrd {
            writer.section(INITRD_TAG, IMAGE_VERSION, initrd);
        }
        writer.finish()
    }

    /// Reads what [`Self::to_bytes`] wrote. That the kernel boots is checked when it does.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, StateError> {
        let mut sections = Sections::parse(bytes, MAX_BOOT_IMAGE_BYTES)?;
        let kernel = sections.take(KERNEL_TAG, IMAGE_VERSION)?;
        let cmdline = sections.take(CMDLINE_TAG, IMAGE_VERSION)?;
        let initrd = sections.take_if_there(INITRD_TAG, IMAGE_VERSION)?;
        sections.finish()?;
        let invalid =
            |what: &str, problem: &str| StateError::Invalid { what: what.to_owned(), problem: problem.to_owned() };
        if cmdline.len() >= MAX_COMMAND_LINE_BYTES {
            return Err(invalid(CMDLINE_TAG, "it is too long"));
        }
        let cmdline = str::from_utf8(cmdline).map_err(|_| invalid(CMDLINE_TAG, "it is no text"))?;
        let image = Self { kernel: kernel.into(), initrd: initrd.map(Arc::from), cmdline: cmdline.to_owned() };
        image.check_size().map_err(|error| invalid("boot image", &error.to_string()))?;
        Ok(image)
    }
}

/// Where the boot processor starts, and how.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryPoint {
    /// As PVH says: 32-bit protected mode, no paging.
    Pvh {
        /// The first instruction.
        entry: u64,
        /// The start structure, for EBX.
        start_info: u64,
    },
    /// As Linux' 64-bit boot protocol says: long mode, low memory mapped where it lies.
    Long {
        /// The first instruction.
        entry: u64,
        /// The boot parameters, for RSI.
        params: u64,
        /// The page tables, for CR3.
        page_tables: u64,
        /// The descriptor table: its address.
        descriptors: u64,
        /// The descriptor table: its length less one.
        descriptors_limit: u16,
    },
}

/// Bytes that are to be put into guest memory.
struct Place {
    address: u64,
    bytes: Vec<u8>,
}

/// An initrd in its place.
#[derive(Clone, Copy)]
struct Initrd<'a> {
    address: u64,
    bytes: &'a [u8],
}

impl<'a> Initrd<'a> {
    /// Puts an initrd as high as it goes: behind `from`, below `to`, at a page's start.
    fn place(bytes: &'a [u8], from: u64, to: u64) -> Result<Self, BootError> {
        if bytes.is_empty() {
            return Err(BootError::EmptyInitrd);
        }
        let length = bytes.len() as u64;
        let page = PAGE_SIZE as u64;
        to.checked_sub(length)
            .map(|address| address / page * page)
            .filter(|&address| address >= from)
            .map(|address| Self { address, bytes })
            .ok_or(BootError::Initrd { bytes: length, from, to })
    }
}

/// Puts `image`, and the ACPI tables of `board`, into memory that is all zero.
///
/// # Errors
/// What about the image does not fit or is not right; nothing was copied then, but for an ELF without a PVH entry.
pub fn load(memory: &Memory, image: &BootImage, board: &Board) -> Result<EntryPoint, BootError> {
    let low_end = layout::low_end(memory);
    let too_small = || BootError::Memory(memory.pages().bytes());
    if low_end <= IMAGE_START {
        return Err(too_small());
    }
    image.check_size()?;
    let tables = acpi::tables(board, ACPI);
    if tables.len() as u64 > ACPI_BYTES {
        return Err(too_small());
    }
    // Else a migration would find out: a target takes no boot image that is larger than the VM.
    if image.moved_bytes() > memory.pages().bytes() {
        return Err(BootError::TooLarge {
            what: "kernel and initrd",
            limit: memory.pages().bytes(),
            advice: "it is all the memory that the VM has; give it more, or strip the kernel",
        });
    }
    let map = layout::memory_map(memory);
    let check_cmdline = |limit: u64| {
        let bytes = image.cmdline.len();
        let limit = limit.min(MAX_COMMAND_LINE_BYTES as u64 - 1);
        if bytes as u64 > limit || image.cmdline.contains('\0') {
            return Err(BootError::CommandLine { bytes, limit });
        }
        Ok(())
    };
    let place_initrd = |from, to| image.initrd.as_deref().map(|bytes| Initrd::place(bytes, from, to)).transpose();
    let ram = memory.ram();
    let put = |address, bytes: &[u8]| ram.write_slice(bytes, GuestAddress(address)).map_err(|_| too_small());

    let (entry, initrd, pieces) = if bzimage::is(&image.kernel) {
        let kernel = bzimage::Kernel::parse(&image.kernel)?;
        if kernel.end > low_end {
            return Err(BootError::TooBig { end: kernel.end, ram: low_end });
        }
        check_cmdline(kernel.max_command_line)?;
        let initrd = place_initrd(kernel.end, low_end.min(kernel.initrd_last + 1))?;
        put(kernel.address, kernel.code)?;
        let descriptors: Vec<u8> = long_mode::DESCRIPTORS.into_iter().flat_map(u64::to_le_bytes).collect();
        let entry = EntryPoint::Long {
            entry: kernel.entry(),
            params: BOOT_PARAMS,
            page_tables: PAGE_TABLES,
            descriptors: DESCRIPTORS,
            descriptors_limit: descriptors.len() as u16 - 1,
        };
        let pieces = vec![
            kernel.params(&map, initrd, ACPI),
            Place { address: PAGE_TABLES, bytes: long_mode::page_tables() },
            Place { address: DESCRIPTORS, bytes: descriptors },
        ];
        (entry, initrd, pieces)
    } else if elf::is(&image.kernel) {
        let end = elf::check(&image.kernel, IMAGE_START, low_end)?;
        check_cmdline(u64::MAX)?;
        let initrd = place_initrd(end, low_end)?;
        let loaded = Elf::load(ram.as_ref(), None, &mut Cursor::new(&image.kernel[..]), None)
            .map_err(|e| BootError::Image(e.to_string()))?;
        let PvhBootCapability::PvhEntryPresent(GuestAddress(entry)) = loaded.pvh_boot_cap else {
            return Err(BootError::Image(
                "it is an ELF without a PVH entry note; for Linux, build it with CONFIG_PVH or use the bzImage".into(),
            ));
        };
        if !(IMAGE_START..end).contains(&entry) {
            return Err(BootError::Image(format!("its entry point {entry:#x} is not in the image")));
        }
        (EntryPoint::Pvh { entry, start_info: START_INFO }, initrd, pvh::pieces(START_INFO, &map, initrd, ACPI))
    } else {
        return Err(BootError::Image("it is neither a Linux bzImage nor an ELF file".into()));
    };
    for piece in pieces {
        put(piece.address, &piece.bytes)?;
    }
    if let Some(initrd) = initrd {
        put(initrd.address, initrd.bytes)?;
    }
    put(ACPI, &tables)?;
    put(RESET_VECTOR, &RESET_CODE)?;
    put(COMMAND_LINE, format!("{}\0", image.cmdline).as_bytes())?;
    Ok(entry)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::elf::tests::pvh_elf;
    use super::layout::MEMORY_MAP;
    use super::*;
    use crate::kvm::memory::MemoryOptions;

    fn image(kernel: &[u8]) -> BootImage {
        BootImage { kernel: kernel.into(), initrd: None, cmdline: "a=b".into() }
    }

    fn start(memory: &Memory, image: &BootImage) -> Result<EntryPoint, BootError> {
        load(memory, image, &Board { cpus: 1, windows: Vec::new() })
    }

    fn memory() -> Memory {
        Memory::new(4 << 20, MemoryOptions::default()).unwrap()
    }

    #[test]
    fn a_pvh_elf_and_its_start_structure_lie_where_they_should() {
        let memory = memory();
        let entry = start(&memory, &image(&pvh_elf(0x10_0000, &[0xf4; 64]))).unwrap();
        assert_eq!(entry, EntryPoint::Pvh { entry: 0x10_0000, start_info: START_INFO });
        let ram = memory.ram();
        assert_eq!(ram.read_obj::<u32>(GuestAddress(START_INFO)).unwrap(), 0x336e_c578);
        assert_eq!(ram.read_obj::<u64>(GuestAddress(START_INFO + 24)).unwrap(), COMMAND_LINE);
        assert_eq!(ram.read_obj::<u64>(GuestAddress(START_INFO + 40)).unwrap(), MEMORY_MAP);
        assert_eq!(ram.read_obj::<u32>(GuestAddress(START_INFO + 48)).unwrap(), 3);
        assert_eq!(ram.read_obj::<[u64; 2]>(GuestAddress(MEMORY_MAP + 48)).unwrap(), [1 << 20, 3 << 20]);
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
            assert!(start(&memory, &image(&good[..length])).is_err(), "cut to {length} bytes");
        }
        assert!(matches!(start(&memory, &image(b"#!/bin/sh\n")), Err(BootError::Image(_))));
        for outside in [0, 0x9_0000, 4 << 20, 0xd000_0000, u64::MAX - 63] {
            assert!(start(&memory, &image(&pvh_elf(outside, &[0xf4; 64]))).is_err(), "loaded at {outside:#x}");
        }
        let mut too_long = image(&good);
        too_long.cmdline = "x".repeat(MAX_COMMAND_LINE_BYTES);
        assert!(matches!(start(&memory, &too_long), Err(BootError::CommandLine { .. })));
        let small = Memory::new(1 << 20, MemoryOptions::default()).unwrap();
        assert!(matches!(start(&small, &image(&good)), Err(BootError::Memory(_))));
        let missing = BootImage::read(Path::new("/nonexistent/kernel"), None, "").unwrap_err();
        assert!(missing.to_string().contains("/nonexistent/kernel"));
    }

    fn linux(code: &[u8]) -> BootImage {
        image(&sample::bzimage(code))
    }

    fn with_initrd(mut image: BootImage, initrd: &[u8]) -> BootImage {
        image.initrd = Some(initrd.into());
        image
    }

    fn words(memory: &Memory, address: u64) -> [u32; 2] {
        memory.ram().read_obj(GuestAddress(address)).unwrap()
    }

    #[test]
    fn a_bzimage_its_parameters_and_its_initrd_lie_where_they_should() {
        let memory = memory();
        let entry = start(&memory, &with_initrd(linux(&[0xf4; 64]), &[7; 5000])).unwrap();
        let EntryPoint::Long { entry, params, page_tables, descriptors, descriptors_limit } = entry else {
            panic!("{entry:?}")
        };
        assert_eq!((entry, params), (sample::ADDRESS + 0x200, BOOT_PARAMS));
        let ram = memory.ram();
        assert_eq!(ram.read_obj::<u64>(GuestAddress(entry)).unwrap(), 0xf4f4_f4f4_f4f4_f4f4);
        // The header is the file's, with the loader's fields filled in.
        assert_eq!(words(&memory, BOOT_PARAMS + 0x1fc)[0] >> 16, 0xaa55);
        assert_eq!(words(&memory, BOOT_PARAMS + 0x202), [u32::from_le_bytes(*b"HdrS"), 0x020f]);
        assert_eq!(words(&memory, BOOT_PARAMS + 0x210)[0], 0x01ff);
        assert_eq!(words(&memory, BOOT_PARAMS + 0x228)[0], COMMAND_LINE as u32);
        assert_eq!(words(&memory, BOOT_PARAMS + 0x70), [ACPI as u32, 0]);
        // The initrd: in the last pages of RAM.
        let initrd = (4u64 << 20) - 8192;
        assert_eq!(words(&memory, BOOT_PARAMS + 0x218), [initrd as u32, 5000]);
        let mut copy = [0; 5001];
        ram.read_slice(&mut copy, GuestAddress(initrd)).unwrap();
        assert!(copy[..5000].iter().all(|&byte| byte == 7) && copy[5000] == 0);
        // The memory map: low RAM, the tables, the rest.
        assert_eq!(words(&memory, BOOT_PARAMS + 0x1e8)[0], 3);
        let entry = |index: u64| {
            let at = BOOT_PARAMS + 0x2d0 + index * 20;
            (ram.read_obj::<[u64; 2]>(GuestAddress(at)).unwrap(), words(&memory, at + 16)[0])
        };
        assert_eq!(entry(0), ([0, 0x9_fc00], 1));
        assert_eq!(entry(1), ([ACPI, 0x2_0000], 3));
        assert_eq!(entry(2), ([1 << 20, 3 << 20], 1));
        assert_eq!(ram.read_obj::<u64>(GuestAddress(ACPI)).unwrap(), u64::from_le_bytes(*b"RSD PTR "));
        // The selectors 0x10 and 0x18, and tables for long mode.
        assert_eq!(u64::from(descriptors_limit) + 1, 4 * 8);
        assert_eq!(ram.read_obj::<u64>(GuestAddress(descriptors + 0x10)).unwrap(), long_mode::DESCRIPTORS[2]);
        assert_eq!(ram.read_obj::<u64>(GuestAddress(page_tables)).unwrap(), (page_tables + 0x1000) | 3);
    }

    #[test]
    fn a_pvh_guest_finds_initrd_and_tables() {
        let memory = memory();
        start(&memory, &with_initrd(image(&pvh_elf(0x10_0000, &[0xf4; 64])), b"initrd")).unwrap();
        let modules = words(&memory, START_INFO + 12);
        let module: [u64; 2] = memory.ram().read_obj(GuestAddress(modules[1].into())).unwrap();
        assert_eq!((modules[0], module), (1, [(4 << 20) - 4096, 6]));
        assert_eq!(memory.ram().read_obj::<u64>(GuestAddress(START_INFO + 32)).unwrap(), ACPI);
        assert_eq!(&memory.ram().read_obj::<[u8; 6]>(GuestAddress(module[0])).unwrap(), b"initrd");
    }

    #[test]
    fn an_initrd_that_does_not_fit_is_refused_before_anything_is_copied() {
        let kernel_end = sample::ADDRESS + u64::from(sample::INIT_BYTES);
        let most = (4 << 20) - kernel_end as usize;
        let memory = memory();
        start(&memory, &with_initrd(linux(&[0xf4; 64]), &vec![1; most])).unwrap();
        let memory = self::memory();
        let refused = start(&memory, &with_initrd(linux(&[0xf4; 64]), &vec![1; most + 1])).unwrap_err();
        assert!(
            matches!(refused, BootError::Initrd { bytes, from, to } if bytes == most as u64 + 1 && from == kernel_end && to == 4 << 20),
            "{refused}"
        );
        assert!(refused.to_string().contains("more memory"), "{refused}");
        assert!(matches!(start(&memory, &with_initrd(linux(&[0xf4; 64]), b"")), Err(BootError::EmptyInitrd)));
        // The kernel's own limit: below the end of RAM, here below its own end.
        for (last, fits) in [(0x1f_ffffu32, true), (0x10_ffff, false)] {
            let mut image = with_initrd(linux(&[0xf4; 64]), &[1; 4096]);
            let mut kernel = image.kernel.to_vec();
            sample::put(&mut kernel, 0x22c, &last.to_le_bytes());
            image.kernel = kernel.into();
            let memory = self::memory();
            assert_eq!(start(&memory, &image).is_ok(), fits, "last {last:#x}");
            if fits {
                assert_eq!(words(&memory, BOOT_PARAMS + 0x218)[0], 0x1f_f000);
            } else {
                let mut low = vec![0; 4 << 20];
                memory.ram().read_slice(&mut low, GuestAddress(0)).unwrap();
                assert!(low.iter().all(|&byte| byte == 0), "something was copied");
            }
        }
        // Behind the end of an ELF's last segment too.
        let elf = image(&pvh_elf(0x20_0000, &vec![0xf4; 0x18_0000]));
        let refused = start(&self::memory(), &with_initrd(elf, &vec![1; 0x8_1000])).unwrap_err();
        assert!(matches!(refused, BootError::Initrd { from: 0x38_0000, to: 0x40_0000, .. }), "{refused}");
    }

    /// Each field that is checked, broken, and a word of what is said then.
    #[test]
    fn a_setup_header_that_promises_nonsense_is_refused_by_name() {
        let good = sample::bzimage(&[0xf4; 64]);
        start(&memory(), &image(&good)).unwrap();
        for (at, value, word) in [
            (0x1fe, &[0u8, 0][..], "boot flag"),
            (0x206, &[0x0b, 2], "2.11"),
            (0x211, &[0], "zImage"),
            (0x236, &[2, 0], "64-bit"),
            (0x201, &[0x10], "length"),
            (0x201, &[0xff], "length"),
            (0x1f1, &[40], "cut off"),
            (0x1f4, &[0xff, 0xff, 0xff, 0xff], "cut off"),
            (0x1f4, &[0x20, 0, 0, 0], "entry"),
            (0x24c, &[0xff, 0xff, 0xff, 0xff], "compressed"),
            (0x230, &[3, 0, 0, 0], "power of two"),
            (0x258, &[0; 8], "below 1 MiB"),
            (0x258, &[0xff; 8], "absurd"),
            (0x202, b"HdrX", "neither"),
        ] {
            let mut bad = good.clone();
            sample::put(&mut bad, at, value);
            let refused = start(&memory(), &image(&bad)).unwrap_err().to_string();
            assert!(refused.contains(word), "{at:#x}: {refused}");
        }
        for length in 0..good.len() {
            assert!(matches!(start(&memory(), &image(&good[..length])), Err(BootError::Image(_))), "cut to {length}");
        }
        // More RAM than there is, and a fixed address.
        let mut large = good.clone();
        sample::put(&mut large, 0x260, &(4u32 << 20).to_le_bytes());
        assert!(matches!(start(&memory(), &image(&large)), Err(BootError::TooBig { end: 0x50_0000, ram: 0x40_0000 })));
        let mut fixed = good.clone();
        sample::put(&mut fixed, 0x234, &[0]);
        sample::put(&mut fixed, 0x258, &0x12_3400u64.to_le_bytes());
        assert!(matches!(start(&memory(), &image(&fixed)), Ok(EntryPoint::Long { entry: 0x12_3600, .. })));
        // A command line that the kernel would cut.
        let mut long = image(&good);
        long.cmdline = "x".repeat(2048);
        assert!(matches!(start(&memory(), &long), Err(BootError::CommandLine { bytes: 2048, limit: 2047 })));
    }

    #[test]
    fn what_could_not_move_along_is_refused_at_once() {
        let memory = memory();
        let padded = [pvh_elf(0x10_0000, &[0xf4; 64]), vec![0; 4 << 20]].concat();
        let refused = start(&memory, &image(&padded)).unwrap_err();
        assert!(matches!(refused, BootError::TooLarge { limit: 0x40_0000, .. }), "{refused}");
        // A file of nothing but holes.
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(MAX_KERNEL_BYTES + 1).unwrap();
        let refused = BootImage::read(file.path(), None, "").unwrap_err();
        assert!(matches!(refused, BootError::TooLarge { what: "the kernel", .. }), "{refused}");
        let missing = BootImage::read(file.path(), Some(Path::new("/nonexistent/initrd")), "").unwrap_err();
        assert!(missing.to_string().contains("initrd /nonexistent/initrd"), "{missing}");
    }

    #[test]
    fn an_image_moves_with_and_without_an_initrd() {
        let plain = image(&[1, 2, 3]);
        assert_eq!(BootImage::from_bytes(&plain.to_bytes()).as_ref(), Ok(&plain));
        let full = with_initrd(plain.clone(), b"cpio");
        assert_eq!(BootImage::from_bytes(&full.to_bytes()), Ok(full.clone()));
        assert!(full.to_bytes().len() as u64 <= full.moved_bytes());
        // As it was written before there were initrds.
        let golden = [
            &b"DUNLINMS\x01\0\0\0\x02\0\0\0"[..],
            b"\x06kernel\x01\0\0\0\x03\0\0\0\x01\x02\x03",
            b"\x07cmdline\x01\0\0\0\x03\0\0\0a=b",
        ]
        .concat();
        let golden = [&golden[..], &crc32fast::hash(&golden).to_le_bytes()].concat();
        assert_eq!(plain.to_bytes(), golden);
        assert_eq!(BootImage::from_bytes(&golden), Ok(plain));
    }

    proptest! {
        #[test]
        fn no_damaged_elf_panics(position in 0usize..300, value: u8, more in prop::collection::vec((0usize..300, any::<u8>()), 0..4)) {
            let mut bytes = pvh_elf(0x10_0000, &[0xf4; 64]);
            for (position, value) in more.into_iter().chain([(position, value)]) {
                let length = bytes.len();
                bytes[position % length] = value;
            }
            let _ = start(&memory(), &image(&bytes));
        }

        /// Whatever the header says: an error, or a kernel and an initrd in RAM that do not meet.
        #[test]
        fn no_setup_header_leads_out_of_ram(
            changes in prop::collection::vec((0x1f0usize..0x270, any::<u8>()), 0..5), initrd in 1usize..9000
        ) {
            let mut bytes = sample::bzimage(&[0xf4; 64]);
            for (position, value) in changes {
                bytes[position] = value;
            }
            let memory = memory();
            if let Ok(EntryPoint::Long { entry, .. }) = start(&memory, &with_initrd(image(&bytes), &vec![1; initrd])) {
                let [address, length] = words(&memory, BOOT_PARAMS + 0x218).map(u64::from);
                prop_assert_eq!(length, initrd as u64);
                prop_assert!(entry > IMAGE_START && entry < address && address + length <= 4 << 20);
            }
        }
    }
}
