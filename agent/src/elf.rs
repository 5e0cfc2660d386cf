//! The header of a 64-bit ELF file, as those need it who read one.
//!
//! Owns its form and what it must be of; what its tables hold is read where it is used. Format: the System V ABI, chapter 4 ("Object
//! Files"); include/uapi/linux/elf.h.

use zerocopy::{FromBytes, Immutable, KnownLayout};

/// The fields of the file header.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout)]
pub(crate) struct Header {
    ident: [u8; 16],
    kind: u16,
    machine: u16,
    version: u32,
    entry: u64,
    pub(crate) segments_offset: u64,
    pub(crate) sections_offset: u64,
    flags: u32,
    own_bytes: u16,
    pub(crate) segment_bytes: u16,
    pub(crate) segments: u16,
    pub(crate) section_bytes: u16,
    pub(crate) sections: u16,
    pub(crate) names: u16,
}

const _: () = assert!(size_of::<Header>() == 64);

impl Header {
    /// Whether it is of a file for 64-bit x86, lowest byte first.
    pub(crate) fn is_x86_64(&self) -> bool {
        self.ident[4..6] == [2, 1] && self.machine == 62
    }
}
