//! Checks of an ELF file before it is loaded.
//!
//! Owns the bounds: every segment lies in the file and in low guest RAM, no sum overflows. The copying is linux-loader's.

use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::BootError;
use crate::elf::Header;

const SEGMENT_BYTES: usize = 56;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_NOTE: u32 = 4;

/// A program header.
#[repr(C)]
#[derive(Clone, Copy, FromBytes, Immutable, KnownLayout)]
struct Segment {
    kind: u32,
    flags: u32,
    offset: u64,
    virtual_address: u64,
    address: u64,
    file_bytes: u64,
    memory_bytes: u64,
    align: u64,
}

const _: () = assert!(size_of::<Segment>() == SEGMENT_BYTES);

/// Whether the file says that it is an ELF file.
pub(super) fn is(file: &[u8]) -> bool {
    file.starts_with(b"\x7fELF")
}

/// Refuses a file that is not a whole 64-bit x86 ELF whose segments lie in guest RAM `[start, end)`. Returns the address
/// behind the last segment.
pub(super) fn check(file: &[u8], start: u64, end: u64) -> Result<u64, BootError> {
    let bad = |problem: &str| BootError::Image(problem.to_owned());
    let (header, _) = Header::read_from_prefix(file).map_err(|_| bad("it is too short"))?;
    if !is(file) {
        return Err(bad("it does not start as an ELF file does"));
    }
    if !header.is_x86_64() {
        return Err(bad("it is not for 64-bit x86"));
    }
    if usize::from(header.segment_bytes) != SEGMENT_BYTES || header.segments == 0 {
        return Err(bad("it has no program headers"));
    }
    let table = usize::try_from(header.segments_offset)
        .ok()
        .filter(|&offset| offset >= size_of::<Header>())
        .and_then(|offset| file.get(offset..)?.get(..usize::from(header.segments) * SEGMENT_BYTES))
        .ok_or_else(|| bad("its program headers are cut off"))?;
    let mut image_end = start;
    for bytes in table.chunks_exact(SEGMENT_BYTES) {
        let segment = Segment::read_from_bytes(bytes).map_err(|_| bad("its program headers are cut off"))?;
        if segment.kind != SEGMENT_LOAD && segment.kind != SEGMENT_NOTE {
            continue;
        }
        let whole = segment.offset.checked_add(segment.file_bytes).is_some_and(|last| last <= file.len() as u64);
        if !whole {
            return Err(bad("a segment is cut off"));
        }
        if segment.kind == SEGMENT_LOAD && segment.memory_bytes > 0 {
            if segment.memory_bytes < segment.file_bytes || segment.address < start {
                return Err(bad("a segment lies below 1 MiB or is larger in the file than in memory"));
            }
            let last = segment.address.checked_add(segment.memory_bytes).ok_or_else(|| bad("a segment overflows"))?;
            if last > end {
                return Err(BootError::TooBig { end: last, ram: end });
            }
            image_end = image_end.max(last);
        } else if segment.kind == SEGMENT_LOAD && segment.file_bytes > 0 {
            return Err(bad("a segment is larger in the file than in memory"));
        }
    }
    Ok(image_end)
}

#[cfg(test)]
pub(crate) mod tests {
    /// A minimal PVH ELF: one segment with `code` at `address`, which is also the entry point, and the note.
    pub(crate) fn pvh_elf(address: u64, code: &[u8]) -> Vec<u8> {
        let (segments, note) = (64u64, 64 + 2 * 56);
        let note_bytes = 20u64;
        let text = note + note_bytes;
        let mut file = Vec::new();
        file.extend_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        file.extend_from_slice(&2u16.to_le_bytes());
        file.extend_from_slice(&62u16.to_le_bytes());
        file.extend_from_slice(&1u32.to_le_bytes());
        for word in [address, segments, 0] {
            file.extend_from_slice(&word.to_le_bytes());
        }
        file.extend_from_slice(&0u32.to_le_bytes());
        for half in [64u16, 56, 2, 64, 0, 0] {
            file.extend_from_slice(&half.to_le_bytes());
        }
        let mut segment = |kind: u32, offset: u64, address: u64, bytes: u64| {
            file.extend_from_slice(&kind.to_le_bytes());
            file.extend_from_slice(&5u32.to_le_bytes());
            for word in [offset, address, address, bytes, bytes, 1] {
                file.extend_from_slice(&word.to_le_bytes());
            }
        };
        segment(4, note, 0, note_bytes);
        segment(1, text, address, code.len() as u64);
        for word in [4u32, 4, 18] {
            file.extend_from_slice(&word.to_le_bytes());
        }
        file.extend_from_slice(b"Xen\0");
        file.extend_from_slice(&(address as u32).to_le_bytes());
        file.extend_from_slice(code);
        file
    }
}
