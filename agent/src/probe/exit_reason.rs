//! Names of the reasons for which KVM returns to user space (`KVM_EXIT_*`, Linux 6.18 `include/uapi/linux/kvm.h`).

use dunlin_ebpf::EXIT_REASON_ERROR;

/// The names, by number; empty where x86 has none.
const NAMES: [&str; 40] = [
    "unknown",
    "exception",
    "io",
    "hypercall",
    "debug",
    "halt",
    "mmio",
    "irq-window-open",
    "shutdown",
    "fail-entry",
    "interrupted",
    "set-tpr",
    "tpr-access",
    "s390-sieic",
    "s390-reset",
    "dcr",
    "nmi",
    "internal-error",
    "osi",
    "papr-hypercall",
    "s390-ucontrol",
    "watchdog",
    "s390-tsch",
    "epr",
    "system-event",
    "s390-stsi",
    "ioapic-eoi",
    "hyperv",
    "arm-nisv",
    "x86-rdmsr",
    "x86-wrmsr",
    "dirty-ring-full",
    "ap-reset-hold",
    "x86-bus-lock",
    "xen",
    "riscv-sbi",
    "riscv-csr",
    "notify",
    "loongarch-iocsr",
    "memory-fault",
];

/// The name of a reason; `exit-N` for one that this version does not know.
pub(crate) fn name(reason: u32) -> String {
    match NAMES.get(reason as usize) {
        Some(&name) => name.to_owned(),
        None if reason == EXIT_REASON_ERROR => "error".to_owned(),
        None => format!("exit-{reason}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_have_the_numbers_of_the_kernel() {
        assert_eq!(name(kvm_bindings::KVM_EXIT_MMIO), "mmio");
        assert_eq!(name(kvm_bindings::KVM_EXIT_INTR), "interrupted");
        assert_eq!(name(kvm_bindings::KVM_EXIT_DIRTY_RING_FULL), "dirty-ring-full");
        assert_eq!(name(kvm_bindings::KVM_EXIT_MEMORY_FAULT), "memory-fault");
        assert_eq!(name(EXIT_REASON_ERROR), "error");
        assert_eq!(name(999), "exit-999");
    }
}
