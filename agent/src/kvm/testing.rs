//! For tests that want a real KVM: tiny guests in machine code, and machines to run them in.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};

use super::boot::BootImage;
use super::boot::elf_for_tests as pvh_elf;
use super::hurry;
use super::machine::{BootConfig, Hosting, Machine};
use super::memory::MemoryOptions;
use crate::model::{DirtyLogKind, SerialSpec, VmId};

/// Where the guests' code lies.
pub(crate) const CODE: u32 = 0x10_0000;
/// The first page that [`writer`] writes.
pub(crate) const PAGES: u32 = 0x20_0000;

/// Whether KVM is there. On a build machine (`CI=true`) it must be; elsewhere the test says that it is skipped.
pub(crate) fn kvm_or_skip(test: &str) -> bool {
    let there = kvm_ioctls::Kvm::new().is_ok();
    assert!(there || std::env::var_os("CI").is_none_or(|ci| ci != "true"), "{test} needs /dev/kvm");
    if !there {
        println!("SKIP {test}: no /dev/kvm");
    }
    there
}

/// The scheduling policy of a thread in front of others. Where nobody may be put there it is an ordinary thread's.
pub(crate) fn policy_in_front() -> i32 {
    let foremost = || {
        let _hurry = hurry::Hurry::here();
        hurry::policy_of(0)
    };
    std::thread::spawn(foremost).join().unwrap()
}

/// Machine code, put together byte by byte.
#[derive(Default)]
pub(crate) struct Code(Vec<u8>);

impl Code {
    pub(crate) fn bytes(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    pub(crate) fn with(self, opcode: &[u8], immediate: u32) -> Self {
        self.bytes(opcode).bytes(&immediate.to_le_bytes())
    }

    /// A short jump with `opcode` back to `target`.
    pub(crate) fn back(self, opcode: u8, target: usize) -> Self {
        let distance = target as i64 - (self.0.len() as i64 + 2);
        self.bytes(&[opcode, i8::try_from(distance).unwrap() as u8])
    }

    pub(crate) fn here(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn image(self) -> BootImage {
        BootImage { kernel: pvh_elf(u64::from(CODE), &self.0).into(), initrd: None, cmdline: String::new() }
    }
}

/// Writes an ever growing number (EAX) into the first word of each of `pages` pages from [`PAGES`], round and round.
pub(crate) fn writer(pages: u32) -> BootImage {
    let code = Code::default().bytes(&[0x31, 0xc0]); // xor eax, eax
    let round = code.here();
    let code = code.with(&[0xbe], PAGES).with(&[0xb9], pages); // mov esi, PAGES; mov ecx, pages
    let page = code.here();
    code.bytes(&[0x40, 0x89, 0x06]) // inc eax; mov [esi], eax
        .with(&[0x81, 0xc6], 4096) // add esi, 4096
        .bytes(&[0x49]) // dec ecx
        .back(0x75, page) // jnz
        .back(0xeb, round) // jmp
        .image()
}

/// Writes a random number (EAX) into the first word of one of 256 pages from [`PAGES`], picked at random, for ever.
pub(crate) fn scatterer() -> BootImage {
    let code = Code::default();
    let again = code.here();
    code.with(&[0x69, 0xc0], 1_664_525) // imul eax, eax, ...
        .with(&[0x05], 1_013_904_223) // add eax, ...
        .bytes(&[0x89, 0xc6, 0xc1, 0xee, 0x10]) // mov esi, eax; shr esi, 16
        .with(&[0x81, 0xe6], 0xff) // and esi, 255
        .bytes(&[0xc1, 0xe6, 0x0c]) // shl esi, 12
        .with(&[0x81, 0xc6], PAGES) // add esi, PAGES
        .bytes(&[0x89, 0x06]) // mov [esi], eax
        .back(0xeb, again) // jmp
        .image()
}

/// Prints `text` with one string instruction, then does what `then` says.
pub(crate) fn printer(text: &[u8], then: &[u8]) -> BootImage {
    // mov esi, text; mov ecx, length; mov dx, 0x3f8; rep outsb; then; hlt; jmp to the hlt
    let code = |address: u32| {
        Code::default()
            .with(&[0xbe], address)
            .with(&[0xb9], text.len() as u32)
            .bytes(&[0x66, 0xba, 0xf8, 0x03, 0xf3, 0x6e])
            .bytes(then)
            .bytes(&[0xf4, 0xeb, 0xfd])
    };
    let length = code(0).here() as u32;
    code(CODE + length).bytes(text).image()
}

/// How a machine for a test is hosted.
pub(crate) fn hosting() -> Hosting {
    Hosting { serial: SerialSpec::None, memory: MemoryOptions { huge_pages: false } }
}

/// A machine's description.
pub(crate) fn config(image: BootImage, cpus: u32, dirty_log: DirtyLogKind) -> BootConfig {
    BootConfig {
        vm_id: VmId::random(),
        name: "test".parse().unwrap(),
        memory_bytes: 16 << 20,
        cpus,
        dirty_log,
        nets: Vec::new(),
        disks: Vec::new(),
        rng: false,
        balloon: false,
        hugepages: false,
        image,
    }
}

/// A machine without devices that runs `image`.
pub(crate) fn boot(image: BootImage, cpus: u32, dirty_log: DirtyLogKind) -> Arc<Machine> {
    Machine::boot(config(image, cpus, dirty_log), &hosting(), Box::new(|_| Ok(Vec::new()))).unwrap()
}

/// The first word of page `index` of [`writer`].
pub(crate) fn written(machine: &Machine, index: u32) -> u32 {
    machine.memory().ram().read_obj(GuestAddress(u64::from(PAGES + index * 4096))).unwrap()
}

/// Waits for something that a guest does, at most a minute: in an emulated machine beside other work that is little.
pub(crate) fn wait_for(what: &str, mut happened: impl FnMut() -> bool) {
    let start = Instant::now();
    while !happened() {
        assert!(start.elapsed() < Duration::from_secs(60), "waited in vain for: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
