//! What is done so that fewer bytes travel: asked for one by one, each with its own count of what it saved and cost.
//!
//! [`pack`] is the source's part of one page stream, [`unpack`] the target's. Everything is made of a private copy of the pages, since the guest writes them
//! meanwhile; the copy is also what a later delta or reference speaks of. Zero pages are [`super::pieces`]' business, the order of pages [`super::order`]'s.

mod codec;
mod delta;
mod dictionary;
mod pack;
mod sent_pages;
mod spared;
#[cfg(test)]
mod tests;
mod unpack;
mod worth;

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

pub(super) use pack::{Outlet, Reducing};
pub(super) use sent_pages::SentPages;
pub(super) use spared::Spared;
pub(super) use unpack::{Unpacker, known_packings};
#[cfg(any(test, feature = "fuzz"))]
pub(crate) use unpack::{fuzz, fuzz_seeds};

use crate::model::{PAGE_SIZE, Packing};

/// Copies that all streams' dictionaries of one migration may hold together, in bytes.
const DICTIONARY_BYTES: u64 = 64 << 20;
/// The highest level of Zstandard that is taken; those above need much memory.
const HIGHEST_LEVEL: i32 = 19;

/// One page as plain bytes.
type Page = [u8; PAGE_SIZE];

/// How pages are compressed, while the link is what keeps them waiting.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compress {
    /// Not at all.
    #[default]
    None,
    /// LZ4: fast, and modest.
    Lz4,
    /// Zstandard at a level from 1 to 19.
    Zstd(i32),
    /// Whichever of LZ4 and Zstandard at level 1 spares more time at present.
    Auto,
}

impl Compress {
    /// What is tried.
    fn codecs(self) -> Vec<codec::Codec> {
        match self {
            Self::None => Vec::new(),
            Self::Lz4 => vec![codec::Codec::Lz4],
            Self::Zstd(level) => vec![codec::Codec::Zstd(level)],
            Self::Auto => vec![codec::Codec::Lz4, codec::Codec::Zstd(1)],
        }
    }
}

impl fmt::Display for Compress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::None => f.write_str("none"),
            Self::Lz4 => f.write_str("lz4"),
            Self::Zstd(level) => write!(f, "zstd:{level}"),
            Self::Auto => f.write_str("auto"),
        }
    }
}

impl FromStr for Compress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "none" => Ok(Self::None),
            "lz4" => Ok(Self::Lz4),
            "zstd" => Ok(Self::Zstd(1)),
            "auto" => Ok(Self::Auto),
            _ => text
                .strip_prefix("zstd:")
                .and_then(|level| level.parse().ok())
                .filter(|level| (1..=HIGHEST_LEVEL).contains(level))
                .map(Self::Zstd)
                .ok_or_else(|| {
                    format!("`{text}` is no way to compress; write none, lz4, zstd, zstd:LEVEL (1 to {HIGHEST_LEVEL}) or auto")
                }),
        }
    }
}

/// What is done so that fewer bytes travel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reducers {
    /// Pages of zeros go as a mark.
    pub zero_pages: bool,
    /// Pages are compressed.
    pub compress: Compress,
    /// Of a page that was sent before only what has changed goes: room for copies of sent pages at the source, in bytes; 0 is off.
    pub delta_bytes: u64,
    /// Of a page that equals another one which the target holds, only that goes.
    pub dedup: bool,
    /// Pages that were dirty after each of the last two rounds go last.
    pub skip_hot: bool,
    /// Pages that the guest says are free are left out, while it runs.
    pub free_pages: bool,
}

impl Default for Reducers {
    fn default() -> Self {
        Self {
            zero_pages: true,
            compress: Compress::None,
            delta_bytes: 0,
            dedup: false,
            skip_hot: false,
            free_pages: false,
        }
    }
}

impl Reducers {
    /// The packings that pages may come in; the target must know them.
    pub(super) fn packings(&self) -> Vec<Packing> {
        let compressed = self.compress.codecs().into_iter().map(codec::Codec::packing);
        let delta = (self.delta_bytes > 0).then_some(Packing::Delta);
        compressed.chain(delta).chain(self.dedup.then_some(Packing::Known)).collect()
    }
}

/// What one reducer has come to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Gain {
    /// Pages that went its way.
    pub(super) pages: u64,
    /// What they have in bytes, less what was sent for them.
    pub(super) saved_bytes: u64,
    /// CPU time of the thread that did it.
    pub(super) cpu: Duration,
}

impl Gain {
    pub(super) fn add(&mut self, other: Self) {
        self.pages += other.pages;
        self.saved_bytes += other.saved_bytes;
        self.cpu += other.cpu;
    }

    /// Notes pages that were packed into so many bytes.
    fn note(&mut self, pages: u64, bytes: usize) {
        self.pages += pages;
        self.saved_bytes += (pages * PAGE_SIZE as u64).saturating_sub(bytes as u64);
    }
}
