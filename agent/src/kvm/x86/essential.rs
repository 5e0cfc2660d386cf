//! The pages without which a vCPU does not get through its next instruction: where it executes, its stack, its descriptor tables and task state, and the page tables that lead there.
//!
//! Reads what the processor reads (Intel SDM volume 3, chapter 4: 4-level and 5-level paging; other modes are left out, and their pages come when they are asked for). The
//! guest's tables are untrusted: each walk reads at most five entries.

use std::collections::BTreeSet;

use kvm_bindings::{kvm_regs, kvm_sregs};

/// CR0: paging is on.
const PAGING: u64 = 1 << 31;
/// CR4: five levels.
const FIVE_LEVELS: u64 = 1 << 12;
/// EFER: long mode is active.
const LONG_MODE: u64 = 1 << 10;
/// An entry leads somewhere.
const PRESENT: u64 = 1;
/// An entry maps a large page.
const LARGE: u64 = 1 << 7;
/// Where it leads to.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The numbers of the guest's pages (GFNs) that a vCPU needs at once. `read` gives the eight bytes at a guest physical address.
pub(crate) fn essential_pages(
    regs: &kvm_regs,
    sregs: &kvm_sregs,
    read: &dyn Fn(u64) -> Option<u64>,
    into: &mut BTreeSet<u64>,
) {
    let is_long = sregs.efer & LONG_MODE != 0;
    let base = |segment: u64| if is_long { 0 } else { segment };
    let stack = base(sregs.ss.base).wrapping_add(regs.rsp);
    let linear = [
        base(sregs.cs.base).wrapping_add(regs.rip),
        // An instruction may end on the next page.
        base(sregs.cs.base).wrapping_add(regs.rip).wrapping_add(15),
        stack,
        stack.wrapping_sub(8),
        sregs.gdt.base,
        sregs.idt.base,
        sregs.idt.base.wrapping_add(sregs.idt.limit.into()),
        sregs.tr.base,
        sregs.tr.base.wrapping_add(sregs.tr.limit.into()),
    ];
    if sregs.cr0 & PAGING == 0 {
        into.extend(linear.map(|address| address >> 12));
    } else if is_long {
        let levels = if sregs.cr4 & FIVE_LEVELS != 0 { 5 } else { 4 };
        for address in linear {
            walk(sregs.cr3, levels, address, read, into);
        }
    } else {
        into.insert(sregs.cr3 >> 12);
    }
}

/// Adds the tables on the way to an address, and the page that it leads to.
fn walk(root: u64, levels: u32, address: u64, read: &dyn Fn(u64) -> Option<u64>, into: &mut BTreeSet<u64>) {
    let mut table = root & ADDRESS;
    for level in (0..levels).rev() {
        into.insert(table >> 12);
        let index = address >> (12 + 9 * level) & 0x1ff;
        let Some(entry) = read(table + index * 8).filter(|entry| entry & PRESENT != 0) else { return };
        let inside = (1u64 << (12 + 9 * level)) - 1;
        if level == 0 || (level < 3 && entry & LARGE != 0) {
            into.insert(((entry & ADDRESS & !inside) | (address & inside)) >> 12);
            return;
        }
        table = entry & ADDRESS;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn sregs(paging: bool) -> kvm_sregs {
        let mut sregs = kvm_sregs { cr3: 0x1000, ..kvm_sregs::default() };
        if paging {
            (sregs.cr0, sregs.efer) = (PAGING, LONG_MODE);
        }
        sregs
    }

    fn pages(sregs: &kvm_sregs, rip: u64, memory: &BTreeMap<u64, u64>) -> Vec<u64> {
        let regs = kvm_regs { rip, rsp: rip, ..kvm_regs::default() };
        let mut found = BTreeSet::new();
        essential_pages(&regs, sregs, &|address| memory.get(&address).copied(), &mut found);
        found.into_iter().collect()
    }

    #[test]
    fn tables_are_followed_to_small_and_large_pages() {
        // 0x1000 -> 0x2000 -> 0x3000 -> 2 MiB at 0x40_0000; the entry of address 0 leads nowhere.
        let address = 0x8020_3000;
        let memory = BTreeMap::from([
            (0x1000, 0x2000 | PRESENT),
            (0x2000 + 2 * 8, 0x3000 | PRESENT),
            (0x3000 + 8, 0x40_0000 | PRESENT | LARGE),
        ]);
        assert_eq!(pages(&sregs(true), address, &memory), [1, 2, 3, 0x402, 0x403]);
        let mut small = memory.clone();
        small.insert(0x3000 + 8, 0x4000 | PRESENT);
        small.insert(0x4000 + 3 * 8, 0x9000 | PRESENT);
        assert_eq!(pages(&sregs(true), address, &small), [1, 2, 3, 4, 9]);
    }

    #[test]
    fn without_paging_an_address_is_its_own_and_tables_of_nonsense_end() {
        assert_eq!(pages(&sregs(false), 0x5010, &BTreeMap::new()), [0, 5]);
        // A table that leads to itself.
        let memory = (0..512).map(|index| (0x1000 + index * 8, 0x1000 | PRESENT)).collect();
        assert_eq!(pages(&sregs(true), u64::MAX - 100, &memory), [1]);
    }
}
