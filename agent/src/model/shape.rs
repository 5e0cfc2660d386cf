//! The shape of a machine: what a target must be able to offer before it accepts a VM.
//!
//! Owns its form on the wire too. Postcard knows no field that may be absent, so what was added to version 1 is a list of
//! names behind the last field, and `MORE` in the number of vCPUs says that it is there. A machine without any of it is
//! written as it always was, and an old reader refuses one that it could not make: no machine has so many vCPUs.

use serde::de::{Error as _, SeqAccess, Visitor};
use serde::ser::SerializeTuple;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::config::{DirtyLogKind, DiskSpec, NetSpec};
use super::id::{VmId, VmName};
use super::region::{RegionId, RegionKind, RegionSpec};
use super::units::{HUGE_PAGE_BYTES, PageCount};

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

/// Set in the number of vCPUs on the wire when names of further devices follow the last field.
const MORE: u32 = 1 << 31;
/// The most names that may follow.
const MAX_NAMES: usize = 16 + MAX_DEVICES;
/// The names: never changed, never given to anything else.
const RNG: &str = "rng";
/// Before a port's number and `:`, what its station has beyond its addresses.
const NET: &str = "net";
const BALLOON: &str = "balloon";
const HUGEPAGES: &str = "hugepages";

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
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// Whether it has a source of entropy; behind the disks in device order.
    pub rng: bool,
    /// Whether it has a balloon; the last in device order.
    pub balloon: bool,
    /// Whether its RAM is of huge pages that a host has set aside.
    pub hugepages: bool,
}

impl MachineShape {
    /// What the wire's version 1 at first had no place for.
    fn names(&self) -> Vec<String> {
        let named = [(self.rng, RNG), (self.balloon, BALLOON), (self.hugepages, HUGEPAGES)];
        let named = named.into_iter().filter(|(there, _)| *there).map(|(_, name)| name.to_owned());
        let further = self.nets.iter().map(|net| net.station.further()).enumerate();
        let further = further.filter(|(_, text)| !text.is_empty()).map(|(port, text)| format!("{NET}{port}:{text}"));
        named.chain(further).collect()
    }

    /// What a port's station has beyond its addresses, as [`MachineShape::names`] has written it; `false` if `name` is none of that.
    fn take_further(&mut self, name: &str) -> Result<bool, String> {
        let Some((port, text)) = name.strip_prefix(NET).and_then(|rest| rest.split_once(':')) else { return Ok(false) };
        let port = port.parse().ok().and_then(|port: usize| self.nets.get_mut(port));
        let port = port.ok_or_else(|| format!("the VM has no port for `{}`", name.escape_debug()))?;
        port.station.take_further(text).map_err(|error| error.to_string())?;
        Ok(true)
    }

    fn take_names(&mut self, names: &[String]) -> Result<(), String> {
        if names.len() > MAX_NAMES {
            return Err(format!("{} further devices are more than {MAX_NAMES}", names.len()));
        }
        for name in names {
            match name.as_str() {
                RNG => self.rng = true,
                BALLOON => self.balloon = true,
                HUGEPAGES => self.hugepages = true,
                other if self.take_further(other)? => {}
                other => {
                    return Err(format!(
                        "the VM has a device `{}`, which this build does not know",
                        other.escape_debug()
                    ));
                }
            }
        }
        Ok(())
    }
}

/// Fields that every shape has on the wire.
const FIELDS: usize = 9;

impl Serialize for MachineShape {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let names = self.names();
        let mut fields = serializer.serialize_tuple(FIELDS + usize::from(!names.is_empty()))?;
        fields.serialize_element(&self.vm_id)?;
        fields.serialize_element(&self.name)?;
        fields.serialize_element(&self.memory_bytes)?;
        fields.serialize_element(&(if names.is_empty() { self.cpus } else { self.cpus | MORE }))?;
        fields.serialize_element(&self.dirty_log)?;
        fields.serialize_element(&self.tsc_khz)?;
        fields.serialize_element(&self.cpuid)?;
        fields.serialize_element(&self.nets)?;
        fields.serialize_element(&self.disks)?;
        if !names.is_empty() {
            fields.serialize_element(&names)?;
        }
        fields.end()
    }
}

impl<'de> Deserialize<'de> for MachineShape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;

        fn field<'de, A: SeqAccess<'de>, T: Deserialize<'de>>(fields: &mut A) -> Result<T, A::Error> {
            fields.next_element()?.ok_or_else(|| A::Error::custom("a machine's shape ends early"))
        }

        impl<'de> Visitor<'de> for Fields {
            type Value = MachineShape;

            fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                formatter.write_str("the shape of a machine")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut fields: A) -> Result<MachineShape, A::Error> {
                let mut shape = MachineShape {
                    vm_id: field(&mut fields)?,
                    name: field(&mut fields)?,
                    memory_bytes: field(&mut fields)?,
                    cpus: field(&mut fields)?,
                    dirty_log: field(&mut fields)?,
                    tsc_khz: field(&mut fields)?,
                    cpuid: field(&mut fields)?,
                    nets: field(&mut fields)?,
                    disks: field(&mut fields)?,
                    rng: false,
                    balloon: false,
                    hugepages: false,
                };
                if shape.cpus & MORE != 0 {
                    shape.cpus &= !MORE;
                    let names: Vec<String> = field(&mut fields)?;
                    shape.take_names(&names).map_err(A::Error::custom)?;
                }
                Ok(shape)
            }
        }

        // Postcard writes no count: whether the last field is there is for the mark to say.
        deserializer.deserialize_tuple(FIELDS + 1, Fields)
    }
}

/// Why an offered shape is not one.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ShapeError {
    /// RAM of zero, not whole pages, or above [`MAX_MEMORY_BYTES`].
    #[error("memory of {0} bytes is not between one page and {MAX_MEMORY_BYTES} bytes in whole pages")]
    Memory(u64),
    /// RAM of huge pages that is not a number of them.
    #[error("memory of {0} bytes is not a number of huge pages of 2 MiB, as --hugepages wants it")]
    HugePages(u64),
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
        if self.hugepages && !self.memory_bytes.is_multiple_of(HUGE_PAGE_BYTES) {
            return Err(ShapeError::HugePages(self.memory_bytes));
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

#[cfg(test)]
mod tests {
    use super::*;

    fn shape() -> MachineShape {
        MachineShape {
            vm_id: VmId(uuid::Uuid::from_u128(7)),
            name: "web1".parse().unwrap(),
            memory_bytes: 256 << 20,
            cpus: 2,
            dirty_log: DirtyLogKind::Ring,
            tsc_khz: 2_000_000,
            cpuid: vec![CpuidLeaf { function: 1, index: 0, flags: 0, registers: [1, 2, 3, 4] }],
            nets: "tap=t0,mac=02:00:00:00:00:01,ip=10.0.0.2".parse().into_iter().collect(),
            disks: "path=/d.img,readonly".parse().into_iter().collect(),
            rng: false,
            balloon: false,
            hugepages: false,
        }
    }

    /// What builds before the entropy source and the balloon wrote and read.
    const OLD: &[u8] = &[
        16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 4, 119, 101, 98, 49, 128, 128, 128, 128, 1, 2, 1, 128, 137,
        122, 1, 1, 0, 0, 1, 2, 3, 4, 1, 2, 116, 48, 17, 48, 50, 58, 48, 48, 58, 48, 48, 58, 48, 48, 58, 48, 48, 58, 48,
        49, 1, 0, 10, 0, 0, 2, 1, 6, 47, 100, 46, 105, 109, 103, 1,
    ];
    /// The same machine with both.
    const NEW: &[u8] = &[
        16, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7, 4, 119, 101, 98, 49, 128, 128, 128, 128, 1, 130, 128, 128,
        128, 8, 1, 128, 137, 122, 1, 1, 0, 0, 1, 2, 3, 4, 1, 2, 116, 48, 17, 48, 50, 58, 48, 48, 58, 48, 48, 58, 48,
        48, 58, 48, 48, 58, 48, 49, 1, 0, 10, 0, 0, 2, 1, 6, 47, 100, 46, 105, 109, 103, 1, 2, 3, 114, 110, 103, 7, 98,
        97, 108, 108, 111, 111, 110,
    ];

    #[test]
    fn machines_without_the_later_devices_are_written_as_they_always_were() {
        /// The form as it was derived then.
        #[derive(Serialize)]
        struct Old(VmId, VmName, u64, u32, DirtyLogKind, u32, Vec<CpuidLeaf>, Vec<NetSpec>, Vec<DiskSpec>);

        let MachineShape { vm_id, name, memory_bytes, cpus, dirty_log, tsc_khz, cpuid, nets, disks, .. } = shape();
        let old = Old(vm_id, name, memory_bytes, cpus, dirty_log, tsc_khz, cpuid, nets, disks);
        assert_eq!(postcard::to_stdvec(&old).unwrap(), OLD);
        assert_eq!(postcard::to_stdvec(&shape()).unwrap(), OLD);
        assert_eq!(postcard::from_bytes::<MachineShape>(OLD).unwrap(), shape());
    }

    #[test]
    fn later_devices_travel_in_the_midst_of_other_messages() {
        for (rng, balloon) in [(false, false), (true, false), (false, true), (true, true)] {
            let shape = MachineShape { rng, balloon, ..shape() };
            let bytes = postcard::to_stdvec(&(1u8, &shape, 0xabcd_u32)).unwrap();
            assert_eq!(postcard::from_bytes::<(u8, MachineShape, u32)>(&bytes).unwrap(), (1, shape, 0xabcd));
        }
        let huge = MachineShape { hugepages: true, ..shape() };
        assert_eq!(postcard::from_bytes::<MachineShape>(&postcard::to_stdvec(&huge).unwrap()).unwrap(), huge);
        let odd = MachineShape { memory_bytes: huge.memory_bytes + 4096, ..huge.clone() };
        assert_eq!((huge.check(), odd.check()), (Ok(()), Err(ShapeError::HugePages(odd.memory_bytes))));
        let both = MachineShape { rng: true, balloon: true, ..shape() };
        assert_eq!(postcard::to_stdvec(&both).unwrap(), NEW);
        assert_eq!(postcard::from_bytes::<MachineShape>(NEW).unwrap(), both);
    }

    #[test]
    fn what_a_port_has_beyond_its_addresses_travels() {
        let mut shape = MachineShape { rng: true, ..shape() };
        let further = "tap=t1,mac=02:00:00:00:00:02,ip=fd00::2,router=fd00::2,gateway=fe80::1,vlan=100.42";
        shape.nets.push(further.parse().unwrap());
        assert_eq!(shape.names(), ["rng", "net1:router=fd00::2,gateway=fe80::1,vlan=100.42"]);
        assert_eq!(postcard::from_bytes::<MachineShape>(&postcard::to_stdvec(&shape).unwrap()).unwrap(), shape);
        for bad in ["net7:vlan=3", "net0:vlan=5000", "net0:", "netx:vlan=3", "net0:tap=t1"] {
            assert!(shape.take_names(&[bad.to_owned()]).is_err(), "{bad} was accepted");
        }
    }

    #[test]
    fn devices_that_this_build_does_not_know_are_refused() {
        let mut bytes = NEW.to_vec();
        let last = bytes.len() - 1;
        bytes[last] = b'm';
        assert!(postcard::from_bytes::<MachineShape>(&bytes).is_err());
        assert!(postcard::from_bytes::<MachineShape>(&NEW[..last]).is_err());
        let error = shape().take_names(&["rng".to_owned(), "tpm".to_owned()]).unwrap_err();
        assert!(error.contains("`tpm`"), "{error}");
        assert!(shape().take_names(&vec!["rng".to_owned(); MAX_NAMES + 1]).is_err());
        // What an old reader says to a new shape: refused, not misread.
        let (.., cpus) = postcard::take_from_bytes::<(VmId, VmName, u64, u32)>(NEW).unwrap().0;
        assert!(MachineShape { cpus, ..shape() }.check().is_err());
    }
}
