//! Places in a guest, by names that hold on any processor.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::units::PAGE_SIZE;

/// A guest physical address, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Gpa(pub u64);

/// A guest frame number: a guest physical address in units of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Gfn(pub u64);

/// A guest virtual address, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Gva(pub u64);

/// A guest's address space, by the guest physical address of its root page table (CR3 on x86, without its flag bits).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct AddressSpace(pub u64);

/// A range of guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct MemoryRange {
    /// Its first byte.
    pub start: Gpa,
    /// Its length in bytes, a multiple of [`PAGE_SIZE`].
    pub bytes: u64,
}

/// A piece of guest RAM and where the VM's own process has it: one of KVM's memory slots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RamSlot {
    /// Its first byte in the guest.
    pub start: Gpa,
    /// Its length in bytes, a multiple of [`PAGE_SIZE`].
    pub bytes: u64,
    /// Its first byte in the address space of the VM's process.
    pub host_address: u64,
}

impl RamSlot {
    /// What it covers in the guest.
    pub const fn range(&self) -> MemoryRange {
        MemoryRange { start: self.start, bytes: self.bytes }
    }

    /// Whether it is whole pages, not empty, and neither of its ends lies beyond what an address can say.
    pub const fn is_sound(&self) -> bool {
        let page = PAGE_SIZE as u64;
        self.bytes > 0
            && self.bytes.is_multiple_of(page)
            && self.start.0.is_multiple_of(page)
            && self.host_address.is_multiple_of(page)
            && self.start.0.checked_add(self.bytes).is_some()
            && self.host_address.checked_add(self.bytes).is_some()
    }
}

impl Gpa {
    /// The frame that holds this address.
    pub const fn frame(self) -> Gfn {
        Gfn(self.0 / PAGE_SIZE as u64)
    }
}

impl Gfn {
    /// The frame's first byte; the highest address there is for a number that no frame has.
    pub const fn address(self) -> Gpa {
        Gpa(self.0.saturating_mul(PAGE_SIZE as u64))
    }
}

impl MemoryRange {
    /// The first byte behind it.
    pub const fn end(&self) -> Gpa {
        Gpa(self.start.0.saturating_add(self.bytes))
    }

    /// Whether `bytes` bytes from `from` lie inside.
    pub const fn contains(&self, from: Gpa, bytes: u64) -> bool {
        from.0 >= self.start.0 && from.0 - self.start.0 <= self.bytes && bytes <= self.bytes - (from.0 - self.start.0)
    }
}

macro_rules! hexadecimal {
    ($($name:ident),*) => {$(
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    )*};
}

hexadecimal!(Gpa, Gfn, Gva, AddressSpace);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_holds_what_lies_wholly_inside() {
        let range = MemoryRange { start: Gpa(0x1000), bytes: 0x2000 };
        assert!(
            range.contains(Gpa(0x1000), 0x2000) && range.contains(Gpa(0x2fff), 1) && range.contains(range.end(), 0)
        );
        assert!(!range.contains(Gpa(0xfff), 1) && !range.contains(Gpa(0x1000), 0x2001));
        assert!(!range.contains(Gpa(0x2fff), 2) && !range.contains(Gpa(u64::MAX), u64::MAX));
    }

    #[test]
    fn a_slot_that_wraps_or_is_no_whole_pages_is_not_sound() {
        let slot = RamSlot { start: Gpa(0x1000), bytes: 0x2000, host_address: 0x7000 };
        assert!(slot.is_sound() && slot.range().end() == Gpa(0x3000));
        for bad in [
            RamSlot { bytes: 0, ..slot },
            RamSlot { bytes: 0x1001, ..slot },
            RamSlot { start: Gpa(u64::MAX - 0xfff), ..slot },
            RamSlot { host_address: u64::MAX - 0xfff, ..slot },
            RamSlot { host_address: 0x7001, ..slot },
        ] {
            assert!(!bad.is_sound(), "{bad:?}");
        }
    }

    #[test]
    fn frames_and_addresses_belong_together() {
        assert_eq!((Gpa(0x1fff).frame(), Gfn(2).address()), (Gfn(1), Gpa(0x2000)));
        assert_eq!((Gfn(u64::MAX).address(), Gfn(16).to_string()), (Gpa(u64::MAX), "0x10".to_owned()));
    }
}
