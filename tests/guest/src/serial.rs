//! Owns the serial port: whole lines only, each with one string instruction.

use core::fmt::{self, Write};

use dunlin_guest::text::Buffer;

use crate::io::{out_string, out8};

const COM1: u16 = 0x3f8;

/// Sets 115200 8N1 with FIFO and no interrupts.
pub fn init() {
    for (register, value) in [(1, 0x00), (3, 0x80), (0, 0x01), (1, 0x00), (3, 0x03), (2, 0x07), (4, 0x03)] {
        out8(COM1 + register, value);
    }
}

/// Writes bytes as they are.
pub fn write(bytes: &[u8]) {
    out_string(COM1, bytes);
}

/// Formats one line and writes it.
pub fn line(text: fmt::Arguments) {
    let mut buffer = Buffer::<512>::new();
    let _ = buffer.write_fmt(text);
    let _ = buffer.write_str("\n");
    write(buffer.as_bytes());
}
