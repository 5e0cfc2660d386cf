//! Owns the division of RAM: which 2 MiB chunks are free, and which vCPU's working set gets which of them.

/// Bytes of a chunk, the size in which RAM is handed out and mapped.
pub const CHUNK_BYTES: u64 = 2 << 20;
/// 4 KiB pages of a chunk.
pub const PAGES_PER_CHUNK: u64 = CHUNK_BYTES / 4096;
/// Ranges of RAM that are remembered.
pub const MAX_RANGES: usize = 32;

/// A range of guest-physical addresses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Range {
    /// First byte.
    pub start: u64,
    /// First byte after it.
    pub end: u64,
}

/// The RAM of the machine, in ascending order.
#[derive(Clone, Copy, Debug)]
pub struct RamMap {
    ranges: [Range; MAX_RANGES],
    len: usize,
}

impl RamMap {
    /// No RAM.
    pub const fn new() -> Self {
        Self { ranges: [Range { start: 0, end: 0 }; MAX_RANGES], len: 0 }
    }

    /// Adds a range of RAM; false when the table is full.
    pub fn add(&mut self, start: u64, bytes: u64) -> bool {
        let Some(end) = start.checked_add(bytes) else { return false };
        if self.len == MAX_RANGES {
            return false;
        }
        let at = self.ranges().iter().position(|range| range.start > start).unwrap_or(self.len);
        self.ranges.copy_within(at..self.len, at + 1);
        self.ranges[at] = Range { start, end };
        self.len += 1;
        true
    }

    /// The ranges.
    pub fn ranges(&self) -> &[Range] {
        &self.ranges[..self.len]
    }

    /// All bytes of RAM.
    pub fn total_bytes(&self) -> u64 {
        self.ranges().iter().map(|range| range.end - range.start).sum()
    }

    /// First address after the last byte of RAM.
    pub fn top(&self) -> u64 {
        self.ranges().iter().map(|range| range.end).max().unwrap_or(0)
    }

    /// True when the chunk at `address` is RAM in whole.
    pub fn holds_chunk(&self, address: u64) -> bool {
        // Neighbouring ranges may meet inside a chunk.
        let mut reached = address;
        for range in self.ranges() {
            if range.start <= reached && range.end > reached {
                reached = range.end;
            }
        }
        reached >= address + CHUNK_BYTES
    }

    /// Whole chunks at or above `floor`, in ascending order.
    pub fn chunks(&self, floor: u64) -> impl Iterator<Item = u64> + '_ {
        let first = floor.next_multiple_of(CHUNK_BYTES);
        let count = self.top().saturating_sub(first) / CHUNK_BYTES;
        (0..count).map(move |index| first + index * CHUNK_BYTES).filter(|chunk| self.holds_chunk(*chunk))
    }
}

impl Default for RamMap {
    fn default() -> Self {
        Self::new()
    }
}

/// What one vCPU gets: chunks for data pages and chunks for its sequence table.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Grant {
    /// Chunks of data pages.
    pub data_chunks: u64,
    /// Chunks of the sequence table (4 bytes a data page), with the bits of windows (1 a data page) behind it.
    pub table_chunks: u64,
}

/// Chunks of data that the books in one chunk are for: 4 bytes and a bit a page, the bits from a page's start on.
const DATA_CHUNKS_PER_TABLE: u64 = 990;

impl Grant {
    /// Splits `chunks` into data and table.
    pub fn of_chunks(chunks: u64) -> Self {
        let table_chunks = chunks.div_ceil(DATA_CHUNKS_PER_TABLE + 1);
        Self { data_chunks: chunks - table_chunks, table_chunks }
    }

    /// Where the bits of windows begin, counted from the sequence table: at the next page behind it.
    pub fn bits_offset(&self) -> u64 {
        (self.data_chunks * PAGES_PER_CHUNK * 4).next_multiple_of(4096)
    }

    /// Chunks in all.
    pub fn chunks(&self) -> u64 {
        self.data_chunks + self.table_chunks
    }

    /// Smallest grant whose data chunks hold `bytes`.
    pub fn for_bytes(bytes: u64) -> Self {
        let data = bytes.div_ceil(CHUNK_BYTES).max(1);
        Self { data_chunks: data, table_chunks: data.div_ceil(DATA_CHUNKS_PER_TABLE) }
    }
}

/// Divides `free_chunks` among vCPUs that ask for `wanted_bytes`: each gets what it asks for while it lasts (else an equal
/// share), and what is left is divided equally, so that a working set can grow later.
pub fn divide(free_chunks: u64, wanted_bytes: &[u64], grants: &mut [Grant]) {
    let cpus = wanted_bytes.len() as u64;
    let wanted = |bytes: &u64| Grant::for_bytes(*bytes).chunks();
    let total: u64 = wanted_bytes.iter().map(wanted).sum();
    let spare = free_chunks.checked_sub(total);
    for (bytes, grant) in wanted_bytes.iter().zip(grants) {
        let chunks = match spare {
            Some(spare) => wanted(bytes) + spare / cpus,
            None => free_chunks / cpus,
        };
        *grant = Grant::of_chunks(chunks);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(mib: u64) -> RamMap {
        let mut map = RamMap::new();
        let low = mib.min(3 << 10) << 20;
        assert!(map.add(0x10_0000, low - 0x10_0000));
        assert!(map.add(0, 0x9_f000));
        if mib > 3 << 10 {
            assert!(map.add(4 << 30, (mib << 20) - low));
        }
        map
    }

    #[test]
    fn chunks_skip_the_hole() {
        let map = machine(6 << 10);
        let chunks: Vec<u64> = map.chunks(4 << 20).collect();
        assert_eq!(chunks[0], 4 << 20);
        assert_eq!(chunks.len() as u64, 3 * 1024 - 2);
        assert!(chunks.contains(&(4 << 30)) && !chunks.contains(&(3 << 30)));
        assert!(!map.holds_chunk(0));
        assert_eq!(map.ranges()[0].start, 0);
    }

    #[test]
    fn ranges_that_meet_inside_a_chunk_are_one() {
        let mut map = RamMap::new();
        map.add(0, 3 << 20);
        map.add(3 << 20, 5 << 20);
        assert_eq!(map.chunks(0).count(), 4);
        assert!(!map.add(u64::MAX, 2));
    }

    #[test]
    fn grants_hold_their_table() {
        for chunks in [1, 2, 3, 991, 992, 1024, 1025, 1026, 1982, 4096, 8192] {
            let grant = Grant::of_chunks(chunks);
            assert_eq!(grant.chunks(), chunks);
            let pages = grant.data_chunks * PAGES_PER_CHUNK;
            let end = grant.bits_offset() + pages.div_ceil(64) * 8;
            assert!(grant.bits_offset() >= pages * 4 && end <= grant.table_chunks * CHUNK_BYTES, "{chunks}");
        }
        for bytes in [1, 64 << 20, 2 << 30, (2 << 30) + 1] {
            let grant = Grant::of_chunks(Grant::for_bytes(bytes).chunks());
            assert!(grant.data_chunks * CHUNK_BYTES >= bytes, "{bytes}");
        }
    }

    #[test]
    fn division_gives_what_is_asked_for_or_an_equal_share() {
        let mut grants = [Grant::default(); 2];
        divide(100, &[64 << 20, 2 << 20], &mut grants);
        assert!(grants[0].data_chunks >= 32 && grants[1].data_chunks >= 1);
        assert!(grants[0].chunks() + grants[1].chunks() <= 100);
        divide(20, &[640 << 20, 2 << 20], &mut grants);
        assert_eq!((grants[0].chunks(), grants[1].chunks()), (10, 10));
    }
}
