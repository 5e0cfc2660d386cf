//! The state of vCPUs, interrupt controllers, timer and clock: read from KVM, written to KVM, and as bytes.
//!
//! Owns the order of the calls, which matters (said at each place), and the fields of the sections `vcpuN` and `vm`. Must not
//! know devices or threads: every vCPU stands with nothing pending.
//!
//! How the guest's time goes on is [`super::time`]'s matter; when in the order, is this module's.

use std::ops::Deref;

use kvm_bindings::{
    KVM_CAP_SREGS2, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_debugregs,
    kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use zerocopy::{FromBytes, IntoBytes};

use super::msr::{self, MsrList};
use super::time::{self, CheckError, Counter, CounterError, Frequency, Moment, Now, SavedCounter, TimeShift};
use crate::kvm::container::{StateError, fields, put_field};
use crate::kvm::sys::{self, KvmError, Sregs2, XsaveSize};

/// The newest version of a vCPU's section.
pub(crate) const VCPU_VERSION: u32 = 1;
/// The newest version of the VM's section.
pub(crate) const VM_VERSION: u32 = 1;

/// KVM refused a state, or the state is none.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The bytes are no state.
    #[error(transparent)]
    State(#[from] StateError),
    /// KVM refused it.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// KVM took it, and the guest's time would jump nevertheless.
    #[error(transparent)]
    Counter(#[from] CounterError),
}

impl From<CheckError> for RestoreError {
    fn from(error: CheckError) -> Self {
        match error {
            CheckError::Counter(e) => Self::Counter(e),
            CheckError::Kvm(e) => Self::Kvm(e),
        }
    }
}

/// What of the state this host can read and write, found out by trying.
#[derive(Clone, Debug)]
pub(crate) struct StateSupport {
    sregs2: bool,
    xsave: XsaveSize,
    msrs: MsrList,
    counter: Counter,
}

impl StateSupport {
    /// Tries on vCPUs that have their CPUID and frequency and have not run.
    pub(crate) fn by_trial(kvm: &Kvm, vm: &VmFd, vcpus: &[&VcpuFd], frequency: Frequency) -> Result<Self, KvmError> {
        let vcpu = vcpus[0];
        let sregs2 = vm.check_extension_raw(KVM_CAP_SREGS2.into()) > 0 && sys::get_sregs2(vcpu).is_ok();
        let msrs = MsrList::by_trial(kvm, vcpu)?;
        let counter = Counter::by_trial(vcpus, frequency);
        Ok(Self { sregs2, xsave: XsaveSize::of(vm), msrs, counter })
    }

    /// How the guest's time-stamp counter comes from the host's.
    pub(crate) fn counter(&self) -> &Counter {
        &self.counter
    }

    /// The registers that this host lists and refuses.
    pub(crate) fn refused_msrs(&self) -> &[u32] {
        self.msrs.refused()
    }

    /// What else this host has not, for a report.
    pub(crate) fn missing(&self, vm: &VmFd) -> Vec<&'static str> {
        let mut missing = Vec::new();
        if !self.sregs2 {
            missing.push("KVM_CAP_SREGS2");
        }
        if !self.counter.by_offset() {
            missing.push("KVM_VCPU_TSC_OFFSET");
        }
        if !self.msrs.has_deadline() {
            missing.push("IA32_TSC_DEADLINE");
        }
        if vm.check_extension_int(Cap::Xsave2) <= 0 {
            missing.push("KVM_CAP_XSAVE2");
        }
        missing
    }
}

/// System registers, as the host that saved them had them.
#[derive(Clone, Debug, PartialEq)]
enum SystemRegisters {
    Plain(kvm_sregs),
    WithPdptrs(Sregs2),
}

/// One vCPU's state.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: SystemRegisters,
    xsave: Vec<u8>,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    events: kvm_vcpu_events,
    msrs: Vec<kvm_msr_entry>,
    counter: SavedCounter,
    lapic: kvm_lapic_state,
    tsc_deadline: Option<u64>,
}

/// The kinds of fields in a vCPU's section. Numbers are never reused.
mod kind {
    pub(super) const MP_STATE: u16 = 1;
    pub(super) const REGS: u16 = 2;
    pub(super) const SREGS: u16 = 3;
    pub(super) const SREGS2: u16 = 4;
    pub(super) const XSAVE: u16 = 5;
    pub(super) const XCRS: u16 = 6;
    pub(super) const DEBUGREGS: u16 = 7;
    pub(super) const EVENTS: u16 = 8;
    pub(super) const MSRS: u16 = 9;
    pub(super) const TSC: u16 = 10;
    pub(super) const TSC_OFFSET: u16 = 11;
    pub(super) const LAPIC: u16 = 12;
    pub(super) const TSC_DEADLINE: u16 = 13;

    pub(super) const PIC_MASTER: u16 = 1;
    pub(super) const PIC_SLAVE: u16 = 2;
    pub(super) const IOAPIC: u16 = 3;
    pub(super) const PIT: u16 = 4;
    pub(super) const CLOCK: u16 = 5;
    pub(super) const MOMENT: u16 = 6;
}

impl VcpuState {
    /// Reads the state; the counter as of `now`.
    pub(crate) fn save(vcpu: &VcpuFd, support: &StateSupport, now: &Now) -> Result<Self, KvmError> {
        // First: KVM takes pending INIT and SIPI into the registers when it is asked for this.
        let mp_state = vcpu.get_mp_state().map_err(KvmError::of("KVM_GET_MP_STATE"))?;
        let regs = vcpu.get_regs().map_err(KvmError::of("KVM_GET_REGS"))?;
        let sregs = if support.sregs2 {
            SystemRegisters::WithPdptrs(sys::get_sregs2(vcpu)?)
        } else {
            SystemRegisters::Plain(vcpu.get_sregs().map_err(KvmError::of("KVM_GET_SREGS"))?)
        };
        let xsave = sys::get_xsave(vcpu, support.xsave)?;
        let xcrs = vcpu.get_xcrs().map_err(KvmError::of("KVM_GET_XCRS"))?;
        let debugregs = vcpu.get_debug_regs().map_err(KvmError::of("KVM_GET_DEBUGREGS"))?;
        let tsc_deadline = if support.msrs.has_deadline() {
            msr::read(vcpu, &[msr::TSC_DEADLINE])?.first().map(|entry| entry.data)
        } else {
            None
        };
        let lapic = vcpu.get_lapic().map_err(KvmError::of("KVM_GET_LAPIC"))?;
        let msrs = msr::read(vcpu, support.msrs.indices())?;
        let counter = support.counter.save(vcpu, now)?;
        // Last: an interrupt that was taken out of the LAPIC for delivery is here.
        let events = vcpu.get_vcpu_events().map_err(KvmError::of("KVM_GET_VCPU_EVENTS"))?;
        Ok(Self { mp_state, regs, sregs, xsave, xcrs, debugregs, events, msrs, counter, lapic, tsc_deadline })
    }

    /// Writes the state to a vCPU that has its CPUID, but for where its clock is. The counter is to show `tsc` at `now`.
    fn restore(&self, vcpu: &VcpuFd, support: &StateSupport, tsc: u64, now: &Now) -> Result<(), RestoreError> {
        // System registers first: they carry the APIC's base and mode, CR4 and EFER that the others are checked against.
        match &self.sregs {
            SystemRegisters::WithPdptrs(sregs) if support.sregs2 => sys::set_sregs2(vcpu, sregs)?,
            SystemRegisters::WithPdptrs(sregs) => {
                vcpu.set_sregs(&without_pdptrs(sregs)).map_err(KvmError::of("KVM_SET_SREGS"))?;
            }
            SystemRegisters::Plain(sregs) => vcpu.set_sregs(sregs).map_err(KvmError::of("KVM_SET_SREGS"))?,
        }
        vcpu.set_regs(&self.regs).map_err(KvmError::of("KVM_SET_REGS"))?;
        // XCR0 before the state that it governs.
        vcpu.set_xcrs(&self.xcrs).map_err(KvmError::of("KVM_SET_XCRS"))?;
        sys::set_xsave(vcpu, support.xsave, &fit_xsave(&self.xsave, support.xsave)?)?;
        vcpu.set_debug_regs(&self.debugregs).map_err(KvmError::of("KVM_SET_DEBUGREGS"))?;
        self.restore_msrs(vcpu, support, |index| !msr::is_clock(index))?;
        // The counter before the LAPIC, whose timer counts by it; the deadline after the LAPIC, which must be in its mode.
        support.counter.restore(vcpu, tsc, now)?;
        vcpu.set_lapic(&self.lapic).map_err(KvmError::of("KVM_SET_LAPIC"))?;
        if let Some(deadline) = self.tsc_deadline
            && support.msrs.has_deadline()
        {
            msr::write(vcpu, &[msr::entry(msr::TSC_DEADLINE, deadline)])?;
        }
        // After the registers, which clear pending exceptions when they are set.
        vcpu.set_vcpu_events(&self.events).map_err(KvmError::of("KVM_SET_VCPU_EVENTS"))?;
        vcpu.set_mp_state(self.mp_state).map_err(KvmError::of("KVM_SET_MP_STATE"))?;
        Ok(())
    }

    /// Writes the registers of which this host knows; one that it does not know, or refuses, may only hold what it has
    /// anyway, or nothing. Only those that are `due`.
    fn restore_msrs(
        &self,
        vcpu: &VcpuFd,
        support: &StateSupport,
        due: impl Fn(u32) -> bool,
    ) -> Result<(), RestoreError> {
        let (known, unknown): (Vec<_>, Vec<_>) = self
            .msrs
            .iter()
            .filter(|entry| due(entry.index) && !msr::is_order(entry.index))
            .partition(|entry| support.msrs.indices().contains(&entry.index));
        msr::write(vcpu, &known)?;
        for entry in unknown {
            let fits = entry.data == 0
                || msr::read(vcpu, &[entry.index]).is_ok_and(|now| now[0].data == entry.data)
                || msr::write(vcpu, &[entry]).is_ok();
            if !fits {
                return Err(StateError::Invalid {
                    what: format!("MSR {:#x}", entry.index),
                    problem: format!("this host cannot set it to {:#x}", entry.data),
                }
                .into());
            }
        }
        Ok(())
    }

    /// The section's payload.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut payload = Vec::with_capacity(16 << 10);
        let mut put = |kind, bytes: &[u8]| put_field(&mut payload, kind, bytes);
        put(kind::MP_STATE, self.mp_state.as_bytes());
        put(kind::REGS, self.regs.as_bytes());
        match &self.sregs {
            SystemRegisters::Plain(sregs) => put(kind::SREGS, sregs.as_bytes()),
            SystemRegisters::WithPdptrs(sregs) => put(kind::SREGS2, sregs.as_bytes()),
        }
        put(kind::XSAVE, &self.xsave);
        put(kind::XCRS, self.xcrs.as_bytes());
        put(kind::DEBUGREGS, self.debugregs.as_bytes());
        put(kind::EVENTS, self.events.as_bytes());
        put(kind::MSRS, self.msrs.as_bytes());
        put(kind::TSC, &self.counter.tsc.to_le_bytes());
        put(kind::LAPIC, self.lapic.as_bytes());
        if let Some(offset) = self.counter.offset {
            put(kind::TSC_OFFSET, &offset.to_le_bytes());
        }
        if let Some(deadline) = self.tsc_deadline {
            put(kind::TSC_DEADLINE, &deadline.to_le_bytes());
        }
        payload
    }

    /// Reads a payload; a field of a kind that this version does not know is refused.
    pub(crate) fn from_bytes(payload: &[u8]) -> Result<Self, StateError> {
        let fields = Fields::read("vCPU", payload, kind::TSC_DEADLINE)?;
        let sregs = match fields.find(kind::SREGS2) {
            Some(_) => SystemRegisters::WithPdptrs(fields.get(kind::SREGS2)?),
            None => SystemRegisters::Plain(fields.get(kind::SREGS)?),
        };
        let xsave = fields.bytes(kind::XSAVE)?.to_vec();
        // The kernel's largest extended states (AMX) are below 16 KiB.
        if !(576..=64 << 10).contains(&xsave.len()) {
            return Err(fields.invalid(kind::XSAVE));
        }
        let msrs = fields.bytes(kind::MSRS)?;
        if !msrs.len().is_multiple_of(size_of::<kvm_msr_entry>()) || msrs.len() > 4096 * size_of::<kvm_msr_entry>() {
            return Err(fields.invalid(kind::MSRS));
        }
        let msrs = msrs
            .chunks_exact(size_of::<kvm_msr_entry>())
            .map(|entry| kvm_msr_entry::read_from_bytes(entry).map_err(|_| fields.invalid(kind::MSRS)))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            mp_state: fields.get(kind::MP_STATE)?,
            regs: fields.get(kind::REGS)?,
            sregs,
            xsave,
            xcrs: fields.get(kind::XCRS)?,
            debugregs: fields.get(kind::DEBUGREGS)?,
            events: fields.get(kind::EVENTS)?,
            msrs,
            counter: SavedCounter { tsc: fields.get(kind::TSC)?, offset: fields.optional(kind::TSC_OFFSET)? },
            lapic: fields.get(kind::LAPIC)?,
            tsc_deadline: fields.optional(kind::TSC_DEADLINE)?,
        })
    }
}

/// The state of what the vCPUs share.
#[derive(Clone, Debug)]
pub(crate) struct VmState {
    pic_master: kvm_irqchip,
    pic_slave: kvm_irqchip,
    ioapic: kvm_irqchip,
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
    moment: Moment,
}

impl VmState {
    /// Reads the state, and the moment that the guest's counters are to be saved as of. `vcpu` is any of the VM's.
    pub(crate) fn save(vm: &VmFd, vcpu: &VcpuFd, support: &StateSupport) -> Result<(Self, Now), KvmError> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(KvmError::of("KVM_GET_IRQCHIP"))?;
            Ok(chip)
        };
        let (clock, now) = time::read_clock(vm, vcpu, &support.counter)?;
        let state = Self {
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
            pit: vm.get_pit2().map_err(KvmError::of("KVM_GET_PIT2"))?,
            clock,
            moment: now.moment(),
        };
        Ok((state, now))
    }

    /// Writes the state, after that of all vCPUs: an interrupt that the I/O APIC still holds goes to a LAPIC at once, and
    /// whether KVM reckons the clock from the counters depends on whether those agree.
    fn restore(&self, vm: &VmFd, time: &TimeShift) -> Result<(), KvmError> {
        for chip in [&self.pic_master, &self.pic_slave, &self.ioapic] {
            vm.set_irqchip(chip).map_err(KvmError::of("KVM_SET_IRQCHIP"))?;
        }
        vm.set_pit2(&self.pit).map_err(KvmError::of("KVM_SET_PIT2"))?;
        time::write_clock(vm, time.clock(self.clock.clock), time.now())
    }

    /// The moment of saving.
    pub(crate) fn moment(&self) -> Moment {
        self.moment
    }

    /// The section's payload.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        let mut payload = Vec::with_capacity(2 << 10);
        let mut put = |kind, bytes: &[u8]| put_field(&mut payload, kind, bytes);
        put(kind::PIC_MASTER, self.pic_master.as_bytes());
        put(kind::PIC_SLAVE, self.pic_slave.as_bytes());
        put(kind::IOAPIC, self.ioapic.as_bytes());
        put(kind::PIT, self.pit.as_bytes());
        put(kind::CLOCK, self.clock.as_bytes());
        put(kind::MOMENT, self.moment.as_bytes());
        payload
    }

    /// Reads a payload.
    pub(crate) fn from_bytes(payload: &[u8]) -> Result<Self, StateError> {
        let fields = Fields::read("VM", payload, kind::MOMENT)?;
        let chip = |kind, chip_id| {
            let chip: kvm_irqchip = fields.get(kind)?;
            if chip.chip_id == chip_id { Ok(chip) } else { Err(fields.invalid(kind)) }
        };
        Ok(Self {
            pic_master: chip(kind::PIC_MASTER, KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip(kind::PIC_SLAVE, KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: chip(kind::IOAPIC, KVM_IRQCHIP_IOAPIC)?,
            pit: fields.get(kind::PIT)?,
            clock: fields.get(kind::CLOCK)?,
            moment: fields.get(kind::MOMENT)?,
        })
    }
}

/// Writes the state of a whole VM: `vcpus` and what they share, in an order that KVM takes.
///
/// # Panics
/// If there are not as many states as vCPUs.
pub(crate) fn restore(
    fd: &VmFd,
    vcpus: &[impl Deref<Target = VcpuFd>],
    support: &StateSupport,
    (states, vm): (&[VcpuState], &VmState),
    time: &TimeShift,
) -> Result<(), RestoreError> {
    assert_eq!(vcpus.len(), states.len());
    for ((vcpu, state), tsc) in vcpus.iter().zip(states).zip(counters(states, support, time)) {
        state.restore(vcpu, support, tsc, time.now())?;
    }
    vm.restore(fd, time)?;
    // Last, with counter and clock in place: from here KVM writes the clock into guest memory whenever the vCPU runs.
    for (vcpu, state) in vcpus.iter().zip(states) {
        state.restore_msrs(vcpu, support, msr::is_clock)?;
    }
    Ok(())
}

/// Makes sure, after [`restore`], that no vCPU's counter goes back, nor jumps ahead.
pub(crate) fn check_counters(
    vcpus: &[impl Deref<Target = VcpuFd>],
    support: &StateSupport,
    states: &[VcpuState],
    time: &TimeShift,
) -> Result<(), RestoreError> {
    for ((index, vcpu), tsc) in (0..).zip(vcpus).zip(counters(states, support, time)) {
        support.counter.check(vcpu, index, tsc, time)?;
    }
    Ok(())
}

fn counters(states: &[VcpuState], support: &StateSupport, time: &TimeShift) -> Vec<u64> {
    let saved: Vec<_> = states.iter().map(|state| state.counter).collect();
    time.counters(&saved, &support.counter)
}

/// The guest's time as a saved machine has it.
#[cfg(test)]
pub(crate) struct SavedTime {
    /// The KVM clock.
    pub(crate) clock_ns: u64,
    /// Whether KVM reckons the clock from counters that are one.
    pub(crate) stable: bool,
    /// The host's real-time clock.
    pub(crate) realtime_ns: u64,
    /// Each vCPU's counter, and its difference from the host's where that is known.
    pub(crate) counters: Vec<(u64, Option<u64>)>,
}

#[cfg(test)]
impl SavedTime {
    pub(crate) fn of(state: &[u8]) -> Self {
        let mut time = Self { clock_ns: 0, stable: false, realtime_ns: 0, counters: Vec::new() };
        for section in crate::kvm::container::parse(state).unwrap() {
            if section.tag == "vm" {
                let vm = VmState::from_bytes(section.payload).unwrap();
                time.clock_ns = vm.clock.clock;
                time.stable = vm.clock.flags & kvm_bindings::KVM_CLOCK_TSC_STABLE != 0;
                time.realtime_ns = vm.moment.realtime_ns;
            } else if section.tag.starts_with("vcpu") {
                let counter = VcpuState::from_bytes(section.payload).unwrap().counter;
                time.counters.push((counter.tsc, counter.offset));
            }
        }
        time
    }
}

/// The fields of one payload.
struct Fields<'a> {
    section: &'static str,
    found: Vec<(u16, &'a [u8])>,
}

impl<'a> Fields<'a> {
    fn read(section: &'static str, payload: &'a [u8], newest: u16) -> Result<Self, StateError> {
        let found = fields(payload)?;
        if let Some(&(kind, _)) = found.iter().find(|(kind, _)| *kind > newest) {
            return Err(StateError::Unexpected(format!("{section} field {kind}")));
        }
        Ok(Self { section, found })
    }

    fn find(&self, kind: u16) -> Option<&'a [u8]> {
        self.found.iter().find(|(found, _)| *found == kind).map(|&(_, bytes)| bytes)
    }

    fn bytes(&self, kind: u16) -> Result<&'a [u8], StateError> {
        self.find(kind).ok_or_else(|| StateError::Missing(format!("{} field {kind}", self.section)))
    }

    fn get<T: FromBytes>(&self, kind: u16) -> Result<T, StateError> {
        T::read_from_bytes(self.bytes(kind)?).map_err(|_| self.invalid(kind))
    }

    fn optional<T: FromBytes>(&self, kind: u16) -> Result<Option<T>, StateError> {
        self.find(kind).map(|_| self.get(kind)).transpose()
    }

    fn invalid(&self, kind: u16) -> StateError {
        StateError::Invalid { what: format!("{} field {kind}", self.section), problem: "it has a bad size".into() }
    }
}

/// `sregs` for a host whose KVM does not know the PDPTRs; with an in-kernel interrupt controller the bitmap of pending
/// interrupts is in the events.
fn without_pdptrs(sregs: &Sregs2) -> kvm_sregs {
    let [cs, ds, es, fs, gs, ss, tr, ldt] = sregs.segments;
    let [gdt, idt] = sregs.tables;
    let [cr0, cr2, cr3, cr4, cr8, efer, apic_base] = sregs.control;
    kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr,
        ldt,
        gdt,
        idt,
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer,
        apic_base,
        ..Default::default()
    }
}

/// An extended state of another host in this host's size: what is cut off must be zero (no component lies there).
fn fit_xsave(state: &[u8], size: XsaveSize) -> Result<Vec<u8>, StateError> {
    let mut fitted = state.to_vec();
    fitted.resize(size.bytes(), 0);
    if state.iter().skip(size.bytes()).any(|&byte| byte != 0) {
        return Err(StateError::Invalid {
            what: "extended CPU state".into(),
            problem: format!("it has {} bytes, this host takes {}", state.len(), size.bytes()),
        });
    }
    Ok(fitted)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use proptest::prelude::*;

    use super::*;
    use crate::kvm::container;
    use crate::kvm::memory::{Memory, MemoryOptions};
    use crate::kvm::testing::kvm_or_skip;
    use crate::kvm::vm::Vm;
    use crate::kvm::x86::cpuid;
    use crate::model::DirtyLogKind;

    /// A VM with one vCPU that has its CPUID.
    fn vm() -> (Memory, Vm, VcpuFd, StateSupport) {
        let memory = Memory::new(4 << 20, MemoryOptions::default()).unwrap();
        let vm = Vm::new(&memory, DirtyLogKind::Bitmap).unwrap();
        let vcpu = vm.fd.create_vcpu(0).unwrap();
        let khz = vcpu.get_tsc_khz().unwrap();
        let leaves = cpuid::of_host(&vm.kvm, khz).unwrap();
        vcpu.set_cpuid2(&cpuid::of_vcpu(&leaves, 0, 1).unwrap()).unwrap();
        let support = StateSupport::by_trial(&vm.kvm, &vm.fd, &[&vcpu], Frequency::of_host(khz)).unwrap();
        (memory, vm, vcpu, support)
    }

    #[test]
    fn a_state_reads_back_from_kvm_as_it_was_written() {
        if !kvm_or_skip("a_state_reads_back_from_kvm_as_it_was_written") {
            return;
        }
        let (_memory, vm, vcpu, support) = vm();
        let (shared, then) = VmState::save(&vm.fd, &vcpu, &support).unwrap();
        let mut state = VcpuState::save(&vcpu, &support, &then).unwrap();
        state.regs.rax = 0x1234_5678_9abc_def0;
        state.regs.rip = 0xfff0;
        if let SystemRegisters::WithPdptrs(sregs) = &mut state.sregs {
            sregs.control[1] = 0xdead_b000;
        }
        state.debugregs.db[1] = 0x7000;
        state.events.nmi.pending = 1;
        // XMM0, in the legacy area, with SSE marked as in use.
        state.xsave[160..168].copy_from_slice(&7u64.to_le_bytes());
        state.xsave[512] |= 2;
        state.mp_state.mp_state = kvm_bindings::KVM_MP_STATE_HALTED;
        let time = TimeShift::none(shared.moment, Now::read(&vcpu, support.counter()).unwrap());
        restore(&vm.fd, &[&vcpu], &support, (std::slice::from_ref(&state), &shared), &time).unwrap();
        let (_, now) = VmState::save(&vm.fd, &vcpu, &support).unwrap();
        let mut again = VcpuState::save(&vcpu, &support, &now).unwrap();
        assert!(again.counter.tsc.wrapping_sub(state.counter.tsc) < 1 << 32, "the counter goes on from where it was");
        again.counter = state.counter;
        assert_eq!(again.regs, state.regs);
        assert_eq!(again.sregs, state.sregs);
        assert_eq!(again.events, state.events);
        assert_eq!(again.xsave, state.xsave);
        assert_eq!(again.lapic, state.lapic);
        assert_eq!(again.debugregs, state.debugregs);
        assert_eq!(again.mp_state, state.mp_state);
        // Hyper-V's run time and reference time, which go on.
        let goes_on = |index| matches!(index, 0x4000_0010 | 0x4000_0020);
        let differs: Vec<_> =
            again.msrs.iter().zip(&state.msrs).filter(|(now, then)| now != then && !goes_on(then.index)).collect();
        assert!(differs.is_empty(), "{differs:x?}");
        drop(vm);
    }

    /// Not a test: prints how long each call takes, medians of 500.
    #[test]
    #[ignore = "a measurement"]
    fn measure_each_call() {
        if !kvm_or_skip("measure_each_call") {
            return;
        }
        let (_memory, vm, vcpu, support) = vm();
        let (shared, now) = VmState::save(&vm.fd, &vcpu, &support).unwrap();
        let state = VcpuState::save(&vcpu, &support, &now).unwrap();
        let time = |what: &str, step: &mut dyn FnMut()| {
            let mut samples: Vec<_> = (0..500)
                .map(|_| {
                    let start = Instant::now();
                    step();
                    start.elapsed()
                })
                .collect();
            samples.sort();
            println!("{what:24} median {:?} p99 {:?}", samples[250], samples[495]);
        };
        println!("{} MSRs, {} bytes of XSAVE", support.msrs.indices().len(), support.xsave.bytes());
        time("get mp_state", &mut || _ = vcpu.get_mp_state().unwrap());
        time("get regs", &mut || _ = vcpu.get_regs().unwrap());
        time("get sregs2", &mut || _ = sys::get_sregs2(&vcpu).unwrap());
        time("get xsave", &mut || _ = sys::get_xsave(&vcpu, support.xsave).unwrap());
        time("get xcrs", &mut || _ = vcpu.get_xcrs().unwrap());
        time("get debugregs", &mut || _ = vcpu.get_debug_regs().unwrap());
        time("get lapic", &mut || _ = vcpu.get_lapic().unwrap());
        time("get msrs", &mut || _ = msr::read(&vcpu, support.msrs.indices()).unwrap());
        time("get tsc", &mut || _ = msr::read(&vcpu, &[msr::TSC]).unwrap());
        time("get tsc offset", &mut || _ = sys::get_tsc_offset(&vcpu));
        time("get events", &mut || _ = vcpu.get_vcpu_events().unwrap());
        time("vcpu to bytes", &mut || _ = state.to_bytes());
        let bytes = state.to_bytes();
        time("vcpu from bytes", &mut || _ = VcpuState::from_bytes(&bytes).unwrap());
        if let SystemRegisters::WithPdptrs(sregs) = &state.sregs {
            time("set sregs2", &mut || sys::set_sregs2(&vcpu, sregs).unwrap());
        }
        time("set regs", &mut || vcpu.set_regs(&state.regs).unwrap());
        time("set xcrs", &mut || vcpu.set_xcrs(&state.xcrs).unwrap());
        time("set xsave", &mut || sys::set_xsave(&vcpu, support.xsave, &state.xsave).unwrap());
        time("set debugregs", &mut || vcpu.set_debug_regs(&state.debugregs).unwrap());
        time("set msrs", &mut || state.restore_msrs(&vcpu, &support, |_| true).unwrap());
        for entry in &state.msrs {
            let mut samples: Vec<_> = (0..20)
                .map(|_| {
                    let start = Instant::now();
                    msr::write(&vcpu, std::slice::from_ref(entry)).unwrap();
                    start.elapsed()
                })
                .collect();
            samples.sort();
            if samples[10].as_micros() > 20 {
                println!("  set msr {:#x} median {:?}", entry.index, samples[10]);
            }
        }
        time("set tsc offset", &mut || sys::set_tsc_offset(&vcpu, 0).unwrap());
        time("set lapic", &mut || vcpu.set_lapic(&state.lapic).unwrap());
        time("set events", &mut || vcpu.set_vcpu_events(&state.events).unwrap());
        time("set mp_state", &mut || vcpu.set_mp_state(state.mp_state).unwrap());
        time("get 3 irqchips", &mut || {
            for chip_id in 0..3 {
                vm.fd.get_irqchip(&mut kvm_irqchip { chip_id, ..Default::default() }).unwrap();
            }
        });
        time("get pit", &mut || _ = vm.fd.get_pit2().unwrap());
        time("get clock and moment", &mut || _ = time::read_clock(&vm.fd, &vcpu, support.counter()).unwrap());
        time("counter as of it", &mut || _ = support.counter().save(&vcpu, &now).unwrap());
        time("set 3 irqchips", &mut || {
            for chip in [&shared.pic_master, &shared.pic_slave, &shared.ioapic] {
                vm.fd.set_irqchip(chip).unwrap();
            }
        });
        time("set pit", &mut || vm.fd.set_pit2(&shared.pit).unwrap());
        time("set clock", &mut || vm.fd.set_clock(&kvm_clock_data { flags: 0, ..shared.clock }).unwrap());
        println!(
            "clock flags {:#x}, tsc offset {:x?}, refused {:x?}",
            shared.clock.flags,
            state.counter.offset,
            support.refused_msrs()
        );
    }

    /// A state as version 1 wrote it, with no KVM at hand.
    fn plain() -> VcpuState {
        VcpuState {
            mp_state: kvm_mp_state::default(),
            regs: kvm_regs { rip: 0x10_0000, rflags: 2, ..Default::default() },
            sregs: SystemRegisters::WithPdptrs(Sregs2 { pdptrs: [1, 2, 3, 4], ..Default::default() }),
            xsave: (0..4096u32).map(|index| index as u8).collect(),
            xcrs: kvm_xcrs { nr_xcrs: 1, ..Default::default() },
            debugregs: kvm_debugregs::default(),
            events: kvm_vcpu_events::default(),
            msrs: (0..100).map(|index| msr::entry(index, u64::from(index) << 32)).collect(),
            counter: SavedCounter { tsc: 77, offset: Some(u64::MAX) },
            lapic: kvm_lapic_state::default(),
            tsc_deadline: Some(99),
        }
    }

    #[test]
    fn bytes_hold_every_field() {
        assert_eq!(VcpuState::from_bytes(&plain().to_bytes()), Ok(plain()));
        let mut without = plain();
        (without.counter.offset, without.tsc_deadline) = (None, None);
        without.sregs = SystemRegisters::Plain(kvm_sregs::default());
        assert_eq!(VcpuState::from_bytes(&without.to_bytes()), Ok(without));
    }

    /// What the VM's section of [`plain`] is.
    fn plain_vm() -> VmState {
        let chip = |chip_id| kvm_irqchip { chip_id, ..Default::default() };
        VmState {
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER),
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE),
            ioapic: chip(KVM_IRQCHIP_IOAPIC),
            pit: kvm_pit_state2 { flags: 1, ..Default::default() },
            clock: kvm_clock_data { clock: 123, ..Default::default() },
            moment: Moment { realtime_ns: 456, host_tsc: 789 },
        }
    }

    fn plain_container() -> Vec<u8> {
        let mut writer = container::Writer::default();
        writer.section("vm", 1, &plain_vm().to_bytes());
        writer.section("vcpu0", 1, &plain().to_bytes());
        writer.finish()
    }

    /// Version 1 as it was first written. This file is never written again: when the format changes, a second one joins it.
    const GOLDEN: &[u8] = include_bytes!("golden/state-v1.bin");

    #[test]
    fn a_state_of_version_1_still_reads() {
        let sections = container::parse(GOLDEN).unwrap();
        let find = |tag| sections.iter().find(|section| section.tag == tag).unwrap();
        find("vcpu0").expect_version(VCPU_VERSION).unwrap();
        assert_eq!(VcpuState::from_bytes(find("vcpu0").payload), Ok(plain()));
        find("vm").expect_version(VM_VERSION).unwrap();
        assert_eq!(VmState::from_bytes(find("vm").payload).unwrap().to_bytes(), plain_vm().to_bytes());
        assert_eq!(plain_container(), GOLDEN, "the format has changed: give it a new version");
    }

    #[test]
    #[ignore = "writes a golden file"]
    fn write_golden() {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/kvm/x86/golden/state-v1.bin");
        assert!(std::fs::metadata(&path).is_ok_and(|file| file.len() == 0), "a golden file is never written again");
        std::fs::write(path, plain_container()).unwrap();
    }

    #[test]
    fn extended_state_fits_only_if_nothing_is_cut_off() {
        let small = XsaveSize::for_test(None);
        let mut state = vec![1; 4096];
        state.resize(8192, 0);
        assert_eq!(fit_xsave(&state, small).unwrap().len(), 4096);
        state[8000] = 1;
        assert!(fit_xsave(&state, small).is_err());
        assert_eq!(fit_xsave(&state, XsaveSize::for_test(Some(11008))).unwrap().len(), 11008);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_reader_panic(changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8), cut in any::<prop::sample::Index>()) {
            let mut bytes = plain().to_bytes();
            for (index, value) in changes {
                let length = bytes.len();
                bytes[index.index(length)] = value;
            }
            let _ = VcpuState::from_bytes(&bytes);
            let _ = VmState::from_bytes(&bytes);
            let _ = VcpuState::from_bytes(&bytes[..cut.index(bytes.len())]);
        }
    }
}
