//! Writes that a guest was told are done, and that are not on its disk yet: those of a VM on loan, until the source can go on from behind them.
//!
//! Owns what is held and in which order it may go. Must not know who lends, nor virtio. A sector that is written again replaces what was held of it: whoever goes on from an earlier increment has that
//! one's own copy of what was held then.

use std::collections::BTreeMap;

use super::raw::SECTOR_BYTES;

/// One sector's bytes.
type Sector = [u8; SECTOR_BYTES as usize];
/// Each one in the encoded form: its number, and its bytes.
const ENCODED_BYTES: usize = 8 + SECTOR_BYTES as usize;

/// Held writes of one disk.
#[derive(Debug, Default)]
pub struct HeldWrites {
    sectors: BTreeMap<u64, (u32, Box<Sector>)>,
    /// The most that may be held; nothing more is while it is 0.
    limit: usize,
    /// The increment that new writes are of.
    number: u32,
    /// Those of increments up to this one may go.
    free: u32,
}

impl HeldWrites {
    /// Holds writes from now on, at most `bytes` of them, as those of increment 1.
    pub fn hold(&mut self, bytes: usize) {
        (self.limit, self.number, self.free) = ((bytes / SECTOR_BYTES as usize).max(1), 1, 0);
    }

    /// Nothing more is held, and all that was may go.
    pub fn end(&mut self) {
        (self.limit, self.free) = (0, u32::MAX);
    }

    /// What is written from now on is of increment `number`.
    pub fn begin(&mut self, number: u32) {
        self.number = number;
    }

    /// What is of increments up to `number` may go.
    pub fn let_out(&mut self, number: u32) {
        self.free = self.free.max(number);
    }

    /// Whether writes are held.
    pub fn holds(&self) -> bool {
        self.limit > 0
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.sectors.is_empty()
    }

    /// Whether `count` more sectors may be held.
    pub fn has_room(&self, count: usize) -> bool {
        self.sectors.len() + count <= self.limit
    }

    /// Holds a write.
    pub fn write(&mut self, sector: u64, bytes: Sector) {
        self.sectors.insert(sector, (self.number, Box::new(bytes)));
    }

    /// What is held of `count` sectors from `first` on.
    pub fn within(&self, first: u64, count: u64) -> impl Iterator<Item = (u64, &Sector)> {
        self.sectors.range(first..first.saturating_add(count)).map(|(&sector, (_, bytes))| (sector, bytes.as_ref()))
    }

    /// Bytes that may go, at most `longest` sectors, all of them neighbours; and the first one's number.
    pub fn next_free(&self, from: u64, longest: usize) -> Option<(u64, Vec<u8>)> {
        let mut free = self.sectors.range(from..).filter(|(_, (number, _))| *number <= self.free);
        let (&first, (_, bytes)) = free.next()?;
        let mut run = bytes.to_vec();
        let mut last = first;
        for (&sector, (_, bytes)) in free.take(longest.saturating_sub(1)) {
            if sector != last + 1 {
                break;
            }
            run.extend_from_slice(bytes.as_slice());
            last = sector;
        }
        Some((first, run))
    }

    /// What may go is where it belongs, durably.
    pub fn remove_free(&mut self) {
        let free = self.free;
        self.sectors.retain(|_, (number, _)| *number > free);
    }

    /// All of it, for the one who goes on from here.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(self.sectors.len() * ENCODED_BYTES);
        for (sector, (_, content)) in &self.sectors {
            bytes.extend_from_slice(&sector.to_le_bytes());
            bytes.extend_from_slice(content.as_slice());
        }
        bytes
    }

    /// Takes what [`HeldWrites::encode`] gave, of a disk of `sectors`: all of it may go at once. `false` if it is none, and nothing has changed.
    pub fn decode(&mut self, bytes: &[u8], sectors: u64) -> bool {
        let (chunks, rest) = bytes.as_chunks::<ENCODED_BYTES>();
        let mut read = BTreeMap::new();
        for chunk in chunks {
            if let Some((number, content)) = chunk.split_first_chunk::<8>()
                && let Ok(content) = Sector::try_from(content)
            {
                read.insert(u64::from_le_bytes(*number), (0, Box::new(content)));
            }
        }
        let fits = rest.is_empty() && read.len() == chunks.len() && read.keys().all(|&sector| sector < sectors);
        if fits {
            *self = Self { sectors: read, limit: 0, number: 0, free: u32::MAX };
        }
        fits
    }
}

/// Fuzzing: held writes that a peer says there are; what is taken is what would be said of it again.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz(input: &[u8]) {
    const SECTORS: u64 = 1 << 20;
    let mut held = HeldWrites::default();
    if held.decode(input, SECTORS) {
        assert!(held.encode().len() == input.len() && !held.holds(), "writes were lost or made up");
        let mut again = HeldWrites::default();
        assert!(again.decode(&held.encode(), SECTORS) && again.encode() == held.encode());
        assert!(held.is_empty() || held.next_free(0, 8).is_some_and(|(first, _)| first < SECTORS));
    } else {
        assert!(held.is_empty(), "something was taken of what is none");
    }
}

/// Seeds of [`fuzz`].
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz_seeds() -> Vec<Vec<u8>> {
    let mut held = HeldWrites::default();
    held.hold(1 << 20);
    for sector in [0, 7, 8, 1 << 19] {
        held.write(sector, [sector as u8; SECTOR_BYTES as usize]);
    }
    vec![Vec::new(), held.encode()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(writes: &[(u32, u64, u8)]) -> HeldWrites {
        let mut held = HeldWrites::default();
        held.hold(8 * 512);
        for &(number, sector, value) in writes {
            held.begin(number);
            held.write(sector, [value; 512]);
        }
        held
    }

    #[test]
    fn only_what_is_safe_goes_and_neighbours_go_together() {
        let mut held = held(&[(1, 4, 1), (1, 5, 2), (1, 9, 3), (2, 6, 4)]);
        assert_eq!(held.next_free(0, 8), None);
        held.let_out(1);
        let (first, bytes) = held.next_free(0, 8).unwrap();
        assert_eq!((first, bytes.len(), bytes[0], bytes[512]), (4, 1024, 1, 2));
        assert_eq!(held.next_free(6, 8).map(|(first, bytes)| (first, bytes[0])), Some((9, 3)));
        held.remove_free();
        assert_eq!(held.within(0, 100).map(|(sector, _)| sector).collect::<Vec<_>>(), [6]);
        held.end();
        held.remove_free();
        assert!(held.is_empty() && !held.holds());
    }

    #[test]
    fn a_sector_written_again_waits_for_the_later_increment() {
        let mut held = held(&[(1, 4, 1), (2, 4, 2)]);
        held.let_out(1);
        assert_eq!(held.next_free(0, 8), None);
        assert_eq!(held.within(4, 1).next(), Some((4, &[2; 512])), "and is read as it was written last");
        assert!(held.has_room(7) && !held.has_room(8));
    }

    #[test]
    fn what_was_held_is_read_as_it_was_and_nothing_else() {
        let first = held(&[(1, 4, 1), (2, 7, 2)]);
        let mut second = HeldWrites::default();
        assert!(!second.decode(&first.encode(), 7), "a sector behind the disk's end");
        assert!(!second.decode(&first.encode()[1..], 8) && second.is_empty());
        let twice = [first.encode(), first.encode()].concat();
        assert!(!second.decode(&twice, 8), "a sector that is there twice");
        assert!(second.decode(&first.encode(), 8));
        assert_eq!(second.next_free(5, 8).map(|(first, bytes)| (first, bytes[0])), Some((7, 2)));
    }
}
