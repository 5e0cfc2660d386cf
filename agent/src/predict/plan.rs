//! The ways of moving a VM that are predicted, who has them, and the commands that ask for them.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::Asked;
use crate::model::BytesPerSecond;

/// A way of moving a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Plan {
    /// The VM stands while everything moves once.
    StopAndCopy,
    /// Rounds while the VM runs, a short pause for the rest (Clark et al., NSDI 2005).
    PreCopy,
    /// The same, its writers held to what lets rounds end.
    PreCopyStun,
    /// The same, and if rounds do not end what is left follows the VM.
    PreCopyPostCopy,
    /// Rounds, one if no more are asked for, then as with post-copy.
    Hybrid,
    /// The VM runs at the target at once; pages are pushed, and fetched when they are needed sooner (Hines and Gopalan, VEE 2009).
    PostCopy,
    /// The same without pushing: pages come when they are needed.
    DemandPaging,
    /// QEMU's own pre-copy.
    QemuPreCopy,
    /// QEMU's own, all vCPUs slowed alike and ever more until it ends.
    QemuAutoConverge,
    /// QEMU's own: one round, then post-copy.
    QemuPostCopy,
}

/// Who would move the VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mover {
    /// Dunlin, which runs it.
    Dunlin,
    /// QEMU, which runs it.
    Qemu,
    /// A VMM of which nothing is known.
    Unknown,
}

impl Mover {
    /// The ways that are predicted for a VM of this kind; of two that serve equally the first is taken.
    pub(super) const fn plans(self) -> &'static [Plan] {
        match self {
            Self::Dunlin | Self::Unknown => &[
                Plan::StopAndCopy,
                Plan::PreCopy,
                Plan::PreCopyStun,
                Plan::PreCopyPostCopy,
                Plan::Hybrid,
                Plan::PostCopy,
                Plan::DemandPaging,
            ],
            Self::Qemu => &[Plan::QemuPreCopy, Plan::QemuAutoConverge, Plan::QemuPostCopy],
        }
    }

    /// Whether it can be moved today.
    pub(super) const fn can_move(self) -> bool {
        !matches!(self, Self::Unknown)
    }
}

impl Plan {
    /// Whether the VM is lost with either host until all of its memory has followed it.
    pub const fn can_lose_the_vm(self) -> bool {
        matches!(self, Self::PreCopyPostCopy | Self::Hybrid | Self::PostCopy | Self::DemandPaging | Self::QemuPostCopy)
    }

    /// Its word, as in JSON.
    pub const fn word(self) -> &'static str {
        match self {
            Self::StopAndCopy => "stop-and-copy",
            Self::PreCopy => "pre-copy",
            Self::PreCopyStun => "pre-copy-stun",
            Self::PreCopyPostCopy => "pre-copy-post-copy",
            Self::Hybrid => "hybrid",
            Self::PostCopy => "post-copy",
            Self::DemandPaging => "demand-paging",
            Self::QemuPreCopy => "qemu-pre-copy",
            Self::QemuAutoConverge => "qemu-auto-converge",
            Self::QemuPostCopy => "qemu-post-copy",
        }
    }

    /// What to type for it: commands that are given one after the other, with the target's address left open.
    pub fn commands(self, vm: &str, bandwidth: BytesPerSecond, downtime: Duration, asked: &Asked) -> Vec<String> {
        let downtime_ms = downtime.as_millis().max(1);
        let dunlin = |how: &str| {
            let rate = asked.least.map_or_else(String::new, |least| rate(least) + "..") + &rate(bandwidth);
            vec![format!(
                "dunlin migrate {vm} --to tcp://TARGET:PORT --bandwidth {rate} --downtime {downtime_ms}ms {how}"
            )]
        };
        // `--bandwidth` is in MiB/s; the downtime is set beside the migration.
        let mebibytes = (bandwidth.0 >> 20).max(1);
        let virsh = |how: &str| {
            vec![
                format!("virsh migrate --live --bandwidth {mebibytes}{how} {vm} qemu+ssh://TARGET/system"),
                format!("virsh migrate-setmaxdowntime {vm} {downtime_ms}"),
            ]
        };
        match self {
            Self::StopAndCopy => dunlin("--strategy stop-and-copy"),
            Self::PreCopy => dunlin("--strategy pre-copy"),
            Self::PreCopyStun => dunlin("--strategy pre-copy --on-stuck stun"),
            Self::PreCopyPostCopy => dunlin("--strategy pre-copy --on-stuck post-copy"),
            Self::QemuPreCopy => virsh(""),
            Self::QemuAutoConverge => virsh(" --auto-converge"),
            Self::QemuPostCopy => virsh(" --postcopy --postcopy-after-precopy"),
            Self::Hybrid if asked.hybrid_rounds == 1 => dunlin("--strategy hybrid"),
            Self::Hybrid => dunlin(&format!("--strategy hybrid --hybrid-rounds {}", asked.hybrid_rounds)),
            Self::PostCopy => dunlin("--strategy post-copy"),
            Self::DemandPaging => dunlin("--strategy demand-paging"),
        }
    }
}

/// A bandwidth as `--bandwidth` reads it, exactly.
fn rate(bandwidth: BytesPerSecond) -> String {
    let units = [(125_000_000, "Gbit"), (125_000, "Mbit"), (1 << 20, "MiB/s"), (1, "B/s")];
    let found = units.into_iter().find(|(bytes, _)| bandwidth.0.is_multiple_of(*bytes));
    found.map_or_else(String::new, |(bytes, unit)| format!("{}{unit}", bandwidth.0 / bytes))
}

impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::StopAndCopy => "stop-and-copy",
            Self::PreCopy => "pre-copy",
            Self::PreCopyStun => "pre-copy, stun",
            Self::PreCopyPostCopy => "pre-copy, post-copy",
            Self::Hybrid => "hybrid",
            Self::PostCopy => "post-copy",
            Self::DemandPaging => "demand-paging",
            Self::QemuPreCopy => "QEMU pre-copy",
            Self::QemuAutoConverge => "QEMU auto-converge",
            Self::QemuPostCopy => "QEMU post-copy",
        })
    }
}
