//! Seeded randomness, the same everywhere: SplitMix64 (Steele et al., OOPSLA 2014). Small, and its whole state is one word that a simulated
//! guest can carry through a migration. Not for secrets.

/// A generator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Random(pub u64);

/// Spreads the bits of `word`.
pub const fn mix(word: u64) -> u64 {
    let word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ (word >> 31)
}

impl Random {
    /// The next 64 bits.
    pub const fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number in `[0, bound)`; 0 for a bound of 0.
    pub const fn below(&mut self, bound: u64) -> u64 {
        ((self.next() as u128 * bound as u128) >> 64) as u64
    }

    /// True once in `n`.
    pub const fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// A generator of its own for `purpose`.
    pub const fn fork(&mut self, purpose: u64) -> Self {
        Self(mix(self.next() ^ purpose))
    }
}
