//! The addresses of a VM's network cards, gathered from several sources.
//!
//! Owns what is believed, and the bounds: a VM that sends from a million addresses fills no memory and is not announced with them all. Must not know where words come from beyond their names.

use std::net::{IpAddr, Ipv6Addr};

use super::frames;
use super::heard::{Evidence, Heard};
use crate::model::network::{FoundCard, FoundIp, LearntFrom};
use crate::model::{MacAddress, Station, VlanTags};

/// No card has more addresses; others are left out.
pub const MOST_IPS: usize = 64;
/// No VM has more cards.
pub const MOST_CARDS: usize = 1024;

/// The cards of one VM, as far as they are known.
#[derive(Clone, Debug, Default)]
pub struct Learner {
    cards: Vec<FoundCard>,
    frames_heard: u64,
}

impl Learner {
    /// A card behind `tap`.
    pub fn card(&mut self, tap: &str, mac: MacAddress, from: LearntFrom) {
        let known = self.cards.iter().any(|card| card.mac == mac && card.tap == tap);
        if !known && self.cards.len() < MOST_CARDS {
            self.cards.push(FoundCard { tap: tap.to_owned(), mac, from, vlan: None, ips: Vec::new() });
        }
    }

    /// The tags of what the cards that have `mac` send, as far as it is known before a frame is heard.
    pub fn tags(&mut self, mac: MacAddress, vlan: Option<VlanTags>) {
        self.cards.iter_mut().filter(|card| card.mac == mac).for_each(|card| card.vlan = vlan.or(card.vlan));
    }

    /// Whether a card behind `tap` is known.
    pub fn has_card(&self, tap: &str) -> bool {
        self.cards.iter().any(|card| card.tap == tap)
    }

    /// An address of the cards that have `mac`. What is known already stays, but for whether it routes.
    pub fn ip(&mut self, mac: MacAddress, ip: IpAddr, from: LearntFrom, router: Option<bool>) {
        if frames::check(ip).is_err() {
            return;
        }
        for card in self.cards.iter_mut().filter(|card| card.mac == mac) {
            let room = card.ips.len() < MOST_IPS;
            match card.ips.iter_mut().find(|found| found.ip == ip) {
                // The newest word counts: a guest may have begun to route.
                Some(found) => found.router = router.or(found.router),
                None if room => card.ips.push(FoundIp { ip, from, router }),
                None => {}
            }
        }
    }

    /// A frame that came out of `tap`.
    pub fn hear(&mut self, tap: &str, heard: &Heard) {
        self.frames_heard += 1;
        // A tap of which nobody named the card's address: whoever sends there is the VM.
        if !self.has_card(tap) || self.cards.iter().any(|card| card.tap == tap && card.from == LearntFrom::Traffic) {
            self.card(tap, heard.mac, LearntFrom::Traffic);
        }
        let Some(card) = self.cards.iter_mut().find(|card| card.tap == tap && card.mac == heard.mac) else { return };
        card.vlan = heard.vlan;
        let Some((ip, evidence)) = heard.ip else { return };
        let router = match evidence {
            Evidence::Advertisement { router } => Some(router),
            Evidence::RouterAdvertisement => Some(true),
            Evidence::Arp | Evidence::Source => None,
        };
        self.ip(heard.mac, ip, LearntFrom::Traffic, router);
    }

    /// Frames that were heard.
    pub fn frames_heard(&self) -> u64 {
        self.frames_heard
    }

    /// The cards.
    pub fn cards(&self) -> &[FoundCard] {
        &self.cards
    }
}

/// What a card is announced as.
pub fn station_of(card: &FoundCard) -> Station {
    let mut station =
        Station { vlan: card.vlan, ..Station::new(card.mac, card.ips.iter().map(|found| found.ip).collect()) };
    let routers: Vec<Ipv6Addr> = card
        .ips
        .iter()
        .filter_map(|found| match found.ip {
            IpAddr::V6(ip) if found.router == Some(true) => Some(ip),
            _ => None,
        })
        .collect();
    for ip in routers {
        station.add_router(ip);
    }
    station
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::announce::heard;

    fn mac(text: &str) -> MacAddress {
        text.parse().unwrap()
    }

    #[test]
    fn sources_add_up_and_the_flag_is_kept() {
        let vm = mac("02:00:00:00:00:01");
        let mut learner = Learner::default();
        learner.card("t0", vm, LearntFrom::CommandLine);
        learner.ip(vm, "10.0.0.1".parse().unwrap(), LearntFrom::Given, None);
        learner.ip(mac("02:00:00:00:00:09"), "10.0.0.9".parse().unwrap(), LearntFrom::NeighbourTable, None);
        learner.ip(vm, "127.0.0.1".parse().unwrap(), LearntFrom::NeighbourTable, None);
        let mut hear = |frame: frames::Frame| learner.hear("t0", &heard::read(frame.bytes()).unwrap());
        let router = "fe80::1".parse().unwrap();
        hear(frames::unsolicited_na(vm, router, frames::RouterFlag::Router));
        hear(frames::gratuitous_arp_request(vm, "10.0.0.1".parse().unwrap()));
        // A bridge inside the VM: another station behind its tap is none of the VM's cards.
        hear(frames::gratuitous_arp_request(mac("02:00:00:00:00:08"), "10.0.0.8".parse().unwrap()));
        let [card] = learner.cards() else { panic!("{learner:?}") };
        assert_eq!((card.from, learner.frames_heard()), (LearntFrom::CommandLine, 3));
        let ips: Vec<_> = card.ips.iter().map(|found| (found.ip.to_string(), found.from, found.router)).collect();
        assert_eq!(
            ips,
            [("10.0.0.1".to_owned(), LearntFrom::Given, None), ("fe80::1".to_owned(), LearntFrom::Traffic, Some(true))]
        );
        assert_eq!(station_of(card).routers, [router]);
    }

    #[test]
    fn a_tap_without_a_name_is_known_by_what_it_sends_and_nobody_fills_the_memory() {
        let mut learner = Learner::default();
        for k in 0..5000u32 {
            let ip = std::net::Ipv4Addr::from(0x0a00_0001 + k);
            let frame = frames::gratuitous_arp_request(mac("02:00:00:00:00:01"), ip).tagged("42".parse().ok());
            learner.hear("t0", &heard::read(frame.bytes()).unwrap());
        }
        let [card] = learner.cards() else { panic!() };
        assert_eq!((card.ips.len(), card.from, card.vlan), (MOST_IPS, LearntFrom::Traffic, "42".parse().ok()));
        for k in 0..5000u32 {
            let [.., a, b] = k.to_be_bytes();
            let station = MacAddress::new([2, 0, 0, 1, a, b]).unwrap();
            learner.hear("t0", &heard::read(frames::rarp(station).bytes()).unwrap());
        }
        assert_eq!(learner.cards().len(), MOST_CARDS);
    }
}
