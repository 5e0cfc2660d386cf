//! A VM of one vCPU and a dozen instructions that writes to as many pages as it is told, again and again.
//!
//! Its code runs in long mode at privilege level 3, where every KVM backend runs it natively; it ends each pass with a
//! write to an address that no memory backs. No interrupts, no descriptor tables, no kernel.

use std::io;

use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_MEM_LOG_DIRTY_PAGES, kvm_enable_cap, kvm_segment, kvm_userspace_memory_region,
};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};

use crate::model::{DirtyLogKind, PAGE_SIZE, PageCount};
use crate::shm::{Mapping, memory_file};

/// Where the guest keeps its page tables and code, below the pages that it writes.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const DIRECTORY: u64 = 0x3000;
const CODE: u64 = 0x4000;
/// The first page that the guest writes.
pub const FIRST_FRAME: u64 = 16;
/// The root of the guest's page tables.
pub const ROOT: u64 = PML4;
/// The root of its second address space, which maps the same.
pub const OTHER_ROOT: u64 = 0x5000;
/// The address of the guest's instruction that writes.
pub const WRITE: u64 = CODE + 6;
/// An address that the guest's page tables map, and no memory backs.
const BELL: u64 = 0x3000_0000;
/// Entries of the dirty ring: what every host that has one allows.
const RING_ENTRIES: u64 = 4096;

const EFER_LONG_MODE: u64 = 0x500;
const CR0_PAGING_PROTECTED: u64 = 0x8005_0033;
const CR4_PHYSICAL_ADDRESS_EXTENSION: u64 = 0x20;
/// Present, writable, user, accessed, dirty; on a directory entry also 2 MiB.
const TABLE: u64 = 0x67;
const LARGE: u64 = 0xe7;

/// ```text
/// again: mov rdi, r8          ; first page
///        mov rcx, r9          ; pages
/// page:  mov [rdi], rcx
///        add rdi, 4096
///        dec rcx
///        jnz page
///        mov [rbx], eax       ; the bell
///        jmp again
/// ```
const PROGRAM: [u8; 25] = [
    0x4c, 0x89, 0xc7, 0x4c, 0x89, 0xc9, 0x48, 0x89, 0x0f, 0x48, 0x81, 0xc7, 0x00, 0x10, 0x00, 0x00, 0x48, 0xff, 0xc9,
    0x75, 0xf1, 0x89, 0x03, 0xeb, 0xe7,
];

/// The VM. It runs only inside [`TinyVm::write_pages`], on the caller's thread.
#[derive(Debug)]
pub struct TinyVm {
    vcpu: VcpuFd,
    vm: VmFd,
    memory: Mapping,
    kind: DirtyLogKind,
}

impl TinyVm {
    /// A VM with room for `pages`.
    ///
    /// # Errors
    /// What KVM or the memory allocator answered.
    pub fn new(pages: PageCount, kind: DirtyLogKind) -> io::Result<Self> {
        let bytes = (FIRST_FRAME + pages.0) * PAGE_SIZE as u64;
        let memory = Mapping::of(memory_file("dunlin-trial", bytes)?, bytes as usize)?;
        let kvm = Kvm::new()?;
        let vm = kvm.create_vm()?;
        if kind == DirtyLogKind::Ring {
            let cap = kvm_enable_cap {
                cap: KVM_CAP_DIRTY_LOG_RING_ACQ_REL,
                args: [RING_ENTRIES * size_of::<kvm_bindings::kvm_dirty_gfn>() as u64, 0, 0, 0],
                ..Default::default()
            };
            vm.enable_cap(&cap)?;
        }
        let tiny = Self { vcpu: vm.create_vcpu(0)?, vm, memory, kind };
        tiny.set_logging(false)?;
        tiny.fill();
        tiny.set_registers(&kvm)?;
        Ok(tiny)
    }

    /// Runs one pass: the guest writes to its first `pages` pages, once each.
    ///
    /// # Errors
    /// KVM refused to run, or ended the run with anything but the guest's bell.
    pub fn write_pages(&mut self, pages: PageCount) -> io::Result<()> {
        self.write_from(0, pages)
    }

    /// Has the guest run in the address space with this root from now on: [`ROOT`] or [`OTHER_ROOT`].
    ///
    /// # Errors
    /// What KVM answered.
    pub fn load_root(&self, root: u64) -> io::Result<()> {
        let mut special = self.vcpu.get_sregs()?;
        special.cr3 = root;
        Ok(self.vcpu.set_sregs(&special)?)
    }

    /// Runs one pass over `pages` pages from the page `first` on.
    ///
    /// # Errors
    /// As [`TinyVm::write_pages`].
    pub fn write_from(&mut self, first: u64, pages: PageCount) -> io::Result<()> {
        let room = (self.memory.len() / PAGE_SIZE) as u64 - FIRST_FRAME;
        let first = first.min(room - 1);
        let mut registers = self.vcpu.get_regs()?;
        registers.rip = CODE;
        registers.r8 = (FIRST_FRAME + first) * PAGE_SIZE as u64;
        registers.r9 = pages.0.clamp(1, room - first);
        self.vcpu.set_regs(&registers)?;
        match self.vcpu.run()? {
            VcpuExit::MmioWrite(BELL, _) => {}
            other => return Err(io::Error::other(format!("the guest stopped with {other:?}"))),
        }
        // The bell is complete only once KVM is entered again.
        self.vcpu.set_kvm_immediate_exit(1);
        let left = self.vcpu.run().map(|exit| format!("{exit:?}"));
        self.vcpu.set_kvm_immediate_exit(0);
        match left {
            Err(e) if e.errno() == libc::EINTR => Ok(()),
            other => Err(io::Error::other(format!("the guest's last write ended with {other:?}"))),
        }
    }

    /// Switches the dirty log on or off. Switching on write-protects every page.
    ///
    /// # Errors
    /// What KVM answered.
    pub fn set_logging(&self, on: bool) -> io::Result<()> {
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: 0,
            memory_size: self.memory.len() as u64,
            userspace_addr: self.memory.as_ptr() as u64,
        };
        // SAFETY: the mapping is whole pages, and outlives the VM: it is dropped after it, in order of declaration.
        unsafe { self.vm.set_user_memory_region(region)? };
        Ok(())
    }

    /// Fetches the dirty bitmap, which write-protects again what was written. Only for [`DirtyLogKind::Bitmap`]. Frames below
    /// [`FIRST_FRAME`] are left out: with AMD's nested paging the walk of the guest's own page tables counts as writing to them
    /// (AMD64 Architecture Programmer's Manual, volume 2, 15.25.6), with other backends it does not.
    ///
    /// # Errors
    /// What KVM answered.
    pub fn fetch_log(&self) -> io::Result<Vec<u64>> {
        debug_assert_eq!(self.kind, DirtyLogKind::Bitmap);
        let mut log = self.vm.get_dirty_log(0, self.memory.len())?;
        if let Some(first) = log.first_mut() {
            *first &= u64::MAX << FIRST_FRAME;
        }
        Ok(log)
    }

    fn fill(&self) {
        let words = self.memory.words();
        let put = |address: u64, value: u64| {
            words[address as usize / 8].store(value, std::sync::atomic::Ordering::Relaxed);
        };
        put(PML4, PDPT | TABLE);
        put(OTHER_ROOT, PDPT | TABLE);
        put(PDPT, DIRECTORY | TABLE);
        for entry in 0..512 {
            put(DIRECTORY + entry * 8, entry << 21 | LARGE);
        }
        for (index, chunk) in PROGRAM.chunks(8).enumerate() {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            put(CODE + index as u64 * 8, u64::from_le_bytes(word));
        }
    }

    fn set_registers(&self, kvm: &Kvm) -> io::Result<()> {
        // Before the special registers: some backends check those against it.
        self.vcpu.set_cpuid2(&kvm.get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)?)?;
        let mut special = self.vcpu.get_sregs()?;
        special.efer = EFER_LONG_MODE;
        special.cr0 = CR0_PAGING_PROTECTED;
        special.cr3 = PML4;
        special.cr4 = CR4_PHYSICAL_ADDRESS_EXTENSION;
        let flat = kvm_segment { limit: u32::MAX, dpl: 3, present: 1, s: 1, g: 1, ..Default::default() };
        special.cs = kvm_segment { selector: 0x33, type_: 11, l: 1, ..flat };
        let data = kvm_segment { selector: 0x2b, type_: 3, db: 1, ..flat };
        (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
        self.vcpu.set_sregs(&special)?;
        let mut registers = self.vcpu.get_regs()?;
        registers.rflags = 2;
        registers.rbx = BELL;
        Ok(self.vcpu.set_regs(&registers)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_holds_exactly_the_pages_that_the_guest_wrote() {
        let mut vm = TinyVm::new(PageCount(128), DirtyLogKind::Bitmap).unwrap();
        vm.write_pages(PageCount(128)).unwrap();
        vm.set_logging(true).unwrap();
        vm.write_pages(PageCount(70)).unwrap();
        let ones: u32 = vm.fetch_log().unwrap().iter().map(|word| word.count_ones()).sum();
        assert_eq!(ones, 70);
        vm.write_pages(PageCount(3)).unwrap();
        assert_eq!(vm.fetch_log().unwrap()[0], 0b111 << FIRST_FRAME);
    }
}
