//! Recordings of what tracking saw of a VM: a file of JSON lines, a header and then one line a look.
//!
//! Owns the file's form, its limits, and both ends of it: [`Recorder`] keeps looks as they are taken, [`Replay`] gives them again as an
//! event source with a clock of its own. Must not know what figures are made of them. Each line is written whole and at once, so
//! that of a recording that was broken off (power, a full disk, `kill -9`) at most the last line is damaged; it is skipped. A file is
//! anybody's: everything in it is checked before it is used.

mod format;
mod replay;
#[cfg(test)]
mod tests;
mod writer;

use std::io;

pub use format::{RecordedSource, RecordedVm, RecordingHeader};
#[cfg(any(test, feature = "fuzz"))]
pub(crate) use format::{fuzz, fuzz_seeds, samples};
pub use replay::{Replay, ReplayClock, ReplaySource, Replayed};
pub use writer::Recorder;

/// The longest line: 16 MiB, room for some four million runs of pages.
pub const MAX_LINE_BYTES: usize = 16 << 20;
/// The most guest frames that are told apart: 4 TiB, a bitmap of 128 MiB.
pub const MAX_FRAMES: u64 = 1 << 30;

/// Why a recording cannot be made or read.
#[derive(Debug, thiserror::Error)]
pub enum RecordingError {
    /// The file.
    #[error("{path}: {source}")]
    Io {
        /// Which.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is one already.
    #[error("{0} exists; a recording overwrites nothing: name another file or remove it")]
    Exists(String),
    /// It is damaged, or no recording.
    #[error("{path}, line {line}: {problem}")]
    Damaged {
        /// Which.
        path: String,
        /// Where, from 1.
        line: u64,
        /// What is wrong.
        problem: String,
    },
    /// More guest addresses than a recording may have.
    #[error(
        "a recording tells {MAX_FRAMES} guest pages apart, and this VM has addresses for {0}; lower the end with --max-address"
    )]
    TooWide(u64),
}
