//! Types that the BPF programs and the agent share. No dependencies, fixed layout, and no code but the arithmetic that both
//! sides must do alike.
//!
//! Owns the names of maps, programs and load-time constants too, so that the two sides cannot disagree. Every field is
//! 4 or 8 bytes and no struct has padding: the kernel refuses to copy bytes that nobody wrote.
#![no_std]

/// Load-time constants, by the name under which the loader overrides them.
pub mod constant {
    /// `u32`: when not 0, events of every other process are dropped before any map is touched.
    pub const ONLY_TGID: &str = "ONLY_TGID";
    /// `u32`: offset of `gfn` in `struct kvm_page_fault`, or [`crate::OFFSET_UNKNOWN`].
    pub const PAGE_FAULT_GFN_OFFSET: &str = "PAGE_FAULT_GFN_OFFSET";
}

/// Maps, by name.
pub mod map {
    /// Hash, process id to [`crate::TrackedVm`]: whose events are counted.
    pub const TRACKED: &str = "TRACKED";
    /// Hash, [`crate::ThreadKey`] to [`crate::ThreadCounters`].
    pub const THREADS: &str = "THREADS";
    /// Hash, [`crate::ExitKey`] to `u64`.
    pub const EXITS: &str = "EXITS";
    /// Array of `u64`, mappable: one bit a guest frame, in one window a tracked VM. Sized at load.
    pub const PAGES: &str = "PAGES";
    /// Array of `u64`, mappable: one counter a [`crate::Loss`].
    pub const LOSSES: &str = "LOSSES";
}

/// Programs, by name; each is a raw tracepoint program.
pub mod program {
    /// On `kvm_mmu_set_spte`.
    pub const SET_SPTE: &str = "set_spte";
    /// On `fast_page_fault`.
    pub const FAST_PAGE_FAULT: &str = "fast_page_fault";
    /// On `kvm_dirty_ring_push`.
    pub const DIRTY_RING_PUSH: &str = "dirty_ring_push";
    /// On `kvm_userspace_exit`.
    pub const USERSPACE_EXIT: &str = "userspace_exit";
    /// On `kvm_exit`.
    pub const GUEST_EXIT: &str = "guest_exit";
}

/// Processes that can be tracked at once.
pub const MAX_TRACKED: u32 = 1024;
/// Threads (vCPUs) whose events can be counted at once.
pub const MAX_THREADS: u32 = 4096;
/// Pairs of thread and exit reason that can be counted at once.
pub const MAX_EXITS: u32 = 16 * MAX_THREADS;
/// [`constant::PAGE_FAULT_GFN_OFFSET`] when this kernel's type information does not tell.
pub const OFFSET_UNKNOWN: u32 = u32::MAX;
/// The reason in [`ExitKey`] of an exit that KVM ended with an error instead of a reason.
pub const EXIT_REASON_ERROR: u32 = u32::MAX;

/// Bins of a histogram of first-write times, nanoseconds from the arming to a page's first write: one for all below
/// 2^14 ns (16 µs), eight an octave up to 2^37 ns (137 s), and one for what is beyond.
pub const FIRST_WRITE_BINS: u32 = 1 + (FIRST_WRITE_END_BITS - FIRST_WRITE_START_BITS) * 8 + 1;

/// Where the bins of an eighth of an octave start, as a power of two.
const FIRST_WRITE_START_BITS: u32 = 14;
/// Where they end.
const FIRST_WRITE_END_BITS: u32 = 37;

/// The bin of a first write `ns` nanoseconds after the arming, below [`FIRST_WRITE_BINS`]. Neither loop nor division nor panic: the
/// kernel's verifier would refuse them.
#[inline]
pub const fn first_write_bin(ns: u64) -> u32 {
    if ns >> FIRST_WRITE_START_BITS == 0 {
        return 0;
    }
    if ns >> FIRST_WRITE_END_BITS != 0 {
        return FIRST_WRITE_BINS - 1;
    }
    // 14 to 36, so nothing below wraps; written so that no build of it leaves a panic behind.
    let octave = 63u32.wrapping_sub(ns.leading_zeros());
    let eighth = ns.wrapping_shr(octave.wrapping_sub(3)) as u32 & 7;
    octave.wrapping_sub(FIRST_WRITE_START_BITS).wrapping_mul(8).wrapping_add(1).wrapping_add(eighth)
}

/// The shortest time of a bin, in nanoseconds; a number beyond the last bin is taken for the last.
pub const fn first_write_bin_start_ns(bin: u32) -> u64 {
    if bin == 0 {
        return 0;
    }
    if bin >= FIRST_WRITE_BINS - 1 {
        return 1 << FIRST_WRITE_END_BITS;
    }
    let octave = FIRST_WRITE_START_BITS + (bin - 1) / 8;
    (8 + (bin as u64 - 1) % 8) << (octave - 3)
}

/// The window of [`map::PAGES`] that belongs to one VM.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrackedVm {
    /// Index of the window's first 64-bit word.
    pub first_word: u32,
    /// Its length in words; a guest frame beyond it counts as [`Loss::OutOfRange`].
    pub words: u32,
}

/// One thread of one process.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThreadKey {
    /// Process id, as the initial pid namespace has it.
    pub tgid: u32,
    /// Thread id, likewise.
    pub tid: u32,
}

/// What one thread did. Only that thread writes it, so plain additions do.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ThreadCounters {
    /// Guest pages (4 KiB) that a mapping made writable, huge mappings counted by what they cover.
    pub pages_made_writable: u64,
    /// Mappings of 2 MiB and larger among them.
    pub huge_mappings: u64,
    /// Entries pushed to a KVM dirty ring.
    pub dirty_ring_pushes: u64,
    /// Exits to user space, all reasons.
    pub userspace_exits: u64,
    /// Exits from guest code, those that KVM handles itself among them.
    pub guest_exits: u64,
}

/// One reason for which one thread left KVM.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExitKey {
    /// Process id.
    pub tgid: u32,
    /// Thread id.
    pub tid: u32,
    /// `KVM_EXIT_*`, or [`EXIT_REASON_ERROR`].
    pub reason: u32,
}

/// Ways in which an event can fail to be counted in full: indices of [`map::LOSSES`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// A page beyond the VM's window: counted in the rate, missing from the unique pages.
    OutOfRange = 0,
    /// No room for another thread: not counted.
    ThreadsFull = 1,
    /// No room for another exit reason: missing from the reasons.
    ExitsFull = 2,
    /// A mapping larger than 2 MiB: counted in the rate, missing from the unique pages.
    TooLarge = 3,
    /// A page table entry or guest frame number that could not be read: not counted.
    Unreadable = 4,
}

impl Loss {
    /// All of them, in order of index.
    pub const ALL: [Self; 5] = [Self::OutOfRange, Self::ThreadsFull, Self::ExitsFull, Self::TooLarge, Self::Unreadable];
}
