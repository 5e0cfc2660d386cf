//! Entry points for fuzzing: bytes as the saved state of a machine, and as a kernel to boot.
//!
//! Owns the promises that are checked: no panic, and a state that is taken is written as it was read. Needs no KVM.

use super::boot::{self, BootImage};
use super::console::Console;
use super::container::{self, Writer};
use super::memory::{Memory, MemoryOptions};
use super::serial::Serial;
use super::x86::acpi::Board;
use super::x86::state::{VcpuState, VmState};
use crate::model::SerialSpec;

/// Reads `bytes` as a container, as they are and with a right checksum, and every section as each kind of state.
///
/// # Panics
/// If a promise is broken.
pub(crate) fn saved_machine(bytes: &[u8]) {
    sections(bytes);
    let mut sound = bytes.to_vec();
    if let Some(body) = sound.len().checked_sub(4) {
        let checksum = crc32fast::hash(&sound[..body]);
        sound[body..].copy_from_slice(&checksum.to_le_bytes());
        sections(&sound);
    }
}

fn sections(bytes: &[u8]) {
    let Ok(sections) = container::parse(bytes) else { return };
    let mut again = Writer::default();
    for section in &sections {
        again.section(section.tag, section.version, section.payload);
        payload(section.payload);
    }
    assert_eq!(again.finish(), bytes, "a container changed by being written");
}

fn payload(bytes: &[u8]) {
    if let Ok(state) = VcpuState::from_bytes(bytes) {
        assert_eq!(VcpuState::from_bytes(&state.to_bytes()), Ok(state), "a vCPU changed by being written");
    }
    if let Ok(state) = VmState::from_bytes(bytes) {
        let written = state.to_bytes();
        let again = VmState::from_bytes(&written).expect("what was written can be read");
        assert_eq!(again.to_bytes(), written, "a VM changed by being written");
    }
}

/// Reads `bytes` as the state of a serial port.
///
/// # Panics
/// If a promise is broken.
pub(crate) fn saved_serial(bytes: &[u8]) {
    let console = Console::open(&SerialSpec::None).expect("no console needs nothing");
    let port = Serial::new(console).expect("an eventfd");
    if port.restore(bytes).is_ok() {
        let saved = port.save();
        port.restore(&saved).expect("its own state fits");
        assert_eq!(port.save(), saved, "a serial port changed by being restored");
    }
}

/// Loads `bytes` as a kernel.
pub(crate) fn kernel(bytes: &[u8]) {
    let memory = Memory::new(4 << 20, MemoryOptions { huge_pages: false }).expect("guest memory");
    let board = Board { cpus: 2, windows: Vec::new() };
    let _ = boot::load(&memory, &BootImage { kernel: bytes.into(), initrd: None, cmdline: "a=b".to_owned() }, &board);
}

/// Saved machines as they are written.
pub(crate) fn saved_machine_seeds() -> Vec<Vec<u8>> {
    vec![include_bytes!("x86/golden/state-v1.bin").to_vec(), Writer::default().finish()]
}

/// Kernels that boot.
pub(crate) fn kernel_seeds() -> Vec<Vec<u8>> {
    #[cfg(test)]
    return vec![boot::elf_for_tests(0x10_0000, &[0xf4; 64])];
    #[cfg(not(test))]
    Vec::new()
}
