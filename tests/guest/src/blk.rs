//! Owns the virtio-blk driver and the block workload: tagged blocks are written, flushed, read back and checked.

use core::sync::atomic::Ordering::Relaxed;

use dunlin_guest::block::{self, Action, BLOCK_BYTES, MAX_BLOCKS, Planner, Spec};
use dunlin_guest::ledger::IrqLedger;
use dunlin_guest::workload::Pacer;

use crate::once::Once;
use crate::virtio::{NEXT, Queue, QueueMemory, Transport, WRITABLE};
use crate::{clock, cpu};

const QUEUE: usize = 16;
const SLOTS: usize = 4;
const SECTOR_BYTES: u64 = 512;
const FEATURE_READ_ONLY: u64 = 1 << 5;
const FEATURE_FLUSH: u64 = 1 << 9;
const REQUEST_READ: u32 = 0;
const REQUEST_WRITE: u32 = 1;
const REQUEST_FLUSH: u32 = 4;

#[repr(C, align(4096))]
struct Slot {
    data: [u64; BLOCK_BYTES / 8],
    kind: u32,
    reserved: u32,
    sector: u64,
    status: u8,
}

const EMPTY_SLOT: Slot = Slot { data: [0; BLOCK_BYTES / 8], kind: 0, reserved: 0, sector: 0, status: 0xff };

static MEMORY: Once<QueueMemory<QUEUE>> = Once::new(QueueMemory::new());
static SLOT_MEMORY: Once<[Slot; SLOTS]> = Once::new([EMPTY_SLOT; SLOTS]);
static SEQUENCES: Once<[u32; MAX_BLOCKS]> = Once::new([0; MAX_BLOCKS]);

/// Counters of the block workload.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counters {
    /// Blocks written.
    pub written: u64,
    /// Blocks read back and checked.
    pub read: u64,
    /// Flushes done.
    pub flushes: u64,
    /// Blocks that were not what they had to be.
    pub mismatches: u64,
    /// Requests that the device failed.
    pub errors: u64,
}

/// A running disk with its workload.
pub struct Block {
    transport: Transport,
    queue: Queue<QUEUE>,
    slots: &'static mut [Slot; SLOTS],
    busy: [Option<Action>; SLOTS],
    sequences: &'static mut [u32; MAX_BLOCKS],
    planner: Planner,
    pacer: Pacer,
    spec: Spec,
    flushes: bool,
    interrupt: usize,
    ledger: IrqLedger,
    taken_before: u16,
    run: u64,
    /// Size of the disk.
    pub capacity_bytes: u64,
    /// Counters.
    pub counters: Counters,
}

impl Block {
    /// Starts the disk behind `transport`; its interrupts are counted in slot `interrupt`. A read-only disk is left idle.
    pub fn start(transport: Transport, interrupt: usize, spec: Spec) -> Option<Self> {
        let features = transport.negotiate(FEATURE_FLUSH | FEATURE_READ_ONLY)?;
        let sectors = u64::from(transport.config32(0)) | u64::from(transport.config32(4)) << 32;
        let capacity_bytes = sectors * SECTOR_BYTES;
        let span = spec.span_bytes.min(capacity_bytes);
        let blocks = (span / BLOCK_BYTES as u64).min(MAX_BLOCKS as u64) as usize;
        let queue = Queue::new(transport, 0, MEMORY.take())?;
        transport.start();
        let usable = blocks > 0 && features & FEATURE_READ_ONLY == 0;
        let now = crate::io::tsc();
        let mut block = Self {
            transport,
            queue,
            slots: SLOT_MEMORY.take(),
            busy: [None; SLOTS],
            sequences: SEQUENCES.take(),
            planner: Planner::new(blocks.max(1), now),
            pacer: Pacer::new(0, clock::tsc_hz(), now),
            spec,
            flushes: features & FEATURE_FLUSH != 0,
            interrupt,
            ledger: IrqLedger::default(),
            taken_before: 0,
            run: now,
            capacity_bytes,
            counters: Counters::default(),
        };
        if usable {
            block.set_rate(spec.rate_blocks_per_second);
        }
        Some(block)
    }

    /// Changes the rate while running.
    pub fn set_rate(&mut self, rate_blocks_per_second: u64) {
        self.spec.rate_blocks_per_second = rate_blocks_per_second;
        self.pacer = Pacer::new(rate_blocks_per_second, clock::tsc_hz(), crate::io::tsc());
    }

    /// The rate wanted.
    pub fn rate_blocks_per_second(&self) -> u64 {
        self.spec.rate_blocks_per_second
    }

    /// Interrupts lost and spurious.
    pub fn interrupts_lost_spurious(&self) -> (u64, u64) {
        (self.ledger.lost, self.ledger.spurious)
    }

    /// One round: completions, book of interrupts, new requests. Returns when the next round must be.
    pub fn round(&mut self, now: u64, run_cycles: u64) -> u64 {
        let interrupts = cpu::cpu(0).device_interrupts[self.interrupt].load(Relaxed);
        if self.ledger.is_new(interrupts) {
            self.transport.acknowledge();
        }
        while let Some((head, _)) = self.queue.take() {
            self.complete(head / 3);
        }
        let progress = self.queue.taken() != self.taken_before;
        self.taken_before = self.queue.taken();
        self.ledger.look(interrupts, progress, progress, run_cycles, clock::cycles(crate::net::IRQ_NS));
        let due = self.pacer.due(now).min(SLOTS as u64);
        let started = (0..due).take_while(|_| self.submit()).count() as u64;
        self.pacer.wrote(started);
        self.queue.notify();
        // With all slots busy the next completion wakes us.
        if started < due { u64::MAX } else { self.pacer.next_due() }
    }

    fn submit(&mut self) -> bool {
        let Some(slot) = self.busy.iter().position(Option::is_none) else { return false };
        let action = self.planner.next(|block| self.sequences[block] != 0);
        let in_flight = |block| {
            self.busy.iter().flatten().any(|other| matches!(other, Action::Write(b) | Action::Read(b) if *b == block))
        };
        match action {
            Action::Write(block) | Action::Read(block) if in_flight(block) => return true,
            Action::Flush if !self.flushes => return true,
            _ => {}
        }
        let memory = &mut self.slots[slot];
        let (kind, index, flags) = match action {
            Action::Write(index) => {
                let sequence = self.sequences[index].wrapping_add(1).max(1);
                self.sequences[index] = sequence;
                block::fill(&mut memory.data, index, sequence, self.run);
                (REQUEST_WRITE, index, 0)
            }
            Action::Read(index) => {
                memory.data.fill(0);
                (REQUEST_READ, index, WRITABLE)
            }
            Action::Flush => (REQUEST_FLUSH, 0, 0),
        };
        memory.kind = kind;
        memory.sector = index as u64 * (BLOCK_BYTES as u64 / SECTOR_BYTES);
        memory.status = 0xff;
        let (data, header, status) =
            (&raw const memory.data as u64, &raw const memory.kind as u64, &raw const memory.status as u64);
        let head = 3 * slot;
        if kind == REQUEST_FLUSH {
            self.queue.describe(head, header, 16, NEXT, head + 2);
        } else {
            self.queue.describe(head, header, 16, NEXT, head + 1);
            self.queue.describe(head + 1, data, BLOCK_BYTES, NEXT | flags, head + 2);
        }
        self.queue.describe(head + 2, status, 1, WRITABLE, 0);
        self.queue.offer(head);
        self.busy[slot] = Some(action);
        true
    }

    fn complete(&mut self, slot: usize) {
        let Some(action) = self.busy.get_mut(slot).and_then(Option::take) else { return };
        let memory = &self.slots[slot];
        // SAFETY: a field of our own static; volatile as the device wrote it.
        let status = unsafe { (&raw const memory.status).read_volatile() };
        if status != 0 {
            self.counters.errors += 1;
            if let Action::Write(block) = action {
                self.sequences[block] = 0; // what the disk holds now is not known
            }
            return;
        }
        match action {
            Action::Write(_) => self.counters.written += 1,
            Action::Flush => self.counters.flushes += 1,
            Action::Read(index) => {
                self.counters.read += 1;
                if !block::check(&memory.data, index, self.sequences[index], self.run) {
                    self.counters.mismatches += 1;
                }
            }
        }
    }
}
