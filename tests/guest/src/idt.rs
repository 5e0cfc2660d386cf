//! Owns the interrupt descriptor table and the TSS descriptors: fills what `entry.rs` reserves.

use crate::cpu;
use crate::entry;

const GATE: u64 = 0x8e00;

fn gate(handler: u64) -> [u64; 2] {
    [(handler & 0xffff) | 0x10 << 16 | GATE << 32 | (handler >> 16 & 0xffff) << 48, handler >> 32]
}

/// Fills the IDT. Call once, on the first vCPU, before any interrupt is enabled.
pub fn fill_idt() {
    // SAFETY: the table is in use by this vCPU only, and no interrupt source is enabled yet; addresses of the handlers are
    // taken, the functions are not called.
    unsafe {
        let table = &raw mut entry::idt;
        for (vector, handler) in entry::exception_table.iter().enumerate() {
            (*table)[vector] = gate(*handler);
        }
        for (index, handler) in entry::device_table.iter().enumerate() {
            (*table)[usize::from(entry::DEVICE_VECTOR) + index] = gate(*handler);
        }
        let handlers: [(u8, unsafe extern "C" fn()); 5] = [
            (entry::TIMER_VECTOR, entry::timer_handler),
            (entry::CROSS_VECTOR, entry::cross_handler),
            (entry::OWN_VECTOR, entry::own_handler),
            (entry::WAKE_VECTOR, entry::wake_handler),
            (entry::SPURIOUS_VECTOR, entry::spurious_handler),
        ];
        for (vector, handler) in handlers {
            (*table)[usize::from(vector)] = gate(handler as *const () as u64);
        }
    }
}

/// Writes the TSS descriptor of a vCPU that does not run yet.
pub fn fill_tss_descriptor(index: usize) {
    let base = cpu::cpu(index).tss.get() as u64;
    let limit = 104 + 256;
    let low = limit | (base & 0xff_ffff) << 16 | 0x89 << 40 | (base >> 24 & 0xff) << 56;
    let slot = usize::from(entry::TSS_SELECTOR) / 8 + 2 * index;
    // SAFETY: the slot belongs to a vCPU that is not started yet; no other vCPU loads it.
    unsafe {
        let table = &raw mut entry::gdt;
        (*table)[slot] = low;
        (*table)[slot + 1] = base >> 32;
    }
}
