//! Whose event this is, and where it is counted.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::{BPF_NOEXIST, BPF_RB_NO_WAKEUP};
use aya_ebpf::helpers::{bpf_get_current_pid_tgid, bpf_ktime_get_ns};
use aya_log_ebpf::warn;
use dunlin_ebpf::{
    Armed, CodeKey, CodeRun, EXIT_TIME_BINS, ExitKey, ExitKind, ExitTimes, FIRST_WRITE_SLOTS, Loss, NO_FIRST_WRITE_BIN,
    PLACE_UNKNOWN, Setting, SpaceCounters, SpaceKey, SpaceRun, THREAD_PLACES, Thread, ThreadKey, TrackedVm, Write,
    attribute, first_write_bin, thread_place,
};

use crate::maps::{ARMED, CODE, EXITS, LOSSES, PAGES, SETTINGS, SPACES, THREADS, TRACKED, VCPUS, WRITES};
use crate::{atomic, constants, vcpu};

/// Pages under one entry of each higher page table level.
const LEVEL_SHIFT: u32 = 9;
/// 64-bit words of the bitmap that a 2 MiB mapping fills.
const WORDS_IN_2_MIB: u32 = 8;

/// What map entries begin as; too large for a program's stack.
static NEW_SPACE: SpaceCounters = SpaceCounters::NONE;
static NEW_TIMES: ExitTimes = ExitTimes::NONE;

/// An event of a process that may be tracked, with the thread that caused it.
pub(crate) struct Event {
    key: ThreadKey,
    settings: Settings,
}

impl Event {
    /// The event under way, unless the current process is certainly not tracked. Whether it is, [`Event::thread`] says.
    #[inline(always)]
    pub(crate) fn current() -> Option<Self> {
        let both = bpf_get_current_pid_tgid();
        let key = ThreadKey { tgid: (both >> 32) as u32, tid: both as u32 };
        let only = constants::only_tgid();
        if only != 0 && only != key.tgid {
            return None;
        }
        Some(Self { key, settings: Settings::now()? })
    }

    /// The window of the current process; none: it is not tracked.
    #[inline(always)]
    fn window(&self) -> Option<TrackedVm> {
        // SAFETY: the value is copied at once; the agent never changes a window in place.
        unsafe { TRACKED.get(self.key.tgid).copied() }
    }

    /// The thread's own record, made on its first event; none if its process is not tracked. No search: the place follows from the thread's
    /// number, and the record knows the window.
    #[inline(always)]
    pub(crate) fn thread(&self, ctx: &impl EbpfContext) -> Option<&mut Thread> {
        let as_of = self.settings.get(Setting::Tracked);
        let thread = match self.record(0) {
            Some(thread) => thread,
            None => {
                self.window()?;
                match self.elsewhere() {
                    Some(thread) => thread,
                    None => {
                        self.lose(ctx, Loss::ThreadsFull);
                        return None;
                    }
                }
            }
        };
        // SAFETY: a live map value that only the current thread writes. The agent clears it when it forgets the VM; an event that is under
        // way then counts nowhere, or as one of whoever has the place next.
        let thread = unsafe { &mut *thread };
        if thread.vm_as_of != as_of {
            thread.vm = self.window()?;
            thread.vm_as_of = as_of;
        }
        Some(thread)
    }

    /// The record at one of the thread's places, if it is there.
    #[inline(always)]
    fn record(&self, nth: u32) -> Option<*mut Thread> {
        let thread = THREADS.get_ptr_mut(thread_place(self.key.tid, nth))?;
        // SAFETY: a live map value.
        (unsafe { (*thread).key } == self.key.word()).then_some(thread)
    }

    /// The record at another place than the first, or at any place that is free; none: all are taken.
    #[inline(always)]
    fn elsewhere(&self) -> Option<*mut Thread> {
        for nth in 1..THREAD_PLACES {
            if let Some(thread) = self.record(nth) {
                return Some(thread);
            }
        }
        for nth in 0..THREAD_PLACES {
            let thread = THREADS.get_ptr_mut(thread_place(self.key.tid, nth))?;
            // SAFETY: a live map value. Only this thread looks for a place for itself.
            if unsafe { atomic::take(&raw mut (*thread).key, self.key.word()) } {
                return Some(thread);
            }
        }
        None
    }

    /// Counts an event that a kernel structure would not tell of.
    #[inline(always)]
    pub(crate) fn unreadable(&self, ctx: &impl EbpfContext) {
        if self.window().is_some() {
            self.lose(ctx, Loss::Unreadable);
        }
    }

    /// Counts one exit to user space, or from guest code.
    #[inline(always)]
    pub(crate) fn left(&self, ctx: &impl EbpfContext, kind: ExitKind, reason: u32) {
        if let Some(times) = self.times(ctx, kind, reason) {
            times.count += 1;
        }
    }

    /// Adds the time that such an exit took.
    #[inline(always)]
    pub(crate) fn came_back(&self, ctx: &impl EbpfContext, kind: ExitKind, reason: u32, ns: u64) {
        let Some(times) = self.times(ctx, kind, reason) else { return };
        times.total_ns += ns;
        if ns > times.longest_ns {
            times.longest_ns = ns;
        }
        let power = 63 - (ns | 1).leading_zeros();
        if let Some(bin) = times.bins.get_mut((power as usize).min(EXIT_TIME_BINS - 1)) {
            *bin += 1;
        }
    }

    #[inline(always)]
    fn times(&self, ctx: &impl EbpfContext, kind: ExitKind, reason: u32) -> Option<&mut ExitTimes> {
        let key = ExitKey { tgid: self.key.tgid, tid: self.key.tid, kind: kind as u32, reason };
        let times = match EXITS.get_ptr_mut(key) {
            Some(times) => times,
            None => {
                let _ = EXITS.insert(key, &NEW_TIMES, u64::from(BPF_NOEXIST));
                let Some(times) = EXITS.get_ptr_mut(key) else {
                    self.lose(ctx, Loss::ExitsFull);
                    return None;
                };
                times
            }
        };
        // SAFETY: as in `thread`.
        Some(unsafe { &mut *times })
    }

    /// Counts the pages of a mapping at `level` (1 is 4 KiB) that covers `gfn` and has become writable.
    #[inline(always)]
    pub(crate) fn made_writable(&self, ctx: &impl EbpfContext, gfn: u64, level: u32) {
        let Some(thread) = self.thread(ctx) else { return };
        let vm = thread.vm;
        // The clock costs as much as a search: what is marked already is not written for the first time.
        let window =
            if level == 1 && self.is_marked(vm, gfn) { Moment::of_marked(vm, gfn) } else { Moment::now(vm, gfn) };
        if window == Moment::Before {
            thread.pages_made_writable += 1;
            return;
        }
        let (pages, fresh) = match level {
            1 if window == Moment::Marked => (1, 0),
            1 => (1, self.mark_word(ctx, vm, gfn / 64, 1 << (gfn % 64))),
            2 => {
                thread.huge_mappings += 1;
                let first = (gfn >> LEVEL_SHIFT) * u64::from(WORDS_IN_2_MIB);
                let mut fresh = 0;
                for word in 0..u64::from(WORDS_IN_2_MIB) {
                    fresh += self.mark_word(ctx, vm, first + word, u64::MAX);
                }
                (1 << LEVEL_SHIFT, fresh)
            }
            _ => {
                thread.huge_mappings += 1;
                self.lose(ctx, Loss::TooLarge);
                (1 << (2 * LEVEL_SHIFT), 0)
            }
        };
        thread.pages_made_writable += pages;
        let bin = match window {
            Moment::In(ns) if fresh != 0 => first_write_bin(ns),
            // Its page stands for no other: whoever wrote it did not write more than others did.
            Moment::Aside => return,
            _ => NO_FIRST_WRITE_BIN,
        };
        add_at(&mut thread.first_writes, bin, fresh);
        self.attribute(ctx, thread, pages, fresh, bin, gfn);
    }

    /// Marks a page that KVM has logged, where the page tables do not show it.
    #[inline(always)]
    pub(crate) fn logged(&self, ctx: &impl EbpfContext, gfn: u64) {
        let Some(thread) = self.thread(ctx) else { return };
        thread.pages_logged += 1;
        if self.settings.get(Setting::Attribute) & attribute::LOGGED_PAGES != 0 {
            let vm = thread.vm;
            let fresh = self.mark_word(ctx, vm, gfn / 64, 1 << (gfn % 64));
            if fresh != 0
                && let Moment::In(ns) = Moment::now(vm, gfn)
            {
                add_at(&mut thread.first_writes, first_write_bin(ns), fresh);
            }
        }
    }

    /// Counts the pages for the address space and the instruction that the vCPU was in.
    #[inline(always)]
    fn attribute(&self, ctx: &impl EbpfContext, thread: &mut Thread, pages: u64, fresh: u32, bin: u32, gfn: u64) {
        let wanted = self.settings.get(Setting::Attribute);
        if wanted & (attribute::SPACES | attribute::CODE | attribute::SINGLE_WRITES) == 0 {
            return;
        }
        let place = self.vcpu(thread).and_then(vcpu::place);
        if wanted & attribute::SINGLE_WRITES != 0 {
            self.tell(ctx, gfn, pages, fresh, place);
        }
        let Some((root, instruction)) = place else {
            return self.lose(ctx, Loss::Unattributed);
        };
        if wanted & attribute::SPACES != 0 {
            let run = &thread.space;
            if run.root != root || (fresh != 0 && run.bin != bin) {
                self.end_space_run(&mut thread.space, root, bin);
            }
            thread.space.pages_made_writable += pages;
            thread.space.first_writes = thread.space.first_writes.wrapping_add(fresh);
        }
        if wanted & attribute::CODE != 0 {
            let Some(instruction) = instruction else {
                return self.lose(ctx, Loss::Unattributed);
            };
            let run = &thread.code;
            if run.instruction != instruction || run.root != root {
                self.end_code_run(&mut thread.code, root, instruction);
            }
            thread.code.pages += pages;
        }
    }

    /// Tells of one write by itself. Nobody is woken: the agent looks when it looks at the counters.
    #[inline(always)]
    fn tell(&self, ctx: &impl EbpfContext, gfn: u64, pages: u64, fresh: u32, place: Option<(u64, Option<u64>)>) {
        let Some(mut room) = WRITES.reserve::<Write>(0) else { return self.lose(ctx, Loss::WritesFull) };
        let (root, instruction) = place.unwrap_or((PLACE_UNKNOWN, None));
        room.write(Write {
            // SAFETY: has no precondition.
            at_ns: unsafe { bpf_ktime_get_ns() },
            root,
            instruction: instruction.unwrap_or(PLACE_UNKNOWN),
            gfn: gfn & !(pages - 1),
            tgid: self.key.tgid,
            tid: self.key.tid,
            pages: pages as u32,
            fresh,
        });
        room.submit(u64::from(BPF_RB_NO_WAKEUP));
    }

    /// Puts the run of the address space into its map, and begins another.
    #[inline(always)]
    fn end_space_run(&self, run: &mut SpaceRun, root: u64, bin: u32) {
        let ended = *run;
        change(&mut run.changes);
        if ended.pages_made_writable != 0 {
            let key = SpaceKey { tgid: self.key.tgid, tid: self.key.tid, root: ended.root };
            let space = match SPACES.get_ptr_mut(key) {
                Some(space) => Some(space),
                None => {
                    let _ = SPACES.insert(key, &NEW_SPACE, u64::from(BPF_NOEXIST));
                    SPACES.get_ptr_mut(key)
                }
            };
            if let Some(space) = space {
                // SAFETY: a live map value of this thread only; the kernel may forget the entry meanwhile, not its memory.
                let space = unsafe { &mut *space };
                space.pages_made_writable += ended.pages_made_writable;
                add_at(&mut space.first_writes, ended.bin, ended.first_writes);
            }
        }
        *run = SpaceRun { changes: run.changes, root, pages_made_writable: 0, bin, first_writes: 0 };
        change(&mut run.changes);
    }

    /// Puts the run of the instruction into its map, and begins another.
    #[inline(always)]
    fn end_code_run(&self, run: &mut CodeRun, root: u64, instruction: u64) {
        let ended = *run;
        change(&mut run.changes);
        if ended.pages != 0 {
            let CodeRun { root, instruction, pages, .. } = ended;
            let key = CodeKey { tgid: self.key.tgid, tid: self.key.tid, root, instruction };
            if let Some(count) = CODE.get_ptr_mut(key) {
                // SAFETY: as above.
                unsafe { *count += pages };
            } else {
                let _ = CODE.insert(key, pages, u64::from(BPF_NOEXIST));
            }
        }
        *run = CodeRun { changes: run.changes, root, instruction, pages: 0 };
        change(&mut run.changes);
    }

    /// Where the kernel has the vCPU that this thread runs.
    #[inline(always)]
    fn vcpu(&self, thread: &mut Thread) -> Option<u64> {
        let as_of = self.settings.get(Setting::Vcpus);
        if thread.vcpu_as_of != as_of {
            // SAFETY: the value is copied at once.
            if let Some(vcpu) = unsafe { VCPUS.get(self.key.tid).copied() } {
                thread.vcpu = vcpu;
            }
            thread.vcpu_as_of = as_of;
        }
        (thread.vcpu != 0).then_some(thread.vcpu)
    }

    /// Whether a page's bit of the VM's window is set.
    #[inline(always)]
    fn is_marked(&self, vm: TrackedVm, gfn: u64) -> bool {
        let word = gfn / 64;
        if word < u64::from(vm.words)
            && let Some(word) = PAGES.get_ptr(vm.first_word + word as u32)
        {
            // SAFETY: a live map value.
            return unsafe { core::ptr::read_volatile(word) } >> (gfn % 64) & 1 != 0;
        }
        false
    }

    /// Sets bits of the VM's window; returns how many were not set before.
    #[inline(always)]
    fn mark_word(&self, ctx: &impl EbpfContext, vm: TrackedVm, word: u64, bits: u64) -> u32 {
        if word < u64::from(vm.words)
            && let Some(word) = PAGES.get_ptr_mut(vm.first_word + word as u32)
        {
            // SAFETY: a live map value.
            let before = unsafe { atomic::set_bits(word, bits) };
            (bits & !before).count_ones()
        } else {
            self.lose(ctx, Loss::OutOfRange);
            0
        }
    }

    /// Counts an event that could not be counted in full.
    #[inline(always)]
    pub(crate) fn lose(&self, ctx: &impl EbpfContext, loss: Loss) {
        if let Some(count) = LOSSES.get_ptr_mut(loss as u32) {
            // SAFETY: a live map value.
            unsafe { atomic::add(count, 1) };
        }
        warn!(ctx, "an event of thread {} was lost: reason {}", self.key.tid, loss as u32);
    }
}

/// Counts the beginning, and then the end, of a change of runs: the agent takes no record that it read meanwhile. The compiler moves no
/// write across it; processors that would (no x86 does) need a barrier here.
#[inline(always)]
fn change(changes: &mut u64) {
    // SAFETY: no instruction at all; only the compiler minds it.
    unsafe { core::arch::asm!("", options(nostack)) };
    // SAFETY: a live field.
    unsafe { core::ptr::write_volatile(changes, changes.wrapping_add(1)) };
    // SAFETY: as above.
    unsafe { core::arch::asm!("", options(nostack)) };
}

/// How a write stands to its VM's window of write protection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Moment {
    /// There is none.
    None,
    /// It is about to begin: the page will be protected, and what is written now does not count.
    Before,
    /// So many nanoseconds after its begin.
    In(u64),
    /// To a page that it does not protect.
    Aside,
    /// To a page that is marked already.
    Marked,
}

/// The VM's window; none: there is none.
#[inline(always)]
fn window_of(vm: TrackedVm) -> Option<Armed> {
    // SAFETY: a live map value, of which the agent changes each word in one piece, the subset only while there is no window.
    let armed = unsafe { core::ptr::read_volatile(ARMED.get_ptr(vm.slot)?) };
    (armed.began_ns != 0).then_some(armed)
}

impl Moment {
    /// Of a write to a page that is marked.
    #[inline(always)]
    fn of_marked(vm: TrackedVm, gfn: u64) -> Self {
        match window_of(vm) {
            Some(armed) if !armed.subset.holds(gfn) => Self::Aside,
            _ => Self::Marked,
        }
    }

    /// Of any other.
    #[inline(always)]
    fn now(vm: TrackedVm, gfn: u64) -> Self {
        let Some(armed) = window_of(vm) else { return Self::None };
        if !armed.subset.holds(gfn) {
            return Self::Aside;
        }
        // SAFETY: has no precondition.
        unsafe { bpf_ktime_get_ns() }.checked_sub(armed.began_ns).map_or(Self::Before, Self::In)
    }
}

#[inline(always)]
fn add_at(bins: &mut [u32; FIRST_WRITE_SLOTS], bin: u32, pages: u32) {
    let count = &mut bins[masked(bin) as usize % FIRST_WRITE_SLOTS];
    *count = count.wrapping_add(pages);
}

/// The number modulo [`FIRST_WRITE_SLOTS`], by an instruction that stays. The compiler can tell that a bin is small and would leave it
/// out; the verifier cannot.
#[inline(always)]
fn masked(number: u32) -> u64 {
    const { assert!(FIRST_WRITE_SLOTS == 256) };
    let mut number = u64::from(number);
    // SAFETY: changes nothing but its register.
    unsafe { core::arch::asm!("{0} &= 255", inout(reg) number, options(nomem, nostack)) };
    number
}

/// What the agent has set.
#[derive(Clone, Copy)]
struct Settings(*const [u64; Setting::COUNT as usize]);

impl Settings {
    #[inline(always)]
    fn now() -> Option<Self> {
        SETTINGS.get_ptr(0).map(Self)
    }

    #[inline(always)]
    fn get(self, which: Setting) -> u64 {
        // SAFETY: a live map value, each word of which the agent changes in one piece.
        unsafe { core::ptr::read_volatile(self.0.cast::<u64>().add(which as usize)) }
    }
}
