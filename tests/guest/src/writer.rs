//! Owns the writer task: it fills the vCPU's working set, writes its pages at the wanted rate and checks each before it does.
//! Runs in an address space of its own, where the working set is mapped at an address of its own (`paging.rs`).

use core::sync::atomic::{
    AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

use dunlin_guest::ledger::{RunClock, TimerWatch};
use dunlin_guest::memory::{Grant, PAGES_PER_CHUNK};
use dunlin_guest::page::{self, Fill, Mismatch, PAGE_BYTES, Page, Part, Rewrite};
use dunlin_guest::text::Buffer;
use dunlin_guest::window::Windows;
use dunlin_guest::workload::{Pacer, Pattern, Picker, Spec};

use crate::cpu::{self, Cpu, Shared, WRITER};
use crate::panic::PANICKED;
use crate::{apic, clock, io, paging, serial};

/// Generation of the last full verification that was asked for.
pub static VERIFY: AtomicU32 = AtomicU32::new(0);

/// Time between two batches of a writer that keeps a rate.
pub static SLICE_NS: AtomicU64 = AtomicU64::new(2_000_000);

/// Length of the windows of which the writer tells its own truth; 0 is off.
pub static WINDOW_NS: AtomicU64 = AtomicU64::new(0);

/// Pages between two looks at the clock.
const BATCH_PAGES: u64 = 64;
/// How often a stopped writer looks for new settings.
const STOPPED_NS: u64 = 50_000_000;
/// Observed running time after which a timer that should have fired counts as stalled.
const STALL_NS: u64 = 1_000_000_000;

impl Shared {
    /// Publishes new settings for the writer. Only one task may do this.
    pub fn publish(&self, spec: &Spec) {
        self.wanted_generation.fetch_add(1, Release);
        self.wanted_bytes.store(spec.working_set_bytes, Relaxed);
        self.wanted_rate.store(spec.rate_pages_per_second, Relaxed);
        let look = u32::from(spec.share_percent) << 16 | (spec.fill as u32) << 8 | spec.pattern as u32;
        self.wanted_look.store(look, Relaxed);
        self.wanted_generation.fetch_add(1, Release);
    }

    /// The settings last published.
    pub fn wanted(&self) -> Spec {
        let look = self.wanted_look.load(Relaxed);
        Spec {
            working_set_bytes: self.wanted_bytes.load(Relaxed),
            rate_pages_per_second: self.wanted_rate.load(Relaxed),
            pattern: Pattern::from_u8(look as u8),
            fill: Fill::from_u8((look >> 8) as u8),
            share_percent: (look >> 16) as u8,
        }
    }
}

struct Writer {
    cpu: &'static Cpu,
    index: usize,
    pages: *mut Page,
    table: *mut u32,
    spec: Spec,
    filled: u64,
    /// Sum of the sequence table, as it must be.
    table_sum: u32,
    words: usize,
    picker: Picker,
    pacer: Pacer,
    run: RunClock,
    watch: TimerWatch,
    windows: Option<Windows<'static>>,
}

/// Entry of the writer task.
pub extern "sysv64" fn main(cpu: &'static Cpu) -> ! {
    let now = cpu.look(0);
    let index = cpu.number();
    let spec = cpu.shared.wanted();
    let mut writer = Writer {
        cpu,
        index,
        pages: paging::working_set_address(index) as *mut Page,
        table: paging::table_address(index) as *mut u32,
        spec,
        filled: 0,
        table_sum: 0,
        words: 0,
        picker: Picker::new(spec.pattern, 1, 1),
        pacer: Pacer::new(0, 1, 0),
        run: RunClock::new(now, clock::cycles(1_000_000)),
        watch: TimerWatch::default(),
        windows: windows(cpu, now),
    };
    writer.run()
}

/// The windows, if they were asked for.
fn windows(cpu: &Cpu, now: u64) -> Option<Windows<'static>> {
    let length_ns = WINDOW_NS.load(Relaxed);
    let pages = cpu.shared.granted_pages.load(Relaxed);
    if length_ns == 0 || pages == 0 {
        return None;
    }
    let grant = Grant { data_chunks: pages / PAGES_PER_CHUNK, ..Grant::default() };
    let start = paging::table_address(cpu.number()) + grant.bits_offset();
    // SAFETY: behind the sequence table there is room for these words in every grant; they are mapped in this task's address space,
    // zero, and used by this task only.
    let bits = unsafe { core::slice::from_raw_parts_mut(start as *mut u64, Windows::words(pages)) };
    Some(Windows::new(bits, length_ns, clock::tsc_hz(), now))
}

impl Writer {
    fn run(&mut self) -> ! {
        let shared = &self.cpu.shared;
        let slice = clock::cycles(SLICE_NS.load(Relaxed));
        let mut generation = 1; // odd: never a settled one
        let mut planned = 0;
        while !PANICKED.load(Relaxed) {
            let slept_until = core::mem::take(&mut planned);
            let now = self.look(slept_until);
            let wanted = shared.wanted_generation.load(Acquire);
            if wanted != generation && wanted.is_multiple_of(2) {
                let spec = shared.wanted();
                if shared.wanted_generation.load(Acquire) == wanted {
                    generation = wanted;
                    self.apply(spec, wanted);
                    continue;
                }
            }
            let verify = VERIFY.load(Acquire);
            if verify != shared.verified_generation.load(Relaxed) {
                self.verify_all();
                shared.verified_generation.store(verify, Release);
            }
            self.poison();
            self.look_at_window(now, slept_until);
            let held_until = shared.held_until.load(Relaxed);
            if now < held_until {
                planned = held_until;
                self.cpu.wait(planned);
                continue;
            }
            let due = self.pacer.due(now).min(BATCH_PAGES);
            if due > 0 {
                self.write_batch(due);
                self.pacer.wrote(due);
                shared.pages_dropped.store(self.pacer.dropped_pages, Relaxed);
            } else if shared.spin.load(Relaxed) == 0 {
                planned = match self.spec.rate_pages_per_second {
                    0 => now + clock::cycles(STOPPED_NS),
                    _ => self.pacer.next_due().max(now + slice),
                };
                self.cpu.wait(planned);
            } else {
                io::relax();
            }
        }
        cpu::halt_for_ever()
    }

    /// Looks at the clock, at the address space, and whether the timer still fires.
    fn look(&mut self, planned: u64) -> u64 {
        let now = self.cpu.look(planned);
        if !paging::in_own_space(self.index, WRITER) {
            self.cpu.shared.address_space_mismatches.fetch_add(1, Relaxed);
        }
        let run = self.run.look(now, planned);
        let overdue = now > self.cpu.armed_until.load(Relaxed);
        if self.watch.look(self.cpu.ticks.load(Relaxed), overdue, run, clock::cycles(STALL_NS)) {
            self.cpu.shared.timer_stalls.fetch_add(1, Relaxed);
            apic::arm_timer(1000);
        }
        now
    }

    /// Keeps the book of windows, and tells one that is over.
    #[inline]
    fn look_at_window(&mut self, now: u64, slept_until: u64) {
        let Some(windows) = &mut self.windows else { return };
        let dropped = self.pacer.dropped_pages;
        let Some(report) = windows.look(now, slept_until, dropped) else { return };
        let mut line = Buffer::<512>::new();
        report.line(&mut line, self.index, clock::tsc_hz());
        serial::write(line.as_bytes());
        windows.restart(io::tsc(), dropped);
    }

    /// Takes over new settings; a changed fill writes the whole working set anew.
    fn apply(&mut self, spec: Spec, generation: u32) {
        let granted = self.cpu.shared.granted_pages.load(Relaxed);
        let pages = (spec.working_set_bytes / PAGE_BYTES as u64).clamp(1, granted.max(1));
        let keep = if spec.fill == self.spec.fill { self.filled.min(pages) } else { 0 };
        self.spec = spec;
        self.words = page::share_words(spec.share_percent);
        self.filled = keep;
        self.cpu.shared.filled_pages.store(keep, Relaxed);
        self.table_sum = (0..keep).fold(0, |sum, index| sum.wrapping_add(self.sequence(index)));
        while self.filled < pages && granted > 0 {
            for _ in 0..BATCH_PAGES.min(pages - self.filled) {
                let index = self.filled;
                page::initialise(self.page(index), page::tag(self.index as u32, index), 1, spec.fill);
                self.set_sequence(index, 1);
                self.table_sum = self.table_sum.wrapping_add(1);
                self.filled += 1;
            }
            self.cpu.shared.filled_pages.store(self.filled, Relaxed);
            self.look(0);
        }
        self.picker = Picker::new(spec.pattern, self.filled, u64::from(generation) << 8 | self.index as u64);
        let rate = if self.filled == 0 { 0 } else { spec.rate_pages_per_second };
        self.pacer = Pacer::new(rate, clock::tsc_hz(), self.cpu.look(0));
        if let Some(windows) = &mut self.windows {
            windows.restart(io::tsc(), 0);
        }
        self.cpu.shared.settled_generation.store(generation, Release);
    }

    #[inline]
    fn page(&mut self, index: u64) -> &'static mut Page {
        debug_assert!(index < self.cpu.shared.granted_pages.load(Relaxed));
        // SAFETY: `index` is below the number of granted pages, all mapped in this address space and used by this task
        // only; each reference is dropped before the next is made.
        unsafe { &mut *self.pages.add(index as usize) }
    }

    #[inline]
    fn sequence(&self, index: u64) -> u32 {
        // SAFETY: the table has an entry for each granted page.
        unsafe { *self.table.add(index as usize) }
    }

    #[inline]
    fn set_sequence(&mut self, index: u64, sequence: u32) {
        // SAFETY: as in `sequence`.
        unsafe { *self.table.add(index as usize) = sequence }
    }

    #[inline]
    fn write_batch(&mut self, pages: u64) {
        for _ in 0..pages {
            let index = self.write_next();
            if let Some(windows) = &mut self.windows {
                windows.wrote(index);
            }
        }
    }

    /// Writes a page; returns which.
    #[inline]
    fn write_next(&mut self) -> u64 {
        let index = self.picker.pick();
        let old = self.sequence(index);
        let new = Rewrite {
            tag: page::tag(self.index as u32, index),
            sequence: old.wrapping_add(1),
            fill: self.spec.fill,
            words: self.words,
        };
        if let Err(mismatch) = page::rewrite(self.page(index), old, &new) {
            self.report(index, &mismatch);
            page::initialise(self.page(index), new.tag, new.sequence, new.fill);
        }
        self.set_sequence(index, new.sequence);
        self.table_sum = self.table_sum.wrapping_add(1);
        let written = &self.cpu.shared.pages_written;
        written.store(written.load(Relaxed) + 1, Relaxed);
        index
    }

    #[cold]
    fn report(&self, index: u64, mismatch: &Mismatch) {
        let shared = &self.cpu.shared;
        if shared.page_mismatches.fetch_add(1, Relaxed) == 0 {
            let details = [index, mismatch.word as u64, mismatch.expected, mismatch.found];
            for (slot, value) in shared.first_mismatch[1..].iter().zip(details) {
                slot.store(value, Relaxed);
            }
            shared.first_mismatch[0].store(mismatch.part as u64, Release);
        }
    }

    /// Checks every page of the working set in whole, and the sequence table against the number of writes.
    fn verify_all(&mut self) {
        let shared = &self.cpu.shared;
        let before = shared.page_mismatches.load(Relaxed);
        let mut sum = 0u32;
        for index in 0..self.filled {
            let sequence = self.sequence(index);
            sum = sum.wrapping_add(sequence);
            if let Err(mismatch) = page::verify(self.page(index), page::tag(self.index as u32, index), sequence) {
                self.report(index, &mismatch);
                page::initialise(self.page(index), page::tag(self.index as u32, index), sequence, self.spec.fill);
            }
            if index % BATCH_PAGES == 0 {
                self.look(0);
            }
        }
        if sum != self.table_sum {
            let (expected, found) = (u64::from(self.table_sum), u64::from(sum));
            self.report(0, &Mismatch { part: Part::SequenceTable, word: 0, expected, found });
            self.table_sum = sum;
        }
        shared.verified_pages.store(self.filled, Relaxed);
        shared.verified_mismatches.store(shared.page_mismatches.load(Relaxed) - before, Relaxed);
    }

    /// Breaks a page when `/poison` asked for it, to prove that breakage is noticed.
    fn poison(&mut self) {
        let wanted = self.cpu.shared.poison.load(Relaxed);
        if wanted > 0 {
            self.cpu.shared.poison.store(0, Relaxed);
            let index = (wanted - 1) % self.filled.max(1);
            if index < self.filled {
                self.page(index)[page::HEADER_WORDS] ^= 1 << 7;
            }
        }
    }
}
