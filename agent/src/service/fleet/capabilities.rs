//! Which rights of this process are missing, by name.

/// CAP_SYS_ADMIN holds the two of BPF too (capabilities(7)).
const SYS_ADMIN: u32 = 21;
/// `/proc/PID/fd` is its owner's alone (fs/proc/fd.c), whatever may be traced.
const DAC_READ_SEARCH: u32 = 2;
const DAC_OVERRIDE: u32 = 1;
/// Number (include/uapi/linux/capability.h), name, and whether CAP_SYS_ADMIN does as well.
const NEEDED: [(u32, &str, bool); 3] =
    [(39, "CAP_BPF", true), (38, "CAP_PERFMON", true), (19, "CAP_SYS_PTRACE", false)];

/// The names of those that a fleet needs and this process has not. None also where `/proc` does not tell: then trying shows.
pub(super) fn missing() -> Vec<&'static str> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    missing_of(&status)
}

/// Warns of what costs figures, but not the fleet.
pub(super) fn warn() {
    let root = rustix::process::geteuid().is_root();
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    if !root && effective(&status).is_some_and(|bits| bits & (1 << DAC_READ_SEARCH | 1 << DAC_OVERRIDE) == 0) {
        tracing::warn!(
            "VMs of other users are not seen: the descriptors of their processes can be listed only with CAP_DAC_READ_SEARCH, or as root"
        );
    }
}

fn effective(status: &str) -> Option<u64> {
    let hex = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
    u64::from_str_radix(hex.trim(), 16).ok()
}

fn missing_of(status: &str) -> Vec<&'static str> {
    let Some(bits) = effective(status) else { return Vec::new() };
    let has = |number: u32| bits >> number & 1 == 1;
    let granted = |&(number, _, admin): &(u32, &str, bool)| has(number) || admin && has(SYS_ADMIN);
    NEEDED.iter().filter(|needed| !granted(needed)).map(|&(_, name, _)| name).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        let with = |bits: u64| missing_of(&format!("Name:\tx\nCapEff:\t{bits:016x}\n"));
        assert_eq!(with(0), ["CAP_BPF", "CAP_PERFMON", "CAP_SYS_PTRACE"]);
        assert_eq!(with(1 << 39 | 1 << 38 | 1 << 19), [""; 0]);
        assert_eq!(with(1 << SYS_ADMIN), ["CAP_SYS_PTRACE"]);
        assert_eq!(missing_of("nonsense"), [""; 0]);
    }
}
