//! The Dunlin test guest: a bare-metal PVH program that writes memory, talks TCP and counts what a migration would lose.
//!
//! All of it but `entry.rs` runs at CPL 3, in user pages: some hosts run only that natively. This file owns the boot: what
//! the VMM tells, the division of RAM, the address spaces, the start of the other vCPUs.
#![no_std]
#![no_main]

mod apic;
mod balloon;
mod blk;
mod bulk;
mod clock;
mod cpu;
mod entry;
mod idt;
mod io;
mod mem;
mod monitor;
mod net;
mod once;
mod packets;
mod paging;
mod panic;
mod power;
mod report;
mod serial;
mod service;
mod start_info;
mod stun;
mod virtio;
mod web;
mod writer;

use core::sync::atomic::{
    AtomicU64, AtomicUsize,
    Ordering::{Acquire, Relaxed, Release},
};

use dunlin_guest::cmdline::{Config, MAX_CPUS};
use dunlin_guest::memory::{self, CHUNK_BYTES, Grant, PAGES_PER_CHUNK, RamMap};

use crate::cpu::{Cpu, SERVICE, WRITER};
use crate::once::Once;
use crate::paging::PageSource;

/// What every task may ask about the machine.
pub struct Settings {
    /// vCPUs that run.
    pub cpus: usize,
    /// RAM.
    pub memory_bytes: u64,
    /// Time between two pings.
    pub ipi_ns: u64,
}

static CPU_COUNT: AtomicUsize = AtomicUsize::new(1);
static MEMORY_BYTES: AtomicU64 = AtomicU64::new(0);
static IPI_NS: AtomicU64 = AtomicU64::new(0);

/// The settings; valid once the boot has set them.
pub fn settings() -> Settings {
    Settings { cpus: CPU_COUNT.load(Relaxed), memory_bytes: MEMORY_BYTES.load(Relaxed), ipi_ns: IPI_NS.load(Relaxed) }
}

/// Lets the writer task of this vCPU start.
pub fn release_writer(cpu: &Cpu) {
    cpu.tasks[WRITER].deadline.store(0, Relaxed);
}

static CONFIG: Once<Option<Config>> = Once::new(None);
static CHUNKS: Once<[u64; MAX_CHUNKS]> = Once::new([0; MAX_CHUNKS]);
/// 2 MiB chunks that are handed out at most: 16 GiB.
const MAX_CHUNKS: usize = 8192;
const PAGE_TABLE_BYTES: u64 = CHUNK_BYTES;

/// First code at CPL 3, on vCPU 0, in the boot page tables.
#[unsafe(no_mangle)]
extern "sysv64" fn rust_start() -> ! {
    idt::fill_idt();
    serial::init();
    let boot = start_info::read();
    let config: &'static Config = CONFIG.take().insert(Config::parse(boot.command_line()));
    serial::line(format_args!("BOOT dunlin-guest {} {}", env!("CARGO_PKG_VERSION"), boot.command_line()));
    if config.bad_options > 0 {
        serial::line(format_args!("WARN {} options were not understood", config.bad_options));
    }
    let tsc_source = clock::calibrate(config.tsc_khz);
    let multiplier = apic::measure_timer(clock::cycles(10_000_000));
    CPU_COUNT.store(config.cpus, Relaxed);
    MEMORY_BYTES.store(boot.ram.total_bytes(), Relaxed);
    IPI_NS.store(config.ipi_ns, Relaxed);
    writer::SLICE_NS.store(config.slice_ns, Relaxed);
    writer::WINDOW_NS.store(config.window_ns, Relaxed);

    let pool = build_spaces(config, &boot.ram);
    for cpu in cpu::all(config.cpus) {
        cpu.timer_multiplier.store(multiplier, Relaxed);
        cpu.tick_cycles.store(clock::cycles(config.tick_ns), Relaxed);
    }
    for index in 0..config.cpus {
        cpu::cpu(index).shared.publish(&config.workloads[index]);
    }
    cpu::cpu(0).shared.spin.store(u8::from(config.spin), Relaxed);

    apic::enable();
    let first = cpu::cpu(0);
    // The first sleep ends by a timer interrupt and in the service address space.
    first.wait(io::tsc() + clock::cycles(1_000_000));
    (1..config.cpus).for_each(start_cpu);
    service::run(first, config, tsc_source, pool)
}

/// Divides RAM and builds the address spaces and tasks of all vCPUs. Returns the chunks of the pool.
fn build_spaces(config: &Config, ram: &RamMap) -> &'static [u64] {
    let image = image();
    let tables = image.1;
    assert!(ram.holds_chunk(tables), "no RAM after the image");
    let mut pages = PageSource::new(tables, tables + PAGE_TABLE_BYTES);
    let chunks = CHUNKS.take();
    let mut count = 0usize;
    for (slot, chunk) in chunks.iter_mut().zip(ram.chunks(tables + PAGE_TABLE_BYTES)) {
        *slot = chunk;
        count += 1;
    }
    let chunks: &'static [u64] = chunks;
    let pool_chunks = match config.pool.bytes {
        0 => 0,
        bytes => (bytes.div_ceil(CHUNK_BYTES) as usize + 1).min(count.saturating_sub(2 * config.cpus)),
    };
    let count = count - pool_chunks;
    let pool = &chunks[count..][..pool_chunks];
    let mut wanted = [0; MAX_CPUS];
    for (bytes, spec) in wanted.iter_mut().zip(&config.workloads) {
        *bytes = spec.working_set_bytes;
    }
    let mut grants = [Grant::default(); MAX_CPUS];
    memory::divide(count as u64, &wanted[..config.cpus], &mut grants[..config.cpus]);

    let identity = paging::identity(&mut pages, ram);
    let mut free = &chunks[..count];
    for (index, grant) in grants[..config.cpus].iter().enumerate() {
        let (data, rest) = free.split_at(grant.data_chunks as usize);
        let (table, rest) = rest.split_at(grant.table_chunks as usize);
        free = rest;
        let service = paging::service_space(&mut pages, identity, index);
        let writer = paging::writer_space(&mut pages, image, index, data, table);
        let cpu = cpu::cpu(index);
        cpu.shared.granted_pages.store(grant.data_chunks * PAGES_PER_CHUNK, Relaxed);
        cpu.prepare(index, monitor::main, writer::main, [service.root(), writer.root()]);
        if index > 0 {
            idt::fill_tss_descriptor(index);
        }
    }
    pool
}

/// First byte of the image and first chunk after it.
fn image() -> (u64, u64) {
    let (start, end) = (&raw const entry::image_start as u64, &raw const entry::image_end as u64);
    (start, end.next_multiple_of(CHUNK_BYTES))
}

/// Starts vCPU `index` and waits until it has arrived in its scheduler.
fn start_cpu(index: usize) {
    let target = cpu::cpu(index);
    // SAFETY: the trampoline page is RAM below 1 MiB that nothing uses any more (the start info was copied); the mailbox is
    // read only by the vCPU that is started here, one at a time.
    unsafe {
        let start = &raw const entry::trampoline_start;
        let bytes = &raw const entry::trampoline_end as usize - start as usize;
        core::ptr::copy_nonoverlapping(start, entry::TRAMPOLINE as *mut u8, bytes);
        (&raw mut entry::ap_cpu).write_volatile(target as *const Cpu as u64);
    }
    core::sync::atomic::fence(Release);
    let first = cpu::cpu(0);
    apic::send_init(index as u32);
    first.wait(io::tsc() + clock::cycles(10_000_000));
    for _ in 0..2 {
        apic::send_startup(index as u32, entry::TRAMPOLINE);
        for _ in 0..50 {
            first.wait(io::tsc() + clock::cycles(2_000_000));
            if target.online.load(Acquire) != 0 {
                return;
            }
        }
    }
    panic!("vCPU {index} did not start");
}

// The service task of vCPU 0 is the boot itself; its saved frame is made like the others' but never used to start it.
const _: () = assert!(SERVICE == 0 && WRITER == 1);
