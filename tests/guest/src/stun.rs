//! Owns the channel on which the host asks that writers stand (the second serial port): the registers, and who stands until when.

use core::sync::atomic::Ordering::Relaxed;

use dunlin_guest::hold::{Hold, Lines};

use crate::cpu::{self, WRITER};
use crate::io::{in8, out_string, out8, tsc};
use crate::{apic, clock, entry};

const COM2: u16 = 0x2f8;
/// The I/O APIC pin of the port.
const PIN: u32 = 3;
/// The last of the interrupts that are counted for devices.
const SLOT: usize = cpu::DEVICE_VECTORS - 1;
/// Line status: a byte has come.
const HAS_BYTE: u8 = 1;
/// No exit of the service task reads more.
const MOST_BYTES: usize = 256;

/// The channel.
pub struct Channel {
    lines: Lines,
    interrupts: u64,
}

impl Channel {
    /// Opens the port, with an interrupt for each byte that comes, and offers to hold writers.
    pub fn open() -> Self {
        for (register, value) in [(1, 0x00), (3, 0x80), (0, 0x01), (1, 0x00), (3, 0x03), (2, 0x07), (4, 0x0b)] {
            out8(COM2 + register, value);
        }
        apic::route(PIN, entry::DEVICE_VECTOR + SLOT as u8);
        out8(COM2 + 1, 0x01);
        out_string(COM2, b"offer 1\n");
        Self { lines: Lines::default(), interrupts: 0 }
    }

    /// Obeys what has come. Each byte costs an exit, so whole lines are read without asking whether there is more.
    pub fn round(&mut self) {
        let interrupts = cpu::cpu(0).device_interrupts[SLOT].load(Relaxed);
        if interrupts == self.interrupts {
            return;
        }
        self.interrupts = interrupts;
        for _ in 0..MOST_BYTES {
            if self.lines.is_between() && in8(COM2 + 5) & HAS_BYTE == 0 {
                break;
            }
            if let Some(hold) = self.lines.byte(in8(COM2)) {
                obey(&hold);
            }
        }
    }
}

fn obey(hold: &Hold) {
    let Some(cpu) = cpu::all(crate::settings().cpus).get(hold.vcpu) else { return };
    let until = if hold.ms == 0 { 0 } else { tsc() + clock::cycles(hold.ms * 1_000_000) };
    let before = cpu.shared.held_until.swap(until, Relaxed);
    cpu.shared.holds.fetch_add(1, Relaxed);
    if until < before {
        if cpu.number() == 0 {
            cpu.tasks[WRITER].deadline.store(0, Relaxed);
        } else {
            apic::send(cpu.number() as u32, entry::WAKE_VECTOR);
        }
    }
}
