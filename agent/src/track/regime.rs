//! Under which conditions a figure was taken. The same events mean different things with and without write protection,
//! so no figure is printed without its regime.

use serde::Serialize;

/// Who write-protects a VM's pages, as far as is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protection {
    /// We do, all of them at the start of the interval.
    Ours,
    /// Someone else has the VM's dirty log on.
    Others,
    /// Nobody, as far as can be seen.
    Unseen,
}

/// What made pages turn writable during an interval.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Regime {
    /// Nothing write-protects the VM's pages, as far as can be seen.
    Passive,
    /// We had every page write-protected at the start of the interval.
    Armed,
    /// Someone else has a dirty log switched on: a migration, most likely.
    Logged,
    /// We had every page write-protected with soft-dirty marks: with no help from the VM, and by whole mappings.
    SoftDirty,
    /// Nothing was protected: pages of a random sample were compared with themselves.
    Sampled,
}

impl Regime {
    /// Its name, as JSON has it.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Passive => "passive",
            Self::Armed => "armed",
            Self::Logged => "logged",
            Self::SoftDirty => "soft-dirty",
            Self::Sampled => "sampled",
        }
    }

    /// What the figures mean under this regime.
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Passive => {
                "lower bound: nothing write-protects the pages, so a page counts once when it is first mapped writable and \
                 never again, however often it is written; a page that was only read or executed may count too"
            }
            Self::Armed => {
                "pages were write-protected at the start of the interval: the unique pages are those that the guest wrote in \
                 it; pages that only devices or KVM itself wrote are not among them"
            }
            Self::Logged => {
                "someone else has a dirty log switched on (a migration?): a page counts once between two of its harvests; pages \
                 that only devices or KVM itself wrote are not among the unique ones"
            }
            Self::SoftDirty => {
                "every page was write-protected by the kernel's soft-dirty marks: the unique pages are those that anybody wrote in the \
                 interval, the VMM too, each at the granularity of the process's mapping (a write into one of 2 MiB marks all of it)"
            }
            Self::Sampled => {
                "an estimate with a 95 % interval from a random sample: pages whose content differs after the window, whoever wrote \
                 them; a page written with what it held already, or changed back, counts as not written"
            }
        }
    }

    /// Whether the true rate may be higher than the figure by any amount.
    pub const fn is_lower_bound(self) -> bool {
        matches!(self, Self::Passive)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_regimes_name_is_that_of_json() {
        for regime in [Regime::Passive, Regime::Armed, Regime::Logged, Regime::SoftDirty, Regime::Sampled] {
            assert_eq!(serde_json::to_value(regime).unwrap(), regime.word());
        }
    }
}
