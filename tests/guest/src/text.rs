//! Owns text made without a heap: a fixed line buffer, and the lines that go to the serial console.

use core::fmt::{self, Write};

/// A text buffer of fixed size; what does not fit is cut off and remembered as such.
pub struct Buffer<const N: usize> {
    bytes: [u8; N],
    len: usize,
    /// True when something did not fit.
    pub truncated: bool,
}

impl<const N: usize> Buffer<N> {
    /// An empty buffer.
    pub const fn new() -> Self {
        Self { bytes: [0; N], len: 0, truncated: false }
    }

    /// What was written so far.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.len = 0;
        self.truncated = false;
    }
}

impl<const N: usize> Default for Buffer<N> {
    fn default() -> Self {
        Self::new()
    }
}

impl<const N: usize> Write for Buffer<N> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let room = N - self.len;
        let taken = text.len().min(room);
        self.bytes[self.len..self.len + taken].copy_from_slice(&text.as_bytes()[..taken]);
        self.len += taken;
        self.truncated |= taken < text.len();
        Ok(())
    }
}

/// Writes a heartbeat line: `HB <sequence> <tsc>`, the time stamp in hexadecimal.
pub fn heartbeat(out: &mut impl Write, sequence: u64, tsc: u64) {
    let _ = writeln!(out, "HB {sequence} {tsc:x}");
}

/// Totals of the `STAT` line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Pages written by all workloads.
    pub pages_written: u64,
    /// Pages that were not what they had to be.
    pub page_mismatches: u64,
    /// Inter-processor interrupts that never came.
    pub ipi_lost: u64,
    /// Inter-processor interrupts that came twice.
    pub ipi_doubled: u64,
    /// Timer interrupts.
    pub ticks: u64,
    /// Timers that did not fire.
    pub timer_stalls: u64,
    /// Times a task found itself in a foreign address space.
    pub address_space_mismatches: u64,
    /// Virtio interrupts that never came, net and block.
    pub irq_lost: u64,
    /// Blocks that were not what they had to be.
    pub block_mismatches: u64,
    /// Block requests that the device failed.
    pub block_errors: u64,
}

/// Writes a `STAT` line.
pub fn stat(out: &mut impl Write, uptime_ns: u64, totals: &Totals) {
    let _ = writeln!(
        out,
        "STAT uptime_ns={uptime_ns} pages_written={} page_mismatches={} ipi_lost={} ipi_doubled={} ticks={} \
         timer_stalls={} address_space_mismatches={} irq_lost={} block_mismatches={} block_errors={}",
        totals.pages_written,
        totals.page_mismatches,
        totals.ipi_lost,
        totals.ipi_doubled,
        totals.ticks,
        totals.timer_stalls,
        totals.address_space_mismatches,
        totals.irq_lost,
        totals.block_mismatches,
        totals.block_errors
    );
}

/// Writes the answer of the TCP echo service: `<n> <count> <tsc>`, the time stamp in hexadecimal.
pub fn echo_answer(out: &mut impl Write, number: &str, count: u64, tsc: u64) {
    let _ = writeln!(out, "{number} {count} {tsc:x}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_their_documented_form() {
        let mut line = Buffer::<512>::new();
        heartbeat(&mut line, 42, 0xabc);
        assert_eq!(line.as_bytes(), b"HB 42 abc\n");
        line.clear();
        echo_answer(&mut line, "17", 3, 0x10);
        assert_eq!(line.as_bytes(), b"17 3 10\n");
        line.clear();
        stat(&mut line, 5, &Totals { pages_written: 9, irq_lost: 2, ..Totals::default() });
        let text = core::str::from_utf8(line.as_bytes()).unwrap();
        assert!(text.starts_with("STAT uptime_ns=5 pages_written=9 page_mismatches=0 "), "{text}");
        assert!(text.contains(" irq_lost=2 ") && text.ends_with('\n') && !text.contains("  "), "{text}");
    }

    #[test]
    fn a_full_buffer_cuts_and_says_so() {
        let mut line = Buffer::<4>::new();
        let _ = line.write_str("abcdef");
        assert_eq!((line.as_bytes(), line.truncated), (&b"abcd"[..], true));
    }
}
