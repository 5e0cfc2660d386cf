//! Owns the local APIC and the IOAPIC: enabling, timer, inter-processor interrupts, routes of devices.

use crate::entry;
use crate::io::{read32, tsc, write32};

const LAPIC: u64 = 0xfee0_0000;
const IOAPIC: u64 = 0xfec0_0000;

const SPURIOUS: u64 = 0xf0;
const COMMAND_LOW: u64 = 0x300;
const COMMAND_HIGH: u64 = 0x310;
const LVT_TIMER: u64 = 0x320;
const LVT_LINT0: u64 = 0x350;
const LVT_LINT1: u64 = 0x360;
const TIMER_INITIAL: u64 = 0x380;
const TIMER_CURRENT: u64 = 0x390;
const TIMER_DIVIDE: u64 = 0x3e0;

const MASKED: u32 = 1 << 16;

fn read(register: u64) -> u32 {
    // SAFETY: the LAPIC page is mapped in every address space; the registers read here have no side effect.
    unsafe { read32(LAPIC + register) }
}

fn write(register: u64, value: u32) {
    // SAFETY: as in `read`; vectors raised by these writes have handlers.
    unsafe { write32(LAPIC + register, value) }
}

/// Enables this vCPU's LAPIC; the timer fires once each time it is armed.
pub fn enable() {
    write(SPURIOUS, 0x100 | u32::from(entry::SPURIOUS_VECTOR)); // first: a disabled LAPIC masks what is written
    write(LVT_LINT0, MASKED);
    write(LVT_LINT1, MASKED);
    write(TIMER_DIVIDE, 0b1011); // by 1
    write(LVT_TIMER, u32::from(entry::TIMER_VECTOR));
}

/// Arms the timer.
pub fn arm_timer(counts: u32) {
    write(TIMER_INITIAL, counts.max(1));
}

/// Measures timer counts for each time stamp cycle, times 2^32. The timer must be masked or not yet in use.
pub fn measure_timer(tsc_cycles: u64) -> u64 {
    write(LVT_TIMER, MASKED | u32::from(entry::TIMER_VECTOR));
    write(TIMER_DIVIDE, 0b1011);
    write(TIMER_INITIAL, u32::MAX);
    let (first_count, start) = (read(TIMER_CURRENT), tsc());
    while tsc() - start < tsc_cycles {
        crate::io::relax();
    }
    let (last_count, end) = (read(TIMER_CURRENT), tsc());
    write(TIMER_INITIAL, 0);
    (u64::from(first_count - last_count) << 32) / (end - start)
}

fn command(destination: u32, low: u32) {
    write(COMMAND_HIGH, destination << 24);
    write(COMMAND_LOW, low);
}

/// Sends an interrupt to a vCPU (its own index too).
pub fn send(destination: u32, vector: u8) {
    command(destination, 0x4000 | u32::from(vector));
}

/// Resets another vCPU.
pub fn send_init(destination: u32) {
    command(destination, 0x4500);
}

/// Starts another vCPU at a page below 1 MiB.
pub fn send_startup(destination: u32, address: u64) {
    command(destination, 0x4600 | (address >> 12) as u32);
}

/// Routes an IOAPIC pin to a vector of vCPU 0, edge-triggered, active high. False when there is no such pin.
pub fn route(gsi: u32, vector: u8) -> bool {
    let select = |register: u32| {
        // SAFETY: the IOAPIC page is mapped in service spaces, where this runs; selecting a register has no effect alone.
        unsafe { write32(IOAPIC, register) }
    };
    select(1);
    // SAFETY: reads the version register selected above.
    let pins = (unsafe { read32(IOAPIC + 0x10) } >> 16 & 0xff) + 1;
    if gsi >= pins {
        return false;
    }
    for (register, value) in [(0x11 + 2 * gsi, 0), (0x10 + 2 * gsi, u32::from(vector))] {
        select(register);
        // SAFETY: writes the redirection entry selected above; the vector has a handler.
        unsafe { write32(IOAPIC + 0x10, value) };
    }
    true
}
