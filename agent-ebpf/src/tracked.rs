//! Whose event this is, and where it is counted.

use aya_ebpf::EbpfContext;
use aya_ebpf::bindings::BPF_NOEXIST;
use aya_ebpf::helpers::bpf_get_current_pid_tgid;
use aya_log_ebpf::{debug, warn};
use dunlin_ebpf::{ExitKey, Loss, ThreadCounters, ThreadKey, TrackedVm};

use crate::atomic;
use crate::maps::{EXITS, LOSSES, PAGES, THREADS, TRACKED};

/// See [`dunlin_ebpf::constant::ONLY_TGID`].
#[unsafe(no_mangle)]
static ONLY_TGID: u32 = 0;

/// Pages under one entry of each higher page table level.
const LEVEL_SHIFT: u32 = 9;
/// 64-bit words of the bitmap that a 2 MiB mapping fills.
const WORDS_IN_2_MIB: u32 = 8;

/// An event of a tracked VM, with the thread that caused it.
pub(crate) struct Event {
    key: ThreadKey,
    vm: TrackedVm,
}

impl Event {
    /// The event under way, if the current process is tracked.
    #[inline(always)]
    pub(crate) fn current() -> Option<Self> {
        let both = bpf_get_current_pid_tgid();
        let key = ThreadKey { tgid: (both >> 32) as u32, tid: both as u32 };
        // SAFETY: a static of this program; volatile, since the loader writes it where the compiler cannot see.
        let only = unsafe { core::ptr::read_volatile(&raw const ONLY_TGID) };
        if only != 0 && only != key.tgid {
            return None;
        }
        // SAFETY: the value is copied at once; the agent never changes a window in place.
        let vm = unsafe { TRACKED.get(key.tgid).copied() }?;
        Some(Self { key, vm })
    }

    /// The counters of the thread, made on its first event.
    #[inline(always)]
    pub(crate) fn counters(&self, ctx: &impl EbpfContext) -> Option<&mut ThreadCounters> {
        if THREADS.get_ptr_mut(self.key).is_none() {
            debug!(ctx, "thread {} of process {} seen for the first time", self.key.tid, self.key.tgid);
            let zero = ThreadCounters::default();
            // Only this thread inserts its own key: an error means that the map is full, and the lookup below says so.
            let _ = THREADS.insert(self.key, zero, u64::from(BPF_NOEXIST));
        }
        match THREADS.get_ptr_mut(self.key) {
            // SAFETY: a live map value that only the current thread writes; entries are never deleted under a
            // tracked VM.
            Some(counters) => Some(unsafe { &mut *counters }),
            None => {
                self.lose(ctx, Loss::ThreadsFull);
                None
            }
        }
    }

    /// Counts one exit to user space by reason.
    #[inline(always)]
    pub(crate) fn exit(&self, ctx: &impl EbpfContext, reason: u32) {
        let key = ExitKey { tgid: self.key.tgid, tid: self.key.tid, reason };
        if let Some(count) = EXITS.get_ptr_mut(key) {
            // SAFETY: a live map value that only the current thread writes.
            unsafe { *count += 1 };
        } else if EXITS.insert(key, 1, u64::from(BPF_NOEXIST)).is_err() {
            self.lose(ctx, Loss::ExitsFull);
        }
    }

    /// Counts the pages of a mapping at `level` (1 is 4 KiB) that covers `gfn` and has become writable.
    #[inline(always)]
    pub(crate) fn made_writable(&self, ctx: &impl EbpfContext, gfn: u64, level: u32) {
        let Some(counters) = self.counters(ctx) else { return };
        match level {
            1 => {
                counters.pages_made_writable += 1;
                self.mark_word(ctx, gfn / 64, 1 << (gfn % 64));
            }
            2 => {
                counters.pages_made_writable += 1 << LEVEL_SHIFT;
                counters.huge_mappings += 1;
                let first = (gfn >> LEVEL_SHIFT) * u64::from(WORDS_IN_2_MIB);
                for word in 0..u64::from(WORDS_IN_2_MIB) {
                    self.mark_word(ctx, first + word, u64::MAX);
                }
            }
            _ => {
                counters.pages_made_writable += 1 << (2 * LEVEL_SHIFT);
                counters.huge_mappings += 1;
                self.lose(ctx, Loss::TooLarge);
            }
        }
    }

    #[inline(always)]
    fn mark_word(&self, ctx: &impl EbpfContext, word: u64, bits: u64) {
        if word < u64::from(self.vm.words)
            && let Some(word) = PAGES.get_ptr_mut(self.vm.first_word + word as u32)
        {
            // SAFETY: a live map value.
            unsafe { atomic::set_bits(word, bits) };
        } else {
            self.lose(ctx, Loss::OutOfRange);
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
