//! The shape of a machine: what a target must be able to offer before it accepts a VM.

use serde::{Deserialize, Serialize};

use super::config::{DirtyLogKind, DiskSpec, NetSpec};
use super::id::{VmId, VmName};
use super::region::{RegionId, RegionKind, RegionSpec};
use super::units::PageCount;

/// The most guest RAM that an offer may ask for, in bytes (16 TiB).
pub const MAX_MEMORY_BYTES: u64 = 16 << 40;
/// The most vCPUs that an offer may ask for.
pub const MAX_CPUS: u32 = 1024;
/// The most devices of one kind that an offer may ask for.
pub const MAX_DEVICES: usize = 32;

/// The longest boot image that moves along with a VM, in bytes, framing included: no machine boots from a larger one, and
/// no peer is believed a larger one.
pub const MAX_BOOT_IMAGE_BYTES: usize = 513 << 20;
/// The frequencies in kHz that a time-stamp counter may have: 10 MHz to 100 GHz, far beyond what has been built.
pub const TSC_KHZ: std::ops::RangeInclusive<u32> = 10_000..=100_000_000;

/// One CPUID leaf as the guest sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidLeaf {
    /// EAX on entry.
    pub function: u32,
    /// ECX on entry, where the leaf has subleaves.
    pub index: u32,
    /// KVM's flags (`KVM_CPUID_FLAG_*`).
    pub flags: u32,
    /// EAX, EBX, ECX, EDX on return.
    pub registers: [u32; 4],
}

/// What a machine is made of. Sent with the offer; every count is checked against the limits of this module
/// before anything is allocated for it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineShape {
    /// The VM's identity.
    pub vm_id: VmId,
    /// The VM's name.
    pub name: VmName,
    /// Guest RAM in bytes, a multiple of the page size.
    pub memory_bytes: u64,
    /// Number of vCPUs.
    pub cpus: u32,
    /// How writes are logged; the target's machine is created with the same.
    pub dirty_log: DirtyLogKind,
    /// The guest's time-stamp counter frequency in kHz.
    pub tsc_khz: u32,
    /// CPUID of the boot processor; the target refuses what its host cannot offer.
    pub cpuid: Vec<CpuidLeaf>,
    /// Network ports, in device order. Taps are the source's names; the target maps them to its own.
    pub nets: Vec<NetSpec>,
    /// Disks, in device order. Paths are the source's; the target maps them to its own.
    pub disks: Vec<DiskSpec>,
}

/// Why an offered shape is not one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ShapeError {
    /// RAM of zero, not whole pages, or above [`MAX_MEMORY_BYTES`].
    #[error("memory of {0} bytes is not between one page and {MAX_MEMORY_BYTES} bytes in whole pages")]
    Memory(u64),
    /// No vCPU, or more than [`MAX_CPUS`].
    #[error("{0} vCPUs are not between 1 and {MAX_CPUS}")]
    Cpus(u32),
    /// More devices of a kind than [`MAX_DEVICES`].
    #[error("{0} devices of a kind are more than {MAX_DEVICES}")]
    Devices(usize),
    /// More CPUID leaves than KVM itself would return (`KVM_MAX_CPUID_ENTRIES`).
    #[error("{0} CPUID leaves are more than 256")]
    Cpuid(usize),
    /// A counter's frequency outside [`TSC_KHZ`], of a machine that has been shown a CPU.
    #[error("a time-stamp counter of {0} kHz is none: it is between {start} and {end} kHz", start = TSC_KHZ.start(), end = TSC_KHZ.end())]
    Tsc(u32),
}

impl MachineShape {
    /// Checks every count against its limit.
    ///
    /// # Errors
    /// The first limit that the shape breaks.
    pub fn check(&self) -> Result<(), ShapeError> {
        if self.memory_bytes == 0
            || !self.memory_bytes.is_multiple_of(super::units::PAGE_SIZE as u64)
            || self.memory_bytes > MAX_MEMORY_BYTES
        {
            return Err(ShapeError::Memory(self.memory_bytes));
        }
        if !(1..=MAX_CPUS).contains(&self.cpus) {
            return Err(ShapeError::Cpus(self.cpus));
        }
        if self.nets.len().max(self.disks.len()) > MAX_DEVICES {
            return Err(ShapeError::Devices(self.nets.len().max(self.disks.len())));
        }
        if self.cpuid.len() > 256 {
            return Err(ShapeError::Cpuid(self.cpuid.len()));
        }
        // Without CPUID it is a machine that has not been made, and gets its host's frequency.
        if !self.cpuid.is_empty() && !TSC_KHZ.contains(&self.tsc_khz) {
            return Err(ShapeError::Tsc(self.tsc_khz));
        }
        Ok(())
    }

    /// The regions that move: RAM, as one file.
    pub fn regions(&self) -> Vec<RegionSpec> {
        vec![RegionSpec { id: RegionId::RAM, kind: RegionKind::Ram, pages: PageCount::covering(self.memory_bytes) }]
    }
}
