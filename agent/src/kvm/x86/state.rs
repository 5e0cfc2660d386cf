//! The state of vCPUs, interrupt controllers, timer and clock: read from KVM, written to KVM, and as bytes.
//!
//! Owns the order of the calls, which matters (said at each place), and the fields of the sections `vcpuN` and `vm`. Must not
//! know devices or threads: every vCPU stands with nothing pending.
//!
//! Time: a guest's clock and time-stamp counter go on by the time that the move took, measured by the hosts' real-time
//! clocks, if that is at most [`LONGEST_BLACKOUT`]; a longer stop (a checkpoint) is no time for the guest.

use std::time::Duration;

use kvm_bindings::{
    KVM_CAP_SREGS2, KVM_CLOCK_HOST_TSC, KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_debugregs, kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry,
    kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use zerocopy::{FromBytes, IntoBytes};

use super::msr::{self, MsrList};
use crate::kvm::container::{StateError, fields, put_field};
use crate::kvm::sys::{self, KvmError, Sregs2, XsaveSize};

/// The newest version of a vCPU's section.
pub(crate) const VCPU_VERSION: u32 = 1;
/// The newest version of the VM's section.
pub(crate) const VM_VERSION: u32 = 1;

/// A stop that is longer is no time for the guest.
pub const LONGEST_BLACKOUT: Duration = Duration::from_secs(10);

/// KVM refused a state, or the state is none.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The bytes are no state.
    #[error(transparent)]
    State(#[from] StateError),
    /// KVM refused it.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// What of the state this host can read and write, found out by trying.
#[derive(Clone, Debug)]
pub(crate) struct StateSupport {
    sregs2: bool,
    xsave: XsaveSize,
    msrs: MsrList,
    /// Whether guest and host counter differ by a constant, so that the offset says everything.
    tsc_offset: bool,
    tsc_khz: u32,
}

impl StateSupport {
    /// Tries on a vCPU that has its CPUID and frequency and has not run.
    pub(crate) fn by_trial(kvm: &Kvm, vm: &VmFd, vcpu: &VcpuFd, tsc_khz: u32, scaled: bool) -> Result<Self, KvmError> {
        let sregs2 = vm.check_extension_raw(KVM_CAP_SREGS2.into()) > 0 && sys::get_sregs2(vcpu).is_ok();
        let msrs = MsrList::by_trial(kvm, vcpu)?;
        let tsc_offset = !scaled && sys::get_tsc_offset(vcpu).is_some();
        Ok(Self { sregs2, xsave: XsaveSize::of(vm), msrs, tsc_offset, tsc_khz })
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
        if !self.tsc_offset {
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
    tsc: u64,
    tsc_offset: Option<u64>,
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
}

impl VcpuState {
    /// Reads the state.
    pub(crate) fn save(vcpu: &VcpuFd, support: &StateSupport) -> Result<Self, KvmError> {
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
        let tsc = msr::read(vcpu, &[msr::TSC])?.first().map_or(0, |entry| entry.data);
        let tsc_offset = if support.tsc_offset { sys::get_tsc_offset(vcpu) } else { None };
        // Last: an interrupt that was taken out of the LAPIC for delivery is here.
        let events = vcpu.get_vcpu_events().map_err(KvmError::of("KVM_GET_VCPU_EVENTS"))?;
        Ok(Self { mp_state, regs, sregs, xsave, xcrs, debugregs, events, msrs, tsc, tsc_offset, lapic, tsc_deadline })
    }

    /// Writes the state to a vCPU that has its CPUID.
    pub(crate) fn restore(&self, vcpu: &VcpuFd, support: &StateSupport, time: &TimeShift) -> Result<(), RestoreError> {
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
        self.restore_msrs(vcpu, support)?;
        // The counter before the LAPIC, whose timer counts by it; the deadline after the LAPIC, which must be in its mode.
        match self.tsc_offset {
            Some(offset) if support.tsc_offset && time.known => {
                sys::set_tsc_offset(vcpu, time.tsc_offset(offset))?;
            }
            _ => msr::write(vcpu, &[msr_entry(msr::TSC, self.tsc.wrapping_add(time.tsc_ticks))])?,
        }
        vcpu.set_lapic(&self.lapic).map_err(KvmError::of("KVM_SET_LAPIC"))?;
        if let Some(deadline) = self.tsc_deadline
            && support.msrs.has_deadline()
        {
            msr::write(vcpu, &[msr_entry(msr::TSC_DEADLINE, deadline)])?;
        }
        // After the registers, which clear pending exceptions when they are set.
        vcpu.set_vcpu_events(&self.events).map_err(KvmError::of("KVM_SET_VCPU_EVENTS"))?;
        vcpu.set_mp_state(self.mp_state).map_err(KvmError::of("KVM_SET_MP_STATE"))?;
        Ok(())
    }

    /// Writes the registers of which this host knows; one that it does not know, or refuses, may only hold what it has
    /// anyway, or nothing.
    fn restore_msrs(&self, vcpu: &VcpuFd, support: &StateSupport) -> Result<(), RestoreError> {
        let (known, unknown): (Vec<_>, Vec<_>) =
            self.msrs.iter().partition(|entry| support.msrs.indices().contains(&entry.index));
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
        put(kind::TSC, &self.tsc.to_le_bytes());
        put(kind::LAPIC, self.lapic.as_bytes());
        if let Some(offset) = self.tsc_offset {
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
            tsc: fields.get(kind::TSC)?,
            tsc_offset: fields.optional(kind::TSC_OFFSET)?,
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
}

impl VmState {
    /// Reads the state.
    pub(crate) fn save(vm: &VmFd) -> Result<Self, KvmError> {
        let chip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).map_err(KvmError::of("KVM_GET_IRQCHIP"))?;
            Ok(chip)
        };
        Ok(Self {
            pic_master: chip(KVM_IRQCHIP_PIC_MASTER)?,
            pic_slave: chip(KVM_IRQCHIP_PIC_SLAVE)?,
            ioapic: chip(KVM_IRQCHIP_IOAPIC)?,
            pit: vm.get_pit2().map_err(KvmError::of("KVM_GET_PIT2"))?,
            clock: vm.get_clock().map_err(KvmError::of("KVM_GET_CLOCK"))?,
        })
    }

    /// Writes the state, after that of all vCPUs: an interrupt that the I/O APIC still holds goes to a LAPIC at once.
    pub(crate) fn restore(&self, vm: &VmFd, time: &TimeShift) -> Result<(), KvmError> {
        for chip in [&self.pic_master, &self.pic_slave, &self.ioapic] {
            vm.set_irqchip(chip).map_err(KvmError::of("KVM_SET_IRQCHIP"))?;
        }
        vm.set_pit2(&self.pit).map_err(KvmError::of("KVM_SET_PIT2"))?;
        let clock = kvm_clock_data { clock: self.clock.clock.saturating_add(time.elapsed_ns), ..Default::default() };
        vm.set_clock(&clock).map_err(KvmError::of("KVM_SET_CLOCK"))
    }

    /// How far the guest's time is to be moved on a host whose clock now says what `vm` answers.
    pub(crate) fn time_shift(&self, vm: &VmFd, support: &StateSupport) -> Result<TimeShift, KvmError> {
        let now = vm.get_clock().map_err(KvmError::of("KVM_GET_CLOCK"))?;
        Ok(TimeShift::between(&self.clock, &now, support.tsc_khz))
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
        payload
    }

    /// Reads a payload.
    pub(crate) fn from_bytes(payload: &[u8]) -> Result<Self, StateError> {
        let fields = Fields::read("VM", payload, kind::CLOCK)?;
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
        })
    }
}

/// By how much guest time moves on at a restore.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TimeShift {
    /// Whether both hosts' clocks said when and at which counter.
    known: bool,
    elapsed_ns: u64,
    tsc_ticks: u64,
    /// The host's counter when the state was saved, at the host where it was saved.
    saved_host_tsc: u64,
    /// The host's counter now, here.
    host_tsc: u64,
}

impl TimeShift {
    /// Guest time stands still: for a reset, where the state was saved by this machine before its first instruction.
    pub(crate) fn none() -> Self {
        Self::default()
    }

    fn between(saved: &kvm_clock_data, now: &kvm_clock_data, tsc_khz: u32) -> Self {
        let both = KVM_CLOCK_REALTIME | KVM_CLOCK_HOST_TSC;
        if saved.flags & now.flags & both != both {
            return Self::default();
        }
        let elapsed_ns = match now.realtime.checked_sub(saved.realtime) {
            Some(elapsed) if elapsed <= LONGEST_BLACKOUT.as_nanos() as u64 => elapsed,
            // A clock that went back, or a stop that was no blackout.
            _ => 0,
        };
        Self {
            known: true,
            elapsed_ns,
            tsc_ticks: (u128::from(elapsed_ns) * u128::from(tsc_khz) / 1_000_000) as u64,
            saved_host_tsc: saved.host_tsc,
            host_tsc: now.host_tsc,
        }
    }

    /// The offset that makes the guest's counter go on from where `offset` had it.
    fn tsc_offset(&self, offset: u64) -> u64 {
        self.saved_host_tsc.wrapping_add(offset).wrapping_add(self.tsc_ticks).wrapping_sub(self.host_tsc)
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

fn msr_entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry { index, data, ..Default::default() }
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
