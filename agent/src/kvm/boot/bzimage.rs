//! Linux' bzImage: what its setup header promises, and the boot_params that its 64-bit entry wants.
//!
//! Owns the checks and the two formats (Documentation/arch/x86/boot.rst, protocol 2.12; zero-page.rst). Must not copy into
//! guest memory, nor know what else lies there.

use super::layout::{BOOT_PARAMS, COMMAND_LINE, IMAGE_START, MapEntry};
use super::{BootError, Initrd, Place};

/// Offsets in the file, which are offsets in boot_params too.
mod field {
    pub(super) const SETUP_SECTORS: usize = 0x1f1;
    pub(super) const SIZE_PARAGRAPHS: usize = 0x1f4;
    pub(super) const BOOT_FLAG: usize = 0x1fe;
    pub(super) const HEADER_LENGTH: usize = 0x201;
    pub(super) const MAGIC: usize = 0x202;
    pub(super) const VERSION: usize = 0x206;
    pub(super) const LOADER: usize = 0x210;
    pub(super) const LOAD_FLAGS: usize = 0x211;
    pub(super) const CODE_32_START: usize = 0x214;
    pub(super) const INITRD_ADDRESS: usize = 0x218;
    pub(super) const INITRD_BYTES: usize = 0x21c;
    pub(super) const COMMAND_LINE: usize = 0x228;
    pub(super) const INITRD_LAST: usize = 0x22c;
    pub(super) const ALIGNMENT: usize = 0x230;
    pub(super) const RELOCATABLE: usize = 0x234;
    pub(super) const EXTENDED_LOAD_FLAGS: usize = 0x236;
    pub(super) const COMMAND_LINE_MAX: usize = 0x238;
    pub(super) const PAYLOAD_OFFSET: usize = 0x248;
    pub(super) const PAYLOAD_BYTES: usize = 0x24c;
    pub(super) const SETUP_DATA: usize = 0x250;
    pub(super) const PREFERRED_ADDRESS: usize = 0x258;
    pub(super) const INIT_BYTES: usize = 0x260;
    /// Behind the last field that is needed.
    pub(super) const END: usize = 0x264;
    // In boot_params alone.
    pub(super) const RSDP: usize = 0x70;
    pub(super) const MAP_ENTRIES: usize = 0x1e8;
    pub(super) const MAP: usize = 0x2d0;
}

/// `HdrS`.
const MAGIC: &[u8; 4] = b"HdrS";
/// The first protocol with the 64-bit entry's flag.
const OLDEST_VERSION: u16 = 0x020c;
/// Load flags, bit 0: the kernel belongs above 1 MiB.
const LOADED_HIGH: u8 = 1;
/// Extended load flags, bit 0: there is a 64-bit entry.
const KERNEL_64: u16 = 1;
/// The 64-bit entry, from the start of the loaded part.
const ENTRY_64: u64 = 0x200;
/// "Some loader without a number of its own."
const LOADER_UNDEFINED: u8 = 0xff;
const SECTOR_BYTES: usize = 512;
/// Where boot_params has room for the setup header's end.
const HEADER_ROOM_END: usize = 0x290;
/// The size of boot_params.
const PARAMS_BYTES: usize = 4096;
/// An entry of the memory map in boot_params, and how many fit.
const MAP_ENTRY_BYTES: usize = 20;
const MAX_MAP_ENTRIES: usize = 128;

/// A bzImage whose header holds what it promises.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel<'a> {
    /// The setup header, from [`field::SETUP_SECTORS`] to its end.
    header: &'a [u8],
    /// The part that is loaded.
    pub(super) code: &'a [u8],
    /// Where it is loaded.
    pub(super) address: u64,
    /// Behind the last byte that it needs before it reads the memory map.
    pub(super) end: u64,
    /// The address of the last byte that an initrd may have.
    pub(super) initrd_last: u64,
    /// The longest command line, closing zero not counted.
    pub(super) max_command_line: u64,
}

/// Whether the file says that it is a bzImage.
pub(super) fn is(file: &[u8]) -> bool {
    file.get(field::MAGIC..).is_some_and(|rest| rest.starts_with(MAGIC))
}

fn bytes_at<const N: usize>(file: &[u8], at: usize) -> Option<[u8; N]> {
    file.get(at..)?.first_chunk().copied()
}

impl<'a> Kernel<'a> {
    /// Checks a file for which [`is`] holds.
    pub(super) fn parse(file: &'a [u8]) -> Result<Self, BootError> {
        let bad = |problem: &str| BootError::Image(problem.to_owned());
        if file.len() < field::END {
            return Err(bad("its setup header is cut off; copy it again"));
        }
        let byte = |at| bytes_at::<1>(file, at).map_or(0, u8::from_le_bytes);
        let half = |at| bytes_at(file, at).map_or(0, u16::from_le_bytes);
        let word = |at| bytes_at(file, at).map_or(0, u32::from_le_bytes);
        let double = |at| bytes_at(file, at).map_or(0, u64::from_le_bytes);

        if half(field::BOOT_FLAG) != 0xaa55 {
            return Err(bad("its setup header has no boot flag"));
        }
        let version = half(field::VERSION);
        if version < OLDEST_VERSION {
            let (major, minor) = (version >> 8, version & 0xff);
            return Err(BootError::Image(format!(
                "it speaks boot protocol {major}.{minor:02}; 2.12 is needed (Linux 3.8 or newer)"
            )));
        }
        if byte(field::LOAD_FLAGS) & LOADED_HIGH == 0 {
            return Err(bad("it is a zImage, to be loaded below 1 MiB; build a bzImage"));
        }
        if half(field::EXTENDED_LOAD_FLAGS) & KERNEL_64 == 0 {
            return Err(bad("it has no 64-bit entry; use a 64-bit kernel"));
        }
        // The header ends where the jump over it leads.
        let header_end = field::MAGIC + usize::from(byte(field::HEADER_LENGTH));
        let header = file
            .get(field::SETUP_SECTORS..header_end)
            .filter(|_| (field::END..=HEADER_ROOM_END).contains(&header_end))
            .ok_or_else(|| bad("its setup header has a wrong length"))?;

        let sectors = match byte(field::SETUP_SECTORS) {
            0 => 4,
            sectors => usize::from(sectors),
        };
        let loaded_bytes = u64::from(word(field::SIZE_PARAGRAPHS)) * 16;
        let code = file.get((sectors + 1) * SECTOR_BYTES..).unwrap_or_default();
        let code = usize::try_from(loaded_bytes).ok().and_then(|bytes| code.get(..bytes)).ok_or_else(|| {
            BootError::Image(format!(
                "it is cut off: {} of {} bytes are there; copy it again",
                file.len(),
                ((sectors + 1) * SECTOR_BYTES) as u64 + loaded_bytes
            ))
        })?;
        if loaded_bytes <= ENTRY_64 {
            return Err(bad("its 64-bit entry lies behind its end"));
        }
        if u64::from(word(field::PAYLOAD_OFFSET)) + u64::from(word(field::PAYLOAD_BYTES)) > loaded_bytes {
            return Err(bad("its compressed part lies behind its end"));
        }

        let preferred = double(field::PREFERRED_ADDRESS);
        let address = if byte(field::RELOCATABLE) == 0 {
            preferred
        } else {
            let alignment = u64::from(word(field::ALIGNMENT));
            if !alignment.is_power_of_two() {
                return Err(bad("its alignment is no power of two"));
            }
            preferred.checked_next_multiple_of(alignment).ok_or_else(|| bad("its preferred address is absurd"))?
        };
        if address < IMAGE_START {
            return Err(bad("it wants to lie below 1 MiB"));
        }
        let needed = u64::from(word(field::INIT_BYTES)).max(loaded_bytes);
        let end = address.checked_add(needed).ok_or_else(|| bad("its preferred address is absurd"))?;
        Ok(Self {
            header,
            code,
            address,
            end,
            initrd_last: word(field::INITRD_LAST).into(),
            max_command_line: word(field::COMMAND_LINE_MAX).into(),
        })
    }

    /// The first instruction.
    pub(super) fn entry(&self) -> u64 {
        self.address + ENTRY_64
    }

    /// What the kernel is told. Its command line lies at [`COMMAND_LINE`]; what is loaded lies below 4 GiB.
    pub(super) fn params(&self, map: &[MapEntry], initrd: Option<Initrd<'_>>, rsdp: u64) -> Place {
        let mut bytes = vec![0; PARAMS_BYTES];
        let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
        put(field::SETUP_SECTORS, self.header);
        put(field::LOADER, &[LOADER_UNDEFINED]);
        put(field::CODE_32_START, &(self.address as u32).to_le_bytes());
        put(field::COMMAND_LINE, &(COMMAND_LINE as u32).to_le_bytes());
        put(field::SETUP_DATA, &[0; 8]);
        let (address, length) = initrd.map_or((0, 0), |initrd| (initrd.address as u32, initrd.bytes.len() as u32));
        put(field::INITRD_ADDRESS, &address.to_le_bytes());
        put(field::INITRD_BYTES, &length.to_le_bytes());
        put(field::RSDP, &rsdp.to_le_bytes());
        let map = &map[..map.len().min(MAX_MAP_ENTRIES)];
        put(field::MAP_ENTRIES, &[map.len() as u8]);
        for (index, entry) in map.iter().enumerate() {
            let at = field::MAP + index * MAP_ENTRY_BYTES;
            put(at, &entry.address.to_le_bytes());
            put(at + 8, &entry.bytes.to_le_bytes());
            put(at + 16, &(entry.kind as u32).to_le_bytes());
        }
        Place { address: BOOT_PARAMS, bytes }
    }
}
