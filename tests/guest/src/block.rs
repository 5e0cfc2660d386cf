//! Owns the format of a disk block that the block workload writes, and the choice of what it does next.

use crate::units;
use crate::workload::Dice;

/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4096;
/// Most blocks that a span may have (bounds the sequence table).
pub const MAX_BLOCKS: usize = 16_384;

const WORDS: usize = BLOCK_BYTES / 8;
const TAG_XOR: u64 = 0xb10c_17d0_5eed_0002;

/// Settings of the block workload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spec {
    /// Requests (writes and reads together) per second; 0 is stopped.
    pub rate_blocks_per_second: u64,
    /// Part of the disk that is used, from its start.
    pub span_bytes: u64,
}

impl Default for Spec {
    fn default() -> Self {
        Self { rate_blocks_per_second: 0, span_bytes: 16 << 20 }
    }
}

impl Spec {
    /// Applies a list `rate:100,span:16M`; false when any part is not understood.
    pub fn set_list(&mut self, list: &str) -> bool {
        list.split(',').filter(|part| !part.is_empty()).fold(true, |good, part| {
            let done = match part.split_once(':') {
                Some(("rate", value)) => value.parse().ok().map(|rate| self.rate_blocks_per_second = rate),
                Some(("span", value)) => units::size_bytes(value).map(|bytes| self.span_bytes = bytes),
                _ => None,
            };
            good && done.is_some()
        })
    }
}

/// What one request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Writes this block.
    Write(usize),
    /// Reads this block back and checks it.
    Read(usize),
    /// Flushes the disk.
    Flush,
}

/// Requests between two flushes.
const FLUSH_EVERY: u64 = 64;

/// Picks request after request: writes everywhere, one read for each write, a flush now and then.
#[derive(Clone, Copy, Debug)]
pub struct Planner {
    dice: Dice,
    count: u64,
    blocks: usize,
}

impl Planner {
    /// A planner over `blocks` blocks.
    pub fn new(blocks: usize, seed: u64) -> Self {
        Self { dice: Dice::new(seed), count: 0, blocks }
    }

    /// The next request; `written` says whether a block was written in this run (only such blocks are read back).
    pub fn next(&mut self, written: impl Fn(usize) -> bool) -> Action {
        self.count += 1;
        if self.count.is_multiple_of(FLUSH_EVERY) {
            return Action::Flush;
        }
        let block = self.dice.below(self.blocks as u64) as usize;
        if self.count.is_multiple_of(2) {
            // A few throws to find a block that was written; in the beginning most were not.
            for _ in 0..8 {
                let candidate = self.dice.below(self.blocks as u64) as usize;
                if written(candidate) {
                    return Action::Read(candidate);
                }
            }
        }
        Action::Write(block)
    }
}

/// Fills a block: tag, sequence, run and check, then pseudo-random words.
pub fn fill(block: &mut [u64; WORDS], index: usize, sequence: u32, run: u64) {
    block[0] = index as u64 ^ TAG_XOR;
    block[1] = u64::from(sequence);
    block[2] = run;
    let mut dice = Dice::new(block[0] ^ run ^ u64::from(sequence) << 32);
    block[4..].iter_mut().for_each(|word| *word = dice.bits());
    block[3] = check_word(block);
}

/// True when the block is exactly what `fill` makes of these arguments.
pub fn check(block: &[u64; WORDS], index: usize, sequence: u32, run: u64) -> bool {
    block[0] == index as u64 ^ TAG_XOR
        && block[1] == u64::from(sequence)
        && block[2] == run
        && block[3] == check_word(block)
}

fn check_word(block: &[u64; WORDS]) -> u64 {
    let header = block[0] ^ block[1].rotate_left(20) ^ block[2].rotate_left(40);
    block[4..].iter().fold(header, |sum, word| sum.rotate_left(1).wrapping_add(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_checks_only_as_itself() {
        let mut block = [0u64; WORDS];
        fill(&mut block, 5, 9, 77);
        assert!(check(&block, 5, 9, 77));
        assert!(!check(&block, 6, 9, 77) && !check(&block, 5, 8, 77) && !check(&block, 5, 9, 78));
        for word in 0..WORDS {
            let mut broken = block;
            broken[word] ^= 1 << (word % 64);
            assert!(!check(&broken, 5, 9, 77), "word {word}");
        }
    }

    #[test]
    fn only_written_blocks_are_read_and_flushes_come() {
        let mut planner = Planner::new(100, 3);
        let mut written = [false; 100];
        let (mut reads, mut writes, mut flushes) = (0, 0, 0);
        for _ in 0..6400 {
            match planner.next(|block| written[block]) {
                Action::Write(block) => {
                    written[block] = true;
                    writes += 1;
                }
                Action::Read(block) => {
                    assert!(written[block]);
                    reads += 1;
                }
                Action::Flush => flushes += 1,
            }
        }
        assert_eq!(flushes, 100);
        assert!(reads > 2_900 && writes > 2_900, "{reads} {writes}");
    }

    #[test]
    fn settings_parse() {
        let mut spec = Spec::default();
        assert!(spec.set_list("rate:100,span:8M"));
        assert_eq!(spec, Spec { rate_blocks_per_second: 100, span_bytes: 8 << 20 });
        assert!(!spec.set_list("rate:x") && !spec.set_list("depth:4"));
    }
}
