//! Whether a tunnel is still needed: whether the VM's addresses have been moved away from behind it.
//!
//! Owns the rule. An address is away when, look after look, either somebody else answers for it in the VM's LAN, or nobody does behind a tunnel that is known to work: then the guest has given it up. Silence
//! of a tunnel that does not work says nothing, nor does a guest that misses a few questions. Must not know how anybody is asked.

use std::collections::BTreeMap;
use std::net::IpAddr;

use crate::model::MacAddress;

/// So many looks in a row must say the same.
pub const LOOKS: u32 = 5;

/// What one look has found of one address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Found {
    /// The VM itself answered, through the tunnel.
    pub behind: bool,
    /// Who else answered for it in the LAN.
    pub elsewhere: Option<MacAddress>,
}

/// What the looks so far have found.
#[derive(Clone, Debug)]
pub struct Moved {
    away: BTreeMap<IpAddr, u32>,
}

impl Moved {
    /// Nobody has looked yet.
    pub fn new(ips: impl IntoIterator<Item = IpAddr>) -> Self {
        Self { away: ips.into_iter().map(|ip| (ip, 0)).collect() }
    }

    /// Takes one look: whether the other end of the tunnel answered, and what was found of each address.
    pub fn look(&mut self, tunnel_works: bool, found: &BTreeMap<IpAddr, Found>) {
        for (ip, looks) in &mut self.away {
            let away = match found.get(ip) {
                Some(Found { behind: true, .. }) | None => false,
                Some(Found { elsewhere: Some(_), .. }) => true,
                Some(Found { elsewhere: None, .. }) => tunnel_works,
            };
            *looks = if away { (*looks + 1).min(LOOKS) } else { 0 };
        }
    }

    /// Whether nothing is left for the tunnel to carry. Never without an address.
    pub fn is_over(&self) -> bool {
        !self.away.is_empty() && self.away.values().all(|&looks| looks >= LOOKS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SILENT: Found = Found { behind: false, elsewhere: None };

    fn ips() -> [IpAddr; 2] {
        ["10.0.0.1", "fd00::1"].map(|ip| ip.parse().unwrap())
    }

    /// Whether it is over after so many looks that all find the same.
    fn after(looks: u32, works: bool, found: [Found; 2]) -> bool {
        let mut moved = Moved::new(ips());
        let found = ips().into_iter().zip(found).collect();
        (0..looks).for_each(|_| moved.look(works, &found));
        moved.is_over()
    }

    #[test]
    fn addresses_that_the_guest_has_given_up_are_away() {
        assert!(after(LOOKS, true, [SILENT; 2]));
        assert!(!after(LOOKS - 1, true, [SILENT; 2]), "too soon");
        assert!(!after(LOOKS, false, [SILENT; 2]), "a tunnel that does not work");
        let behind = Found { behind: true, elsewhere: None };
        assert!(!after(LOOKS, true, [SILENT, behind]), "one is still there");
        assert!(!Moved::new([]).is_over(), "none is known");
    }

    #[test]
    fn an_address_that_another_has_is_away_whatever_the_tunnel_does() {
        let taken = Found { behind: false, elsewhere: Some("02:00:00:00:00:09".parse().unwrap()) };
        assert!(after(LOOKS, false, [taken; 2]));
        let both = Found { behind: true, ..taken };
        assert!(!after(LOOKS, true, [both; 2]), "a conflict, which is for an operator to settle");
    }

    #[test]
    fn one_answer_begins_the_count_anew() {
        let mut moved = Moved::new(ips());
        let all = |found: Found| ips().into_iter().map(|ip| (ip, found)).collect();
        (1..LOOKS).for_each(|_| moved.look(true, &all(SILENT)));
        moved.look(true, &all(Found { behind: true, elsewhere: None }));
        (1..LOOKS).for_each(|_| moved.look(true, &all(SILENT)));
        assert!(!moved.is_over());
        moved.look(true, &all(SILENT));
        assert!(moved.is_over());
        moved.look(true, &BTreeMap::new());
        assert!(!moved.is_over(), "what was not looked for is not known to be away");
    }
}
