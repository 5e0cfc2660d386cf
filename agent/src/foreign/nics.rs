//! The network cards of a VM that another VMM runs: which tap, which Ethernet address.
//!
//! Owns what `/proc/PID/fdinfo` says of tap descriptors, what command lines say of cards, and QEMU's `info network`. Every word is a VMM's or an operator's: it is read
//! within bounds, and an address or a name that can be none is left out.

use std::collections::BTreeMap;
use std::fs;
use std::io;

use serde_json::Value;

use crate::model::MacAddress;

/// A VM has no more cards than this; others are left out.
const MOST_CARDS: usize = 1024;

/// One network card, as far as it is known.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Card {
    /// The tap behind it.
    pub tap: Option<String>,
    /// Its address; the guest may have chosen another one.
    pub mac: Option<MacAddress>,
}

/// The taps that a process holds open, by descriptor: `iff:` in `/proc/PID/fdinfo` (drivers/net/tun.c, tun_chr_show_fdinfo).
///
/// # Errors
/// The process is gone, or may not be looked at.
pub fn taps(pid: u32) -> io::Result<BTreeMap<i32, String>> {
    let mut taps = BTreeMap::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fdinfo"))?.flatten() {
        let Some(number) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
        let Ok(text) = fs::read_to_string(entry.path()) else { continue };
        if let Some(name) =
            text.lines().find_map(|line| line.strip_prefix("iff:")).map(str::trim).filter(|n| is_name(n))
        {
            taps.insert(number, name.to_owned());
        }
    }
    Ok(taps)
}

/// Whether an interface can be called so. A tap descriptor that has no interface yet has an empty name.
fn is_name(name: &str) -> bool {
    (1..16).contains(&name.len()) && !name.contains(['/', '\0']) && !name.chars().any(char::is_whitespace)
}

/// What a command line says of its VM's cards. `taps` are those that the process holds, by descriptor.
pub fn of_command(vmm: &str, command: &[String], taps: &BTreeMap<i32, String>) -> Vec<Card> {
    let values = |options: &'static [&'static str]| {
        command.windows(2).filter_map(move |pair| {
            let name = pair[0].strip_prefix("--").or_else(|| pair[0].strip_prefix('-'))?;
            options.contains(&name).then(|| (name, Fields::read(&pair[1])))
        })
    };
    let mut cards: Vec<Card> = match vmm {
        "qemu" => {
            // A backend by its name, and the cards that name it.
            let backends: Vec<Fields> = values(&["netdev"]).map(|(_, fields)| fields).collect();
            let mut cards: Vec<Card> = values(&["device"])
                .filter_map(|(_, card)| {
                    let netdev = card.get("netdev")?;
                    let backend = backends.iter().find(|backend| backend.get("id") == Some(netdev));
                    Some(Card { tap: backend.and_then(|backend| backend.tap(taps)), mac: card.mac() })
                })
                .collect();
            cards.extend(values(&["nic"]).map(|(_, fields)| Card { tap: fields.tap(taps), mac: fields.mac() }));
            cards
        }
        "cloud-hypervisor" | "crosvm" => {
            values(&["net"]).map(|(_, fields)| Card { tap: fields.tap(taps), mac: fields.mac() }).collect()
        }
        _ => Vec::new(),
    };
    cards.retain(|card| card.tap.is_some() || card.mac.is_some());
    cards.truncate(MOST_CARDS);
    cards
}

/// One option's value: `type,key=value,…`, or a JSON object as libvirt writes it.
struct Fields(Vec<(String, String)>);

impl Fields {
    fn read(text: &str) -> Self {
        if let Ok(Value::Object(object)) = serde_json::from_str(text) {
            let word = |value: Value| match value {
                Value::String(text) => Some(text),
                Value::Number(number) => Some(number.to_string()),
                _ => None,
            };
            return Self(object.into_iter().filter_map(|(key, value)| Some((key, word(value)?))).collect());
        }
        let pair = |part: &str| part.split_once('=').map(|(key, value)| (key.to_owned(), value.to_owned()));
        Self(text.split(',').filter_map(pair).collect())
    }

    fn get(&self, key: &str) -> Option<&str> {
        self.0.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    fn mac(&self) -> Option<MacAddress> {
        self.get("mac").or_else(|| self.get("macaddr"))?.parse().ok()
    }

    /// The tap by its name, or by a descriptor that the VMM was given (`fd=7`, `fds=7:8`).
    fn tap(&self, taps: &BTreeMap<i32, String>) -> Option<String> {
        let named = ["ifname", "tap", "tap-name"].iter().find_map(|key| self.get(key)).filter(|name| is_name(name));
        let given = || {
            let first = self.get("fd").or_else(|| self.get("fds"))?.split(':').next()?;
            taps.get(&first.parse().ok()?).cloned()
        };
        named.map(str::to_owned).or_else(given)
    }
}

/// The cards that QEMU's `info network` (HMP) tells of:
///
/// ```text
/// net0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56
///  \ n0: index=0,type=tap,ifname=tap0,script=no,downscript=no
/// ```
pub fn of_info_network(text: &str, taps: &BTreeMap<i32, String>) -> Vec<Card> {
    let mut cards: Vec<Card> = Vec::new();
    for line in text.lines() {
        let (behind, line) = match line.trim_start().strip_prefix('\\') {
            Some(rest) => (true, rest),
            None => (false, line),
        };
        let Some((_, fields)) = line.split_once(": ") else { continue };
        let fields = Fields::read(fields.trim());
        match (behind, fields.get("type")) {
            (false, Some("nic")) if cards.len() < MOST_CARDS => cards.push(Card { tap: None, mac: fields.mac() }),
            (true, Some("tap")) => {
                if let Some(card) = cards.last_mut() {
                    card.tap = fields.tap(taps);
                }
            }
            _ => {}
        }
    }
    cards.retain(|card| card.tap.is_some() || card.mac.is_some());
    cards
}

/// Reads any text as a command line and as a monitor's answer.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz(input: &[u8]) {
    let Ok(text) = std::str::from_utf8(input) else { return };
    let taps = BTreeMap::from([(7, "tap7".to_owned())]);
    let command: Vec<String> = text.split('\n').map(str::to_owned).collect();
    let mut cards = of_info_network(text, &taps);
    for vmm in ["qemu", "cloud-hypervisor", "other"] {
        cards.extend(of_command(vmm, &command, &taps));
    }
    assert!(cards.iter().all(|card| card.tap.as_deref().is_none_or(is_name)), "{cards:?}");
}

/// A command line and an answer.
#[cfg(any(test, feature = "fuzz"))]
pub(crate) fn fuzz_seeds() -> Vec<Vec<u8>> {
    let command = "qemu-system-x86_64\n-netdev\ntap,id=n0,fd=7\n-device\nvirtio-net-pci,netdev=n0,mac=52:54:00:12:34:56\n\
                   -nic\ntap,ifname=tap1,mac=52:54:00:12:34:57";
    let answer =
        "net0: index=0,type=nic,macaddr=52:54:00:12:34:56\r\n \\ n0: index=0,type=tap,ifname=tap0,script=no\r\n";
    [command, answer].map(|text| text.as_bytes().to_vec()).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(tap: &str, mac: &str) -> Card {
        Card { tap: (!tap.is_empty()).then(|| tap.to_owned()), mac: mac.parse().ok() }
    }

    fn of(vmm: &str, line: &str) -> Vec<Card> {
        let taps = BTreeMap::from([(23, "vnet5".to_owned())]);
        of_command(vmm, &line.split_whitespace().map(str::to_owned).collect::<Vec<_>>(), &taps)
    }

    #[test]
    fn command_lines_name_cards() {
        let mac = "52:54:00:12:34:56";
        for (vmm, line, wanted) in [
            (
                "qemu",
                format!("qemu -device virtio-net-pci,netdev=n0,mac={mac} -netdev tap,id=n0,ifname=tap0,script=no"),
                vec![card("tap0", mac)],
            ),
            // As libvirt starts it: descriptors, JSON.
            (
                "qemu",
                format!(
                    r#"qemu -netdev {{"type":"tap","fd":"23","vhost":true,"id":"hostnet0"}} -device {{"driver":"virtio-net-pci","netdev":"hostnet0","mac":"{mac}"}}"#
                ),
                vec![card("vnet5", mac)],
            ),
            ("qemu", format!("qemu -nic tap,ifname=t1,macaddr={mac} -nic user"), vec![card("t1", mac)]),
            ("qemu", format!("qemu -device e1000,netdev=nobody,mac={mac}"), vec![card("", mac)]),
            ("qemu", "qemu -device virtio-blk,drive=d -netdev user,id=n0".to_owned(), vec![]),
            ("cloud-hypervisor", format!("cloud-hypervisor --net tap=ch0,mac={mac}"), vec![card("ch0", mac)]),
            ("firecracker", "firecracker --net tap=x".to_owned(), vec![]),
            ("qemu", "qemu -nic tap,ifname=../../etc,mac=01:00:00:00:00:00".to_owned(), vec![]),
            ("qemu", "qemu -nic tap,ifname=averyveryverylongname -nic tap,ifname=".to_owned(), vec![]),
        ] {
            assert_eq!(of(vmm, &line), wanted, "{line}");
        }
    }

    #[test]
    fn a_monitor_names_cards() {
        let text = "net0: index=0,type=nic,model=virtio-net-pci,macaddr=52:54:00:12:34:56\r\n \\ n0: index=0,type=tap,ifname=tap0,script=no\r\n\
                    net1: index=0,type=nic,model=e1000,macaddr=52:54:00:12:34:57\r\n \\ n1: index=0,type=user,net=10.0.2.0\r\nhub 0\r\n";
        let wanted = [card("tap0", "52:54:00:12:34:56"), card("", "52:54:00:12:34:57")];
        assert_eq!(of_info_network(text, &BTreeMap::new()), wanted);
    }

    #[test]
    fn descriptors_of_other_kinds_are_no_taps() {
        assert!(taps(std::process::id()).is_ok());
        assert!(taps(u32::MAX).is_err());
    }
}
