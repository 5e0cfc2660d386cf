//! Owns the single instructions that reach hardware from CPL 3: port I/O, MMIO, the time stamp counter.

use core::arch::asm;

/// Reads the time stamp counter.
#[inline(always)]
pub fn tsc() -> u64 {
    // SAFETY: reads a counter; CR4.TSD is off.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// Writes a byte to a port.
pub fn out8(port: u16, value: u8) {
    // SAFETY: the I/O bitmap opens the ports that this program names; the devices behind them do not touch memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) }
}

/// Writes a word to a port.
pub fn out16(port: u16, value: u16) {
    // SAFETY: as in `out8`.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack)) }
}

/// Reads a byte from a port.
pub fn in8(port: u16) -> u8 {
    let value: u8;
    // SAFETY: as in `out8`.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) }
    value
}

/// Writes all bytes to a port with one string instruction, which KVM hands over in one exit.
pub fn out_string(port: u16, bytes: &[u8]) {
    // SAFETY: reads `bytes` only; ports as in `out8`.
    unsafe {
        asm!("rep outsb", in("dx") port, inout("rsi") bytes.as_ptr() => _, inout("rcx") bytes.len() => _,
             options(readonly, nostack))
    }
}

/// Reads a 32-bit register of a device.
///
/// # Safety
/// `address` must be a device register that is mapped and whose reading is harmless.
pub unsafe fn read32(address: u64) -> u32 {
    let value: u32;
    // SAFETY: by contract of the function. A plain `mov`, so that every VMM's emulator decodes it.
    unsafe { asm!("mov {:e}, [{}]", out(reg) value, in(reg) address, options(nostack)) }
    value
}

/// Writes a 32-bit register of a device.
///
/// # Safety
/// `address` must be a mapped device register, and what the write makes the device do must be sound.
pub unsafe fn write32(address: u64, value: u32) {
    // SAFETY: by contract of the function.
    unsafe { asm!("mov [{}], {:e}", in(reg) address, in(reg) value, options(nostack)) }
}

/// Spins politely.
#[inline(always)]
pub fn relax() {
    core::hint::spin_loop();
}
