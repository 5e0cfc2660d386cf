//! The outcome table: what fails × when → what is true then, as data.
//!
//! The documentation's table is printed from it, and the simulation ([`crate::sim`]) compares every faulted run with it.
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

/// How far the handover has come, by what the two journals hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Window {
    /// The target has not journaled `prepared`.
    BeforePrepared,
    /// The target has journaled `prepared`, the source has not journaled `released`.
    Prepared,
    /// The source has journaled `released`, the target has not journaled `owner`.
    Released,
    /// The target has journaled `owner`; the source does not know yet.
    Owned,
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
    /// It runs nowhere, but is complete somewhere: `dunlin resolve` makes it go on with nothing lost.
    Waits,
    /// Its only machine has died: a VM crash like any other.
    Crashed,
}
