//! Owns the frequency of the time stamp counter: told by the VMM, else measured against the PIT, else against the LAPIC.

use core::sync::atomic::{AtomicU64, Ordering::Relaxed};

use crate::apic;
use crate::io::{in8, out8, tsc};

static TSC_HZ: AtomicU64 = AtomicU64::new(1_000_000_000);
static BOOT_TSC: AtomicU64 = AtomicU64::new(0);

const PIT_HZ: u64 = 1_193_182;
const PIT_COUNTS: u64 = 23_864; // 20 ms
/// KVM's LAPIC timer counts nanoseconds unless its VMM says otherwise.
const LAPIC_HZ: u64 = 1_000_000_000;

/// Frequency of the time stamp counter.
pub fn tsc_hz() -> u64 {
    TSC_HZ.load(Relaxed)
}

/// Time stamp at boot.
pub fn boot_tsc() -> u64 {
    BOOT_TSC.load(Relaxed)
}

/// Time since boot, pauses of the machine included.
pub fn uptime_ns() -> u64 {
    dunlin_guest::units::cycles_to_ns(tsc().saturating_sub(boot_tsc()), tsc_hz())
}

/// Cycles of a time span.
pub fn cycles(ns: u64) -> u64 {
    dunlin_guest::units::ns_to_cycles(ns, tsc_hz())
}

/// Finds the frequency and says where from.
pub fn calibrate(told_khz: Option<u64>) -> &'static str {
    BOOT_TSC.store(tsc(), Relaxed);
    let (hz, source) = match told_khz {
        Some(khz) => (khz * 1000, "cmdline"),
        None => match measure_by_pit() {
            Some(hz) => (hz, "pit"),
            None => (measure_by_lapic(), "lapic"),
        },
    };
    TSC_HZ.store(hz, Relaxed);
    source
}

fn measure_by_pit() -> Option<u64> {
    // Channel 2, one-shot, gated by port 0x61, whose bit 5 shows its output. The shortest of three runs is the least disturbed.
    let run = || {
        let gate = in8(0x61) & !0x03;
        out8(0x61, gate);
        out8(0x43, 0xb0);
        out8(0x42, PIT_COUNTS as u8);
        out8(0x42, (PIT_COUNTS >> 8) as u8);
        out8(0x61, gate | 1);
        let start = tsc();
        let mut polls = 0u32;
        while in8(0x61) & 0x20 == 0 {
            polls += 1;
            if polls > 2_000_000 || tsc() - start > 1_000_000_000 {
                return None;
            }
        }
        // With no PIT the port reads as all ones at once.
        (polls > 2).then(|| (tsc() - start) * PIT_HZ / PIT_COUNTS)
    };
    (0..3).map(|_| run()).try_fold(u64::MAX, |least, hz| hz.map(|hz| least.min(hz)))
}

fn measure_by_lapic() -> u64 {
    let counts_per_cycle = apic::measure_timer(20_000_000).max(1);
    ((u128::from(LAPIC_HZ) << 32) / u128::from(counts_per_cycle)) as u64
}
