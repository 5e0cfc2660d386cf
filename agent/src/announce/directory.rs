//! The map of VMs to their addresses that a host keeps: who is here with what, and where those have gone that were.
//!
//! Owns what is believed, what is forgotten, and the bounds. Must not know where words come from: whoever looks at processes and tables says them.
//!
//! An IP address that was learnt from a table belongs to one Ethernet address at a time, the one that was said last. What a VM was started with stays its own, whoever else claims it: two
//! that claim the same are a conflict, and that is told.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::IpAddr;

use super::frames;
use super::learn::MOST_IPS;
use crate::model::addresses::{AddressBook, KnownCard, KnownVm, LeftVm, SharedAddress};
use crate::model::network::{ConflictKind, FoundIp, LearntFrom};
use crate::model::{MacAddress, VmId};

/// No more VMs are kept; others are left out.
pub const MOST_VMS: usize = 4096;
/// No more cards of one VM.
pub const MOST_CARDS: usize = 256;
/// No more VMs that have left: the oldest are forgotten.
pub const MOST_LEFT: usize = 256;

/// The map.
#[derive(Clone, Debug, Default)]
pub struct Directory {
    vms: BTreeMap<VmId, KnownVm>,
    left: VecDeque<LeftVm>,
}

impl Directory {
    /// What was written before. It is as bounded as any other.
    pub fn restore(book: AddressBook) -> Self {
        let mut directory = Self::default();
        for vm in book.vms {
            directory.arrive(vm);
        }
        for left in book.left.into_iter().rev() {
            directory.leave(left);
        }
        directory
    }

    /// Whether the VM is known as this process, and its cards with it.
    pub fn knows(&self, vm_id: VmId, pid: u32) -> bool {
        self.vms.get(&vm_id).is_some_and(|vm| vm.pid == pid && vm.problem.is_none())
    }

    /// The same, whether its cards are known or not.
    pub fn knows_process(&self, vm_id: VmId, pid: u32) -> bool {
        self.vms.get(&vm_id).is_some_and(|vm| vm.pid == pid)
    }

    /// A VM is here. What was learnt of it before is kept where its cards have the same addresses; since when it is here, if it is the same process.
    pub fn arrive(&mut self, mut vm: KnownVm) {
        vm.cards.truncate(MOST_CARDS);
        for card in &mut vm.cards {
            card.ips.retain(|found| frames::check(found.ip).is_ok());
            card.ips.truncate(MOST_IPS);
        }
        if let Some(before) = self.vms.get(&vm.vm_id) {
            if before.pid == vm.pid {
                vm.since_unix_ms = vm.since_unix_ms.min(before.since_unix_ms);
                vm.came_from = vm.came_from.or_else(|| before.came_from.clone());
            }
            for card in &mut vm.cards {
                let mac = card.mac;
                let learnt = before.cards.iter().filter(|known| known.mac == mac);
                for found in learnt.flat_map(|known| &known.ips).filter(|found| is_learnt(found.from)) {
                    add(card, *found);
                }
            }
        } else if self.vms.len() >= MOST_VMS {
            return;
        }
        self.left.retain(|left| left.vm_id != vm.vm_id);
        self.vms.insert(vm.vm_id, vm);
    }

    /// Only `present` are here: takes the others out, and returns them.
    pub fn keep_only(&mut self, present: &BTreeSet<VmId>) -> Vec<KnownVm> {
        let gone: Vec<VmId> = self.vms.keys().filter(|id| !present.contains(id)).copied().collect();
        gone.iter().filter_map(|id| self.vms.remove(id)).collect()
    }

    /// A VM has gone.
    pub fn leave(&mut self, left: LeftVm) {
        self.vms.remove(&left.vm_id);
        self.left.retain(|before| before.vm_id != left.vm_id);
        self.left.push_front(left);
        self.left.truncate(MOST_LEFT);
    }

    /// A table has `ip` for `mac` now: whoever else was believed to have it by a table has it no more. Returns whether that is news.
    pub fn learn(&mut self, mac: MacAddress, ip: IpAddr, from: LearntFrom, router: Option<bool>) -> bool {
        if frames::check(ip).is_err() || !self.cards().any(|card| card.mac == mac) {
            return false;
        }
        let mut news = false;
        for card in self.vms.values_mut().flat_map(|vm| &mut vm.cards) {
            if card.mac == mac {
                news |= add(card, FoundIp { ip, from, router });
            } else {
                let before = card.ips.len();
                card.ips.retain(|found| found.ip != ip || !is_learnt(found.from));
                news |= card.ips.len() < before;
            }
        }
        news
    }

    fn cards(&self) -> impl Iterator<Item = &KnownCard> {
        self.vms.values().flat_map(|vm| &vm.cards)
    }

    /// Addresses that two VMs on one bridge share.
    pub fn conflicts(&self) -> Vec<SharedAddress> {
        let mut by_mac: BTreeMap<(&str, MacAddress), BTreeSet<VmId>> = BTreeMap::new();
        let mut by_ip: BTreeMap<(&str, IpAddr), (MacAddress, BTreeSet<VmId>)> = BTreeMap::new();
        for (id, vm) in &self.vms {
            for card in &vm.cards {
                let Some(bridge) = card.bridge.as_deref() else { continue };
                by_mac.entry((bridge, card.mac)).or_default().insert(*id);
                for found in &card.ips {
                    by_ip.entry((bridge, found.ip)).or_insert_with(|| (card.mac, BTreeSet::new())).1.insert(*id);
                }
            }
        }
        let names = |ids: &BTreeSet<VmId>| {
            let mut names: Vec<String> =
                ids.iter().filter_map(|id| self.vms.get(id)).map(|vm| vm.vm_name.clone()).collect();
            names.sort();
            names
        };
        let mut shared = Vec::new();
        for ((bridge, mac), ids) in &by_mac {
            if ids.len() > 1 {
                let (kind, bridge) = (ConflictKind::Mac, (*bridge).to_owned());
                shared.push(SharedAddress { kind, bridge, mac: *mac, ip: None, vm_names: names(ids) });
            }
        }
        for ((bridge, ip), (mac, ids)) in &by_ip {
            // Those that share an Ethernet address share what was learnt of it.
            let is_told = by_mac.get(&(*bridge, *mac)).is_some_and(|owners| ids.is_subset(owners));
            if ids.len() > 1 && !is_told {
                let (kind, bridge) = (ConflictKind::Address, (*bridge).to_owned());
                shared.push(SharedAddress { kind, bridge, mac: *mac, ip: Some(*ip), vm_names: names(ids) });
            }
        }
        shared
    }

    /// All of it.
    pub fn book(&self, unix_ms: u64, host: &str) -> AddressBook {
        let mut vms: Vec<KnownVm> = self.vms.values().cloned().collect();
        vms.sort_by(|a, b| a.vm_name.cmp(&b.vm_name).then(a.pid.cmp(&b.pid)));
        let left = self.left.iter().cloned().collect();
        AddressBook { unix_ms, host: host.to_owned(), vms, left, conflicts: self.conflicts() }
    }
}

/// Whether a table or a frame said so, and not whoever started the VM.
const fn is_learnt(from: LearntFrom) -> bool {
    matches!(from, LearntFrom::ForwardingTable | LearntFrom::NeighbourTable | LearntFrom::Traffic)
}

/// Adds an address to a card, once; whether that is news. What it was started with stays; of what was learnt the oldest gives way.
fn add(card: &mut KnownCard, found: FoundIp) -> bool {
    if let Some(known) = card.ips.iter_mut().find(|known| known.ip == found.ip) {
        let router = found.router.or(known.router);
        return std::mem::replace(&mut known.router, router) != router;
    }
    if card.ips.len() >= MOST_IPS {
        let Some(oldest) = card.ips.iter().position(|known| is_learnt(known.from)) else { return false };
        card.ips.remove(oldest);
    }
    card.ips.push(found);
    true
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn mac(number: u8) -> MacAddress {
        MacAddress::new([2, 0, 0, 0, 0, number]).unwrap()
    }

    fn ip(number: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, number.max(1)])
    }

    fn vm(number: u8, pid: u32, mac_number: u8, own: &[u8]) -> KnownVm {
        let ips = own.iter().map(|&n| FoundIp { ip: ip(n), from: LearntFrom::Configuration, router: None }).collect();
        KnownVm {
            vm_id: VmId(uuid::Uuid::from_u128(number.into())),
            vm_name: format!("vm{number}"),
            is_hosted: true,
            pid,
            since_unix_ms: u64::from(pid),
            came_by: None,
            came_from: None,
            state_dir: None,
            cards: vec![KnownCard {
                tap: format!("tap{number}"),
                bridge: Some("br0".to_owned()),
                mac: mac(mac_number),
                from: LearntFrom::Configuration,
                vlan: None,
                ips,
            }],
            problem: None,
        }
    }

    fn left(number: u8) -> LeftVm {
        let vm = vm(number, 1, 1, &[]);
        LeftVm { vm_id: vm.vm_id, vm_name: vm.vm_name, left_unix_ms: 1, went_by: None, went_to: None, macs: Vec::new() }
    }

    #[test]
    fn what_is_learnt_moves_and_what_was_given_stays() {
        let mut directory = Directory::default();
        directory.arrive(vm(1, 1, 1, &[1]));
        directory.arrive(vm(2, 2, 2, &[]));
        let learn = |directory: &mut Directory, of: u8, number: u8| {
            directory.learn(mac(of), ip(number), LearntFrom::NeighbourTable, None)
        };
        assert!(learn(&mut directory, 1, 9) && !learn(&mut directory, 1, 9));
        assert!(learn(&mut directory, 2, 9), "it has moved");
        assert!(!learn(&mut directory, 7, 3), "nobody's");
        let ips = |directory: &Directory, at: usize| -> Vec<IpAddr> {
            directory.book(0, "h").vms[at].cards[0].ips.iter().map(|found| found.ip).collect()
        };
        assert_eq!((ips(&directory, 0), ips(&directory, 1)), (vec![ip(1)], vec![ip(9)]));
        assert_eq!(directory.conflicts(), []);
        // Somebody has what another was started with.
        assert!(learn(&mut directory, 2, 1));
        let [conflict] = &directory.conflicts()[..] else { panic!() };
        assert_eq!((conflict.kind, conflict.ip), (ConflictKind::Address, Some(ip(1))));
        assert_eq!(conflict.sentence(), "vm1 and vm2 share 10.0.0.1 on bridge `br0`");
        // The same Ethernet address is one conflict, and what was learnt for it no other.
        directory.arrive(vm(3, 3, 2, &[]));
        learn(&mut directory, 2, 9);
        let kinds: Vec<_> = directory.conflicts().iter().map(|one| (one.kind, one.vm_names.join(","))).collect();
        assert_eq!(kinds[0], (ConflictKind::Mac, "vm2,vm3".to_owned()), "{kinds:?}");
        assert!(
            kinds.iter().filter(|(kind, _)| *kind == ConflictKind::Address).all(|(_, names)| names.contains("vm1"))
        );
        // Bridges apart: nobody hears the other.
        let mut apart = vm(3, 3, 2, &[]);
        apart.cards[0].bridge = Some("br1".to_owned());
        directory.arrive(apart);
        assert!(directory.conflicts().iter().all(|one| one.kind == ConflictKind::Address));
    }

    #[test]
    fn a_vm_that_comes_back_is_not_among_those_that_left() {
        let mut directory = Directory::default();
        directory.arrive(vm(1, 10, 1, &[1]));
        assert!(directory.knows(vm(1, 10, 1, &[]).vm_id, 10));
        directory.learn(mac(1), ip(7), LearntFrom::NeighbourTable, None);
        let gone = directory.keep_only(&BTreeSet::new());
        assert_eq!(gone.len(), 1);
        directory.leave(left(1));
        assert_eq!(directory.book(0, "h").left.len(), 1);
        directory.arrive(vm(1, 11, 1, &[1]));
        let book = directory.book(5, "h");
        assert_eq!((book.left.len(), book.vms[0].since_unix_ms, book.host.as_str()), (0, 11, "h"));
        // The same process, looked at again: since when, and what was learnt, are kept.
        directory.learn(mac(1), ip(7), LearntFrom::NeighbourTable, None);
        directory.arrive(KnownVm { since_unix_ms: 99, ..vm(1, 11, 1, &[1]) });
        let again = directory.book(5, "h");
        assert_eq!((again.vms[0].since_unix_ms, again.vms[0].cards[0].ips.len()), (11, 2));
    }

    /// What may happen to the map.
    #[derive(Clone, Debug)]
    enum Event {
        Arrive(u8, u32, u8, Vec<u8>),
        Learn(u8, u8),
        Leave(u8),
        KeepOnly(Vec<u8>),
    }

    fn any_event() -> impl Strategy<Value = Event> {
        prop_oneof![
            (0u8..12, 1u32..4, 0u8..8, prop::collection::vec(0u8..20, 0..4))
                .prop_map(|(n, pid, mac, ips)| Event::Arrive(n, pid, mac, ips)),
            (0u8..8, 0u8..200).prop_map(|(mac, ip)| Event::Learn(mac, ip)),
            (0u8..12).prop_map(Event::Leave),
            prop::collection::vec(0u8..12, 0..12).prop_map(Event::KeepOnly),
        ]
    }

    proptest! {
        /// Whatever happens: bounded, no VM both here and gone, no learnt address at two Ethernet addresses, conflicts of VMs that are here, and what is written reads back the same.
        #[test]
        fn the_map_stays_sane(events in prop::collection::vec(any_event(), 0..400)) {
            let mut directory = Directory::default();
            for event in events {
                match event {
                    Event::Arrive(n, pid, mac, ips) => directory.arrive(vm(n, pid, mac, &ips)),
                    Event::Learn(of, number) => {
                        directory.learn(mac(of), ip(number), LearntFrom::NeighbourTable, None);
                    }
                    Event::Leave(n) => directory.leave(left(n)),
                    Event::KeepOnly(present) => {
                        let present = present.into_iter().map(|n| vm(n, 1, 1, &[]).vm_id).collect();
                        for gone in directory.keep_only(&present) {
                            prop_assert!(!present.contains(&gone.vm_id));
                        }
                    }
                }
                let book = directory.book(1, "h");
                let mut learnt: BTreeMap<IpAddr, MacAddress> = BTreeMap::new();
                for vm in &book.vms {
                    prop_assert!(book.left.iter().all(|left| left.vm_id != vm.vm_id));
                    for card in &vm.cards {
                        prop_assert!(card.ips.len() <= MOST_IPS);
                        for found in card.ips.iter().filter(|found| is_learnt(found.from)) {
                            let owner = learnt.insert(found.ip, card.mac);
                            prop_assert!(owner.is_none_or(|owner| owner == card.mac));
                        }
                    }
                }
                for conflict in &book.conflicts {
                    prop_assert!(conflict.vm_names.len() > 1);
                    prop_assert!(conflict.vm_names.iter().all(|name| book.vms.iter().any(|vm| vm.vm_name == *name)));
                }
                let text = serde_json::to_string(&book).unwrap();
                let read: AddressBook = serde_json::from_str(&text).unwrap();
                prop_assert_eq!(&Directory::restore(read.clone()).book(1, "h"), &book);
                prop_assert_eq!(read, book);
            }
        }

        /// A VM that answers for every address there is fills no memory.
        #[test]
        fn nobody_fills_the_map(numbers in prop::collection::vec(any::<u32>(), 0..2000)) {
            let mut directory = Directory::default();
            directory.arrive(vm(1, 1, 1, &[1]));
            for number in numbers {
                let ip = std::net::Ipv4Addr::from(number);
                directory.learn(mac(1), ip.into(), LearntFrom::NeighbourTable, None);
            }
            let book = directory.book(1, "h");
            prop_assert!(book.vms[0].cards[0].ips.len() <= MOST_IPS);
            prop_assert!(book.vms[0].cards[0].ips.iter().any(|found| found.from == LearntFrom::Configuration));
            for n in 0..=u8::MAX {
                directory.leave(LeftVm { vm_id: VmId(uuid::Uuid::from_u128(1000 + u128::from(n))), ..left(1) });
                directory.leave(LeftVm { vm_id: VmId(uuid::Uuid::from_u128(9000 + u128::from(n))), ..left(1) });
            }
            prop_assert_eq!(directory.book(1, "h").left.len(), MOST_LEFT);
        }
    }
}
