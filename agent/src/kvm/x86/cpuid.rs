//! CPUID: what a guest is shown, per vCPU, and whether another host can show the same.
//!
//! Owns the filter over what KVM supports, and the topology (one package, one thread a core). Nested virtualisation is not
//! offered: so there is no nested state to move.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::kvm::sys::KvmError;
use crate::model::shape::CpuidLeaf;

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;

/// The hypervisor leaf that carries the frequencies of TSC and LAPIC timer, in kHz.
const TIMING_LEAF: u32 = 0x4000_0010;
/// KVM's LAPIC timer counts at 1 GHz.
const LAPIC_TIMER_KHZ: u32 = 1_000_000;
/// The leaves of the topology by levels, threads and cores: Intel's first and second form; AMD has the first too.
const TOPOLOGY_LEAVES: [u32; 2] = [0xb, 0x1f];
/// The levels that are shown: thread, core, and the one that says that there are no more.
const TOPOLOGY_LEVELS: u32 = 3;
/// EBX of leaf 0 of AMD's processors, and of Hygon's, which are told the same.
const AMD_VENDORS: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];

/// This host cannot show a guest what it has seen elsewhere.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum CpuidError {
    /// The CPU's maker differs.
    #[error("the VM's CPU is of another maker than this host's")]
    Vendor,
    /// Features are missing.
    #[error("this host's CPU or KVM lacks features that the VM uses: {}", .0.join(", "))]
    Features(Vec<String>),
    /// The VM's physical addresses are wider.
    #[error("the VM has {vm} physical address bits, this host {host}")]
    AddressBits {
        /// The VM's.
        vm: u32,
        /// This host's.
        host: u32,
    },
}

/// The registers that hold features, one a bit: function, index, register.
const FEATURES: &[(u32, u32, usize, &str)] = &[
    (0x1, 0, ECX, "CPUID.1:ECX"),
    (0x1, 0, EDX, "CPUID.1:EDX"),
    (0x7, 0, EBX, "CPUID.7:EBX"),
    (0x7, 0, ECX, "CPUID.7:ECX"),
    (0x7, 0, EDX, "CPUID.7:EDX"),
    (0x7, 1, EAX, "CPUID.7.1:EAX"),
    (0x7, 1, EBX, "CPUID.7.1:EBX"),
    (0x7, 1, ECX, "CPUID.7.1:ECX"),
    (0x7, 1, EDX, "CPUID.7.1:EDX"),
    (0x7, 2, EDX, "CPUID.7.2:EDX"),
    (0xd, 0, EAX, "CPUID.D:EAX"),
    (0xd, 0, EDX, "CPUID.D:EDX"),
    (0xd, 1, EAX, "CPUID.D.1:EAX"),
    (0x8000_0001, 0, ECX, "CPUID.80000001:ECX"),
    (0x8000_0001, 0, EDX, "CPUID.80000001:EDX"),
    (0x8000_0007, 0, EDX, "CPUID.80000007:EDX"),
    (0x8000_0008, 0, EBX, "CPUID.80000008:EBX"),
    (0x8000_0021, 0, EAX, "CPUID.80000021:EAX"),
    (0x4000_0001, 0, EAX, "KVM features"),
];

/// What guests are shown on this host: what KVM supports, less nested virtualisation.
pub(crate) fn of_host(kvm: &Kvm, tsc_khz: u32) -> Result<Vec<CpuidLeaf>, KvmError> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(KvmError::of("KVM_GET_SUPPORTED_CPUID"))?;
    let mut leaves: Vec<CpuidLeaf> = supported
        .as_slice()
        .iter()
        .map(|entry| CpuidLeaf {
            function: entry.function,
            index: entry.index,
            flags: entry.flags,
            registers: [entry.eax, entry.ebx, entry.ecx, entry.edx],
        })
        // Nested paging of AMD's SVM; the timing leaf is ours.
        .filter(|leaf| leaf.function != 0x8000_000a && leaf.function != TIMING_LEAF)
        .collect();
    complete_topology(&mut leaves);
    let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
    for leaf in &mut leaves {
        match (leaf.function, leaf.index) {
            (0x1, _) => {
                // MONITOR and VMX away; x2APIC and the hypervisor bit on; TSC deadline as KVM says.
                leaf.registers[ECX] &= !(1 << 3 | 1 << 5 | 1 << 24);
                leaf.registers[ECX] |= 1 << 21 | 1 << 31 | u32::from(deadline_timer) << 24;
                // The initial APIC id and the CLFLUSH size; the host's own id means nothing to a guest.
                leaf.registers[EBX] &= 0xff00;
            }
            (0x8000_0001, _) => leaf.registers[ECX] &= !(1 << 2),
            (0x4000_0000, _) => leaf.registers[EAX] = leaf.registers[EAX].max(TIMING_LEAF),
            _ => {}
        }
    }
    leaves.push(CpuidLeaf { function: TIMING_LEAF, index: 0, flags: 0, registers: [tsc_khz, LAPIC_TIMER_KHZ, 0, 0] });
    Ok(leaves)
}

/// Makes room for all levels of the topology: KVM lists one without content, since it does not know how many cores there
/// will be.
fn complete_topology(leaves: &mut Vec<CpuidLeaf>) {
    for function in TOPOLOGY_LEAVES {
        let before = leaves.len();
        leaves.retain(|leaf| leaf.function != function);
        if leaves.len() < before {
            let flags = KVM_CPUID_FLAG_SIGNIFCANT_INDEX;
            leaves.extend((0..TOPOLOGY_LEVELS).map(|index| CpuidLeaf { function, index, flags, registers: [0; 4] }));
        }
    }
}

/// The leaves as vCPU `index` of `cpus` sees them.
pub(crate) fn of_vcpu(leaves: &[CpuidLeaf], index: u32, cpus: u32) -> Result<CpuId, KvmError> {
    // Bits of an APIC id that count cores.
    let core_bits = cpus.next_power_of_two().trailing_zeros();
    let is_amd = leaves.iter().any(|leaf| leaf.function == 0 && AMD_VENDORS.contains(&leaf.registers[EBX]));
    let entries: Vec<kvm_cpuid_entry2> = leaves
        .iter()
        .map(|leaf| {
            let mut registers = leaf.registers;
            set_topology(leaf, &mut registers, index, cpus, core_bits);
            if is_amd && leaf.function == 0x8000_0001 {
                // AMD's way to say that the bit for several threads means cores (CmpLegacy).
                registers[ECX] = registers[ECX] & !(1 << 1) | u32::from(cpus > 1) << 1;
            }
            kvm_cpuid_entry2 {
                function: leaf.function,
                index: leaf.index,
                flags: leaf.flags,
                eax: registers[EAX],
                ebx: registers[EBX],
                ecx: registers[ECX],
                edx: registers[EDX],
                ..Default::default()
            }
        })
        .collect();
    CpuId::from_entries(&entries)
        .map_err(|e| KvmError { action: "CPUID list", source: std::io::Error::other(format!("{e:?}")) })
}

fn set_topology(leaf: &CpuidLeaf, registers: &mut [u32; 4], id: u32, cpus: u32, core_bits: u32) {
    let mut field = |register: usize, shift: u32, bits: u32, value: u32| {
        let mask = ((1u64 << bits) - 1) as u32;
        registers[register] = registers[register] & !(mask << shift) | (value.min(mask) & mask) << shift;
    };
    match (leaf.function, leaf.index) {
        (0x1, _) => {
            field(EBX, 24, 8, id);
            field(EBX, 16, 8, 1 << core_bits);
            field(EDX, 28, 1, u32::from(cpus > 1));
        }
        // Caches: the last level is shared by all cores, the others by none.
        (0x4 | 0x8000_001d, _) if leaf.registers[EAX] & 0x1f != 0 => {
            let level = leaf.registers[EAX] >> 5 & 7;
            field(EAX, 14, 12, if level >= 3 { (1 << core_bits) - 1 } else { 0 });
            if leaf.function == 0x4 {
                field(EAX, 26, 6, (1 << core_bits) - 1);
            }
        }
        (0xb | 0x1f, level) => {
            let (shift, count, kind) = match level {
                0 => (0, 1, 1),
                1 => (core_bits, cpus, 2),
                _ => (0, 0, 0),
            };
            *registers = [shift, count, kind << 8 | level, id];
        }
        (0x8000_0008, _) => {
            field(ECX, 0, 8, cpus - 1);
            field(ECX, 12, 4, core_bits);
        }
        (0x8000_001e, _) => *registers = [id, id & 0xff, 0, 0],
        _ => {}
    }
}

/// Whether this host, which shows `host`, can run a VM that was shown `vm`.
pub(crate) fn check(vm: &[CpuidLeaf], host: &[CpuidLeaf]) -> Result<(), CpuidError> {
    let register = |leaves: &[CpuidLeaf], function, index, register: usize| {
        leaves
            .iter()
            .find(|leaf| {
                let by_index = leaf.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
                leaf.function == function && (!by_index || leaf.index == index)
            })
            .map_or(0, |leaf| leaf.registers[register])
    };
    if [EBX, ECX, EDX].iter().any(|&part| register(vm, 0, 0, part) != register(host, 0, 0, part)) {
        return Err(CpuidError::Vendor);
    }
    let missing: Vec<String> = FEATURES
        .iter()
        .filter_map(|&(function, index, part, name)| {
            let mut lacks = register(vm, function, index, part) & !register(host, function, index, part);
            // The bits for several cores are topology, not features.
            match (function, part) {
                (0x1, EDX) => lacks &= !(1 << 28),
                (0x8000_0001, ECX) => lacks &= !(1 << 1),
                _ => {}
            }
            let bits: Vec<String> = (0..32).filter(|bit| lacks >> bit & 1 == 1).map(|bit| bit.to_string()).collect();
            (!bits.is_empty()).then(|| format!("{name} bit {}", bits.join("+")))
        })
        .collect();
    if !missing.is_empty() {
        return Err(CpuidError::Features(missing));
    }
    let bits = |leaves| register(leaves, 0x8000_0008, 0, EAX) & 0xff;
    if bits(vm) > bits(host) {
        return Err(CpuidError::AddressBits { vm: bits(vm), host: bits(host) });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, registers: [u32; 4]) -> CpuidLeaf {
        CpuidLeaf { function, index, flags: u32::from(function == 7), registers }
    }

    fn host() -> Vec<CpuidLeaf> {
        vec![
            leaf(0, 0, [13, 1, 2, 3]),
            leaf(1, 0, [0, 0, 0xff, 0xff]),
            leaf(7, 0, [0, 0b11, 0, 0]),
            leaf(0x8000_0008, 0, [48, 0, 0, 0]),
            leaf(0xb, 0, [0; 4]),
            leaf(0xb, 1, [0; 4]),
        ]
    }

    #[test]
    fn a_host_that_lacks_something_is_refused_with_its_name() {
        assert_eq!(check(&host(), &host()), Ok(()));
        let mut vm = host();
        vm[2].registers[EBX] |= 1 << 16;
        let refused = check(&vm, &host()).unwrap_err();
        assert_eq!(refused, CpuidError::Features(vec!["CPUID.7:EBX bit 16".into()]));
        // The other way round is fine: the guest does not know what it could have.
        assert_eq!(check(&host(), &vm), Ok(()));
        vm = host();
        vm[0].registers[ECX] = 9;
        assert_eq!(check(&vm, &host()), Err(CpuidError::Vendor));
        vm = host();
        vm[3].registers[EAX] = 52;
        assert_eq!(check(&vm, &host()), Err(CpuidError::AddressBits { vm: 52, host: 48 }));
    }

    #[test]
    fn each_vcpu_has_its_own_id_and_the_same_package() {
        let cpuid = of_vcpu(&host(), 2, 3).unwrap();
        let find = |function, index| {
            *cpuid.as_slice().iter().find(|entry| entry.function == function && entry.index == index).unwrap()
        };
        assert_eq!(find(1, 0).ebx >> 16, 2 << 8 | 4);
        assert_eq!((find(0xb, 0).ebx, find(0xb, 0).edx), (1, 2));
        assert_eq!((find(0xb, 1).eax, find(0xb, 1).ebx, find(0xb, 1).ecx), (2, 3, 2 << 8 | 1));
        assert_eq!(find(0x8000_0008, 0).ecx, 2 | 2 << 12);
    }

    #[test]
    fn a_host_without_levels_of_topology_shows_them_all_the_same() {
        let mut leaves = vec![leaf(0xb, 0, [9; 4]), leaf(0, 0, [0; 4])];
        complete_topology(&mut leaves);
        let levels: Vec<_> = leaves.iter().map(|leaf| (leaf.function, leaf.index, leaf.flags)).collect();
        assert_eq!(levels, [(0, 0, 0), (0xb, 0, 1), (0xb, 1, 1), (0xb, 2, 1)]);
        let cpuid = of_vcpu(&leaves, 1, 2).unwrap();
        let registers: Vec<_> =
            cpuid.as_slice()[1..].iter().map(|entry| [entry.eax, entry.ebx, entry.ecx, entry.edx]).collect();
        assert_eq!(registers, [[0, 1, 1 << 8, 1], [1, 2, 2 << 8 | 1, 1], [0, 0, 2, 1]]);
    }

    #[test]
    fn cores_of_amd_are_no_threads() {
        let amd = |vendor: &[u8; 4]| {
            vec![leaf(0, 0, [13, u32::from_le_bytes(*vendor), 0, 0]), leaf(0x8000_0001, 0, [0, 0, 0, 0])]
        };
        let bit = |leaves: &[CpuidLeaf], cpus| of_vcpu(leaves, 0, cpus).unwrap().as_slice()[1].ecx >> 1 & 1;
        assert_eq!(
            [bit(&amd(b"Auth"), 1), bit(&amd(b"Auth"), 2), bit(&amd(b"Hygo"), 2), bit(&amd(b"Genu"), 2)],
            [0, 1, 1, 0]
        );
        let mut vm = amd(b"Auth");
        vm[1].registers[ECX] = 2;
        assert_eq!(check(&vm, &amd(b"Auth")), Ok(()));
    }

    #[test]
    fn a_cache_that_is_not_there_stays_away() {
        let leaves = [leaf(4, 0, [0; 4]), leaf(4, 1, [0x163, 0, 0, 0])];
        let cpuid = of_vcpu(&leaves, 0, 4).unwrap();
        assert_eq!(cpuid.as_slice().iter().map(|entry| entry.eax).collect::<Vec<_>>(), [0, 0x163 | 3 << 14 | 3 << 26]);
    }
}
