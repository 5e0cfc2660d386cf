//! The rights of this very process, as the kernel has them (capabilities(7)).

/// Numbers of include/uapi/linux/capability.h.
pub const DAC_OVERRIDE: u32 = 1;
/// Reading and searching whatever its owner may.
pub const DAC_READ_SEARCH: u32 = 2;
/// Reading the memory of other processes.
pub const SYS_PTRACE: u32 = 19;
/// Nearly everything; the two of BPF too.
pub const SYS_ADMIN: u32 = 21;
/// Tracepoints and reading kernel memory by BPF.
pub const PERFMON: u32 = 38;
/// Loading BPF programs.
pub const BPF: u32 = 39;

/// A process's effective capabilities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Effective(u64);

impl Effective {
    /// Those of this process; none where `/proc` does not tell.
    pub fn own() -> Option<Self> {
        Self::parse(&std::fs::read_to_string("/proc/self/status").ok()?)
    }

    /// Those in the text of a `/proc/PID/status`.
    pub fn parse(status: &str) -> Option<Self> {
        let hex = status.lines().find_map(|line| line.strip_prefix("CapEff:"))?;
        u64::from_str_radix(hex.trim(), 16).ok().map(Self)
    }

    /// Whether the one of this number is among them.
    pub fn has(self, number: u32) -> bool {
        number < u64::BITS && self.0 >> number & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn they_are_read_by_number() {
        let of = |text: &str| Effective::parse(text).map(|own| own.has(BPF));
        assert_eq!(of("Name:\tx\nCapEff:\t0000008000000000\n"), Some(true));
        assert_eq!([of("CapEff:\t0000000000000001"), of("CapEff:\tx"), of("")], [Some(false), None, None]);
        assert!(Effective::own().is_some_and(|own| !own.has(64)));
    }
}
