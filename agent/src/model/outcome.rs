//! How a command or a migration ends, who owns the VM then, and the exit code that says so.

use serde::{Deserialize, Serialize};

/// Who may run the VM's vCPUs, as one side sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Owner {
    /// This side.
    Here,
    /// The other side.
    There,
    /// Nobody until the two sides have spoken, a fence has decided, or an operator has (`dunlin resolve`).
    InDoubt,
    /// Nobody any more: the machine has died, and the VM with it.
    Nobody,
}

impl Owner {
    /// Its word, as in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Here => "here",
            Self::There => "there",
            Self::InDoubt => "in-doubt",
            Self::Nobody => "nobody",
        }
    }
}

/// How a migration ended, as the source's manager saw it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Ending {
    /// The VM runs at the target.
    Moved,
    /// The target or the source refused before anything moved; the VM runs at the source.
    Refused,
    /// It failed and the VM runs at the source.
    Failed,
    /// An operator cancelled it and the VM runs at the source.
    Cancelled,
    /// The source's machine died before the target held a complete VM: a VM crash like any other.
    Lost,
    /// Contact was lost between `released` and `running`; see `dunlin resolve`.
    InDoubt,
}

/// The exit codes of every command.
pub mod exit {
    /// Done (migrate: the VM runs at the target).
    pub const DONE: u8 = 0;
    /// Any other failure: of a command that moves nothing.
    pub const ERROR: u8 = 1;
    /// The command line is wrong.
    pub const USAGE: u8 = 2;
    /// Refused before anything was touched.
    pub const REFUSED: u8 = 3;
    /// Failed, and the VM runs at the source.
    pub const FAILED: u8 = 4;
    /// In doubt: neither side runs the VM until it is resolved.
    pub const IN_DOUBT: u8 = 5;
    /// Cancelled, and the VM runs at the source.
    pub const CANCELLED: u8 = 6;
}

impl Ending {
    /// Its word, as in JSON.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Moved => "moved",
            Self::Refused => "refused",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Lost => "lost",
            Self::InDoubt => "in-doubt",
        }
    }

    /// The exit code of `dunlin migrate`.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Moved => exit::DONE,
            Self::Refused => exit::REFUSED,
            Self::Failed => exit::FAILED,
            Self::Lost => exit::ERROR,
            Self::InDoubt => exit::IN_DOUBT,
            Self::Cancelled => exit::CANCELLED,
        }
    }

    /// Who owns the VM, seen from the source.
    pub const fn owner(self) -> Owner {
        match self {
            Self::Moved => Owner::There,
            Self::Refused | Self::Failed | Self::Cancelled => Owner::Here,
            Self::Lost => Owner::Nobody,
            Self::InDoubt => Owner::InDoubt,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_those_of_json() {
        for owner in [Owner::Here, Owner::There, Owner::InDoubt, Owner::Nobody] {
            assert_eq!(serde_json::to_value(owner).unwrap(), owner.name());
        }
        use Ending::{Cancelled, Failed, InDoubt, Lost, Moved, Refused};
        for ending in [Moved, Refused, Failed, Cancelled, Lost, InDoubt] {
            assert_eq!(serde_json::to_value(ending).unwrap(), ending.name());
        }
    }
}
