//! The attach plan: which program goes on which tracepoint, and what it gives. The loader and `dunlin doctor` read this
//! one table.

use dunlin_ebpf::program;

/// One program on one tracepoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hook {
    /// The program's name in the object.
    pub program: &'static str,
    /// The tracepoint, attached as a raw tracepoint (works for a built-in and for a modular KVM).
    pub tracepoint: &'static str,
    /// What it sees.
    pub gives: &'static str,
    /// Whether it brings pages that turn writable; one of those must attach, or there is nothing to track with.
    pub sees_writable_pages: bool,
}

/// All of them.
pub const HOOKS: [Hook; 5] = [
    Hook {
        program: program::SET_SPTE,
        tracepoint: "kvm_mmu_set_spte",
        gives: "pages turning writable, by guest frame",
        sees_writable_pages: true,
    },
    Hook {
        program: program::FAST_PAGE_FAULT,
        tracepoint: "fast_page_fault",
        gives: "write-protect faults that KVM resolves without its lock",
        sees_writable_pages: true,
    },
    Hook {
        program: program::DIRTY_RING_PUSH,
        tracepoint: "kvm_dirty_ring_push",
        gives: "pages as KVM logs them, while a dirty ring is on",
        sees_writable_pages: false,
    },
    Hook {
        program: program::USERSPACE_EXIT,
        tracepoint: "kvm_userspace_exit",
        gives: "exits to the VMM by reason",
        sees_writable_pages: false,
    },
    Hook {
        program: program::GUEST_EXIT,
        tracepoint: "kvm_exit",
        gives: "exits from guest code, those that KVM handles itself among them",
        sees_writable_pages: false,
    },
];
