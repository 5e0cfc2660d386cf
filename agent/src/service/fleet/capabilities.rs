//! Which rights of this process are missing, by name.

use crate::trial::capabilities::{BPF, DAC_OVERRIDE, DAC_READ_SEARCH, Effective, PERFMON, SYS_ADMIN, SYS_PTRACE};

/// Number, name, and whether CAP_SYS_ADMIN does as well.
const NEEDED: [(u32, &str, bool); 3] =
    [(BPF, "CAP_BPF", true), (PERFMON, "CAP_PERFMON", true), (SYS_PTRACE, "CAP_SYS_PTRACE", false)];

/// The names of those that a fleet needs and this process has not. None also where `/proc` does not tell: then trying shows.
pub(super) fn missing() -> Vec<&'static str> {
    missing_of(Effective::own())
}

/// Warns of what costs figures, but not the fleet.
pub(super) fn warn() {
    // `/proc/PID/fd` is its owner's alone (fs/proc/fd.c), whatever may be traced.
    let root = rustix::process::geteuid().is_root();
    if !root && Effective::own().is_some_and(|own| !own.has(DAC_READ_SEARCH) && !own.has(DAC_OVERRIDE)) {
        tracing::warn!(
            "VMs of other users are not seen: the descriptors of their processes can be listed only with CAP_DAC_READ_SEARCH, or as root"
        );
    }
}

fn missing_of(own: Option<Effective>) -> Vec<&'static str> {
    let Some(own) = own else { return Vec::new() };
    let granted = |&(number, _, admin): &(u32, &str, bool)| own.has(number) || admin && own.has(SYS_ADMIN);
    NEEDED.iter().filter(|needed| !granted(needed)).map(|&(_, name, _)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let with = |bits: u64| missing_of(Effective::parse(&format!("Name:\tx\nCapEff:\t{bits:016x}\n")));
        assert_eq!(with(0), ["CAP_BPF", "CAP_PERFMON", "CAP_SYS_PTRACE"]);
        assert_eq!(with(1 << 39 | 1 << 38 | 1 << 19), [""; 0]);
        assert_eq!(with(1 << SYS_ADMIN), ["CAP_SYS_PTRACE"]);
        assert_eq!(missing_of(None), [""; 0]);
    }
}
