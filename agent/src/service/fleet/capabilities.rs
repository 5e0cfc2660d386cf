//! Which rights of this process are missing, by name.

/// CAP_SYS_ADMIN holds the two of BPF too (capabilities(7)).
const SYS_ADMIN: u32 = 21;
/// Number (include/uapi/linux/capability.h), name, and whether CAP_SYS_ADMIN does as well.
const NEEDED: [(u32, &str, bool); 3] =
    [(39, "CAP_BPF", true), (38, "CAP_PERFMON", true), (19, "CAP_SYS_PTRACE", false)];

/// The names of those that a fleet needs and this process has not. None also where `/proc` does not tell: then trying shows.
pub(super) fn missing() -> Vec<&'static str> {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    missing_of(&status)
}

fn missing_of(status: &str) -> Vec<&'static str> {
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let Some(bits) = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()) else { return Vec::new() };
    let has = |number: u32| bits >> number & 1 == 1;
    let lacks = |&(number, _, admin): &(u32, &str, bool)| !has(number) && !(admin && has(SYS_ADMIN));
    NEEDED.iter().filter(|needed| lacks(needed)).map(|&(_, name, _)| name).collect()
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
