//! A KVM virtual machine with its memory slots, interrupt controllers and timer, before it has vCPUs.
//!
//! Owns the order in which KVM wants a VM to be made, and the wiring of interrupts and queue notifications. Must not know
//! what a device does.

use std::sync::Arc;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config};
use kvm_ioctls::{IoEventAddress, Kvm, VmFd};
use vmm_sys_util::eventfd::EventFd;

use super::bus::{IrqLine, MmioBus};
use super::dirty;
use super::memory::Memory;
use super::sys::KvmError;
use crate::model::DirtyLogKind;

/// Three pages for the task-state segment of Intel's real mode, in the hole.
const TSS_ADDRESS: usize = 0xfffb_d000;
/// One page for its identity map.
const IDENTITY_MAP_ADDRESS: u64 = 0xfffb_c000;

/// A pin of the in-kernel interrupt controllers.
///
/// Not an irqfd: for a pin of the I/O APIC the kernel delivers that from a work queue, whose threads a busy host may keep
/// waiting for seconds, and a VM that is saved meanwhile leaves the interrupt behind.
struct Line {
    vm: Arc<VmFd>,
    irq: u32,
}

impl IrqLine for Line {
    fn pulse(&self) {
        for level in [true, false] {
            // It fails only for a pin that does not exist, and the bus gives out none of those.
            let _ = self.vm.set_irq_line(self.irq, level);
        }
    }
}

/// A VM without vCPUs.
pub(crate) struct Vm {
    pub(crate) kvm: Kvm,
    pub(crate) fd: Arc<VmFd>,
    /// The size of one vCPU's dirty ring; zero with a bitmap.
    pub(crate) ring_bytes: usize,
}

impl Vm {
    /// Makes a VM over `memory`.
    pub(crate) fn new(memory: &Memory, log: DirtyLogKind) -> Result<Self, KvmError> {
        let kvm = Kvm::new().map_err(KvmError::of("opening /dev/kvm"))?;
        let fd = create(&kvm)?;
        fd.set_identity_map_address(IDENTITY_MAP_ADDRESS).map_err(KvmError::of("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(TSS_ADDRESS).map_err(KvmError::of("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip().map_err(KvmError::of("KVM_CREATE_IRQCHIP"))?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        fd.create_pit2(pit).map_err(KvmError::of("KVM_CREATE_PIT2"))?;
        let ring_bytes = dirty::prepare(&fd, log)?;
        for range in memory.ranges() {
            dirty::set_slot(&fd, range, 0)?;
        }
        Ok(Self { kvm, fd: Arc::new(fd), ring_bytes })
    }

    /// Lets `event` raise interrupt `irq`.
    pub(crate) fn connect_irq(&self, event: &EventFd, irq: u32) -> Result<(), KvmError> {
        self.fd.register_irqfd(event, irq).map_err(KvmError::of("KVM_IRQFD"))
    }

    /// Connects interrupts and notifications of all devices of `bus`.
    pub(crate) fn connect_bus(&self, bus: &MmioBus) -> Result<(), KvmError> {
        for (index, device) in bus.devices().iter().enumerate() {
            device.connect_irq(Arc::new(Line { vm: self.fd.clone(), irq: MmioBus::irq(index) }));
            for event in device.io_events() {
                let address = IoEventAddress::Mmio(MmioBus::address(index) + event.offset);
                self.fd.register_ioevent(event.event, &address, event.value).map_err(KvmError::of("KVM_IOEVENTFD"))?;
            }
        }
        Ok(())
    }
}

/// KVM_CREATE_VM answers EINTR when a signal comes while it waits for memory.
fn create(kvm: &Kvm) -> Result<VmFd, KvmError> {
    loop {
        match kvm.create_vm() {
            Err(e) if e.errno() == libc::EINTR => {}
            other => return other.map_err(KvmError::of("KVM_CREATE_VM")),
        }
    }
}
