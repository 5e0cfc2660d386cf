//! Owns what the VMM hands over by the PVH protocol: command line and memory map, copied out before RAM is used.

use core::ptr::read_unaligned;

use dunlin_guest::memory::RamMap;

use crate::entry;

const MAGIC: u32 = 0x336e_c578;
const COMMAND_LINE_BYTES: usize = 2048;
const TYPE_RAM: u32 = 1;

#[repr(C)]
#[derive(Clone, Copy)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    modules: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct MemoryMapEntry {
    address: u64,
    bytes: u64,
    kind: u32,
    reserved: u32,
}

/// What the VMM told.
pub struct Boot {
    command_line: [u8; COMMAND_LINE_BYTES],
    command_line_len: usize,
    /// The RAM.
    pub ram: RamMap,
}

impl Boot {
    /// The command line; what is not text is cut off.
    pub fn command_line(&self) -> &str {
        let bytes = &self.command_line[..self.command_line_len];
        match core::str::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => core::str::from_utf8(&bytes[..error.valid_up_to()]).unwrap_or(""),
        }
    }
}

/// Copies the start info.
pub fn read() -> Boot {
    let mut boot = Boot { command_line: [0; COMMAND_LINE_BYTES], command_line_len: 0, ram: RamMap::new() };
    // SAFETY: the address is the one that the VMM passed by the PVH protocol; it is below 4 GiB, which is mapped, and so are
    // the command line and memory map that it names. Nothing of that RAM was used yet.
    unsafe {
        let address = u64::from((&raw const entry::pvh_start_info).read_volatile());
        let info = read_unaligned(address as *const StartInfo);
        assert!(info.magic == MAGIC, "no PVH start info at {address:#x}");
        assert!(info.version >= 1 && info.memory_map_entries > 0, "the start info has no memory map");
        let text = info.command_line as *const u8;
        while info.command_line != 0 && boot.command_line_len < COMMAND_LINE_BYTES {
            let byte = *text.add(boot.command_line_len);
            if byte == 0 {
                break;
            }
            boot.command_line[boot.command_line_len] = byte;
            boot.command_line_len += 1;
        }
        for index in 0..info.memory_map_entries as usize {
            let entry = read_unaligned((info.memory_map as *const MemoryMapEntry).add(index));
            if entry.kind == TYPE_RAM {
                boot.ram.add(entry.address, entry.bytes);
            }
        }
    }
    boot
}
