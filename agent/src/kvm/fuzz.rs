//! Entry points for fuzzing: bytes as the saved state of a machine, as a kernel to boot, and as a boot image that moves.
//!
//! Owns the promises that are checked: no panic, and a state that is taken is written as it was read. Needs no KVM.

use std::sync::Arc;

use super::boot::{self, BootError, BootImage, EntryPoint, sample};
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
    let port = Serial::new("serial0", console).expect("an eventfd");
    if port.restore(bytes).is_ok() {
        let saved = port.save();
        port.restore(&saved).expect("its own state fits");
        assert_eq!(port.save(), saved, "a serial port changed by being restored");
    }
}

/// RAM for a kernel.
fn memory() -> Memory {
    Memory::new(4 << 20, MemoryOptions { huge_pages: false }).expect("guest memory")
}

fn load(kernel: &[u8], initrd: Option<&[u8]>) -> Result<EntryPoint, BootError> {
    let image = BootImage { kernel: kernel.into(), initrd: initrd.map(Arc::from), cmdline: "a=b".to_owned() };
    boot::load(&memory(), &image, &Board { cpus: 2, windows: Vec::new() })
}

/// Loads `bytes` as a kernel.
pub(crate) fn kernel(bytes: &[u8]) {
    let _ = load(bytes, None);
}

/// Loads `bytes` as a bzImage with an initrd: as they are, and with the marks that make them one.
///
/// # Panics
/// If a promise is broken.
pub(crate) fn bzimage(bytes: &[u8]) {
    let mut marked = bytes.to_vec();
    if marked.len() >= 0x206 {
        sample::put(&mut marked, 0x1fe, &[0x55, 0xaa]);
        sample::put(&mut marked, 0x202, b"HdrS");
    }
    for bytes in [bytes, &marked] {
        if let Ok(EntryPoint::Long { entry, .. }) = load(bytes, Some(&[1; 5000])) {
            assert!((1 << 20..4 << 20).contains(&entry), "an entry point that is not in RAM");
        }
    }
}

/// Reads `bytes` as a boot image that moves along: as they are, and with a right checksum.
///
/// # Panics
/// If a promise is broken.
pub(crate) fn boot_image(bytes: &[u8]) {
    let mut sound = bytes.to_vec();
    if let Some(body) = sound.len().checked_sub(4) {
        let checksum = crc32fast::hash(&sound[..body]);
        sound[body..].copy_from_slice(&checksum.to_le_bytes());
    }
    for bytes in [bytes, &sound] {
        if let Ok(image) = BootImage::from_bytes(bytes) {
            assert_eq!(BootImage::from_bytes(&image.to_bytes()), Ok(image), "a boot image changed by being written");
        }
    }
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

/// bzImages that boot.
pub(crate) fn bzimage_seeds() -> Vec<Vec<u8>> {
    vec![sample::bzimage(&[0xf4; 64])]
}

/// Boot images with and without an initrd.
pub(crate) fn boot_image_seeds() -> Vec<Vec<u8>> {
    let image = |initrd: Option<&[u8]>| {
        BootImage { kernel: [1, 2, 3].into(), initrd: initrd.map(Arc::from), cmdline: "a=b".to_owned() }.to_bytes()
    };
    vec![image(None), image(Some(b"cpio"))]
}
