//! Single writes, as the programs put them into a ring: taken out of it, in the order of their times.
//!
//! Must not know what is made of them.

use aya::Ebpf;
use aya::maps::{MapData, RingBuf};
use dunlin_ebpf::{PLACE_UNKNOWN, Write, map};

use super::probes::ProbeError;
use crate::model::{AddressSpace, Gfn, GuestWrite, Gva};

/// What the kernel puts before each record (`BPF_RINGBUF_HDR_SZ`, kernel/bpf/ringbuf.c).
const HEADER_BYTES: usize = 8;

/// The ring, once it is asked for.
pub(super) struct Writes {
    ring: RingBuf<MapData>,
    /// Records that it can hold.
    room: usize,
}

impl std::fmt::Debug for Writes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writes").field("room", &self.room).finish_non_exhaustive()
    }
}

/// The size in bytes that the ring must be made of: a power of two of at least a page.
pub(super) fn ring_bytes(asked: Option<u32>) -> u32 {
    asked.unwrap_or(0).clamp(4096, 1 << 30).next_power_of_two()
}

impl Writes {
    /// Maps the ring of `bytes`.
    ///
    /// # Errors
    /// The object has none, or it cannot be mapped.
    pub(super) fn open(bpf: &mut Ebpf, bytes: u32) -> Result<Self, ProbeError> {
        let ring = bpf.take_map(map::WRITES).ok_or_else(|| ProbeError::map(map::WRITES, "is not in the object"))?;
        let ring = RingBuf::try_from(ring).map_err(|e| ProbeError::map(map::WRITES, e))?;
        Ok(Self { ring, room: bytes as usize / (size_of::<Write>() + HEADER_BYTES) })
    }

    /// Moves what a process has written into `into`: at most what the ring can hold, so that a flood does not keep anybody here.
    pub(super) fn take(&mut self, pid: u32, into: &mut Vec<GuestWrite>) {
        let first = into.len();
        for _ in 0..self.room {
            let Some(record) = self.ring.next() else { break };
            let Some(write) = parse(&record) else { continue };
            if write.tgid == pid {
                into.push(told(&write));
            }
        }
        // Nearly in order already: each CPU takes its room in the ring after it has looked at the clock.
        into[first..].sort_by_key(|write| write.at_ns);
    }
}

/// None: no record of ours.
fn parse(record: &[u8]) -> Option<Write> {
    let (words, []) = record.as_chunks::<8>() else { return None };
    let words: [[u8; 8]; Write::WORDS] = words.try_into().ok()?;
    Some(Write::from_words(words.map(u64::from_le_bytes)))
}

fn told(write: &Write) -> GuestWrite {
    let known = |place: u64| (place != PLACE_UNKNOWN).then_some(place);
    GuestWrite {
        at_ns: write.at_ns,
        thread_id: write.tid,
        gfn: Gfn(write.gfn),
        pages: write.pages,
        fresh: write.fresh,
        address_space: known(write.root).map(AddressSpace),
        instruction: known(write.instruction).map(Gva),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_read_as_it_was_written_and_nothing_else_is() {
        let bytes: Vec<u8> = (0..size_of::<Write>() as u8).collect();
        let word = |at: u8| u64::from_le_bytes(std::array::from_fn(|byte| at + byte as u8));
        let half = |at: u8| u32::from_le_bytes(std::array::from_fn(|byte| at + byte as u8));
        let write = Write {
            at_ns: word(0),
            root: word(8),
            instruction: word(16),
            gfn: word(24),
            tgid: half(32),
            tid: half(36),
            pages: half(40),
            fresh: half(44),
        };
        assert_eq!(parse(&bytes), Some(write));
        assert!((0..bytes.len()).all(|cut| parse(&bytes[..cut]).is_none()));
        let nowhere = told(&Write { root: PLACE_UNKNOWN, instruction: PLACE_UNKNOWN, ..write });
        assert_eq!((nowhere.address_space, nowhere.instruction), (None, None));
    }

    #[test]
    fn a_ring_has_a_size_that_the_kernel_takes() {
        assert_eq!([None, Some(1), Some(4097), Some(u32::MAX)].map(ring_bytes), [4096, 4096, 8192, 1 << 30]);
    }
}
