//! Owns the end of the machine: power-off and reset, on our VMM and on QEMU.

use crate::io::{out8, out16};
use crate::serial;

/// Powers the machine off.
pub fn off() -> ! {
    serial::line(format_args!("POWEROFF"));
    out8(0x600, 5); // dunlin
    out8(0xf4, 0x10); // QEMU isa-debug-exit: status 33
    out16(0x604, 0x2000); // QEMU pc and q35: ACPI S5
    crate::cpu::halt_for_ever()
}

/// Resets the machine.
pub fn reset() -> ! {
    serial::line(format_args!("RESET"));
    out8(0x64, 0xfe);
    crate::cpu::halt_for_ever()
}
