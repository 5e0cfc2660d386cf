//! How pages travel that are not sent as they are: the words that both ends of a page stream share.

/// What the bytes of a packed run are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Packing {
    /// One LZ4 block of all its pages.
    Lz4,
    /// One Zstandard frame of all its pages.
    Zstd,
    /// For each page what differs from the page that was sent for the same place before.
    Delta,
    /// For each page the place of an equal one that the target holds.
    Known,
}

impl Packing {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Lz4, Self::Zstd, Self::Delta, Self::Known];

    /// Its number on the wire; never zero.
    pub const fn number(self) -> u16 {
        match self {
            Self::Lz4 => 1,
            Self::Zstd => 2,
            Self::Delta => 3,
            Self::Known => 4,
        }
    }

    /// The packing of a number.
    pub fn from_number(number: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|packing| packing.number() == number)
    }

    /// Its name in messages and reports.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
            Self::Delta => "delta",
            Self::Known => "dedup",
        }
    }

    /// The packing of a name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|packing| packing.name() == name)
    }
}
