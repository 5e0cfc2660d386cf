//! What a trial found.

use std::io;

/// The outcome of really trying something.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It works; the text says how well, or is empty.
    Works(String),
    /// The kernel, or the machine under it, lacks it.
    Missing(String),
    /// It is there, and this process may not use it.
    Refused(String),
}

impl Verdict {
    /// It works, and there is nothing more to say.
    pub const WORKS: Self = Self::Works(String::new());

    /// What an error means: `EPERM` and `EACCES` are somebody's policy, everything else is a lack.
    pub fn of(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::Refused(error.to_string()),
            _ => Self::Missing(error.to_string()),
        }
    }

    /// The verdict on a trial: what it says, or what its error means.
    pub fn from_trial(trial: io::Result<String>) -> Self {
        trial.map_or_else(|error| Self::of(&error), Self::Works)
    }

    /// Whether it works.
    pub const fn works(&self) -> bool {
        matches!(self, Self::Works(_))
    }
}
