//! Types that the BPF programs and the agent share. No dependencies, fixed layout, no code but the bins of times.
//!
//! Owns the names of maps, programs and load-time constants too, so that the two sides cannot disagree. Every field is
//! 4 or 8 bytes and no struct has padding: the kernel refuses to copy bytes that nobody wrote.
#![no_std]

/// Load-time constants, by the name under which the loader overrides them.
///
/// Those that end in `_OFFSET` are offsets in bytes into structures of this kernel, or [`crate::OFFSET_UNKNOWN`].
pub mod constant {
    /// `u32`: when not 0, events of every other process are dropped before any map is touched.
    pub const ONLY_TGID: &str = "ONLY_TGID";
    /// `u32`: `gfn` in `struct kvm_page_fault`.
    pub const PAGE_FAULT_GFN_OFFSET: &str = "PAGE_FAULT_GFN_OFFSET";
    /// `u32`: the guest's instruction pointer in `struct kvm_vcpu`.
    pub const VCPU_RIP_OFFSET: &str = "VCPU_RIP_OFFSET";
    /// `u32`: the root of the guest's page tables (CR3) in `struct kvm_vcpu`.
    pub const VCPU_ROOT_OFFSET: &str = "VCPU_ROOT_OFFSET";
    /// `u32`: a pointer in `struct kvm_vcpu` (or in what encloses it) to what [`EXIT_REASON_OFFSET`] is relative to; unknown where that is in
    /// the vCPU's structure itself.
    pub const VCPU_AREA_OFFSET: &str = "VCPU_AREA_OFFSET";
    /// `u32`: the processor's number for why guest code was left.
    pub const EXIT_REASON_OFFSET: &str = "EXIT_REASON_OFFSET";
}

/// Maps, by name.
pub mod map {
    /// Hash, process id to [`crate::TrackedVm`]: whose events are counted.
    pub const TRACKED: &str = "TRACKED";
    /// Array of [`crate::Thread`], mappable: the record of a thread is at one of its [`crate::thread_place`]s.
    pub const THREADS: &str = "THREADS";
    /// Hash, thread id to `u64`: where the kernel has the vCPU (`struct kvm_vcpu`) that the thread runs.
    pub const VCPUS: &str = "VCPUS";
    /// Hash, [`crate::ExitKey`] to [`crate::ExitTimes`].
    pub const EXITS: &str = "EXITS";
    /// LRU hash, [`crate::SpaceKey`] to [`crate::SpaceCounters`].
    pub const SPACES: &str = "SPACES";
    /// LRU hash, [`crate::CodeKey`] to `u64`.
    pub const CODE: &str = "CODE";
    /// Array of `u64`, mappable: one bit a guest frame, in one window a tracked VM. Sized at load.
    pub const PAGES: &str = "PAGES";
    /// Array of [`crate::Armed`], mappable: one a [`crate::TrackedVm::slot`].
    pub const ARMED: &str = "ARMED";
    /// Array of one value, mappable: a `u64` for each [`crate::Setting`], so that one look-up brings all.
    pub const SETTINGS: &str = "SETTINGS";
    /// Ring of [`crate::Write`]s, one after the other. Sized at load: a page, unless single writes are asked for.
    pub const WRITES: &str = "WRITES";
    /// Array of `u64`, mappable: one counter a [`crate::Loss`].
    pub const LOSSES: &str = "LOSSES";
    /// Array of [`crate::PEEK_BYTES`] bytes, mappable: what the program `peek` has read.
    pub const PEEKED: &str = "PEEKED";
}

/// Programs, by name.
pub mod program {
    /// Raw tracepoint `kvm_mmu_set_spte`.
    pub const SET_SPTE: &str = "set_spte";
    /// Raw tracepoint `fast_page_fault`.
    pub const FAST_PAGE_FAULT: &str = "fast_page_fault";
    /// Raw tracepoint `kvm_dirty_ring_push`.
    pub const DIRTY_RING_PUSH: &str = "dirty_ring_push";
    /// Raw tracepoint `kvm_userspace_exit`.
    pub const USERSPACE_EXIT: &str = "userspace_exit";
    /// Raw tracepoint `kvm_fpu`.
    pub const GUEST_FPU: &str = "guest_fpu";
    /// Raw tracepoint `kvm_exit`.
    pub const GUEST_EXIT: &str = "guest_exit";
    /// Raw tracepoint `kvm_entry`.
    pub const GUEST_ENTRY: &str = "guest_entry";
    /// Kernel probe on `mark_page_dirty_in_slot`.
    pub const PAGE_LOGGED: &str = "page_logged";
    /// The same at the function's entry.
    pub const PAGE_LOGGED_AT_ENTRY: &str = "page_logged_at_entry";
    /// Raw tracepoint program that is attached to nothing: run by hand, it reads kernel memory into [`super::map::PEEKED`].
    pub const PEEK: &str = "peek";
}

/// Processes that can be tracked at once.
pub const MAX_TRACKED: u32 = 1024;
/// Threads (vCPUs) whose events can be counted at once.
pub const MAX_THREADS: u32 = 4096;
/// Pairs of thread and exit reason that can be counted at once.
pub const MAX_EXITS: u32 = 16 * MAX_THREADS;
/// Address spaces that are remembered, those that wrote last.
pub const MAX_SPACES: u32 = 4096;
/// Places in guest code that are remembered, those that wrote last.
pub const MAX_CODE: u32 = 16384;
/// An offset that this kernel's type information does not tell.
pub const OFFSET_UNKNOWN: u32 = u32::MAX;
/// The reason in [`ExitKey`] of an exit that KVM ended with an error instead of a reason, or whose reason could not be read.
pub const EXIT_REASON_ERROR: u32 = u32::MAX;
/// Bytes that `peek` reads at most.
pub const PEEK_BYTES: u32 = 4096;
/// Bits 12 to 51 of CR3, and of an entry of x86's page tables: an address in the guest's memory. The others are flags (Intel SDM volume 3, section 4.5).
pub const TABLE_ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Entries of [`map::SETTINGS`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setting {
    /// Counts changes of [`map::VCPUS`]: threads look there again.
    Vcpus = 0,
    /// What events are attributed to, beside their thread: a sum of [`attribute`]'s bits.
    Attribute = 1,
    /// Counts changes of [`map::TRACKED`], from 1 on: threads look there again.
    Tracked = 2,
}

impl Setting {
    /// How many there are.
    pub const COUNT: u32 = 3;
}

/// Bits of [`Setting::Attribute`].
pub mod attribute {
    /// Guest address spaces.
    pub const SPACES: u64 = 1;
    /// Guest code: the instruction that wrote.
    pub const CODE: u64 = 2;
    /// Pages of a log that someone else has switched on are marked as they are logged (where the processor logs by itself, page tables
    /// show next to nothing).
    pub const LOGGED_PAGES: u64 = 4;
    /// Each write is told by itself too, in [`super::map::WRITES`].
    pub const SINGLE_WRITES: u64 = 8;
}

/// A root or an instruction that could not be read.
pub const PLACE_UNKNOWN: u64 = u64::MAX;

/// One event: a mapping that turned writable.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Write {
    /// When, by the monotonic clock in nanoseconds.
    pub at_ns: u64,
    /// As [`SpaceKey::root`], or [`PLACE_UNKNOWN`].
    pub root: u64,
    /// As [`CodeKey::instruction`], or [`PLACE_UNKNOWN`].
    pub instruction: u64,
    /// The first guest frame that the mapping covers.
    pub gfn: u64,
    /// Process id.
    pub tgid: u32,
    /// Thread id.
    pub tid: u32,
    /// Pages that the mapping covers.
    pub pages: u32,
    /// How many of them were not marked in [`map::PAGES`] before.
    pub fresh: u32,
}

impl Write {
    /// Its words, in order of their place.
    pub const WORDS: usize = size_of::<Self>() / size_of::<u64>();

    /// As it lies in the ring on a little-endian processor, word by word.
    #[must_use]
    pub const fn from_words(words: [u64; Self::WORDS]) -> Self {
        let [at_ns, root, instruction, gfn, ids, counts] = words;
        let (tgid, tid) = (ids as u32, (ids >> 32) as u32);
        Self { at_ns, root, instruction, gfn, tgid, tid, pages: counts as u32, fresh: (counts >> 32) as u32 }
    }
}

/// The window of [`map::PAGES`] that belongs to one VM.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TrackedVm {
    /// Index of the window's first 64-bit word.
    pub first_word: u32,
    /// Its length in words; a guest frame beyond it counts as [`Loss::OutOfRange`].
    pub words: u32,
    /// Index into [`map::ARMED`].
    pub slot: u32,
    /// Zero.
    pub reserved: u32,
}

/// A window of write protection of one VM.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Armed {
    /// When it begins, by the monotonic clock in nanoseconds; 0 while there is none. Until then no page is marked.
    pub began_ns: u64,
    /// The pages that are protected. Changed only while there is no window.
    pub subset: PageSubset,
}

/// Pages that stand for all: all of them, or one of each group of 2^n that follow one another, chosen by a hash.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PageSubset {
    /// The exponent n in the lowest byte, above it what makes the choice another one.
    raw: u64,
}

impl PageSubset {
    /// Every page.
    pub const ALL: Self = Self { raw: 0 };
    /// The largest exponent.
    pub const MAX_SHIFT: u32 = 12;

    /// One page of each `2^shift`; a larger shift than [`Self::MAX_SHIFT`] counts as that. Another `seed` chooses other pages.
    #[must_use]
    pub const fn one_in(shift: u32, seed: u64) -> Self {
        let shift = if shift > Self::MAX_SHIFT { Self::MAX_SHIFT } else { shift };
        if shift == 0 { Self::ALL } else { Self { raw: seed << 8 | shift as u64 } }
    }

    /// As it is sent elsewhere.
    #[must_use]
    pub const fn raw(self) -> u64 {
        self.raw
    }

    /// As it was sent: any number is a subset.
    #[must_use]
    pub const fn from_raw(raw: u64) -> Self {
        Self::one_in(raw as u8 as u32, raw >> 8)
    }

    /// How many pages one stands for.
    #[must_use]
    pub const fn every(self) -> u64 {
        1 << self.shift()
    }

    #[inline(always)]
    #[allow(clippy::inline_always, reason = "as for `first_write_bin`")]
    const fn shift(self) -> u64 {
        self.raw & 0xf
    }

    /// Whether the page belongs to it.
    #[must_use]
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "as for `first_write_bin`")]
    pub const fn holds(self, page: u64) -> bool {
        self.of_group(page >> self.shift()) == page
    }

    /// The page that stands for the group of pages `[group · every, (group + 1) · every)`.
    ///
    /// The hash is the multiplicative one (Knuth, The Art of Computer Programming 3, section 6.4), of which high bits are good.
    #[must_use]
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "as for `first_write_bin`")]
    pub const fn of_group(self, group: u64) -> u64 {
        let shift = self.shift();
        let hash = (group ^ self.raw).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40;
        group << shift | hash & ((1 << shift) - 1)
    }
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

/// Consecutive events of one address space whose pages are not in [`map::SPACES`] yet. Root and bin do not change while a run lasts.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpaceRun {
    /// Twice the number of runs that have ended; odd while one is being put into its map.
    pub changes: u64,
    /// As [`SpaceKey::root`].
    pub root: u64,
    /// As [`SpaceCounters::pages_made_writable`].
    pub pages_made_writable: u64,
    /// The element of [`SpaceCounters::first_writes`] that [`SpaceRun::first_writes`] belongs to.
    pub bin: u32,
    /// Pages that were written for the first time.
    pub first_writes: u32,
}

/// Consecutive events of one instruction whose pages are not in [`map::CODE`] yet. Root and instruction do not change while a run lasts.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CodeRun {
    /// As [`SpaceRun::changes`].
    pub changes: u64,
    /// As [`CodeKey::root`].
    pub root: u64,
    /// As [`CodeKey::instruction`].
    pub instruction: u64,
    /// Pages made writable.
    pub pages: u64,
}

/// What one thread did, and what it is doing. Only that thread writes it, so plain additions do. What most events touch comes first.
///
/// A guest writes many pages in a row from one place; so what is attributed is summed up in a run here, and is put into its map when the
/// next event comes from elsewhere. What an address space or instruction wrote is its map entry and the run under way, if that is its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Thread {
    /// Whose it is: [`ThreadKey::word`]; 0: nobody's, and all else is 0 then.
    pub key: u64,
    /// Guest pages (4 KiB) that a mapping made writable, huge mappings counted by what they cover.
    pub pages_made_writable: u64,
    /// The window of its VM, so that an event finds it without a search.
    pub vm: TrackedVm,
    /// [`Setting::Tracked`] when that was looked up; 0: it never was.
    pub vm_as_of: u64,
    /// Where the kernel has the vCPU; 0 while that is not known.
    pub vcpu: u64,
    /// [`Setting::Vcpus`] when that was looked up.
    pub vcpu_as_of: u64,
    /// The run of the address space.
    pub space: SpaceRun,
    /// The run of the instruction.
    pub code: CodeRun,
    /// Mappings of 2 MiB and larger among [`Thread::pages_made_writable`].
    pub huge_mappings: u64,
    /// Entries pushed to a KVM dirty ring.
    pub dirty_ring_pushes: u64,
    /// Pages that KVM marked in a dirty log.
    pub pages_logged: u64,
    /// Exits to user space, all reasons.
    pub userspace_exits: u64,
    /// Exits from guest code, those that KVM handles itself among them.
    pub guest_exits: u64,
    /// When guest code was left last, by the monotonic clock in nanoseconds; 0 while it runs.
    pub left_guest_ns: u64,
    /// When KVM returned to user space last; 0 while it is in KVM.
    pub left_kvm_ns: u64,
    /// The reason that belongs to [`Thread::left_guest_ns`].
    pub guest_exit_reason: u32,
    /// The reason that belongs to [`Thread::left_kvm_ns`].
    pub userspace_exit_reason: u32,
    /// Pages by the time of their first write since their VM was armed: see [`first_write_bin`].
    pub first_writes: [u32; FIRST_WRITE_SLOTS],
}

impl ThreadKey {
    /// The key as one word, as `bpf_get_current_pid_tgid` has it.
    #[must_use]
    #[inline(always)]
    #[allow(clippy::inline_always, reason = "called in BPF programs, where a call costs a frame of a small stack")]
    pub const fn word(self) -> u64 {
        (self.tgid as u64) << 32 | self.tid as u64
    }
}

/// Places where the record of a thread may be. Nearly always it is at the first: threads of a process have numbers in a row.
pub const THREAD_PLACES: u32 = 16;

/// One of a thread's [`THREAD_PLACES`] places in [`map::THREADS`].
#[must_use]
#[inline(always)]
#[allow(clippy::inline_always, reason = "called in BPF programs, where a call costs a frame of a small stack")]
pub const fn thread_place(tid: u32, nth: u32) -> u32 {
    // A prime, so that the threads of two processes that lie upon one another do not look for room at the same places.
    tid.wrapping_add(nth * 1021) % MAX_THREADS
}

/// Where in KVM's layers an exit was taken.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitKind {
    /// From KVM to the VMM; the reason is `KVM_EXIT_*`.
    Userspace = 0,
    /// From guest code to KVM; the reason is the processor's.
    Guest = 1,
}

/// One reason for which one thread left guest code or KVM.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ExitKey {
    /// Process id.
    pub tgid: u32,
    /// Thread id.
    pub tid: u32,
    /// An [`ExitKind`].
    pub kind: u32,
    /// The reason, or [`EXIT_REASON_ERROR`].
    pub reason: u32,
}

/// Powers of two of nanoseconds that [`ExitTimes`] tells apart.
pub const EXIT_TIME_BINS: usize = 40;

/// How often, and for how long.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitTimes {
    /// Exits.
    pub count: u64,
    /// Sum of the times until the guest (or KVM) was entered again, in nanoseconds.
    pub total_ns: u64,
    /// The longest of them.
    pub longest_ns: u64,
    /// How many took [2^n, 2^(n+1)) nanoseconds; the last bin has no end.
    pub bins: [u32; EXIT_TIME_BINS],
}

impl ExitTimes {
    /// No exit yet.
    pub const NONE: Self = Self { count: 0, total_ns: 0, longest_ns: 0, bins: [0; EXIT_TIME_BINS] };
}

/// One guest address space as one vCPU had it loaded.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SpaceKey {
    /// Process id.
    pub tgid: u32,
    /// Thread id.
    pub tid: u32,
    /// The guest physical address of its root page table.
    pub root: u64,
}

/// What was written while an address space was loaded.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SpaceCounters {
    /// As [`Thread::pages_made_writable`].
    pub pages_made_writable: u64,
    /// As [`Thread::first_writes`].
    pub first_writes: [u32; FIRST_WRITE_SLOTS],
}

impl SpaceCounters {
    /// Nothing yet.
    pub const NONE: Self = Self { pages_made_writable: 0, first_writes: [0; FIRST_WRITE_SLOTS] };
}

/// One guest instruction of one address space.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CodeKey {
    /// Process id.
    pub tgid: u32,
    /// Thread id.
    pub tid: u32,
    /// The root page table.
    pub root: u64,
    /// The instruction's guest virtual address.
    pub instruction: u64,
}

/// Bins of a histogram of first-write times: below 2^14 ns, 8 for each power of two up to 2^37 ns (137 s), above.
pub const FIRST_WRITE_BINS: u32 = 2 + 8 * (LAST_POWER - FIRST_POWER);
/// Elements of an array of such bins: a power of two, so that an index is bounded by a mask, which the verifier understands.
pub const FIRST_WRITE_SLOTS: usize = 256;
/// The element that stands for no bin: whatever is counted there counts nowhere.
pub const NO_FIRST_WRITE_BIN: u32 = FIRST_WRITE_SLOTS as u32 - 1;
const FIRST_POWER: u32 = 14;
const LAST_POWER: u32 = 37;

/// The bin of a page that was first written `ns` nanoseconds after its VM was armed.
#[must_use]
#[inline(always)]
#[allow(clippy::inline_always, reason = "called in BPF programs, where a call costs a frame of a small stack")]
#[allow(clippy::manual_ilog2, reason = "BPF programs have no panic, and `ilog2` has one")]
pub const fn first_write_bin(ns: u64) -> u32 {
    if ns < 1 << FIRST_POWER {
        return 0;
    }
    let power = 63 - ns.leading_zeros();
    if power >= LAST_POWER {
        return FIRST_WRITE_BINS - 1;
    }
    1 + (power - FIRST_POWER) * 8 + ((ns >> (power - 3)) & 7) as u32
}

/// The shortest time, in nanoseconds, that belongs to a bin; a number beyond the last bin is taken for the last.
#[must_use]
pub const fn first_write_bin_start_ns(bin: u32) -> u64 {
    if bin == 0 {
        return 0;
    }
    if bin >= FIRST_WRITE_BINS - 1 {
        return 1 << LAST_POWER;
    }
    let power = FIRST_POWER + (bin - 1) / 8;
    (8 + (bin as u64 - 1) % 8) << (power - 3)
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
    /// A guest's address space or instruction could not be read: the write is counted, and belongs to nobody.
    Unattributed = 5,
    /// No room in [`map::WRITES`]: the write is counted, and not told by itself.
    WritesFull = 6,
}

impl Loss {
    /// All of them, in order of index.
    pub const ALL: [Self; 7] = [
        Self::OutOfRange,
        Self::ThreadsFull,
        Self::ExitsFull,
        Self::TooLarge,
        Self::Unreadable,
        Self::Unattributed,
        Self::WritesFull,
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subset_has_one_page_of_each_group_and_differs_by_its_seed() {
        for shift in [1, 4, 12] {
            let (one, other) = (PageSubset::one_in(shift, 1), PageSubset::one_in(shift, 2));
            let (size, mut same) = (1u64 << shift, 0);
            for group in 0..256u64 {
                let held = |subset: PageSubset| (group * size..(group + 1) * size).find(|&p| subset.holds(p));
                let count = (group * size..(group + 1) * size).filter(|&p| one.holds(p)).count();
                assert_eq!(count, 1, "group {group} of {size}");
                same += u64::from(held(one) == held(other));
            }
            // Two of independent choices agree in one of 2^shift groups.
            assert!(same < 256 / size + 48, "{same} of 256 groups of {size} choose the same page");
            assert_eq!(one.every(), size);
            assert_eq!(PageSubset::from_raw(one.raw()), one);
        }
        assert!((0..1000).all(|page| PageSubset::ALL.holds(page)));
        assert_eq!(PageSubset::one_in(99, 7).every(), 1 << PageSubset::MAX_SHIFT);
        assert_eq!(PageSubset::from_raw(u64::MAX).every(), 1 << PageSubset::MAX_SHIFT);
    }

    #[test]
    fn bins_follow_one_another() {
        for bin in 1..FIRST_WRITE_BINS {
            let start = first_write_bin_start_ns(bin);
            assert_eq!((first_write_bin(start), first_write_bin(start - 1)), (bin, bin - 1), "{start} ns");
        }
        assert_eq!((first_write_bin(0), first_write_bin(u64::MAX)), (0, FIRST_WRITE_BINS - 1));
    }
}
