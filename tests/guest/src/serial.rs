//! Owns the serial port: whole lines only, each with one string instruction. A VMM may take it in pieces (KVM ends one where a page of the line ends), so only one vCPU writes at a time.

use core::fmt::{self, Write};
use core::hint::spin_loop;
use core::sync::atomic::{AtomicBool, Ordering};

use dunlin_guest::text::Buffer;

use crate::io::{out_string, out8, tsc};

const COM1: u16 = 0x3f8;
/// For how long the port is waited for: some milliseconds. Whoever has it may be held from outside, and a panic must come through.
const PATIENCE_CYCLES: u64 = 10_000_000;

/// A vCPU writes.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// Sets 115200 8N1 with FIFO and no interrupts.
pub fn init() {
    for (register, value) in [(1, 0x00), (3, 0x80), (0, 0x01), (1, 0x00), (3, 0x03), (2, 0x07), (4, 0x03)] {
        out8(COM1 + register, value);
    }
}

/// Writes bytes as they are.
pub fn write(bytes: &[u8]) {
    let since = tsc();
    while TAKEN.swap(true, Ordering::Acquire) && tsc().wrapping_sub(since) < PATIENCE_CYCLES {
        spin_loop();
    }
    out_string(COM1, bytes);
    TAKEN.store(false, Ordering::Release);
}

/// Formats one line and writes it.
pub fn line(text: fmt::Arguments) {
    let mut buffer = Buffer::<512>::new();
    let _ = buffer.write_fmt(text);
    let _ = buffer.write_str("\n");
    write(buffer.as_bytes());
}
