//! Owns what the guest says about itself: totals, the JSON counters, the page for people.

use core::fmt::Write;
use core::sync::atomic::Ordering::{Acquire, Relaxed};

use dunlin_guest::page::Part;
use dunlin_guest::text::Totals;
use dunlin_guest::units::cycles_to_ns;
use dunlin_guest::workload::UNTHROTTLED;

use crate::balloon::{self, Balloon};
use crate::blk::Block;
use crate::clock;
use crate::cpu::{self, Cpu};
use crate::net::NetDevice;

/// What only the service task of vCPU 0 knows.
pub struct Extras<'a> {
    /// Heartbeats sent.
    pub heartbeats: u64,
    /// The network card.
    pub net: Option<&'a NetDevice>,
    /// Lines answered by the echo service.
    pub echo_lines: u64,
    /// The disk.
    pub block: Option<&'a Block>,
    /// The balloon.
    pub balloon: Option<&'a Balloon>,
}

impl Extras<'_> {
    /// Sums over all vCPUs and devices.
    pub fn totals(&self) -> Totals {
        let cpus = cpu::all(crate::settings().cpus);
        let sum = |value: fn(&Cpu) -> u64| cpus.iter().map(value).sum();
        let net_lost = self.net.map_or(0, |net| net.interrupts_lost_spurious().0);
        let block_lost = self.block.map_or(0, |block| block.interrupts_lost_spurious().0);
        Totals {
            pages_written: sum(|cpu| cpu.shared.pages_written.load(Relaxed)),
            page_mismatches: sum(|cpu| cpu.shared.page_mismatches.load(Relaxed))
                + self.balloon.map_or(0, |balloon| balloon.counters().mismatches),
            ipi_lost: sum(|cpu| cpu.shared.cross[1].load(Relaxed) + cpu.shared.own[1].load(Relaxed)),
            ipi_doubled: sum(|cpu| cpu.shared.cross[2].load(Relaxed) + cpu.shared.own[2].load(Relaxed)),
            ticks: sum(|cpu| cpu.ticks.load(Relaxed)),
            timer_stalls: sum(|cpu| cpu.shared.timer_stalls.load(Relaxed)),
            address_space_mismatches: sum(|cpu| cpu.shared.address_space_mismatches.load(Relaxed)),
            irq_lost: net_lost + block_lost,
            block_mismatches: self.block.map_or(0, |block| block.counters.mismatches),
            block_errors: self.block.map_or(0, |block| block.counters.errors),
        }
    }
}

/// Writes the object `dunlin.guest/v1`.
pub fn counters(out: &mut impl Write, extras: &Extras) {
    let hz = clock::tsc_hz();
    let first = cpu::cpu(0);
    let _ = write!(
        out,
        "{{\"schema\":\"dunlin.guest/v1\",\"version\":\"{}\",\"uptime_ns\":{},\"tsc\":{},\"tsc_hz\":{hz},\"boot_tsc\":{},\
         \"heartbeats\":{},\"memory_bytes\":{},\"max_gap_ns\":{},\"max_gap_at_tsc\":{},\"vcpus\":[",
        env!("CARGO_PKG_VERSION"),
        clock::uptime_ns(),
        crate::io::tsc(),
        clock::boot_tsc(),
        extras.heartbeats,
        crate::settings().memory_bytes,
        cycles_to_ns(first.shared.max_gap_cycles.load(Relaxed), hz),
        first.shared.max_gap_at.load(Relaxed),
    );
    for (index, cpu) in cpu::all(crate::settings().cpus).iter().enumerate() {
        let _ = out.write_str(if index > 0 { "," } else { "" });
        vcpu(out, cpu, hz);
    }
    let _ = out.write_str("],\"net\":");
    match extras.net {
        Some(net) => {
            let (lost, spurious) = net.interrupts_lost_spurious();
            let _ = write!(
                out,
                "{{\"frames_received\":{},\"frames_sent\":{},\"echo_lines\":{},\"irq_lost\":{lost},\"irq_spurious\":{spurious}}}",
                net.frames.0, net.frames.1, extras.echo_lines
            );
        }
        None => {
            let _ = out.write_str("null");
        }
    }
    let _ = out.write_str(",\"block\":");
    match extras.block {
        Some(block) => {
            let (lost, spurious) = block.interrupts_lost_spurious();
            let counters = &block.counters;
            let _ = write!(
                out,
                "{{\"capacity_bytes\":{},\"rate_blocks_per_second\":{},\"blocks_written\":{},\"blocks_read\":{},\"flushes\":{},\
                 \"block_mismatches\":{},\"block_errors\":{},\"irq_lost\":{lost},\"irq_spurious\":{spurious}}}",
                block.capacity_bytes,
                block.rate_blocks_per_second(),
                counters.written,
                counters.read,
                counters.flushes,
                counters.mismatches,
                counters.errors
            );
        }
        None => {
            let _ = out.write_str("null");
        }
    }
    let _ = out.write_str(",\"balloon\":");
    match extras.balloon {
        Some(balloon) => {
            let ((given, pages), counters) = (balloon.pages(), balloon.counters());
            let _ = write!(
                out,
                "{{\"pool_pages\":{pages},\"given_pages\":{given},\"rounds\":{},\"used\":{},\"used_named\":{},\"reported\":{},\"freed\":{},\
                 \"page_mismatches\":{}}}",
                balloon.rounds,
                counters.used,
                counters.used_named,
                counters.reported,
                counters.freed,
                counters.mismatches
            );
        }
        None => {
            let _ = out.write_str("null");
        }
    }
    let _ = out.write_str("}\n");
}

fn vcpu(out: &mut impl Write, cpu: &Cpu, hz: u64) {
    let shared = &cpu.shared;
    let spec = shared.wanted();
    let (sent, lost, doubled) = add(&shared.cross, &shared.own);
    let _ = write!(
        out,
        "{{\"id\":{},\"ticks\":{},\"timer_stalls\":{},\"ipi_sent\":{sent},\"ipi_received\":{},\"ipi_lost\":{lost},\
         \"ipi_doubled\":{doubled},\"address_space_mismatches\":{},\"lapic_spurious\":{},\"max_gap_ns\":{},\"holds\":{},",
        cpu.index.load(Relaxed),
        cpu.ticks.load(Relaxed),
        shared.timer_stalls.load(Relaxed),
        cpu.cross_received.load(Relaxed) + cpu.own_received.load(Relaxed),
        shared.address_space_mismatches.load(Relaxed),
        cpu.spurious.load(Relaxed),
        cycles_to_ns(shared.max_gap_cycles.load(Relaxed), hz),
        shared.holds.load(Relaxed),
    );
    let rate = Rate(spec.rate_pages_per_second);
    let _ = write!(
        out,
        "\"workload\":{{\"ws_bytes\":{},\"ws_max_bytes\":{},\"filled_pages\":{},\"rate_pages_per_second\":{rate},\
         \"pattern\":\"{}\",\"share_percent\":{},\"fill\":\"{}\",\"spin\":{},\"settled\":{},\"dropped_pages\":{}}},",
        spec.working_set_bytes,
        shared.granted_pages.load(Relaxed) * 4096,
        shared.filled_pages.load(Relaxed),
        spec.pattern.name(),
        spec.share_percent,
        spec.fill.name(),
        shared.spin.load(Relaxed) != 0,
        is_settled(cpu),
        shared.pages_dropped.load(Relaxed),
    );
    let _ = write!(
        out,
        "\"pages_written\":{},\"page_mismatches\":{},\"first_mismatch\":",
        shared.pages_written.load(Relaxed),
        shared.page_mismatches.load(Relaxed)
    );
    first_mismatch(out, cpu);
    let _ = out.write_str("}");
}

struct Rate(u64);

impl core::fmt::Display for Rate {
    fn fmt(&self, f: &mut core::fmt::Formatter) -> core::fmt::Result {
        match self.0 {
            UNTHROTTLED => f.write_str("\"max\""),
            rate => write!(f, "{rate}"),
        }
    }
}

fn first_mismatch(out: &mut impl Write, cpu: &Cpu) {
    let [part, page, word, expected, found] = &cpu.shared.first_mismatch;
    match Part::from_u8(part.load(Acquire) as u8) {
        Some(part) => {
            let _ = write!(
                out,
                "{{\"part\":\"{}\",\"page\":{},\"word\":{},\"expected\":\"{:#x}\",\"found\":\"{:#x}\"}}",
                part.name(),
                page.load(Relaxed),
                word.load(Relaxed),
                expected.load(Relaxed),
                found.load(Relaxed)
            );
        }
        None => {
            let _ = out.write_str("null");
        }
    }
}

fn add(a: &[core::sync::atomic::AtomicU64; 3], b: &[core::sync::atomic::AtomicU64; 3]) -> (u64, u64, u64) {
    let sum = |index: usize| a[index].load(Relaxed) + b[index].load(Relaxed);
    (sum(0), sum(1), sum(2))
}

/// True when the writer of this vCPU has taken over its settings and filled its working set.
pub fn is_settled(cpu: &Cpu) -> bool {
    cpu.shared.settled_generation.load(Acquire) == cpu.shared.wanted_generation.load(Relaxed)
}

/// Forgets the largest gaps of all vCPUs.
pub fn reset_gaps() {
    for cpu in cpu::all(crate::settings().cpus) {
        cpu.shared.max_gap_cycles.store(0, Relaxed);
        cpu.shared.max_gap_at.store(0, Relaxed);
    }
}

/// Writes the answer of `/verify`.
pub fn verification(out: &mut impl Write) {
    let cpus = cpu::all(crate::settings().cpus);
    let sum = |value: fn(&Cpu) -> u64| -> u64 { cpus.iter().map(value).sum() };
    let pool = balloon::verified();
    let pages = sum(|cpu| cpu.shared.verified_pages.load(Relaxed)) + pool.0;
    let mismatches = sum(|cpu| cpu.shared.verified_mismatches.load(Relaxed)) + pool.1;
    let _ = writeln!(
        out,
        "{{\"schema\":\"dunlin.guest-verify/v1\",\"ok\":{},\"pages_checked\":{pages},\"page_mismatches\":{mismatches}}}",
        mismatches == 0
    );
}

/// Writes the page for people.
pub fn index(out: &mut impl Write, extras: &Extras) {
    let totals = extras.totals();
    let _ = write!(
        out,
        "dunlin test guest {}\nup {} s, {} MiB, {} vCPUs, {} heartbeats\n\n",
        env!("CARGO_PKG_VERSION"),
        clock::uptime_ns() / 1_000_000_000,
        crate::settings().memory_bytes >> 20,
        crate::settings().cpus,
        extras.heartbeats
    );
    for (name, value) in [
        ("pages written", totals.pages_written),
        ("page mismatches", totals.page_mismatches),
        ("address space mismatches", totals.address_space_mismatches),
        ("IPIs lost", totals.ipi_lost),
        ("IPIs doubled", totals.ipi_doubled),
        ("timer interrupts", totals.ticks),
        ("timer stalls", totals.timer_stalls),
        ("device interrupts lost", totals.irq_lost),
        ("block mismatches", totals.block_mismatches),
        ("block errors", totals.block_errors),
        ("echo lines answered", extras.echo_lines),
    ] {
        let _ = writeln!(out, "{name:26} {value}");
    }
    let _ = out.write_str("\n/counters /set?cpu=0&rate=1000 /verify /reset-gap /poweroff /reset\n");
}
