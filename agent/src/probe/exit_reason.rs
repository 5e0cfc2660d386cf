//! Names of the reasons for which KVM returns to user space (`KVM_EXIT_*`, Linux 6.18 `include/uapi/linux/kvm.h`), and for which a processor
//! leaves guest code (`SVM_EXIT_*`, `EXIT_REASON_*`, `arch/x86/include/uapi/asm/{svm,vmx}.h`).

use dunlin_ebpf::EXIT_REASON_ERROR;

use super::layout::Backend;

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

/// AMD's, from 0x60 on.
const SVM: [&str; 0x30] = [
    "interrupt",
    "nmi",
    "smi",
    "init",
    "virtual-interrupt",
    "cr0-sel-write",
    "idtr-read",
    "gdtr-read",
    "ldtr-read",
    "tr-read",
    "idtr-write",
    "gdtr-write",
    "ldtr-write",
    "tr-write",
    "rdtsc",
    "rdpmc",
    "pushf",
    "popf",
    "cpuid",
    "rsm",
    "iret",
    "swint",
    "invd",
    "pause",
    "hlt",
    "invlpg",
    "invlpga",
    "io",
    "msr",
    "task-switch",
    "ferr-freeze",
    "shutdown",
    "vmrun",
    "vmmcall",
    "vmload",
    "vmsave",
    "stgi",
    "clgi",
    "skinit",
    "rdtscp",
    "icebp",
    "wbinvd",
    "monitor",
    "mwait",
    "mwait-cond",
    "xsetbv",
    "rdpru",
    "efer-write-trap",
];

/// Intel's; empty where it has none.
const VMX: [&str; 76] = [
    "exception-nmi",
    "external-interrupt",
    "triple-fault",
    "init",
    "sipi",
    "",
    "",
    "interrupt-window",
    "nmi-window",
    "task-switch",
    "cpuid",
    "",
    "hlt",
    "invd",
    "invlpg",
    "rdpmc",
    "rdtsc",
    "",
    "vmcall",
    "vmclear",
    "vmlaunch",
    "vmptrld",
    "vmptrst",
    "vmread",
    "vmresume",
    "vmwrite",
    "vmoff",
    "vmon",
    "cr-access",
    "dr-access",
    "io",
    "msr-read",
    "msr-write",
    "invalid-state",
    "msr-load-fail",
    "",
    "mwait",
    "monitor-trap-flag",
    "",
    "monitor",
    "pause",
    "mce-during-vmentry",
    "",
    "tpr-below-threshold",
    "apic-access",
    "eoi-induced",
    "gdtr-idtr",
    "ldtr-tr",
    "ept-violation",
    "ept-misconfig",
    "invept",
    "rdtscp",
    "preemption-timer",
    "invvpid",
    "wbinvd",
    "xsetbv",
    "apic-write",
    "rdrand",
    "invpcid",
    "vmfunc",
    "encls",
    "rdseed",
    "pml-full",
    "xsaves",
    "xrstors",
    "",
    "",
    "umwait",
    "tpause",
    "",
    "",
    "",
    "",
    "",
    "bus-lock",
    "notify",
];

/// The name of a processor's reason for leaving guest code.
pub(crate) fn guest(backend: Backend, reason: u32) -> String {
    if reason == EXIT_REASON_ERROR {
        return "unknown".to_owned();
    }
    let name = match backend {
        Backend::Svm => match reason {
            0x00..=0x0f => return format!("cr{}-read", reason & 0xf),
            0x10..=0x1f => return format!("cr{}-write", reason & 0xf),
            0x20..=0x2f => return format!("dr{}-read", reason & 0xf),
            0x30..=0x3f => return format!("dr{}-write", reason & 0xf),
            0x40..=0x5f => return format!("exception-{}", reason - 0x40),
            0x90..=0x9f => return format!("cr{}-write-trap", reason & 0xf),
            0xa2 => Some("invpcid"),
            0x400 => Some("npf"),
            0x401 => Some("avic-incomplete-ipi"),
            0x402 => Some("avic-unaccelerated"),
            0x403 => Some("vmgexit"),
            _ => reason.checked_sub(0x60).and_then(|index| SVM.get(index as usize).copied()),
        },
        // The upper half says how, not why.
        Backend::Vmx => VMX.get((reason & 0xffff) as usize).copied().filter(|name| !name.is_empty()),
        Backend::Other => None,
    };
    name.map_or_else(|| format!("exit-{reason:#x}"), ToOwned::to_owned)
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
        let all = [
            (0x400, "npf"),
            (0x78, "hlt"),
            (0x7b, "io"),
            (0x4e, "exception-14"),
            (0x8f, "efer-write-trap"),
            (0x999, "exit-0x999"),
        ];
        for (reason, name) in all {
            assert_eq!(guest(Backend::Svm, reason), name);
        }
        let all = [(48, "ept-violation"), (1 << 31 | 2, "triple-fault"), (12, "hlt"), (75, "notify"), (5, "exit-0x5")];
        for (reason, name) in all {
            assert_eq!(guest(Backend::Vmx, reason), name);
        }
    }
}
