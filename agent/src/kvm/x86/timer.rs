//! When a vCPU's own timer is due, as its local APIC has it.
//!
//! Owns the reading of the timer's registers (Intel SDM volume 3, 11.5.4). Must not know why anybody asks.

use std::time::Duration;

use kvm_bindings::{Msrs, kvm_lapic_state, kvm_msr_entry};
use kvm_ioctls::VcpuFd;

/// Registers of the local APIC, by offset.
const ISR: usize = 0x100;
const IRR: usize = 0x200;
const LVT_TIMER: usize = 0x320;
const CURRENT_COUNT: usize = 0x390;
const DIVIDE: usize = 0x3e0;
const MASKED: u32 = 1 << 16;
const DEADLINE_MODE: u32 = 0b10;
const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// How long until the vCPU has an interrupt to take: none at all while one is pending, or has been taken and not been dealt with; unknown without a timer.
pub(in crate::kvm) fn next_interrupt(fd: &VcpuFd) -> Option<Duration> {
    let lapic = fd.get_lapic().ok()?;
    let any = |first: usize| (0..8).any(|index| register(&lapic, first + index * 0x10) != 0);
    if any(IRR) || any(ISR) {
        return Some(Duration::ZERO);
    }
    let timer = register(&lapic, LVT_TIMER);
    if timer & MASKED != 0 {
        return None;
    }
    if timer >> 17 & 0b11 == DEADLINE_MODE {
        let entry = |index| kvm_msr_entry { index, ..Default::default() };
        let mut msrs = Msrs::from_entries(&[entry(MSR_TSC_DEADLINE), entry(MSR_TSC)]).ok()?;
        fd.get_msrs(&mut msrs).ok().filter(|&read| read == 2)?;
        let [deadline, now] = [0, 1].map(|index| msrs.as_slice()[index].data);
        let khz = fd.get_tsc_khz().ok().filter(|&khz| khz > 0)?;
        return (deadline != 0)
            .then(|| Duration::from_nanos(deadline.saturating_sub(now).saturating_mul(1_000_000) / u64::from(khz)));
    }
    counted(register(&lapic, CURRENT_COUNT), register(&lapic, DIVIDE))
}

/// KVM's bus takes a nanosecond a cycle (`APIC_BUS_CYCLE_NS`, arch/x86/kvm/lapic.h).
fn counted(count: u32, divide: u32) -> Option<Duration> {
    let shift = ((divide & 0b11 | divide >> 1 & 0b100) + 1) & 0b111;
    (count != 0).then(|| Duration::from_nanos(u64::from(count) << shift))
}

fn register(lapic: &kvm_lapic_state, offset: usize) -> u32 {
    u32::from_le_bytes(std::array::from_fn(|byte| lapic.regs[offset + byte] as u8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_is_a_time_by_the_divider() {
        let ns = |count, divide| counted(count, divide).map(|time| time.as_nanos());
        // Table of the divide configuration register: 1011b divides by 1, 0000b by 2, 0011b by 16, 1010b by 128.
        assert_eq!([ns(100, 0b1011), ns(100, 0), ns(100, 0b0011), ns(100, 0b1010)], [100, 200, 1600, 12_800].map(Some));
        assert_eq!(ns(0, 0), None);
    }
}
