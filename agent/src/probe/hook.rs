//! The attach plan: which program goes where, what it gives, and what can be done without. The loader, `dunlin doctor` and the
//! metrics read this one table.

use dunlin_ebpf::program;

/// How a program is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attach {
    /// As a raw tracepoint: works for a built-in and for a modular KVM, and needs no tracefs.
    RawTracepoint,
    /// As a kernel probe at a function's entry: a breakpoint, or a jump where the kernel can make it one.
    KernelProbe,
    /// As a call at a function's entry (`fentry`): costs less than a probe, and needs the kernel's type information and function tracing.
    FunctionEntry,
}

impl Attach {
    /// The way in words.
    pub const fn words(self) -> &'static str {
        match self {
            Self::RawTracepoint => "raw tracepoint",
            Self::KernelProbe => "kernel probe",
            Self::FunctionEntry => "function entry",
        }
    }
}

/// What a program is good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Gives {
    /// Pages that turn writable; one program that does must attach, or there is nothing to track with.
    Pages,
    /// Pages of a dirty ring that someone switched on.
    RingPages,
    /// Pages that the processor logs by itself (Intel's page modification log), where page tables show next to nothing.
    HardwareLog,
    /// Exits to the VMM, and how long it took.
    VmmExits,
    /// Exits from guest code, and how long KVM took.
    GuestExits,
}

/// A way to the same events that costs less, and that not every kernel has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Faster {
    /// The program's name in the object.
    pub program: &'static str,
    /// How it is attached.
    pub attach: Attach,
}

/// One program at one place in the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hook {
    /// The program's name in the object.
    pub program: &'static str,
    /// The tracepoint or function.
    pub place: &'static str,
    /// How it is attached there.
    pub attach: Attach,
    /// What is tried before that.
    pub faster: Option<Faster>,
    /// What it sees, in words.
    pub what: &'static str,
    /// What it is good for.
    pub gives: Gives,
}

/// All of them.
pub const HOOKS: [Hook; 8] = [
    Hook {
        program: program::SET_SPTE,
        place: "kvm_mmu_set_spte",
        attach: Attach::RawTracepoint,
        faster: None,
        what: "pages turning writable, by guest frame",
        gives: Gives::Pages,
    },
    Hook {
        program: program::FAST_PAGE_FAULT,
        place: "fast_page_fault",
        attach: Attach::RawTracepoint,
        faster: None,
        what: "write-protect faults that KVM resolves without its lock",
        gives: Gives::Pages,
    },
    Hook {
        program: program::DIRTY_RING_PUSH,
        place: "kvm_dirty_ring_push",
        attach: Attach::RawTracepoint,
        faster: None,
        what: "pages as KVM logs them, while a dirty ring is on",
        gives: Gives::RingPages,
    },
    Hook {
        program: program::PAGE_LOGGED,
        place: "mark_page_dirty_in_slot",
        attach: Attach::KernelProbe,
        faster: Some(Faster { program: program::PAGE_LOGGED_AT_ENTRY, attach: Attach::FunctionEntry }),
        what: "pages as KVM logs them, those that the processor logged by itself among them",
        gives: Gives::HardwareLog,
    },
    Hook {
        program: program::USERSPACE_EXIT,
        place: "kvm_userspace_exit",
        attach: Attach::RawTracepoint,
        faster: None,
        what: "exits to the VMM by reason",
        gives: Gives::VmmExits,
    },
    Hook {
        program: program::GUEST_FPU,
        place: "kvm_fpu",
        attach: Attach::RawTracepoint,
        faster: None,
        what: "when the VMM came back: how long an exit to it took",
        gives: Gives::VmmExits,
    },
    Hook {
        program: program::GUEST_EXIT,
        place: "kvm_exit",
        attach: Attach::RawTracepoint,
        faster: None,
        what: "exits from guest code by reason, those that KVM handles itself among them",
        gives: Gives::GuestExits,
    },
    Hook {
        program: program::GUEST_ENTRY,
        place: "kvm_entry",
        attach: Attach::RawTracepoint,
        faster: None,
        what: "how long each exit from guest code took",
        gives: Gives::GuestExits,
    },
];
