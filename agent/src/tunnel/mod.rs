//! Tunnels: what each end is made of, in which order, and how all of that is undone.
//!
//! Policy over [`crate::port::Wires`]. One list of steps for each end is what is done from its beginning when the tunnel is laid, and undone from its end when it is taken down or when a step fails, so the
//! two can never differ. Must not know netlink, files or migrations.
//!
//! - [`echo`]: the frames by which one end finds out whether the other one answers;
//! - [`moved`]: whether a tunnel is still needed.

pub mod echo;
pub mod moved;

use std::net::IpAddr;

use crate::model::tunnel::{VXLAN_PORT, overhead_bytes};
use crate::model::{MacAddress, TunnelEntry, TunnelLine, TunnelSide, WireguardEnd};
use crate::port::{VxlanDevice, WireError, WireguardDevice, Wires};

/// One thing that is done when an end is made.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step<'a> {
    /// What the devices send through.
    Wireguard(WireguardDevice),
    /// The new host's own bridge for the VM.
    Bridge { name: &'a str, mtu_bytes: u32 },
    /// The device.
    Device(VxlanDevice),
    /// The device becomes a port of the bridge.
    Join { device: &'a str, bridge: &'a str, answers: bool },
    /// The VM's tap goes from the bridge that it was in to the tunnel's.
    Take { tap: &'a str, from: &'a str, to: &'a str },
    /// The former host answers for an address of the VM.
    Know { bridge: &'a str, ip: IpAddr, mac: MacAddress },
}

impl Step<'_> {
    fn do_it(&self, wires: &mut dyn Wires) -> Result<(), WireError> {
        match self {
            Self::Wireguard(device) => wires.make_wireguard(device),
            Self::Bridge { name, mtu_bytes } => wires.make_bridge(name, *mtu_bytes),
            Self::Device(device) => wires.make_vxlan(device),
            Self::Join { device, bridge, answers } => wires.join(device, bridge, *answers),
            Self::Take { tap, from, to } => {
                if !from.is_empty() {
                    wires.leave(tap, from)?;
                }
                let joined = wires.join(tap, to, false);
                // It must not hang between the two.
                if joined.is_err() && !from.is_empty() {
                    wires.join(tap, from, false)?;
                }
                joined
            }
            Self::Know { bridge, ip, mac } => {
                // Without IPv6 on the bridge, say: the VM answers for itself then, through the tunnel.
                if let Err(error) = wires.know(bridge, *ip, *mac) {
                    tracing::warn!("{bridge} will not answer for {ip}, the VM does so itself: {error}");
                }
                Ok(())
            }
        }
    }

    fn undo(&self, wires: &mut dyn Wires) -> Result<(), WireError> {
        match self {
            Self::Wireguard(device) => wires.remove(&device.name),
            Self::Bridge { name, .. } => wires.remove(name),
            Self::Device(device) => wires.remove(&device.name),
            Self::Join { device, bridge, .. } => wires.leave(device, bridge),
            // A tap that is gone, or that somebody has put elsewhere since, is no business of the tunnel's any more.
            Self::Take { tap, from, to } => match wires.bridge_of(tap) {
                Ok(Some(now)) if now == *to => {
                    wires.leave(tap, to)?;
                    if from.is_empty() { Ok(()) } else { wires.join(tap, from, false) }
                }
                Ok(_) | Err(_) => Ok(()),
            },
            Self::Know { bridge, ip, mac } => wires.forget(bridge, *ip, *mac),
        }
    }
}

fn steps<'a>(entry: &'a TunnelEntry, line: &'a TunnelLine) -> Vec<Step<'a>> {
    let (device, bridge) = (line.device.as_str(), line.bridge.as_str());
    let (local, remote, port, through) = match &entry.wireguard {
        Some(inside) => (inside.local.into(), inside.remote.into(), VXLAN_PORT, Some(inside.device.clone())),
        None => (entry.local, entry.remote, entry.port, None),
    };
    let (name, vni, mtu_bytes) = (line.device.clone(), line.vni, line.lan_mtu_bytes);
    let made = Step::Device(VxlanDevice { name, vni, local, remote, port, through, mtu_bytes });
    match entry.side {
        TunnelSide::Former => {
            let mut steps = vec![made, Step::Join { device, bridge, answers: true }];
            steps.extend(line.ips.iter().map(|&ip| Step::Know { bridge, ip, mac: line.mac }));
            steps
        }
        TunnelSide::New => vec![
            Step::Bridge { name: bridge, mtu_bytes: line.lan_mtu_bytes },
            made,
            Step::Join { device, bridge, answers: false },
            Step::Take { tap: &line.tap, from: &line.taken_from, to: bridge },
        ],
    }
}

/// The device that all of a tunnel's packets go through. It takes the largest that the LANs have: how large they may be is said of the other host, not of the device, since who sends larger ones is told so only then
/// (a VXLAN device is never larger than what it sends through, and a bridge drops without a word what is larger than its port).
fn wireguard(entry: &TunnelEntry, end: &WireguardEnd) -> WireguardDevice {
    let largest = entry.lines.iter().map(|line| line.lan_mtu_bytes).max().unwrap_or_default();
    WireguardDevice {
        name: end.device.clone(),
        port: entry.port,
        local: end.local,
        remote: end.remote,
        mtu_bytes: end.mtu_bytes,
        device_mtu_bytes: end.mtu_bytes.max(largest + overhead_bytes(end.remote.into())),
    }
}

fn all_steps(entry: &TunnelEntry) -> Vec<Step<'_>> {
    let through = entry.wireguard.iter().map(|end| Step::Wireguard(wireguard(entry, end)));
    through.chain(entry.lines.iter().flat_map(|line| steps(entry, line))).collect()
}

/// Makes one end.
///
/// # Errors
/// What could not be made; everything is as it was before, or the error says what is not.
pub fn lay(wires: &mut dyn Wires, entry: &TunnelEntry) -> Result<(), WireError> {
    let steps = all_steps(entry);
    for (index, step) in steps.iter().enumerate() {
        let Err(error) = step.do_it(wires) else { continue };
        let left = undo(wires, &steps[..index]);
        return Err(if left.is_empty() {
            error
        } else {
            WireError(format!("{error}; left behind: {}", left.join("; ")))
        });
    }
    Ok(())
}

/// Takes one end down, as much of it as is there; what could not be taken down, in words.
pub fn take_down(wires: &mut dyn Wires, entry: &TunnelEntry) -> Vec<String> {
    undo(wires, &all_steps(entry))
}

fn undo(wires: &mut dyn Wires, done: &[Step<'_>]) -> Vec<String> {
    done.iter().rev().filter_map(|step| step.undo(wires).err()).map(|error| error.to_string()).collect()
}

/// At the former host, when the VM runs at the new one: its LAN sends to it there from now on, whether it says anything or not.
///
/// # Errors
/// The bridge cannot be told. It learns by itself when the VM sends.
pub fn turn(wires: &mut dyn Wires, entry: &TunnelEntry) -> Result<(), WireError> {
    entry.lines.iter().try_for_each(|line| wires.point(line.mac, &line.device))
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::model::tunnel::inner_pair;
    use crate::model::{MigrationId, VmId, Vni, WireguardKey};
    use crate::port::WireguardPeer;

    /// A host's interfaces; refuses one of the changes.
    #[derive(Clone, Debug, Default, PartialEq, Eq)]
    struct Host {
        interfaces: BTreeSet<String>,
        masters: BTreeMap<String, String>,
        known: BTreeSet<(String, IpAddr, MacAddress)>,
        /// What sends through what.
        through: BTreeMap<String, String>,
        pointed: BTreeMap<String, String>,
    }

    struct Fake {
        host: Host,
        changes: u32,
        refuse: Option<u32>,
        /// The VM's addresses cannot be known.
        knows_nothing: bool,
    }

    impl Fake {
        fn new(host: Host, refuse: Option<u32>) -> Self {
            Self { host, changes: 0, refuse, knows_nothing: false }
        }

        fn change(&mut self) -> Result<(), WireError> {
            self.changes += 1;
            if self.refuse == Some(self.changes) { Err(WireError("refused".to_owned())) } else { Ok(()) }
        }

        fn make(&mut self, name: &str) -> Result<(), WireError> {
            self.change()?;
            let fresh = self.host.interfaces.insert(name.to_owned());
            if fresh { Ok(()) } else { Err(WireError(format!("{name} is there already"))) }
        }
    }

    impl Wires for Fake {
        fn make_vxlan(&mut self, device: &VxlanDevice) -> Result<(), WireError> {
            self.make(&device.name)?;
            if let Some(through) = &device.through {
                assert!(self.host.interfaces.contains(through), "{device:?} before {through}");
                self.host.through.insert(device.name.clone(), through.clone());
            }
            Ok(())
        }

        fn make_wireguard(&mut self, device: &WireguardDevice) -> Result<(), WireError> {
            self.make(&device.name)
        }

        fn key_of(&mut self, _device: &str) -> Result<WireguardKey, WireError> {
            Ok(WireguardKey([1; 32]))
        }

        fn meet(&mut self, _device: &str, _peer: &WireguardPeer) -> Result<(), WireError> {
            Ok(())
        }

        fn make_bridge(&mut self, name: &str, _mtu_bytes: u32) -> Result<(), WireError> {
            self.make(name)
        }

        fn remove(&mut self, name: &str) -> Result<(), WireError> {
            assert!(!self.host.through.values().any(|through| through == name), "{name} is still needed");
            self.host.through.remove(name);
            self.host.interfaces.remove(name);
            self.host.masters.retain(|port, bridge| port != name && bridge != name);
            Ok(())
        }

        fn join(&mut self, port: &str, bridge: &str, _answers: bool) -> Result<(), WireError> {
            self.change()?;
            if !self.host.interfaces.contains(bridge) || self.host.masters.contains_key(port) {
                return Err(WireError(format!("{port} cannot join {bridge}")));
            }
            self.host.masters.insert(port.to_owned(), bridge.to_owned());
            Ok(())
        }

        fn leave(&mut self, port: &str, bridge: &str) -> Result<(), WireError> {
            if self.host.masters.get(port).is_some_and(|master| master == bridge) {
                self.host.masters.remove(port);
            }
            Ok(())
        }

        fn bridge_of(&mut self, port: &str) -> Result<Option<String>, WireError> {
            if self.host.interfaces.contains(port) {
                Ok(self.host.masters.get(port).cloned())
            } else {
                Err(WireError(format!("no {port}")))
            }
        }

        fn know(&mut self, bridge: &str, ip: IpAddr, mac: MacAddress) -> Result<(), WireError> {
            if self.knows_nothing {
                return Err(WireError("no IPv6".to_owned()));
            }
            self.host.known.insert((bridge.to_owned(), ip, mac));
            Ok(())
        }

        fn forget(&mut self, bridge: &str, ip: IpAddr, mac: MacAddress) -> Result<(), WireError> {
            self.host.known.remove(&(bridge.to_owned(), ip, mac));
            Ok(())
        }

        fn point(&mut self, mac: MacAddress, port: &str) -> Result<(), WireError> {
            self.host.pointed.insert(mac.to_string(), port.to_owned());
            Ok(())
        }
    }

    fn entry(side: TunnelSide) -> TunnelEntry {
        let line = |number: u32, taken_from: &str| TunnelLine {
            device: format!("dln-{number}"),
            vni: Vni::new(number).unwrap(),
            tap: format!("tap{number}"),
            bridge: if side == TunnelSide::Former { "lan".to_owned() } else { format!("dlb-{number}") },
            taken_from: if side == TunnelSide::Former { String::new() } else { taken_from.to_owned() },
            mac: format!("02:00:00:00:00:{number:02x}").parse().unwrap(),
            ips: vec![format!("10.0.0.{number}").parse().unwrap(), format!("fd00::{number}").parse().unwrap()],
            lan_mtu_bytes: 1500,
        };
        TunnelEntry {
            id: "1".to_owned(),
            vm_id: VmId::random(),
            vm_name: "vm".parse().unwrap(),
            migration_id: MigrationId::random(),
            side,
            local: "192.0.2.1".parse().unwrap(),
            remote: "198.51.100.1".parse().unwrap(),
            port: 4789,
            wireguard: None,
            mtu_bytes: 1450,
            since_unix_ms: 0,
            boot_id: String::new(),
            namespace: 0,
            state_dir: "/".into(),
            lines: vec![line(1, "lan"), line(2, "")],
        }
    }

    /// The same inside WireGuard.
    fn secret(side: TunnelSide) -> TunnelEntry {
        let [local, remote] = inner_pair(1);
        let end = WireguardEnd { device: "dlw-1".to_owned(), local, remote, mtu_bytes: 1440 };
        TunnelEntry { port: 51_820, wireguard: Some(end), ..entry(side) }
    }

    /// Two taps, one of them in the LAN's bridge.
    fn host() -> Host {
        Host {
            interfaces: ["lan", "tap1", "tap2"].map(str::to_owned).into(),
            masters: [("tap1".to_owned(), "lan".to_owned())].into(),
            ..Host::default()
        }
    }

    #[test]
    fn the_former_host_has_a_port_in_the_lan_that_its_bridge_answers_for() {
        let (entry, mut wires) = (entry(TunnelSide::Former), Fake::new(host(), None));
        lay(&mut wires, &entry).unwrap();
        assert_eq!(wires.host.masters["dln-1"], "lan");
        assert_eq!(wires.host.masters["tap1"], "lan", "the VM is still there");
        assert_eq!(wires.host.known.len(), 4);
        turn(&mut wires, &entry).unwrap();
        assert_eq!(wires.host.pointed["02:00:00:00:00:02"], "dln-2");
    }

    #[test]
    fn the_new_host_has_the_tap_alone_with_the_tunnel() {
        let (entry, mut wires) = (entry(TunnelSide::New), Fake::new(host(), None));
        lay(&mut wires, &entry).unwrap();
        for number in [1, 2] {
            assert_eq!(wires.host.masters[&format!("tap{number}")], format!("dlb-{number}"));
            assert_eq!(wires.host.masters[&format!("dln-{number}")], format!("dlb-{number}"));
        }
    }

    #[test]
    fn whatever_is_refused_everything_is_as_it_was() {
        let sides = [TunnelSide::Former, TunnelSide::New];
        for entry in sides.iter().flat_map(|&side| [entry(side), secret(side)]) {
            let side = entry.side;
            let mut whole = Fake::new(host(), None);
            lay(&mut whole, &entry).unwrap();
            for refused in 1..=whole.changes {
                let mut wires = Fake::new(host(), Some(refused));
                let error = lay(&mut wires, &entry).unwrap_err().to_string();
                assert_eq!((wires.host, error.as_str()), (host(), "refused"), "{side}: change {refused}");
            }
            assert_eq!(take_down(&mut whole, &entry), Vec::<String>::new());
            assert_eq!(whole.host, host(), "{side}");
            assert_eq!(take_down(&mut whole, &entry), Vec::<String>::new(), "again");
            assert_eq!(whole.host, host(), "{side}: again");
        }
    }

    #[test]
    fn inside_wireguard_all_packets_go_through_its_device_and_to_nobody_else() {
        let (entry, mut wires) = (secret(TunnelSide::New), Fake::new(host(), None));
        lay(&mut wires, &entry).unwrap();
        let through = ["dln-1", "dln-2"].map(|device| (device.to_owned(), "dlw-1".to_owned()));
        assert_eq!(wires.host.through, through.into());
        for step in all_steps(&entry) {
            match step {
                Step::Device(device) => {
                    let [local, remote] = inner_pair(1).map(IpAddr::V4);
                    assert_eq!((device.local, device.remote, device.port), (local, remote, 4789));
                }
                Step::Wireguard(device) => {
                    assert_eq!((device.port, device.mtu_bytes, device.device_mtu_bytes), (51_820, 1440, 1550));
                }
                _ => {}
            }
        }
    }

    #[test]
    fn another_ones_device_is_left_alone() {
        let mut host = host();
        host.interfaces.insert("dln-2".to_owned());
        let mut wires = Fake::new(host.clone(), None);
        lay(&mut wires, &entry(TunnelSide::New)).unwrap_err();
        assert_eq!(wires.host, host);
    }

    #[test]
    fn a_tap_that_is_gone_or_elsewhere_is_left_alone() {
        let (entry, mut wires) = (entry(TunnelSide::New), Fake::new(host(), None));
        lay(&mut wires, &entry).unwrap();
        wires.remove("tap1").unwrap();
        wires.leave("tap2", "dlb-2").unwrap();
        wires.join("tap2", "lan", false).unwrap();
        assert_eq!(take_down(&mut wires, &entry), Vec::<String>::new());
        assert_eq!(wires.host.masters, [("tap2".to_owned(), "lan".to_owned())].into());
    }

    #[test]
    fn a_bridge_that_is_gone_is_said_and_the_rest_is_taken_down() {
        let (entry, mut wires) = (entry(TunnelSide::New), Fake::new(host(), None));
        lay(&mut wires, &entry).unwrap();
        wires.host.interfaces.remove("lan");
        assert_eq!(take_down(&mut wires, &entry), ["tap1 cannot join lan"]);
        assert_eq!(wires.host.interfaces, ["tap1", "tap2"].map(str::to_owned).into());
    }

    #[test]
    fn a_host_that_cannot_answer_for_the_vm_carries_it_all_the_same() {
        let (entry, mut wires) = (entry(TunnelSide::Former), Fake::new(host(), None));
        wires.knows_nothing = true;
        lay(&mut wires, &entry).unwrap();
        assert_eq!(wires.host.masters["dln-1"], "lan");
    }
}
