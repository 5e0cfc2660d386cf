//! The six stages of a migration (Clark et al., NSDI 2005, §4.1; the lecture's "6 steps"), and the finer steps at which
//! events are logged, faults injected and blackout accounted.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The six stages, one state machine for every strategy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Stage 0: the VM is named, the target is reached, versions are agreed.
    PreMigration,
    /// Stage 1: the target has set aside memory, devices and streams, or refused.
    Reservation,
    /// Stage 2: memory flows while the VM runs.
    IterativePreCopy,
    /// Stage 3: the VM is paused; the last pages and the state flow.
    StopAndCopy,
    /// Stage 4: the target holds a complete VM (`prepared`); the source gives it up (`released`).
    Commitment,
    /// Stage 5: the target owns the VM, announces it, runs it.
    Activation,
}

impl Stage {
    /// All stages in order.
    pub const ALL: [Self; 6] = [
        Self::PreMigration,
        Self::Reservation,
        Self::IterativePreCopy,
        Self::StopAndCopy,
        Self::Commitment,
        Self::Activation,
    ];
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::PreMigration => "pre-migration",
            Self::Reservation => "reservation",
            Self::IterativePreCopy => "iterative-pre-copy",
            Self::StopAndCopy => "stop-and-copy",
            Self::Commitment => "commitment",
            Self::Activation => "activation",
        })
    }
}

macro_rules! steps {
    ($($(#[$doc:meta])* $variant:ident = $text:literal in $stage:ident;)*) => {
        /// A point that a manager passes. Each is an event in the log; tests hold a manager at one to kill it there.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum Step { $($(#[$doc])* $variant,)* }

        impl Step {
            /// All steps, in the order in which a migration passes them.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The stage that the step belongs to.
            pub const fn stage(self) -> Stage {
                match self { $(Self::$variant => Stage::$stage,)* }
            }

            /// The step's name as it is written in logs and given to `--hold-at`.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    };
}

steps! {
    /// Source: connected, nothing offered yet. Target: a peer has connected.
    Connected = "connected" in PreMigration;
    /// The machine's shape was offered.
    Offered = "offered" in PreMigration;
    /// The target's machine exists and waits; every stream is open.
    Reserved = "reserved" in Reservation;
    /// A round of pages begins (the guest runs).
    Round = "round" in IterativePreCopy;
    /// The vCPUs are stopped and the devices drained.
    Paused = "paused" in StopAndCopy;
    /// The last pages and the state were sent (source) or received (target).
    StateMoved = "state-moved" in StopAndCopy;
    /// The target holds a complete VM and has journaled it.
    Prepared = "prepared" in Commitment;
    /// The source has journaled that the VM is on loan (source), or it runs on loan (target): `--safe-post-copy`.
    Lent = "lent" in Commitment;
    /// The source has journaled that it never resumes by itself.
    Released = "released" in Commitment;
    /// The target has journaled that it owns the VM.
    Owned = "owned" in Activation;
    /// The first announcement has left.
    Announced = "announced" in Activation;
    /// The guest runs at the target.
    Running = "running" in Activation;
    /// The source has let go of everything.
    Discarded = "discarded" in Activation;
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Step {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.iter().copied().find(|step| step.name() == text).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|step| step.name()).collect();
            format!("`{text}` is no step; one of {}", names.join(", "))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_follow_the_stages() {
        assert!(Step::ALL.is_sorted_by_key(|step| step.stage()));
        for &step in Step::ALL {
            assert_eq!(step.name().parse(), Ok(step));
        }
        for stage in Stage::ALL {
            assert!(Step::ALL.iter().any(|step| step.stage() == stage), "{stage} has no step");
        }
    }
}
