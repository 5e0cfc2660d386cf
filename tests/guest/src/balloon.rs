//! Owns the virtio-balloon driver: gives pages of the pool to the host and takes them back, names the free ones when asked, and has the pool churn meanwhile.
//!
//! What the host wants is looked at when an interrupt comes, and now and then, so that none is missed.

use core::sync::atomic::{
    AtomicBool, AtomicU32, AtomicU64,
    Ordering::{Acquire, Relaxed, Release},
};

use dunlin_guest::memory::{CHUNK_BYTES, PAGES_PER_CHUNK};
use dunlin_guest::page::{self, Fill, PAGE_BYTES, Page};
use dunlin_guest::pool::{Counters, Pool, Spec};
use dunlin_guest::workload::Pacer;

use crate::once::Once;
use crate::virtio::{NEXT, Queue, QueueMemory, Transport, WRITABLE};
use crate::writer::VERIFY;
use crate::{clock, cpu};

const QUEUE: usize = 64;
/// The driver names free pages when asked.
const FEATURE_HINT: u64 = 1 << 3;
/// The driver names free pages by itself.
const FEATURE_REPORTING: u64 = 1 << 5;
/// Offsets in the configuration space.
const TARGET: u64 = 0;
const ACTUAL: u64 = 4;
const COMMAND: u64 = 8;
/// Naming is to end, or has ended.
const STOP: u32 = 0;
/// What was named may be used.
const DONE: u32 = 1;
/// Pages of one request.
const MOST_NUMBERS: usize = 256;
/// Time between two looks without an interrupt.
const LOOK_NS: u64 = 50_000_000;
/// Pages of one report.
const REPORT_PAGES: usize = 32;
/// Pages that churn uses or frees in one round at most.
const BATCH_PAGES: u64 = 256;

static INFLATE: Once<QueueMemory<QUEUE>> = Once::new(QueueMemory::new());
static DEFLATE: Once<QueueMemory<QUEUE>> = Once::new(QueueMemory::new());
static HINT: Once<QueueMemory<QUEUE>> = Once::new(QueueMemory::new());
static REPORT: Once<QueueMemory<QUEUE>> = Once::new(QueueMemory::new());
static NUMBERS: Once<[[u32; MOST_NUMBERS]; 2]> = Once::new([[0; MOST_NUMBERS]; 2]);
static COMMANDS: Once<[u32; QUEUE]> = Once::new([0; QUEUE]);

/// Whether there is a pool to verify.
static IS_USED: AtomicBool = AtomicBool::new(false);
static VERIFIED: AtomicU32 = AtomicU32::new(0);
static VERIFIED_PAGES: AtomicU64 = AtomicU64::new(0);
static VERIFIED_MISMATCHES: AtomicU64 = AtomicU64::new(0);

/// Whether a full verification is done, as far as the pool is concerned.
pub fn has_verified(generation: u32) -> bool {
    !IS_USED.load(Relaxed) || VERIFIED.load(Acquire) >= generation
}

/// Pages that the last full verification checked, and how many of them were wrong.
pub fn verified() -> (u64, u64) {
    (VERIFIED_PAGES.load(Relaxed), VERIFIED_MISMATCHES.load(Relaxed))
}

/// One of the queues on which page numbers travel, with at most one request under way.
struct Numbers {
    queue: Queue<QUEUE>,
    numbers: &'static mut [u32; MOST_NUMBERS],
    under_way: u32,
}

impl Numbers {
    /// Sends what `next` yields; false if that is nothing.
    fn send(&mut self, most: u32, mut next: impl FnMut() -> Option<u64>) -> bool {
        let mut count = 0;
        while count < most.min(MOST_NUMBERS as u32)
            && let Some(address) = next()
        {
            self.numbers[count as usize] = (address / PAGE_BYTES as u64) as u32;
            count += 1;
        }
        self.under_way = count;
        if count > 0 {
            self.queue.describe(0, self.numbers.as_ptr() as u64, count as usize * 4, 0, 0);
            self.queue.offer(0);
            self.queue.notify();
        }
        count > 0
    }

    /// How many pages the host has taken note of since the last call.
    fn done(&mut self) -> u32 {
        self.queue.take().map_or(0, |_| core::mem::take(&mut self.under_way))
    }
}

/// Reporting free pages, with at most one request under way.
struct Reports {
    queue: Queue<QUEUE>,
    pages: [u64; REPORT_PAGES],
    under_way: usize,
}

/// Naming free pages.
struct Hints {
    queue: Queue<QUEUE>,
    commands: &'static mut [u32; QUEUE],
    /// Descriptors that the device does not hold.
    free: [usize; QUEUE],
    free_count: usize,
    /// The command that is answered, or was last.
    command: u32,
    /// Where to look for the next free pages; `None` when all are named.
    from: Option<u64>,
}

impl Hints {
    fn reclaim(&mut self) {
        while let Some((index, _)) = self.queue.take() {
            self.free[self.free_count] = index;
            self.free_count += 1;
        }
    }

    fn offer(&mut self, address: Option<u64>, value: u32, len: usize) {
        self.free_count -= 1;
        let index = self.free[self.free_count];
        match address {
            Some(address) => self.queue.describe(index, address, len, WRITABLE, 0),
            None => {
                self.commands[index] = value;
                self.queue.describe(index, &raw const self.commands[index] as u64, 4, 0, 0);
            }
        }
        self.queue.offer(index);
    }
}

/// A running balloon.
pub struct Balloon {
    transport: Transport,
    chunks: &'static [u64],
    pool: Pool<'static>,
    pacer: Pacer,
    inflate: Numbers,
    deflate: Numbers,
    hints: Option<Hints>,
    reports: Option<Reports>,
    target: u32,
    actual: u32,
    interrupt: usize,
    interrupts: u64,
    next_look: u64,
    verified: u32,
    /// Rounds of hints that were answered whole.
    pub rounds: u64,
}

/// Where page `index` of the pool is.
fn address(chunks: &[u64], index: u64) -> u64 {
    chunks[1 + (index / PAGES_PER_CHUNK) as usize] + index % PAGES_PER_CHUNK * PAGE_BYTES as u64
}

/// The page itself.
fn page_at(chunks: &[u64], index: u64) -> &'static mut Page {
    // SAFETY: a page of a chunk that is the pool's alone, mapped one to one in service spaces; each reference is dropped before the next is made.
    unsafe { &mut *(address(chunks, index) as *mut Page) }
}

impl Balloon {
    /// Starts the balloon behind `transport` over the pool in `chunks`, whose first is for its table, and fills the pool.
    pub fn start(transport: Transport, interrupt: usize, spec: Spec, chunks: &'static [u64]) -> Option<Self> {
        let pages = (chunks.len() as u64).checked_sub(1).filter(|count| *count > 0)? * PAGES_PER_CHUNK;
        let wanted = FEATURE_HINT | if spec.reports { FEATURE_REPORTING } else { 0 };
        let features = transport.negotiate(wanted)?;
        let pages = pages.min(CHUNK_BYTES / 4).min(spec.bytes / PAGE_BYTES as u64);
        // SAFETY: the first chunk is the pool's alone, mapped one to one, and holds as many entries.
        let table = unsafe { core::slice::from_raw_parts_mut(chunks[0] as *mut u32, pages as usize) };
        let pool = Pool::new(table);
        for index in 0..pages {
            page::initialise(page_at(chunks, index), page::tag(0xfd, index), 1, Fill::Random);
        }
        let [first, second] = NUMBERS.take();
        let inflate = Numbers { queue: Queue::new(transport, 0, INFLATE.take())?, numbers: first, under_way: 0 };
        let deflate = Numbers { queue: Queue::new(transport, 1, DEFLATE.take())?, numbers: second, under_way: 0 };
        let hints = match features & FEATURE_HINT {
            0 => None,
            _ => Some(Hints {
                queue: Queue::new(transport, 2, HINT.take())?,
                commands: COMMANDS.take(),
                free: core::array::from_fn(|index| index),
                free_count: QUEUE,
                command: STOP,
                from: None,
            }),
        };
        // Queues are numbered without gaps.
        let reports = match features & FEATURE_REPORTING {
            0 => None,
            _ => Some(Reports {
                queue: Queue::new(transport, if hints.is_some() { 3 } else { 2 }, REPORT.take())?,
                pages: [0; REPORT_PAGES],
                under_way: 0,
            }),
        };
        transport.start();
        IS_USED.store(true, Relaxed);
        let now = crate::io::tsc();
        Some(Self {
            transport,
            chunks,
            pool,
            pacer: Pacer::new(spec.churn_pages_per_second, clock::tsc_hz(), now),
            inflate,
            deflate,
            hints,
            reports,
            target: 0,
            actual: 0,
            interrupt,
            interrupts: 0,
            next_look: now,
            verified: 0,
            rounds: 0,
        })
    }

    /// Pages in the balloon, and pages of the pool.
    pub fn pages(&self) -> (u32, u64) {
        (self.actual, self.pool.pages())
    }

    /// What the pool has done.
    pub fn counters(&self) -> Counters {
        self.pool.counters
    }

    /// One round: what the host wants, then churn. Returns when the next round must be.
    pub fn round(&mut self, now: u64) -> u64 {
        let interrupts = cpu::cpu(0).device_interrupts[self.interrupt].load(Relaxed);
        if interrupts != self.interrupts {
            self.interrupts = interrupts;
            self.transport.acknowledge();
            self.next_look = now;
        }
        if now >= self.next_look {
            self.next_look = now + clock::cycles(LOOK_NS);
            self.target = self.transport.config32(TARGET);
            let command = self.transport.config32(COMMAND);
            self.obey(command);
        }
        self.move_pages();
        self.name_pages();
        self.report_pages();
        self.verify();
        let (chunks, due) = (self.chunks, self.pacer.due(now).min(BATCH_PAGES));
        (0..due).for_each(|_| self.pool.churn(|index| page_at(chunks, index)));
        self.pacer.wrote(due);
        self.next_look.min(self.pacer.next_due().max(now + clock::cycles(2_000_000)))
    }

    /// Gives and takes until the balloon has what the host wants, a request at a time.
    fn move_pages(&mut self) {
        let before = self.actual;
        self.actual += self.inflate.done();
        self.actual -= self.deflate.done();
        if self.actual != before {
            self.transport.set_config32(ACTUAL, self.actual);
        }
        if self.inflate.under_way > 0 || self.deflate.under_way > 0 {
            return;
        }
        let (chunks, pool) = (self.chunks, &mut self.pool);
        if self.actual < self.target {
            self.inflate.send(self.target - self.actual, || pool.give().map(|index| address(chunks, index)));
        } else if self.actual > self.target {
            self.deflate.send(self.actual - self.target, || pool.take_back().map(|index| address(chunks, index)));
        }
    }

    fn obey(&mut self, command: u32) {
        let Some(hints) = &mut self.hints else { return };
        match command {
            STOP => hints.from = hints.from.map(|_| u64::MAX),
            DONE => {
                hints.from = hints.from.map(|_| u64::MAX);
                self.pool.forget_names();
            }
            _ if command == hints.command => {}
            _ => {
                hints.reclaim();
                hints.command = command;
                hints.from = Some(0);
                if hints.free_count > 0 {
                    hints.offer(None, command, 4);
                }
            }
        }
    }

    /// Names free pages as long as there is room in the queue; at the end says so.
    fn name_pages(&mut self) {
        let Some(hints) = &mut self.hints else { return };
        hints.reclaim();
        while hints.free_count > 0
            && let Some(from) = hints.from
        {
            match self.pool.name(from) {
                Some((first, count)) => {
                    hints.offer(Some(address(self.chunks, first)), 0, count as usize * PAGE_BYTES);
                    hints.from = Some(first + count);
                }
                None => {
                    hints.offer(None, STOP, 4);
                    hints.from = None;
                    self.rounds += 1;
                }
            }
        }
        hints.queue.notify();
    }

    /// Reports free pages, a request at a time.
    fn report_pages(&mut self) {
        let Some(reports) = &mut self.reports else { return };
        if reports.under_way > 0 && reports.queue.take().is_some() {
            let done = core::mem::take(&mut reports.under_way);
            reports.pages[..done].iter().for_each(|page| self.pool.reported(*page));
        }
        if reports.under_way > 0 {
            return;
        }
        while reports.under_way < REPORT_PAGES
            && let Some(page) = self.pool.report()
        {
            reports.pages[reports.under_way] = page;
            reports.under_way += 1;
        }
        let count = reports.under_way;
        for (index, page) in reports.pages[..count].iter().enumerate() {
            let (more, next) = if index + 1 < count { (NEXT, index + 1) } else { (0, 0) };
            reports.queue.describe(index, address(self.chunks, *page), PAGE_BYTES, WRITABLE | more, next);
        }
        if count > 0 {
            reports.queue.offer(0);
            reports.queue.notify();
        }
    }

    /// Checks everything when that was asked for.
    fn verify(&mut self) {
        let wanted = VERIFY.load(Acquire);
        if wanted == self.verified {
            return;
        }
        let (chunks, before) = (self.chunks, self.pool.counters.mismatches);
        let checked = self.pool.check_all(|index| page_at(chunks, index));
        VERIFIED_PAGES.store(checked, Relaxed);
        VERIFIED_MISMATCHES.store(self.pool.counters.mismatches - before, Relaxed);
        self.verified = wanted;
        VERIFIED.store(wanted, Release);
    }
}
