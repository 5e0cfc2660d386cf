//! The outcome table: what fails × when → what is true then, as data.
//!
//! The documentation's table is printed from it, and the simulation (`crate::sim`) compares every faulted run with it.
//! Knows nothing of how anything is done.

use std::fmt;

use crate::model::Ending;

/// The single failures that the table speaks of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Failure {
    /// The source's manager dies.
    SourceManagerDies,
    /// The source's machine dies: a VM crash.
    SourceMachineDies,
    /// The target's manager dies.
    TargetManagerDies,
    /// The target's machine dies.
    TargetMachineDies,
    /// All connections are reset and the target stays unreachable.
    LinkCut,
    /// All connections are reset; dialling works again soon.
    LinkCutHeals,
    /// Nothing arrives any more, in one direction or both.
    LinkStalls,
    /// Nothing arrives for a while; then everything does.
    LinkStallHeals,
    /// The source's journal cannot be written.
    SourceDiskFull,
    /// The target's journal cannot be written.
    TargetDiskFull,
    /// An operator cancels, at either side.
    Cancelled,
}

/// How far the handover has come, by what the two journals hold. `prepared` is journaled ahead of time, and counts once the VM
/// is complete; only for the disk of the target's journal it counts at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Window {
    /// The target is not `prepared`.
    BeforePrepared,
    /// The target is `prepared`, the source has not journaled `released`.
    Prepared,
    /// The source has journaled `lent`, and not `released`: the VM runs at the target on loan, or is about to.
    Lent,
    /// The source has journaled `released`, the target has not journaled `owner`.
    Released,
    /// The target has journaled `owner`; the source does not know yet.
    Owned,
    /// The source knows that the VM runs at the target, and pages of it are still at the source.
    Owing,
    /// The source knows that the VM runs at the target.
    Done,
}

/// Where the VM is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Whereabouts {
    /// Its vCPUs run at the source.
    RunsAtSource,
    /// Its vCPUs run at the target.
    RunsAtTarget,
    /// Its vCPUs run at the target, and wait wherever they touch a page that is still at the source: `--recover` goes on with nothing lost.
    RunsOwing,
    /// It runs nowhere, but is complete somewhere: `dunlin resolve` makes it go on with nothing lost.
    Waits,
    /// Its only machine has died: a VM crash like any other.
    Crashed,
}

/// One row: a failure that strikes in a window, and everything that may be true when both managers have ended.
#[derive(Clone, Copy, Debug)]
pub struct Outcome {
    /// What fails.
    pub failure: Failure,
    /// How far the handover has come as it strikes.
    pub when: Window,
    /// How the source's manager says that it ended (`None`: it died or never reached the target), and where the VM is.
    pub ends: &'static [(Option<Ending>, Whereabouts)],
    /// Whether the target may be left with a prepared copy of a VM that goes on at the source.
    pub copy_may_wait: bool,
    /// What the operator sees and does.
    pub operator: &'static str,
}

const REFUSED: (Option<Ending>, Whereabouts) = (Some(Ending::Refused), Whereabouts::RunsAtSource);
const FAILED: (Option<Ending>, Whereabouts) = (Some(Ending::Failed), Whereabouts::RunsAtSource);
const CANCELLED: (Option<Ending>, Whereabouts) = (Some(Ending::Cancelled), Whereabouts::RunsAtSource);
const NOT_STARTED: (Option<Ending>, Whereabouts) = (None, Whereabouts::RunsAtSource);
const MOVED: (Option<Ending>, Whereabouts) = (Some(Ending::Moved), Whereabouts::RunsAtTarget);
const MOVED_THEN_CRASHED: (Option<Ending>, Whereabouts) = (Some(Ending::Moved), Whereabouts::Crashed);
const LOST: (Option<Ending>, Whereabouts) = (Some(Ending::Lost), Whereabouts::Crashed);
const WAITS: (Option<Ending>, Whereabouts) = (Some(Ending::InDoubt), Whereabouts::Waits);
const UNHEARD: (Option<Ending>, Whereabouts) = (Some(Ending::InDoubt), Whereabouts::RunsAtTarget);
const UNMANAGED_AT_SOURCE: (Option<Ending>, Whereabouts) = (None, Whereabouts::RunsAtSource);
const UNMANAGED_AT_TARGET: (Option<Ending>, Whereabouts) = (None, Whereabouts::RunsAtTarget);
const UNMANAGED_WAITS: (Option<Ending>, Whereabouts) = (None, Whereabouts::Waits);
const OWING: (Option<Ending>, Whereabouts) = (Some(Ending::InDoubt), Whereabouts::RunsOwing);
const UNMANAGED_OWING: (Option<Ending>, Whereabouts) = (None, Whereabouts::RunsOwing);

const fn row(
    failure: Failure,
    when: Window,
    ends: &'static [(Option<Ending>, Whereabouts)],
    copy_may_wait: bool,
    operator: &'static str,
) -> Outcome {
    Outcome { failure, when, ends, copy_may_wait, operator }
}

const TRY_AGAIN: &str = "The VM runs at the source; nothing is left at the target. Try again.";
const LET_COPY_GO: &str = "The VM runs at the source. A copy that waits at the target must not run: \
                           `dunlin resolve N --owner there` on the target lets it go.";
const RESOLVE: &str = "In doubt: look at the target. If it holds the VM, `dunlin resolve N --owner here` on it and \
                       `--owner there` on the source; if its journal says never-owner, `--owner here` on the source.";
const FREE_SOURCE: &str = "The VM runs at the target. What stands at the source is let go by `dunlin resolve N --owner \
                           there` on the source.";
const NOTHING: &str = "Nothing: the VM runs at the target.";

use Failure::{
    Cancelled, LinkCut, LinkCutHeals, LinkStallHeals, LinkStalls, SourceDiskFull, SourceMachineDies, SourceManagerDies,
    TargetDiskFull, TargetMachineDies, TargetManagerDies,
};
use Window::{BeforePrepared, Done, Lent, Owing, Owned, Prepared, Released};

/// The table. Every pair of failure and window has exactly one row.
pub const OUTCOMES: &[Outcome] = &[
    row(SourceManagerDies, BeforePrepared, &[UNMANAGED_AT_SOURCE], true, LET_COPY_GO),
    row(SourceManagerDies, Prepared, &[UNMANAGED_AT_SOURCE, UNMANAGED_WAITS], true, RESOLVE),
    row(SourceManagerDies, Released, &[UNMANAGED_WAITS, UNMANAGED_AT_TARGET], false, RESOLVE),
    row(SourceManagerDies, Owned, &[UNMANAGED_AT_TARGET], false, FREE_SOURCE),
    row(SourceManagerDies, Done, &[UNMANAGED_AT_TARGET, MOVED], false, FREE_SOURCE),
    row(
        SourceMachineDies,
        BeforePrepared,
        &[LOST, MOVED],
        false,
        "A VM crash like any other, unless the state had been handed over: then the target completes it.",
    ),
    row(SourceMachineDies, Prepared, &[MOVED], false, NOTHING),
    row(SourceMachineDies, Released, &[MOVED], false, NOTHING),
    row(SourceMachineDies, Owned, &[MOVED], false, NOTHING),
    row(SourceMachineDies, Done, &[MOVED], false, NOTHING),
    row(TargetManagerDies, BeforePrepared, &[FAILED, NOT_STARTED], true, LET_COPY_GO),
    row(TargetManagerDies, Prepared, &[FAILED, WAITS], true, RESOLVE),
    row(TargetManagerDies, Released, &[WAITS, UNHEARD], false, RESOLVE),
    row(TargetManagerDies, Owned, &[MOVED, UNHEARD], false, FREE_SOURCE),
    row(TargetManagerDies, Done, &[MOVED], false, NOTHING),
    row(TargetMachineDies, BeforePrepared, &[FAILED], false, TRY_AGAIN),
    row(TargetMachineDies, Prepared, &[FAILED], false, TRY_AGAIN),
    row(TargetMachineDies, Released, &[FAILED], false, TRY_AGAIN),
    row(
        TargetMachineDies,
        Owned,
        &[FAILED, MOVED_THEN_CRASHED],
        false,
        "If the guest had not run there yet it runs at the source again; else a VM crash at the target.",
    ),
    row(TargetMachineDies, Done, &[MOVED_THEN_CRASHED], false, "A VM crash at the target like any other."),
    row(LinkCut, BeforePrepared, &[FAILED, NOT_STARTED], true, LET_COPY_GO),
    row(LinkCut, Prepared, &[FAILED, WAITS], true, RESOLVE),
    row(LinkCut, Released, &[WAITS, UNHEARD], false, RESOLVE),
    row(LinkCut, Owned, &[MOVED, UNHEARD], false, FREE_SOURCE),
    row(LinkCut, Done, &[MOVED], false, NOTHING),
    row(LinkCutHeals, BeforePrepared, &[FAILED, NOT_STARTED], false, TRY_AGAIN),
    row(LinkCutHeals, Prepared, &[FAILED, MOVED], false, "Nothing: the managers settle it by themselves."),
    row(LinkCutHeals, Released, &[MOVED], false, NOTHING),
    row(LinkCutHeals, Owned, &[MOVED], false, NOTHING),
    row(LinkCutHeals, Done, &[MOVED], false, NOTHING),
    row(LinkStalls, BeforePrepared, &[FAILED, NOT_STARTED, WAITS], true, RESOLVE),
    row(LinkStalls, Prepared, &[FAILED, WAITS, UNHEARD], true, RESOLVE),
    row(LinkStalls, Released, &[WAITS, UNHEARD, MOVED], false, RESOLVE),
    row(LinkStalls, Owned, &[MOVED, UNHEARD], false, FREE_SOURCE),
    row(LinkStalls, Done, &[MOVED], false, NOTHING),
    row(LinkStallHeals, BeforePrepared, &[FAILED, NOT_STARTED, MOVED], false, TRY_AGAIN),
    row(LinkStallHeals, Prepared, &[FAILED, MOVED], false, "Nothing: the managers settle it by themselves."),
    row(LinkStallHeals, Released, &[MOVED], false, NOTHING),
    row(LinkStallHeals, Owned, &[MOVED], false, NOTHING),
    row(LinkStallHeals, Done, &[MOVED], false, NOTHING),
    row(SourceDiskFull, BeforePrepared, &[FAILED, NOT_STARTED], false, TRY_AGAIN),
    row(SourceDiskFull, Prepared, &[FAILED, MOVED], false, "Make room on the source. Where the VM runs is certain."),
    row(SourceDiskFull, Released, &[MOVED], false, FREE_SOURCE),
    row(SourceDiskFull, Owned, &[MOVED], false, FREE_SOURCE),
    row(SourceDiskFull, Done, &[MOVED], false, FREE_SOURCE),
    row(TargetDiskFull, BeforePrepared, &[REFUSED, FAILED], false, TRY_AGAIN),
    row(
        TargetDiskFull,
        Prepared,
        &[WAITS],
        false,
        "The target can neither take nor give back the VM: make room there, then `dunlin resolve N --owner here` on it.",
    ),
    row(
        TargetDiskFull,
        Released,
        &[WAITS, MOVED],
        false,
        "The target can neither take nor give back the VM: make room there, then `dunlin resolve N --owner here` on it.",
    ),
    row(TargetDiskFull, Owned, &[MOVED], false, NOTHING),
    row(TargetDiskFull, Done, &[MOVED], false, NOTHING),
    row(Cancelled, BeforePrepared, &[CANCELLED, FAILED, MOVED], false, "The report says whether it came in time."),
    row(Cancelled, Prepared, &[CANCELLED, MOVED], false, "The report says whether it came in time."),
    row(Cancelled, Released, &[MOVED], false, "It came too late: the VM runs at the target."),
    row(Cancelled, Owned, &[MOVED], false, "It came too late: the VM runs at the target."),
    row(Cancelled, Done, &[MOVED], false, "It came too late: the VM runs at the target."),
];

const RECOVER: &str = "The VM runs at the target, or is about to, and waits where it touches a page that is still at the source. See to the \
                       link, start `dunlin vm receive --recover N` there if its manager is gone, then `dunlin migrate N --recover`.";
const DIED_THERE: &str = "A VM crash at the target. What stands at the source is the VM as it was before it moved.";

/// Where the VM runs before its memory is there (`demand-paging`, `post-copy`, `hybrid`): the rows that are other than those of [`OUTCOMES`], and those of the window that
/// only such a migration has.
pub const OWING_OUTCOMES: &[Outcome] = &[
    row(SourceManagerDies, Released, &[UNMANAGED_WAITS, UNMANAGED_OWING, UNMANAGED_AT_TARGET], false, RECOVER),
    row(TargetManagerDies, Released, &[WAITS, OWING, UNHEARD], false, RECOVER),
    row(LinkCut, Released, &[WAITS, OWING, UNHEARD], false, RECOVER),
    row(LinkStalls, Prepared, &[FAILED, WAITS, OWING, UNHEARD], true, RECOVER),
    row(LinkStalls, Released, &[WAITS, OWING, UNHEARD, MOVED], false, RECOVER),
    row(SourceManagerDies, Owned, &[UNMANAGED_OWING, UNMANAGED_AT_TARGET], false, RECOVER),
    row(TargetManagerDies, Owned, &[OWING, UNHEARD, MOVED], false, RECOVER),
    row(
        TargetMachineDies,
        Owned,
        &[FAILED, LOST, MOVED_THEN_CRASHED],
        false,
        "If the guest had not run there yet it runs at the source again; else a VM crash at the target.",
    ),
    row(LinkCut, Owned, &[OWING, UNHEARD, MOVED], false, RECOVER),
    row(LinkStalls, Owned, &[OWING, UNHEARD, MOVED], false, RECOVER),
    row(SourceManagerDies, Owing, &[UNMANAGED_OWING, UNMANAGED_AT_TARGET, MOVED], false, RECOVER),
    row(SourceMachineDies, Owing, &[MOVED], false, "Nothing: the source's manager holds its memory, and goes on."),
    row(TargetManagerDies, Owing, &[OWING, UNHEARD, MOVED], false, RECOVER),
    row(TargetMachineDies, Owing, &[LOST, MOVED_THEN_CRASHED], false, DIED_THERE),
    row(LinkCut, Owing, &[OWING, UNHEARD, MOVED], false, RECOVER),
    row(LinkCutHeals, Owing, &[MOVED], false, "Nothing: the managers go on over another connection."),
    row(LinkStalls, Owing, &[OWING, UNHEARD, MOVED], false, RECOVER),
    row(LinkStallHeals, Owing, &[MOVED], false, "Nothing: the managers go on."),
    row(SourceDiskFull, Owing, &[MOVED], false, FREE_SOURCE),
    row(TargetDiskFull, Owing, &[MOVED], false, NOTHING),
    row(Cancelled, Owing, &[MOVED], false, "It came too late: the VM runs at the target."),
    // All is there, and the source may not have heard it.
    row(TargetManagerDies, Done, &[MOVED, UNHEARD], false, FREE_SOURCE),
    row(LinkCut, Done, &[MOVED, UNHEARD], false, FREE_SOURCE),
    row(LinkStalls, Done, &[MOVED, UNHEARD], false, FREE_SOURCE),
];

const GOES_ON_HERE: &str = "The VM runs at the source, from the last increment; what it did since nobody has seen.";
const GOES_ON_HERE_COPY: &str = "The VM runs at the source, from the last increment. A copy that waits at the target must not run: `dunlin resolve N --owner there` on the target lets it go.";
const LEND_ON: &str = "The VM stands where its loan ended. `dunlin migrate N --recover` goes on with the loan, or takes the VM back if the target cannot be reached.";

/// Under `--safe-post-copy`: the rows of the window that only such a migration has. What strikes before it ends as in [`OUTCOMES`], what strikes behind it too: from `released` on all is there.
pub const LENT_OUTCOMES: &[Outcome] = &[
    row(SourceManagerDies, Lent, &[UNMANAGED_WAITS], false, LEND_ON),
    row(
        SourceMachineDies,
        Lent,
        &[MOVED],
        false,
        "Nothing: the loan becomes a gift, and what is owed follows from the source's manager.",
    ),
    row(TargetManagerDies, Lent, &[FAILED], true, GOES_ON_HERE_COPY),
    row(TargetMachineDies, Lent, &[FAILED], false, GOES_ON_HERE),
    row(LinkCut, Lent, &[FAILED], true, GOES_ON_HERE_COPY),
    row(
        LinkCutHeals,
        Lent,
        &[MOVED, FAILED],
        false,
        "Nothing: the loan goes on over another connection, or the VM runs at the source again.",
    ),
    row(LinkStalls, Lent, &[FAILED], true, GOES_ON_HERE_COPY),
    row(
        LinkStallHeals,
        Lent,
        &[MOVED, FAILED],
        false,
        "Nothing: the loan goes on, or the VM runs at the source again.",
    ),
    row(
        SourceDiskFull,
        Lent,
        &[WAITS],
        false,
        "The VM stands where its loan ended: make room at the source, then `dunlin migrate N --recover`.",
    ),
    row(
        TargetDiskFull,
        Lent,
        &[WAITS],
        false,
        "The target can neither take nor give back the VM: make room there, then `dunlin resolve N --owner here` on it.",
    ),
    row(Cancelled, Lent, &[CANCELLED, FAILED, MOVED], false, GOES_ON_HERE),
];

/// The row for a failure that strikes in a window of a migration by `--safe-post-copy`.
pub fn outcome_lent(failure: Failure, when: Window) -> Option<&'static Outcome> {
    LENT_OUTCOMES.iter().find(|row| row.failure == failure && row.when == when).or_else(|| outcome(failure, when))
}

/// The row for a failure that strikes in a window of a migration whose VM runs before its memory is there.
pub fn outcome_owing(failure: Failure, when: Window) -> Option<&'static Outcome> {
    OWING_OUTCOMES.iter().find(|row| row.failure == failure && row.when == when).or_else(|| outcome(failure, when))
}

/// The row for a failure that strikes in a window.
pub fn outcome(failure: Failure, when: Window) -> Option<&'static Outcome> {
    OUTCOMES.iter().find(|row| row.failure == failure && row.when == when)
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SourceManagerDies => "the source's manager dies",
            Self::SourceMachineDies => "the source's machine dies",
            Self::TargetManagerDies => "the target's manager dies",
            Self::TargetMachineDies => "the target's machine dies",
            Self::LinkCut => "the link is cut for good",
            Self::LinkCutHeals => "the link is cut and soon works again",
            Self::LinkStalls => "the link stalls for good",
            Self::LinkStallHeals => "the link stalls for a while",
            Self::SourceDiskFull => "the source's disk is full",
            Self::TargetDiskFull => "the target's disk is full",
            Self::Cancelled => "an operator cancels",
        })
    }
}

impl fmt::Display for Window {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::BeforePrepared => "before `prepared`",
            Self::Prepared => "from `prepared` on",
            Self::Lent => "from `lent` on",
            Self::Released => "from `released` on",
            Self::Owned => "from `owner` on",
            Self::Owing => "after `running`, owing pages",
            Self::Done => "after `running`",
        })
    }
}

impl fmt::Display for Whereabouts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RunsAtSource => "runs at the source",
            Self::RunsAtTarget => "runs at the target",
            Self::RunsOwing => "runs at the target, is owed pages",
            Self::Waits => "complete, runs nowhere",
            Self::Crashed => "crashed",
        })
    }
}

/// One of the tables in Markdown, for the documentation.
pub fn markdown(rows: &[Outcome]) -> String {
    let mut text =
        "| failure | when | `dunlin migrate` exits with | the VM | operator |\n|---|---|---|---|---|\n".to_owned();
    for row in rows {
        let exit = |ending: Option<Ending>| ending.map_or("-".to_owned(), |ending| ending.exit_code().to_string());
        let ends: Vec<_> = row.ends.iter().map(|&(ending, vm)| (exit(ending), vm.to_string())).collect();
        let exits: Vec<_> = ends.iter().map(|(exit, _)| exit.as_str()).collect();
        let places: Vec<_> = ends.iter().map(|(_, place)| place.as_str()).collect();
        let (exits, places) = (exits.join(" or "), places.join(" or "));
        text += &format!("| {} | {} | {exits} | {places} | {} |\n", row.failure, row.when, row.operator);
    }
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn every_failure_has_one_row_in_every_window() {
        let pairs: BTreeSet<_> = OUTCOMES.iter().map(|row| (row.failure, row.when)).collect();
        assert_eq!(pairs.len(), OUTCOMES.len(), "a row is there twice");
        let failures: BTreeSet<_> = OUTCOMES.iter().map(|row| row.failure).collect();
        assert_eq!(pairs.len(), failures.len() * 5, "a window is missing");
        assert_eq!(markdown(OUTCOMES).lines().count(), OUTCOMES.len() + 2);
        let owing: BTreeSet<_> = OWING_OUTCOMES.iter().map(|row| (row.failure, row.when)).collect();
        assert_eq!(owing.len(), OWING_OUTCOMES.len(), "a row is there twice");
        assert!(failures.iter().all(|&failure| owing.contains(&(failure, Owing))), "a row is missing");
    }
}
